"""Category 'erupting': a volcano with a growing plume, creeping lava and flying bombs, seen by a moving camera."""

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
    OOD_ROCKS,
    OOD_SKIES,
    ROCKS,
    SIZE,
    SKIES,
    Canvas,
    ballistic_position,
    composite_over,
    create_layer,
    draw_sky,
    mix_colours,
    random_log_uniform,
    smooth_noise,
    view_layer,
)


class Bomb(NamedTuple):
    """A lump of lava, with its scene positions in the first and last frame. Hotter lumps are brighter."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    heat: float


class LavaTongue(NamedTuple):
    """The area of the mountain layer that lava may cover, and how far it flows."""

    box: tuple[slice, slice, slice]  # channels, rows, columns of the layer
    depth: np.ndarray  # [rows, columns], distance from the crater in pixels; larger away from the middle
    offset: np.ndarray  # [rows, columns], distance from the middle of the tongue in units of its half width
    start: float  # depth of the front in the first frame
    reach: float  # pixels by which the front advances until the last frame


class Eruption:
    """A volcano with a growing plume, creeping lava and flying bombs, seen by a moving camera.

    All random numbers are drawn in the constructor, so each frame can be drawn alone.
    """

    def __init__(self, random: np.random.Generator, ood: bool):
        self.pace = random.uniform(1.05, 1.25) if ood else random_log_uniform(random, 0.0045, 1.0)
        heading = random.uniform(-0.6, 0.6) + (math.pi if ood else 0.0)
        distance = random.uniform(65, 165) * self.pace
        self.travel = distance * math.cos(heading), 0.5 * distance * math.sin(heading)
        self.x, self.y = SIZE / 2 + random.uniform(-26, 26), random.uniform(122, 158)
        self.mouth, self.steepness = random.uniform(11, 22), random.uniform(0.62, 1.0)
        skies, rocks = (OOD_SKIES, OOD_ROCKS) if ood else (SKIES, ROCKS)
        self.sky_colours = skies[random.integers(len(skies))]
        self.rock = rocks[random.integers(len(rocks))]
        self.glow = 1.0 if ood else 0.62  # weaker by day, so that it does not saturate
        self.sky = draw_sky(random, self.sky_colours, random.uniform(160, 190), ood).astype(np.uint8)
        self.bare_mountain = self._draw_mountain(random)
        self.mountain = self.bare_mountain.copy()
        sides = random.permutation([-1, 1])[: random.integers(1, 3)]
        self.tongues = [self._plan_tongue(random, side) for side in sides]
        bomb_count = round(random.uniform(6, 11) * min(1.0, self.pace) ** 0.6)
        self.bombs = [self._plan_bomb(random) for _ in range(bomb_count)]
        self._plan_plume(random)
        self.embers = random.uniform(0, 1, (5, int(6 + 44 * min(1.0, self.pace) ** 0.5)))
        self.flicker = 1 + 0.12 * random.standard_normal(FRAMES) * (0.3 + 0.7 * min(1.0, self.pace))

    def draw_frame(self, index: int) -> np.ndarray:
        """Returns uint8 [3, height, width]."""
        seconds = index / FPS
        left, top = self.camera_position(seconds)
        frame = view_layer(self.sky, 0.3 * left, 0.3 * top)
        self._draw_plume(frame, seconds, left, top)
        for tongue in self.tongues:
            self.mountain[tongue.box] = self.bare_mountain[tongue.box]
        for tongue in self.tongues:
            self._draw_lava(tongue, seconds)
        rows = slice(max(0, int(self.y - top) - 20), SIZE)
        composite_over(frame, view_layer(self.mountain, left, top, rows), rows)
        frame = frame.astype(np.uint8)
        scene = Canvas(frame, left, top)
        glow = self.flicker[index] * self.glow
        scene.add_light(self.x, self.y - 3, 3.4 * self.mouth, (150 * glow, 66 * glow, 16 * glow))
        self._draw_embers(scene, seconds)
        for bomb in self.bombs:
            self._draw_bomb(scene, bomb, seconds)
        return frame

    def camera_position(self, seconds: float) -> tuple[float, float]:
        """Offset of the camera from the middle of its path, in pixels."""
        fraction = seconds / DURATION_S - 0.5
        return fraction * self.travel[0], fraction * self.travel[1]

    def outline(self, x: np.ndarray | float) -> np.ndarray | float:
        """The y of the mountain's smooth outline."""
        distance = np.maximum(np.abs(x - self.x) - self.mouth, 0)
        return self.y + self.steepness * distance / (1 + distance / 700)

    def _draw_mountain(self, random: np.random.Generator) -> np.ndarray:
        """Draws ridges that run from the crater into the haze of the plain, lit from one side: uint8 layer."""
        canvas = Canvas(create_layer(), -MARGIN, -MARGIN)
        size = canvas.array.shape[1]
        xs = np.arange(size, dtype=np.float32) - MARGIN
        ys = xs[:, None]
        roughness = 2.2 * smooth_noise(random, 1, size, 1, 50)[0] + 4 * smooth_noise(random, 1, size, 1, 14)[0]
        dip = 5 * np.cos(((xs - self.x) / self.mouth).clip(-1, 1) * (math.pi / 2))
        outline = self.outline(xs) + roughness * (np.abs(xs - self.x) / 40).clip(0, 1) + dip
        depth = (ys - self.y).clip(0, None)
        angle = (xs - self.x) / (depth * (1.1 / self.steepness) + self.mouth)
        ridges = np.zeros((size, size), np.float32)
        for frequency, amplitude in ((2.2, 1.0), (5.0, 0.6), (11.0, 0.35)):
            waves = smooth_noise(random, 1, 512, 1, int(8 * frequency))[0]
            position = ((angle + 2.5) * (511 / 5) + 3 * smooth_noise(random, size, size, 16, 16)).clip(0, 510)
            first = position.astype(np.int64)
            ridges += amplitude * (waves[first] + (position - first) * (waves[first + 1] - waves[first]))
        light = (0.5 + 0.30 * ridges - 0.22 * np.sign(random.uniform(-1, 1)) * angle.clip(-1, 1)).clip(0.05, 1.2)
        rock = np.asarray(self.rock, np.float32)[:, None, None] * (0.45 + 1.15 * light)
        haze = (np.asarray(self.sky_colours[1], np.float32) * 0.75)[:, None, None]
        canvas.fill_below(outline, rock + (haze - rock) * ((ys - 190) / 220).clip(0, 0.45))
        return canvas.array.astype(np.uint8)

    def _plan_tongue(self, random: np.random.Generator, side: int) -> LavaTongue:
        reach = random_log_uniform(random, 0.5, 1.0) * 74 * min(1.3, self.pace**0.8)
        start = random.uniform(18, 50)
        rows = slice(int(self.y) + MARGIN, min(SIZE + 2 * MARGIN, int(self.y + start + reach) + MARGIN + 12))
        ys = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - MARGIN
        depth = ys - np.float32(self.y)
        slope = random.uniform(0.25, 0.75) / self.steepness
        bend = random.uniform(2, 6) * np.sin(depth / random.uniform(12, 22)) * (depth / 30).clip(0, 1)
        middle = self.x + side * (0.35 * self.mouth + slope * depth) + bend
        first_column = max(0, int(middle.min()) + MARGIN - 24)
        columns = slice(first_column, min(SIZE + 2 * MARGIN, int(middle.max()) + MARGIN + 24))
        xs = np.arange(columns.start, columns.stop, dtype=np.float32) - MARGIN
        offset = np.abs(xs - middle) / (random.uniform(3.5, 6.5) * (1 + depth / 90))
        return LavaTongue((slice(0, 3), rows, columns), depth + 7 * offset**2, offset, start, reach)

    def _draw_lava(self, tongue: LavaTongue, seconds: float) -> None:
        box, depth, offset, start, reach = tongue
        front = start + reach * seconds / DURATION_S
        coverage = ((1 - offset) * 4 + 0.5).clip(0, 1) * ((front - depth) / 2 + 0.5).clip(0, 1)
        heat = 1.05 - 0.5 * offset**2 - 0.45 * depth / front + 0.08 * np.sin(depth / 4 - 5 * seconds * self.pace)
        lava = np.stack([np.full_like(heat, 255), 40 + 190 * heat, 10 + 120 * heat**3]).clip(0, 255)
        bare = self.mountain[box]
        glow = ((1.9 - offset).clip(0, 1) * ((front + 8 - depth) / 16).clip(0, 1) * 0.4)[None]
        warm = bare + (np.asarray((200, 70, 20), np.float32)[:, None, None] - bare) * glow
        lava = (warm + (lava - warm) * coverage + 0.5).astype(np.uint8)
        opacity = self.bare_mountain[3:4, box[1], box[2]]
        self.mountain[box] = np.minimum(lava, opacity)

    def _plan_bomb(self, random: np.random.Generator) -> Bomb:
        """A bomb that left the crater before the first frame and lands in view of the last one."""
        flight_s = random.uniform(0.15, 0.8)  # before the first frame
        speed_x = random.uniform(8, 36) * random.choice([-1, 1])
        end_x = self.x + speed_x * (flight_s + DURATION_S)
        left = self.camera_position(DURATION_S)[0]
        if not 6 < end_x - left < SIZE - 6:  # outside the view, the last frame would not determine the path
            end_x = min(max(end_x, left + random.uniform(6, 60)), left + SIZE - random.uniform(6, 60))
            speed_x = (end_x - self.x) / (flight_s + DURATION_S)
        end_y = min(random.uniform(self.y - 30, float(self.outline(end_x)) - 2), 236)
        total_s = flight_s + DURATION_S
        speed_up = (self.y - end_y) / total_s + GRAVITY * total_s / 2  # at the crater
        start = self.x + speed_x * flight_s, self.y - speed_up * flight_s + GRAVITY / 2 * flight_s**2
        return Bomb(start, (end_x, end_y), random.uniform(2.2, 5.2), random.uniform(0.2, 1))

    def _draw_bomb(self, scene: Canvas, bomb: Bomb, seconds: float) -> None:
        x, y = ballistic_position(bomb.start, bomb.end, seconds)
        scene.add_light(x, y, 3.4 * bomb.radius, (130 * self.glow, (40 + 20 * bomb.heat) * self.glow, 8))
        tail = ballistic_position(bomb.start, bomb.end, seconds - 0.1)  # shows the velocity
        scene.draw_line(*tail, x, y, 0.5 * bomb.radius, (255, 120, 36), 0.6)
        scene.draw_ellipse(x, y, bomb.radius, bomb.radius, (255, 170 + 75 * bomb.heat, 60 + 150 * bomb.heat))

    def _plan_plume(self, random: np.random.Generator) -> None:
        """Plans puffs at fixed fractions of the growing plume, so that start and end determine their paths."""
        pace, count = min(1.3, self.pace), 20
        # Height in the first frame, and growth until the last one, in pixels.
        self.plume_height, self.plume_growth = random.uniform(40, 105), random.uniform(60, 170) * pace
        self.lean = random.uniform(-0.45, 0.45)
        self.puffs = np.stack(
            [
                np.linspace(1, 0, count) ** 1.3,  # fraction of the height; the highest is drawn first
                random.uniform(-0.32, 0.32, count),  # offset from the middle, in radii
                random.uniform(0.8, 1.2, count),  # size
                random.uniform(-0.16, 0.16, count),  # tone
                random.integers(0, 3, count),  # index into `shapes`
                random.uniform(0, 2 * math.pi, count),  # phase of the churning
            ],
            axis=1,
        )
        self.churn = random.uniform(0.3, 1.0) * min(1.0, pace**0.5)
        self.jitter = 0.5 * self.churn * random.standard_normal((FRAMES, 2, count))
        tone = random.uniform(0.15, 1.0)
        haze = mix_colours(self.sky_colours[0], self.sky_colours[1], 0.5)
        dark = mix_colours((34, 31, 33), mix_colours(haze, (96, 90, 92), 0.5), tone)
        bright = mix_colours((118, 108, 104), (246, 240, 232), tone)
        if sum(self.sky_colours[0]) < 100:
            dark = mix_colours(dark, (14, 14, 24), 0.6)
            bright = mix_colours(bright, (56, 54, 76), 0.65)
        self.smoke = dark, bright
        self.shapes = [_draw_puff_shape(random) for _ in range(3)]

    def _draw_plume(self, frame: np.ndarray, seconds: float, left: float, top: float) -> None:
        """Blends the puffs at half the resolution, then composites them over the frame."""
        half_height = min(SIZE // 2, int(self.y - top + 26) // 2)
        half = np.zeros((3, half_height, SIZE // 2), np.float32)  # light, warmth, coverage
        height = self.plume_height + self.plume_growth * seconds / DURATION_S
        jitter = self.jitter[round(seconds * FPS)].tolist()
        for number, (level, side, size, tone, shape, phase) in enumerate(self.puffs.tolist()):
            radius = (self.mouth * 0.62 + 0.30 * level * height) * size
            sway = math.sin(phase + 2.2 * self.churn * seconds) * self.churn * 2
            x = self.x + self.lean * level**1.4 * height + side * radius + sway + jitter[0][number] - left
            y = self.y + 2 - level * height + jitter[1][number] - top
            columns, texel_columns = _puff_pixels((x - 0.5) / 2, radius / 2, half.shape[2])
            rows, texel_rows = _puff_pixels((y - 0.5) / 2, radius / 2, half.shape[1])
            if not len(texel_columns) or not len(texel_rows):
                continue
            texels = texel_rows[:, None] * 96 + texel_columns
            coverage, light = self.shapes[int(shape)]
            coverage, light = coverage.take(texels), light.take(texels)
            transparency = 1 - coverage
            light += np.float32(tone) * coverage
            warmth = max(0.0, 1 - level * height / 46) ** 2
            # Warm puffs are the lowest and drawn last, so the warmth plane is still zero for all puffs before them.
            warm_coverage = np.float32(warmth) * coverage if warmth else None
            for plane, addition in ((0, light), (1, warm_coverage), (2, coverage)):
                if addition is not None:
                    region = half[plane, rows, columns]
                    region *= transparency
                    region += addition
        self._composite_plume(frame, half)

    def _composite_plume(self, frame: np.ndarray, half: np.ndarray) -> None:
        light, warmth, coverage = half
        planes = []
        for dark, bright, warm in zip(*self.smoke, (255, 120, 50), strict=True):
            planes.append(dark * coverage + (bright - dark) * light + 0.55 * (warm - dark) * warmth * (1 - 0.5 * light))
        small = np.stack([*planes, 255 * coverage])
        small = np.minimum(small.clip(0, 255), small[3:]).astype(np.uint16)
        composite_over(frame, _upsample(_upsample(small, 1), 2), slice(0, 2 * half.shape[1]))

    def _draw_embers(self, scene: Canvas, seconds: float) -> None:
        """Draws sparks that rise, sway and fade. Each spark is split between its four nearest pixels."""
        side, start, speed, life, sway = self.embers
        age = (start + seconds * (0.25 + 0.5 * life)) % 1
        spread = (side - 0.5) * self.mouth * (1.6 + 3 * age)
        x = self.x + spread + 5 * np.sin(6.3 * (sway + age * (1 + sway))) - scene.x0
        y = self.y - 2 - (20 + 80 * speed) * age - scene.y0
        strength = (1 - age) * (0.65 + 0.35 * np.sin(40 * sway + 25 * seconds))
        first_x, first_y = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        visible = (first_x >= 0) & (first_x < SIZE - 1) & (first_y >= 0) & (first_y < SIZE - 1)
        for right in (0, 1):
            for low in (0, 1):
                weight = np.abs(1 - right - (x - first_x)) * np.abs(1 - low - (y - first_y)) * strength
                column, row, weight = (first_x + right)[visible], (first_y + low)[visible], weight[visible]
                for channel, value in enumerate((255, 190, 90)):
                    previous = scene.array[channel, row, column].astype(np.float32)
                    scene.array[channel, row, column] = previous + (value - previous) * np.sqrt(weight)


def _puff_pixels(centre: float, radius: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels within `radius` of a centre, and the texel of a 96-pixel shape that each of them shows."""
    pixels = np.arange(max(0, math.ceil(centre - radius)), max(0, min(size, math.floor(centre + radius) + 1)))
    texels = ((pixels - (centre - radius)) * (95 / (2 * radius))).astype(np.int64)
    return (slice(pixels[0], pixels[-1] + 1) if len(pixels) else slice(0, 0)), texels


def _upsample(small: np.ndarray, axis: int) -> np.ndarray:
    """Doubles the pixels along an axis, uint16, bilinear: 3/4 of the nearer and 1/4 of the farther one."""
    size = small.shape[axis]
    previous = small.take(np.arange(size).clip(1, None) - 1, axis)
    following = small.take(np.arange(size).clip(None, size - 2) + 1, axis)
    pair = np.stack([(3 * small + previous) >> 2, (3 * small + following) >> 2], axis + 1)
    return pair.reshape(*small.shape[:axis], -1, *small.shape[axis + 1 :])


def _draw_puff_shape(random: np.random.Generator) -> np.ndarray:
    """Draws a puff of smoke as a heap of balls: coverage and light, float32 [2, 96, 96], lit from the upper left."""
    grid = (np.arange(96, dtype=np.float32) - 47.5) / 48
    highest, light = np.full((96, 96), -1, np.float32), np.zeros((96, 96), np.float32)
    for number in range(22):
        angle = random.uniform(0, 2 * math.pi)
        distance = 0.6 * math.sqrt(random.uniform(0, 1)) * (number > 0)
        radius = 0.6 if number == 0 else random.uniform(0.22, 0.38)
        dx = (grid[None] - distance * math.cos(angle)) / radius
        dy = (grid[:, None] - distance * math.sin(angle)) / radius
        squared = dx * dx + dy * dy
        depth = np.sqrt((1 - squared).clip(0, None))
        z = np.where(squared < 1, radius * depth - 0.7 * distance**2, -1)
        shade = 0.42 + 0.30 * depth - 0.20 * dx - 0.34 * dy
        light, highest = np.where(z > highest, shade, light), np.maximum(z, highest)
    edge = (1.0 - np.sqrt(grid[None] ** 2 + grid[:, None] ** 2)).clip(0, 0.35) / 0.35
    coverage = ((highest + 0.55) * 2.2).clip(0, 1) * edge
    return np.stack([0.96 * coverage, 0.96 * coverage * light.clip(0, 1)]).astype(np.float32)
