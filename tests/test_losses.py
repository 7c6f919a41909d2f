import math

import torch
from torch.distributions import Normal, kl_divergence

from giffy_ray.losses import gaussian_kl, squared_error


def test_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    std = torch.rand(5, 7, generator=generator, dtype=torch.float64) + 0.1
    reference = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.ones_like(std))).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, std), reference, rtol=0, atol=1e-5)


def test_kl_closed_form():
    # 600 dimensions with mean 1 and std e: 0.5 (1 + e^2 - 2 - 1) each.
    value = gaussian_kl(torch.ones(1, 600, dtype=torch.float64), torch.full((1, 600), math.e, dtype=torch.float64))
    assert math.isclose(float(value), 600 * 0.5 * (math.e**2 - 2), rel_tol=1e-7)


def test_kl_is_finite_where_the_deviation_underflows():
    assert torch.isfinite(gaussian_kl(torch.zeros(1, 2), torch.zeros(1, 2))).all()


def test_squared_error_sums_over_all_but_the_batch():
    made, real = torch.zeros(2, 3, 30, 4, 4), torch.zeros(2, 3, 30, 4, 4)
    real[1] = 0.5
    assert squared_error(made, real).tolist() == [0.0, 0.25 * 3 * 30 * 4 * 4]
