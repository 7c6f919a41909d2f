"""Measures whole-video interpolation: memory, audio sync, cuts, speed and quality, next to FFmpeg's minterpolate.

    .venv/bin/python benchmarks/video.py [--images FOLDER] [--model NAME] [--seconds 60] [--compared-seconds 8]

Makes a film of 1280x720 with sound and three cuts: four pictures, each panned and zoomed, with a smaller one that moves
across. Its frame rate rises from 15 to 30. A few white frames and clicks at the same instants show whether picture and
sound stay in step. Then a film of 30 frames per second loses every second frame, and the frames made in their place are
compared with them.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from giffy_ray.config import Experiment, override
from giffy_ray.inference.clip import add_video_stream, to_video_frame
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.video import VideoReport, interpolate_video
from giffy_ray.models.motion import Motion

WIDTH, HEIGHT = 1280, 720
SHOTS = 4
SLOW_FPS, FAST_FPS = 15, 30
SAMPLE_RATE_HZ = 48_000
CLICK_S = 0.005
WHITE_FRAME_FRACTIONS = (0.1, 0.4, 0.6, 0.95)  # of the film
QUALITY = 80
RATE_FACTOR = 38 - QUALITY // 4  # x264's, for the same quality from ffmpeg
MEASURED_QUALITY = 100  # of the outputs whose PSNR is measured
MINTERPOLATE = f"minterpolate=fps={FAST_FPS}:mi_mode=mci"


class StillNetwork:
    """Finds no motion, so that the frames between two are cross-fades."""

    latent = 0

    def iter_motion(self, start: Tensor, end: Tensor, noise: Tensor, times: Tensor) -> Iterator[Motion]:
        fields = start.new_zeros(len(times), 8, *start.shape[2:])
        yield Motion(fields[:, :4], fields[:, 4:5], fields[:, 5:])


def cross_fade() -> Interpolator:
    """Returns an interpolator that blends: trained on images so large that `Interpolator` does not match them."""
    experiment = override(Experiment(), {"clip.height": 2**12, "clip.width": 2**12})
    return Interpolator(StillNetwork(), experiment, torch.device("cpu"))  # type: ignore[arg-type]


@dataclass
class MemoryCurve:
    """Resident memory by number of written frames."""

    written: list[int] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)

    def sample(self, written: int, total: int) -> None:
        if written % 10 == 0 or written == total:
            self.written.append(written)
            self.rss_mb.append(psutil.Process().memory_info().rss / 1e6)

    def quarters(self) -> list[float]:
        """Returns the peak of each quarter of the film."""
        return [float(part.max()) for part in np.array_split(np.array(self.rss_mb), 4)]


# ---- Films


def load_pictures(folder: Path | None) -> list[Image.Image]:
    """Returns `SHOTS` + 1 pictures of at least 1.5 times the size of the film."""
    size = (WIDTH * 3 // 2, HEIGHT * 3 // 2)
    if folder is None:
        return [draw_texture(seed, size) for seed in range(SHOTS + 1)]
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            if picture.width >= size[0] and picture.height >= size[1]:
                picture.draft("RGB", size)
                pictures.append(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        if len(pictures) == SHOTS + 1:
            return pictures
    sys.exit(f"{folder}: has {len(pictures)} pictures of {size[0]}x{size[1]} pixels or more; {SHOTS + 1} are needed")


def draw_texture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Draws detail at all scales: the sum of enlarged noise, with shapes on it."""
    random = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = (255 * random.random((max(2, cells * 9 // 16), cells, 3))).astype(np.uint8)
        total += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), np.float32) / cells**0.6
    total = 255 * (total - total.min()) / np.ptp(total)
    picture = Image.fromarray(total.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(60):
        x, y, radius = random.integers(0, size[0]), random.integers(0, size[1]), random.integers(5, 90)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(random.integers(0, 256, 3).tolist()))
    return picture


def render_film(pictures: Sequence[Image.Image], seconds: float, fps: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (shot, uint8 [height, width, 3]) for each frame. Motion is smooth, and faster in each shot."""
    frames_per_shot = round(seconds * fps / SHOTS)
    object_size = 260
    mask = Image.new("L", (object_size, object_size))
    ImageDraw.Draw(mask).ellipse([4, 4, object_size - 4, object_size - 4], fill=255)
    thing = pictures[-1].resize((WIDTH, HEIGHT)).crop((300, 200, 300 + object_size, 200 + object_size))
    for shot in range(SHOTS):
        picture = pictures[shot]
        speed = 25 * (shot + 1)  # pixels of the picture per second
        for number in range(frames_per_shot):
            moment = number / fps
            scale = 1 + 0.04 * np.sin(0.5 * moment)
            width, height = WIDTH * scale, HEIGHT * scale
            swing = (picture.width - WIDTH * 1.05) / 2
            x = swing * (1 + np.sin(speed * moment / swing - 1)) * 0.98
            y = (picture.height - HEIGHT * 1.05) / 2 * (1 + np.sin(0.3 * moment))
            view = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
            left = (WIDTH - object_size) * (0.5 + 0.5 * np.sin(0.4 * (shot + 1) * moment + shot))
            paste_smoothly(view, thing, mask, left, HEIGHT / 3 + 60 * np.sin(1.3 * moment))
            yield shot, np.asarray(view)


def paste_smoothly(view: Image.Image, thing: Image.Image, mask: Image.Image, x: float, y: float) -> None:
    """Pastes at a position between pixels."""
    whole_x, whole_y = int(x), int(y)
    size = (thing.width + 1, thing.height + 1)
    matrix = (1, 0, whole_x - x, 0, 1, whole_y - y)
    shifted, shifted_mask = (
        image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR) for image in (thing, mask)
    )
    view.paste(shifted, (whole_x, whole_y), shifted_mask)


def write_film(path: Path, frames: Iterator[np.ndarray], fps: int, quality: int, clicks_s: Sequence[float]) -> int:
    """Writes frames and a track of clicks. Returns the number of frames."""
    count = 0
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, Fraction(fps), quality)
        stream.width, stream.height = WIDTH, HEIGHT
        sound: Any = container.add_stream("aac", rate=SAMPLE_RATE_HZ)
        sound.layout = "mono"
        for count, rgb in enumerate(frames, 1):
            container.mux(stream.encode(to_video_frame(rgb)))
            if count % fps == 0:  # a second of sound after each second of video
                write_sound(container, sound, count // fps - 1, clicks_s)
        container.mux(stream.encode())
        container.mux(sound.encode())
    return count


def write_sound(container: Any, stream: Any, second: int, clicks_s: Sequence[float]) -> None:
    samples = np.zeros(SAMPLE_RATE_HZ, np.float32)
    for click_s in clicks_s:
        if second <= click_s < second + 1:
            first = round((click_s - second) * SAMPLE_RATE_HZ)
            length = min(round(CLICK_S * SAMPLE_RATE_HZ), SAMPLE_RATE_HZ - first)
            samples[first : first + length] = 0.8 * np.sin(np.arange(length) * 2 * np.pi * 1000 / SAMPLE_RATE_HZ)
    frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
    frame.rate, frame.pts, frame.time_base = SAMPLE_RATE_HZ, second * SAMPLE_RATE_HZ, Fraction(1, SAMPLE_RATE_HZ)
    container.mux(stream.encode(frame))


def add_white_frames(frames: Iterator[tuple[int, np.ndarray]], numbers: set[int]) -> Iterator[np.ndarray]:
    for number, (_, rgb) in enumerate(frames):
        yield np.full_like(rgb, 255) if number in numbers else rgb


# ---- Measurements


def luma_frames(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Yields the time in seconds and uint8 [height, width] of each frame."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            yield float(frame.pts * frame.time_base), lines[:, : plane.width].copy()


def measure_sync(path: Path, seconds: float) -> list[float]:
    """Returns the time of each click minus that of its white frame, in milliseconds."""
    flashes_s = [moment for moment, luma in luma_frames(path) if luma.mean() > 225]
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        container.seek(0)
        first_s = next(float(frame.pts * frame.time_base) for frame in container.decode(audio=0))
    loud = np.flatnonzero(np.abs(np.concatenate(blocks)) > 0.2) / SAMPLE_RATE_HZ + first_s
    clicks_s = [moment for index, moment in enumerate(loud) if index == 0 or moment - loud[index - 1] > 0.5]
    if len(flashes_s) != len(WHITE_FRAME_FRACTIONS) or len(clicks_s) != len(flashes_s):
        sys.exit(f"{path}: has {len(flashes_s)} white frames and {len(clicks_s)} clicks")
    return [1000 * (click_s - flash_s) for click_s, flash_s in zip(clicks_s, flashes_s, strict=True)]


def count_mixtures(source: Path, output: Path, cut_numbers: Sequence[int]) -> int:
    """Counts output frames between the last frame before a cut and the first after it that resemble neither."""
    wanted = {number for cut in cut_numbers for number in (cut - 1, cut)}
    originals = {number: luma for number, (_, luma) in enumerate(luma_frames(source)) if number in wanted}
    mixtures = 0
    for moment, luma in luma_frames(output):
        for cut in cut_numbers:
            if (cut - 1) / SLOW_FPS < moment - 1e-3 and moment + 1e-3 < cut / SLOW_FPS:
                mixtures += max(psnr_db(luma, originals[cut - 1]), psnr_db(luma, originals[cut])) < 30
    return mixtures


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(first.astype(np.float32) - second).mean(), 1e-6)))


def run_minterpolate(source: Path, output: Path, rate_factor: int) -> float:
    """Returns the seconds that ffmpeg takes."""
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", str(rate_factor), "-c:a", "copy"]
    command = ["ffmpeg", "-loglevel", "error", "-y", "-i", str(source), "-vf", MINTERPOLATE, *encoder, str(output)]
    started_s = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started_s


def measure_whole_film(
    interpolator: Interpolator, pictures: Sequence[Image.Image], seconds: float, folder: Path, console: Console
) -> None:
    source, output = folder / "film.mp4", folder / "film-30.mp4"
    count = SHOTS * round(seconds * SLOW_FPS / SHOTS)
    white = {round(fraction * count) for fraction in WHITE_FRAME_FRACTIONS}
    frames = add_white_frames(render_film(pictures, seconds, SLOW_FPS), white)
    write_film(source, frames, SLOW_FPS, QUALITY, [number / SLOW_FPS for number in sorted(white)])
    memory = MemoryCurve()
    report = interpolate_video(interpolator, source, output, times=2, quality=QUALITY, on_progress=memory.sample)
    cuts = [count // SHOTS * shot for shot in range(1, SHOTS)]
    console.print(film_table(report, memory, measure_sync(output, seconds), count_mixtures(source, output, cuts)))


def film_table(report: VideoReport, memory: MemoryCurve, sync_ms: list[float], mixtures: int) -> Table:
    table = Table("whole film, 15 to 30 frames per second", "")
    quarters = memory.quarters()
    table.add_row("frames read, written, made", f"{report.frames_read}, {report.frames_written}, {report.frames_made}")
    table.add_row("seconds", f"{report.elapsed_s:.1f}")
    table.add_row("frames written per second", f"{report.frames_written / report.elapsed_s:.2f}")
    table.add_row("cuts found at, s", ", ".join(f"{moment:.2f}" for moment in report.cut_times_s))
    table.add_row("frames between two scenes that resemble neither", str(mixtures))
    table.add_row("peak memory by quarter of the film, MB", ", ".join(f"{peak:.0f}" for peak in quarters))
    table.add_row("growth from the first quarter to the last, MB", f"{quarters[-1] - quarters[0]:.0f}")
    table.add_row("click after its white frame, ms", ", ".join(f"{offset:.1f}" for offset in sync_ms))
    table.add_row("audio streams copied, encoded", f"{report.audio_copied}, {report.audio_encoded}")
    return table


def measure_speed(
    interpolator: Interpolator, pictures: Sequence[Image.Image], seconds: float, rounds: int, folder: Path
) -> Table:
    """Compares seconds of the clock, and of the processors, which other processes disturb less."""
    source = folder / "part.mp4"
    count = write_film(source, (rgb for _, rgb in render_film(pictures, seconds, SLOW_FPS)), SLOW_FPS, QUALITY, [])
    table = Table("speed", "s", "minterpolate, s", "ratio", "CPU s", "minterpolate, CPU s", "frames/s", "minterpolate")
    for number in range(rounds):
        cpu_s = time.process_time()
        ours_s = interpolate_video(interpolator, source, folder / "ours.mp4", times=2, quality=QUALITY).elapsed_s
        ours_cpu_s = time.process_time() - cpu_s
        children_s = cpu_of_children_s()
        theirs_s = run_minterpolate(source, folder / "theirs.mp4", RATE_FACTOR)
        theirs_cpu_s = cpu_of_children_s() - children_s
        rates = 2 * count / ours_s, 2 * count / theirs_s
        row = (ours_s, theirs_s, theirs_s / ours_s, ours_cpu_s, theirs_cpu_s, *rates)
        table.add_row(f"round {number + 1}, {seconds:g} s of film", *(f"{value:.2f}" for value in row))
    return table


def cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_quality(interpolator: Interpolator, pictures: Sequence[Image.Image], seconds: float, folder: Path) -> Table:
    """Compares the frames made in the place of dropped ones with these, except between two shots."""
    truth: dict[int, np.ndarray] = {}
    shots: list[int] = []

    def keep_even() -> Iterator[np.ndarray]:
        for number, (shot, rgb) in enumerate(render_film(pictures, seconds, FAST_FPS)):
            shots.append(shot)
            if number % 2:
                frame = to_video_frame(rgb)
                lines = np.frombuffer(frame.planes[0], np.uint8).reshape(HEIGHT, frame.planes[0].line_size)
                truth[number] = lines[:, :WIDTH].copy()
            else:
                yield rgb

    source = folder / "dropped.mp4"
    write_film(source, keep_even(), SLOW_FPS, MEASURED_QUALITY, [])
    scored = [number for number in truth if number + 1 < len(shots) and shots[number - 1] == shots[number + 1]]
    methods: dict[str, Callable[[Path], object]] = {
        "giffy_ray": lambda path: interpolate_video(interpolator, source, path, times=2, quality=MEASURED_QUALITY),
        "minterpolate": lambda path: run_minterpolate(source, path, 38 - MEASURED_QUALITY // 4),
        "cross-fade": lambda path: interpolate_video(cross_fade(), source, path, times=2, quality=MEASURED_QUALITY),
    }
    names = [f"shot {shot + 1}" for shot in range(SHOTS)]
    table = Table("PSNR of made frames, dB (luma)", "all", *names, "frames")
    for name, convert in methods.items():
        output = folder / f"{name}.mp4"
        convert(output)
        scores = {}
        for moment, luma in luma_frames(output):
            number = round(moment * FAST_FPS)
            if number in truth and number in scored:
                scores[number] = psnr_db(luma, truth[number])
        by_shot = [[score for number, score in scores.items() if shots[number] == shot] for shot in range(SHOTS)]
        means = [np.mean(list(scores.values())), *(np.mean(part) if part else np.nan for part in by_shot)]
        table.add_row(name, *(f"{mean:.2f}" for mean in means), str(len(scores)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of photographs of 1920x1080 or more")
    parser.add_argument("--model", default="between")
    parser.add_argument("--seconds", type=float, default=60, help="length of the film")
    parser.add_argument("--compared-seconds", type=float, default=8, help="length of the films that ffmpeg gets, too")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison of speed")
    parser.add_argument("--only", choices=("film", "speed", "quality"), help="one of the three measurements")
    arguments = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        sys.exit("ffmpeg is not installed")
    pictures = load_pictures(arguments.images)
    interpolator = Interpolator.from_pretrained(arguments.model)
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "film"):
            measure_whole_film(interpolator, pictures, arguments.seconds, folder, console)
        if arguments.only in (None, "speed"):
            console.print(measure_speed(interpolator, pictures, arguments.compared_seconds, arguments.rounds, folder))
        if arguments.only in (None, "quality"):
            console.print(measure_quality(interpolator, pictures, arguments.compared_seconds, folder))


if __name__ == "__main__":
    main()
