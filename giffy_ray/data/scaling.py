"""Scales decoded frames to the size of a clip: cropped, area-averaged, upright, in BT.709 colours."""

from __future__ import annotations

import struct
import threading
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from giffy_ray.config import ClipConfig
from giffy_ray.data.colour import is_hdr, is_wide_gamut, to_bt709
from giffy_ray.data.headers import Crop

# Area averaging includes chroma, which is worth 18 dB of PSNR. Without accurate rounding even unscaled frames are off
# by four levels. FFmpeg takes the chroma position from the frame (`chroma_location`); its `scale` filter does so only
# when given `in_chroma_loc`.
SCALING_FLAGS = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Matrix numbers of ITU-T H.273. FFmpeg converts the first group; the others map to one of that group, as in players.
_CONVERTED_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
_UNSPECIFIED_MATRICES = (2, 3)
_BT2020_CONSTANT_LUMINANCE = 10
_CHROMATICITY_DERIVED_MATRICES = (12, 13)
_MIN_PIXEL_ASPECT, _MAX_PIXEL_ASPECT = 1 / 8, 8  # width over height; values outside are errors in the file
_thread_local = threading.local()


class TooLargeError(Exception):
    """Scaling a frame would exceed the pixel limit."""


class UnsupportedColourError(Exception):
    """A frame's colour matrix is not supported."""


class FrameScaler:
    """Scales the decoded frames of one video to uint8 [height, width, 3], RGB, upright.

    Args:
        clip: Gives the size and `fit`.
        pixel_aspect: Width of a pixel over its height.
        crop: Cropping that the container states for frames of `size`. Ignored if nothing would remain.
        size: Height and width of the frames that `crop` applies to.
        max_pixels: Limit for the scaled frame before it is cropped to the clip.
    """

    def __init__(self, clip: ClipConfig, pixel_aspect: float, crop: Crop, size: tuple[int, int], max_pixels: int):
        self._clip, self._max_pixels = clip, max_pixels
        self._pixel_aspect = pixel_aspect if _MIN_PIXEL_ASPECT <= pixel_aspect <= _MAX_PIXEL_ASPECT else 1.0
        is_valid = min(crop) >= 0 and crop.left + crop.right < size[1] and crop.top + crop.bottom < size[0]
        self._crop, self._crop_size = (crop if is_valid else Crop()), size
        self._quarter_turns: int | None = None  # orientation, read from the first frame
        self._flipped = False
        self._reformatter = _get_reformatter()
        self.hdr = False  # whether any frame was HDR

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns uint8 [height, width, 3]. Raises TooLargeError, UnsupportedColourError."""
        if self._quarter_turns is None:
            self._quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise
            self._flipped = _is_flipped(frame)  # upside down, before the rotation
        is_sideways = self._quarter_turns % 2 == 1
        clip_size = (self._clip.height, self._clip.width)
        target = clip_size[::-1] if is_sideways else clip_size
        frame = self._crop_and_deinterlace(frame)
        height, width = target
        if self._clip.fit != "stretch":
            height, width = _fit_size(frame.height, frame.width * self._pixel_aspect, height, width, self._clip.fit)
            if height * width > self._max_pixels:
                raise TooLargeError(
                    f"{frame.width}x{frame.height}, scaled to {width}x{height} for clip.fit={self._clip.fit},"
                )
        scaled = self._scale(frame, height, width)
        if (height, width) != target:
            scaled = _crop_or_pad_centre(scaled, *target)
        if self._flipped:
            scaled = scaled[::-1]
        return np.rot90(scaled, self._quarter_turns) if self._quarter_turns else scaled

    def _scale(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """Returns uint8 [height, width, 3]."""
        transfer, primaries = frame.color_trc, frame.color_primaries
        hdr = is_hdr(transfer)
        needs_16_bit = hdr or is_wide_gamut(primaries)
        self.hdr |= hdr
        scaled = self._reformatter.reformat(
            frame,
            width,
            height,
            format="rgb48le" if needs_16_bit else "rgb24",
            interpolation=SCALING_FLAGS,
            src_colorspace=_source_matrix(frame, needs_16_bit),
            src_color_range=frame.color_range,
            threads=1,
        )
        plane, dtype = scaled.planes[0], np.dtype("<u2" if needs_16_bit else "u1")
        lines = np.frombuffer(plane, dtype).reshape(height, plane.line_size // dtype.itemsize)  # type: ignore[arg-type]
        pixels = lines[:, : 3 * width].reshape(height, width, 3)
        return to_bt709(pixels, transfer, primaries) if needs_16_bit else pixels

    def _crop_and_deinterlace(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Applies the container's cropping and marks interlaced frames as progressive."""
        filters = []
        if frame.interlaced_frame:
            filters.append(("setfield", "prog"))  # otherwise FFmpeg scales each field by itself
        if any(self._crop) and (frame.height, frame.width) == self._crop_size:
            width = frame.width - self._crop.left - self._crop.right
            height = frame.height - self._crop.top - self._crop.bottom
            filters.append(("crop", f"{width}:{height}:{self._crop.left}:{self._crop.top}:exact=1"))
        if not filters:
            return frame
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
        steps = [graph.add(name, options) for name, options in filters]
        graph.link_nodes(source, *steps, graph.add("buffersink")).configure()
        graph.vpush(frame)
        return graph.vpull()


def _source_matrix(frame: av.VideoFrame, is_wide: bool) -> Colorspace | None:
    """The matrix to convert a frame with; None for the one that it states. Raises UnsupportedColourError."""
    matrix = frame.colorspace
    is_supported = matrix in _CONVERTED_MATRICES and not (is_wide and matrix in _UNSPECIFIED_MATRICES)
    if frame.format.is_rgb or is_supported:
        return None
    if matrix in _UNSPECIFIED_MATRICES:
        return Colorspace.BT2020 if is_wide else Colorspace.ITU601
    if matrix == _BT2020_CONSTANT_LUMINANCE:
        return Colorspace.BT2020
    if matrix in _CHROMATICITY_DERIVED_MATRICES:
        return Colorspace.BT2020 if is_wide else Colorspace.ITU709
    raise UnsupportedColourError(f"its colour matrix {matrix} (ITU-T H.273) is not supported")


def _get_reformatter() -> VideoReformatter:
    """Returns the reformatter of this thread. Creating one costs as much as scaling a few frames."""
    if not hasattr(_thread_local, "reformatter"):
        _thread_local.reformatter = VideoReformatter()
    return _thread_local.reformatter


def _is_flipped(frame: av.VideoFrame) -> bool:
    """Whether the display matrix mirrors the frame (negative determinant)."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(frame.side_data["DISPLAYMATRIX"]))
    return a * d < b * c


def _fit_size(source_height: float, source_width: float, height: int, width: int, fit: str) -> tuple[int, int]:
    """The size to scale a frame to before it is cropped or padded to height and width."""
    scales = height / source_height, width / source_width
    scale = max(scales) if fit == "crop" else min(scales)
    return max(1, round(source_height * scale)), max(1, round(source_width * scale))


def _crop_or_pad_centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops to the size around the centre, or pads with black."""
    for axis, size in ((0, height), (1, width)):
        surplus = pixels.shape[axis] - size
        if surplus > 0:
            pixels = pixels.take(range(surplus // 2, surplus // 2 + size), axis=axis)
        elif surplus < 0:
            margins = [(0, 0)] * 3
            margins[axis] = (-surplus // 2, -surplus - -surplus // 2)
            pixels = np.pad(pixels, margins)
    return pixels
