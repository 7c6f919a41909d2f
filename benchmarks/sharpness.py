"""Measures how sharp and how right the frame half-way between a picture and the same picture, shifted, is.

    PYTHONPATH=. python benchmarks/sharpness.py PICTURE... [--model between] [--shifts 12 7 12.5]

Each picture is cut to 1024x768 at four times the size and averaged, so shifts by quarters of a pixel are exact. The
frame half-way should be the picture shifted by half as much: the table shows its PSNR, that of the cross-fade and that
of the start, and its gradient energy relative to the mean of both pictures. Not to lose sharpness means 1.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from giffy_ray.inference.images import read_image
from giffy_ray.inference.interpolator import DEFAULT_MODEL, Interpolator

WIDTH, HEIGHT, OVERSAMPLING = 1024, 768, 4
MARGIN_PX = 32  # more than the largest shift


def cut(canvas: Tensor, offset_px: float) -> np.ndarray:
    """Cuts the picture at an offset: uint8 [HEIGHT, WIDTH, 3]."""
    left = round(offset_px * OVERSAMPLING)
    window = canvas[:, :, : HEIGHT * OVERSAMPLING, left : left + WIDTH * OVERSAMPLING]
    averaged = functional.avg_pool2d(window, OVERSAMPLING)
    return averaged[0].permute(1, 2, 0).mul(255).round().byte().numpy()


def load_canvas(path: str) -> Tensor:
    """Scales a picture so that it covers the cuts, and enlarges it: [1, 3, height, width], 0..1."""
    picture = Image.fromarray(read_image(path)[..., :3])
    factor = max((WIDTH + MARGIN_PX) / picture.width, HEIGHT / picture.height)
    small = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    large = small.resize((small.width * OVERSAMPLING, small.height * OVERSAMPLING), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float() / 255


def psnr_db(generated: np.ndarray, target: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((generated.astype(float) - target) ** 2)))


def gradient_energy(image: np.ndarray) -> float:
    floats = image.astype(float)
    return float((np.diff(floats, axis=0) ** 2).mean() + (np.diff(floats, axis=1) ** 2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--shifts", type=float, nargs="+", default=[12, 7, 12.5])
    arguments = parser.parse_args()
    interpolator = Interpolator.from_pretrained(arguments.model)
    table = Table("picture", "shift", "PSNR dB", "cross-fade", "start", "energy", "seconds")
    for path in arguments.pictures:
        canvas = load_canvas(path)
        for shift in arguments.shifts:
            start, end, target = (cut(canvas, offset) for offset in (0, shift, shift / 2))
            start_s = time.perf_counter()
            generated = next(interpolator.iter_frames(start, end, [0.5]))
            elapsed_s = time.perf_counter() - start_s
            cross_fade = (start.astype(float) + end) / 2
            energy = 2 * gradient_energy(generated) / (gradient_energy(start) + gradient_energy(end))
            scores = (psnr_db(generated, target), psnr_db(cross_fade, target), psnr_db(start, target))
            cells = [f"{value:.1f}" for value in scores]
            table.add_row(path.rpartition("/")[2], f"{shift:g}", *cells, f"{energy:.3f}", f"{elapsed_s:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
