"""Training step of the GAN learner against equation 2. Tests with several ranks are in test_learner."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from giffy_ray import models
from giffy_ray.config import ConfigError, Experiment, OptimConfig, SpeedConfig, override
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training import learners
from giffy_ray.training.learners.discriminators import DiscriminatorGroup
from tests.models.test_models import CGAN, DIRECT_3D, TWO_STREAM
from tests.training.learners.test_learner import CLIPS, CPU, SAMPLE_INDICES, TIMES

EXPERIMENT = override(Experiment(), CGAN | {"optim.lr": 1e-3, "optim.discriminator_lr": 3e-3})


class LinearDiscriminator(nn.Module):
    """A weighted sum of the frames' means: its gradients are easy to write out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
        self.calls = 0

    def forward(self, target, generated):
        self.calls += 1
        return tuple((clips.mean((1, 3, 4)) * self.weight).sum(1) for clips in (target, generated))


def build_group(discriminators: dict[str, nn.Module], loss: str, label: float = 1.0, **optim) -> DiscriminatorGroup:
    return DiscriminatorGroup(discriminators, torch.device("cpu"), OptimConfig(**optim), 10, SpeedConfig(), loss, label)


def test_losses_match_equation_2():
    experiment = override(EXPERIMENT, {"model.discriminator_updates": 1, "model.frame_weight": 0.3})
    learner, twin = learners.build(experiment, CPU), learners.build(experiment, CPU)
    target = to_floats(CLIPS)
    noise = noise_from_keys(0, SAMPLE_INDICES.tolist(), 3)
    with torch.no_grad():
        generated, _ = twin.networks["generator"].train()(target[:, :, 0], target[:, :, -1], noise)
        target_logits, generated_logits = twin.networks["discriminator"].train()(target, generated)
    entropy = functional.binary_cross_entropy_with_logits
    metrics = learner.update(CLIPS, TIMES, SAMPLE_INDICES)

    ones, zeros = torch.ones(8), torch.zeros(8)
    d_loss = entropy(target_logits, 0.9 * ones) + entropy(generated_logits, zeros)
    torch.testing.assert_close(metrics["d_loss"], d_loss)
    torch.testing.assert_close(metrics["d_real"], target_logits.mean())
    torch.testing.assert_close(metrics["d_made"], generated_logits.mean())
    difference = generated - target
    squared = (difference[:, :, 0] ** 2 + difference[:, :, -1] ** 2).sum() / 8
    torch.testing.assert_close(metrics["frame_loss"], squared)
    with torch.no_grad():  # the generator's loss uses the discriminator after its step
        _, updated_logits = learner.networks["discriminator"](target, generated)
    torch.testing.assert_close(metrics["g_loss"], entropy(updated_logits, ones))
    absolute_learner = learners.build(override(experiment, {"model.frame_loss": "absolute"}), CPU)
    absolute = (difference[:, :, 0].abs() + difference[:, :, -1].abs()).sum() / 8
    torch.testing.assert_close(absolute_learner.update(CLIPS, TIMES, SAMPLE_INDICES)["frame_loss"], absolute)


RECONSTRUCTION = {"model.reconstruction_weight": 50.0}
WEIGHTS = {
    "train.global_batch_size": 8,
    "model.frame_weight": 0.3,
    "model.discriminator_updates": 1,
    "optim.discriminator_lr": 1e-30,
}


@pytest.mark.parametrize(
    "changes",
    [CGAN | {"model.frame_loss": "squared"}, TWO_STREAM | {"model.mask_weight": 7.0}, DIRECT_3D | RECONSTRUCTION],
    ids=lambda changes: changes["model.kind"],
)
def test_generator_gradient_is_that_of_the_sum_of_its_losses(changes: dict):
    """Compares with autograd through a twin, whose discriminators barely learn."""
    experiment = override(Experiment(), changes | WEIGHTS)
    learner, twin = learners.build(experiment, CPU), learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    target = to_floats(clips)
    noise = noise_from_keys(0, SAMPLE_INDICES.tolist(), learner.latent)
    generator = twin.networks["generator"].train()
    generated, penalty = generator(target[:, :, 0], target[:, :, -1], noise)
    difference = generated - target
    ends = difference[:, :, [0, -1]].square() if changes.get("model.frame_loss") else difference[:, :, [0, -1]].abs()
    reconstruction = changes.get("model.reconstruction_weight", 0) * difference.abs().mean()
    loss = penalty.mean() + 0.3 * ends.sum() / 8 + reconstruction
    for name in models.build_discriminators(experiment.model, experiment.clip):
        network = twin.networks[name].train()
        network(target, generated.detach())  # spectral norm refines its estimate at every call
        loss = loss + functional.softplus(-network(generated.detach(), generated)[1]).mean()
    loss.backward()
    learner.update(clips, torch.linspace(0, 1, clips.shape[1]).expand(len(clips), -1), SAMPLE_INDICES)
    for parameter, expected in zip(learner.networks["generator"].parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_discriminator_takes_four_steps_per_generator_step_at_its_own_learning_rate():
    learner = learners.build(override(EXPERIMENT, {"optim.ema_decay": 0.5}), CPU)
    for _ in range(3):
        learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in learner.optimizers.items()
    }
    assert steps == {"generator": {3}, "discriminator": {12}}
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in learner.optimizers.items()}
    assert rates == {"generator": 1e-3, "discriminator": 3e-3}
    assert set(learner.networks) == {"generator", "generator_average", "discriminator"}
    assert learner.discriminators.modules["discriminator"].average is None  # type: ignore[attr-defined]
    same = learners.build(override(EXPERIMENT, {"optim.discriminator_lr": None}), CPU)
    same.update(CLIPS, TIMES, SAMPLE_INDICES)
    assert same.optimizers["discriminator"].param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_generator_loss_has_gradients_only_for_generated_clips(loss: str):
    discriminator = LinearDiscriminator()
    generated = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clip_losses = build_group({"one": discriminator}, loss).generator_loss(generated)
    weight = discriminator.weight.detach()
    logits = (generated.detach().mean((1, 3, 4)) * weight).sum(1)
    slope = logits.sigmoid() - 1 if loss == "logistic" else -torch.ones(2)
    expected = functional.softplus(-logits) if loss == "logistic" else -logits
    torch.testing.assert_close(clip_losses.detach(), expected)
    clip_losses.sum().backward()
    gradient = slope.view(2, 1, 1, 1, 1) * weight.view(1, 1, 3, 1, 1) / (3 * 4 * 4)
    torch.testing.assert_close(generated.grad, gradient.expand_as(generated))
    assert discriminator.weight.grad is None
    assert discriminator.weight.requires_grad
    two_losses = build_group({"a": discriminator, "b": discriminator}, loss).generator_loss(generated)
    torch.testing.assert_close(two_losses, 2 * clip_losses)


@pytest.mark.parametrize(("loss", "label"), [("logistic", 0.9), ("hinge", 1.0)])
def test_discriminator_step_follows_its_gradient_and_has_none_for_generated_clips(loss: str, label: float):
    discriminator = LinearDiscriminator()
    weight = discriminator.weight.detach().clone()
    target, generated = torch.rand(2, 4, 3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    generated.requires_grad_()
    target_means = target.detach().mean((1, 3, 4))
    generated_means = generated.detach().mean((1, 3, 4))
    target_logits = (target_means * weight).sum(1)
    generated_logits = (generated_means * weight).sum(1)
    if loss == "logistic":
        target_slope = target_logits.sigmoid() - label
        generated_slope = generated_logits.sigmoid()
    else:
        target_slope = -(target_logits < 1).float()
        generated_slope = (generated_logits > -1).float()
    expected = (target_slope[:, None] * target_means).mean(0) + (generated_slope[:, None] * generated_means).mean(0)
    group = build_group({"one": discriminator}, loss, label, lr=1e-2)
    metrics = group.update(target, generated, step=0, weight=1.0)
    torch.testing.assert_close(discriminator.weight.grad, expected)
    torch.testing.assert_close(discriminator.weight.detach(), weight - 1e-2 * expected.sign(), rtol=0, atol=1e-6)
    assert generated.grad is None
    assert discriminator.calls == 1  # DistributedDataParallel supports one forward per backward
    assert metrics["d_real"] == pytest.approx(float(target_logits.mean()))


def test_metrics_are_sums_and_means_over_discriminators():
    target, generated = torch.rand(2, 4, 3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    single, double = (
        build_group({name: LinearDiscriminator() for name in names}, "logistic").update(
            target, generated, step=0, weight=1.0
        )
        for names in ("a", "ab")
    )
    torch.testing.assert_close(double, {**single, "d_loss": 2 * single["d_loss"]})


def test_generate_depends_on_endpoints_and_noise_and_not_on_the_batch():
    learner = learners.build(EXPERIMENT, CPU)
    learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    noise = noise_from_keys(1, range(8), 3)
    generated = learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise)
    assert generated.shape == CLIPS.shape
    assert generated.dtype == torch.uint8
    assert torch.equal(learner.generate(CLIPS[2:3, 0], CLIPS[2:3, -1], noise[2:3]), generated[2:3])
    generator = learner.networks["generator"].train()  # batch norm amplifies the weak signals of an untrained network
    start, end = to_floats(CLIPS[:, 0]), to_floats(CLIPS[:, -1])
    with torch.no_grad():
        first, _ = generator(start, end, noise)
        with_other_noise, _ = generator(start, end, -noise)
        reversed_ends, _ = generator(end, start, noise)
    assert not torch.equal(first, with_other_noise)
    assert not torch.equal(first, reversed_ends)
    with pytest.raises(ConfigError, match=r"frames: cgan generates only clips of clip\.frames=6 \(value 5\)"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise, frames=5)
    assert learner.reconstruct(CLIPS) is None  # the generator never sees the frames between


def test_training_reduces_the_frame_loss():
    plain = CLIPS[:, :1, :1, :1].expand_as(CLIPS).contiguous()  # one colour per clip
    learner = learners.build(override(EXPERIMENT, {"optim.lr": 1e-2, "model.discriminator_updates": 1}), CPU)
    frame_losses = [float(learner.update(plain, TIMES, SAMPLE_INDICES)["frame_loss"]) for _ in range(30)]
    assert frame_losses[-1] < 0.5 * frame_losses[0]
