"""Helpers around torch.distributed. Without a process group they act as world size 1."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from giffy_ray.core.async_copy import AsyncHostCopy, to_device_async

Result = TypeVar("Result")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_loss_weight(local_batch_size: int, global_batch_size: int) -> float:
    """Returns the weight of this rank's mean loss, so that the mean over ranks is the mean over the global batch."""
    return local_batch_size * world_size() / global_batch_size


def all_reduce_sum(values: Iterable[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks, in float64."""
    local_values = [float(value) for value in values]
    if world_size() == 1:
        return local_values
    tensor = torch.tensor(local_values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_mean(values: Tensor, weight: float) -> Tensor:
    """Averages `values` over the ranks, weighted by `local_loss_weight`. Does not synchronize the CPU with a GPU."""
    if world_size() == 1:
        return weight * values
    total = weight / world_size() * values
    dist.all_reduce(total)
    return total


class DelayedAnyReduce:
    """Logical OR of each flag over all ranks, delayed by one call so that no rank blocks.

    With a world size of 1 there is no delay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pending: tuple[dist.Work, AsyncHostCopy] | None = None

    def __call__(self, flags: Sequence[bool]) -> list[bool]:
        """Starts reducing `flags` and returns the result of the previous call; the first call returns False."""
        if world_size() == 1:
            return list(flags)
        previous = self.wait() or [False] * len(flags)
        reduced = to_device_async(torch.tensor(flags, dtype=torch.int32), self.device)
        work = cast(dist.Work, dist.all_reduce(reduced, async_op=True))
        if reduced.is_cuda:
            work.wait()  # blocks the CUDA stream, not the CPU
        self._pending = work, AsyncHostCopy(reduced)
        return previous

    def wait(self) -> list[bool] | None:
        """Waits for the result of the last call; None if there was none."""
        if self._pending is None:
            return None
        work, copy = self._pending
        work.wait()
        return [value > 0 for value in copy.wait()]


def broadcast_objects(values: list[Any]) -> list[Any]:
    """Returns rank 0's values on all ranks."""
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values


def all_gather_object(value: Any) -> list[Any]:
    """Returns the values of all ranks, in rank order, on all ranks."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def run_on_rank_zero(function: Callable[[], Result]) -> Result:
    """Calls `function` on rank 0 alone. Every rank returns its result or raises its error."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    result, remote_failure = broadcast_objects([result, _to_picklable(failure)])
    if failure or remote_failure:
        raise failure or remote_failure
    return result


def run_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Calls `function` on every rank. If it raises on any rank, all ranks raise the error of the lowest one."""
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    raise_first_error(failure)
    return cast(Result, result)


def raise_first_error(failure: Exception | None) -> None:
    """Raises the error of the lowest rank that has one, on every rank. Collective: every rank must call it."""
    failures = all_gather_object(_to_picklable(failure))
    failures[rank()] = failure  # the original, with its traceback
    for first_failure in failures:
        if first_failure is not None:
            raise first_failure


def _to_picklable(failure: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure


def broadcast_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Overwrites the tensors of all ranks in place with rank 0's, bit by bit.

    Several tensors travel in one broadcast. A single contiguous tensor on `device` is sent without a copy.

    Args:
        tensors: Tensors of any dtype and device, in the same order on all ranks.
        device: A device that the process group supports; tensors on others are copied there and back.
    """
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    if world_size() == 1 or not tensors:
        return
    pieces = [tensor.to(device).contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    buffer = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    dist.broadcast(buffer, src=0)
    for tensor, part in zip(tensors, buffer.split([len(piece) for piece in pieces]), strict=True):
        if part.data_ptr() != tensor.data_ptr():
            aligned = part if len(pieces) == 1 else part.clone()
            tensor.copy_(aligned.view(tensor.dtype).view(tensor.shape))


def wrap_ddp(network: nn.Module, compress_gradients: bool = False) -> nn.Module:
    """Wraps a network in DistributedDataParallel if there are several ranks.

    With `compress_gradients`, gradients are exchanged as bfloat16.
    """
    if world_size() == 1:
        return network
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if compress_gradients:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def broadcast_buffers(networks: Iterable[nn.Module]) -> None:
    """Broadcasts rank 0's batch norm statistics, which are the ones in its checkpoint, to all ranks.

    Skips integer buffers. They are equal on all ranks, and the step count of a weight average is on the CPU, which NCCL
    does not support.
    """
    if world_size() > 1:
        for network in networks:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, src=0)
