"""Runs the service for tests, and builds what clients send: good images and hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image

from giffy_ray.inference.service import create_app, create_server
from giffy_ray.inference.service_guard import ServiceLimits
from giffy_ray.inference.service_queue import Service
from giffy_ray.inference.service_worker import ModelVersion, Options, Part

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120


def encode_image(pixels: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, file_format, **options)
    return out.getvalue()


def scene(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Returns a smooth picture that differs from those of other seeds: uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def pair(seed: int, height: int = 48, width: int = 64) -> dict[str, bytes]:
    return {
        "start": encode_image(scene(2 * seed, height, width)),
        "end": encode_image(scene(2 * seed + 1, height, width)),
    }


def bomb_png(width: int, height: int) -> bytes:
    """Returns a PNG of a few kilobytes that states a huge size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6), 9)) + chunk(b"IEND", b"")


def bomb_gif() -> bytes:
    gif = bytearray(encode_image(scene(0), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(gif)


def bomb_tiff() -> bytes:
    out = io.BytesIO()
    Image.new("1", (8000, 8000)).save(out, "TIFF", compression="group4")
    return out.getvalue()


def bomb_webp() -> bytes:
    out = io.BytesIO()
    Image.new("L", (6000, 5000)).save(out, "WEBP", lossless=True, method=0, quality=0)
    return out.getvalue()


def animation(file_format: str) -> bytes:
    out = io.BytesIO()
    first, *others = [Image.fromarray(scene(seed)) for seed in range(3)]
    first.save(out, file_format, save_all=True, append_images=others)
    return out.getvalue()


@functools.cache
def hostile_images() -> dict[str, tuple[bytes, str]]:
    """Returns files that are refused, by name, each with a pattern of the error."""
    png = encode_image(scene(0))
    too_large = r"start: has \d+x\d+ pixels; the limit is 25 million"
    return {
        "empty": (b"", "start: the file is empty"),
        "text": (b"This is no image. " * 10, "start: .*(not an image|damaged|cannot be)"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "start: "),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "start: "),
        "truncated png": (png[: len(png) // 2], "start: .*damaged.*truncated"),
        "truncated jpeg": (encode_image(scene(0), "JPEG")[:400], "start: .*damaged"),
        "png bomb": (bomb_png(50_000, 50_000), too_large),
        "gif bomb": (bomb_gif(), too_large),
        "tiff bomb": (bomb_tiff(), too_large),
        "webp bomb": (bomb_webp(), too_large),
        "animated gif": (animation("GIF"), "start: .*animation"),
        "animated webp": (animation("WEBP"), "start: .*animation"),
        "one pixel": (encode_image(scene(0)[:1, :1]), "start: .*2x2"),
    }


class FakeBackend:
    """Answers with the PNG of the start image and the label of the model, after `delay_s`."""

    def __init__(self, delay_s: float = 0, size_bytes: int = 0):
        self.delay_s, self.size_bytes = delay_s, size_bytes
        self.loaded: list[ModelVersion] = []
        self.failure: Exception | None = None  # of the next calls
        self.started = self.cancelled = 0

    async def ping(self) -> None:
        pass

    async def load(self, model: ModelVersion) -> None:
        if self.failure:
            raise self.failure
        self.loaded.append(model)

    async def generate(
        self, model: ModelVersion, start: np.ndarray, end: np.ndarray, options: Options
    ) -> AsyncGenerator[Part, None]:
        self.started += 1
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        for sample in range(options.samples):
            if self.failure:
                raise self.failure
            content = encode_image(start) + model.label.encode() + bytes(self.size_bytes)
            yield Part(f"sample-{sample + 1}.mp4", "video/mp4", content)


@contextlib.contextmanager
def run_app(
    backend: FakeBackend, limits: ServiceLimits | None = None, token: str | None = None, is_loopback: bool = True
) -> Iterator[str]:
    """Runs the HTTP server in a thread, and yields its address."""
    limits = limits or ServiceLimits(requests_per_minute=10_000)
    ready = threading.Event()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    servers = []

    async def serve() -> None:
        service = Service(backend, "between", limits, parallel=2)
        async with service.run():
            servers.append(create_server(create_app(service, token, is_loopback), limits))
            ready.set()
            await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        assert ready.wait(START_TIMEOUT_S)
        wait_until_ready(address, thread.is_alive)
        yield address
    finally:
        if servers:
            servers[0].should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def wait_until_ready(address: str, is_alive: Any) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while is_alive() and time.monotonic() < deadline_s:
        with contextlib.suppress(requests.ConnectionError):
            requests.get(f"{address}/healthz", timeout=5).raise_for_status()
            return
        time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")


@contextlib.contextmanager
def run_process(
    model: str, folder: Path, stop_signal: signal.Signals = signal.SIGTERM, **arguments: Any
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs `run_service` in a process, as `giffy serve` does, and yields its address.

    Its temporary files lie in `folder`. After the block it gets the signal, and must leave nothing behind.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "from giffy_ray.inference.service import run_service; "
        "from giffy_ray.inference.service_guard import ServiceLimits; "
        f"run_service({model!r}, port={port}, device='cpu', "
        + ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        + ")"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(folder), "MALLOC_ARENA_MAX": "2"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(address, lambda: process.poll() is None)
        yield address, process
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(stop_signal)
        assert process.wait(60) == 0
        assert len(children) > 3  # Ray's, at least
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
        assert not list(folder.glob("giffy_ray-*"))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
