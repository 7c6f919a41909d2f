"""Measures what restoring takes: benchmarks/restore.py [EXPERIMENT] [section.field=value ...] [--workers N]

By default that of Table 1's CVAE, with 485 million parameters: 5.8 GB on disk, and up to twice as much memory for each
worker. Two ways take turns, in processes of their own on this machine: `each`, where every worker reads, verifies and
loads all files, as earlier versions did, and `broadcast`, where rank 0 does and sends the others each tensor. Printed
are the resident memory of a worker before it restores, at its peak (mapped files count), and after it has written to
all of its state, as the first step does; the bytes that it read (mapped files do not count), and the seconds until the
slowest is ready.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from giffy_ray.cluster.local import free_port
from giffy_ray.config import Experiment, from_yaml, load, override, to_yaml
from giffy_ray.training import checkpoints, learners
from giffy_ray.training.checkpoints import Snapshot, TrainState
from giffy_ray.training.learners import Learner

ROOT = Path(__file__).parent.parent
TABLE_1 = ROOT / "jobs" / "experiments" / "cvae-erupting.yaml"
WAYS = ("each", "broadcast")


def restore_on_each(location: str, learner: Learner) -> None:
    """As earlier versions restored: on every worker, from whole files."""
    checkpoints.verify(location)
    folder = Path(location)
    for name, network in learner.networks.items():
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    tensors = load_file(folder / "optimizers.safetensors")
    numbers = json.loads((folder / "position.json").read_text())["optimizers"]
    for name, optimizer in learner.optimizers.items():
        state: dict = {int(index): dict(values) for index, values in numbers[name]["state"].items()}
        for key, tensor in tensors.items():
            of, index, entry = key.rsplit("/", 2)
            if of == name:
                state[int(index)][entry] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": numbers[name]["param_groups"]})


def status_bytes(field: str, file: str = "/proc/self/status", unit_bytes: int = 1024) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * unit_bytes for line in lines if line.startswith(f"{field}:"))


def write_checkpoint(_: int, yaml: str, place: str) -> None:
    """After one step of the optimisers with random gradients."""
    experiment = from_yaml(yaml)
    learner = learners.build(experiment, torch.device("cpu"))
    for optimizer in learner.optimizers.values():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.rand_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    Path(place).mkdir()
    Snapshot(learner, experiment, TrainState(1)).save(Path(place))


def work(rank: int, yaml: str, place: str, way: str, workers: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    learner = learners.build(override(from_yaml(yaml), {"train.seed": 1}), torch.device("cpu"))
    dist.barrier()
    before, read = status_bytes("VmRSS"), status_bytes("rchar", "/proc/self/io", 1)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began_s = time.perf_counter()
    if way == "each":
        restore_on_each(place, learner)
    else:
        checkpoints.restore(place, learner)
    dist.barrier()
    seconds = time.perf_counter() - began_s
    for optimizer in learner.optimizers.values():
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.add_(0)
    weights = [weight for network in learner.networks.values() for weight in network.parameters()]
    measured = {
        "before": before,
        "peak": status_bytes("VmHWM"),
        "after": status_bytes("VmRSS"),
        "read": status_bytes("rchar", "/proc/self/io", 1) - read,
        "seconds": seconds,
        "checksum": sum(float(weight.detach().sum(dtype=torch.float64)) for weight in weights),
    }
    Path(folder, f"{way}-{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def restored(experiment: Experiment, place: str, way: str, workers: int) -> list[dict[str, float]]:
    """Returns the measurements of each worker."""
    with tempfile.TemporaryDirectory() as folder:
        words = (to_yaml(experiment), place, way, workers, free_port(), folder)
        torch.multiprocessing.spawn(work, words, nprocs=workers)  # type: ignore[attr-defined]
        return [json.loads(Path(folder, f"{way}-{rank}.json").read_text()) for rank in range(workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default=str(TABLE_1))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where the checkpoint is written, and removed at the end; a temporary folder")
    asked = parser.parse_args()
    experiment = load(Path(asked.experiment), [*asked.overrides, "cluster.workers=1"])
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        place = str(Path(folder, "checkpoint_1"))
        torch.multiprocessing.spawn(write_checkpoint, (to_yaml(experiment), place), nprocs=1)  # type: ignore[attr-defined]
        size = sum(file.stat().st_size for file in Path(place).iterdir())
        found = {way: restored(experiment, place, way, asked.workers) for way in WAYS}
    assert len({one["checksum"] for ranks in found.values() for one in ranks}) == 1, "the two ways differ"
    table = Table(title=f"restoring {size / 1e9:.2f} GB with {asked.workers} workers, GB", title_justify="left")
    for heading in ("way", "rank", "before", "peak", "after", "peak above after", "read", "seconds"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, ranks in found.items():
        for rank, one in enumerate(ranks):
            sizes = (one["before"], one["peak"], one["after"], one["peak"] - one["after"], one["read"])
            table.add_row(way, str(rank), *(f"{value / 1e9:.3f}" for value in sizes), f"{one['seconds']:.1f}")
        total = sum(one["peak"] for one in ranks)
        table.add_row(way, "all", "", f"{total / 1e9:.3f}", "", "", "", "", end_section=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
