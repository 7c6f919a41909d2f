"""Checks metrics against closed forms, plain loops, scipy, and l2 values computed by hand as the paper defines them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import correlate1d

from giffy_ray.core.tensor_types import to_floats, to_pixels
from giffy_ray.evaluation.metrics import (
    bootstrap_interval,
    diversity,
    ends_error,
    l2_paper,
    motion_error,
    motion_ratio,
    psnr,
    sharpness_ratio,
    skill,
    squared_error,
    ssim,
)

SHAPE = (2, 30, 64, 64, 3)


def clips(value: int) -> torch.Tensor:
    return torch.full(SHAPE, value, dtype=torch.uint8)


def test_l2_of_black_against_white():
    # sqrt(30*64*64*3 * 255^2) / 100
    assert l2_paper(clips(0), clips(255)).tolist() == pytest.approx([1548.2511] * 2, abs=1e-4)


def test_l2_of_a_difference_of_one_everywhere():
    assert l2_paper(clips(7), clips(8)).tolist() == pytest.approx([math.sqrt(368640) / 100] * 2)


def test_l2_does_not_wrap_around():
    assert torch.equal(l2_paper(clips(0), clips(255)), l2_paper(clips(255), clips(0)))


def test_psnr_matches_the_closed_form_and_ignores_the_given_frames():
    generated = clips(100)
    generated[:, 0], generated[:, -1] = 0, 255  # must not count
    assert psnr(generated, clips(110)).tolist() == pytest.approx([20 * math.log10(25.5)] * 2)
    assert psnr(clips(3), clips(3)).tolist() == [math.inf] * 2


def test_ssim_of_equal_and_constant_clips_matches_closed_forms():
    assert ssim(clips(9), clips(9)).tolist() == pytest.approx([1.0] * 2, abs=1e-5)  # float32
    # Without variance, only the luminance term remains: (2ab + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 100 / 255, 150 / 255, 0.01**2
    assert ssim(clips(100), clips(150)).tolist() == pytest.approx(
        [(2 * a * b + c1) / (a * a + b * b + c1)] * 2, abs=3e-4
    )


def test_ssim_matches_a_plain_implementation():
    rng = np.random.default_rng(0)
    generated, target = (torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 32, 3), dtype=np.uint8)) for _ in range(2))
    assert ssim(generated, target).tolist() == pytest.approx(
        [_plain_ssim(generated[0, 1].numpy(), target[0, 1].numpy())], abs=1e-4
    )


def _plain_ssim(generated: np.ndarray, target: np.ndarray) -> float:
    """Wang et al. 2004 on one uint8 [height, width, 3] frame: 11x11 Gaussian window, sigma 1.5, reflected edges."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    a, b = generated / 255.0, target / 255.0
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim_map = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return float(ssim_map.mean())


def test_pixel_and_float_conversions_are_inverse():
    all_values = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 1, 16, 16, 3)
    floats = to_floats(all_values)
    assert floats.shape == (1, 3, 1, 16, 16)
    assert (float(floats.min()), float(floats.max())) == (0.0, 1.0)
    assert torch.equal(to_pixels(floats), all_values)
    assert to_pixels(torch.tensor([[[[-1.0]], [[0.5]], [[2.0]]]])).flatten().tolist() == [0, 128, 255]


def random_clips(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_squared_error_ignores_the_given_frames():
    generated = clips(100)
    generated[:, 0], generated[:, -1] = 0, 255
    assert squared_error(generated, clips(97)).tolist() == [28 * 64 * 64 * 3 * 9.0] * 2


def test_ends_error_uses_only_the_first_and_last_frame():
    generated = clips(100)
    assert ends_error(generated, clips(100)).tolist() == [0.0] * 2
    generated[:, 0], generated[:, -1], generated[:, 5] = 103, 96, 0
    assert ends_error(generated, clips(100)).tolist() == pytest.approx([math.sqrt((9 + 16) / 2)] * 2)


def test_motion_metrics_ignore_a_constant_brightness_change():
    target = random_clips(0, 2, 5, 8, 8, 3) // 2
    assert motion_error(target + 100, target).tolist() == [0.0] * 2
    assert motion_ratio(target + 100, target).tolist() == [1.0] * 2


def test_motion_error_matches_a_plain_loop():
    generated, target = random_clips(0, 2, 4, 3, 5, 3), random_clips(1, 2, 4, 3, 5, 3)
    for clip, value in enumerate(motion_error(generated, target).tolist()):
        x, y = generated[clip].numpy().astype(float), target[clip].numpy().astype(float)
        errors = [(x[i] - x[i - 1]) - (y[i] - y[i - 1]) for i in range(1, 4)]
        assert value == pytest.approx(math.sqrt(np.mean(np.square(errors))))


def test_motion_ratio_of_a_flickering_clip():
    target, generated = clips(0), clips(0)
    target[:, 1::2], generated[:, 1::2] = 200, 50
    assert motion_ratio(generated, target).tolist() == [0.25] * 2
    assert motion_ratio(clips(9), target).tolist() == [0.0] * 2
    assert motion_ratio(target, clips(9)).tolist() == [math.inf] * 2
    assert all(math.isnan(value) for value in motion_ratio(clips(9), clips(9)).tolist())


def test_motion_ratio_of_an_edge_at_half_speed():
    """A white edge advances by one column per frame, in the target by two."""
    target, generated = (torch.zeros(1, 6, 8, 12, 3, dtype=torch.uint8) for _ in range(2))
    for frame in range(6):
        target[:, frame, :, : 2 * frame], generated[:, frame, :, :frame] = 255, 255
    assert motion_ratio(generated, target).tolist() == [0.5]


def test_sharpness_ratio_of_edges():
    """The target has a step of 200 along the width; the clips split it into halves, or scale it to a quarter."""
    target, generated = (torch.zeros(2, 5, 8, 8, 3, dtype=torch.uint8) for _ in range(2))
    target[:, :, :, 4:] = 200
    generated[0, :, :, 3:] = 100
    generated[0, :, :, 5:] = 200
    generated[1, :, :, 4:] = 50
    generated[:, 0] = random_clips(0, 2, 8, 8, 3)  # must not count
    assert sharpness_ratio(generated, target).tolist() == pytest.approx([1.0, 0.25])
    assert sharpness_ratio(generated.transpose(2, 3), target.transpose(2, 3)).tolist() == pytest.approx([1.0, 0.25])


def test_skill_is_0_for_linear_interpolation_and_1_for_perfect_clips():
    linear = torch.tensor([100.0, 300.0])
    assert float(skill(linear, linear)) == 0
    assert float(skill(torch.zeros(2), linear)) == 1
    assert float(skill(torch.tensor([50.0, 450.0]), linear)) == pytest.approx(-0.25)


def test_diversity_matches_a_closed_form_and_a_plain_loop():
    levels = torch.tensor([10, 20, 40], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(-1, 5, 4, 4, 3).clone()
    levels[:, 0], levels[:, -1] = 0, 255
    levels[0, 0] = 255  # must not count
    assert float(diversity(levels)) == pytest.approx((10 + 30 + 20) / 3)
    samples = random_clips(0, 2, 3, 4, 5, 6, 3)
    for clip, value in enumerate(diversity(samples).tolist()):
        between = samples[clip, :, 1:-1].numpy().astype(float)
        pairs = [math.sqrt(np.mean((between[a] - between[b]) ** 2)) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert value == pytest.approx(np.mean(pairs))
    assert diversity(samples[:, :1].expand(-1, 3, -1, -1, -1, -1)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"at least 2.*value 1"):
        diversity(samples[:, :1])


def test_interval_of_independent_clips_matches_scipy():
    values = torch.from_numpy(np.random.default_rng(0).gamma(2, size=60))
    interval = bootstrap_interval(torch.mean, [str(clip) for clip in range(60)], values, resamples=4000)
    expected = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    assert interval == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    narrower = bootstrap_interval(torch.mean, [str(clip) for clip in range(60)], values, confidence=0.5)
    # A normal distribution gives 0.674 / 1.960.
    assert (narrower[1] - narrower[0]) / width == pytest.approx(0.344, abs=0.04)


def test_interval_resamples_all_values_together():
    """A method with half of linear's error on every clip has skill 0.5 in every resample."""
    linear = torch.from_numpy(np.random.default_rng(0).gamma(2, size=20))
    sources = [str(clip // 2) for clip in range(20)]
    assert bootstrap_interval(skill, sources, linear / 2, linear, resamples=50) == pytest.approx((0.5, 0.5))


def test_copies_of_clips_do_not_narrow_the_interval():
    """Nine copies of each clip are no more evidence than one; treated as independent, they narrow it to a third."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=40))
    sources, copies = [str(clip) for clip in range(40)], values.repeat(9)
    interval = bootstrap_interval(torch.mean, sources, values)
    assert bootstrap_interval(torch.mean, sources * 9, copies) == pytest.approx(interval)
    too_narrow = bootstrap_interval(torch.mean, [str(clip) for clip in range(360)], copies)
    assert (too_narrow[1] - too_narrow[0]) / (interval[1] - interval[0]) == pytest.approx(1 / 3, abs=0.03)


def test_interval_is_seeded_and_rejects_invalid_input():
    values = torch.arange(6.0).double()
    sources = ["a", "a", "b", "b", "c", "c"]
    assert bootstrap_interval(torch.mean, sources, values, seed=3) == bootstrap_interval(
        torch.mean, sources, values, seed=3
    )
    assert all(math.isnan(value) for value in bootstrap_interval(torch.mean, ["a"] * 6, values))
    with pytest.raises(ValueError, match=r"5 sources for values of \[6\] clips"):
        bootstrap_interval(torch.mean, sources[:5], values)
    with pytest.raises(ValueError, match="0 sources"):
        bootstrap_interval(torch.mean, [], values[:0])


def _frames_between(clips: torch.Tensor) -> torch.Tensor:
    return clips[:, 1:-1].flatten(0, 1).permute(0, 3, 1, 2).double() / 255


@pytest.mark.parametrize("size", [(64, 64), (24, 40), (6, 7)])
def test_ssim_matches_torchmetrics_in_float64(size: tuple[int, int]):
    from torchmetrics.functional.image import structural_similarity_index_measure

    target = random_clips(0, 6, 4, *size, 3)
    generated = random_clips(1, 6, 4, *size, 3)
    generated[1] = target[1] // 2 + 60  # the same structure with less contrast
    generated[2], target[2] = 100, 150  # flat
    generated[3, :, : size[0] // 2], target[3, :, : size[0] // 2] = 255, 255  # half of the rows equal and flat
    generated[4] = target[4]
    target[5] = 0
    expected = structural_similarity_index_measure(
        _frames_between(generated), _frames_between(target), data_range=1.0, reduction="none"
    )
    assert isinstance(expected, torch.Tensor)
    assert ssim(generated, target).tolist() == pytest.approx(expected.view(6, 2).mean(1).tolist(), abs=1e-5)


def test_ssim_of_a_clip_does_not_depend_on_its_batch():
    generated, target = random_clips(0, 3, 4, 16, 24, 3), random_clips(1, 3, 4, 16, 24, 3)
    assert ssim(generated, target)[1:].tolist() == ssim(generated[1:], target[1:]).tolist()
