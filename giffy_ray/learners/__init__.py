"""A Learner is the only thing that the training loop knows of a model: how to take one step, and how to make clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from giffy_ray.config import Experiment
from giffy_ray.learners.cvae import CVAELearner
from giffy_ray.shapes import Clips, Images, Noise, Positions


class Learner(Protocol):
    networks: dict[str, nn.Module]  # bare, never wrapped: what a checkpoint holds
    optimizers: dict[str, torch.optim.Optimizer]
    latent: int  # width of the noise that `generate` takes

    def update(self, clips: Clips, positions: Positions) -> dict[str, Tensor]:
        """One optimiser step. Returns named losses, scalars averaged over this worker's clips."""
        ...

    def generate(self, start: Images, end: Images, noise: Noise) -> Clips: ...


def build(
    experiment: Experiment,
    device: torch.device,
    parallel: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Learner:
    """The learner of `experiment.model.kind`, with weights drawn from `experiment.train.seed`.

    `parallel` wraps every network that is trained, with DistributedDataParallel where there are several workers.
    """
    match experiment.model.kind:
        case "cvae":
            return CVAELearner(experiment, device, parallel)
