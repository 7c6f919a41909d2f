"""The measures behind cuts and duplicates, in closed form. Films are in test_video.py."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest

from giffy_ray.inference.scene_cuts import (
    Thumbnail,
    ThumbnailMaker,
    is_duplicate,
    mark_cuts,
    measure_change,
    measure_distance,
)


@dataclass
class Shown:
    thumbnail: Thumbnail
    time: Fraction


def thumbnail(luma: np.ndarray | float) -> Thumbnail:
    plane = np.broadcast_to(np.asarray(luma, np.float32), (48, 64))
    return Thumbnail(plane, plane)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (48, 64)).astype(np.float32)


def find_cuts(thumbnails: list[Thumbnail], times: list[int] | None = None) -> list[int]:
    shown = [Shown(item, Fraction(time)) for item, time in zip(thumbnails, times or range(99), strict=False)]
    return [number for number, (_, is_cut) in enumerate(mark_cuts(shown)) if is_cut]


def test_thumbnails_are_averages():
    luma = np.kron(np.arange(48 * 64).reshape(48, 64) % 200 + 16, np.ones((8, 8))).astype(np.uint8)
    planes = np.concatenate([luma.ravel(), np.full(luma.size // 2, 128, np.uint8)])
    frame = av.VideoFrame.from_ndarray(planes.reshape(-1, 512), format="yuv420p")
    small = ThumbnailMaker()(frame)
    assert np.abs(small.luma - (luma[::8, ::8].astype(float) - 16) * 255 / 219).max() <= 1.5  # in full range
    assert small.detail.shape == (96 * 3 // 2, 128)
    assert np.abs(small.detail[:96] - luma[::4, ::4]).max() <= 1


def test_change_is_the_root_mean_square():
    assert measure_change(thumbnail(100), thumbnail(103)) == pytest.approx(3)
    spot = np.zeros((48, 64))
    spot[5, 7] = 64
    assert measure_change(thumbnail(0), thumbnail(spot)) == pytest.approx(64 / np.sqrt(48 * 64))


@pytest.mark.parametrize(
    ("change", "last_change", "expected"),
    [(0, 0, True), (0.1, 0, True), (0.2, 0, False), (0.2, 1, True), (1, 3, False), (1, 5, True), (2, 50, False)],
)
def test_duplicates_change_far_less_than_motion(change: float, last_change: float, expected: bool):
    assert is_duplicate(change, last_change) is expected


def test_distance_compensates_motion():
    """Blocks whose shifted place lies within the frame match exactly."""
    picture = noise(1)
    moved = np.roll(picture, (3, 6), axis=(0, 1))
    unmoved = np.abs(picture - moved).mean()
    inside = (48 // 8 - 1) * (64 // 8 - 1) / (48 // 8 * (64 // 8))
    assert measure_distance(thumbnail(picture), thumbnail(moved)) < unmoved * (1 - inside)
    assert measure_distance(thumbnail(picture), thumbnail(np.roll(picture, 24, axis=1))) > 0.6 * unmoved
    assert measure_distance(thumbnail(50), thumbnail(58)) == pytest.approx(8)


def test_cuts_differ_more_than_their_neighbours():
    first, second = thumbnail(noise(1)), thumbnail(noise(2))
    assert find_cuts([first] * 5 + [second] * 5) == [5]
    assert find_cuts([first, second]) == [1]
    assert find_cuts([first] * 3 + [second] + [first] * 3) == []  # a flash
    assert find_cuts([thumbnail(10 * level) for level in range(10)]) == []  # a fade
    assert find_cuts([]) == find_cuts([first]) == []


def test_longer_pairs_may_differ_more():
    """Brightness rises evenly, and frames are missing in the middle."""
    levels, times = [0, 10, 20, 60, 70, 80], [0, 1, 2, 6, 7, 8]
    assert find_cuts([thumbnail(level) for level in levels], times) == []
    assert find_cuts([thumbnail(level) for level in levels]) == [3]
