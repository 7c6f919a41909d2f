"""One step in process, against the formula written out; two workers against one with twice the batch."""

import socket

import pytest
import torch
import torch.multiprocessing
from torch import nn

from giffy_ray import learners
from giffy_ray.config import Experiment, from_yaml, override, to_yaml
from giffy_ray.learners.noise import noise_at, noise_for
from giffy_ray.shapes import to_floats

CPU = torch.device("cpu")
CLIPS = torch.randint(0, 256, (8, 6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(100, 108)


def test_the_loss_is_equation_1(tiny: Experiment):
    experiment = override(tiny, {"model.reconstruction_weight": 0.7, "model.ends_weight": 3.0})
    learner = learners.build(experiment, CPU)
    twin = learners.build(experiment, CPU).networks["cvae"].train()

    real = to_floats(CLIPS)
    made, mean, std = twin(real, noise_at(0, POSITIONS.tolist(), 3))
    kl = (0.5 * (mean**2 + std**2 - torch.log(std**2) - 1)).sum() / 8
    whole = ((made - real) ** 2).sum() / 8
    ends = (((made - real)[:, :, 0]) ** 2).sum() / 8 + (((made - real)[:, :, -1]) ** 2).sum() / 8

    losses = learner.update(CLIPS, POSITIONS)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["reconstruction"], whole)
    torch.testing.assert_close(losses["ends"], ends)
    torch.testing.assert_close(losses["loss"], kl + 0.7 * whole + 3.0 * ends)


def test_a_step_is_adams(tiny: Experiment):
    """Adam's first step moves every weight by lr against the sign of its gradient (Kingma & Ba 2015, section 2.1)."""
    experiment = override(tiny, {"optim.lr": 1e-3})
    learner, before = learners.build(experiment, CPU), learners.build(experiment, CPU)
    learner.update(CLIPS, POSITIONS)
    for new, old in zip(learner.networks["cvae"].parameters(), before.networks["cvae"].parameters(), strict=True):
        steady = new.grad.abs() > 1e-3  # where epsilon does not count
        expected = (old - 1e-3 * new.grad.sign())[steady]
        torch.testing.assert_close(new[steady], expected, rtol=0, atol=2e-6)
    assert learner.optimizers["cvae"].defaults["betas"] == (0.8, 0.999)


def test_steps_make_the_loss_smaller(tiny: Experiment):
    plain = CLIPS[:, :1, :1, :1].expand_as(CLIPS).contiguous()  # one colour each: noise cannot be learned
    learner = learners.build(override(tiny, {"optim.lr": 1e-2}), CPU)
    losses = [float(learner.update(plain, POSITIONS)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_making_clips_needs_only_the_ends_and_depends_on_the_noise(tiny: Experiment):
    learner = learners.build(tiny, CPU)
    learner.update(CLIPS, POSITIONS)
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


def test_noise_depends_on_seed_and_key_only():
    many = noise_at(3, [5, 6, 7], 4)
    assert torch.equal(noise_at(3, [6], 4)[0], many[1])
    assert not torch.equal(noise_at(4, [6], 4)[0], many[1])
    assert torch.equal(noise_for(3, ["b", "a"], 4)[1], noise_for(3, ["a"], 4)[0])
    assert noise_at(0, range(2000), 8).mean().item() == pytest.approx(0, abs=0.03)
    assert noise_at(0, range(2000), 8).std().item() == pytest.approx(1, abs=0.03)


def _worker(rank: int, workers: int, port: int, yaml: str, queue) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    learner = learners.build(from_yaml(yaml), CPU, nn.parallel.DistributedDataParallel)
    share = slice(rank * 8 // workers, (rank + 1) * 8 // workers)
    for _ in range(3):
        learner.update(CLIPS[share], POSITIONS[share])
    weights = nn.utils.parameters_to_vector(learner.networks["cvae"].parameters()).detach()
    queue.put((rank, weights.numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train(workers: int, yaml: str) -> list[torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_worker, args=(rank, workers, port, yaml, queue)) for rank in range(workers)]
    for process in processes:
        process.start()
    weights = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [torch.from_numpy(weights[rank]) for rank in range(workers)]


def test_two_workers_equal_one_with_twice_the_batch(tiny: Experiment):
    # Batch norm looks at one worker's clips only, so it is off here.
    yaml = to_yaml(override(tiny, {"model.batch_norm": False, "optim.lr": 1e-3}))
    (one,), two = _train(1, yaml), _train(2, yaml)
    assert torch.equal(two[0], two[1])
    torch.testing.assert_close(two[0], one, rtol=0, atol=2e-6)
    start = nn.utils.parameters_to_vector(learners.build(from_yaml(yaml), CPU).networks["cvae"].parameters())
    assert float((one - start).detach().abs().max()) > 1e-3
