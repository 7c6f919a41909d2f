"""'skiing': carved turns or a jump, before trees, rocks, gates and huts that the camera passes."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from giffy_ray.data.synthetic.canvas import (
    DURATION_S,
    FAR_SHARE,
    FORE_SHARE,
    FPS,
    FRAMES,
    GREENS,
    GREENS_UNSEEN,
    MARGIN,
    SIZE,
    SKIES,
    SKIES_UNSEEN,
    SPACING,
    SUITS,
    SUITS_UNSEEN,
    Colour,
    Picture,
    draw_sky,
    empty_layer,
    log_uniform,
    mix,
    noise,
    put_over,
    shifted_window,
    spread,
    thrown,
)


class Slope:
    """A skier who carves down a slope or jumps, before trees, rocks, gates and huts that pass by the camera."""

    def __init__(self, random: np.random.Generator, shifted: bool):
        self.pace = pace = random.uniform(1.05, 1.14) if shifted else log_uniform(random, 0.006, 1.0)
        self.shifted = shifted
        self.pan = 80 * pace * (-1 if shifted else 1)  # pixels that the near slope moves, below SPACING
        self.tilt = random.uniform(0.04, 0.24) * (-1 if shifted else 1)
        self.horizon = random.uniform(82, 108)
        skies = SKIES_UNSEEN if shifted else SKIES
        self.sky_colours = skies[random.integers(len(skies))]
        light = mix(self.sky_colours[1], (255, 255, 255), 0.0 if shifted else 0.72)
        self.snow = mix(light, (120, 140, 190), 0.35) if shifted else light
        self.shade = mix(self.snow, mix(self.sky_colours[0], (70, 90, 150), 0.5), 0.42)
        self.sky = draw_sky(random, self.sky_colours, self.horizon + 12, shifted).astype(np.uint8)
        self.far, self.near, self.fore = self._far_slope(random), self._near_slope(random), self._treetops(random)
        self._plan_skier(random)
        self.grains = random.standard_normal((FRAMES, 4, 26)).astype(np.float32)
        for ago in range(45, 0, -1):
            self._draw_track(-ago / FPS)

    def frame(self, index: int) -> np.ndarray:
        """uint8 [3, height, width]; frames are drawn in order, for the track stays in the snow."""
        seconds = index / FPS
        self._draw_track(seconds)
        left = self.camera(seconds)
        frame = shifted_window(self.sky, 0.16 * left, 0.04 * left)
        reach = abs(self.tilt) * (SIZE / 2 + MARGIN) + abs(self.tilt * self.pan)
        for layer, share, top, low in (
            (self.far, FAR_SHARE, self.horizon - 66 - reach, self.horizon + 70 + reach),
            (self.near, 1.0, 0, SIZE),
        ):
            rows = slice(max(0, int(top)), min(SIZE, int(low)))
            put_over(frame, shifted_window(layer, share * left, share * left * self.tilt, rows), rows)
        frame = frame.astype(np.uint8)
        self._draw_skier(Picture(frame), index)
        rows = slice(SIZE - 96, SIZE)
        low = frame[:, rows].astype(np.uint16)
        put_over(low, shifted_window(self.fore, FORE_SHARE * left, 0, rows), slice(None))
        frame[:, rows] = low
        return frame

    def camera(self, seconds: float) -> float:
        return self.pan * (seconds / DURATION_S - 0.5)

    def ground(self, x: np.ndarray | float, level: float) -> np.ndarray | float:
        return level + self.tilt * (x - SIZE / 2)

    def skier(self, seconds: float) -> tuple[float, float, float, float]:
        """The skier's feet in the frame in pixels; the lean and the heading in radians, positive to the right."""
        if self.jump:
            x, y = thrown(self.start, self.end, seconds)
            return x, y, 0.16 * math.copysign(1, self.end[0] - self.start[0]), 0.5 * self.heading
        share = seconds / DURATION_S
        turn = self.phase + 2 * math.pi * self.turns * share
        x = self.start[0] + share * (self.end[0] - self.start[0]) + self.swing * math.sin(turn)
        y = self.start[1] + share * (self.end[1] - self.start[1])
        return x, y, -0.62 * math.sin(turn), self.heading * math.cos(turn)

    def _plan_skier(self, random: np.random.Generator) -> None:
        pace = self.pace
        self.jump = bool(pace > 0.25 and random.random() < 0.3)
        self.phase = random.uniform(0, 2 * math.pi)
        self.turns = random.uniform(0.5, 1.4) * min(1.0, pace**0.5)
        self.swing = random.uniform(16, 42)
        self.heading = random.uniform(0.5, 0.95)
        self.tall = random.uniform(66, 104)
        middle, drift, fall = random.uniform(100, 156), random.uniform(-70, 70) * pace**0.5, 42 * min(1.0, pace**0.5)
        low = random.uniform(206, 236)
        self.start, self.end = (middle - drift / 2, low - fall), (middle + drift / 2, low)
        suits = SUITS_UNSEEN if self.shifted else SUITS
        first, second = random.choice(len(suits), 2, replace=False)
        dim = 0.35 if self.shifted else 0.0
        self.jacket, self.trousers = mix(suits[first], (30, 34, 70), dim), mix(suits[second], (30, 34, 70), dim)
        self.helmet = mix(suits[second], (255, 255, 255), 0.25)

    def _treetops(self, random: np.random.Generator) -> np.ndarray:
        """Firs close to the camera, of which only the tops reach into the frame."""
        canvas = Picture(empty_layer(), -MARGIN, -MARGIN)
        for x in spread(random, FORE_SHARE * SPACING, -MARGIN, SIZE + MARGIN):
            high = random.uniform(130, 190)
            self._tree(
                canvas, x, SIZE + high - random.uniform(34, 80), high, mix(self._green(random), (8, 12, 26), 0.45)
            )
        return canvas.array.astype(np.uint8)

    def _far_slope(self, random: np.random.Generator) -> np.ndarray:
        canvas = Picture(empty_layer(), -MARGIN, -MARGIN)
        xs = np.arange(-MARGIN, SIZE + MARGIN, dtype=np.float32)
        canvas.below(
            self.ground(xs, self.horizon + 16) + 4 * noise(random, 1, len(xs), 1, 5)[0],
            np.asarray(mix(mix(self.snow, self.shade, 0.3), self.sky_colours[1], 0.22)),
        )
        level, haze = self.horizon + 16, 0.22
        for x in spread(random, FAR_SHARE * SPACING, -MARGIN, SIZE + MARGIN):
            y = float(self.ground(x, level)) + random.uniform(6, 16)
            self._tree(canvas, x, y, random.uniform(38, 72), mix(self._green(random), self.sky_colours[1], haze))
        return canvas.array.astype(np.uint8)

    def _near_slope(self, random: np.random.Generator) -> np.ndarray:
        """Soft waves of snow, and the few large things on it, each of a size and colour of its own."""
        canvas = Picture(empty_layer(), -MARGIN, -MARGIN)
        size = canvas.array.shape[1]
        xs, ys = (np.arange(size, dtype=np.float32) - MARGIN for _ in range(2))
        waves = noise(random, size, size, 13, 4) + 0.5 * noise(random, size, size, 26, 7)
        depth = ((ys[:, None] - np.asarray(self.ground(xs, self.horizon + 40))[None]) / 150).clip(0, 1)
        share = (0.30 + 0.32 * waves - 0.22 * depth).clip(0, 1)
        snow, shade = (np.asarray(c, np.float32)[:, None, None] for c in (self.snow, self.shade))
        outline = self.ground(xs, self.horizon + 40) + 5 * noise(random, 1, size, 1, 6)[0]
        canvas.below(outline, snow + (shade - snow) * share)
        places = spread(random, SPACING, -MARGIN - 20, SIZE + MARGIN)
        things = [(float(self.ground(x, self.horizon + 40)) + random.uniform(8, 40), x) for x in places]
        for y, x in things:
            canvas.disc(x + 14, y + 1, 34, 5, self.shade, 0.7, soft=True)
        for y, x in sorted(things):
            self._thing(canvas, random, x, y)
        return canvas.array.astype(np.uint8)

    def _green(self, random: np.random.Generator) -> Colour:
        greens = GREENS_UNSEEN if self.shifted else GREENS
        green, grey = greens[random.integers(len(greens))], random.uniform(0, 70)
        green = mix(green, (grey, grey, grey), 0.25)
        return mix(green, (20, 24, 50), 0.45) if self.shifted else green

    def _thing(self, canvas: Picture, random: np.random.Generator, x: float, y: float) -> None:
        kind, large = random.random(), random.uniform(0.8, 1.3)
        if kind < 0.64:
            self._tree(canvas, x, y, 142 * large, self._green(random))
        elif kind < 0.78:
            grey = random.uniform(70, 120) * (0.5 if self.shifted else 1)
            wide, high = 42 * large, 44 * large
            rock = [
                (x - wide, y),
                (x - 0.62 * wide, y - 0.8 * high),
                (x, y - high),
                (x + 0.7 * wide, y - 0.6 * high),
                (x + wide, y),
            ]
            canvas.convex(rock, (grey, grey, grey + 8))
            canvas.convex(
                [(x, y - high), (x + 0.7 * wide, y - 0.6 * high), (x + wide, y), (x + 0.2 * wide, y)],
                (0.7 * grey, 0.7 * grey, 0.75 * grey + 8),
            )
            canvas.convex(
                [
                    (x - 0.62 * wide, y - 0.8 * high),
                    (x, y - high),
                    (x + 0.7 * wide, y - 0.6 * high),
                    (x - 0.1 * wide, y - 0.72 * high),
                ],
                mix(self.snow, self.shade, 0.1),
            )
        elif kind < 0.9:
            suits = SUITS_UNSEEN if self.shifted else SUITS
            cloth, high, wide = suits[random.integers(len(suits))], 74 * large, 36 * large
            for side in (-1, 1):
                canvas.limb(x + side * wide, y, x + side * wide, y - high, 1.5, (74, 70, 78))
            canvas.convex(
                [(x - wide, y - high), (x + wide, y - high), (x + wide, y - 0.52 * high), (x - wide, y - 0.52 * high)],
                cloth,
            )
            canvas.convex(
                [
                    (x - wide, y - 0.68 * high),
                    (x + wide, y - 0.68 * high),
                    (x + wide, y - 0.6 * high),
                    (x - wide, y - 0.6 * high),
                ],
                mix(cloth, (255, 255, 255), 0.7),
            )
        else:
            self._hut(canvas, x, y, 40 * large)

    def _hut(self, canvas: Picture, x: float, y: float, wide: float) -> None:
        wood = (58, 40, 44) if self.shifted else (126, 84, 56)
        high, eaves = 0.9 * wide, 1.3 * wide
        canvas.convex([(x - wide, y - high), (x + wide, y - high), (x + wide, y), (x - wide, y)], wood)
        canvas.convex([(x - wide, y - high), (x, y - 1.75 * high), (x + wide, y - high)], mix(wood, (0, 0, 0), 0.2))
        for side in (-1, 1):
            canvas.limb(
                x, y - 1.85 * high, x + side * eaves, y - 0.82 * high, 0.1 * wide, mix(self.snow, self.shade, 0.15)
            )
            left = x + side * 0.5 * wide
            canvas.convex(
                [
                    (left - 0.2 * wide, y - 0.72 * high),
                    (left + 0.2 * wide, y - 0.72 * high),
                    (left + 0.2 * wide, y - 0.34 * high),
                    (left - 0.2 * wide, y - 0.34 * high),
                ],
                (255, 216, 130),
            )

    def _tree(self, canvas: Picture, x: float, y: float, high: float, green: Colour) -> None:
        """A fir: four tiers, lit on the left, with snow on their tips."""
        canvas.convex(
            [
                (x - 0.035 * high, y - 0.2 * high),
                (x + 0.035 * high, y - 0.2 * high),
                (x + 0.045 * high, y),
                (x - 0.045 * high, y),
            ],
            mix((84, 62, 48), green, 0.3),
        )
        for tier in range(4):
            low, wide = y - (0.12 + 0.2 * tier) * high, (0.33 - 0.065 * tier) * high
            tip = low - (0.36 - 0.03 * tier) * high
            light = mix(green, (255, 255, 255), 0.01 + 0.04 * tier)
            canvas.convex([(x - wide, low), (x, tip), (x + wide, low), (x, low + 0.045 * high)], light)
            canvas.convex([(x, tip), (x + wide, low), (x, low + 0.045 * high)], mix(light, (8, 12, 30), 0.24))
            canvas.convex(
                [
                    (x - 0.36 * wide, tip + 0.36 * (low - tip)),
                    (x, tip),
                    (x + 0.2 * wide, tip + 0.2 * (low - tip)),
                    (x - 0.06 * wide, tip + 0.3 * (low - tip)),
                ],
                mix(self.snow, light, 0.2),
            )

    def _draw_track(self, seconds: float) -> None:
        """Presses this moment's bit of the two ski tracks into the near layer, which the camera then carries away."""
        if self.jump:
            return
        left = self.camera(seconds)
        snow = Picture(self.near, -MARGIN - left, -MARGIN - left * self.tilt)
        (x0, y0, lean, _), (x, y, _, _) = self.skier(seconds - 1.05 / FPS), self.skier(seconds)
        for side in (-0.07, 0.07):
            snow.limb(x0 + side * self.tall, y0, x + side * self.tall, y, 1.0 + 1.6 * abs(lean), self.shade, 0.55)

    def _draw_skier(self, frame: Picture, index: int) -> None:
        """A figure seen from the front: skis along the heading, the body leaning into the turn."""
        x, y, lean, heading = self.skier(index / FPS)
        tall, limb = self.tall, frame.limb
        ground = y if not self.jump else float(max(self.start[1], self.end[1])) + 6
        frame.disc(x + 3, ground + 2, 0.42 * tall, 0.07 * tall, self.shade, 0.8 if not self.jump else 0.55, soft=True)
        if not self.jump:
            self._draw_spray(frame, index, x, y, lean)
        sin, cos = math.sin(lean), math.cos(lean)

        def at(side: float, up: float) -> tuple[float, float]:
            return x + tall * (side * cos + up * sin), y - tall * (up * cos - side * sin)

        def body(thick: float, colour: Colour, *joints: tuple[float, float]) -> None:
            for one, other in pairwise(joints):
                limb(*at(*one), *at(*other), thick * tall, colour)

        along, toward = 0.44 * math.sin(heading) * tall, 0.2 * math.cos(heading) * tall
        for side in (-0.085, 0.085):
            sx, sy = at(side, 0.0)
            limb(sx - along, sy - toward, sx + along, sy + toward, 0.026 * tall, mix(self.helmet, (20, 20, 30), 0.55))
        tuck = 0.12 if self.jump else 0.05 + 0.10 * abs(lean)
        hips, neck = 0.44 - 0.6 * tuck, 0.76 - tuck
        for side in (-1, 1):
            arm, pole = side * (0.30 + 0.1 * self.jump), side * (0.42 + 0.06 * self.jump)
            limb(*at(arm, 0.46), *at(pole, -0.02 + 0.2 * self.jump), 0.012 * tall, (70, 72, 84))
            body(0.052, self.trousers, (0.085 * side, 0.04), (0.11 * side, 0.24 - 0.3 * tuck), (0.06 * side, hips))
            limb(*at(0.085 * side, 0.03), *at(0.085 * side, 0.06), 0.055 * tall, (44, 46, 58))
            body(0.043, mix(self.jacket, (0, 0, 0), 0.15), (0.1 * side, neck - 0.03), (0.22 * side, 0.56), (arm, 0.47))
        body(0.092, self.jacket, (-0.02, hips + 0.02), (-0.03, neck - 0.05))
        body(0.092, self.jacket, (0.02, hips + 0.02), (0.03, neck - 0.05))
        head_x, head_y = at(0.02 * math.sin(heading), neck + 0.13)
        frame.disc(head_x, head_y, 0.085 * tall, 0.095 * tall, self.helmet)
        turn = 0.035 * math.sin(heading) * tall
        limb(
            head_x + turn - 0.04 * tall,
            head_y + 0.02 * tall,
            head_x + turn + 0.04 * tall,
            head_y + 0.02 * tall,
            0.026 * tall,
            (40, 44, 60),
        )

    def _draw_spray(self, frame: Picture, index: int, x: float, y: float, lean: float) -> None:
        """Snow thrown to the outside of the turn: a cloud that tells the phase, and grains that are chance."""
        side, strength = -math.copysign(1, lean), min(1.0, abs(lean) / 0.62) * (0.2 + 0.8 * min(1.0, self.pace**0.5))
        white = mix(self.snow, (255, 255, 255), 0.7)
        for step in range(3):
            reach = (0.2 + 0.16 * step) * self.tall
            frame.disc(
                x + side * reach,
                y - 0.05 * self.tall,
                (0.16 + 0.05 * step) * self.tall,
                (0.09 + 0.035 * step) * self.tall,
                white,
                0.75 * strength,
                soft=True,
            )
        grains = self.grains[index]
        for across, up, size, light in grains[:, : int(26 * strength)].T.tolist():
            place = x + side * self.tall * (0.22 + 0.26 * abs(across)), y - self.tall * (0.01 + 0.13 * abs(up))
            frame.disc(*place, 1 + 0.8 * abs(size), 1 + 0.8 * abs(size), white, min(1.0, 0.5 + 0.3 * abs(light)))
