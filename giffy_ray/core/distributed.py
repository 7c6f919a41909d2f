"""This worker among the others of a training. Where there is no process group it is the only one."""

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


def local_loss_weight(clips: int, batch: int) -> float:
    """What a mean over this worker's clips counts for, so that the mean over workers is that over the whole batch."""
    return clips * world_size() / batch


def all_reduce_sum(values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over all workers, in float64."""
    own = [float(value) for value in values]
    if world_size() == 1:
        return own
    tensor = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def mean_of(values: Tensor, weight: float) -> Tensor:
    """Mean of `values` over the ranks, weighted by `local_loss_weight`. On a GPU, the CPU does not wait."""
    if world_size() == 1:
        return weight * values
    total = weight / world_size() * values
    dist.all_reduce(total)
    return total


class DelayedAnyReduce:
    """Of each flag, whether any worker had set it at the call before: all get the same answer, and wait for nobody.

    Where there is one worker, its answer is that of the same call.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._asked: tuple[dist.Work, AsyncHostCopy] | None = None

    def __call__(self, flags: Sequence[bool]) -> list[bool]:
        if world_size() == 1:
            return list(flags)
        answer = self.end() or [False] * len(flags)
        asked = to_device_async(torch.tensor(flags, dtype=torch.int32), self.device)
        work = cast(dist.Work, dist.all_reduce(asked, async_op=True))
        if asked.is_cuda:
            work.wait()  # the GPU, not we
        self._asked = work, AsyncHostCopy(asked)
        return answer

    def end(self) -> list[bool] | None:
        """The answer to the last call, for which this waits; None where there was none."""
        if self._asked is None:
            return None
        work, answer = self._asked
        work.wait()
        return [value > 0 for value in answer.wait()]


def broadcast_object(values: list[Any]) -> list[Any]:
    """The values that rank 0 has, on all workers."""
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values


def from_all(value: Any) -> list[Any]:
    """The value of each rank, by rank, on all workers."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], Result]) -> Result:
    """Runs `work` on rank 0 alone. All workers return what it returned, or raise what it raised."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    result, sent_failure = broadcast_object([result, _picklable(failure)])
    if failure or sent_failure:
        raise failure or sent_failure
    return result


def on_each(work: Callable[[], Result]) -> Result:
    """Runs `work` on every worker. Where it raises on any, all raise the error of the lowest rank."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    raise_first(failure)
    return cast(Result, result)


def raise_first(failure: Exception | None) -> None:
    """Raises on every worker the failure of the lowest rank that has one; all have to call this."""
    failures = from_all(_picklable(failure))
    failures[rank()] = failure  # with its traceback
    for each in failures:
        if each is not None:
            raise each


def _picklable(failure: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure


def broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Gives the tensors the values that they have on rank 0, on all workers, in place and bit by bit.

    `device`: where the process group takes tensors from; others go there and back. One contiguous tensor there is sent
    as it is, without a copy; several travel together.
    """
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    if world_size() == 1 or not tensors:
        return
    pieces = [tensor.to(device).contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    carried = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    dist.broadcast(carried, src=0)
    for tensor, part in zip(tensors, carried.split([len(piece) for piece in pieces]), strict=True):
        if part.data_ptr() != tensor.data_ptr():
            aligned = part if len(pieces) == 1 else part.clone()
            tensor.copy_(aligned.view(tensor.dtype).view(tensor.shape))


def wrap_ddp(network: nn.Module, compressed: bool = False) -> nn.Module:
    """A network whose gradients are averaged over the workers as they are made; sent as bfloat16 where `compressed`."""
    if world_size() == 1:
        return network
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if compressed:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def broadcast_buffers(networks: Iterable[nn.Module]) -> None:
    """Gives all workers the statistics of rank 0's batch norms: those that its checkpoint holds.

    Counts are the same everywhere, and that of an average of weights lies on the CPU, from where NCCL sends nothing.
    """
    if world_size() > 1:
        for network in networks:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, src=0)
