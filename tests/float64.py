"""A learner in float64: what processors round differently in float32 grows with each step, to percents with a GAN."""

import torch
from torch import nn

from giffy_ray import learners
from giffy_ray.config import Experiment
from giffy_ray.learners import Learner


def build(experiment: Experiment, steps: int = 1) -> Learner:
    torch.set_default_dtype(torch.float64)
    learner = learners.build(experiment, torch.device("cpu"), steps=steps)
    torch.set_default_dtype(torch.float32)
    for network in learner.networks.values():
        network.register_forward_pre_hook(_widened)
    return learner


def _widened(network: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    dtype = next(network.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)
