"""What the headers of mp4 and mkv files say and PyAV does not pass on: cropping, and how long a fragmented file lasts.

Anything may be in a header. What does not hold together counts as not said; nothing here raises.
ISO/IEC 14496-12 (boxes), RFC 8794 and RFC 9559 (EBML and Matroska).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_MAX_PARTS = 100_000  # boxes or elements side by side; files are made that hold more, and real ones do not
_BOX_HEAD_BYTES = 8
_BEFORE_FRAMES = (b"styp", b"sidx", b"prft", b"emsg", b"moof")  # boxes of a fragment whose frames follow in an mdat
_SAMPLE_ENTRY_BYTES = 78  # of a video sample entry, before the boxes that it holds
_SEGMENT, _TRACKS, _CLUSTER, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0x1F43B675, 0xAE, 0x83, 0xE0
_PIXEL_CROPS = {0x54CC: "left", 0x54DD: "right", 0x54BB: "top", 0x54AA: "bottom"}


class Crop(NamedTuple):
    """How many pixels at each side of a decoded picture are not to be shown."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


class Fragments(NamedTuple):
    """How long a fragmented mp4 lasts by its headers; 0 where they do not say."""

    track_s: float  # one track, from its first frame on (sidx)
    movie_s: float  # the longest track (mvhd, mehd)
    is_cut: bool  # whether the file ends within a box, or between the head of a fragment and its frames


class _Part(NamedTuple):
    """A box of an mp4 or an element of an mkv: where its content begins and ends."""

    kind: int
    body: int
    end: int


def fragments_of(video: bytes, track_id: int) -> Fragments | None:
    """None where the file is no fragmented mp4."""
    top = list(_boxes(video, 0, len(video)))
    movie = _first(top, b"moov")
    extends = movie and _first(_inside(video, movie), b"mvex")
    if not extends and not _first(top, b"moof"):
        return None
    try:
        movie_s = max(_movie_s(video, movie, extends), 0.0) if movie else 0.0
        spans = [_indexed_s(video, box) for box in top if box.kind == _fourcc(b"sidx")]
    except (struct.error, ZeroDivisionError):
        movie_s, spans = 0.0, []
    ours = [(start_s, end_s) for track, start_s, end_s in spans if track == track_id]
    track_s = max(end_s for _, end_s in ours) - min(start_s for start_s, _ in ours) if ours else 0.0
    rest = len(video) - top[-1].end
    is_cut = rest < 0 or 0 < rest < _BOX_HEAD_BYTES or top[-1].kind in map(_fourcc, _BEFORE_FRAMES)
    return Fragments(track_s, movie_s, is_cut)


def mp4_crop(video: bytes, track_id: int, width: int, height: int) -> Crop:
    """The clean aperture of a track whose decoded pictures have this size."""
    try:
        for track in _inside(video, _first(_boxes(video, 0, len(video)), b"moov")):
            header = _first(_inside(video, track), b"tkhd") if track.kind == _fourcc(b"trak") else None
            if header is None or _track_id(video, header) != track_id:
                continue
            way: _Part | None = track
            for kind in (b"mdia", b"minf", b"stbl", b"stsd"):
                way = _first(_inside(video, way), kind)
            entry = next(_boxes(video, way.body + 8, way.end), None) if way else None
            clap = _first(_boxes(video, entry.body + _SAMPLE_ENTRY_BYTES, entry.end), b"clap") if entry else None
            return _aperture(video, clap, width, height) if clap else Crop()
    except (struct.error, ZeroDivisionError):
        pass
    return Crop()


def matroska_crop(video: bytes, place: int, tracks: int) -> Crop:
    """Of the video track at a place among the `tracks` video tracks of the file."""
    segment = next((part for part in _elements(video, 0, len(video)) if part.kind == _SEGMENT), None)
    found: list[Crop] = []
    for part in _elements(video, segment.body, segment.end) if segment else ():
        if part.kind == _CLUSTER:
            break
        if part.kind == _TRACKS:
            found += [_track_crop(video, track) for track in _elements(video, *part[1:]) if _is_video(video, track)]
    return found[place] if len(found) == tracks else Crop()


def is_matroska_cut(video: bytes) -> bool:
    """Whether the file ends within an element."""
    start = 0
    for _ in range(_MAX_PARTS):
        name = _variable(video, start, len(video), keep_marker=True)
        size = _variable(video, start + name[1], len(video)) if name else None
        if name is None or size is None:
            return start < len(video) and bool(video[start])  # within the head of one, unless zeros fill the file up
        body = start + name[1] + size[1]
        end = body if _is_unknown(size) else body + size[0]
        if end > len(video):
            return True
        start = body if name[0] in (_SEGMENT, _CLUSTER) else end
    return False


def _fourcc(kind: bytes) -> int:
    return int.from_bytes(kind, "big")


def _boxes(video: bytes, start: int, end: int) -> Iterator[_Part]:
    """The boxes between two offsets; the last may claim to end beyond."""
    for _ in range(_MAX_PARTS):
        if start + _BOX_HEAD_BYTES > end:
            return
        size, kind = struct.unpack_from(">II", video, start)
        head = _BOX_HEAD_BYTES
        if size == 1 and start + 16 <= end:
            (size,), head = struct.unpack_from(">Q", video, start + 8), 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield _Part(kind, start + head, start + size)
        start += size


def _inside(video: bytes, box: _Part | None) -> Iterator[_Part]:
    return _boxes(video, box.body, min(box.end, len(video))) if box else iter(())


def _first(boxes: Iterator[_Part] | list[_Part], kind: bytes) -> _Part | None:
    return next((box for box in boxes if box.kind == _fourcc(kind)), None)


def _movie_s(video: bytes, movie: _Part, extends: _Part | None) -> float:
    header = _first(_inside(video, movie), b"mvhd")
    if header is None:
        return 0.0
    long = video[header.body] == 1
    unit, length = struct.unpack_from(">IQ" if long else ">II", video, header.body + (20 if long else 12))
    lengths = [0 if length in (2**32 - 1, 2**64 - 1) else length]  # all ones: not known
    extent = _first(_inside(video, extends), b"mehd")
    if extent:
        lengths += struct.unpack_from(">Q" if video[extent.body] == 1 else ">I", video, extent.body + 4)
    return max(lengths) / unit


def _indexed_s(video: bytes, sidx: _Part) -> tuple[int, float, float]:
    """(track, when the first frame of a segment index is shown, when the last one ends), in seconds of the track."""
    track, unit = struct.unpack_from(">II", video, sidx.body + 4)
    long = video[sidx.body] == 1
    first, _, _, count = struct.unpack_from(">QQHH" if long else ">IIHH", video, sidx.body + 12)
    references = sidx.body + (32 if long else 24)
    length = sum(struct.unpack_from(">I", video, references + 12 * number + 4)[0] for number in range(count))
    return track, first / unit, (first + length) / unit


def _track_id(video: bytes, header: _Part) -> int:
    return struct.unpack_from(">I", video, header.body + (20 if video[header.body] == 1 else 12))[0]


def _aperture(video: bytes, clap: _Part, width: int, height: int) -> Crop:
    numbers = struct.unpack_from(">IIIIiIiI", video, clap.body)
    wide, high, right, down = (numbers[i] / numbers[i + 1] for i in (0, 2, 4, 6))
    left, top = round((width - wide) / 2 + right), round((height - high) / 2 + down)
    return Crop(left, width - left - round(wide), top, height - top - round(high))


def _elements(video: bytes, start: int, end: int) -> Iterator[_Part]:
    end = min(end, len(video))
    for _ in range(_MAX_PARTS):
        name = _variable(video, start, end, keep_marker=True)
        size = _variable(video, start + name[1], end) if name else None
        if name is None or size is None:
            return
        body = start + name[1] + size[1]
        start = end if _is_unknown(size) else min(body + size[0], end)
        yield _Part(name[0], body, start)


def _variable(video: bytes, start: int, end: int, keep_marker: bool = False) -> tuple[int, int] | None:
    """(value, bytes that it takes) of a number of EBML; None where there is none."""
    if start >= end or not video[start]:
        return None
    length = 9 - video[start].bit_length()
    if start + length > end:
        return None
    value = int.from_bytes(video[start : start + length], "big")
    return value if keep_marker else value & (1 << 7 * length) - 1, length


def _is_unknown(size: tuple[int, int]) -> bool:
    """Whether the size of an element, as `_variable` gives it, is all ones: it ends where the next one begins."""
    return size[0] == (1 << 7 * size[1]) - 1


def _number(video: bytes, element: _Part) -> int:
    return int.from_bytes(video[element.body : min(element.end, element.body + 8)], "big")


def _is_video(video: bytes, track: _Part) -> bool:
    if track.kind != _TRACK:
        return False
    return any(part.kind == _TRACK_TYPE and _number(video, part) == 1 for part in _elements(video, *track[1:]))


def _track_crop(video: bytes, track: _Part) -> Crop:
    for part in _elements(video, *track[1:]):
        if part.kind == _VIDEO:
            said = {_PIXEL_CROPS[one.kind]: one for one in _elements(video, *part[1:]) if one.kind in _PIXEL_CROPS}
            return Crop(**{side: _number(video, one) for side, one in said.items()})
    return Crop()
