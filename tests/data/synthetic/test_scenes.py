"""The scenes obey the physics that they claim, and are as hard as they claim."""

from functools import cache

import numpy as np
import pytest

from giffy_ray.data.synthetic import scenes
from giffy_ray.data.synthetic.canvas import (
    DURATION_S,
    GRAVITY,
    MARGIN,
    SPACING,
    put_over,
    shifted_window,
    spread,
    thrown,
)
from giffy_ray.data.synthetic.eruption import Bomb, Eruption
from giffy_ray.data.synthetic.slope import Slope

MOMENTS = np.linspace(0, DURATION_S, 31)


def eruption(seed: int, shifted: bool = False) -> Eruption:
    return Eruption(np.random.default_rng([seed, 0, int(shifted)]), shifted)


@cache
def slope(seed: int, shifted: bool = False) -> Slope:
    """Shared by the tests, which only ask it: its frames are drawn nowhere but in `draw`."""
    return Slope(np.random.default_rng([seed, 1, int(shifted)]), shifted)


def linear_error(clip: np.ndarray) -> float:
    """The report's unit: sqrt of the sum of squared differences over 30 frames of 64x64, over 100."""
    frames = clip[::3].reshape(30, 64, 4, 64, 4, 3).mean(axis=(2, 4))
    weight = np.linspace(0, 1, 30)[:, None, None, None]
    return float(np.sqrt(((frames - (frames[0] + weight * (frames[-1] - frames[0]))) ** 2).sum()) / 100)


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_a_seed_is_a_clip(category: str):
    clip = scenes.draw(category, 5)
    assert clip.shape == (90, 256, 256, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, scenes.draw(category, 5))
    assert not np.array_equal(clip, scenes.draw(category, 6))
    assert not np.array_equal(clip, scenes.draw(category, 5, shifted=True))


def test_an_unknown_category_is_named():
    with pytest.raises(ValueError, match=r"erupting, skiing \(value 'surfing'\)"):
        scenes.draw("surfing", 0)


def test_a_thrown_thing_falls_freely_from_its_first_place_to_its_last():
    start, end = (10.0, 80.0), (70.0, 120.0)
    xs, ys = np.asarray([thrown(start, end, moment) for moment in MOMENTS]).T
    step = DURATION_S / 30
    assert (xs[0], ys[0]) == start
    assert (xs[-1], ys[-1]) == pytest.approx(end)
    assert np.allclose(np.diff(xs), 60 / 30)
    # y0 + v t + g t^2 / 2 with the one v that leads to the end
    speed = (120 - 80) / DURATION_S - GRAVITY * DURATION_S / 2
    assert np.allclose(ys, 80 + speed * MOMENTS + GRAVITY * MOMENTS**2 / 2)
    assert np.allclose(np.diff(ys, 2) / step**2, GRAVITY)


def test_bombs_come_from_the_crater_and_are_in_sight_at_both_ends():
    for seed in range(8):
        scene = eruption(seed)
        for bomb in scene.bombs:
            before = [thrown(bomb.start, bomb.end, -moment) for moment in np.linspace(0, 0.9, 900)]
            assert min(np.hypot(x - scene.x, y - scene.y) for x, y in before) < 1
            for moment, (x, y) in ((0, bomb.start), (DURATION_S, bomb.end)):
                left, top = scene.camera(moment)
                assert 0 < x - left < 256
                assert y - top < 256


def test_a_bomb_is_seen_where_its_path_and_the_camera_say():
    scene = eruption(0, shifted=True)
    scene.puffs, scene.embers = scene.puffs[:0], scene.embers[:, :0]  # nothing bright behind or before it
    scene.sky[:] = 20  # no moon either
    for index in (0, 30, 51, 89):
        scene.bombs = []
        without = scene.frame(index).astype(int)
        scene.bombs = [bomb := Bomb((150.0, 70.0), (70.0, 90.0), 4.0, 1.0)]
        with_bomb = scene.frame(index).astype(int)
        core = np.where(with_bomb[1] > 200, with_bomb[1] - without[1], 0).clip(0)
        rows, columns = np.indices(core.shape)
        seen = (columns * core).sum() / core.sum(), (rows * core).sum() / core.sum()
        (x, y), (left, top) = thrown(bomb.start, bomb.end, index / 30), scene.camera(index / 30)
        assert seen == pytest.approx((x - left, y - top), abs=0.6)


def test_lava_creeps_on_by_its_reach():
    scene = eruption(3)
    tongue = scene.tongues[0]
    _, down, away, start, reach = tongue
    middle = away < 0.4
    for seconds in (0.0, 1.5, DURATION_S):
        scene.mountain[:] = scene.bare
        scene._draw_lava(tongue, seconds)
        hot = scene.mountain[tongue[0]][0] == 255
        assert down[hot & middle].max() == pytest.approx(start + reach * seconds / DURATION_S, abs=1.5)


def test_a_frame_of_an_eruption_does_not_need_those_before():
    scene, other = eruption(4), eruption(4)
    for index in (0, 20, 39):
        scene.frame(index)
    assert np.array_equal(scene.frame(40), other.frame(40))


def test_a_jump_is_a_parabola_and_a_carve_is_less_than_a_turn_and_a_half():
    slopes = [slope(seed) for seed in range(25)]
    jumps = [one for one in slopes if one.jump]
    assert 0 < len(jumps) < 13
    heights = np.asarray([jumps[0].skier(moment)[1] for moment in MOMENTS])
    assert np.allclose(np.diff(heights, 2) / (DURATION_S / 30) ** 2, GRAVITY)
    assert max(one.turns for one in slopes) < 1.5


def test_lean_and_heading_tell_the_phase_of_a_carve():
    one = next(found for found in map(slope, range(25)) if not found.jump and found.turns > 0.8)
    x, _, lean, heading = np.asarray([one.skier(moment) for moment in MOMENTS]).T
    drift = np.linspace(one.start[0], one.end[0], 31)
    assert np.allclose(lean / 0.62, -(x - drift) / one.swing)  # towards the middle of the turn
    sideways = np.gradient(x - drift)
    assert np.corrcoef(sideways, heading)[0, 1] > 0.99


def test_the_camera_pans_less_than_the_spacing_of_what_it_passes():
    random = np.random.default_rng(0)
    assert min(np.diff(spread(random, SPACING, -100, 400)).min() for _ in range(50)) >= SPACING
    for shifted, direction in ((False, 1), (True, -1)):
        pans = np.asarray([slope(seed, shifted).pan for seed in range(25 if not shifted else 6)]) * direction
        assert pans.min() > 0
        assert pans.max() < SPACING
        if not shifted:
            assert pans.min() < 4  # nearly still ones too


def test_shifted_scenes_lie_outside_the_others():
    usual, shifted = ([make(seed, way) for make in (eruption, slope) for seed in range(4)] for way in (False, True))
    assert max(one.pace for one in usual) <= 1 < min(one.pace for one in shifted)
    assert {one.sky_colours for one in usual}.isdisjoint(one.sky_colours for one in shifted)
    light = [np.mean([one.sky.mean() for one in some]) for some in (usual, shifted)]
    assert light[1] < 0.6 * light[0]
    travels = [[one.travel[0] for one in some if isinstance(one, Eruption)] for some in (usual, shifted)]
    assert min(travels[0]) > 0 > max(travels[1])


def test_a_window_moves_by_fractions_of_a_pixel():
    ramp = np.broadcast_to(np.arange(256 + 2 * MARGIN) * 0.5, (3, 256 + 2 * MARGIN, 256 + 2 * MARGIN))
    ramp = (2 * ramp % 200).astype(np.uint8)
    for x in (0.0, 0.25, 7.5, -3.75):
        seen = shifted_window(ramp, x, 0.5)[0, 9, :90].astype(float)
        places = MARGIN + x + np.arange(90)
        whole = (places % 200 < 199) & (places % 200 >= 0)  # not where the ramp falls
        assert np.allclose(seen[whole], (places % 200)[whole], atol=1)
    across = shifted_window(ramp.transpose(0, 2, 1), 0.5, 4.25)[0, :60, 9]
    assert np.allclose(across, (MARGIN + 4.25 + np.arange(60)) % 200, atol=1)


def test_laying_over_blends_by_opacity_and_never_overflows():
    opacity, below, colour = np.meshgrid(np.arange(256), np.arange(0, 256, 5), np.arange(0, 256, 5), indexing="ij")
    opacity, below, colour = (one.reshape(1, 1, -1) for one in (opacity, below, colour))
    over = (colour * opacity // 255).astype(np.uint16)
    frame = np.repeat(below, 3, axis=0).astype(np.uint16)
    put_over(frame, np.concatenate([over, over, over, opacity.astype(np.uint16)]), slice(0, 1))
    exact = below + (colour - below) * opacity / 255
    assert frame.max() <= 255
    assert np.abs(frame[0] - exact[0]).max() < 2.1


@pytest.mark.parametrize(("category", "mean"), [("erupting", 62), ("skiing", 153)])
def test_difficulty_is_spread_like_the_reports(category: str, mean: float):
    """Few seeds, so broad bounds; the figures of a hundred are in the docstring of giffy_ray.data.synthetic.scenes."""
    errors = np.asarray([linear_error(scenes.draw(category, seed)) for seed in range(6)])
    assert 0.5 * mean < errors.mean() < 1.6 * mean
    assert errors.std() > 0.3 * errors.mean()
