"""Glossary of tensors: axes, dtypes and value ranges, and the two conversions between them.

Decoded data is uint8, RGB, 0..255, with the channel axis last. Networks see floats 0..1 with the channel axis second,
as Conv2d and Conv3d take them. `to_floats` and `to_pixels` are the only conversions.

Axes, in this order where they occur:

    batch           clips that are processed together
    channel         3, red, green, blue; last in uint8 tensors
    time            frames of a clip
    height width    pixels, from the top left
    latent          components of the noise vector

Variables:

    clip            uint8 [time, height, width, 3]: all frames from start to end; `clips` adds the batch axis in front
    start, end      first and last frame of a clip: the two given images
    between         the frames between start and end, which a model generates
    target          the true clip, which a generated clip is compared with
    generated       the clip that a model or a baseline returns for a start and an end
    times           time of each frame, 0 at the start and 1 at the end
    noise           standard normal, [batch, latent]
    sample_indices  positions of training samples in the infinite shuffled stream (see `data.sampler`)
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
Times: TypeAlias = Float[Tensor, "batch time"]
Noise: TypeAlias = Float[Tensor, "batch latent"]
SampleIndices: TypeAlias = Int64[Tensor, " batch"]
PerClip: TypeAlias = Float[Tensor, " batch"]  # one value per clip, such as a score


def to_floats(pixels: Tensor) -> Tensor:
    """Converts Images or Clips to floats.

    Args:
        pixels: uint8 [batch, ..., channel], 0..255.

    Returns:
        [batch, channel, ...] of torch's default dtype, 0..1.
    """
    # Permuting uint8 moves a quarter of the bytes.
    return pixels.movedim(-1, 1).contiguous().to(torch.get_default_dtype()).div_(255)


class NonFiniteOutput(ArithmeticError):
    """A network returned NaN or infinity, because its weights or its input are too large."""


def to_pixels(floats: Tensor) -> Tensor:
    """Converts ImageFloats or ClipFloats to pixels: the inverse of `to_floats`, clamped and rounded to the nearest.

    Args:
        floats: [batch, channel, ...]; values outside 0..1 are clamped.

    Returns:
        uint8 [batch, ..., channel], 0..255.

    Raises:
        NonFiniteOutput: A value is NaN, which uint8 would show as black, or infinite.
    """
    if not floats.isfinite().all():
        raise NonFiniteOutput("the network output is not finite: the weights have diverged; use an earlier checkpoint")
    return floats.detach().clamp(0, 1).mul(255).round_().to(torch.uint8).movedim(1, -1).contiguous()
