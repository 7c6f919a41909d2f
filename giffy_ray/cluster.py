"""Joining a Ray cluster, and how a training's workers share it with Ray Data and with other trials."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

import ray
from ray._private.state import state  # no public function tells what an autoscaler may add

from giffy_ray.config import ConfigError, Experiment, override
from giffy_ray.head import AS_ANY_PROCESS
from giffy_ray.storage import is_local

# Ray Data's tasks, which decode, take whole CPUs; without one to spare they wait for ever.
_DATA_CPUS = 1
_ROUNDING = 1e-9  # 1 / 0.1 is meant to be 10


@dataclass(frozen=True)
class Share:
    """What each DDP worker takes, and how many trainings fit side by side."""

    cpus_per_worker: float
    gpus_per_worker: float
    trainings: int


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts one. Ray's log lines stay in its files."""
    if not ray.is_initialized():
        os.environ.update(AS_ANY_PROCESS | os.environ)
        ray.init(logging_level=logging.WARNING, log_to_driver=False)


def share_of(experiment: Experiment) -> Share:
    """Divides the cluster, with what its autoscaler may add. Raises ConfigError where it cannot hold the training."""
    there, settings = capacity(), experiment.cluster
    if there.nodes > 1 and is_local(experiment.storage):
        raise ConfigError(
            f"storage: the cluster has {there.nodes} nodes, or may grow to them, which do not share the local folder "
            f"{experiment.storage!r}; give an address such as s3://bucket/giffy_ray"
        )
    use_gpu = there.gpus > 0 if settings.gpu is None else settings.gpu
    if use_gpu and there.gpus < settings.fewest:
        raise ConfigError(
            f"cluster.workers: each needs a GPU, and the cluster has or may add {there.gpus} (value {settings.fewest})"
        )
    needed = (settings.fewest if use_gpu else 1) + _DATA_CPUS
    if there.cpus < needed:
        raise ConfigError(
            f"cluster.workers: {settings.fewest} and Ray Data need {needed} CPUs; the cluster has or may add "
            f"{there.cpus:g}"
        )
    if use_gpu:
        trainings = min(there.gpus, int(there.cpus) - _DATA_CPUS) // settings.most
        return Share(1.0, 1, max(1, trainings))
    # Logical CPUs: on a small machine the workers and the data tasks take turns on its cores.
    cpus_per_worker = min(1.0, (there.cpus - _DATA_CPUS) / settings.most)
    return Share(cpus_per_worker, 0, max(1, int((there.cpus - _DATA_CPUS) / (settings.most * cpus_per_worker))))


def share_of_trials(experiment: Experiment) -> Share:
    """The same for the trials of a search, `search.workers` each: as many side by side as there are cores or GPUs."""
    workers, of_gpu = experiment.search.workers, experiment.search.gpus_per_worker
    share = share_of(override(experiment, {"cluster.workers": workers}))
    there = capacity()
    if share.gpus_per_worker:
        # A worker below 1 fits on one GPU with others; above, it takes whole ones.
        workers_by_gpus = there.gpus * int(1 / of_gpu + _ROUNDING) if of_gpu < 1 else int(there.gpus / of_gpu)
        if workers_by_gpus < workers:
            raise ConfigError(
                f"search.gpus_per_worker: search.workers={workers} need {workers * of_gpu:g} GPUs, and the cluster has "
                f"or may add {there.gpus} (value {of_gpu:g})"
            )
        side_by_side = min(workers_by_gpus, int(there.cpus) - _DATA_CPUS) // workers
        return Share(1.0, of_gpu, max(1, side_by_side))
    if workers > 1:
        return share
    cores = int(there.cpus)
    return Share((there.cpus - _DATA_CPUS) / cores, 0, cores)


@dataclass(frozen=True)
class Capacity:
    cpus: float
    gpus: int
    nodes: int


def capacity() -> Capacity:
    """What the cluster has now, or, where that is more, what it has once its autoscaler has added all that it may."""
    now, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    autoscaler = state.get_cluster_config()
    if autoscaler is None:
        return Capacity(now.get("CPU", 0.0), int(now.get("GPU", 0)), nodes)
    may_be = state.get_max_resources_from_cluster_config() or {}
    cpus, gpus = (max(now.get(name, 0.0), may_be.get(name, 0)) for name in ("CPU", "GPU"))
    # The head is not among those that may be added; -1 is any number.
    added = [sys.maxsize if group.max_count < 0 else group.max_count for group in autoscaler.node_group_configs]
    return Capacity(cpus, int(gpus), max(nodes, 1 + sum(added)))
