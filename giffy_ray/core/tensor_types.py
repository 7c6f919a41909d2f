"""The names of tensors: axes, dtype and value range, and the only two conversions between them.

Outside the networks everything is a Clip: uint8, axes (time, height, width, channel), RGB 0..255; `Clips` has a
leading batch axis. Networks see floats 0..1 with channels first, so that Conv2d and Conv3d take them as they are.

    start, end    first and last frame of a clip, the two given images
    between       the frames that are to be made
    made, real    a clip that came out of a method, and the one that was filmed
    noise         float [batch, latent], standard normal
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Images: TypeAlias = UInt8[Tensor, "batch height width 3"]
Clips: TypeAlias = UInt8[Tensor, "batch time height width 3"]
ImageFloats: TypeAlias = Float[Tensor, "batch 3 height width"]
ClipFloats: TypeAlias = Float[Tensor, "batch 3 time height width"]
Times: TypeAlias = Float[Tensor, "batch time"]  # of each frame, from 0 at the start to 1 at the end
Noise: TypeAlias = Float[Tensor, "batch latent"]
SampleIndices: TypeAlias = Int64[Tensor, " batch"]
PerClip: TypeAlias = Float[Tensor, " batch"]


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 [..., channel] 0..255 -> torch's default dtype with the channel axis second, 0..1. Images or Clips."""
    # Permuted while still uint8: a quarter of the bytes to move.
    return pixels.movedim(-1, 1).contiguous().to(torch.get_default_dtype()).div_(255)


class NonFiniteOutput(ArithmeticError):
    """A network's output is NaN or infinite: its weights or its input are too large, and no picture shows it."""


def to_pixels(floats: Tensor) -> Tensor:
    """The inverse of `to_floats`: rounds to the nearest of 0..255 and puts the channel axis last.

    Raises NonFiniteOutput: as uint8, NaN would be black.
    """
    if not floats.isfinite().all():
        raise NonFiniteOutput(
            "the network's output is not finite: its weights have diverged; use an earlier checkpoint"
        )
    return floats.detach().clamp(0, 1).mul(255).round_().to(torch.uint8).movedim(1, -1).contiguous()
