"""How one network is trained, as the `optim` section says: Adam, learning rate over the steps, clipping, average."""

from __future__ import annotations

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

AVERAGE = "_average"  # how the name of a network's average ends, among what a checkpoint holds
_EMA_WARMUP_STEPS = 10  # steps in which an average forgets faster: what it starts from is not worth keeping


class OptimizedModule:
    """A network with its optimiser.

    The number of a step, which the learning rate depends on, is the caller's: it follows from the place in the sample
    stream, so a run that was cut goes on with the rate it had.
    """

    def __init__(self, network: nn.Module, optim: OptimConfig, steps: int, speed: SpeedConfig, lr: float | None = None):
        self.optim, self.steps, self.speed, self.lr = optim, steps, speed, lr or optim.lr
        self.device = next(network.parameters()).device
        self.network = network = _laid_out(network, speed, self.device)
        self.average = WeightAverage(network, optim.ema_decay) if optim.ema_decay else None
        self._buffers: BufferSnapshot | None = None  # before the first forward pass of a step
        if speed.compile:
            network.compile()
        self.parallel = distributed.wrap_ddp(network, speed.compress_gradients)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=self.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )

    @property
    def eval_module(self) -> nn.Module:
        """The network that makes clips: the average of the weights where there is one."""
        return self.average.module if self.average else self.network

    def networks(self, name: str) -> dict[str, nn.Module]:
        """What a checkpoint holds of it."""
        return {name: self.network} | ({f"{name}{AVERAGE}": self.average} if self.average else {})

    def __call__(self, *inputs: Tensor) -> Any:
        """What the network makes of them, in float32 (or wider) whatever it is computed in.

        In train mode this begins a step: if the step is skipped, batch norm's statistics return to what they are now.
        """
        if self.network.training and self._buffers is None:
            self._buffers = BufferSnapshot(self.network)
        return self.forward_local(self.parallel, *inputs)

    def forward_local(self, network: Callable[..., Any], *inputs: Tensor) -> Any:
        """The same of the network as it is given, without the other workers."""
        if self.speed.channels_last:
            inputs = tuple(_channels_last(one) for one in inputs)
        narrow = self.speed.precision == "bfloat16" or (self.speed.precision == "auto" and self.device.type == "cuda")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            outputs = network(*inputs)
        return _widened(outputs)

    def training_step(
        self,
        loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        inputs: Sequence[Tensor],
        step: int,
        weight: float,
    ) -> dict[str, Tensor]:
        """One step down the gradient of loss_of(*inputs), a mean over the clips along the first axis of each input.

        Taken in parts of `speed.micro_batch_size` clips. `loss_of` returns the loss and named values, whose means are
        returned with `skipped`: 1 where the gradient was not finite, and nothing was done. `weight`: of these clips
        against those of the other workers.
        """
        self.optimizer.zero_grad()
        clips = len(inputs[0])
        parts = list(zip(*(one.split(self.speed.micro_batch_size or clips) for one in inputs), strict=True))
        means: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            share = len(part[0]) / clips
            # Workers say nothing to each other before the last part.
            silent = isinstance(self.parallel, DistributedDataParallel) and place < len(parts) - 1
            with self.parallel.no_sync() if silent else nullcontext():  # type: ignore[operator]
                loss, named = loss_of(*part)
                self._backward(weight * share * loss)
            means = {name: means.get(name, 0) + share * value.detach() for name, value in named.items()}
        means["skipped"] = self._step(step) + means.get("skipped", 0.0)  # of a discriminator, which `loss_of` trains
        return means

    def _backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`. One that is not finite spoils that of every worker, so that all leave it out."""
        (loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()

    def _step(self, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate_at(step, self.steps, self.optim)
        weights = list(self.network.parameters())
        norm = nn.utils.get_total_norm([one.grad for one in weights if one.grad is not None])
        if self.optim.max_grad_norm:
            nn.utils.clip_grads_with_norm_(weights, self.optim.max_grad_norm, norm)
        skipped = (~norm.isfinite()).float()
        # The fused optimiser leaves the step out where this is 1, as for torch.amp.GradScaler: to ask for it here would
        # be to wait for the GPU at each step.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._buffers:
            self._buffers.restore_where(skipped > 0)
            self._buffers = None
        if self.average:
            self.average.update_unless(skipped > 0, self.network)
        return skipped


class BufferSnapshot:
    """Copies of a network's buffers, such as batch norm's running statistics. Neither call waits for a GPU."""

    def __init__(self, network: nn.Module):
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        # One tensor for each dtype: a network may have hundreds of buffers, and each copy is a kernel launch.
        self._copies = {dtype: _flatten(buffers) for dtype, buffers in self._buffers.items()}

    def restore_where(self, condition: Tensor) -> None:
        """Restores all buffers if `condition`, a scalar on their device, is true."""
        for dtype, buffers in self._buffers.items():
            values = torch.where(condition, self._copies[dtype], _flatten(buffers))
            values = values.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [each.view_as(old) for each, old in zip(values, buffers, strict=True)])  # type: ignore[attr-defined]


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class WeightAverage(AveragedModel):
    """An exponential moving average of all weights and buffers, decay min(`decay`, (1 + n) / (10 + n)) at step n.

    Its state dict is that of AveragedModel, whose own update asks the GPU for the number of steps at each step.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, device=next(network.parameters()).device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_unless(self, skipped: Tensor, network: nn.Module) -> None:
        """Takes one step towards `network`, whose weights and buffers are finite; none if `skipped`, a scalar."""
        count = self.n_averaged.double()
        decay = ((1 + count) / (_EMA_WARMUP_STEPS + count)).clamp(max=self.decay)
        # The first step copies. A skipped one has the rate 0.
        rate = torch.where(self.n_averaged > 0, 1 - decay, 1.0) * ~skipped
        pairs = [
            *zip(self.module.parameters(), network.parameters(), strict=True),
            *zip(self.module.buffers(), network.buffers(), strict=True),
        ]
        floats = [(old.detach(), new.detach()) for old, new in pairs if old.is_floating_point()]
        for dtype in {old.dtype for old, _ in floats}:
            olds, news = zip(*((old, new) for old, new in floats if old.dtype == dtype), strict=True)
            changes = torch._foreach_sub(news, olds)  # type: ignore[attr-defined]
            torch._foreach_mul_(changes, rate.to(dtype))  # type: ignore[attr-defined]
            torch._foreach_add_(olds, changes)  # type: ignore[attr-defined]
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)
        self.n_averaged += ~skipped


def rate_at(step: int, steps: int, optim: OptimConfig) -> float:
    """The share of the learning rate that step `step` of `steps` takes, in (0, 1].

    Rises evenly over `warmup_steps`; then stays, or falls as a half cosine (SGDR, Loshchilov & Hutter 2017, eq. 5).
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _laid_out(network: nn.Module, speed: SpeedConfig, device: torch.device) -> nn.Module:
    if speed.sync_batch_norm and device.type == "cuda" and distributed.world_size() > 1:
        network = convert_sync_batch_norm(network)
    if speed.channels_last:
        for parameter in network.parameters():
            parameter.data = _channels_last(parameter.data)
    return network


def _channels_last(tensor: Tensor) -> Tensor:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=layouts[tensor.dim()]) if tensor.dim() in layouts else tensor


def _widened(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_widened(output) for output in outputs)
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
