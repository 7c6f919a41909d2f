"""The sandbox returns the decoder's results and survives everything that a file does to the decoder."""

import os
import signal
import time

import numpy as np
import pytest

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, sample_clip
from giffy_ray.data.sandbox import Sandbox
from tests.conftest import grey_video, moving_video

CLIP, LIMITS = ClipConfig(frames=6, height=16, width=16), LimitsConfig(decode_s=1, memory_mb=1024)


def rejection(sandbox: Sandbox, video: bytes) -> tuple[str, str]:
    with pytest.raises(RejectedVideo) as raised:
        sandbox.sample(video)
    return raised.value.reason, raised.value.detail


def test_sandbox_returns_the_decoders_results():
    with Sandbox(CLIP, LIMITS) as sandbox:
        for number in range(3):
            video = moving_video(number, 20, 30)
            sampled, expected = sandbox.sample(video), sample_clip(video, CLIP)
            assert np.array_equal(sampled.clip, expected.clip)
            assert np.array_equal(sampled.times_s, expected.times_s)
            assert sampled[2:] == expected[2:]
            assert sampled.source.width == 64
        assert rejection(sandbox, b"") == ("empty", "the file has no bytes")
        assert rejection(sandbox, b"no video")[0] == "not_video"


@pytest.mark.parametrize(
    ("video", "reason", "detail"),
    [
        (b"crash", "crash", "the decoder ended with SIGSEGV"),
        (b"exits", "crash", "the decoder ended with exit code 3"),
        (b"hangs", "timeout", "decoding took longer than data.limits.decode_s=1 s"),
        (b"grows", "memory", "decoding needed more than data.limits.memory_mb=1024"),
        (b"raise", "crash", "the decoder failed: KeyError: 'moov'"),
        (b"halts", "timeout", "decoding took longer than data.limits.decode_s=1 s"),
        (b"halve", "crash", "the decoder ended with exit code 3"),
        (b"lying", "crash", "the decoder returned an invalid answer"),
        (b"large", "crash", "the decoder ended with SIGKILL"),
    ],
)
def test_misbehaving_decoder_rejects_only_its_own_video(video: bytes, reason: str, detail: str):
    good = grey_video(30)
    with Sandbox(CLIP, LIMITS, "tests.data.hostile:sample") as sandbox:
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)
        assert rejection(sandbox, video) == (reason, detail)
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)


def test_cancelled_request_does_not_answer_the_next_one():
    """Ray cancels a task by raising KeyboardInterrupt in a process that then runs other tasks."""

    def cancel(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    videos = [moving_video(number, 20, 30) for number in range(2)]
    with Sandbox(CLIP, LIMITS, "tests.data.hostile:sample_slow") as sandbox:
        sandbox.sample(videos[0])
        previous_handler = signal.signal(signal.SIGALRM, cancel)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                sandbox.sample(videos[0])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous_handler)
        assert np.array_equal(sandbox.sample(videos[1]).clip, sample_clip(videos[1], CLIP).clip)


def test_video_is_retried_when_the_process_dies():
    good = grey_video(30)
    with Sandbox(CLIP, LIMITS) as sandbox:
        sandbox.sample(good)
        assert sandbox._process
        sandbox._process.kill()
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)


def test_process_ends_when_its_parent_disappears():
    sandbox = Sandbox(CLIP, LIMITS)
    sandbox.sample(grey_video(30))
    assert sandbox._process
    pid = sandbox._process.pid
    sandbox._connection.close()  # as when the parent is killed
    for _ in range(50):
        if sandbox._process.poll() is not None:
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_process_that_does_not_start_raises_runtime_error():
    with pytest.raises(RuntimeError, match="did not start"):
        Sandbox(CLIP, LIMITS, "tests.data.hostile:missing").sample(b"x")
