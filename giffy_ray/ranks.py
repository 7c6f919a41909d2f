"""This worker among the others of a training. Where there is no process group it is the only one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from giffy_ray.transfer import Fetched, sent


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def weight_of(clips: int, batch: int) -> float:
    """What a mean over this worker's clips counts for, so that the mean over workers is that over the whole batch."""
    return clips * count() / batch


def sums(values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over all workers, in float64."""
    own = [float(value) for value in values]
    if count() == 1:
        return own
    tensor = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def mean_of(values: Tensor, weight: float) -> Tensor:
    """The mean of `values` over the workers, each counting for its `weight_of`. On a GPU, the CPU does not wait."""
    if count() == 1:
        return weight * values
    total = weight / count() * values
    dist.all_reduce(total)
    return total


class AnyOfEach:
    """Of each flag, whether any worker had set it at the call before: all get the same answer, and wait for nobody.

    Where there is one worker, its answer is that of the same call.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._asked: tuple[dist.Work, Fetched] | None = None

    def __call__(self, flags: Sequence[bool]) -> list[bool]:
        if count() == 1:
            return list(flags)
        answer = self.end() or [False] * len(flags)
        asked = sent(torch.tensor(flags, dtype=torch.int32), self.device)
        work = cast(dist.Work, dist.all_reduce(asked, async_op=True))
        if asked.is_cuda:
            work.wait()  # the GPU, not we
        self._asked = work, Fetched(asked)
        return answer

    def end(self) -> list[bool] | None:
        """The answer to the last call, for which this waits; None where there was none."""
        if self._asked is None:
            return None
        work, answer = self._asked
        work.wait()
        return [value > 0 for value in answer.values()]


def from_first(values: list[Any]) -> list[Any]:
    """The values that rank 0 has, on all workers."""
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values


def from_all(value: Any) -> list[Any]:
    """The value of each rank, by rank, on all workers."""
    values = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values


def averaging(network: nn.Module, compressed: bool = False) -> nn.Module:
    """A network whose gradients are averaged over the workers as they are made; sent as bfloat16 where `compressed`."""
    if count() == 1:
        return network
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if compressed:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def share_buffers(networks: Iterable[nn.Module]) -> None:
    """Gives all workers the statistics of rank 0's batch norms: those that its checkpoint holds.

    Counts are the same everywhere, and that of an average of weights lies on the CPU, from where NCCL sends nothing.
    """
    if count() > 1:
        for network in networks:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, src=0)
