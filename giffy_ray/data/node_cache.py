"""Copies of remote shards on the disk of a node: shared by its processes, bounded, least recently used evicted first.

    <folder>/<name>             a copy, whole and checked; its time of change is when a process last mapped it
    <folder>/<name>.partial     one that is being written; its space is allocated before the first byte arrives
    <folder>/.lock              held by the process that evicts or allocates

A map holds a shared lock (flock) on its copy, and only a copy that nobody has locked is evicted. So no evicted copy
takes disk space, what a process has mapped stays, and the kernel frees the locks of a process that is killed. A process
maps a 32nd of the cache at most, or one copy: then it drops its maps, and others can evict these copies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from pyarrow import fs

from giffy_ray.config import ConfigError
from giffy_ray.storage import PARTIAL

_RESERVE = 0.1  # of the disk stays free where no limit is given; Ray stops spilling to a disk that is 95 % full
_MOST_MAPPED = 1 / 32  # of the cache or disk, by one process
_BATCH = 1 / 50  # of the copies are evicted at once, as each eviction lists all of them
_LOCK_POLL_S = 0.02
_CHUNK_BYTES = 2**24
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class _Copy(NamedTuple):
    used_ns: int
    path: Path
    size: int


class NodeCache:
    """`limit_bytes`: of all copies; None: as much as is free, less a tenth of the disk.

    `release` must drop the maps that this process holds.
    """

    def __init__(self, folder: Path, limit_bytes: float | None = None, release: Callable[[], None] = lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
        disk_bytes = disk.f_blocks * disk.f_frsize
        self.folder, self._limit_bytes, self._release = folder, limit_bytes, release
        self._reserve_bytes = 0.0 if limit_bytes is not None else _RESERVE * disk_bytes
        self._most_mapped_bytes = _MOST_MAPPED * (disk_bytes if limit_bytes is None else limit_bytes)
        self._mapped_bytes = 0

    def map(self, name: str, filesystem: fs.FileSystem, remote: str, sha256: str) -> np.ndarray:
        """uint8 [bytes], not to be written to: the content of `remote`, out of its copy, which is made if need be.

        Where other processes use so many copies that there is no room for one more, the content is read into memory.
        Raises ConfigError where it alone does not fit on the disk, RuntimeError where its sha256 is another.
        """
        copy = self.folder / name
        while (content := _map(copy)) is None:
            if not self.bring(copy, filesystem, remote, sha256):
                content = _read(filesystem, remote, sha256)
                break
        self._mapped_bytes += content.size
        if self._mapped_bytes > self._most_mapped_bytes:
            self._release()
            self._mapped_bytes = content.size
        return content

    def bring(self, copy: Path, filesystem: fs.FileSystem, remote: str, sha256: str) -> bool:
        """Copies a remote file to `copy`, unless it is there. False where other processes use all the room.

        Raises as `map`.
        """
        try:
            return self._copy_in(copy, filesystem, remote, sha256)
        except OSError as error:  # not even an empty file can be made
            if error.errno not in _FULL:
                raise
            return False

    def _copy_in(self, copy: Path, filesystem: fs.FileSystem, remote: str, sha256: str) -> bool:
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(copy.name + PARTIAL)
        with _claimed(partial) as file:
            if copy.exists():  # another process has made it while we waited
                return True
            size, is_full = filesystem.get_file_info(remote).size, False
            while True:
                try:
                    if not self._allocate(file, size, evict=is_full):
                        return False
                    _copy(filesystem, remote, file, sha256)
                    partial.rename(copy)
                    return True
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    os.ftruncate(file, 0)
                    is_full = True  # whatever the file system says is free: a quota, or other programs that write

    def capacity_bytes(self) -> float:
        """How much all copies together may take now."""
        held, free = sum(copy.size for copy in self._copies()), shutil.disk_usage(self.folder).free
        return held + free - self._reserve_bytes if self._limit_bytes is None else min(self._limit_bytes, held + free)

    def _allocate(self, file: int, size: int, evict: bool) -> bool:
        """Takes the space for a new copy. Whether there is enough; `evict`: at least one copy must make room."""
        with FileLock(self.folder / ".lock"):
            if not self._make_room(size, evict):
                return False
            try:
                os.posix_fallocate(file, 0, max(size, 1))
            except OSError as error:
                if error.errno not in _CANNOT_ALLOCATE:
                    raise
        return True

    def _make_room(self, size: int, evict: bool) -> bool:
        free = shutil.disk_usage(self.folder).free
        if self._limit_bytes is None and free - self._reserve_bytes >= size and not evict:
            return True
        copies = sorted(self._copies())
        held = sum(copy.size for copy in copies)
        self._refuse_too_large(size, held, free, evict)
        room = free - self._reserve_bytes if self._limit_bytes is None else min(self._limit_bytes - held, free)
        if room >= size and not evict:
            return True
        wanted, evicted = max(size, _BATCH * held), 0
        for release in (lambda: None, self._release):  # of our own maps, only where nothing else is left
            release()
            for copy in copies:
                if room + evicted >= wanted and (evicted or not evict):
                    break
                evicted += _evict(copy)
            if evicted and room + evicted >= size:
                return True
        # The tenth of the disk that is kept free is given up before a training is.
        return self._limit_bytes is None and free + evicted >= size and (bool(evicted) or not evict)

    def _refuse_too_large(self, size: int, held: int, free: int, full: bool) -> None:
        if self._limit_bytes is not None and size > self._limit_bytes:
            raise ConfigError(
                f"data.node_cache_gb: one shard of the clips has {size / 1e9:.3g} GB "
                f"(value {self._limit_bytes / 1e9:g}); give more, or data.keep=false"
            )
        if size > held + free or (full and not held):
            raise ConfigError(
                f"{self.folder}: {free / 1e9:.1f} GB are free, too little for one shard of the clips that this node "
                f"reads ({size / 1e9:.3g} GB); set TMPDIR to a larger disk, or data.keep=false"
            )

    def _copies(self) -> Iterator[_Copy]:
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicts
                continue
            yield _Copy(status.st_mtime_ns, path, status.st_blocks * 512)


def _map(copy: Path) -> np.ndarray | None:
    """uint8 [bytes]; None where there is no copy. The map keeps a duplicate of the descriptor, and so the lock."""
    try:
        file = copy.open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # evicted before it was locked
            return None
        now_ns = time.time_ns()
        os.utime(file.fileno(), ns=(now_ns, now_ns))  # the file system's own time of access is often switched off
        return np.memmap(file, np.uint8, "r")


def _evict(copy: _Copy) -> int:
    """The bytes that are free now; 0 where a process maps the copy, or writes it. Removes what a killed one left."""
    try:
        file = os.open(copy.path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(file, copy.path):  # another process has evicted it, or it was completed and has its name now
            return 0
        copy.path.unlink()
        return copy.size
    except BlockingIOError:
        return 0
    finally:
        os.close(file)


@contextmanager
def _claimed(partial: Path) -> Iterator[int]:
    """The descriptor of the file, which is made if need be; no other process writes it. Removes what is left of it.

    Polls, because a blocking wait may never end: a completed file keeps its inode, and its readers hold shared locks on
    it for as long as they map it. Closes the file between polls, so that an evicted file frees its space.
    """
    while True:
        file = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if _try_lock(file) and _is_at(file, partial):  # else completed or evicted in the meantime
                try:
                    yield file
                finally:
                    if _is_at(file, partial):  # not renamed
                        partial.unlink()
                return
        finally:
            os.close(file)
        time.sleep(_LOCK_POLL_S)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _copy(filesystem: fs.FileSystem, remote: str, file: int, sha256: str) -> None:
    digest, place = hashlib.sha256(), 0
    with filesystem.open_input_stream(remote) as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            while chunk:
                written = os.pwrite(file, chunk, place)
                chunk, place = chunk[written:], place + written
    os.ftruncate(file, place)
    _compare(remote, digest.hexdigest(), sha256)


def _read(filesystem: fs.FileSystem, remote: str, sha256: str) -> np.ndarray:
    with filesystem.open_input_stream(remote) as source:
        content = source.read()
    _compare(remote, hashlib.sha256(content).hexdigest(), sha256)
    return np.frombuffer(content, np.uint8)


def _compare(remote: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise RuntimeError(
            f"{remote}: its sha256 is {found}, not {wanted}; run jobs/prepare.py, which decodes it again"
        )
