"""Predicts how a training step grows with the number of workers and the network, and checks the prediction here.

    PYTHONPATH=. python benchmarks/scaling.py [--rounds N] [--steps N]

With W workers, each of which has the same number of clips,

    step(W) = compute + max(0, exchange(W) - hidden),    exchange(W) = 2 (W - 1) / W * bytes / bandwidth

`bytes` is the size of the gradient. `exchange` is the time of a ring all-reduce (Patarasuk & Yuan 2009). `hidden` is
the part of the exchange that DDP overlaps with the backward pass: half a step on GPUs, and nothing on this machine,
where the workers' cores do both. The check compares one and two workers, which communicate over gloo and loopback.

The prediction for GPUs takes `compute` as the sum of arithmetic at a share of peak FLOP/s, and of memory traffic: both
passes read the weights, the gradient is written, and Adam makes seven passes over all of them. A step takes at least
the time to launch its kernels. MACHINES lists the assumptions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
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

EXPERIMENTS = Path(__file__).parent.parent / "giffy_ray" / "experiments"
BATCH_SIZE = 16  # clips per worker in the check
GPU_BATCH_SIZE = 20  # clips per GPU in the prediction
GPU_COUNTS = (1, 8, 64, 512)
# Checked here: a network with a small gradient for its arithmetic, and one with the proportions of the paper's CVAE.
CHECKED_EXPERIMENTS = {
    "between": ("between", {}),
    "demo CVAE with wide layers": ("demo", {"model.image_hidden": 2048, "model.video_hidden": 1024}),
}
PREDICTED_EXPERIMENTS = {"the paper's CVAE, 485 M": "cvae-erupting", "between, 1.4 M": "between"}


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind.

    `nvlink` and `network` are the bandwidth per GPU of a ring all-reduce in one node of eight and across nodes, as
    NCCL's tests measure it on such machines.
    """

    name: str
    flops: float  # per second, reached by a training with small convolutions: an assumption
    memory: float  # bytes per second
    nvlink: float  # bytes per second
    network: float  # bytes per second
    gpus_per_node: int = 8
    hidden: float = 0.5  # share of a step
    launches_s: float = 3e-3  # to launch the kernels of a step, one after the other


MACHINES = [
    Machine("H100, 400 Gb/s per GPU", 0.3 * 989e12, 0.8 * 3.35e12, 360e9, 45e9),
    Machine("H100, 100 Gb/s per node", 0.3 * 989e12, 0.8 * 3.35e12, 360e9, 1.5e9),
]


def predict_exchange_s(workers: int, gradient_bytes: float, bandwidth: float) -> float:
    return 2 * (workers - 1) / workers * gradient_bytes / bandwidth


def predict_compute_s(machine: Machine, flops: float, parameters: int) -> float:
    moved_bytes = 4 * parameters * (2 + 1 + 7)
    return max(machine.launches_s, flops / machine.flops + moved_bytes / machine.memory)


def predict_step_s(machine: Machine, workers: int, compute_s: float, parameters: int) -> float:
    bandwidth = machine.nvlink if workers <= machine.gpus_per_node else machine.network
    exchange_s = predict_exchange_s(workers, 4 * parameters, bandwidth)
    return compute_s + max(0.0, exchange_s - machine.hidden * compute_s)


def measure_in_processes(yaml: str, workers: int, joined: bool, steps: int) -> tuple[float, float]:
    """Runs training steps in one process per worker.

    Args:
        yaml: The experiment.
        workers: Number of processes.
        joined: The processes share a process group; otherwise they train independently.
        steps: Training steps of each process.

    Returns:
        Seconds per step and per all-reduce of the gradient alone (0 unless joined), of the slowest worker.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (yaml, workers, joined, steps, port, folder)
        torch.multiprocessing.spawn(_run_worker, args=arguments, nprocs=workers)  # type: ignore[attr-defined]
        durations_s = np.asarray([np.loadtxt(path) for path in sorted(Path(folder).iterdir())])
    return float(durations_s[:, 0].max()), float(durations_s[:, 1].max())


def _run_worker(rank: int, yaml: str, workers: int, joined: bool, steps: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    if joined:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    experiment = from_yaml(yaml)
    # Each worker has the same number of clips, regardless of the number of workers.
    learner = learners.build(experiment, torch.device("cpu"))
    frames = experiment.data.segments.frames or experiment.clip.frames
    clips = torch.randint(0, 256, (BATCH_SIZE, frames, 64, 64, 3), dtype=torch.uint8)
    times = torch.linspace(0, 1, frames).expand(BATCH_SIZE, -1)
    sample_indices = torch.arange(BATCH_SIZE)
    step_s = measure_median_s(lambda: learner.update(clips, times, sample_indices), steps)
    exchange_s = 0.0
    if joined:
        gradient = torch.zeros(count_parameters(experiment))
        exchange_s = measure_median_s(lambda: dist.all_reduce(gradient), steps)
    np.savetxt(os.path.join(folder, str(rank)), [step_s, exchange_s])
    if joined:
        dist.destroy_process_group()


def measure_median_s(function: Callable[[], object], repetitions: int) -> float:
    """Returns the median duration, without the first third."""
    durations_s = []
    for _ in range(repetitions):
        start_s = time.perf_counter()
        function()
        durations_s.append(time.perf_counter() - start_s)
    return statistics.median(durations_s[repetitions // 3 :])


def count_parameters(experiment: Experiment) -> int:
    with torch.device("meta"):
        network = models.build(experiment.model, experiment.clip)
    return sum(parameter.numel() for parameter in network.parameters())


def estimate_step_flops(experiment: Experiment, batch_size: int) -> int:
    """Counts the FLOPs of the forward pass; a step takes three times as many."""
    clip = experiment.clip
    with torch.device("meta"):
        network = models.build(experiment.model, clip)
        noise = torch.zeros(batch_size, experiment.model.latent)
        if experiment.model.kind == "between":
            frames = 4
            clips = torch.zeros(batch_size, 3, frames, 64, 64)
            inputs = (clips, torch.zeros(batch_size, frames), noise, torch.zeros(batch_size) > 0)
        else:
            inputs = (torch.zeros(batch_size, 3, clip.frames, clip.height, clip.width), noise)
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
    return 3 * counter.get_total_flops()


def tabulate_check(rounds: int, steps: int) -> Table:
    title = f"measured here: milliseconds per step of {BATCH_SIZE} clips on each worker, medians"
    table = Table(title=title, title_justify="left")
    for heading in ("network", "gradient MB", "one worker", "two apart", "exchange", "two: predicted", "two: measured"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, (file, overrides) in CHECKED_EXPERIMENTS.items():
        experiment = load(EXPERIMENTS / f"{file}.yaml")
        experiment = override(experiment, overrides | {"train.global_batch_size": 2 * BATCH_SIZE})
        yaml = to_yaml(experiment)
        rows = []
        for _ in range(rounds):
            single_s, _ = measure_in_processes(yaml, 1, False, steps)
            apart_s, _ = measure_in_processes(yaml, 2, False, steps)
            joined_s, exchange_s = measure_in_processes(yaml, 2, True, steps)
            rows.append([single_s, apart_s, exchange_s, apart_s + exchange_s, joined_s])
        medians = [f"{1000 * statistics.median(column):.0f}" for column in zip(*rows, strict=True)]
        table.add_row(name, f"{4 * count_parameters(experiment) / 1e6:.1f}", *medians)
    return table


def tabulate_predictions() -> Table:
    title = f"predicted: milliseconds per step of {GPU_BATCH_SIZE} clips on each GPU, and efficiency"
    table = Table(title=title, title_justify="left")
    for heading in ("network", "machine", "gradient MB", *map(str, GPU_COUNTS)):
        table.add_column(heading, justify="left" if heading in ("network", "machine") else "right")
    for name, file in PREDICTED_EXPERIMENTS.items():
        experiment = load(EXPERIMENTS / f"{file}.yaml")
        parameters = count_parameters(experiment)
        for machine in MACHINES:
            compute_s = predict_compute_s(machine, estimate_step_flops(experiment, GPU_BATCH_SIZE), parameters)
            steps_s = [predict_step_s(machine, gpus, compute_s, parameters) for gpus in GPU_COUNTS]
            cells = [f"{1000 * step_s:.1f} ({compute_s / step_s:.0%})" for step_s in steps_s]
            table.add_row(name, machine.name, f"{4 * parameters / 1e6:.0f}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(tabulate_predictions())
    console.print(tabulate_check(arguments.rounds, arguments.steps))


if __name__ == "__main__":
    main()
