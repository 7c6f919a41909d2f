"""Worker resources on clusters of several nodes, compared with all possible placements."""

import itertools
import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from giffy_ray.cluster.placement import (
    Node,
    WorkerResources,
    count_safe_workers,
    max_cpus_per_worker,
    plan,
    plan_trials,
    predict_placement,
)
from giffy_ray.config import ConfigError, Experiment, override

CACHED = Experiment()
DECODED = override(Experiment(), {"data.cache_decoded": False})


def make_nodes(*cpus: float, gpus: int = 0) -> list[Node]:
    return [Node("abcdefgh"[number], amount, gpus) for number, amount in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "workers", "cached", "decoded"),
    [
        ((2,), 1, 2, 1),
        ((2,), 2, 1, 0.5),
        ((2,), 3, 0.6666, 0.3333),
        ((3,), 2, 1, 1),
        ((32,), 2, 16, 15),
        ((8,), 2, 4, 3),  # 3.5 would fit, but threads are whole
        ((8, 8), 2, 8, 7),
        ((9, 8), 2, 8, 8),  # 8 on the first node leave one CPU there
        ((8, 8), 4, 4, 3),
        ((2, 2), 4, 1, 0.5),  # 0.75, by the totals, would leave 0.5 on each node
        ((2, 2), 2, 2, 1),
        ((2, 2, 2), 5, 1, 1),
        ((32, 2), 2, 16, 16),
        ((1, 1), 1, 1, 1),
        ((1, 1), 2, 1, None),  # the workers may be on separate nodes, and then no CPU is free
        ((1,), 1, 1, None),
        ((1,), 4, 0.25, None),
        ((0, 4), 2, 2, 1),
        ((0.5, 4), 2, 2, 1),
    ],
)
def test_cpus_per_cpu_worker(cpus, workers: int, cached: float, decoded: float | None):
    for base, expected in ((CACHED, cached), (DECODED, decoded)):
        experiment = override(base, {"cluster.workers": workers})
        if expected is None:
            with pytest.raises(ConfigError, match=r"cluster\.workers: "):
                plan(make_nodes(*cpus), experiment)
        else:
            assert plan(make_nodes(*cpus), experiment) == WorkerResources(expected, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "workers", "cached", "decoded"),
    [
        (make_nodes(64, gpus=8), 8, 1, 1),
        (make_nodes(64, gpus=8), 2, 4, 4),
        (make_nodes(5, gpus=8), 2, 2, 2),
        (make_nodes(4, gpus=4), 4, 1, None),
        ([*make_nodes(4, gpus=4), Node("head", 1)], 4, 1, 1),  # the head has a CPU for decode tasks
        (make_nodes(2, 2, gpus=2), 4, 1, None),  # 4 CPUs and 4 GPUs in all
        (make_nodes(2, 2, gpus=2), 3, 1, 1),
        ([Node("a", 1, 4), Node("b", 16)], 2, None, None),  # enough of both, but not on one node
    ],
)
def test_concurrent_trainings_on_gpus(nodes: list[Node], workers: int, cached: int | None, decoded: int | None):
    for base, expected in ((CACHED, cached), (DECODED, decoded)):
        experiment = override(base, {"cluster.workers": workers})
        if expected is None:
            with pytest.raises(ConfigError, match=r"cluster\.workers: "):
                plan(nodes, experiment)
        else:
            assert plan(nodes, experiment) == WorkerResources(1.0, 1, expected)


@pytest.mark.parametrize(
    ("cpus", "workers", "trials", "cached", "decoded"),
    [
        ((2,), 1, 12, (1, 2), (0.5, 2)),
        ((16,), 1, 12, (1, 12), (1, 12)),
        ((16,), 1, 4, (4, 4), (3, 4)),
        ((16,), 1, 16, (1, 16), (0.9375, 16)),
        ((16,), 2, 12, (1, 8), (1, 7)),
        ((2, 2), 1, 12, (1, 4), (0.5, 4)),
        ((8, 8), 2, 3, (2, 3), (2, 3)),
        ((1, 1), 1, 12, (1, 2), (1, 1)),
    ],
)
def test_concurrent_trials(cpus, workers: int, trials: int, cached, decoded):
    for base, (cpus_per_worker, max_concurrent) in ((CACHED, cached), (DECODED, decoded)):
        experiment = override(base, {"search.workers": workers, "search.trials": trials})
        assert plan_trials(make_nodes(*cpus), experiment) == WorkerResources(cpus_per_worker, 0, max_concurrent)


def test_autoscaler_nodes_count_only_if_they_are_needed():
    head, large, small = Node("head", 4), Node("large", 16, count=8, live=False), Node("small", 2, count=1, live=False)
    endless = Node("endless", 16, count=2**63, live=False)
    for group in (large, endless):
        for workers, cpus in ((1, 4), (2, 2), (4, 1), (8, 2), (16, 1), (20, 1), (21, 1)):
            worker_resources = plan([head, small, group], override(CACHED, {"cluster.workers": workers}))
            assert worker_resources == WorkerResources(cpus, 0, 1), workers
            assert ("to be added" in worker_resources.summary) == (workers > 4)
    assert plan([head, small], override(CACHED, {"cluster.workers": 6})) == WorkerResources(1, 0, 1)
    assert plan([head, small], override(CACHED, {"cluster.workers": 7})) == WorkerResources(0.8, 0, 1)
    assert plan(
        [Node("head", 4), Node("gpu", 8, 1, count=4, live=False)], override(DECODED, {"cluster.workers": 4})
    ) == WorkerResources(1, 1, 1)


def test_summary():
    two_workers = {"cluster.workers": 2}
    assert (
        plan(make_nodes(9, 8), override(DECODED, two_workers)).summary
        == "2 workers, 8 CPUs each (a: 1, b: 1); 1 CPU for Ray Data"
    )
    assert plan(make_nodes(8, 8), override(CACHED, two_workers)).summary == "2 workers, 8 CPUs each (a: 1, b: 1)"
    assert plan(make_nodes(2, 2), override(DECODED, {"cluster.workers": 4})).summary == (
        "4 workers, 0.5 CPU each (a: 2, b: 2); 2 CPUs for Ray Data"
    )
    assert plan(make_nodes(8, 8, gpus=2), override(CACHED, {"cluster.workers": [1, 3]})).summary == (
        "1 to 3 workers, 1 CPU and 1 GPU each (a: 2, b: 1)"
    )
    assert plan_trials(make_nodes(16), override(CACHED, {"search.trials": 4})).summary == (
        "4 trials at a time, 1 worker each, 4 CPUs per worker"
    )


def test_an_elastic_training_gets_as_many_workers_as_are_safe():
    elastic = override(DECODED, {"cluster.workers": [1, 2]})
    assert plan(make_nodes(1, 1), elastic) == WorkerResources(1, 0, 1)
    with pytest.raises(ConfigError, match=r"at most 1 workers of 1 CPU fit .*data\.cache_decoded=false\) \(value 2\)"):
        plan(make_nodes(1, 1), override(DECODED, {"cluster.workers": [2, 3]}))


def all_placements(capacities: list[int], workers: int):
    """Yields all ways to place the workers on nodes with these capacities."""
    for counts in itertools.product(*(range(capacity + 1) for capacity in capacities)):
        if sum(counts) == workers:
            yield counts


CPUS = st.lists(st.integers(0, 9).map(float) | st.sampled_from([0.5, 1.5, 2.5]), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(CPUS, st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(1, 5), st.booleans())
@example([2.0, 2.0], [0, 0, 0], 4, False)
def test_workers_and_decode_tasks_fit_in_every_placement(cpus, gpus, workers, cached):
    nodes = [Node("abc"[number], amount, gpus[number]) for number, amount in enumerate(cpus)]
    has_gpus = any(node.gpus for node in nodes)
    try:
        worker_resources = plan(
            nodes, override(Experiment(), {"cluster.workers": workers, "data.cache_decoded": cached})
        )
        cpus_per_worker = worker_resources.cpus_per_worker
    except ConfigError:
        worker_resources, cpus_per_worker = None, 1.0

    def is_safe(share: float) -> bool:
        """Tries all placements of workers with `share` CPUs."""
        capacities = [math.floor(node.cpus / share + 1e-9) for node in nodes]
        if has_gpus:
            capacities = [min(capacity, node.gpus) for capacity, node in zip(capacities, nodes, strict=True)]
        free = [
            max(node.cpus - share * count for node, count in zip(nodes, counts, strict=True))
            for counts in all_placements([min(capacity, workers) for capacity in capacities], workers)
        ]
        return bool(free) and sum(capacities) >= workers and (cached or min(free) >= 1 - 1e-9)

    if worker_resources:
        assert is_safe(cpus_per_worker)
        assert cpus_per_worker == 1 if has_gpus else cpus_per_worker < 1 or cpus_per_worker == int(cpus_per_worker)
        placement = predict_placement(nodes, workers, cpus_per_worker, worker_resources.gpus_per_worker)
        assert sum(placement.values()) == workers
    elif max(cpus) >= 1:  # then no other share is safe either
        assert not any(is_safe(share) for share in ([1.0] if has_gpus else [0.1, 0.25, 0.5, 1.0, 2.0, 3.0]))


@settings(max_examples=40, deadline=None)
@given(CPUS, st.integers(1, 6), st.booleans())
def test_no_larger_share_is_safe(cpus, workers, decodes):
    nodes = make_nodes(*cpus)
    largest = max_cpus_per_worker(nodes, workers, decodes)
    candidates = [numerator / 200 for numerator in range(1, 200)] + [float(cpus) for cpus in range(1, 10)]
    for candidate in candidates:
        if candidate > (largest or 0) + 1e-4:
            assert count_safe_workers(nodes, candidate, 0, decodes) < workers


@settings(max_examples=40, deadline=None)
@given(CPUS, st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_concurrent_trials_fit(cpus, workers, trials, cached):
    nodes = make_nodes(*cpus)
    experiment = override(
        Experiment(), {"search.workers": workers, "search.trials": trials, "data.cache_decoded": cached}
    )
    try:
        plan(nodes, override(experiment, {"cluster.workers": workers}))
    except ConfigError:
        assume(False)
    worker_resources = plan_trials(nodes, experiment)
    max_concurrent = worker_resources.max_concurrent
    assert 1 <= max_concurrent <= trials
    assert count_safe_workers(nodes, worker_resources.cpus_per_worker, 0, not cached) >= max_concurrent * workers
