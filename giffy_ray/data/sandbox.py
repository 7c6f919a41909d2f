"""Decoding in a process of its own: a file that crashes, hangs or blows up the decoder costs that process and no more.

    Sandbox (in a Ray task) --bytes of a video--> python -m giffy_ray.data.sandbox (limited in memory and time)
                            <--facts, clip------

The process is kept for the next video; one that ended is started anew. What comes back is JSON and pixels, never a
pickle, so that a decoder taken over by its input has nothing to say to Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, Sampled, Source

_SAMPLE = "giffy_ray.data.decode:sample_clip"
_START_S = 60  # for a new process to import what it needs
_ATTEMPTS = 2  # a video in whose time the process ended is tried once more, in a new one
_LONGEST_FACTS = 64 * 2**20  # bytes: the times of a million frames are a third of it
_GRACE_S = 5  # after which a process that nobody waits for ends itself


class Sandbox:
    """`sample_clip` behind a wall: the same results, the same RejectedVideo, and a few reasons more.

    crash: the decoder failed or was ended, and once more when it was tried again. timeout: it took longer than
    `limits.decode_s`. memory: it wanted more than `limits.memory_mb`.
    """

    def __init__(self, clip: ClipConfig, limits: LimitsConfig, sample: str = _SAMPLE):
        self.clip, self.limits, self._sample = clip, limits, sample
        self._process: subprocess.Popen | None = None

    def sample(self, video: bytes) -> Sampled:
        for _ in range(_ATTEMPTS):
            if self._process is None:
                self._start()
            try:
                return self._ask(video)
            except BlockingIOError:
                self._end()
                limit = f"data.limits.decode_s={self.limits.decode_s} s"
                raise RejectedVideo("timeout", f"decoding took longer than {limit}") from None
            except (EOFError, OSError):
                ended = self._end()
            except (ValueError, TypeError, KeyError, AttributeError):
                self._end()
                raise RejectedVideo("crash", "the decoder's answer is no clip") from None
            except RejectedVideo:
                raise
            except BaseException:  # such as a task that Ray cancels: the next video must not get this one's answer
                self._end()
                raise
        raise RejectedVideo("crash", f"it ended the decoder with {ended}")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # it may stop in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", self.limits.decode_s, 0))
        settings = json.dumps([dataclasses.asdict(self.clip), dataclasses.asdict(self.limits), self._sample])
        command = [sys.executable, "-m", "giffy_ray.data.sandbox", str(theirs.fileno()), settings]
        # None of our tokens and keys. Its one thread decodes; those of numpy's BLAS would count against its memory.
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            if not self._connection.poll(_START_S):
                raise EOFError
            self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the decoding process did not start ({self._end()}): {' '.join(command)}") from error
        except BaseException:
            self._end()
            raise

    def _ask(self, video: bytes) -> Sampled:
        self._connection.send_bytes(video)
        if not self._connection.poll(self.limits.decode_s):
            raise BlockingIOError
        said = json.loads(self._connection.recv_bytes(_LONGEST_FACTS))
        if "reason" in said:
            raise RejectedVideo(str(said["reason"])[:20], str(said["detail"])[:1000])
        times_s = np.asarray(said["times_s"], dtype=np.float64)
        shape = (len(times_s), self.clip.height, self.clip.width, 3)
        clip = np.frombuffer(self._connection.recv_bytes(math.prod(shape)), np.uint8).reshape(shape)
        return Sampled(clip, times_s, said["padded"], Source(**said["source"]))

    def _end(self) -> str:
        """Ends the process, if it has not ended by itself; says how it ended."""
        assert self._process
        self._connection.close()
        try:
            code = self._process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@functools.lru_cache(maxsize=1)
def sandbox_for(clip: ClipConfig, limits: LimitsConfig, sample: str) -> Sandbox:
    """The one of this process, kept over tasks."""
    return Sandbox(clip, limits, sample)


def _serve(connection: Connection, clip: ClipConfig, limits: LimitsConfig, sample: str) -> None:
    """Answers one video after another until the other side is gone."""
    module, _, function = sample.partition(":")
    sample_clip = getattr(importlib.import_module(module), function)
    most_bytes = limits.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"ready")
    while True:
        try:
            video = connection.recv_bytes()
        except EOFError:
            return
        signal.alarm(limits.decode_s + _GRACE_S)
        try:
            sampled = sample_clip(video, clip, limits)
        except RejectedVideo as rejected:
            connection.send_bytes(json.dumps({"reason": rejected.reason, "detail": rejected.detail}).encode())
        except MemoryError:
            detail = f"decoding wanted more than data.limits.memory_mb={limits.memory_mb}"
            connection.send_bytes(json.dumps({"reason": "memory", "detail": detail}).encode())
        except Exception as error:
            detail = f"it made the decoder fail: {type(error).__name__}: {error}"
            connection.send_bytes(json.dumps({"reason": "crash", "detail": detail}).encode())
        else:
            facts = {
                "times_s": sampled.times_s.tolist(),
                "padded": sampled.padded,
                "source": dataclasses.asdict(sampled.source),
            }
            connection.send_bytes(json.dumps(facts).encode())
            connection.send_bytes(np.ascontiguousarray(sampled.clip).data.cast("B"))
        signal.alarm(0)


if __name__ == "__main__":
    _clip, _limits, _function = json.loads(sys.argv[2])
    _serve(Connection(int(sys.argv[1])), ClipConfig(**_clip), LimitsConfig(**_limits), _function)
