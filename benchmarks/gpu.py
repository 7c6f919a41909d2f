"""The report's CVAE at its full size on a GPU: a plain script, then each of the speed fields: benchmarks/gpu.py

    python benchmarks/gpu.py [EXPERIMENT.yaml] [section.field=value ...]

Ways take turns for ROUNDS rounds, each for STEPS steps on batches of stored clips that lie in pinned memory. The
plain script is eager, with torch.optim.Adam and PyTorch's default precision (convolutions in TF32, products in
float32); a careful one sets both to TF32 and lets cuDNN try its algorithms out, as our loop does. Utilisation counts
products and convolutions once each, against the product rate that is measured here; so are the two floors, of
arithmetic and of the bytes that must move.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
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

DEFAULT = Path(__file__).parent.parent / "jobs" / "experiments" / "cvae-erupting.yaml"
ROUNDS, WARM_UP, STEPS, CURVE = 3, 6, 25, 300
CAREFUL = "plain script, TF32, cuDNN tuned"
# Of float32 weights under Adam: read for the forward and for the backward pass, the gradient written; then Adam reads
# it, the weight and its two averages, and writes three of them.
BYTES_OF_PARAMETER = 4 * (2 + 1 + 4 + 3)
FIELDS: dict[str, dict[str, object]] = {
    "ours, float32": {"speed.precision": "float32"},
    "ours: bfloat16, as by default": {},
    "ours, channels last": {"speed.channels_last": True},
    "ours, compiled": {"speed.compile": True},
    "ours, compiled, channels last": {"speed.compile": True, "speed.channels_last": True},
}

Batch = tuple[Tensor, Tensor, Tensor]  # clips, times, positions
Step = Callable[[Batch], object]


def plain(experiment: Experiment, device: torch.device, precision: str, tuned: bool) -> Step:
    """What a user would write."""
    torch.manual_seed(0)
    with device:
        network = models.build(experiment.model, experiment.clip)
    optimizer = torch.optim.Adam(network.parameters(), lr=experiment.optim.lr)
    latent = experiment.model.latent

    def step(batch: Batch) -> float:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = tuned
        real = to_floats(batch[0].to(device))
        made, mean, std = network(real, torch.randn(len(real), latent, device=device))
        whole, ends = losses.squared_error(made, real), losses.squared_error(made[:, :, [0, -1]], real[:, :, [0, -1]])
        loss = (losses.gaussian_kl(mean, std) + 2 * whole + 2 * ends).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # a script logs it

    return step


def ours(experiment: Experiment, device: torch.device) -> Step:
    with device:  # weights are drawn there, which is faster
        learner = learners.build(experiment, device, steps=10_000)

    def step(batch: Batch) -> dict[str, Tensor]:
        torch.set_float32_matmul_precision("highest" if experiment.speed.precision == "float32" else "high")
        torch.backends.cudnn.benchmark = True
        return learner.update(*batch)

    return step


def ways(experiment: Experiment, device: torch.device) -> dict[str, Callable[[], Step]]:
    ways = {
        "plain script, float32": functools.partial(plain, experiment, device, "highest", False),
        "plain script, TF32": functools.partial(plain, experiment, device, "high", False),
        CAREFUL: functools.partial(plain, experiment, device, "high", True),
    }
    return ways | {
        name: functools.partial(ours, override(experiment, fields), device) for name, fields in FIELDS.items()
    }


def batches(experiment: Experiment, count: int, device: torch.device) -> list[Batch]:
    dealer, size = TrainingSampler(prepare(experiment), experiment.data, 0), experiment.train.global_batch_size
    ready = []
    for step in range(count):
        positions = rank_indices(step, size, 0, 1)
        clips, times = dealer(positions)
        tensors = [torch.from_numpy(array) for array in (clips, times, positions)]
        ready.append(tuple(one.pin_memory() if device.type == "cuda" else one for one in tensors))
    return ready


def now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(step: Step, ready: list[Batch], device: torch.device) -> float:
    for place in range(WARM_UP):
        step(ready[place % len(ready)])
    began_s = now_s(device)
    for place in range(STEPS):
        step(ready[place % len(ready)])
    return (now_s(device) - began_s) / STEPS


def used_gb(device: torch.device, most: bool = False) -> float:
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated)(device) / 1e9


def curve(experiment: Experiment, ready: list[Batch], device: torch.device) -> list[float]:
    """The loss of each step of a training, its noise the same in every precision."""
    step = ours(experiment, device)
    steps = [step(ready[place % len(ready)]) for place in range(CURVE)]
    return [float(named["loss"]) for named in steps]  # type: ignore[index]


def ceilings(device: torch.device) -> tuple[float, float]:
    """What the device reaches here: operations a second in bfloat16 products, and bytes a second read and written."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = []
    for work in (lambda: one @ other, lambda: target.copy_(source)):
        for _ in range(3):
            work()
        began_s = now_s(device)
        for _ in range(10):
            work()
        taken.append((now_s(device) - began_s) / 10)
    return 2 * size**3 / taken[0], 2 * source.numel() / taken[1]


def flops_of(experiment: Experiment, batch: Batch, device: torch.device) -> int:
    step = plain(experiment, device, "high", False)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measured(experiment: Experiment, ready: list[Batch], device: torch.device) -> tuple[list[dict], dict[str, float]]:
    """Seconds a step by way, of each round, and the most memory that each takes, in GB. All stay in memory."""
    rounds: list[dict[str, float]] = []
    begun: dict[str, Step] = {}
    memory_gb = {}
    for _ in range(ROUNDS):
        seen = {}
        for way, begin in ways(experiment, device).items():
            began_s, others_gb = time.perf_counter(), used_gb(device)
            step = begun[way] = begun.get(way) or begin()
            seen[way] = seconds_of(step, ready, device)
            memory_gb.setdefault(way, used_gb(device, most=True) - others_gb)
            free(device)
            print(f"{way}: {1000 * seen[way]:.1f} ms, {time.perf_counter() - began_s:.0f} s in all", flush=True)
        rounds.append(seen)
    return rounds, memory_gb


def table_of(rounds: list[dict[str, float]], memory_gb: dict[str, float], flops: int, rate: float, batch: int) -> Table:
    table = Table(title=f"a step of {batch} clips", title_justify="left")
    for heading in ("way", "ms", "clips/s", "of a careful script's rate", "utilisation", "GB"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name in rounds[0]:
        seconds = statistics.median(seen[name] for seen in rounds)
        ratios = sorted(seen[CAREFUL] / seen[name] for seen in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        cells = [f"{1000 * seconds:.1f}", f"{batch / seconds:.0f}", spread, f"{flops / seconds / rate:.0%}"]
        table.add_row(name, *cells, f"{memory_gb[name]:.1f}")
    return table


def main() -> None:
    words = sys.argv[1:]
    path = words.pop(0) if words and "=" not in words[0] else DEFAULT
    experiment = load(path, words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    resources.connect()
    ready, parameters = batches(experiment, 100, device), 0
    with torch.device("meta"):
        parameters = sum(each.numel() for each in models.build(experiment.model, experiment.clip).parameters())
    rate, bandwidth = ceilings(device)
    flops = flops_of(experiment, ready[0], device)
    free(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(
        f"{name}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s in products, {bandwidth / 1e12:.2f} TB/s; "
        f"{parameters:,} parameters, {flops / 1e12:.2f} TFLOP a step"
    )
    moved = BYTES_OF_PARAMETER * parameters
    console.print(f"floors: {1000 * flops / rate:.1f} ms by arithmetic, {1000 * moved / bandwidth:.1f} ms by bytes")

    rounds, memory_gb = measured(experiment, ready, device)
    free(device)
    console.print(table_of(rounds, memory_gb, flops, rate, experiment.train.global_batch_size))

    curves = {}
    for precision in ("float32", "bfloat16"):
        curves[precision] = curve(override(experiment, {"speed.precision": precision}), ready, device)
        free(device)
    for first in range(0, CURVE, CURVE // 6):
        means = {name: statistics.mean(values[first : first + CURVE // 6]) for name, values in curves.items()}
        console.print(f"steps {first + 1:3} on: " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()))


if __name__ == "__main__":
    main()
