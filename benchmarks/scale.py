"""Measures the work that grows with the number of videos, besides decoding: listing, preparing, opening, sampling.

    PYTHONPATH=. python benchmarks/scale.py --rows 10000 100000 1000000

The videos are empty files, and their clips share one small shard, so the results include no decoding and little
reading. Opening, the first batch and the epoch are measured in a fresh process. Memory is what that process uses beyond
its imports: private memory (unique set size) and anonymous memory, the part of it that no file backs. A million rows
take 1 GB of disk below --folder, 5 GB of memory, and a few minutes.
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
from giffy_ray.data import clip_dataset, prune, shards
from giffy_ray.data.catalog import Catalog, Video, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import TrainingSampler, rank_indices
from giffy_ray.data.shards import ROW_SCHEMA, SHARD_VIDEOS, DecodeConfig

FRAMES, SIDE, BATCH_SIZE, EPOCHS = 4, 8, 64, 10
CATEGORIES = 300
VALIDATION_CLIPS = 1000  # used by an evaluation
CPU_TIME_ENV = "GIFFY_RAY_SCALE_CPU_TIME"


def measure_s(function: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the function's result and its duration in seconds, of CPU time if CPU_TIME_ENV is set."""
    clock = time.process_time if os.environ.get(CPU_TIME_ENV) else time.perf_counter
    gc.collect()
    start_s = clock()
    result = function()
    return result, clock() - start_s


def build_experiment(folder: Path) -> Experiment:
    overrides = {
        "clip.frames": FRAMES,
        "clip.height": SIDE,
        "clip.width": SIDE,
        "data.root": str(folder / "videos"),
        "storage": str(folder / "runs"),
    }
    return override(Experiment(), overrides)


def create_videos(folder: Path, count: int) -> None:
    """Creates empty files in one folder per category."""
    for category in range(CATEGORIES):
        path = folder / "videos" / f"category{category:03}"
        path.mkdir(parents=True)
        for number in range(category, count, CATEGORIES):
            os.close(os.open(path / f"a video of some length of name {number:08}.mp4", os.O_CREAT))


def create_store(store_location: str, catalog: Catalog, experiment: Experiment) -> pa.Table:
    """Writes the decode config and one shard of a store. Returns an index that points all clips to this shard."""
    shards.write_decode_config(store_location, DecodeConfig(experiment.clip))
    frames = np.random.default_rng(0).integers(0, 256, SHARD_VIDEOS * FRAMES * SIDE * SIDE * 3, np.uint8).tobytes()
    shard = hashlib.sha256(frames).hexdigest()
    write_bytes(shards.get_shard_path(store_location, shard), frames)
    identities = [video.identity for video in catalog.videos]
    constants = {
        "shard": shard,
        "shard_bytes": len(frames),
        "frames": FRAMES,
        "padded": 0,
        "codec": "h264",
        "hdr": False,
        "source_width": 320,
        "source_height": 240,
        "source_fps": 30.0,
        "seconds": 3.0,
    }
    columns: dict[str, pa.Array] = {
        "identity": pa.array(identities),
        "sha256": pa.array([hashlib.sha256(identity.encode()).hexdigest() for identity in identities]),
        "first": pa.array(np.arange(len(identities)) % SHARD_VIDEOS * FRAMES),
    }
    for field in ROW_SCHEMA:
        columns.setdefault(field.name, pa.repeat(pa.scalar(constants.get(field.name), field.type), len(identities)))
    return pa.table(columns).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def write_listings(store_location: str, index: pa.Table) -> None:
    """Writes the listings of decode tasks: one for every SHARD_VIDEOS videos."""
    for first in range(0, len(index), SHARD_VIDEOS):
        shards._write_listing(store_location, index.slice(first, SHARD_VIDEOS))


def build_catalog(folder: Path, count: int) -> Catalog:
    """Builds a catalog without files."""

    def build_video(number: int) -> Video:
        category = f"category{number * CATEGORIES // count:03}"
        name = f"{category}/a video of some length of name {number:08}.mp4"
        split = "training" if number % 10 else "validation"
        return Video(name, f"{folder}/videos/{name}", category, split, name.removesuffix(".mp4"), 1, 1)

    videos = tuple(build_video(number) for number in range(count))
    return Catalog("videos", f"{folder}/videos", fs.LocalFileSystem(), videos, f"{folder}/videos")


def memory_mb() -> tuple[float, float]:
    """Returns the private and the anonymous memory of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    anonymous_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return psutil.Process().memory_full_info().uss / 1e6, anonymous_kb * 1024 / 1e6


def measure_sampling(set_location: str) -> dict[str, float]:
    """Opens a dataset and samples one epoch, in this process, which should be fresh."""
    private_before_mb, anonymous_before_mb = memory_mb()
    dataset, open_s = measure_s(lambda: ClipDataset(set_location))
    private_mb, anonymous_mb = memory_mb()
    results = {
        "open_s": open_s,
        "open_private_mb": private_mb - private_before_mb,
        "open_anonymous_mb": anonymous_mb - anonymous_before_mb,
    }
    sampler, start_s = measure_s(lambda: TrainingSampler(dataset, DataConfig(), 0))
    _, batch_s = measure_s(lambda: sampler(rank_indices(0, BATCH_SIZE, 0, 1)))
    results["first_batch_s"] = start_s + batch_s

    def sample(steps: np.ndarray) -> None:
        for step in steps.tolist():
            sampler(rank_indices(step, BATCH_SIZE, 0, 1))

    steps = np.arange(len(sampler.indices) // BATCH_SIZE)
    results["epoch_s"] = 0.0
    memory_by_quarter_mb = []
    for quarter in np.array_split(steps, 4):
        results["epoch_s"] += measure_s(lambda quarter=quarter: sample(quarter))[1]
        memory_by_quarter_mb.append(memory_mb())
    for quarter, (private_mb, _) in enumerate(memory_by_quarter_mb, 1):
        results[f"epoch_{quarter}_private_mb"] = private_mb - private_before_mb
    for quarter, (_, anonymous_mb) in enumerate(memory_by_quarter_mb, 1):
        results[f"epoch_{quarter}_anonymous_mb"] = anonymous_mb - anonymous_before_mb
    return results


def measure_stream(set_location: str) -> dict[str, float]:
    """Measures the time from opening a dataset to the first batch through Ray Data, twice, without Ray's start."""
    import ray

    from giffy_ray.data import loader

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:

        def read_first_batch() -> None:
            dataset = ClipDataset(set_location)
            steps = range(len(dataset.split_indices("training")) * EPOCHS // BATCH_SIZE)
            next(loader.iter_training_batches(dataset, DataConfig(), 0, BATCH_SIZE, 0, 1, steps))

        return {f"stream_batch_{attempt}_s": measure_s(read_first_batch)[1] for attempt in (1, 2)}
    finally:
        ray.shutdown()


MEASUREMENTS = {"open": measure_sampling, "stream": measure_stream}


def measure_in_fresh_process(measurement: str, set_location: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", measurement, set_location]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def measure(count: int, folder: Path, with_files: bool, with_ray: bool) -> dict[str, float]:
    experiment = build_experiment(folder)
    results: dict[str, float] = {}
    store_location = join(experiment.storage, "stores", DecodeConfig(experiment.clip).key)
    if with_files:
        create_videos(folder, count)
        catalog, results["list_s"] = measure_s(lambda: read_catalog(str(folder / "videos"), experiment.data))
    else:
        catalog = build_catalog(folder, count)
    index = create_store(store_location, catalog, experiment)
    if with_files:
        write_listings(store_location, index)
        rows, results["read_rows_s"] = measure_s(lambda: shards.read_rows(store_location))
        index, results["choose_rows_s"] = measure_s(lambda: shards.choose_rows(rows))
        del rows
    set_location, results["write_set_s"] = measure_s(
        lambda: clip_dataset.write_set(store_location, catalog, index, experiment.data.limits)
    )
    del catalog, index
    if with_files:
        # Everything that a job does before and after decoding, then what the next job with the same videos does.
        _, results["prepare_s"] = measure_s(lambda: prepare(experiment))
        _, results["prepare_prepared_s"] = measure_s(lambda: prepare(experiment))
        _, results["plan_prune_s"] = measure_s(lambda: prune.plan(experiment))
    dataset = ClipDataset(set_location)
    _, results["count_s"] = measure_s(dataset.count_by_category)
    results["set_mb"] = Path(set_location, "rows.arrow").stat().st_size / 1e6

    def choose_clips() -> list[tuple[str, str, str]]:
        validation = dataset.split_indices("validation")
        count = min(VALIDATION_CLIPS, len(validation))
        chosen = np.sort(np.random.default_rng(0).choice(validation, count, replace=False))
        return [(dataset.ids[index], dataset.categories[index], dataset.sources[index]) for index in chosen.tolist()]

    _, results["choose_clips_s"] = measure_s(choose_clips)
    results |= measure_in_fresh_process("open", set_location)
    if with_ray:
        results |= measure_in_fresh_process("stream", set_location)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="parent of the temporary files; by default the system's temporary folder")
    parser.add_argument("--without-ray", action="store_true", help="skip the first batch through Ray Data")
    parser.add_argument("--without-files", action="store_true", help="skip listing and preparing")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU time of the process, for a busy machine")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ[CPU_TIME_ENV] = "1"  # child processes inherit it
    if arguments.measure:
        measurement, set_location = arguments.measure
        print(json.dumps(MEASUREMENTS[measurement](set_location)))
        return
    columns = []
    for count in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="giffy_ray-scale-", dir=arguments.folder) as folder:
            columns.append(measure(count, Path(folder), not arguments.without_files, not arguments.without_ray))
            print(count, json.dumps(columns[-1]), file=sys.stderr)
    print(f"{'rows':26}" + "".join(f"{count:>12,}" for count in arguments.rows))
    for name in columns[0]:
        print(f"{name:26}" + "".join(f"{results[name]:12.3f}" for results in columns))


if __name__ == "__main__":
    main()
