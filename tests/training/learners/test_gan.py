"""A step of the GAN learner against equation 2 written out. Two workers are in test_learner."""

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
from tests.training.learners.test_learner import CLIPS, CPU, POSITIONS, TIMES

EXPERIMENT = override(Experiment(), CGAN | {"optim.lr": 1e-3, "optim.discriminator_lr": 3e-3})


class Judge(nn.Module):
    """The mean of every frame, weighed: a discriminator whose gradients can be written out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
        self.calls = 0

    def forward(self, real, made):
        self.calls += 1
        return tuple((clips.mean((1, 3, 4)) * self.weight).sum(1) for clips in (real, made))


def adversary(judges: dict[str, nn.Module], loss: str, label: float = 1.0, **optim) -> DiscriminatorGroup:
    return DiscriminatorGroup(judges, torch.device("cpu"), OptimConfig(**optim), 10, SpeedConfig(), loss, label)


def test_the_losses_are_those_of_equation_2():
    experiment = override(EXPERIMENT, {"model.discriminator_updates": 1, "model.frame_weight": 0.3})
    learner, twin = learners.build(experiment, CPU), learners.build(experiment, CPU)
    real, noise = to_floats(CLIPS), noise_from_keys(0, POSITIONS.tolist(), 3)
    with torch.no_grad():
        made, _ = twin.networks["generator"].train()(real[:, :, 0], real[:, :, -1], noise)
        real_logits, made_logits = twin.networks["discriminator"].train()(real, made)
    entropy = functional.binary_cross_entropy_with_logits
    named = learner.update(CLIPS, TIMES, POSITIONS)

    ones, zeros = torch.ones(8), torch.zeros(8)
    torch.testing.assert_close(named["d_loss"], entropy(real_logits, 0.9 * ones) + entropy(made_logits, zeros))
    torch.testing.assert_close(named["d_real"], real_logits.mean())
    torch.testing.assert_close(named["d_made"], made_logits.mean())
    ends = ((made - real)[:, :, 0] ** 2 + (made - real)[:, :, -1] ** 2).sum() / 8
    torch.testing.assert_close(named["frame_loss"], ends)
    with torch.no_grad():  # the generator is judged by the discriminator after its step
        _, judged = learner.networks["discriminator"](real, made)
    torch.testing.assert_close(named["g_loss"], entropy(judged, ones))
    absolute = learners.build(override(experiment, {"model.frame_loss": "absolute"}), CPU)
    ends = ((made - real)[:, :, 0].abs() + (made - real)[:, :, -1].abs()).sum() / 8
    torch.testing.assert_close(absolute.update(CLIPS, TIMES, POSITIONS)["frame_loss"], ends)


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
def test_the_generator_descends_the_sum_of_its_losses(changes: dict):
    """Its gradient by another way: through discriminators that hardly learn."""
    experiment = override(Experiment(), changes | WEIGHTS)
    learner, twin = learners.build(experiment, CPU), learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    real, noise = to_floats(clips), noise_from_keys(0, POSITIONS.tolist(), learner.latent)
    generator = twin.networks["generator"].train()
    made, penalty = generator(real[:, :, 0], real[:, :, -1], noise)
    difference = made - real
    ends = difference[:, :, [0, -1]].square() if changes.get("model.frame_loss") else difference[:, :, [0, -1]].abs()
    loss = (
        penalty.mean() + 0.3 * ends.sum() / 8 + changes.get("model.reconstruction_weight", 0) * difference.abs().mean()
    )
    for judge in models.discriminators(experiment.model, experiment.clip):
        network = twin.networks[judge].train()
        network(real, made.detach())  # spectral norm looks closer at every call
        loss = loss + functional.softplus(-network(made.detach(), made)[1]).mean()
    loss.backward()
    learner.update(clips, torch.linspace(0, 1, clips.shape[1]).expand(len(clips), -1), POSITIONS)
    for found, expected in zip(learner.networks["generator"].parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_four_steps_of_the_discriminator_for_each_of_the_generator_at_rates_of_their_own():
    learner = learners.build(override(EXPERIMENT, {"optim.ema_decay": 0.5}), CPU)
    for _ in range(3):
        learner.update(CLIPS, TIMES, POSITIONS)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in learner.optimizers.items()
    }
    assert steps == {"generator": {3}, "discriminator": {12}}
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in learner.optimizers.items()}
    assert rates == {"generator": 1e-3, "discriminator": 3e-3}
    assert set(learner.networks) == {"generator", "generator_average", "discriminator"}
    assert learner.adversary.descents["discriminator"].average is None  # type: ignore[attr-defined]
    same = learners.build(override(EXPERIMENT, {"optim.discriminator_lr": None}), CPU)
    same.update(CLIPS, TIMES, POSITIONS)
    assert same.optimizers["discriminator"].param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_persuading_moves_what_is_made_and_nothing_else(loss: str):
    judge, made = Judge(), torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    against = adversary({"one": judge}, loss)
    cost = against.generator_loss(made)
    logits = (made.detach().mean((1, 3, 4)) * judge.weight.detach()).sum(1)
    slope = logits.sigmoid() - 1 if loss == "logistic" else -torch.ones(2)
    torch.testing.assert_close(cost.detach(), functional.softplus(-logits) if loss == "logistic" else -logits)
    cost.sum().backward()
    each = slope.view(2, 1, 1, 1, 1) * judge.weight.detach().view(1, 1, 3, 1, 1) / (3 * 4 * 4)
    torch.testing.assert_close(made.grad, each.expand_as(made))
    assert judge.weight.grad is None
    assert judge.weight.requires_grad
    torch.testing.assert_close(adversary({"a": judge, "b": judge}, loss).generator_loss(made), 2 * cost)


@pytest.mark.parametrize(("loss", "label"), [("logistic", 0.9), ("hinge", 1.0)])
def test_a_discriminators_step_follows_its_gradient_and_leaves_the_made_clips_alone(loss: str, label: float):
    judge = Judge()
    real, made = torch.rand(2, 4, 3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    made.requires_grad_()
    frames = [clips.detach().mean((1, 3, 4)) for clips in (real, made)]
    real_logits, made_logits = ((of * judge.weight.detach()).sum(1) for of in frames)
    if loss == "logistic":
        slopes = real_logits.sigmoid() - label, made_logits.sigmoid()
    else:
        slopes = -(real_logits < 1).float(), (made_logits > -1).float()
    expected = sum((slope[:, None] * of).mean(0) for slope, of in zip(slopes, frames, strict=True))
    before = judge.weight.detach().clone()
    named = adversary({"one": judge}, loss, label, lr=1e-2).update(real, made, step=0, weight=1.0)
    torch.testing.assert_close(judge.weight.grad, expected)
    torch.testing.assert_close(judge.weight.detach(), before - 1e-2 * expected.sign(), rtol=0, atol=1e-6)
    assert made.grad is None
    assert judge.calls == 1  # what DistributedDataParallel can follow
    assert named["d_real"] == pytest.approx(float(real_logits.mean()))


def test_the_sums_and_means_over_two_discriminators():
    real, made = torch.rand(2, 4, 3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    single, double = (
        adversary({name: Judge() for name in names}, "logistic").update(real, made, step=0, weight=1.0)
        for names in ("a", "ab")
    )
    torch.testing.assert_close(double, {**single, "d_loss": 2 * single["d_loss"]})


def test_making_clips_depends_on_ends_and_noise_and_not_on_the_batch():
    learner = learners.build(EXPERIMENT, CPU)
    learner.update(CLIPS, TIMES, POSITIONS)
    noise = noise_from_keys(1, range(8), 3)
    made = learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise)
    assert made.shape == CLIPS.shape
    assert made.dtype == torch.uint8
    assert torch.equal(learner.generate(CLIPS[2:3, 0], CLIPS[2:3, -1], noise[2:3]), made[2:3])
    generator = learner.networks["generator"].train()  # batch norm lifts a fresh network's faint signals
    start, end = to_floats(CLIPS[:, 0]), to_floats(CLIPS[:, -1])
    with torch.no_grad():
        first, other, turned = (
            generator(*given)[0] for given in ((start, end, noise), (start, end, -noise), (end, start, noise))
        )
    assert not torch.equal(first, other)
    assert not torch.equal(first, turned)
    with pytest.raises(ConfigError, match=r"frames: cgan makes clips of clip\.frames=6 \(value 5\)"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise, frames=5)
    assert learner.reconstruct(CLIPS) is None  # its generator sees no frames between


def test_it_learns_to_reproduce_the_ends():
    plain = CLIPS[:, :1, :1, :1].expand_as(CLIPS).contiguous()  # one colour each
    learner = learners.build(override(EXPERIMENT, {"optim.lr": 1e-2, "model.discriminator_updates": 1}), CPU)
    frame = [float(learner.update(plain, TIMES, POSITIONS)["frame_loss"]) for _ in range(30)]
    assert frame[-1] < 0.5 * frame[0]
