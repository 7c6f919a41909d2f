"""One optimiser step of `between`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from giffy_ray import losses
from giffy_ray.config import BetweenConfig, Experiment
from giffy_ray.learners.descent import Descent
from giffy_ray.learners.noise import noise_at
from giffy_ray.models.between import Between
from giffy_ray.shapes import Clips, Images, Noise, Positions, Times, to_floats, to_pixels


class BetweenLearner:
    def __init__(
        self, experiment: Experiment, device: torch.device, parallel: Callable[[nn.Module], nn.Module], steps: int
    ):
        self.experiment, self.device = experiment, device
        self.model = cast(BetweenConfig, experiment.model)
        torch.manual_seed(experiment.train.seed)
        network = Between(self.model, experiment.clip).to(device)
        self.latent = network.latent
        self.descent = Descent(network, experiment.optim, steps, parallel)
        self.networks = self.descent.networks("between")
        self.optimizers: dict[str, torch.optim.Optimizer] = {"between": self.descent.optimizer}

    def update(self, clips: Clips, times: Times, positions: Positions) -> dict[str, Tensor]:
        """One step on the mean over `clips` of the squared error relative to linear interpolation's, and KL(q || p).

        The first clips of the batch are made from a sample of q, the others from the prior's mean: so the mean is a
        good guess, and samples are varied.
        """
        model, step = self.model, int(positions[0]) // self.experiment.train.batch
        self.descent.network.train()
        real, times = to_floats(clips.to(self.device, non_blocking=True)), times.to(self.device)
        noise = noise_at(self.experiment.train.seed, positions.tolist(), self.latent, self.device)
        sampled = torch.arange(len(real), device=self.device) < round(model.sampled_share * len(real))

        made, *distributions = self.descent.parallel(real, times, noise, sampled)
        relative = losses.relative_error(made, real, times, model.error_floor)
        kl = losses.free_nats(losses.gaussian_kl_between(*distributions)[sampled], model.free_nats)
        loss = relative.mean() + self._kl_weight(step) * kl
        self.descent(loss, step)
        named = {"loss": loss, "kl": kl, "relative_error": relative.mean()}
        if sampled.any() and not sampled.all():
            named |= {"posterior_error": relative[sampled].mean(), "prior_error": relative[~sampled].mean()}
        return {name: value.detach() for name, value in named.items()}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips of any number of frames from their two ends; noise 0 makes the prior's mean."""
        network = self.descent.trained.eval()
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        times = torch.linspace(0, 1, frames or self.experiment.clip.frames, device=self.device)
        made = network.generate(first, last, noise.to(self.device), times.expand(len(first), -1))
        return to_pixels(made).cpu()

    def _kl_weight(self, step: int) -> float:
        warmup = self.model.kl_warmup_steps
        return self.model.kl_weight * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
