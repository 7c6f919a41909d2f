"""Times a training step of the paper's CVAE at full size on a GPU: plain scripts, then each of the `speed` fields.

    PYTHONPATH=. python benchmarks/gpu.py [EXPERIMENT.yaml] [section.field=value ...]

The methods alternate for ROUNDS rounds, each with STEPS steps on batches of cached clips in pinned memory. The plain
script is eager, with torch.optim.Adam and PyTorch's default precision: TF32 for convolutions, float32 for matrix
products. The careful script sets both to TF32 and lets cuDNN benchmark its algorithms, as the training loop does.
Utilisation counts the operations of matrix products and convolutions, relative to the rate of matrix products that is
measured on the device. Two lower bounds of the step time follow: from arithmetic, and from the bytes that it moves.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from giffy_ray import models
from giffy_ray.cluster import resources
from giffy_ray.config import Experiment, load, override
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import TrainingSampler, rank_indices
from giffy_ray.training import learners
from giffy_ray.training.learners import losses

DEFAULT_EXPERIMENT = Path(__file__).parent.parent / "giffy_ray" / "experiments" / "cvae-erupting.yaml"
ROUNDS, WARMUP_STEPS, STEPS, CURVE_STEPS = 3, 6, 25, 300
BATCHES = 100
CAREFUL_SCRIPT = "plain script, TF32, cuDNN tuned"
# Memory traffic of a float32 weight: both passes read it, and the backward pass writes its gradient. Adam reads the
# gradient, the weight and two moments, and writes the weight and the moments.
BYTES_PER_PARAMETER = 4 * (2 + 1 + 4 + 3)
OVERRIDES: dict[str, dict[str, object]] = {
    "giffy_ray, float32": {"speed.precision": "float32"},
    "giffy_ray, bfloat16 (the default)": {},
    "giffy_ray, channels last": {"speed.channels_last": True},
    "giffy_ray, compiled": {"speed.compile": True},
    "giffy_ray, compiled, channels last": {"speed.compile": True, "speed.channels_last": True},
}

Batch = tuple[Tensor, Tensor, Tensor]  # clips, times, sample indices
Step = Callable[[Batch], object]


def build_script_step(experiment: Experiment, device: torch.device, precision: str, tune_cudnn: bool) -> Step:
    """Returns the training step that a user would write."""
    torch.manual_seed(0)
    with device:
        network = models.build(experiment.model, experiment.clip)
    optimizer = torch.optim.Adam(network.parameters(), lr=experiment.optim.lr)
    latent = experiment.model.latent

    def step(batch: Batch) -> float:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = tune_cudnn
        target = to_floats(batch[0].to(device))
        generated, mean, std = network(target, torch.randn(len(target), latent, device=device))
        clip_error = losses.squared_error(generated, target)
        ends_error = losses.squared_error(generated[:, :, [0, -1]], target[:, :, [0, -1]])
        loss = (losses.gaussian_kl(mean, std) + 2 * clip_error + 2 * ends_error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # scripts log it

    return step


def build_learner_step(experiment: Experiment, device: torch.device) -> Step:
    """Returns the training step of giffy_ray."""
    with device:  # initializing weights is faster there
        learner = learners.build(experiment, device, steps=10_000)

    def step(batch: Batch) -> dict[str, Tensor]:
        torch.set_float32_matmul_precision("highest" if experiment.speed.precision == "float32" else "high")
        torch.backends.cudnn.benchmark = True
        return learner.update(*batch)

    return step


def list_methods(experiment: Experiment, device: torch.device) -> dict[str, Callable[[], Step]]:
    scripts = {
        "plain script, float32": functools.partial(build_script_step, experiment, device, "highest", False),
        "plain script, TF32": functools.partial(build_script_step, experiment, device, "high", False),
        CAREFUL_SCRIPT: functools.partial(build_script_step, experiment, device, "high", True),
    }
    return scripts | {
        name: functools.partial(build_learner_step, override(experiment, overrides), device)
        for name, overrides in OVERRIDES.items()
    }


def load_batches(experiment: Experiment, count: int, device: torch.device) -> list[Batch]:
    sampler = TrainingSampler(prepare(experiment), experiment.data, 0)
    batches = []
    for step in range(count):
        sample_indices = rank_indices(step, experiment.train.global_batch_size, 0, 1)
        clips, times = sampler(sample_indices)
        tensors = [torch.from_numpy(array) for array in (clips, times, sample_indices)]
        batches.append(tuple(tensor.pin_memory() if device.type == "cuda" else tensor for tensor in tensors))
    return batches


def synchronized_time_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_step_s(step: Step, batches: list[Batch], device: torch.device) -> float:
    for index in range(WARMUP_STEPS):
        step(batches[index % len(batches)])
    start_s = synchronized_time_s(device)
    for index in range(STEPS):
        step(batches[index % len(batches)])
    return (synchronized_time_s(device) - start_s) / STEPS


def allocated_gb(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def max_allocated_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def record_curve(experiment: Experiment, batches: list[Batch], device: torch.device) -> list[float]:
    """Returns the loss of each step of a training. The noise is the same in every precision."""
    step = build_learner_step(experiment, device)
    losses_by_step = [step(batches[index % len(batches)]) for index in range(CURVE_STEPS)]
    return [float(named["loss"]) for named in losses_by_step]  # type: ignore[index]


def measure_peaks(device: torch.device) -> tuple[float, float]:
    """Returns FLOP/s of matrix products (bfloat16 on a GPU), and bytes read and written per second."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    durations_s = []
    for operation in (lambda: left @ right, lambda: destination.copy_(source)):
        for _ in range(3):
            operation()
        start_s = synchronized_time_s(device)
        for _ in range(10):
            operation()
        durations_s.append((synchronized_time_s(device) - start_s) / 10)
    return 2 * size**3 / durations_s[0], 2 * source.numel() / durations_s[1]


def count_step_flops(experiment: Experiment, batch: Batch, device: torch.device) -> int:
    step = build_script_step(experiment, device, "high", False)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def count_parameters(experiment: Experiment) -> int:
    with torch.device("meta"):
        network = models.build(experiment.model, experiment.clip)
    return sum(parameter.numel() for parameter in network.parameters())


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(
    experiment: Experiment, batches: list[Batch], device: torch.device
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Returns seconds per step by method, of each round, and the peak memory of each method in GB.

    All methods stay in memory.
    """
    rounds: list[dict[str, float]] = []
    steps: dict[str, Step] = {}
    memory_gb: dict[str, float] = {}
    for _ in range(ROUNDS):
        step_s = {}
        for name, build_step in list_methods(experiment, device).items():
            start_s = time.perf_counter()
            other_methods_gb = allocated_gb(device)
            step = steps[name] = steps.get(name) or build_step()
            step_s[name] = measure_step_s(step, batches, device)
            memory_gb.setdefault(name, max_allocated_gb(device) - other_methods_gb)
            free_memory(device)
            duration_s = time.perf_counter() - start_s
            print(f"{name}: {1000 * step_s[name]:.1f} ms per step, {duration_s:.0f} s in total", flush=True)
        rounds.append(step_s)
    return rounds, memory_gb


def format_table(
    rounds: list[dict[str, float]], memory_gb: Mapping[str, float], flops: int, peak_flops: float, batch_size: int
) -> Table:
    table = Table(title=f"one step of {batch_size} clips", title_justify="left")
    for heading in ("method", "ms", "clips/s", "speed, careful script = 1", "utilisation", "GB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name in rounds[0]:
        step_s = statistics.median(durations_s[name] for durations_s in rounds)
        ratios = sorted(durations_s[CAREFUL_SCRIPT] / durations_s[name] for durations_s in rounds)
        table.add_row(
            name,
            f"{1000 * step_s:.1f}",
            f"{batch_size / step_s:.0f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            f"{flops / step_s / peak_flops:.0%}",
            f"{memory_gb[name]:.1f}",
        )
    return table


def main() -> None:
    arguments = sys.argv[1:]
    path = arguments.pop(0) if arguments and "=" not in arguments[0] else DEFAULT_EXPERIMENT
    experiment = load(path, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    resources.connect()
    batches = load_batches(experiment, BATCHES, device)
    parameters = count_parameters(experiment)
    peak_flops, bandwidth = measure_peaks(device)
    flops = count_step_flops(experiment, batches[0], device)
    free_memory(device)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(
        f"{device_name}, torch {torch.__version__}: {peak_flops / 1e12:.0f} TFLOP/s in matrix products, "
        f"{bandwidth / 1e12:.2f} TB/s; {parameters:,} parameters, {flops / 1e12:.2f} TFLOP per step"
    )
    moved_bytes = BYTES_PER_PARAMETER * parameters
    console.print(
        f"lower bounds: {1000 * flops / peak_flops:.1f} ms of arithmetic, "
        f"{1000 * moved_bytes / bandwidth:.1f} ms of memory traffic"
    )

    rounds, memory_gb = measure(experiment, batches, device)
    free_memory(device)
    console.print(format_table(rounds, memory_gb, flops, peak_flops, experiment.train.global_batch_size))

    curves = {}
    for precision in ("float32", "bfloat16"):
        curves[precision] = record_curve(override(experiment, {"speed.precision": precision}), batches, device)
        free_memory(device)
    length = CURVE_STEPS // 6
    for first in range(0, CURVE_STEPS, length):
        means = {name: statistics.mean(curve[first : first + length]) for name, curve in curves.items()}
        console.print(
            f"mean loss from step {first + 1:3}: " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
        )


if __name__ == "__main__":
    main()
