"""Category 'skiing': carved turns or a jump, in front of trees, rocks, gates and huts that the camera pans past."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from giffy_ray.data.synthetic.canvas import (
    DURATION_S,
    FAR_PARALLAX,
    FOREGROUND_PARALLAX,
    FPS,
    FRAMES,
    GREENS,
    MARGIN,
    OOD_GREENS,
    OOD_SKIES,
    OOD_SUITS,
    SIZE,
    SKIES,
    SPACING,
    SUITS,
    Canvas,
    Colour,
    ballistic_position,
    composite_over,
    create_layer,
    draw_sky,
    mix_colours,
    random_log_uniform,
    random_positions,
    smooth_noise,
    view_layer,
)


class Slope:
    """A skier who carves or jumps, in front of trees, rocks, gates and huts that the camera pans past.

    Draw the frames in order: ski tracks stay in the snow.
    """

    def __init__(self, random: np.random.Generator, ood: bool):
        self.ood = ood
        self.pace = random.uniform(1.05, 1.14) if ood else random_log_uniform(random, 0.006, 1.0)
        self.pan = 80 * self.pace * (-1 if ood else 1)  # pixels that the near slope moves; below SPACING
        self.tilt = random.uniform(0.04, 0.24) * (-1 if ood else 1)
        self.horizon = random.uniform(82, 108)
        skies = OOD_SKIES if ood else SKIES
        self.sky_colours = skies[random.integers(len(skies))]
        light = mix_colours(self.sky_colours[1], (255, 255, 255), 0.0 if ood else 0.72)
        self.snow = mix_colours(light, (120, 140, 190), 0.35) if ood else light
        self.shade = mix_colours(self.snow, mix_colours(self.sky_colours[0], (70, 90, 150), 0.5), 0.42)
        self.sky = draw_sky(random, self.sky_colours, self.horizon + 12, ood).astype(np.uint8)
        self.far = self._draw_far_slope(random)
        self.near = self._draw_near_slope(random)
        self.foreground = self._draw_treetops(random)
        self._plan_skier(random)
        self.grains = random.standard_normal((FRAMES, 4, 26)).astype(np.float32)
        for past_frames in range(45, 0, -1):
            self._draw_track(-past_frames / FPS)

    def draw_frame(self, index: int) -> np.ndarray:
        """Returns uint8 [3, height, width]."""
        seconds = index / FPS
        self._draw_track(seconds)
        left = self.camera_x(seconds)
        frame = view_layer(self.sky, 0.16 * left, 0.04 * left)
        reach = abs(self.tilt) * (SIZE / 2 + MARGIN) + abs(self.tilt * self.pan)
        for layer, parallax, top, bottom in (
            (self.far, FAR_PARALLAX, self.horizon - 66 - reach, self.horizon + 70 + reach),
            (self.near, 1.0, 0, SIZE),
        ):
            rows = slice(max(0, int(top)), min(SIZE, int(bottom)))
            composite_over(frame, view_layer(layer, parallax * left, parallax * left * self.tilt, rows), rows)
        frame = frame.astype(np.uint8)
        self._draw_skier(Canvas(frame), index)
        rows = slice(SIZE - 96, SIZE)
        bottom_rows = frame[:, rows].astype(np.uint16)
        composite_over(bottom_rows, view_layer(self.foreground, FOREGROUND_PARALLAX * left, 0, rows), slice(None))
        frame[:, rows] = bottom_rows
        return frame

    def camera_x(self, seconds: float) -> float:
        """Offset of the camera from the middle of its path, in pixels."""
        return self.pan * (seconds / DURATION_S - 0.5)

    def ground_y(self, x: np.ndarray | float, level: float) -> np.ndarray | float:
        """The y of a slope that is at `level` in the middle of the scene."""
        return level + self.tilt * (x - SIZE / 2)

    def skier_pose(self, seconds: float) -> tuple[float, float, float, float]:
        """Returns (x, y) of the skier's feet in frame pixels, and lean and heading in radians (positive: right)."""
        if self.is_jump:
            x, y = ballistic_position(self.start, self.end, seconds)
            return x, y, 0.16 * math.copysign(1, self.end[0] - self.start[0]), 0.5 * self.heading
        fraction = seconds / DURATION_S
        phase = self.phase + 2 * math.pi * self.turns * fraction
        x = self.start[0] + fraction * (self.end[0] - self.start[0]) + self.swing * math.sin(phase)
        y = self.start[1] + fraction * (self.end[1] - self.start[1])
        return x, y, -0.62 * math.sin(phase), self.heading * math.cos(phase)

    def _plan_skier(self, random: np.random.Generator) -> None:
        pace = self.pace
        self.is_jump = bool(pace > 0.25 and random.random() < 0.3)
        self.phase = random.uniform(0, 2 * math.pi)
        self.turns = random.uniform(0.5, 1.4) * min(1.0, pace**0.5)
        self.swing = random.uniform(16, 42)
        self.heading = random.uniform(0.5, 0.95)
        self.height = random.uniform(66, 104)
        middle, drift, fall = random.uniform(100, 156), random.uniform(-70, 70) * pace**0.5, 42 * min(1.0, pace**0.5)
        end_y = random.uniform(206, 236)
        self.start, self.end = (middle - drift / 2, end_y - fall), (middle + drift / 2, end_y)
        suits = OOD_SUITS if self.ood else SUITS
        jacket, trousers = random.choice(len(suits), 2, replace=False)
        darkness = 0.35 if self.ood else 0.0
        self.jacket = mix_colours(suits[jacket], (30, 34, 70), darkness)
        self.trousers = mix_colours(suits[trousers], (30, 34, 70), darkness)
        self.helmet = mix_colours(suits[trousers], (255, 255, 255), 0.25)

    def _draw_treetops(self, random: np.random.Generator) -> np.ndarray:
        """Draws firs close to the camera, of which only the tops are in the frame: uint8 layer."""
        canvas = Canvas(create_layer(), -MARGIN, -MARGIN)
        for x in random_positions(random, FOREGROUND_PARALLAX * SPACING, -MARGIN, SIZE + MARGIN):
            height = random.uniform(130, 190)
            y = SIZE + height - random.uniform(34, 80)
            self._draw_tree(canvas, x, y, height, mix_colours(self._random_green(random), (8, 12, 26), 0.45))
        return canvas.array.astype(np.uint8)

    def _draw_far_slope(self, random: np.random.Generator) -> np.ndarray:
        canvas = Canvas(create_layer(), -MARGIN, -MARGIN)
        level, haze = self.horizon + 16, 0.22
        xs = np.arange(-MARGIN, SIZE + MARGIN, dtype=np.float32)
        outline = self.ground_y(xs, level) + 4 * smooth_noise(random, 1, len(xs), 1, 5)[0]
        snow = mix_colours(mix_colours(self.snow, self.shade, 0.3), self.sky_colours[1], haze)
        canvas.fill_below(outline, np.asarray(snow))
        for x in random_positions(random, FAR_PARALLAX * SPACING, -MARGIN, SIZE + MARGIN):
            y = float(self.ground_y(x, level)) + random.uniform(6, 16)
            height = random.uniform(38, 72)
            self._draw_tree(canvas, x, y, height, mix_colours(self._random_green(random), self.sky_colours[1], haze))
        return canvas.array.astype(np.uint8)

    def _draw_near_slope(self, random: np.random.Generator) -> np.ndarray:
        """Draws waves of snow and a few large objects, each of its own size and colour: uint8 layer."""
        canvas = Canvas(create_layer(), -MARGIN, -MARGIN)
        size = canvas.array.shape[1]
        xs = ys = np.arange(size, dtype=np.float32) - MARGIN
        level = self.horizon + 40
        waves = smooth_noise(random, size, size, 13, 4) + 0.5 * smooth_noise(random, size, size, 26, 7)
        depth = ((ys[:, None] - np.asarray(self.ground_y(xs, level))[None]) / 150).clip(0, 1)
        shading = (0.30 + 0.32 * waves - 0.22 * depth).clip(0, 1)
        snow = np.asarray(self.snow, np.float32)[:, None, None]
        shade = np.asarray(self.shade, np.float32)[:, None, None]
        outline = self.ground_y(xs, level) + 5 * smooth_noise(random, 1, size, 1, 6)[0]
        canvas.fill_below(outline, snow + (shade - snow) * shading)
        object_xs = random_positions(random, SPACING, -MARGIN - 20, SIZE + MARGIN)
        positions = [(float(self.ground_y(x, level)) + random.uniform(8, 40), x) for x in object_xs]
        for y, x in positions:
            canvas.draw_ellipse(x + 14, y + 1, 34, 5, self.shade, 0.7, soft=True)
        for y, x in sorted(positions):
            self._draw_object(canvas, random, x, y)
        return canvas.array.astype(np.uint8)

    def _random_green(self, random: np.random.Generator) -> Colour:
        greens = OOD_GREENS if self.ood else GREENS
        green, grey = greens[random.integers(len(greens))], random.uniform(0, 70)
        green = mix_colours(green, (grey, grey, grey), 0.25)
        return mix_colours(green, (20, 24, 50), 0.45) if self.ood else green

    def _draw_object(self, canvas: Canvas, random: np.random.Generator, x: float, y: float) -> None:
        """Draws a random tree, rock, gate or hut that stands at (x, y)."""
        kind, scale = random.random(), random.uniform(0.8, 1.3)
        if kind < 0.64:
            self._draw_tree(canvas, x, y, 142 * scale, self._random_green(random))
        elif kind < 0.78:
            grey = random.uniform(70, 120) * (0.5 if self.ood else 1)
            self._draw_rock(canvas, x, y, scale, grey)
        elif kind < 0.9:
            suits = OOD_SUITS if self.ood else SUITS
            self._draw_gate(canvas, x, y, scale, suits[random.integers(len(suits))])
        else:
            self._draw_hut(canvas, x, y, 40 * scale)

    def _draw_rock(self, canvas: Canvas, x: float, y: float, scale: float, grey: float) -> None:
        """A rock with a shaded right side and snow on top."""
        half_width, height = 42 * scale, 44 * scale
        left_corner = (x - 0.62 * half_width, y - 0.8 * height)
        right_corner = (x + 0.7 * half_width, y - 0.6 * height)
        top, right_foot = (x, y - height), (x + half_width, y)
        dark = (0.7 * grey, 0.7 * grey, 0.75 * grey + 8)
        canvas.draw_polygon([(x - half_width, y), left_corner, top, right_corner, right_foot], (grey, grey, grey + 8))
        canvas.draw_polygon([top, right_corner, right_foot, (x + 0.2 * half_width, y)], dark)
        snow_edge = (x - 0.1 * half_width, y - 0.72 * height)
        snow = mix_colours(self.snow, self.shade, 0.1)
        canvas.draw_polygon([left_corner, top, right_corner, snow_edge], snow)

    def _draw_gate(self, canvas: Canvas, x: float, y: float, scale: float, cloth: Colour) -> None:
        """Two poles with a striped cloth between them."""
        height, half_width = 74 * scale, 36 * scale
        left, right = x - half_width, x + half_width
        for side in (-1, 1):
            pole_x = x + side * half_width
            canvas.draw_line(pole_x, y, pole_x, y - height, 1.5, (74, 70, 78))
        bottom = y - 0.52 * height
        canvas.draw_polygon([(left, y - height), (right, y - height), (right, bottom), (left, bottom)], cloth)
        stripe_top, stripe_bottom = y - 0.68 * height, y - 0.6 * height
        canvas.draw_polygon(
            [(left, stripe_top), (right, stripe_top), (right, stripe_bottom), (left, stripe_bottom)],
            mix_colours(cloth, (255, 255, 255), 0.7),
        )

    def _draw_hut(self, canvas: Canvas, x: float, y: float, half_width: float) -> None:
        wood = (58, 40, 44) if self.ood else (126, 84, 56)
        height, eaves = 0.9 * half_width, 1.3 * half_width
        left, right, top = x - half_width, x + half_width, y - height
        canvas.draw_polygon([(left, top), (right, top), (right, y), (left, y)], wood)
        canvas.draw_polygon([(left, top), (x, y - 1.75 * height), (right, top)], mix_colours(wood, (0, 0, 0), 0.2))
        for side in (-1, 1):
            roof_snow = mix_colours(self.snow, self.shade, 0.15)
            roof_end = (x + side * eaves, y - 0.82 * height)
            canvas.draw_line(x, y - 1.85 * height, *roof_end, 0.1 * half_width, roof_snow)
            window_x = x + side * 0.5 * half_width
            window_left, window_right = window_x - 0.2 * half_width, window_x + 0.2 * half_width
            window_top, window_bottom = y - 0.72 * height, y - 0.34 * height
            window = [
                (window_left, window_top),
                (window_right, window_top),
                (window_right, window_bottom),
                (window_left, window_bottom),
            ]
            canvas.draw_polygon(window, (255, 216, 130))

    def _draw_tree(self, canvas: Canvas, x: float, y: float, height: float, green: Colour) -> None:
        """A fir: four tiers, lit from the left, with snow on their tips."""
        trunk = [
            (x - 0.035 * height, y - 0.2 * height),
            (x + 0.035 * height, y - 0.2 * height),
            (x + 0.045 * height, y),
            (x - 0.045 * height, y),
        ]
        canvas.draw_polygon(trunk, mix_colours((84, 62, 48), green, 0.3))
        for tier in range(4):
            bottom, half_width = y - (0.12 + 0.2 * tier) * height, (0.33 - 0.065 * tier) * height
            tip = bottom - (0.36 - 0.03 * tier) * height
            left, right, sag = (x - half_width, bottom), (x + half_width, bottom), (x, bottom + 0.045 * height)
            light = mix_colours(green, (255, 255, 255), 0.01 + 0.04 * tier)
            canvas.draw_polygon([left, (x, tip), right, sag], light)
            canvas.draw_polygon([(x, tip), right, sag], mix_colours(light, (8, 12, 30), 0.24))
            snow = [
                (x - 0.36 * half_width, tip + 0.36 * (bottom - tip)),
                (x, tip),
                (x + 0.2 * half_width, tip + 0.2 * (bottom - tip)),
                (x - 0.06 * half_width, tip + 0.3 * (bottom - tip)),
            ]
            canvas.draw_polygon(snow, mix_colours(self.snow, light, 0.2))

    def _draw_track(self, seconds: float) -> None:
        """Draws the segment of the ski tracks at this time on the near layer, which then moves with the camera."""
        if self.is_jump:
            return
        left = self.camera_x(seconds)
        snow = Canvas(self.near, -MARGIN - left, -MARGIN - left * self.tilt)
        previous_x, previous_y, lean, _ = self.skier_pose(seconds - 1.05 / FPS)
        x, y, _, _ = self.skier_pose(seconds)
        half_width = 1.0 + 1.6 * abs(lean)
        for side in (-0.07, 0.07):
            offset = side * self.height
            snow.draw_line(previous_x + offset, previous_y, x + offset, y, half_width, self.shade, 0.55)

    def _draw_skier(self, frame: Canvas, index: int) -> None:
        """Draws a figure from the front: skis along the heading, the body leaning into the turn."""
        x, y, lean, heading = self.skier_pose(index / FPS)
        height = self.height
        ground = float(max(self.start[1], self.end[1])) + 6 if self.is_jump else y
        shadow_opacity = 0.55 if self.is_jump else 0.8
        frame.draw_ellipse(x + 3, ground + 2, 0.42 * height, 0.07 * height, self.shade, shadow_opacity, soft=True)
        if not self.is_jump:
            self._draw_spray(frame, index, x, y, lean)
        sin, cos = math.sin(lean), math.cos(lean)

        def to_frame(side: float, up: float) -> tuple[float, float]:
            """Body coordinates in units of the height, from the feet on -> frame pixels."""
            return x + height * (side * cos + up * sin), y - height * (up * cos - side * sin)

        def draw_limb(thickness: float, colour: Colour, *joints: tuple[float, float]) -> None:
            for first, second in pairwise(joints):
                frame.draw_line(*to_frame(*first), *to_frame(*second), thickness * height, colour)

        ski_x, ski_y = 0.44 * math.sin(heading) * height, 0.2 * math.cos(heading) * height
        ski_colour = mix_colours(self.helmet, (20, 20, 30), 0.55)
        for side in (-0.085, 0.085):
            foot_x, foot_y = to_frame(side, 0.0)
            frame.draw_line(foot_x - ski_x, foot_y - ski_y, foot_x + ski_x, foot_y + ski_y, 0.026 * height, ski_colour)
        tuck = 0.12 if self.is_jump else 0.05 + 0.10 * abs(lean)
        hips, neck = 0.44 - 0.6 * tuck, 0.76 - tuck
        sleeve = mix_colours(self.jacket, (0, 0, 0), 0.15)
        for side in (-1, 1):
            hand, pole = side * (0.30 + 0.1 * self.is_jump), side * (0.42 + 0.06 * self.is_jump)
            draw_limb(0.012, (70, 72, 84), (hand, 0.46), (pole, -0.02 + 0.2 * self.is_jump))
            knee = (0.11 * side, 0.24 - 0.3 * tuck)
            draw_limb(0.052, self.trousers, (0.085 * side, 0.04), knee, (0.06 * side, hips))
            draw_limb(0.055, (44, 46, 58), (0.085 * side, 0.03), (0.085 * side, 0.06))
            draw_limb(0.043, sleeve, (0.1 * side, neck - 0.03), (0.22 * side, 0.56), (hand, 0.47))
        draw_limb(0.092, self.jacket, (-0.02, hips + 0.02), (-0.03, neck - 0.05))
        draw_limb(0.092, self.jacket, (0.02, hips + 0.02), (0.03, neck - 0.05))
        head_x, head_y = to_frame(0.02 * math.sin(heading), neck + 0.13)
        frame.draw_ellipse(head_x, head_y, 0.085 * height, 0.095 * height, self.helmet)
        goggles_x, goggles_y = head_x + 0.035 * math.sin(heading) * height, head_y + 0.02 * height
        half_width = 0.04 * height
        frame.draw_line(
            goggles_x - half_width, goggles_y, goggles_x + half_width, goggles_y, 0.026 * height, (40, 44, 60)
        )

    def _draw_spray(self, frame: Canvas, index: int, x: float, y: float, lean: float) -> None:
        """Draws snow thrown to the outside of the turn: a cloud that shows the phase, and random grains."""
        side = -math.copysign(1, lean)
        strength = min(1.0, abs(lean) / 0.62) * (0.2 + 0.8 * min(1.0, self.pace**0.5))
        white = mix_colours(self.snow, (255, 255, 255), 0.7)
        for step in range(3):
            reach = (0.2 + 0.16 * step) * self.height
            frame.draw_ellipse(
                x + side * reach,
                y - 0.05 * self.height,
                (0.16 + 0.05 * step) * self.height,
                (0.09 + 0.035 * step) * self.height,
                white,
                0.75 * strength,
                soft=True,
            )
        visible_grains = self.grains[index][:, : int(26 * strength)]
        for across, up, size, brightness in visible_grains.T.tolist():
            grain_x = x + side * self.height * (0.22 + 0.26 * abs(across))
            grain_y = y - self.height * (0.01 + 0.13 * abs(up))
            radius = 1 + 0.8 * abs(size)
            opacity = min(1.0, 0.5 + 0.3 * abs(brightness))
            frame.draw_ellipse(grain_x, grain_y, radius, radius, white, opacity)
