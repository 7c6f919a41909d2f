"""One optimiser step of `between`."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from giffy_ray import losses, models, ranks
from giffy_ray.config import BetweenConfig, Experiment
from giffy_ray.learners.adversary import Adversary
from giffy_ray.learners.descent import Descent
from giffy_ray.learners.noise import noise_at
from giffy_ray.models.between import Between
from giffy_ray.models.pair_discriminator import AUGMENT_DRAWS, augmented
from giffy_ray.shapes import ClipFloats, Clips, Images, Noise, Positions, Times, to_floats, to_pixels

_AUGMENT = 1  # added to the seed where draws are for the discriminator's augmentation


class BetweenLearner:
    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment, self.device = experiment, device
        self.model = cast(BetweenConfig, experiment.model)
        torch.manual_seed(experiment.train.seed)
        network = Between(self.model, experiment.clip).to(device)
        self.latent = self.model.latent
        self.descent = Descent(network, experiment.optim, steps, experiment.speed)
        self.networks = self.descent.networks("between")
        self.optimizers: dict[str, torch.optim.Optimizer] = {"between": self.descent.optimizer}
        if self.model.adversarial_weight:
            judges = models.discriminators(self.model, experiment.clip)
            self.adversary = Adversary(judges, device, experiment.optim, steps, experiment.speed, "hinge")
            self.networks |= self.adversary.networks
            self.optimizers |= self.adversary.optimizers

    def update(self, clips: Clips, times: Times, positions: Positions) -> dict[str, Tensor]:
        """One step on the mean over `clips` of the squared error relative to linear interpolation's, and KL(q || p).

        A share of the clips is made from a sample of q, the others from the prior's mean: so the mean is a good guess,
        and samples are varied.
        """
        train = self.experiment.train
        self.descent.network.train()
        real = to_floats(clips.to(self.device, non_blocking=True))
        times = times.to(real, non_blocking=True)
        noise = noise_at(train.seed, positions.tolist(), self.latent, self.device)
        places = torch.arange(len(real) + 1, dtype=torch.float64, device=self.device)
        sampled = (places * self.model.sampled_share).floor().diff() > 0
        step, weight = int(positions[0]) // train.batch, ranks.weight_of(len(clips), train.batch)
        loss_of = functools.partial(self._loss, step=step, weight=weight)
        return self.descent.descend(loss_of, (real, times, noise, sampled, positions), step, weight)

    def _loss(
        self,
        real: ClipFloats,
        times: Times,
        noise: Noise,
        sampled: Tensor,
        positions: Positions,
        *,
        step: int,
        weight: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        made, *distributions = self.descent(real, times, noise, sampled)
        relative = losses.relative_error(made, real, times, model.error_floor)
        kl = losses.free_nats(losses.gaussian_kl_between(*distributions)[sampled], model.free_nats)
        loss = relative.mean() + model.kl_weight * losses.warmed_up(step, model.kl_warmup_steps) * kl
        named = {"kl": kl, "relative_error": relative.mean()}
        if model.adversarial_weight and step >= model.adversarial_from_step:
            judged = self._judged(real, made, positions, step, weight)
            loss = loss + model.adversarial_weight * judged["g_loss"]
            named |= judged
        if 0 < model.sampled_share < 1:
            named["posterior_error"] = (relative * sampled).mean() / model.sampled_share
            named["prior_error"] = (relative * ~sampled).mean() / (1 - model.sampled_share)
        return loss, named | {"loss": loss}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips of any number of frames from their two ends; noise 0 makes the prior's mean."""
        network = cast(Between, self.descent.trained.eval())
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        times = torch.linspace(0, 1, frames or self.experiment.clip.frames, device=self.device)[1:-1]
        between = network.generate(first, last, noise.to(self.device), times.expand(len(first), -1))
        return to_pixels(torch.cat([first[:, :, None], between, last[:, :, None]], dim=2)).cpu()

    @torch.no_grad()
    def reconstruct(self, clips: Clips) -> Clips:
        """Makes clips, whose frames are taken to be evenly spaced, again from the mean of q."""
        network, real = self.descent.trained.eval(), to_floats(clips.to(self.device))
        times = torch.linspace(0, 1, real.shape[2], device=self.device).expand(len(real), -1)
        noise = torch.zeros(len(real), self.latent, device=self.device)
        between, *_ = network(real, times, noise, torch.ones(len(real), dtype=torch.bool, device=self.device))
        return to_pixels(torch.cat([real[:, :, :1], between, real[:, :, -1:]], dim=2)).cpu()

    def _judged(
        self, real: ClipFloats, between: Tensor, positions: Positions, step: int, weight: float
    ) -> dict[str, Tensor]:
        """One step of the discriminator, then what it makes of the frames. Both are shown the same changes of both."""
        made = torch.cat([real[:, :, :1], between, real[:, :, -1:]], dim=2)
        seed = self.experiment.train.seed + _AUGMENT
        draws = torch.special.ndtr(noise_at(seed, positions.tolist(), AUGMENT_DRAWS, self.device))
        real, made = augmented(real, draws), augmented(made, draws)
        named = self.adversary.update(real, made, step, weight)
        return named | {"g_loss": self.adversary.persuade(made).mean()}
