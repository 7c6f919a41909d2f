"""Joining a Ray cluster, and how a training's workers share it with Ray Data and with other trials."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import state  # no public function tells what an autoscaler may add
from ray.exceptions import RayError

from giffy_ray.config import ConfigError, Experiment, override
from giffy_ray.head import AS_ANY_PROCESS, JOB_STOP_WAIT, refuse_long_folder
from giffy_ray.messages import show_worker_messages, worker_setup
from giffy_ray.storage import is_local, without_secrets

# Ray Data's tasks, which decode, take whole CPUs; without one to spare they wait for ever.
_DATA_CPUS = 1
_ANSWER_S = 10  # for a cluster's head to answer
# With less, `ray job stop` may kill a job whose last checkpoint is still being written. Ray's default is 3 s.
_SHORTEST_STOP_WAIT_S, _RAY_STOP_WAIT = 60, "3"
_FEW_BATCHES = 4  # an actor takes ten seconds to start
_ACTOR_BYTES = 1.5e9  # of an actor, beside the weights of its models: libraries and activations
_ROUNDING = 1e-9  # 1 / 0.1 is meant to be 10


@dataclass(frozen=True)
class Share:
    """What each DDP worker takes, and how many trainings fit side by side."""

    cpus_per_worker: float
    gpus_per_worker: float
    trainings: int


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts one. Raises ConfigError where it does not answer.

    Workers get our environment's MLFLOW_*, AWS_* and GOOGLE_*, and what they warn of is printed here. Ray's log lines
    stay in its files.
    """
    if ray.is_initialized():
        return
    warning = stop_wait_warning(os.environ)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    address = _address()
    if address is None:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        refuse_long_folder(f"{folder.rstrip('/')}/ray", len(str(os.getpid())))
    else:
        _refuse_silent(address)
    os.environ.update(AS_ANY_PROCESS | JOB_STOP_WAIT | os.environ)
    setup = {"worker_process_setup_hook": worker_setup(os.environ)}
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, runtime_env=setup)
    except (RuntimeError, ConnectionError, ValueError, RayError) as error:
        where = f"join the cluster at {address}" if address else "start Ray"
        raise ConfigError(f"RAY_ADDRESS: cannot {where}: {str(error).strip().partition(chr(10))[0]}") from error
    show_worker_messages()


def stop_wait_warning(environment: Mapping[str, str]) -> str | None:
    """What to say where `ray job stop` would kill this job too soon; None where it would not, or this is no job.

    Ray gives a job the environment of the process that supervises it, which is the one that reads the waiting time.
    """
    (name,) = JOB_STOP_WAIT
    value = environment.get(name, _RAY_STOP_WAIT)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in environment or (value.isdecimal() and int(value) >= _SHORTEST_STOP_WAIT_S):
        return None
    return (
        f"warning: `ray job stop` kills this job after {value} s ({name}), which may cut off its last checkpoint; "
        f"export {name}={JOB_STOP_WAIT[name]} before `ray start --head`, or set it in the job's runtime environment"
    )


def _address() -> str | None:
    """HOST:PORT of the cluster to join; None where one is to be started."""
    given = os.environ.get("RAY_ADDRESS", "")
    scheme, separator, _ = given.partition("://")
    if separator:
        kind = (
            "Ray Client" if scheme == "ray" else "a dashboard" if scheme in ("http", "https") else "no address of Ray"
        )
        raise ConfigError(
            f"RAY_ADDRESS: {scheme}:// is {kind}; submit the job with `ray job submit --address http://HOST:8265 -- "
            f"python ...`, or unset RAY_ADDRESS to run it here (value {without_secrets(given)!r})"
        )
    try:
        return services.canonicalize_bootstrap_address(None)  # type: ignore[arg-type]
    except (ValueError, ConnectionError, OSError) as error:
        raise ConfigError(f"RAY_ADDRESS: {str(error).partition(chr(10))[0]} (value {given!r})") from error


def _refuse_silent(address: str) -> None:
    """Raises ConfigError where no Ray answers: ray.init would try for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        direct = [("grpc.enable_http_proxy", 0)]  # as Ray itself connects
        with cast(grpc.Channel, init_grpc_channel(address, direct)) as channel:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
    except (grpc.FutureTimeoutError, ValueError, OSError):
        given = os.environ.get("RAY_ADDRESS")
        source = f"value {given!r}" if given else "from ray_current_cluster, which `ray start` wrote"
        raise ConfigError(
            f"RAY_ADDRESS: no Ray answers at {address} ({source}); give the address of a running cluster, or "
            "RAY_ADDRESS=local to start Ray here"
        ) from None


def share_of(experiment: Experiment) -> Share:
    """Divides the cluster, with what its autoscaler may add. Raises ConfigError where it cannot hold the training."""
    there, settings = capacity(), experiment.cluster
    if there.nodes > 1 and is_local(experiment.storage):
        raise ConfigError(
            f"storage: the cluster has {there.nodes} nodes, or may grow to them, which do not share the local folder "
            f"{experiment.storage!r}; give an address such as s3://bucket/giffy_ray"
        )
    use_gpu = there.gpus > 0 if settings.gpu is None else settings.gpu
    if not use_gpu:
        _refuse_gpu_fields(experiment)
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


def _refuse_gpu_fields(experiment: Experiment) -> None:
    for name in ("compress_gradients", "sync_batch_norm"):
        if getattr(experiment.speed, name):
            raise ConfigError(
                f"speed.{name}: works on GPUs only, and this training has none (value True); leave it out"
            )


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


@dataclass(frozen=True)
class Pool:
    """Actors that hold models, and what each takes, as `ray.remote` says it. 0 actors: this process does their work."""

    actors: int
    resources: Mapping[str, Any]


def model_pool(experiment: Experiment, batches: int, weight_bytes: int) -> Pool:
    """As many actors as there are GPUs, or, where none is free, CPUs; no more than there are batches, or fit in memory.

    Few batches do not pay for actors to start, and without Ray there are none.
    """
    if batches <= _FEW_BATCHES or not ray.is_initialized():
        return Pool(0, {})
    there, free = ray.cluster_resources(), ray.available_resources()
    on_gpu = experiment.cluster.gpu is not False and free.get("GPU", 0) >= 1
    # Twice the weights: those that come and those that are built.
    memory = int(_ACTOR_BYTES + 2 * weight_bytes)
    fitting = int(there.get("memory", 0) // memory)
    actors = max(1, min(int(there["GPU" if on_gpu else "CPU"]), batches, fitting))
    taken = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0}
    return Pool(actors, taken | ({"memory": memory} if fitting else {}))


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
