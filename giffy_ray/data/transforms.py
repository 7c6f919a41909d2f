"""Selects segments of videos and augments clips, as pure functions of uniform random numbers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from giffy_ray.config import AugmentConfig, SegmentsConfig

_CHANNEL_ORDERS = list(itertools.permutations(range(3)))


class AugmentationDraws(NamedTuple):
    """All random numbers of one training sample, uniform in [0, 1).

    Every sample draws all of them, so switching one augmentation on or off does not change the others.
    """

    flip: float  # flips below 0.5
    reverse: float  # reverses below 0.5
    crop: np.ndarray  # [3]: size, x, y of the first frame's crop
    brightness: float
    channel_order: float
    pan: float  # distance
    pan_crop: np.ndarray  # [3]: size, x, y of the crop that the pan moves towards
    segment: np.ndarray  # [2 + frames]: length and start of the segment, and a jitter for each frame

    @staticmethod
    def count(frames: int) -> int:
        """The number of random numbers that a sample of `frames` frames draws."""
        return 13 + frames

    @staticmethod
    def from_uniform(numbers: np.ndarray) -> AugmentationDraws:
        """Splits [count(frames)] random numbers. Their order is part of the definition of the sample stream."""
        return AugmentationDraws(
            flip=numbers[0],
            reverse=numbers[1],
            crop=numbers[2:5],
            brightness=numbers[5],
            channel_order=numbers[6],
            pan=numbers[7],
            pan_crop=numbers[8:11],
            segment=numbers[11:],
        )


def choose_segment(times_s: np.ndarray, segments: SegmentsConfig, draws: np.ndarray) -> np.ndarray:
    """Chooses a random segment of a video and the frames to sample from it.

    The length is uniform between `shortest_s` and the whole video, and the start is uniform for that length.

    Args:
        times_s: Presentation times of the video's frames, starting at 0.
        segments: Settings of the segment.
        draws: `AugmentationDraws.segment`. Only `frame_times: jittered` uses the numbers per frame.

    Returns:
        int64 [segments.frames]: indices into `times_s`.
    """
    span_s = times_s[-1]
    shortest_s = min(segments.shortest_s, span_s)
    length_s = shortest_s + draws[0] * (span_s - shortest_s)
    start_s = draws[1] * (span_s - length_s)
    if segments.frame_times == "uniform":
        fractions = np.linspace(0, 1, segments.frames)
    else:
        # Each inner frame is anywhere within its own part of the segment: in order and spread out.
        inner = segments.frames - 2
        fractions = np.concatenate([[0], (np.arange(inner) + draws[2 : 2 + inner]) / max(inner, 1), [1]])
    return np.abs(times_s[None, :] - (start_s + fractions * length_s)[:, None]).argmin(axis=1)


def normalize_times(times_s: np.ndarray) -> np.ndarray:
    """Scales times to 0 at the first frame and 1 at the last; evenly spaced if all of them are equal."""
    span_s = times_s[-1] - times_s[0]
    return (times_s - times_s[0]) / span_s if span_s else np.linspace(0, 1, len(times_s))


def augment_clip(frames: np.ndarray, times: np.ndarray, augment: AugmentConfig, draws: AugmentationDraws) -> np.ndarray:
    """Augments all frames of a clip alike; only `pan` depends on time.

    Args:
        frames: uint8 [time, height, width, 3].
        times: float [time], 0 at the first frame and 1 at the last.
        augment: Which augmentations to apply.
        draws: Random numbers of the sample.

    Returns:
        uint8 [time, height, width, 3], a view of `frames` where possible.
    """
    if augment.crop < 1:
        first = _crop_window(augment.crop, draws.crop)
        # Squared, so that most crops move little, like most cameras.
        distance = augment.pan * draws.pan**2
        last = first + distance * (_crop_window(augment.crop, draws.pan_crop) - first)
        frames = _crop_and_resize(frames, first + times[:, None] * (last - first))
    if augment.flip and draws.flip < 0.5:
        frames = frames[:, :, ::-1]
    if augment.reverse and draws.reverse < 0.5:
        frames = frames[::-1]
    if augment.brightness:
        gain = 1 + (2 * draws.brightness - 1) * augment.brightness
        frames = np.minimum(np.round(np.arange(256) * gain), 255).astype(np.uint8)[frames]
    if augment.permute_channels:
        frames = frames[..., _CHANNEL_ORDERS[int(draws.channel_order * len(_CHANNEL_ORDERS))]]
    return frames


def _crop_window(min_size: float, draws: np.ndarray) -> np.ndarray:
    """float64 [3]: size as a fraction of height and width, then the centre (x, y), where edges are at -1 and 1."""
    size = 1 - draws[0] * (1 - min_size)
    return np.asarray([size, *((2 * draws[1:3] - 1) * (1 - size))])


def _crop_and_resize(frames: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Crops each frame to its window, [time, 3], and resizes it to the original size with bilinear interpolation."""
    import torch  # not imported by tasks that only decode
    from torch.nn.functional import affine_grid, grid_sample

    size, x, y = torch.from_numpy(windows.astype(np.float32)).unbind(1)
    zero = torch.zeros_like(size)
    affine = torch.stack([torch.stack([size, zero, x], 1), torch.stack([zero, size, y], 1)], 1)
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    grid = affine_grid(affine, list(planes.shape), align_corners=False)
    resized = grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return resized.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
