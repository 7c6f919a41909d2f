"""How a step of training grows with workers and network: benchmarks/scaling.py [--rounds N] [--steps N]

The model of it: with W workers, each of which has its own share of the batch,

    step(W) = compute + max(0, exchange(W) - hidden),    exchange(W) = 2 (W - 1) / W * bytes / bandwidth

`bytes` are those of the gradient, `exchange` is what a ring all-reduce sends and receives at each worker (Patarasuk &
Yuan 2009), and `hidden` the part of the backward pass behind which DDP hides it: a half of the step on GPUs, nothing
here, where the workers' cores do both. It is checked on this machine with one and two workers, whose processes talk by
gloo over loopback, and says what GPUs would do. There `compute` is arithmetic at a share of the peak, and the bytes of
the weights, read in both passes, of the gradient, and of Adam's seven passes over them all, at the memory's speed; but
never less than what starting the kernels takes. The assumptions are in MACHINES.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from giffy_ray import models
from giffy_ray.cluster.local import free_port
from giffy_ray.config import Experiment, from_yaml, load, override, to_yaml
from giffy_ray.training import learners

EXPERIMENTS = Path(__file__).parent.parent / "jobs" / "experiments"
BATCH = 16
# Checked here: a network whose gradient is small against its work, and one with the proportions of the report's.
CHECKED = {
    "between": ("between", {}),
    "demo CVAE with wide layers": ("demo", {"model.image_hidden": 2048, "model.video_hidden": 1024}),
}
PREDICTED = {"report's CVAE, 485 M": "cvae-erupting", "between, 1.4 M": "between"}


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind. `nvlink` and `network` are bytes a second of an all-reduce's ring at each GPU, as measured by
    NCCL's tests on such machines, in one node of eight and across nodes."""

    name: str
    flops: float  # that a training of small convolutions reaches, a second: an assumption
    memory: float  # bytes a second
    nvlink: float
    network: float
    per_node: int = 8
    hidden: float = 0.5  # of a step
    launches_s: float = 3e-3  # of the kernels of a step, one after the other


MACHINES = [
    Machine("H100, 400 Gb/s a GPU", 0.3 * 989e12, 0.8 * 3.35e12, 360e9, 45e9),
    Machine("H100, 100 Gb/s a node", 0.3 * 989e12, 0.8 * 3.35e12, 360e9, 1.5e9),
]


def exchange_s(workers: int, gradient_bytes: float, bandwidth: float) -> float:
    return 2 * (workers - 1) / workers * gradient_bytes / bandwidth


def compute_s(machine: Machine, flops: float, parameters: int) -> float:
    moved_bytes = 4 * parameters * (2 + 1 + 7)
    return max(machine.launches_s, flops / machine.flops + moved_bytes / machine.memory)


def step_s(machine: Machine, workers: int, compute_s: float, parameters: int) -> float:
    bandwidth = machine.nvlink if workers <= machine.per_node else machine.network
    return compute_s + max(0.0, exchange_s(workers, 4 * parameters, bandwidth) - machine.hidden * compute_s)


def in_processes(yaml: str, workers: int, joined: bool, steps: int) -> tuple[float, float]:
    """Seconds a step, and of an exchange of the gradient by itself (0 where the workers are not joined)."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        words = (yaml, workers, joined, steps, port, folder)
        torch.multiprocessing.spawn(_process, args=words, nprocs=workers)  # type: ignore[attr-defined]
        seconds = np.asarray([np.loadtxt(path) for path in sorted(Path(folder).iterdir())])
    return float(seconds[:, 0].max()), float(seconds[:, 1].max())


def _process(rank: int, yaml: str, workers: int, joined: bool, steps: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    if joined:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    experiment = from_yaml(yaml)
    # As many clips on each worker, however many there are.
    learner = learners.build(experiment, torch.device("cpu"))
    frames = experiment.data.segments.frames or experiment.clip.frames
    clips = torch.randint(0, 256, (BATCH, frames, 64, 64, 3), dtype=torch.uint8)
    times, positions = torch.linspace(0, 1, frames).expand(BATCH, -1), torch.arange(BATCH)
    taken_s = seconds_of(lambda: learner.update(clips, times, positions), steps)
    exchanged_s = 0.0
    if joined:
        gradient = torch.zeros(parameters_of(experiment))
        exchanged_s = seconds_of(lambda: dist.all_reduce(gradient), steps)
    np.savetxt(os.path.join(folder, str(rank)), [taken_s, exchanged_s])
    if joined:
        dist.destroy_process_group()


def seconds_of(step, steps: int) -> float:
    taken_s = []
    for _ in range(steps):
        began_s = time.perf_counter()
        step()
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s[steps // 3 :])


def parameters_of(experiment: Experiment) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in models.build(experiment.model, experiment.clip).parameters())


def flops_of(experiment: Experiment, batch: int) -> int:
    """Of a step: three times those of its forward pass, which is counted."""
    with torch.device("meta"):
        network, clip, frames = models.build(experiment.model, experiment.clip), experiment.clip, 4
        noise = torch.zeros(batch, experiment.model.latent)
        if experiment.model.kind == "between":
            inputs = (torch.zeros(batch, 3, frames, 64, 64), torch.zeros(batch, frames), noise, torch.zeros(batch) > 0)
        else:
            inputs = (torch.zeros(batch, 3, clip.frames, clip.height, clip.width), noise)
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
    return 3 * counter.get_total_flops()


def checked(rounds: int, steps: int) -> Table:
    table = Table(title="here: milliseconds a step of 16 clips on each worker, medians", title_justify="left")
    for heading in ("network", "gradient MB", "one worker", "two apart", "exchange", "two: predicted", "two: measured"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, (file, changes) in CHECKED.items():
        experiment = override(load(EXPERIMENTS / f"{file}.yaml"), changes | {"train.global_batch_size": 2 * BATCH})
        yaml, seen = to_yaml(experiment), []
        for _ in range(rounds):
            one, apart = in_processes(yaml, 1, False, steps)[0], in_processes(yaml, 2, False, steps)[0]
            together, exchanged = in_processes(yaml, 2, True, steps)
            seen.append([one, apart, exchanged, apart + exchanged, together])
        medians = [f"{1000 * statistics.median(column):.0f}" for column in zip(*seen, strict=True)]
        table.add_row(name, f"{4 * parameters_of(experiment) / 1e6:.1f}", *medians)
    return table


def predicted() -> Table:
    table = Table(title="predicted: milliseconds a step of 20 clips on each GPU, and efficiency", title_justify="left")
    for heading in ("network", "machine", "gradient MB", "1", "8", "64", "512"):
        table.add_column(heading, justify="left" if heading in ("network", "machine") else "right")
    for name, file in PREDICTED.items():
        experiment = load(EXPERIMENTS / f"{file}.yaml")
        parameters = parameters_of(experiment)
        for machine in MACHINES:
            alone_s = compute_s(machine, flops_of(experiment, 20), parameters)
            steps = [step_s(machine, workers, alone_s, parameters) for workers in (1, 8, 64, 512)]
            cells = [f"{1000 * seconds:.1f} ({alone_s / seconds:.0%})" for seconds in steps]
            table.add_row(name, machine.name, f"{4 * parameters / 1e6:.0f}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    words = parser.parse_args()
    console = Console(width=120)
    console.print(predicted())
    console.print(checked(words.rounds, words.steps))


if __name__ == "__main__":
    main()
