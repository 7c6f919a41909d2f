"""Loss functions: floats in, one value per clip out. The learners average over the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.core.tensor_types import ClipFloats, PerClip, Times

# Keeps the logarithm finite if a standard deviation underflows. The paper's code uses the same constant.
_VARIANCE_EPSILON = 1e-8


def squared_error(generated: Tensor, target: Tensor) -> PerClip:
    """||target - generated||^2 of equation 1, summed over every axis but the first."""
    return (generated - target).square().flatten(1).sum(1)


def absolute_error(generated: Tensor, target: Tensor) -> PerClip:
    """|target - generated|, summed over every axis but the first."""
    return (generated - target).abs().flatten(1).sum(1)


def endpoint_frames(clips: ClipFloats) -> Tensor:
    """Returns the first and last frame as a view, [batch, 3, 2, height, width].

    A slice, because indexing with a list would synchronize with the GPU.
    """
    return clips[:, :, :: clips.shape[2] - 1]


def relative_error(generated: Tensor, target: ClipFloats, times: Times, epsilon: float) -> PerClip:
    """Mean squared error of the frames between, relative to that of linear interpolation plus `epsilon`.

    Args:
        generated: Only the frames between, [batch, 3, time - 2, height, width].
        target: The clips with their endpoint frames, [batch, 3, time, height, width].
        times: Times of all frames, at which the linear interpolation is taken.
        epsilon: Keeps the ratio finite for still clips.
    """
    time = times[:, None, 1:-1, None, None]
    between = target[:, :, 1:-1]
    linear = target[:, :, :1] * (1 - time) + target[:, :, -1:] * time
    error = (generated - between).square().flatten(1).mean(1)
    linear_error = (linear - between).square().flatten(1).mean(1)
    return error / (linear_error + epsilon)


def gaussian_kl(mean: Tensor, std: Tensor) -> PerClip:
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over the latent axis: [batch, latent] -> [batch].

    Closed form of Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean.square() + std.square() - (std.square() + _VARIANCE_EPSILON).log() - 1).sum(1)


def gaussian_kl_between(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)) in nats, elementwise: all [batch, latent]."""
    return (prior_std / std).log() + (std.square() + (mean - prior_mean).square()) / (2 * prior_std.square()) - 0.5


def free_nats(kl: Tensor, free: float, batch_kl: Tensor | None = None) -> Tensor:
    """Sums KL over the latent axis, counting each latent value for at least `free` nats.

    Free bits (Kingma et al. 2016, arXiv 1606.04934, eq. 15): below `free` the cost is constant, so there is no pressure
    to give a latent value up.

    Args:
        kl: KL of each latent value, a mean over clips, [latent].
        free: The threshold in nats.
        batch_kl: The mean over the global batch, [latent], if `kl` covers only some of its clips. It then decides which
            values are above the threshold.

    Returns:
        A scalar.
    """
    return torch.where((kl if batch_kl is None else batch_kl) > free, kl, free).sum()


def logistic_discriminator(target_logits: PerClip, generated_logits: PerClip, real_label: float) -> PerClip:
    """Cross entropy of the discriminator in nats: target clips against `real_label`, generated clips against 0.

    Goodfellow et al. 2014 (arXiv 1406.2661), eq. 1, with one-sided label smoothing for `real_label` below 1 (Salimans
    et al. 2016, arXiv 1606.03498, section 3.4).
    """
    positive = functional.softplus(-target_logits)
    negative = functional.softplus(target_logits)
    return real_label * positive + (1 - real_label) * negative + functional.softplus(generated_logits)


def logistic_generator(generated_logits: PerClip) -> PerClip:
    """Non-saturating generator loss -log D(generated) in nats: Goodfellow et al. 2014, section 3."""
    return functional.softplus(-generated_logits)


def hinge_discriminator(target_logits: PerClip, generated_logits: PerClip) -> PerClip:
    """Hinge loss with margins 1 for target clips and -1 for generated clips: Lim & Ye 2017 (arXiv 1705.02894)."""
    return functional.relu(1 - target_logits) + functional.relu(1 + generated_logits)


def hinge_generator(generated_logits: PerClip) -> PerClip:
    """The generator's side of the hinge loss, -D(generated): SAGAN (Zhang et al. 2019, arXiv 1805.08318), eq. 4."""
    return -generated_logits


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Returns the weight in (0, 1] of a loss term that is warmed up linearly over `warmup_steps`, from step 0 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
