"""The discriminators of a learner: how they are trained, and what they make of the clips that the learner makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from giffy_ray.config import OptimConfig, SpeedConfig
from giffy_ray.core.tensor_types import ClipFloats, PerClip
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.optimized_module import BufferSnapshot, OptimizedModule


class DiscriminatorGroup:
    """`discriminators`, each (real, made) -> logits of both, by the name that a checkpoint gives it.

    They learn at `optim.discriminator_lr`, or `optim.lr` where it is none; no average of their weights is kept, for
    they make no clips. `real_label` is that of the logistic loss.
    """

    def __init__(
        self,
        discriminators: Mapping[str, nn.Module],
        device: torch.device,
        optim: OptimConfig,
        steps: int,
        speed: SpeedConfig,
        loss: Literal["logistic", "hinge"],
        real_label: float = 1.0,
    ):
        self.loss, self.real_label = loss, real_label
        self._buffers: list[BufferSnapshot] = []  # of the discriminators, before `generator_loss`
        unaveraged = dataclasses.replace(optim, ema_decay=0.0)
        self.descents = {
            name: OptimizedModule(network.to(device), unaveraged, steps, speed, lr=optim.discriminator_lr)
            for name, network in discriminators.items()
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: descent.network for name, descent in self.descents.items()}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: descent.optimizer for name, descent in self.descents.items()}

    def update(self, real: ClipFloats, made: ClipFloats, step: int, weight: float) -> dict[str, Tensor]:
        """One step of each discriminator, from the mean over the clips; nothing flows back into `made`.

        Returns d_loss and skipped, summed over the discriminators, and d_real and d_made, the mean of their logits
        before the step. `weight`: as for `OptimizedModule.training_step`.
        """
        named = [
            descent.training_step(functools.partial(self._loss, descent), (real, made.detach()), step, weight)
            for descent in self.descents.values()
        ]
        of_all = {name: torch.stack([each[name] for each in named]) for name in named[0]}
        sums, means = ("d_loss", "skipped"), ("d_real", "d_made")
        return {name: of_all[name].sum() for name in sums} | {name: of_all[name].mean() for name in means}

    def _loss(self, descent: OptimizedModule, real: ClipFloats, made: ClipFloats) -> tuple[Tensor, dict[str, Tensor]]:
        descent.network.train()
        real_logits, made_logits = descent(real, made)
        loss = self._discriminator_loss(real_logits, made_logits).mean()
        return loss, {"d_loss": loss, "d_real": real_logits.mean(), "d_made": made_logits.mean()}

    def generator_loss(self, made: ClipFloats) -> PerClip:
        """What each made clip costs the generator: its adversarial loss, summed over the discriminators.

        The gradient flows through the discriminators into `made`, not into their weights, and workers say nothing to
        each other. A discriminator is called with `made` in place of the real clips too, which no gradient flows
        through. It is in train mode, so batch norm takes the statistics of `made`, and its running statistics move
        towards them twice: nothing reads those of a discriminator. After
        the generator's step comes `restore_buffers_where`.
        """
        costs, self._buffers = [], []
        for descent in self.descents.values():
            descent.network.train()
            self._buffers.append(BufferSnapshot(descent.network))
            with _weights_held(descent.network):
                _, logits = descent.forward_local(descent.network, made.detach(), made)
            costs.append(
                losses.logistic_generator(logits) if self.loss == "logistic" else losses.hinge_generator(logits)
            )
        return torch.stack(costs).sum(0)

    def restore_buffers_where(self, skipped: Tensor) -> None:
        """Restores the buffers that `generator_loss` changed if `skipped`, a scalar: clips may be NaN then."""
        for buffers in self._buffers:
            buffers.restore_where(skipped)
        self._buffers = []

    def _discriminator_loss(self, real_logits: PerClip, made_logits: PerClip) -> PerClip:
        if self.loss == "logistic":
            return losses.logistic_discriminator(real_logits, made_logits, self.real_label)
        return losses.hinge_discriminator(real_logits, made_logits)


@contextmanager
def _weights_held(network: nn.Module) -> Iterator[None]:
    """Inside, the network's weights are constants to autograd."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
