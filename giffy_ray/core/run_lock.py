"""Run lock: only one process at a time trains a run.

The lock is a lease in the run's folder. `lease.json` names the holder, which rewrites it every few seconds. A lease
that has not been renewed for `EXPIRES_S` seconds is free. Every write is conditional on what its writer last read, so a
process that was paused never overwrites a new holder. A local file system compares under a file lock; S3 compares in
the request (If-Match, If-None-Match). Storage without such requests is compared before each write. Except on a local
file system, an acquired lock is read again after a moment, in case two writers succeeded.
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
_ABANDONED_S = 3600.0  # compared across the clocks of two machines, which may differ by minutes
_RENEW_S = 5.0  # between renewals
_SETTLE_S = 0.5  # between reads while waiting, and before a write that is not exclusive is read again
_S3_TIMEOUT_S = 5.0
# These must be equal before a process id is meaningful here. A host name alone does not identify a machine, and each
# container has its own process ids.
_MACHINE_FIELDS = ("host", "boot_id", "pid_namespace")
_ZOMBIE_TICKS = -1  # start time of a process that has ended but was not waited for
_log = logging.getLogger(__name__)


class RunLockLost(Exception):
    """Another process holds the run's lock, or may hold it by now. The message names the run and the reason."""


@contextmanager
def run_lock(run_dir: str) -> Iterator[RunLock]:
    """Holds the lock of a run inside the block. First waits for a lease that may have expired.

    Args:
        run_dir: Local path or URI of the run's folder.

    Raises:
        ConfigError: Another process holds the lock.
        RunLockLost: At the end of the block, if the lock was lost inside. An error raised by the block is not
            replaced; the loss is added to it as a note.
    """
    lock = RunLock(run_dir)
    lock.acquire()
    try:
        try:
            yield lock
        finally:
            lock.release()
    except Exception as error:
        if lock.lost_reason and not isinstance(error, RunLockLost):
            error.add_note(lock.lost_reason)
        raise
    lock.check()


class RunLock:
    """The lock of a run, which a thread of this process renews. `holder` identifies it in the file."""

    def __init__(self, run_dir: str):
        self.holder = uuid.uuid4().hex
        self._run_name = _run_name(run_dir)
        self._path = lock_path(run_dir)
        self._file = _open_lock_file(self._path)
        self._entry = {"holder": self.holder, **_describe_this_process()}
        self._lost_reason = ""
        self._last_error = ""
        self._deadline_s = float("inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name=f"lock of {self._run_name}", daemon=True)

    @property
    def lost_reason(self) -> str:
        """Why the lock is lost; empty while this process holds it."""
        if not self._lost_reason and not self._stopped.is_set() and time.monotonic() > self._deadline_s:
            details = f" ({self._last_error})" if self._last_error else ""
            self._set_lost(f"it could not be renewed for {EXPIRES_S:.0f} s{details}")
        return self._lost_reason

    def check(self) -> None:
        """Raises RunLockLost if the lock is lost."""
        if self.lost_reason:
            raise RunLockLost(self.lost_reason)

    def acquire(self) -> None:
        """Acquires the lock. Raises ConfigError if another process holds it or is faster."""
        while True:
            previous = self._wait_until_free()
            began_s = time.monotonic()
            try:
                self._file.write(self._serialize(), previous)
            except _WriteConflict:
                pass  # with another process, or with ourselves if the client repeated a request that had succeeded
            except Timeout as error:
                raise ConfigError(
                    f"name: {error.lock_file} stays locked, because a process was paused while it changed the lock of "
                    f"run {self._run_name!r}; continue or end that process (value {self._run_name!r})"
                ) from error
            if not self._file.is_exclusive:
                time.sleep(_SETTLE_S)
            current = self._file.read()
            if _parse(current.text).get("holder") == self.holder:
                break
            if current.text is not None:
                raise self._held_error(current.text)
        self._deadline_s = began_s + EXPIRES_S
        self._thread.start()

    def release(self) -> None:
        """Deletes the lease if this process still holds it. A failure is only logged: the lease then expires."""
        already_lost = self.lost_reason  # checked now, because the deadline no longer counts once stopped
        self._stopped.set()
        self._thread.join()
        try:
            current = self._file.read()
            if _parse(current.text).get("holder") == self.holder:
                self._file.write(None, current)
            elif not already_lost:
                self._set_lost(_describe_loss(current.text))
        except Exception as error:
            _log.warning("%s: could not be deleted (%r); it expires in %.0f s", self._path, error, EXPIRES_S)

    def _wait_until_free(self) -> _FileVersion:
        """Returns the version of the file that may be replaced. Raises ConfigError if it is being renewed.

        The clocks of machines differ, so only a change of the file counts as a renewal.
        """
        first = self._file.read()
        if first.text is None or _has_ended(_parse(first.text)):
            return first
        print(f"waiting up to {EXPIRES_S:.0f} s to see whether {self._run_name!r} is still being trained", flush=True)
        deadline_s = time.monotonic() + EXPIRES_S
        while time.monotonic() < deadline_s:
            time.sleep(_SETTLE_S)
            current = self._file.read()
            if current.text is None:
                return current
            if current.text != first.text:
                raise self._held_error(current.text)
        return first

    def _renew_until_stopped(self) -> None:
        while not self._stopped.wait(_RENEW_S) and not self.lost_reason:
            try:
                self._renew()
                if self._last_error:
                    _log.warning("%s: renewed again", self._path)
                self._last_error = ""
            except Exception as error:  # the storage may be unavailable for a moment; only the deadline counts
                if not self._last_error:
                    _log.warning("%s: could not be renewed (%r); trying again", self._path, error)
                self._last_error = repr(error)

    def _renew(self) -> None:
        began_s = time.monotonic()
        current = self._file.read()
        if _parse(current.text).get("holder") != self.holder:
            self._set_lost(_describe_loss(current.text))
            return
        if self.lost_reason:  # the process was paused, or reading took too long
            return
        self._file.write(self._serialize(), current)
        self._deadline_s = began_s + EXPIRES_S

    def _set_lost(self, reason: str) -> None:
        self._lost_reason = _lost_message(self._run_name, self._path, reason)
        _log.error(self._lost_reason)

    def _serialize(self) -> str:
        return json.dumps(self._entry | {"renewed_s": time.time()})

    def _held_error(self, text: str) -> ConfigError:
        holder = _parse(text)
        return ConfigError(
            f"name: the run {self._run_name!r} is being trained by process {holder.get('pid')} on "
            f"{holder.get('host')} ({self._path}); choose another name=... or end that process "
            f"(value {self._run_name!r})"
        )


class RunLockWatcher:
    """Watches the lock of `holder` from any process that can read the storage, such as a worker of its training."""

    def __init__(self, run_dir: str, holder: str):
        self.path = lock_path(run_dir)
        self.holder = holder
        self._run_name = _run_name(run_dir)
        self._text = ""
        self._changed_s = time.monotonic()

    def poll(self) -> str:
        """Reads the lease and returns why the lock is lost; empty while `holder` has it. Raises storage errors."""
        text = read_text(self.path, "replace")
        now_s = time.monotonic()
        reason = ""
        if _parse(text).get("holder") != self.holder:
            reason = _describe_loss(text)
        elif text != self._text:
            self._text = text or ""
            self._changed_s = now_s
        elif now_s - self._changed_s > EXPIRES_S:
            reason = (
                f"it was not renewed for {EXPIRES_S:.0f} s; the process that started the training hangs or has ended"
            )
        return reason and _lost_message(self._run_name, self.path, reason)

    def check(self) -> None:
        """Raises RunLockLost if the lock is lost. Call it before what only the holder may do."""
        if lost_reason := self.poll():
            raise RunLockLost(lost_reason)


def is_live(path: str) -> bool:
    """Returns whether a process may hold the lease at `path`, without waiting for it to expire.

    False only if the holder has certainly ended, or has not renewed the lease for an hour by its own clock.
    """
    text = read_text(path)
    if text is None:
        return False
    lease = _parse(text)
    renewed_s = lease.get("renewed_s")
    abandoned = isinstance(renewed_s, int | float) and time.time() - renewed_s > _ABANDONED_S
    return not abandoned and not _has_ended(lease)


def lock_path(run_dir: str) -> str:
    """Returns the path or URI of a run's lease file."""
    return join(run_dir, "lease.json")


def _run_name(run_dir: str) -> str:
    return run_dir.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class _FileVersion:
    """Content of the lease file at one moment."""

    text: str | None  # None: the file does not exist
    etag: str = ""  # on S3 only


class _WriteConflict(Exception):
    """The file is no longer as it was read."""


class _LockFile(Protocol):
    is_exclusive: bool  # whether of two writers with the same expected version, one certainly fails

    def read(self) -> _FileVersion: ...

    def write(self, text: str | None, expected: _FileVersion) -> None:
        """Replaces the expected version; None deletes the file. Raises _WriteConflict if the file differs from it."""
        ...


class _LocalLockFile:
    is_exclusive = True

    def __init__(self, location: str):
        self._location = location
        self._path = Path(filesystem_of(location)[1])

    def read(self) -> _FileVersion:
        return _FileVersion(read_text(self._location, "replace"))

    def write(self, text: str | None, expected: _FileVersion) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The kernel frees the lock when its process ends. A process that is paused inside keeps others out.
        with FileLock(f"{self._path}.lock", timeout=EXPIRES_S / 2, poll_interval=0.01):
            if self.read() != expected:
                raise _WriteConflict
            if text is None:
                self._path.unlink()
            else:
                write_text(self._location, text)


class _S3LockFile:
    # Some S3-compatible servers ignore the conditions, and some reject requests with conditions.
    is_exclusive = False

    def __init__(self, location: str):
        import boto3
        from botocore.config import Config

        self._bucket, _, self._key = location.partition("://")[2].partition("/")
        # boto3 retries for minutes by default, in which the lease would expire.
        config = Config(connect_timeout=_S3_TIMEOUT_S, read_timeout=_S3_TIMEOUT_S, retries={"total_max_attempts": 2})
        self._client: Any = boto3.Session().client("s3", config=config)
        self._supports_conditions = True

    def read(self) -> _FileVersion:
        try:
            response = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except self._client.exceptions.NoSuchKey:
            return _FileVersion(None)
        return _FileVersion(response["Body"].read().decode(errors="replace"), response["ETag"])

    def write(self, text: str | None, expected: _FileVersion) -> None:
        from botocore.exceptions import ClientError

        request = {"Bucket": self._bucket, "Key": self._key}
        if self._supports_conditions:
            request |= {"IfNoneMatch": "*"} if expected.text is None else {"IfMatch": expected.etag}
        elif self.read() != expected:
            raise _WriteConflict
        try:
            if text is None:
                self._client.delete_object(**request)
            else:
                self._client.put_object(Body=text.encode(), **request)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise _WriteConflict from error
            if code != "NotImplemented" or not self._supports_conditions:
                raise
            self._supports_conditions = False
            self.write(text, expected)


class _UnconditionalLockFile:
    """For a storage without a conditional write: compares before the write."""

    is_exclusive = False

    def __init__(self, location: str):
        self._location = location

    def read(self) -> _FileVersion:
        return _FileVersion(read_text(self._location, "replace"))

    def write(self, text: str | None, expected: _FileVersion) -> None:
        if self.read() != expected:
            raise _WriteConflict
        if text is None:
            filesystem, path = filesystem_of(self._location)
            filesystem.delete_file(path)
        else:
            write_text(self._location, text)


def _open_lock_file(location: str) -> _LockFile:
    if is_local(location):
        return _LocalLockFile(location)
    return _S3LockFile(location) if location.startswith("s3://") else _UnconditionalLockFile(location)


def _parse(text: str | None) -> dict[str, Any]:
    """Returns the content of a lease; empty if it is missing or invalid."""
    try:
        lease = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return lease if isinstance(lease, dict) else {}


def _lost_message(run_name: str, path: str, reason: str) -> str:
    return f"the lock of the run {run_name!r} is lost ({path}): {reason}"


def _describe_loss(text: str | None) -> str:
    if text is None:
        return "its file was deleted"
    holder = _parse(text)
    return f"process {holder.get('pid')} on {holder.get('host')} has taken over the run"


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_id": _read_boot_id(),
        "pid_namespace": _read_pid_namespace(),
        "pid": os.getpid(),
        "started_ticks": _read_start_ticks(os.getpid()),
    }


def _has_ended(lease: dict[str, Any]) -> bool:
    """Returns whether the holder certainly was a process of this machine that has ended."""
    this_process = _describe_this_process()
    if any(this_process[name] is None or lease.get(name) != this_process[name] for name in _MACHINE_FIELDS):
        return False
    pid = lease.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists and belongs to another user
        pass
    ticks = _read_start_ticks(pid)
    return ticks is not None and ticks != lease.get("started_ticks")


def _read_boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _read_pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _read_start_ticks(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None if that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return _ZOMBIE_TICKS if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
