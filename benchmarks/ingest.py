"""Compares the path from cached clips to batches with the data loaders that a user would choose instead.

    PYTHONPATH=. python benchmarks/ingest.py [--rounds N]

Each method makes batches of 20 clips, uint8 [20, 30, 64, 64, 3], in a process that is connected to a Ray of two CPUs:
the same 1,000 clips in random order, over 5 epochs. The method that decodes reads built-in videos, for one epoch. The
methods alternate. The time includes everything that an epoch costs, also its start. The tables show medians over
rounds; ratios compare methods within one round, then take the median.

It then measures the time to the first batch, memory over 100 epochs, and decoding with one process and with two.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from giffy_ray.config import ClipConfig, DataConfig, Experiment, LimitsConfig, SyntheticConfig, override
from giffy_ray.data import loader, shards
from giffy_ray.data.catalog import read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import DecodedClip, SourceInfo
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import shuffled_indices
from giffy_ray.data.shards import DecodeConfig
from giffy_ray.data.synthetic.dataset import plan_videos, render_video

CLIPS, BATCH_SIZE, EPOCHS, DECODED_VIDEOS = 1000, 20, 5, 240
CLIPS_PER_PARQUET_FILE = 100
FIRST_BATCHES, MEMORY_EPOCHS = 5, 100
GIFFY_RAY = "giffy_ray: Ray Data streams step numbers, the worker reads its clips"
CLIP = ClipConfig()
_CLIP_BYTES = CLIP.frames * CLIP.height * CLIP.width * 3
_BATCH_SHAPE = (-1, CLIP.frames, CLIP.height, CLIP.width, 3)
Batches = Iterator[torch.Tensor]


def sample_noise(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> DecodedClip:
    """Replaces the decoder where only the dataset is measured. Noise does not compress."""
    random = np.random.default_rng(int(video))
    frames = random.integers(0, 256, (clip.frames, clip.height, clip.width, 3), dtype=np.uint8)
    return DecodedClip(frames, np.arange(clip.frames) / clip.fps, 0, SourceInfo("none", 64, 64, 30, 3))


class ClipTensors(Dataset):
    """The dataset that a user would write over the memory map."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.dataset.get_clips(np.asarray([index]))[0])


class VideoTensors(Dataset):
    """The dataset that a user would write over the video files."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from benchmarks.decode import decode_with_opencv

        return torch.from_numpy(decode_with_opencv(self.paths[index]))


class _CollateArrow(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> torch.Tensor:
        column = batch["clip"].combine_chunks()
        if isinstance(column, pa.FixedSizeBinaryArray):
            return torch.from_numpy(np.frombuffer(column.buffers()[1], np.uint8).reshape(_BATCH_SHAPE).copy())
        return torch.from_numpy(np.stack(list(column.to_numpy_ndarray())).reshape(_BATCH_SHAPE))


def iter_memory_map(dataset: ClipDataset) -> Batches:
    """The ceiling: only copies clips out of the memory map, in this process."""
    indices = dataset.split_indices("training")
    for step in range(EPOCHS * len(indices) // BATCH_SIZE):
        sample_indices = np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        yield torch.from_numpy(dataset.get_clips(shuffled_indices(sample_indices, indices, 0)))


def iter_giffy_ray(dataset: ClipDataset, epochs: int = EPOCHS) -> Batches:
    steps = range(epochs * len(dataset) // BATCH_SIZE)
    for batch in loader.iter_training_batches(dataset, DataConfig(), 0, BATCH_SIZE, 0, 1, steps):
        yield batch.clips


def iter_data_loader(dataset: Dataset, epochs: int) -> Batches:
    batches = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in range(epochs):
        yield from batches


def iter_parquet(folder: Path) -> Batches:
    parquet = ray.data.read_parquet([str(path) for path in sorted(folder.glob("*.parquet"))])
    for _ in range(EPOCHS):
        batches = parquet.iter_torch_batches(batch_size=BATCH_SIZE, prefetch_batches=4, collate_fn=_CollateArrow())
        yield from batches  # type: ignore[misc]


def write_parquet(dataset: ClipDataset, folder: Path, as_tensors: bool) -> Path:
    folder.mkdir()
    for first in range(0, len(dataset), CLIPS_PER_PARQUET_FILE):
        clips = dataset.get_clips(np.arange(first, first + CLIPS_PER_PARQUET_FILE))
        if as_tensors:
            column: pa.Array = pa.FixedShapeTensorArray.from_numpy_ndarray(clips)
        else:
            column = pa.array([clip.tobytes() for clip in clips], pa.binary(_CLIP_BYTES))
        pq.write_table(pa.table({"clip": column}), folder / f"{first:05}.parquet", compression="none")
    return folder


def measure_mb_per_s(iter_batches: Callable[[], Batches]) -> float:
    start_s = time.perf_counter()
    clips = 0
    for batch in iter_batches():
        clips += len(batch)
    return clips * _CLIP_BYTES / 1e6 / (time.perf_counter() - start_s)


def anonymous_mb() -> float:
    """Returns the memory of this process without the memory map."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def build_experiment(storage: Path, root: Path) -> Experiment:
    return override(Experiment(), {"storage": str(storage), "data.root": str(root), "data.validation_fraction": 1e-9})


def prepare_noise(folder: Path) -> ClipDataset:
    category = folder / "numbers" / "training" / "x"
    category.mkdir(parents=True)
    for number in range(CLIPS):
        (category / f"{number:05}.mp4").write_text(str(number))
    return prepare(build_experiment(folder, folder / "numbers"), decoder="benchmarks.ingest:sample_noise")


def render_videos(folder: Path, count: int) -> list[Path]:
    root = folder / "videos" / "training" / "x"
    root.mkdir(parents=True)
    for spec in plan_videos(SyntheticConfig(training_clips=count // 2, validation_clips=1))[:count]:
        (root / spec.name).write_bytes(render_video(spec))
    return sorted(root.glob("*.mp4"))


def compare(folder: Path, dataset: ClipDataset, videos: list[Path], rounds: int) -> Table:
    tensors = write_parquet(dataset, folder / "tensors", as_tensors=True)
    binary = write_parquet(dataset, folder / "binary", as_tensors=False)
    methods: dict[str, Callable[[], Batches]] = {
        "plain memory map, no Ray (the ceiling)": lambda: iter_memory_map(dataset),
        GIFFY_RAY: lambda: iter_giffy_ray(dataset),
        "torch DataLoader, 2 workers, memory map": lambda: iter_data_loader(ClipTensors(dataset), EPOCHS),
        "Ray Data, Parquet, fixed-size binary": lambda: iter_parquet(binary),
        "Ray Data, Parquet, tensor column": lambda: iter_parquet(tensors),
        "torch DataLoader, 2 workers, OpenCV decoding": lambda: iter_data_loader(VideoTensors(videos), 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, iter_batches in methods.items():
            rates[name].append(measure_mb_per_s(iter_batches))
    table = Table("method", "MB/s", "clips/s", "giffy_ray is faster by", "spread")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, method_rates in rates.items():
        ratios = [giffy_ray / other for giffy_ray, other in zip(rates[GIFFY_RAY], method_rates, strict=True)]
        median = statistics.median(method_rates)
        table.add_row(
            name,
            f"{median:,.0f}",
            f"{median * 1e6 / _CLIP_BYTES:,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    return table


def measure_first_batches_s(dataset: ClipDataset) -> list[float]:
    durations_s = []
    for _ in range(FIRST_BATCHES):
        start_s = time.perf_counter()
        next(iter_giffy_ray(dataset))
        durations_s.append(time.perf_counter() - start_s)
    return durations_s


def measure_memory_mb(dataset: ClipDataset, epochs: int) -> list[float]:
    """Returns the anonymous memory of this process at ten moments of a long stream."""
    memory_mb, steps_per_epoch = [], len(dataset) // BATCH_SIZE
    for step, _ in enumerate(iter_giffy_ray(dataset, epochs)):
        if step % (steps_per_epoch * epochs // 10) == steps_per_epoch:
            memory_mb.append(anonymous_mb())
    return memory_mb


def start_ray(cpus: int) -> None:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def measure_videos_per_s(videos: list[Path], cpus: int, folder: Path) -> float:
    """Returns the rate of decoding between the end of the first shard and that of the last: the steady state."""
    start_ray(cpus)
    catalog = read_catalog(str(videos[0].parents[2]), DataConfig(validation_fraction=1e-9))
    decode = functools.partial(
        shards.decode_shard,
        filesystem=catalog.filesystem,
        decode_config=DecodeConfig(CLIP),
        limits=LimitsConfig(),
        location=str(folder),
    )
    end_times_s, video_counts = [], []
    for table in loader.decode_blocks(shards.chunk_videos(catalog.videos * 4), decode):
        end_times_s.append(time.perf_counter())
        video_counts.append(len(table))
    ray.shutdown()
    # The first `cpus` shards end at about the same time, as do the last.
    return sum(video_counts[cpus:]) / (end_times_s[-1] - end_times_s[cpus - 1])


def compare_decoding(folder: Path, videos: list[Path], rounds: int) -> str:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for cpus, cpu_rates in rates.items():
            cpu_rates.append(measure_videos_per_s(videos, cpus, folder / f"prepared-{number}-{cpus}"))
    single, double = statistics.median(rates[1]), statistics.median(rates[2])
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return (
        f"decoding into the cache: {single:.0f} videos/s with one process, {double:.0f} with two "
        f"({statistics.median(ratios):.2f} times; {min(ratios):.2f} to {max(ratios):.2f}). "
        f"A million videos: {1e6 / double / 3600:.1f} hours on two cores, {1e6 / single / 64 / 60:.0f} minutes on 64, "
        f"and {1e6 * _CLIP_BYTES / 1e9:.0f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_ray(2)
        dataset = prepare_noise(folder)
        videos = render_videos(folder, DECODED_VIDEOS)
        first_batches_s = ", ".join(f"{duration_s:.2f}" for duration_s in measure_first_batches_s(dataset))
        console.print(f"first batch after {first_batches_s} s")
        console.print(compare(folder, dataset, videos, rounds))
        memory_mb = ", ".join(f"{memory:.0f}" for memory in measure_memory_mb(dataset, MEMORY_EPOCHS))
        console.print(f"memory over {MEMORY_EPOCHS} epochs: {memory_mb} MB")
        ray.shutdown()
        console.print(compare_decoding(folder, videos, rounds))


if __name__ == "__main__":
    main()
