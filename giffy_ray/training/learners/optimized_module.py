"""A network with its optimizer: AdamW, learning-rate schedule, gradient clipping and weight average."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from giffy_ray.config import OptimConfig, SpeedConfig
from giffy_ray.core import distributed
from giffy_ray.models.layers import convert_sync_batch_norm

AVERAGE_SUFFIX = "_average"  # appended to a network's name in checkpoints to name its weight average
_EMA_WARMUP_STEPS = 10  # the average starts from random weights, so it forgets faster during the first steps


class OptimizedModule:
    """A network with its optimizer, as configured by the `optim` and `speed` sections.

    The caller passes the step number, on which the learning rate depends. It follows from the position in the sample
    stream, so a resumed run continues with the same learning rate.
    """

    def __init__(self, network: nn.Module, optim: OptimConfig, steps: int, speed: SpeedConfig, lr: float | None = None):
        self.optim = optim
        self.steps = steps
        self.speed = speed
        self.lr = lr or optim.lr
        self.device = next(network.parameters()).device
        self.network = network = _prepare_network(network, speed, self.device)
        self.average = WeightAverage(network, optim.ema_decay) if optim.ema_decay else None
        self._buffers: BufferSnapshot | None = None  # taken before the first forward pass of a step
        if speed.compile:
            network.compile()
        self.parallel = distributed.wrap_ddp(network, speed.compress_gradients)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, created at first use: the first optimizer of a process imports PyTorch's compiler, for 3 s."""
        return torch.optim.AdamW(
            self.network.parameters(),
            lr=self.lr,
            betas=(self.optim.beta1, self.optim.beta2),
            weight_decay=self.optim.weight_decay,
            fused=True,
        )

    @property
    def eval_module(self) -> nn.Module:
        """The network to generate with: the weight average if there is one."""
        return self.average.module if self.average else self.network

    def networks(self, name: str) -> dict[str, nn.Module]:
        """Returns the networks to save in a checkpoint, by name."""
        networks: dict[str, nn.Module] = {name: self.network}
        if self.average:
            networks[f"{name}{AVERAGE_SUFFIX}"] = self.average
        return networks

    def __call__(self, *inputs: Tensor) -> Any:
        """Runs the DDP network; outputs are at least float32, whatever the compute precision.

        In train mode the first call begins a step. If that step is skipped, buffers such as batch norm statistics are
        restored to their values at this call.
        """
        if self.network.training and self._buffers is None:
            self._buffers = BufferSnapshot(self.network)
        return self.forward_local(self.parallel, *inputs)

    def forward_local(self, network: Callable[..., Any], *inputs: Tensor) -> Any:
        """Runs `network` with the configured precision and memory format. Without DDP, ranks do not communicate."""
        if self.speed.channels_last:
            inputs = tuple(_to_channels_last(tensor) for tensor in inputs)
        use_bfloat16 = self.speed.precision == "bfloat16" or (
            self.speed.precision == "auto" and self.device.type == "cuda"
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bfloat16):
            outputs = network(*inputs)
        return _to_full_precision(outputs)

    def training_step(
        self,
        loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        inputs: Sequence[Tensor],
        step: int,
        weight: float,
    ) -> dict[str, Tensor]:
        """Takes one optimizer step, accumulating gradients over micro-batches of `speed.micro_batch_size` clips.

        Args:
            loss_fn: Maps (a part of) the inputs to the loss, a mean over clips, and named metrics.
            inputs: Tensors with one row per clip.
            step: Number of the step, from 0.
            weight: Weight of this rank's mean loss, see `distributed.local_loss_weight`.

        Returns:
            Means of the metrics, and `skipped`: 1 if the gradient was not finite and nothing was updated, plus the
            `skipped` of `loss_fn`.
        """
        self.optimizer.zero_grad()
        batch_size = len(inputs[0])
        micro_batch_size = self.speed.micro_batch_size or batch_size
        micro_batches = list(zip(*(tensor.split(micro_batch_size) for tensor in inputs), strict=True))
        means: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            fraction = len(micro_batch[0]) / batch_size
            is_last = index == len(micro_batches) - 1
            # DDP synchronizes gradients in the last micro-batch only.
            skip_sync = isinstance(self.parallel, DistributedDataParallel) and not is_last
            with self.parallel.no_sync() if skip_sync else nullcontext():  # type: ignore[operator]
                loss, metrics = loss_fn(*micro_batch)
                self._backward(weight * fraction * loss)
            means = {name: means.get(name, 0) + fraction * value.detach() for name, value in metrics.items()}
        means["skipped"] = self._step(step) + means.get("skipped", 0.0)  # `loss_fn` may train a discriminator
        return means

    def _backward(self, loss: Tensor) -> None:
        """Backpropagates `loss`.

        A non-finite loss makes the averaged gradient non-finite on every rank, so all ranks skip the step.
        """
        (loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()

    def _step(self, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor(step, self.steps, self.optim)
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.optim.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.max_grad_norm, norm)
        skipped = (~norm.isfinite()).float()
        # The fused optimizer skips the step if this is 1, as for torch.amp.GradScaler. Reading the value here would
        # synchronize with the GPU at each step.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._buffers:
            self._buffers.restore_where(skipped > 0)
            self._buffers = None
        if self.average:
            self.average.update_unless(skipped > 0, self.network)
        return skipped


class BufferSnapshot:
    """Copies of a network's buffers, such as batch norm's running statistics. Never synchronizes with a GPU."""

    def __init__(self, network: nn.Module):
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        # One tensor per dtype: a network may have hundreds of buffers, and each copy is a kernel launch.
        self._copies = {dtype: _flatten(buffers) for dtype, buffers in self._buffers.items()}

    def restore_where(self, condition: Tensor) -> None:
        """Restores all buffers if `condition`, a scalar on their device, is true."""
        for dtype, buffers in self._buffers.items():
            flat = torch.where(condition, self._copies[dtype], _flatten(buffers))
            pieces = flat.split([buffer.numel() for buffer in buffers])
            values = [piece.view_as(buffer) for piece, buffer in zip(pieces, buffers, strict=True)]
            torch._foreach_copy_(buffers, values)  # type: ignore[attr-defined]


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class WeightAverage(AveragedModel):
    """Exponential moving average of all weights and buffers, with decay min(`decay`, (1 + n) / (10 + n)) at step n.

    Its state dict is that of AveragedModel, whose own update synchronizes with the GPU at each step.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, device=next(network.parameters()).device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_unless(self, skipped: Tensor, network: nn.Module) -> None:
        """Moves the average towards `network`, unless `skipped`, a scalar, is true. All its values must be finite."""
        count = self.n_averaged.double()
        decay = ((1 + count) / (_EMA_WARMUP_STEPS + count)).clamp(max=self.decay)
        # The first step copies the weights. A skipped step has rate 0.
        rate = torch.where(self.n_averaged > 0, 1 - decay, 1.0) * ~skipped
        pairs = [
            *zip(self.module.parameters(), network.parameters(), strict=True),
            *zip(self.module.buffers(), network.buffers(), strict=True),
        ]
        float_pairs = [(average.detach(), new.detach()) for average, new in pairs if average.is_floating_point()]
        for dtype in {average.dtype for average, _ in float_pairs}:
            same_dtype = [(average, new) for average, new in float_pairs if average.dtype == dtype]
            averages, new_values = zip(*same_dtype, strict=True)
            changes = torch._foreach_sub(new_values, averages)  # type: ignore[attr-defined]
            torch._foreach_mul_(changes, rate.to(dtype))  # type: ignore[attr-defined]
            torch._foreach_add_(averages, changes)  # type: ignore[attr-defined]
        for average, new in pairs:
            if not average.is_floating_point():
                average.copy_(new)
        self.n_averaged += ~skipped


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Returns the factor in (0, 1] of the learning rate at step `step` of `steps`.

    Rises linearly over `warmup_steps`, then stays constant or falls as a half cosine (SGDR, Loshchilov & Hutter 2017,
    eq. 5).
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _prepare_network(network: nn.Module, speed: SpeedConfig, device: torch.device) -> nn.Module:
    """Converts batch norm and memory format as the `speed` section asks."""
    if speed.sync_batch_norm and device.type == "cuda" and distributed.world_size() > 1:
        network = convert_sync_batch_norm(network)
    if speed.channels_last:
        for parameter in network.parameters():
            parameter.data = _to_channels_last(parameter.data)
    return network


def _to_channels_last(tensor: Tensor) -> Tensor:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=layouts[tensor.dim()]) if tensor.dim() in layouts else tensor


def _to_full_precision(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_to_full_precision(output) for output in outputs)
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
