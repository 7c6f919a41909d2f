"""Segments and augmentation of clips, as functions of draws."""

from __future__ import annotations

import itertools

import numpy as np

from giffy_ray.config import AugmentConfig, SegmentsConfig

# Flip, reverse, crop: size and place, brightness, colours; pan: how far, size and place; interval: length and start.
_DRAWS, _PAN, _INTERVAL = 13, 7, 11
_COLOURS = list(itertools.permutations(range(3)))


def choose_segment(times_s: np.ndarray, segments: SegmentsConfig, draws: np.ndarray) -> np.ndarray:
    """int64 [segments.frames]: the frames of a segment of a video whose frames are shown at `times_s`.

    Its length is uniform between `shortest_s` and the whole video, then its start is uniform. Draws in [0, 1):
    length, start, and one for each frame, which `frame_times: jittered` takes.
    """
    span_s = times_s[-1]
    shortest_s = min(segments.shortest_s, span_s)
    length_s = shortest_s + draws[0] * (span_s - shortest_s)
    start_s = draws[1] * (span_s - length_s)
    if segments.frame_times == "uniform":
        shares = np.linspace(0, 1, segments.frames)
    else:
        # Each frame between has a part of the interval to itself: in order, spread out, and anywhere in it.
        inner = segments.frames - 2
        shares = np.concatenate([[0], (np.arange(inner) + draws[2 : 2 + inner]) / max(inner, 1), [1]])
    return np.abs(times_s[None, :] - (start_s + shares * length_s)[:, None]).argmin(axis=1)


def augment_clip(frames: np.ndarray, times: np.ndarray, augment: AugmentConfig, draws: np.ndarray) -> np.ndarray:
    """uint8 [time, height, width, 3], a view where it can be: all frames changed alike, as `augment` says.

    But for `pan`, which moves what is cut out evenly over `times`, float [time] from 0 to 1.
    """
    if augment.crop < 1:
        first = _window(augment.crop, draws[2:5])
        # Squared, so that most windows move little: most cameras do.
        pan = augment.pan * draws[_PAN] ** 2
        last = first + pan * (_window(augment.crop, draws[_PAN + 1 : _PAN + 4]) - first)
        frames = _cut_out(frames, first + times[:, None] * (last - first))
    if augment.flip and draws[0] < 0.5:
        frames = frames[:, :, ::-1]
    if augment.reverse and draws[1] < 0.5:
        frames = frames[::-1]
    if augment.brightness:
        gain = 1 + (2 * draws[5] - 1) * augment.brightness
        frames = np.minimum(np.round(np.arange(256) * gain), 255).astype(np.uint8)[frames]
    if augment.permute_channels:
        frames = frames[..., _COLOURS[int(draws[6] * len(_COLOURS))]]
    return frames


def _window(smallest: float, draws: np.ndarray) -> np.ndarray:
    """A part of the picture: its share of height and width, and its middle as (x, y), where edges are at -1 and 1."""
    share = 1 - draws[0] * (1 - smallest)
    return np.asarray([share, *((2 * draws[1:3] - 1) * (1 - share))])


def _cut_out(frames: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Of each frame its window, [time, 3], as large as the whole frame; bilinear."""
    import torch  # the tasks that only decode do without it
    from torch.nn.functional import affine_grid, grid_sample

    share, x, y = torch.from_numpy(windows.astype(np.float32)).unbind(1)
    none = torch.zeros_like(share)
    affine = torch.stack([torch.stack([share, none, x], 1), torch.stack([none, share, y], 1)], 1)
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    grid = affine_grid(affine, list(planes.shape), align_corners=False)
    cut = grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return cut.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _shares(times_s: np.ndarray) -> np.ndarray:
    """Times of an interval from 0 at its first frame to 1 at its last."""
    span_s = times_s[-1] - times_s[0]
    return (times_s - times_s[0]) / span_s if span_s else np.linspace(0, 1, len(times_s))
