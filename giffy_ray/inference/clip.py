"""The clip that an interpolation returns, and how it is written to a file."""

from __future__ import annotations

import base64
import itertools
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from giffy_ray.core.errors import InputError
from giffy_ray.inference.images import flatten_alpha

FORMATS = ("mp4", "gif", "webp", "png")  # png: one file per frame, in a folder
DEFAULT_QUALITY = 80
_MIN_FPS, _MAX_FPS = 0.01, 1000
_MAX_GIF_FPS = 50  # browsers show frames of less than 20 ms for 100 ms
_MAX_RATE_DENOMINATOR = 1001  # that of NTSC rates such as 30000/1001, the 29.97 frames per second of television
_MAX_SIDE_PX = {"mp4": 16384, "gif": 65535, "webp": 16383}
_PALETTE_FRAMES = 8
_PREVIEW_PX = 512
_PNG_COMPRESSION = 3  # of zlib; half the time of the default, and files 5 % larger
_PNG_PATTERN = re.compile(r"[^%]*%(0\d)?d[^%]*", re.DOTALL)


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """An interpolated clip. `numpy.asarray(clip)` is its frames; notebooks show it as an animation.

    Attributes:
        frames: uint8 [time, height, width, 3], or 4 channels if the images have transparency; sRGB.
        fps: Frames per second.
    """

    frames: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.frames[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.frames, dtype, copy=copy)

    def __repr__(self) -> str:
        _, height, width, _ = self.frames.shape
        return f"Clip({len(self)} frames of {width}x{height}, {self.fps:g} fps)"

    def to_pil(self) -> list[Image.Image]:
        """Returns the frames as PIL images."""
        return [Image.fromarray(frame) for frame in self.frames]

    def save(self, path: str | PathLike[str], quality: float = DEFAULT_QUALITY) -> None:
        """Writes the clip; the suffix of `path` selects the format. See `save_frames`."""
        save_frames(self.frames, path, self.fps, quality)

    def _repr_html_(self) -> str:
        """Shows the clip in a notebook as an animated WebP of at most 512x512 pixels."""
        images = self.to_pil()
        for image in images:
            image.thumbnail((_PREVIEW_PX, _PREVIEW_PX))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.webp")
            save_frames(map(np.asarray, images), path, self.fps)
            encoded = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{len(self)} frames at {self.fps:g} fps" src="data:image/webp;base64,{encoded}">'


def output_format(path: str | PathLike[str]) -> str:
    """Returns the format of an output path: its suffix, or png for a folder or a pattern such as frame_%04d.png.

    Raises:
        InputError: The suffix is not one of `FORMATS`.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if not suffix:
        return "png"
    if suffix not in FORMATS:
        supported = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(
            f"{path}: the format .{suffix} is not supported; expected {supported}, or a folder for PNG files"
        )
    return suffix


def save_frames(
    frames: Iterable[np.ndarray], path: str | PathLike[str], fps: float | Fraction, quality: float = DEFAULT_QUALITY
) -> int:
    """Writes frames to a file as they arrive. The file appears under its name only when it is complete.

    - mp4 is H.264 (yuv420p), without transparency: it is composited on white, and odd sizes repeat their last row or
      column.
    - WebP plays in a loop and keeps transparency.
    - GIF plays in a loop and is composited on white. All frames are held in memory, because they share a palette. It
      counts time in hundredths of a second: the frames of 30 per second last 30 or 40 ms.
    - A folder, `name.png` or `name_%04d.png` gets one PNG file per frame, numbered from 1.

    Existing files are replaced. Of a longer sequence of PNG files, the rest stays.

    Args:
        frames: uint8 [height, width, 3 or 4] each, all of one shape.
        path: The output. Folders are created.
        fps: Frames per second, 0.01 to 1000; for GIF at most 50.
        quality: 0 to 100, for mp4 and WebP.

    Returns:
        The number of frames.

    Raises:
        InputError: The format, the frame rate, the quality or the frames are not supported, there are no frames, or the
            output cannot be created.
        OSError: The output cannot be completed, for example because the disk is full.
    """
    file_format = output_format(path)
    _check_options(path, file_format, float(fps), quality)
    frames = _check_frames(frames, path, file_format)
    first = next(frames, None)
    if first is None:
        raise InputError(f"{path}: there are no frames to write")
    frames = itertools.chain([first], frames)
    if file_format == "png":
        return _save_pngs(frames, path)
    target = Path(path)
    _create_folder(target.parent, path)
    # The absolute path, because FFmpeg takes the a of a:b/clip.mp4 for a protocol.
    partial = target.parent.absolute() / f".{target.name}.{uuid.uuid4().hex}.partial"
    encode = {"mp4": _encode_mp4, "gif": _encode_gif, "webp": _encode_webp}[file_format]
    try:
        count = encode(frames, partial, fps, quality)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _check_options(path: str | PathLike[str], file_format: str, fps: float, quality: float) -> None:
    if file_format == "png":
        png_pattern(path)
    elif Path(path).is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    max_fps = _MAX_GIF_FPS if file_format == "gif" else _MAX_FPS
    if not _MIN_FPS <= fps <= max_fps:
        raise InputError(f"fps: must be {_MIN_FPS:g} to {max_fps} for {file_format} (value {fps:g})")
    if not 0 <= quality <= 100:
        raise InputError(f"quality: must be 0 to 100 (value {quality:g})")


def _check_frames(frames: Iterable[np.ndarray], path: str | PathLike[str], file_format: str) -> Iterator[np.ndarray]:
    shape = None
    for number, frame in enumerate(frames, 1):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (3, 4):
            expected = "uint8 [height, width, 3 or 4]"
            raise InputError(f"{path}: frame {number} is {frame.dtype} {list(frame.shape)}; expected {expected}")
        height, width = frame.shape[:2]
        limit_px = _MAX_SIDE_PX.get(file_format)
        if limit_px and max(height, width) > limit_px:
            limit = f"{file_format} has at most {limit_px} per side, PNG files have no limit"
            raise InputError(f"{path}: the frames have {width}x{height} pixels; {limit}")
        shape = shape or frame.shape
        if frame.shape != shape:
            raise InputError(f"{path}: frame {number} has shape {list(frame.shape)}, those before it {list(shape)}")
        yield frame


def _create_folder(folder: Path, path: str | PathLike[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # fails if the folder is not writable
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def png_pattern(path: str | PathLike[str]) -> tuple[Path, str]:
    """Returns the folder of the PNG files of an output, and the pattern of their names.

    `out` gives `out/frame_%04d.png`, `out.png` gives `out_%04d.png`.

    Raises:
        InputError: The name contains a % that is not the one number.
    """
    path = Path(path)
    if not path.suffix:
        return path, "frame_%04d.png"
    pattern = path.name if "%" in path.name else f"{path.stem}_%04d.png"
    if not _PNG_PATTERN.fullmatch(pattern):
        raise InputError(f"{path}: the name must have one number, such as frame_%04d.png")
    return path.parent, pattern


def _save_pngs(frames: Iterable[np.ndarray], path: str | PathLike[str]) -> int:
    folder, pattern = png_pattern(path)
    _create_folder(folder, path)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial:
        count = 0
        for count, frame in enumerate(frames, 1):
            Image.fromarray(frame).save(Path(partial, pattern % count), compress_level=_PNG_COMPRESSION)
        for number in range(1, count + 1):
            os.replace(Path(partial, pattern % number), folder / (pattern % number))
    return count


def _encode_mp4(frames: Iterable[np.ndarray], path: Path, fps: float | Fraction, quality: float) -> int:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = add_video_stream(container, fps, quality)
        return _encode_video(container, stream, (to_video_frame(pad_to_even(flatten_alpha(frame))) for frame in frames))


def _encode_webp(frames: Iterable[np.ndarray], path: Path, fps: float | Fraction, quality: float) -> int:
    # FFmpeg rather than Pillow, which holds all frames in memory.
    with av.open(str(path), "w", format="webp", options={"loop": "0"}) as container:
        stream = container.add_stream("libwebp_anim", _frame_rate(fps), options={"quality": f"{quality:g}"})
        stream.pix_fmt = "bgra"
        return _encode_video(container, stream, map(_to_bgra_frame, frames))


def _encode_video(container: Any, stream: Any, frames: Iterable[av.VideoFrame]) -> int:
    count = 0
    for count, frame in enumerate(frames, 1):
        if count == 1:
            stream.height, stream.width = frame.height, frame.width
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    return count


def add_video_stream(container: Any, fps: float | Fraction, quality: float) -> Any:
    """Adds an H.264 stream for `to_video_frame`; the caller sets its size.

    Quality 80 is x264's rate factor 18, which is hard to tell from the original; 50 is 25.5.
    """
    # x264's macroblock tree gives one of two files for the same frames, from run to run.
    options = {"preset": "veryfast", "crf": f"{38 - quality / 4:g}", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", _frame_rate(fps), options=options)
    stream.pix_fmt = "yuv420p"
    # Players assume BT.709 for HD video, and guess by the height if a file states nothing.
    stream.codec_context.color_range = ColorRange.MPEG
    stream.codec_context.colorspace = Colorspace.ITU709
    stream.codec_context.color_primaries = ColorPrimaries.BT709
    stream.codec_context.color_trc = ColorTrc.BT709
    return stream


def _frame_rate(fps: float | Fraction) -> Fraction:
    return fps if isinstance(fps, Fraction) else Fraction(float(fps)).limit_denominator(_MAX_RATE_DENOMINATOR)


def to_video_frame(rgb: np.ndarray) -> av.VideoFrame:
    """Converts uint8 [height, width, 3] to a frame in BT.709, limited range."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def _to_bgra_frame(image: np.ndarray) -> av.VideoFrame:
    pixel_format = "rgb24" if image.shape[2] == 3 else "rgba"
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=pixel_format).reformat(format="bgra")


def pad_to_even(frame: np.ndarray) -> np.ndarray:
    """Repeats the last row and column where height or width is odd: yuv420p has one colour for 2x2 pixels."""
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")


def _encode_gif(frames: Iterable[np.ndarray], path: Path, fps: float | Fraction, quality: float) -> int:
    """All frames share one palette, without which still areas would flicker."""
    flattened = [flatten_alpha(frame) for frame in frames]
    count = len(flattened)
    sampled = np.unique(np.linspace(0, count - 1, _PALETTE_FRAMES).round().astype(int))
    palette = Image.fromarray(np.concatenate([flattened[index] for index in sampled])).quantize(256)
    dither = Image.Dither.FLOYDSTEINBERG
    quantized = (Image.fromarray(frame).quantize(palette=palette, dither=dither) for frame in flattened)
    ends_ms = [10 * round(100 * number / fps) for number in range(count + 1)]
    durations_ms = [end_ms - start_ms for start_ms, end_ms in itertools.pairwise(ends_ms)]
    next(quantized).save(
        path, "GIF", save_all=True, append_images=quantized, duration=durations_ms, loop=0, optimize=False
    )
    return count
