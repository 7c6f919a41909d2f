"""Colour and form of decoded pictures, against closed forms and against FFmpeg's own filters."""

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
from tests.data.boxes import box, element, inserted, overwritten
from tests.data.corpus import AVC1

# Weights of red and blue in grey: ITU-R BT.601, BT.709 and BT.2020.
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
FIELDS = [(150, 90, 170), (81, 90, 240), (145, 54, 34), (41, 240, 110), (200, 128, 128), (60, 140, 120)]
X264_NAMES = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc"}
EXACT = {"crf": "0", "preset": "ultrafast"}


def rgb_of(yuv: Iterable[float], matrix: str = "bt601", full: bool = False, bits: int = 8) -> np.ndarray:
    """float64 [3]: the definition, from R' = Y' + 2 (1 - Kr) Cr and so on, clipped to what 8 bits can show."""
    unit = 2 ** (bits - 8)
    luma, blue, red = (value / unit for value in yuv)
    luma = luma / 255 if full else (luma - 16) / 219
    blue, red = ((value - 128) / (255 if full else 224) for value in (blue, red))
    of_red, of_blue = WEIGHTS[matrix]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    g = (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue)
    return np.clip(255 * np.array([r, g, b]), 0, 255)


def flat(yuv: tuple[int, int, int], pixels: str = "yuv420p", width: int = 64, height: int = 48) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, pixels)
    for plane, value in zip(frame.planes, yuv, strict=True):
        size = frame.format.components[0].bits > 8
        plane.update((value.to_bytes(2, "little") if size else bytes([value])) * (plane.buffer_size // (1 + size)))
    return frame


def written(
    frames: list[av.VideoFrame],
    kind: str = "mp4",
    codec: str = "libx264",
    shape: Fraction | None = None,
    **options: str,
) -> bytes:
    """The frames as they are, their pixels not converted; `shape` is that of a pixel."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        if shape is not None:
            stream.sample_aspect_ratio = shape
        for number, frame in enumerate(frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def painted(picture: np.ndarray, pixels: str = "yuv444p", kind: str = "matroska", codec: str = "ffv1", **more) -> bytes:
    """Three frames of a uint8 [height, width, 3 or 4] picture, without loss but for the conversion to YCbCr."""
    source = "rgb24" if picture.shape[2] == 3 else "rgba"
    frames = [av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pixels) for _ in range(3)]
    return written(frames, kind, codec, **more)


def decoded(video: bytes, height: int, width: int, fit: str = "stretch") -> np.ndarray:
    """float64 [height, width, 3]: the second frame."""
    clip = ClipConfig(frames=3, height=height, width=width, fit=fit)  # type: ignore[arg-type]
    return sample_clip(video, clip).clip[1].astype(np.float64)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: three gradients that tell left from right and top from bottom."""
    across, down = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    planes = (across + 0 * down, 0 * across + down, 255 - (across + down) / 2)
    return np.stack(planes, axis=2).round().astype(np.uint8)


def box_average(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [height, width, channels]: every pixel of the result is the mean of the area that it covers."""

    def shares(source: int, size: int) -> np.ndarray:
        edges = np.arange(size + 1) * source / size
        low = np.maximum(edges[:-1, None], np.arange(source)[None, :])
        high = np.minimum(edges[1:, None], np.arange(source)[None, :] + 1)
        return np.maximum(high - low, 0) * size / source

    rows, columns = shares(picture.shape[0], height), shares(picture.shape[1], width)
    return np.einsum("ri,ijc,sj->rsc", rows, picture.astype(np.float64), columns, optimize=True)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one - other) ** 2)))


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_tagged_colours_are_those_of_their_standard(matrix: str, full: bool):
    tags = f"colormatrix={X264_NAMES[matrix]}:fullrange={'on' if full else 'off'}"
    for yuv in FIELDS:
        video = written([flat(yuv) for _ in range(3)], **EXACT, **{"x264-params": tags})
        assert np.abs(decoded(video, 16, 16) - rgb_of(yuv, matrix, full)).max() <= 2, yuv


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_colours_without_tags_are_taken_as_players_on_ffmpeg_take_them(size: tuple[int, int]):
    """As BT.601, limited, whatever the size."""
    height, width = size
    for yuv in FIELDS[:2]:
        video = written([flat(yuv, width=width, height=height) for _ in range(3)], **EXACT)
        assert np.abs(decoded(video, 16, 16) - rgb_of(yuv)).max() <= 2
        assert np.abs(decoded(video, 16, 16) - by_ffmpeg(video, 16, 16)).max() <= 1


@pytest.mark.parametrize("tags", ["", "colormatrix=bt709:fullrange=off", "colormatrix=smpte170m:fullrange=on"])
def test_pictures_are_what_ffmpegs_own_scale_filter_makes_of_them(tags: str):
    # Chroma at full size: where it lies between the pixels is for the codec to say, and the filter does not ask it.
    noise = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    frames = [av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format="yuv444p") for _ in range(3)]
    video = written(frames, **EXACT, **({"x264-params": tags} if tags else {}))
    for height, width in ((64, 64), (50, 70)):
        assert np.abs(decoded(video, height, width) - by_ffmpeg(video, height, width)).max() <= 1


def by_ffmpeg(video: bytes, height: int, width: int) -> np.ndarray:
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


# Where the chroma samples of 4:2:0 lie, in pixels right of and below the first pixel's centre; x264's number for it.
PLACES = {"left": (0, 0.5, 0), "center": (0.5, 0.5, 1), "topleft": (0, 0, 2), "untagged": (0, 0.5, None)}


def saturated_picture() -> np.ndarray:
    """uint8 [256, 256, 3]: blocks of 8 pixels across all grids of 4:2:0, of colours as strong as can be without that
    chroma between two of them leaves the range of RGB, where a conversion at full size would clip it."""
    colours = 90 + 76 * np.array([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)])
    blocks = colours[np.random.default_rng(0).integers(0, 8, (33, 33))].repeat(8, axis=0).repeat(8, axis=1)
    return blocks[3:259, 5:261].astype(np.uint8)


def with_chroma_at(picture: np.ndarray, across: float, down: float) -> av.VideoFrame:
    """BT.601 in limited range; a chroma sample is the mean of the two pixels that it lies between, or of the one that
    it lies on and half of each neighbour."""

    def halved(plane: np.ndarray, place: float) -> np.ndarray:
        if place:
            return (plane[::2] + plane[1::2]) / 2
        padded = np.pad(plane, ((1, 0), (0, 0)), mode="edge")
        return (padded[:-1:2] + 2 * padded[1::2] + np.roll(plane, -1, axis=0)[::2]) / 4

    red, green, blue = np.moveaxis(picture / 255, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [16 + 219 * luma]
    for colour, weight in ((blue, 0.114), (red, 0.299)):
        chroma = 128 + 224 * (colour - luma) / (2 * (1 - weight))
        planes.append(halved(halved(chroma, down).T, across).T)
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], "yuv420p")
    for plane, levels in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = levels.round()
        plane.update(rows.tobytes())
    return frame


def rgb_from(yuv: np.ndarray) -> np.ndarray:
    return np.stack([rgb_of(pixel) for pixel in yuv.reshape(-1, 3)]).reshape(yuv.shape)


def chroma_video(place: str, tagged: str) -> bytes:
    across, down, _ = PLACES[place]
    number = PLACES[tagged][2]
    frames = [with_chroma_at(saturated_picture(), across, down) for _ in range(3)]
    return written(frames, **EXACT, **({} if number is None else {"x264-params": f"chromaloc={number}"}))


@pytest.mark.parametrize("place", PLACES)
def test_chroma_is_taken_from_where_it_lies(place: str):
    """What is there on average is what was there before it was thinned out to 4:2:0. Of rows and columns both that
    leaves less than of columns alone."""
    truth = box_average(saturated_picture(), 64, 64)
    errors = {tagged: psnr(decoded(chroma_video(place, tagged), 64, 64), truth) for tagged in PLACES}
    assert errors[place] > (44 if place == "topleft" else 53)
    elsewhere = [db for tagged, db in errors.items() if PLACES[tagged][:2] != PLACES[place][:2]]
    assert max(elsewhere) < errors[place] - 3


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg command; without, see the test before")
@pytest.mark.parametrize("place", PLACES)
def test_chroma_is_where_ffmpegs_command_line_puts_it_when_told(place: str):
    """Converted at full size and averaged. Untold, it takes chroma for centred, whatever the file says."""
    video = chroma_video(place, place)
    across, down, _ = PLACES[place]
    position = f"in_h_chr_pos={round(256 * across)}:in_v_chr_pos={round(256 * down)}"
    full = f"scale={position}:flags=accurate_rnd+full_chroma_inp+bicubic,format=yuv444p"
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(video)
        command = ["ffmpeg", "-v", "error", "-i", file.name, "-vf", full, "-frames:v", "1", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
    yuv = np.moveaxis(np.frombuffer(raw, np.uint8).reshape(3, 256, 256), 0, 2)
    assert psnr(decoded(video, 64, 64), rgb_from(box_average(yuv, 64, 64))) > 45


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", EXACT),
        ("mp4", "libx265", {"x265-params": "lossless=1:log-level=none"}),
        ("matroska", "ffv1", {}),
    ],
)
def test_ten_bits(kind: str, codec: str, options: dict[str, str]):
    yuv = (601, 362, 683)
    video = written([flat(yuv, "yuv420p10le") for _ in range(3)], kind, codec, **options)
    assert np.abs(decoded(video, 16, 16) - rgb_of(yuv, bits=10)).max() <= 2


def test_ten_bits_of_full_range():
    """Unlike with 8 bits the range is told by a tag alone, and by no pixel format of its own."""
    yuv = (601, 362, 683)
    video = written([flat(yuv, "yuv420p10le") for _ in range(3)], **EXACT, **{"x264-params": "fullrange=on"})
    assert np.abs(decoded(video, 16, 16) - rgb_of(yuv, full=True, bits=10)).max() <= 2


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
def test_transparency_leaves_colours_as_they_are(kind: str, codec: str, pixels: str, alpha: int):
    picture = np.full((48, 64, 4), [200, 100, 50, alpha], np.uint8)
    assert np.abs(decoded(painted(picture, pixels, kind, codec), 16, 16) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p"])
def test_odd_sizes(pixels: str):
    picture = smooth_picture(47, 63)
    assert psnr(decoded(painted(picture, pixels), 16, 24), box_average(picture, 16, 24)) > (
        45 if "444" in pixels else 40
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 80), (50, 50), (33, 64)])
def test_scaling_down_averages_the_area_that_a_pixel_covers(height: int, width: int):
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    error = psnr(decoded(painted(noise), height, width), box_average(noise, height, width))
    assert error > 40
    point = noise[(np.arange(height) * 120) // height][:, (np.arange(width) * 160) // width]
    assert error > psnr(point.astype(float), box_average(noise, height, width)) + 20


# Rows of the matrix in tkhd for x' = a x + c y, y' = b x + d y with y downwards, and the same done to an array.
ORIENTATIONS = {
    "as it is": ((1, 0, 0, 1), lambda picture: picture),
    "clockwise": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "half round": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "counterclockwise": ((0, -1, 1, 0), np.rot90),
    "left is right": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "top is bottom": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "transposed": ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_upright(orientation: str):
    (a, b, c, d), turned = ORIENTATIONS[orientation]
    picture = smooth_picture(48, 96)
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    video = overwritten(painted(picture, "yuv444p", "mp4", "libx264", **EXACT), "moov/trak/tkhd", 40, matrix)
    upright = turned(picture)
    height, width = upright.shape[0] // 3, upright.shape[1] // 3
    assert psnr(decoded(video, height, width), box_average(upright, height, width)) > 45
    # Fitting is to the upright picture: of 96x48 it is the sides that go, of 48x96 top and bottom.
    middle = upright[upright.shape[0] // 2 - 24 :][:48, upright.shape[1] // 2 - 24 :][:, :48]
    assert psnr(decoded(video, 16, 16, "crop"), box_average(middle, 16, 16)) > 45


def test_lines_of_two_moments_are_averaged_like_others():
    """An interlaced picture whose every other line is white: grey when halved, not stripes."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2] = 255
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p") for _ in range(3)]
    video = written(frames, **EXACT, **{"x264-params": "interlaced=1:tff=1"})
    with av.open(io.BytesIO(video)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert np.abs(decoded(video, 16, 16) - 127.5).max() <= 2
    tags = {"x264-params": "interlaced=1:tff=1:colormatrix=bt709:fullrange=on"}
    for yuv in FIELDS:
        video = written([flat(yuv) for _ in range(3)], **EXACT, **tags)
        assert np.abs(decoded(video, 16, 16) - rgb_of(yuv, "bt709", full=True)).max() <= 2


def test_cropping_cuts_both_sides_alike():
    picture = smooth_picture(48, 144)
    assert psnr(decoded(painted(picture), 16, 16, "crop"), box_average(picture[:, 48:96], 16, 16)) > 45
    tall = smooth_picture(144, 48)
    assert psnr(decoded(painted(tall), 16, 16, "crop"), box_average(tall[48:96], 16, 16)) > 45


def test_padding_puts_black_at_both_sides():
    white = np.full((48, 96, 3), 255, np.uint8)
    padded = decoded(painted(white), 32, 32, "pad")
    assert not padded[:8].any() and not padded[24:].any()
    assert (padded[8:24] >= 253).all()
    odd = decoded(painted(white), 31, 32, "pad")  # 16 rows of picture: 7 above and 8 below
    assert np.flatnonzero(odd.any(axis=(1, 2))).tolist() == list(range(7, 23))
    tall = decoded(painted(white.swapaxes(0, 1).copy()), 32, 32, "pad")
    assert np.flatnonzero(tall.any(axis=(0, 2))).tolist() == list(range(8, 24))
    picture = smooth_picture(48, 96)
    assert psnr(decoded(painted(picture), 32, 32, "pad")[8:24], box_average(picture, 16, 32)) > 45


def test_stretching_keeps_the_whole_picture():
    picture = smooth_picture(48, 96)
    assert psnr(decoded(painted(picture), 16, 16), box_average(picture, 16, 16)) > 45


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [("mp4", "libx264", "yuv444p"), ("matroska", "libx264", "yuv444p"), ("mov", "png", "rgb24")],
)
def test_pixels_that_are_not_square_count_by_their_shape(kind: str, codec: str, pixels: str):
    """48x48 pixels twice as wide as high are shown as 96x48."""
    picture = smooth_picture(48, 48)
    options = EXACT if codec == "libx264" else {}
    video = painted(picture, pixels, kind, codec, shape=Fraction(2), **options)
    assert psnr(decoded(video, 16, 16, "crop"), box_average(picture[:, 12:36], 16, 16)) > 45
    padded = decoded(video, 32, 32, "pad")
    assert psnr(padded[8:24], box_average(picture, 16, 32)) > 45
    assert not padded[:8].any() and not padded[24:].any()
    assert psnr(decoded(video, 16, 16), box_average(picture, 16, 16)) > 45


def test_an_impossible_shape_of_pixels_is_taken_for_square():
    picture = smooth_picture(48, 48)
    video = painted(picture, "yuv444p", "mp4", "libx264", shape=Fraction(2), **EXACT)
    video = overwritten(video, f"{AVC1}/pasp", 0, struct.pack(">II", 1000, 1))
    assert psnr(decoded(video, 16, 16, "crop"), box_average(picture, 16, 16)) > 45


def test_what_cropping_would_blow_up_is_rejected():
    sliver = painted(smooth_picture(2, 4000))
    clip = ClipConfig(frames=3, height=64, width=64, fit="crop")
    with pytest.raises(RejectedVideo, match="too_large: 4000x2, scaled to 128000x64 for"):
        sample_clip(sliver, clip, LimitsConfig(pixels=1_000_000))


def number(name: str, value: int) -> bytes:
    return element(name, value.to_bytes(4, "big"))


def matroska(picture: np.ndarray, *settings: bytes) -> bytes:
    """Three frames of a picture in FFV1, with more elements in their track's settings of the video."""
    with av.open(io.BytesIO(painted(picture))) as container:
        private = container.streams.video[0].codec_context.extradata or b""
        frames = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    size = number("b0", picture.shape[1]) + number("ba", picture.shape[0])
    track = number("d7", 1) + number("73c5", 1) + number("83", 1) + element("86", b"V_FFV1")
    track = element("ae", track, element("63a2", private), element("e0", size, *settings))
    blocks = [element("a3", b"\x81" + struct.pack(">h", 100 * i) + b"\x80" + frame) for i, frame in enumerate(frames)]
    head = element("1a45dfa3", element("4282", b"matroska"))
    info = element("1549a966", number("2ad7b1", 1_000_000))
    return head + element("18538067", info, element("1654ae6b", track), element("1f43b675", number("e7", 0), *blocks))


CROPS = {"left": "54cc", "right": "54dd", "top": "54bb", "bottom": "54aa"}


def cropped(picture: np.ndarray, **sides: int) -> bytes:
    return matroska(picture, *(number(CROPS[side], pixels) for side, pixels in sides.items()))


@pytest.mark.parametrize("sides", [{"left": 12, "right": 24}, {"top": 9, "bottom": 3}, {"left": 5, "bottom": 7}])
def test_matroska_may_crop_its_pictures(sides: dict[str, int]):
    picture = smooth_picture(48, 96)
    height, width = picture.shape[:2]
    inner = picture[sides.get("top", 0) : height - sides.get("bottom", 0)]
    inner = inner[:, sides.get("left", 0) : width - sides.get("right", 0)]
    assert psnr(decoded(cropped(picture, **sides), 16, 16), box_average(inner, 16, 16)) > 45


def test_cropped_pixels_keep_their_shape():
    picture = smooth_picture(48, 96)
    video = cropped(picture, left=24, right=24)
    for fit in ("stretch", "crop", "pad"):
        assert psnr(decoded(video, 16, 16, fit), box_average(picture[:, 24:72], 16, 16)) > 45


@pytest.mark.parametrize("sides", [{"left": 96}, {"left": 50, "right": 50}, {"top": 2**32 - 1}])
def test_a_crop_that_leaves_nothing_is_rejected(sides: dict[str, int]):
    with pytest.raises(RejectedVideo, match="not_video"):  # by FFmpeg itself
        decoded(cropped(smooth_picture(48, 96), **sides), 16, 16)


def clean_aperture(width: int, height: int, right: int, down: int) -> bytes:
    return box("clap", struct.pack(">IIIIiIiI", width, 1, height, 1, right, 2, down, 2))


def test_an_mp4_may_crop_its_pictures():
    picture = smooth_picture(48, 96)
    whole = painted(picture, "yuv444p", "mp4", "libx264", **EXACT)
    # 64x40, its centre 5 pixels right of the picture's and 2 below it.
    video = inserted(whole, f"{AVC1}/avcC", clean_aperture(64, 40, 10, 4))
    inner = picture[6:46, 21:85]
    assert psnr(decoded(video, 16, 16), box_average(inner, 16, 16)) > 45
    turned = overwritten(video, "moov/trak/tkhd", 40, struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    assert psnr(decoded(turned, 16, 16), box_average(np.rot90(inner, -1), 16, 16)) > 45
    for nothing in (clean_aperture(0, 40, 0, 0), clean_aperture(200, 40, 0, 0), box("clap", bytes(32))):
        ignored = inserted(whole, f"{AVC1}/avcC", nothing)
        assert psnr(decoded(ignored, 16, 16), box_average(picture, 16, 16)) > 45
