"""Throughput of jobs/interpolate.py with Ray workers, next to one process.

    python benchmarks/bulk.py [MODEL] [--pairs 40] [--frames 15] [--size 256] [--workers 1 2]

Makes clips of pairs from the built-in test split, in this process with one thread, and in actors with one CPU each.
Prints pairs per second of wall time, which includes the start of the actors, and of the time in which they worked; and
whether a second start of the job makes nothing.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import ray
import torch
from PIL import Image

from giffy_ray.config import ClipConfig, SyntheticConfig
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.synthetic import dataset
from giffy_ray.inference.bulk import BulkResult, ClipOptions, interpolate_pairs


def write_pairs(folder: Path, count: int, size: int) -> None:
    """Writes the first frame of held-out clips and the one a second later, NAME_a.png and NAME_b.png."""
    settings = SyntheticConfig(training_clips=1, validation_clips=1, test_clips=-(-count // 2))
    videos = [video for video in dataset.plan_videos(settings) if video.split == "test"][:count]
    clip = ClipConfig(frames=2, fps=1, height=size, width=size)
    folder.mkdir()
    for video in videos:
        for side, frame in zip("ab", decode_clip(dataset.render_video(video), clip), strict=True):
            Image.fromarray(frame).save(folder / f"{Path(video.name).stem}_{side}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="between")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--frames", type=int, default=15)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        write_pairs(Path(folder, "pairs"), arguments.pairs, arguments.size)
        ray.init(
            address="local",
            num_cpus=max(arguments.workers),
            include_dashboard=False,
            _temp_dir=folder,
            logging_level=logging.ERROR,
        )
        torch.set_num_threads(1)
        options = ClipOptions(frames=arguments.frames)
        rates = {}
        for workers in (0, *arguments.workers):
            output = f"{folder}/clips-{workers}"
            begin_s = time.perf_counter()
            result = interpolate_pairs(f"{folder}/pairs", output, arguments.model, options, workers=workers)
            wall_s = time.perf_counter() - begin_s
            rates[workers] = report(workers, result, wall_s)
            again = interpolate_pairs(f"{folder}/pairs", output, arguments.model, options, workers=0)
            assert (again.made, again.kept) == (0, result.made)
        for workers in arguments.workers:
            print(f"{workers} workers work {rates[workers] / rates[0]:.2f} times as fast as one process")
        ray.shutdown()


def report(workers: int, result: BulkResult, wall_s: float) -> float:
    """Prints the throughput of a job. Returns pairs per second of work."""
    busy_s = sum(row.seconds for row in result.rows) / max(workers, 1)
    name = f"{workers} workers" if workers else "one process"
    print(
        f"{name}: {result.made} pairs in {wall_s:.1f} s, {result.made / wall_s:.2f} per second of wall time, "
        f"{result.made / busy_s:.2f} per second of work",
        flush=True,
    )
    return result.made / busy_s


if __name__ == "__main__":
    main()
