"""One step of a conditional GAN: equation 2 of the report."""

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
from giffy_ray.models import refuse_other_lengths
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training.learners import losses
from giffy_ray.training.learners.discriminators import DiscriminatorGroup
from giffy_ray.training.learners.optimized_module import OptimizedModule


class GANLearner:
    def __init__(self, experiment: Experiment, device: torch.device, steps: int):
        self.experiment, self.device = experiment, device
        self.model = cast(CGANConfig | TwoStreamConfig | Direct3DConfig, experiment.model)
        self.latent, weight = self.model.latent, self.model.frame_weight
        clip = experiment.clip
        self.frame_weight: float = 20 / (3 * clip.height * clip.width) if weight is None else weight
        refuse_other_lengths(experiment, experiment.data.segments.frames or None, "data.segments.frames")
        torch.manual_seed(experiment.train.seed)
        generator = models.build(experiment.model, experiment.clip).to(device)
        self.descent = OptimizedModule(generator, experiment.optim, steps, experiment.speed)
        judges = models.discriminators(experiment.model, experiment.clip)
        self.adversary = DiscriminatorGroup(
            judges,
            device,
            experiment.optim,
            steps,
            experiment.speed,
            self.model.adversarial_loss,
            self.model.real_label,
        )
        self.networks = self.descent.networks("generator") | self.adversary.networks
        self.optimizers = {"generator": self.descent.optimizer} | self.adversary.optimizers

    def update(self, clips: Clips, times: Times, positions: SampleIndices) -> dict[str, Tensor]:
        """`discriminator_updates` steps of the discriminators, then one of the generator, all on the same clips.

        Each clip's position seeds its noise, which is the same for all of these steps, as in the authors' code. So the
        generator, which does not change meanwhile, makes its clips once for all of them.
        """
        train = self.experiment.train
        self.descent.network.train()
        real = to_floats(clips.to(self.device, non_blocking=True))
        noise = noise_from_keys(train.seed, positions.tolist(), self.latent, self.device)
        step, weight = (
            int(positions[0]) // train.global_batch_size,
            distributed.local_loss_weight(len(clips), train.global_batch_size),
        )

        made, penalty = self.descent(real[:, :, 0], real[:, :, -1], noise)
        judged = {}
        for _ in range(self.model.discriminator_updates):
            judged = self.adversary.update(real, made, step, weight)
        named = self.descent.training_step(self._loss, (real, made, penalty), step, weight)
        self.adversary.restore_buffers_where(named["skipped"] > 0)
        return judged | named | {"skipped": judged["skipped"] + named["skipped"]}

    def _loss(self, real: ClipFloats, made: ClipFloats, penalty: PerClip) -> tuple[Tensor, dict[str, Tensor]]:
        frame_error = losses.squared_error if self.model.frame_loss == "squared" else losses.absolute_error
        frame_loss = frame_error(losses.ends_of(made), losses.ends_of(real)).mean()
        g_loss = self.adversary.generator_loss(made).mean()
        loss = g_loss + self.frame_weight * frame_loss + penalty.mean()
        named = {"g_loss": g_loss, "frame_loss": frame_loss}
        if isinstance(self.model, Direct3DConfig):
            named["reconstruction"] = (made - real).abs().mean()
            loss = loss + self.model.reconstruction_weight * named["reconstruction"]
        return loss, named

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips from their two ends and `noise`, which the generator takes as it is."""
        refuse_other_lengths(self.experiment, frames)
        network = self.descent.eval_module.eval()
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        made, _ = network(first, last, noise.to(self.device))
        return to_pixels(made).cpu()

    def reconstruct(self, clips: Clips) -> None:
        """The generator never sees the frames between."""
