"""One optimiser step of the CVAE: equation 1 of the report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from giffy_ray import losses
from giffy_ray.config import Experiment
from giffy_ray.learners.noise import noise_at
from giffy_ray.models.cvae import CVAE
from giffy_ray.shapes import Clips, Images, Noise, Positions, to_floats, to_pixels


class CVAELearner:
    def __init__(self, experiment: Experiment, device: torch.device, parallel: Callable[[nn.Module], nn.Module]):
        self.model, self.seed, self.device = experiment.model, experiment.train.seed, device
        self.latent = experiment.model.latent
        torch.manual_seed(experiment.train.seed)
        self.network = CVAE(experiment.model, experiment.clip).to(device)
        self.parallel = parallel(self.network)
        self.networks: dict[str, nn.Module] = {"cvae": self.network}
        optim = experiment.optim
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "cvae": torch.optim.Adam(self.network.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2))
        }

    def update(self, clips: Clips, positions: Positions) -> dict[str, Tensor]:
        """One step of Adam on the mean over `clips` of KL + lambda1 |X-G|^2 + lambda2 (|xi-Gi|^2 + |xf-Gf|^2).

        `positions` are the clips' places in the sample stream; each seeds the noise of its own latent.
        """
        self.network.train()
        real = to_floats(clips.to(self.device, non_blocking=True))
        noise = noise_at(self.seed, positions.tolist(), self.latent, self.device)

        made, mean, std = self.parallel(real, noise)
        kl = losses.gaussian_kl(mean, std).mean()
        reconstruction = losses.squared_error(made, real).mean()
        ends = losses.squared_error(made[:, :, [0, -1]], real[:, :, [0, -1]]).mean()
        loss = kl + self.model.reconstruction_weight * reconstruction + self.model.ends_weight * ends

        optimizer = self.optimizers["cvae"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        named = {"loss": loss, "kl": kl, "reconstruction": reconstruction, "ends": ends}
        return {name: value.detach() for name, value in named.items()}

    @torch.no_grad()
    def generate(self, start: Images, end: Images, noise: Noise) -> Clips:
        """Makes clips from their two ends; `noise` stands for the latent (zeros: the middle of the prior)."""
        self.network.eval()
        first, last = (to_floats(image.to(self.device)) for image in (start, end))
        return to_pixels(self.network.generate(first, last, noise.to(self.device))).cpu()
