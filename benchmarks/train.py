"""A step of training, side by side with what a user would write instead: benchmarks/train.py [--rounds N] [--steps N]

The model is the CVAE of jobs/experiments/small/cvae.yaml, on built-in clips that are stored already, on the CPU:

    bare        the same steps on batches that lie in memory, in plain processes: the ceiling
    ours        the training loop in Ray Train's workers, its batches dealt by Ray Data
    DataLoader  a plain script: the same network in DistributedDataParallel, torch.optim.Adam, a DataLoader
    Lightning   the same network and loss in a LightningModule, its Trainer with the ddp strategy (where installed)

The ways take turns, with one worker and with two, and each starts its processes anew. Counted is the mean time of the
steps after the first third. Figures are medians over rounds; ratios to `bare` are of one round each, then the median.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from giffy_ray import models
from giffy_ray.cluster import resources
from giffy_ray.cluster.local import DEFAULT_NICENESS_ENV, free_port
from giffy_ray.cluster.resources import resources_for
from giffy_ray.config import Experiment, from_yaml, load, override, to_yaml
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import TrainingSampler, rank_indices
from giffy_ray.training import learners, trainer
from giffy_ray.training.learners import losses
from giffy_ray.training.progress_callback import relay_metrics

CLIPS, BATCH = 320, 16
ROOT = Path(__file__).parent.parent


class Clips(Dataset):
    """What a user would write over the stored clips."""

    def __init__(self, store: ClipDataset):
        self.store = store

    def __len__(self) -> int:
        return len(self.store.split_indices("training"))

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.store.get_clips(np.asarray([row]))[0])


def cvae_loss(network: nn.Module, clips: torch.Tensor, latent: int) -> torch.Tensor:
    real = to_floats(clips)
    made, mean, std = network(real, torch.randn(len(real), latent))
    whole, ends = losses.squared_error(made, real), losses.squared_error(made[:, :, [0, -1]], real[:, :, [0, -1]])
    return (losses.gaussian_kl(mean, std) + whole + ends).mean()


def bare(experiment: Experiment, store: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    learner = learners.build(experiment, torch.device("cpu"), steps)
    dealer = TrainingSampler(store, experiment.data, 0)
    ready = []
    for step in range(8):
        positions = rank_indices(step, BATCH, rank, workers)
        clips, times = dealer(positions)
        ready.append((torch.from_numpy(clips), torch.from_numpy(times), torch.from_numpy(positions)))
    return timed(functools.partial(learner.update, *ready[step % 8]) for step in range(steps))


def plain(experiment: Experiment, store: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    network: nn.Module = models.build(experiment.model, experiment.clip)
    if workers > 1:
        network = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    dataset = Clips(store)
    sampler = DistributedSampler(dataset, workers, rank)
    batches = endless(DataLoader(dataset, BATCH // workers, sampler=sampler, num_workers=1, drop_last=True), sampler)

    def step() -> None:
        loss = cvae_loss(network, next(batches), experiment.model.latent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # a script logs it

    return timed(step for _ in range(steps))


def endless(loader: DataLoader, sampler: DistributedSampler) -> Iterator[torch.Tensor]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def lightning(experiment: Experiment, store: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    import lightning  # type: ignore[import-not-found]

    ended_s: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = models.build(experiment.model, experiment.clip)

        def training_step(self, clips: torch.Tensor) -> torch.Tensor:
            return cvae_loss(self.network, clips, experiment.model.latent)

        def on_train_batch_end(self, *_: Any) -> None:
            ended_s.append(time.perf_counter())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy="ddp" if workers > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(Clips(store), BATCH // workers, shuffle=True, num_workers=1, drop_last=True))
    return np.diff(ended_s).tolist()


def timed(steps: Iterator[Callable[[], Any]]) -> list[float]:
    taken_s = []
    for step in steps:
        began_s = time.perf_counter()
        step()
        taken_s.append(time.perf_counter() - began_s)
    return taken_s


def of_processes(way: Callable, experiment: Experiment, store: ClipDataset, workers: int, steps: int) -> float:
    """Seconds a step, of processes of its own; those of `bare` keep their memory, as ours do."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        words = (way.__name__, to_yaml(experiment), store.location, workers, steps, port, folder)
        with mock.patch.dict(os.environ, resources.MALLOC_ENV if way is bare else {}):
            torch.multiprocessing.spawn(_process, args=words, nprocs=workers)  # type: ignore[attr-defined]
        return float(np.loadtxt(f"{folder}/seconds"))


def _process(rank: int, way: str, yaml: str, store: str, workers: int, steps: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # As torchrun does it, which Lightning looks for.
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
    if workers > 1 and way != "lightning":
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    taken_s = globals()[way](from_yaml(yaml), ClipDataset(store), rank, workers, steps)
    if rank == 0:
        np.savetxt(f"{folder}/seconds", [np.mean(taken_s[len(taken_s) // 3 :])])


def ours(experiment: Experiment, store: ClipDataset, workers: int, steps: int) -> tuple[float, float]:
    """Seconds a step of the last two thirds, and the share of it that waits for data."""
    reports: list[Any] = []
    a_third = -(-steps // 3) * BATCH // CLIPS or 1
    name = f"run-{time.time_ns()}"
    changes = {"name": name, "train.epochs": 3 * a_third, "train.validate_every": a_third}
    with relay_metrics(reports.append) as relay:
        experiment = override(experiment, changes)
        trainer.train(experiment, store, resources_for(experiment), callbacks=[relay])
    last = [report for report in reports if "epoch" in report][1:]
    waits = [report["speed/data_wait_fraction"] for report in last]
    return statistics.mean(report["speed/step_ms"] for report in last) / 1000, statistics.mean(waits)


def one_round(experiment: Experiment, store: ClipDataset, steps: int) -> dict[tuple[str, int], float]:
    """Seconds a step by way and number of workers, and the shares of ours that wait for data."""
    ways = {"bare": bare, "DataLoader": plain, **({"Lightning": lightning} if _has_lightning() else {})}
    seconds = {}
    for workers in (1, 2):
        here = override(experiment, {"cluster.workers": workers})
        for name, way in ways.items():
            seconds[name, workers] = of_processes(way, here, store, workers, steps)
        seconds["ours", workers], seconds["ours, waiting", workers] = ours(here, store, workers, steps)
        print({name: f"{1000 * value:.0f} ms" for (name, count), value in seconds.items() if count == workers})
    return seconds


def _has_lightning() -> bool:
    return importlib.util.find_spec("lightning") is not None


def table_of(rounds: list[dict[tuple[str, int], float]]) -> Table:
    table = Table(title="a step of training; of the bare steps, with the spread over rounds", title_justify="left")
    for heading in ("way", "workers", "ms", "of bare", "waits for data"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, workers in rounds[0]:
        if name.endswith("waiting"):
            continue
        ratios = sorted(seconds[name, workers] / seconds["bare", workers] for seconds in rounds)
        milliseconds = 1000 * statistics.median(seconds[name, workers] for seconds in rounds)
        waits = [seconds[f"{name}, waiting", workers] for seconds in rounds] if name == "ours" else []
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        wait = f"{statistics.median(waits):.1%}" if waits else ""
        table.add_row(name, str(workers), f"{milliseconds:.0f}", "" if name == "bare" else spread, wait)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    words = parser.parse_args()
    # Each process computes with one thread, ours too: so many threads and cores have both ways.
    os.environ |= DEFAULT_NICENESS_ENV
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        changes = {"storage": folder, "train.global_batch_size": BATCH, "data.synthetic.training_clips": CLIPS // 2}
        experiment = override(
            load(ROOT / "jobs/experiments/small/cvae.yaml"), changes | {"data.synthetic.validation_clips": 2}
        )
        store = prepare(experiment)
        rounds = [one_round(experiment, store, words.steps) for _ in range(words.rounds)]
    Console(width=100).print(table_of(rounds))


if __name__ == "__main__":
    main()
