"""One optimiser step of the CVAE: equation 1 of the report."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from giffy_ray import models
from giffy_ray.config import Encoders, Experiment
from giffy_ray.core import distributed
from giffy_ray.core.tensor_types import ClipFloats, Clips, Images, Noise, SampleIndices, Times, to_floats, to_pixels
from giffy_ray.models import refuse_other_lengths
from giffy_ray.models.cvae import Autoencoder
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.optimized_module import OptimizedModule


class CVAELearner:
    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment, self.device = experiment, device
        self.model = cast(Encoders, experiment.model)
        self.latent = self.model.latent
        refuse_other_lengths(experiment, experiment.data.segments.frames or None, "data.segments.frames")
        torch.manual_seed(experiment.train.seed)
        network = models.build(experiment.model, experiment.clip).to(device)
        self.descent = OptimizedModule(network, experiment.optim, steps, experiment.speed)
        self.networks = self.descent.networks("cvae")
        self.optimizers: dict[str, torch.optim.Optimizer] = {"cvae": self.descent.optimizer}

    def update(self, clips: Clips, times: Times, positions: SampleIndices) -> dict[str, Tensor]:
        """One step of Adam on the mean over `clips` of KL + lambda1 |X-G|^2 + lambda2 (|xi-Gi|^2 + |xf-Gf|^2).

        Each clip's position seeds the noise of its latent. KL comes in over the first `model.kl_warmup_steps`.
        """
        self.descent.network.train()
        train = self.experiment.train
        noise = noise_from_keys(train.seed, positions.tolist(), self.latent, self.device)
        real = to_floats(clips.to(self.device, non_blocking=True))
        step, weight = (
            int(positions[0]) // train.global_batch_size,
            distributed.local_loss_weight(len(clips), train.global_batch_size),
        )
        kl_weight = losses.warmed_up(step, self.model.kl_warmup_steps)
        return self.descent.training_step(partial(self._loss, kl_weight=kl_weight), (real, noise), step, weight)

    def _loss(self, real: ClipFloats, noise: Noise, *, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        made, mean, std = self.descent(real, noise)
        kl = losses.gaussian_kl(mean, std).mean()
        reconstruction = losses.squared_error(made, real).mean()
        ends = losses.squared_error(losses.ends_of(made), losses.ends_of(real)).mean()
        loss = kl_weight * kl + self.model.reconstruction_weight * reconstruction + self.model.ends_weight * ends
        return loss, {"loss": loss, "kl": kl, "reconstruction": reconstruction, "ends": ends}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips from their two ends; `noise` stands for the latent (zeros: the middle of the prior)."""
        refuse_other_lengths(self.experiment, frames)
        network = cast(Autoencoder, self.descent.eval_module.eval())
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        return to_pixels(network.generate(first, last, noise.to(self.device))).cpu()

    @torch.no_grad()
    def reconstruct(self, clips: Clips) -> Clips:
        """Makes clips again, from the mean of q."""
        network, real = self.descent.eval_module.eval(), to_floats(clips.to(self.device))
        made, _, _ = network(real, torch.zeros(len(real), self.latent, device=self.device))
        return to_pixels(made).cpu()
