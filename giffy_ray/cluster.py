"""Joining a Ray cluster, and how a training's workers share it with Ray Data and with other trials."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.storage import is_local

# Ray Data's tasks, which deal the batches and decode, take whole CPUs; without one to spare the workers wait for ever.
_DATA_CPUS = 1


@dataclass(frozen=True)
class Share:
    """What each DDP worker takes, and how many trainings fit side by side."""

    cpus_per_worker: float
    gpus_per_worker: int
    trainings: int


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts one. Ray's log lines stay in its files."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)


def share_of(experiment: Experiment) -> Share:
    """Divides the cluster as it stands now. Raises ConfigError where `cluster.workers` cannot run on it."""
    total, workers = ray.cluster_resources(), experiment.cluster.workers
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and is_local(experiment.storage):
        raise ConfigError(
            f"storage: the cluster has {nodes} nodes, which do not share the local folder "
            f"{experiment.storage!r}; give an address such as s3://bucket/giffy_ray"
        )
    cpus, gpus = total.get("CPU", 0.0), int(total.get("GPU", 0))
    use_gpu = gpus > 0 if experiment.cluster.gpu is None else experiment.cluster.gpu
    if use_gpu:
        return Share(1.0, 1, max(1, gpus // workers))
    if cpus < _DATA_CPUS + 1:
        raise ConfigError(f"the cluster has {cpus:g} CPUs; Ray Data and the workers need {_DATA_CPUS + 1}")
    # Logical CPUs: on a small machine the workers and the data tasks take turns on its cores.
    cpus_per_worker = min(1.0, (cpus - _DATA_CPUS) / workers)
    return Share(cpus_per_worker, 0, max(1, int((cpus - _DATA_CPUS) / (workers * cpus_per_worker))))
