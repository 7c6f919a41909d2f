"""Checks the baselines against closed forms and plain loops, and the ends of their clips."""

import numpy as np
import pytest
import torch

from giffy_ray.config import ConfigError
from giffy_ray.models import baselines
from giffy_ray.models.baselines import BASELINES, hold, linear, linear_as_coded, minterpolate_blend, minterpolate_mci


def random_images(seed: int, batch: int = 2, height: int = 24, width: int = 18) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("frames", [2, 3, 7])
def test_clips_have_the_right_shape_and_ends(name: str, frames: int):
    start, end = random_images(0), random_images(1)
    generated = BASELINES[name](start, end, frames)
    assert generated.shape == (2, frames, 24, 18, 3) and generated.dtype == torch.uint8
    assert torch.equal(generated[:, 0], start)
    assert torch.equal(generated[:, -1], end) == (name != "linear_as_coded")


@pytest.mark.parametrize("name", BASELINES)
def test_single_frame_is_rejected(name: str):
    with pytest.raises(ValueError, match=r"frames: needs at least 2.*value 1"):
        BASELINES[name](random_images(0), random_images(1), 1)


def test_linear_as_coded_matches_the_authors_formula():
    start, end = random_images(0), random_images(1)
    generated = linear_as_coded(start, end, 30)
    # first + i/30 * (last - first), rounded down by Python's integer division.
    for index in (1, 10, 29):
        for position in ((0, 0, 0, 0), (1, 23, 17, 2), (0, 5, 7, 1)):
            first, last = int(start[position]), int(end[position])
            assert int(generated[:, index][position]) == first + (index * (last - first)) // 30
    black, white = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    assert linear_as_coded(black, white, 30)[0, -1, 0, 0].tolist() == [246] * 3  # 255 * 29/30 = 246.5
    assert linear(black, white, 30)[0, 10, 0, 0].tolist() == [88] * 3  # 255 * 10/29 = 87.9


@pytest.mark.parametrize(("frames", "start_count"), [(30, 15), (5, 3), (2, 1)])
def test_hold_shows_the_closer_image(frames: int, start_count: int):
    start, end = random_images(0), random_images(1)
    generated = hold(start, end, frames)
    closer = [start if index <= (frames - 1 - index) else end for index in range(frames)]
    assert sum(image is start for image in closer) == start_count
    assert torch.equal(generated, torch.stack(closer, dim=1))


def test_minterpolate_blend_matches_linear_up_to_rounding():
    start, end = random_images(0), random_images(1)
    assert (minterpolate_blend(start, end, 9).int() - linear(start, end, 9).int()).abs().max() <= 1


@pytest.mark.parametrize(("dx", "dy"), [(8, 0), (-6, 0), (12, 4)])
def test_minterpolate_mci_follows_a_pan(dx: int, dy: int):
    """For a pan by whole pixels, it has less than half of linear's squared error."""
    target = pan_clip(dx, dy)
    generated = minterpolate_mci(target[:, 0], target[:, -1], 3)
    interpolated = linear(target[:, 0], target[:, -1], 3)
    errors = [
        float((clip[:, 1].double() - target[:, 1].double()).square().mean()) for clip in (generated, interpolated)
    ]
    assert errors[0] < 0.5 * errors[1]


def pan_clip(dx: int, dy: int) -> torch.Tensor:
    """Moves a window by (dx, dy) over a smooth picture in two steps; three frames, uint8 [1, 3, 64, 64, 3]."""
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255
    picture = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")[0].permute(1, 2, 0)
    windows = [(16 + step * dy // 2, 16 + step * dx // 2) for step in range(3)]
    return torch.stack([picture[y : y + 64, x : x + 64] for y, x in windows]).round().to(torch.uint8)[None]


@pytest.mark.parametrize("name", ["minterpolate_mci", "minterpolate_blend"])
def test_minterpolate_preserves_colours_and_edges(name: str):
    """Every frame equals a still picture of pure colours whose size is no multiple of the block size."""
    still = random_images(3, height=21, width=35)
    still[..., 0], still[:, :10, :, 1:] = 255, 0
    generated = BASELINES[name](still, still, 5)
    assert torch.equal(generated, still[:, None].expand(-1, 5, -1, -1, -1))


def test_minterpolate_mci_rejects_images_smaller_than_two_blocks():
    with pytest.raises(ConfigError, match=r"minterpolate_mci: needs images of at least 16x16.*value 24x15"):
        minterpolate_mci(random_images(0, width=15), random_images(1, width=15), 3)


def test_missing_ffmpeg_filter_is_reported(monkeypatch: pytest.MonkeyPatch):
    import av.filter

    monkeypatch.setattr(av.filter, "filters_available", {"scale"})
    for method in (minterpolate_mci, minterpolate_blend):
        with pytest.raises(ConfigError, match="minterpolate: the FFmpeg of this PyAV lacks the filter"):
            method(random_images(0), random_images(1), 3)


def test_baselines_are_registered_by_function_name():
    assert list(BASELINES) == ["linear", "linear_as_coded", "hold", "minterpolate_mci", "minterpolate_blend"]
    assert all(getattr(baselines, name) is method for name, method in BASELINES.items())
