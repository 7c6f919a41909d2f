"""Small tensors on their way to a GPU and back, while neither it nor the CPU waits."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. A GPU fetches it when it comes to it; from other memory than pinned, we wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncHostCopy:
    """The values of a tensor, on their way to the CPU from now on.

    Asking for them waits for what the GPU was told to do before, and, unlike `tensor.tolist()`, for nothing later.
    """

    def __init__(self, tensor: Tensor):
        self._here = tensor.detach().to("cpu", non_blocking=True)  # in pinned memory
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def wait(self) -> list[float]:
        """All of them, in one row."""
        if self._arrived:
            self._arrived.synchronize()
        return self._here.flatten().tolist()
