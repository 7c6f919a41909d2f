"""Training steps of the learners against their formulas, and several ranks against one with the whole batch."""

import copy
import math
import tempfile
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from giffy_ray import models
from giffy_ray.cluster.local import free_port
from giffy_ray.config import ConfigError, Experiment, OptimConfig, SpeedConfig, from_yaml, override, to_yaml
from giffy_ray.core import distributed
from giffy_ray.core.tensor_types import NonFiniteOutput, to_floats, to_pixels
from giffy_ray.models.layers import SyncBatchStatisticsNorm, convert_sync_batch_norm
from giffy_ray.models.sampling import noise_from_clip_ids, noise_from_keys
from giffy_ray.training import learners
from giffy_ray.training.learners.between import posterior_mask
from giffy_ray.training.learners.losses import gaussian_kl_between, relative_error
from giffy_ray.training.learners.optimized_module import OptimizedModule, lr_factor
from tests.conftest import in_float64
from tests.models.test_models import CGAN, DIRECT_3D, TWO_STREAM

CPU = torch.device("cpu")
CLIPS = torch.randint(0, 256, (8, 6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TIMES = torch.linspace(0, 1, 6).expand(8, -1)
SAMPLE_INDICES = torch.arange(96, 104)  # a whole step of 8
TINY_BETWEEN = {
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 16,
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
}


def test_cvae_loss_matches_equation_1(tiny: Experiment):
    experiment = override(tiny, {"model.reconstruction_weight": 0.7, "model.ends_weight": 3.0})
    learner = learners.build(experiment, CPU)
    twin = learners.build(experiment, CPU).networks["cvae"].train()

    target = to_floats(CLIPS)
    generated, mean, std = twin(target, noise_from_keys(0, SAMPLE_INDICES.tolist(), 3))
    kl = (0.5 * (mean**2 + std**2 - torch.log(std**2) - 1)).sum() / 8
    difference = generated - target
    reconstruction = (difference**2).sum() / 8
    ends = (difference[:, :, 0] ** 2).sum() / 8 + (difference[:, :, -1] ** 2).sum() / 8

    losses = learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["reconstruction"], reconstruction)
    torch.testing.assert_close(losses["ends"], ends)
    torch.testing.assert_close(losses["loss"], kl + 0.7 * reconstruction + 3.0 * ends)


def test_first_step_matches_adam(tiny: Experiment):
    """Adam's first step moves every weight by lr against the sign of its gradient (Kingma & Ba 2015, section 2.1)."""
    experiment = override(tiny, {"optim.lr": 1e-3})
    learner, before = learners.build(experiment, CPU), learners.build(experiment, CPU)
    learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    for new, old in zip(learner.networks["cvae"].parameters(), before.networks["cvae"].parameters(), strict=True):
        large = new.grad.abs() > 1e-3  # where epsilon is negligible
        expected = (old - 1e-3 * new.grad.sign())[large]
        torch.testing.assert_close(new[large], expected, rtol=0, atol=2e-6)
    assert learner.optimizers["cvae"].defaults["betas"] == (0.8, 0.999)


def test_training_reduces_the_loss(tiny: Experiment):
    plain = CLIPS[:, :1, :1, :1].expand_as(CLIPS).contiguous()  # one colour per clip, because noise cannot be learned
    learner = learners.build(override(tiny, {"optim.lr": 1e-2}), CPU)
    losses = [float(learner.update(plain, TIMES, SAMPLE_INDICES)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_generate_depends_only_on_endpoints_and_noise(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    noise = noise_from_keys(1, range(8), 3)
    generated = learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise)
    assert generated.shape == CLIPS.shape
    assert generated.dtype == torch.uint8
    single = learner.generate(CLIPS[2:3, 0], CLIPS[2:3, -1], noise[2:3])
    assert torch.equal(single, generated[2:3])  # a clip does not depend on the rest of the batch
    network = learner.networks["cvae"].train()  # batch norm amplifies the weak signals of an untrained network
    start = to_floats(CLIPS[:, 0])
    end = to_floats(CLIPS[:, -1])
    with torch.no_grad():
        assert not torch.equal(network.generate(start, end, noise), network.generate(start, end, -noise))
        assert not torch.equal(network.generate(start, end, noise), network.generate(end, start, noise))


def test_reconstruct_uses_the_posterior_mean(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    network = learner.networks["cvae"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # an untrained network generates grey clips for any input
        network.eval()
        target = to_floats(CLIPS)
        codes = network.image_encoder(target[:, :, 0]), network.image_encoder(target[:, :, -1])
        mean, _ = network.video_encoder(target, *codes)
        expected = to_pixels(network.generator(mean, *codes))
        prior_mean_clips = to_pixels(network.generator(torch.zeros_like(mean), *codes))
    reconstructed = learner.reconstruct(CLIPS)
    assert reconstructed is not None
    assert torch.equal(reconstructed, expected)
    assert not torch.equal(reconstructed, prior_mean_clips)


def test_noise_depends_only_on_seed_and_key():
    noise = noise_from_keys(3, [5, 6, 7], 4)
    assert torch.equal(noise_from_keys(3, [6], 4)[0], noise[1])
    assert not torch.equal(noise_from_keys(4, [6], 4)[0], noise[1])
    assert torch.equal(noise_from_clip_ids(3, ["b", "a"], 4)[1], noise_from_clip_ids(3, ["a"], 4)[0])
    assert noise_from_keys(0, range(2000), 8).mean().item() == pytest.approx(0, abs=0.03)
    assert noise_from_keys(0, range(2000), 8).std().item() == pytest.approx(1, abs=0.03)


def test_unsupported_requests_raise_config_errors(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    with pytest.raises(ConfigError, match=r"frames: cvae generates only clips of clip\.frames=6 \(value 7\)"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], torch.zeros(8, 3), frames=7)
    with pytest.raises(ConfigError, match=r"data\.segments\.frames: cvae .*6 \(value 4\)"):
        learners.build(override(tiny, {"data.segments.frames": 4}), CPU)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: .*cluster\.workers=2 \(value 2\)"):
        learners.build(override(tiny, {"train.global_batch_size": 2, "cluster.workers": 2}), CPU)
    learners.build(override(tiny, {"train.global_batch_size": 1, "model.batch_norm": False}), CPU)


def test_lr_factor_warms_up_linearly_and_decays_as_a_half_cosine():
    constant, cosine = OptimConfig(warmup_steps=4), OptimConfig(warmup_steps=4, schedule="cosine")
    assert [lr_factor(step, 20, constant) for step in (0, 1, 2, 3, 4, 19)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [lr_factor(step, 20, cosine) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert lr_factor(4, 20, cosine) == 1
    assert lr_factor(8, 20, cosine) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))  # a quarter of the way
    assert lr_factor(12, 20, cosine) == pytest.approx(0.5)
    assert lr_factor(20, 20, cosine) == lr_factor(99, 20, cosine) == pytest.approx(0)
    assert lr_factor(0, 1, OptimConfig()) == 1


def optimized_module(network: nn.Module, **optim) -> OptimizedModule:
    return OptimizedModule(network, OptimConfig(**optim), steps=20, speed=SpeedConfig())


def take_step(module: OptimizedModule, loss: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    return module.training_step(lambda _: (loss, {"loss": loss}), [torch.zeros(1)], step, weight=1.0)


def test_step_uses_the_learning_rate_of_its_number():
    """Adam's first step is the learning rate, against the sign of the gradient."""
    for step, rate in [(0, 0.25), (1, 0.5), (7, 1)]:
        layer = nn.Linear(3, 1, bias=False)
        before = layer.weight.detach().clone()
        take_step(optimized_module(layer, lr=1e-2, warmup_steps=4), layer.weight.sum(), step)
        torch.testing.assert_close(before - layer.weight.detach(), torch.full((1, 3), rate * 1e-2))


def test_weight_average_matches_a_plain_loop():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module = optimized_module(network, lr=0.1, ema_decay=0.5)
    states = []
    for step in range(9):
        take_step(module, network(torch.randn(4, 3)).square().sum(), step)
        states.append(copy.deepcopy(network.state_dict()))
    expected = states[0]
    for count, state in enumerate(states[1:], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in module.eval_module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.allclose(network[0].weight, expected["0.weight"])
    assert set(module.networks("net")) == {"net", "net_average"}
    assert optimized_module(network).eval_module is network


def test_weight_decay_is_decoupled():
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): without a gradient a weight shrinks by lr * decay."""
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    take_step(optimized_module(layer, lr=0.1, weight_decay=0.2), 0 * layer.weight.sum() + 0 * layer.bias.sum(), 0)
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.2))


@pytest.mark.parametrize(("norm", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradient_is_clipped_to_its_norm_and_keeps_its_direction(norm: float, expected: list[float]):
    layer = nn.Linear(2, 1, bias=False)
    gradients = []
    module = optimized_module(layer, max_grad_norm=norm)
    module.optimizer.register_step_pre_hook(lambda *_: gradients.append(layer.weight.grad))
    take_step(module, (layer.weight * torch.tensor([[3.0, 4.0]])).sum(), 0)
    torch.testing.assert_close(gradients, [torch.tensor([expected])], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])  # the squared gradient of 1e38 overflows
def test_step_with_a_non_finite_gradient_changes_nothing(scale: float):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    module = optimized_module(network, lr=0.1, ema_decay=0.5)
    assert not take_step(module, network.weight.square().sum(), 0)["skipped"]
    before = copy.deepcopy([network.state_dict(), module.average.state_dict(), module.optimizer.state_dict()])
    loss = (scale * network.weight * 1e10).square().sum()
    assert take_step(module, loss, 1)["skipped"] == 1
    after = [network.state_dict(), module.average.state_dict(), module.optimizer.state_dict()]
    assert str(after) == str(before)
    assert not take_step(module, network.weight.square().sum(), 2)["skipped"]


def test_non_finite_loss_with_a_finite_gradient_skips_the_step():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    assert take_step(optimized_module(layer), layer.weight.sum() + math.inf, 0)["skipped"] == 1
    assert torch.equal(layer.weight, before)


def test_micro_batches_change_only_rounding(tiny: Experiment):
    cvae = override(tiny, {"model.batch_norm": False, "optim.lr": 1e-3, "train.global_batch_size": 8})
    between = override(
        Experiment(), TINY_BETWEEN | {"train.global_batch_size": 8, "model.kl_weight": 0.0, "optim.lr": 1e-3}
    )
    for experiment in (cvae, between):
        micro_batched = override(experiment, {"speed.micro_batch_size": 3})
        whole_batch = train_weights(to_yaml(experiment))
        in_micro_batches = train_weights(to_yaml(micro_batched))
        torch.testing.assert_close(in_micro_batches, whole_batch, rtol=0, atol=1e-11)
        assert not torch.equal(in_micro_batches, train_weights(to_yaml(experiment), updates=0))
    with pytest.raises(ConfigError, match=r"speed\.micro_batch_size: .*\(value 3\)"):
        learners.build(override(Experiment(), CGAN | {"speed.micro_batch_size": 3}), CPU)


def test_bfloat16_and_channels_last_change_only_rounding(tiny: Experiment):
    experiment = override(tiny, {"model.batch_norm": False})
    clips, times, sample_indices = CLIPS[:4], TIMES[:4], SAMPLE_INDICES[:4]
    exact_loss = learners.build(experiment, CPU).update(clips, times, sample_indices)["loss"]
    channels_last = learners.build(override(experiment, {"speed.channels_last": True}), CPU)
    channels_last_loss = channels_last.update(clips, times, sample_indices)["loss"]
    bfloat16 = learners.build(override(experiment, {"speed.precision": "bfloat16"}), CPU)
    bfloat16_loss = bfloat16.update(clips, times, sample_indices)["loss"]
    torch.testing.assert_close(channels_last_loss, exact_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(bfloat16_loss, exact_loss, rtol=2e-2, atol=0)
    assert bfloat16_loss != exact_loss
    assert bfloat16_loss.dtype == torch.float32


def _run_rank(rank: int, world_size: int, port: int, yamls: list[str], folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    results = [train_weights(yaml, part) for yaml in yamls]
    if world_size == 2:
        results += [skipped_where_rank_1_fails(rank), delayed_flags_on_both(rank)]
    save_file({str(number): result.contiguous() for number, result in enumerate(results)}, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def skipped_where_rank_1_fails(rank: int) -> torch.Tensor:
    """Returns `skipped` of three steps, then the weights. Rank 1 has a non-finite loss, then a non-finite gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    module = optimized_module(layer, lr=0.1)
    skipped = []
    for failure in (0.0, math.inf, math.nan):
        inputs = torch.full((1, 2), failure if rank == 1 and math.isnan(failure) else 1.0)
        added = failure if rank == 1 and math.isinf(failure) else 0.0
        losses = module.training_step(
            lambda inputs, added=added: (module(inputs).sum() + added, {}), [inputs], 0, weight=1.0
        )
        skipped.append(losses["skipped"])
    return torch.cat([torch.stack(skipped), nn.utils.parameters_to_vector(layer.parameters()).detach()])


def delayed_flags_on_both(rank: int) -> torch.Tensor:
    """Results of four calls: rank 1 sets the first flag in the first call, rank 0 the second flag in the second."""
    any_reduce = distributed.DelayedAnyReduce(CPU)
    calls = [[rank == 1, False], [False, rank == 0], [False, False], [False, False]]
    results = torch.tensor([any_reduce(flags) for flags in calls])
    assert any_reduce.wait() == [False, False]
    return results


KL = TINY_BETWEEN | {"train.global_batch_size": 8, "optim.lr": 1e-3, "model.kl_weight": 0.5, "model.kl_warmup_steps": 0}
ADVERSARIAL = {"model.adversarial_weight": 0.3, "model.discriminator_widths": (4, 6, 8)}


@in_float64()
def train_weights(yaml: str, part: slice = slice(8), updates: int = 3) -> torch.Tensor:
    """Returns the concatenated weights of all networks of a learner after some updates in float64."""
    experiment = from_yaml(yaml)
    learner = learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    for _ in range(updates):
        learner.update(clips[part], TIMES[part], SAMPLE_INDICES[part])
    networks = learner.networks.values()
    return torch.cat([nn.utils.parameters_to_vector(network.parameters()) for network in networks]).detach()


def train_weights_on_ranks(world_size: int, yamls: list[str]) -> list[list[torch.Tensor]]:
    """Returns for each rank, which gets its part of the clips, the results of `train_weights` for each experiment."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (world_size, free_port(), yamls, folder), nprocs=world_size)
        files = [load_file(f"{folder}/{rank}") for rank in range(world_size)]
    return [[tensors[str(number)] for number in range(len(tensors))] for tensors in files]


def test_two_ranks_equal_each_other_and_one_rank_with_the_whole_batch(tiny: Experiment):
    cgan = override(Experiment(), CGAN | {"model.batch_norm": False})
    # Batch norm sees only one rank's clips, so it is off for the comparison with a single rank.
    plain = [
        to_yaml(override(experiment, {"model.batch_norm": False, "optim.lr": 1e-3})) for experiment in (tiny, cgan)
    ]
    normalized_changes = [CGAN | {"optim.ema_decay": 0.5}, TWO_STREAM, DIRECT_3D | {"model.reconstruction_weight": 1.0}]
    normalized = [to_yaml(override(Experiment(), changes)) for changes in normalized_changes]
    first, second = train_weights_on_ranks(2, plain + normalized)
    flags = first.pop()
    assert torch.equal(flags, second.pop())
    assert flags.tolist() == [[False, False], [True, False], [False, True], [False, False]]
    failures = first.pop()
    assert torch.equal(failures, second.pop())
    assert failures[:3].tolist() == [0, 1, 1]
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    initial = nn.utils.parameters_to_vector(layer.parameters()).detach()
    after_one_step = initial - 0.1  # Adam's step: the gradient is positive
    torch.testing.assert_close(failures[3:], after_one_step, rtol=0, atol=1e-6)
    for first_weights, second_weights in zip(first, second, strict=True):
        assert torch.equal(first_weights, second_weights)
    for yaml, weights in zip(plain, first, strict=False):
        torch.testing.assert_close(train_weights(yaml), weights, rtol=0, atol=1e-11)
        assert float((weights - train_weights(yaml, updates=0)).abs().max()) > 1e-3


def test_between_does_not_depend_on_ranks_or_micro_batches():
    """KL is a mean over the clips from the posterior, of which the ranks have 3, 3 and 2 of 8."""
    variants = [
        {"model.posterior_fraction": 0.5, "model.free_nats": 0.02},
        {"model.posterior_fraction": 0.3, "model.free_nats": 0.0},
    ]
    variants.append(variants[0] | ADVERSARIAL)
    experiments = [override(Experiment(), KL | changes) for changes in variants]
    micro_batched = [
        override(experiment, {"speed.micro_batch_size": size}) for experiment in experiments[:2] for size in (1, 3)
    ]
    expected = [train_weights(to_yaml(experiment)) for experiment in experiments]
    for experiment, weights in zip(experiments, expected, strict=True):
        without_kl = train_weights(to_yaml(override(experiment, {"model.kl_weight": 0.0})))
        assert (weights - without_kl).abs().max() > 1e-4
    expected += [weights for weights in expected[:2] for _ in range(2)]
    yamls = [to_yaml(experiment) for experiment in (*experiments, *micro_batched)]
    single_rank = [train_weights(yaml) for yaml in yamls]
    for results in (single_rank, *train_weights_on_ranks(3, yamls)):
        for weights, expected_weights in zip(results, expected, strict=True):
            torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-11)


def test_posterior_mask_depends_only_on_sample_indices():
    for fraction in (0.0, 0.3, 0.5, 1.0):
        mask = posterior_mask(torch.arange(1000), fraction)
        assert int(mask.sum()) == round(1000 * fraction)
        assert torch.equal(posterior_mask(torch.arange(500, 700), fraction), mask[500:700])
        gaps = torch.diff(mask.nonzero().flatten())
        assert not fraction or int(gaps.max() - gaps.min()) <= 1
    assert posterior_mask(torch.arange(10**9, 10**9 + 10), 0.5).sum() == 5


def test_between_metrics_are_means_over_their_own_clips():
    learner = learners.build(
        override(Experiment(), KL | {"model.posterior_fraction": 0.3, "model.free_nats": 0.0}), CPU
    )
    network = learner.networks["between"]
    from_posterior = posterior_mask(SAMPLE_INDICES, 0.3)
    noise = noise_from_keys(0, SAMPLE_INDICES.tolist(), 2)
    assert int(from_posterior.sum()) == 3
    target = to_floats(CLIPS)
    with torch.no_grad():
        for parameter in network.parameters():  # heads start at zero, where prior and posterior give the same frames
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
        generated, *distributions = network(target, TIMES, noise, from_posterior)
        relative = relative_error(generated, target, TIMES, learner.config.error_epsilon)  # type: ignore[attr-defined]
        kl = gaussian_kl_between(*distributions)
    metrics = learner.update(CLIPS, TIMES, SAMPLE_INDICES)
    mean_kl = kl[from_posterior].sum(1).mean()
    torch.testing.assert_close(metrics["kl"], mean_kl)
    torch.testing.assert_close(metrics["posterior_error"], relative[from_posterior].mean())
    torch.testing.assert_close(metrics["prior_error"], relative[~from_posterior].mean())
    torch.testing.assert_close(metrics["loss"], relative.mean() + 0.5 * mean_kl)


ALL_MODELS = [
    pytest.param({}, id="cvae"),
    pytest.param({"model.image_batch_statistics": True}, id="cvae, batch statistics"),
    *(pytest.param(changes, id=changes["model.kind"]) for changes in (CGAN, TWO_STREAM, DIRECT_3D)),
    pytest.param(KL | ADVERSARIAL, id="between"),
]


def _state_of(learner: learners.Learner) -> dict[str, Tensor]:
    networks = {
        f"{name} {key}": value for name, net in learner.networks.items() for key, value in net.state_dict().items()
    }
    optimizers = {
        f"{name} {number} {key}": value
        for name, optimizer in learner.optimizers.items()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return {name: value.clone() for name, value in (networks | optimizers).items()}


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_skipped_step_restores_weights_statistics_averages_and_optimizers(tiny: Experiment, changes: dict):
    """The generator's first convolution returns NaN, as if its input had overflowed."""
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes | {"optim.ema_decay": 0.9})
    learner = learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    times = torch.linspace(0, 1, clips.shape[1]).expand(8, -1)
    assert not learner.update(clips, times, SAMPLE_INDICES)["skipped"]
    before = _state_of(learner)
    network = next(iter(learner.networks.values()))
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    hook = layer.register_forward_hook(lambda module, inputs, output: output * math.nan)
    assert learner.update(clips, times, SAMPLE_INDICES + 8)["skipped"]
    hook.remove()
    after = _state_of(learner)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert not learner.update(clips, times, SAMPLE_INDICES + 8)["skipped"]
    assert all(value.isfinite().all() for value in _state_of(learner).values())


@pytest.mark.parametrize("changes", [CGAN, KL | ADVERSARIAL], ids=["cgan", "between"])
def test_skipped_discriminator_step_is_counted(changes: dict):
    learner = learners.build(override(Experiment(), changes), CPU)
    discriminator = learner.networks["discriminator"]
    before = _state_of(learner)
    weight = next(iter(discriminator.parameters()))
    weight.register_hook(lambda gradient: gradient * math.nan)
    assert learner.update(CLIPS, TIMES, SAMPLE_INDICES)["skipped"] >= 1
    after = _state_of(learner)
    unchanged = [name for name in before if name.startswith("discriminator") and torch.equal(before[name], after[name])]
    assert [name for name in discriminator.state_dict() if f"discriminator {name}" in unchanged]
    assert all(value.isfinite().all() for value in after.values())
    parameters = {f"discriminator {name}" for name, _ in discriminator.named_parameters()}
    assert parameters <= set(unchanged)


def test_non_finite_output_raises(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    with torch.no_grad():
        next(iter(learner.networks["cvae"].parameters())).fill_(math.nan)
    with pytest.raises(NonFiniteOutput, match="not finite"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], torch.zeros(8, 3))
    with pytest.raises(NonFiniteOutput):
        learner.reconstruct(CLIPS)


class _SyncDetector(TorchDispatchMode):
    """Records ops that synchronize the CPU with a GPU: reading a value, boolean indices, copies of Python lists."""

    def __init__(self):
        super().__init__()
        self.synchronizing_ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else []
        if (
            (name in ("_local_scalar_dense", "is_nonzero", "equal") and args[0].is_meta)
            or name in ("nonzero", "masked_select")
            or any(index is not None and (index.dtype == torch.bool or not index.is_meta) for index in indices)
        ):
            self.synchronizing_ops.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_step_does_not_synchronize_with_the_gpu(tiny: Experiment, changes: dict, monkeypatch: pytest.MonkeyPatch):
    """Runs on the meta device, whose tensors have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not support the meta device
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes | {"optim.ema_decay": 0.9})
    learner = learners.build(experiment, torch.device("meta"))
    for optimizer in learner.optimizers.values():
        monkeypatch.setattr(optimizer, "step", lambda: None)  # nor does the fused optimizer
    frames = experiment.clip.frames
    clips = torch.zeros(8, frames, experiment.clip.height, experiment.clip.width, 3, dtype=torch.uint8)
    with _SyncDetector() as detector:
        learner.update(clips, torch.linspace(0, 1, frames).expand(8, -1), SAMPLE_INDICES)
    assert detector.synchronizing_ops == []


def test_sync_batch_norm_keeps_layers_that_use_batch_statistics(tiny: Experiment):
    torch.manual_seed(0)
    network = models.build(override(tiny, {"model.image_batch_statistics": True}).model, tiny.clip)
    plain = copy.deepcopy(network)
    kinds = {name: type(module) for name, module in network.named_modules() if "BatchNorm" in type(module).__name__}
    synced = convert_sync_batch_norm(network)
    assert list(synced.state_dict()) == list(plain.state_dict())
    for name, kind in kinds.items():
        expected = SyncBatchStatisticsNorm if "ByBatch" in kind.__name__ else nn.SyncBatchNorm
        assert type(synced.get_submodule(name)) is expected, name
    assert {SyncBatchStatisticsNorm, nn.SyncBatchNorm} <= {type(module) for module in synced.modules()}
    ends = to_floats(CLIPS[:, 0]), to_floats(CLIPS[:, -1])
    noise = torch.randn(8, 3)
    with torch.no_grad():
        torch.testing.assert_close(synced.eval().generate(*ends, noise), plain.eval().generate(*ends, noise))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed.micro_batch_size": 1}, r"speed\.micro_batch_size: batch norm .*\(value 1\)"),
        ({"optim.discriminator_lr": 1e-3}, r"optim\.discriminator_lr: model\.kind=cvae trains no discriminator"),
        (TINY_BETWEEN | {"optim.discriminator_lr": 1e-3}, r"optim\.discriminator_lr: .*adversarial_weight"),
        (
            {"data.segments.frames": 6, "data.segments.frame_times": "jittered"},
            r"data\.segments\.frame_times: model\.kind=cvae assumes evenly spaced frames \(value 'jittered'\)",
        ),
        (
            TINY_BETWEEN | {"data.segments.frame_times": "jittered"},
            r"data\.segments\.frame_times: applies only to segments of videos.*data\.segments\.frames=0",
        ),
        (
            KL | ADVERSARIAL | {"data.segments.frames": 4, "data.segments.frame_times": "jittered"},
            r"data\.segments\.frame_times: the discriminator .*evenly spaced",
        ),
    ],
)
def test_fields_with_no_effect_or_a_wrong_effect_are_rejected(tiny: Experiment, changes: dict, message: str):
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes)
    with pytest.raises(ConfigError, match=message):
        learners.check(experiment)
    learners.build(experiment, CPU)  # a checkpoint of such a training can still generate clips


def test_panning_without_cropping_is_rejected():
    with pytest.raises(ConfigError, match=r"data\.augment\.pan: .*crop below 1 \(value 0\.5\)"):
        learners.check(override(Experiment(), {"data.augment.pan": 0.5}))
    learners.check(override(Experiment(), {"data.augment.pan": 0.5, "data.augment.crop": 0.9}))


def test_two_stream_frame_weight_depends_on_the_frame_size():
    """The authors' weight is 10 on the mean over a frame in -1..1, whose absolute differences are twice ours."""
    learner = learners.build(override(Experiment(), TWO_STREAM), CPU)
    clip = learner.experiment.clip  # type: ignore[attr-defined]
    assert learner.frame_weight == 10 * 2 / (3 * clip.height * clip.width)  # type: ignore[attr-defined]
    fixed = override(Experiment(), TWO_STREAM | {"model.frame_weight": 0.5})
    assert learners.build(fixed, CPU).frame_weight == 0.5  # type: ignore[attr-defined]
    at_64 = override(Experiment(), TWO_STREAM | {"clip.height": 64, "clip.width": 64})
    assert learners.build(at_64, torch.device("meta")).frame_weight == 20 / 12288  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "required"),
    [
        ({"data.segments.shortest_s": 2.0}, "data.segments.frames"),
        ({"data.cache_decoded": False, "data.cache_max_gb": 3.0}, "data.cache_decoded"),
        ({"model.batch_norm": False, "model.image_batch_statistics": True}, "model.batch_norm"),
        ({"model.batch_norm": False, "speed.sync_batch_norm": True}, "model.batch_norm"),
        ({"model.kind": "cgan", "model.adversarial_loss": "hinge", "model.real_label": 0.8}, "model.adversarial_loss"),
        ({"model.kind": "between", "model.adversarial_from_step": 9}, "model.adversarial_weight"),
        ({"model.kind": "between", "model.discriminator_widths": (2, 2, 2)}, "model.adversarial_weight"),
        ({"model.kind": "between", "model.kl_weight": 0, "model.free_nats": 1.0}, "model.kl_weight"),
        ({"model.kind": "between", "model.posterior_fraction": 0, "model.kl_weight": 1.0}, "model.posterior_fraction"),
    ],
)
def test_field_without_the_field_it_requires_is_rejected(changes: dict, required: str):
    experiment, field = override(Experiment(), changes), list(changes)[-1]
    with pytest.raises(ConfigError, match=rf"{field}: has no effect with {required}=".replace(".", r"\.")):
        learners.check(experiment)
    learners.check(experiment, searched=[required])  # the field has an effect in other trials


def test_default_values_require_no_other_field():
    hinge = {"model.kind": "cgan", "model.adversarial_loss": "hinge"}
    for changes in (hinge, {"model.kind": "between", "model.kl_weight": 0}, {"model.batch_norm": False}):
        learners.check(override(Experiment(), changes))


def test_sync_batch_norm_is_rejected_for_between():
    with pytest.raises(ConfigError, match=r"speed\.sync_batch_norm: model\.kind=between"):
        learners.check(override(Experiment(), {"model.kind": "between", "speed.sync_batch_norm": True}))
