"""Methods without parameters, behind the interface of a model: start, end -> clip, all uint8.

    linear                every pixel fades evenly from the start to the end
    linear_as_coded       the same as the report's authors wrote it: it stops short of the end
    hold                  the nearer of the two images, held
    minterpolate_mci      FFmpeg's motion-compensated interpolation
    minterpolate_blend    FFmpeg's fade

All make at least two frames; fewer are a ValueError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import torch

from giffy_ray.config import ConfigError
from giffy_ray.core.tensor_types import Clips, Images

# Chosen on pans of 3 to 20 pixels and on a square moving over a still picture, all 64x64: half of linear's squared
# error, where FFmpeg's own (blocks of 16, predictive search) leave 0.7 of it and do not find the square.
_MCI = {"mi_mode": "mci", "mc_mode": "aobmc", "me": "esa", "mb_size": "8", "search_param": "16"}
_BLEND = {"mi_mode": "blend"}
# minterpolate takes no RGB. Red, green and blue travel as planes 1 to 3 of this format, untouched; in plane 0, where it
# looks for motion, is luma.
_PLANES = "yuva444p"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def linear(start: Images, end: Images, frames: int) -> Clips:
    """Linear interpolation: frame i is start + i/(frames-1) * (end - start), rounded to the nearest value.

    The authors divided by `frames` and so never reached the end image; this reaches both.
    """
    _refuse_too_few(frames)
    weight = torch.linspace(0, 1, frames, dtype=torch.float64, device=start.device).view(1, -1, 1, 1, 1)
    mixed = start[:, None].double() * (1 - weight) + end[:, None].double() * weight
    return mixed.round().to(torch.uint8)


def linear_as_coded(start: Images, end: Images, frames: int) -> Clips:
    """Frame i is start + i/frames * (end - start), rounded down, as the authors had it: the end is not reached."""
    _refuse_too_few(frames)
    # In whole numbers: in floats, what should be a whole number may come out just below it, and lose a level.
    step = torch.arange(frames, dtype=torch.int32, device=start.device).view(1, -1, 1, 1, 1)
    mixed = start[:, None].int() * (frames - step) + end[:, None].int() * step
    return mixed.floor_divide(frames).to(torch.uint8)


def hold(start: Images, end: Images, frames: int) -> Clips:
    """The start for the first half of the frames, the end for the second; the one in the middle is the start's."""
    _refuse_too_few(frames)
    of_start = (frames + 1) // 2
    return torch.stack([start] * of_start + [end] * (frames - of_start), dim=1)


def minterpolate_mci(start: Images, end: Images, frames: int) -> Clips:
    """FFmpeg's `minterpolate`, mi_mode=mci: blocks of 8x8 are looked for up to 16 pixels away and moved along.

    The first and last frame are exactly start and end, and colours pass without conversion. Raises ConfigError for
    images of less than two blocks on a side, and where the FFmpeg at hand lacks the filter.
    """
    if min(start.shape[1:3]) < 2 * int(_MCI["mb_size"]):
        size = "x".join(map(str, start.shape[1:3]))
        raise ConfigError(f"minterpolate_mci: images of at least 16x16, two blocks on a side (value {size})")
    return _minterpolate(start, end, frames, _MCI)


def minterpolate_blend(start: Images, end: Images, frames: int) -> Clips:
    """FFmpeg's `minterpolate`, mi_mode=blend: `linear` but for rounding. Ends, colours, errors: `minterpolate_mci`."""
    return _minterpolate(start, end, frames, _BLEND)


BASELINES: dict[str, Callable[[Images, Images, int], Clips]] = {
    method.__name__: method for method in (linear, linear_as_coded, hold, minterpolate_mci, minterpolate_blend)
}


def _minterpolate(start: Images, end: Images, frames: int, options: dict[str, str]) -> Clips:
    _refuse_too_few(frames)
    clips = [
        # No more than are wanted: the filter would go on to work on the frames after them.
        np.stack(list(itertools.islice(_interpolated(first, last, frames, options), frames)))
        for first, last in zip(start.cpu().numpy(), end.cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(clips)).to(start.device)


def _interpolated(start: np.ndarray, end: np.ndarray, frames: int, options: dict[str, str]) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3], twice -> `frames` of them."""
    # Imported here: networks are built where nothing is decoded.
    from av import VideoFormat
    from av.filter import Graph, filters_available

    if "minterpolate" not in filters_available:
        raise ConfigError(
            "minterpolate: the FFmpeg that PyAV was built with has no such filter. Leave out the methods"
            " minterpolate_*, or install a PyAV with a full FFmpeg, as its wheels on PyPI have"
        )
    height, width = start.shape[:2]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat(_PLANES), time_base=Fraction(1))
    # Without scd=none it takes two images that differ for a cut, and interpolates nothing.
    motion = graph.add("minterpolate", fps=str(frames - 1), scd="none", **options)
    sink = graph.add("buffersink")
    source.link_to(motion)
    motion.link_to(sink)
    graph.configure()
    # It needs frames before and after the two that it works between: a second of start, then the clip, then the end.
    for second, image in enumerate((start, start, end, end, end)):
        graph.vpush(_to_planes(image, second))
        yield from _made(graph, frames)
    graph.vpush(None)
    yield from _made(graph, frames)


def _made(graph, frames: int) -> Iterator[np.ndarray]:
    """The frames that are ready, of those between the first second and the second."""
    from av.error import BlockingIOError, EOFError

    while True:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EOFError):  # it wants more, or has no more
            return
        if frames - 1 <= frame.pts <= 2 * (frames - 1):
            planes = [_pixels(plane, frame.width) for plane in frame.planes]
            yield np.stack(planes[1:], axis=-1)


def _to_planes(image: np.ndarray, second: int):
    from av import VideoFrame

    frame = VideoFrame(image.shape[1], image.shape[0], _PLANES)
    luma = (image @ np.array(_LUMA)).round().astype(np.uint8)
    for plane, values in zip(frame.planes, (luma, *np.moveaxis(image, -1, 0)), strict=True):
        _pixels(plane, frame.width)[:] = values
    frame.pts, frame.time_base = second, Fraction(1)
    return frame


def _pixels(plane, width: int) -> np.ndarray:
    """A view of the plane without the padding of its rows, uint8 [height, width]."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width]


def _refuse_too_few(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"frames: at least 2, the start and the end (value {frames})")
