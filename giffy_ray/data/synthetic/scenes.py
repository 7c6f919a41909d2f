"""Draws the two categories of scenes of the built-in dataset: 'erupting' and 'skiing'.

Each scene has motion that a cross-fade gets wrong although start and end determine it: bombs and jumps under one fixed
gravity, advancing fronts, a growing plume, a camera that pans past large objects by less than their spacing, and turns
whose phase shows in lean, heading and spray. Each scene also has deliberate noise (embers, spray, churning smoke,
flicker), so that a latent variable has something to explain. Speeds are log-uniform, down to nearly still. Colours,
light, sizes and positions vary with the seed.

Out-of-distribution (`ood`) scenes lie outside these ranges: night, colours of sky, rock, trees and clothes that occur
nowhere else, the opposite camera direction, and speeds above the maximum.

Error of linear interpolation from end to end (i/29), in the paper's unit, before encoding, over seeds 0 to 99. The
paper's own videos have 62 +- 58 (median 44) and 153 +- 89.

    erupting  60.5 +- 51.9, median  37,  2.6 to 191; holding the nearest end has 1.35 times the squared error
    skiing   143.5 +- 83.7, median 126,   25 to 323; holding the nearest end has 1.32 times the squared error

An oracle that blends the two ends optimally for every frame reduces this error by only 1 %: the rest is motion.
"""

from __future__ import annotations

import numpy as np

from giffy_ray.data.synthetic.canvas import FPS, FRAMES, SIZE
from giffy_ray.data.synthetic.eruption import Eruption
from giffy_ray.data.synthetic.slope import Slope

__all__ = ["CATEGORIES", "FPS", "FRAMES", "SIZE", "VERSION", "draw_clip"]

CATEGORIES = ("erupting", "skiing")
# Version of the pixels. Models are evaluated on them, so any change of a pixel must raise it.
VERSION = 1


def draw_clip(category: str, seed: int, ood: bool = False) -> np.ndarray:
    """Draws one clip. Equal arguments give equal clips.

    Args:
        category: One of CATEGORIES.
        seed: Seed of everything that varies.
        ood: Draws an out-of-distribution clip: night, other colours, opposite camera direction, faster.

    Returns:
        uint8 [FRAMES, SIZE, SIZE, 3], RGB, at FPS.

    Raises:
        ValueError: There is no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)} (value {category!r})")
    random = np.random.default_rng([seed, CATEGORIES.index(category), int(ood)])
    scene = Eruption(random, ood) if category == "erupting" else Slope(random, ood)
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for index in range(FRAMES):
        frame = scene.draw_frame(index)
        for channel in range(3):
            clip[index, :, :, channel] = frame[channel]
    return clip
