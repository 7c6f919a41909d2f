"""Largest error of exported models on held-out pairs, and their speed next to the model itself.

    python benchmarks/export.py [MODEL] [--pairs 20] [--frames 9]

Exports the model, `between` by default, to ONNX and torch.export, and compares their frames with those of the model in
PyTorch on first and last frames of clips of the built-in test split, at three sizes. A frame in 8 bits has steps of
1/255, 3.9e-3: an error below half of that rounds to the same level, but for values that lie next to a half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from giffy_ray.config import ClipConfig, SyntheticConfig
from giffy_ray.core.tensor_types import to_pixels
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.synthetic import dataset
from giffy_ray.inference.export import INPUT_NAMES, export_model, load_network

SIZES = ((64, 64), (128, 128), (192, 256))  # height, width


def render_pairs(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns first and last frames of clips that no training has seen, [count, 3, height, width] each, 0..1."""
    settings = SyntheticConfig(training_clips=1, validation_clips=1, test_clips=-(-count // 2))
    videos = [video for video in dataset.plan_videos(settings) if video.split == "test"][:count]
    clip = ClipConfig(frames=30, fps=10, height=height, width=width)
    frames = np.stack([decode_clip(dataset.render_video(video), clip)[[0, -1]] for video in videos])
    start, end = torch.from_numpy(frames).permute(1, 0, 4, 2, 3).float().div(255).contiguous()
    return start, end


def run_on_pairs(run: Callable[..., Tensor], start: Tensor, end: Tensor, times: Tensor) -> tuple[Tensor, float]:
    """Returns the frames of all pairs, one pair per call, and the seconds that the calls took after a first one."""
    run(start[:1], end[:1], times)
    begin_s = time.perf_counter()
    with torch.no_grad():
        frames = torch.cat([run(*pair, times) for pair in zip(start.split(1), end.split(1), strict=True)])
    return frames, time.perf_counter() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="between")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--frames", type=int, default=9)
    arguments = parser.parse_args()
    times = torch.linspace(0, 1, arguments.frames + 2)[None, 1:-1]
    network = load_network(arguments.model)
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        begin_s = time.perf_counter()
        onnx_file = export_model(arguments.model, Path(folder, "model.onnx"), "onnx")
        torch_file = export_model(arguments.model, Path(folder, "model.pt2"), "torch-export")
        print(f"exported in {time.perf_counter() - begin_s:.0f} s", end="; ")
        print(", ".join(f"{file.suffix}: {file.stat().st_size / 1e6:.1f} MB" for file in (onnx_file, torch_file)))
        session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        program = torch.export.load(torch_file).module()

    def run_onnx(*inputs: Tensor) -> Tensor:
        arrays = (tensor.numpy() for tensor in inputs)
        return torch.from_numpy(session.run(None, dict(zip(INPUT_NAMES, arrays, strict=True)))[0])

    for height, width in SIZES:
        start, end = render_pairs(arguments.pairs, height, width)
        expected, seconds = run_on_pairs(network, start, end, times)
        print(
            f"{width}x{height}, {len(start)} pairs, {arguments.frames} frames: {seconds:.2f} s in PyTorch", flush=True
        )
        for name, run in (("ONNX, onnxruntime", run_onnx), ("torch.export", program)):
            frames, seconds = run_on_pairs(run, start, end, times)
            levels = to_pixels(frames.transpose(1, 2)).int() - to_pixels(expected.transpose(1, 2)).int()
            print(
                f"  {name}: maximum error {(frames - expected).abs().max():.1e}, "
                f"{(levels != 0).double().mean() * 100:.4f} % of the 8-bit values differ, by at most "
                f"{levels.abs().max()}; {seconds:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
