"""How one network is trained, as the `optim` section says: Adam, learning rate over the steps, clipping, average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from giffy_ray import ranks
from giffy_ray.config import OptimConfig, SpeedConfig

_YOUNG = 10  # steps in which an average forgets faster: what it starts from is not worth keeping


class Descent:
    """A network with its optimiser.

    The number of a step, which the learning rate depends on, is the caller's: it follows from the place in the sample
    stream, so a run that was cut goes on with the rate it had.
    """

    def __init__(self, network: nn.Module, optim: OptimConfig, steps: int, speed: SpeedConfig, lr: float | None = None):
        self.optim, self.steps, self.speed, self.lr = optim, steps, speed, lr or optim.lr
        self.device = next(network.parameters()).device
        self.network = network = _laid_out(network, speed, self.device)
        self.average = averaged(network, optim.ema) if optim.ema else None
        if speed.compile:
            network.compile()
        self.parallel = ranks.averaging(network, speed.compress_gradients)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=self.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )

    @property
    def trained(self) -> nn.Module:
        """The network that makes clips: the average of the weights where there is one."""
        return self.average.module if self.average else self.network

    def networks(self, name: str) -> dict[str, nn.Module]:
        """What a checkpoint holds of it."""
        return {name: self.network} | ({f"{name}_average": self.average} if self.average else {})

    def __call__(self, *inputs: Tensor) -> Any:
        """What the network makes of them, in float32 (or wider) whatever it is computed in."""
        return self.of(self.parallel, *inputs)

    def of(self, network: nn.Module, *inputs: Tensor) -> Any:
        """The same of the network as it is given, without the other workers."""
        if self.speed.channels_last:
            inputs = tuple(_channels_last(one) for one in inputs)
        narrow = self.speed.precision == "bfloat16" or (self.speed.precision == "auto" and self.device.type == "cuda")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            outputs = network(*inputs)
        return _widened(outputs)

    def descend(
        self,
        loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        inputs: Sequence[Tensor],
        step: int,
        weight: float,
    ) -> dict[str, Tensor]:
        """One step down the gradient of loss_of(*inputs), a mean over the clips along the first axis of each input.

        Taken in parts of `speed.micro_batch` clips. `loss_of` returns the loss and named values, whose means are
        returned with `skipped`: 1 where the gradient was not finite, and nothing was done. `weight`: of these clips
        against those of the other workers.
        """
        self.optimizer.zero_grad()
        clips = len(inputs[0])
        parts = list(zip(*(one.split(self.speed.micro_batch or clips) for one in inputs), strict=True))
        means: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            share = len(part[0]) / clips
            # Workers say nothing to each other before the last part.
            silent = isinstance(self.parallel, DistributedDataParallel) and place < len(parts) - 1
            with self.parallel.no_sync() if silent else nullcontext():  # type: ignore[operator]
                loss, named = loss_of(*part)
                self._backward(weight * share * loss)
            means = {name: means.get(name, 0) + share * value.detach() for name, value in named.items()}
        means["skipped"] = self._step(step)
        return means

    def _backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`. One that is not finite spoils that of every worker, so that all leave it out."""
        (loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()

    def _step(self, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate_at(step, self.steps, self.optim)
        weights = list(self.network.parameters())
        norm = nn.utils.get_total_norm([one.grad for one in weights if one.grad is not None])
        if self.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(weights, self.optim.clip_norm, norm)
        skipped = (~norm.isfinite()).float()
        # The fused optimiser leaves the step out where this is 1, as for torch.amp.GradScaler: to ask for it here would
        # be to wait for the GPU at each step.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average and not skipped:
            self.average.update_parameters(self.network)
        return skipped


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


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of all weights and statistics, decay min(`decay`, (1 + n) / (10 + n)) at step n."""

    def average(old: PARAM_LIST, new: PARAM_LIST, _: Tensor | int) -> None:
        count = int(model.n_averaged)  # on the CPU, where the one that is given has gone to the GPU, which would answer
        if old[0].is_floating_point():
            get_ema_multi_avg_fn(min(decay, (1 + count) / (_YOUNG + count)))(old, new, count)
        else:
            for one, other in zip(old, new, strict=True):
                one.copy_(other)

    model = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return model


def _laid_out(network: nn.Module, speed: SpeedConfig, device: torch.device) -> nn.Module:
    if speed.sync_batch_norm and device.type == "cuda" and ranks.count() > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
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
