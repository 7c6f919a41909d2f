"""How many workers fit on the nodes of a cluster, and what each of them gets. Pure arithmetic, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from giffy_ray.config import ConfigError, Experiment, override

# Ray Data's decode tasks take whole CPUs. If no node has one to spare, they are never scheduled.
DATA_CPUS = 1
_EPSILON = 1e-9  # so that 1 / 0.1 counts as 10
_RESOURCE_UNITS = 10_000  # Ray counts resources in ten-thousandths
_MAX_SHOWN_NODES = 8


@dataclass(frozen=True)
class Node:
    """One or more equal nodes of a cluster.

    Attributes:
        name: Name for the user.
        cpus: CPUs of one node.
        gpus: GPUs of one node.
        count: How many such nodes there are.
        live: False if an autoscaler may add them.
    """

    name: str
    cpus: float
    gpus: int = 0
    count: int = 1
    live: bool = True


@dataclass(frozen=True)
class WorkerResources:
    """Resources of each DDP worker.

    Attributes:
        cpus_per_worker: A whole number, or a fraction below 1.
        gpus_per_worker: GPUs, or a fraction of one that workers share.
        max_concurrent: How many trainings or trials fit at the same time.
        summary: All of this as text.
    """

    cpus_per_worker: float
    gpus_per_worker: float
    max_concurrent: int
    summary: str = field(default="", compare=False)


def plan(nodes: Sequence[Node], experiment: Experiment) -> WorkerResources:
    """Divides the nodes among the workers of one training.

    The workers fit however Ray places them. If `data.cache_decoded` is false, one node keeps a whole CPU for decode
    tasks. A GPU worker gets one CPU. CPU workers share all cores: each gets whole CPUs, from which Ray sets its number
    of threads, or a fraction if there are more workers than cores. Nodes that an autoscaler may add count only if the
    live nodes have less than a CPU per worker.

    Args:
        nodes: The nodes of the cluster.
        experiment: The training.

    Raises:
        ConfigError: The nodes cannot hold the training.
    """
    cluster = experiment.cluster
    decodes = not experiment.data.cache_decoded
    use_gpu = _uses_gpu(nodes, experiment)
    if not use_gpu:
        _reject_gpu_fields(experiment)
    if all(node.cpus < DATA_CPUS for node in nodes):
        raise ConfigError(
            f"cluster: no node has the whole CPU that decoding a video needs ({_describe_nodes(nodes)}); add a larger "
            "node"
        )
    if use_gpu:
        _check_totals(nodes, cluster.min_workers, use_gpu, decodes)
        fitting = count_safe_workers(nodes, 1.0, 1, decodes)
        if fitting < cluster.min_workers:
            raise ConfigError(
                _does_not_fit_message(nodes, "cluster.workers", cluster.min_workers, fitting, 1.0, 1, decodes)
            )
        workers = min(fitting, cluster.max_workers)
        max_concurrent = max(1, fitting // cluster.max_workers)
        return WorkerResources(1.0, 1, max_concurrent, _summarize(nodes, experiment, workers, 1.0, 1))
    for workers in range(cluster.max_workers, cluster.min_workers - 1, -1):
        counted = _select_needed_nodes(nodes, workers, decodes)
        cpus = max_cpus_per_worker(counted, workers, decodes)
        if cpus:
            return WorkerResources(cpus, 0, 1, _summarize(counted, experiment, workers, cpus, 0))
    _check_totals(nodes, cluster.min_workers, use_gpu, decodes)
    fitting = count_safe_workers(nodes, 1.0, 0, decodes)
    raise ConfigError(_does_not_fit_message(nodes, "cluster.workers", cluster.min_workers, fitting, 1.0, 0, decodes))


def plan_trials(nodes: Sequence[Node], experiment: Experiment) -> WorkerResources:
    """Divides the nodes among the trials of a search, which have `search.workers` workers each.

    Runs as many trials at a time as there are cores or GPUs. If the search has fewer trials, each gets more CPUs.

    Args:
        nodes: The nodes of the cluster.
        experiment: The search.

    Raises:
        ConfigError: The nodes cannot hold a trial.
    """
    workers = experiment.search.workers
    gpus_per_worker = experiment.search.gpus_per_worker
    decodes = not experiment.data.cache_decoded
    trial = override(experiment, {"cluster.workers": workers})
    plan(nodes, trial)  # reports what already prevents a single training
    if _uses_gpu(nodes, trial):
        gpu_slots = _sum_over_nodes(nodes, lambda node: _count_gpu_slots(node.gpus, gpus_per_worker))
        if gpu_slots < workers:
            raise ConfigError(
                f"search.gpus_per_worker: search.workers={workers} need {workers * gpus_per_worker:g} GPUs, and the "
                f"cluster has or may add {_sum_over_nodes(nodes, lambda node: node.gpus)} (value {gpus_per_worker:g})"
            )
        fitting = count_safe_workers(nodes, 1.0, gpus_per_worker, decodes)
        if fitting < workers:
            raise ConfigError(
                _does_not_fit_message(nodes, "search.workers", workers, fitting, 1.0, gpus_per_worker, decodes)
            )
        max_concurrent = fitting // workers
        summary = _summarize_trials(max_concurrent, workers, 1.0, gpus_per_worker)
        return WorkerResources(1.0, gpus_per_worker, max_concurrent, summary)
    # A single-worker trial may get less than a CPU, and then shares a core with decode tasks.
    cores = _sum_over_nodes(nodes, lambda node: int(node.cpus))
    capacity = cores if workers == 1 else count_safe_workers(nodes, 1.0, 0, decodes)
    for max_concurrent in range(max(1, min(capacity // workers, experiment.search.trials)), 0, -1):
        counted = _select_needed_nodes(nodes, max_concurrent * workers, decodes)
        cpus = max_cpus_per_worker(counted, max_concurrent * workers, decodes)
        if cpus:
            return WorkerResources(cpus, 0, max_concurrent, _summarize_trials(max_concurrent, workers, cpus, 0))
    raise AssertionError("a single trial fits wherever a training does")


def count_safe_workers(nodes: Iterable[Node], cpus: float, gpus: float, decodes: bool) -> int:
    """Returns the largest number of workers that is safe however Ray places them.

    All of them fit, and with `decodes`, no placement leaves every node with less than a CPU.

    Args:
        nodes: The nodes.
        cpus: CPUs per worker.
        gpus: GPUs per worker.
        decodes: Whether Ray Data decodes videos during the training.
    """
    fitting = 0
    blocking = 0.0
    for node in nodes:
        fitting += node.count * _count_fitting(node, cpus, gpus)
        blocking += node.count * _count_blocking(node, cpus, gpus)
    return max(0, int(min(fitting, blocking - 1))) if decodes else fitting


def max_cpus_per_worker(nodes: Sequence[Node], workers: int, decodes: bool) -> float | None:
    """Returns the most CPUs that each of `workers` CPU workers can get, or None if they do not fit.

    The result is a whole number, or a fraction below 1. With `decodes` a larger number can be safe although a smaller
    one is not: on a node of 8 CPUs, one worker of 7 leaves a CPU free, and two workers of 4 do not. So the function
    tries every candidate: each number at which a node is full, or has exactly one CPU left.
    """
    largest = max((int(node.cpus) for node in nodes), default=0)
    for cpus in range(largest, 0, -1):
        if count_safe_workers(nodes, cpus, 0, decodes) >= workers:
            return float(cpus)
    shareable = {cpus for node in nodes for cpus in (node.cpus, node.cpus - DATA_CPUS) if cpus > 0}
    candidates = {
        math.floor(cpus / count * _RESOURCE_UNITS + _EPSILON) for cpus in shareable for count in range(1, workers + 1)
    }
    for units in sorted(candidates, reverse=True):
        cpus = units / _RESOURCE_UNITS
        if 0 < units < _RESOURCE_UNITS and count_safe_workers(nodes, cpus, 0, decodes) >= workers:
            return cpus
    return None


def predict_placement(nodes: Sequence[Node], workers: int, cpus: float, gpus: float) -> dict[str, int]:
    """Predicts how many workers Ray places on each node: it spreads CPU workers, and packs GPU workers."""
    placed = {node.name: 0 for node in nodes}
    capacity = {node.name: node.count * _count_fitting(node, cpus, gpus) for node in nodes}
    node_count = {node.name: node.count for node in nodes}
    order = sorted(nodes, key=lambda node: (not node.live, -node.gpus if gpus else -node.cpus))
    for _ in range(workers):
        free = [node.name for node in order if placed[node.name] < capacity[node.name]]
        name = free[0] if gpus else min(free, key=lambda name: placed[name] // node_count[name])
        placed[name] += 1
    return {name: count for name, count in placed.items() if count}


def _count_gpu_slots(gpus: int, gpus_per_worker: float) -> int:
    """Counts the workers that fit on the GPUs of a node. Below 1, workers share a GPU; above, they take whole ones."""
    if gpus_per_worker < 1:
        return gpus * int(1 / gpus_per_worker + _EPSILON)
    return int(gpus / gpus_per_worker)


def _count_fitting(node: Node, cpus: float, gpus: float) -> int:
    """Counts the workers that fit on one such node."""
    by_cpus = math.floor(node.cpus / cpus + _EPSILON)
    return min(by_cpus, _count_gpu_slots(node.gpus, gpus)) if gpus else by_cpus


def _count_blocking(node: Node, cpus: float, gpus: float) -> float:
    """Returns the fewest workers that leave less than a CPU on one such node; infinity if so many do not fit."""
    if node.cpus < DATA_CPUS:
        return 0
    workers = math.floor((node.cpus - DATA_CPUS) / cpus + _EPSILON) + 1
    return workers if workers <= _count_fitting(node, cpus, gpus) else math.inf


def _select_needed_nodes(nodes: Sequence[Node], workers: int, decodes: bool) -> list[Node]:
    """Returns the live nodes, and the fewest others that give each CPU worker a CPU, or all if that is not enough."""
    selected = [node for node in nodes if node.live]
    for group in sorted((node for node in nodes if not node.live), key=lambda node: -node.cpus):
        for count in range(min(group.count, workers + 1) + 1):
            added = Node(group.name, group.cpus, group.gpus, count, live=False)
            if count_safe_workers([*selected, added], 1.0, 0, decodes) >= workers:
                return [*selected, added] if count else selected
        selected.append(group)
    return selected


def _sum_over_nodes(nodes: Iterable[Node], amount: Callable[[Node], Any]) -> Any:
    return sum(node.count * amount(node) for node in nodes)


def _uses_gpu(nodes: Sequence[Node], experiment: Experiment) -> bool:
    if experiment.cluster.gpu is None:
        return any(node.gpus for node in nodes)
    return experiment.cluster.gpu


def _reject_gpu_fields(experiment: Experiment) -> None:
    for name in ("compress_gradients", "sync_batch_norm"):
        if getattr(experiment.speed, name):
            raise ConfigError(f"speed.{name}: needs GPUs, and this training has none; remove it (value True)")


def _check_totals(nodes: Sequence[Node], workers: int, use_gpu: bool, decodes: bool) -> None:
    """Raises ConfigError if the cluster as a whole has too few CPUs or GPUs."""
    gpus = _sum_over_nodes(nodes, lambda node: node.gpus)
    cpus = _sum_over_nodes(nodes, lambda node: node.cpus)
    if use_gpu and gpus < workers:
        raise ConfigError(
            f"cluster.workers: each worker needs a GPU, and the cluster has or may add {gpus} (value {workers})"
        )
    needed = (workers if use_gpu else 1) + (DATA_CPUS if decodes else 0)
    if cpus < needed:
        consumers = f"{workers} worker{'' if workers == 1 else 's'}{' and Ray Data' if decodes else ''}"
        raise ConfigError(
            f"cluster.workers: {consumers} need {needed} CPUs, and the cluster has or may add {cpus:g} (value "
            f"{workers})"
        )


def _does_not_fit_message(
    nodes: Sequence[Node], field_name: str, workers: int, fitting: int, cpus: float, gpus: float, decodes: bool
) -> str:
    spare = " and leave a whole CPU on one of them to decode videos (data.cache_decoded=false)" if decodes else ""
    return (
        f"{field_name}: at most {fitting} workers of {_describe_resources(cpus, gpus)} fit on the nodes{spare} (value "
        f"{workers}); the cluster has or may add {_describe_nodes(nodes)}"
    )


def _summarize(nodes: Sequence[Node], experiment: Experiment, workers: int, cpus: float, gpus: float) -> str:
    cluster = experiment.cluster
    is_elastic = cluster.min_workers != cluster.max_workers
    count = f"{cluster.min_workers} to {cluster.max_workers}" if is_elastic else f"{workers}"
    placed = predict_placement(nodes, workers, cpus, gpus)
    live = {node.name: node.live for node in nodes}
    placements = [f"{name if live[name] else f'to be added, {name}'}: {number}" for name, number in placed.items()]
    where = ", ".join(placements[:_MAX_SHOWN_NODES]) + (", ..." if len(placements) > _MAX_SHOWN_NODES else "")
    data = ""
    if not experiment.data.cache_decoded:
        counted = [node for node in nodes if node.live or node.name in placed]
        free = _sum_over_nodes(counted, lambda node: node.cpus) - workers * cpus
        data = f"; {free:g} CPU{'' if free == 1 else 's'} for Ray Data"
    return f"{count} worker{'' if count == '1' else 's'}, {_describe_resources(cpus, gpus)} each ({where}){data}"


def _summarize_trials(max_concurrent: int, workers: int, cpus: float, gpus: float) -> str:
    trials = "1 trial" if max_concurrent == 1 else f"{max_concurrent} trials"
    workers_text = "1 worker" if workers == 1 else f"{workers} workers"
    return f"{trials} at a time, {workers_text} each, {_describe_resources(cpus, gpus)} per worker"


def _describe_resources(cpus: float, gpus: float) -> str:
    """Formats '8 CPUs', or '1 CPU and 1 GPU'."""
    amounts = [(cpus, "CPU"), *([(gpus, "GPU")] if gpus else [])]
    return " and ".join(f"{amount:g} {unit}{'s' if amount > 1 else ''}" for amount, unit in amounts)


def _describe_nodes(nodes: Sequence[Node]) -> str:
    """Formats 'node a with 4 CPUs, 3 x l4 with 8 CPUs and 1 GPU'."""
    descriptions = [
        f"{'' if node.count == 1 else f'{node.count} x '}{node.name} with {_describe_resources(node.cpus, node.gpus)}"
        for node in nodes[:_MAX_SHOWN_NODES]
    ]
    return ", ".join(descriptions) + (", ..." if len(nodes) > _MAX_SHOWN_NODES else "")
