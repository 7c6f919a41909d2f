"""Checks pictures against the arrays they were made of, closed forms of colour science, and Pillow."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from giffy_ray.core.errors import InputError
from giffy_ray.inference import images
from giffy_ray.inference.images import ImageError, flatten_alpha, match_sizes, read_image

LOSSLESS = {"PNG": {}, "TIFF": {}, "BMP": {}, "PPM": {}, "WEBP": {"lossless": True, "exact": True}}
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, file_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Encodes uint16 [height, width, channels] as a PNG with 16 bits, which Pillow does not write in colour."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    content = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in content)


def assert_one_line(error: pytest.ExceptionInfo, name: str) -> None:
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert len(message) < 250 + len(name)


# --- sources and formats


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_lossless_files_are_read_exactly_from_every_source(file_format: str, tmp_path: Path):
    expected = noise(5, 7)
    content = encode(expected, file_format, **LOSSLESS[file_format])
    path = tmp_path / "picture"
    path.write_bytes(content)
    with Image.open(path) as opened:
        for source in (path, str(path), content, bytearray(content), memoryview(content), opened):
            np.testing.assert_array_equal(read_image(source), expected)


@pytest.mark.parametrize(("file_format", "options"), [("JPEG", {}), ("AVIF", {}), ("WEBP", {})])
def test_lossy_files_are_read_as_pillow_reads_them(file_format: str, options: dict):
    content = encode(noise(16, 24), file_format, **options)
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(read_image(content), np.asarray(image.convert("RGB")))


def test_result_is_contiguous_writable_and_shares_no_memory():
    array = noise(6, 8)
    image = Image.fromarray(array)
    for source in (array, array[::-1, ::2], image, encode(array), torch.from_numpy(array), noise(6, 8, 4)):
        result = read_image(source)
        assert result.flags.c_contiguous
        assert result.flags.writeable
        assert not np.shares_memory(result, array)


def test_first_picture_of_a_phones_mpo_is_read():
    first, second = np.full((16, 24, 3), 40, np.uint8), np.full((16, 24, 3), 200, np.uint8)
    content = encode(first, "MPO", save_all=True, append_images=[Image.fromarray(second)])
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert np.abs(read_image(content).astype(int) - 40).max() <= 1


# --- orientation


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the pixels of a file whose orientation tag makes viewers show `upright`.

    EXIF 2.32, section 4.6.4: the tag says which visual edges row 0 and column 0 are at.
    """
    height, width = upright.shape[:2]
    row_of_top, column_of_left = np.arange(height), np.arange(width)
    row_of_bottom, column_of_right = row_of_top[::-1], column_of_left[::-1]
    rows, columns = {
        1: (row_of_top, column_of_left),
        2: (row_of_top, column_of_right),
        3: (row_of_bottom, column_of_right),
        4: (row_of_bottom, column_of_left),
        5: (row_of_top, column_of_left),
        6: (row_of_top, column_of_right),
        7: (row_of_bottom, column_of_right),
        8: (row_of_bottom, column_of_left),
    }[orientation]
    stored = upright[np.ix_(rows, columns)]
    return stored if orientation < 5 else stored.swapaxes(0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_exif_orientation_is_applied(file_format: str, orientation: int):
    upright = np.kron(noise(2, 3), np.ones((8, 8, 1))).astype(np.uint8)
    stored = np.ascontiguousarray(stored_as(upright, orientation))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = LOSSLESS.get(file_format, {"quality": 100, "subsampling": "4:4:4"})
    result = read_image(encode(stored, file_format, exif=exif, **options))
    assert result.shape == upright.shape
    tolerance = 0 if file_format in LOSSLESS else 4
    assert np.abs(result.astype(int) - upright).max() <= tolerance


def test_orientation_applies_to_16_bits_and_alpha():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    result = read_image(encode(np.ascontiguousarray(stored_as(upright, 6)), exif=exif))
    np.testing.assert_array_equal(result[:, :, 0], np.round(upright / 257))
    upright = noise(3, 4, 4)
    result = read_image(encode(np.ascontiguousarray(stored_as(upright, 6)), exif=exif))
    np.testing.assert_array_equal(result, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("content", [b"junk", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_is_ignored(content: bytes):
    picture = noise(8, 8)
    np.testing.assert_array_equal(read_image(encode(picture, exif=b"Exif\0\0" + content)), picture)


def test_orientation_outside_1_to_8_is_ignored():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    picture = noise(8, 6)
    np.testing.assert_array_equal(read_image(encode(picture, exif=exif)), picture)


# --- modes and transparency


def test_grayscale_and_black_and_white_become_rgb():
    gray = noise(5, 7)[:, :, 0]
    np.testing.assert_array_equal(read_image(encode(gray)), np.dstack([gray] * 3))
    bits = gray > 127
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(bits))), np.dstack([bits * np.uint8(255)] * 3))


def test_palette_with_transparency_is_looked_up():
    index = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    palette, alpha = noise(5, 1)[:, 0], np.array([0, 255, 128, 7, 255], np.uint8)
    image = Image.fromarray(index).convert("L")
    image.putpalette(palette.tobytes())
    expected = np.dstack([palette[index], alpha[index]])
    np.testing.assert_array_equal(read_image(encode(image, transparency=bytes(alpha))), expected)
    np.testing.assert_array_equal(read_image(encode(image)), palette[index])


def test_transparent_colour_of_gif_and_png_becomes_alpha():
    index = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(index).convert("L")
    image.putpalette(bytes([9, 9, 9, 200, 0, 0, 0, 200, 0]))
    np.testing.assert_array_equal(
        read_image(encode(image, "GIF", transparency=1))[:, :, 3], np.where(index == 1, 0, 255)
    )
    picture = np.array([[[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [0, 0, 0]]], np.uint8)
    result = read_image(encode(picture, transparency=(1, 2, 3)))
    np.testing.assert_array_equal(result, np.dstack([picture, [[0, 255], [0, 255]]]))


def test_alpha_is_kept_only_if_a_pixel_is_not_opaque():
    picture = noise(5, 7, 4)
    np.testing.assert_array_equal(read_image(encode(picture)), picture)
    picture[:, :, 3] = 255
    for source in (encode(picture), picture, Image.fromarray(picture), encode(picture, "WEBP", lossless=True)):
        np.testing.assert_array_equal(read_image(source), picture[:, :, :3])
    picture[4, 6, 3] = 254
    np.testing.assert_array_equal(read_image(picture), picture)


def test_gray_with_alpha_becomes_rgba():
    gray, alpha = noise(5, 7)[:, :, 0], noise(5, 7, seed=1)[:, :, 0]
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    np.testing.assert_array_equal(read_image(encode(image)), np.dstack([gray, gray, gray, alpha]))


def test_premultiplied_alpha_is_divided_out():
    gray = Image.new("LA", (4, 4), (200, 128))
    colour = Image.new("RGBA", (4, 4), (200, 100, 40, 128))
    assert np.abs(read_image(gray.convert("La"))[0, 0].astype(int) - [200, 200, 200, 128]).max() <= 1
    assert np.abs(read_image(colour.convert("RGBa"))[0, 0].astype(int) - [200, 100, 40, 128]).max() <= 1


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 128, 0), (30, 60, 90, 120), (0, 0, 0, 255)])
def test_cmyk_jpeg_without_profile_is_the_complement_of_its_inks(ink: tuple[int, ...]):
    result = read_image(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
    expected = (255 - np.array(ink[:3])) * (255 - ink[3]) / 255
    assert np.abs(result - expected).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "PA", "P"])
def test_other_modes_of_pillow_are_converted(mode: str):
    picture = np.kron(noise(3, 3), np.ones((4, 4, 1))).astype(np.uint8)
    image = Image.fromarray(picture).convert(mode)
    np.testing.assert_array_equal(read_image(image), np.asarray(image.convert("RGB")))


# --- bit depth


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grayscale_is_rounded(file_format: str):
    values = np.array([[0, 1, 128, 129], [385, 386, 32767, 65534], [65535, 256, 257, 25700]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(encode(values, file_format)), np.dstack([expected] * 3))


def test_big_endian_16_bit_tiff_is_read():
    values = np.array([[0, 257], [65535, 25700]], np.uint16)
    tags = [(256, 2), (257, 2), (258, 16), (259, 1), (262, 1), (273, 122), (277, 1), (278, 2), (279, 8)]
    entries = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    content = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + b"\0" * 4 + values.astype(">u2").tobytes()
    assert len(content) == 122 + 8
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "I;16B"
    np.testing.assert_array_equal(read_image(content)[:, :, 0], [[0, 1], [255, 100]])


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_has_its_upper_8_bits(colour_type: int, channels: int):
    """Pillow reads no more. That is at most one level below the rounded value."""
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    result = read_image(png(samples, colour_type))
    expected = samples if channels > 2 else samples[:, :, [0, 0, 0, 1]]
    np.testing.assert_array_equal(result, expected >> 8)
    assert np.abs(result - expected / 257).max() < 1


def test_32_bit_integers_are_read_if_they_fit_in_16():
    values = np.array([[0, 257], [65535, 25700]], np.int32)
    np.testing.assert_array_equal(read_image(encode(values, "TIFF"))[:, :, 0], [[0, 1], [255, 100]])
    for value in (-1, 65536):
        values[0, 0] = value
        with pytest.raises(ImageError, match=f"a.tif: has values of .*{value}.*expected 16 bits"):
            read_image(encode(values, "TIFF"), "a.tif")


def test_float_tiff_is_0_to_1():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(read_image(encode(values, "TIFF"))[:, :, 2], np.round(values * 255))
    with pytest.raises(ImageError, match=r"a.tif: floats must be in 0..1 \(values 0 to 255\)"):
        read_image(encode(values * 255, "TIFF"), "a.tif")


# --- colour profiles

SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_D50 = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_GAMMA = 563 / 256


def icc_profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """Builds an ICC profile, version 2 (ICC.1:2001-04, section 6)."""
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    d50 = struct.pack(">iii", 63190, 65536, 54061)
    header = struct.pack(">II", 0x02400000, 0)[:4] + kind + space + connection + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    header = b"\0\0\0\0lcms" + header + b"acsp" + b"\0" * 28 + d50
    content = header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(content)) + content[4:]


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *np.round(np.asarray(values) * 65536).astype(int))


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: xyz(column) for name, column in zip(names, primaries.T, strict=True)}
    tags |= {name: gamma_curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return icc_profile(b"RGB ", {b"wtpt": xyz(np.array([0.9642, 1, 0.8249])), **tags})


def gray_profile(gamma: float) -> bytes:
    return icc_profile(b"GRAY", {b"wtpt": xyz(np.array([0.9642, 1, 0.8249])), b"kTRC": gamma_curve(gamma)})


def cmyk_profile() -> bytes:
    """A CMYK profile with a table of two points per ink: strong inks are darker, and black is bluish."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    lightness = 100 * np.prod(1 - inks * [0.3, 0.5, 0.1, 0.9], axis=1)
    a, b = inks @ [-30, 60, 0, 0], inks @ [-40, 0, 70, -20]
    table = np.stack([lightness * 2.55, a + 128, b + 128], -1).clip(0, 255).round().astype(np.uint8)
    identity = struct.pack(">9i", *[65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)])
    curves = np.arange(256, dtype=np.uint8).tobytes()
    content = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + curves * 4 + table.tobytes() + curves * 3
    return icc_profile(b"CMYK", {b"wtpt": xyz(np.array([0.9642, 1, 0.8249])), b"A2B0": content}, b"prtr", b"Lab ")


def srgb_from_linear(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, to 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def reference(image: Image.Image, profile: bytes) -> np.ndarray:
    """Converts with Little CMS through Pillow."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_adobe_rgb_is_converted_to_srgb(file_format: str):
    picture = noise(16, 16)
    profile = rgb_profile(ADOBE_D50, ADOBE_GAMMA)
    result = read_image(encode(picture, file_format, icc_profile=profile, **LOSSLESS[file_format]))
    linear = (picture / 255) ** ADOBE_GAMMA @ (np.linalg.inv(SRGB_D50) @ ADOBE_D50).T
    assert np.abs(result - srgb_from_linear(linear)).max() <= 2
    np.testing.assert_array_equal(result, reference(Image.fromarray(picture), profile))
    assert np.abs(result.astype(int) - picture).max() > 40  # the profile matters


def test_swapped_primaries_swap_the_channels():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    picture = noise(16, 16)
    result = read_image(encode(picture, icc_profile=swapped))
    assert np.abs(result.astype(int) - picture[:, :, [1, 0, 2]]).max() <= 1
    assert np.abs(read_image(encode(picture, icc_profile=srgb)).astype(int) - picture).max() <= 1


def test_colours_without_profile_count_as_srgb():
    """Even if EXIF says that the camera was set to Adobe RGB; browsers ignore that too."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 0xFFFF
    exif.get_ifd(ExifTags.IFD.Interop)[1] = "R03"
    picture = noise(8, 8)
    np.testing.assert_array_equal(read_image(encode(picture, exif=exif)), picture)


def test_profile_leaves_alpha_alone():
    picture, profile = noise(8, 8, 4), rgb_profile(ADOBE_D50, ADOBE_GAMMA)
    result = read_image(encode(picture, icc_profile=profile))
    np.testing.assert_array_equal(result[:, :, 3], picture[:, :, 3])
    np.testing.assert_array_equal(result[:, :, :3], reference(Image.fromarray(picture[:, :, :3]), profile))


@pytest.mark.parametrize("bits", [8, 16])
def test_gray_profile_is_converted(bits: int):
    gray = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(2, axis=0)
    stored = gray if bits == 8 else gray.astype(np.uint16) * 257
    result = read_image(encode(stored, icc_profile=gray_profile(1.8)))
    assert np.abs(result - srgb_from_linear((gray / 255) ** 1.8)[:, :, None]).max() <= 1.5


def test_gray_profile_is_converted_beside_alpha():
    gray, alpha = noise(8, 8)[:, :, 0], noise(8, 8, seed=1)[:, :, 0]
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    result = read_image(encode(image, icc_profile=gray_profile(1.8)))
    assert np.abs(result[:, :, :3] - srgb_from_linear((gray / 255) ** 1.8)[:, :, None]).max() <= 1.5
    np.testing.assert_array_equal(result[:, :, 3], alpha)


def test_rgb_profile_applies_to_gray_and_palette_images():
    profile = rgb_profile(ADOBE_D50, 1.0)
    gray = np.arange(0, 250, 5, dtype=np.uint8)[None].repeat(2, axis=0)
    result = read_image(encode(gray, icc_profile=profile))
    assert np.abs(result - srgb_from_linear(gray / 255)[:, :, None]).max() <= 2
    image = Image.fromarray(noise(8, 8)).quantize(16)
    np.testing.assert_array_equal(
        read_image(encode(image, icc_profile=profile)), reference(image.convert("RGB"), profile)
    )


def test_cmyk_profile_is_converted():
    inks = np.random.default_rng(0).integers(0, 256, (2, 2, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    content = encode(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=cmyk_profile())
    result = read_image(content)
    image = Image.fromarray(inks, "CMYK")
    np.testing.assert_array_equal(result, reference(image, cmyk_profile()))
    assert np.abs(result.astype(int) - np.asarray(image.convert("RGB"))).max() > 30  # the profile matters


@pytest.mark.parametrize(
    "profile", [b"junk", b"\0" * 200, gray_profile(1.0), cmyk_profile(), rgb_profile(ADOBE_D50, 1.0)[:300]]
)
def test_profile_that_is_damaged_or_of_another_colour_model_is_ignored(profile: bytes):
    picture = noise(8, 8)
    np.testing.assert_array_equal(read_image(encode(picture, icc_profile=profile)), picture)


def test_rgb_profile_of_a_cmyk_image_is_ignored():
    image = Image.new("CMYK", (8, 8), (10, 200, 30, 40))
    expected = read_image(encode(image, "TIFF"))
    np.testing.assert_array_equal(read_image(encode(image, "TIFF", icc_profile=rgb_profile(SRGB_D50, 1.0))), expected)


# --- what is refused


@pytest.mark.parametrize("file_format", ANIMATED)
def test_animations_and_pages_are_refused(file_format: str):
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in range(3)]
    content = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"is an animation or has several pages; give a still image") as error:
        read_image(content, "film")
    assert_one_line(error, "film")


def test_pil_image_gives_its_current_frame():
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
    with Image.open(io.BytesIO(encode(frames[0], "PNG", save_all=True, append_images=frames[1:]))) as image:
        image.seek(2)
        np.testing.assert_array_equal(read_image(image), np.asarray(frames[2]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(12_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    with pytest.raises(ImageError, match=r"100 million.*scale it down") as error:
        read_image(content, "bomb.png")
    assert_one_line(error, "bomb.png")


def test_bomb_in_a_text_chunk_is_refused():
    text = (b"zTXt", b"comment\0\0" + zlib.compress(b"\0" * 2**21))
    with pytest.raises(ImageError, match=r"a.png: is damaged") as error:
        read_image(png(np.zeros((4, 4, 3), np.uint16), 2, text), "a.png")
    assert_one_line(error, "a.png")


def test_large_arrays_and_pil_images_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    for source in (noise(6, 8), Image.fromarray(noise(6, 8)), encode(noise(6, 8))):
        with pytest.raises(ImageError, match=r"start: has 8x6 pixels; the limit is 4.7e-05 million, scale it down"):
            read_image(source, "start")
    monkeypatch.setattr(images, "MAX_PIXELS", 48)
    assert read_image(noise(6, 8)).shape == (6, 8, 3)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_images_of_one_row_or_column_are_refused(shape: tuple[int, int]):
    picture = noise(*shape)
    for source in (picture, Image.fromarray(picture), encode(picture)):
        with pytest.raises(ImageError, match=f"has {shape[1]}x{shape[0]} pixels; at least 2x2 are needed"):
            read_image(source)
    assert read_image(noise(2, 2)).shape == (2, 2, 3)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM"])
def test_truncated_files_are_refused(file_format: str, kept: float, tmp_path: Path):
    content = encode(noise(64, 64), file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ImageError, match=r"is damaged and cannot be decoded|is not an image that can be read") as error:
        read_image(path)
    assert_one_line(error, str(path))


def test_truncated_file_that_pillow_opened_lazily_is_refused():
    content = encode(noise(64, 64))
    with Image.open(io.BytesIO(content[: len(content) // 2])) as image, pytest.raises(ImageError) as error:
        read_image(image, "start")
    assert_one_line(error, "start")
    with pytest.raises(ImageError, match=r"start: is damaged"):
        read_image(image, "start")  # closed


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"a text\n", b"<svg></svg>", b"\0" * 4096])
def test_files_that_are_no_images_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    remedy = "is not an image that can be read; convert it to one of PNG, JPEG, WEBP, TIFF, BMP, GIF, AVIF"
    with pytest.raises(ImageError, match=remedy) as error:
        read_image(path)
    assert_one_line(error, str(path))


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f\x01", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)
def test_formats_of_phones_that_pillow_lacks_are_named(header: bytes, kind: str):
    with pytest.raises(ImageError, match=f"^photo: {kind} is not supported; convert it to one of PNG, JPEG"):
        read_image(header + b"\0" * 100, "photo")


def test_paths_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path, reason in [
        (tmp_path / "missing.png", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        for source in (path, str(path)):
            with pytest.raises(ImageError, match=f"cannot be read: {reason}$") as error:
                read_image(source, "start")
            assert_one_line(error, str(path))
    with pytest.raises(ImageError, match=r"null byte"):
        read_image("a\0b.png")
    path = tmp_path / "secret.png"
    path.write_bytes(encode(noise(4, 4)))

    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(ImageError, match=r"secret.png: cannot be read: Permission denied$"):
        read_image(path)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "a.png: does not fit in memory; scale it down"),
        (ValueError("bad\n  chunk"), "a.png: is damaged and cannot be decoded: bad chunk"),
        (EOFError(), "a.png: is damaged and cannot be decoded: EOFError"),
        (OSError(5, "Input/output error"), "a.png: cannot be read: Input/output error"),
        (OSError("broken data stream"), "a.png: is damaged and cannot be decoded: broken data stream"),
    ],
)
def test_any_error_of_a_decoder_becomes_one_line(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    def fail(_image):
        raise raised

    content = encode(noise(4, 4))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match=f"^{re.escape(message)}$") as error:
        read_image(content, "a.png")
    assert error.value.__cause__ is raised


# --- damaged files


def seeds() -> dict[str, bytes]:
    """Files of every format, with metadata that is parsed too."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "a picture"
    metadata = {"exif": exif, "icc_profile": rgb_profile(ADOBE_D50, ADOBE_GAMMA)}
    picture, transparent = Image.fromarray(noise(24, 32)), Image.fromarray(noise(24, 32, 4))
    return {
        "png": encode(transparent, "PNG", **metadata),
        "palette": encode(picture.quantize(16), "PNG", transparency=3, **metadata),
        "png16": png(np.random.default_rng(0).integers(0, 65536, (24, 32, 3)).astype(np.uint16), 2),
        "jpeg": encode(picture, "JPEG", **metadata),
        "progressive": encode(picture.convert("L"), "JPEG", progressive=True, icc_profile=gray_profile(2.0)),
        "cmyk": encode(picture.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
        "webp": encode(transparent, "WEBP", **metadata),
        "gif": encode(picture, "GIF"),
        "tiff": encode(picture, "TIFF", **metadata),
        "deflate": encode(transparent, "TIFF", compression="tiff_deflate"),
        "tiff16": encode(noise(24, 32)[:, :, 0].astype(np.uint16), "TIFF"),
        "bmp": encode(picture, "BMP"),
        "ppm": encode(picture, "PPM"),
        "avif": encode(transparent, "AVIF", speed=10, **metadata),
    }


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Damages a file in one to four places, mostly near its beginning, where its structure is."""
    damaged = bytearray(content)
    for _ in range(random.integers(1, 5)):
        length = len(damaged)
        place = int(length * random.random() ** random.integers(1, 4))
        match random.integers(5):
            case 0:
                damaged[place : place + 1] = random.bytes(1)
            case 1:
                damaged[place : place + 4] = random.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            case 2:
                damaged[place:place] = random.bytes(int(random.integers(1, 9)))
            case 3:
                del damaged[place : place + int(random.integers(1, 9))]
            case 4:
                del damaged[max(16, place) :]
    return bytes(damaged)


def repair_png(content: bytes) -> bytes:
    """Corrects the checksums of a PNG file, which would hide other damage."""
    repaired, position = bytearray(content[:8]), 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind, body = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        repaired += png_chunk(kind, body)
        position += 12 + length
    return bytes(repaired)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", list(seeds()))
def test_any_bytes_give_an_image_or_one_clear_line(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    content, random = seeds()[kind], np.random.default_rng(sum(kind.encode()))
    assert read_image(content).shape[:2] in {(24, 32), (32, 24)}
    refused = 0
    for _ in range(60):
        damaged = mutate(content, random)
        if kind in ("png", "palette", "png16") and random.random() < 0.7:
            damaged = repair_png(damaged)
        try:
            result = read_image(damaged, "upload")
        except ImageError as error:
            refused += 1
            message = str(error)
            assert message.startswith("upload: ")
            assert "\n" not in message
        else:
            assert result.dtype == np.uint8
            assert result.ndim == 3
            assert result.shape[2] in (3, 4)
    assert refused >= 10


# --- arrays and tensors


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "uint16", ">u2", "uint8", "bool"])
def test_arrays_of_every_supported_dtype(dtype: str):
    levels = noise(5, 7)
    if dtype == "bool":
        array, expected = levels > 99, (levels > 99) * np.uint8(255)
    elif np.dtype(dtype).kind == "f":
        array, expected = (levels / 255).astype(dtype), levels
    else:
        array, expected = (levels.astype(int) * (257 if np.dtype(dtype).itemsize == 2 else 1)).astype(dtype), levels
    np.testing.assert_array_equal(read_image(array), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "uint8", "uint16", "bool"])
def test_tensors_of_every_supported_dtype(dtype: str):
    levels = torch.from_numpy(noise(5, 7)).permute(2, 0, 1)
    target = getattr(torch, dtype)
    if dtype == "bool":
        tensor, expected = levels > 99, (levels > 99).to(torch.uint8) * 255
    elif target.is_floating_point:
        tensor, expected = (levels / 255).to(target), levels
    else:
        tensor, expected = (levels.int() * (257 if dtype == "uint16" else 1)).to(target), levels
    result = read_image(tensor)
    tolerance = 1 if dtype == "bfloat16" else 0  # of 8 bits of precision
    assert np.abs(result.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= tolerance


def test_uint16_is_rounded_to_the_nearest_level():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(read_image(values)[:, :, 0], np.round(values / 257))


def test_floats_are_rounded_to_the_nearest_level_and_may_leave_0_to_1_by_rounding():
    values = np.array([[0.1, 0.9999], [0.00196, 0.00197]])
    np.testing.assert_array_equal(read_image(values)[:, :, 0], [[26, 255], [0, 1]])
    np.testing.assert_array_equal(read_image(np.array([[-1e-7, 1 + 1e-7]] * 2))[:, :, 0], [[0, 255]] * 2)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint32", "complex64", "<U3"])
def test_other_dtypes_are_refused(dtype: str):
    with pytest.raises(ImageError, match=r"start: has dtype .*; expected uint8, uint16 or floats in 0..1"):
        read_image(np.zeros((4, 4, 3), dtype), "start")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "has pixels that are NaN or infinite"),
        (np.inf, "has pixels that are NaN or infinite"),
        (-0.1, r"floats must be in 0..1 \(values -0.1 to 0\)"),
        (255.0, r"floats must be in 0..1 \(values 0 to 255\)"),
    ],
)
def test_floats_outside_0_to_1_are_refused(value: float, message: str):
    array = np.zeros((4, 4, 3), np.float32)
    array[1, 2, 0] = value
    for source in (array, torch.from_numpy(array)):
        with pytest.raises(ImageError, match=f"^start: {message}"):
            read_image(source, "start")


@pytest.mark.parametrize("shape", [(), (4,), (6, 6, 2), (2, 6, 6), (5, 6, 7), (1, 4, 4, 3), (0, 0, 0)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]):
    for source in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ImageError, match=re.escape(f"start: has shape {shape}; expected")) as error:
            read_image(source, "start")
        assert_one_line(error, "start")


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (3, 0, 4), (0, 4)])
def test_empty_arrays_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ImageError, match=r"at least 2x2 are needed"):
        read_image(np.zeros(shape, np.float32))


@pytest.mark.parametrize("source", [None, object(), {"a": 1}, [[1, 2], [3]], lambda: 1])
def test_other_objects_are_refused(source: object):
    with pytest.raises(ImageError, match=r"^start: (has type|cannot be converted)") as error:
        read_image(source, "start")
    assert_one_line(error, "start")


def test_channels_come_last_where_both_are_possible():
    """A picture that is 3 pixels high, and one that is 3 wide with channels first."""
    high = noise(3, 40)
    np.testing.assert_array_equal(read_image(high), high)
    np.testing.assert_array_equal(read_image(high.transpose(2, 0, 1)), high)  # [3, 3, 40]
    wide = noise(40, 3)
    np.testing.assert_array_equal(read_image(wide.transpose(2, 0, 1)), wide.transpose(2, 0, 1))  # [3, 40, 3] as stored
    rgba = noise(40, 50, 4)
    np.testing.assert_array_equal(read_image(rgba.transpose(2, 0, 1)), rgba)
    gray = noise(40, 50, 1)
    np.testing.assert_array_equal(read_image(gray.transpose(2, 0, 1)), gray.repeat(3, axis=2))


def test_views_and_tensors_with_gradients_are_read():
    array = noise(12, 16)
    np.testing.assert_array_equal(read_image(array[::-2, 3:9]), array[::-2, 3:9])
    np.testing.assert_array_equal(read_image(np.asfortranarray(array)), array)
    floats = torch.from_numpy(array / 255).requires_grad_()
    np.testing.assert_array_equal(read_image(floats), array)
    np.testing.assert_array_equal(read_image(floats.transpose(0, 1)[2:]), array.swapaxes(0, 1)[2:])
    np.testing.assert_array_equal(read_image(torch.from_numpy(array)._neg_view()._neg_view()), array)


def test_tensor_without_data_is_refused():
    with pytest.raises(ImageError, match=r"start: cannot be converted to an array: .*meta") as error:
        read_image(torch.zeros(4, 4, 3, device="meta"), "start")
    assert_one_line(error, "start")


# --- sizes


def test_images_of_equal_size_stay_as_they_are():
    start, end = noise(6, 8), noise(6, 8, seed=1)
    for fit in ("crop", "pad", "stretch"):
        matched = match_sizes(start, end, fit)
        assert matched[0] is start
        assert matched[1] is end


def test_crop_keeps_the_middle_and_pad_adds_black_bars():
    middle = noise(20, 20)
    wide = np.concatenate([noise(20, 10, seed=1), middle, noise(20, 10, seed=2)], axis=1)
    np.testing.assert_array_equal(match_sizes(middle, wide, "crop")[1], middle)
    np.testing.assert_array_equal(match_sizes(middle, wide.swapaxes(0, 1), "crop")[1], middle.swapaxes(0, 1))
    flat = noise(10, 20)
    padded = match_sizes(middle, flat, "pad")[1]
    np.testing.assert_array_equal(padded[5:15], flat)
    assert not padded[:5].any()
    assert not padded[15:].any()


@pytest.mark.parametrize("size", [(40, 64), (17, 23), (9, 90)])
def test_fits_are_those_of_pillow(size: tuple[int, int]):
    start, end = noise(24, 30), noise(*size)
    image, lanczos = Image.fromarray(end), Image.Resampling.LANCZOS
    expected = {
        "crop": ImageOps.fit(image, (30, 24), lanczos),
        "pad": ImageOps.pad(image, (30, 24), lanczos),
        "stretch": image.resize((30, 24), lanczos),
    }
    for fit, scaled in expected.items():
        np.testing.assert_array_equal(match_sizes(start, end, fit)[1], np.asarray(scaled))
    results = [np.asarray(scaled) for scaled in expected.values()]
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[1], results[2])


def test_rounding_of_the_size_is_no_other_shape():
    start, end = noise(200, 300), noise(101, 150)
    expected = np.asarray(Image.fromarray(end).resize((300, 200), Image.Resampling.LANCZOS))
    for fit in ("crop", "pad", "stretch"):
        np.testing.assert_array_equal(match_sizes(start, end, fit)[1], expected)


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_extreme_shapes_are_fitted(fit: str, size: tuple[int, int]):
    assert match_sizes(noise(20, 30), noise(*size), fit)[1].shape == (20, 30, 3)
    assert match_sizes(noise(*size), noise(20, 30), fit)[1].shape == (*size, 3)


def test_both_images_get_alpha_if_one_has_it():
    opaque, transparent = noise(6, 8), noise(6, 8, 4)
    for start, end in ((opaque, transparent), (transparent, opaque)):
        matched = match_sizes(start, end)
        for image, source in zip(matched, (start, end), strict=True):
            np.testing.assert_array_equal(image[:, :, :3], source[:, :, :3])
            np.testing.assert_array_equal(image[:, :, 3], source[:, :, 3] if source.shape[2] == 4 else 255)


def test_hidden_colour_does_not_bleed_when_transparency_is_scaled():
    end = np.zeros((20, 20, 4), np.uint8)
    end[:, :10] = (255, 0, 0, 0)  # red, but transparent
    end[:, 10:] = (0, 0, 255, 255)
    scaled = match_sizes(noise(9, 9, 4), end)[1]
    visible = scaled[:, :, 3] > 10
    assert visible.any()
    assert scaled[visible][:, 0].max() <= 1
    padded = match_sizes(noise(9, 27, 4), end, "pad")[1]
    assert not padded[:, :9].any()  # transparent


def test_scaled_end_is_writable():
    assert match_sizes(noise(6, 8), noise(12, 16))[1].flags.writeable


def test_unknown_fit_is_refused():
    with pytest.raises(InputError, match=r"^fit: must be one of crop, pad, stretch \(value 'cut'\)$"):
        match_sizes(noise(4, 4), noise(4, 4), "cut")  # type: ignore[arg-type]


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_is_composited_on_the_background(background: tuple[int, int, int]):
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 4)).astype(np.uint8)
    frames[0, 0, :2, 3] = 0, 255
    alpha = frames[..., 3:] / 255
    expected = frames[..., :3] * alpha + np.array(background) * (1 - alpha)
    flattened = flatten_alpha(frames, background)
    assert np.abs(flattened - expected).max() <= 0.501
    np.testing.assert_array_equal(flattened[0, 0, 0], background)
    np.testing.assert_array_equal(flattened[0, 0, 1], frames[0, 0, 1, :3])
    opaque = frames[..., :3]
    assert flatten_alpha(opaque) is opaque
