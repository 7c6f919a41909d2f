"""A durable queue of tracking events, so that a server that is down loses nothing and delays nothing.

    <folder>/waiting/<time>.<kind>-<key>     one file per event: a line of JSON, then bytes
    <folder>/sent/<key>                      empty: an event with this key was delivered
    <folder>/refused/<time>.<kind>-<key>     an event that the server rejected, with the reason; see `requeue_refused`
    <folder>/begun                           a copy of the event that last began the run

An event is on disk (or in the bucket) before `put` returns, so it survives the process. While the storage rejects
writes, events stay in memory. A key identifies an event that must be logged once, such as the metrics of a step: `put`
ignores a key that was used before. Earlier versions wrote names without `.<kind>`.
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

from giffy_ray.core.storage import PARTIAL_SUFFIX, filesystem_of, join, read_bytes, redact_credentials, write_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something to log.

    Attributes:
        name: Its file name, which sorts by time.
        payload: JSON fields; `kind` selects how the event is uploaded.
        content: The bytes of a file, or none.
    """

    name: str
    payload: Mapping[str, Any]
    content: bytes

    @property
    def key(self) -> str:
        return _parse_key(self.name)

    @property
    def kind(self) -> str:
        return self.payload["kind"]

    @property
    def time_ms(self) -> int:
        """When it was put into the outbox, in milliseconds since 1970."""
        return _parse_time_ns(self.name) // 1_000_000


class Outbox:
    """The events of one run. At most one process puts events in, and one delivers them."""

    def __init__(self, folder: str):
        self.folder = folder
        stored_names = [*self.waiting_names(), *self.refused_names()]
        self._used_keys = {*_list_files(join(folder, "sent")), *map(_parse_key, stored_names)} - {""}
        # Names must keep their order even if the clock was set back.
        self._last_time_ns = max(map(_parse_time_ns, stored_names), default=0)
        self._unwritten: deque[tuple[str, bytes]] = deque()
        self._lock = threading.Lock()  # the sampler of system metrics writes from its own thread

    @staticmethod
    def exists_in(folder: str) -> bool:
        return any(_list_files(join(folder, name)) for name in ("waiting", "refused", "sent"))

    def put(self, payload: Mapping[str, Any], content: bytes = b"", key: str = "") -> None:
        """Stores an event. A storage failure does not raise: `write_pending` tries again.

        Args:
            payload: JSON fields, among them `kind`.
            content: The bytes of a file.
            key: Part of the file's name. Events without a key may be put any number of times.
        """
        with self._lock:
            if key in self._used_keys:
                return
            if key:
                self._used_keys.add(key)
            self._last_time_ns = max(time.time_ns(), self._last_time_ns + 1)
            name = f"{self._last_time_ns:020}.{payload['kind']}-{key}"
            serialized = _serialize(payload, content)
            if not self._unwritten:  # otherwise each call would wait for the failing storage
                try:
                    write_bytes(join(self.folder, "waiting", name), serialized)
                    return
                except OSError as failure:
                    _log.warning("cannot write to %s: %s", self.folder, redact_credentials(str(failure)))
            self._unwritten.append((name, serialized))

    def write_pending(self) -> None:
        """Writes the events that `put` could not write. Raises OSError if the storage still fails."""
        while self._unwritten:
            name, serialized = self._unwritten[0]
            write_bytes(join(self.folder, "waiting", name), serialized)
            self._unwritten.popleft()

    @property
    def unwritten_count(self) -> int:
        """Number of events that are in memory only."""
        return len(self._unwritten)

    def has(self, key: str) -> bool:
        return key in self._used_keys

    def waiting_names(self) -> list[str]:
        """Lists the events to deliver, oldest first."""
        return sorted(_list_files(join(self.folder, "waiting")))

    def refused_names(self) -> list[str]:
        """Lists the events that the server rejected, oldest first."""
        return sorted(_list_files(join(self.folder, "refused")))

    def read(self, name: str, subfolder: str = "waiting") -> Event:
        """Reads an event. Raises ValueError if the file is not an event."""
        header, _, content = read_bytes(join(self.folder, subfolder, name)).partition(b"\n")
        payload = json.loads(header)
        if not isinstance(payload, dict) or "kind" not in payload:
            raise ValueError(f"{name} is not an event")
        return Event(name, payload, content)

    def mark_delivered(self, event: Event) -> None:
        if event.key:
            write_bytes(join(self.folder, "sent", event.key), b"")
        self._remove("waiting", event.name)

    def refuse(self, event: Event, reason: str) -> None:
        """Moves an event to `refused/`, with the reason."""
        serialized = _serialize({**event.payload, "refusal": reason}, event.content)
        write_bytes(join(self.folder, "refused", event.name), serialized)
        self._remove("waiting", event.name)

    def refuse_damaged(self, name: str) -> None:
        """Moves a file that is not an event to `refused/`."""
        write_bytes(join(self.folder, "refused", name), read_bytes(join(self.folder, "waiting", name)))
        self._remove("waiting", name)

    def requeue_refused(self, has_run: bool) -> None:
        """Queues the refused events again.

        Events that begin or end the run are dropped if a later start has begun it: they no longer apply.

        Args:
            has_run: Whether MLflow has the run. Earlier versions kept no copy of the event that began it.
        """
        fallback_ns = time.time_ns() if has_run else 0
        begin = self.load_begin()
        begun_ns = _parse_time_ns(begin.name) if begin else fallback_ns
        for name in self.refused_names():
            try:
                event = self.read(name, "refused")
            except ValueError:
                continue
            if event.kind not in ("begin", "status") or _parse_time_ns(name) > begun_ns:
                payload = {field: value for field, value in event.payload.items() if field != "refusal"}
                write_bytes(join(self.folder, "waiting", name), _serialize(payload, event.content))
            self._remove("refused", name)

    def save_begin(self, event: Event) -> None:
        """Keeps a copy of the event that began the run."""
        write_bytes(join(self.folder, "begun"), _serialize({**event.payload, "letter": event.name}, event.content))

    def load_begin(self) -> Event | None:
        """Returns the event that last began the run.

        None if the run has not begun, if an earlier version began it, and if the copy is damaged.
        """
        if "begun" not in _list_files(self.folder):
            return None
        header, _, content = read_bytes(join(self.folder, "begun")).partition(b"\n")
        try:
            payload = json.loads(header)
            return Event(payload.pop("letter"), payload, content)
        except (ValueError, KeyError, TypeError, AttributeError) as damage:
            _log.warning("%s/begun is damaged: %r", self.folder, damage)
            return None

    def _remove(self, subfolder: str, name: str) -> None:
        filesystem, path = filesystem_of(join(self.folder, subfolder, name))
        filesystem.delete_file(path)


def has_waiting(folder: str) -> bool:
    """Returns whether events wait in the outbox at `folder`, with a single request to the storage."""
    return bool(_list_files(join(folder, "waiting")))


def parse_kind(name: str) -> str:
    """Returns the kind in an event's name, or an empty string for names of earlier versions."""
    return name.partition("-")[0].partition(".")[2]


def _parse_key(name: str) -> str:
    return name.partition("-")[2]


def _parse_time_ns(name: str) -> int:
    digits = name.partition("-")[0].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _serialize(payload: Mapping[str, Any], content: bytes) -> bytes:
    return json.dumps(payload).encode() + b"\n" + content


def _list_files(folder: str) -> list[str]:
    filesystem, path = filesystem_of(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [
        info.base_name
        for info in infos
        if info.type == fs.FileType.File and not info.base_name.endswith(PARTIAL_SUFFIX)
    ]
