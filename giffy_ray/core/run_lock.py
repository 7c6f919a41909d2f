"""The lease on a run's folder: one process at a time trains a run.

`lease.json` names the process that holds the run, which writes it again every few seconds; a lease that has not been
written for `EXPIRES_S` seconds is free. Every write depends on what its writer last read, so nobody overwrites a new
holder, however long it was paused in between: a file lock guards the comparison on a local file system, and S3 makes
it itself (If-Match, If-None-Match). Other object stores compare less strictly: what was written is read again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from giffy_ray.core.errors import ConfigError
from giffy_ray.core.storage import filesystem_of, is_local, join, read_text, write_text

EXPIRES_S = 30.0
_ABANDONED_S = 3600.0  # by the clocks of two machines, which may differ by minutes
_RENEW_S = 5.0
_SETTLE_S = 0.5
_PATIENCE_S = 5.0  # with a request to S3
# What has to be equal before a process number means anything here. Host names alone do not tell machines apart, and
# containers of one machine see processes of their own.
_MACHINE = ("host", "boot_id", "pid_namespace")
_GONE = -1  # the start time of a process that has ended and was not waited for
_log = logging.getLogger(__name__)


class RunLockLost(Exception):
    """The run belongs to another process, or may by now. The message names the run and says why."""


@contextmanager
def run_lock(run_dir: str) -> Iterator[RunLock]:
    """Holds the lease of the run in `run_dir` inside the block. Waits for a lease that may have expired.

    Raises ConfigError where another process holds it. LeaseLost is raised at the end of a block in which it was lost;
    an error that the block raises is not replaced, and says so in a note.
    """
    lease = RunLock(run_dir)
    lease.acquire()
    try:
        try:
            yield lease
        finally:
            lease.release()
    except Exception as error:
        if lease.lost and not isinstance(error, RunLockLost):
            error.add_note(lease.lost)
        raise
    lease.check()


class RunLock:
    """A lease that a thread of this process renews. `holder` identifies it in the file."""

    def __init__(self, run_dir: str):
        self.holder = uuid.uuid4().hex
        self._name, self._location = name_of(run_dir), location_of(run_dir)
        self._file = _file_at(self._location)
        self._own = {"holder": self.holder, **_this_process()}
        self._lost, self._failure, self._deadline_s = "", "", float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {self._name}", daemon=True)

    @property
    def lost(self) -> str:
        """Why the run is no longer ours; an empty string while it is."""
        if not self._lost and not self._ended.is_set() and time.monotonic() > self._deadline_s:
            why = f"it could not be renewed for {EXPIRES_S:.0f} s" + (f" ({self._failure})" if self._failure else "")
            self._lose(why)
        return self._lost

    def check(self) -> None:
        """Raises LeaseLost."""
        if self.lost:
            raise RunLockLost(self.lost)

    def acquire(self) -> None:
        """Raises ConfigError where another process holds the lease, or gets it first."""
        while True:
            seen, began_s = self._wait_until_free(), time.monotonic()
            try:
                self._file.write(self._text(), seen)
            except _Changed:
                pass  # by another process; or by ourselves, where a client sends a request again that had succeeded
            except Timeout as error:
                raise ConfigError(
                    f"name: a process that was paused while it changed the lease of {self._name!r} keeps "
                    f"{error.lock_file} locked; continue or end that process"
                ) from error
            if not self._file.is_exclusive:
                time.sleep(_SETTLE_S)
            now = self._file.read()
            if _parsed(now.text).get("holder") == self.holder:
                break
            if now.text is not None:
                raise self._taken(now.text)
        self._deadline_s = began_s + EXPIRES_S
        self._thread.start()

    def release(self) -> None:
        """Deletes the lease where it is still ours. A failure is logged: the lease then expires by itself."""
        already_lost = self.lost  # by the clock, which does not count from here on
        self._ended.set()
        self._thread.join()
        try:
            seen = self._file.read()
            if _parsed(seen.text).get("holder") == self.holder:
                self._file.write(None, seen)
            elif not already_lost:
                self._lose(_why_not_ours(seen.text))
        except Exception as failure:
            _log.warning("%s: could not be deleted (%r); it expires in %.0f s", self._location, failure, EXPIRES_S)

    def _wait_until_free(self) -> _Seen:
        """What the file holds that may be replaced.

        Clocks of machines differ, so what counts is whether the file changes while we look.
        """
        first = self._file.read()
        if first.text is None or _is_gone(_parsed(first.text)):
            return first
        print(f"waiting up to {EXPIRES_S:.0f} s to see whether {self._name!r} is still being trained", flush=True)
        deadline_s = time.monotonic() + EXPIRES_S
        while time.monotonic() < deadline_s:
            time.sleep(_SETTLE_S)
            seen = self._file.read()
            if seen.text is None:
                return seen
            if seen.text != first.text:
                raise self._taken(seen.text)
        return first

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_S) and not self.lost:
            try:
                self._renew_once()
                if self._failure:
                    _log.warning("%s: is renewed again", self._location)
                self._failure = ""
            except Exception as failure:  # a storage that is away for a moment; what counts is the deadline
                if not self._failure:
                    _log.warning("%s: could not be renewed (%r); trying again", self._location, failure)
                self._failure = repr(failure)

    def _renew_once(self) -> None:
        began_s = time.monotonic()
        seen = self._file.read()
        if _parsed(seen.text).get("holder") != self.holder:
            self._lose(_why_not_ours(seen.text))
            return
        if self.lost:  # we were paused, or reading took too long
            return
        self._file.write(self._text(), seen)
        self._deadline_s = began_s + EXPIRES_S

    def _lose(self, why: str) -> None:
        self._lost = f"the lease of the run {self._name!r} is lost ({self._location}): {why}"
        _log.error(self._lost)

    def _text(self) -> str:
        return json.dumps(self._own | {"renewed_s": time.time()})

    def _taken(self, text: str) -> ConfigError:
        theirs = _parsed(text)
        return ConfigError(
            f"name: the run {self._name!r} is being trained by process {theirs.get('pid')} on {theirs.get('host')} "
            f"({self._location}); give another name=..., or end that process"
        )


class RunLockWatcher:
    """Follows the lease of `holder` from any process that reads the storage, such as a worker of its training."""

    def __init__(self, run_dir: str, holder: str):
        self.location, self.holder, self._name = location_of(run_dir), holder, name_of(run_dir)
        self._text, self._changed_s = "", time.monotonic()

    def look(self) -> str:
        """Why the run is no longer the holder's; an empty string while it is. Raises what reading raises."""
        text, now_s = read_text(self.location, "replace"), time.monotonic()
        why = ""
        if _parsed(text).get("holder") != self.holder:
            why = _why_not_ours(text)
        elif text != self._text:
            self._text, self._changed_s = text or "", now_s
        elif now_s - self._changed_s > EXPIRES_S:
            why = f"it was not renewed for {EXPIRES_S:.0f} s; the process that started the training hangs, or has ended"
        return why and f"the lease of the run {self._name!r} is lost ({self.location}): {why}"

    def check(self) -> None:
        """Raises LeaseLost. To be called before what only the holder may do, such as completing a checkpoint."""
        if lost := self.look():
            raise RunLockLost(lost)


def is_live(location: str) -> bool:
    """Whether a process may hold the lease at `location`, without the half minute that it takes to be sure.

    It does not where it certainly has ended, or where the lease says that nobody has renewed it for an hour.
    """
    text = read_text(location)
    if text is None:
        return False
    found = _parsed(text)
    renewed_s = found.get("renewed_s")
    abandoned = isinstance(renewed_s, int | float) and time.time() - renewed_s > _ABANDONED_S
    return not abandoned and not _is_gone(found)


def location_of(run_dir: str) -> str:
    return join(run_dir, "lease.json")


def name_of(run_dir: str) -> str:
    return run_dir.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class _Seen:
    text: str | None  # none: there is no file
    version: str = ""  # S3's ETag of it


class _Changed(Exception):
    """The file is not as it was read."""


class _File(Protocol):
    is_exclusive: bool  # whether of two writers that read the same, one certainly fails

    def read(self) -> _Seen: ...

    def write(self, text: str | None, seen: _Seen) -> None:
        """Replaces what was seen; none deletes it. Raises _Changed where it is not what is there."""
        ...


class _LocalFile:
    is_exclusive = True

    def __init__(self, location: str):
        self._location, self._path = location, Path(filesystem_of(location)[1])

    def read(self) -> _Seen:
        return _Seen(read_text(self._location, "replace"))

    def write(self, text: str | None, seen: _Seen) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The kernel frees the lock when its process ends. A process that is paused inside keeps others out.
        with FileLock(f"{self._path}.lock", timeout=EXPIRES_S / 2, poll_interval=0.01):
            if self.read() != seen:
                raise _Changed
            if text is None:
                self._path.unlink()
            else:
                write_text(self._location, text)


class _S3Object:
    # Some servers that speak S3 ignore the conditions, and some refuse requests that have any.
    is_exclusive = False

    def __init__(self, location: str):
        import boto3
        from botocore.config import Config

        self._bucket, _, self._key = location.partition("://")[2].partition("/")
        # By default a request is tried for minutes, and the lease expires meanwhile.
        patience = Config(connect_timeout=_PATIENCE_S, read_timeout=_PATIENCE_S, retries={"total_max_attempts": 2})
        self._client: Any = boto3.Session().client("s3", config=patience)
        self._has_conditions = True

    def read(self) -> _Seen:
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except self._client.exceptions.NoSuchKey:
            return _Seen(None)
        return _Seen(found["Body"].read().decode(errors="replace"), found["ETag"])

    def write(self, text: str | None, seen: _Seen) -> None:
        from botocore.exceptions import ClientError

        where = {"Bucket": self._bucket, "Key": self._key}
        if self._has_conditions:
            where |= {"IfNoneMatch": "*"} if seen.text is None else {"IfMatch": seen.version}
        elif self.read() != seen:
            raise _Changed
        try:
            if text is None:
                self._client.delete_object(**where)
            else:
                self._client.put_object(Body=text.encode(), **where)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise _Changed from error
            if error.response["Error"]["Code"] != "NotImplemented" or not self._has_conditions:
                raise
            self._has_conditions = False
            self.write(text, seen)


class _PlainFile:
    """On a storage for which there is no conditional write here."""

    is_exclusive = False

    def __init__(self, location: str):
        self._location = location

    def read(self) -> _Seen:
        return _Seen(read_text(self._location, "replace"))

    def write(self, text: str | None, seen: _Seen) -> None:
        if self.read() != seen:
            raise _Changed
        if text is None:
            filesystem, path = filesystem_of(self._location)
            filesystem.delete_file(path)
        else:
            write_text(self._location, text)


def _file_at(location: str) -> _File:
    if is_local(location):
        return _LocalFile(location)
    return _S3Object(location) if location.startswith("s3://") else _PlainFile(location)


def _parsed(text: str | None) -> dict[str, Any]:
    """What a lease says; nothing where it cannot be read."""
    try:
        lease = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return lease if isinstance(lease, dict) else {}


def _why_not_ours(text: str | None) -> str:
    if text is None:
        return "its file was deleted"
    theirs = _parsed(text)
    return f"process {theirs.get('pid')} on {theirs.get('host')} has taken the run"


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started_ticks": _started_ticks(os.getpid()),
    }


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether its holder certainly was a process of this machine that has ended."""
    here, pid = _this_process(), lease.get("pid")
    if any(here[name] is None or lease.get(name) != here[name] for name in _MACHINE):
        return False
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # there is one, of another user
        pass
    ticks = _started_ticks(pid)
    return ticks is not None and ticks != lease.get("started_ticks")


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _started_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; none where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return _GONE if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
