"""Training step of the CVAE: equation 1 of the paper."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from giffy_ray import models
from giffy_ray.config import BaseCVAEConfig, Experiment
from giffy_ray.core import distributed
from giffy_ray.core.tensor_types import ClipFloats, Clips, Images, Noise, SampleIndices, Times, to_floats, to_pixels
from giffy_ray.models import require_trained_length
from giffy_ray.models.cvae import Autoencoder
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.optimized_module import OptimizedModule


class CVAELearner:
    """The learner of `model.kind` cvae and advanced_cvae."""

    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment = experiment
        self.device = device
        self.config = cast(BaseCVAEConfig, experiment.model)
        self.latent = self.config.latent
        require_trained_length(experiment, experiment.data.segments.frames or None, "data.segments.frames")
        torch.manual_seed(experiment.train.seed)
        network = models.build(experiment.model, experiment.clip).to(device)
        self.module = OptimizedModule(network, experiment.optim, steps, experiment.speed)
        self.networks = self.module.networks("cvae")

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by their name in checkpoints."""
        return {"cvae": self.module.optimizer}

    def update(self, clips: Clips, times: Times, sample_indices: SampleIndices) -> dict[str, Tensor]:
        """Takes one step on the mean over `clips` of KL + lambda1 |X-G|^2 + lambda2 (|xi-Gi|^2 + |xf-Gf|^2).

        Each clip's sample index seeds its noise. The KL term is warmed up over `model.kl_warmup_steps`.
        """
        self.module.network.train()
        train = self.experiment.train
        noise = noise_from_keys(train.seed, sample_indices.tolist(), self.latent, self.device)
        target = to_floats(clips.to(self.device, non_blocking=True))
        step = int(sample_indices[0]) // train.global_batch_size
        weight = distributed.local_loss_weight(len(clips), train.global_batch_size)
        loss_fn = partial(self._loss, kl_factor=losses.warmup_factor(step, self.config.kl_warmup_steps))
        return self.module.training_step(loss_fn, (target, noise), step, weight)

    def _loss(self, target: ClipFloats, noise: Noise, *, kl_factor: float) -> tuple[Tensor, dict[str, Tensor]]:
        generated, mean, std = self.module(target, noise)
        kl = losses.gaussian_kl(mean, std).mean()
        reconstruction = losses.squared_error(generated, target).mean()
        ends = losses.squared_error(losses.endpoint_frames(generated), losses.endpoint_frames(target)).mean()
        loss = kl_factor * kl + self.config.reconstruction_weight * reconstruction + self.config.ends_weight * ends
        return loss, {"loss": loss, "kl": kl, "reconstruction": reconstruction, "ends": ends}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Generates one clip per pair of images. `noise` is the latent; zeros give the mean of the prior."""
        require_trained_length(self.experiment, frames)
        network = cast(Autoencoder, self.module.eval_module.eval())
        first = to_floats(start.to(self.device))
        last = to_floats(end.to(self.device))
        return to_pixels(network.generate(first, last, noise.to(self.device))).cpu()

    @torch.no_grad()
    def reconstruct(self, clips: Clips) -> Clips:
        """Reconstructs clips from the mean of the posterior q."""
        network = self.module.eval_module.eval()
        target = to_floats(clips.to(self.device))
        generated, _, _ = network(target, torch.zeros(len(target), self.latent, device=self.device))
        return to_pixels(generated).cpu()
