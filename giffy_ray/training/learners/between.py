"""One optimiser step of `between`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from giffy_ray import models
from giffy_ray.config import BetweenConfig, Experiment
from giffy_ray.core import distributed
from giffy_ray.core.async_copy import to_device_async
from giffy_ray.core.tensor_types import ClipFloats, Clips, Images, Noise, SampleIndices, Times, to_floats, to_pixels
from giffy_ray.models.between import Between
from giffy_ray.models.pair_discriminator import AUGMENT_DRAWS, augmented
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.discriminators import DiscriminatorGroup
from giffy_ray.training.learners.optimized_module import OptimizedModule

_AUGMENT = 1  # added to the seed where draws are for the discriminator's augmentation


class BetweenLearner:
    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment, self.device = experiment, device
        self.model = cast(BetweenConfig, experiment.model)
        torch.manual_seed(experiment.train.seed)
        network = Between(self.model, experiment.clip).to(device)
        self.latent = self.model.latent
        self.descent = OptimizedModule(network, experiment.optim, steps, experiment.speed)
        self.networks = self.descent.networks("between")
        self.optimizers: dict[str, torch.optim.Optimizer] = {"between": self.descent.optimizer}
        if self.model.adversarial_weight:
            judges = models.discriminators(self.model, experiment.clip)
            self.adversary = DiscriminatorGroup(judges, device, experiment.optim, steps, experiment.speed, "hinge")
            self.networks |= self.adversary.networks
            self.optimizers |= self.adversary.optimizers

    def update(self, clips: Clips, times: Times, positions: SampleIndices) -> dict[str, Tensor]:
        """One step on the mean over `clips` of the squared error relative to linear interpolation's, and KL(q || p).

        A share of the clips is made from a sample of q, the others from the prior's mean: so the mean is a good guess,
        and samples are varied. KL is a mean over those made from q, of the whole batch.
        """
        train = self.experiment.train
        self.descent.network.train()
        real = to_floats(clips.to(self.device, non_blocking=True))
        times = times.to(real, non_blocking=True)
        noise = noise_from_keys(train.seed, positions.tolist(), self.latent, self.device)
        step, weight = (
            int(positions[0]) // train.global_batch_size,
            distributed.local_loss_weight(len(clips), train.global_batch_size),
        )
        sampled = to_device_async(is_sampled(positions, self.model.posterior_fraction), self.device)
        whole_batch = step * train.global_batch_size + torch.arange(train.global_batch_size)
        rate = float(is_sampled(whole_batch, self.model.posterior_fraction).double().mean())
        whole_kl = None
        if 0 < self.experiment.speed.micro_batch_size < len(clips):
            whole_kl = self._whole_kl(real, times, sampled, rate, weight)
        loss_of = functools.partial(self._loss, step=step, weight=weight, rate=rate, whole_kl=whole_kl)
        named = self.descent.training_step(loss_of, (real, times, noise, sampled, positions), step, weight)
        if self.model.adversarial_weight:
            self.adversary.restore_buffers_where(named["skipped"] > 0)
        return named

    def _loss(
        self,
        real: ClipFloats,
        times: Times,
        noise: Noise,
        sampled: Tensor,
        positions: SampleIndices,
        *,
        step: int,
        weight: float,
        rate: float,
        whole_kl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`rate`: the share of the whole batch that is made from q; `whole_kl`: see `_whole_kl`.

        The losses are means over the clips given, so that their means over the workers are those over the batch.
        """
        model = self.model
        made, *distributions = self.descent(real, times, noise, sampled)
        relative = losses.relative_error(made, real, times, model.error_epsilon)
        kl = _mean_kl(distributions, sampled, rate)
        if model.free_nats and rate:
            whole_kl = distributed.mean_of(kl.detach(), weight) if whole_kl is None else whole_kl
            kl = losses.free_nats(kl, model.free_nats, whole_kl)
        else:
            kl = kl.sum()
        loss = relative.mean() + model.kl_weight * losses.warmed_up(step, model.kl_warmup_steps) * kl
        named = {"kl": kl, "relative_error": relative.mean()}
        if model.adversarial_weight and step >= model.adversarial_from_step:
            judged = self._judged(real, made, positions, step, weight)
            loss = loss + model.adversarial_weight * judged["g_loss"]
            named |= judged
        if 0 < rate < 1:
            named["posterior_error"] = (relative * sampled).mean() / rate
            named["prior_error"] = (relative * ~sampled).mean() / (1 - rate)
        return loss, named | {"loss": loss}

    @torch.no_grad()
    def _whole_kl(self, real: ClipFloats, times: Times, sampled: Tensor, rate: float, weight: float) -> Tensor:
        """KL of each latent value over the whole batch, [latent], before any of its micro-batches is taken.

        Whether a value costs anything, beyond its free nats, follows from all clips of the batch.
        """
        network, size = cast(Between, self.descent.network), self.experiment.speed.micro_batch_size
        total = torch.zeros(self.latent, dtype=real.dtype, device=real.device)
        for clips, moments, chosen in zip(real.split(size), times.split(size), sampled.split(size), strict=True):
            distributions = self.descent.forward_local(network.distributions, clips, moments)
            total += len(clips) / len(real) * _mean_kl(distributions, chosen, rate)
        return distributed.mean_of(total, weight)

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips of any number of frames from their two ends; noise 0 makes the prior's mean."""
        network = cast(Between, self.descent.eval_module.eval())
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        times = torch.linspace(0, 1, frames or self.experiment.clip.frames, device=self.device)[1:-1]
        between = network.generate(first, last, noise.to(self.device), times.expand(len(first), -1))
        return to_pixels(torch.cat([first[:, :, None], between, last[:, :, None]], dim=2)).cpu()

    @torch.no_grad()
    def reconstruct(self, clips: Clips) -> Clips:
        """Makes clips, whose frames are taken to be evenly spaced, again from the mean of q."""
        network, real = self.descent.eval_module.eval(), to_floats(clips.to(self.device))
        times = torch.linspace(0, 1, real.shape[2], device=self.device).expand(len(real), -1)
        noise = torch.zeros(len(real), self.latent, device=self.device)
        between, *_ = network(real, times, noise, torch.ones(len(real), dtype=torch.bool, device=self.device))
        return to_pixels(torch.cat([real[:, :, :1], between, real[:, :, -1:]], dim=2)).cpu()

    def _judged(
        self, real: ClipFloats, between: Tensor, positions: SampleIndices, step: int, weight: float
    ) -> dict[str, Tensor]:
        """One step of the discriminator, then what it makes of the frames. Both are shown the same changes of both."""
        made = torch.cat([real[:, :, :1], between, real[:, :, -1:]], dim=2)
        seed = self.experiment.train.seed + _AUGMENT
        draws = torch.special.ndtr(noise_from_keys(seed, positions.tolist(), AUGMENT_DRAWS, self.device))
        real, made = augmented(real, draws), augmented(made, draws)
        named = self.adversary.update(real, made, step, weight)
        return named | {"g_loss": self.adversary.generator_loss(made).mean()}


def is_sampled(positions: SampleIndices, share: float) -> Tensor:
    """bool [batch]: which positions of the sample stream are made from a sample of q.

    Evenly spaced, `share` of all positions: position p where the integer part of p * share grows. So it depends
    neither on the workers nor on the micro-batches.
    """
    places = positions.double()
    return ((places + 1) * share).floor() > (places * share).floor()


def _mean_kl(distributions: Sequence[Tensor], sampled: Tensor, rate: float) -> Tensor:
    """[latent]: KL of the clips made from q, as a share of the mean over those of a batch that has `rate` of them."""
    kl = losses.gaussian_kl_between(*distributions)
    return torch.where(sampled[:, None], kl, 0.0).mean(0) / (rate or 1.0)
