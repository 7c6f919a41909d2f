"""Sampling of clips from a trained generator.

Noise depends only on a seed and a key, so neither batch size, nor number of ranks, nor interruptions change a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from giffy_ray.config import Experiment
from giffy_ray.core.async_copy import to_device_async
from giffy_ray.core.tensor_types import Clips, Images, Noise

_BATCH_SIZE = 8  # clips per call of `generate`

Method = Callable[[Images, Images, list[str]], Clips]  # (start, end, clip ids) -> generated clips


@runtime_checkable
class ClipGenerator(Protocol):
    """Generates clips between two images. Every `Learner` is one."""

    networks: dict[str, nn.Module]
    latent: int  # width of the noise; 0 for a deterministic generator

    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Generates one clip for each pair of images.

        Args:
            start: First frames, uint8.
            end: Last frames, uint8.
            noise: One row per pair; zeros give the mean of the prior.
            frames: Length of the clips; None for the experiment's.

        Raises:
            ConfigError: The model cannot generate clips of this length.
        """
        ...


class TrainedModel(NamedTuple):
    """A trained generator, the name it is shown under, and the experiment it was trained with."""

    name: str
    learner: ClipGenerator
    experiment: Experiment


@dataclass(frozen=True, eq=False)
class LearnerMethod:
    """A Method that generates with a learner, from noise that depends only on `seed` and the clip id.

    Without a seed the noise is zero, which gives the mean of the prior.
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
    """Returns the methods by which a learner is evaluated.

    `name` generates the mean of the prior. A learner that takes noise also has `name, sample`, and, for more than one
    sample, `name, best of K`, which lists one method per sample.
    """
    methods: dict[str, list[Method]] = {name: [LearnerMethod(learner, seed=None)]}
    if learner.latent:
        sample_methods: list[Method] = [LearnerMethod(learner, seed + sample) for sample in range(samples)]
        methods[f"{name}, sample"] = sample_methods[:1]
        if samples > 1:
            methods[f"{name}, best of {samples}"] = sample_methods
    return methods


def generate_in_batches(learner: ClipGenerator, start: Images, end: Images, noise: Noise) -> Clips:
    """Generates any number of clips in batches of a fixed size.

    The last pair is repeated to fill the last batch. So a clip does not depend on the others: matrix products round
    differently for few rows than for many.
    """
    count = len(start)
    padded_count = -(-count // _BATCH_SIZE) * _BATCH_SIZE
    indices = torch.arange(padded_count).clamp(max=count - 1)
    batches = [learner.generate(start[batch], end[batch], noise[batch]) for batch in indices.split(_BATCH_SIZE)]
    return torch.cat(batches)[:count]


def noise_from_keys(seed: int, keys: Sequence[int], width: int, device: torch.device | None = None) -> Noise:
    """Draws standard normal noise [len(keys), width] in torch's default dtype.

    Row i depends only on `seed` and `keys[i]`.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, key])).standard_normal(width, dtype=np.float32) for key in keys
    ]
    noise = torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())
    return noise if device is None else to_device_async(noise, device)


def noise_from_clip_ids(seed: int, clip_ids: Sequence[str], width: int, device: torch.device | None = None) -> Noise:
    """Draws noise [len(clip_ids), width] by clip id, so that every evaluation of a clip uses the same noise."""
    return noise_from_keys(seed, [zlib.crc32(clip_id.encode()) for clip_id in clip_ids], width, device)
