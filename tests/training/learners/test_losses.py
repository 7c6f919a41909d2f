"""Loss functions against torch.distributions, torch's own losses and values computed by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from giffy_ray.training.learners.losses import (
    absolute_error,
    endpoint_frames,
    free_nats,
    gaussian_kl,
    gaussian_kl_between,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
    relative_error,
    squared_error,
)


def test_gaussian_kl_matches_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    std = torch.rand(5, 7, generator=generator, dtype=torch.float64) + 0.1
    reference = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.ones_like(std))).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, std), reference, rtol=0, atol=1e-5)


def test_gaussian_kl_matches_the_closed_form():
    # 600 dimensions with mean 1 and std e: 0.5 (1 + e^2 - 2 - 1) each.
    value = gaussian_kl(torch.ones(1, 600, dtype=torch.float64), torch.full((1, 600), math.e, dtype=torch.float64))
    assert math.isclose(float(value), 600 * 0.5 * (math.e**2 - 2), rel_tol=1e-7)


def test_gaussian_kl_is_finite_if_the_deviation_underflows():
    assert torch.isfinite(gaussian_kl(torch.zeros(1, 2), torch.zeros(1, 2))).all()


def test_squared_error_sums_over_all_axes_but_the_batch():
    generated, target = torch.zeros(2, 3, 30, 4, 4), torch.zeros(2, 3, 30, 4, 4)
    target[1] = 0.5
    assert squared_error(generated, target).tolist() == [0.0, 0.25 * 3 * 30 * 4 * 4]


def test_absolute_error_sums_over_all_axes_but_the_batch():
    generated, target = torch.zeros(2, 3, 2, 4, 4), torch.zeros(2, 3, 2, 4, 4)
    target[1] = -0.5
    assert absolute_error(generated, target).tolist() == [0.0, 0.5 * 3 * 2 * 4 * 4]


def test_endpoint_frames_are_a_view_of_the_first_and_last_frame():
    for frames in (2, 3, 30):
        clips = torch.rand(2, 3, frames, 4, 4)
        assert torch.equal(endpoint_frames(clips), torch.stack([clips[:, :, 0], clips[:, :, frames - 1]], dim=2))
        assert endpoint_frames(clips).data_ptr() == clips.data_ptr()


def test_gaussian_kl_between_matches_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, prior_mean = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    std, prior_std = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) + 0.1
    reference = kl_divergence(Normal(mean, std), Normal(prior_mean, prior_std))
    torch.testing.assert_close(gaussian_kl_between(mean, std, prior_mean, prior_std), reference)


def test_free_nats_apply_to_the_batch_mean():
    kl = torch.tensor([[0.0, 1.0, 0.1], [0.4, 3.0, 0.1]], requires_grad=True)  # means 0.2, 2.0, 0.1
    cost = free_nats(kl.mean(0), 0.5)
    assert cost.item() == pytest.approx(0.5 + 2.0 + 0.5)
    cost.backward()
    assert kl.grad.tolist() == [[0, 0.5, 0], [0, 0.5, 0]]  # no gradient below the threshold
    assert free_nats(kl.mean(0), 0.0).item() == pytest.approx(0.2 + 2.0 + 0.1)


def test_free_nats_threshold_uses_the_global_batch():
    rank_kl = torch.tensor([[0.1, 0.9, 0.8], [0.3, 0.2, 0.1]], requires_grad=True)  # means 0.2, 0.55, 0.45
    costs = torch.stack([free_nats(kl, 0.5, rank_kl.detach().mean(0)) for kl in rank_kl])
    assert costs.mean().item() == pytest.approx(free_nats(rank_kl.mean(0), 0.5).item()) == pytest.approx(1.55)
    costs.mean().backward()
    assert rank_kl.grad.tolist() == [[0, 0.5, 0], [0, 0.5, 0]]


def test_relative_error_is_relative_to_linear_interpolation_plus_epsilon():
    # Frames 0, 0.5, 0.5, 1 at the times 0, 1/4, 1/2, 1: linear interpolation is off by 1/4 once.
    target = torch.tensor([0, 0.5, 0.5, 1]).view(1, 1, 4, 1, 1).expand(2, 3, 4, 2, 2)
    times = torch.tensor([0, 0.25, 0.5, 1]).expand(2, 4)
    generated = target[:, :, 1:-1].clone()
    generated[1] += 0.3
    error = relative_error(generated, target, times, 0.01)
    torch.testing.assert_close(error, torch.tensor([0, 0.3**2 / (0.25**2 / 2 + 0.01)]))
    linear = times[:, None, 1:-1, None, None].expand_as(generated)
    torch.testing.assert_close(relative_error(linear, target, times, 1e-9), torch.ones(2), rtol=1e-5, atol=0)


LOGITS = torch.linspace(-30, 30, 13, dtype=torch.float64)


@pytest.mark.parametrize("label", [1.0, 0.9])
def test_logistic_losses_match_torch_cross_entropy(label: float):
    target, generated = LOGITS, LOGITS.flip(0)
    entropy = functional.binary_cross_entropy_with_logits
    expected = entropy(target, torch.full_like(target, label), reduction="none")
    expected = expected + entropy(generated, torch.zeros_like(generated), reduction="none")
    torch.testing.assert_close(logistic_discriminator(target, generated, label), expected)
    torch.testing.assert_close(
        logistic_generator(generated), entropy(generated, torch.ones_like(generated), reduction="none")
    )


@pytest.mark.parametrize(("label", "probability", "minimum"), [(0.9, 0.45, 1.3763), (1.0, 0.5, 2 * math.log(2))])
def test_logistic_discriminator_minimum_for_indistinguishable_clips(label: float, probability: float, minimum: float):
    """D* = label p_real / (p_real + p_made), Salimans et al. 2016, section 3.4, compared with a grid search."""
    logits = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    values = logistic_discriminator(logits, logits, label)
    assert float(values.min()) == pytest.approx(minimum, abs=5e-5)
    assert float(logits[values.argmin()].sigmoid()) == pytest.approx(probability, abs=1e-4)


def test_logistic_generator_gradient_does_not_saturate():
    """d/dx of -log sigmoid(x) is sigmoid(x) - 1: -1 where the discriminator is confident, not 0."""
    logits = LOGITS.clone().requires_grad_()
    logistic_generator(logits).sum().backward()
    torch.testing.assert_close(logits.grad, LOGITS.sigmoid() - 1)
    assert float(logits.grad[0]) == pytest.approx(-1)


def test_hinge_losses_match_hand_computed_values():
    target, generated = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert hinge_discriminator(target, generated).tolist() == [0.0, 0.5 + 0.5, 2.0 + 2.0]
    assert hinge_generator(generated).tolist() == [2.0, 0.5, -1.0]
