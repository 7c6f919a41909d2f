"""'erupting': a volcano with a rising plume, lava bombs, a tongue of lava down its flank, embers, a slow camera."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from giffy_ray.data.scenes.canvas import (
    DURATION_S,
    FINE,
    GRAVITY,
    MARGIN,
    SIZE,
    Colour,
    add_disc,
    ballistic,
    fine,
    gradient,
    mix,
    ridge,
    soft_disc,
    window,
)

_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((70, 118, 178), (196, 212, 224)),
    ((92, 104, 132), (214, 178, 150)),
    ((120, 132, 150), (196, 198, 200)),
    ((60, 74, 120), (232, 150, 110)),
)
_SKIES_NIGHT: tuple[tuple[Colour, Colour], ...] = (((10, 12, 28), (52, 44, 72)), ((16, 14, 34), (84, 46, 60)))


class Bomb(NamedTuple):
    """A lump of lava: place and velocity at time 0, in pixels and pixels per second."""

    x: float
    y: float
    speed_x: float
    speed_y: float
    radius: float

    def at(self, seconds: float) -> tuple[float, float]:
        return ballistic(self.x, self.speed_x, seconds), ballistic(self.y, self.speed_y, seconds, GRAVITY)


class Puff(NamedTuple):
    """A ball of smoke: born at `born_s` in the crater, rising and growing."""

    born_s: float
    side: float
    rise: float
    grow: float
    shade: int
    wobble: float


class Eruption:
    """A volcano: plume, lava bombs, a tongue of lava down its flank, embers, a slow camera."""

    def __init__(self, random: np.random.Generator, shifted: bool):
        self.random = random
        self.pace = float(np.exp(random.uniform(np.log(0.02), np.log(3.8)))) * (1.5 if shifted else 1.0)
        self.crater_x = SIZE / 2 + random.uniform(-45, 45)
        self.crater_y = random.uniform(105, 150)
        self.width = random.uniform(12, 26)  # of the crater
        self.slope = random.uniform(0.75, 1.15)
        heading = random.uniform(0, 2 * math.pi)
        travel = min(110.0, random.uniform(10, 45) * self.pace)
        self.pan = (travel * math.cos(heading), 0.4 * travel * math.sin(heading))
        self.night = shifted or random.random() < 0.25
        self.background = self._background()
        self.wind = random.normal(0, 16) * min(1.5, self.pace)
        self.bombs = [self._bomb() for _ in range(min(16, random.poisson(10 * self.pace**0.7)))]
        self.puffs = self._puffs()
        self.lava_side = random.choice([-1, 1])
        self.lava_from, self.lava_speed = random.uniform(15, 70), random.uniform(8, 20) * min(2.0, self.pace)
        self.lava_width = random.uniform(6, 14)
        self.discs: dict[tuple, Image.Image] = {}
        self.lava = self._lava_map()

    def frame(self, seconds: float) -> Image.Image:
        left, top = (self.pan[0] * seconds / DURATION_S, self.pan[1] * seconds / DURATION_S)
        image = window(self.background, left, top)
        self._draw_puffs(image, seconds, left, top)
        self._draw_lava(image, seconds, left, top)
        flicker = 1 + 0.15 * min(1.0, self.pace) * self.random.standard_normal()
        add_disc(image, self.crater_x - left, self.crater_y - top, 2.1 * self.width * flicker, (255, 150, 60), 0.5)
        for bomb in self.bombs:
            x, y = bomb.at(seconds)
            if y < self._flank(x) + 3:
                add_disc(image, x - left, y - top, 3.2 * bomb.radius, (255, 110, 30), 0.55)
                self._dot(image, x - left, y - top, bomb.radius, (255, 226, 150))
        self._draw_embers(image, left, top)
        return image

    def _flank(self, x: float) -> float:
        """The height of the mountain's outline at x, as a y coordinate."""
        away = max(0.0, abs(x - self.crater_x) - self.width)
        return self.crater_y + self.slope * away**0.93

    def _background(self) -> Image.Image:
        random, night = self.random, self.night
        top, low = _SKIES_NIGHT[random.integers(len(_SKIES_NIGHT))] if night else _SKIES[random.integers(len(_SKIES))]
        image = gradient(top, low)
        painter = ImageDraw.Draw(image)
        haze = mix(low, (60, 60, 70), 0.35)
        ridge(painter, random, 178, 26, haze)
        rock = mix((66, 54, 52), (24, 22, 32), 0.75 if night else random.uniform(0, 0.7))
        xs = np.linspace(-MARGIN, SIZE + MARGIN, 220)
        rough = np.cumsum(random.normal(0, 0.8, len(xs)))
        rough -= np.linspace(rough[0], rough[-1], len(xs))
        outline = [(x, self._flank(x) + r) for x, r in zip(xs, rough, strict=True)]
        floor = [(SIZE + MARGIN, SIZE + MARGIN), (-MARGIN, SIZE + MARGIN)]
        painter.polygon(fine(outline + floor), fill=rock)
        for _ in range(26):  # gullies, lit from one side
            side = random.choice([-1, 1])
            away, length, wide = random.uniform(self.width, 150), random.uniform(20, 80), random.uniform(2, 7)
            x = self.crater_x + side * away
            y = self._flank(x) + random.uniform(4, 60)
            run = side * length / max(self.slope, 0.5) * 0.8
            tone = mix(rock, (18, 16, 20) if side < 0 else (150, 130, 115), random.uniform(0.1, 0.3))
            painter.polygon(fine([(x, y), (x + run + wide, y + length), (x + run - wide, y + length)]), fill=tone)
        mouth = [
            (self.crater_x - self.width, self.crater_y - 3),
            (self.crater_x + self.width, self.crater_y + 4),
        ]
        painter.ellipse(fine(mouth), fill=(120, 40, 20))
        return image.reduce(FINE)

    def _bomb(self) -> Bomb:
        """One that left the crater up to two seconds ago and is still in the air, mostly, three seconds from now."""
        random = self.random
        flown_s = random.uniform(0.1, 2.2)
        speed_x, up = random.normal(0, 30) * min(1.5, 0.4 + self.pace), random.uniform(70, 165)
        x, y = ballistic(self.crater_x, speed_x, flown_s), ballistic(self.crater_y, -up, flown_s, GRAVITY)
        return Bomb(x, y, speed_x, -up + GRAVITY * flown_s, random.uniform(1.4, 3.6))

    def _puffs(self) -> list[Puff]:
        random = self.random
        lively = min(2.0, self.pace)
        rise, every_s = random.uniform(30, 60) * (0.02 + lively), 2.4 / (0.02 + lively)
        count = int(random.integers(22, 38))
        shade = int(random.integers(50, 110) if self.night else random.integers(70, 190))
        born = -np.linspace(0, every_s, count) * random.uniform(0.4, 1.5) + random.uniform(0, 1.2)
        return [
            Puff(
                float(b),
                float(random.normal(0, 0.35)),
                rise * float(random.uniform(0.85, 1.15)),
                float(random.uniform(0.30, 0.42)),
                int(np.clip(shade + random.normal(0, 22), 20, 235)),
                float(random.normal(0, 1)),
            )
            for b in born
        ] + [
            Puff(float(b), float(random.normal(0, 0.3)), rise, 0.36, shade, float(random.normal(0, 1)))
            for b in np.arange(0.05, DURATION_S, max(0.12, every_s / count))
        ]

    def _draw_puffs(self, image: Image.Image, seconds: float, left: float, top: float) -> None:
        for puff in sorted(self.puffs, key=lambda one: one.born_s):
            age_s = seconds - puff.born_s
            if age_s <= 0:
                continue
            risen = puff.rise * age_s
            radius = min(62.0, self.width * 0.6 + puff.grow * risen)
            x = self.crater_x + self.wind * age_s + puff.side * radius + puff.wobble * math.sin(age_s * 2 + puff.wobble)
            y = self.crater_y - risen + 4
            if y < -70:
                continue
            lit = puff.shade + int(40 * math.exp(-risen / 30))
            self._puff(image, x - left, y - top, radius, (lit, int(lit * 0.92), int(lit * 0.88)))

    def _puff(self, image: Image.Image, x: float, y: float, radius: float, colour: Colour) -> None:
        size = max(2, round(radius / 2) * 2)
        mask = self.discs.get(("puff", size))
        if mask is None:
            mask = self.discs["puff", size] = soft_disc(size, 0.75)
        image.paste(colour, (round(x) - size, round(y) - size), mask)

    def _dot(self, image: Image.Image, x: float, y: float, radius: float, colour: Colour) -> None:
        """A disc with a smooth edge, at an eighth of a pixel's accuracy."""
        reach, finer = math.ceil(radius) + 1, 8
        mask = Image.new("L", (2 * reach * finer, 2 * reach * finer))
        x0, y0 = math.floor(x) - reach, math.floor(y) - reach
        cx, cy, r = (x - x0) * finer, (y - y0) * finer, radius * finer
        ImageDraw.Draw(mask).ellipse([cx - r, cy - r, cx + r, cy + r], fill=255)
        image.paste(colour, (x0, y0), mask.reduce(finer))

    def _lava_map(self) -> tuple[np.ndarray, np.ndarray]:
        """For each pixel: how far down the lava's bed it lies, and how far from the bed's middle, in pixels."""
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        down = y - self.crater_y
        bend = 7 * np.sin(down / 17 + self.wind)
        middle = self.crater_x + self.lava_side * (self.width * 0.5 + down * 0.45) + bend
        return down, np.abs(x - middle) / (1 + np.maximum(down, 0) / 140)

    def _draw_lava(self, image: Image.Image, seconds: float, left: float, top: float) -> None:
        down, away = self.lava
        front = self.lava_from + self.lava_speed * seconds
        rows = slice(max(0, int(self.crater_y)), min(SIZE, int(self.crater_y + front) + 4))
        down, away = down[rows], away[rows]
        inside = np.clip(self.lava_width / 2 + 1 - away, 0, 1) * np.clip((front - down) / 2, 0, 1)
        heat = np.clip(1.1 - down / (front + 40) + 0.12 * np.sin(down / 5 - seconds * 6), 0, 1)
        bed = np.empty((*down.shape, 3), np.uint8)
        bed[..., 0], bed[..., 1], bed[..., 2] = (
            255,
            (70 + 150 * heat).astype(np.uint8),
            (20 + 70 * heat**2).astype(np.uint8),
        )
        mask = Image.fromarray((inside * 255).astype(np.uint8))
        image.paste(Image.fromarray(bed), (round(-left), rows.start + round(-top)), mask)

    def _draw_embers(self, image: Image.Image, left: float, top: float) -> None:
        for _ in range(self.random.poisson(min(28.0, 14 * self.pace))):
            x = self.crater_x + self.random.normal(0, self.width) - left
            y = self.crater_y - abs(self.random.normal(0, 40)) - top
            if 0 <= x < SIZE - 1 and 0 <= y < SIZE - 1:
                glow = int(self.random.integers(120, 220))
                image.paste((255, glow, glow // 3), (int(x), int(y), int(x) + 2, int(y) + 2))
