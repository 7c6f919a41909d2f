"""Letters to a server that may be away: each is kept in a folder until it was delivered, in order, once.

    <folder>/waiting/<when>-<key>     one file a letter: a line of JSON, then bytes
    <folder>/sent/<key>               empty: what was delivered
    <folder>/refused/<when>-<key>     what the server will not have

A letter is on disk (or in the bucket) before `put` returns, so it outlives the process. Keys name what must not be said
twice, such as the metrics of a step: a second letter with a key that was used is not kept.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from giffy_ray.storage import PARTIAL, filesystem_of, join, read_bytes, write_bytes


@dataclass(frozen=True)
class Letter:
    name: str
    head: Mapping[str, Any]
    content: bytes

    @property
    def key(self) -> str:
        return self.name.partition("-")[2]


class Outbox:
    """One process at a time puts letters in, and one delivers them."""

    def __init__(self, folder: str):
        self.folder = folder
        self._used = {*_names(join(folder, "sent")), *(name.partition("-")[2] for name in self.waiting())} - {""}
        self._last = 0
        self._one_at_a_time = threading.Lock()  # the sampler of the machine writes too

    @staticmethod
    def is_at(folder: str) -> bool:
        return bool(_names(join(folder, "waiting")) or _names(join(folder, "sent")))

    def put(self, head: Mapping[str, Any], content: bytes = b"", key: str = "") -> None:
        """`key` is part of a file's name; a letter without one may be sent again and again."""
        with self._one_at_a_time:
            if key in self._used:
                return
            if key:
                self._used.add(key)
            self._last = max(time.time_ns(), self._last + 1)
            write_bytes(join(self.folder, "waiting", f"{self._last:020}-{key}"), _folded(head, content))

    def has(self, key: str) -> bool:
        return key in self._used

    def waiting(self) -> list[str]:
        """Names of letters, in the order in which they were put in."""
        return sorted(_names(join(self.folder, "waiting")))

    def read(self, name: str) -> Letter:
        head, _, content = read_bytes(join(self.folder, "waiting", name)).partition(b"\n")
        return Letter(name, json.loads(head), content)

    def delivered(self, letter: Letter) -> None:
        if letter.key:
            write_bytes(join(self.folder, "sent", letter.key), b"")
        self._remove(letter)

    def refused(self, letter: Letter) -> None:
        write_bytes(
            join(self.folder, "refused", letter.name), json.dumps(letter.head).encode() + b"\n" + letter.content
        )
        self._remove(letter)

    def _remove(self, letter: Letter) -> None:
        filesystem, path = filesystem_of(join(self.folder, "waiting", letter.name))
        filesystem.delete_file(path)


def _folded(head: Mapping[str, Any], content: bytes) -> bytes:
    return json.dumps(head).encode() + b"\n" + content


def _names(folder: str) -> list[str]:
    filesystem, path = filesystem_of(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in infos if info.type == fs.FileType.File and not info.base_name.endswith(PARTIAL)]
