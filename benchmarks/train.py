"""Compares a training step with what a user would write instead.

    PYTHONPATH=. python benchmarks/train.py [--rounds N] [--steps N]

The model is the CVAE of giffy_ray/experiments/small/cvae.yaml, on cached built-in clips, on the CPU:

    bare        the same steps on batches in memory, in plain processes: the ceiling
    giffy_ray   the training loop in Ray Train's workers, with batches from Ray Data
    DataLoader  a plain script: the same network in DistributedDataParallel, torch.optim.Adam, a DataLoader
    Lightning   the same network and loss in a LightningModule, with the Trainer's ddp strategy (if installed)

The methods alternate, with one worker and with two, and each starts new processes. The result of a run is the mean time
of its steps after the first third. The table shows medians over rounds; ratios to `bare` compare methods within one
round, then take the median.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
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

CLIPS, BATCH_SIZE = 320, 16
BARE_BATCHES = 8
WORKER_COUNTS = (1, 2)
ROOT = Path(__file__).parent.parent


class Measurement(NamedTuple):
    step_s: float
    data_wait_fraction: float | None = None


Measurements = Mapping[tuple[str, int], Measurement]  # by method and number of workers


class TrainingClips(Dataset):
    """The dataset that a user would write over the cached clips."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.split_indices("training"))

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.dataset.get_clips(np.asarray([index]))[0])


def cvae_loss(network: nn.Module, clips: torch.Tensor, latent: int) -> torch.Tensor:
    target = to_floats(clips)
    generated, mean, std = network(target, torch.randn(len(target), latent))
    clip_error = losses.squared_error(generated, target)
    ends_error = losses.squared_error(generated[:, :, [0, -1]], target[:, :, [0, -1]])
    return (losses.gaussian_kl(mean, std) + clip_error + ends_error).mean()


def train_bare(experiment: Experiment, dataset: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    learner = learners.build(experiment, torch.device("cpu"), steps)
    sampler = TrainingSampler(dataset, experiment.data, 0)
    batches = []
    for step in range(BARE_BATCHES):
        sample_indices = rank_indices(step, BATCH_SIZE, rank, workers)
        clips, times = sampler(sample_indices)
        batches.append((torch.from_numpy(clips), torch.from_numpy(times), torch.from_numpy(sample_indices)))
    return measure_steps_s(functools.partial(learner.update, *batches[step % BARE_BATCHES]) for step in range(steps))


def train_script(experiment: Experiment, dataset: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    network: nn.Module = models.build(experiment.model, experiment.clip)
    if workers > 1:
        network = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    clips = TrainingClips(dataset)
    sampler = DistributedSampler(clips, workers, rank)
    loader = DataLoader(clips, BATCH_SIZE // workers, sampler=sampler, num_workers=1, drop_last=True)
    batches = iter_endlessly(loader, sampler)

    def step() -> None:
        loss = cvae_loss(network, next(batches), experiment.model.latent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # scripts log it

    return measure_steps_s(step for _ in range(steps))


def iter_endlessly(loader: DataLoader, sampler: DistributedSampler) -> Iterator[torch.Tensor]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def train_lightning(experiment: Experiment, dataset: ClipDataset, rank: int, workers: int, steps: int) -> list[float]:
    import lightning  # type: ignore[import-not-found]

    end_times_s: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = models.build(experiment.model, experiment.clip)

        def training_step(self, clips: torch.Tensor) -> torch.Tensor:
            return cvae_loss(self.network, clips, experiment.model.latent)

        def on_train_batch_end(self, *_: Any) -> None:
            end_times_s.append(time.perf_counter())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    lightning_trainer = lightning.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy="ddp" if workers > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TrainingClips(dataset), BATCH_SIZE // workers, shuffle=True, num_workers=1, drop_last=True)
    lightning_trainer.fit(Module(), loader)
    return np.diff(end_times_s).tolist()


TRAIN_FUNCTIONS: dict[str, Callable[..., list[float]]] = {
    "bare": train_bare,
    "DataLoader": train_script,
    "Lightning": train_lightning,
}


def measure_steps_s(steps: Iterable[Callable[[], Any]]) -> list[float]:
    durations_s = []
    for step in steps:
        start_s = time.perf_counter()
        step()
        durations_s.append(time.perf_counter() - start_s)
    return durations_s


def measure_in_processes(method: str, experiment: Experiment, dataset: ClipDataset, steps: int) -> Measurement:
    """Trains in new processes, one per worker. `bare` uses the same malloc settings as giffy_ray's workers."""
    workers = experiment.cluster.workers
    with tempfile.TemporaryDirectory() as folder:
        arguments = (method, to_yaml(experiment), dataset.location, workers, steps, free_port(), folder)
        with mock.patch.dict(os.environ, resources.MALLOC_ENV if method == "bare" else {}):
            torch.multiprocessing.spawn(_run_worker, args=arguments, nprocs=workers)  # type: ignore[attr-defined]
        return Measurement(float(np.loadtxt(f"{folder}/step_s")))


def _run_worker(
    rank: int, method: str, yaml: str, dataset_location: str, workers: int, steps: int, port: int, folder: str
) -> None:
    torch.set_num_threads(1)
    # Lightning reads the variables of torchrun.
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
    if workers > 1 and method != "Lightning":
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    train = TRAIN_FUNCTIONS[method]
    durations_s = train(from_yaml(yaml), ClipDataset(dataset_location), rank, workers, steps)
    if rank == 0:
        np.savetxt(f"{folder}/step_s", [np.mean(durations_s[len(durations_s) // 3 :])])


def measure_giffy_ray(experiment: Experiment, dataset: ClipDataset, steps: int) -> Measurement:
    """Measures the last two thirds of a training of at least `steps` steps."""
    epochs_per_third = -(-steps // 3) * BATCH_SIZE // CLIPS or 1
    overrides = {
        "name": f"run-{time.time_ns()}",
        "train.epochs": 3 * epochs_per_third,
        "train.validate_every": epochs_per_third,
    }
    experiment = override(experiment, overrides)
    reports: list[Mapping[str, Any]] = []
    with relay_metrics(reports.append) as callback:
        trainer.train(experiment, dataset, resources_for(experiment), callbacks=[callback])
    epoch_reports = [report for report in reports if "epoch" in report][1:]
    return Measurement(
        statistics.mean(report["speed/step_ms"] for report in epoch_reports) / 1000,
        statistics.mean(report["speed/data_wait_fraction"] for report in epoch_reports),
    )


def run_round(experiment: Experiment, dataset: ClipDataset, steps: int) -> Measurements:
    measurements = {}
    for workers in WORKER_COUNTS:
        worker_experiment = override(experiment, {"cluster.workers": workers})
        for method in TRAIN_FUNCTIONS:
            if method != "Lightning" or importlib.util.find_spec("lightning"):
                measurements[method, workers] = measure_in_processes(method, worker_experiment, dataset, steps)
        measurements["giffy_ray", workers] = measure_giffy_ray(worker_experiment, dataset, steps)
        step_times = [
            f"{method} {1000 * measurement.step_s:.0f} ms"
            for (method, count), measurement in measurements.items()
            if count == workers
        ]
        print(f"{workers} worker(s): {', '.join(step_times)}", flush=True)
    return measurements


def format_table(rounds: list[Measurements]) -> Table:
    table = Table(title="one training step, relative to bare steps, with the spread over rounds", title_justify="left")
    for heading in ("method", "workers", "ms", "of bare", "waits for data"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, workers in rounds[0]:
        steps_s = [measurements[method, workers].step_s for measurements in rounds]
        bare_steps_s = [measurements["bare", workers].step_s for measurements in rounds]
        ratios = sorted(step_s / bare_s for step_s, bare_s in zip(steps_s, bare_steps_s, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        fractions = [measurements[method, workers].data_wait_fraction for measurements in rounds]
        known_fractions = [fraction for fraction in fractions if fraction is not None]
        table.add_row(
            method,
            str(workers),
            f"{1000 * statistics.median(steps_s):.0f}",
            "" if method == "bare" else spread,
            f"{statistics.median(known_fractions):.1%}" if known_fractions else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    # Every process of every method computes with one thread, so all methods have the same number of threads.
    os.environ |= DEFAULT_NICENESS_ENV
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "storage": folder,
            "train.global_batch_size": BATCH_SIZE,
            "data.synthetic.training_clips": CLIPS // 2,
            "data.synthetic.validation_clips": 2,
        }
        experiment = override(load(ROOT / "giffy_ray/experiments/small/cvae.yaml"), overrides)
        dataset = prepare(experiment)
        rounds = [run_round(experiment, dataset, arguments.steps) for _ in range(arguments.rounds)]
    Console(width=100).print(format_table(rounds))


if __name__ == "__main__":
    main()
