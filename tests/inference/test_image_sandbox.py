"""Images from the sandbox equal those of `read_image`, and a limit that is exceeded is an ImageError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from giffy_ray.inference.image_sandbox import ImageSandbox
from giffy_ray.inference.images import ImageError, read_image
from tests.inference.service_client import encode_image, scene


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ImageSandbox]:
    sandbox = ImageSandbox(max_pixels=4_000_000)
    yield sandbox
    sandbox.close()


def transparent() -> np.ndarray:
    alpha = np.linspace(0, 255, 48 * 64).reshape(48, 64, 1).astype(np.uint8)
    return np.concatenate([scene(3), alpha], axis=2)


@pytest.mark.parametrize(
    "file",
    [
        encode_image(scene(0)),
        encode_image(scene(1), "JPEG"),
        encode_image(transparent()),
        encode_image(transparent(), "WEBP"),
        encode_image(scene(2)[:, :, 0].astype(np.uint16) * 257),
    ],
    ids=["png", "jpeg", "alpha", "webp", "16 bit"],
)
def test_images_equal_those_of_the_library(sandbox: ImageSandbox, file: bytes):
    expected = read_image(file)
    assert np.array_equal(sandbox.read(file, "start"), expected)
    assert sandbox.check(file, "start") == expected.shape[:2]


def test_large_images_are_scaled_down(sandbox: ImageSandbox):
    picture = scene(4, 300, 400)
    scaled = sandbox.read(encode_image(picture), "start", longer_side=100)
    assert np.array_equal(scaled, np.asarray(Image.fromarray(picture).resize((100, 75), Image.Resampling.LANCZOS)))
    assert sandbox.check(encode_image(picture), "start", longer_side=100) == (75, 100)
    assert sandbox.check(encode_image(picture), "start", longer_side=400) == (300, 400)
    assert sandbox.check(encode_image(scene(4, 1000, 4)), "start", longer_side=16) == (16, 2)


def test_limit_of_pixels_is_that_of_the_sandbox(sandbox: ImageSandbox):
    assert sandbox.check(encode_image(np.zeros((2000, 2000, 3), np.uint8)), "start") == (2000, 2000)
    with pytest.raises(ImageError, match="end: has 2001x2000 pixels; the limit is 4 million"):
        sandbox.check(encode_image(np.zeros((2000, 2001, 3), np.uint8)), "end")


def test_memory_is_limited():
    sandbox = ImageSandbox(max_pixels=100_000_000, memory_mb=450)
    try:
        big = encode_image(np.zeros((6000, 8000, 3), np.uint8), compress_level=1)
        with pytest.raises(ImageError, match=r"start: .*memory"):
            sandbox.check(big, "start")
        assert sandbox.check(encode_image(scene(0)), "start") == (48, 64)
    finally:
        sandbox.close()


def test_process_that_dies_is_replaced(sandbox: ImageSandbox):
    sandbox.check(encode_image(scene(0)), "start")
    process = sandbox._process._process
    assert process
    os.kill(process.pid, 9)
    assert sandbox.check(encode_image(scene(0)), "start") == (48, 64)
    environment = Path(f"/proc/{sandbox._process._process.pid}/environ").read_bytes()
    assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} <= {
        b"PATH",
        b"LD_LIBRARY_PATH",
        b"OPENBLAS_NUM_THREADS",
        b"PYTHONPATH",
    }
