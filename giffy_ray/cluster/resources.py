"""Joining a Ray cluster, and how a training's workers share it with Ray Data and with other trials."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import grpc
import ray
import ray.train
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import state  # no public function tells what an autoscaler may add
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from giffy_ray.cluster.local import DEFAULT_NICENESS_ENV, JOB_STOP_WAIT_ENV, refuse_long_folder
from giffy_ray.cluster.placement import Node, WorkerResources, plan, plan_trials
from giffy_ray.cluster.shared_storage import Answer, check_each_node, refuse_growth
from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.messages import show_worker_messages, worker_setup
from giffy_ray.core.storage import redact_credentials

_ANSWER_S = 10  # for a cluster's head to answer
# With less, `ray job stop` may kill a job whose last checkpoint is still being written. Ray's default is 3 s.
_SHORTEST_STOP_WAIT_S, _RAY_STOP_WAIT = 60, "3"
_NODE_ANSWER_S = 120  # for a node to start a process and to look at its folders
_FEW_BATCHES = 4  # an actor takes ten seconds to start
_ACTOR_BYTES = 1.5e9  # of an actor, beside the weights of its models: libraries and activations


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
    os.environ.update(DEFAULT_NICENESS_ENV | JOB_STOP_WAIT_ENV | os.environ)
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
    (name,) = JOB_STOP_WAIT_ENV
    value = environment.get(name, _RAY_STOP_WAIT)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in environment or (value.isdecimal() and int(value) >= _SHORTEST_STOP_WAIT_S):
        return None
    return (
        f"warning: `ray job stop` kills this job after {value} s ({name}), which may cut off its last checkpoint; "
        f"export {name}={JOB_STOP_WAIT_ENV[name]} before `ray start --head`, or set it in the job's runtime environment"
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
            f"python ...`, or unset RAY_ADDRESS to run it here (value {redact_credentials(given)!r})"
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


def resources_for(experiment: Experiment) -> WorkerResources:
    """Divides the cluster, with what its autoscaler may add, among the workers of a training.

    Raises ConfigError where it cannot hold the training, or where its nodes do not share a local folder of it.
    """
    check_folders(experiment)
    return plan(nodes_of_cluster(), experiment)


def trial_resources_for(experiment: Experiment) -> WorkerResources:
    """The same for the trials of a search, `search.workers` each: as many side by side as there are cores or GPUs."""
    return plan_trials(nodes_of_cluster(), experiment)


def check_folders(experiment: Experiment) -> None:
    """Raises ConfigError where a node of the cluster does not share a local `storage` or `data.root` with this one.

    On a cluster that may grow, `cluster.shared_storage` must state that the nodes to come share them, too.
    """
    alive, most = _live_nodes(), _most_nodes()
    if most > len(alive):
        refuse_growth(experiment, most)
    if len(alive) > 1:
        check_each_node(experiment, functools.partial(_ask_each, alive))


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


def nodes_of_cluster() -> list[Node]:
    """The live nodes, and what an autoscaler may add to them."""
    nodes = [_node(name, node["Resources"]) for name, node in _live_nodes().items()]
    autoscaler = state.get_cluster_config()
    for group in autoscaler.node_group_configs if autoscaler else ():
        one = _node(group.name or "node", group.resources)
        there = sum((node.cpus, node.gpus) == (one.cpus, one.gpus) for node in nodes if node.live)
        count = _most_of(group) - there
        if count > 0:
            nodes.append(replace(one, count=count, live=False))
    return nodes


def _node(name: str, resources: Mapping[str, float]) -> Node:
    return Node(name, float(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _most_of(group: Any) -> int:
    """The head is not among those that may be added; -1 is any number."""
    return sys.maxsize if group.max_count < 0 else group.max_count


def _most_nodes() -> int:
    """How many nodes the cluster has, or may grow to."""
    autoscaler = state.get_cluster_config()
    added = [_most_of(group) for group in autoscaler.node_group_configs] if autoscaler else []
    return max(len(_live_nodes()), 1 + sum(added))


def _live_nodes() -> dict[str, dict[str, Any]]:
    """Ray's table of the nodes that are alive, by a name for the user: the host's, which several may have in tests."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    return {
        host if hosts[host := node["NodeManagerHostname"]] == 1 else f"{host}-{node['NodeID'][:6]}": node
        for node in alive
    }


def _ask_each(
    nodes: Mapping[str, Mapping[str, Any]], function: Callable[..., Answer], *arguments: Any
) -> dict[str, Answer]:
    """What `function` returns on each node, or why it returned nothing. The tasks take no CPU: a busy node answers."""
    task = ray.remote(function)
    asked = {
        name: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for name, node in nodes.items()
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_NODE_ANSWER_S)
    return {name: _answer_of(answer) for name, answer in asked.items()}


def _answer_of(answer: Any) -> Answer:
    try:
        return ray.get(answer, timeout=0)
    except GetTimeoutError:
        return Answer(f"it did not answer within {_NODE_ANSWER_S} s")
    except RayError as error:
        return Answer(f"it cannot be asked: {str(error).strip().rpartition(chr(10))[2]}")


# glibc gives large blocks back to the kernel, and the pages that are asked for again take a quarter of a step's time
# where a network is trained on the CPU. One arena, as any but the first gives back what is larger than 64 MB all the
# same, and we train in a thread; huge pages, of which there are fewer to ask for.
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
