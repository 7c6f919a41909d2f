"""The two kinds of scene that the built-in data set is drawn from: 'erupting' and 'skiing'.

Each has what a cross-fade gets wrong and the two end images nevertheless tell: ballistic paths under one fixed
gravity, fronts that advance, a camera that pans past things of their own colour and size, turns whose phase shows.
Each also has noise on purpose (embers, spray, turbulence, flicker), so that a latent has something to explain.
Speeds are drawn log-uniformly, down to nearly still. Colours, light, sizes and places vary from seed to seed.

`shifted` scenes lie outside the training's range: night or evening, the other pan direction, faster.

How hard they are for linear interpolation from end to end (i/29), in the report's unit, over seeds 0 to 99, before
encoding; the report's own videos were 62 +- 58 and 153 +- 89:

    erupting  60 +- 46, median  42,  8 to 170; holding the nearest end makes 1.35 times the squared error
    skiing   157 +- 78, median 152, 21 to 351; holding the nearest end makes 1.28 times the squared error

An oracle that knows the best blend of the two ends for every frame gains 1 % of that error: the rest is motion.
"""

from __future__ import annotations

import numpy as np

from giffy_ray.data.scenes.canvas import FPS, FRAMES, SIZE
from giffy_ray.data.scenes.eruption import Eruption
from giffy_ray.data.scenes.slope import Slope

__all__ = ["CATEGORIES", "FPS", "FRAMES", "SIZE", "VERSION", "draw"]

CATEGORIES = ("erupting", "skiing")
VERSION = 1  # of what is drawn. Frozen: models are judged on it, so a change of any pixel must raise it


def draw(category: str, seed: int, shifted: bool = False) -> np.ndarray:
    """One clip: uint8 [90, 256, 256, 3], RGB, 30 frames a second. The same arguments give the same clip.

    Raises ValueError for a category that there is none of.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)} (value {category!r})")
    random = np.random.default_rng([seed, CATEGORIES.index(category), int(shifted)])
    scene = (Eruption if category == "erupting" else Slope)(random, shifted)
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for frame in range(FRAMES):
        clip[frame] = np.asarray(scene.frame(frame / FPS))
    return clip
