"""Whole films: times, cuts, duplicates, sound, colours and metadata of real files, without the quality of a model."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from torch import Tensor

from giffy_ray.config import Experiment, override
from giffy_ray.core.errors import InputError
from giffy_ray.inference import video
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.video import VideoReport, interpolate_video
from giffy_ray.models.motion import Motion
from tests.data.boxes import make_faststart, overwrite_body

LOSSLESS = {"qp": "0", "preset": "ultrafast"}
ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BILINEAR
RATE_HZ = 48_000
SAMPLES = 1_000  # per audio frame that is written
WHITE = 235  # luma in limited range


class StillNetwork:
    """Finds no motion, so that the frames between two are their blends, and all results have a closed form."""

    latent = 0

    def __init__(self) -> None:
        self.widths: list[int] = []  # of the images that it was asked for

    def iter_motion(self, start: Tensor, end: Tensor, noise: Tensor, times: Tensor) -> Iterator[Motion]:
        assert len(times) and times.min() > 0 and times.max() < 1
        self.widths.append(start.shape[3])
        fields = torch.zeros(len(times), 8, *start.shape[2:])
        yield Motion(fields[:, :4], fields[:, 4:5], fields[:, 5:])


def blending_interpolator(network: Any = None) -> Interpolator:
    """An interpolator with that network, or another one; it was trained on images so large that nothing is matched."""
    experiment = override(Experiment(), {"clip.height": 1024, "clip.width": 1024})
    return Interpolator(network or StillNetwork(), experiment, torch.device("cpu"))


def write_film(
    path: Path,
    frames: Sequence[np.ndarray] | np.ndarray,
    times_s: Sequence[float | Fraction] | None = None,
    *,
    fps: int = 15,
    kind: str | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] = LOSSLESS,
    audio_codec: str | None = None,
    impulses_s: Sequence[float] = (),
    audio_start_s: float = 0.0,
    audio_s: float | None = None,
    tags: dict[str, Any] | None = None,
) -> Path:
    """Writes a film of uint8 [height, width, 3] or luma [height, width] frames, with clicks at `impulses_s`."""
    times = [Fraction(number, fps) if times_s is None else Fraction(times_s[number]) for number in range(len(frames))]
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        height, width = frames[0].shape[:2]
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.time_base = Fraction(1, 90_000)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        sound: Any = None
        if audio_codec:
            sound = container.add_stream(audio_codec, rate=RATE_HZ, bit_rate=128_000)
            sound.layout = "mono"
        for picture, time in zip(frames, times, strict=True):
            if picture.ndim == 2:
                frame = grey_frame(picture, pixel_format)
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            length_s = float(times[-1] - times[0]) if audio_s is None else audio_s
            write_clicks(container, sound, impulses_s, audio_start_s, length_s)
    return path


def grey_frame(luma: np.ndarray, pixel_format: str) -> av.VideoFrame:
    """Makes a frame with this luma in limited range, and no colour."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(luma.astype(np.uint8)), format="gray")
    frame.color_range = 1
    planes = np.concatenate([luma.ravel(), np.full(luma.size // 2, 128)]).astype(np.uint8)
    height, width = luma.shape
    frame = av.VideoFrame.from_ndarray(planes.reshape(height * 3 // 2, width), format="yuv420p")
    return frame if pixel_format == "yuv420p" else frame.reformat(format=pixel_format)


def write_clicks(container: Any, stream: Any, impulses_s: Sequence[float], start_s: float, length_s: float) -> None:
    """Encodes silence with single samples of full amplitude."""
    samples = np.zeros(round(length_s * RATE_HZ), np.float32)
    for impulse_s in impulses_s:
        samples[round((impulse_s - start_s) * RATE_HZ)] = 0.9
    for begin in range(0, len(samples), SAMPLES):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + SAMPLES], "fltp", "mono")
        frame.rate, frame.time_base = RATE_HZ, Fraction(1, RATE_HZ)
        frame.pts = begin + round(start_s * RATE_HZ)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@dataclass
class Decoded:
    times_s: np.ndarray  # from the start of the container's time
    luma: np.ndarray  # uint8 [frames, height, width]
    rgb: np.ndarray  # uint8 [frames, height, width, 3]
    stream: dict[str, Any]


def decode(path: Path) -> Decoded:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        facts = {
            "rate": stream.average_rate,
            "aspect": stream.sample_aspect_ratio,
            "colours": (frames[0].colorspace, frames[0].color_range),
            "interlaced": any(frame.interlaced_frame for frame in frames),
            "rotation": frames[0].rotation,
            "codec": stream.codec_context.name,
            "format": frames[0].format.name,
        }
        times_s = np.array([float(frame.pts * frame.time_base) for frame in frames])
        luma = [plane_of(frame) for frame in frames]
        rgb = [frame.to_ndarray(format="rgb24", interpolation=ACCURATE) for frame in frames]
        return Decoded(times_s, np.stack(luma), np.stack(rgb), facts)


def plane_of(frame: av.VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].copy()


def audio_bytes(path: Path) -> bytes:
    """Returns the content of all packets. Demuxers divide PCM into packets as they like."""
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0))


def uniform(levels: Sequence[float], height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Makes frames of one luma each."""
    return [np.full((height, width), level, np.uint8) for level in levels]


def texture(seed: int, height: int = 72, width: int = 128) -> np.ndarray:
    """Luma with detail at several scales, 40..216."""
    random = np.random.default_rng(seed)
    sizes = [(4, 4), (9, 16), (18, 32)]
    layers = [np.kron(random.uniform(0, 1, size), np.ones((height // size[0], width // size[1]))) for size in sizes]
    mixed = sum(layer / (number + 1) for number, layer in enumerate(layers))
    return (40 + 176 * (mixed - mixed.min()) / np.ptp(mixed)).astype(np.uint8)


def pan(seed: int, frames: int, step_px: int = 2) -> list[np.ndarray]:
    wide = np.concatenate([texture(seed), texture(seed + 100)], axis=1)
    return [wide[:, number * step_px : number * step_px + 128] for number in range(frames)]


def convert(source: Path, output: Path | None = None, network: Any = None, **options: Any) -> VideoReport:
    options = {"times": 2, "quality": 100} | options
    if "fps" in options:
        del options["times"]
    return interpolate_video(blending_interpolator(network), source, output or source.with_name("out.mp4"), **options)


# ---- Number and times of frames


@pytest.mark.parametrize(
    ("source_fps", "options", "target"),
    [
        (15, {"times": 2}, Fraction(30)),
        (24, {"times": 2.5}, Fraction(60)),
        (24, {"fps": 60}, Fraction(60)),
        (30, {"fps": 24}, Fraction(24)),
        (25, {"fps": 29.97}, Fraction(30_000, 1001)),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_frames_have_the_right_number_times_and_content(
    tmp_path: Path, source_fps: int, options: dict[str, float], target: Fraction, suffix: str
):
    """Brightness rises linearly with time, so that each output frame must have the brightness of its time."""
    levels_per_s = 120
    levels = [30 + levels_per_s * number / source_fps for number in range(source_fps)]  # one second
    source = write_film(tmp_path / f"in.{suffix}", uniform(np.round(levels)), fps=source_fps)
    output = tmp_path / f"out.{suffix}"
    report = convert(source, output, **options)
    film = decode(output)
    count = int(np.ceil(float(target) - 0.25))
    assert film.stream["rate"] == target
    assert len(film.times_s) == report.frames_written == count
    assert np.abs(film.times_s - np.arange(count) / float(target)).max() <= (0.0006 if suffix == "mkv" else 1e-4)
    last_s = (source_fps - 1) / source_fps
    expected = 30 + levels_per_s * np.minimum(np.arange(count) / float(target), last_s)
    assert np.abs(film.luma.mean((1, 2)) - expected).max() < 1.6
    assert report.frames_read == source_fps and (report.source_fps, report.target_fps) == (source_fps, float(target))
    assert report.cuts == report.duplicates == 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_that_the_source_has_are_not_made(tmp_path: Path, suffix: str):
    """Matroska rounds their times to milliseconds."""
    source = write_film(tmp_path / f"in.{suffix}", pan(1, 20), fps=15)
    report = convert(source, times=2)
    assert (report.frames_written, report.frames_made) == (40, 19)
    assert np.abs(decode(tmp_path / "out.mp4").luma[:-1:2].astype(int) - decode(source).luma).max() <= 8


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_becomes_constant(tmp_path: Path, suffix: str):
    gaps = np.array([1, 3, 2, 6, 1, 1, 4, 2, 5, 1, 2, 2, 3, 1, 6, 2, 1, 4, 2, 2]) / 60
    times_s = np.concatenate([[0], np.cumsum(gaps)])
    levels = 30 + 200 * times_s
    source = write_film(tmp_path / f"in.{suffix}", uniform(np.round(levels)), times_s.tolist(), fps=30)
    report = convert(source, times=2)
    film = decode(tmp_path / "out.mp4")
    assert report.source_fps == pytest.approx(len(gaps) / times_s[-1], rel=1e-3)
    assert np.abs(np.diff(film.times_s) - 1 / report.target_fps).max() < 2e-4
    expected = 30 + 200 * np.minimum(film.times_s, times_s[-1])
    assert np.abs(film.luma.mean((1, 2)) - expected).max() < 1.6


def test_a_few_missing_frames_leave_the_rate(tmp_path: Path):
    times_s = [Fraction(number, 25) for number in range(40) if number != 17]
    source = write_film(tmp_path / "in.mp4", uniform([30 + float(100 * time) for time in times_s]), times_s, fps=25)
    assert convert(source, times=2).target_fps == 50


def test_a_gap_without_frames_is_still(tmp_path: Path):
    """Screen recorders write no frames while nothing changes."""
    times_s = [number / 15 for number in range(20)] + [4 + number / 15 for number in range(20)]
    levels = [40 + 2 * number for number in range(20)] + [140 + 2 * number for number in range(20)]
    source = write_film(tmp_path / "in.mp4", uniform(levels), times_s)
    convert(source, fps=30)
    film = decode(tmp_path / "out.mp4")
    still = (film.times_s > 19.5 / 15) & (film.times_s < 3.8)
    assert np.abs(film.luma[still].mean((1, 2)) - 78).max() < 1.6


# ---- Cuts


def test_cuts_are_not_morphed(tmp_path: Path):
    shots = [pan(1, 12), pan(2, 9), pan(3, 12)]
    source = write_film(tmp_path / "in.mp4", [frame for shot in shots for frame in shot])
    report = convert(source, times=3)
    assert report.cut_times_s == pytest.approx([12 / 15, 21 / 15])
    originals, film = decode(source).luma.astype(int), decode(tmp_path / "out.mp4").luma.astype(int)
    for cut in (12, 21):
        for number in range(3 * cut - 2, 3 * cut):
            near = cut - 1 if number == 3 * cut - 2 else cut
            far = 2 * cut - 1 - near
            assert np.abs(film[number] - originals[near]).mean() < 2
            assert np.abs(film[number] - originals[far]).mean() > 20
    assert len(film) == 99 and report.frames_made == 2 * (11 + 8 + 11)


def test_a_cut_stays_where_it_is_behind_duplicates(tmp_path: Path):
    """Two scenes, animated on threes: the cut is between the last duplicate and the next scene."""
    drawn = [frame for shot in (pan(1, 5, 6), pan(2, 5, 6)) for frame in shot]
    source = write_film(tmp_path / "in.mp4", [frame for frame in drawn for _ in range(3)], fps=24)
    report = convert(source, times=2)
    originals, film = decode(source).luma.astype(int), decode(tmp_path / "out.mp4").luma.astype(int)
    assert report.cut_times_s == pytest.approx([15 / 24])
    assert report.duplicates == 20
    for number in range(24, 30):
        assert np.abs(film[number] - originals[14 if number <= 29 else 15]).mean() < 2
    assert np.abs(film[30] - originals[15]).mean() < 2


def flash(frames: list[np.ndarray], first: int, length: int) -> list[np.ndarray]:
    bright = {
        number: np.minimum(frames[number].astype(int) + 90, WHITE).astype(np.uint8) for number in range(len(frames))
    }
    return [bright[number] if first <= number < first + length else frame for number, frame in enumerate(frames)]


def fade(frames: list[np.ndarray], length: int) -> list[np.ndarray]:
    weights = np.clip(1 - np.arange(len(frames)) / length, 0, 1)
    return [(16 + weight * (frame - 16.0)).astype(np.uint8) for frame, weight in zip(frames, weights, strict=True)]


def dissolve(frames: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
    weights = np.linspace(0, 1, len(frames))
    return [(a * (1 - w) + b * w).astype(np.uint8) for a, b, w in zip(frames, others, weights, strict=True)]


@pytest.mark.parametrize(
    "frames",
    [
        flash(pan(1, 14), 6, 1),
        flash(pan(1, 14), 6, 2),
        fade(pan(1, 14), 10),
        fade(pan(1, 14), 5),
        dissolve(pan(1, 12), pan(2, 12)),
        pan(4, 12, 10),
        [texture(5)] * 4 + pan(5, 8, 8),
    ],
    ids=["flash", "long flash", "fade", "short fade", "dissolve", "fast pan", "sudden pan"],
)
def test_other_changes_are_no_cuts(tmp_path: Path, frames: list[np.ndarray]):
    source = write_film(tmp_path / "in.mp4", frames)
    assert convert(source).cuts == 0


def test_a_shot_of_one_frame_has_two_cuts(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", [*pan(1, 8), texture(7), *pan(2, 8)])
    report = convert(source)
    assert report.cut_times_s == pytest.approx([8 / 15, 9 / 15])


def test_motion_size_can_be_given(tmp_path: Path):
    network = StillNetwork()
    source = write_film(tmp_path / "in.mp4", pan(1, 5))
    convert(source, network=network, motion_size=96)
    assert set(network.widths) == {96}
    convert(source, network=network)
    assert set(network.widths) == {96, 128}


# ---- Duplicates


@pytest.mark.parametrize(("hold", "options"), [(2, LOSSLESS), (3, LOSSLESS), (2, {"crf": "20"})])
def test_motion_is_spread_over_duplicates(tmp_path: Path, hold: int, options: dict[str, str]):
    """Animation on twos and threes: brightness rises evenly, although the source repeats each frame."""
    levels = np.repeat(40 + 12 * np.arange(12), hold)
    source = write_film(tmp_path / "in.mp4", uniform(levels), fps=24, options=options)
    report = convert(source, times=2)
    film = decode(tmp_path / "out.mp4").luma.mean((1, 2))
    expected = np.minimum(40 + 12 * np.arange(len(film)) / (2 * hold), 40 + 12 * 11)
    assert np.abs(film - expected).max() < 2
    assert report.duplicates == 12 * (hold - 1)


def test_telecined_film_moves_in_each_frame(tmp_path: Path):
    """24 frames per second in 30: each fifth frame repeats the fourth."""
    shown = [4 * (number // 5) + min(number % 5, 3) for number in range(30)]
    source = write_film(tmp_path / "in.mp4", uniform(40 + 6 * np.array(shown)), fps=30)
    report = convert(source, times=2)
    film = decode(tmp_path / "out.mp4").luma.mean((1, 2))
    steps = np.diff(film)[: 2 * 28]  # before the last repeated frame
    assert report.duplicates == 6
    assert steps.min() > 0.7 and steps.max() < 5


def test_a_still_film_stays_still(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", [texture(1)] * 30)
    report = convert(source)
    film = decode(tmp_path / "out.mp4").luma.astype(int)
    assert (report.frames_made, report.duplicates, report.frames_written) == (0, 29, 60)
    assert np.abs(film - texture(1)).max() <= 6


def test_motion_after_a_still_scene_begins_when_it_begins(tmp_path: Path):
    levels = [60] * 30 + [60 + 10 * number for number in range(1, 10)]
    source = write_film(tmp_path / "in.mp4", uniform(levels))
    convert(source, times=2)
    film = decode(tmp_path / "out.mp4").luma.mean((1, 2))
    assert np.abs(film[:59] - 60).max() < 1.6
    expected = np.minimum(60 + 5 * np.arange(1, 20), 150)
    assert np.abs(film[59:] - expected).max() < 1.6


# ---- Sound


@pytest.mark.parametrize(
    ("suffix", "audio_codec", "output"),
    [
        ("mp4", "aac", "out.mp4"),
        ("mp4", "aac", "out.mkv"),
        ("mkv", "libopus", "out.mkv"),
        ("mkv", "aac", "out.mp4"),
        ("mkv", "flac", "out.mp4"),
        ("mkv", "pcm_s16le", "out.mov"),
    ],
)
def test_audio_is_copied_bit_by_bit(tmp_path: Path, suffix: str, audio_codec: str, output: str):
    source = write_film(tmp_path / f"in.{suffix}", pan(1, 30), audio_codec=audio_codec, impulses_s=[0.5, 1.1])
    report = convert(source, tmp_path / output)
    assert (report.audio_copied, report.audio_encoded, report.left_out) == (1, 0, [])
    assert len(audio_bytes(source)) > 500 and audio_bytes(tmp_path / output) == audio_bytes(source)


def click_and_flash(path: Path) -> tuple[float, float]:
    """Returns the times of the loudest sample and of the brightest frame, as a player shows them."""
    with av.open(str(path)) as container:
        loudest, click_s = 0.0, 0.0
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray().astype(np.float64)).max(0)
            if np.issubdtype(frame.to_ndarray().dtype, np.integer):
                samples = samples / np.iinfo(frame.to_ndarray().dtype).max
            if samples.max() > loudest:
                loudest = samples.max()
                click_s = float(frame.pts * frame.time_base) + samples.argmax() / frame.rate
    film = decode(path)
    return click_s, float(film.times_s[film.luma.mean((1, 2)).argmax()])


def flash_frames(number: int, count: int = 45) -> list[np.ndarray]:
    frames = uniform(60 + np.arange(count) % 2 * 4)
    frames[number] = uniform([WHITE])[0]
    return frames


@pytest.mark.parametrize("output", ["out.mp4", "out.mkv"])
@pytest.mark.parametrize(
    ("suffix", "audio_codec", "video_start_s", "audio_start_s"),
    [
        ("mp4", "aac", 0, 0),
        ("mkv", "libopus", 0, 0),
        ("mkv", "pcm_s16le", 5.4321, 5),  # times that do not start at 0, and video that starts after the audio
        ("mp4", "aac", 0, 0.35),
        ("mp4", "aac", 0.517, 0),
        ("ts", "aac", 0, 0),
        ("avi", "mp2", 0, 0),
    ],
)
def test_audio_stays_in_sync(
    tmp_path: Path, suffix: str, audio_codec: str, video_start_s: float, audio_start_s: float, output: str
):
    flash_s = video_start_s + 20 / 15
    times_s = [video_start_s + number / 15 for number in range(45)]
    source = write_film(
        tmp_path / f"in.{suffix}",
        flash_frames(20),
        times_s,
        kind={"ts": "mpegts", "mkv": "matroska"}.get(suffix, suffix),
        options={"preset": "ultrafast", "crf": "10"},
        audio_codec=audio_codec,
        impulses_s=[flash_s],
        audio_start_s=audio_start_s,
        audio_s=2.5,
    )
    source_click_s, source_flash_s = click_and_flash(source)
    if suffix == "avi":
        source_flash_s = flash_s  # avi stores no times of frames, and those that FFmpeg guesses are wrong
    convert(source, tmp_path / output)
    click_s, shown_s = click_and_flash(tmp_path / output)
    assert abs((click_s - shown_s) - (source_click_s - source_flash_s)) < 0.003
    assert abs(click_s - shown_s) < 1 / 15


def test_audio_of_an_edit_list_stays_in_sync(tmp_path: Path):
    """The edit lists of both tracks begin 0.4 s and 0.45 s within the media."""
    source = write_film(
        tmp_path / "in.mp4", flash_frames(20), audio_codec="aac", impulses_s=[20 / 15], audio_s=2.5, options={"g": "5"}
    )
    trimmed = tmp_path / "trimmed.mp4"
    cut_with_edit_lists(source, trimmed, 0.5)
    source_click_s, source_flash_s = click_and_flash(trimmed)
    assert source_flash_s < 0.9
    report = convert(trimmed)
    click_s, shown_s = click_and_flash(tmp_path / "out.mp4")
    assert report.frames_read < 40
    assert abs((click_s - shown_s) - (source_click_s - source_flash_s)) < 0.003


def cut_with_edit_lists(source: Path, output: Path, start_s: float) -> None:
    """Copies packets with times from `start_s` on as 0; mp4 hides what is before by its edit list."""
    with av.open(str(source)) as container, av.open(str(output), "w") as muxer:
        streams = {stream.index: muxer.add_stream_from_template(stream) for stream in container.streams}
        for packet in container.demux():
            if packet.size:
                shift = round(start_s / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = streams[packet.stream.index]
                muxer.mux(packet)


def test_audio_that_the_container_cannot_hold_is_encoded(tmp_path: Path):
    source = write_film(
        tmp_path / "in.wmv",
        flash_frames(20),
        kind="asf",
        codec="wmv2",
        options={"b": "4000k"},
        audio_codec="wmav2",
        impulses_s=[20 / 15],
        audio_s=2.5,
    )
    report = convert(source)
    assert (report.audio_copied, report.audio_encoded) == (0, 1)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.audio[0].rate == RATE_HZ
    click_s, shown_s = click_and_flash(tmp_path / "out.mp4")
    assert abs(click_s - shown_s) < 1 / 30


def test_audio_may_be_longer_than_the_video(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 10), audio_codec="aac", audio_s=3)
    convert(source)
    assert audio_bytes(tmp_path / "out.mp4") == audio_bytes(source)


# ---- Geometry and colours


def test_rotated_video_is_written_upright(tmp_path: Path):
    frames = pan(1, 12)
    source = write_film(tmp_path / "in.mp4", frames)
    # x' = -y and y' = x, as phones write it.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    source.write_bytes(overwrite_body(source.read_bytes(), "moov/trak/tkhd", 40, matrix))
    assert decode(source).stream["rotation"] != 0
    convert(source)
    film = decode(tmp_path / "out.mp4")
    assert film.stream["rotation"] == 0
    assert film.luma.shape == (24, 128, 72)
    assert np.abs(film.luma[0].astype(int) - np.rot90(frames[0], -1)).mean() < 2


def test_pixel_aspect_is_kept(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 12), tags={"sample_aspect_ratio": Fraction(4, 3)})
    convert(source)
    assert decode(tmp_path / "out.mp4").stream["aspect"] == Fraction(4, 3)
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    source.write_bytes(overwrite_body(source.read_bytes(), "moov/trak/tkhd", 40, matrix))
    convert(source)
    assert decode(tmp_path / "out.mp4").stream["aspect"] == Fraction(3, 4)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv422p10le", "yuvj420p"])
@pytest.mark.parametrize("matrix", [1, 6])
def test_colours_are_kept(tmp_path: Path, pixel_format: str, matrix: int):
    """Made frames and the source's have the colours of a blend of the source, in the matrix that the file states."""
    first, last = np.array([200, 40, 60.0]), np.array([60, 190, 220.0])
    weights = np.linspace(0, 1, 9)
    frames = [np.broadcast_to((1 - w) * first + w * last, (48, 64, 3)).round().astype(np.uint8) for w in weights]
    full_range = pixel_format == "yuvj420p"
    options = {"dst_colorspace": matrix if matrix == 1 else 5, "dst_color_range": 2 if full_range else 1}
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15, options=LOSSLESS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixel_format
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full_range else 1
        context.color_primaries = context.color_trc = matrix
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixel_format, **options)))
        container.mux(stream.encode())
    convert(path)
    film = decode(tmp_path / "out.mp4")
    expected_matrix = matrix if pixel_format in ("yuv420p", "yuvj420p") else 1
    assert film.stream["colours"] == (expected_matrix, 2 if full_range else 1)
    blends = [(1 - w) * first + w * last for w in np.linspace(0, 1, 17)]
    assert np.abs(film.rgb[:17].mean((1, 2)) - np.array(blends)).max() < 3.5


def test_odd_sizes_are_padded(tmp_path: Path):
    frames = [np.repeat(frame[:47, :63, None], 3, axis=2) for frame in pan(1, 8)]
    source = write_film(tmp_path / "in.mkv", frames, codec="ffv1", pixel_format="yuv444p", options={})
    convert(source)
    film = decode(tmp_path / "out.mp4")
    assert film.luma.shape[1:] == (48, 64)
    assert np.abs(film.luma[:, 47].astype(int) - film.luma[:, 46]).mean() < 4


def test_hdr_is_tone_mapped(tmp_path: Path):
    """Diffuse white of 203 cd/m2 in PQ becomes level 216 of 255: see giffy_ray/data/colour.py."""
    signal = 0.5807  # ITU-R BT.2100, the inverse EOTF of 203 cd/m2
    level = round(64 + 876 * signal)
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15, options=LOSSLESS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 9, 1, 9, 16
        for number in range(6):
            frame = av.VideoFrame(64, 48, "yuv420p10le")
            for plane, value in zip(frame.planes, (level + 4 * (number % 2), 512, 512), strict=True):
                plane.update(value.to_bytes(2, "little") * (plane.buffer_size // 2))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    convert(path)
    film = decode(tmp_path / "out.mp4")
    assert film.stream["colours"] == (1, 1) and film.stream["format"] == "yuv420p"
    assert np.abs(film.rgb[0].mean((0, 1)) - 216).max() < 3


def test_interlaced_video_is_deinterlaced(tmp_path: Path):
    """The fields of a frame show a moving edge at two times, which combs; the output's neighbouring lines agree."""
    frames = []
    for number in range(16):
        picture = np.full((96, 128), 60, np.uint8)
        for field_number in (0, 1):
            left = 8 + 4 * (2 * number + field_number) % 100
            picture[field_number::2, left : left + 20] = 200
        frames.append(picture)
    source = write_film(tmp_path / "in.mp4", frames, options={**LOSSLESS, "x264-params": "interlaced=1:tff=1"})
    original = decode(source)
    assert original.stream["interlaced"]
    convert(source)
    film = decode(tmp_path / "out.mp4")
    assert not film.stream["interlaced"] and len(film.luma) == 32

    def combing(luma: np.ndarray) -> float:
        lines = luma.astype(int)
        return float(np.abs(2 * lines[:, 1:-1] - lines[:, :-2] - lines[:, 2:]).mean())

    assert combing(original.luma) > 5
    assert combing(film.luma[2:-2]) < combing(original.luma) / 4


def test_size_may_change_within_the_film(tmp_path: Path):
    """mpegts can join recordings of two sizes."""
    joined = tmp_path / "in.ts"
    parts = []
    for number, (height, width) in enumerate(((48, 64), (96, 128))):
        times_s = [number + index / 15 for index in range(15)]
        part = write_film(
            tmp_path / f"{number}.ts",
            uniform(60 + 4 * np.arange(15), height, width),
            times_s,
            kind="mpegts",
            options={"preset": "ultrafast", "crf": "5"},
        )
        parts.append(part.read_bytes())
    joined.write_bytes(b"".join(parts))
    convert(joined)
    film = decode(tmp_path / "out.mp4")
    assert film.luma.shape[1:] == (48, 64) and len(film.luma) >= 58


# ---- Metadata and other streams


def test_metadata_chapters_and_subtitles_are_kept(tmp_path: Path):
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as container:
        container.metadata["title"] = "Zwölf Boote"
        container.set_chapters(
            [
                {"id": 1, "start": 0, "end": 600, "time_base": Fraction(1, 1000), "metadata": {"title": "Harbour"}},
                {"id": 2, "start": 600, "end": 2000, "time_base": Fraction(1, 1000), "metadata": {"title": "Sea"}},
            ]
        )
        stream = container.add_stream("libx264", rate=15, options=LOSSLESS)
        stream.height, stream.width, stream.pix_fmt = 72, 128, "yuv420p"
        sound = container.add_stream("aac", rate=RATE_HZ)
        sound.layout = "mono"
        sound.metadata["language"] = "deu"
        words = container.add_mux_stream("subrip")
        words.time_base = Fraction(1, 1000)
        for picture in pan(1, 30):
            container.mux(stream.encode(grey_frame(picture, "yuv420p")))
        container.mux(stream.encode())
        write_clicks(container, sound, [], 0, 2)
        packet = av.Packet(b"Ahoy")
        packet.pts = packet.dts = 500
        packet.duration, packet.time_base, packet.stream = 700, Fraction(1, 1000), words
        container.mux(packet)
    report = convert(source, tmp_path / "out.mkv")
    assert report.left_out == []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.metadata["title"] == "Zwölf Boote"
        chapters = [
            (chapter["metadata"]["title"], float(chapter["start"] * chapter["time_base"]))
            for chapter in container.chapters()
        ]
        assert chapters == [("Harbour", 0), ("Sea", pytest.approx(0.6, abs=0.03))]
        assert container.streams.audio[0].language == "deu"
        (said,) = [packet for packet in container.demux(subtitles=0) if packet.size]
        assert bytes(said) == b"Ahoy"
        assert float(said.pts * said.time_base) == pytest.approx(0.5, abs=0.03)
    report = convert(source, tmp_path / "out.mp4")
    assert report.left_out == ["subtitle stream 2 (subrip)"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.metadata["title"] == "Zwölf Boote"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["Harbour", "Sea"]


# ---- Memory, progress, interruption


def test_memory_does_not_grow_with_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At any time a few frames have been read that are not written yet, also in still scenes and between cuts."""
    read = 0
    ahead = []

    def count_frames(*arguments: Any) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        nonlocal read
        for item in original(*arguments):
            read += 1
            yield item

    original = video.read_frames
    monkeypatch.setattr(video, "read_frames", count_frames)
    shots = [[texture(9)] * 60, pan(1, 50, 1), [texture(8)] * 90, pan(2, 50, 1)]
    source = write_film(tmp_path / "in.mp4", [frame for shot in shots for frame in shot], audio_codec="aac")
    convert(source, on_progress=lambda written, total: ahead.append(read - written / 2))
    assert read == 250
    assert max(ahead) <= 10  # four mean intervals of 1/15 s, three frames for cuts, and two whose motion is estimated


def test_progress_counts_to_the_end(tmp_path: Path):
    calls = []
    convert(write_film(tmp_path / "in.mp4", pan(1, 9)), on_progress=lambda *counts: calls.append(counts))
    assert calls == [(number, 18) for number in range(1, 19)]


def test_an_interruption_leaves_nothing(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 20), audio_codec="aac")
    output = tmp_path / "folder" / "out.mp4"
    output.parent.mkdir()
    output.write_bytes(b"an earlier film")

    def interrupt(written: int, total: int) -> None:
        assert len(list(output.parent.iterdir())) <= 2
        if written == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, output, on_progress=interrupt)
    assert [path.name for path in output.parent.iterdir()] == ["out.mp4"]
    assert output.read_bytes() == b"an earlier film"


# ---- Errors


def broken_films(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = write_film(folder / "whole.mp4", pan(1, 60), audio_codec="aac").read_bytes()
    matroska = write_film(folder / "whole.mkv", pan(1, 60)).read_bytes()
    contents = {
        "text.mp4": (b"not a video", "not a video that can be read"),
        "empty.mp4": (b"", "not a video that can be read"),
        "concat.mp4": (b"ffconcat version 1.0\nfile whole.mp4\n", "not a video that can be read"),
        "headless.mp4": (whole[: len(whole) // 2], "not a video that can be read"),
        "cut.mp4": (faststart(folder, whole), "damaged|truncated"),
        "cut.mkv": (matroska[: len(matroska) // 2], "truncated"),
        "single.mp4": (write_film(folder / "one.mp4", pan(1, 1)).read_bytes(), "fewer than two frames"),
    }
    films = {}
    for name, (content, message) in contents.items():
        films[name] = folder / f"broken-{name}", message
        films[name][0].write_bytes(content)
    return films


def faststart(folder: Path, whole: bytes) -> bytes:
    """Returns two thirds of a film whose list of frames comes first."""
    single = write_film(folder / "silent.mp4", pan(1, 60)).read_bytes()
    moved = make_faststart(single)
    return moved[: len(moved) * 2 // 3]


@pytest.mark.parametrize(
    "name", ["text.mp4", "empty.mp4", "concat.mp4", "headless.mp4", "cut.mp4", "cut.mkv", "single.mp4"]
)
def test_broken_films_are_refused_in_one_line(tmp_path: Path, name: str):
    path, message = broken_films(tmp_path)[name]
    with pytest.raises(InputError, match=message) as raised:
        convert(path, tmp_path / "outputs" / "out.mp4")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("outputs/*"))


def test_a_damaged_middle_is_refused(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 90), options={"crf": "5"})
    content = bytearray(source.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    source.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        convert(source, tmp_path / "outputs" / "out.mp4")
    assert not list(tmp_path.glob("outputs/*"))


def test_sound_without_video_is_refused(tmp_path: Path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=RATE_HZ)
        stream.layout = "mono"
        write_clicks(container, stream, [0.5], 0, 1)
    with pytest.raises(InputError, match="has no video stream"):
        convert(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": None}, "times, fps: give one"),
        ({"times": 2, "fps": 30}, "times, fps: give one"),
        ({"times": 0}, "times: must be above 0"),
        ({"times": float("nan")}, "times: must be above 0"),
        ({"times": 100}, "times: 1500 frames per second"),
        ({"fps": -1, "times": None}, "fps: must be above 0"),
        ({"fps": 1001, "times": None}, "fps: must be above 0"),
        ({"quality": 101}, "quality: must be 0 to 100"),
        ({"motion_size": 0}, "motion_size: must be at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    source = write_film(tmp_path / "in.mp4", pan(1, 4))
    with pytest.raises(InputError, match=message):
        interpolate_video(blending_interpolator(), source, tmp_path / "out.mp4", **({"times": 2} | options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_wrong_files_are_refused(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 4))
    for path, output, message in (
        (source, source, "is the source"),
        (source, tmp_path / "out.gif", "change the suffix"),
        (tmp_path / "none.mp4", tmp_path / "out.mp4", "there is no such file"),
        (tmp_path, tmp_path / "out.mp4", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            convert(path, output)
    small = Interpolator(object(), override(Experiment(), {"clip.height": 48}), torch.device("cpu"))
    with pytest.raises(InputError, match="model: this one generates only clips of 64x48"):
        interpolate_video(small, source, tmp_path / "out.mp4", times=2)


# ---- With a model


def test_a_model_doubles_the_rate(tmp_path: Path):
    source = write_film(tmp_path / "in.mp4", pan(1, 6), audio_codec="aac")
    report = interpolate_video(Interpolator.from_pretrained(device="cpu"), source, tmp_path / "out.mp4", times=2)
    film, original = decode(tmp_path / "out.mp4").luma.astype(float), decode(source).luma.astype(float)
    assert (report.frames_written, report.frames_made) == (12, 5)
    assert np.abs(film[:-1:2] - original).mean() < 4
    for number in range(5):  # made frames are no copies of a neighbour, and like both
        made, start, end = film[2 * number + 1], original[number], original[number + 1]
        assert 0.5 < np.abs(made - start).mean() < 30 and 0.5 < np.abs(made - end).mean() < 30
