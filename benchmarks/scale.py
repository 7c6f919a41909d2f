"""Measures the work besides decoding that grows with the number of videos: listing, preparing, opening, dealing.

    PYTHONPATH=. python benchmarks/scale.py --rows 10000 100000 1000000

The videos are empty files, and their clips stand-ins: the rows of every 32 point into one small shard. So the figures
hold no decoding and little reading. Opening, the first batch and the epoch are measured in a process of their own;
memory is what it takes beyond its imports: private memory (unique set size), and the part of it that is no file
(anonymous). A million rows take 1 GB of disk below --folder, five GB of memory, and a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import fs

from giffy_ray.config import DataConfig, Experiment, override
from giffy_ray.core.storage import join, write_bytes
from giffy_ray.data import clip_dataset as stores
from giffy_ray.data import shards
from giffy_ray.data.catalog import Catalog, Video, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import TrainingSampler, rank_indices
from giffy_ray.data.shards import ROW_SCHEMA, SHARD_VIDEOS, DecodeConfig

FRAMES, SIDE, BATCH, EPOCHS = 4, 8, 64, 10
CATEGORIES = 300
VALIDATION_CLIPS = 1000  # that an evaluation looks at


CPU_TIME = "GIFFY_RAY_SCALE_CPU_TIME"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds)."""
    clock = time.process_time if os.environ.get(CPU_TIME) else time.perf_counter
    gc.collect()
    began_s = clock()
    result = work()
    return result, clock() - began_s


def experiment_of(folder: Path) -> Experiment:
    clip = {"clip.frames": FRAMES, "clip.height": SIDE, "clip.width": SIDE}
    return override(Experiment(), {**clip, "data.root": str(folder / "videos"), "storage": str(folder / "runs")})


def make_videos(folder: Path, count: int) -> None:
    """Empty files in folders of classes."""
    for category in range(CATEGORIES):
        place = folder / "videos" / f"category{category:03}"
        place.mkdir(parents=True)
        for number in range(category, count, CATEGORIES):
            os.close(os.open(place / f"a video of some length of name {number:08}.mp4", os.O_CREAT))


def make_store(location: str, catalog: Catalog, experiment: Experiment) -> pa.Table:
    """The recipe and the one shard of a store. Returns an index in which it holds the frames of every clip."""
    shards.write_recipe(location, DecodeConfig(experiment.clip))
    frames = np.random.default_rng(0).integers(0, 256, SHARD_VIDEOS * FRAMES * SIDE * SIDE * 3, np.uint8).tobytes()
    shard = hashlib.sha256(frames).hexdigest()
    write_bytes(shards.shard_path(location, shard), frames)
    identities = [video.identity for video in catalog.videos]
    known = {"shard": shard, "shard_bytes": len(frames), "frames": FRAMES, "padded": 0, "codec": "h264", "hdr": False}
    known |= {"source_width": 320, "source_height": 240, "source_fps": 30.0, "seconds": 3.0}
    columns: dict[str, pa.Array] = {
        "identity": pa.array(identities),
        "sha256": pa.array([hashlib.sha256(identity.encode()).hexdigest() for identity in identities]),
        "first": pa.array(np.arange(len(identities)) % SHARD_VIDEOS * FRAMES),
    }
    for field in ROW_SCHEMA:
        columns.setdefault(field.name, pa.repeat(pa.scalar(known.get(field.name), field.type), len(identities)))
    return pa.table(columns).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def write_listings(location: str, index: pa.Table) -> None:
    """Writes the listings of decode tasks: one for every SHARD_VIDEOS videos."""
    for first in range(0, len(index), SHARD_VIDEOS):
        shards._write_listing(location, index.slice(first, SHARD_VIDEOS))


def catalog_in_memory(folder: Path, count: int) -> Catalog:
    def video_of(number: int) -> Video:
        category = f"category{number * CATEGORIES // count:03}"
        name = f"{category}/a video of some length of name {number:08}.mp4"
        split = "training" if number % 10 else "validation"
        return Video(name, f"{folder}/videos/{name}", category, split, name.removesuffix(".mp4"), 1, 1)

    videos = tuple(video_of(number) for number in range(count))
    return Catalog("videos", f"{folder}/videos", fs.LocalFileSystem(), videos, f"{folder}/videos")


def memory_mb() -> tuple[float, float]:
    """(private, anonymous) of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    anonymous_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return psutil.Process().memory_full_info().uss / 1e6, anonymous_kb * 1024 / 1e6


def open_and_deal(location: str) -> dict[str, float]:
    """Opens a store and deals an epoch, in this process, which should be fresh."""
    before = memory_mb()
    store, open_s = timed(lambda: ClipDataset(location))
    opened = memory_mb()
    dealer, start_s = timed(lambda: TrainingSampler(store, DataConfig(), 0))
    _, batch_s = timed(lambda: dealer(rank_indices(0, BATCH, 0, 1)))
    steps, parts, epoch_s = len(dealer.rows) // BATCH, [], 0.0

    def deal(part: np.ndarray) -> None:
        for step in part.tolist():
            dealer(rank_indices(step, BATCH, 0, 1))

    for part in np.array_split(np.arange(steps), 4):
        epoch_s += timed(lambda part=part: deal(part))[1]
        parts.append(memory_mb())
    return {
        "open_s": open_s,
        "open_private_mb": opened[0] - before[0],
        "open_anonymous_mb": opened[1] - before[1],
        "dealer_batch_s": start_s + batch_s,
        "epoch_s": epoch_s,
        **{f"epoch_{quarter}_private_mb": part[0] - before[0] for quarter, part in enumerate(parts, 1)},
        **{f"epoch_{quarter}_anonymous_mb": part[1] - before[1] for quarter, part in enumerate(parts, 1)},
    }


def start_stream(location: str) -> dict[str, float]:
    """From a store's location to the first batch of a training, through Ray Data; without the start of Ray."""
    import ray

    from giffy_ray.data import loader

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:

        def first_batch() -> None:
            store = ClipDataset(location)
            steps = range(len(store.split_indices("training")) * EPOCHS // BATCH)
            next(loader.batches(store, DataConfig(), 0, BATCH, 0, 1, steps))

        return {f"stream_batch_{again}_s": timed(first_batch)[1] for again in (1, 2)}
    finally:
        ray.shutdown()


def in_fresh_process(what: str, location: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, location]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def measure(count: int, folder: Path, with_files: bool, with_ray: bool) -> dict[str, float]:
    experiment, figures = experiment_of(folder), dict[str, float]()
    location = join(experiment.storage, "stores", DecodeConfig(experiment.clip).key)
    if with_files:
        make_videos(folder, count)
        catalog, figures["list_s"] = timed(lambda: read_catalog(str(folder / "videos"), experiment.data))
    else:
        catalog = catalog_in_memory(folder, count)
    index = make_store(location, catalog, experiment)
    if with_files:
        write_listings(location, index)
        rows, figures["read_rows_s"] = timed(lambda: shards.read_rows(location))
        index, figures["choose_rows_s"] = timed(lambda: shards.choose_rows(rows))
        del rows
    place, figures["write_set_s"] = timed(lambda: stores.write_set(location, catalog, index, experiment.data.limits))
    del catalog, index
    if with_files:
        # All that a job does before and after decoding, and what the next job of the same videos does.
        _, figures["prepare_s"] = timed(lambda: prepare(experiment))
        _, figures["prepare_prepared_s"] = timed(lambda: prepare(experiment))
    store = ClipDataset(place)
    _, figures["count_s"] = timed(store.category_counts)
    figures["set_mb"] = Path(place, "rows.arrow").stat().st_size / 1e6

    def choose() -> list[tuple[str, str, str]]:
        held_out = store.split_indices("validation")
        chosen = np.random.default_rng(0).choice(held_out, min(VALIDATION_CLIPS, len(held_out)), replace=False)
        return [(store.ids[row], store.categories[row], store.sources[row]) for row in np.sort(chosen).tolist()]

    _, figures["choose_clips_s"] = timed(choose)
    figures |= in_fresh_process("open", place)
    return figures | (in_fresh_process("stream", place) if with_ray else {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where the files are made, and removed again")
    parser.add_argument("--without-ray", action="store_true", help="leaves the first batch through Ray Data out")
    parser.add_argument("--without-files", action="store_true", help="leaves listing and preparing out")
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU time of the process, for a busy machine")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cpu:
        os.environ[CPU_TIME] = "1"  # of the processes that we start too
    if words.measure:
        what, location = words.measure
        print(json.dumps({"open": open_and_deal, "stream": start_stream}[what](location)))
        return
    columns = []
    for count in words.rows:
        with tempfile.TemporaryDirectory(prefix="giffy_ray-scale-", dir=words.folder) as folder:
            columns.append(measure(count, Path(folder), not words.without_files, not words.without_ray))
            print(count, json.dumps(columns[-1]), file=sys.stderr)
    print(f"{'rows':26}" + "".join(f"{count:>12,}" for count in words.rows))
    for name in columns[0]:
        print(f"{name:26}" + "".join(f"{figures[name]:12.3f}" for figures in columns))


if __name__ == "__main__":
    main()
