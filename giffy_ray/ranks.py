"""This worker among the others of a training. Where there is no process group it is the only one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel


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


def any_of_each(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether it is set on any worker: all get the same answer."""
    return [bool(total) for total in sums(flags, device)]


def from_first(values: list[Any]) -> list[Any]:
    """The values that rank 0 has, on all workers."""
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
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
    """Gives all workers the statistics of rank 0's batch norms: those that its checkpoint holds."""
    if count() > 1:
        for network in networks:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
