"""Writes clips and checks them with other readers: FFmpeg for mp4, Pillow for GIF, WebP and PNG."""

import base64
import io
import os
import re
import resource
import signal
import stat
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from giffy_ray.core.errors import InputError
from giffy_ray.inference.clip import Clip, output_format, pad_to_even, png_pattern, save_frames, to_video_frame

OUTPUTS = ["clip.mp4", "clip.gif", "clip.webp", "clip.png", "folder"]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0), (255, 255, 255), (250, 200, 10)]


def picture(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """A smooth picture with a fine texture that is gray, since yuv420p halves the resolution of colour."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    colour = np.stack([x, y, 0.5 + 0.4 * np.sin(4 * x + 3 * y + phase)], -1)
    texture = 0.08 * np.sin(60 * x + phase)[..., None]
    return (255 * (0.15 + 0.7 * colour + texture).clip(0, 1)).round().astype(np.uint8)


def moving(frames: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    clip = np.stack([picture(height, width, 0.3 * index) for index in range(frames)])
    if channels == 3:
        return clip
    alpha = np.broadcast_to(np.linspace(0, 255, width).round().astype(np.uint8), (frames, height, width))
    return np.concatenate([clip, alpha[..., None]], axis=-1)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Converts planes of BT.709, limited range, to float RGB 0..255 (ITU-R BT.709-6, section 3)."""
    planes = [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    ]
    y, cb, cr = planes[0], *(np.kron(plane, np.ones((2, 2)))[: frame.height, : frame.width] for plane in planes[1:])
    luma, blue, red = (y - 16) / 219, (cb - 128) / 224 * 1.8556, (cr - 128) / 224 * 1.5748
    green = luma - (0.2126 * red + 0.0722 * blue) / 0.7152
    return 255 * np.stack([luma + red, green, luma + blue], -1).clip(0, 1)


def read_video(path: Path) -> tuple[list[av.VideoFrame], Fraction, list[Fraction]]:
    """Returns the frames, the frame rate and the time of each frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.average_rate is not None
        assert stream.duration is not None
        assert stream.duration * stream.time_base == len(frames) / stream.average_rate
        return frames, stream.average_rate, [frame.pts * frame.time_base for frame in frames]


def read_animation(path: Path | io.BytesIO) -> tuple[list[Image.Image], list[int]]:
    """Returns the frames and how long each is shown, in milliseconds."""
    frames, durations_ms = [], []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(image.convert("RGBA"))
            durations_ms.append(image.info["duration"])
    return frames, durations_ms


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(image.astype(float) - target).mean())))


def files(folder: Path) -> dict[str, bytes]:
    """Returns all files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- mp4


@pytest.mark.parametrize("size", [(96, 128), (97, 128), (96, 127), (3, 5), (2, 2)])
def test_mp4_has_the_frames_of_the_clip(size: tuple[int, int], tmp_path: Path):
    clip = moving(12, *size)
    assert save_frames(clip, tmp_path / "clip.mp4", 25) == 12
    frames, rate, times_s = read_video(tmp_path / "clip.mp4")
    height, width = size
    assert (frames[0].height, frames[0].width) == (height + height % 2, width + width % 2)
    assert rate == 25
    assert times_s == [Fraction(index, 25) for index in range(12)]
    for frame, expected in zip(frames, clip, strict=True):
        rgb = to_rgb(frame)
        assert psnr(rgb[:height, :width], expected) > 35 or min(size) < 8  # too small for a codec
        np.testing.assert_allclose(rgb[height:], rgb[height - 1 : height].repeat(height % 2, axis=0), atol=24)


def test_pad_to_even_repeats_the_last_row_and_column():
    frame = picture(5, 7)
    padded = pad_to_even(frame)
    assert padded.shape == (6, 8, 3)
    np.testing.assert_array_equal(padded[:5, :7], frame)
    np.testing.assert_array_equal(padded[5], padded[4])
    np.testing.assert_array_equal(padded[:, 7], padded[:, 6])
    even = picture(6, 8)
    assert pad_to_even(even) is even


@pytest.mark.parametrize("colour", COLOURS)
def test_mp4_has_the_colours_of_the_clip(colour: tuple[int, int, int], tmp_path: Path):
    clip = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3))
    save_frames(clip, tmp_path / "clip.mp4", 10)
    for frame in read_video(tmp_path / "clip.mp4")[0]:
        assert np.abs(to_rgb(frame) - colour).max() <= 3
        # Numbers of ITU-T H.273: BT.709 is 1, limited range is 1 in FFmpeg.
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)


@pytest.mark.parametrize("colour", COLOURS)
def test_video_frame_is_bt709_by_its_definition(colour: tuple[int, int, int]):
    frame = to_video_frame(np.broadcast_to(np.array(colour, np.uint8), (4, 6, 3)))
    red, green, blue = np.array(colour) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    for plane, level in zip(frame.planes, expected, strict=True):
        pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        assert np.abs(pixels - level).max() < 1


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (29.97, Fraction(2997, 100)),
        (23.976, Fraction(2997, 125)),
        (30000 / 1001, Fraction(30000, 1001)),
        (Fraction(24000, 1001), Fraction(24000, 1001)),
        (0.5, Fraction(1, 2)),
        (0.01, Fraction(1, 100)),
        (np.float32(12.5), Fraction(25, 2)),
        (1000, Fraction(1000)),
    ],
)
def test_mp4_has_the_frame_rate(fps: float | Fraction, rate: Fraction, tmp_path: Path):
    save_frames(moving(7, 16, 16), tmp_path / "clip.mp4", fps)
    _, average_rate, times_s = read_video(tmp_path / "clip.mp4")
    assert average_rate == rate
    assert [float(time_s) for time_s in times_s] == pytest.approx([float(index / rate) for index in range(7)], abs=1e-4)


def test_transparency_is_composited_on_white(tmp_path: Path):
    clip = np.zeros((2, 32, 48, 4), np.uint8)
    clip[:, :, :16, 3], clip[:, :, 16:32, 3], clip[:, :, 32:] = 0, 128, (0, 0, 255, 255)
    expected = np.zeros((32, 48, 3))
    expected[:, :16], expected[:, 16:32], expected[:, 32:] = 255, 127, (0, 0, 255)
    save_frames(clip, tmp_path / "clip.mp4", 10)
    inner = np.s_[:, [4, 8, 12, 20, 24, 28, 36, 40, 44]]  # colours are blurred at the edges
    assert np.abs(to_rgb(read_video(tmp_path / "clip.mp4")[0][0])[inner] - expected[inner]).max() <= 3
    save_frames(clip, tmp_path / "clip.gif", 10)
    gif = np.asarray(read_animation(tmp_path / "clip.gif")[0][0])
    assert np.abs(gif[:, :, :3] - expected).max() <= 1
    assert (gif[:, :, 3] == 255).all()


# --- GIF and WebP


@pytest.mark.parametrize("fps", [30, 12, 50, 29.97, 0.5])
def test_gif_shows_each_frame_at_its_time_to_the_hundredth_second(fps: float, tmp_path: Path):
    save_frames(moving(40, 16, 16), tmp_path / "clip.gif", fps)
    frames, durations_ms = read_animation(tmp_path / "clip.gif")
    assert len(frames) == 40
    ends_ms = np.cumsum(durations_ms)
    assert np.abs(ends_ms - 1000 * np.arange(1, 41) / fps).max() <= 5.001
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["loop"] == 0  # for ever


@pytest.mark.parametrize("fps", [30, 12, 60, 29.97, 0.5])
def test_webp_shows_each_frame_at_its_time_to_the_millisecond(fps: float, tmp_path: Path):
    save_frames(moving(40, 16, 16), tmp_path / "clip.webp", fps)
    frames, durations_ms = read_animation(tmp_path / "clip.webp")
    assert len(frames) == 40
    assert np.abs(np.cumsum(durations_ms) - 1000 * np.arange(1, 41) / fps).max() <= 1.001
    with Image.open(tmp_path / "clip.webp") as image:
        assert image.info["loop"] == 0


def test_gif_has_the_colours_of_the_whole_clip(tmp_path: Path):
    """From red to blue in ten frames: no palette of one frame has both."""
    y, x = np.mgrid[:32, :32] / 31
    start, end = np.stack([0.3 + 0.7 * x, 0.3 * y, 0 * x], -1), np.stack([0 * x, 0.3 * y, 0.3 + 0.7 * x], -1)
    clip = np.stack([255 * ((1 - time) * start + time * end) for time in np.linspace(0, 1, 10)]).round()
    save_frames(clip.astype(np.uint8), tmp_path / "clip.gif", 10)
    for frame, expected in zip(read_animation(tmp_path / "clip.gif")[0], clip, strict=True):
        blocks = np.asarray(frame)[:, :, :3].reshape(4, 8, 4, 8, 3).mean((1, 3))  # averages the dither
        assert np.abs(blocks - expected.reshape(4, 8, 4, 8, 3).mean((1, 3))).max() < 20


def test_still_part_of_a_gif_does_not_flicker(tmp_path: Path):
    """The dither spreads to the right and below, so only what is above the motion is the same in all frames."""
    clip = moving(10, 64, 64)
    clip[:, :32] = picture(64, 64)[:32]
    save_frames(clip, tmp_path / "clip.gif", 10)
    frames = [np.asarray(frame) for frame in read_animation(tmp_path / "clip.gif")[0]]
    for frame in frames[1:]:
        np.testing.assert_array_equal(frame[:32], frames[0][:32])
    assert (frames[1][32:] != frames[0][32:]).any()


def test_gif_of_a_still_clip_lasts_as_long(tmp_path: Path):
    """Pillow merges equal frames."""
    save_frames(moving(1, 16, 16).repeat(30, axis=0), tmp_path / "clip.gif", 30)
    assert sum(read_animation(tmp_path / "clip.gif")[1]) == 1000


def test_webp_keeps_transparency(tmp_path: Path):
    clip = moving(5, 48, 64, channels=4)
    save_frames(clip, tmp_path / "clip.webp", 10)
    frames = [np.asarray(frame) for frame in read_animation(tmp_path / "clip.webp")[0]]
    for frame, expected in zip(frames, clip, strict=True):
        np.testing.assert_array_equal(frame[..., 3], expected[..., 3])
        opaque = expected[0, :, 3] > 200
        assert psnr(frame[:, opaque, :3], expected[:, opaque, :3]) > 30


def test_webp_without_transparency_is_opaque(tmp_path: Path):
    clip = moving(3, 48, 64)
    save_frames(clip, tmp_path / "clip.webp", 10)
    for frame, expected in zip(read_animation(tmp_path / "clip.webp")[0], clip, strict=True):
        assert psnr(np.asarray(frame)[..., :3], expected) > 33
        assert (np.asarray(frame)[..., 3] == 255).all()


# --- PNG


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("folder", "folder/frame_%04d.png"),
        ("deep/folder", "deep/folder/frame_%04d.png"),
        ("clip.png", "clip_%04d.png"),
        ("folder/clip_%03d.PNG", "folder/clip_%03d.PNG"),
        ("%d.png", "%d.png"),
    ],
)
def test_png_files_are_exact_and_numbered_from_1(output: str, names: str, channels: int, tmp_path: Path):
    clip = moving(3, 5, 7, channels)
    assert save_frames(clip, tmp_path / output, 10) == 3
    assert sorted(files(tmp_path)) == [names % number for number in (1, 2, 3)]
    for number, expected in enumerate(clip, 1):
        with Image.open(tmp_path / (names % number)) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", ["%s.png", "a%d_%d.png", "50%.png", "%.png", "%c.png", "%%.png", "%99999999d.png"])
def test_patterns_without_one_number_are_refused(name: str, tmp_path: Path):
    with pytest.raises(InputError, match=r"must have one number, such as frame_%04d.png$") as error:
        save_frames(moving(2, 4, 4), tmp_path / name, 10)
    assert str(tmp_path / name) in str(error.value)
    assert not files(tmp_path)


def test_png_files_of_a_longer_clip_stay(tmp_path: Path):
    save_frames(moving(5, 4, 4), tmp_path, 10)
    old = files(tmp_path)
    save_frames(255 - moving(3, 4, 4), tmp_path, 10)
    changed = {name for name, content in files(tmp_path).items() if content != old[name]}
    assert changed == {"frame_0001.png", "frame_0002.png", "frame_0003.png"}
    assert files(tmp_path).keys() == old.keys()


def test_png_pattern_of_each_output(tmp_path: Path):
    assert png_pattern("out") == (Path("out"), "frame_%04d.png")
    assert png_pattern(Path("a/out.png")) == (Path("a"), "out_%04d.png")
    assert png_pattern("a/%d.png") == (Path("a"), "%d.png")


# --- all formats


@pytest.mark.parametrize("output", OUTPUTS)
def test_one_frame_is_enough(output: str, tmp_path: Path):
    clip = moving(1, 16, 24)
    assert save_frames(clip, tmp_path / output, 10) == 1
    ((name, content),) = files(tmp_path).items()
    if name.endswith(".mp4"):
        (frame,), _, _ = read_video(tmp_path / name)
        assert psnr(to_rgb(frame), clip[0]) > 30
    else:
        with Image.open(io.BytesIO(content)) as image:
            assert getattr(image, "n_frames", 1) == 1
            assert psnr(np.asarray(image.convert("RGB")), clip[0]) > 25


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_frames_are_refused(output: str, tmp_path: Path):
    for frames in ([], iter(()), np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=f"{output}: there are no frames to write$"):
            save_frames(frames, tmp_path / output, 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("error", [RuntimeError("the model broke"), KeyboardInterrupt(), InputError("no picture")])
def test_interrupted_writes_leave_nothing(output: str, error: BaseException, tmp_path: Path):
    def interrupted() -> Iterator[np.ndarray]:
        yield from moving(60, 16, 16)  # more than x264 looks ahead, so that it has written some
        raise error

    target = tmp_path / "new" / output
    for folder in (target.parent, target.parent):  # a new one, and one that holds an earlier clip
        old = files(tmp_path)
        with pytest.raises(type(error)) as raised:
            save_frames(interrupted(), target, 10)
        assert raised.value is error
        assert files(tmp_path) == old
        save_frames(moving(2, 8, 8), target, 10)
        assert files(folder)


@pytest.mark.parametrize("output", OUTPUTS)
def test_error_before_the_first_frame_leaves_not_even_a_folder(output: str, tmp_path: Path):
    def fail() -> Iterator[np.ndarray]:
        raise InputError("no picture")
        yield

    with pytest.raises(InputError, match="no picture"):
        save_frames(fail(), tmp_path / "new" / output, 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", OUTPUTS)
def test_full_disk_leaves_nothing(output: str, tmp_path: Path):
    """A limit on the size of files stands for the disk."""
    clip = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_frames(clip, tmp_path / output, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert not files(tmp_path)


@pytest.mark.parametrize("output", ["clip.mp4", "clip.webp", "clip.png"])
def test_frames_are_released_as_they_are_written(output: str, tmp_path: Path):
    """Only GIF needs all of them, for its palette."""
    alive, most = 0, 0

    def count_release() -> None:
        nonlocal alive
        alive -= 1

    def generate() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for index in range(50):
            frame = picture(16, 16, 0.1 * index)
            alive += 1
            most = max(most, alive)
            weakref.finalize(frame, count_release)
            yield frame
            del frame

    assert save_frames(generate(), tmp_path / output, 10) == 50
    assert most <= 4


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((16, 18, 3), np.uint8), r"frame 3 has shape \[16, 18, 3\], those before it \[16, 16, 3\]"),
        (np.zeros((16, 16, 4), np.uint8), r"frame 3 has shape \[16, 16, 4\], those before it \[16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.float32), r"frame 3 is float32 \[16, 16, 3\]; expected uint8"),
        (np.zeros((16, 16), np.uint8), r"frame 3 is uint8 \[16, 16\]; expected uint8 \[height, width, 3 or 4\]"),
        (np.zeros((16, 16, 1), np.uint8), r"frame 3 is uint8 \[16, 16, 1\]; expected"),
    ],
)
@pytest.mark.parametrize("output", OUTPUTS)
def test_frames_that_do_not_fit_are_refused(output: str, frame: np.ndarray, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"{output}: {message}"):
        save_frames([*moving(2, 16, 16), frame], tmp_path / output, 10)
    assert not files(tmp_path)


@pytest.mark.parametrize(("output", "limit_px"), [("clip.mp4", 16384), ("clip.webp", 16383), ("clip.gif", 65535)])
def test_frames_larger_than_the_format_are_refused(output: str, limit_px: int, tmp_path: Path):
    clip = np.zeros((1, 2, limit_px + 1, 3), np.uint8)
    with pytest.raises(InputError, match=f"{limit_px + 1}x2 pixels; {output[5:]} has at most {limit_px} per side"):
        save_frames(clip, tmp_path / output, 10)
    assert not files(tmp_path)
    assert save_frames(clip[:, :, 1:], tmp_path / output, 10) == 1


@pytest.mark.parametrize("output", ["clip.mp4", "clip.webp"])
def test_quality_raises_size_and_fidelity(output: str, tmp_path: Path):
    clip = np.kron(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    sizes, fidelities = [], []
    for quality in (0, 30, 60, 80, 100):
        Clip(clip, 10).save(tmp_path / output, quality)
        sizes.append((tmp_path / output).stat().st_size)
        if output.endswith("mp4"):
            shown = [to_rgb(frame) for frame in read_video(tmp_path / output)[0]]
        else:
            images, durations_ms = read_animation(tmp_path / output)  # similar frames are merged at low quality
            shown = np.repeat([np.asarray(image)[..., :3] for image in images], np.array(durations_ms) // 100, axis=0)
        fidelities.append(psnr(np.stack(shown), clip))
    assert sizes == sorted(set(sizes))
    assert fidelities == sorted(set(fidelities))


@pytest.mark.parametrize(
    ("output", "fps", "quality", "message"),
    [
        ("clip.mp4", 0, 80, r"fps: must be 0.01 to 1000 for mp4 \(value 0\)"),
        ("clip.mp4", -5, 80, r"fps: .*\(value -5\)"),
        ("clip.webp", float("nan"), 80, r"fps: .*\(value nan\)"),
        ("clip.png", float("inf"), 80, r"fps: .*\(value inf\)"),
        ("clip.mp4", Fraction(2000), 80, r"fps: .*\(value 2000\)"),
        ("clip.gif", 60, 80, r"fps: must be 0.01 to 50 for gif \(value 60\)"),
        ("clip.mp4", 10, -1, r"quality: must be 0 to 100 \(value -1\)"),
        ("clip.webp", 10, 101, r"quality: must be 0 to 100 \(value 101\)"),
        ("clip.avi", 10, 80, r"clip.avi: the format .avi is not supported; expected .mp4, .gif, .webp, .png, or"),
        ("clip.jpg", 10, 80, r"clip.jpg: the format .jpg is not supported"),
        ("%d_%d.png", 10, 80, r"must have one number, such as frame_%04d.png"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_a_frame_is_made(
    output: str, fps: float, quality: float, message: str, tmp_path: Path
):
    def fail() -> Iterator[np.ndarray]:
        raise AssertionError("a frame was generated")
        yield

    with pytest.raises(InputError, match=message):
        save_frames(fail(), tmp_path / output, fps, quality)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["clip.mp4", "clip.gif", "clip.webp"])
def test_a_folder_of_that_name_is_refused_and_stays(output: str, tmp_path: Path):
    (tmp_path / output).mkdir()
    (tmp_path / output / "content").write_text("kept")
    with pytest.raises(InputError, match=f"{output}: is a folder; give the name of a file"):
        save_frames(moving(2, 8, 8), tmp_path / output, 10)
    assert files(tmp_path) == {f"{output}/content": b"kept"}


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_that_cannot_be_created_are_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=f"file/{output}: cannot be written: "):
        save_frames(moving(2, 8, 8), tmp_path / "file" / output, 10)

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the tests may run as root, who may write everywhere
    with pytest.raises(InputError, match=f"{output}: cannot be written: Permission denied"):
        save_frames(moving(2, 8, 8), tmp_path / output, 10)
    assert files(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("output", ["clip.mp4", "clip.gif", "clip.webp", "clip_0001.png"])
def test_files_have_the_permissions_of_other_new_files(output: str, tmp_path: Path):
    save_frames(moving(1, 8, 8), tmp_path / output.replace("_0001", ""), 10)
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (output, "other")}
    assert len(modes) == 1


@pytest.mark.parametrize("folder", ["a:b", "http:", "file:", "50% off", "é ü"])
def test_unusual_names_of_folders_are_no_addresses(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for output in ("c:lip.mp4", "clip.webp", "clip.gif", "clip.png"):
        save_frames(moving(1, 8, 8), f"{folder}/{output}", 10)
    names = {"c:lip.mp4", "clip.webp", "clip.gif", "clip_0001.png"}
    assert files(tmp_path).keys() == {f"{folder}/{name}" for name in names}


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.mp4", "mp4"), ("a.b.GIF", "gif"), (Path("x/a.WebP"), "webp"), ("f_%04d.png", "png"), ("x/frames", "png")],
)
def test_suffix_selects_the_format(path: str | Path, expected: str):
    assert output_format(path) == expected


# --- Clip


def test_clip_is_an_array():
    frames = moving(4, 6, 8)
    clip = Clip(frames, 10)
    assert np.shares_memory(np.asarray(clip), frames)
    assert not np.shares_memory(np.array(clip), frames)
    np.testing.assert_array_equal(np.asarray(clip, np.float32), frames.astype(np.float32))
    with pytest.raises(ValueError, match="copy"):
        np.asarray(clip, np.float32, copy=False)
    assert len(clip) == 4
    np.testing.assert_array_equal(clip[1], frames[1])
    np.testing.assert_array_equal(clip[1:, ::2], frames[1:, ::2])
    np.testing.assert_array_equal(np.stack(list(clip)), frames)
    assert float(np.mean(clip)) == frames.mean()
    assert repr(clip) == "Clip(4 frames of 8x6, 10 fps)"


@pytest.mark.parametrize("channels", [3, 4])
def test_clip_gives_pil_images(channels: int):
    frames = moving(3, 6, 8, channels)
    images = Clip(frames, 10).to_pil()
    assert [image.mode for image in images] == ["RGB" if channels == 3 else "RGBA"] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), frames)


@pytest.mark.parametrize("as_type", [str, Path])
def test_clip_is_saved_under_a_path_of_either_type(as_type: type, tmp_path: Path):
    Clip(moving(3, 8, 8), 10).save(as_type(tmp_path / "deep" / "CLIP.MP4"))
    assert read_video(tmp_path / "deep" / "CLIP.MP4")[1] == 10
    assert list(files(tmp_path)) == ["deep/CLIP.MP4"]


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((4, 6, 8, 3), (8, 6)), ((2, 300, 1024, 4), (512, 150)), ((2, 2000, 4, 3), (1, 512)), ((1, 6, 8, 3), (8, 6))],
)
def test_notebooks_show_a_small_animation(shape: tuple[int, int, int, int], shown: tuple[int, int]):
    frames = moving(*shape)
    html = Clip(frames, 12.5)._repr_html_()
    match = re.fullmatch(r'<img alt="(\d+) frames at 12.5 fps" src="data:image/webp;base64,([^"]+)">', html)
    assert match
    assert int(match[1]) == len(frames)
    images, durations_ms = read_animation(io.BytesIO(base64.b64decode(match[2])))
    assert len(images) == len(frames)
    assert {image.size for image in images} == {shown}
    if len(frames) > 1:
        assert set(durations_ms) == {80}
    if shape[3] == 4:
        assert np.abs(np.asarray(images[0])[..., 3].mean(0) - np.linspace(0, 255, 512)).max() < 2


def test_existing_files_are_replaced(tmp_path: Path):
    for output in ("clip.mp4", "clip.gif", "clip.webp"):
        (tmp_path / output).write_bytes(b"old")
        save_frames(moving(2, 8, 8), tmp_path / output, 10)
        assert len((tmp_path / output).read_bytes()) > 3
    assert sorted(os.listdir(tmp_path)) == ["clip.gif", "clip.mp4", "clip.webp"]
