"""Edits mp4 boxes (ISO/IEC 14496-12) and builds mkv elements, to derive broken files from valid ones."""

from __future__ import annotations

import struct
from typing import NamedTuple

# Bytes of a box's own fields, before its child boxes.
_FIELD_BYTES = {"stsd": 8, "dref": 8, "meta": 4, "avc1": 78}


class Box(NamedTuple):
    """A box and its byte offsets: start of the header, start of the body, end."""

    kind: str
    start: int
    body: int
    end: int


def list_boxes(video: bytes, start: int = 0, end: int | None = None) -> list[Box]:
    """Lists the sibling boxes between two offsets."""
    siblings = []
    end = len(video) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", video, start)
        if size < 8:
            break
        siblings.append(Box(kind.decode("latin-1"), start, start + 8, min(start + size, end)))
        start += size
    return siblings


def find_box(video: bytes, path: str) -> list[Box]:
    """Returns a box after all of its ancestors, outermost first: find_box(video, "moov/trak/mdia/mdhd")."""
    ancestry: list[Box] = []
    start, end = 0, len(video)
    for kind in path.split("/"):
        box = next((box for box in list_boxes(video, start, end) if box.kind == kind), None)
        if box is None:
            raise KeyError(f"{path}: the file has no such box")
        ancestry.append(box)
        start, end = box.body + _FIELD_BYTES.get(kind, 0), box.end
    return ancestry


def make_box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind.encode("latin-1")) + body


def overwrite_body(video: bytes, path: str, offset: int, patch: bytes) -> bytes:
    """Overwrites bytes of a box's body."""
    start = find_box(video, path)[-1].body + offset
    return video[:start] + patch + video[start + len(patch) :]


def replace_box(video: bytes, path: str, new: bytes) -> bytes:
    """Replaces a box and updates its ancestors' sizes. It must follow the media data, whose offsets would change."""
    *ancestors, old = find_box(video, path)
    changed = bytearray(video)
    for ancestor in ancestors:
        size = ancestor.end - ancestor.start + len(new) - (old.end - old.start)
        struct.pack_into(">I", changed, ancestor.start, size)
    return bytes(changed[: old.start] + new + changed[old.end :])


def remove_box(video: bytes, path: str) -> bytes:
    return replace_box(video, path, b"")


def insert_box(video: bytes, path: str, new: bytes) -> bytes:
    """Inserts a box before the box at `path`."""
    old = find_box(video, path)[-1]
    return replace_box(video, path, new + video[old.start : old.end])


def make_faststart(video: bytes) -> bytes:
    """Moves the frame list (moov) before the frames (mdat), as for streaming."""
    top = {box.kind: video[box.start : box.end] for box in list_boxes(video)}
    path = "moov/trak/mdia/minf/stbl/stco"
    moov = top["moov"]
    chunk_offsets = find_box(moov, path)[-1]
    (count,) = struct.unpack_from(">I", moov, chunk_offsets.body + 4)
    offsets = struct.unpack_from(f">{count}I", moov, chunk_offsets.body + 8)
    moved = [offset + len(moov) for offset in offsets]
    moov = overwrite_body(moov, path, 8, struct.pack(f">{count}I", *moved))
    return top.pop("ftyp") + moov + b"".join(content for kind, content in top.items() if kind != "moov")


def make_element(name: str, *parts: bytes) -> bytes:
    """Builds an mkv element from its name in hexadecimal, an 8-byte size and its body."""
    body = b"".join(parts)
    return bytes.fromhex(name) + struct.pack(">Q", len(body) | 1 << 56) + body
