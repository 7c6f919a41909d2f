"""Runs decoders in separate processes, so that a file that crashes, hangs or exhausts one costs only that process.

    DecoderProcess (in a Ray task, a service) --bytes of a file--> python -m MODULE (limited memory and time)
                                              <--metadata, pixels---

The process is reused for the next file and restarted if it has ended. It answers with JSON and raw pixels, never with
a pickle, so a decoder that its input has taken over cannot run code in the parent. `Sandbox` decodes videos this way;
`giffy_ray.inference.image_sandbox` decodes images.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import DecodedClip, RejectedVideo, SourceInfo

_DEFAULT_DECODER = "giffy_ray.data.decode:sample_clip"
_START_TIMEOUT_S = 60  # covers the imports of a new process
_ATTEMPTS = 2  # a file during which the process ends is retried once in a new process
_MAX_METADATA_BYTES = 64 * 2**20  # the times of a million frames take a third of it
_MAX_REASON_CHARS, _MAX_DETAIL_CHARS = 20, 1000
_GRACE_S = 5  # after the time limit, an abandoned process ends itself

_Result = TypeVar("_Result")


class RejectedFile(Exception):
    """A file that its decoder refused, or that it did not survive.

    Attributes:
        reason: Short code: the decoder's own, or
            crash: The decoder failed or its process ended, in both attempts.
            timeout: Decoding took longer than `ProcessLimits.time_s`.
            memory: Decoding needed more than `ProcessLimits.memory_mb`.
        detail: Description of the problem for the user.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of a decoding process for each file, and how messages call them."""

    time_s: int
    memory_mb: int
    time_name: str
    memory_name: str


class DecoderProcess:
    """Sends files to a child process, one after another, and reads its answers. Not thread-safe.

    Args:
        module: Run with `python -m MODULE`; it calls `serve_files`.
        limits: Limits of the process.
        settings: JSON values for the module.
    """

    def __init__(self, module: str, limits: ProcessLimits, settings: Sequence[Any]):
        self._module, self._process_limits, self._settings = module, limits, settings
        self._process: subprocess.Popen | None = None

    def request(self, file: bytes, read_answer: Callable[[dict[str, Any], Callable[[int], bytes]], _Result]) -> _Result:
        """Decodes one file.

        Args:
            file: What the module's decoder gets.
            read_answer: Builds the result from the metadata and from a function that receives at most so many bytes
                of pixels. It may raise ValueError, TypeError, KeyError or AttributeError for an invalid answer.

        Raises:
            RejectedFile: The decoder refused the file or did not survive it.
            RuntimeError: The process does not start.
        """
        exit_status = ""
        for _ in range(_ATTEMPTS):
            if self._process is None:
                self._start()
            try:
                return self._exchange(file, read_answer)
            except BlockingIOError:
                self._terminate()
                name = self._process_limits.time_name
                raise RejectedFile("timeout", f"decoding took longer than {name}") from None
            except (EOFError, OSError):
                exit_status = self._terminate()
            except (ValueError, TypeError, KeyError, AttributeError):
                self._terminate()
                raise RejectedFile("crash", "the decoder returned an invalid answer") from None
            except RejectedFile:
                raise
            except BaseException:  # such as a task that Ray cancels: the next file must not get this answer
                self._terminate()
                raise
        raise RejectedFile("crash", f"the decoder ended with {exit_status}")

    def _start(self) -> None:
        parent_socket, child_socket = socket.socketpair()
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the process may stop in the middle of a message
            timeout = struct.pack("ll", self._process_limits.time_s, 0)
            parent_socket.setsockopt(socket.SOL_SOCKET, direction, timeout)
        settings = json.dumps([dataclasses.asdict(self._process_limits), *self._settings])
        command = [sys.executable, "-m", self._module, str(child_socket.fileno()), settings]
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

    def _exchange(
        self, file: bytes, read_answer: Callable[[dict[str, Any], Callable[[int], bytes]], _Result]
    ) -> _Result:
        self._connection.send_bytes(file)
        if not self._connection.poll(self._process_limits.time_s):
            raise BlockingIOError
        metadata = json.loads(self._connection.recv_bytes(_MAX_METADATA_BYTES))
        if "reason" in metadata:
            reason, detail = str(metadata["reason"]), str(metadata["detail"])
            raise RejectedFile(reason[:_MAX_REASON_CHARS], detail[:_MAX_DETAIL_CHARS])
        return read_answer(metadata, self._connection.recv_bytes)

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


class Sandbox(DecoderProcess):
    """Runs `sample_clip` in a child process, with the same results and the same RejectedVideo.

    RejectedVideo has the additional reasons of `RejectedFile`: crash, timeout and memory.

    Args:
        clip: Settings of the clip.
        limits: Limits of the file and of the process.
        decoder: "module:function" with the parameters and results of `sample_clip`.
    """

    def __init__(self, clip: ClipConfig, limits: LimitsConfig, decoder: str = _DEFAULT_DECODER):
        process_limits = ProcessLimits(
            limits.decode_s,
            limits.memory_mb,
            time_name=f"data.limits.decode_s={limits.decode_s} s",
            memory_name=f"data.limits.memory_mb={limits.memory_mb}",
        )
        settings = [dataclasses.asdict(clip), dataclasses.asdict(limits), decoder]
        super().__init__("giffy_ray.data.sandbox", process_limits, settings)
        self.clip, self.limits = clip, limits

    def sample(self, video: bytes) -> DecodedClip:
        """Decodes the clip of one video. Raises RejectedVideo; RuntimeError if the process does not start."""
        try:
            return self.request(video, self._read_clip)
        except RejectedFile as rejected:
            raise RejectedVideo(rejected.reason, rejected.detail) from None

    def _read_clip(self, metadata: dict[str, Any], receive: Callable[[int], bytes]) -> DecodedClip:
        times_s = np.asarray(metadata["times_s"], dtype=np.float64)
        shape = (len(times_s), self.clip.height, self.clip.width, 3)
        clip = np.frombuffer(receive(math.prod(shape)), np.uint8).reshape(shape)
        return DecodedClip(clip, times_s, metadata["padding_frames"], SourceInfo(**metadata["source"]))

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


def read_settings() -> tuple[Connection, ProcessLimits, list[Any]]:
    """Returns what `DecoderProcess` gave this process: the connection, the limits, and the settings of its module."""
    limits, *settings = json.loads(sys.argv[2])
    return Connection(int(sys.argv[1])), ProcessLimits(**limits), settings


def serve_files(
    connection: Connection, limits: ProcessLimits, decode: Callable[[bytes], tuple[dict[str, Any], np.ndarray | None]]
) -> None:
    """Decodes one file after another until the parent closes the connection.

    Args:
        connection: To the parent.
        limits: Set for this process.
        decode: Returns metadata (JSON values, without the key `reason`), and pixels if there are any to send. Raises
            RejectedFile.
    """
    memory_bytes = limits.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"ready")
    while True:
        try:
            file = connection.recv_bytes()
        except EOFError:
            return
        signal.alarm(limits.time_s + _GRACE_S)
        try:
            metadata, pixels = decode(file)
        except RejectedFile as rejected:
            _send_rejection(connection, rejected.reason, rejected.detail)
        except MemoryError:
            _send_rejection(connection, "memory", f"decoding needed more than {limits.memory_name}")
        except Exception as error:
            _send_rejection(connection, "crash", f"the decoder failed: {type(error).__name__}: {error}")
        else:
            connection.send_bytes(json.dumps(metadata).encode())
            if pixels is not None:
                connection.send_bytes(np.ascontiguousarray(pixels).data.cast("B"))
        signal.alarm(0)


def _send_rejection(connection: Connection, reason: str, detail: str) -> None:
    connection.send_bytes(json.dumps({"reason": reason, "detail": detail}).encode())


def _make_video_decoder(
    clip: ClipConfig, limits: LimitsConfig, decoder: str
) -> Callable[[bytes], tuple[dict[str, Any], np.ndarray]]:
    module, _, function = decoder.partition(":")
    sample = getattr(importlib.import_module(module), function)

    def decode(video: bytes) -> tuple[dict[str, Any], np.ndarray]:
        try:
            decoded = sample(video, clip, limits)
        except RejectedVideo as rejected:
            raise RejectedFile(rejected.reason, rejected.detail) from None
        metadata = {
            "times_s": decoded.times_s.tolist(),
            "padding_frames": decoded.padding_frames,
            "source": dataclasses.asdict(decoded.source),
        }
        return metadata, decoded.clip

    return decode


if __name__ == "__main__":
    _connection, _process_limits, (_clip, _limits, _decoder) = read_settings()
    serve_files(
        _connection, _process_limits, _make_video_decoder(ClipConfig(**_clip), LimitsConfig(**_limits), _decoder)
    )
