"""Reads header fields of mp4 and mkv files that PyAV does not expose: cropping, and the length of fragmented files.

Headers are untrusted. Inconsistent fields count as absent.

References: ISO/IEC 14496-12 (mp4 boxes), RFC 8794 (EBML), RFC 9559 (Matroska).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_MAX_SIBLINGS = 100_000  # boxes or elements on one level; only malicious files have more
_BOX_HEADER_BYTES = 8
_FRAGMENT_BOXES = (b"styp", b"sidx", b"prft", b"emsg", b"moof")  # boxes of a fragment that precede its frames (mdat)
_SAMPLE_ENTRY_BYTES = 78  # fields of a video sample entry before its child boxes
_SEGMENT, _TRACKS, _CLUSTER, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0x1F43B675, 0xAE, 0x83, 0xE0
_PIXEL_CROPS = {0x54CC: "left", 0x54DD: "right", 0x54BB: "top", 0x54AA: "bottom"}


class Crop(NamedTuple):
    """Pixels to remove from each side of a decoded frame."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


class FragmentInfo(NamedTuple):
    """Stated length of a fragmented mp4; 0 if not stated."""

    track_s: float  # duration of one track from its first frame on (sidx)
    movie_s: float  # duration of the longest track (mvhd, mehd)
    is_truncated: bool  # whether the file ends within a box, or between a fragment's header and its frames


class _Node(NamedTuple):
    """A box of an mp4 or an element of an mkv, with the byte offsets of its content."""

    kind: int
    body: int
    end: int


def read_fragments(video: bytes, track_id: int) -> FragmentInfo | None:
    """Reads the stated length of a fragmented mp4. Returns None if the file is not fragmented."""
    top = list(_boxes(video, 0, len(video)))
    movie = _first(top, b"moov")
    extends = movie and _first(_children(video, movie), b"mvex")
    if not extends and not _first(top, b"moof"):
        return None
    try:
        movie_s = max(_movie_duration_s(video, movie, extends), 0.0) if movie else 0.0
        segments = [_indexed_segment(video, box) for box in top if box.kind == _fourcc(b"sidx")]
    except (struct.error, ZeroDivisionError):
        movie_s, segments = 0.0, []
    spans_s = [(start_s, end_s) for track, start_s, end_s in segments if track == track_id]
    track_s = max(end_s for _, end_s in spans_s) - min(start_s for start_s, _ in spans_s) if spans_s else 0.0
    remaining = len(video) - top[-1].end
    ends_within_box = remaining < 0 or 0 < remaining < _BOX_HEADER_BYTES
    is_truncated = ends_within_box or top[-1].kind in map(_fourcc, _FRAGMENT_BOXES)
    return FragmentInfo(track_s, movie_s, is_truncated)


def read_mp4_crop(video: bytes, track_id: int, width: int, height: int) -> Crop:
    """Reads the clean aperture (`clap`) of a track whose decoded frames have this size."""
    try:
        for track in _children(video, _first(_boxes(video, 0, len(video)), b"moov")):
            header = _first(_children(video, track), b"tkhd") if track.kind == _fourcc(b"trak") else None
            if header is None or _track_id(video, header) != track_id:
                continue
            box: _Node | None = track
            for kind in (b"mdia", b"minf", b"stbl", b"stsd"):
                box = _first(_children(video, box), kind)
            entry = next(_boxes(video, box.body + 8, box.end), None) if box else None
            clap = _first(_boxes(video, entry.body + _SAMPLE_ENTRY_BYTES, entry.end), b"clap") if entry else None
            return _clean_aperture(video, clap, width, height) if clap else Crop()
    except (struct.error, ZeroDivisionError):
        pass
    return Crop()


def read_matroska_crop(video: bytes, track_index: int, track_count: int) -> Crop:
    """Reads the pixel crop of one of the `track_count` video tracks of a file."""
    segment = next((element for element in _elements(video, 0, len(video)) if element.kind == _SEGMENT), None)
    crops: list[Crop] = []
    for element in _elements(video, segment.body, segment.end) if segment else ():
        if element.kind == _CLUSTER:
            break
        if element.kind == _TRACKS:
            tracks = _elements(video, element.body, element.end)
            crops += [_track_crop(video, track) for track in tracks if _is_video(video, track)]
    return crops[track_index] if len(crops) == track_count else Crop()


def is_matroska_truncated(video: bytes) -> bool:
    """Returns whether the file ends within an element."""
    start = 0
    for _ in range(_MAX_SIBLINGS):
        name = _read_vint(video, start, len(video), keep_marker=True)
        size = _read_vint(video, start + name[1], len(video)) if name else None
        if name is None or size is None:
            return start < len(video) and bool(video[start])  # within an element's header, unless zeros pad the file
        body = start + name[1] + size[1]
        end = body if _is_unknown_size(size) else body + size[0]
        if end > len(video):
            return True
        start = body if name[0] in (_SEGMENT, _CLUSTER) else end
    return False


def _fourcc(kind: bytes) -> int:
    return int.from_bytes(kind, "big")


def _boxes(video: bytes, start: int, end: int) -> Iterator[_Node]:
    """The boxes between two offsets. The last one may state an end beyond them."""
    for _ in range(_MAX_SIBLINGS):
        if start + _BOX_HEADER_BYTES > end:
            return
        size, kind = struct.unpack_from(">II", video, start)
        header_bytes = _BOX_HEADER_BYTES
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", video, start + 8)
            header_bytes = 16
        elif size == 0:
            size = end - start
        if size < header_bytes:
            return
        yield _Node(kind, start + header_bytes, start + size)
        start += size


def _children(video: bytes, box: _Node | None) -> Iterator[_Node]:
    return _boxes(video, box.body, min(box.end, len(video))) if box else iter(())


def _first(boxes: Iterator[_Node] | list[_Node], kind: bytes) -> _Node | None:
    return next((box for box in boxes if box.kind == _fourcc(kind)), None)


def _movie_duration_s(video: bytes, movie: _Node, extends: _Node | None) -> float:
    header = _first(_children(video, movie), b"mvhd")
    if header is None:
        return 0.0
    is_64_bit = video[header.body] == 1
    timescale, duration = struct.unpack_from(
        ">IQ" if is_64_bit else ">II", video, header.body + (20 if is_64_bit else 12)
    )
    durations = [0 if duration in (2**32 - 1, 2**64 - 1) else duration]  # all ones: unknown
    extends_header = _first(_children(video, extends), b"mehd")
    if extends_header:
        is_64_bit = video[extends_header.body] == 1
        durations += struct.unpack_from(">Q" if is_64_bit else ">I", video, extends_header.body + 4)
    return max(durations) / timescale


def _indexed_segment(video: bytes, sidx: _Node) -> tuple[int, float, float]:
    """Returns (track ID, start, end) of the frames in a segment index, in seconds of the track."""
    track, timescale = struct.unpack_from(">II", video, sidx.body + 4)
    is_64_bit = video[sidx.body] == 1
    start, _, _, count = struct.unpack_from(">QQHH" if is_64_bit else ">IIHH", video, sidx.body + 12)
    references = sidx.body + (32 if is_64_bit else 24)
    duration = sum(struct.unpack_from(">I", video, references + 12 * number + 4)[0] for number in range(count))
    return track, start / timescale, (start + duration) / timescale


def _track_id(video: bytes, header: _Node) -> int:
    return struct.unpack_from(">I", video, header.body + (20 if video[header.body] == 1 else 12))[0]


def _clean_aperture(video: bytes, clap: _Node, width: int, height: int) -> Crop:
    """`clap` holds width, height and the offset of the centre to the right and down, all as fractions."""
    numbers = struct.unpack_from(">IIIIiIiI", video, clap.body)
    clap_width, clap_height, right, down = (numbers[i] / numbers[i + 1] for i in (0, 2, 4, 6))
    left = round((width - clap_width) / 2 + right)
    top = round((height - clap_height) / 2 + down)
    return Crop(left, width - left - round(clap_width), top, height - top - round(clap_height))


def _elements(video: bytes, start: int, end: int) -> Iterator[_Node]:
    end = min(end, len(video))
    for _ in range(_MAX_SIBLINGS):
        name = _read_vint(video, start, end, keep_marker=True)
        size = _read_vint(video, start + name[1], end) if name else None
        if name is None or size is None:
            return
        body = start + name[1] + size[1]
        start = end if _is_unknown_size(size) else min(body + size[0], end)
        yield _Node(name[0], body, start)


def _read_vint(video: bytes, start: int, end: int, keep_marker: bool = False) -> tuple[int, int] | None:
    """Returns (value, length in bytes) of an EBML variable-size integer, None if there is none."""
    if start >= end or not video[start]:
        return None
    length = 9 - video[start].bit_length()
    if start + length > end:
        return None
    value = int.from_bytes(video[start : start + length], "big")
    return value if keep_marker else value & (1 << 7 * length) - 1, length


def _is_unknown_size(size: tuple[int, int]) -> bool:
    """Whether all bits of an element's size, as `_read_vint` returns it, are set: its end is not stated."""
    return size[0] == (1 << 7 * size[1]) - 1


def _read_uint(video: bytes, element: _Node) -> int:
    return int.from_bytes(video[element.body : min(element.end, element.body + 8)], "big")


def _is_video(video: bytes, track: _Node) -> bool:
    if track.kind != _TRACK:
        return False
    fields = _elements(video, track.body, track.end)
    return any(field.kind == _TRACK_TYPE and _read_uint(video, field) == 1 for field in fields)


def _track_crop(video: bytes, track: _Node) -> Crop:
    for field in _elements(video, track.body, track.end):
        if field.kind == _VIDEO:
            settings = _elements(video, field.body, field.end)
            crops = {_PIXEL_CROPS[setting.kind]: setting for setting in settings if setting.kind in _PIXEL_CROPS}
            return Crop(**{side: _read_uint(video, setting) for side, setting in crops.items()})
    return Crop()
