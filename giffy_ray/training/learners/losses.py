"""Losses as pure functions: floats in, one value per clip out. Averaging over the batch is the learner's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.core.tensor_types import ClipFloats, PerClip, Times

# Keeps the logarithm finite where a standard deviation underflows; the authors' code has the same constant.
_TINY = 1e-8


def squared_error(made: Tensor, real: Tensor) -> PerClip:
    """||real - made||^2 of equation 1: summed over every axis but the first."""
    return (made - real).square().flatten(1).sum(1)


def ends_of(clips: ClipFloats) -> Tensor:
    """First and last frame, a view: [batch, 3, 2, height, width]. Indices in a list would make a GPU be waited for."""
    return clips[:, :, :: clips.shape[2] - 1]


def gaussian_kl(mean: Tensor, std: Tensor) -> PerClip:
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over the latent axis: [batch, latent] -> [batch].

    Closed form of Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean.square() + std.square() - (std.square() + _TINY).log() - 1).sum(1)


def gaussian_kl_between(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)) in nats, of each value: all [batch, latent]."""
    return (prior_std / std).log() + (std.square() + (mean - prior_mean).square()) / (2 * prior_std.square()) - 0.5


def free_nats(kl: Tensor, free: float, whole: Tensor | None = None) -> Tensor:
    """[latent] -> scalar: the sum over the latent of what each value costs beyond `free` nats.

    `kl` is a mean over clips. Free bits (Kingma et al. 2016, arXiv 1606.04934, eq. 15): below `free` a value costs the
    same, so it is not given up. `whole`, [latent], is the mean over the whole batch, which decides this, where `kl` is
    only the share of some of its clips.
    """
    return torch.where((kl if whole is None else whole) > free, kl, free).sum()


def relative_error(made: Tensor, real: ClipFloats, times: Times, floor: float) -> PerClip:
    """Mean squared error of the frames between, over that of linear interpolation at their times plus `floor`.

    `real` has the end frames, `made` only those between.
    """
    time, between = times[:, None, 1:-1, None, None], real[:, :, 1:-1]
    linear = real[:, :, :1] * (1 - time) + real[:, :, -1:] * time
    error, baseline = ((guess - between).square().flatten(1).mean(1) for guess in (made, linear))
    return error / (baseline + floor)


def absolute_error(made: Tensor, real: Tensor) -> PerClip:
    """|real - made|, summed over every axis but the first."""
    return (made - real).abs().flatten(1).sum(1)


def logistic_discriminator(real_logits: PerClip, made_logits: PerClip, real_label: float) -> PerClip:
    """Cross entropy of the discriminator in nats: real clips against `real_label`, made ones against 0.

    Goodfellow et al. 2014 (arXiv 1406.2661), eq. 1, with one-sided label smoothing where `real_label` is below 1
    (Salimans et al. 2016, arXiv 1606.03498, section 3.4).
    """
    real = real_label * functional.softplus(-real_logits) + (1 - real_label) * functional.softplus(real_logits)
    return real + functional.softplus(made_logits)


def logistic_generator(made_logits: PerClip) -> PerClip:
    """-log D(made) in nats, which does not saturate where D is sure: Goodfellow et al. 2014, section 3."""
    return functional.softplus(-made_logits)


def hinge_discriminator(real_logits: PerClip, made_logits: PerClip) -> PerClip:
    """Real clips are to be above 1, made ones below -1: Lim & Ye 2017 (arXiv 1705.02894)."""
    return functional.relu(1 - real_logits) + functional.relu(1 + made_logits)


def hinge_generator(made_logits: PerClip) -> PerClip:
    """The generator's side of the hinge loss: -D(made), as in SAGAN (Zhang et al. 2019, arXiv 1805.08318), eq. 4."""
    return -made_logits


def warmed_up(step: int, steps: int) -> float:
    """What a term that comes in linearly over `steps` counts for at step `step`, from 0 on: up to 1."""
    return min(1.0, (step + 1) / steps) if steps else 1.0
