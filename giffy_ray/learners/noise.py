"""Noise as a function of what it is for, so that it does not depend on batches, workers or where a run was cut."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from giffy_ray.shapes import Noise
from giffy_ray.transfer import sent


def noise_at(seed: int, keys: Sequence[int], width: int, device: torch.device | None = None) -> Noise:
    """Standard normal [len(keys), width] in torch's default dtype; row i depends on (seed, keys[i]) only."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, key])).standard_normal(width, dtype=np.float32) for key in keys
    ]
    noise = torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())
    return noise if device is None else sent(noise, device)


def noise_for(seed: int, clip_ids: Sequence[str], width: int, device: torch.device | None = None) -> Noise:
    """`noise_at` with one row for each clip id: a clip is made from the same noise in every evaluation."""
    return noise_at(seed, [zlib.crc32(clip_id.encode()) for clip_id in clip_ids], width, device)
