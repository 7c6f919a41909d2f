"""What both kinds of scene are drawn with: colours, skies, layers that a camera pans over, soft discs.

Backgrounds are Pillow images drawn larger than the frame, by MARGIN on every side, and FINE times finer, then
reduced, which smooths their edges. Coordinates are pixels of the frame, y downwards.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

FRAMES, FPS, SIZE = 90, 30, 256
DURATION_S = FRAMES / FPS
GRAVITY = 55.0  # pixels / s^2, the same in every scene
MARGIN = 128
FINE = 2

Colour = tuple[int, int, int]
Layer = tuple[Image.Image, Image.Image]  # colours and mask


def ballistic(place: float, speed: float, seconds: float, gravity: float = 0.0) -> float:
    """Where a thrown thing is after `seconds`: place + speed t + gravity t^2 / 2, in pixels, y downwards."""
    return place + speed * seconds + gravity * seconds**2 / 2


def mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def gradient(top: Colour, low: Colour, horizon: float = SIZE * 0.75) -> Image.Image:
    """A sky on the fine canvas: `top` above, `low` from the horizon down."""
    height = SIZE + 2 * MARGIN
    share = np.clip((np.arange(height) - MARGIN) / horizon, 0, 1)[:, None]
    column = (np.asarray(top) * (1 - share) + np.asarray(low) * share).astype(np.uint8)
    return Image.fromarray(column[:, None, :].repeat(8, axis=1)).resize((FINE * height, FINE * height))


def ridge(
    painter: ImageDraw.ImageDraw, random: np.random.Generator, level: float, height: float, colour: Colour
) -> None:
    """A far range of mountains."""
    xs = np.arange(-MARGIN, SIZE + MARGIN + 40, random.uniform(24, 40))
    peaks = [
        (x + random.uniform(-8, 8), level - random.uniform(0, height) * (1 - i % 2 * 0.7)) for i, x in enumerate(xs)
    ]
    painter.polygon(fine([*peaks, (SIZE + MARGIN, SIZE + MARGIN), (-MARGIN, SIZE + MARGIN)]), fill=colour)


def fine(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Frame coordinates -> coordinates of the fine canvas with its margin."""
    return [((x + MARGIN) * FINE, (y + MARGIN) * FINE) for x, y in points]


def layer(picture: Image.Image) -> Layer:
    """Colours and mask apart: cheaper to move than RGBA, which Pillow multiplies out at every step."""
    small = picture.reduce(FINE)
    return small.convert("RGB"), small.getchannel("A")


def window(canvas: Image.Image, left: float, top: float, rows: tuple[int, int] = (0, SIZE)) -> Image.Image:
    """Some rows of the frame's part of a canvas with margins, moved by `left` and `top`, fractions of pixels too."""
    x, y = MARGIN + left, MARGIN + top + rows[0]
    width, height = SIZE, rows[1] - rows[0]
    x0, y0 = math.floor(x), math.floor(y)
    part = canvas.crop((x0, y0, x0 + width + 1, y0 + height + 1))
    box = (x - x0, y - y0, x - x0 + width, y - y0 + height)
    return part.resize((width, height), Image.Resampling.BILINEAR, box=box)


def soft_disc(radius: int, strength: float) -> Image.Image:
    """A mask of 2 radius x 2 radius that fades from the middle outwards."""
    axis = (np.arange(2 * radius) + 0.5 - radius) / radius
    distance = np.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    return Image.fromarray((255 * strength * np.clip(1.15 - distance, 0, 1) ** 0.7 * (distance < 1)).astype(np.uint8))


_GLOWS: dict[tuple[int, Colour, float], Image.Image] = {}


def add_disc(image: Image.Image, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
    """Light around a point."""
    size = max(2, round(radius))
    key = (size, colour, strength)
    if key not in _GLOWS:
        axis = (np.arange(2 * size) + 0.5 - size) / size
        squared = axis[:, None] ** 2 + axis[None, :] ** 2
        _GLOWS[key] = Image.fromarray((255 * strength * np.clip(1 - squared, 0, 1) ** 2).astype(np.uint8))
    image.paste(colour, (round(x) - size, round(y) - size), _GLOWS[key])
