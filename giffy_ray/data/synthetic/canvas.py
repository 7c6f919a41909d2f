"""What both kinds of scene share: motion, colours, smooth shapes, layers that a camera moves over. Pure numpy.

Pictures are arrays [channel, height, width]: moving and blending them is fastest so. Coordinates are pixels of the
frame, y downwards, the middle of the first pixel at 0, 0.
"""

from __future__ import annotations

import math

import numpy as np

FRAMES, FPS, SIZE = 90, 30, 256
DURATION_S = (FRAMES - 1) / FPS  # from the first frame to the last
GRAVITY = 56.0  # pixels / s^2, the same in every clip: only so do the two ends tell the path between
MARGIN = 104  # pixels that a layer reaches beyond the frame on every side, for the camera to move over
SPACING = 92.0  # pixels between things on the nearest slope; the camera pans less, and so never takes one for the next
FAR_SHARE, FORE_SHARE = 0.5, 1.4  # of the pan and of the spacing, for what is further away and for what is closer

# Colours are sRGB triples 0..255. Those named UNSEEN occur only in shifted clips.
SKIES = (
    ((62, 116, 186), (198, 218, 232)),
    ((96, 112, 150), (236, 196, 160)),
    ((126, 138, 156), (206, 208, 208)),
    ((70, 84, 138), (244, 158, 112)),
    ((84, 142, 176), (226, 226, 204)),
)
SKIES_UNSEEN = (((8, 10, 26), (46, 44, 80)), ((10, 16, 30), (30, 66, 78)))
ROCKS, ROCKS_UNSEEN = ((64, 50, 46), (52, 48, 54), (84, 62, 48), (44, 46, 44)), ((30, 26, 40), (24, 32, 36))
SUITS = ((206, 44, 46), (236, 150, 32), (38, 92, 190), (44, 48, 62), (140, 52, 150), (30, 140, 124))
SUITS_UNSEEN = ((170, 226, 40), (255, 120, 190), (240, 240, 120))
GREENS, GREENS_UNSEEN = ((30, 78, 56), (52, 96, 50), (22, 62, 66), (84, 104, 52)), ((150, 70, 30), (110, 40, 70))

Colour = tuple[float, float, float]


# ---------------------------------------------------------------- motion: pure functions of time


def thrown(start: tuple[float, float], end: tuple[float, float], seconds: float) -> tuple[float, float]:
    """Where a thing is that flies freely from `start` at 0 to `end` at DURATION_S; pixels, y downwards.

    x is linear; y is linear less GRAVITY / 2 * t * (DURATION_S - t), the parabola that meets both ends.
    """
    share = seconds / DURATION_S
    rise = GRAVITY / 2 * seconds * (DURATION_S - seconds)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]) - rise


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


def spread(random: np.random.Generator, spacing: float, low: float, high: float) -> list[float]:
    """Places from `low` to `high`, never closer than `spacing` and at most a third further apart."""
    places = [low + random.uniform(0, spacing)]
    while places[-1] < high:
        places.append(places[-1] + spacing * random.uniform(1, 1.33))
    return places


# ---------------------------------------------------------------- drawing


def mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (a + share * (b - a) for a, b in zip(one, other, strict=True))
    return red, green, blue


class Picture:
    """Draws smooth shapes on an array [channel 3 or 4, height, width], uint8 or float32 0..255; pixels are points.

    With four channels the fourth is opacity and the colours are multiplied by it already. `x0`, `y0`: which place
    of the scene the array's first pixel shows.
    """

    def __init__(self, array: np.ndarray, x0: float = 0.0, y0: float = 0.0):
        self.array, self.x0, self.y0 = array, x0, y0

    def _box(self, left: float, top: float, right: float, low: float):
        """The part of the array that a shape touches, and the places in the scene of its columns and rows."""
        height, width = self.array.shape[1:]
        columns = slice(max(0, math.floor(left - self.x0)), max(0, min(width, math.ceil(right - self.x0) + 1)))
        rows = slice(max(0, math.floor(top - self.y0)), max(0, min(height, math.ceil(low - self.y0) + 1)))
        xs = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(self.x0)
        ys = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(self.y0)
        return self.array[:, rows, columns], xs[None, :], ys[:, None]

    def _fill(self, part: np.ndarray, cover: np.ndarray, colour: Colour) -> None:
        rgba = np.asarray((*colour, 255)[: len(part)], np.float32)[:, None, None]
        mixed = part + (rgba - part) * cover
        part[...] = mixed + 0.5 if part.dtype == np.uint8 else mixed

    def disc(self, x: float, y: float, wide: float, high: float, colour: Colour, strength: float = 1.0, soft=False):
        """An ellipse of half axes `wide` and `high`; a soft one fades from the middle to the edge."""
        part, xs, ys = self._box(x - wide - 1, y - high - 1, x + wide + 1, y + high + 1)
        if part.size:
            squared = ((xs - x) / wide) ** 2 + ((ys - y) / high) ** 2
            cover = (
                (1 - squared).clip(0, 1) ** 2 if soft else ((1 - np.sqrt(squared)) * min(wide, high) + 0.5).clip(0, 1)
            )
            self._fill(part, cover * np.float32(strength), colour)

    def limb(self, x: float, y: float, to_x: float, to_y: float, thick: float, colour: Colour, strength: float = 1.0):
        """A line with round ends, `thick` pixels from its middle to its edge."""
        part, xs, ys = self._box(
            min(x, to_x) - thick - 1, min(y, to_y) - thick - 1, max(x, to_x) + thick + 1, max(y, to_y) + thick + 1
        )
        if part.size:
            dx, dy = to_x - x, to_y - y
            share = (((xs - x) * dx + (ys - y) * dy) / max(dx * dx + dy * dy, 1e-6)).clip(0, 1)
            distance = np.sqrt((xs - x - share * dx) ** 2 + (ys - y - share * dy) ** 2)
            self._fill(part, (thick + 0.5 - distance).clip(0, 1) * np.float32(strength), colour)

    def convex(self, points: list[tuple[float, float]], colour: Colour, strength: float = 1.0) -> None:
        """A convex polygon, its points in clockwise order as seen on the screen."""
        across, down = zip(*points, strict=True)
        part, xs, ys = self._box(min(across) - 1, min(down) - 1, max(across) + 1, max(down) + 1)
        if part.size:
            cover = np.ones((ys.shape[0], xs.shape[1]), np.float32)
            for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
                length = math.hypot(bx - ax, by - ay) or 1.0
                inside = ((bx - ax) * (ys - ay) - (by - ay) * (xs - ax)) / length
                np.minimum(cover, (inside + 0.5).clip(0, 1), out=cover)
            self._fill(part, cover * np.float32(strength), colour)

    def below(self, heights: np.ndarray, colours: np.ndarray) -> None:
        """Everything under a line, given as one y a column, in colours [3] or [3, height, width]."""
        ys = np.arange(self.array.shape[1], dtype=np.float32)[:, None] + np.float32(self.y0)
        cover = (ys - heights[None].astype(np.float32) + 0.5).clip(0, 1)
        filled = np.full_like(self.array, 255)
        filled[:3] = np.asarray(colours, np.float32).reshape(
            3, *((1, 1) if np.ndim(colours) == 1 else colours.shape[1:])
        )
        self.array += (filled - self.array) * cover

    def light(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Adds light around a point of a uint8 picture, none beyond `radius`."""
        part, xs, ys = self._box(x - radius, y - radius, x + radius, y + radius)
        if part.size:
            near = (1 - ((xs - x) / radius) ** 2 - ((ys - y) / radius) ** 2).clip(0, 1) ** 2
            rgb = np.asarray(colour, np.float32)[:, None, None]
            part[...] = np.minimum(part + rgb * near, 255)


def noise(random: np.random.Generator, height: int, width: int, high: int, wide: int) -> np.ndarray:
    """Smooth noise, float32 [height, width], -1 .. 1, with `high` x `wide` hills."""
    values = random.uniform(-1, 1, (high + 2, wide + 2)).astype(np.float32)
    for count, cells, axis in ((height, high, 0), (width, wide, 1)):
        place = np.arange(count, dtype=np.float32) * np.float32(cells / count)
        first = place.astype(np.int64)
        share = place - first
        share = (share * share * (3 - 2 * share)).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(first, axis) * (1 - share) + values.take(first + 1, axis) * share
    return values


def shifted_window(layer: np.ndarray, x: float, y: float, rows: slice = slice(0, SIZE)) -> np.ndarray:
    """The frame's rows of a uint8 layer [channel, height, width] for a camera moved by x, y: uint16, bilinear."""
    left, top = math.floor(x), math.floor(y)
    right, low = int(256 * (x - left)), int(256 * (y - top))
    first = MARGIN + top + rows.start
    part = layer[:, first : first + rows.stop - rows.start + 1, MARGIN + left : MARGIN + left + SIZE + 1]
    part = part.astype(np.uint16)
    part = (part[:, :, :-1] * np.uint16(256 - right) + part[:, :, 1:] * np.uint16(right) + np.uint16(128)) >> 8
    return (part[:, :-1] * np.uint16(256 - low) + part[:, 1:] * np.uint16(low) + np.uint16(128)) >> 8


def put_over(frame: np.ndarray, top: np.ndarray, rows: slice) -> None:
    """Lays a uint16 window with opacity over the same rows of a uint16 frame. Cannot exceed 255: colour <= opacity."""
    part = frame[:, rows]
    part *= 256 - top[3]
    part >>= 8
    part += top[:3]


def empty_layer(channels: int = 4) -> np.ndarray:
    return np.zeros((channels, SIZE + 2 * MARGIN, SIZE + 2 * MARGIN), np.float32)


def heights_of(random: np.random.Generator, level: float, high: float, hills: int) -> np.ndarray:
    """A range of mountains: the y of its outline in every column of a layer."""
    width = SIZE + 2 * MARGIN
    bend = noise(random, 1, width, 1, hills)[0] + 0.4 * noise(random, 1, width, 1, 3 * hills)[0]
    peaks = 1 - np.abs(bend) * 1.4
    return level - high * peaks - 0.07 * high * noise(random, 1, width, 1, 24 * hills)[0]


def draw_sky(random: np.random.Generator, sky: tuple[Colour, Colour], horizon: float, night: bool) -> np.ndarray:
    """A float32 layer: a sky with sun or stars, thin clouds, and two far ranges fading into its haze."""
    top, low = sky
    canvas = Picture(empty_layer(3), -MARGIN, -MARGIN)
    size = canvas.array.shape[1]
    share = ((np.arange(size, dtype=np.float32) - MARGIN) / np.float32(horizon)).clip(0, 1)[None, :, None]
    canvas.array += np.asarray(top, np.float32)[:, None, None] * (1 - share)
    canvas.array += np.asarray(low, np.float32)[:, None, None] * share
    sun_x, sun_y = random.uniform(20, 236), random.uniform(12, 0.45 * horizon)
    if night:
        for _ in range(60):
            canvas.disc(
                random.uniform(-MARGIN, SIZE + MARGIN),
                random.uniform(-30, horizon),
                1.0,
                1.0,
                (220, 224, 255),
                random.uniform(0.15, 0.8),
            )
    canvas.disc(sun_x, sun_y, 60, 60, mix(low, (255, 246, 220), 0.5), 0.35, soft=True)
    canvas.disc(sun_x, sun_y, 11, 11, mix(low, (255, 250, 232), 0.8))
    veil = noise(random, size, size, 18, 4) + 0.5 * noise(random, size, size, 36, 9)
    veil = (veil - 0.15).clip(0, 1) * (0.12 if night else 0.5) * (1 - share[0]) ** 0.5
    canvas.array += (np.asarray(mix(low, (255, 255, 255), 0.3), np.float32)[:, None, None] - canvas.array) * veil
    canvas.below(heights_of(random, horizon - 6, 36, 5), np.asarray(mix(low, top, 0.35)))
    canvas.below(heights_of(random, horizon + 8, 24, 7), np.asarray(mix(mix(low, top, 0.62), (60, 70, 90), 0.25)))
    return canvas.array
