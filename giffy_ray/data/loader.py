"""The Ray Data graphs, and the only importer of ray.data: videos -> shards, positions -> batches, rows -> results.

    videos, 32 to a block --decode_shard, in tasks of the whole cluster--> shards, and rows that say what became of each
    steps, in order --TrainingSampler, in the worker or in tasks--> this worker's batch of each
    rows of the store, in batches --a mapper, in a pool of actors that hold models--> the result of each batch, in order

One execution deals a whole training. Where clips are kept, Ray Data deals the numbers of the steps and the worker
gathers its slice of each from the node's memory map, in the threads that Ray Data prefetches with: ten times as fast
as sending clips through the object store. Where they are not kept, tasks of the cluster decode the slices.
"""

from __future__ import annotations

import functools
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.collate_fn import NumpyBatchCollateFn

from giffy_ray.config import DataConfig
from giffy_ray.core.progress import Bar
from giffy_ray.core.tensor_types import Clips, SampleIndices, Times
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.sampler import TrainingSampler, rank_indices

_PREFETCH = 2
_STEPS_PER_DEAL = 4  # dealing a number costs Ray Data as much as gathering its clips costs us
_STEPS_PER_DEALT_BLOCK = 10_000
_STEPS_PER_TASK = 100  # which decodes them one after another
_MOST_MAP_BLOCKS = 1000  # into which `map_rows` divides its batches: each costs the driver a millisecond or more


Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    clips: Clips
    times: Times
    positions: SampleIndices


def decode_all(chunks: Sequence[pa.Table], decode: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Runs `decode` on each chunk in a task of its own and gives what it returns, in the order that tasks end."""
    _be_quiet()
    # Not `from_arrow`, which starts a task for each table only to count its rows.
    dataset = ray.data.from_blocks(list(chunks)).map_batches(decode, batch_size=None, batch_format="pyarrow")
    yield from cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


class _CollateStep:
    """The number of a step -> the clips, times and positions of this worker's slice of it."""

    def __init__(self, dealer: TrainingSampler, batch: int, rank: int, workers: int, first_step: int):
        self.dealer, self.first_step = dealer, first_step
        self.positions = functools.partial(rank_indices, batch=batch, rank=rank, workers=workers)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        positions = self.positions(self.first_step + step)
        clips, times = self.dealer(positions)
        return {"clips": clips, "times": times, "positions": positions}


class _Gathered(NumpyBatchCollateFn):
    """Numbers of steps -> their batches, gathered here."""

    def __init__(self, deal: _CollateStep):
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
    store: ClipDataset, data: DataConfig, seed: int, batch: int, rank: int, workers: int, steps: range
) -> Iterator[Batch]:
    """This worker's batches of the training split for `steps`, in order. One execution serves all of them.

    Nothing is started before the first batch is asked for.
    """
    _be_quiet()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    deal = _CollateStep(TrainingSampler(store, data, seed), batch, rank, workers, steps.start)
    if store.recipe.cache:
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
                batch_size=len(rank_indices(0, batch, rank, workers)), prefetch_batches=_PREFETCH, collate_fn=_Decoded()
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


def map_rows(
    rows: np.ndarray,
    make_mapper: Callable[[], Callable[[np.ndarray], Result]],
    *,
    batch: int,
    actors: int = 0,
    title: str,
    resources: Mapping[str, Any] | None = None,
) -> Iterator[Result]:
    """The result of each `batch` of `rows`, in order, with a progress bar that counts rows.

    `make_mapper` is called once in each of `actors` actors, of which one suffices to start; what it returns is called
    with int64 rows. With 0 actors both are called in this process, which needs no Ray. A result depends on its batch
    only if the mapper keeps no state. `resources`: of an actor, as `ray.remote` takes them. What the mapper raises is
    raised here, the first in the order of the rows. Results are streamed: Ray Data bounds how many wait.
    """
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    with Bar(title, len(rows), "clips") as bar:
        in_actors = functools.partial(_map_in_actors, rows, make_mapper, batch, actors, resources or {})
        for part, result in zip(parts, in_actors() if actors else map(make_mapper(), parts), strict=True):
            bar.advance(len(part))
            yield result


class _Mapper:
    """In an actor of `map_rows`: the first place of a batch -> its pickled result, or what was raised."""

    def __init__(self, shared: Sequence[ray.ObjectRef], batch: int):
        self.shared, self.batch = shared, batch
        self.rows = self.mapper = None

    def __call__(self, starts: dict[str, np.ndarray]) -> pa.Table:
        (start,) = starts["item"].tolist()
        try:
            if self.mapper is None:
                # Not in __init__, whose failures Ray Data would try again.
                self.rows, make_mapper = ray.get(list(self.shared))
                self.mapper = make_mapper()
            assert self.rows is not None
            outcome = (self.mapper(self.rows[start : start + self.batch]), None)
        except Exception as error:
            # Its traceback would not survive being pickled.
            error.add_note(f"in an actor, for the batch from row {start} on:\n{traceback.format_exc()}")
            outcome = (None, error)
        return pa.table({"outcome": pa.array([pickle.dumps(outcome)], pa.large_binary())})


def _map_in_actors(
    rows: np.ndarray, make_mapper: Callable[[], Any], batch: int, actors: int, resources: Mapping[str, Any]
) -> Iterator[Any]:
    _be_quiet()
    starts = list(range(0, len(rows), batch))
    shared = [ray.put(np.asarray(rows)), ray.put(make_mapper)]  # once, not once for each actor
    dataset = ray.data.from_items(starts, override_num_blocks=min(len(starts), _MOST_MAP_BLOCKS)).map_batches(
        _Mapper,
        fn_constructor_args=(shared, batch),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        **resources,
    )
    dataset.context.execution_options.preserve_order = True
    for block in cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow")):
        for pickled in block["outcome"]:
            result, error = pickle.loads(pickled.as_py())
            if error is not None:
                raise error
            yield result


def _be_quiet() -> None:
    """Ray Data's bars and notes are for whoever builds a graph, not for whoever waits for one."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
