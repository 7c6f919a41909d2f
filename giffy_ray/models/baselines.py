"""Interpolation methods without learned parameters: start, end -> clip, all uint8.

    linear                linear interpolation of every pixel from the start to the end
    linear_as_coded       linear interpolation as the paper's authors coded it; it stops short of the end
    hold                  the closer of the two images
    minterpolate_mci      FFmpeg's motion-compensated interpolation
    minterpolate_blend    FFmpeg's blending

All methods generate two or more frames and raise ValueError for fewer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import torch

from giffy_ray.config import ConfigError
from giffy_ray.core.tensor_types import Clips, Images

# Tuned on 64x64 clips: pans of 3 to 20 pixels, and a square moving over a still picture. They halve linear's squared
# error; FFmpeg's defaults (blocks of 16, predictive search) leave 70 % of it and miss the square.
_MCI = {"mi_mode": "mci", "mc_mode": "aobmc", "me": "esa", "mb_size": "8", "search_param": "16"}
_BLEND = {"mi_mode": "blend"}
# minterpolate does not accept RGB. Planes 1 to 3 of this format carry red, green and blue unchanged; plane 0, which the
# motion search uses, carries luma.
_PLANES = "yuva444p"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def linear(start: Images, end: Images, frames: int) -> Clips:
    """Linear interpolation: frame i is start + i/(frames-1) * (end - start), rounded to the nearest value.

    The paper's authors divided by `frames`, so their clips stop short of the end; these reach both images.
    """
    _check_frame_count(frames)
    weight = torch.linspace(0, 1, frames, dtype=torch.float64, device=start.device).view(1, -1, 1, 1, 1)
    mixed = start[:, None].double() * (1 - weight) + end[:, None].double() * weight
    return mixed.round().to(torch.uint8)


def linear_as_coded(start: Images, end: Images, frames: int) -> Clips:
    """Linear interpolation in the paper's code: frame i is start + i/frames * (end - start), rounded down.

    It does not reach the end image.
    """
    _check_frame_count(frames)
    # Integer arithmetic: a float result just below a whole number would lose a grey level.
    step = torch.arange(frames, dtype=torch.int32, device=start.device).view(1, -1, 1, 1, 1)
    mixed = start[:, None].int() * (frames - step) + end[:, None].int() * step
    return mixed.floor_divide(frames).to(torch.uint8)


def hold(start: Images, end: Images, frames: int) -> Clips:
    """Repeats the start in the first half of the frames, and the end in the rest; an odd middle frame is the start."""
    _check_frame_count(frames)
    start_count = (frames + 1) // 2
    return torch.stack([start] * start_count + [end] * (frames - start_count), dim=1)


def minterpolate_mci(start: Images, end: Images, frames: int) -> Clips:
    """FFmpeg's `minterpolate` with mi_mode=mci: matches blocks of 8x8 within 16 pixels and moves them.

    The first and last frame equal start and end, and colours are not converted.

    Raises:
        ConfigError: The images are smaller than two blocks, or PyAV's FFmpeg lacks the filter.
    """
    min_size = 2 * int(_MCI["mb_size"])
    if min(start.shape[1:3]) < min_size:
        size = "x".join(map(str, start.shape[1:3]))
        raise ConfigError(
            f"minterpolate_mci: needs images of at least {min_size}x{min_size}, two blocks per side (value {size})"
        )
    return _minterpolate(start, end, frames, _MCI)


def minterpolate_blend(start: Images, end: Images, frames: int) -> Clips:
    """FFmpeg's `minterpolate` with mi_mode=blend: equals `linear` up to rounding.

    Ends, colours and the error for a missing filter are those of `minterpolate_mci`.
    """
    return _minterpolate(start, end, frames, _BLEND)


BASELINES: dict[str, Callable[[Images, Images, int], Clips]] = {
    method.__name__: method for method in (linear, linear_as_coded, hold, minterpolate_mci, minterpolate_blend)
}


def _minterpolate(start: Images, end: Images, frames: int, options: dict[str, str]) -> Clips:
    _check_frame_count(frames)
    clips = []
    for first, last in zip(start.cpu().numpy(), end.cpu().numpy(), strict=True):
        generated = _generate_frames(first, last, frames, options)
        # Exactly `frames`: exhausting the generator would filter the frames after them, too.
        clips.append(np.stack(list(itertools.islice(generated, frames))))
    return torch.from_numpy(np.stack(clips)).to(start.device)


def _generate_frames(start: np.ndarray, end: np.ndarray, frames: int, options: dict[str, str]) -> Iterator[np.ndarray]:
    """Yields `frames` frames between two images, all uint8 [height, width, 3]."""
    # Deferred, because importing networks must not load FFmpeg.
    from av import VideoFormat
    from av.filter import Graph, filters_available

    if "minterpolate" not in filters_available:
        raise ConfigError(
            "minterpolate: the FFmpeg of this PyAV lacks the filter. Remove the minterpolate_* methods, or install"
            " PyAV from a PyPI wheel, which bundles a full FFmpeg"
        )
    height, width = start.shape[:2]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat(_PLANES), time_base=Fraction(1))
    # scd=none disables scene detection, which would take two different images for a cut and not interpolate.
    motion = graph.add("minterpolate", fps=str(frames - 1), scd="none", **options)
    sink = graph.add("buffersink")
    source.link_to(motion)
    motion.link_to(sink)
    graph.configure()
    # The filter needs context on both sides: one second of the start, one second to interpolate, then the end.
    for second, image in enumerate((start, start, end, end, end)):
        graph.vpush(_to_planes(image, second))
        yield from _pull_frames(graph, frames)
    graph.vpush(None)
    yield from _pull_frames(graph, frames)


def _pull_frames(graph, frames: int) -> Iterator[np.ndarray]:
    """Yields the finished frames of the interpolated second."""
    from av.error import BlockingIOError, EOFError

    while True:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EOFError):  # it needs more input, or is finished
            return
        if frames - 1 <= frame.pts <= 2 * (frames - 1):
            planes = [_pixels(plane, frame.width) for plane in frame.planes]
            yield np.stack(planes[1:], axis=-1)


def _to_planes(image: np.ndarray, second: int):
    """Packs an RGB image into a frame with the planes luma, red, green, blue and a timestamp in seconds."""
    from av import VideoFrame

    frame = VideoFrame(image.shape[1], image.shape[0], _PLANES)
    luma = (image @ np.array(_LUMA)).round().astype(np.uint8)
    for plane, values in zip(frame.planes, (luma, *np.moveaxis(image, -1, 0)), strict=True):
        _pixels(plane, frame.width)[:] = values
    frame.pts, frame.time_base = second, Fraction(1)
    return frame


def _pixels(plane, width: int) -> np.ndarray:
    """Returns a view of the plane without row padding, uint8 [height, width]."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width]


def _check_frame_count(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"frames: needs at least 2, the start and the end (value {frames})")
