"""Metrics of generated clips against target clips, as pure functions. docs/metrics.md explains their use and limits.

Per-clip metrics map Clips `generated` and `target`, uint8 [batch, time, height, width, 3], to float64 [batch]. Most of
them use only the frames between: the two given frames would flatter every method. `skill`, `diversity` and
`bootstrap_interval` aggregate over clips or samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from giffy_ray.core.tensor_types import Clips, PerClip

_SSIM_RADIUS = 5  # the window spans 11 values
_SSIM_SIGMA = 1.5


def l2_paper(generated: Clips, target: Clips) -> PerClip:
    """L2 distance in the unit of the paper's Table 2: over all pixels of the clip in 0..255, divided by 100.

    The table's caption says pixels in 0..1, but only 0..255 reproduces its figures.
    """
    return _pixel_differences(generated, target).square().sum(1).sqrt() / 100


def psnr(generated: Clips, target: Clips) -> PerClip:
    """Peak signal-to-noise ratio of the frames between, in dB: 10 log10(255^2 / MSE). Infinite for equal clips."""
    mean_squared = _pixel_differences(generated[:, 1:-1], target[:, 1:-1]).square().mean(1)
    return 10 * torch.log10(255.0**2 / mean_squared)


def ssim(generated: Clips, target: Clips) -> PerClip:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window, reflected edges) of the frames between.

    Matches torchmetrics in float64 to 1e-5. In float32, torchmetrics takes eight times as long and is off by up to
    3e-4 on flat frames.
    """
    height, width = target.shape[2:4]
    blur_rows = _gaussian_blur_matrix(height, target.device)
    blur_columns = _gaussian_blur_matrix(width, target.device).T
    # One clip at a time, so that the intermediate maps fit into the CPU cache.
    return torch.stack(
        [
            _ssim_map(generated_clip, target_clip, blur_rows, blur_columns).mean().double()
            for generated_clip, target_clip in zip(generated, target, strict=True)
        ]
    )


def _ssim_map(generated: Tensor, target: Tensor, blur_rows: Tensor, blur_columns: Tensor) -> Tensor:
    """Local SSIM of the frames between of one clip, float32 [time - 2, 3, height, width]."""
    x = generated[1:-1].permute(0, 3, 1, 2).float().div_(255)
    y = target[1:-1].permute(0, 3, 1, 2).float().div_(255)
    # Variances are invariant to an offset; subtracting it first loses fewer digits to cancellation in float32.
    offset = y.mean((-2, -1), keepdim=True)
    x, y = x.sub_(offset), y.sub_(offset)

    def blur(maps: Tensor) -> Tensor:
        return blur_rows @ (maps @ blur_columns)

    mean_x, mean_y = blur(x), blur(y)
    covariance = blur(x * y).sub_(mean_x * mean_y)
    variance_sum = blur(x.square_().add_(y.square_()))
    variance_sum.sub_(mean_x.square()).sub_(mean_y.square()).clamp_(min=0)
    mean_x, mean_y = mean_x.add_(offset), mean_y.add_(offset)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (mean_x * mean_y).mul_(2).add_(c1).mul_(covariance.mul_(2).add_(c2))
    denominator = mean_x.square_().add_(mean_y.square_()).add_(c1).mul_(variance_sum.add_(c2))
    return numerator.div_(denominator)


@functools.lru_cache(maxsize=16)
def _gaussian_blur_matrix(size: int, device: torch.device) -> Tensor:
    """float32 [size, size] that blurs an axis by matrix multiplication: Gaussian window, reflected edges."""
    taps = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    weights = torch.exp(-((taps.double() / _SSIM_SIGMA) ** 2) / 2)
    period = max(1, 2 * (size - 1))  # reflection at both edges is periodic
    positions = (torch.arange(size)[:, None] + taps) % period
    positions = torch.minimum(positions, period - positions) if size > 1 else torch.zeros_like(positions)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, positions, (weights / weights.sum()).expand(size, -1))
    return matrix.float().to(device)


def squared_error(generated: Clips, target: Clips) -> PerClip:
    """Sum of squared differences over the frames between, pixels in 0..255; the input of `skill`."""
    return _pixel_differences(generated[:, 1:-1], target[:, 1:-1]).square().sum(1)


def ends_error(generated: Clips, target: Clips) -> PerClip:
    """Root mean squared error of the first and last frame, 0..255. It is 0 if both given images are reproduced."""
    return _rms(_pixel_differences(generated[:, [0, -1]], target[:, [0, -1]]))


def motion_error(generated: Clips, target: Clips) -> PerClip:
    """Root mean squared error of temporal differences (each frame minus the previous one), 0..510.

    A constant change of brightness has no effect on it.
    """
    return _rms(_adjacent_differences(generated, 1).sub_(_adjacent_differences(target, 1)).flatten(1))


def motion_ratio(generated: Clips, target: Clips) -> PerClip:
    """Mean absolute temporal difference, generated over target: 1 is the right amount of motion, 0 a still.

    Infinite if only the target is still, NaN if both are.
    """
    generated_motion = _adjacent_differences(generated, 1).abs_().flatten(1).mean(1)
    return generated_motion / _adjacent_differences(target, 1).abs_().flatten(1).mean(1)


def sharpness_ratio(generated: Clips, target: Clips) -> PerClip:
    """Mean absolute spatial gradient of the frames between, generated over target: below 1 is blurred, above 1 noisy.

    The gradient sums the differences of adjacent pixels along height and along width. Infinite if only the target is
    flat, NaN if both are.
    """
    return _mean_gradient(generated[:, 1:-1]) / _mean_gradient(target[:, 1:-1])


def skill(generated_sse: Tensor, linear_sse: Tensor) -> Tensor:
    """Mean squared error skill score (Murphy 1988, Monthly Weather Review 116) against linear interpolation.

    1 is perfect, 0 equals linear interpolation, and negative values are worse than it.

    Args:
        generated_sse: `squared_error` of the method, [batch].
        linear_sse: `squared_error` of linear interpolation, [batch].

    Returns:
        The scalar 1 - sum(generated_sse) / sum(linear_sse); NaN if both sums are 0.
    """
    return 1 - generated_sse.sum() / linear_sse.sum()


def diversity(samples: UInt8[Tensor, "*clips sample time height width 3"]) -> Float[Tensor, "*clips"]:
    """Mean pairwise root mean squared difference of a clip's samples over the frames between, 0..255.

    Returns:
        float64 with the axes that precede `sample`.

    Raises:
        ValueError: There are fewer than two samples.
    """
    count = samples.shape[-5]
    if count < 2:
        raise ValueError(f"samples: diversity needs at least 2 per clip (value {count})")
    values = samples[..., 1:-1, :, :, :].flatten(-4).double()
    # The matrix product formula for distances would lose half of the digits.
    distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((-1, -2)) / (count * (count - 1)) / values.shape[-1] ** 0.5


def bootstrap_interval(
    statistic: Callable[..., Tensor],
    sources: Sequence[str],
    *values: PerClip,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic(*values)` by a cluster bootstrap over source videos.

    Each resample draws as many videos as there are, with replacement, and takes all their clips, because clips of one
    video are not independent (Davison & Hinkley 1997, section 3.8).

    Args:
        statistic: Maps the resampled values to a scalar, such as `torch.mean` or `skill`.
        sources: Source video of each clip.
        *values: Per-clip values, [batch] each; they are resampled together.
        confidence: Coverage of the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bound. Both are NaN if all clips come from one video.

    Raises:
        ValueError: The lengths differ or are 0.
    """
    lengths = [len(per_clip) for per_clip in values]
    if set(lengths) != {len(sources)} or not sources:
        raise ValueError(f"bootstrap_interval: {len(sources)} sources for values of {lengths} clips")
    clips_by_source: dict[str, list[int]] = {}
    for clip, source in enumerate(sources):
        clips_by_source.setdefault(source, []).append(clip)
    if len(clips_by_source) == 1:
        return math.nan, math.nan
    groups = [np.array(clips) for clips in clips_by_source.values()]
    rng = np.random.default_rng(seed)
    statistics = np.empty(resamples)
    for resample in range(resamples):
        clips = np.concatenate([groups[group] for group in rng.integers(len(groups), size=len(groups))])
        statistics[resample] = statistic(*(per_clip[clips] for per_clip in values))
    low, high = np.quantile(statistics, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def _pixel_differences(generated: Clips, target: Clips) -> Tensor:
    """float64 [batch, values]."""
    return (generated.double() - target.double()).flatten(1)


def _adjacent_differences(clips: Clips, axis: int) -> Tensor:
    """Each value minus the previous one along `axis`, float64."""
    return clips.double().diff(dim=axis)


def _mean_gradient(frames: Clips) -> PerClip:
    gradients = (_adjacent_differences(frames, axis).abs_().flatten(1).mean(1) for axis in (2, 3))
    return sum(gradients, start=torch.zeros(()))


def _rms(differences: Tensor) -> PerClip:
    return differences.square().mean(1).sqrt()
