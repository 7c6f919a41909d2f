"""Decoders that misbehave as a malicious file might make them do. The sandbox runs them in place of `sample_clip`."""

import os
import signal
import struct
import sys
import time

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import DecodedClip, RejectedVideo, sample_clip

_PARTIAL_ANSWER = struct.pack("!i", 1000) + b"{"  # stated length, then only one byte


def sample(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> DecodedClip:
    """Misbehaves as the first five bytes of the video say; decodes other videos."""
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
            os.write(int(sys.argv[1]), _PARTIAL_ANSWER)
            time.sleep(1000)
        case b"halve":
            os.write(int(sys.argv[1]), _PARTIAL_ANSWER)
            os._exit(3)
        case b"lying":
            answer = b'{"times_s": 7, "padding_frames": [], "source": "none"}'
            os.write(int(sys.argv[1]), struct.pack("!i", len(answer)) + answer)
            time.sleep(1000)
        case b"large":
            os.write(int(sys.argv[1]), struct.pack("!i", 2**31 - 1) + b"{" * 100)
            time.sleep(1000)
    return sample_clip(video, clip, limits)


def sample_slow(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> DecodedClip:
    time.sleep(0.3)
    return sample_clip(video, clip, limits)


def mark_flaky(video: bytes) -> bytes:
    """Returns the same mp4 with a mark that makes `sample_flaky` reject it."""
    return video + struct.pack("!I4s", 13, b"free") + b"flaky"


def sample_flaky(video: bytes, clip: ClipConfig, limits: LimitsConfig) -> DecodedClip:
    """Behaves like `sample_clip` on a machine where marked videos time out."""
    if video.endswith(b"flaky"):
        raise RejectedVideo("timeout", "this machine is too slow")
    return sample_clip(video, clip, limits)
