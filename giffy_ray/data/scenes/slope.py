"""'skiing': turns or a jump on a slope, a camera that pans along, trees and rocks that pass by, spray."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from giffy_ray.data.scenes.canvas import (
    DURATION_S,
    FINE,
    GRAVITY,
    MARGIN,
    SIZE,
    Colour,
    Layer,
    ballistic,
    fine,
    gradient,
    layer,
    mix,
    ridge,
    soft_disc,
    window,
)

_SKIES_CLEAR: tuple[tuple[Colour, Colour], ...] = (
    ((44, 108, 190), (168, 206, 238)),
    ((110, 140, 176), (206, 218, 230)),
)
_SKIES_EVENING: tuple[tuple[Colour, Colour], ...] = (((60, 62, 120), (240, 170, 140)), ((38, 44, 88), (214, 150, 170)))
_SUITS: tuple[Colour, ...] = (
    (214, 40, 44),
    (240, 168, 30),
    (34, 96, 200),
    (28, 32, 44),
    (150, 44, 150),
    (24, 150, 130),
)
_GREENS: tuple[Colour, ...] = ((28, 72, 52), (44, 92, 48), (20, 56, 60), (70, 88, 44))


class Slope:
    """A skier on a slope: carved turns or a jump, a camera that pans along, trees and rocks that pass, spray."""

    def __init__(self, random: np.random.Generator, shifted: bool):
        self.random = random
        pace = float(np.exp(random.uniform(np.log(0.06), np.log(1.2)))) * (1.6 if shifted else 1.0)
        self.direction = -1 if shifted else 1
        self.pan = (
            self.direction * 80 * min(1.0 if not shifted else 1.5, pace)
        )  # pixels that the snow moves in the clip, below the trees' spacing
        self.tilt = random.uniform(0.10, 0.32) * self.direction
        self.horizon = random.uniform(84, 118)
        self.evening = shifted or random.random() < 0.3
        self.wood = random.uniform(0.6, 2.4)  # how large the trees and rocks are
        self.sky, self.far, self.near = self._layers()
        self.jump = pace > 0.35 and random.random() < 0.4
        self.phase = random.uniform(0, 2 * math.pi)
        self.turns = random.uniform(0.4, 1.4) * (0.06 + 0.94 * pace)
        self.swing = random.uniform(14, 40)
        self.x, self.y = random.uniform(85, 171), random.uniform(140, 190)
        self.drift = random.uniform(-1, 1) * 34 * pace
        self.height = random.uniform(46, 76)
        self.fall = 26 * pace
        self.up = random.uniform(0.35, 0.65) * GRAVITY * DURATION_S
        self.suit, self.legs = _SUITS[random.integers(len(_SUITS))], _SUITS[random.integers(len(_SUITS))]
        self.spray = pace

    def frame(self, seconds: float) -> Image.Image:
        moved = self.pan * seconds / DURATION_S
        image = window(self.sky, 0.08 * moved, 0)
        hidden = min(SIZE, round(self.horizon + 50 + abs(self.tilt) * SIZE))  # by the nearer snow
        for parts, share, rows in ((self.far, 0.45, (40, hidden)), (self.near, 1.0, (0, SIZE))):
            picture, mask = (window(part, share * moved, share * moved * self.tilt, rows) for part in parts)
            image.paste(picture, (0, rows[0]), mask)
        self._draw_skier(image, seconds)
        return image

    def skier_at(self, seconds: float) -> tuple[float, float, float]:
        """x and y of the skier's feet in pixels, and the lean in radians, positive to the right."""
        if self.jump:
            return (
                ballistic(self.x, self.drift, seconds / DURATION_S),
                ballistic(self.y, -self.up, seconds, GRAVITY),
                0.15,
            )
        angle = self.phase + 2 * math.pi * self.turns * seconds / DURATION_S
        x = ballistic(self.x, self.drift, seconds / DURATION_S) + self.swing * math.sin(angle)
        y = ballistic(self.y, self.fall, seconds / DURATION_S)
        return x, y, -0.55 * math.sin(angle)

    def _layers(self) -> tuple[Image.Image, Layer, Layer]:
        """The sky, the far slope and the near one; each further one moves less when the camera pans."""
        random = self.random
        skies = _SKIES_EVENING if self.evening else _SKIES_CLEAR
        top, low = skies[random.integers(len(skies))]
        sky = gradient(top, low, self.horizon)
        painter = ImageDraw.Draw(sky)
        ridge(painter, random, self.horizon - 18, 42, mix(low, (96, 110, 140), 0.45))
        ridge(painter, random, self.horizon + 2, 26, mix(low, (150, 165, 190), 0.6))
        snow = mix((246, 249, 253), (176, 150, 190) if self.evening else (214, 226, 242), random.uniform(0.1, 0.5))
        shade = mix(snow, (90, 104, 150), 0.35)

        # Clear parts have the snow's colour, so that no dark edge appears where layers are blurred or moved.
        far = Image.new("RGBA", sky.size, (*snow, 0))
        painter = ImageDraw.Draw(far)
        self._ground(painter, self.horizon + 8, mix(snow, shade, 0.35))
        for x in self._places(44):
            self._tree(
                painter, x, self._level(x, self.horizon + 8) + 3, random.uniform(22, 40), mix(_GREENS[0], shade, 0.45)
            )

        near = Image.new("RGBA", far.size, (*snow, 0))
        painter = ImageDraw.Draw(near)
        self._ground(painter, self.horizon + 34, snow)
        for _ in range(18):  # soft shadows of the ground
            x, y = random.uniform(-MARGIN, SIZE + MARGIN), random.uniform(self.horizon + 50, SIZE + 60)
            wide, high = random.uniform(40, 120), random.uniform(3, 10)
            painter.ellipse(fine([(x - wide, y - high), (x + wide, y + high)]), fill=(*mix(snow, shade, 0.35), 255))
        blurred = near.convert("RGB").reduce(4).filter(ImageFilter.GaussianBlur(1)).resize(near.size)
        blurred.putalpha(near.getchannel("A"))
        near, painter = blurred, ImageDraw.Draw(blurred)
        for x in np.sort(np.concatenate([self._places(82) for _ in range(1 + (self.wood > 1.2))])):
            depth = random.uniform(0, 1) ** 2
            ground = self._level(x, self.horizon + 36) + depth * 90
            self._thing(painter, x, ground, self.wood * (1.1 + 1.1 * depth), shade)
        return sky.reduce(FINE), layer(far), layer(near)

    def _level(self, x: float, height: float) -> float:
        return height + self.tilt * (x - SIZE / 2)

    def _ground(self, painter: ImageDraw.ImageDraw, height: float, colour: Colour) -> None:
        low, high = -MARGIN, SIZE + MARGIN
        edge = [(low, self._level(low, height)), (high, self._level(high, height)), (high, high), (low, high)]
        painter.polygon(fine(edge), fill=(*colour, 255))

    def _places(self, spacing: float) -> np.ndarray:
        """Places along the slope about `spacing` apart, never closer than three quarters of it."""
        places = np.arange(-MARGIN, SIZE + MARGIN, spacing)
        return places + self.random.uniform(-0.125, 0.125, len(places)) * spacing

    def _thing(self, painter: ImageDraw.ImageDraw, x: float, ground: float, scale: float, shade: Colour) -> None:
        random = self.random
        painter.ellipse(fine([(x - 22 * scale, ground - 4), (x + 18 * scale, ground + 4)]), fill=(*shade, 255))
        kind = random.random()
        if kind < 0.6:
            green = mix(_GREENS[random.integers(len(_GREENS))], (70, 60, 90), 0.4 if self.evening else 0.0)
            self._tree(painter, x, ground, scale * random.uniform(36, 60), green)
        elif kind < 0.8:
            grey = int(random.integers(70, 130))
            wide, high = scale * random.uniform(10, 20), scale * random.uniform(8, 16)
            rock = [
                (x - wide, ground),
                (x - wide * 0.6, ground - high),
                (x + wide * 0.3, ground - high * 1.2),
                (x + wide, ground),
            ]
            painter.polygon(fine(rock), fill=(grey, grey, grey + 8, 255))
        else:
            colour = _SUITS[random.integers(len(_SUITS))]
            high = scale * 30
            painter.line(fine([(x, ground), (x, ground - high)]), fill=(60, 60, 66, 255), width=3)
            painter.polygon(
                fine([(x, ground - high), (x + 16 * scale, ground - high * 0.8), (x, ground - high * 0.6)]),
                fill=(*colour, 255),
            )

    def _tree(self, painter: ImageDraw.ImageDraw, x: float, ground: float, height: float, green: Colour) -> None:
        painter.rectangle(
            fine([(x - height * 0.05, ground - height * 0.2), (x + height * 0.05, ground)]), fill=(74, 56, 46, 255)
        )
        for part in range(3):
            base, wide = ground - height * (0.12 + 0.27 * part), height * (0.32 - 0.08 * part)
            crown = [(x - wide, base), (x, base - height * 0.42), (x + wide, base)]
            painter.polygon(fine(crown), fill=(*mix(green, (255, 255, 255), 0.06 * part), 255))

    def _draw_skier(self, image: Image.Image, seconds: float) -> None:
        x, y, lean = self.skier_at(seconds)
        if not self.jump:
            self._draw_spray(image, x, y, lean)
        finer, reach = 3, math.ceil(self.height * 0.72)
        tile = Image.new("RGBA", (2 * reach * finer, 2 * reach * finer), (*self.suit, 0))
        x0, y0 = math.floor(x + 0.3 * self.height * math.sin(lean)) - reach, math.floor(y - 0.45 * self.height) - reach
        painter = ImageDraw.Draw(tile)
        size = self.height

        def point(side: float, up: float) -> tuple[float, float]:
            """A point of the body, `up` heights above the feet, turned by the lean."""
            across = x + size * (side * math.cos(lean) + up * math.sin(lean))
            above = y - size * (up * math.cos(lean) - side * math.sin(lean))
            return (across - x0) * finer, (above - y0) * finer

        def limb(colour: Colour, wide: float, *points: tuple[float, float]) -> None:
            painter.line(
                [point(*p) for p in points], fill=(*colour, 255), width=round(wide * size * finer), joint="curve"
            )
            for p in points:
                px, py = point(*p)
                r = wide * size * finer / 2
                painter.ellipse([px - r, py - r, px + r, py + r], fill=(*colour, 255))

        for side in (-0.07, 0.09):
            limb((40, 40, 48), 0.05, (side - 0.36, -0.02), (side + 0.4, 0.03))
        limb((70, 70, 78), 0.03, (-0.2, 0.55), (-0.34, 0.0))
        limb((70, 70, 78), 0.03, (0.26, 0.55), (0.4, 0.02))
        for side in (-0.08, 0.09):
            limb(self.legs, 0.13, (side, 0.04), (side + 0.07, 0.22), (side * 0.6, 0.4))
        limb(self.suit, 0.22, (0.0, 0.42), (0.05, 0.7))
        limb(self.suit, 0.09, (0.0, 0.7), (-0.14, 0.6), (-0.2, 0.54))
        limb(self.suit, 0.09, (0.08, 0.7), (0.2, 0.62), (0.26, 0.55))
        limb((236, 196, 166), 0.17, (0.07, 0.9))
        limb(mix(self.suit, (20, 20, 30), 0.5), 0.15, (0.055, 0.935))
        small = tile.reduce(finer)
        image.paste(small, (x0, y0), small)

    def _draw_spray(self, image: Image.Image, x: float, y: float, lean: float) -> None:
        """Snow thrown to the outside of the turn, the more the deeper the lean; different in every frame."""
        amount = int(40 * abs(lean) * (0.2 + self.spray))
        side = -math.copysign(1, lean)
        for _ in range(amount):
            px = x + side * abs(self.random.normal(8, 13))
            py = y - abs(self.random.normal(0, 7))
            radius = int(self.random.integers(1, 4))
            mask = soft_disc(radius, 0.8)
            image.paste((255, 255, 255), (round(px) - radius, round(py) - radius), mask)
