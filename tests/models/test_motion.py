"""Checks warping, blending and rendering against plain indexing, closed forms and torch's own resizing."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.models.motion import FrameRenderer, Motion, blend, end_weight, warp

SIZES = [(16, 24), (2, 2), (2, 9), (33, 7), (65, 40)]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_motion(rng: torch.Generator, height: int, width: int, frames: int = 1, flow_px: float = 3.0) -> Motion:
    flows, visibility, residual = torch.randn(frames, 8, height, width, generator=rng).split([4, 1, 3], dim=1)
    return Motion(flow_px * flows, visibility, 0.1 * residual)


def random_images(rng: torch.Generator, height: int, width: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    start, end = torch.rand(2, 1, channels, height, width, generator=rng)
    return start, end


def resize(motion: Motion, height: int, width: int) -> Motion:
    """Resizes motion as torch does, in the pixels of its new size."""
    flows, visibility, residual = (functional.interpolate(field, (height, width), mode="bilinear") for field in motion)
    scale = torch.tensor([width / motion.flows.shape[3], height / motion.flows.shape[2]] * 2)
    return Motion(flows * scale.view(1, 4, 1, 1), visibility, residual)


def shift(image: Tensor, dx: int, dy: int) -> Tensor:
    """Samples each pixel dx to its right and dy below, with repeated edges."""
    height, width = image.shape[2:]
    y, x = np.clip(np.arange(height) + dy, 0, height - 1), np.clip(np.arange(width) + dx, 0, width - 1)
    return image[:, :, y][:, :, :, x]


# --- warp


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_warp_by_whole_pixels_copies_them_and_repeats_the_edge(rng: torch.Generator, mode: str):
    picture = torch.rand(2, 3, 8, 10, generator=rng)
    flow = torch.zeros(2, 2, 8, 10)
    flow[:, 0], flow[:, 1] = 2, -1  # samples two pixels to the right and one above
    torch.testing.assert_close(warp(picture, flow, mode), shift(picture, 2, -1), atol=1e-5, rtol=0)


def test_warp_by_fractions_of_pixels_is_bilinear(rng: torch.Generator):
    picture = torch.rand(1, 1, 6, 6, generator=rng)
    flow = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(1, 2, 6, 6)
    expected = (
        0.75 * 0.25 * picture[..., :-1, :-1]
        + 0.25 * 0.25 * picture[..., :-1, 1:]
        + 0.75 * 0.75 * picture[..., 1:, :-1]
        + 0.25 * 0.75 * picture[..., 1:, 1:]
    )
    torch.testing.assert_close(warp(picture, flow)[..., :-1, :-1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [0.25, 0.5, 0.9])
def test_bicubic_warp_is_the_kernel_of_keys(rng: torch.Generator, offset: float):
    """Keys 1981, with a = -0.75 as in torch and OpenCV."""
    picture, a = torch.rand(1, 1, 4, 12, generator=rng), -0.75
    flow = torch.tensor([offset, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 12)
    distances = torch.tensor([1 + offset, offset, 1 - offset, 2 - offset])
    near = (a + 2) * distances**3 - (a + 3) * distances**2 + 1
    far = a * distances**3 - 5 * a * distances**2 + 8 * a * distances - 4 * a
    weights = torch.where(distances <= 1, near, far)
    expected = sum(weight * shift(picture, dx, 0) for weight, dx in zip(weights, (-1, 0, 1, 2), strict=True))
    torch.testing.assert_close(
        warp(picture, flow, "bicubic")[..., 1:-2],
        expected[..., 1:-2],
        atol=1e-5,
        rtol=0,  # type: ignore[index]
    )


@pytest.mark.parametrize("invalid", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_non_finite_flow_gives_nan_at_its_pixel_only(rng: torch.Generator, mode: str, invalid: float):
    """On a CPU, grid_sample's own gradient crashes at NaN."""
    picture = torch.rand(2, 3, 8, 10, generator=rng).requires_grad_()
    flow = torch.rand(2, 2, 8, 10, generator=rng)
    expected = warp(picture, flow, mode)
    flow[1, 0, 4, 5] = invalid
    generated = warp(picture, flow.requires_grad_(), mode)
    generated.sum().backward()
    assert generated[1, :, 4, 5].isnan().all()
    assert generated.isnan().sum() == 3
    assert torch.equal(generated.nan_to_num(), torch.where(generated.isnan(), 0, expected))


# --- blend


@pytest.mark.parametrize("visibility", [-1e9, -100.0, -3.0, 0.0, 3.0, 100.0, 1e9, math.inf, -math.inf])
def test_weight_of_the_end_is_exactly_0_and_1_at_the_ends(visibility: float):
    field = torch.full((2, 1, 3, 3), visibility)
    assert (end_weight(torch.tensor(0.0), field) == 0).all()
    assert (end_weight(torch.tensor(1.0), field) == 1).all()
    assert ((end_weight(torch.tensor(0.5), field) > 0) & (end_weight(torch.tensor(0.5), field) < 1)).all()


def test_weight_of_the_end_is_a_sigmoid(rng: torch.Generator):
    visibility = 6 * torch.randn(2, 1, 8, 8, generator=rng)
    time = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    expected = torch.sigmoid(torch.logit(time) + visibility.clamp(-8, 8))  # its bounds keep the odds finite
    torch.testing.assert_close(end_weight(time, visibility), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(end_weight(time, torch.zeros(2, 1, 8, 8)), time.expand(2, 1, 8, 8))


def test_blend_without_motion_matches_its_formula(rng: torch.Generator):
    start, end, residual = torch.rand(3, 2, 3, 8, 8, generator=rng)
    visibility = torch.randn(2, 1, 8, 8, generator=rng)
    time = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    generated = blend(start, end, time, Motion(torch.zeros(2, 4, 8, 8), visibility, residual))
    weight = torch.sigmoid(torch.logit(time) + visibility)
    expected = (1 - weight) * start + weight * end + 4 * time * (1 - time) * residual
    torch.testing.assert_close(generated, expected, atol=1e-5, rtol=1e-5)


def test_blend_of_translations_by_whole_pixels_matches_indexing(rng: torch.Generator):
    """Flows are for the whole way: at 1/4 of it, the start is displaced by 1/4, and the end by 3/4."""
    start, end, residual = torch.rand(3, 2, 3, 20, 30, generator=rng)
    visibility = torch.randn(2, 1, 20, 30, generator=rng)
    flows = torch.tensor([8.0, -4.0, -12.0, 4.0]).view(1, 4, 1, 1).expand(2, 4, 20, 30)
    time = torch.tensor(0.25).expand(2, 1, 1, 1)
    generated = blend(start, end, time, Motion(flows, visibility, residual))
    weight = torch.sigmoid(torch.logit(time) + visibility)
    expected = (1 - weight) * shift(start, 2, -1) + weight * shift(end, -9, 3) + 0.75 * residual
    torch.testing.assert_close(generated, expected, atol=2e-5, rtol=0)


def test_right_motion_gives_the_true_frame(rng: torch.Generator):
    """The end is the start, moved 12 pixels to the right and 4 up; half-way it is at 6 and 2."""
    scene = torch.rand(1, 3, 60, 80, generator=rng)
    start, middle, end = (scene[:, :, 20 + dy : 40 + dy, 20 - dx : 50 - dx] for dx, dy in ((0, 0), (6, 2), (12, 4)))
    flows = torch.tensor([-12.0, 4.0, 12.0, -4.0]).view(1, 4, 1, 1).expand(1, 4, 20, 30)
    zeros = torch.zeros(1, 1, 20, 30)
    generated = blend(start, end, torch.full((1, 1, 1, 1), 0.5), Motion(flows, zeros, zeros.expand(1, 3, -1, -1)))
    inner = (..., slice(2, -2), slice(6, -6))  # both pictures show it
    torch.testing.assert_close(generated[inner], middle[inner], atol=2e-5, rtol=0)


@pytest.mark.parametrize("time", [0.0, 1.0])
def test_end_frames_are_exact_for_any_motion(rng: torch.Generator, time: float):
    start, end = random_images(rng, 16, 24)
    motion = random_motion(rng, 16, 24, flow_px=50)
    expected = (start, end)[int(time)]
    torch.testing.assert_close(blend(start, end, torch.full((1, 1, 1, 1), time), motion), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(FrameRenderer(start, end).render(motion, time), expected, atol=1e-5, rtol=0)


# --- rendering


@pytest.mark.parametrize("time", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("size", SIZES)
def test_renderer_is_blend_at_equal_size(rng: torch.Generator, size: tuple[int, int], time: float):
    start, end = random_images(rng, *size)
    motion = random_motion(rng, *size)
    expected = blend(start, end, torch.full((1, 1, 1, 1), time), motion)
    torch.testing.assert_close(FrameRenderer(start, end).render(motion, time), expected, atol=1e-5, rtol=0)


def test_renderer_adds_the_residual_to_colour_and_not_to_alpha(rng: torch.Generator):
    start, end = random_images(rng, 16, 24, channels=4)
    motion = random_motion(rng, 16, 24)
    four = motion._replace(residual=functional.pad(motion.residual, (0, 0, 0, 0, 0, 1)))  # 0 for alpha
    expected = blend(start, end, torch.full((1, 1, 1, 1), 0.3), four)
    torch.testing.assert_close(FrameRenderer(start, end).render(motion, 0.3), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(130, 20), (65, 33), (2, 2)])
def test_strips_of_any_height_give_the_same_frame(rng: torch.Generator, size: tuple[int, int], channels: int):
    start, end = random_images(rng, *size, channels)
    motion = random_motion(rng, 24, 16, flow_px=9)
    whole = FrameRenderer(start, end, strip_rows=10_000).render(motion, 0.4)
    for strip_rows in (1, 7, 64, size[0], size[0] + 1):
        torch.testing.assert_close(FrameRenderer(start, end, strip_rows).render(motion, 0.4), whole, atol=0, rtol=0)


def test_frame_does_not_depend_on_the_number_of_threads(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    start, end = random_images(rng, 70, 30)
    motion = random_motion(rng, 16, 16, flow_px=9)
    frames = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        frames.append(FrameRenderer(start, end, strip_rows=8).render(motion, 0.4))
    for frame in frames[1:]:
        torch.testing.assert_close(frame, frames[0], atol=0, rtol=0)


@pytest.mark.parametrize("motion_size", [(8, 8), (8, 16), (40, 8), (16, 24), (64, 104), (1, 1)])
@pytest.mark.parametrize("size", [(33, 50), (2, 2), (65, 17)])
def test_motion_is_resized_as_torch_does(rng: torch.Generator, size: tuple[int, int], motion_size: tuple[int, int]):
    start, end = random_images(rng, *size)
    motion = random_motion(rng, *motion_size, flow_px=1.5)
    expected = blend(start, end, torch.full((1, 1, 1, 1), 0.3), resize(motion, *size))
    generated = FrameRenderer(start, end, strip_rows=7).render(motion, 0.3)
    torch.testing.assert_close(generated, expected, atol=1e-4, rtol=0)


def test_motion_means_the_same_fraction_of_the_picture_at_every_size(rng: torch.Generator):
    """A flow of 1/4 of the width, estimated on 16x8, moves a picture of 80x40 by 10 pixels half-way."""
    start, end = random_images(rng, 40, 80)
    flows = torch.tensor([4.0, 2.0, 0.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 8, 16)
    motion = Motion(flows, torch.zeros(1, 1, 8, 16), torch.zeros(1, 3, 8, 16))
    generated = FrameRenderer(start, end).render(motion, 0.5)
    torch.testing.assert_close(generated, 0.5 * shift(start, 10, 5) + 0.5 * end, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("field", "invalid"),
    [
        ("flows", math.nan),
        ("flows", math.inf),
        ("visibility", math.nan),
        ("residual", math.nan),
        ("residual", math.inf),
    ],
)
def test_non_finite_motion_shows_as_non_finite_pixels_there_only(rng: torch.Generator, field: str, invalid: float):
    """So that the caller can tell: a NaN that became a colour would be a wrong frame without an error."""
    start, end = random_images(rng, 16, 24)
    motion = random_motion(rng, 16, 24)
    expected = FrameRenderer(start, end).render(motion, 0.5)
    getattr(motion, field)[0, 0, 5, 9] = invalid
    generated = FrameRenderer(start, end).render(motion, 0.5)
    assert not generated[0, 0, 5, 9].isfinite()
    damaged = torch.zeros_like(generated, dtype=torch.bool)
    damaged[0, :, 4:7, 8:11] = True  # resizing spreads it to neighbours at most
    torch.testing.assert_close(generated[~damaged], expected[~damaged], atol=0, rtol=0)


def test_rendering_changes_neither_images_nor_motion(rng: torch.Generator):
    start, end = random_images(rng, 20, 30)
    motion = random_motion(rng, 8, 8)
    inputs = [start, end, *motion]
    copies = [tensor.clone() for tensor in inputs]
    FrameRenderer(start, end, strip_rows=3).render(motion, 0.5)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


def test_rendering_records_no_gradient(rng: torch.Generator):
    start, end = random_images(rng, 8, 8)
    motion = random_motion(rng, 8, 8)
    assert not FrameRenderer(start.requires_grad_(), end).render(motion, 0.5).requires_grad
