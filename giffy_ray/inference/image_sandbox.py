"""Decodes images of strangers in a separate process with limited memory and time. Imports neither torch nor Ray.

See `giffy_ray.data.sandbox`. The formats, and everything that makes an image usable, are those of
`giffy_ray.inference.images`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from giffy_ray.core.errors import InputError
from giffy_ray.data.sandbox import (
    DecoderProcess,
    ProcessLimits,
    RejectedFile,
    read_settings,
    serve_files,
)
from giffy_ray.inference import images
from giffy_ray.inference.images import ImageError, read_image

_REASON = "image"  # of a file that `read_image` refuses
_MAX_MESSAGE_CHARS = 300  # of what Pillow says about a damaged file


class ImageSandbox:
    """Reads images like `read_image`, in a child process that is reused. Not thread-safe.

    Args:
        max_pixels: An image with more is refused before it is decoded.
        decode_s: Maximum time to decode an image, in whole seconds.
        memory_mb: Maximum address space of the process; Python, NumPy and Pillow need 270 MiB of it.
    """

    def __init__(self, max_pixels: int, decode_s: int = 10, memory_mb: int = 1536):
        limits = ProcessLimits(decode_s, memory_mb, f"{decode_s} s", f"{memory_mb} MiB of memory")
        self._process = DecoderProcess("giffy_ray.inference.image_sandbox", limits, [max_pixels])

    def read(self, file: bytes, name: str, longer_side: int | None = None) -> np.ndarray:
        """Decodes an image file.

        Args:
            file: Its bytes.
            name: How messages call it.
            longer_side: Scale a larger image down to this.

        Returns:
            uint8 [height, width, 3 or 4].

        Raises:
            ImageError: The file is no image of a supported format, or decoding it exceeds a limit.
        """

        def read_answer(metadata: dict[str, Any], receive: Callable[[int], bytes]) -> np.ndarray:
            shape = _check_shape(metadata["shape"])
            return np.frombuffer(receive(math.prod(shape)), np.uint8).reshape(shape)

        return self._request(file, name, longer_side, True, read_answer)

    def check(self, file: bytes, name: str, longer_side: int | None = None) -> tuple[int, int]:
        """Decodes an image file like `read`, and returns only the height and width of the result."""

        def read_answer(metadata: dict[str, Any], receive: Callable[[int], bytes]) -> tuple[int, int]:
            height, width, _channels = _check_shape(metadata["shape"])
            return height, width

        return self._request(file, name, longer_side, False, read_answer)

    def _request(
        self, file: bytes, name: str, longer_side: int | None, needs_pixels: bool, read_answer: Callable[..., Any]
    ) -> Any:
        if not file:
            raise ImageError(f"{name}: the file is empty")
        header = json.dumps([name, longer_side, needs_pixels]).encode()
        try:
            return self._process.request(header + b"\n" + file, read_answer)
        except RejectedFile as rejected:
            message = rejected.detail if rejected.reason == _REASON else f"{name}: {rejected.detail}"
            raise ImageError(message[:_MAX_MESSAGE_CHARS]) from None

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def _check_shape(shape: list[int]) -> tuple[int, int, int]:
    height, width, channels = shape
    if height < 1 or width < 1 or channels not in (3, 4):
        raise ValueError(f"unexpected shape {shape}")
    return height, width, channels


def _decode(request: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
    header, _, file = request.partition(b"\n")
    name, longer_side, needs_pixels = json.loads(header)
    try:
        pixels = _scale_down(read_image(file, name), longer_side)
    except InputError as error:
        raise RejectedFile(_REASON, str(error)) from None
    return {"shape": pixels.shape}, pixels if needs_pixels else None


def _scale_down(pixels: np.ndarray, longer_side: int | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    if longer_side is None or max(height, width) <= longer_side:
        return pixels
    factor = longer_side / max(height, width)
    size = (max(2, round(width * factor)), max(2, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


if __name__ == "__main__":
    _connection, _process_limits, (images.MAX_PIXELS,) = read_settings()
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is higher, and calls such a file damaged
    Image.init()  # loads all formats before memory is limited
    serve_files(_connection, _process_limits, _decode)
