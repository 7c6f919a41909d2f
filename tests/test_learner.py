"""One step in process, against the formula written out; two workers against one with twice the batch."""

import copy
import math

import pytest
import torch
import torch.multiprocessing
from torch import nn

from giffy_ray import learners, ranks
from giffy_ray.config import ConfigError, Experiment, OptimConfig, SpeedConfig, from_yaml, override, to_yaml
from giffy_ray.head import free_port
from giffy_ray.learners.descent import Descent, rate_at
from giffy_ray.learners.noise import noise_at, noise_for
from giffy_ray.shapes import to_floats, to_pixels
from tests.conftest import in_float64
from tests.test_models import CGAN, DIRECT_3D, TWO_STREAM

CPU = torch.device("cpu")
CLIPS = torch.randint(0, 256, (8, 6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TIMES = torch.linspace(0, 1, 6).expand(8, -1)
POSITIONS = torch.arange(100, 108)
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
    made, mean, std = twin(real, noise_at(0, POSITIONS.tolist(), 3))
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
    noise = noise_at(1, range(8), 3)
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
    many = noise_at(3, [5, 6, 7], 4)
    assert torch.equal(noise_at(3, [6], 4)[0], many[1])
    assert not torch.equal(noise_at(4, [6], 4)[0], many[1])
    assert torch.equal(noise_for(3, ["b", "a"], 4)[1], noise_for(3, ["a"], 4)[0])
    assert noise_at(0, range(2000), 8).mean().item() == pytest.approx(0, abs=0.03)
    assert noise_at(0, range(2000), 8).std().item() == pytest.approx(1, abs=0.03)


def test_what_the_learner_cannot_do_is_refused(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    with pytest.raises(ConfigError, match=r"frames: cvae makes clips of clip\.frames=6 \(value 7\)"):
        learner.generate(CLIPS[:, 0], CLIPS[:, -1], torch.zeros(8, 3), frames=7)
    with pytest.raises(ConfigError, match=r"data\.intervals\.frames: cvae .*6 \(value 4\)"):
        learners.build(override(tiny, {"data.intervals.frames": 4}), CPU)
    with pytest.raises(ConfigError, match=r"train\.batch: .*cluster\.workers=2 \(value 2\)"):
        learners.build(override(tiny, {"train.batch": 2, "cluster.workers": 2}), CPU)
    learners.build(override(tiny, {"train.batch": 1, "model.batch_norm": False}), CPU)


def test_the_learning_rate_rises_evenly_and_falls_as_half_a_cosine():
    constant, cosine = OptimConfig(warmup_steps=4), OptimConfig(warmup_steps=4, schedule="cosine")
    assert [rate_at(step, 20, constant) for step in (0, 1, 2, 3, 4, 19)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_at(step, 20, cosine) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert rate_at(4, 20, cosine) == 1
    assert rate_at(8, 20, cosine) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))  # a quarter of the way
    assert rate_at(12, 20, cosine) == pytest.approx(0.5)
    assert rate_at(20, 20, cosine) == rate_at(99, 20, cosine) == pytest.approx(0)
    assert rate_at(0, 1, OptimConfig()) == 1


def descent_of(network: nn.Module, **optim) -> Descent:
    return Descent(network, OptimConfig(**optim), steps=20, speed=SpeedConfig())


def descend(descent: Descent, loss: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    return descent.descend(lambda _: (loss, {"loss": loss}), [torch.zeros(1)], step, weight=1.0)


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
    descent, seen = descent_of(network, lr=0.1, ema=0.5), []
    for step in range(9):
        descend(descent, network(torch.randn(4, 3)).square().sum(), step)
        seen.append(copy.deepcopy(network.state_dict()))
    expected = seen[0]
    for count, state in enumerate(seen[1:], start=1):
        kept = min(0.5, (1 + count) / (10 + count))
        for name, value in state.items():
            expected[name] = kept * expected[name] + (1 - kept) * value if value.is_floating_point() else value
    for name, value in descent.trained.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.allclose(network[0].weight, expected["0.weight"])
    assert set(descent.networks("net")) == {"net", "net_average"}
    assert descent_of(network).trained is network


def test_weight_decay_is_decoupled():
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): without a gradient a weight shrinks by lr * decay."""
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    descend(descent_of(layer, lr=0.1, weight_decay=0.2), 0 * layer.weight.sum() + 0 * layer.bias.sum(), 0)
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.2))


@pytest.mark.parametrize(("norm", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_the_gradient_is_cut_to_its_norm_and_keeps_its_direction(norm: float, expected: list[float]):
    layer, seen = nn.Linear(2, 1, bias=False), []
    descent = descent_of(layer, clip_norm=norm)
    descent.optimizer.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad))
    descend(descent, (layer.weight * torch.tensor([[3.0, 4.0]])).sum(), 0)
    torch.testing.assert_close(seen, [torch.tensor([expected])], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])  # the gradient of the last overflows where it is squared
def test_a_step_without_a_finite_gradient_changes_nothing(scale: float):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    descent = descent_of(network, lr=0.1, ema=0.5)
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
    whole = override(tiny, {"model.batch_norm": False, "optim.lr": 1e-3, "train.batch": 8})
    between = override(Experiment(), TINY_BETWEEN | {"train.batch": 8, "model.kl_weight": 0.0, "optim.lr": 1e-3})
    for experiment in (whole, between):
        parts = override(experiment, {"speed.micro_batch": 3})
        together, apart = (trained(to_yaml(each)) for each in (experiment, parts))
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-11)
        assert not torch.equal(apart, trained(to_yaml(experiment), updates=0))
    with pytest.raises(ConfigError, match=r"speed\.micro_batch: .*\(value 3\)"):
        learners.build(override(Experiment(), CGAN | {"speed.micro_batch": 3}), CPU)


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


def _worker(rank: int, workers: int, port: int, yamls: list[str], queue) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    share = slice(rank * 8 // workers, (rank + 1) * 8 // workers)
    weights = [trained(yaml, share).numpy() for yaml in yamls]
    queue.put((rank, [*weights, skipped_where_rank_1_fails(rank).numpy(), heard_of_both(rank).numpy()]))
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
        losses = descent.descend(lambda one, more=added: (descent(one).sum() + more, {}), [inputs], 0, weight=1.0)
        skipped.append(losses["skipped"])
    return torch.cat([torch.stack(skipped), nn.utils.parameters_to_vector(layer.parameters()).detach()])


def heard_of_both(rank: int) -> torch.Tensor:
    """What four calls hear, where rank 1 sets the first flag at the first, and rank 0 the second at the second."""
    any_of_each = ranks.AnyOfEach(CPU)
    said = [[rank == 1, False], [False, rank == 0], [False, False], [False, False]]
    heard = torch.tensor([any_of_each(flags) for flags in said])
    assert any_of_each.end() == [False, False]
    return heard


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


def trained_by_two(yamls: list[str]) -> list[list[torch.Tensor]]:
    """For each of two workers with half the clips each, what `trained` returns for each experiment."""
    port = free_port()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_worker, args=(rank, 2, port, yamls, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    weights = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [[torch.from_numpy(one) for one in weights[rank]] for rank in range(2)]


def test_two_workers_equal_each_other_and_one_with_twice_the_batch(tiny: Experiment):
    cgan = override(Experiment(), CGAN | {"model.batch_norm": False})
    # Batch norm looks at one worker's clips only, so it is off where they are to equal one.
    plain = [to_yaml(override(each, {"model.batch_norm": False, "optim.lr": 1e-3})) for each in (tiny, cgan)]
    others = [CGAN | {"optim.ema": 0.5}, TWO_STREAM, DIRECT_3D | {"model.reconstruction_weight": 1.0}]
    normalised = [to_yaml(override(Experiment(), each)) for each in others]
    first, second = trained_by_two(plain + normalised)
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
