"""Sampling of clips from a generator, with noise that depends on a seed and a key alone.

So neither batches, nor workers, nor interruptions change a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from giffy_ray.core.async_copy import to_device_async
from giffy_ray.core.tensor_types import Clips, Images, Noise


def noise_from_keys(seed: int, keys: Sequence[int], width: int, device: torch.device | None = None) -> Noise:
    """Standard normal [len(keys), width] in torch's default dtype; row i depends on (seed, keys[i]) only."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, key])).standard_normal(width, dtype=np.float32) for key in keys
    ]
    noise = torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())
    return noise if device is None else to_device_async(noise, device)


def noise_from_clip_ids(seed: int, clip_ids: Sequence[str], width: int, device: torch.device | None = None) -> Noise:
    """`noise_from_keys` with one row for each clip id: a clip is made from the same noise in every evaluation."""
    return noise_from_keys(seed, [zlib.crc32(clip_id.encode()) for clip_id in clip_ids], width, device)


_GENERATED = 8  # clips that a generator makes at a time
# start, end, ids of the clips -> made clips
Method = Callable[[Images, Images, list[str]], Clips]


@runtime_checkable
class ClipGenerator(Protocol):
    """Makes clips from two images; every `Learner` is one."""

    networks: dict[str, nn.Module]
    latent: int  # width of the noise; 0: it takes none

    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips from their two ends. `frames` other than the experiment's: ConfigError where it cannot."""
        ...


@dataclass(frozen=True, eq=False)
class FromNoise:
    """A Method: one clip of each pair of ends, from noise that depends on `seed` and the clip's id only.

    Without a seed the noise is 0, of which a learner makes the prior's mean.
    """

    learner: ClipGenerator
    seed: int | None

    def __call__(self, start: Images, end: Images, clip_ids: list[str]) -> Clips:
        return self.learner.generate(start, end, self.noise(clip_ids))

    def noise(self, clip_ids: Sequence[str]) -> Noise:
        if self.seed is None:
            return torch.zeros(len(clip_ids), self.learner.latent)
        return noise_from_clip_ids(self.seed, clip_ids, self.learner.latent)


def learner_methods(name: str, learner: ClipGenerator, seed: int, samples: int) -> dict[str, list[Method]]:
    """`name` makes clips from noise 0, the prior's mean; 'name, sample' and 'name, best of K' where there is noise."""
    methods: dict[str, list[Method]] = {name: [mean_method(learner)]}
    if learner.latent:
        drawn: list[Method] = [learner_method(learner, seed + sample) for sample in range(samples)]
        methods[f"{name}, sample"] = drawn[:1]
        if samples > 1:
            methods[f"{name}, best of {samples}"] = drawn
    return methods


def mean_method(learner: ClipGenerator) -> Method:
    return FromNoise(learner, None)


def learner_method(learner: ClipGenerator, seed: int) -> Method:
    """One sample for each clip, from noise that depends on the seed and the clip's id only."""
    return FromNoise(learner, seed)


def generate_in_parts(learner: ClipGenerator, start: Images, end: Images, noise: Noise) -> Clips:
    """`learner.generate` of any number of ends, always of the same number at a time.

    The last ones are repeated to fill the last part. So a clip does not depend on how many are made beside it:
    matrix products of few rows are rounded otherwise than those of many.
    """
    count = len(start)
    places = torch.arange(-(-count // _GENERATED) * _GENERATED).clamp(max=count - 1)
    parts = [learner.generate(start[part], end[part], noise[part]) for part in places.split(_GENERATED)]
    return torch.cat(parts)[:count]
