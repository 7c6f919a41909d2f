"""Copies small tensors between CPU and GPU without blocking either of them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to `device` asynchronously, through pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncHostCopy:
    """Starts copying a tensor to the CPU.

    Unlike `tensor.tolist()`, `wait()` waits only for the work that was queued on the GPU before the copy.
    """

    def __init__(self, tensor: Tensor):
        self._host_tensor = tensor.detach().to("cpu", non_blocking=True)  # in pinned memory
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied:
            self._copied.record()

    def wait(self) -> list[float]:
        """Waits for the copy and returns all values in one flat list."""
        if self._copied:
            self._copied.synchronize()
        return self._host_tensor.flatten().tolist()
