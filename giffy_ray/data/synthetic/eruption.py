"""'erupting': a volcano with a plume that swells, lava that creeps, bombs that fly; a camera that moves on."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from giffy_ray.data.synthetic.canvas import (
    DURATION_S,
    FPS,
    FRAMES,
    GRAVITY,
    MARGIN,
    ROCKS,
    ROCKS_UNSEEN,
    SIZE,
    SKIES,
    SKIES_UNSEEN,
    Picture,
    draw_sky,
    empty_layer,
    log_uniform,
    mix,
    noise,
    put_over,
    shifted_window,
    thrown,
)


class Bomb(NamedTuple):
    """A lump of lava: its places in the scene in the first and in the last frame, in pixels; hotter is brighter."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    heat: float


class Eruption:
    """A volcano whose plume swells, whose lava creeps down, whose bombs fly, seen by a camera that moves on.

    All that is random is drawn at the start, so that any frame can be drawn alone.
    """

    def __init__(self, random: np.random.Generator, shifted: bool):
        self.pace = pace = random.uniform(1.05, 1.25) if shifted else log_uniform(random, 0.0045, 1.0)
        heading = random.uniform(-0.6, 0.6) + (math.pi if shifted else 0.0)
        travel = random.uniform(65, 165) * pace
        self.travel = travel * math.cos(heading), 0.5 * travel * math.sin(heading)
        self.x, self.y = SIZE / 2 + random.uniform(-26, 26), random.uniform(122, 158)
        self.mouth, self.steep = random.uniform(11, 22), random.uniform(0.62, 1.0)
        sky, rock = (SKIES_UNSEEN, ROCKS_UNSEEN) if shifted else (SKIES, ROCKS)
        self.sky_colours, self.rock = sky[random.integers(len(sky))], rock[random.integers(len(rock))]
        self.glow = 1.0 if shifted else 0.62  # less by day, when it would be lost in white
        self.sky = draw_sky(random, self.sky_colours, random.uniform(160, 190), shifted).astype(np.uint8)
        self.bare = self._mountain(random)
        self.mountain = self.bare.copy()
        self.tongues = [self._tongue(random, side) for side in random.permutation([-1, 1])[: random.integers(1, 3)]]
        self.bombs = [self._bomb(random) for _ in range(round(random.uniform(6, 11) * min(1.0, pace) ** 0.6))]
        self._plan_plume(random)
        self.embers = random.uniform(0, 1, (5, int(6 + 44 * min(1.0, pace) ** 0.5)))
        self.flicker = 1 + 0.12 * random.standard_normal(FRAMES) * (0.3 + 0.7 * min(1.0, pace))

    def frame(self, index: int) -> np.ndarray:
        """uint8 [3, height, width]"""
        seconds = index / FPS
        left, top = self.camera(seconds)
        frame = shifted_window(self.sky, 0.3 * left, 0.3 * top)
        self._draw_plume(frame, seconds, left, top)
        for tongue in self.tongues:
            self.mountain[tongue[0]] = self.bare[tongue[0]]
        for tongue in self.tongues:
            self._draw_lava(tongue, seconds)
        rows = slice(max(0, int(self.y - top) - 20), SIZE)
        put_over(frame, shifted_window(self.mountain, left, top, rows), rows)
        frame = frame.astype(np.uint8)
        scene = Picture(frame, left, top)
        glow = self.flicker[index] * self.glow
        scene.light(self.x, self.y - 3, 3.4 * self.mouth, (150 * glow, 66 * glow, 16 * glow))
        self._draw_embers(scene, seconds)
        for bomb in self.bombs:
            self._draw_bomb(scene, bomb, seconds)
        return frame

    def camera(self, seconds: float) -> tuple[float, float]:
        """How far the camera stands from the middle of its way, pixels."""
        share = seconds / DURATION_S - 0.5
        return share * self.travel[0], share * self.travel[1]

    def flank(self, x: np.ndarray | float) -> np.ndarray | float:
        """The y of the mountain's outline."""
        away = np.maximum(np.abs(x - self.x) - self.mouth, 0)
        return self.y + self.steep * away / (1 + away / 700)

    def _mountain(self, random: np.random.Generator) -> np.ndarray:
        """A uint8 layer: ridges run down from the crater, lit from one side, into the haze of the plain."""
        canvas = Picture(empty_layer(), -MARGIN, -MARGIN)
        size = canvas.array.shape[1]
        ys, xs = (np.arange(size, dtype=np.float32) - MARGIN)[:, None], (np.arange(size, dtype=np.float32) - MARGIN)
        rough = 2.2 * noise(random, 1, size, 1, 50)[0] + 4 * noise(random, 1, size, 1, 14)[0]
        dip = 5 * np.cos(((xs - self.x) / self.mouth).clip(-1, 1) * (math.pi / 2))
        outline = self.flank(xs) + rough * (np.abs(xs - self.x) / 40).clip(0, 1) + dip
        down = (ys - self.y).clip(0, None)
        angle = (xs - self.x) / (down * (1.1 / self.steep) + self.mouth)
        ridges = np.zeros((size, size), np.float32)
        for fine, strength in ((2.2, 1.0), (5.0, 0.6), (11.0, 0.35)):
            waves = noise(random, 1, 512, 1, int(8 * fine))[0]
            place = ((angle + 2.5) * (511 / 5) + 3 * noise(random, size, size, 16, 16)).clip(0, 510)
            first = place.astype(np.int64)
            ridges += strength * (waves[first] + (place - first) * (waves[first + 1] - waves[first]))
        lit = (0.5 + 0.30 * ridges - 0.22 * np.sign(random.uniform(-1, 1)) * angle.clip(-1, 1)).clip(0.05, 1.2)
        rock = np.asarray(self.rock, np.float32)[:, None, None] * (0.45 + 1.15 * lit)
        haze = (np.asarray(self.sky_colours[1], np.float32) * 0.75)[:, None, None]
        canvas.below(outline, rock + (haze - rock) * ((ys - 190) / 220).clip(0, 0.45))
        return canvas.array.astype(np.uint8)

    def _tongue(self, random: np.random.Generator, side: int) -> tuple:
        """Where lava may flow: a box of the layer, how far down and from the middle its pixels lie; the front."""
        reach = log_uniform(random, 0.5, 1.0) * 74 * min(1.3, self.pace**0.8)
        start = random.uniform(18, 50)
        rows = slice(int(self.y) + MARGIN, min(SIZE + 2 * MARGIN, int(self.y + start + reach) + MARGIN + 12))
        ys = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - MARGIN
        down = ys - np.float32(self.y)
        run = random.uniform(0.25, 0.75) / self.steep
        bend = random.uniform(2, 6) * np.sin(down / random.uniform(12, 22)) * (down / 30).clip(0, 1)
        middle = self.x + side * (0.35 * self.mouth + run * down) + bend
        columns = slice(
            max(0, int(middle.min()) + MARGIN - 24), min(SIZE + 2 * MARGIN, int(middle.max()) + MARGIN + 24)
        )
        xs = np.arange(columns.start, columns.stop, dtype=np.float32) - MARGIN
        away = np.abs(xs - middle) / (random.uniform(3.5, 6.5) * (1 + down / 90))
        return (slice(0, 3), rows, columns), down + 7 * away**2, away, start, reach

    def _draw_lava(self, tongue: tuple, seconds: float) -> None:
        box, down, away, start, reach = tongue
        front = start + reach * seconds / DURATION_S
        cover = ((1 - away) * 4 + 0.5).clip(0, 1) * ((front - down) / 2 + 0.5).clip(0, 1)
        heat = 1.05 - 0.5 * away**2 - 0.45 * down / front + 0.08 * np.sin(down / 4 - 5 * seconds * self.pace)
        lava = np.stack([np.full_like(heat, 255), 40 + 190 * heat, 10 + 120 * heat**3]).clip(0, 255)
        bare = self.mountain[box]
        glow = ((1.9 - away).clip(0, 1) * ((front + 8 - down) / 16).clip(0, 1) * 0.4)[None]
        warm = bare + (np.asarray((200, 70, 20), np.float32)[:, None, None] - bare) * glow
        lava = (warm + (lava - warm) * cover + 0.5).astype(np.uint8)
        self.mountain[box] = np.minimum(lava, self.bare[3:4, box[1], box[2]])

    def _bomb(self, random: np.random.Generator) -> Bomb:
        """One that has left the crater a moment ago and comes down within sight of the last frame."""
        flown_s, speed_x = random.uniform(0.15, 0.8), random.uniform(8, 36) * random.choice([-1, 1])
        end_x = self.x + speed_x * (flown_s + DURATION_S)
        left = self.camera(DURATION_S)[0]
        if not 6 < end_x - left < SIZE - 6:  # it would be out of sight, and its path not to be told
            end_x = min(max(end_x, left + random.uniform(6, 60)), left + SIZE - random.uniform(6, 60))
            speed_x = (end_x - self.x) / (flown_s + DURATION_S)
        end_y = min(random.uniform(self.y - 30, float(self.flank(end_x)) - 2), 236)
        whole_s = flown_s + DURATION_S
        up = (self.y - end_y) / whole_s + GRAVITY * whole_s / 2  # from the crater at -flown_s to the end
        start = self.x + speed_x * flown_s, self.y - up * flown_s + GRAVITY / 2 * flown_s**2
        return Bomb(start, (end_x, end_y), random.uniform(2.2, 5.2), random.uniform(0.2, 1))

    def _draw_bomb(self, scene: Picture, bomb: Bomb, seconds: float) -> None:
        x, y = thrown(bomb.start, bomb.end, seconds)
        scene.light(x, y, 3.4 * bomb.radius, (130 * self.glow, (40 + 20 * bomb.heat) * self.glow, 8))
        before = thrown(bomb.start, bomb.end, seconds - 0.1)  # a tail tells the speed
        scene.limb(*before, x, y, 0.5 * bomb.radius, (255, 120, 36), 0.6)
        scene.disc(x, y, bomb.radius, bomb.radius, (255, 170 + 75 * bomb.heat, 60 + 150 * bomb.heat))

    def _plan_plume(self, random: np.random.Generator) -> None:
        """Puffs at fixed shares of the plume's height, which grows: both ends show each of them, and so its way."""
        pace, count = min(1.3, self.pace), 20
        self.tall = random.uniform(40, 105), random.uniform(60, 170) * pace  # at first, and what it gains; pixels
        self.lean = random.uniform(-0.45, 0.45)
        self.puffs = np.stack(
            [
                np.linspace(1, 0, count) ** 1.3,  # share of the height; the highest is drawn first
                random.uniform(-0.32, 0.32, count),  # beside the middle, in radii
                random.uniform(0.8, 1.2, count),  # size
                random.uniform(-0.16, 0.16, count),  # tone
                random.integers(0, 3, count),  # which shape
                random.uniform(0, 2 * math.pi, count),  # where its churning begins
            ],
            axis=1,
        )
        self.churn = random.uniform(0.3, 1.0) * min(1.0, pace**0.5)
        self.jitter = 0.5 * self.churn * random.standard_normal((FRAMES, 2, count))
        tone = random.uniform(0.15, 1.0)
        haze = mix(self.sky_colours[0], self.sky_colours[1], 0.5)
        self.smoke = mix((34, 31, 33), mix(haze, (96, 90, 92), 0.5), tone), mix((118, 108, 104), (246, 240, 232), tone)
        if sum(self.sky_colours[0]) < 100:
            self.smoke = mix(self.smoke[0], (14, 14, 24), 0.6), mix(self.smoke[1], (56, 54, 76), 0.65)
        self.shapes = [_cauliflower(random) for _ in range(3)]

    def _draw_plume(self, frame: np.ndarray, seconds: float, left: float, top: float) -> None:
        """Blends the puffs at half the frame's resolution, then lays them over the frame."""
        half = np.zeros((3, min(SIZE // 2, int(self.y - top + 26) // 2), SIZE // 2), np.float32)  # light, warmth, cover
        tall = self.tall[0] + self.tall[1] * seconds / DURATION_S
        jitter = self.jitter[round(seconds * FPS)].tolist()
        for number, (share, side, size, tone, shape, phase) in enumerate(self.puffs.tolist()):
            radius = (self.mouth * 0.62 + 0.30 * share * tall) * size
            sway = math.sin(phase + 2.2 * self.churn * seconds) * self.churn * 2
            x = self.x + self.lean * share**1.4 * tall + side * radius + sway + jitter[0][number] - left
            y = self.y + 2 - share * tall + jitter[1][number] - top
            columns, u = _reach((x - 0.5) / 2, radius / 2, half.shape[2])
            rows, v = _reach((y - 0.5) / 2, radius / 2, half.shape[1])
            if not len(u) or not len(v):
                continue
            texels = v[:, None] * 96 + u
            cover, light = self.shapes[int(shape)]
            cover, light = cover.take(texels), light.take(texels)
            clear = 1 - cover
            light += np.float32(tone) * cover
            warmth = max(0.0, 1 - share * tall / 46) ** 2
            for plane, more in ((0, light), (1, np.float32(warmth) * cover if warmth else None), (2, cover)):
                if more is not None:  # the warm puffs are the lowest, drawn last: until then there is nothing to cover
                    part = half[plane, rows, columns]
                    part *= clear
                    part += more
        self._lay_plume(frame, half)

    def _lay_plume(self, frame: np.ndarray, half: np.ndarray) -> None:
        light, warmth, cover = half
        dark, bright = self.smoke
        warm = (255, 120, 50)
        small = np.stack(
            [
                d * cover + (b - d) * light + 0.55 * (w - d) * warmth * (1 - 0.5 * light)
                for d, b, w in zip(dark, bright, warm, strict=True)
            ]
            + [255 * cover]
        )
        small = np.minimum(small.clip(0, 255), small[3:]).astype(np.uint16)
        put_over(frame, _doubled(_doubled(small, 1), 2), slice(0, 2 * half.shape[1]))

    def _draw_embers(self, scene: Picture, seconds: float) -> None:
        """Sparks that rise, sway and go out; each pixel pair takes its share of a spark."""
        side, start, speed, life, sway = self.embers
        age = (start + seconds * (0.25 + 0.5 * life)) % 1
        x = (
            self.x
            + (side - 0.5) * self.mouth * (1.6 + 3 * age)
            + 5 * np.sin(6.3 * (sway + age * (1 + sway)))
            - scene.x0
        )
        y = self.y - 2 - (20 + 80 * speed) * age - scene.y0
        strength = (1 - age) * (0.65 + 0.35 * np.sin(40 * sway + 25 * seconds))
        first_x, first_y = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        inside = (first_x >= 0) & (first_x < SIZE - 1) & (first_y >= 0) & (first_y < SIZE - 1)
        for right in (0, 1):
            for low in (0, 1):
                share = np.abs(1 - right - (x - first_x)) * np.abs(1 - low - (y - first_y)) * strength
                column, row, share = (first_x + right)[inside], (first_y + low)[inside], share[inside]
                for channel, value in enumerate((255, 190, 90)):
                    old = scene.array[channel, row, column].astype(np.float32)
                    scene.array[channel, row, column] = old + (value - old) * np.sqrt(share)


def _reach(middle: float, radius: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels within `radius` of a place that exist, and for each the row of a 96-pixel shape that it shows."""
    places = np.arange(max(0, math.ceil(middle - radius)), max(0, min(size, math.floor(middle + radius) + 1)))
    texels = ((places - (middle - radius)) * (95 / (2 * radius))).astype(np.int64)
    return (slice(places[0], places[-1] + 1) if len(places) else slice(0, 0)), texels


def _doubled(small: np.ndarray, axis: int) -> np.ndarray:
    """Twice as many pixels along an axis, uint16, bilinear: 3/4 of the nearer and 1/4 of the farther."""
    low, high = (
        small.take(np.arange(small.shape[axis]).clip(*ends) + step, axis)
        for ends, step in (((1, None), -1), ((None, small.shape[axis] - 2), 1))
    )
    pair = np.stack([(3 * small + low) >> 2, (3 * small + high) >> 2], axis + 1)
    return pair.reshape(*small.shape[:axis], -1, *small.shape[axis + 1 :])


def _cauliflower(random: np.random.Generator) -> np.ndarray:
    """A puff of smoke as a heap of balls: cover and light, float32 [2, 96, 96], lit from the upper left."""
    place = (np.arange(96, dtype=np.float32) - 47.5) / 48
    best, light = np.full((96, 96), -1, np.float32), np.zeros((96, 96), np.float32)
    for number in range(22):
        turn, out = random.uniform(0, 2 * math.pi), 0.6 * math.sqrt(random.uniform(0, 1)) * (number > 0)
        radius = 0.6 if number == 0 else random.uniform(0.22, 0.38)
        dx, dy = (place[None] - out * math.cos(turn)) / radius, (place[:, None] - out * math.sin(turn)) / radius
        squared = dx * dx + dy * dy
        depth = np.sqrt((1 - squared).clip(0, None))
        z = np.where(squared < 1, radius * depth - 0.7 * out**2, -1)
        shade = 0.42 + 0.30 * depth - 0.20 * dx - 0.34 * dy
        light, best = np.where(z > best, shade, light), np.maximum(z, best)
    edge = (1.0 - np.sqrt(place[None] ** 2 + place[:, None] ** 2)).clip(0, 0.35) / 0.35
    cover = ((best + 0.55) * 2.2).clip(0, 1) * edge
    return np.stack([0.96 * cover, 0.96 * cover * light.clip(0, 1)]).astype(np.float32)
