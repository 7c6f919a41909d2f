"""The Ray Data graphs, and the only importer of ray.data: videos -> store, and positions -> batches.

The sample stream is a function of position: position p is clip permutation(seed, epoch)[p mod N] of epoch p div N.
Step s of a run with global batch G is positions [s*G, (s+1)*G), whatever the number of workers; rank r of W takes
the r-th of W equal slices. So resuming is starting at a step, and one execution feeds a whole training.

Ray Data deals the steps; the worker gathers its slice of each from the node's memory map, which is ten times as
fast as sending clips through the object store, in the threads that Ray Data prefetches with.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.collate_fn import NumpyBatchCollateFn

from giffy_ray.config import ClipConfig
from giffy_ray.data import store as stores
from giffy_ray.data.catalog import Catalog
from giffy_ray.data.store import SHARD_CLIPS, Store
from giffy_ray.shapes import Clips, Positions

_PREFETCH_BATCHES = 2
_STEPS_PER_BLOCK = 100


@dataclass(frozen=True)
class Batch:
    clips: Clips
    positions: Positions


def fill_store(
    catalog: Catalog, clip: ClipConfig, location: str, progress: Callable[[int], None] = lambda videos: None
) -> None:
    """Decodes every video of the catalog into the store at `location`, one Ray task for each shard.

    `progress` is called with the number of videos done since its last call.
    """
    _be_quiet()
    videos = [{"id": v.id, "path": v.path, "category": v.category, "split": v.split} for v in catalog.videos]
    parts = [
        pa.Table.from_pylist([video | {"shard": shard} for video in videos[first : first + SHARD_CLIPS]])
        for shard, first in enumerate(range(0, len(videos), SHARD_CLIPS))
    ]
    decode = functools.partial(stores.decode_shard, filesystem=catalog.filesystem, clip=clip, location=location)
    outcomes: list[dict[str, Any]] = []
    dataset = ray.data.from_arrow(parts).map_batches(decode, batch_size=None, batch_format="pyarrow")
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        done = cast(pa.Table, table).to_pylist()
        outcomes += done
        progress(len(done))
    stores.finish_store(location, catalog, clip, outcomes)


def rows_at(positions: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """The store rows at positions of the sample stream over `rows`: each row once an epoch, in seeded order."""
    epochs, places = np.divmod(positions, len(rows))
    chosen = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = rows[_permutation(seed, int(epoch), len(rows))[places[here]]]
    return chosen


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def slice_of(step: int, batch: int, rank: int, workers: int) -> np.ndarray:
    """int64: the positions that rank `rank` of `workers` takes in a step of `batch` clips over all workers."""
    share = batch // workers
    return step * batch + rank * share + np.arange(share)


class _Gather(NumpyBatchCollateFn):
    """The number of a step -> this worker's Batch of that step."""

    def __init__(self, store: Store, seed: int, batch: int, rank: int, workers: int, first_step: int):
        super().__init__()
        self.store, self.rows, self.seed, self.first_step = store, store.rows_of("training"), seed, first_step
        self.positions = functools.partial(slice_of, batch=batch, rank=rank, workers=workers)

    def __call__(self, batch: dict[str, np.ndarray]) -> Batch:
        positions = self.positions(self.first_step + int(batch["id"][0]))
        clips = self.store.gather(rows_at(positions, self.rows, self.seed))
        return Batch(torch.from_numpy(clips), torch.from_numpy(positions))


def batches(store: Store, seed: int, batch: int, rank: int, workers: int, steps: range) -> Iterator[Batch]:
    """This worker's batches of the training split for `steps`, in order. One execution serves all of them.

    Nothing is started before the first batch is asked for.
    """
    _be_quiet()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dealt = ray.data.range(len(steps), override_num_blocks=max(1, len(steps) // _STEPS_PER_BLOCK))
    gather = _Gather(store, seed, batch, rank, workers, steps.start)
    dealing = dealt.iter_torch_batches(batch_size=1, prefetch_batches=_PREFETCH_BATCHES, collate_fn=gather)
    yield from cast(Iterator[Batch], dealing)


def _be_quiet() -> None:
    """Ray Data's bars and notes are for whoever builds a graph, not for whoever waits for one."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
