"""Every hostile file is rejected for an expected reason, within limits of time and memory, and opens no other file."""

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
from tests.data.corpus import HostileFile, hostile_files, noise_avi, noise_mkv, noise_mp4, noise_webm

CLIP = ClipConfig(height=16, width=16)
LIMITS = LimitsConfig(decode_s=20, memory_mb=1024)
_IN_ACCESS, _IN_OPEN = 1, 32


class AccessWatch:
    """Detects whether any process opens or reads a file, with inotify."""

    def __init__(self, path: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._handle, os.fsencode(path), _IN_ACCESS | _IN_OPEN) >= 0

    def poll(self) -> int:
        """Returns the kinds of access since the last call."""
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
    """A valid video, so that a decoder that follows a reference succeeds."""
    path = tmp_path_factory.mktemp("elsewhere") / "canary.mp4"
    path.write_bytes(noise_mp4())
    return path


@pytest.fixture(scope="module")
def files(canary: Path) -> dict[str, HostileFile]:
    return hostile_files(canary)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(CLIP, LIMITS) as sandbox:
        yield sandbox


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def list_children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_every_hostile_file_is_rejected(files: dict[str, HostileFile], canary: Path, sandbox: Sandbox):
    assert len(files) > 100
    watch, failures, processes = AccessWatch(canary), {}, set()
    for name, (video, reasons) in files.items():
        begin_s = time.monotonic()
        try:
            sandbox.sample(video)
            failures[name] = "gave a clip"
        except RejectedVideo as rejected:
            if rejected.reason not in reasons or not rejected.detail:
                failures[name] = f"{rejected}, not {reasons}"
        if time.monotonic() - begin_s > LIMITS.decode_s / 2:
            failures[name] = f"took {time.monotonic() - begin_s:.1f} s"
        assert sandbox._process, name
        pid = sandbox._process.pid
        processes.add(pid)
        if peak_mb(pid) > LIMITS.memory_mb or list_children(pid):
            failures[name] = f"{peak_mb(pid):.0f} MB, children {list_children(pid)!r}"
        if watch.poll():
            failures[name] = "opened another file"
    assert not failures
    assert len(processes) == 1  # no file ended the decoder
    assert peak_mb(processes.pop()) < 600
    canary.read_bytes()
    assert watch.poll() == _IN_ACCESS | _IN_OPEN  # the watch works


@pytest.mark.parametrize("make_video", [noise_mp4, noise_mkv, noise_avi, noise_webm])
def test_base_files_of_hostile_files_are_valid(make_video, sandbox: Sandbox):
    sampled = sandbox.sample(make_video())
    assert sampled.padding_frames == 0
    assert np.array_equal(sampled.clip, sample_clip(make_video(), CLIP).clip)


def test_limits_are_enforced():
    limits = {
        "pixels": (64 * 64 - 1, "too_large", "64x64 exceeds"),
        "frames": (89, "too_long", "90 frames exceed"),
        "seconds": (2, "too_long", "3 s exceeds"),
    }
    for field, (limit, reason, subject) in limits.items():
        with pytest.raises(RejectedVideo) as raised:
            sample_clip(noise_mp4(), CLIP, LimitsConfig(**{field: limit}))
        assert raised.value.reason == reason
        assert raised.value.detail == f"{subject} data.limits.{field}={limit}"
