"""The parts of `between` against plain loops and closed forms, and what holds whatever the weights are."""

import numpy as np
import pytest
import torch
from torch import nn

from giffy_ray import models
from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError, Experiment, override
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.models.baselines import linear
from giffy_ray.models.between import Between, blend, matches, warp
from giffy_ray.training import learners
from giffy_ray.training.learners import losses

CLIP = ClipConfig(frames=6, height=16, width=24)
SMALL = {
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 24,
    "optim.lr": 3e-3,
    "optim.max_grad_norm": 1.0,
    "optim.ema_decay": 0.9,
    "train.global_batch_size": 4,
}


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scrambled(network: nn.Module, random: torch.Generator) -> Between:
    """With weights that no head starts from."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=random)
    assert isinstance(network, Between)
    return network


def small() -> Between:
    network = models.build(BetweenConfig(widths=(4, 6, 8), latent=2), CLIP)
    assert isinstance(network, Between)
    return network


def test_warping_by_whole_pixels_fetches_them_and_beyond_the_edge_lies_the_edge(random: torch.Generator):
    picture = torch.rand(2, 3, 8, 10, generator=random)
    flow = torch.zeros(2, 2, 8, 10)
    flow[:, 0], flow[:, 1] = 2, -1  # from two to the right and one above
    made = warp(picture, flow)
    y, x = np.clip(np.arange(8) - 1, 0, 7), np.clip(np.arange(10) + 2, 0, 9)
    torch.testing.assert_close(made, picture[:, :, y][:, :, :, x], atol=1e-5, rtol=0)


def test_warping_by_parts_of_pixels_is_bilinear(random: torch.Generator):
    picture = torch.rand(1, 1, 6, 6, generator=random)
    flow = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(1, 2, 6, 6)
    by_hand = (
        0.75 * 0.25 * picture[..., :-1, :-1]
        + 0.25 * 0.25 * picture[..., :-1, 1:]
        + 0.75 * 0.75 * picture[..., 1:, :-1]
        + 0.25 * 0.75 * picture[..., 1:, 1:]
    )
    torch.testing.assert_close(warp(picture, flow)[..., :-1, :-1], by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_flow_that_is_not_finite_gives_nan_there_and_nowhere_else(random: torch.Generator, mode: str, bad: float):
    """The gradient of grid_sample itself crashes at NaN, on a CPU."""
    picture = torch.rand(2, 3, 8, 10, generator=random).requires_grad_()
    flow = torch.rand(2, 2, 8, 10, generator=random)
    expected = warp(picture, flow, mode)
    flow[1, 0, 4, 5] = bad
    made = warp(picture, flow.requires_grad_(), mode)
    made.sum().backward()
    assert made[1, :, 4, 5].isnan().all()
    assert made.isnan().sum() == 3
    assert torch.equal(made.nan_to_num(), torch.where(made.isnan(), 0, expected))


def test_matches_are_cosines_with_the_places_around(random: torch.Generator):
    picture, other = torch.randn(2, 1, 5, 6, 7, generator=random)
    found = matches(picture, other)
    assert found.shape == (1, 81, 6, 7)
    for dy, dx, y, x in [(0, 0, 3, 3), (2, -3, 1, 4), (-4, 4, 5, 0), (1, 1, 5, 6), (-2, 0, 0, 2)]:
        cosine = found[0, (dy + 4) * 9 + dx + 4, y, x]
        inside = 0 <= y + dy < 6 and 0 <= x + dx < 7
        expected = (
            nn.functional.cosine_similarity(picture[0, :, y, x], other[0, :, y + dy, x + dx], dim=0) if inside else 0
        )
        assert float(cosine) == pytest.approx(float(expected), abs=1e-5)


def test_the_blend_weighs_the_end_by_the_sigmoid_of_logit_and_visibility(random: torch.Generator):
    start, end, residual = torch.rand(3, 2, 3, 8, 8, generator=random)
    visibility = torch.randn(2, 1, 8, 8, generator=random)
    time = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    made = blend(start, end, time, torch.zeros(2, 4, 8, 8), torch.cat([visibility, residual], dim=1))
    weight = torch.sigmoid(torch.logit(time) + visibility)
    expected = (1 - weight) * start + weight * end + 4 * time * (1 - time) * residual
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_before_training_it_is_linear_interpolation(random: torch.Generator):
    clips = torch.randint(0, 256, (3, 6, 16, 24, 3), generator=random).to(torch.uint8)
    learner = learners.build(override(Experiment(), SMALL), torch.device("cpu"))
    made = learner.generate(clips[:, 0], clips[:, -1], torch.randn(3, learner.latent, generator=random))
    assert (made.int() - linear(clips[:, 0], clips[:, -1], 6).int()).abs().max() <= 1


def test_both_ends_are_exact_whatever_the_weights(random: torch.Generator):
    network = scrambled(small(), random)
    start, end = torch.rand(2, 2, 3, 16, 24, generator=random)
    noise = torch.randn(2, 2, generator=random)
    made = network.generate(start, end, noise, torch.linspace(0, 1, 5).expand(2, -1))
    torch.testing.assert_close(made[:, :, 0], start, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, :, -1], end, atol=1e-5, rtol=0)
    assert (made[:, :, 2] - (start + end) / 2).abs().max() > 0.1  # and the weights do matter


def test_a_frame_depends_on_its_time_only_and_any_number_can_be_asked_for(random: torch.Generator):
    network = scrambled(small(), random)
    start, end = torch.rand(2, 2, 3, 16, 24, generator=random)
    noise = torch.randn(2, 2, generator=random)
    five = network.generate(start, end, noise, torch.linspace(0, 1, 5).expand(2, -1))
    nine = network.generate(start, end, noise, torch.linspace(0, 1, 9).expand(2, -1))
    torch.testing.assert_close(five, nine[:, :, ::2], atol=2e-5, rtol=0)
    assert not torch.allclose(network.generate(start, end, -noise, torch.full((2, 1), 0.5)), five[:, :, 2:3], atol=1e-3)


@pytest.mark.parametrize(("ensemble", "axes"), [(2, (-1,)), (4, (-1,)), (4, (-2,)), (4, (-2, -1))])
def test_a_self_ensemble_makes_of_mirrored_ends_the_mirrored_clip(random: torch.Generator, ensemble: int, axes: tuple):
    model = BetweenConfig(widths=(4, 6, 8), latent=2, self_ensemble=ensemble)
    network = scrambled(models.build(model, CLIP), random)
    start, end = torch.rand(2, 3, 3, 16, 24, generator=random)
    noise, times = torch.randn(3, 2, generator=random), torch.linspace(0, 1, 6)[1:-1].expand(3, -1)
    made = network.generate(start, end, noise, times)
    mirrored = network.generate(start.flip(axes), end.flip(axes), noise, times)
    torch.testing.assert_close(mirrored, made.flip(axes), atol=1e-5, rtol=0)
    network.mirrors = network.mirrors[:1]  # one alone does not
    alone = network.generate(start, end, noise, times)
    assert (network.generate(start.flip(axes), end.flip(axes), noise, times) - alone.flip(axes)).abs().max() > 1e-3


def test_a_clip_is_made_again_from_what_q_says_of_it(random: torch.Generator):
    """By way of the noise that brings the prior to q's mean."""
    learner = learners.build(override(Experiment(), SMALL), torch.device("cpu"))
    network = scrambled(learner.descent.eval_module, random).eval()  # type: ignore[attr-defined]
    clips = torch.randint(0, 256, (3, 6, 16, 24, 3), dtype=torch.uint8, generator=random)
    times, sampled = torch.linspace(0, 1, 6).expand(3, -1), torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        _, mean, _, prior_mean, prior_std = network(to_floats(clips), times, torch.zeros(3, 2), sampled)
    expected = learner.generate(clips[:, 0], clips[:, -1], (mean - prior_mean) / prior_std)
    again = learner.reconstruct(clips)
    assert again is not None
    assert (again.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(again, learner.generate(clips[:, 0], clips[:, -1], torch.zeros(3, 2)))
    assert torch.equal(again[:, [0, -1]], clips[:, [0, -1]])


def test_every_weight_is_trained(random: torch.Generator):
    """What DistributedDataParallel would wait for in vain."""
    network = scrambled(small(), random)
    clip = torch.rand(2, 3, 4, 16, 24, generator=random)
    times = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(2, -1)
    made, *distributions = network(clip, times, torch.randn(2, 2), torch.tensor([True, False]))
    (made.sum() + losses.gaussian_kl_between(*distributions).sum()).backward()
    assert not [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_a_network_of_its_defaults_is_small():
    total = sum(parameter.numel() for parameter in models.build(BetweenConfig(), ClipConfig()).parameters())
    assert total < 485_486_299 / 100


def test_it_learns_that_a_square_moves(random: torch.Generator):
    experiment = override(Experiment(), SMALL)
    learner = learners.build(experiment, torch.device("cpu"), steps=60)
    clips, times = torch.zeros(4, 6, 16, 24, 3, dtype=torch.uint8), torch.linspace(0, 1, 6).expand(4, -1)
    for place in range(4):
        for frame in range(6):
            clips[place, frame, 2 + 2 * place : 8 + 2 * place, 2 * frame : 2 * frame + 8] = 200
    errors = [float(learner.update(clips, times, torch.arange(4) + 4 * step)["relative_error"]) for step in range(60)]
    assert errors[0] == pytest.approx(1, abs=0.1)  # linear interpolation's, but for the floor
    assert errors[-1] < 0.5 * errors[0]
    made = learner.generate(clips[:, 0], clips[:, -1], torch.zeros(4, learner.latent))
    baseline = linear(clips[:, 0], clips[:, -1], 6)
    assert (made.float() - clips.float()).square().mean() < 0.7 * (baseline.float() - clips.float()).square().mean()
    assert learner.generate(clips[:, 0], clips[:, -1], torch.zeros(4, learner.latent), frames=11).shape[1] == 11


@pytest.mark.parametrize(("field", "size"), [("height", 20), ("width", 30)])
def test_a_size_that_it_cannot_halve_three_times_is_refused(field: str, size: int):
    with pytest.raises(ConfigError, match=f"clip.{field}: .*8.*{size}"):
        models.build(BetweenConfig(), ClipConfig(**{field: size}))
