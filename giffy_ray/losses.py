"""Losses as pure functions: floats in, one value per clip out. Averaging over the batch is the learner's."""

from __future__ import annotations

from torch import Tensor

from giffy_ray.shapes import PerClip

# Keeps the logarithm finite where a standard deviation underflows; the authors' code has the same constant.
_TINY = 1e-8


def squared_error(made: Tensor, real: Tensor) -> PerClip:
    """||real - made||^2 of equation 1: summed over every axis but the first."""
    return (made - real).square().flatten(1).sum(1)


def gaussian_kl(mean: Tensor, std: Tensor) -> PerClip:
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over the latent axis: [batch, latent] -> [batch].

    Closed form of Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean.square() + std.square() - (std.square() + _TINY).log() - 1).sum(1)
