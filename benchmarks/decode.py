"""Decoding, side by side with what a user would pick instead: benchmarks/decode.py [--videos FOLDER] [--rounds N]

Every way makes the same 30 frames of 64x64 of every video, from the file's bytes where the library can. The ways take
turns, video by video, in one process; CPU time counts all threads of the process. Figures are medians over rounds of
the sum over videos, and ratios to OpenCV. PSNR is against a full RGB decode and a box average, median and worst clip.

Without --videos the built-in data set is rendered: drawings, which compress better than real videos do.
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
_WANTED = range(0, 90, 3)
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
Way = Callable[[Path], np.ndarray | None]


def ours(path: Path) -> np.ndarray:
    return sample_clip(path.read_bytes(), CLIP).clip


def bare(path: Path) -> None:
    """All frames decoded by PyAV, no pixel looked at."""
    with av.open(io.BytesIO(path.read_bytes()), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def plain_pyav(path: Path) -> np.ndarray:
    """The usual loop: decode everything, convert what is wanted with PyAV's defaults."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return np.stack([f.to_ndarray(format="rgb24", width=64, height=64) for i, f in enumerate(frames) if i % 3 == 0])


def authors(path: Path) -> np.ndarray:
    """As the study did: every frame to RGB at full size, then PIL's antialiased resize."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frames[i]).resize((64, 64), lanczos)) for i in _WANTED])


def opencv(path: Path) -> np.ndarray:
    """What a careful user writes: one thread, unwanted frames grabbed and not retrieved, INTER_AREA."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in range(90):
        capture.grab()
        if index % 3 == 0:
            small = cv2.resize(capture.retrieve()[1], (64, 64), interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def torchcodec(path: Path) -> np.ndarray:
    import torch
    from torch.nn import functional
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    torch.set_num_threads(1)
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
    frames = decoder.get_frames_at(list(_WANTED)).data
    small = functional.interpolate(frames.float(), (64, 64), mode="area").round().to(torch.uint8)
    return small.permute(0, 2, 3, 1).numpy()


def decord(path: Path) -> np.ndarray:
    import decord as library

    reader = library.VideoReader(str(path), width=64, height=64, num_threads=1)
    return reader.get_batch(list(_WANTED)).asnumpy()


WAYS: dict[str, Way] = {
    "OpenCV": opencv,
    "giffy_ray": ours,
    "bare PyAV (no pixels)": bare,
    "torchcodec 0.13": torchcodec,
    "PyAV, plain": plain_pyav,
    "decord": decord,
    "the study's way": authors,
}


def reference(path: Path) -> np.ndarray:
    """float64 [30, 64, 64, 3]: every wanted frame in full RGB, accurately converted, box-averaged."""
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24", interpolation=_ACCURATE) for f in container.decode(video=0)]
    full = np.stack([frames[i] for i in _WANTED]).astype(np.float64)
    time, height, width, _ = full.shape
    return full.reshape(time, 64, height // 64, 64, width // 64, 3).mean(axis=(2, 4))


def psnr_db(made: np.ndarray, real: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((made - real) ** 2), 1e-12)))


def measure(videos: list[Path], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """CPU seconds of each way in each round, PSNR of each way for each video, and the ways that could not run."""
    cpu_s: dict[str, list[float]] = {}
    psnrs: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    for name, way in WAYS.items():
        try:
            pictures = [way(path) for path in videos]
        except (ImportError, RuntimeError, OSError) as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        cpu_s[name] = []
        if pictures[0] is not None:
            pairs = zip(pictures, videos, strict=True)
            psnrs[name] = [psnr_db(picture, reference(path)) for picture, path in pairs]  # type: ignore[arg-type]
    for _ in range(rounds):
        spent_s = dict.fromkeys(cpu_s, 0.0)
        for path in videos:
            for name in cpu_s:
                began_s = time.process_time()
                WAYS[name](path)
                spent_s[name] += time.process_time() - began_s
        for name, seconds in spent_s.items():
            cpu_s[name].append(seconds)
    return cpu_s, psnrs, absent


def _many(videos: list[Path]) -> int:
    with Sandbox(CLIP, LimitsConfig()) as sandbox:
        sandbox.sample(videos[0].read_bytes())
        began_s = time.perf_counter()
        for path in videos * 4:
            sandbox.sample(path.read_bytes())
        return round(len(videos) * 4 / (time.perf_counter() - began_s) * 1000)


def scaling(videos: list[Path], rounds: int) -> list[float]:
    """Clips a second of two sandboxed processes side by side, in units of one alone."""
    ratios = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_many, [videos[:2]] * 2))
        for _ in range(rounds):
            alone = pool.submit(_many, videos).result()
            ratios.append(sum(pool.map(_many, [videos, videos])) / alone)
    return ratios


def table(cpu_s: dict[str, list[float]], psnrs: dict[str, list[float]], videos: int) -> Table:
    shown = Table("way", *(f"{heading}" for heading in ("CPU ms a clip", "speed, OpenCV = 1", "spread", "PSNR dB")))
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, seconds in cpu_s.items():
        ratios = [base / own for base, own in zip(cpu_s.get("OpenCV", seconds), seconds, strict=True)]
        db = psnrs.get(name)
        shown.add_row(
            name,
            f"{1000 * statistics.median(seconds) / videos:.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(db):.1f}, worst {min(db):.1f}" if db else "",
        )
    return shown


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--videos", type=Path, help="a folder of 256x256 videos of 90 frames or more")
    words.add_argument("--rounds", type=int, default=7)
    chosen = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.videos is None:
            for planned in dataset.plan(SyntheticConfig(training_clips=12, validation_clips=12)):
                (Path(folder) / planned.name).write_bytes(dataset.video(planned))
        videos = sorted((chosen.videos or Path(folder)).glob("*.mp4"))
        cpu_s, psnrs, absent = measure(videos, chosen.rounds)
        console = Console(width=100)
        console.print(f"{len(videos)} videos, {sum(p.stat().st_size for p in videos) / len(videos) / 1000:.0f} kB each")
        console.print(table(cpu_s, psnrs, len(videos)))
        for name, why in absent.items():
            console.print(f"left out: {name}: {why}")
        ratios = scaling(videos, 5)
        console.print(f"two processes: {statistics.median(ratios):.2f} times one ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
