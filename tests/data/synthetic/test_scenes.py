"""The scenes follow their stated physics and have the stated difficulty."""

from functools import cache

import numpy as np
import pytest

from giffy_ray.data.synthetic import scenes
from giffy_ray.data.synthetic.canvas import (
    DURATION_S,
    GRAVITY,
    MARGIN,
    SPACING,
    ballistic_position,
    composite_over,
    random_positions,
    view_layer,
)
from giffy_ray.data.synthetic.eruption import Bomb, Eruption
from giffy_ray.data.synthetic.slope import Slope

TIMES_S = np.linspace(0, DURATION_S, 31)


def make_eruption(seed: int, ood: bool = False) -> Eruption:
    return Eruption(np.random.default_rng([seed, 0, int(ood)]), ood)


@cache
def make_slope(seed: int, ood: bool = False) -> Slope:
    """Cached: the tests only read it, and draw frames only through `draw_clip`."""
    return Slope(np.random.default_rng([seed, 1, int(ood)]), ood)


def linear_error(clip: np.ndarray) -> float:
    """Error of linear interpolation in the paper's unit: sqrt of the summed squared error of 30 64x64 frames, / 100."""
    frames = clip[::3].reshape(30, 64, 4, 64, 4, 3).mean(axis=(2, 4))
    weight = np.linspace(0, 1, 30)[:, None, None, None]
    return float(np.sqrt(((frames - (frames[0] + weight * (frames[-1] - frames[0]))) ** 2).sum()) / 100)


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_seed_determines_clip(category: str):
    clip = scenes.draw_clip(category, 5)
    assert clip.shape == (90, 256, 256, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, scenes.draw_clip(category, 5))
    assert not np.array_equal(clip, scenes.draw_clip(category, 6))
    assert not np.array_equal(clip, scenes.draw_clip(category, 5, ood=True))


def test_unknown_category_raises():
    with pytest.raises(ValueError, match=r"erupting, skiing \(value 'surfing'\)"):
        scenes.draw_clip("surfing", 0)


def test_ballistic_position_falls_freely_from_start_to_end():
    start, end = (10.0, 80.0), (70.0, 120.0)
    xs, ys = np.asarray([ballistic_position(start, end, time_s) for time_s in TIMES_S]).T
    step_s = DURATION_S / 30
    assert (xs[0], ys[0]) == start
    assert (xs[-1], ys[-1]) == pytest.approx(end)
    assert np.allclose(np.diff(xs), 60 / 30)
    # y0 + v t + g t^2 / 2 with the initial speed v that leads to the end
    speed = (120 - 80) / DURATION_S - GRAVITY * DURATION_S / 2
    assert np.allclose(ys, 80 + speed * TIMES_S + GRAVITY * TIMES_S**2 / 2)
    assert np.allclose(np.diff(ys, 2) / step_s**2, GRAVITY)


def test_bombs_leave_crater_and_are_visible_at_start_and_end():
    for seed in range(8):
        scene = make_eruption(seed)
        for bomb in scene.bombs:
            before = [ballistic_position(bomb.start, bomb.end, -time_s) for time_s in np.linspace(0, 0.9, 900)]
            assert min(np.hypot(x - scene.x, y - scene.y) for x, y in before) < 1
            for time_s, (x, y) in ((0, bomb.start), (DURATION_S, bomb.end)):
                left, top = scene.camera_position(time_s)
                assert 0 < x - left < 256
                assert y - top < 256


def test_bomb_is_drawn_at_its_position_relative_to_camera():
    scene = make_eruption(0, ood=True)
    scene.puffs, scene.embers = scene.puffs[:0], scene.embers[:, :0]  # nothing bright behind or in front of the bomb
    scene.sky[:] = 20  # no moon either
    for index in (0, 30, 51, 89):
        scene.bombs = []
        without_bomb = scene.draw_frame(index).astype(int)
        bomb = Bomb((150.0, 70.0), (70.0, 90.0), 4.0, 1.0)
        scene.bombs = [bomb]
        with_bomb = scene.draw_frame(index).astype(int)
        core = np.where(with_bomb[1] > 200, with_bomb[1] - without_bomb[1], 0).clip(0)
        rows, columns = np.indices(core.shape)
        centroid = (columns * core).sum() / core.sum(), (rows * core).sum() / core.sum()
        x, y = ballistic_position(bomb.start, bomb.end, index / 30)
        left, top = scene.camera_position(index / 30)
        assert centroid == pytest.approx((x - left, y - top), abs=0.6)


def test_lava_front_advances_linearly_by_its_reach():
    scene = make_eruption(3)
    tongue = scene.tongues[0]
    is_middle = tongue.offset < 0.4
    for seconds in (0.0, 1.5, DURATION_S):
        scene.mountain[:] = scene.bare_mountain
        scene._draw_lava(tongue, seconds)
        is_hot = scene.mountain[tongue.box][0] == 255
        front = tongue.start + tongue.reach * seconds / DURATION_S
        assert tongue.depth[is_hot & is_middle].max() == pytest.approx(front, abs=1.5)


def test_eruption_frame_does_not_depend_on_earlier_frames():
    scene, fresh_scene = make_eruption(4), make_eruption(4)
    for index in (0, 20, 39):
        scene.draw_frame(index)
    assert np.array_equal(scene.draw_frame(40), fresh_scene.draw_frame(40))


def test_jumps_are_parabolas_and_carves_stay_below_one_and_a_half_turns():
    slopes = [make_slope(seed) for seed in range(25)]
    jumps = [slope for slope in slopes if slope.is_jump]
    assert 0 < len(jumps) < 13
    heights = np.asarray([jumps[0].skier_pose(time_s)[1] for time_s in TIMES_S])
    assert np.allclose(np.diff(heights, 2) / (DURATION_S / 30) ** 2, GRAVITY)
    assert max(slope.turns for slope in slopes) < 1.5


def test_lean_and_heading_show_phase_of_carve():
    slope = next(slope for slope in map(make_slope, range(25)) if not slope.is_jump and slope.turns > 0.8)
    x, _, lean, heading = np.asarray([slope.skier_pose(time_s) for time_s in TIMES_S]).T
    drift = np.linspace(slope.start[0], slope.end[0], 31)
    assert np.allclose(lean / 0.62, -(x - drift) / slope.swing)  # towards the middle of the turn
    sideways = np.gradient(x - drift)
    assert np.corrcoef(sideways, heading)[0, 1] > 0.99


def test_camera_pans_less_than_object_spacing():
    random = np.random.default_rng(0)
    assert min(np.diff(random_positions(random, SPACING, -100, 400)).min() for _ in range(50)) >= SPACING
    for ood, direction in ((False, 1), (True, -1)):
        pans = np.asarray([make_slope(seed, ood).pan for seed in range(6 if ood else 25)]) * direction
        assert pans.min() > 0
        assert pans.max() < SPACING
        if not ood:
            assert pans.min() < 4  # nearly still scenes too


def test_ood_scenes_lie_outside_the_training_range():
    in_distribution, ood = (
        [make(seed, is_ood) for make in (make_eruption, make_slope) for seed in range(4)] for is_ood in (False, True)
    )
    assert max(scene.pace for scene in in_distribution) <= 1 < min(scene.pace for scene in ood)
    assert {scene.sky_colours for scene in in_distribution}.isdisjoint(scene.sky_colours for scene in ood)
    brightness = [np.mean([scene.sky.mean() for scene in group]) for group in (in_distribution, ood)]
    assert brightness[1] < 0.6 * brightness[0]
    travels = [[scene.travel[0] for scene in group if isinstance(scene, Eruption)] for group in (in_distribution, ood)]
    assert min(travels[0]) > 0 > max(travels[1])


def test_view_layer_moves_by_fractions_of_a_pixel():
    ramp = np.broadcast_to(np.arange(256 + 2 * MARGIN) * 0.5, (3, 256 + 2 * MARGIN, 256 + 2 * MARGIN))
    ramp = (2 * ramp % 200).astype(np.uint8)
    for x in (0.0, 0.25, 7.5, -3.75):
        row = view_layer(ramp, x, 0.5)[0, 9, :90].astype(float)
        positions = MARGIN + x + np.arange(90)
        is_rising = (positions % 200 < 199) & (positions % 200 >= 0)  # not where the ramp wraps around
        assert np.allclose(row[is_rising], (positions % 200)[is_rising], atol=1)
    column = view_layer(ramp.transpose(0, 2, 1), 0.5, 4.25)[0, :60, 9]
    assert np.allclose(column, (MARGIN + 4.25 + np.arange(60)) % 200, atol=1)


def test_composite_over_blends_by_opacity_without_overflow():
    grids = np.meshgrid(np.arange(256), np.arange(0, 256, 5), np.arange(0, 256, 5), indexing="ij")
    opacity, below, colour = (grid.reshape(1, 1, -1) for grid in grids)
    premultiplied = (colour * opacity // 255).astype(np.uint16)
    frame = np.repeat(below, 3, axis=0).astype(np.uint16)
    top = np.concatenate([premultiplied, premultiplied, premultiplied, opacity.astype(np.uint16)])
    composite_over(frame, top, slice(0, 1))
    exact = below + (colour - below) * opacity / 255
    assert frame.max() <= 255
    assert np.abs(frame[0] - exact[0]).max() < 2.1


@pytest.mark.parametrize(("category", "mean"), [("erupting", 62), ("skiing", 153)])
def test_difficulty_is_distributed_like_the_papers(category: str, mean: float):
    """Few seeds, so the bounds are wide. The docstring of giffy_ray.data.synthetic.scenes has figures for a hundred."""
    errors = np.asarray([linear_error(scenes.draw_clip(category, seed)) for seed in range(6)])
    assert 0.5 * mean < errors.mean() < 1.6 * mean
    assert errors.std() > 0.3 * errors.mean()
