"""Randomly damaged files give a valid clip or a rejection with a reason, within the time limit.

Every run tests the same few files. GIFFY_RAY_FUZZ_S=300 continues for 300 seconds with random files and prints how many
ended for which reason.
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
from hypothesis import strategies as st

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import DecodedClip, RejectedVideo
from giffy_ray.data.sandbox import Sandbox
from tests.conftest import encode, grey_video, moving_video
from tests.data.boxes import make_faststart
from tests.data.corpus import (
    INDEXED,
    encode_fragmented,
    hostile_files,
    noise_avi,
    noise_mkv,
    noise_mp4,
    noise_webm,
    set_stated_duration,
)

# fit="crop" covers upscaling before cropping.
CLIP = ClipConfig(frames=12, height=16, width=24, fit="crop")
LIMITS = LimitsConfig(decode_s=10, memory_mb=1024)
REASONS = {
    *("empty", "not_video", "no_video", "no_decoder", "no_frames", "still", "too_large", "too_long", "damaged"),
    *("memory", "timeout", "crash"),
}
FUZZ_S = int(os.environ.get("GIFFY_RAY_FUZZ_S", "0"))
# Names of boxes and chunks. Numbers follow a name, and its size precedes it.
_NAMES = re.compile(
    rb"ftyp|moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|dinf|dref|url |stbl|stsd|avc1|avcC|mp4v|esds|mdat"
    rb"|stts|stss|ctts|stsc|stsz|stco|mvex|mehd|trex|sidx|moof|tfhd|trun|RIFF|LIST|hdrl|avih|strl|strh|strf|movi|idx1|00dc"
    rb"|\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b"
)
_EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**16, 255)


@functools.cache
def base_files() -> list[bytes]:
    """Valid files, mostly small so that many bytes are not pixels, and all hostile files."""
    valid = [
        noise_mp4(),
        noise_mkv(),
        noise_avi(),
        noise_webm(),
        make_faststart(noise_mp4()),
        make_faststart(grey_video(40)),
    ]
    valid += [grey_video(40, kind=kind) for kind in ("mp4", "mov", "matroska", "avi")]
    valid += [moving_video(1, 40, 30, kind=kind) for kind in ("mp4", "matroska")]
    still = np.full((20, 40, 48, 3), 99, np.uint8)
    valid += [
        encode(still, 10, kind, codec) for kind, codec in (("mp4", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"))
    ]
    valid += [
        encode_fragmented(flags=INDEXED),
        encode_fragmented(10, sound_s=2),
        set_stated_duration(encode_fragmented(20), 2, "mehd"),
    ]
    broken = hostile_files(Path("/nowhere/canary.mp4"))
    return valid * 5 + [hostile.video for name, hostile in broken.items() if hostile.video and "bomb" not in name]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    video = draw(st.sampled_from(base_files()))
    for _ in range(draw(st.integers(1, 4))):
        video = _mutate(draw, video)
    return video


def _mutate(draw: st.DrawFn, video: bytes) -> bytes:
    if not video:
        return draw(st.binary(max_size=64))
    offset = int(draw(st.floats(0, 1, exclude_max=True)) * len(video))
    length = draw(st.integers(1, 4096))
    match draw(st.sampled_from(("number", "number", "number", "flip", "bytes", "delete", "repeat", "cut", "splice"))):
        case "number":
            names = [name.start() for name in _NAMES.finditer(video[:200_000])]
            start = draw(st.sampled_from(names)) if names else offset
            start = max(0, start + 4 * draw(st.integers(-1, 8)))
            width = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from(_EXTREMES)) % 2 ** (8 * width)
            return video[:start] + number.to_bytes(width, "big") + video[start + width :]
        case "flip":
            return video[:offset] + bytes([video[offset] ^ 1 << draw(st.integers(0, 7))]) + video[offset + 1 :]
        case "bytes":
            new = draw(st.binary(min_size=1, max_size=64))
            return video[:offset] + new + video[offset + len(new) :]
        case "delete":
            return video[:offset] + video[offset + length :]
        case "repeat":
            return video[: offset + length] + video[offset:]
        case "cut":
            return video[:offset]
        case _:
            other = draw(st.sampled_from(base_files()))
            return video[:offset] + other[int(draw(st.floats(0, 1)) * len(other)) :]


def sample_outcome(sandbox: Sandbox, video: bytes) -> str:
    begin_s, rejected = time.monotonic(), None
    try:
        check_clip(sandbox.sample(video))
    except RejectedVideo as error:
        rejected = error
    assert time.monotonic() - begin_s < LIMITS.decode_s + 5
    if rejected is None:
        return "clip"
    assert rejected.reason in REASONS
    assert rejected.detail
    if FUZZ_S and rejected.reason in ("memory", "timeout", "crash"):  # worth investigating
        print(f"{rejected}: {_save(video)}")
    return rejected.reason


def _save(video: bytes) -> Path:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"giffy_ray-fuzz-{abs(hash(video)):x}.bin"
    path.write_bytes(video)
    return path


def check_clip(sampled: DecodedClip) -> None:
    assert sampled.clip.shape == (CLIP.frames, CLIP.height, CLIP.width, 3)
    assert sampled.clip.dtype == np.uint8
    assert sampled.times_s.shape == (CLIP.frames,)
    assert sampled.times_s[0] == 0
    assert np.all(np.diff(sampled.times_s) >= 0)
    assert np.all(np.isfinite(sampled.times_s))
    assert 0 <= sampled.padding_frames < CLIP.frames
    assert 0 < sampled.source.width * sampled.source.height <= LIMITS.pixels
    assert 0 <= sampled.source.duration_s <= LIMITS.seconds
    assert np.isfinite(sampled.source.fps)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(CLIP, LIMITS) as sandbox:
        yield sandbox


_NO_DEADLINE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


@settings(_NO_DEADLINE, max_examples=60, derandomize=True)
@given(video=broken_files())
def test_damaged_file_gives_a_clip_or_a_reason(sandbox: Sandbox, video: bytes):
    sample_outcome(sandbox, video)


@pytest.mark.skipif(not FUZZ_S, reason="set GIFFY_RAY_FUZZ_S=300 to run it for 300 s")
def test_damaged_files_for_a_given_time(sandbox: Sandbox, capsys: pytest.CaptureFixture):
    counts, deadline_s = collections.Counter(), time.monotonic() + FUZZ_S

    def sample_once(video: bytes) -> None:
        if time.monotonic() < deadline_s:
            counts[sample_outcome(sandbox, video)] += 1

    with capsys.disabled():
        while time.monotonic() < deadline_s:
            seed(random.SystemRandom().getrandbits(64))(
                settings(_NO_DEADLINE, max_examples=500)(given(broken_files())(sample_once))
            )()
        print(f"\n{counts.total()} files in {FUZZ_S} s: {dict(counts.most_common())}")
