"""CPU cores and memory that this process may use. Containers limit both with cgroups, which most libraries ignore."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_UNLIMITED_BYTES = 2**60  # cgroup v1 writes a limit above this for none


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """Returns the CPU cores that this process may use, by its affinity and its cgroups; it may be a fraction.

    Args:
        cgroups: Where the cgroups are mounted.
        membership: The file that lists those of this process.
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(affine), *_cpu_limits(cgroups, membership)])


def free_memory_bytes(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP, meminfo: Path = _MEMINFO) -> int | None:
    """Returns the memory that this process can still allocate, or None if the system does not tell.

    Args:
        cgroups: Where the cgroups are mounted.
        membership: The file that lists those of this process.
        meminfo: The kernel's report on the memory of the machine.
    """
    return min([*_available_bytes(meminfo), *_memory_limits(cgroups, membership)], default=None)


def _cpu_limits(cgroups: Path, membership: Path) -> Iterator[float]:
    for folder in _own_cgroups("cpu", cgroups, membership):
        quota, period = (
            _read_words(folder / "cpu.max")
            or (
                *_read_words(folder / "cpu.cfs_quota_us"),
                *_read_words(folder / "cpu.cfs_period_us"),
            )
            or ("max", "1")
        )
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def _memory_limits(cgroups: Path, membership: Path) -> Iterator[int]:
    """Yields limit minus use of each cgroup. File cache that the kernel can drop does not count as use."""
    for folder in _own_cgroups("memory", cgroups, membership):
        statistics = _read_words(folder / "memory.stat")
        values = dict(zip(statistics[::2], statistics[1::2], strict=False))
        cache = int(values.get("total_inactive_file", values.get("inactive_file", 0)))
        for limit_name, use_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, use = _read_words(folder / limit_name), _read_words(folder / use_name)
            if limit and use and limit[0] != "max" and int(limit[0]) < _UNLIMITED_BYTES:
                yield max(0, int(limit[0]) - int(use[0]) + cache)


def _own_cgroups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """Yields the folders of this process's cgroups and of all that contain them: each may set a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root = cgroups
        elif controller in controllers.split(","):
            root = cgroups / controller
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(root))


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _available_bytes(meminfo: Path) -> Iterator[int]:
    words = _read_words(meminfo)
    if "MemAvailable:" in words:
        yield int(words[words.index("MemAvailable:") + 1]) * 1024
        return
    try:
        import psutil  # type: ignore[import-untyped]  # for macOS and Windows
    except ImportError:
        return
    yield psutil.virtual_memory().available
