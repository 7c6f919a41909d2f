"""Files broken at random give a clip of the right form or a rejection by name: nothing else, and in time.

A few files in every run, the same ones each time. GIFFY_RAY_FUZZ_S=300 goes on for that many seconds with others, and
prints how many ended for which reason.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, Sampled
from giffy_ray.data.sandbox import Sandbox
from tests.conftest import encode, grey_video, moving_video
from tests.data.boxes import starts_fast
from tests.data.corpus import INDEXED, avi, fragmented, hostile_files, mkv, mp4, states_length, webm

# Cropping, because it is what scales a picture up before it cuts it.
CLIP = ClipConfig(frames=12, height=16, width=24, fit="crop")
LIMITS = LimitsConfig(decode_s=10, memory_mb=1024)
REASONS = {
    *("empty", "not_video", "no_video", "no_decoder", "no_frames", "still", "too_large", "too_long", "damaged"),
    *("memory", "timeout", "crash"),
}
FUZZ_S = int(os.environ.get("GIFFY_RAY_FUZZ_S", "0"))
# Where a number may stand: after the name of a box or chunk, and before it (its size).
_NAMES = re.compile(
    rb"ftyp|moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|dinf|dref|url |stbl|stsd|avc1|avcC|mp4v|esds|mdat"
    rb"|stts|stss|ctts|stsc|stsz|stco|mvex|mehd|trex|sidx|moof|tfhd|trun|RIFF|LIST|hdrl|avih|strl|strh|strf|movi|idx1|00dc"
    rb"|\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b"
)
_EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**16, 255)


@functools.cache
def bases() -> list[bytes]:
    """Good files, most of them small, so that many of their bytes are not pixels; and every hostile one."""
    good = [mp4(), mkv(), avi(), webm(), starts_fast(mp4()), starts_fast(grey_video(40))]
    good += [grey_video(40, kind=kind) for kind in ("mp4", "mov", "matroska", "avi")]
    good += [moving_video(1, 40, 30, kind=kind) for kind in ("mp4", "matroska")]
    still = np.full((20, 40, 48, 3), 99, np.uint8)
    good += [
        encode(still, 10, kind, codec) for kind, codec in (("mp4", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"))
    ]
    good += [fragmented(flags=INDEXED), fragmented(10, sound_s=2), states_length(fragmented(20), 2, "mehd")]
    broken = hostile_files(Path("/nowhere/canary.mp4"))
    return good * 5 + [one.video for name, one in broken.items() if one.video and "bomb" not in name]


@some.composite
def broken_files(draw: some.DrawFn) -> bytes:
    video = draw(some.sampled_from(bases()))
    for _ in range(draw(some.integers(1, 4))):
        video = _mutated(draw, video)
    return video


def _mutated(draw: some.DrawFn, video: bytes) -> bytes:
    if not video:
        return draw(some.binary(max_size=64))
    place = int(draw(some.floats(0, 1, exclude_max=True)) * len(video))
    length = draw(some.integers(1, 4096))
    match draw(some.sampled_from(("number", "number", "number", "flip", "bytes", "delete", "repeat", "cut", "splice"))):
        case "number":
            names = [name.start() for name in _NAMES.finditer(video[:200_000])]
            start = draw(some.sampled_from(names)) if names else place
            start = max(0, start + 4 * draw(some.integers(-1, 8)))
            width = draw(some.sampled_from((1, 2, 4, 8)))
            number = draw(some.sampled_from(_EXTREMES)) % 2 ** (8 * width)
            return video[:start] + number.to_bytes(width, "big") + video[start + width :]
        case "flip":
            return video[:place] + bytes([video[place] ^ 1 << draw(some.integers(0, 7))]) + video[place + 1 :]
        case "bytes":
            new = draw(some.binary(min_size=1, max_size=64))
            return video[:place] + new + video[place + len(new) :]
        case "delete":
            return video[:place] + video[place + length :]
        case "repeat":
            return video[: place + length] + video[place:]
        case "cut":
            return video[:place]
        case _:
            other = draw(some.sampled_from(bases()))
            return video[:place] + other[int(draw(some.floats(0, 1)) * len(other)) :]


def outcome(sandbox: Sandbox, video: bytes) -> str:
    begin, rejected = time.monotonic(), None
    try:
        check(sandbox.sample(video))
    except RejectedVideo as error:
        rejected = error
    assert time.monotonic() - begin < LIMITS.decode_s + 5
    if rejected is None:
        return "clip"
    assert rejected.reason in REASONS
    assert rejected.detail
    if FUZZ_S and rejected.reason in ("memory", "timeout", "crash"):  # worth a look
        print(f"{rejected}: {_kept(video)}")
    return rejected.reason


def _kept(video: bytes) -> Path:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"giffy_ray-fuzz-{abs(hash(video)):x}.bin"
    path.write_bytes(video)
    return path


def check(sampled: Sampled) -> None:
    assert sampled.clip.shape == (CLIP.frames, CLIP.height, CLIP.width, 3)
    assert sampled.clip.dtype == np.uint8
    assert sampled.times_s.shape == (CLIP.frames,)
    assert sampled.times_s[0] == 0
    assert np.all(np.diff(sampled.times_s) >= 0)
    assert np.all(np.isfinite(sampled.times_s))
    assert 0 <= sampled.padded < CLIP.frames
    assert 0 < sampled.source.width * sampled.source.height <= LIMITS.pixels
    assert 0 <= sampled.source.seconds <= LIMITS.seconds
    assert np.isfinite(sampled.source.fps)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(CLIP, LIMITS) as running:
        yield running


_CALM = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


@settings(_CALM, max_examples=60, derandomize=True)
@given(video=broken_files())
def test_any_file_gives_a_clip_or_a_reason(sandbox: Sandbox, video: bytes):
    outcome(sandbox, video)


@pytest.mark.skipif(not FUZZ_S, reason="GIFFY_RAY_FUZZ_S=300 runs it for 300 s")
def test_for_long(sandbox: Sandbox, capsys: pytest.CaptureFixture):
    counts, until = collections.Counter(), time.monotonic() + FUZZ_S

    def once(video: bytes) -> None:
        if time.monotonic() < until:
            counts[outcome(sandbox, video)] += 1

    with capsys.disabled():
        while time.monotonic() < until:
            seed(random.SystemRandom().getrandbits(64))(
                settings(_CALM, max_examples=500)(given(broken_files())(once))
            )()
        print(f"\n{counts.total()} files in {FUZZ_S} s: {dict(counts.most_common())}")
