"""Finds cuts and duplicate frames in a film, from small versions of its frames.

A cut is a pair of frames that differ far more than their neighbours do:

    distance > _MIN_CUT_DISTANCE + _CUT_RATIO x the distances of the neighbouring pairs

The distances of pairs that are shorter in time count for more. A distance compensates motion, so pans stay small. The
pairs of a fade or dissolve differ about as much as each other. A flash differs, too, but the frames before and after it
show the same, unlike those around a cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

_DETAIL_WIDTH_PX = 160  # of the version that shows duplicates
_MIN_DETAIL_SCALE = 4  # frame pixels per side of one of its pixels; averages out most noise of compression
# The change of a duplicate, in levels of 255. x264 changes a frame that it repeats by 0.1 to 0.3 at good quality, which
# is 4 to 30 times less than motion that stutters visibly.
_MAX_STILL_CHANGE = 0.15
_MAX_DUPLICATE_CHANGE = 1.5
_DUPLICATE_RATIO = 0.25  # of the change between the last two distinct frames

_HEIGHT_PX, _WIDTH_PX, _BLOCK_PX = 48, 64, 8  # of the version that shows cuts, whatever the frame's shape
_SEARCH_RADIUS_PX = 6  # a tenth of the width
# In levels of 255: pans and zooms of photographs give 1 to 4, cuts 19 to 106, a cut between two of them at 15 % of
# their brightness 7.
_MIN_CUT_DISTANCE = 4.0
_CUT_RATIO = 2.0
_FLASH_RATIO = 0.6  # of the distances across a flash and into it, at most
_MAX_DURATION_RATIO = 4  # up to which a pair may differ more than a shorter neighbour
_SPAN = 3  # frames on either side of a pair that are looked at; a flash may be one frame shorter


class Thumbnail(NamedTuple):
    """Two small versions of a frame."""

    detail: np.ndarray
    """float32, the three planes of YCbCr 4:2:0 in one array; each value averages at least 4x4 pixels."""
    luma: np.ndarray
    """float32 [48, 64], 0 for black to 255 for white."""


class ThumbnailMaker:
    """Makes thumbnails of frames in YCbCr."""

    def __init__(self) -> None:
        self._detail_scaler, self._luma_scaler = VideoReformatter(), VideoReformatter()  # each caches one conversion

    def __call__(self, frame: av.VideoFrame) -> Thumbnail:
        """Makes the thumbnail of a frame by area averages."""
        scale = max(_MIN_DETAIL_SCALE, frame.width / _DETAIL_WIDTH_PX)
        width, height = (2 * max(1, round(size / scale / 2)) for size in (frame.width, frame.height))
        area = Interpolation.AREA
        detail = self._detail_scaler.reformat(frame, width, height, "yuv420p", interpolation=area, threads=1)
        luma = self._luma_scaler.reformat(frame, _WIDTH_PX, _HEIGHT_PX, "gray", interpolation=area, threads=1)
        return Thumbnail(detail.to_ndarray().astype(np.float32), luma.to_ndarray().astype(np.float32))


def measure_change(first: Thumbnail, second: Thumbnail) -> float:
    """Returns the root mean square difference of two frames, in levels of 255."""
    return float(np.sqrt(np.square(first.detail - second.detail).mean()))


def is_duplicate(change: float, last_change: float) -> bool:
    """Returns whether a frame repeats the last distinct one, apart from what compression changes.

    Args:
        change: Between the last distinct frame and this one.
        last_change: Between the last two distinct frames; 0 if there is only one.
    """
    return change <= max(_MAX_STILL_CHANGE, min(_MAX_DUPLICATE_CHANGE, _DUPLICATE_RATIO * last_change))


def measure_distance(first: Thumbnail, second: Thumbnail) -> float:
    """Returns how badly the second frame can be made of the first: a mean absolute difference, in levels of 255.

    Each block of the second is compared with the most similar one of the first within `_SEARCH_RADIUS_PX`.
    """
    unmoved = float(np.abs(first.luma - second.luma).mean())
    if unmoved <= _MIN_CUT_DISTANCE:
        return unmoved
    padded = np.pad(first.luma, _SEARCH_RADIUS_PX, mode="edge")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, (_HEIGHT_PX, _WIDTH_PX))
    rows, columns = _HEIGHT_PX // _BLOCK_PX, _WIDTH_PX // _BLOCK_PX
    blocks = np.abs(shifted - second.luma).reshape(-1, rows, _BLOCK_PX, columns, _BLOCK_PX)
    return float(blocks.mean(axis=(2, 4)).min(axis=0).mean())


class Shown(Protocol):
    """A frame with its thumbnail and its presentation time in seconds."""

    @property
    def thumbnail(self) -> Thumbnail:
        """Small versions of the frame."""
        ...

    @property
    def time(self) -> Fraction:
        """Presentation time in seconds."""
        ...


_Item = TypeVar("_Item", bound=Shown)


class _Step(NamedTuple):
    """A frame, and how it differs from the one before."""

    thumbnail: Thumbnail
    distance: float  # 0 for the first
    duration: float  # in seconds


def mark_cuts(items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
    """Yields each item, and whether a cut separates it from the one before. Reads two items ahead."""
    before: deque[_Step] = deque(maxlen=_SPAN)
    after: deque[_Step] = deque()
    waiting: deque[_Item] = deque()  # the items of `after`
    previous: _Item | None = None
    for item in items:
        after.append(_measure_step(previous, item))
        waiting.append(item)
        previous = item
        if len(after) == _SPAN:
            yield waiting.popleft(), _is_cut([*before], [*after])
            before.append(after.popleft())
    while after:
        yield waiting.popleft(), _is_cut([*before], [*after])
        before.append(after.popleft())


def _measure_step(previous: Shown | None, item: Shown) -> _Step:
    if previous is None:
        return _Step(item.thumbnail, 0.0, 1.0)
    distance = measure_distance(previous.thumbnail, item.thumbnail)
    return _Step(item.thumbnail, distance, float(item.time - previous.time))


def _is_cut(before: Sequence[_Step], after: Sequence[_Step]) -> bool:
    """Returns whether there is a cut between the last frame of `before` and the first of `after`."""
    if not before:
        return False
    first = after[0]
    # The largest one is left out, because the next cut may follow within two frames.
    neighbours = sorted(
        step.distance * min(max(1.0, first.duration / step.duration), _MAX_DURATION_RATIO)
        for step in (*before[1:], *after[1:])
    )[:-1]
    if first.distance <= _MIN_CUT_DISTANCE + _CUT_RATIO * max(neighbours, default=0.0):
        return False
    around = [(before[-1], later) for later in after[1:]] + [(earlier, first) for earlier in before[:-1]]
    return all(measure_distance(a.thumbnail, b.thumbnail) >= _FLASH_RATIO * first.distance for a, b in around)
