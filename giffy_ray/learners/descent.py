"""How one network is trained, as the `optim` section says: Adam, learning rate over the steps, clipping, average."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from giffy_ray.config import OptimConfig

_YOUNG = 10  # steps in which an average forgets faster: what it starts from is not worth keeping


class Descent:
    """A network with its optimiser. Every call descends one step.

    `step`, which the learning rate depends on, is the caller's: it follows from the place in the sample stream, so a
    run that was cut goes on with the rate it had.
    """

    def __init__(
        self,
        network: nn.Module,
        optim: OptimConfig,
        steps: int,
        parallel: Callable[[nn.Module], nn.Module],
        lr: float | None = None,
    ):
        self.network, self.optim, self.steps, self.lr = network, optim, steps, lr or optim.lr
        self.parallel = parallel(network)  # what the training calls: it averages gradients over the workers
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
        )
        self.average = averaged(network, optim.ema) if optim.ema else None

    @property
    def trained(self) -> nn.Module:
        """The network that makes clips: the average of the weights where there is one."""
        return self.average.module if self.average else self.network

    def networks(self, name: str) -> dict[str, nn.Module]:
        """What a checkpoint holds of it."""
        return {name: self.network} | ({f"{name}_average": self.average} if self.average else {})

    def __call__(self, loss: Tensor, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate_at(step, self.steps, self.optim)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.optim.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.network)


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

    def average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        kept = min(decay, (1 + int(count)) / (_YOUNG + int(count)))
        return torch.lerp(new, old, kept) if old.is_floating_point() else new

    return AveragedModel(network, avg_fn=average, use_buffers=True)
