"""Training step of a conditional GAN: equation 2 of the paper."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from giffy_ray import models
from giffy_ray.config import CGANConfig, Direct3DConfig, Experiment, TwoStreamConfig
from giffy_ray.core import distributed
from giffy_ray.core.tensor_types import (
    ClipFloats,
    Clips,
    Images,
    Noise,
    PerClip,
    SampleIndices,
    Times,
    to_floats,
    to_pixels,
)
from giffy_ray.models import require_trained_length
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.discriminators import DiscriminatorGroup
from giffy_ray.training.learners.optimized_module import OptimizedModule


class GANLearner:
    """The learner of `model.kind` cgan, two_stream and direct_3d."""

    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment = experiment
        self.device = device
        self.config = cast(CGANConfig | TwoStreamConfig | Direct3DConfig, experiment.model)
        self.latent = self.config.latent
        clip = experiment.clip
        # Default: 10 times the mean absolute error, as in two-stream's code, whose range -1..1 doubles the differences.
        default_weight = 20 / (3 * clip.height * clip.width)
        self.frame_weight: float = default_weight if self.config.frame_weight is None else self.config.frame_weight
        require_trained_length(experiment, experiment.data.segments.frames or None, "data.segments.frames")
        torch.manual_seed(experiment.train.seed)
        generator = models.build(experiment.model, experiment.clip).to(device)
        self.module = OptimizedModule(generator, experiment.optim, steps, experiment.speed)
        self.discriminators = DiscriminatorGroup(
            models.build_discriminators(experiment.model, experiment.clip),
            device,
            experiment.optim,
            steps,
            experiment.speed,
            self.config.adversarial_loss,
            self.config.real_label,
        )
        self.networks = self.module.networks("generator") | self.discriminators.networks

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by their name in checkpoints."""
        return {"generator": self.module.optimizer} | self.discriminators.optimizers

    def update(self, clips: Clips, times: Times, sample_indices: SampleIndices) -> dict[str, Tensor]:
        """Takes `discriminator_updates` steps of the discriminators, then one of the generator, on the same clips.

        Each clip's sample index seeds its noise, which all of these steps share, as in the authors' code. The generator
        does not change before its own step, so it generates the clips once.
        """
        train = self.experiment.train
        self.module.network.train()
        target = to_floats(clips.to(self.device, non_blocking=True))
        noise = noise_from_keys(train.seed, sample_indices.tolist(), self.latent, self.device)
        step = int(sample_indices[0]) // train.global_batch_size
        weight = distributed.local_loss_weight(len(clips), train.global_batch_size)

        generated, penalty = self.module(target[:, :, 0], target[:, :, -1], noise)
        discriminator_metrics = {}
        for _ in range(self.config.discriminator_updates):
            discriminator_metrics = self.discriminators.update(target, generated, step, weight)
        metrics = self.module.training_step(self._loss, (target, generated, penalty), step, weight)
        self.discriminators.restore_buffers_where(metrics["skipped"] > 0)
        return discriminator_metrics | metrics | {"skipped": discriminator_metrics["skipped"] + metrics["skipped"]}

    def _loss(self, target: ClipFloats, generated: ClipFloats, penalty: PerClip) -> tuple[Tensor, dict[str, Tensor]]:
        frame_error = losses.squared_error if self.config.frame_loss == "squared" else losses.absolute_error
        frame_loss = frame_error(losses.endpoint_frames(generated), losses.endpoint_frames(target)).mean()
        g_loss = self.discriminators.generator_loss(generated).mean()
        loss = g_loss + self.frame_weight * frame_loss + penalty.mean()
        metrics = {"g_loss": g_loss, "frame_loss": frame_loss}
        if isinstance(self.config, Direct3DConfig):
            metrics["reconstruction"] = (generated - target).abs().mean()
            loss = loss + self.config.reconstruction_weight * metrics["reconstruction"]
        return loss, metrics

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Generates one clip per pair of images from `noise`."""
        require_trained_length(self.experiment, frames)
        network = self.module.eval_module.eval()
        first = to_floats(start.to(self.device))
        last = to_floats(end.to(self.device))
        generated, _ = network(first, last, noise.to(self.device))
        return to_pixels(generated).cpu()

    def reconstruct(self, clips: Clips) -> None:
        """Returns None: the generator never sees the frames between."""
