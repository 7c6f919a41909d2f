"""One step in process, against the formula written out; two workers against one with twice the batch."""

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
from giffy_ray.models.layers import SyncByBatchNorm, convert_sync_batch_norm
from giffy_ray.models.sampling import noise_from_clip_ids, noise_from_keys
from giffy_ray.training import learners
from giffy_ray.training.learners.between import is_sampled
from giffy_ray.training.learners.losses import gaussian_kl_between, relative_error
from giffy_ray.training.learners.optimized_module import OptimizedModule, rate_at
from tests.conftest import in_float64
from tests.models.test_models import CGAN, DIRECT_3D, TWO_STREAM

CPU = torch.device("cpu")
CLIPS = torch.randint(0, 256, (8, 6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TIMES = torch.linspace(0, 1, 6).expand(8, -1)
POSITIONS = torch.arange(96, 104)  # a whole step of 8
TINY_BETWEEN = {
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 16,
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
}


def test_the_loss_is_equation_1(tiny: Experiment):
    experiment = override(tiny, {"model.reconstruction_weight": 0.7, "model.ends_weight": 3.0})
    learner = learners.build(experiment, CPU)
    twin = learners.build(experiment, CPU).networks["cvae"].train()

    real = to_floats(CLIPS)
    made, mean, std = twin(real, noise_from_keys(0, POSITIONS.tolist(), 3))
    kl = (0.5 * (mean**2 + std**2 - torch.log(std**2) - 1)).sum() / 8
    whole = ((made - real) ** 2).sum() / 8
    ends = (((made - real)[:, :, 0]) ** 2).sum() / 8 + (((made - real)[:, :, -1]) ** 2).sum() / 8

    losses = learner.update(CLIPS, TIMES, POSITIONS)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["reconstruction"], whole)
    torch.testing.assert_close(losses["ends"], ends)
    torch.testing.assert_close(losses["loss"], kl + 0.7 * whole + 3.0 * ends)


def test_a_step_is_adams(tiny: Experiment):
    """Adam's first step moves every weight by lr against the sign of its gradient (Kingma & Ba 2015, section 2.1)."""
    experiment = override(tiny, {"optim.lr": 1e-3})
    learner, before = learners.build(experiment, CPU), learners.build(experiment, CPU)
    learner.update(CLIPS, TIMES, POSITIONS)
    for new, old in zip(learner.networks["cvae"].parameters(), before.networks["cvae"].parameters(), strict=True):
        steady = new.grad.abs() > 1e-3  # where epsilon does not count
        expected = (old - 1e-3 * new.grad.sign())[steady]
        torch.testing.assert_close(new[steady], expected, rtol=0, atol=2e-6)
    assert learner.optimizers["cvae"].defaults["betas"] == (0.8, 0.999)


def test_steps_make_the_loss_smaller(tiny: Experiment):
    plain = CLIPS[:, :1, :1, :1].expand_as(CLIPS).contiguous()  # one colour each: noise cannot be learned
    learner = learners.build(override(tiny, {"optim.lr": 1e-2}), CPU)
    losses = [float(learner.update(plain, TIMES, POSITIONS)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_making_clips_needs_only_the_ends_and_depends_on_the_noise(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    learner.update(CLIPS, TIMES, POSITIONS)
    noise = noise_from_keys(1, range(8), 3)
    made = learner.generate(CLIPS[:, 0], CLIPS[:, -1], noise)
    assert made.shape == CLIPS.shape
    assert made.dtype == torch.uint8
    one = learner.generate(CLIPS[2:3, 0], CLIPS[2:3, -1], noise[2:3])
    assert torch.equal(one, made[2:3])  # a clip does not depend on those beside it
    network = learner.networks["cvae"].train()  # batch norm lifts a fresh network's faint signals
    ends = to_floats(CLIPS[:, 0]), to_floats(CLIPS[:, -1])
    with torch.no_grad():
        assert not torch.equal(network.generate(*ends, noise), network.generate(*ends, -noise))
        assert not torch.equal(network.generate(*ends, noise), network.generate(*ends[::-1], noise))


def test_a_clip_is_made_again_from_the_mean_of_q(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    network = learner.networks["cvae"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # a fresh network's clips are grey, whatever it sees
        network.eval()
        real = to_floats(CLIPS)
        codes = network.image_encoder(real[:, :, 0]), network.image_encoder(real[:, :, -1])
        mean, _ = network.video_encoder(real, *codes)
        expected = to_pixels(network.generator(mean, *codes))
        from_the_prior = to_pixels(network.generator(torch.zeros_like(mean), *codes))
    again = learner.reconstruct(CLIPS)
    assert again is not None
    assert torch.equal(again, expected)
    assert not torch.equal(again, from_the_prior)


def test_noise_depends_on_seed_and_key_only():
    many = noise_from_keys(3, [5, 6, 7], 4)
    assert torch.equal(noise_from_keys(3, [6], 4)[0], many[1])
    assert not torch.equal(noise_from_keys(4, [6], 4)[0], many[1])
    assert torch.equal(noise_from_clip_ids(3, ["b", "a"], 4)[1], noise_from_clip_ids(3, ["a"], 4)[0])
    assert noise_from_keys(0, range(2000), 8).mean().item() == pytest.approx(0, abs=0.03)
    assert noise_from_keys(0, range(2000), 8).std().item() == pytest.approx(1, abs=0.03)


def test_what_the_learner_cannot_do_is_refused(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    with pytest.raises(ConfigError, match=r"frames: cvae makes clips of clip\.frames=6 \(value 7\)"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], torch.zeros(8, 3), frames=7)
    with pytest.raises(ConfigError, match=r"data\.segments\.frames: cvae .*6 \(value 4\)"):
        learners.build(override(tiny, {"data.segments.frames": 4}), CPU)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: .*cluster\.workers=2 \(value 2\)"):
        learners.build(override(tiny, {"train.global_batch_size": 2, "cluster.workers": 2}), CPU)
    learners.build(override(tiny, {"train.global_batch_size": 1, "model.batch_norm": False}), CPU)


def test_the_learning_rate_rises_evenly_and_falls_as_half_a_cosine():
    constant, cosine = OptimConfig(warmup_steps=4), OptimConfig(warmup_steps=4, schedule="cosine")
    assert [rate_at(step, 20, constant) for step in (0, 1, 2, 3, 4, 19)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_at(step, 20, cosine) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert rate_at(4, 20, cosine) == 1
    assert rate_at(8, 20, cosine) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))  # a quarter of the way
    assert rate_at(12, 20, cosine) == pytest.approx(0.5)
    assert rate_at(20, 20, cosine) == rate_at(99, 20, cosine) == pytest.approx(0)
    assert rate_at(0, 1, OptimConfig()) == 1


def descent_of(network: nn.Module, **optim) -> OptimizedModule:
    return OptimizedModule(network, OptimConfig(**optim), steps=20, speed=SpeedConfig())


def descend(descent: OptimizedModule, loss: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    return descent.training_step(lambda _: (loss, {"loss": loss}), [torch.zeros(1)], step, weight=1.0)


def test_each_step_takes_the_rate_of_its_place():
    """Adam's first step is the learning rate, against the sign of the gradient."""
    for step, rate in [(0, 0.25), (1, 0.5), (7, 1)]:
        layer = nn.Linear(3, 1, bias=False)
        before = layer.weight.detach().clone()
        descend(descent_of(layer, lr=1e-2, warmup_steps=4), layer.weight.sum(), step)
        torch.testing.assert_close(before - layer.weight.detach(), torch.full((1, 3), rate * 1e-2))


def test_the_average_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    descent, seen = descent_of(network, lr=0.1, ema_decay=0.5), []
    for step in range(9):
        descend(descent, network(torch.randn(4, 3)).square().sum(), step)
        seen.append(copy.deepcopy(network.state_dict()))
    expected = seen[0]
    for count, state in enumerate(seen[1:], start=1):
        kept = min(0.5, (1 + count) / (10 + count))
        for name, value in state.items():
            expected[name] = kept * expected[name] + (1 - kept) * value if value.is_floating_point() else value
    for name, value in descent.eval_module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.allclose(network[0].weight, expected["0.weight"])
    assert set(descent.networks("net")) == {"net", "net_average"}
    assert descent_of(network).eval_module is network


def test_weight_decay_is_decoupled():
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): without a gradient a weight shrinks by lr * decay."""
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    descend(descent_of(layer, lr=0.1, weight_decay=0.2), 0 * layer.weight.sum() + 0 * layer.bias.sum(), 0)
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.2))


@pytest.mark.parametrize(("norm", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_the_gradient_is_cut_to_its_norm_and_keeps_its_direction(norm: float, expected: list[float]):
    layer, seen = nn.Linear(2, 1, bias=False), []
    descent = descent_of(layer, max_grad_norm=norm)
    descent.optimizer.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad))
    descend(descent, (layer.weight * torch.tensor([[3.0, 4.0]])).sum(), 0)
    torch.testing.assert_close(seen, [torch.tensor([expected])], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])  # the gradient of the last overflows where it is squared
def test_a_step_without_a_finite_gradient_changes_nothing(scale: float):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    descent = descent_of(network, lr=0.1, ema_decay=0.5)
    assert not descend(descent, network.weight.square().sum(), 0)["skipped"]
    before = copy.deepcopy([network.state_dict(), descent.average.state_dict(), descent.optimizer.state_dict()])
    loss = (scale * network.weight * 1e10).square().sum()
    assert descend(descent, loss, 1)["skipped"] == 1
    after = [network.state_dict(), descent.average.state_dict(), descent.optimizer.state_dict()]
    assert str(after) == str(before)
    assert not descend(descent, network.weight.square().sum(), 2)["skipped"]


def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is_finite():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    assert descend(descent_of(layer), layer.weight.sum() + math.inf, 0)["skipped"] == 1
    assert torch.equal(layer.weight, before)


def test_micro_batches_change_nothing_but_rounding(tiny: Experiment):
    whole = override(tiny, {"model.batch_norm": False, "optim.lr": 1e-3, "train.global_batch_size": 8})
    between = override(
        Experiment(), TINY_BETWEEN | {"train.global_batch_size": 8, "model.kl_weight": 0.0, "optim.lr": 1e-3}
    )
    for experiment in (whole, between):
        parts = override(experiment, {"speed.micro_batch_size": 3})
        together, apart = (trained(to_yaml(each)) for each in (experiment, parts))
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-11)
        assert not torch.equal(apart, trained(to_yaml(experiment), updates=0))
    with pytest.raises(ConfigError, match=r"speed\.micro_batch_size: .*\(value 3\)"):
        learners.build(override(Experiment(), CGAN | {"speed.micro_batch_size": 3}), CPU)


def test_bfloat16_and_channels_last_round_and_nothing_else(tiny: Experiment):
    experiment = override(tiny, {"model.batch_norm": False})
    clips, times, positions = CLIPS[:4], TIMES[:4], POSITIONS[:4]
    exact = learners.build(experiment, CPU).update(clips, times, positions)
    last = learners.build(override(experiment, {"speed.channels_last": True}), CPU).update(clips, times, positions)
    narrow = learners.build(override(experiment, {"speed.precision": "bfloat16"}), CPU).update(clips, times, positions)
    torch.testing.assert_close(last["loss"], exact["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(narrow["loss"], exact["loss"], rtol=2e-2, atol=0)
    assert narrow["loss"] != exact["loss"]
    assert narrow["loss"].dtype == torch.float32


def _worker(rank: int, workers: int, port: int, yamls: list[str], folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    share = slice(rank * 8 // workers, (rank + 1) * 8 // workers)
    results = [trained(yaml, share) for yaml in yamls]
    if workers == 2:
        results += [skipped_where_rank_1_fails(rank), heard_of_both(rank)]
    save_file({str(number): each.contiguous() for number, each in enumerate(results)}, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def skipped_where_rank_1_fails(rank: int) -> torch.Tensor:
    """`skipped` of three steps, of which rank 1 has no finite loss, then no finite gradient; then the weights."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    descent, skipped = descent_of(layer, lr=0.1), []
    for failure in (0.0, math.inf, math.nan):
        inputs = torch.full((1, 2), failure if rank == 1 and math.isnan(failure) else 1.0)
        added = failure if rank == 1 and math.isinf(failure) else 0.0
        losses = descent.training_step(lambda one, more=added: (descent(one).sum() + more, {}), [inputs], 0, weight=1.0)
        skipped.append(losses["skipped"])
    return torch.cat([torch.stack(skipped), nn.utils.parameters_to_vector(layer.parameters()).detach()])


def heard_of_both(rank: int) -> torch.Tensor:
    """What four calls hear, where rank 1 sets the first flag at the first, and rank 0 the second at the second."""
    any_of_each = distributed.DelayedAnyReduce(CPU)
    said = [[rank == 1, False], [False, rank == 0], [False, False], [False, False]]
    heard = torch.tensor([any_of_each(flags) for flags in said])
    assert any_of_each.end() == [False, False]
    return heard


KL = TINY_BETWEEN | {"train.global_batch_size": 8, "optim.lr": 1e-3, "model.kl_weight": 0.5, "model.kl_warmup_steps": 0}
ADVERSARIAL = {"model.adversarial_weight": 0.3, "model.discriminator_widths": (4, 6, 8)}


@in_float64()
def trained(yaml: str, share: slice = slice(8), updates: int = 3) -> torch.Tensor:
    """The weights of all the learner's networks after some updates in float64, one after the other."""
    experiment = from_yaml(yaml)
    learner = learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    for _ in range(updates):
        learner.update(clips[share], TIMES[share], POSITIONS[share])
    networks = learner.networks.values()
    return torch.cat([nn.utils.parameters_to_vector(network.parameters()) for network in networks]).detach()


def trained_by(workers: int, yamls: list[str]) -> list[list[torch.Tensor]]:
    """For each worker, which has its share of the clips, what `trained` returns for each experiment."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (workers, free_port(), yamls, folder), nprocs=workers)
        files = [load_file(f"{folder}/{rank}") for rank in range(workers)]
    return [[tensors[str(number)] for number in range(len(tensors))] for tensors in files]


def test_two_workers_equal_each_other_and_one_with_twice_the_batch(tiny: Experiment):
    cgan = override(Experiment(), CGAN | {"model.batch_norm": False})
    # Batch norm looks at one worker's clips only, so it is off where they are to equal one.
    plain = [to_yaml(override(each, {"model.batch_norm": False, "optim.lr": 1e-3})) for each in (tiny, cgan)]
    others = [CGAN | {"optim.ema_decay": 0.5}, TWO_STREAM, DIRECT_3D | {"model.reconstruction_weight": 1.0}]
    normalised = [to_yaml(override(Experiment(), each)) for each in others]
    first, second = trained_by(2, plain + normalised)
    heard = first.pop()
    assert torch.equal(heard, second.pop())
    assert heard.tolist() == [[False, False], [True, False], [False, True], [False, False]]
    failures = first.pop()
    assert torch.equal(failures, second.pop())
    assert failures[:3].tolist() == [0, 1, 1]
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    after_one_step = (
        nn.utils.parameters_to_vector(layer.parameters()).detach() - 0.1
    )  # Adam's: the gradient is positive
    torch.testing.assert_close(failures[3:], after_one_step, rtol=0, atol=1e-6)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for yaml, one in zip(plain, first, strict=False):
        torch.testing.assert_close(trained(yaml), one, rtol=0, atol=1e-11)
        assert float((one - trained(yaml, updates=0)).abs().max()) > 1e-3


def test_between_does_not_depend_on_workers_or_micro_batches():
    """Its KL is a mean over the clips made from q, of which each worker has another number: 3, 3 and 2 clips of 8."""
    shares = [{"model.posterior_fraction": share, "model.free_nats": free} for share, free in ((0.5, 0.02), (0.3, 0.0))]
    experiments = [override(Experiment(), KL | each) for each in (*shares, shares[0] | ADVERSARIAL)]
    parts = [override(each, {"speed.micro_batch_size": size}) for each in experiments[:2] for size in (1, 3)]
    expected = [trained(to_yaml(each)) for each in experiments]
    expected += [each for each in expected[:2] for _ in range(2)]
    for each, weights in zip(experiments, expected, strict=False):
        assert (weights - trained(to_yaml(override(each, {"model.kl_weight": 0.0})))).abs().max() > 1e-4
    yamls = [to_yaml(each) for each in (*experiments, *parts)]
    alone = [trained(yaml) for yaml in yamls]
    for found in (alone, *trained_by(3, yamls)):
        for weights, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-11)


def test_which_clips_are_made_from_q_follows_from_their_positions():
    for share in (0.0, 0.3, 0.5, 1.0):
        chosen = is_sampled(torch.arange(1000), share)
        assert int(chosen.sum()) == round(1000 * share)
        assert torch.equal(is_sampled(torch.arange(500, 700), share), chosen[500:700])
        gaps = torch.diff(chosen.nonzero().flatten())
        assert not share or int(gaps.max() - gaps.min()) <= 1
    assert is_sampled(torch.arange(10**9, 10**9 + 10), 0.5).sum() == 5


def test_the_losses_of_between_are_means_over_the_clips_they_are_of():
    learner = learners.build(
        override(Experiment(), KL | {"model.posterior_fraction": 0.3, "model.free_nats": 0.0}), CPU
    )
    network = learner.networks["between"]
    sampled, noise = is_sampled(POSITIONS, 0.3), noise_from_keys(0, POSITIONS.tolist(), 2)
    assert int(sampled.sum()) == 3
    real = to_floats(CLIPS)
    with torch.no_grad():
        for parameter in network.parameters():  # whose heads start from zero, where prior and q make the same frames
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
        made, *distributions = network(real, TIMES, noise, sampled)
        relative = relative_error(made, real, TIMES, learner.model.error_epsilon)  # type: ignore[attr-defined]
        kl = gaussian_kl_between(*distributions)
    named = learner.update(CLIPS, TIMES, POSITIONS)
    torch.testing.assert_close(named["kl"], kl[sampled].sum(1).mean())
    torch.testing.assert_close(named["posterior_error"], relative[sampled].mean())
    torch.testing.assert_close(named["prior_error"], relative[~sampled].mean())
    torch.testing.assert_close(named["loss"], relative.mean() + 0.5 * kl[sampled].sum(1).mean())


ALL_MODELS = [
    pytest.param({}, id="cvae"),
    pytest.param({"model.image_batch_statistics": True}, id="cvae, batch statistics"),
    *(pytest.param(each, id=each["model.kind"]) for each in (CGAN, TWO_STREAM, DIRECT_3D)),
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
def test_a_skipped_step_leaves_no_trace_in_weights_statistics_averages_and_optimisers(tiny: Experiment, changes: dict):
    """The generator's first convolution is made to return NaN, as one whose input overflows does."""
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes | {"optim.ema_decay": 0.9})
    learner = learners.build(experiment, CPU)
    clips = CLIPS.repeat_interleave(experiment.clip.frames // CLIPS.shape[1], dim=1)
    times = torch.linspace(0, 1, clips.shape[1]).expand(8, -1)
    assert not learner.update(clips, times, POSITIONS)["skipped"]
    before = _state_of(learner)
    network = next(iter(learner.networks.values()))
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    hook = layer.register_forward_hook(lambda module, inputs, output: output * math.nan)
    assert learner.update(clips, times, POSITIONS + 8)["skipped"]
    hook.remove()
    after = _state_of(learner)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert not learner.update(clips, times, POSITIONS + 8)["skipped"]
    assert all(value.isfinite().all() for value in _state_of(learner).values())


@pytest.mark.parametrize("changes", [CGAN, KL | ADVERSARIAL], ids=["cgan", "between"])
def test_a_discriminators_skipped_step_counts(changes: dict):
    learner = learners.build(override(Experiment(), changes), CPU)
    judge = learner.networks["discriminator"]
    before = _state_of(learner)
    weight = next(iter(judge.parameters()))
    weight.register_hook(lambda gradient: gradient * math.nan)
    assert learner.update(CLIPS, TIMES, POSITIONS)["skipped"] >= 1
    after = _state_of(learner)
    unchanged = [name for name in before if name.startswith("discriminator") and torch.equal(before[name], after[name])]
    assert [name for name in judge.state_dict() if f"discriminator {name}" in unchanged]
    assert all(value.isfinite().all() for value in after.values())
    parameters = {f"discriminator {name}" for name, _ in judge.named_parameters()}
    assert parameters <= set(unchanged)


def test_output_that_is_not_finite_is_an_error(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    with torch.no_grad():
        next(iter(learner.networks["cvae"].parameters())).fill_(math.nan)
    with pytest.raises(NonFiniteOutput, match="not finite"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], torch.zeros(8, 3))
    with pytest.raises(NonFiniteOutput):
        learner.reconstruct(CLIPS)


class _Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: reading a value, boolean indices, copies of Python lists."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else []
        if (
            (name in ("_local_scalar_dense", "is_nonzero", "equal") and args[0].is_meta)
            or name in ("nonzero", "masked_select")
            or any(index is not None and (index.dtype == torch.bool or not index.is_meta) for index in indices)
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_a_step_does_not_wait_for_the_gpu(tiny: Experiment, changes: dict, monkeypatch: pytest.MonkeyPatch):
    """On the meta device, whose tensors have no values that could be read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes | {"optim.ema_decay": 0.9})
    learner = learners.build(experiment, torch.device("meta"))
    for optimizer in learner.optimizers.values():
        monkeypatch.setattr(optimizer, "step", lambda: None)  # the fused one, which does not know it either
    frames = experiment.clip.frames
    clips = torch.zeros(8, frames, experiment.clip.height, experiment.clip.width, 3, dtype=torch.uint8)
    with _Waits() as waits:
        learner.update(clips, torch.linspace(0, 1, frames).expand(8, -1), POSITIONS)
    assert waits.found == []


def test_sync_batch_norm_leaves_layers_that_use_batch_statistics_as_they_are(tiny: Experiment):
    torch.manual_seed(0)
    network = models.build(override(tiny, {"model.image_batch_statistics": True}).model, tiny.clip)
    plain = copy.deepcopy(network)
    kinds = {name: type(module) for name, module in network.named_modules() if "BatchNorm" in type(module).__name__}
    synced = convert_sync_batch_norm(network)
    assert list(synced.state_dict()) == list(plain.state_dict())
    for name, kind in kinds.items():
        expected = SyncByBatchNorm if "ByBatch" in kind.__name__ else nn.SyncBatchNorm
        assert type(synced.get_submodule(name)) is expected, name
    assert {SyncByBatchNorm, nn.SyncBatchNorm} <= {type(module) for module in synced.modules()}
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
            {"data.segments.frames": 6, "data.segments.frame_times": "random"},
            r"data\.segments\.frame_times: model\.kind=cvae takes frames to be evenly spaced \(value 'random'\)",
        ),
        (
            TINY_BETWEEN | {"data.segments.frame_times": "random"},
            r"data\.segments\.frame_times: is of parts of the videos.*data\.segments\.frames=0",
        ),
        (
            KL | ADVERSARIAL | {"data.segments.frames": 4, "data.segments.frame_times": "random"},
            r"data\.segments\.frame_times: the discriminator .*evenly spaced",
        ),
    ],
)
def test_fields_that_would_have_no_effect_or_a_wrong_one_are_refused(tiny: Experiment, changes: dict, message: str):
    experiment = override(tiny if "model.kind" not in changes else Experiment(), changes)
    with pytest.raises(ConfigError, match=message):
        learners.check(experiment)
    learners.build(experiment, CPU)  # a checkpoint of such a training still makes clips


def test_panning_without_cropping_is_refused():
    with pytest.raises(ConfigError, match=r"data\.augment\.pan: .*crop below 1 \(value 0\.5\)"):
        learners.check(override(Experiment(), {"data.augment.pan": 0.5}))
    learners.check(override(Experiment(), {"data.augment.pan": 0.5, "data.augment.crop": 0.9}))


def test_two_streams_frame_weight_follows_from_the_size_of_the_frames():
    """Theirs weighs the mean over a frame in -1..1, whose absolute differences are twice ours, with 10."""
    learner = learners.build(override(Experiment(), TWO_STREAM), CPU)
    clip = learner.experiment.clip  # type: ignore[attr-defined]
    assert learner.frame_weight == 10 * 2 / (3 * clip.height * clip.width)  # type: ignore[attr-defined]
    fixed = override(Experiment(), TWO_STREAM | {"model.frame_weight": 0.5})
    assert learners.build(fixed, CPU).frame_weight == 0.5  # type: ignore[attr-defined]
    at_64 = override(Experiment(), TWO_STREAM | {"clip.height": 64, "clip.width": 64})
    assert learners.build(at_64, torch.device("meta")).frame_weight == 20 / 12288  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "needed"),
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
def test_a_field_that_acts_only_with_another_one_is_refused_without_it(changes: dict, needed: str):
    experiment, field = override(Experiment(), changes), list(changes)[-1]
    with pytest.raises(ConfigError, match=rf"{field}: has no effect with {needed}=".replace(".", r"\.")):
        learners.check(experiment)
    learners.check(experiment, searched=[needed])  # other trials give the field its effect


def test_defaults_need_no_other_field():
    hinge = {"model.kind": "cgan", "model.adversarial_loss": "hinge"}
    for changes in (hinge, {"model.kind": "between", "model.kl_weight": 0}, {"model.batch_norm": False}):
        learners.check(override(Experiment(), changes))


def test_between_has_no_batch_norm_to_synchronise():
    with pytest.raises(ConfigError, match=r"speed\.sync_batch_norm: model\.kind=between"):
        learners.check(override(Experiment(), {"model.kind": "between", "speed.sync_batch_norm": True}))
