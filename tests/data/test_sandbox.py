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


def reason_of(sandbox: Sandbox, video: bytes) -> tuple[str, str]:
    with pytest.raises(RejectedVideo) as raised:
        sandbox.sample(video)
    return raised.value.reason, raised.value.detail


def test_it_gives_what_the_decoder_gives():
    with Sandbox(CLIP, LIMITS) as sandbox:
        for number in range(3):
            video = moving_video(number, 20, 30)
            sampled, plain = sandbox.sample(video), sample_clip(video, CLIP)
            assert np.array_equal(sampled.clip, plain.clip)
            assert np.array_equal(sampled.times_s, plain.times_s)
            assert sampled[2:] == plain[2:]
            assert sampled.source.width == 64
        assert reason_of(sandbox, b"") == ("empty", "the file has no bytes")
        assert reason_of(sandbox, b"no video")[0] == "not_video"


@pytest.mark.parametrize(
    ("video", "reason", "detail"),
    [
        (b"crash", "crash", "it ended the decoder with SIGSEGV"),
        (b"exits", "crash", "it ended the decoder with exit code 3"),
        (b"hangs", "timeout", "decoding took longer than data.limits.decode_s=1 s"),
        (b"grows", "memory", "decoding wanted more than data.limits.memory_mb=1024"),
        (b"raise", "crash", "it made the decoder fail: KeyError: 'moov'"),
        (b"halts", "timeout", "decoding took longer than data.limits.decode_s=1 s"),
        (b"halve", "crash", "it ended the decoder with exit code 3"),
        (b"lying", "crash", "the decoder's answer is no clip"),
        (b"large", "crash", "it ended the decoder with SIGKILL"),
    ],
)
def test_what_a_file_does_to_the_decoder_is_its_own_affair(video: bytes, reason: str, detail: str):
    good = grey_video(30)
    with Sandbox(CLIP, LIMITS, "tests.data.hostile:sample") as sandbox:
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)
        assert reason_of(sandbox, video) == (reason, detail)
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)


def test_the_answer_to_a_video_that_nobody_waits_for_any_more_is_not_the_next_ones():
    """As when Ray cancels a task: it raises KeyboardInterrupt in a process that then gets other tasks."""

    def cancel(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    videos = [moving_video(number, 20, 30) for number in range(2)]
    with Sandbox(CLIP, LIMITS, "tests.data.hostile:sample_slow") as sandbox:
        sandbox.sample(videos[0])
        before = signal.signal(signal.SIGALRM, cancel)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                sandbox.sample(videos[0])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert np.array_equal(sandbox.sample(videos[1]).clip, sample_clip(videos[1], CLIP).clip)


def test_a_video_in_whose_time_the_decoder_died_by_accident_is_tried_again():
    good = grey_video(30)
    with Sandbox(CLIP, LIMITS) as sandbox:
        sandbox.sample(good)
        assert sandbox._process
        sandbox._process.kill()
        assert np.array_equal(sandbox.sample(good).clip, sample_clip(good, CLIP).clip)


def test_the_process_ends_with_the_sandbox():
    sandbox = Sandbox(CLIP, LIMITS)
    sandbox.sample(grey_video(30))
    assert sandbox._process
    pid = sandbox._process.pid
    sandbox._connection.close()  # as when the task that holds it is killed
    for _ in range(50):
        if sandbox._process.poll() is not None:
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_decoder_that_cannot_start_is_an_error_and_no_reject():
    with pytest.raises(RuntimeError, match="did not start"):
        Sandbox(CLIP, LIMITS, "tests.data.hostile:missing").sample(b"x")
