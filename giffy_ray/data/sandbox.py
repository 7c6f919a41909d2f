"""Runs the decoder in a separate process, so that a file that crashes, hangs or exhausts it costs only that process.

    Sandbox (in a Ray task) --bytes of a video--> python -m giffy_ray.data.sandbox (limited memory and time)
                            <--metadata, clip---

The process is reused for the next video and restarted if it has ended. It answers with JSON and raw pixels, never with
a pickle, so a decoder that its input has taken over cannot run code in the Ray task.
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
from giffy_ray.data.decode import DecodedClip, RejectedVideo, SourceInfo

_DEFAULT_DECODER = "giffy_ray.data.decode:sample_clip"
_START_TIMEOUT_S = 60  # covers the imports of a new process
_ATTEMPTS = 2  # a video during which the process ends is retried once in a new process
_MAX_METADATA_BYTES = 64 * 2**20  # the times of a million frames take a third of it
_GRACE_S = 5  # after the time limit, an abandoned process ends itself


class Sandbox:
    """Runs `sample_clip` in a child process, with the same results and the same RejectedVideo.

    Additional reasons of RejectedVideo:
        crash: The decoder failed or its process ended, in both attempts.
        timeout: Decoding took longer than `limits.decode_s`.
        memory: Decoding needed more than `limits.memory_mb`.

    Args:
        clip: Settings of the clip.
        limits: Limits of the file and of the process.
        decoder: "module:function" with the parameters and results of `sample_clip`.
    """

    def __init__(self, clip: ClipConfig, limits: LimitsConfig, decoder: str = _DEFAULT_DECODER):
        self.clip, self.limits, self._decoder = clip, limits, decoder
        self._process: subprocess.Popen | None = None

    def sample(self, video: bytes) -> DecodedClip:
        """Decodes the clip of one video. Raises RejectedVideo; RuntimeError if the process does not start."""
        exit_status = ""
        for _ in range(_ATTEMPTS):
            if self._process is None:
                self._start()
            try:
                return self._request(video)
            except BlockingIOError:
                self._terminate()
                limit = f"data.limits.decode_s={self.limits.decode_s} s"
                raise RejectedVideo("timeout", f"decoding took longer than {limit}") from None
            except (EOFError, OSError):
                exit_status = self._terminate()
            except (ValueError, TypeError, KeyError, AttributeError):
                self._terminate()
                raise RejectedVideo("crash", "the decoder returned an invalid answer") from None
            except RejectedVideo:
                raise
            except BaseException:  # such as a task that Ray cancels: the next video must not get this answer
                self._terminate()
                raise
        raise RejectedVideo("crash", f"the decoder ended with {exit_status}")

    def _start(self) -> None:
        parent_socket, child_socket = socket.socketpair()
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the process may stop in the middle of a message
            parent_socket.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", self.limits.decode_s, 0))
        settings = json.dumps([dataclasses.asdict(self.clip), dataclasses.asdict(self.limits), self._decoder])
        command = [sys.executable, "-m", "giffy_ray.data.sandbox", str(child_socket.fileno()), settings]
        # The environment carries no credentials. BLAS threads would count against the memory limit.
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command,
            pass_fds=[child_socket.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        child_socket.close()
        self._connection = Connection(parent_socket.detach())
        try:
            if not self._connection.poll(_START_TIMEOUT_S):
                raise EOFError
            self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            exit_status = self._terminate()
            raise RuntimeError(f"the decoding process did not start ({exit_status}): {' '.join(command)}") from error
        except BaseException:
            self._terminate()
            raise

    def _request(self, video: bytes) -> DecodedClip:
        self._connection.send_bytes(video)
        if not self._connection.poll(self.limits.decode_s):
            raise BlockingIOError
        metadata = json.loads(self._connection.recv_bytes(_MAX_METADATA_BYTES))
        if "reason" in metadata:
            raise RejectedVideo(str(metadata["reason"])[:20], str(metadata["detail"])[:1000])
        times_s = np.asarray(metadata["times_s"], dtype=np.float64)
        shape = (len(times_s), self.clip.height, self.clip.width, 3)
        clip = np.frombuffer(self._connection.recv_bytes(math.prod(shape)), np.uint8).reshape(shape)
        return DecodedClip(clip, times_s, metadata["padding_frames"], SourceInfo(**metadata["source"]))

    def _terminate(self) -> str:
        """Kills the process unless it has ended by itself. Returns the signal or exit code."""
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
            self._terminate()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@functools.lru_cache(maxsize=1)
def get_sandbox(clip: ClipConfig, limits: LimitsConfig, decoder: str) -> Sandbox:
    """Returns the sandbox of this process, which successive tasks share."""
    return Sandbox(clip, limits, decoder)


def _serve(connection: Connection, clip: ClipConfig, limits: LimitsConfig, decoder: str) -> None:
    """Decodes one video after another until the parent closes the connection."""
    module, _, function = decoder.partition(":")
    sample = getattr(importlib.import_module(module), function)
    memory_bytes = limits.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"ready")
    while True:
        try:
            video = connection.recv_bytes()
        except EOFError:
            return
        signal.alarm(limits.decode_s + _GRACE_S)
        try:
            decoded = sample(video, clip, limits)
        except RejectedVideo as rejected:
            connection.send_bytes(json.dumps({"reason": rejected.reason, "detail": rejected.detail}).encode())
        except MemoryError:
            detail = f"decoding needed more than data.limits.memory_mb={limits.memory_mb}"
            connection.send_bytes(json.dumps({"reason": "memory", "detail": detail}).encode())
        except Exception as error:
            detail = f"the decoder failed: {type(error).__name__}: {error}"
            connection.send_bytes(json.dumps({"reason": "crash", "detail": detail}).encode())
        else:
            metadata = {
                "times_s": decoded.times_s.tolist(),
                "padding_frames": decoded.padding_frames,
                "source": dataclasses.asdict(decoded.source),
            }
            connection.send_bytes(json.dumps(metadata).encode())
            connection.send_bytes(np.ascontiguousarray(decoded.clip).data.cast("B"))
        signal.alarm(0)


if __name__ == "__main__":
    _clip, _limits, _decoder = json.loads(sys.argv[2])
    _serve(Connection(int(sys.argv[1])), ClipConfig(**_clip), LimitsConfig(**_limits), _decoder)
