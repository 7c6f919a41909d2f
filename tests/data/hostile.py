"""A decoder that does what a hostile file might make one do: run by the sandbox in place of the real one."""

import os
import signal
import struct
import sys
import time

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, Sampled, sample_clip

_HALF_AN_ANSWER = struct.pack("!i", 1000) + b"{"


def sample(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> Sampled:
    match video[:5]:
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"hangs":
            time.sleep(1000)
        case b"grows":
            bytearray(limits.memory_mb * 2**20)
        case b"exits":
            os._exit(3)
        case b"raise":
            raise KeyError("moov")
        case b"halts":
            os.write(int(sys.argv[1]), _HALF_AN_ANSWER)
            time.sleep(1000)
        case b"halve":
            os.write(int(sys.argv[1]), _HALF_AN_ANSWER)
            os._exit(3)
        case b"lying":
            answer = b'{"times_s": 7, "padded": [], "source": "none"}'
            os.write(int(sys.argv[1]), struct.pack("!i", len(answer)) + answer)
            time.sleep(1000)
        case b"large":
            os.write(int(sys.argv[1]), struct.pack("!i", 2**31 - 1) + b"{" * 100)
            time.sleep(1000)
    return sample_clip(video, clip, limits)


def sample_slow(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> Sampled:
    time.sleep(0.3)
    return sample_clip(video, clip, limits)


def mark_flaky(video: bytes) -> bytes:
    """An mp4 that `sample_flaky` rejects, and that is otherwise the same video."""
    return video + struct.pack("!I4s", 13, b"free") + b"flaky"


def sample_flaky(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> Sampled:
    """`sample_clip` on a machine where some videos time out."""
    if video.endswith(b"flaky"):
        raise RejectedVideo("timeout", "this machine is too slow")
    return sample_clip(video, clip, limits)
