"""Measures memory, reads and time of restoring a checkpoint.

    PYTHONPATH=. python benchmarks/restore.py [EXPERIMENT] [section.field=value ...] [--workers N] [--folder FOLDER]

The default is the CVAE of the paper's Table 1, with 485 million parameters: 5.8 GB on disk, and up to twice as much
memory for each worker. Two methods alternate, in separate processes on this machine:

    each       every worker reads, verifies and loads all files, as earlier versions did
    broadcast  rank 0 does, and broadcasts each tensor

The table shows the resident memory of a worker before it restores, at its peak (mapped files count), and after it has
written to all of its state, as the first step does. It also shows the bytes that the worker read (mapped files do not
count), and the seconds until the slowest worker is ready.
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
from giffy_ray.training import checkpoint_format, checkpoints, learners
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.learners import Learner

ROOT = Path(__file__).parent.parent
TABLE_1 = ROOT / "giffy_ray" / "experiments" / "cvae-erupting.yaml"
METHODS = ("each", "broadcast")


def restore_on_each(checkpoint_dir: str, learner: Learner) -> None:
    """Restores as earlier versions did: on every worker, from whole files."""
    checkpoint_format.verify(checkpoint_dir)
    folder = Path(checkpoint_dir)
    for name, network in learner.networks.items():
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    tensors = load_file(folder / "optimizers.safetensors")
    train_state = json.loads((folder / "position.json").read_text())
    for name, optimizer in learner.optimizers.items():
        values = train_state["optimizers"][name]
        state: dict = {int(index): dict(entries) for index, entries in values["state"].items()}
        for key, tensor in tensors.items():
            optimizer_name, index, entry = key.rsplit("/", 2)
            if optimizer_name == name:
                state[int(index)][entry] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def read_proc_bytes(field: str, file: str = "/proc/self/status", unit_bytes: int = 1024) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * unit_bytes for line in lines if line.startswith(f"{field}:"))


def write_checkpoint(_: int, yaml: str, checkpoint_dir: str) -> None:
    """Writes a checkpoint after one optimizer step with random gradients."""
    experiment = from_yaml(yaml)
    learner = learners.build(experiment, torch.device("cpu"))
    for optimizer in learner.optimizers.values():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.rand_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    Path(checkpoint_dir).mkdir()
    Snapshot(learner, experiment, TrainState(1)).save(Path(checkpoint_dir))


def run_worker(rank: int, yaml: str, checkpoint_dir: str, method: str, workers: int, port: int, folder: str) -> None:
    """Restores the checkpoint on one rank, and writes the measurements to `<folder>/<method>-<rank>.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    learner = learners.build(override(from_yaml(yaml), {"train.seed": 1}), torch.device("cpu"))
    dist.barrier()
    before_bytes = read_proc_bytes("VmRSS")
    read_before_bytes = read_proc_bytes("rchar", "/proc/self/io", 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start_s = time.perf_counter()
    if method == "each":
        restore_on_each(checkpoint_dir, learner)
    else:
        checkpoints.restore(checkpoint_dir, learner)
    dist.barrier()
    duration_s = time.perf_counter() - start_s
    for optimizer in learner.optimizers.values():
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.add_(0)
    weights = [weight for network in learner.networks.values() for weight in network.parameters()]
    measurements = {
        "before": before_bytes,
        "peak": read_proc_bytes("VmHWM"),
        "after": read_proc_bytes("VmRSS"),
        "read": read_proc_bytes("rchar", "/proc/self/io", 1) - read_before_bytes,
        "seconds": duration_s,
        "checksum": sum(float(weight.detach().sum(dtype=torch.float64)) for weight in weights),
    }
    Path(folder, f"{method}-{rank}.json").write_text(json.dumps(measurements))
    dist.barrier()
    dist.destroy_process_group()


def measure(experiment: Experiment, checkpoint_dir: str, method: str, workers: int) -> list[dict[str, float]]:
    """Returns the measurements of each worker."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (to_yaml(experiment), checkpoint_dir, method, workers, free_port(), folder)
        torch.multiprocessing.spawn(run_worker, arguments, nprocs=workers)  # type: ignore[attr-defined]
        return [json.loads(Path(folder, f"{method}-{rank}.json").read_text()) for rank in range(workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default=str(TABLE_1))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="parent of the temporary checkpoint; by default the system's temporary folder")
    arguments = parser.parse_args()
    experiment = load(Path(arguments.experiment), [*arguments.overrides, "cluster.workers=1"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint_dir = str(Path(folder, "checkpoint_1"))
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            write_checkpoint, (to_yaml(experiment), checkpoint_dir), nprocs=1
        )
        size_bytes = sum(file.stat().st_size for file in Path(checkpoint_dir).iterdir())
        results = {method: measure(experiment, checkpoint_dir, method, arguments.workers) for method in METHODS}
    checksums = {measurements["checksum"] for ranks in results.values() for measurements in ranks}
    assert len(checksums) == 1, "the two methods restore different weights"
    title = f"restoring {size_bytes / 1e9:.2f} GB with {arguments.workers} workers, GB"
    table = Table(title=title, title_justify="left")
    for heading in ("method", "rank", "before", "peak", "after", "peak above after", "read", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, ranks in results.items():
        for rank, measurements in enumerate(ranks):
            sizes_bytes = (
                measurements["before"],
                measurements["peak"],
                measurements["after"],
                measurements["peak"] - measurements["after"],
                measurements["read"],
            )
            sizes_gb = [f"{size / 1e9:.3f}" for size in sizes_bytes]
            table.add_row(method, str(rank), *sizes_gb, f"{measurements['seconds']:.1f}")
        total_bytes = sum(measurements["peak"] for measurements in ranks)
        table.add_row(method, "all", "", f"{total_bytes / 1e9:.3f}", "", "", "", "", end_section=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
