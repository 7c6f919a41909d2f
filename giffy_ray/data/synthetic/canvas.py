"""Building blocks of the scenes: motion, colours, smooth shapes, and layers that a camera pans over. Pure numpy.

Images are arrays [channel, height, width], the fastest layout for moving and blending. Coordinates are pixels of the
frame; y points down, and the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

import math

import numpy as np

FRAMES, FPS, SIZE = 90, 30, 256
DURATION_S = (FRAMES - 1) / FPS  # from the first frame to the last
GRAVITY = 56.0  # pixels / s^2; equal in all clips, so that start and end determine the path between them
MARGIN = 104  # pixels by which a layer exceeds the frame on every side, as room for the camera
# Minimum distance in pixels of objects on the nearest slope. The camera pans less, so an object at the end of a clip
# cannot be confused with its neighbour at the start.
SPACING = 92.0
FAR_PARALLAX, FOREGROUND_PARALLAX = 0.5, 1.4  # factors of pan and spacing for distant and for close objects

# Colours are sRGB triples 0..255. Those named OOD occur only in out-of-distribution clips.
SKIES = (
    ((62, 116, 186), (198, 218, 232)),
    ((96, 112, 150), (236, 196, 160)),
    ((126, 138, 156), (206, 208, 208)),
    ((70, 84, 138), (244, 158, 112)),
    ((84, 142, 176), (226, 226, 204)),
)
OOD_SKIES = (((8, 10, 26), (46, 44, 80)), ((10, 16, 30), (30, 66, 78)))
ROCKS = ((64, 50, 46), (52, 48, 54), (84, 62, 48), (44, 46, 44))
OOD_ROCKS = ((30, 26, 40), (24, 32, 36))
SUITS = ((206, 44, 46), (236, 150, 32), (38, 92, 190), (44, 48, 62), (140, 52, 150), (30, 140, 124))
OOD_SUITS = ((170, 226, 40), (255, 120, 190), (240, 240, 120))
GREENS = ((30, 78, 56), (52, 96, 50), (22, 62, 66), (84, 104, 52))
OOD_GREENS = ((150, 70, 30), (110, 40, 70))

Colour = tuple[float, float, float]


# ---------------------------------------------------------------- motion: pure functions of time


def ballistic_position(start: tuple[float, float], end: tuple[float, float], seconds: float) -> tuple[float, float]:
    """Position of a free-falling object that is at `start` at 0 and at `end` at DURATION_S.

    x is linear in time. y is linear minus GRAVITY / 2 * t * (DURATION_S - t), the parabola through both points.
    """
    fraction = seconds / DURATION_S
    rise = GRAVITY / 2 * seconds * (DURATION_S - seconds)
    return start[0] + fraction * (end[0] - start[0]), start[1] + fraction * (end[1] - start[1]) - rise


def random_log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


def random_positions(random: np.random.Generator, spacing: float, low: float, high: float) -> list[float]:
    """Positions from `low` to `high` at distances from `spacing` to 1.33 times `spacing`."""
    positions = [low + random.uniform(0, spacing)]
    while positions[-1] < high:
        positions.append(positions[-1] + spacing * random.uniform(1, 1.33))
    return positions


# ---------------------------------------------------------------- drawing


def mix_colours(first: Colour, second: Colour, fraction: float) -> Colour:
    red, green, blue = (a + fraction * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue


class Canvas:
    """Draws anti-aliased shapes on an image.

    Args:
        array: [3 or 4, height, width], uint8 or float32, 0..255. A fourth channel is opacity, and the colours are then
            premultiplied.
        x0: Scene x of the array's first column.
        y0: Scene y of the array's first row.
    """

    def __init__(self, array: np.ndarray, x0: float = 0.0, y0: float = 0.0):
        self.array, self.x0, self.y0 = array, x0, y0

    def _region(self, left: float, top: float, right: float, bottom: float):
        """The part of the array within a bounding box, and the scene coordinates of its columns and rows."""
        height, width = self.array.shape[1:]
        columns = slice(max(0, math.floor(left - self.x0)), max(0, min(width, math.ceil(right - self.x0) + 1)))
        rows = slice(max(0, math.floor(top - self.y0)), max(0, min(height, math.ceil(bottom - self.y0) + 1)))
        xs = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(self.x0)
        ys = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(self.y0)
        return self.array[:, rows, columns], xs[None, :], ys[:, None]

    def _blend(self, region: np.ndarray, coverage: np.ndarray, colour: Colour) -> None:
        rgba = np.asarray((*colour, 255)[: len(region)], np.float32)[:, None, None]
        blended = region + (rgba - region) * coverage
        region[...] = blended + 0.5 if region.dtype == np.uint8 else blended

    def draw_ellipse(
        self,
        x: float,
        y: float,
        half_width: float,
        half_height: float,
        colour: Colour,
        opacity: float = 1.0,
        soft: bool = False,
    ) -> None:
        """A soft ellipse fades from the centre to the edge."""
        region, xs, ys = self._region(x - half_width - 1, y - half_height - 1, x + half_width + 1, y + half_height + 1)
        if region.size:
            squared_radius = ((xs - x) / half_width) ** 2 + ((ys - y) / half_height) ** 2
            if soft:
                coverage = (1 - squared_radius).clip(0, 1) ** 2
            else:
                coverage = ((1 - np.sqrt(squared_radius)) * min(half_width, half_height) + 0.5).clip(0, 1)
            self._blend(region, coverage * np.float32(opacity), colour)

    def draw_line(
        self, x: float, y: float, to_x: float, to_y: float, half_width: float, colour: Colour, opacity: float = 1.0
    ) -> None:
        """A line with round ends."""
        region, xs, ys = self._region(
            min(x, to_x) - half_width - 1,
            min(y, to_y) - half_width - 1,
            max(x, to_x) + half_width + 1,
            max(y, to_y) + half_width + 1,
        )
        if region.size:
            dx, dy = to_x - x, to_y - y
            fraction = (((xs - x) * dx + (ys - y) * dy) / max(dx * dx + dy * dy, 1e-6)).clip(0, 1)
            distance = np.sqrt((xs - x - fraction * dx) ** 2 + (ys - y - fraction * dy) ** 2)
            self._blend(region, (half_width + 0.5 - distance).clip(0, 1) * np.float32(opacity), colour)

    def draw_polygon(self, points: list[tuple[float, float]], colour: Colour, opacity: float = 1.0) -> None:
        """A convex polygon. The points are in clockwise order on the screen."""
        point_xs, point_ys = zip(*points, strict=True)
        region, xs, ys = self._region(min(point_xs) - 1, min(point_ys) - 1, max(point_xs) + 1, max(point_ys) + 1)
        if region.size:
            coverage = np.ones((ys.shape[0], xs.shape[1]), np.float32)
            for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
                length = math.hypot(bx - ax, by - ay) or 1.0
                inside = ((bx - ax) * (ys - ay) - (by - ay) * (xs - ax)) / length
                np.minimum(coverage, (inside + 0.5).clip(0, 1), out=coverage)
            self._blend(region, coverage * np.float32(opacity), colour)

    def fill_below(self, outline: np.ndarray, colours: np.ndarray) -> None:
        """Fills everything below an outline, [width] scene y, with colours [3] or [3, height, width]."""
        ys = np.arange(self.array.shape[1], dtype=np.float32)[:, None] + np.float32(self.y0)
        coverage = (ys - outline[None].astype(np.float32) + 0.5).clip(0, 1)
        filled = np.full_like(self.array, 255)
        image_shape = (1, 1) if np.ndim(colours) == 1 else colours.shape[1:]
        filled[:3] = np.asarray(colours, np.float32).reshape(3, *image_shape)
        self.array += (filled - self.array) * coverage

    def add_light(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Adds light to a uint8 image that fades to zero at `radius`."""
        region, xs, ys = self._region(x - radius, y - radius, x + radius, y + radius)
        if region.size:
            intensity = (1 - ((xs - x) / radius) ** 2 - ((ys - y) / radius) ** 2).clip(0, 1) ** 2
            rgb = np.asarray(colour, np.float32)[:, None, None]
            region[...] = np.minimum(region + rgb * intensity, 255)


def smooth_noise(random: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Value noise, float32 [height, width], -1..1, interpolated between `rows` x `columns` random values."""
    values = random.uniform(-1, 1, (rows + 2, columns + 2)).astype(np.float32)
    for size, cells, axis in ((height, rows, 0), (width, columns, 1)):
        position = np.arange(size, dtype=np.float32) * np.float32(cells / size)
        first = position.astype(np.int64)
        fraction = position - first
        weight = (fraction * fraction * (3 - 2 * fraction)).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(first, axis) * (1 - weight) + values.take(first + 1, axis) * weight
    return values


def view_layer(layer: np.ndarray, x: float, y: float, rows: slice = slice(0, SIZE)) -> np.ndarray:
    """The view of a camera moved by (x, y) over a layer, with bilinear interpolation.

    Args:
        layer: uint8 [channel, height, width], MARGIN larger than the frame on every side.
        x: Camera offset to the right.
        y: Camera offset down.
        rows: Rows of the frame.

    Returns:
        uint16 [channel, rows, SIZE].
    """
    left, top = math.floor(x), math.floor(y)
    right_weight, bottom_weight = int(256 * (x - left)), int(256 * (y - top))
    first = MARGIN + top + rows.start
    view = layer[:, first : first + rows.stop - rows.start + 1, MARGIN + left : MARGIN + left + SIZE + 1]
    view = view.astype(np.uint16)
    view = view[:, :, :-1] * np.uint16(256 - right_weight) + view[:, :, 1:] * np.uint16(right_weight)
    view = (view + np.uint16(128)) >> 8
    view = view[:, :-1] * np.uint16(256 - bottom_weight) + view[:, 1:] * np.uint16(bottom_weight)
    return (view + np.uint16(128)) >> 8


def composite_over(frame: np.ndarray, top: np.ndarray, rows: slice) -> None:
    """Composites a premultiplied uint16 RGBA view over the same rows of a uint16 frame, in place.

    Values stay below 256, because premultiplied colours do not exceed their opacity.
    """
    below = frame[:, rows]
    below *= 256 - top[3]
    below >>= 8
    below += top[:3]


def create_layer(channels: int = 4) -> np.ndarray:
    return np.zeros((channels, SIZE + 2 * MARGIN, SIZE + 2 * MARGIN), np.float32)


def random_ridge_outline(random: np.random.Generator, level: float, height: float, hills: int) -> np.ndarray:
    """Outline of a mountain range: y for each column of a layer."""
    width = SIZE + 2 * MARGIN
    bend = smooth_noise(random, 1, width, 1, hills)[0] + 0.4 * smooth_noise(random, 1, width, 1, 3 * hills)[0]
    peaks = 1 - np.abs(bend) * 1.4
    return level - height * peaks - 0.07 * height * smooth_noise(random, 1, width, 1, 24 * hills)[0]


def draw_sky(random: np.random.Generator, sky: tuple[Colour, Colour], horizon: float, night: bool) -> np.ndarray:
    """Draws a sky with sun or stars, thin clouds, and two distant ranges in its haze: float32 layer, 3 channels."""
    top, low = sky
    canvas = Canvas(create_layer(3), -MARGIN, -MARGIN)
    size = canvas.array.shape[1]
    descent = ((np.arange(size, dtype=np.float32) - MARGIN) / np.float32(horizon)).clip(0, 1)[None, :, None]
    canvas.array += np.asarray(top, np.float32)[:, None, None] * (1 - descent)
    canvas.array += np.asarray(low, np.float32)[:, None, None] * descent
    sun_x, sun_y = random.uniform(20, 236), random.uniform(12, 0.45 * horizon)
    if night:
        for _ in range(60):
            star_x = random.uniform(-MARGIN, SIZE + MARGIN)
            star_y = random.uniform(-30, horizon)
            canvas.draw_ellipse(star_x, star_y, 1.0, 1.0, (220, 224, 255), random.uniform(0.15, 0.8))
    canvas.draw_ellipse(sun_x, sun_y, 60, 60, mix_colours(low, (255, 246, 220), 0.5), 0.35, soft=True)
    canvas.draw_ellipse(sun_x, sun_y, 11, 11, mix_colours(low, (255, 250, 232), 0.8))
    clouds = smooth_noise(random, size, size, 18, 4) + 0.5 * smooth_noise(random, size, size, 36, 9)
    clouds = (clouds - 0.15).clip(0, 1) * (0.12 if night else 0.5) * (1 - descent[0]) ** 0.5
    cloud_colour = np.asarray(mix_colours(low, (255, 255, 255), 0.3), np.float32)[:, None, None]
    canvas.array += (cloud_colour - canvas.array) * clouds
    far_colour = mix_colours(low, top, 0.35)
    near_colour = mix_colours(mix_colours(low, top, 0.62), (60, 70, 90), 0.25)
    canvas.fill_below(random_ridge_outline(random, horizon - 6, 36, 5), np.asarray(far_colour))
    canvas.fill_below(random_ridge_outline(random, horizon + 8, 24, 7), np.asarray(near_colour))
    return canvas.array
