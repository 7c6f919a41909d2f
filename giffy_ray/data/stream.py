"""The Ray Data graphs, and the only importer of ray.data: videos -> shards, and positions -> batches.

    videos, 32 to a block --decode_shard, in tasks of the whole cluster--> shards, and rows that say what became of each
    steps, in order --Dealer, in the worker or in tasks--> this worker's batch of each

One execution deals a whole training. Where clips are kept, Ray Data deals the numbers of the steps and the worker
gathers its slice of each from the node's memory map, in the threads that Ray Data prefetches with: ten times as fast
as sending clips through the object store. Where they are not kept, tasks of the cluster decode the slices.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.collate_fn import NumpyBatchCollateFn

from giffy_ray.config import DataConfig
from giffy_ray.data.deal import Dealer, slice_of
from giffy_ray.data.store import Store
from giffy_ray.shapes import Clips, Positions, Times

_PREFETCH = 2
_STEPS_PER_DEAL = 4  # dealing a number costs Ray Data as much as gathering its clips costs us
_STEPS_PER_DEALT_BLOCK = 10_000
_STEPS_PER_TASK = 100  # which decodes them one after another


@dataclass(frozen=True)
class Batch:
    clips: Clips
    times: Times
    positions: Positions


def decode_all(chunks: Sequence[pa.Table], decode: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Runs `decode` on each chunk in a task of its own and gives what it returns, in the order that tasks end."""
    _be_quiet()
    # Not `from_arrow`, which starts a task for each table only to count its rows.
    dataset = ray.data.from_blocks(list(chunks)).map_batches(decode, batch_size=None, batch_format="pyarrow")
    yield from cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


class _Deal:
    """The number of a step -> the clips, times and positions of this worker's slice of it."""

    def __init__(self, dealer: Dealer, batch: int, rank: int, workers: int, first_step: int):
        self.dealer, self.first_step = dealer, first_step
        self.positions = functools.partial(slice_of, batch=batch, rank=rank, workers=workers)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        positions = self.positions(self.first_step + step)
        clips, times = self.dealer(positions)
        return {"clips": clips, "times": times, "positions": positions}


class _Gathered(NumpyBatchCollateFn):
    """Numbers of steps -> their batches, gathered here."""

    def __init__(self, deal: _Deal):
        super().__init__()
        self.deal = deal

    def __call__(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        return [_batch_of(self.deal(int(step))) for step in batch["item"]]


class _Decoded(NumpyBatchCollateFn):
    """A slice that a task has dealt -> its batch. What lies in the object store may not be written to."""

    def __call__(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        return [_batch_of({name: np.array(array) for name, array in batch.items()})]


def _batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    """In pinned memory where there is a GPU, which then fetches it while it computes."""
    pinned = torch.cuda.is_available()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**{name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()})


def batches(
    store: Store, data: DataConfig, seed: int, batch: int, rank: int, workers: int, steps: range
) -> Iterator[Batch]:
    """This worker's batches of the training split for `steps`, in order. One execution serves all of them.

    Nothing is started before the first batch is asked for.
    """
    _be_quiet()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    deal = _Deal(Dealer(store, data, seed), batch, rank, workers, steps.start)
    if store.recipe.keep:
        dealing = _numbers(len(steps), _STEPS_PER_DEALT_BLOCK).iter_torch_batches(
            batch_size=_STEPS_PER_DEAL, prefetch_batches=_PREFETCH, collate_fn=_Gathered(deal)
        )
    else:

        def decode(numbers: Any) -> dict[str, np.ndarray]:
            return deal(int(numbers["item"][0]))

        dealing = (
            _numbers(len(steps), _STEPS_PER_TASK)
            .map_batches(decode, batch_size=1)
            .iter_torch_batches(
                batch_size=len(slice_of(0, batch, rank, workers)), prefetch_batches=_PREFETCH, collate_fn=_Decoded()
            )
        )
    for dealt in cast(Iterator[list[Batch]], dealing):
        yield from dealt


def _numbers(count: int, block: int) -> ray.data.Dataset:
    """The numbers below `count` as the column `item`, `block` of them together.

    Put into the object store from here, not by tasks: those would want a CPU, and workers that come back on fewer
    nodes may have taken all. As arrays, because Ray Data takes 20 us for each item of a list.
    """
    return ray.data.from_blocks(
        [pa.table({"item": np.arange(first, min(first + block, count))}) for first in range(0, max(count, 1), block)]
    )


def _be_quiet() -> None:
    """Ray Data's bars and notes are for whoever builds a graph, not for whoever waits for one."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
