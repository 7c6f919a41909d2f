"""Letters to a server that may be away: each is kept in a folder until it was delivered, in order, once.

    <folder>/waiting/<when>.<kind>-<key>     one file a letter: a line of JSON, then bytes
    <folder>/sent/<key>                      empty: what was delivered
    <folder>/refused/<when>.<kind>-<key>     what the server does not accept, with its reason; `readmit` queues it again
    <folder>/begun                           a copy of the letter that last began the run

A letter is on disk (or in the bucket) before `put` returns, so it outlives the process; while the storage does not
accept writes it is kept in memory. Keys name what must not be said twice, such as the metrics of a step: a second
letter with a key that was used is not kept. Earlier versions wrote names without `.<kind>`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from giffy_ray.core.storage import PARTIAL, filesystem_of, join, read_bytes, redact_credentials, write_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    name: str
    head: Mapping[str, Any]
    content: bytes

    @property
    def key(self) -> str:
        return _key_of(self.name)

    @property
    def kind(self) -> str:
        return self.head["kind"]

    @property
    def time_ms(self) -> int:
        """When it was put in, in milliseconds since 1970."""
        return _time_ns_of(self.name) // 1_000_000


class Outbox:
    """One process at a time puts letters in, and one delivers them."""

    def __init__(self, folder: str):
        self.folder = folder
        stored = [*self.waiting(), *self.refused()]
        self._used = {*_names(join(folder, "sent")), *map(_key_of, stored)} - {""}
        self._last = max(map(_time_ns_of, stored), default=0)  # names stay in order if the clock was set back
        self._unwritten: deque[tuple[str, bytes]] = deque()
        self._one_at_a_time = threading.Lock()  # the sampler of the machine writes too

    @staticmethod
    def is_at(folder: str) -> bool:
        return any(_names(join(folder, name)) for name in ("waiting", "refused", "sent"))

    def put(self, head: Mapping[str, Any], content: bytes = b"", key: str = "") -> None:
        """`key` is part of a file's name; a letter without one may be sent again and again.

        A storage that fails raises nothing: `write_pending` tries again.
        """
        with self._one_at_a_time:
            if key in self._used:
                return
            if key:
                self._used.add(key)
            self._last = max(time.time_ns(), self._last + 1)
            name, folded = f"{self._last:020}.{head['kind']}-{key}", _folded(head, content)
            if not self._unwritten:  # else it would wait for the storage again
                try:
                    write_bytes(join(self.folder, "waiting", name), folded)
                    return
                except OSError as failure:
                    _log.warning("%s cannot be written: %s", self.folder, redact_credentials(str(failure)))
            self._unwritten.append((name, folded))

    def write_pending(self) -> None:
        """Writes the letters that `put` could not write. Raises OSError if the storage still fails."""
        while self._unwritten:
            name, folded = self._unwritten[0]
            write_bytes(join(self.folder, "waiting", name), folded)
            self._unwritten.popleft()

    @property
    def unwritten(self) -> int:
        """The number of letters that are in memory only."""
        return len(self._unwritten)

    def has(self, key: str) -> bool:
        return key in self._used

    def waiting(self) -> list[str]:
        """Names of letters, in the order in which they were put in."""
        return sorted(_names(join(self.folder, "waiting")))

    def refused(self) -> list[str]:
        """Names of the letters that were put aside, in the order in which they were put in."""
        return sorted(_names(join(self.folder, "refused")))

    def read(self, name: str, folder: str = "waiting") -> Event:
        """Raises ValueError if the file is not a letter."""
        head, _, content = read_bytes(join(self.folder, folder, name)).partition(b"\n")
        head = json.loads(head)
        if not isinstance(head, dict) or "kind" not in head:
            raise ValueError(f"{name} is not a letter")
        return Event(name, head, content)

    def delivered(self, letter: Event) -> None:
        if letter.key:
            write_bytes(join(self.folder, "sent", letter.key), b"")
        self._remove("waiting", letter.name)

    def put_aside(self, letter: Event, reason: str) -> None:
        """Moves a letter to `refused/`, with the reason."""
        folded = _folded({**letter.head, "refusal": reason}, letter.content)
        write_bytes(join(self.folder, "refused", letter.name), folded)
        self._remove("waiting", letter.name)

    def put_aside_damaged(self, name: str) -> None:
        """Moves a file that is not a letter to `refused/`."""
        write_bytes(join(self.folder, "refused", name), read_bytes(join(self.folder, "waiting", name)))
        self._remove("waiting", name)

    def readmit(self, has_run: bool) -> None:
        """Queues the refused letters again.

        Those that begin or end the run are dropped if a later start has begun it: they no longer apply. Earlier
        versions left no copy of that start, only a run in MLflow (`has_run`).
        """
        begun = self.begun()
        begun_ns = _time_ns_of(begun.name) if begun else time.time_ns() if has_run else 0
        for name in self.refused():
            try:
                letter = self.read(name, "refused")
            except ValueError:
                continue
            if letter.kind not in ("begin", "status") or _time_ns_of(name) > begun_ns:
                head = {field: value for field, value in letter.head.items() if field != "refusal"}
                write_bytes(join(self.folder, "waiting", name), _folded(head, letter.content))
            self._remove("refused", name)

    def keep_begin(self, letter: Event) -> None:
        write_bytes(join(self.folder, "begun"), _folded({**letter.head, "letter": letter.name}, letter.content))

    def begun(self) -> Event | None:
        """The letter that last began the run. None before the first, for runs of earlier versions, and if it is
        damaged."""
        if "begun" not in _names(self.folder):
            return None
        head, _, content = read_bytes(join(self.folder, "begun")).partition(b"\n")
        try:
            head = json.loads(head)
            return Event(head.pop("letter"), head, content)
        except (ValueError, KeyError, TypeError, AttributeError) as damage:
            _log.warning("%s/begun is damaged: %r", self.folder, damage)
            return None

    def _remove(self, folder: str, name: str) -> None:
        filesystem, path = filesystem_of(join(self.folder, folder, name))
        filesystem.delete_file(path)


def has_waiting(folder: str) -> bool:
    """Whether letters wait in the outbox at `folder`; asks the storage once."""
    return bool(_names(join(folder, "waiting")))


def kind_in(name: str) -> str:
    """The kind of a letter by its name, or an empty string in names of earlier versions."""
    return name.partition("-")[0].partition(".")[2]


def _key_of(name: str) -> str:
    return name.partition("-")[2]


def _time_ns_of(name: str) -> int:
    digits = name.partition("-")[0].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _folded(head: Mapping[str, Any], content: bytes) -> bytes:
    return json.dumps(head).encode() + b"\n" + content


def _names(folder: str) -> list[str]:
    filesystem, path = filesystem_of(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in infos if info.type == fs.FileType.File and not info.base_name.endswith(PARTIAL)]
