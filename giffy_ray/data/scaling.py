"""Decoded frames -> pictures of a clip: cropped, averaged down, upright, in the colours of an ordinary screen."""

from __future__ import annotations

import struct
import threading
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from giffy_ray.config import ClipConfig
from giffy_ray.data.colour import is_hdr, is_wide, to_bt709
from giffy_ray.data.headers import Crop

# Averaging every source pixel, of colour too (PSNR falls by 18 dB without), and with accurate rounding: what need not
# be scaled is off by four levels without. Colour is taken from where the frame says that its samples lie
# (`chroma_location`), which FFmpeg's `scale` filter does only where its `in_chroma_loc` says so.
SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Matrices by their numbers in ITU-T H.273. FFmpeg converts some; these are taken for one of them, as players do.
_CONVERTED_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
_UNSPECIFIED_MATRICES = (2, 3)
_BT2020_CONSTANT_LUMINANCE = 10
_MATRICES_OF_PRIMARIES = (12, 13)
_PIXEL_SHAPES = 1 / 8, 8  # width over height; what is beyond is a mistake
_thread = threading.local()


class TooLargeError(Exception):
    """A picture that would be scaled to more pixels than is allowed."""


class UnsupportedColourError(Exception):
    """A picture whose colours are coded in a way that cannot be converted."""


class FrameScaler:
    """Decoded frames of one video -> uint8 [height, width, 3], RGB, upright and to size.

    `pixel_shape` is the width of a pixel over its height, `crop` what the container says is not to be shown of pictures
    of `size` (height, width), `max_pixels` the most that a picture may be scaled to before it is cropped to the clip.
    """

    def __init__(self, clip: ClipConfig, pixel_shape: float, crop: Crop, size: tuple[int, int], max_pixels: int):
        self._clip, self._max_pixels = clip, max_pixels
        self._pixel_shape = pixel_shape if _PIXEL_SHAPES[0] <= pixel_shape <= _PIXEL_SHAPES[1] else 1.0
        whole = min(crop) >= 0 and crop.left + crop.right < size[1] and crop.top + crop.bottom < size[0]
        self._crop, self._crop_size = (crop if whole else Crop()), size
        self._turns = self._mirrored = None  # of the first frame
        self._reformatter = _reformatter()
        self.hdr = False  # whether a frame was HDR

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Raises TooLargeError, UnsupportedColourError."""
        if self._turns is None:
            self._turns = round(frame.rotation / 90) % 4  # counterclockwise, to be upright
            self._mirrored = _is_mirrored(frame)  # upside down, before it is turned
        sideways = self._turns % 2 == 1
        full = (self._clip.width, self._clip.height) if sideways else (self._clip.height, self._clip.width)
        frame = self._filtered(frame)
        height, width = full
        if self._clip.fit != "stretch":
            height, width = _fitted(frame.height, frame.width * self._pixel_shape, height, width, self._clip.fit)
            if height * width > self._max_pixels:
                raise TooLargeError(
                    f"{frame.width}x{frame.height}, scaled to {width}x{height} for clip.fit={self._clip.fit},"
                )
        picture = self._scaled(frame, height, width)
        if (height, width) != full:
            picture = _centred(picture, *full)
        if self._mirrored:
            picture = picture[::-1]
        return np.rot90(picture, self._turns) if self._turns else picture

    def _scaled(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """uint8 [height, width, 3]"""
        transfer, primaries = frame.color_trc, frame.color_primaries
        hdr = is_hdr(transfer)
        deep = hdr or is_wide(primaries)
        self.hdr |= hdr
        small = self._reformatter.reformat(
            frame,
            width,
            height,
            format="rgb48le" if deep else "rgb24",
            interpolation=SCALING,
            src_colorspace=_matrix(frame, deep),
            src_color_range=frame.color_range,
            threads=1,
        )
        plane, kind = small.planes[0], np.dtype("<u2" if deep else "u1")
        rows = np.frombuffer(plane, kind).reshape(height, plane.line_size // kind.itemsize)  # type: ignore[arg-type]
        picture = rows[:, : 3 * width].reshape(height, width, 3)
        return to_bt709(picture, transfer, primaries) if deep else picture

    def _filtered(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame without what is not to be shown, as one picture and not as lines of two moments."""
        filters = []
        if frame.interlaced_frame:
            filters.append(("setfield", "prog"))  # each of the two would be scaled by itself
        if any(self._crop) and (frame.height, frame.width) == self._crop_size:
            width, height = frame.width - self._crop.left - self._crop.right, frame.height - self._crop.top
            crop = f"{width}:{height - self._crop.bottom}:{self._crop.left}:{self._crop.top}:exact=1"
            filters.append(("crop", crop))
        if not filters:
            return frame
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
        steps = [graph.add(name, options) for name, options in filters]
        graph.link_nodes(source, *steps, graph.add("buffersink")).configure()
        graph.vpush(frame)
        return graph.vpull()


def _matrix(frame: av.VideoFrame, deep: bool) -> Colorspace | None:
    """The matrix that a frame is converted by; none for its own. Raises UnsupportedColourError."""
    matrix = frame.colorspace
    if frame.format.is_rgb or (matrix in _CONVERTED_MATRICES and not (deep and matrix in _UNSPECIFIED_MATRICES)):
        return None
    if matrix in _UNSPECIFIED_MATRICES:
        return Colorspace.BT2020 if deep else Colorspace.ITU601
    if matrix == _BT2020_CONSTANT_LUMINANCE:
        return Colorspace.BT2020
    if matrix in _MATRICES_OF_PRIMARIES:
        return Colorspace.BT2020 if deep else Colorspace.ITU709
    raise UnsupportedColourError(f"its colours are coded by matrix {matrix} of ITU-T H.273, which is not supported")


def _reformatter() -> VideoReformatter:
    """The one of this thread: setting one up costs as much as scaling a few frames."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    return _thread.reformatter


def _is_mirrored(frame: av.VideoFrame) -> bool:
    if "DISPLAYMATRIX" not in frame.side_data:
        return False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(frame.side_data["DISPLAYMATRIX"]))
    return a * d < b * c


def _fitted(source_height: float, source_width: float, height: int, width: int, fit: str) -> tuple[int, int]:
    """The size that a picture is scaled to before it is cropped or padded to height and width."""
    scales = height / source_height, width / source_width
    scale = max(scales) if fit == "crop" else min(scales)
    return max(1, round(source_height * scale)), max(1, round(source_width * scale))


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts a picture to the size, or puts black around it."""
    for axis, size in ((0, height), (1, width)):
        surplus = picture.shape[axis] - size
        if surplus > 0:
            picture = picture.take(range(surplus // 2, surplus // 2 + size), axis=axis)
        elif surplus < 0:
            margins = [(0, 0)] * 3
            margins[axis] = (-surplus // 2, -surplus - -surplus // 2)
            picture = np.pad(picture, margins)
    return picture
