"""Connects to a Ray cluster, and divides its resources among workers, Ray Data and concurrent trials."""

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
from ray._private.state import state  # no public function returns what an autoscaler may add
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from giffy_ray.cluster.local import DEFAULT_NICENESS_ENV, JOB_STOP_WAIT_ENV, check_temp_dir_length
from giffy_ray.cluster.placement import Node, WorkerResources, plan, plan_trials
from giffy_ray.cluster.shared_storage import Answer, check_growth, check_nodes
from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.messages import make_worker_setup_hook, show_worker_messages
from giffy_ray.core.storage import redact_credentials

_CONNECT_TIMEOUT_S = 10
_MIN_STOP_WAIT_S = 60  # with less, `ray job stop` may kill a job while it writes its last checkpoint
_RAY_STOP_WAIT_S = "3"  # Ray's default
_NODE_TIMEOUT_S = 120  # for a node to start a process and look at its folders
_MAX_LOCAL_BATCHES = 4  # more are worth the ten seconds that an actor takes to start
_ACTOR_BYTES = 1.5e9  # memory of an actor besides the weights of its models: libraries and activations


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS, or that of this machine, or starts one.

    Forwards MLFLOW_*, AWS_* and GOOGLE_* to the workers, and prints their warnings here. Ray's own log lines stay in
    its files.

    Raises:
        ConfigError: RAY_ADDRESS is wrong, or the cluster does not answer.
    """
    if ray.is_initialized():
        return
    warning = stop_wait_warning(os.environ)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    address = _find_cluster_address()
    if address is None:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        check_temp_dir_length(f"{folder.rstrip('/')}/ray", len(str(os.getpid())))
    else:
        _check_reachable(address)
    os.environ.update(DEFAULT_NICENESS_ENV | JOB_STOP_WAIT_ENV | os.environ)
    runtime_env = {"worker_process_setup_hook": make_worker_setup_hook(os.environ)}
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, runtime_env=runtime_env)
    except (RuntimeError, ConnectionError, ValueError, RayError) as error:
        action = f"join the cluster at {address}" if address else "start Ray"
        raise ConfigError(f"RAY_ADDRESS: cannot {action}: {str(error).strip().partition(chr(10))[0]}") from error
    show_worker_messages()


def stop_wait_warning(environment: Mapping[str, str]) -> str | None:
    """Returns a warning if `ray job stop` would kill this job too soon. None otherwise, and outside a Ray job.

    The supervisor of the job reads the waiting time, and a job inherits the supervisor's environment.
    """
    (name,) = JOB_STOP_WAIT_ENV
    value = environment.get(name, _RAY_STOP_WAIT_S)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in environment or (value.isdecimal() and int(value) >= _MIN_STOP_WAIT_S):
        return None
    return (
        f"warning: `ray job stop` kills this job after {value} s ({name}), which may cut off its last checkpoint; "
        f"export {name}={JOB_STOP_WAIT_ENV[name]} before `ray start --head`, or set it in the job's runtime environment"
    )


def _find_cluster_address() -> str | None:
    """Returns HOST:PORT of the cluster to join, or None to start one."""
    ray_address = os.environ.get("RAY_ADDRESS", "")
    scheme, separator, _ = ray_address.partition("://")
    if separator:
        if scheme == "ray":
            kind = "Ray Client"
        elif scheme in ("http", "https"):
            kind = "a dashboard"
        else:
            kind = "no address of Ray"
        raise ConfigError(
            f"RAY_ADDRESS: {scheme}:// is {kind}; submit the job with `ray job submit --address http://HOST:8265 -- "
            f"python ...`, or unset RAY_ADDRESS to run it here (value {redact_credentials(ray_address)!r})"
        )
    try:
        return services.canonicalize_bootstrap_address(None)  # type: ignore[arg-type]
    except (ValueError, ConnectionError, OSError) as error:
        raise ConfigError(f"RAY_ADDRESS: {str(error).partition(chr(10))[0]} (value {ray_address!r})") from error


def _check_reachable(address: str) -> None:
    """Raises ConfigError if no Ray answers. ray.init would retry for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        options = [("grpc.enable_http_proxy", 0)]  # Ray's own
        with cast(grpc.Channel, init_grpc_channel(address, options)) as channel:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_TIMEOUT_S)
    except (grpc.FutureTimeoutError, ValueError, OSError):
        ray_address = os.environ.get("RAY_ADDRESS")
        source = f"value {ray_address!r}" if ray_address else "from ray_current_cluster, which `ray start` wrote"
        raise ConfigError(
            f"RAY_ADDRESS: no Ray answers at {address} ({source}); give the address of a running cluster, or "
            "RAY_ADDRESS=local to start Ray here"
        ) from None


def resources_for(experiment: Experiment) -> WorkerResources:
    """Divides the cluster, including the nodes that its autoscaler may add, among the workers of a training.

    Raises:
        ConfigError: The cluster cannot hold the training, or its nodes do not share a local folder of it.
    """
    check_folders(experiment)
    return plan(list_nodes(), experiment)


def trial_resources_for(experiment: Experiment) -> WorkerResources:
    """Divides the cluster among the trials of a search; see `plan_trials`."""
    return plan_trials(list_nodes(), experiment)


def check_folders(experiment: Experiment) -> None:
    """Checks that all nodes share a local `storage` and `data.root` with this one.

    If the cluster may grow, `cluster.shared_storage` must state that future nodes share them too.

    Raises:
        ConfigError: A node does not share a folder.
    """
    live_nodes = _list_live_nodes()
    max_nodes = _count_max_nodes()
    if max_nodes > len(live_nodes):
        check_growth(experiment, max_nodes)
    if len(live_nodes) > 1:
        check_nodes(experiment, functools.partial(_run_on_each, live_nodes))


@dataclass(frozen=True)
class Pool:
    """Actors that hold models.

    Attributes:
        actors: Number of actors; with 0 this process does their work.
        resources: Options of `ray.remote` for each.
    """

    actors: int
    resources: Mapping[str, Any]


def model_pool(experiment: Experiment, batches: int, weight_bytes: int) -> Pool:
    """Plans one actor per GPU, or per CPU if no GPU is free. Without Ray, or for a few batches, there are no actors.

    Args:
        experiment: The evaluation.
        batches: Number of batches, which limits the actors.
        weight_bytes: Size of the models, which limits the actors by memory.
    """
    if batches <= _MAX_LOCAL_BATCHES or not ray.is_initialized():
        return Pool(0, {})
    total = ray.cluster_resources()
    available = ray.available_resources()
    on_gpu = experiment.cluster.gpu is not False and available.get("GPU", 0) >= 1
    memory_bytes = int(_ACTOR_BYTES + 2 * weight_bytes)  # twice: the weights as received, and in the models
    fitting = int(total.get("memory", 0) // memory_bytes)
    actors = max(1, min(int(total["GPU" if on_gpu else "CPU"]), batches, fitting))
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0}
    if fitting:
        resources["memory"] = memory_bytes
    return Pool(actors, resources)


def list_nodes() -> list[Node]:
    """Lists the live nodes, and those that an autoscaler may add."""
    nodes = [_to_node(name, node["Resources"]) for name, node in _list_live_nodes().items()]
    autoscaler = state.get_cluster_config()
    for group in autoscaler.node_group_configs if autoscaler else ():
        group_node = _to_node(group.name or "node", group.resources)
        existing = sum((node.cpus, node.gpus) == (group_node.cpus, group_node.gpus) for node in nodes if node.live)
        count = _max_group_size(group) - existing
        if count > 0:
            nodes.append(replace(group_node, count=count, live=False))
    return nodes


def _to_node(name: str, resources: Mapping[str, float]) -> Node:
    return Node(name, float(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _max_group_size(group: Any) -> int:
    """Returns the most nodes of an autoscaler's group, without the head. Ray writes -1 for any number."""
    return sys.maxsize if group.max_count < 0 else group.max_count


def _count_max_nodes() -> int:
    """Counts the nodes that the cluster has, or may grow to."""
    autoscaler = state.get_cluster_config()
    group_sizes = [_max_group_size(group) for group in autoscaler.node_group_configs] if autoscaler else []
    return max(len(_list_live_nodes()), 1 + sum(group_sizes))


def _list_live_nodes() -> dict[str, dict[str, Any]]:
    """Returns Ray's entries of the live nodes by host name, with part of the node id if a host has several nodes."""
    live_nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes_per_host = Counter(node["NodeManagerHostname"] for node in live_nodes)
    named_nodes = {}
    for node in live_nodes:
        host = node["NodeManagerHostname"]
        name = host if nodes_per_host[host] == 1 else f"{host}-{node['NodeID'][:6]}"
        named_nodes[name] = node
    return named_nodes


def _run_on_each(
    nodes: Mapping[str, Mapping[str, Any]], function: Callable[..., Answer], *arguments: Any
) -> dict[str, Answer]:
    """Runs `function` on each node. Returns its answers, or why there is none. The tasks run on busy nodes too."""
    task = ray.remote(function)
    futures = {
        name: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for name, node in nodes.items()
    }
    ray.wait(list(futures.values()), num_returns=len(futures), timeout=_NODE_TIMEOUT_S)
    return {name: _get_answer(future) for name, future in futures.items()}


def _get_answer(future: Any) -> Answer:
    try:
        return ray.get(future, timeout=0)
    except GetTimeoutError:
        return Answer(f"it did not answer within {_NODE_TIMEOUT_S} s")
    except RayError as error:
        return Answer(f"the check failed there: {str(error).strip().rpartition(chr(10))[2]}")


# By default glibc returns large blocks to the kernel, and the page faults of requesting them again take a quarter of a
# CPU training step. A single arena, because any other one returns blocks above 64 MB regardless, and the training runs
# in a thread. Huge pages reduce the number of page faults.
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
