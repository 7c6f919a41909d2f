"""A decoder that does what a hostile file might make one do: run by the sandbox in place of the real one."""

import os
import signal
import time

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import Sampled, sample_clip


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
    return sample_clip(video, clip, limits)
