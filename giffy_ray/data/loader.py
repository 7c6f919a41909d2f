"""The Ray Data pipelines of the product. No other module imports ray.data.

    decode_blocks            video lists --decode_shard, tasks on the whole cluster--> shards and their metadata
    iter_training_batches    steps, in order --TrainingSampler, in the worker or in tasks--> this rank's batches
    map_batches_with_models  dataset indices, in batches --actors that hold models--> results, in order

One execution serves a whole training. With cached clips, Ray Data distributes only step numbers, and each worker reads
its slice from the node's memory map, in Ray Data's prefetch threads: ten times as fast as sending clips through the
object store. Without a cache, tasks on the cluster decode the slices.
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
from giffy_ray.core.progress import ProgressBar
from giffy_ray.core.tensor_types import Clips, SampleIndices, Times
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.sampler import TrainingSampler, rank_indices

_PREFETCH_BATCHES = 2
_STEPS_PER_FETCH = 4  # fetching one step number from Ray Data costs as much as reading its clips
_STEPS_PER_CACHED_BLOCK = 10_000
_STEPS_PER_TASK = 100  # decoded one after another
_MAX_MAP_BLOCKS = 1000  # of `map_batches_with_models`; each costs the driver at least a millisecond


Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a training step. In pinned memory if there is a GPU."""

    clips: Clips
    times: Times
    sample_indices: SampleIndices


def decode_blocks(blocks: Sequence[pa.Table], decode: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Runs `decode` on each block in a task of its own. Yields the results in the order of completion."""
    _silence_ray_data()
    # `from_arrow` would start a task per table just to count its rows.
    pipeline = ray.data.from_blocks(list(blocks)).map_batches(decode, batch_size=None, batch_format="pyarrow")
    yield from cast(Iterator[pa.Table], pipeline.iter_batches(batch_size=None, batch_format="pyarrow"))


class _CollateStep:
    """Maps a step number to the clips, times and sample indices of this rank."""

    def __init__(self, sampler: TrainingSampler, global_batch_size: int, rank: int, world_size: int, first_step: int):
        self.sampler, self.first_step = sampler, first_step
        self.get_sample_indices = functools.partial(
            rank_indices, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        sample_indices = self.get_sample_indices(self.first_step + step)
        clips, times = self.sampler(sample_indices)
        return {"clips": clips, "times": times, "sample_indices": sample_indices}


class _CollateCachedSteps(NumpyBatchCollateFn):
    """Maps step numbers to batches, read from the cache in this process."""

    def __init__(self, collate_step: _CollateStep):
        super().__init__()
        self.collate_step = collate_step

    def __call__(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        return [_to_batch(self.collate_step(int(step))) for step in batch["item"]]


class _CollateDecodedStep(NumpyBatchCollateFn):
    """Maps a slice that a task decoded to a batch. Copies it, because object store memory is read-only."""

    def __call__(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        return [_to_batch({name: np.array(array) for name, array in batch.items()})]


def _to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Pins the memory if there is a GPU, so that it can copy the batch while it computes."""
    pinned = torch.cuda.is_available()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**{name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()})


def iter_training_batches(
    dataset: ClipDataset, data: DataConfig, seed: int, global_batch_size: int, rank: int, world_size: int, steps: range
) -> Iterator[Batch]:
    """Yields this rank's batches of the training split for `steps`, in order.

    One Ray Data execution serves all steps. It starts when the first batch is requested.
    """
    _silence_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    collate_step = _CollateStep(TrainingSampler(dataset, data, seed), global_batch_size, rank, world_size, steps.start)
    if dataset.decode_config.cache:
        fetched = _step_numbers(len(steps), _STEPS_PER_CACHED_BLOCK).iter_torch_batches(
            batch_size=_STEPS_PER_FETCH,
            prefetch_batches=_PREFETCH_BATCHES,
            collate_fn=_CollateCachedSteps(collate_step),
        )
    else:

        def decode(numbers: Any) -> dict[str, np.ndarray]:
            return collate_step(int(numbers["item"][0]))

        decoded = _step_numbers(len(steps), _STEPS_PER_TASK).map_batches(decode, batch_size=1)
        fetched = decoded.iter_torch_batches(
            batch_size=len(rank_indices(0, global_batch_size, rank, world_size)),
            prefetch_batches=_PREFETCH_BATCHES,
            collate_fn=_CollateDecodedStep(),
        )
    for batches in cast(Iterator[list[Batch]], fetched):
        yield from batches


def _step_numbers(count: int, block_size: int) -> ray.data.Dataset:
    """The numbers 0 to `count` - 1 as column `item`, in blocks of `block_size`.

    The blocks are put into the object store from here. Tasks would need a CPU, and after a loss of nodes the restarted
    workers may occupy all of them. Blocks are arrays, because Ray Data takes 20 us per item of a list.
    """
    blocks = []
    for first in range(0, max(count, 1), block_size):
        blocks.append(pa.table({"item": np.arange(first, min(first + block_size, count))}))
    return ray.data.from_blocks(blocks)


def map_batches_with_models(
    indices: np.ndarray,
    make_mapper: Callable[[], Callable[[np.ndarray], Result]],
    *,
    batch_size: int,
    actors: int = 0,
    title: str,
    resources: Mapping[str, Any] | None = None,
) -> Iterator[Result]:
    """Maps batches of dataset indices in a pool of actors that hold models, and shows a progress bar.

    Results are streamed, and Ray Data bounds how many are waiting.

    Args:
        indices: int64 [n].
        make_mapper: Called once per actor. The mapper that it returns is called with int64 [<= batch_size]. A stateless
            mapper makes each result a function of its batch alone.
        batch_size: Number of indices per call.
        actors: Maximum size of the pool; work starts with the first actor. 0 runs in this process without Ray.
        title: Title of the progress bar, which counts indices.
        resources: Resources of an actor, as arguments of `ray.remote`.

    Yields:
        The result of each batch, in order.

    Raises:
        Exception: The error of the mapper; if there are several, that of the first batch.
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    with ProgressBar(title, len(indices), "clips") as bar:
        if actors:
            results = _map_in_actors(indices, make_mapper, batch_size, actors, resources or {})
        else:
            results = map(make_mapper(), batches)
        for batch, result in zip(batches, results, strict=True):
            bar.advance(len(batch))
            yield result


class _MapperActor:
    """Runs in an actor of `map_batches_with_models`. Maps the offset of a batch to its pickled (result, error)."""

    def __init__(self, shared: Sequence[ray.ObjectRef], batch_size: int):
        self.shared, self.batch_size = shared, batch_size
        self.indices = self.mapper = None

    def __call__(self, offsets: dict[str, np.ndarray]) -> pa.Table:
        (offset,) = offsets["item"].tolist()
        try:
            if self.mapper is None:
                # Not in __init__, which Ray Data would retry on failure.
                self.indices, make_mapper = ray.get(list(self.shared))
                self.mapper = make_mapper()
            assert self.indices is not None
            outcome = (self.mapper(self.indices[offset : offset + self.batch_size]), None)
        except Exception as error:
            # Pickling drops the traceback, so it travels as a note.
            error.add_note(f"in an actor, for the batch at offset {offset}:\n{traceback.format_exc()}")
            outcome = (None, error)
        return pa.table({"outcome": pa.array([pickle.dumps(outcome)], pa.large_binary())})


def _map_in_actors(
    indices: np.ndarray, make_mapper: Callable[[], Any], batch_size: int, actors: int, resources: Mapping[str, Any]
) -> Iterator[Any]:
    _silence_ray_data()
    offsets = list(range(0, len(indices), batch_size))
    shared = [ray.put(np.asarray(indices)), ray.put(make_mapper)]  # stored once instead of once per actor
    pipeline = ray.data.from_items(offsets, override_num_blocks=min(len(offsets), _MAX_MAP_BLOCKS)).map_batches(
        _MapperActor,
        fn_constructor_args=(shared, batch_size),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        **resources,
    )
    pipeline.context.execution_options.preserve_order = True
    for block in cast(Iterator[pa.Table], pipeline.iter_batches(batch_size=None, batch_format="pyarrow")):
        for pickled in block["outcome"]:
            result, error = pickle.loads(pickled.as_py())
            if error is not None:
                raise error
            yield result


def _silence_ray_data() -> None:
    """Turns off Ray Data's progress bars and notes, which describe the execution graph rather than the job."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
