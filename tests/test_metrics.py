"""Closed forms; the two L2 values are those of the report's unit, worked out by hand from its definition."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from giffy_ray.metrics import l2_report, psnr, ssim
from giffy_ray.shapes import to_floats, to_pixels

SHAPE = (2, 30, 64, 64, 3)


def clips(value: int) -> torch.Tensor:
    return torch.full(SHAPE, value, dtype=torch.uint8)


def test_l2_of_black_against_white():
    # sqrt(30*64*64*3 * 255^2) / 100
    assert l2_report(clips(0), clips(255)).tolist() == pytest.approx([1548.2511] * 2, abs=1e-4)


def test_l2_of_a_difference_of_one_everywhere():
    assert l2_report(clips(7), clips(8)).tolist() == pytest.approx([math.sqrt(368640) / 100] * 2)


def test_l2_does_not_wrap_around():
    assert torch.equal(l2_report(clips(0), clips(255)), l2_report(clips(255), clips(0)))


def test_psnr_closed_form_and_only_between():
    made = clips(100)
    made[:, 0], made[:, -1] = 0, 255  # the given frames must not count
    assert psnr(made, clips(110)).tolist() == pytest.approx([20 * math.log10(25.5)] * 2)
    assert psnr(clips(3), clips(3)).tolist() == [math.inf] * 2


def test_ssim_of_equal_clips_is_one_and_of_constants_the_closed_form():
    assert ssim(clips(9), clips(9)).tolist() == pytest.approx([1.0] * 2, abs=1e-5)  # float32
    # Without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 100 / 255, 150 / 255, 0.01**2
    assert ssim(clips(100), clips(150)).tolist() == pytest.approx(
        [(2 * a * b + c1) / (a * a + b * b + c1)] * 2, abs=3e-4
    )


def test_ssim_against_a_plain_implementation():
    random = np.random.default_rng(0)
    made, real = (torch.from_numpy(random.integers(0, 256, (1, 3, 32, 32, 3), dtype=np.uint8)) for _ in "ab")
    assert ssim(made, real).tolist() == pytest.approx([_plain_ssim(made[0, 1].numpy(), real[0, 1].numpy())], abs=1e-4)


def _plain_ssim(made: np.ndarray, real: np.ndarray) -> float:
    """Wang et al. 2004 on one uint8 [height, width, 3] frame: 11x11 Gaussian window, sigma 1.5, reflected edges."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    a, b = made / 255.0, real / 255.0
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    each = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(each.mean())


def test_pixels_and_floats_are_inverse():
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 1, 16, 16, 3)
    floats = to_floats(every)
    assert floats.shape == (1, 3, 1, 16, 16)
    assert (float(floats.min()), float(floats.max())) == (0.0, 1.0)
    assert torch.equal(to_pixels(floats), every)
    assert to_pixels(torch.tensor([[[[-1.0]], [[0.5]], [[2.0]]]])).flatten().tolist() == [0, 128, 255]
