"""Reads the pictures that people have: any format, orientation, colour space, bit depth and size."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from giffy_ray.core.errors import InputError

ImageInput: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Any"
Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 100_000_000  # of one image; Pillow would decode up to 179 million
_MAX_ASPECT_DIFFERENCE = 0.01  # a rounding of the size, not another shape
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")
_SUPPORTED = ", ".join(_FORMATS[:7])
_UNSUPPORTED = {
    "HEIC": re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
}
_HEADER_BYTES = 12
_OPAQUE = 255
_FLOAT_TOLERANCE = 1e-3  # by which rounding errors may leave 0..1; a quarter of a level
_TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour model of an ICC profile -> mode of Pillow


class ImageError(InputError):
    """An image that cannot be used. The message names the file or argument and says what to do."""


def read_image(source: ImageInput, name: str = "image") -> np.ndarray:
    """Reads an image as 8-bit sRGB, upright.

    EXIF orientation is applied, an embedded ICC profile is converted to sRGB, grayscale becomes RGB, and 16 bits become
    8: grayscale by rounding, colour by its upper 8 bits, which are all that Pillow reads. Without a profile, colours
    count as sRGB.

    Args:
        source: Path, bytes of an image file, PIL image (its current frame), or an array or tensor: [height, width],
            [height, width, channels], or, if the last axis is none, [channels, height, width], with 1, 3 or 4 channels.
            Integers are 0..255 (uint8) or 0..65535 (uint16), booleans black and white, floats 0..1.
        name: How messages call an image that has no path.

    Returns:
        uint8 [height, width, 3], or [height, width, 4] if a pixel is not opaque. Shares no memory with `source`.

    Raises:
        ImageError: The image does not exist, cannot be read, has several frames, or is too large.
    """
    name = os.fsdecode(source) if isinstance(source, str | PathLike) else name
    with _explain_errors(name):
        if isinstance(source, str | PathLike):
            with open(source, "rb") as file:
                image = _read_file(file, name)
        elif isinstance(source, bytes | bytearray | memoryview):
            image = _read_file(io.BytesIO(source), name)
        elif isinstance(source, Image.Image):
            image = _read_pil(source, name)
        else:
            image = _read_array(source, name)
        has_transparency = image.shape[2] == 4 and (image[:, :, 3] != _OPAQUE).any()
        return image.copy() if has_transparency else image[:, :, :3].copy()


def match_sizes(start: np.ndarray, end: np.ndarray, fit: Fit = "crop") -> tuple[np.ndarray, np.ndarray]:
    """Scales the end to the size of the start, and gives both the same channels.

    Args:
        start: uint8 [height, width, 3 or 4].
        end: The same, of any size.
        fit: What happens to an end of another shape: crop cuts its edges, pad adds black ones (transparent ones to an
            image with transparency), stretch distorts it.

    Raises:
        InputError: There is no such fit.
    """
    if fit not in get_args(Fit):
        raise InputError(f"fit: must be one of {', '.join(get_args(Fit))} (value {fit!r})")
    if start.shape[2] != end.shape[2]:
        start, end = _with_alpha(start), _with_alpha(end)
    height, width = start.shape[:2]
    if end.shape[:2] == (height, width):
        return start, end
    image = Image.fromarray(end)
    aspect_difference = abs(image.width * height / (image.height * width) - 1)
    if fit == "stretch" or aspect_difference <= _MAX_ASPECT_DIFFERENCE:
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    elif fit == "crop":
        scaled = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        scaled = ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS)
    return start, np.array(scaled)


def flatten_alpha(image: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Composites RGBA on a background, for formats without transparency.

    Args:
        image: uint8 [..., 3 or 4].
        background: RGB, 0..255.

    Returns:
        uint8 [..., 3].
    """
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / _OPAQUE
    colour = image[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return colour.round().astype(np.uint8)


@contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Raises ImageError instead of any other error. For a damaged file, decoders raise errors of all types."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: does not fit in memory; scale it down") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: has more than {MAX_PIXELS / 1e6:g} million pixels; scale it down") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{name}: cannot be read: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: is damaged and cannot be decoded: {reason}") from error


def _read_file(file: BinaryIO, name: str) -> np.ndarray:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ImageError(f"{name}: is an animation or has several pages; give a still image")
            return _read_pil(image, name)
    except UnidentifiedImageError as error:
        file.seek(0)
        header = file.read(_HEADER_BYTES)
        kinds = [f"{kind} is not supported" for kind, pattern in _UNSUPPORTED.items() if pattern.match(header)]
        problem = (*kinds, "is not an image that can be read")[0]
        raise ImageError(f"{name}: {problem}; convert it to one of {_SUPPORTED}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        limit = f"the limit is {MAX_PIXELS / 1e6:g} million"
        raise ImageError(f"{name}: has {width}x{height} pixels; {limit}, scale it down")
    if min(width, height) < 2:
        raise ImageError(f"{name}: has {width}x{height} pixels; at least 2x2 are needed")


def _read_pil(image: Image.Image, name: str) -> np.ndarray:
    _check_size(image.width, image.height, name)
    image.load()
    transposition = _TRANSPOSITIONS.get(_read_orientation(image))
    srgb = _convert_to_srgb(image, name)
    return np.asarray(srgb if transposition is None else srgb.transpose(transposition))


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of a picture that is intact; viewers ignore it too
        return 1


def _convert_to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Converts to RGB, or to RGBA if the image has transparency."""
    profile, is_gray = image.info.get("icc_profile"), Image.getmodebase(image.mode) == "L"
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(_normalize_integers(image, name), name))
    if image.mode == "La":  # of TIFF; Pillow converts it to LA only
        image = image.convert("LA")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colour = (_apply_profile(image, profile, is_gray) if profile else None) or image.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
    return colour


def _normalize_integers(image: Image.Image, name: str) -> np.ndarray:
    """Returns the pixels of an image with more than 8 bits as uint16 or float32."""
    array = np.asarray(image)
    if image.mode == "F":
        return array
    if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise ImageError(f"{name}: has values of {array.min()} to {array.max()}; expected 16 bits, 0 to 65535")
    return array.astype(np.uint16)


def _apply_profile(image: Image.Image, profile: bytes, is_gray: bool) -> Image.Image | None:
    """Converts to sRGB. Returns None if the profile is damaged or of another colour model; viewers ignore it too."""
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colour_profile: Any = embedded.profile
        mode = _PROFILE_MODES.get(colour_profile.xcolor_space)
        if mode is None or (mode == "L" and not is_gray) or (mode == "CMYK") != (image.mode == "CMYK"):
            return None
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image.convert(mode), embedded, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _read_array(source: Any, name: str) -> np.ndarray:
    array = _to_numpy(source, name)
    if array.dtype == object:
        expected = "a path, the bytes of a file, a PIL image, an array or a tensor"
        raise ImageError(f"{name}: has type {type(source).__name__}; expected {expected}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ImageError(f"{name}: has shape {array.shape}; expected [height, width, 3]")
    channels_last = array if array.shape[2] in (1, 3, 4) else array.transpose(1, 2, 0)
    height, width, channels = channels_last.shape
    if channels not in (1, 3, 4):
        raise ImageError(f"{name}: has shape {array.shape}; expected 1, 3 or 4 channels")
    _check_size(width, height, name)
    image = _to_uint8(channels_last, name)
    return image.repeat(3, axis=2) if channels == 1 else image


def _to_numpy(source: Any, name: str) -> np.ndarray:
    try:
        if hasattr(source, "detach"):  # a tensor of torch, which this module does not import
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
        return np.asarray(source)
    except Exception as error:  # such as a tensor on the meta device, or lists of different lengths
        reason = " ".join(str(error).split())
        raise ImageError(f"{name}: cannot be converted to an array: {reason}") from error


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    kind, item_bytes = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        if not np.isfinite(array).all():
            raise ImageError(f"{name}: has pixels that are NaN or infinite; floats must be in 0..1")
        if array.min() < -_FLOAT_TOLERANCE or array.max() > 1 + _FLOAT_TOLERANCE:
            raise ImageError(f"{name}: floats must be in 0..1 (values {array.min():g} to {array.max():g})")
        return np.round(array.astype(np.float32) * 255).astype(np.uint8)
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "u" and item_bytes == 1:
        return array
    if kind == "u" and item_bytes == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise ImageError(f"{name}: has dtype {array.dtype}; expected uint8, uint16 or floats in 0..1")


def _with_alpha(image: np.ndarray) -> np.ndarray:
    if image.shape[2] == 4:
        return image
    return np.concatenate([image, np.full_like(image[:, :, :1], _OPAQUE)], axis=2)
