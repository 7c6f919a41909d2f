"""Cores and memory within cgroups of version 1 and 2, from copies of the kernel's files."""

import os
from pathlib import Path

import psutil
import pytest

from giffy_ray.core.machine import free_memory_bytes, usable_cores

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
NO_LIMIT_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"cgroups": root / "cgroup", "membership": root / "membership"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"membership": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, None),
        ({"membership": "0::/\n", "cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"membership": "0::/a/b\n", "cgroup/a/cpu.max": "25000 100000\n", "cgroup/a/b/cpu.max": "max 100000"}, 0.25),
        ({"membership": "0::/gone\n", "cgroup/cpu.max": "75000 100000\n"}, 0.75),
        (
            {
                "membership": "4:memory:/\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "cgroup/cpu/cpu.cfs_quota_us": "20000\n",
                "cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            0.4,
        ),
        (
            {
                "membership": "3:cpu:/\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_usable_cores(tmp_path: Path, files: dict[str, str], cores: float | None):
    expected = len(os.sched_getaffinity(0)) if cores is None else cores
    assert usable_cores(**write(tmp_path, files)) == expected


def test_the_affinity_limits_the_cores(tmp_path: Path):
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(affinity)])
        assert usable_cores(**write(tmp_path, {})) == 1
    finally:
        os.sched_setaffinity(0, affinity)


@pytest.mark.parametrize(
    ("files", "free_bytes"),
    [
        ({}, 8_000_000 * 1024),
        ({"membership": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}, 8_000_000 * 1024),
        ({"membership": "0::/\n", "cgroup/memory.max": "1000\n", "cgroup/memory.current": "400\n"}, 600),
        (
            {
                "membership": "0::/\n",
                "cgroup/memory.max": "1000\n",
                "cgroup/memory.current": "400\n",
                "cgroup/memory.stat": "anon 100\ninactive_file 150\n",
            },
            750,
        ),
        ({"membership": "0::/\n", "cgroup/memory.max": "1000\n", "cgroup/memory.current": "1400\n"}, 0),
        (
            {
                "membership": "9:memory:/a\n",
                "cgroup/memory/memory.limit_in_bytes": "5000\n",
                "cgroup/memory/memory.usage_in_bytes": "1000\n",
                "cgroup/memory/a/memory.limit_in_bytes": NO_LIMIT_V1,
                "cgroup/memory/a/memory.usage_in_bytes": "1000\n",
            },
            4000,
        ),
    ],
)
def test_free_memory(tmp_path: Path, files: dict[str, str], free_bytes: int):
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert free_memory_bytes(**write(tmp_path, files), meminfo=tmp_path / "meminfo") == free_bytes


def test_other_systems_are_asked_through_psutil(tmp_path: Path):
    free_bytes = free_memory_bytes(**write(tmp_path, {}), meminfo=tmp_path / "none")
    assert free_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)
