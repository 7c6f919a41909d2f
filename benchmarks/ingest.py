"""From stored clips to batches, side by side with what a user would pick instead: benchmarks/ingest.py [--rounds N]

Every way makes batches of 20 clips, uint8 [20, 30, 64, 64, 3], in a process that has joined a Ray of two CPUs, from
the same 1,000 clips in random order, over 5 epochs; the clips that are decoded come from the built-in videos, one
epoch of them. The ways take turns. All that an epoch costs is counted, starting it too. Figures are medians over
rounds; ratios are of one round each, then the median.

Then: the time to the first batch, memory over 100 epochs, and decoding a data set with one process and with two.
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
from giffy_ray.data import shards, stream, synthetic
from giffy_ray.data.catalog import read_catalog
from giffy_ray.data.deal import rows_at
from giffy_ray.data.decode import Sampled, Source
from giffy_ray.data.prepare import prepare
from giffy_ray.data.shards import Recipe
from giffy_ray.data.store import Store

CLIPS, BATCH, EPOCHS, DECODED = 1000, 20, 5, 240
CLIP = ClipConfig()
_CLIP_BYTES = CLIP.frames * CLIP.height * CLIP.width * 3
_SHAPE = (-1, CLIP.frames, CLIP.height, CLIP.width, 3)
Batches = Iterator[torch.Tensor]


def noise(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> Sampled:
    """Stands for the decoder where only the store is measured: a clip that does not compress."""
    random = np.random.default_rng(int(video))
    frames = random.integers(0, 256, (clip.frames, clip.height, clip.width, 3), dtype=np.uint8)
    return Sampled(frames, np.arange(clip.frames) / clip.fps, 0, Source("none", 64, 64, 30, 3))


class Clips(Dataset):
    """What a user would write over the memory map."""

    def __init__(self, store: Store):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.store.gather(np.asarray([row]))[0])


class Videos(Dataset):
    """What a user would write over the files."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from benchmarks.decode import opencv

        return torch.from_numpy(opencv(self.paths[index]))


class _Arrow(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> torch.Tensor:
        column = batch["clip"].combine_chunks()
        if isinstance(column, pa.FixedSizeBinaryArray):
            return torch.from_numpy(np.frombuffer(column.buffers()[1], np.uint8).reshape(_SHAPE).copy())
        return torch.from_numpy(np.stack(list(column.to_numpy_ndarray())).reshape(_SHAPE))


def plain(store: Store) -> Batches:
    """The ceiling: clips copied out of the map in this process, nothing else."""
    rows = store.rows_of("training")
    for step in range(EPOCHS * len(rows) // BATCH):
        yield torch.from_numpy(store.gather(rows_at(np.arange(step * BATCH, (step + 1) * BATCH), rows, 0)))


def ours(store: Store, epochs: int = EPOCHS) -> Batches:
    steps = range(epochs * len(store) // BATCH)
    for batch in stream.batches(store, DataConfig(), 0, BATCH, 0, 1, steps):
        yield batch.clips


def loader(dataset: Dataset, epochs: int) -> Batches:
    batches = DataLoader(dataset, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in range(epochs):
        yield from batches


def parquet(folder: Path) -> Batches:
    data = ray.data.read_parquet([str(path) for path in sorted(folder.glob("*.parquet"))])
    for _ in range(EPOCHS):
        batches = data.iter_torch_batches(batch_size=BATCH, prefetch_batches=4, collate_fn=_Arrow())
        yield from batches  # type: ignore[misc]


def write_parquet(store: Store, folder: Path, tensors: bool) -> Path:
    folder.mkdir()
    for first in range(0, len(store), 100):
        clips = store.gather(np.arange(first, first + 100))
        if tensors:
            column: pa.Array = pa.FixedShapeTensorArray.from_numpy_ndarray(clips)
        else:
            column = pa.array([clip.tobytes() for clip in clips], pa.binary(_CLIP_BYTES))
        pq.write_table(pa.table({"clip": column}), folder / f"{first:05}.parquet", compression="none")
    return folder


def mb_per_s(way: Callable[[], Batches]) -> float:
    began_s, clips = time.perf_counter(), 0
    for batch in way():
        clips += len(batch)
    return clips * _CLIP_BYTES / 1e6 / (time.perf_counter() - began_s)


def anonymous_mb() -> float:
    """Memory of this process that is not the memory map's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def experiment_in(folder: Path, root: Path) -> Experiment:
    return override(Experiment(), {"storage": str(folder), "data.root": str(root), "data.validation_fraction": 1e-9})


def noise_store(folder: Path) -> Store:
    (folder / "numbers" / "training" / "x").mkdir(parents=True)
    for number in range(CLIPS):
        (folder / "numbers" / "training" / "x" / f"{number:05}.mp4").write_text(str(number))
    return prepare(experiment_in(folder, folder / "numbers"), decoder="benchmarks.ingest:noise")


def real_videos(folder: Path, count: int) -> list[Path]:
    root = folder / "videos" / "training" / "x"
    root.mkdir(parents=True)
    for planned in synthetic.plan(SyntheticConfig(training_clips=count // 2, validation_clips=1))[:count]:
        (root / planned.name).write_bytes(synthetic.video(planned))
    return sorted(root.glob("*.mp4"))


def compare(folder: Path, store: Store, videos: list[Path], rounds: int) -> Table:
    tensors, binary = write_parquet(store, folder / "tensors", True), write_parquet(store, folder / "binary", False)
    ways: dict[str, Callable[[], Batches]] = {
        "plain memory map, no Ray (the ceiling)": lambda: plain(store),
        "giffy_ray: Ray Data deals, the worker gathers": lambda: ours(store),
        "torch DataLoader, 2 workers, memory map": lambda: loader(Clips(store), EPOCHS),
        "Ray Data, Parquet, fixed-size binary": lambda: parquet(binary),
        "Ray Data, Parquet, tensor column": lambda: parquet(tensors),
        "torch DataLoader, 2 workers, OpenCV decoding": lambda: loader(Videos(videos), 1),
    }
    rates = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(mb_per_s(way))
    ours_rates = rates["giffy_ray: Ray Data deals, the worker gathers"]
    table = Table("way", "MB/s", "clips/s", "giffy_ray is faster by", "spread")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, own in rates.items():
        ratios = [mine / other for mine, other in zip(ours_rates, own, strict=True)]
        middle = statistics.median(own)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(
            name, f"{middle:,.0f}", f"{middle * 1e6 / _CLIP_BYTES:,.0f}", f"{statistics.median(ratios):.2f}", spread
        )
    return table


def first_batch_s(store: Store) -> list[float]:
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        next(ours(store))
        took_s.append(time.perf_counter() - began_s)
    return took_s


def memory_over_epochs(store: Store, epochs: int) -> list[float]:
    seen, steps = [], len(store) // BATCH
    for step, _ in enumerate(ours(store, epochs)):
        if step % (steps * epochs // 10) == steps:
            seen.append(anonymous_mb())
    return seen


def start_ray(cpus: int) -> None:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def decoded_per_s(videos: list[Path], cpus: int, folder: Path) -> float:
    """Videos a second, from the end of the first shard to that of the last: what a long preparation comes to."""
    start_ray(cpus)
    catalog = read_catalog(str(videos[0].parents[2]), DataConfig(validation_fraction=1e-9))
    decode = functools.partial(
        shards.decode_shard,
        filesystem=catalog.filesystem,
        recipe=Recipe(CLIP),
        limits=LimitsConfig(),
        location=str(folder),
    )
    ends_s, done = [], []
    for table in stream.decode_all(shards.chunks_of(catalog.videos * 4), decode):
        ends_s.append(time.perf_counter())
        done.append(len(table))
    ray.shutdown()
    # The first `cpus` shards end at about the same time, as do the last.
    return sum(done[cpus:]) / (ends_s[-1] - ends_s[cpus - 1])


def preparing(folder: Path, videos: list[Path], rounds: int) -> str:
    rates = {cpus: [] for cpus in (1, 2)}
    for number in range(rounds):
        for cpus, found in rates.items():
            found.append(decoded_per_s(videos, cpus, folder / f"prepared-{number}-{cpus}"))
    alone, both = (statistics.median(found) for found in rates.values())
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    return (
        f"decoding into the store: {alone:.0f} videos a second with one process, {both:.0f} with two "
        f"({statistics.median(ratios):.2f} times; {min(ratios):.2f} to {max(ratios):.2f}). "
        f"A million: {1e6 / both / 3600:.1f} hours on two cores, {1e6 / alone / 64 / 3600 * 60:.0f} minutes on 64, "
        f"and {1e6 * _CLIP_BYTES / 1e9:.0f} GB"
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=5)
    rounds = words.parse_args().rounds
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_ray(2)
        store = noise_store(folder)
        videos = real_videos(folder, DECODED)
        console.print(f"first batch after {', '.join(f'{s:.2f}' for s in first_batch_s(store))} s")
        console.print(compare(folder, store, videos, rounds))
        console.print("MB of memory over 100 epochs:", *(f"{mb:.0f}" for mb in memory_over_epochs(store, 100)))
        ray.shutdown()
        console.print(preparing(folder, videos, rounds))


if __name__ == "__main__":
    main()
