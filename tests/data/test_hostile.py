"""Every hostile file is rejected for a reason that fits, in time and in little memory, and opens no other file."""

import ctypes
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, sample_clip
from giffy_ray.data.sandbox import Sandbox
from tests.data.corpus import Hostile, avi, hostile_files, mkv, mp4, webm

CLIP = ClipConfig(height=16, width=16)
LIMITS = LimitsConfig(decode_s=20, memory_mb=1024)
_IN_ACCESS, _IN_OPEN = 1, 32


class Watch:
    """What the kernel reports of a file: whether anyone, in any process, has opened or read it."""

    def __init__(self, path: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._handle, os.fsencode(path), _IN_ACCESS | _IN_OPEN) >= 0

    def seen(self) -> int:
        """The kinds of access since the last call."""
        try:
            events, kinds = os.read(self._handle, 65536), 0
        except BlockingIOError:
            return 0
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            kinds, events = kinds | mask, events[16 + length :]
        return kinds


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good video, so that a decoder which follows a reference has something to show for it."""
    path = tmp_path_factory.mktemp("elsewhere") / "canary.mp4"
    path.write_bytes(mp4())
    return path


@pytest.fixture(scope="module")
def files(canary: Path) -> dict[str, Hostile]:
    return hostile_files(canary)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(CLIP, LIMITS) as running:
        yield running


def peak_mb(pid: int) -> float:
    """The most memory that a process ever had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def children_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_every_hostile_file_is_rejected(files: dict[str, Hostile], canary: Path, sandbox: Sandbox):
    assert len(files) > 100
    watch, wrong, processes = Watch(canary), {}, set()
    for name, (video, reasons) in files.items():
        begin = time.monotonic()
        try:
            sandbox.sample(video)
            wrong[name] = "gave a clip"
        except RejectedVideo as rejected:
            if rejected.reason not in reasons or not rejected.detail:
                wrong[name] = f"{rejected}, not {reasons}"
        if time.monotonic() - begin > LIMITS.decode_s / 2:
            wrong[name] = f"took {time.monotonic() - begin:.1f} s"
        assert sandbox._process, name
        pid = sandbox._process.pid
        processes.add(pid)
        if peak_mb(pid) > LIMITS.memory_mb or children_of(pid):
            wrong[name] = f"{peak_mb(pid):.0f} MB, children {children_of(pid)!r}"
        if watch.seen():
            wrong[name] = "opened another file"
    assert not wrong
    assert len(processes) == 1  # not one of them ended the decoder
    assert peak_mb(processes.pop()) < 600
    canary.read_bytes()
    assert watch.seen() == _IN_ACCESS | _IN_OPEN  # the watch itself works


@pytest.mark.parametrize("whole", [mp4, mkv, avi, webm])
def test_what_the_hostile_files_were_made_from_is_good(whole, sandbox: Sandbox):
    sampled = sandbox.sample(whole())
    assert sampled.padded == 0
    assert np.array_equal(sampled.clip, sample_clip(whole(), CLIP).clip)


def test_the_limits_count(sandbox: Sandbox):
    tight = {
        "pixels": (64 * 64 - 1, "too_large", "64x64 is"),
        "frames": (89, "too_long", "90 frames are"),
        "seconds": (2, "too_long", "3 s are"),
    }
    for field, (limit, reason, found) in tight.items():
        with pytest.raises(RejectedVideo) as raised:
            sample_clip(mp4(), CLIP, LimitsConfig(**{field: limit}))
        assert raised.value.reason == reason
        assert raised.value.detail == f"{found} over data.limits.{field}={limit}"
