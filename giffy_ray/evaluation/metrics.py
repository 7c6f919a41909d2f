"""How far a made clip is from the real one: pure functions. What each is for, and where it misleads: docs/metrics.md.

Per clip: Clips `made` and `real`, uint8 [batch, time, height, width, 3], to float64 [batch]. Most look at the frames
between only: the two given frames would flatter every method. Over many clips: `skill`, `diversity` and `interval`.
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

_WINDOW = 5  # values on each side of the middle of SSIM's window


def l2_paper(made: Clips, real: Clips) -> PerClip:
    """The unit of the report's Table 2: Euclidean distance over all pixels of the clip in 0..255, over 100.

    The table's caption says pixels in 0..1; its published figures are reproduced only by 0..255.
    """
    return _differences(made, real).square().sum(1).sqrt() / 100


def psnr(made: Clips, real: Clips) -> PerClip:
    """Peak signal-to-noise ratio of the frames between, in dB: 10 log10(255^2 / MSE); infinite when equal."""
    mean_squared = _differences(made[:, 1:-1], real[:, 1:-1]).square().mean(1)
    return 10 * torch.log10(255.0**2 / mean_squared)


def ssim(made: Clips, real: Clips) -> PerClip:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window, reflected edges) of the frames between.

    Equal to torchmetrics' in float64 to 1e-5. torchmetrics itself, in float32, takes eight times as long and is off by
    up to 3e-4 where frames are flat.
    """
    height, width = real.shape[2:4]
    rows, columns = _gaussian_window(height, real.device), _gaussian_window(width, real.device).T
    # One clip at a time, whose maps stay in the processor's cache.
    return torch.stack([_ssim_map(*pair, rows, columns).mean().double() for pair in zip(made, real, strict=True)])


def _ssim_map(made: Tensor, real: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """SSIM of each value of the frames between of one clip, float32 [time - 2, 3, height, width]."""
    ours, theirs = (clip[1:-1].permute(0, 3, 1, 2).float().div_(255) for clip in (made, real))
    # Variances do not depend on an offset. Without one, float32 cancels fewer digits.
    offset = theirs.mean((-2, -1), keepdim=True)
    ours, theirs = ours.sub_(offset), theirs.sub_(offset)

    def blur(maps: Tensor) -> Tensor:
        return rows @ (maps @ columns)

    mean_ours, mean_theirs = blur(ours), blur(theirs)
    covariance = blur(ours * theirs).sub_(mean_ours * mean_theirs)
    variances = blur(ours.square_().add_(theirs.square_()))  # of both, added up
    variances.sub_(mean_ours.square()).sub_(mean_theirs.square()).clamp_(min=0)
    mean_ours, mean_theirs = mean_ours.add_(offset), mean_theirs.add_(offset)
    luminance, contrast = 0.01**2, 0.03**2
    above = (mean_ours * mean_theirs).mul_(2).add_(luminance).mul_(covariance.mul_(2).add_(contrast))
    below = mean_ours.square_().add_(mean_theirs.square_()).add_(luminance).mul_(variances.add_(contrast))
    return above.div_(below)


@functools.lru_cache(maxsize=16)
def _gaussian_window(size: int, device: torch.device) -> Tensor:
    """float32 [size, size]: blurs an axis of this size that it is multiplied with. Sigma 1.5, edges are reflected."""
    taps = torch.arange(-_WINDOW, _WINDOW + 1)
    weights = torch.exp(-((taps.double() / 1.5) ** 2) / 2)
    # Reflection repeats with this period, in both directions.
    period = max(1, 2 * (size - 1))
    places = (torch.arange(size)[:, None] + taps) % period
    places = torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)
    window = torch.zeros(size, size, dtype=torch.float64)
    window.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))
    return window.float().to(device)


def squared_error(made: Clips, real: Clips) -> PerClip:
    """Sum of squared differences over the frames between, pixels 0..255: what `skill` adds up."""
    return _differences(made[:, 1:-1], real[:, 1:-1]).square().sum(1)


def ends_error(made: Clips, real: Clips) -> PerClip:
    """Root mean squared difference of the first and the last frame, 0..255: 0 where the two given images are kept."""
    return _rms(_differences(made[:, [0, -1]], real[:, [0, -1]]))


def motion_error(made: Clips, real: Clips) -> PerClip:
    """Root mean squared difference between the temporal differences of made and of real, 0..510.

    A temporal difference is a frame less the one before it. 0 for a clip that is only brighter throughout.
    """
    return _rms(_steps(made, 1).sub_(_steps(real, 1)).flatten(1))


def motion_ratio(made: Clips, real: Clips) -> PerClip:
    """Mean absolute temporal difference of made over real's: 1 is as much change as was filmed, 0 a still.

    Infinite where only the real clip stands still, NaN where both do.
    """
    return _steps(made, 1).abs_().flatten(1).mean(1) / _steps(real, 1).abs_().flatten(1).mean(1)


def sharpness_ratio(made: Clips, real: Clips) -> PerClip:
    """Mean absolute spatial gradient of the frames between, made over real: below 1 is blurred, above 1 is noisy.

    The gradient is the difference of neighbours along height plus that along width. Infinite where only the real
    frames are flat, NaN where both are.
    """
    return _steepness(made[:, 1:-1]) / _steepness(real[:, 1:-1])


METRICS = {"l2_paper": l2_paper, "psnr": psnr, "ssim": ssim}


def skill(made_sse: Tensor, linear_sse: Tensor) -> Tensor:
    """1 - sum(made_sse) / sum(linear_sse), of `squared_error` [batch] each: a scalar.

    0 is linear interpolation, 1 is perfect, below 0 is worse than linear. The mean squared error skill score (Murphy
    1988, Monthly Weather Review 116) with linear interpolation as its reference. NaN where both are sums of nothing.
    """
    return 1 - made_sse.sum() / linear_sse.sum()


def diversity(samples: UInt8[Tensor, "*clips sample time height width 3"]) -> Float[Tensor, "*clips"]:
    """Mean over pairs of samples of one clip of the root mean squared difference of their frames between, 0..255.

    Any axes before `sample` are kept: float64 [*clips]. Raises ValueError for fewer than two samples.
    """
    count = samples.shape[-5]
    if count < 2:
        raise ValueError(f"samples: diversity needs at least 2 of a clip (value {count})")
    values = samples[..., 1:-1, :, :, :].flatten(-4).double()
    # Not by inner products, which lose half of the digits.
    distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((-1, -2)) / (count * (count - 1)) / values.shape[-1] ** 0.5


def interval(
    statistic: Callable[..., Tensor],
    sources: Sequence[str],
    *values: PerClip,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*values)`, by source video: (low, high).

    `sources` names the video of each clip, `values` are [batch] each and are resampled together:
    `interval(torch.mean, sources, psnrs)`, `interval(skill, sources, made_sse, linear_sse)`. As many videos as there
    are get drawn with replacement, each with all its clips (cluster bootstrap; Davison & Hinkley 1997, section 3.8),
    as clips of a video are no independent evidence. Both are NaN for clips of one video, which say nothing of others.
    Raises ValueError where the lengths differ or are 0.
    """
    if {len(each) for each in values} != {len(sources)} or not sources:
        raise ValueError(f"interval: {len(sources)} sources for values of {[len(each) for each in values]} clips")
    clips_of: dict[str, list[int]] = {}
    for clip, source in enumerate(sources):
        clips_of.setdefault(source, []).append(clip)
    if len(clips_of) == 1:
        return math.nan, math.nan
    groups = [np.array(clips) for clips in clips_of.values()]
    random = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for resample in range(resamples):
        chosen = np.concatenate([groups[group] for group in random.integers(len(groups), size=len(groups))])
        drawn[resample] = statistic(*(each[chosen] for each in values))
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def _differences(made: Clips, real: Clips) -> Tensor:
    return (made.double() - real.double()).flatten(1)


def _steps(clips: Clips, axis: int) -> Tensor:
    """Every place less the one before it along `axis`, float64."""
    return clips.double().diff(dim=axis)


def _steepness(frames: Clips) -> PerClip:
    return sum((_steps(frames, axis).abs_().flatten(1).mean(1) for axis in (2, 3)), start=torch.zeros(()))


def _rms(differences: Tensor) -> PerClip:
    return differences.square().mean(1).sqrt()
