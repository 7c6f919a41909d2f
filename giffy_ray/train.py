"""Training: the loop that each worker runs, and the TorchTrainer around it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train.torch import TorchTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from giffy_ray import checkpoints, learners, render
from giffy_ray.cluster import Share
from giffy_ray.config import ConfigError, Experiment, flatten, from_yaml, to_yaml
from giffy_ray.data import stream
from giffy_ray.data.store import Store
from giffy_ray.evaluate import Method, learner_method
from giffy_ray.learners import Learner
from giffy_ray.metrics import l2_report, psnr
from giffy_ray.storage import join, read_text, write_text
from giffy_ray.tracking import open_run

_SAMPLES = 6
# What may differ when a run is started again under its name.
_MAY_CHANGE = ("train.epochs", "storage", "data.root", "cluster.", "tracking.", "evaluate.", "search.")
# Ray Train looks for reports and dead workers this often; its default of 2 s is the price of every report.
_POLL_S = 0.2
_START_TIMEOUT_S = 900  # a cloud node has to boot
# glibc gives large blocks back to the kernel, and the pages that are asked for again take a quarter of a step's time
# where a network is trained on the CPU.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def train_loop(settings: dict[str, Any]) -> None:
    """What every worker runs. `settings`: the experiment as YAML, the store, and the parent of its MLflow run."""
    experiment = from_yaml(settings["experiment"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    store = Store(settings["store"])
    tracker = open_run(experiment, rank, settings["parent"], {"data.fingerprint": store.fingerprint})
    clips, batch, epochs = len(store.rows_of("training")), experiment.train.batch, experiment.train.epochs
    share = batch // workers
    ends = epoch_ends(clips, batch, epochs)
    validated = [epoch for epoch in range(1, epochs + 1) if epoch % experiment.train.validate_every == 0]
    learner = learners.build(experiment, ray.train.torch.get_device(), _parallel, steps=ends[-1])
    make = learner_method(learner, experiment.train.seed)

    steps_done = _resume(learner)
    steps = range(steps_done, ends[-1])
    batches = stream.batches(store, experiment.data, experiment.train.seed, batch, rank, workers, steps)

    def draw_samples() -> bytes:
        return _samples(make, store, experiment.clip.fps)

    if steps_done == 0:
        tracker.log_animation(draw_samples, "validation", step=0)

    # ---------------------------------------------------------------------------------- the training
    for epoch in sorted({*validated, epochs}):
        losses, waited_s, began_s = [], 0.0, time.perf_counter()
        while steps_done < ends[epoch - 1]:
            asked_s = time.perf_counter()
            dealt = next(batches)
            waited_s += time.perf_counter() - asked_s
            losses.append(learner.update(dealt.clips, dealt.times, dealt.positions))
            steps_done += 1
        if not losses:
            continue  # seen before the run was cut
        took_s = time.perf_counter() - began_s
        _share_buffers(learner)

        metrics = {f"train/{name}": value for name, value in _mean_of(losses).items()}
        metrics |= {f"val/{name}": value for name, value in validate(make, store, share).items()}
        metrics["speed/clips_per_s"] = len(losses) * batch / took_s
        metrics["speed/data_wait_fraction"] = waited_s / took_s
        tracker.log_metrics(metrics, step=epoch)
        tracker.log_animation(draw_samples, "validation", step=epoch)
        with checkpoints.written(learner, experiment, steps_done, metrics, rank) as checkpoint:
            ray.train.report(metrics | {"epoch": epoch}, checkpoint=checkpoint)
    tracker.finish()
    # ----------------------------------------------------------------------------------


def epoch_ends(clips: int, batch: int, epochs: int) -> list[int]:
    """The number of steps after which each epoch has been seen whole; batches run on across epochs."""
    return [-(-epoch * clips // batch) for epoch in range(1, epochs + 1)]


def validate(make: Method, store: Store, share: int) -> dict[str, float]:
    """Means over the validation clips, `share` at a time on each worker, which takes every workers-th clip."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = store.rows_of("validation")[rank::workers]
    sums = {"l2_report": 0.0, "psnr": 0.0}
    for first in range(0, len(rows), share):
        chosen = rows[first : first + share]
        real = torch.from_numpy(store.gather(chosen))
        made = make(real[:, 0], real[:, -1], [store.ids[row] for row in chosen])
        sums["l2_report"] += float(l2_report(made, real).sum())
        sums["psnr"] += float(psnr(made, real).sum())
    totals = _over_workers([*sums.values(), len(rows)])
    return {name: total / totals[-1] for name, total in zip(sums, totals, strict=False)}


def train(
    experiment: Experiment,
    store: Store,
    share: Share,
    parent: str | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> str:
    """Trains to the end, or goes on where the run of this name was cut. Returns where the last checkpoint lies.

    `parent` is the id of the MLflow run that this one is shown under. Raises ConfigError before anything starts,
    ray.train.TrainingFailedError after.
    """
    check(experiment, store)
    _claim(experiment, store)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    resources = {"CPU": share.cpus_per_worker, "GPU": share.gpus_per_worker}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"experiment": to_yaml(experiment), "store": store.location, "parent": parent},
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.cluster.workers,
            use_gpu=share.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=experiment.name,
            storage_path=experiment.storage,
            worker_runtime_env={"env_vars": _KEEP_MEMORY},
            callbacks=list(callbacks),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(
                max_failures=experiment.cluster.max_failures, controller_failure_limit=3
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()
    return checkpoints.newest(experiment)


def check(experiment: Experiment, store: Store) -> None:
    """What can be known to be wrong before anything starts. Raises ConfigError."""
    with torch.device("meta"):  # what the model cannot do, said without the memory that it takes
        learners.build(experiment, torch.device("meta"))
    batch, workers = experiment.train.batch, experiment.cluster.workers
    if batch % workers:
        raise ConfigError(f"train.batch: must be a multiple of cluster.workers={workers} (value {batch})")
    for split in ("training", "validation"):
        if not len(store.rows_of(split)):
            raise ConfigError(f"data.root: no {split} clips in it; see {store.location} for what was rejected")


def _claim(experiment: Experiment, store: Store) -> None:
    """Leaves the experiment and its clips' fingerprint in the run's folder, or compares them with what is there."""
    folder = join(experiment.storage, experiment.name)
    text = read_text(join(folder, "experiment.yaml"))
    if text is None:
        write_text(join(folder, "data_set"), store.fingerprint)
        write_text(join(folder, "experiment.yaml"), to_yaml(experiment))
        return
    if read_text(join(folder, "data_set")) != store.fingerprint:
        raise ConfigError(
            f"data.root: the run {experiment.name!r} was started with other clips than there are now in "
            f"{store.location}; give another name=..., or remove {folder}"
        )
    before, now = flatten(from_yaml(text)), flatten(experiment)
    for name in now:
        if before[name] != now[name] and not name.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"{name}: the run {experiment.name!r} was started with {before[name]!r} (value {now[name]!r}); "
                f"give another name=..., or remove {folder}"
            )


def _parallel(network: nn.Module) -> nn.Module:
    if torch.distributed.get_world_size() == 1:
        return network
    return DistributedDataParallel(network)


def _share_buffers(learner: Learner) -> None:
    """Gives all workers the statistics of rank 0's batch norms: those that its checkpoint will hold."""
    for network in learner.networks.values():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _resume(learner: Learner) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return checkpoints.restore(Path(folder), learner)


def _mean_of(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of each named loss over steps and workers."""
    means = [float(torch.stack([loss[name] for loss in losses]).mean()) for name in losses[0]]
    workers = torch.distributed.get_world_size()
    return {name: total / workers for name, total in zip(losses[0], _over_workers(means), strict=True)}


def _over_workers(values: Iterable[float]) -> list[float]:
    """Each value summed over all workers."""
    sums = torch.tensor(list(values), dtype=torch.float64, device=ray.train.torch.get_device())
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def _samples(make: Method, store: Store, fps: float) -> bytes:
    """Real above made, side by side and moving: the first validation clips."""
    rows = store.rows_of("validation")[:_SAMPLES]
    real = torch.from_numpy(store.gather(rows))
    made = make(real[:, 0], real[:, -1], [store.ids[row] for row in rows])
    return render.animation({"real": real.numpy(), "made": made.numpy()}, fps, "webp")
