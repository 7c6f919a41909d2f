"""Methods without parameters, against closed forms and a plain loop; the ends of every one."""

import numpy as np
import pytest
import torch

from giffy_ray.config import ConfigError
from giffy_ray.models import baselines
from giffy_ray.models.baselines import BASELINES, hold, linear, linear_as_coded, minterpolate_blend, minterpolate_mci


def images(seed: int, batch: int = 2, height: int = 24, width: int = 18) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (batch, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("frames", [2, 3, 7])
def test_shape_and_ends(name: str, frames: int):
    start, end = images(0), images(1)
    made = BASELINES[name](start, end, frames)
    assert made.shape == (2, frames, 24, 18, 3) and made.dtype == torch.uint8
    assert torch.equal(made[:, 0], start)
    assert torch.equal(made[:, -1], end) == (name != "linear_as_coded")


@pytest.mark.parametrize("name", BASELINES)
def test_one_frame_is_refused(name: str):
    with pytest.raises(ValueError, match=r"frames: at least 2.*value 1"):
        BASELINES[name](images(0), images(1), 1)


def test_linear_as_coded_is_the_authors_formula():
    start, end = images(0), images(1)
    made = linear_as_coded(start, end, 30)
    # first + i/30 * (last - first), rounded down: floor division of whole numbers in Python.
    for index in (1, 10, 29):
        for place in ((0, 0, 0, 0), (1, 23, 17, 2), (0, 5, 7, 1)):
            first, last = int(start[place]), int(end[place])
            assert int(made[:, index][place]) == first + (index * (last - first)) // 30
    black, white = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    assert linear_as_coded(black, white, 30)[0, -1, 0, 0].tolist() == [246] * 3  # 255 * 29/30 = 246.5
    assert linear(black, white, 30)[0, 10, 0, 0].tolist() == [88] * 3  # 255 * 10/29 = 87.9


@pytest.mark.parametrize(("frames", "of_start"), [(30, 15), (5, 3), (2, 1)])
def test_hold_shows_the_nearer_image(frames: int, of_start: int):
    start, end = images(0), images(1)
    made = hold(start, end, frames)
    nearer = [start if index <= (frames - 1 - index) else end for index in range(frames)]
    assert sum(image is start for image in nearer) == of_start
    assert torch.equal(made, torch.stack(nearer, dim=1))


def test_blend_is_linear_but_for_rounding():
    start, end = images(0), images(1)
    assert (minterpolate_blend(start, end, 9).int() - linear(start, end, 9).int()).abs().max() <= 1


@pytest.mark.parametrize(("dx", "dy"), [(8, 0), (-6, 0), (12, 4)])
def test_mci_follows_a_pan(dx: int, dy: int):
    """Of a picture that moves by whole pixels: less than half of linear's squared error."""
    real = pan(dx, dy)
    made = minterpolate_mci(real[:, 0], real[:, -1], 3)
    faded = linear(real[:, 0], real[:, -1], 3)
    errors = [float((clip[:, 1].double() - real[:, 1].double()).square().mean()) for clip in (made, faded)]
    assert errors[0] < 0.5 * errors[1]


def pan(dx: int, dy: int) -> torch.Tensor:
    """Three frames, uint8 [1, 3, 64, 64, 3]: a window that moves by (dx, dy) over a smooth picture, in two steps."""
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255
    picture = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")[0].permute(1, 2, 0)
    windows = [(16 + step * dy // 2, 16 + step * dx // 2) for step in range(3)]
    return torch.stack([picture[y : y + 64, x : x + 64] for y, x in windows]).round().to(torch.uint8)[None]


@pytest.mark.parametrize("name", ["minterpolate_mci", "minterpolate_blend"])
def test_ffmpeg_leaves_colours_and_edges_alone(name: str):
    """A still picture of pure colours, of a size that blocks of 8 do not fill: every frame is the picture."""
    still = images(3, height=21, width=35)
    still[..., 0], still[:, :10, :, 1:] = 255, 0
    made = BASELINES[name](still, still, 5)
    assert torch.equal(made, still[:, None].expand(-1, 5, -1, -1, -1))


def test_mci_of_images_smaller_than_two_blocks():
    with pytest.raises(ConfigError, match=r"minterpolate_mci: images of at least 16x16.*value 24x15"):
        minterpolate_mci(images(0, width=15), images(1, width=15), 3)


def test_an_ffmpeg_without_the_filter(monkeypatch: pytest.MonkeyPatch):
    import av.filter

    monkeypatch.setattr(av.filter, "filters_available", {"scale"})
    for method in (minterpolate_mci, minterpolate_blend):
        with pytest.raises(ConfigError, match="minterpolate: the FFmpeg that PyAV was built with has no such filter"):
            method(images(0), images(1), 3)


def test_names():
    assert list(BASELINES) == ["linear", "linear_as_coded", "hold", "minterpolate_mci", "minterpolate_blend"]
    assert all(getattr(baselines, name) is method for name, method in BASELINES.items())
