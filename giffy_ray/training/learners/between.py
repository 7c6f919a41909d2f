"""Training step of `between`: squared error relative to linear interpolation, KL, and optionally a hinge GAN loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from giffy_ray import models
from giffy_ray.config import BetweenConfig, Experiment
from giffy_ray.core import distributed
from giffy_ray.core.async_copy import to_device_async
from giffy_ray.core.tensor_types import (
    ClipFloats,
    Clips,
    ImageFloats,
    Images,
    Noise,
    SampleIndices,
    Times,
    to_floats,
    to_pixels,
)
from giffy_ray.models.between import Between
from giffy_ray.models.motion import Motion
from giffy_ray.models.pair_discriminator import AUGMENT_DRAWS, diff_augment
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.discriminators import DiscriminatorGroup
from giffy_ray.training.learners.optimized_module import OptimizedModule

_AUGMENT_SEED_OFFSET = 1  # added to the seed for the draws of the discriminator's augmentation


class BetweenLearner:
    """The learner of `model.kind` between."""

    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment = experiment
        self.device = device
        self.config = cast(BetweenConfig, experiment.model)
        torch.manual_seed(experiment.train.seed)
        network = Between(self.config, experiment.clip).to(device)
        self.latent = self.config.latent
        self.module = OptimizedModule(network, experiment.optim, steps, experiment.speed)
        self.networks = self.module.networks("between")
        if self.config.adversarial_weight:
            networks = models.build_discriminators(self.config, experiment.clip)
            self.discriminators = DiscriminatorGroup(
                networks, device, experiment.optim, steps, experiment.speed, "hinge"
            )
            self.networks |= self.discriminators.networks

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by their name in checkpoints."""
        discriminators = self.discriminators.optimizers if self.config.adversarial_weight else {}
        return {"between": self.module.optimizer} | discriminators

    def update(self, clips: Clips, times: Times, sample_indices: SampleIndices) -> dict[str, Tensor]:
        """Takes one step on the mean relative squared error and KL(q || p).

        A fraction of the clips is generated from a sample of the posterior q, the others from the mean of the prior p:
        so the mean is a good guess and samples are diverse. KL is a mean over the clips from q in the global batch.
        """
        train = self.experiment.train
        self.module.network.train()
        target = to_floats(clips.to(self.device, non_blocking=True))
        times = times.to(target, non_blocking=True)
        noise = noise_from_keys(train.seed, sample_indices.tolist(), self.latent, self.device)
        step = int(sample_indices[0]) // train.global_batch_size
        weight = distributed.local_loss_weight(len(clips), train.global_batch_size)
        from_posterior = to_device_async(posterior_mask(sample_indices, self.config.posterior_fraction), self.device)
        global_batch = step * train.global_batch_size + torch.arange(train.global_batch_size)
        posterior_rate = float(posterior_mask(global_batch, self.config.posterior_fraction).double().mean())
        batch_kl = None
        if 0 < self.experiment.speed.micro_batch_size < len(clips):
            batch_kl = self._global_batch_kl(target, times, from_posterior, posterior_rate, weight)
        loss_fn = functools.partial(
            self._loss, step=step, weight=weight, posterior_rate=posterior_rate, batch_kl=batch_kl
        )
        inputs = (target, times, noise, from_posterior, sample_indices)
        metrics = self.module.training_step(loss_fn, inputs, step, weight)
        if self.config.adversarial_weight:
            self.discriminators.restore_buffers_where(metrics["skipped"] > 0)
        return metrics

    def _loss(
        self,
        target: ClipFloats,
        times: Times,
        noise: Noise,
        from_posterior: Tensor,
        sample_indices: SampleIndices,
        *,
        step: int,
        weight: float,
        posterior_rate: float,
        batch_kl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and metrics as means over the given clips, so that means over ranks are over the batch.

        Args:
            target: The clips.
            times: Times of their frames.
            noise: One row per clip.
            from_posterior: bool [batch], which clips to generate from a sample of q.
            sample_indices: Seeds of the discriminator's augmentation.
            step: Number of the step.
            weight: Weight of this rank's mean loss.
            posterior_rate: Fraction of the global batch that is generated from q.
            batch_kl: Result of `_global_batch_kl`, if this is a micro-batch.
        """
        config = self.config
        generated, *distributions = self.module(target, times, noise, from_posterior)
        relative = losses.relative_error(generated, target, times, config.error_epsilon)
        kl = _mean_kl(distributions, from_posterior, posterior_rate)
        if config.free_nats and posterior_rate:
            if batch_kl is None:
                batch_kl = distributed.all_reduce_mean(kl.detach(), weight)
            kl = losses.free_nats(kl, config.free_nats, batch_kl)
        else:
            kl = kl.sum()
        loss = relative.mean() + config.kl_weight * losses.warmup_factor(step, config.kl_warmup_steps) * kl
        metrics = {"kl": kl, "relative_error": relative.mean()}
        if config.adversarial_weight and step >= config.adversarial_from_step:
            adversarial_metrics = self._discriminator_step(target, generated, sample_indices, step, weight)
            loss = loss + config.adversarial_weight * adversarial_metrics["g_loss"]
            metrics |= adversarial_metrics
        if 0 < posterior_rate < 1:
            metrics["posterior_error"] = (relative * from_posterior).mean() / posterior_rate
            metrics["prior_error"] = (relative * ~from_posterior).mean() / (1 - posterior_rate)
        return loss, metrics | {"loss": loss}

    @torch.no_grad()
    def _global_batch_kl(
        self, target: ClipFloats, times: Times, from_posterior: Tensor, posterior_rate: float, weight: float
    ) -> Tensor:
        """Returns the KL of each latent value over the global batch, [latent], before the first micro-batch.

        Whether a value exceeds its free nats depends on all clips of the batch.
        """
        network = cast(Between, self.module.network)
        size = self.experiment.speed.micro_batch_size
        total = torch.zeros(self.latent, dtype=target.dtype, device=target.device)
        micro_batches = zip(target.split(size), times.split(size), from_posterior.split(size), strict=True)
        for clips, clip_times, mask in micro_batches:
            distributions = self.module.forward_local(network.distributions, clips, clip_times)
            total += len(clips) / len(target) * _mean_kl(distributions, mask, posterior_rate)
        return distributed.all_reduce_mean(total, weight)

    def _discriminator_step(
        self, target: ClipFloats, between: Tensor, sample_indices: SampleIndices, step: int, weight: float
    ) -> dict[str, Tensor]:
        """Updates the discriminator, then returns its metrics and the generator's `g_loss`.

        Target and generated clips get the same augmentation. `between` holds only the frames between.
        """
        generated = torch.cat([target[:, :, :1], between, target[:, :, -1:]], dim=2)
        seed = self.experiment.train.seed + _AUGMENT_SEED_OFFSET
        normals = noise_from_keys(seed, sample_indices.tolist(), AUGMENT_DRAWS, self.device)
        draws = torch.special.ndtr(normals)  # uniform in 0..1
        target = diff_augment(target, draws)
        generated = diff_augment(generated, draws)
        metrics = self.discriminators.update(target, generated, step, weight)
        return metrics | {"g_loss": self.discriminators.generator_loss(generated).mean()}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Generates clips of any number of frames between two images; zero noise gives the mean of the prior."""
        network = cast(Between, self.module.eval_module.eval())
        first = to_floats(start.to(self.device))
        last = to_floats(end.to(self.device))
        times = torch.linspace(0, 1, frames or self.experiment.clip.frames, device=self.device)[1:-1]
        between = network.generate(first, last, noise.to(self.device), times.expand(len(first), -1))
        return to_pixels(torch.cat([first[:, :, None], between, last[:, :, None]], dim=2)).cpu()

    def iter_motion(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Tensor) -> Iterator[Motion]:
        """Estimates the motion between two images; see `models.motion.MotionEstimator`."""
        network = cast(Between, self.module.eval_module.eval())
        return network.iter_motion(start, end, noise, times)

    @torch.no_grad()
    def reconstruct(self, clips: Clips) -> Clips:
        """Reconstructs clips with evenly spaced frames from the mean of the posterior q."""
        network = self.module.eval_module.eval()
        target = to_floats(clips.to(self.device))
        times = torch.linspace(0, 1, target.shape[2], device=self.device).expand(len(target), -1)
        noise = torch.zeros(len(target), self.latent, device=self.device)
        from_posterior = torch.ones(len(target), dtype=torch.bool, device=self.device)
        between, *_ = network(target, times, noise, from_posterior)
        return to_pixels(torch.cat([target[:, :, :1], between, target[:, :, -1:]], dim=2)).cpu()


def posterior_mask(sample_indices: SampleIndices, fraction: float) -> Tensor:
    """Returns which samples to generate from the posterior q, bool [batch].

    `fraction` of all indices is chosen, evenly spaced: index i where the integer part of i * fraction increases. So the
    choice depends neither on the ranks nor on the micro-batches.
    """
    indices = sample_indices.double()
    return ((indices + 1) * fraction).floor() > (indices * fraction).floor()


def _mean_kl(distributions: Sequence[Tensor], from_posterior: Tensor, posterior_rate: float) -> Tensor:
    """Returns the KL of each latent value, [latent]: these clips' part of the mean over the batch's clips from q.

    `posterior_rate` is the fraction of the batch that is generated from q.
    """
    kl = losses.gaussian_kl_between(*distributions)
    return torch.where(from_posterior[:, None], kl, 0.0).mean(0) / (posterior_rate or 1.0)
