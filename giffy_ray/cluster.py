"""Joining a Ray cluster, and how a training's workers share it with Ray Data and with other trials."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.storage import is_local

# Ray Data's tasks, which deal the batches and decode, take whole CPUs; without one to spare the workers wait for ever.
_DATA_CPUS = 1
# Only tables and positions pass through it; clips are read from memory maps.
_OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Share:
    """What each DDP worker takes, and how many trainings fit side by side."""

    cpus_per_worker: float
    gpus_per_worker: int
    trainings: int


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts a local one. Ray's own log lines stay in its files."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)


@dataclass(frozen=True)
class Head:
    """A Ray head that this process started."""

    dashboard: str  # also the address of the jobs API
    environment: dict[str, str]  # what a subprocess needs to submit jobs to it


@contextmanager
def local_head(cpus: int | None = None) -> Iterator[Head]:
    """A Ray head with dashboard and jobs API on free ports, with a token of its own; gone when the block ends.

    It is a child of this process and dies with it. Its logs are kept only where the block raises.
    """
    folder = Path(tempfile.mkdtemp(prefix="giffy_ray-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    here = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    # So that jobs find this environment's python and ray, whether it was activated or not.
    here["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    try:
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,
            dashboard_port=_free_port(),
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        dashboard = f"http://{context.dashboard_url}"
        yield Head(dashboard, {**os.environ, "RAY_ADDRESS": dashboard, "PYTHONUNBUFFERED": "1"})
    except BaseException:
        print(f"Ray's logs are in {folder}", file=sys.stderr)
        raise
    else:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
