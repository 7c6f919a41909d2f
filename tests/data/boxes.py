"""The boxes of an mp4 file (ISO/IEC 14496-12) and the elements of an mkv file, to build broken ones from whole ones."""

from __future__ import annotations

import struct
from typing import NamedTuple

# How many bytes of its own a box has before the boxes that it holds.
_OWN_BYTES = {"stsd": 8, "dref": 8, "meta": 4, "avc1": 78}


class Box(NamedTuple):
    kind: str
    start: int
    body: int
    end: int


def boxes(video: bytes, start: int = 0, end: int | None = None) -> list[Box]:
    """The boxes that lie one after another between two offsets."""
    found, end = [], len(video) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", video, start)
        if size < 8:
            break
        found.append(Box(kind.decode("latin-1"), start, start + 8, min(start + size, end)))
        start += size
    return found


def find(video: bytes, path: str) -> list[Box]:
    """A box and those that it lies in, outermost first: find(video, "moov/trak/mdia/mdhd")."""
    way: list[Box] = []
    start, end = 0, len(video)
    for kind in path.split("/"):
        box = next((box for box in boxes(video, start, end) if box.kind == kind), None)
        if box is None:
            raise KeyError(f"{path}: the file has no such box")
        way.append(box)
        start, end = box.body + _OWN_BYTES.get(kind, 0), box.end
    return way


def box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind.encode("latin-1")) + body


def overwritten(video: bytes, path: str, offset: int, patch: bytes) -> bytes:
    """The file with some bytes of a box's body written over."""
    place = find(video, path)[-1].body + offset
    return video[:place] + patch + video[place + len(patch) :]


def replaced(video: bytes, path: str, new: bytes) -> bytes:
    """The file with other bytes in place of a whole box; it must lie behind the media data, which moves otherwise."""
    *around, old = find(video, path)
    changed = bytearray(video)
    for outer in around:
        struct.pack_into(">I", changed, outer.start, outer.end - outer.start + len(new) - (old.end - old.start))
    return bytes(changed[: old.start] + new + changed[old.end :])


def without(video: bytes, path: str) -> bytes:
    return replaced(video, path, b"")


def inserted(video: bytes, path: str, new: bytes) -> bytes:
    """The file with another box before the one named."""
    old = find(video, path)[-1]
    return replaced(video, path, new + video[old.start : old.end])


def starts_fast(video: bytes) -> bytes:
    """The file with its list of frames before its frames, as for the web."""
    top = {box.kind: video[box.start : box.end] for box in boxes(video)}
    at = "moov/trak/mdia/minf/stbl/stco"
    moov, offsets = top["moov"], find(top["moov"], at)[-1]
    (count,) = struct.unpack_from(">I", moov, offsets.body + 4)
    moved = [offset + len(moov) for offset in struct.unpack_from(f">{count}I", moov, offsets.body + 8)]
    moov = overwritten(moov, at, 8, struct.pack(f">{count}I", *moved))
    return top.pop("ftyp") + moov + b"".join(part for kind, part in top.items() if kind != "moov")


def element(name: str, *parts: bytes) -> bytes:
    """An element of an mkv file: its name in hexadecimal, its size in eight bytes, its body."""
    body = b"".join(parts)
    return bytes.fromhex(name) + struct.pack(">Q", len(body) | 1 << 56) + body
