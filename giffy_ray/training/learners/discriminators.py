"""The discriminators of an adversarial learner, and the loss that they give its generator."""

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
    """Discriminators that are trained together on the same clips.

    They have no weight average, because they do not generate clips.

    Args:
        discriminators: Networks by their name in checkpoints. Each maps (target, generated) to the logits of both.
        device: Device of the networks.
        optim: Their learning rate is `optim.discriminator_lr`, or `optim.lr` if that is None.
        steps: Number of steps of the whole training.
        speed: Precision, memory format and compilation.
        loss: The adversarial loss.
        real_label: Label of the target clips in the logistic loss.
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
        self.loss = loss
        self.real_label = real_label
        self._buffers: list[BufferSnapshot] = []  # of the discriminators, taken before `generator_loss`
        optim_without_average = dataclasses.replace(optim, ema_decay=0.0)
        self.modules = {
            name: OptimizedModule(network.to(device), optim_without_average, steps, speed, lr=optim.discriminator_lr)
            for name, network in discriminators.items()
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: module.network for name, module in self.modules.items()}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: module.optimizer for name, module in self.modules.items()}

    def update(self, target: ClipFloats, generated: ClipFloats, step: int, weight: float) -> dict[str, Tensor]:
        """Takes one optimizer step of each discriminator. No gradient flows into `generated`.

        Args:
            target: Target clips.
            generated: Generated clips with the same endpoint frames.
            step: Number of the generator's step.
            weight: As in `OptimizedModule.training_step`.

        Returns:
            `d_loss` and `skipped`, summed over the discriminators, and `d_real` and `d_made`, their mean logits for
            target and generated clips before the step.
        """
        metrics = [
            module.training_step(functools.partial(self._loss, module), (target, generated.detach()), step, weight)
            for module in self.modules.values()
        ]
        stacked = {name: torch.stack([values[name] for values in metrics]) for name in metrics[0]}
        return {
            "d_loss": stacked["d_loss"].sum(),
            "skipped": stacked["skipped"].sum(),
            "d_real": stacked["d_real"].mean(),
            "d_made": stacked["d_made"].mean(),
        }

    def _loss(
        self, module: OptimizedModule, target: ClipFloats, generated: ClipFloats
    ) -> tuple[Tensor, dict[str, Tensor]]:
        module.network.train()
        target_logits, generated_logits = module(target, generated)
        loss = self._discriminator_loss(target_logits, generated_logits).mean()
        return loss, {"d_loss": loss, "d_real": target_logits.mean(), "d_made": generated_logits.mean()}

    def _discriminator_loss(self, target_logits: PerClip, generated_logits: PerClip) -> PerClip:
        if self.loss == "logistic":
            return losses.logistic_discriminator(target_logits, generated_logits, self.real_label)
        return losses.hinge_discriminator(target_logits, generated_logits)

    def generator_loss(self, generated: ClipFloats) -> PerClip:
        """Returns the generator's adversarial loss per clip, summed over the discriminators.

        Gradients flow through the discriminators into `generated`, but not into their weights, and the ranks do not
        communicate. Each discriminator also gets the detached `generated` in place of the target clips. It is in train
        mode, so batch norm uses the statistics of `generated` and updates its running statistics twice; nothing reads
        those of a discriminator. After the generator's step, call `restore_buffers_where`.
        """
        clip_losses = []
        self._buffers = []
        for module in self.modules.values():
            module.network.train()
            self._buffers.append(BufferSnapshot(module.network))
            with _frozen_weights(module.network):
                _, logits = module.forward_local(module.network, generated.detach(), generated)
            if self.loss == "logistic":
                clip_losses.append(losses.logistic_generator(logits))
            else:
                clip_losses.append(losses.hinge_generator(logits))
        return torch.stack(clip_losses).sum(0)

    def restore_buffers_where(self, skipped: Tensor) -> None:
        """Restores the buffers that `generator_loss` changed if `skipped`, a scalar, is true: clips may be NaN then."""
        for buffers in self._buffers:
            buffers.restore_where(skipped)
        self._buffers = []


@contextmanager
def _frozen_weights(network: nn.Module) -> Iterator[None]:
    """Makes the network's weights constant for autograd inside the block."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
