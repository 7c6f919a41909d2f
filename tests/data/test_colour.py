"""Decoded colours and geometry match closed forms and FFmpeg's own filters."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.decode import RejectedVideo, sample_clip
from tests.data.boxes import insert_box, make_box, make_element, overwrite_body
from tests.data.corpus import AVC1

# Luma weights of red and blue: ITU-R BT.601, BT.709 and BT.2020.
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
YUV_COLOURS = [(150, 90, 170), (81, 90, 240), (145, 54, 34), (41, 240, 110), (200, 128, 128), (60, 140, 120)]
X264_NAMES = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc"}
LOSSLESS = {"crf": "0", "preset": "ultrafast"}


def yuv_to_rgb(yuv: Iterable[float], matrix: str = "bt601", full: bool = False, bits: int = 8) -> np.ndarray:
    """float64 [3]: converts by definition, R' = Y' + 2 (1 - Kr) Cr etc., and clips to 0..255."""
    unit = 2 ** (bits - 8)
    luma, blue, red = (value / unit for value in yuv)
    luma = luma / 255 if full else (luma - 16) / 219
    blue, red = ((value - 128) / (255 if full else 224) for value in (blue, red))
    red_weight, blue_weight = WEIGHTS[matrix]
    r, b = luma + 2 * (1 - red_weight) * red, luma + 2 * (1 - blue_weight) * blue
    g = (luma - red_weight * r - blue_weight * b) / (1 - red_weight - blue_weight)
    return np.clip(255 * np.array([r, g, b]), 0, 255)


def make_flat_frame(
    yuv: tuple[int, int, int], pixels: str = "yuv420p", width: int = 64, height: int = 48
) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, pixels)
    for plane, value in zip(frame.planes, yuv, strict=True):
        sample = value.to_bytes(2, "little") if frame.format.components[0].bits > 8 else bytes([value])
        plane.update(sample * (plane.buffer_size // len(sample)))
    return frame


def encode_frames(
    frames: list[av.VideoFrame],
    kind: str = "mp4",
    codec: str = "libx264",
    pixel_aspect: Fraction | None = None,
    **options: str,
) -> bytes:
    """Encodes the frames without converting their pixel format."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        if pixel_aspect is not None:
            stream.sample_aspect_ratio = pixel_aspect
        for number, frame in enumerate(frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def encode_picture(
    picture: np.ndarray, pixels: str = "yuv444p", kind: str = "matroska", codec: str = "ffv1", **options
) -> bytes:
    """Encodes three equal frames, uint8 [height, width, 3 or 4], lossless except for the conversion to YCbCr."""
    source = "rgb24" if picture.shape[2] == 3 else "rgba"
    frames = [av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pixels) for _ in range(3)]
    return encode_frames(frames, kind, codec, **options)


def decode(video: bytes, height: int, width: int, fit: str = "stretch") -> np.ndarray:
    """Decodes the second frame: float64 [height, width, 3]."""
    clip = ClipConfig(frames=3, height=height, width=width, fit=fit)  # type: ignore[arg-type]
    return sample_clip(video, clip).clip[1].astype(np.float64)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: three gradients that distinguish left from right and top from bottom."""
    across, down = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    planes = (across + 0 * down, 0 * across + down, 255 - (across + down) / 2)
    return np.stack(planes, axis=2).round().astype(np.uint8)


def box_average(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [height, width, channels]: each output pixel is the mean of the area that it covers."""

    def area_weights(source: int, size: int) -> np.ndarray:
        edges = np.arange(size + 1) * source / size
        low = np.maximum(edges[:-1, None], np.arange(source)[None, :])
        high = np.minimum(edges[1:, None], np.arange(source)[None, :] + 1)
        return np.maximum(high - low, 0) * size / source

    rows, columns = area_weights(picture.shape[0], height), area_weights(picture.shape[1], width)
    return np.einsum("ri,ijc,sj->rsc", rows, picture.astype(np.float64), columns, optimize=True)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first - second) ** 2)))


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_tagged_colours_match_their_standard(matrix: str, full: bool):
    tags = f"colormatrix={X264_NAMES[matrix]}:fullrange={'on' if full else 'off'}"
    for yuv in YUV_COLOURS:
        video = encode_frames([make_flat_frame(yuv) for _ in range(3)], **LOSSLESS, **{"x264-params": tags})
        assert np.abs(decode(video, 16, 16) - yuv_to_rgb(yuv, matrix, full)).max() <= 2, yuv


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_untagged_colours_are_bt601_limited_range_as_in_ffmpeg(size: tuple[int, int]):
    """Independently of the frame size."""
    height, width = size
    for yuv in YUV_COLOURS[:2]:
        video = encode_frames([make_flat_frame(yuv, width=width, height=height) for _ in range(3)], **LOSSLESS)
        assert np.abs(decode(video, 16, 16) - yuv_to_rgb(yuv)).max() <= 2
        assert np.abs(decode(video, 16, 16) - scale_with_ffmpeg(video, 16, 16)).max() <= 1


@pytest.mark.parametrize("tags", ["", "colormatrix=bt709:fullrange=off", "colormatrix=smpte170m:fullrange=on"])
def test_scaling_matches_ffmpegs_scale_filter(tags: str):
    # Full-size chroma, because the filter ignores the chroma position that the codec states.
    noise = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    frames = [av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format="yuv444p") for _ in range(3)]
    video = encode_frames(frames, **LOSSLESS, **({"x264-params": tags} if tags else {}))
    for height, width in ((64, 64), (50, 70)):
        assert np.abs(decode(video, height, width) - scale_with_ffmpeg(video, height, width)).max() <= 1


def scale_with_ffmpeg(video: bytes, height: int, width: int) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        stream, graph = container.streams.video[0], Graph()
        steps = [
            graph.add_buffer(template=stream),
            graph.add("scale", f"{width}:{height}:flags=area+accurate_rnd+full_chroma_int"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*steps).configure()
        graph.vpush(next(container.decode(stream)))
        return graph.vpull().to_ndarray().astype(np.float64)


# Position of the 4:2:0 chroma samples in pixels right of and below the first pixel's centre, and x264's number for it.
CHROMA_LOCATIONS = {"left": (0, 0.5, 0), "center": (0.5, 0.5, 1), "topleft": (0, 0, 2), "untagged": (0, 0.5, None)}


def saturated_picture() -> np.ndarray:
    """uint8 [256, 256, 3]: 8-pixel blocks of saturated colours, not aligned to the 4:2:0 grid.

    The saturation is limited so that interpolated chroma stays within RGB; a conversion at full size would clip it.
    """
    colours = 90 + 76 * np.array([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)])
    blocks = colours[np.random.default_rng(0).integers(0, 8, (33, 33))].repeat(8, axis=0).repeat(8, axis=1)
    return blocks[3:259, 5:261].astype(np.uint8)


def subsample_chroma(picture: np.ndarray, across: float, down: float) -> av.VideoFrame:
    """Converts to BT.601 limited range, 4:2:0.

    A chroma sample averages the two pixels beside it, or the pixel at its position and half of each neighbour.
    """

    def halve(plane: np.ndarray, position: float) -> np.ndarray:
        if position:
            return (plane[::2] + plane[1::2]) / 2
        padded = np.pad(plane, ((1, 0), (0, 0)), mode="edge")
        return (padded[:-1:2] + 2 * padded[1::2] + np.roll(plane, -1, axis=0)[::2]) / 4

    red, green, blue = np.moveaxis(picture / 255, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [16 + 219 * luma]
    for colour, weight in ((blue, 0.114), (red, 0.299)):
        chroma = 128 + 224 * (colour - luma) / (2 * (1 - weight))
        planes.append(halve(halve(chroma, down).T, across).T)
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], "yuv420p")
    for plane, levels in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = levels.round()
        plane.update(rows.tobytes())
    return frame


def yuv_image_to_rgb(yuv: np.ndarray) -> np.ndarray:
    return np.stack([yuv_to_rgb(pixel) for pixel in yuv.reshape(-1, 3)]).reshape(yuv.shape)


def encode_with_chroma(location: str, tag: str) -> bytes:
    across, down, _ = CHROMA_LOCATIONS[location]
    number = CHROMA_LOCATIONS[tag][2]
    frames = [subsample_chroma(saturated_picture(), across, down) for _ in range(3)]
    return encode_frames(frames, **LOSSLESS, **({} if number is None else {"x264-params": f"chromaloc={number}"}))


@pytest.mark.parametrize("location", CHROMA_LOCATIONS)
def test_chroma_is_read_at_its_tagged_location(location: str):
    """With the right tag, the area average equals that of the source. Filtering rows and columns (topleft) loses more
    than filtering columns alone.
    """
    truth = box_average(saturated_picture(), 64, 64)
    psnr_by_tag = {tag: psnr(decode(encode_with_chroma(location, tag), 64, 64), truth) for tag in CHROMA_LOCATIONS}
    assert psnr_by_tag[location] > (44 if location == "topleft" else 53)
    position = CHROMA_LOCATIONS[location][:2]
    other_tags = [db for tag, db in psnr_by_tag.items() if CHROMA_LOCATIONS[tag][:2] != position]
    assert max(other_tags) < psnr_by_tag[location] - 3


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg command; the test before does not")
@pytest.mark.parametrize("location", CHROMA_LOCATIONS)
def test_chroma_location_matches_ffmpegs_with_explicit_position(location: str):
    """Converts at full size and averages. Without an explicit position ffmpeg assumes centred chroma."""
    video = encode_with_chroma(location, location)
    across, down, _ = CHROMA_LOCATIONS[location]
    position = f"in_h_chr_pos={round(256 * across)}:in_v_chr_pos={round(256 * down)}"
    full = f"scale={position}:flags=accurate_rnd+full_chroma_inp+bicubic,format=yuv444p"
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(video)
        command = ["ffmpeg", "-v", "error", "-i", file.name, "-vf", full, "-frames:v", "1", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
    yuv = np.moveaxis(np.frombuffer(raw, np.uint8).reshape(3, 256, 256), 0, 2)
    assert psnr(decode(video, 64, 64), yuv_image_to_rgb(box_average(yuv, 64, 64))) > 45


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", LOSSLESS),
        ("mp4", "libx265", {"x265-params": "lossless=1:log-level=none"}),
        ("matroska", "ffv1", {}),
    ],
)
def test_ten_bit_colours(kind: str, codec: str, options: dict[str, str]):
    yuv = (601, 362, 683)
    video = encode_frames([make_flat_frame(yuv, "yuv420p10le") for _ in range(3)], kind, codec, **options)
    assert np.abs(decode(video, 16, 16) - yuv_to_rgb(yuv, bits=10)).max() <= 2


def test_ten_bit_full_range():
    """Unlike with 8 bits, only a tag states the range; there is no pixel format for it."""
    yuv = (601, 362, 683)
    video = encode_frames(
        [make_flat_frame(yuv, "yuv420p10le") for _ in range(3)], **LOSSLESS, **{"x264-params": "fullrange=on"}
    )
    assert np.abs(decode(video, 16, 16) - yuv_to_rgb(yuv, full=True, bits=10)).max() <= 2


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("webm", "libvpx-vp9", "yuva420p"),
    ],
)
@pytest.mark.parametrize("alpha", [0, 60, 255])
def test_alpha_is_dropped_without_changing_colours(kind: str, codec: str, pixels: str, alpha: int):
    picture = np.full((48, 64, 4), [200, 100, 50, alpha], np.uint8)
    assert np.abs(decode(encode_picture(picture, pixels, kind, codec), 16, 16) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p"])
def test_odd_sizes_are_scaled(pixels: str):
    picture = smooth_picture(47, 63)
    assert psnr(decode(encode_picture(picture, pixels), 16, 24), box_average(picture, 16, 24)) > (
        45 if "444" in pixels else 40
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 80), (50, 50), (33, 64)])
def test_downscaling_averages_the_covered_area(height: int, width: int):
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    error = psnr(decode(encode_picture(noise), height, width), box_average(noise, height, width))
    assert error > 40
    nearest = noise[(np.arange(height) * 120) // height][:, (np.arange(width) * 160) // width]
    assert error > psnr(nearest.astype(float), box_average(noise, height, width)) + 20


# (a, b, c, d) of the tkhd matrix, x' = a x + c y and y' = b x + d y with y down, and the same transform of an array.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), lambda picture: picture),
    "clockwise": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "half turn": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "counterclockwise": ((0, -1, 1, 0), np.rot90),
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "transposed": ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
    "transposed along the other diagonal": ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_frames_are_rotated_upright(orientation: str):
    (a, b, c, d), transform = ORIENTATIONS[orientation]
    picture = smooth_picture(48, 96)
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    video = overwrite_body(
        encode_picture(picture, "yuv444p", "mp4", "libx264", **LOSSLESS), "moov/trak/tkhd", 40, matrix
    )
    upright = transform(picture)
    height, width = upright.shape[0] // 3, upright.shape[1] // 3
    assert psnr(decode(video, height, width), box_average(upright, height, width)) > 45
    # `fit` applies to the upright frame: it crops the sides of 96x48, and top and bottom of 48x96.
    middle = upright[upright.shape[0] // 2 - 24 :][:48, upright.shape[1] // 2 - 24 :][:, :48]
    assert psnr(decode(video, 16, 16, "crop"), box_average(middle, 16, 16)) > 45


def test_interlaced_fields_are_averaged_together():
    """An interlaced frame whose every other line is white becomes grey when scaled down, not striped."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2] = 255
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p") for _ in range(3)]
    video = encode_frames(frames, **LOSSLESS, **{"x264-params": "interlaced=1:tff=1"})
    with av.open(io.BytesIO(video)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert np.abs(decode(video, 16, 16) - 127.5).max() <= 2
    tags = {"x264-params": "interlaced=1:tff=1:colormatrix=bt709:fullrange=on"}
    for yuv in YUV_COLOURS:
        video = encode_frames([make_flat_frame(yuv) for _ in range(3)], **LOSSLESS, **tags)
        assert np.abs(decode(video, 16, 16) - yuv_to_rgb(yuv, "bt709", full=True)).max() <= 2


def test_crop_is_centred():
    picture = smooth_picture(48, 144)
    assert psnr(decode(encode_picture(picture), 16, 16, "crop"), box_average(picture[:, 48:96], 16, 16)) > 45
    tall = smooth_picture(144, 48)
    assert psnr(decode(encode_picture(tall), 16, 16, "crop"), box_average(tall[48:96], 16, 16)) > 45


def test_padding_is_centred_and_black():
    white = np.full((48, 96, 3), 255, np.uint8)
    padded = decode(encode_picture(white), 32, 32, "pad")
    assert not padded[:8].any() and not padded[24:].any()
    assert (padded[8:24] >= 253).all()
    odd = decode(encode_picture(white), 31, 32, "pad")  # 16 rows of content: 7 of padding above and 8 below
    assert np.flatnonzero(odd.any(axis=(1, 2))).tolist() == list(range(7, 23))
    tall = decode(encode_picture(white.swapaxes(0, 1).copy()), 32, 32, "pad")
    assert np.flatnonzero(tall.any(axis=(0, 2))).tolist() == list(range(8, 24))
    picture = smooth_picture(48, 96)
    assert psnr(decode(encode_picture(picture), 32, 32, "pad")[8:24], box_average(picture, 16, 32)) > 45


def test_stretch_keeps_the_whole_frame():
    picture = smooth_picture(48, 96)
    assert psnr(decode(encode_picture(picture), 16, 16), box_average(picture, 16, 16)) > 45


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [("mp4", "libx264", "yuv444p"), ("matroska", "libx264", "yuv444p"), ("mov", "png", "rgb24")],
)
def test_non_square_pixels_are_corrected(kind: str, codec: str, pixels: str):
    """48x48 pixels that are twice as wide as high display as 96x48."""
    picture = smooth_picture(48, 48)
    options = LOSSLESS if codec == "libx264" else {}
    video = encode_picture(picture, pixels, kind, codec, pixel_aspect=Fraction(2), **options)
    assert psnr(decode(video, 16, 16, "crop"), box_average(picture[:, 12:36], 16, 16)) > 45
    padded = decode(video, 32, 32, "pad")
    assert psnr(padded[8:24], box_average(picture, 16, 32)) > 45
    assert not padded[:8].any() and not padded[24:].any()
    assert psnr(decode(video, 16, 16), box_average(picture, 16, 16)) > 45


def test_implausible_pixel_aspect_counts_as_square():
    picture = smooth_picture(48, 48)
    video = encode_picture(picture, "yuv444p", "mp4", "libx264", pixel_aspect=Fraction(2), **LOSSLESS)
    video = overwrite_body(video, f"{AVC1}/pasp", 0, struct.pack(">II", 1000, 1))
    assert psnr(decode(video, 16, 16, "crop"), box_average(picture, 16, 16)) > 45


def test_frame_that_cropping_would_enlarge_beyond_the_limit_is_rejected():
    sliver = encode_picture(smooth_picture(2, 4000))
    clip = ClipConfig(frames=3, height=64, width=64, fit="crop")
    with pytest.raises(RejectedVideo, match="too_large: 4000x2, scaled to 128000x64 for"):
        sample_clip(sliver, clip, LimitsConfig(pixels=1_000_000))


def make_number(name: str, value: int) -> bytes:
    """Builds an mkv element that holds an unsigned integer."""
    return make_element(name, value.to_bytes(4, "big"))


def encode_matroska(picture: np.ndarray, *settings: bytes) -> bytes:
    """Encodes three equal frames with FFV1, with additional elements in the track's video settings."""
    with av.open(io.BytesIO(encode_picture(picture))) as container:
        private = container.streams.video[0].codec_context.extradata or b""
        frames = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    size = make_number("b0", picture.shape[1]) + make_number("ba", picture.shape[0])
    track = make_number("d7", 1) + make_number("73c5", 1) + make_number("83", 1) + make_element("86", b"V_FFV1")
    track = make_element("ae", track, make_element("63a2", private), make_element("e0", size, *settings))
    blocks = [
        make_element("a3", b"\x81" + struct.pack(">h", 100 * i) + b"\x80" + frame) for i, frame in enumerate(frames)
    ]
    head = make_element("1a45dfa3", make_element("4282", b"matroska"))
    info = make_element("1549a966", make_number("2ad7b1", 1_000_000))
    return head + make_element(
        "18538067", info, make_element("1654ae6b", track), make_element("1f43b675", make_number("e7", 0), *blocks)
    )


CROPS = {"left": "54cc", "right": "54dd", "top": "54bb", "bottom": "54aa"}


def encode_cropped(picture: np.ndarray, **sides: int) -> bytes:
    return encode_matroska(picture, *(make_number(CROPS[side], pixels) for side, pixels in sides.items()))


@pytest.mark.parametrize("sides", [{"left": 12, "right": 24}, {"top": 9, "bottom": 3}, {"left": 5, "bottom": 7}])
def test_matroska_crop_is_applied(sides: dict[str, int]):
    picture = smooth_picture(48, 96)
    height, width = picture.shape[:2]
    inner = picture[sides.get("top", 0) : height - sides.get("bottom", 0)]
    inner = inner[:, sides.get("left", 0) : width - sides.get("right", 0)]
    assert psnr(decode(encode_cropped(picture, **sides), 16, 16), box_average(inner, 16, 16)) > 45


def test_crop_keeps_the_pixel_aspect():
    picture = smooth_picture(48, 96)
    video = encode_cropped(picture, left=24, right=24)
    for fit in ("stretch", "crop", "pad"):
        assert psnr(decode(video, 16, 16, fit), box_average(picture[:, 24:72], 16, 16)) > 45


@pytest.mark.parametrize("sides", [{"left": 96}, {"left": 50, "right": 50}, {"top": 2**32 - 1}])
def test_crop_that_leaves_nothing_is_rejected(sides: dict[str, int]):
    with pytest.raises(RejectedVideo, match="not_video"):  # by FFmpeg itself
        decode(encode_cropped(smooth_picture(48, 96), **sides), 16, 16)


def make_clean_aperture(width: int, height: int, right: int, down: int) -> bytes:
    return make_box("clap", struct.pack(">IIIIiIiI", width, 1, height, 1, right, 2, down, 2))


def test_mp4_clean_aperture_is_applied():
    picture = smooth_picture(48, 96)
    whole = encode_picture(picture, "yuv444p", "mp4", "libx264", **LOSSLESS)
    # 64x40, with the centre 5 pixels right of the frame's centre and 2 below it.
    video = insert_box(whole, f"{AVC1}/avcC", make_clean_aperture(64, 40, 10, 4))
    inner = picture[6:46, 21:85]
    assert psnr(decode(video, 16, 16), box_average(inner, 16, 16)) > 45
    turned = overwrite_body(
        video, "moov/trak/tkhd", 40, struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    )
    assert psnr(decode(turned, 16, 16), box_average(np.rot90(inner, -1), 16, 16)) > 45
    for invalid in (make_clean_aperture(0, 40, 0, 0), make_clean_aperture(200, 40, 0, 0), make_box("clap", bytes(32))):
        ignored = insert_box(whole, f"{AVC1}/avcC", invalid)
        assert psnr(decode(ignored, 16, 16), box_average(picture, 16, 16)) > 45
