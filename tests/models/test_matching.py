import math

import pytest
import torch
from torch import Tensor

from giffy_ray.models import matching
from giffy_ray.models.motion import Motion, insert_half_pixels

SIZE = 96


def make_texture(x: Tensor, y: Tensor) -> Tensor:
    """A smooth texture of three colours at any position, [1, 3, height, width], 0..1."""
    waves = [(0.21, 0.13, 0.3), (0.09, -0.17, 1.1), (0.31, 0.05, 2.0), (-0.06, 0.27, 0.7)]
    colours = [
        sum(torch.sin((a + 0.03 * channel) * x + (b - 0.02 * channel) * y + phase) for a, b, phase in waves)
        for channel in range(3)
    ]
    return 0.5 + torch.stack(colours)[None] / 10


def make_pair(x_shift: float, y_shift: float) -> Tensor:
    """A texture, and the same moved by a shift: [2, 3, SIZE, SIZE]."""
    y, x = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")
    return torch.cat([make_texture(x, y), make_texture(x - x_shift, y - y_shift)])


@pytest.mark.parametrize("shift", [(0.0, 0.0), (3.3, -2.6), (-7.5, 5.25)])
@pytest.mark.parametrize("brightness", [0.0, 0.1])
def test_refine_displacement_finds_a_shift(shift: tuple[float, float], brightness: float):
    images = make_pair(*shift)
    images[1] += brightness
    displacement = matching.refine_displacement(images, torch.zeros(1, 2, SIZE, SIZE))
    errors = (displacement - torch.tensor(shift).view(1, 2, 1, 1)).abs()[..., 24:-24, 24:-24]
    assert errors.median() < 0.05
    assert errors.quantile(0.95) < 0.15


def test_refine_displacement_keeps_its_start_where_nothing_can_be_seen():
    initial = torch.full((1, 2, 32, 32), 1.5)
    displacement = matching.refine_displacement(torch.full((2, 3, 32, 32), 0.4), initial)
    torch.testing.assert_close(displacement, initial)


def test_select_displacement_takes_the_right_candidate_at_each_place():
    """The left half is still and the right half moves."""
    still, moved = make_pair(0, 0), make_pair(6, 0)
    images = torch.cat([still[..., : SIZE // 2], moved[..., SIZE // 2 :]], dim=3)
    candidates = [torch.zeros(1, 2, SIZE, SIZE), torch.tensor([6.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, SIZE, SIZE)]
    displacement, index = matching.select_displacement(images, candidates, [1.0, 1.1])
    assert (index[..., : SIZE // 2 - 12] == 0).all()
    assert (index[..., SIZE // 2 + 12 : -8] == 1).all()
    torch.testing.assert_close(displacement[:, :1], 6.0 * index)


def test_match_error_is_zero_for_the_true_displacement_alone():
    images = make_pair(4, 2)
    true = torch.tensor([4.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, SIZE, SIZE)
    inner = (..., slice(8, -8), slice(8, -8))
    assert matching.match_error(images, true)[inner].max() < 1e-5
    assert matching.match_error(images, torch.zeros_like(true))[inner].min() > 0.005


def test_mean_displacement_of_opposite_flows():
    flows = torch.tensor([-3.0, 1.0, 5.0, -3.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    motion = Motion(flows, torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2))
    assert matching.mean_displacement(motion)[0, :, 0, 0].tolist() == [4.0, -2.0]


def test_resize_displacement_scales_its_vectors():
    field = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 8, 4)
    resized = matching.resize_displacement(field, 16, 12)
    assert resized.shape == (1, 2, 16, 12)
    torch.testing.assert_close(resized, torch.tensor([6.0, 6.0]).view(1, 2, 1, 1).expand_as(resized))


@pytest.mark.parametrize("time", [0.1, 0.5, 0.8])
def test_move_to_time_moves_a_field_with_its_content(time: float):
    """What is at x half-way is at x + (time - 0.5) d at another time."""
    displacement = torch.tensor([10.0, -4.0]).view(1, 2, 1, 1).expand(1, 2, SIZE, SIZE)
    y, x = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")
    moved = matching.move_to_time(x[None, None] + 100 * y, displacement, time)
    expected = (x - 10 * (time - 0.5)) + 100 * (y + 4 * (time - 0.5))
    torch.testing.assert_close(moved[0, 0, 8:-8, 8:-8], expected[8:-8, 8:-8], rtol=0, atol=0.05)


def test_blur_of_a_point_is_a_gaussian():
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 20] = 1
    blurred = matching.blur(point, 2.5)
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert (blurred[0, 0, 20, 23] / blurred[0, 0, 20, 20]).item() == pytest.approx(math.exp(-0.5 * (3 / 2.5) ** 2))
    torch.testing.assert_close(matching.blur(torch.full((1, 2, 9, 9), 0.3), 2.5), torch.full((1, 2, 9, 9), 0.3))


def test_insert_half_pixels_interpolates_a_wave():
    position = torch.arange(64.0)
    image = torch.sin(0.9 * position) + 0.2 * torch.cos(0.5 * position)[:, None]
    finer = torch.arange(127.0) / 2
    expected = torch.sin(0.9 * finer) + 0.2 * torch.cos(0.5 * finer)[:, None]
    inserted = insert_half_pixels(image[None, None])
    torch.testing.assert_close(inserted[0, 0, ::2, ::2], image)
    torch.testing.assert_close(inserted[0, 0, 12:-12, 12:-12], expected[12:-12, 12:-12], atol=0.01, rtol=0)
