"""Copies of remote shards on a node's disk: shared by its processes, bounded, evicted in least-recently-used order.

    <folder>/<name>             complete and verified copy; its modification time is when it was last mapped
    <folder>/<name>.partial     copy being written; its space is allocated before the first byte arrives
    <folder>/.lock              held while a process evicts or allocates

A map holds a shared lock (flock) on its copy, and only unlocked copies are evicted. So evicted copies take no disk
space, mapped copies stay, and the kernel releases the locks of a killed process. A process that maps more than 1/32 of
the cache drops its maps, so that other processes can evict these copies.
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
from giffy_ray.core.storage import PARTIAL_SUFFIX

_RESERVED_DISK_FRACTION = 0.1  # stays free without a limit; Ray stops spilling to a disk that is 95 % full
_MAX_MAPPED_FRACTION = 1 / 32  # of the cache or disk, per process
_EVICTION_FRACTION = 1 / 50  # of all copies at once, because each eviction lists all of them
_LOCK_POLL_S = 0.02
_CHUNK_BYTES = 2**24
_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_ALLOCATE_ERRORS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class _Copy(NamedTuple):
    used_ns: int
    path: Path
    size: int


class NodeCache:
    """Disk cache of remote shards.

    Args:
        folder: Folder of the cache, shared by the processes of the node.
        limit_bytes: Maximum size of all copies. None: all free space except a tenth of the disk.
        release: Must drop the maps that this process holds.
    """

    def __init__(self, folder: Path, limit_bytes: float | None = None, release: Callable[[], None] = lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
        disk_bytes = disk.f_blocks * disk.f_frsize
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._release = release
        self._reserved_bytes = 0.0 if limit_bytes is not None else _RESERVED_DISK_FRACTION * disk_bytes
        self._max_mapped_bytes = _MAX_MAPPED_FRACTION * (disk_bytes if limit_bytes is None else limit_bytes)
        self._mapped_bytes = 0

    def map(self, name: str, filesystem: fs.FileSystem, remote: str, sha256: str) -> np.ndarray:
        """Maps the copy of a remote file, which is downloaded first if needed.

        Reads the file into memory if copies in use by other processes leave no room for another one.

        Args:
            name: Path of the copy below the cache's folder.
            filesystem: File system of `remote`.
            remote: Path of the file.
            sha256: Expected checksum, in hex.

        Returns:
            uint8 [bytes], read-only.

        Raises:
            ConfigError: The file alone exceeds the limit or the disk.
            RuntimeError: The checksum differs.
        """
        copy = self.folder / name
        while (content := _map_copy(copy)) is None:
            if not self.download(copy, filesystem, remote, sha256):
                content = _read_remote(filesystem, remote, sha256)
                break
        self._mapped_bytes += content.size
        if self._mapped_bytes > self._max_mapped_bytes:
            self._release()
            self._mapped_bytes = content.size
        return content

    def download(self, copy: Path, filesystem: fs.FileSystem, remote: str, sha256: str) -> bool:
        """Downloads a remote file to `copy`, unless it exists.

        Returns:
            False if copies in use by other processes leave no room.

        Raises:
            ConfigError, RuntimeError: As `map`.
        """
        try:
            return self._download(copy, filesystem, remote, sha256)
        except OSError as error:  # the disk cannot take even an empty file
            if error.errno not in _DISK_FULL_ERRORS:
                raise
            return False

    def _download(self, copy: Path, filesystem: fs.FileSystem, remote: str, sha256: str) -> bool:
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(copy.name + PARTIAL_SUFFIX)
        with _open_exclusively(partial) as file:
            if copy.exists():  # another process has downloaded it in the meantime
                return True
            size = filesystem.get_file_info(remote).size
            is_full = False
            while True:
                try:
                    if not self._allocate(file, size, must_evict=is_full):
                        return False
                    _copy_remote(filesystem, remote, file, sha256)
                    partial.rename(copy)
                    return True
                except OSError as error:
                    if error.errno not in _DISK_FULL_ERRORS:
                        raise
                    os.ftruncate(file, 0)
                    is_full = True  # despite the reported free space: a quota, or another program that writes

    def capacity_bytes(self) -> float:
        """Returns the size that all copies together can have now."""
        cached_bytes = sum(copy.size for copy in self._list_copies())
        free_bytes = shutil.disk_usage(self.folder).free
        if self._limit_bytes is None:
            return cached_bytes + free_bytes - self._reserved_bytes
        return min(self._limit_bytes, cached_bytes + free_bytes)

    def _allocate(self, file: int, size: int, must_evict: bool) -> bool:
        """Allocates the space of a new copy. Returns whether there is enough. `must_evict`: evict at least one copy."""
        with FileLock(self.folder / ".lock"):
            if not self._make_room(size, must_evict):
                return False
            try:
                os.posix_fallocate(file, 0, max(size, 1))
            except OSError as error:
                if error.errno not in _CANNOT_ALLOCATE_ERRORS:
                    raise
        return True

    def _make_room(self, size: int, must_evict: bool) -> bool:
        free_bytes = shutil.disk_usage(self.folder).free
        if self._limit_bytes is None and free_bytes - self._reserved_bytes >= size and not must_evict:
            return True
        copies = sorted(self._list_copies())
        cached_bytes = sum(copy.size for copy in copies)
        self._check_size(size, cached_bytes, free_bytes, is_full=must_evict)
        if self._limit_bytes is None:
            room = free_bytes - self._reserved_bytes
        else:
            room = min(self._limit_bytes - cached_bytes, free_bytes)
        if room >= size and not must_evict:
            return True
        target_bytes = max(size, _EVICTION_FRACTION * cached_bytes)
        evicted_bytes = 0
        for release in (lambda: None, self._release):  # this process's own maps are a last resort
            release()
            for copy in copies:
                if room + evicted_bytes >= target_bytes and (evicted_bytes or not must_evict):
                    break
                evicted_bytes += _evict(copy)
            if evicted_bytes and room + evicted_bytes >= size:
                return True
        # Using the reserved space is better than failing.
        return (
            self._limit_bytes is None and free_bytes + evicted_bytes >= size and (evicted_bytes > 0 or not must_evict)
        )

    def _check_size(self, size: int, cached_bytes: int, free_bytes: int, is_full: bool) -> None:
        if self._limit_bytes is not None and size > self._limit_bytes:
            raise ConfigError(
                f"data.node_cache_gb: one shard has {size / 1e9:.3g} GB (value {self._limit_bytes / 1e9:g}); "
                "increase it or set data.cache_decoded=false"
            )
        if size > cached_bytes + free_bytes or (is_full and not cached_bytes):
            raise ConfigError(
                f"{self.folder}: {free_bytes / 1e9:.1f} GB are free, too little for one shard "
                f"({size / 1e9:.3g} GB); set TMPDIR to a larger disk, or data.cache_decoded=false"
            )

    def _list_copies(self) -> Iterator[_Copy]:
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # evicted by another process
                continue
            yield _Copy(status.st_mtime_ns, path, status.st_blocks * 512)


def _map_copy(copy: Path) -> np.ndarray | None:
    """Maps a copy: uint8 [bytes], or None if there is none. The map duplicates the descriptor and with it the lock."""
    try:
        file = copy.open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # evicted before it was locked
            return None
        now_ns = time.time_ns()
        os.utime(file.fileno(), ns=(now_ns, now_ns))  # file systems are often mounted without access times
        return np.memmap(file, np.uint8, "r")


def _evict(copy: _Copy) -> int:
    """Deletes a copy, complete or left by a killed process, unless a process maps or writes it.

    Returns:
        The number of bytes freed, 0 if the copy is in use.
    """
    try:
        file = os.open(copy.path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_open_at(file, copy.path):  # another process has evicted it, or completed and renamed it
            return 0
        copy.path.unlink()
        return copy.size
    except BlockingIOError:
        return 0
    finally:
        os.close(file)


@contextmanager
def _open_exclusively(partial: Path) -> Iterator[int]:
    """Opens a partial file, creating it if needed, such that no other process writes it. Deletes it at the end.

    Polls, because a blocking wait may never end: a completed file keeps its inode, and its readers hold shared locks on
    it for as long as they map it. Closes the file between polls, so that an evicted file frees its space.
    """
    while True:
        file = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if _try_lock(file) and _is_open_at(file, partial):  # else completed or evicted in the meantime
                try:
                    yield file
                finally:
                    if _is_open_at(file, partial):  # not renamed
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


def _is_open_at(file: int, path: Path) -> bool:
    """Whether a descriptor refers to the file that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _copy_remote(filesystem: fs.FileSystem, remote: str, file: int, sha256: str) -> None:
    digest = hashlib.sha256()
    offset = 0
    with filesystem.open_input_stream(remote) as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            while chunk:
                written = os.pwrite(file, chunk, offset)
                chunk = chunk[written:]
                offset += written
    os.ftruncate(file, offset)
    _check_sha256(remote, digest.hexdigest(), sha256)


def _read_remote(filesystem: fs.FileSystem, remote: str, sha256: str) -> np.ndarray:
    with filesystem.open_input_stream(remote) as source:
        content = source.read()
    _check_sha256(remote, hashlib.sha256(content).hexdigest(), sha256)
    return np.frombuffer(content, np.uint8)


def _check_sha256(remote: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise RuntimeError(
            f"{remote}: its sha256 is {actual} instead of {expected}; run jobs/prepare.py, which decodes it again"
        )
