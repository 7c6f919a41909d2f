"""How many workers fit on the nodes of a cluster, and what each of them gets. Pure arithmetic, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from giffy_ray.config import ConfigError, Experiment, override

# Ray Data's tasks, which decode, take whole CPUs; without one to spare on a single node they wait for ever.
DATA_CPUS = 1
_ROUNDING = 1e-9  # 1 / 0.1 is meant to be 10
_GRAIN = 10_000  # Ray counts resources in ten-thousandths
_SHOWN_NODES = 8


@dataclass(frozen=True)
class Node:
    """`count` equal nodes of a cluster. Where they are not `live`, an autoscaler may add them."""

    name: str
    cpus: float
    gpus: int = 0
    count: int = 1
    live: bool = True


@dataclass(frozen=True)
class WorkerResources:
    """What each DDP worker takes, and how many trainings fit side by side."""

    cpus_per_worker: float
    gpus_per_worker: float
    trainings: int
    summary: str = field(default="", compare=False)  # the same in words, for the user


def plan(nodes: Sequence[Node], experiment: Experiment) -> WorkerResources:
    """Divides the nodes among the workers of one training. Raises ConfigError where they cannot hold it.

    However Ray places the workers, they fit; where `data.cache_decoded` is false, one node keeps a whole CPU for decode tasks.
    A GPU worker takes one CPU. CPU workers share all cores: whole CPUs each, as Ray sets their number of threads, or a
    fraction where there are more workers than cores. An autoscaler is counted on only where the live nodes have less
    than a CPU for each worker.
    """
    settings, decodes = experiment.cluster, not experiment.data.cache_decoded
    use_gpu = _uses_gpu(nodes, experiment)
    if not use_gpu:
        _refuse_gpu_fields(experiment)
    if all(node.cpus < DATA_CPUS for node in nodes):
        raise ConfigError(f"cluster: no node has a whole CPU, which decoding a video takes ({_named(nodes)})")
    if use_gpu:
        _check_totals(nodes, settings.min_workers, use_gpu, decodes)
        fitting = most_workers(nodes, 1.0, 1, decodes)
        if fitting < settings.min_workers:
            raise ConfigError(_does_not_fit(nodes, "cluster.workers", settings.min_workers, fitting, 1.0, 1, decodes))
        workers, cpus, gpus = min(fitting, settings.max_workers), 1.0, 1
        return WorkerResources(
            cpus, gpus, max(1, fitting // settings.max_workers), _summary(nodes, experiment, workers, cpus, gpus)
        )
    for workers in range(settings.max_workers, settings.min_workers - 1, -1):
        counted = _nodes_needed(nodes, workers, decodes)
        cpus = largest_share(counted, workers, decodes)
        if cpus:
            return WorkerResources(cpus, 0, 1, _summary(counted, experiment, workers, cpus, 0))
    _check_totals(nodes, settings.min_workers, use_gpu, decodes)
    fitting = most_workers(nodes, 1.0, 0, decodes)
    raise ConfigError(_does_not_fit(nodes, "cluster.workers", settings.min_workers, fitting, 1.0, 0, decodes))


def plan_trials(nodes: Sequence[Node], experiment: Experiment) -> WorkerResources:
    """The same for the trials of a search, `search.workers` each: as many side by side as there are cores or GPUs.

    Where a search has fewer trials than that, each gets more CPUs.
    """
    workers, of_gpu, decodes = (
        experiment.search.workers,
        experiment.search.gpus_per_worker,
        not experiment.data.cache_decoded,
    )
    trial = override(experiment, {"cluster.workers": workers})
    plan(nodes, trial)  # what cannot hold one training is refused in the same words
    if _uses_gpu(nodes, trial):
        by_gpus = _total(nodes, lambda node: _slots(node.gpus, of_gpu))
        if by_gpus < workers:
            raise ConfigError(
                f"search.gpus_per_worker: search.workers={workers} need {workers * of_gpu:g} GPUs, and the cluster has "
                f"or may add {_total(nodes, lambda node: node.gpus)} (value {of_gpu:g})"
            )
        fitting = most_workers(nodes, 1.0, of_gpu, decodes)
        if fitting < workers:
            raise ConfigError(_does_not_fit(nodes, "search.workers", workers, fitting, 1.0, of_gpu, decodes))
        side_by_side = fitting // workers
        return WorkerResources(1.0, of_gpu, side_by_side, _summary_of_trials(side_by_side, workers, 1.0, of_gpu))
    # A trial of one worker may take less than a CPU: it then shares a core with decode tasks.
    cores = _total(nodes, lambda node: int(node.cpus))
    room = cores if workers == 1 else most_workers(nodes, 1.0, 0, decodes)
    for side_by_side in range(max(1, min(room // workers, experiment.search.trials)), 0, -1):
        counted = _nodes_needed(nodes, side_by_side * workers, decodes)
        cpus = largest_share(counted, side_by_side * workers, decodes)
        if cpus:
            return WorkerResources(cpus, 0, side_by_side, _summary_of_trials(side_by_side, workers, cpus, 0))
    raise AssertionError("a single trial is a training, which fits")


def most_workers(nodes: Iterable[Node], cpus: float, gpus: float, decodes: bool) -> int:
    """The largest number of workers of `cpus` and `gpus` each that is safe however Ray places them.

    All of them fit; where `decodes`, no placement leaves every node with less than a CPU.
    """
    fit, blocked = 0, 0.0
    for node in nodes:
        fit += node.count * _fitting(node, cpus, gpus)
        blocked += node.count * _blocking(node, cpus, gpus)
    return max(0, int(min(fit, blocked - 1))) if decodes else fit


def largest_share(nodes: Sequence[Node], workers: int, decodes: bool) -> float | None:
    """The most CPUs that each of `workers` CPU workers can get: a whole number, or a fraction below 1; None: none fit.

    With `decodes` a larger share can be safe where a smaller one is not (one worker of 7 CPUs on a node of 8 leaves
    one free, two of 4 do not), so every candidate is tried: that at which a node is full, or has one CPU left.
    """
    largest = max((int(node.cpus) for node in nodes), default=0)
    for cpus in range(largest, 0, -1):
        if most_workers(nodes, cpus, 0, decodes) >= workers:
            return float(cpus)
    parts = {part for node in nodes for part in (node.cpus, node.cpus - DATA_CPUS) if part > 0}
    grains = {math.floor(part / count * _GRAIN + _ROUNDING) for part in parts for count in range(1, workers + 1)}
    for cpus in (grain / _GRAIN for grain in sorted(grains, reverse=True) if 0 < grain < _GRAIN):
        if most_workers(nodes, cpus, 0, decodes) >= workers:
            return cpus
    return None


def place(nodes: Sequence[Node], workers: int, cpus: float, gpus: float) -> dict[str, int]:
    """Where `workers` are expected: Ray spreads CPU workers over the nodes, and packs GPU workers on few of them."""
    placed = {node.name: 0 for node in nodes}
    room = {node.name: node.count * _fitting(node, cpus, gpus) for node in nodes}
    size = {node.name: node.count for node in nodes}
    order = sorted(nodes, key=lambda node: (not node.live, -node.gpus if gpus else -node.cpus))
    for _ in range(workers):
        free = [node.name for node in order if placed[node.name] < room[node.name]]
        name = free[0] if gpus else min(free, key=lambda name: placed[name] // size[name])
        placed[name] += 1
    return {name: count for name, count in placed.items() if count}


def _slots(gpus: int, of_gpu: float) -> int:
    """Workers on the GPUs of one node. Below 1, each fits on one GPU, beside others; above, it takes whole ones."""
    return gpus * int(1 / of_gpu + _ROUNDING) if of_gpu < 1 else int(gpus / of_gpu)


def _fitting(node: Node, cpus: float, gpus: float) -> int:
    """How many workers fit on one such node."""
    by_cpus = math.floor(node.cpus / cpus + _ROUNDING)
    return min(by_cpus, _slots(node.gpus, gpus)) if gpus else by_cpus


def _blocking(node: Node, cpus: float, gpus: float) -> float:
    """How few workers leave less than a CPU on one such node; infinity where so many do not fit."""
    if node.cpus < DATA_CPUS:
        return 0
    workers = math.floor((node.cpus - DATA_CPUS) / cpus + _ROUNDING) + 1
    return workers if workers <= _fitting(node, cpus, gpus) else math.inf


def _nodes_needed(nodes: Sequence[Node], workers: int, decodes: bool) -> list[Node]:
    """The live nodes, with the fewest others that give each CPU worker a CPU; all, where even these do not."""
    counted = [node for node in nodes if node.live]
    for group in sorted((node for node in nodes if not node.live), key=lambda node: -node.cpus):
        for count in range(min(group.count, workers + 1) + 1):
            added = Node(group.name, group.cpus, group.gpus, count, live=False)
            if most_workers([*counted, added], 1.0, 0, decodes) >= workers:
                return [*counted, added] if count else counted
        counted.append(group)
    return counted


def _total(nodes: Iterable[Node], of_one) -> int:
    return sum(node.count * of_one(node) for node in nodes)


def _uses_gpu(nodes: Sequence[Node], experiment: Experiment) -> bool:
    asked = experiment.cluster.gpu
    return any(node.gpus for node in nodes) if asked is None else asked


def _refuse_gpu_fields(experiment: Experiment) -> None:
    for name in ("compress_gradients", "sync_batch_norm"):
        if getattr(experiment.speed, name):
            raise ConfigError(
                f"speed.{name}: works on GPUs only, and this training has none (value True); leave it out"
            )


def _check_totals(nodes: Sequence[Node], workers: int, use_gpu: bool, decodes: bool) -> None:
    """Raises ConfigError for what the cluster as a whole lacks, wherever it is."""
    gpus, cpus = _total(nodes, lambda node: node.gpus), _total(nodes, lambda node: node.cpus)
    if use_gpu and gpus < workers:
        raise ConfigError(f"cluster.workers: each needs a GPU, and the cluster has or may add {gpus} (value {workers})")
    needed = (workers if use_gpu else 1) + (DATA_CPUS if decodes else 0)
    if cpus < needed:
        who = f"{workers} and Ray Data" if decodes else f"{workers}"
        raise ConfigError(f"cluster.workers: {who} need {needed} CPUs; the cluster has or may add {cpus:g}")


def _does_not_fit(
    nodes: Sequence[Node], name: str, workers: int, fitting: int, cpus: float, gpus: float, decodes: bool
) -> str:
    spare = " and leave a whole CPU on one of them to decode videos (data.cache_decoded=false)" if decodes else ""
    return (
        f"{name}: at most {fitting} workers of {_amounts(cpus, gpus)} fit on the nodes{spare} (value {workers}); the "
        f"cluster has or may add {_named(nodes)}"
    )


def _summary(nodes: Sequence[Node], experiment: Experiment, workers: int, cpus: float, gpus: float) -> str:
    elastic = experiment.cluster.min_workers != experiment.cluster.max_workers
    count = f"{experiment.cluster.min_workers} to {experiment.cluster.max_workers}" if elastic else f"{workers}"
    placed = place(nodes, workers, cpus, gpus)
    live = {node.name: node.live for node in nodes}
    names = [f"{name if live[name] else f'to be added, {name}'}: {number}" for name, number in placed.items()]
    where = ", ".join(names[:_SHOWN_NODES]) + (", ..." if len(names) > _SHOWN_NODES else "")
    data = ""
    if not experiment.data.cache_decoded:
        counted = [node for node in nodes if node.live or node.name in placed]
        free = _total(counted, lambda node: node.cpus) - workers * cpus
        data = f"; {free:g} CPU{'' if free == 1 else 's'} for Ray Data"
    return f"{count} worker{'' if count == '1' else 's'}, {_amounts(cpus, gpus)} each ({where}){data}"


def _summary_of_trials(side_by_side: int, workers: int, cpus: float, gpus: float) -> str:
    of = "1 worker" if workers == 1 else f"{workers} workers"
    trials = "1 trial" if side_by_side == 1 else f"{side_by_side} trials"
    return f"{trials} at a time, {of} each, {_amounts(cpus, gpus)} a worker"


def _amounts(cpus: float, gpus: float) -> str:
    """'8 CPUs', or '1 CPU and 1 GPU'."""
    amounts = [(cpus, "CPU"), *([(gpus, "GPU")] if gpus else [])]
    return " and ".join(f"{amount:g} {name}{'s' if amount > 1 else ''}" for amount, name in amounts)


def _named(nodes: Sequence[Node]) -> str:
    """'node a with 4 CPUs, 3 x l4 with 8 CPUs and 1 GPU'."""
    shown = [
        f"{'' if node.count == 1 else f'{node.count} x '}{node.name} with {_amounts(node.cpus, node.gpus)}"
        for node in nodes[:_SHOWN_NODES]
    ]
    return ", ".join(shown) + (", ..." if len(nodes) > _SHOWN_NODES else "")
