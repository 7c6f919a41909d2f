"""Checks the parts of `between` against plain loops and closed forms, and its invariants for any weights."""

import pytest
import torch
from torch import nn

from giffy_ray import models
from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError, Experiment, override
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.models.baselines import linear
from giffy_ray.models.between import Between, cost_volume
from giffy_ray.training import learners
from giffy_ray.training.learners import losses
from tests.conftest import SMALL_BETWEEN

CLIP = ClipConfig(frames=6, height=16, width=24)
SMALL = {
    **SMALL_BETWEEN,
    "optim.lr": 3e-3,
    "optim.max_grad_norm": 1.0,
    "optim.ema_decay": 0.9,
    "train.global_batch_size": 4,
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randomise(network: nn.Module, rng: torch.Generator) -> Between:
    """Replaces the initial weights, with which the heads output zero."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=rng)
    assert isinstance(network, Between)
    return network


def build_small() -> Between:
    network = models.build(BetweenConfig(widths=(4, 6, 8), latent=2), CLIP)
    assert isinstance(network, Between)
    return network


def test_cost_volume_holds_cosines_of_the_neighbourhood(rng: torch.Generator):
    features, other_features = torch.randn(2, 1, 5, 6, 7, generator=rng)
    volume = cost_volume(features, other_features)
    assert volume.shape == (1, 81, 6, 7)
    for dy, dx, y, x in [(0, 0, 3, 3), (2, -3, 1, 4), (-4, 4, 5, 0), (1, 1, 5, 6), (-2, 0, 0, 2)]:
        cosine = volume[0, (dy + 4) * 9 + dx + 4, y, x]
        inside = 0 <= y + dy < 6 and 0 <= x + dx < 7
        expected = (
            nn.functional.cosine_similarity(features[0, :, y, x], other_features[0, :, y + dy, x + dx], dim=0)
            if inside
            else 0
        )
        assert float(cosine) == pytest.approx(float(expected), abs=1e-5)


def test_untrained_network_is_linear_interpolation(rng: torch.Generator):
    clips = torch.randint(0, 256, (3, 6, 16, 24, 3), generator=rng).to(torch.uint8)
    learner = learners.build(override(Experiment(), SMALL), torch.device("cpu"))
    generated = learner.generate(clips[:, 0], clips[:, -1], torch.randn(3, learner.latent, generator=rng))
    assert (generated.int() - linear(clips[:, 0], clips[:, -1], 6).int()).abs().max() <= 1


def test_end_frames_are_exact_for_any_weights(rng: torch.Generator):
    network = randomise(build_small(), rng)
    start, end = torch.rand(2, 2, 3, 16, 24, generator=rng)
    noise = torch.randn(2, 2, generator=rng)
    generated = network.generate(start, end, noise, torch.linspace(0, 1, 5).expand(2, -1))
    torch.testing.assert_close(generated[:, :, 0], start, atol=1e-5, rtol=0)
    torch.testing.assert_close(generated[:, :, -1], end, atol=1e-5, rtol=0)
    assert (generated[:, :, 2] - (start + end) / 2).abs().max() > 0.1  # the weights have an effect


def test_frame_depends_only_on_its_time_and_not_on_the_number_of_frames(rng: torch.Generator):
    network = randomise(build_small(), rng)
    start, end = torch.rand(2, 2, 3, 16, 24, generator=rng)
    noise = torch.randn(2, 2, generator=rng)
    five = network.generate(start, end, noise, torch.linspace(0, 1, 5).expand(2, -1))
    nine = network.generate(start, end, noise, torch.linspace(0, 1, 9).expand(2, -1))
    torch.testing.assert_close(five, nine[:, :, ::2], atol=2e-5, rtol=0)
    assert not torch.allclose(network.generate(start, end, -noise, torch.full((2, 1), 0.5)), five[:, :, 2:3], atol=1e-3)


@pytest.mark.parametrize(("ensemble", "axes"), [(2, (-1,)), (4, (-1,)), (4, (-2,)), (4, (-2, -1))])
def test_self_ensemble_maps_mirrored_ends_to_the_mirrored_clip(rng: torch.Generator, ensemble: int, axes: tuple):
    model = BetweenConfig(widths=(4, 6, 8), latent=2, self_ensemble=ensemble)
    network = randomise(models.build(model, CLIP), rng)
    start, end = torch.rand(2, 3, 3, 16, 24, generator=rng)
    noise, times = torch.randn(3, 2, generator=rng), torch.linspace(0, 1, 6)[1:-1].expand(3, -1)
    generated = network.generate(start, end, noise, times)
    mirrored = network.generate(start.flip(axes), end.flip(axes), noise, times)
    torch.testing.assert_close(mirrored, generated.flip(axes), atol=1e-5, rtol=0)
    network.mirrors = network.mirrors[:1]  # without an ensemble, it does not hold
    generated = network.generate(start, end, noise, times)
    mirrored = network.generate(start.flip(axes), end.flip(axes), noise, times)
    assert (mirrored - generated.flip(axes)).abs().max() > 1e-3


def test_reconstruction_uses_the_mean_of_q(rng: torch.Generator):
    """The expected clip comes from the noise that moves the prior to q's mean."""
    learner = learners.build(override(Experiment(), SMALL), torch.device("cpu"))
    network = randomise(learner.module.eval_module, rng).eval()  # type: ignore[attr-defined]
    clips = torch.randint(0, 256, (3, 6, 16, 24, 3), dtype=torch.uint8, generator=rng)
    times, sampled = torch.linspace(0, 1, 6).expand(3, -1), torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        _, mean, _, prior_mean, prior_std = network(to_floats(clips), times, torch.zeros(3, 2), sampled)
    expected = learner.generate(clips[:, 0], clips[:, -1], (mean - prior_mean) / prior_std)
    reconstructed = learner.reconstruct(clips)
    assert reconstructed is not None
    assert (reconstructed.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(reconstructed, learner.generate(clips[:, 0], clips[:, -1], torch.zeros(3, 2)))
    assert torch.equal(reconstructed[:, [0, -1]], clips[:, [0, -1]])


def test_every_parameter_gets_a_gradient(rng: torch.Generator):
    """DistributedDataParallel would wait forever for a missing gradient."""
    network = randomise(build_small(), rng)
    clip = torch.rand(2, 3, 4, 16, 24, generator=rng)
    times = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(2, -1)
    generated, *distributions = network(clip, times, torch.randn(2, 2), torch.tensor([True, False]))
    (generated.sum() + losses.gaussian_kl_between(*distributions).sum()).backward()
    assert not [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_default_network_has_less_than_1_percent_of_the_cvaes_parameters():
    total = sum(parameter.numel() for parameter in models.build(BetweenConfig(), ClipConfig()).parameters())
    assert total < 485_486_299 / 100


def test_training_learns_a_moving_square(rng: torch.Generator):
    experiment = override(Experiment(), SMALL)
    learner = learners.build(experiment, torch.device("cpu"), steps=60)
    clips, times = torch.zeros(4, 6, 16, 24, 3, dtype=torch.uint8), torch.linspace(0, 1, 6).expand(4, -1)
    for clip in range(4):
        for frame in range(6):
            clips[clip, frame, 2 + 2 * clip : 8 + 2 * clip, 2 * frame : 2 * frame + 8] = 200
    errors = [float(learner.update(clips, times, torch.arange(4) + 4 * step)["relative_error"]) for step in range(60)]
    assert errors[0] == pytest.approx(1, abs=0.1)  # linear interpolation's, up to error_epsilon
    assert errors[-1] < 0.5 * errors[0]
    generated = learner.generate(clips[:, 0], clips[:, -1], torch.zeros(4, learner.latent))
    baseline = linear(clips[:, 0], clips[:, -1], 6)
    assert (generated.float() - clips.float()).square().mean() < 0.7 * (
        baseline.float() - clips.float()
    ).square().mean()
    assert learner.generate(clips[:, 0], clips[:, -1], torch.zeros(4, learner.latent), frames=11).shape[1] == 11


@pytest.mark.parametrize(("field", "size"), [("height", 20), ("width", 30)])
def test_unsupported_sizes_are_rejected(field: str, size: int):
    with pytest.raises(ConfigError, match=f"clip.{field}: .*8.*{size}"):
        models.build(BetweenConfig(), ClipConfig(**{field: size}))
