"""Compares decoding with the libraries that a user would choose instead.

    PYTHONPATH=. python benchmarks/decode.py [--videos FOLDER] [--rounds N]

Each method turns each video into the same 30 frames of 64x64, from the bytes of the file where the library can. The
methods alternate, video by video, in one process. CPU time counts all threads of the process. The tables show medians
over rounds of the sum over videos, and ratios to OpenCV. PSNR compares with a full RGB decode and a box average; median
and worst clip.

Without --videos it renders the built-in dataset: drawings, which compress better than camera videos.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image
from rich.console import Console
from rich.table import Table

from giffy_ray.config import ClipConfig, LimitsConfig, SyntheticConfig
from giffy_ray.data.decode import sample_clip
from giffy_ray.data.sandbox import Sandbox
from giffy_ray.data.synthetic import dataset

CLIP = ClipConfig()
SOURCE_FRAMES = 90
SAMPLED_FRAMES = range(0, SOURCE_FRAMES, 3)
SCALING_ROUNDS = 5
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
Decoder = Callable[[Path], np.ndarray | None]


def decode_with_giffy_ray(path: Path) -> np.ndarray:
    return sample_clip(path.read_bytes(), CLIP).clip


def decode_without_pixels(path: Path) -> None:
    """Decodes all frames with PyAV and converts none to RGB."""
    with av.open(io.BytesIO(path.read_bytes()), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def decode_with_pyav(path: Path) -> np.ndarray:
    """The usual loop: decodes all frames and converts the sampled ones with PyAV's defaults."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return np.stack([f.to_ndarray(format="rgb24", width=64, height=64) for i, f in enumerate(frames) if i % 3 == 0])


def decode_as_the_paper(path: Path) -> np.ndarray:
    """Converts all frames to RGB at full size, then resizes the sampled ones with Pillow's antialiased filter."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frames[i]).resize((64, 64), lanczos)) for i in SAMPLED_FRAMES])


def decode_with_opencv(path: Path) -> np.ndarray:
    """What a careful user writes: one thread, INTER_AREA, and no `retrieve` of frames that are not sampled."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in range(SOURCE_FRAMES):
        capture.grab()
        if index % 3 == 0:
            small = cv2.resize(capture.retrieve()[1], (64, 64), interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def decode_with_torchcodec(path: Path) -> np.ndarray:
    import torch
    from torch.nn import functional
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    torch.set_num_threads(1)
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
    frames = decoder.get_frames_at(list(SAMPLED_FRAMES)).data
    small = functional.interpolate(frames.float(), (64, 64), mode="area").round().to(torch.uint8)
    return small.permute(0, 2, 3, 1).numpy()


def decode_with_decord(path: Path) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), width=64, height=64, num_threads=1)
    return reader.get_batch(list(SAMPLED_FRAMES)).asnumpy()


DECODERS: dict[str, Decoder] = {
    "OpenCV": decode_with_opencv,
    "giffy_ray": decode_with_giffy_ray,
    "bare PyAV (no pixels)": decode_without_pixels,
    "torchcodec 0.13": decode_with_torchcodec,
    "PyAV, plain": decode_with_pyav,
    "decord": decode_with_decord,
    "the paper's way": decode_as_the_paper,
}


def decode_reference(path: Path) -> np.ndarray:
    """Decodes all frames to RGB accurately and box-averages the sampled ones, float64 [30, 64, 64, 3]."""
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24", interpolation=_ACCURATE) for f in container.decode(video=0)]
    full = np.stack([frames[i] for i in SAMPLED_FRAMES]).astype(np.float64)
    time, height, width, _ = full.shape
    return full.reshape(time, 64, height // 64, 64, width // 64, 3).mean(axis=(2, 4))


def psnr_db(decoded: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((decoded - reference) ** 2), 1e-12)))


def measure(videos: list[Path], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Returns CPU seconds by decoder and round, PSNR by decoder and video, and why some decoders cannot run."""
    cpu_s: dict[str, list[float]] = {}
    psnrs_db: dict[str, list[float]] = {}
    unavailable: dict[str, str] = {}
    for name, decode in DECODERS.items():
        try:
            clips = [decode(path) for path in videos]
        except (ImportError, RuntimeError, OSError) as error:
            unavailable[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        cpu_s[name] = []
        if clips[0] is not None:
            pairs = zip(clips, videos, strict=True)
            psnrs_db[name] = [psnr_db(clip, decode_reference(path)) for clip, path in pairs]  # type: ignore[arg-type]
    for _ in range(rounds):
        round_s = dict.fromkeys(cpu_s, 0.0)
        for path in videos:
            for name in cpu_s:
                start_s = time.process_time()
                DECODERS[name](path)
                round_s[name] += time.process_time() - start_s
        for name, duration_s in round_s.items():
            cpu_s[name].append(duration_s)
    return cpu_s, psnrs_db, unavailable


def measure_sandbox(videos: list[Path]) -> int:
    """Returns the clips per 1000 s of one sandboxed process."""
    with Sandbox(CLIP, LimitsConfig()) as sandbox:
        sandbox.sample(videos[0].read_bytes())
        start_s = time.perf_counter()
        for path in videos * 4:
            sandbox.sample(path.read_bytes())
        return round(len(videos) * 4 / (time.perf_counter() - start_s) * 1000)


def measure_two_processes(videos: list[Path], rounds: int) -> list[float]:
    """Returns the throughput of two concurrent sandboxed processes, relative to a single one, of each round."""
    ratios = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(measure_sandbox, [videos[:2]] * 2))
        for _ in range(rounds):
            single = pool.submit(measure_sandbox, videos).result()
            ratios.append(sum(pool.map(measure_sandbox, [videos, videos])) / single)
    return ratios


def format_table(cpu_s: dict[str, list[float]], psnrs_db: dict[str, list[float]], video_count: int) -> Table:
    table = Table("method", "CPU ms per clip", "speed, OpenCV = 1", "spread", "PSNR dB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, durations_s in cpu_s.items():
        baseline_s = cpu_s.get("OpenCV", durations_s)
        ratios = [opencv_s / duration_s for opencv_s, duration_s in zip(baseline_s, durations_s, strict=True)]
        psnrs = psnrs_db.get(name)
        table.add_row(
            name,
            f"{1000 * statistics.median(durations_s) / video_count:.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(psnrs):.1f}, worst {min(psnrs):.1f}" if psnrs else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="a folder of 256x256 videos with at least 90 frames")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.videos is None:
            for spec in dataset.plan_videos(SyntheticConfig(training_clips=12, validation_clips=12)):
                (Path(folder) / spec.name).write_bytes(dataset.render_video(spec))
        videos = sorted((arguments.videos or Path(folder)).glob("*.mp4"))
        cpu_s, psnrs_db, unavailable = measure(videos, arguments.rounds)
        console = Console(width=100)
        mean_kb = sum(path.stat().st_size for path in videos) / len(videos) / 1000
        console.print(f"{len(videos)} videos, {mean_kb:.0f} kB on average")
        console.print(format_table(cpu_s, psnrs_db, len(videos)))
        for name, reason in unavailable.items():
            console.print(f"unavailable: {name}: {reason}")
        ratios = measure_two_processes(videos, SCALING_ROUNDS)
        console.print(
            f"two processes decode {statistics.median(ratios):.2f} times as many clips as one "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
