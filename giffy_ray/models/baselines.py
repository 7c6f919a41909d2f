"""Methods without parameters, behind the interface of a model: start, end -> clip, all uint8."""

from __future__ import annotations

import torch

from giffy_ray.shapes import Clips, Images


def linear(start: Images, end: Images, frames: int) -> Clips:
    """Linear interpolation: frame i is start + i/(frames-1) * (end - start), rounded to the nearest value.

    The authors divided by `frames` and so never reached the end image; this reaches both.
    """
    weight = torch.linspace(0, 1, frames, dtype=torch.float64, device=start.device).view(1, -1, 1, 1, 1)
    mixed = start[:, None].double() * (1 - weight) + end[:, None].double() * weight
    return mixed.round().to(torch.uint8)
