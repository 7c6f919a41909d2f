"""Closed forms, plain loops and scipy; the two L2 values are worked out by hand from the report's definition."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import correlate1d

from giffy_ray.core.tensor_types import to_floats, to_pixels
from giffy_ray.evaluation.metrics import (
    diversity,
    ends_error,
    interval,
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


def random_clips(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_squared_error_counts_only_between():
    made = clips(100)
    made[:, 0], made[:, -1] = 0, 255
    assert squared_error(made, clips(97)).tolist() == [28 * 64 * 64 * 3 * 9.0] * 2


def test_ends_error_counts_only_the_ends():
    made = clips(100)
    assert ends_error(made, clips(100)).tolist() == [0.0] * 2
    made[:, 0], made[:, -1], made[:, 5] = 103, 96, 0
    assert ends_error(made, clips(100)).tolist() == pytest.approx([math.sqrt((9 + 16) / 2)] * 2)


def test_motion_of_a_brighter_clip_is_right():
    real = random_clips(0, 2, 5, 8, 8, 3) // 2
    assert motion_error(real + 100, real).tolist() == [0.0] * 2
    assert motion_ratio(real + 100, real).tolist() == [1.0] * 2


def test_motion_error_against_a_plain_loop():
    made, real = random_clips(0, 2, 4, 3, 5, 3), random_clips(1, 2, 4, 3, 5, 3)
    for clip, value in enumerate(motion_error(made, real).tolist()):
        ours, theirs = made[clip].numpy().astype(float), real[clip].numpy().astype(float)
        steps = [(ours[i] - ours[i - 1]) - (theirs[i] - theirs[i - 1]) for i in range(1, 4)]
        assert value == pytest.approx(math.sqrt(np.mean(np.square(steps))))


def test_motion_ratio_of_a_clip_that_flickers():
    real, made = clips(0), clips(0)
    real[:, 1::2], made[:, 1::2] = 200, 50
    assert motion_ratio(made, real).tolist() == [0.25] * 2
    assert motion_ratio(clips(9), real).tolist() == [0.0] * 2
    assert motion_ratio(real, clips(9)).tolist() == [math.inf] * 2
    assert all(math.isnan(value) for value in motion_ratio(clips(9), clips(9)).tolist())


def test_motion_ratio_of_an_edge_that_moves_half_as_far():
    """A white edge that covers a further column (real: two) with each frame."""
    real, made = (torch.zeros(1, 6, 8, 12, 3, dtype=torch.uint8) for _ in "ab")
    for frame in range(6):
        real[:, frame, :, : 2 * frame], made[:, frame, :, :frame] = 255, 255
    assert motion_ratio(made, real).tolist() == [0.5]


def test_sharpness_ratio_of_edges():
    """One step of 200 along the width against the same step in two halves (as sharp) and one of 50 (a quarter)."""
    real, made = (torch.zeros(2, 5, 8, 8, 3, dtype=torch.uint8) for _ in "ab")
    real[:, :, :, 4:] = 200
    made[0, :, :, 3:] = 100
    made[0, :, :, 5:] = 200
    made[1, :, :, 4:] = 50
    made[:, 0] = random_clips(0, 2, 8, 8, 3)  # the given frames must not count
    assert sharpness_ratio(made, real).tolist() == pytest.approx([1.0, 0.25])
    assert sharpness_ratio(made.transpose(2, 3), real.transpose(2, 3)).tolist() == pytest.approx([1.0, 0.25])


def test_skill():
    linear = torch.tensor([100.0, 300.0])
    assert float(skill(linear, linear)) == 0
    assert float(skill(torch.zeros(2), linear)) == 1
    assert float(skill(torch.tensor([50.0, 450.0]), linear)) == pytest.approx(-0.25)


def test_diversity_of_constants_and_against_a_plain_loop():
    levels = torch.tensor([10, 20, 40], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(-1, 5, 4, 4, 3).clone()
    levels[:, 0], levels[:, -1] = 0, 255
    levels[0, 0] = 255  # the given frames must not count
    assert float(diversity(levels)) == pytest.approx((10 + 30 + 20) / 3)
    samples = random_clips(0, 2, 3, 4, 5, 6, 3)
    for clip, value in enumerate(diversity(samples).tolist()):
        between = samples[clip, :, 1:-1].numpy().astype(float)
        pairs = [math.sqrt(np.mean((between[a] - between[b]) ** 2)) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert value == pytest.approx(np.mean(pairs))
    assert diversity(samples[:, :1].expand(-1, 3, -1, -1, -1, -1)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"at least 2.*value 1"):
        diversity(samples[:, :1])


def test_interval_of_independent_clips_against_scipy():
    values = torch.from_numpy(np.random.default_rng(0).gamma(2, size=60))
    ours = interval(torch.mean, [str(clip) for clip in range(60)], values, resamples=4000)
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)
    narrower = interval(torch.mean, [str(clip) for clip in range(60)], values, confidence=0.5)
    # Of a normal distribution: 0.674 / 1.960.
    assert (narrower[1] - narrower[0]) / width == pytest.approx(0.344, abs=0.04)


def test_interval_takes_values_together():
    """A method with half of linear's error on every clip has skill 0.5 in every resample."""
    linear = torch.from_numpy(np.random.default_rng(0).gamma(2, size=20))
    sources = [str(clip // 2) for clip in range(20)]
    assert interval(skill, sources, linear / 2, linear, resamples=50) == pytest.approx((0.5, 0.5))


def test_interval_of_copies_is_that_of_their_sources():
    """Nine copies of each clip are no more evidence than one; taken for nine clips they shrink it to a third."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=40))
    sources, copies = [str(clip) for clip in range(40)], values.repeat(9)
    once = interval(torch.mean, sources, values)
    assert interval(torch.mean, sources * 9, copies) == pytest.approx(once)
    fooled = interval(torch.mean, [str(clip) for clip in range(360)], copies)
    assert (fooled[1] - fooled[0]) / (once[1] - once[0]) == pytest.approx(1 / 3, abs=0.03)


def test_interval_is_seeded_and_refuses_what_it_cannot_answer():
    values = torch.arange(6.0).double()
    sources = ["a", "a", "b", "b", "c", "c"]
    assert interval(torch.mean, sources, values, seed=3) == interval(torch.mean, sources, values, seed=3)
    assert all(math.isnan(value) for value in interval(torch.mean, ["a"] * 6, values))
    with pytest.raises(ValueError, match=r"5 sources for values of \[6\] clips"):
        interval(torch.mean, sources[:5], values)
    with pytest.raises(ValueError, match="0 sources"):
        interval(torch.mean, [], values[:0])


def _frames_between(clips: torch.Tensor) -> torch.Tensor:
    return clips[:, 1:-1].flatten(0, 1).permute(0, 3, 1, 2).double() / 255


@pytest.mark.parametrize("size", [(64, 64), (24, 40), (6, 7)])
def test_ssim_is_torchmetrics_in_float64(size: tuple[int, int]):
    from torchmetrics.functional.image import structural_similarity_index_measure

    real = random_clips(0, 6, 4, *size, 3)
    made = random_clips(1, 6, 4, *size, 3)
    made[1] = real[1] // 2 + 60  # the same structure, paler
    made[2], real[2] = 100, 150  # flat
    made[3, :, : size[0] // 2], real[3, :, : size[0] // 2] = 255, 255  # half of it equal and flat
    made[4] = real[4]
    real[5] = 0
    theirs = structural_similarity_index_measure(
        _frames_between(made), _frames_between(real), data_range=1.0, reduction="none"
    )
    assert isinstance(theirs, torch.Tensor)
    assert ssim(made, real).tolist() == pytest.approx(theirs.view(6, 2).mean(1).tolist(), abs=1e-5)


def test_ssim_of_a_clip_does_not_depend_on_its_batch():
    made, real = random_clips(0, 3, 4, 16, 24, 3), random_clips(1, 3, 4, 16, 24, 3)
    assert ssim(made, real)[1:].tolist() == ssim(made[1:], real[1:]).tolist()
