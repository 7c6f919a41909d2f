"""Shares of a cluster, node by node, compared with all placements that there are."""

import itertools
import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from giffy_ray.cluster.placement import Node, WorkerResources, largest_share, most_workers, place, plan, plan_trials
from giffy_ray.config import ConfigError, Experiment, override

KEPT, DECODED = Experiment(), override(Experiment(), {"data.cache_decoded": False})


def nodes_of(*cpus: float, gpus: int = 0) -> list[Node]:
    return [Node("abcdefgh"[number], amount, gpus) for number, amount in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "workers", "kept", "decoded"),
    [
        ((2,), 1, 2, 1),
        ((2,), 2, 1, 0.5),
        ((2,), 3, 0.6666, 0.3333),
        ((3,), 2, 1, 1),
        ((32,), 2, 16, 15),
        ((8,), 2, 4, 3),  # 3.5 would do; threads are whole
        ((8, 8), 2, 8, 7),
        ((9, 8), 2, 8, 8),  # 8 on the first leave it one
        ((8, 8), 4, 4, 3),
        ((2, 2), 4, 1, 0.5),  # 0.75, as of totals, leaves 0.5 on each
        ((2, 2), 2, 2, 1),
        ((2, 2, 2), 5, 1, 1),
        ((32, 2), 2, 16, 16),
        ((1, 1), 1, 1, 1),
        ((1, 1), 2, 1, None),  # both may be on nodes of their own, and then no CPU is free
        ((1,), 1, 1, None),
        ((1,), 4, 0.25, None),
        ((0, 4), 2, 2, 1),
        ((0.5, 4), 2, 2, 1),
    ],
)
def test_cpus_of_a_worker(cpus, workers: int, kept: float, decoded: float | None):
    for experiment, expected in ((KEPT, kept), (DECODED, decoded)):
        asked = override(experiment, {"cluster.workers": workers})
        if expected is None:
            with pytest.raises(ConfigError, match=r"cluster\.workers: "):
                plan(nodes_of(*cpus), asked)
        else:
            assert plan(nodes_of(*cpus), asked) == WorkerResources(expected, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "workers", "kept", "decoded"),
    [
        (nodes_of(64, gpus=8), 8, 1, 1),
        (nodes_of(64, gpus=8), 2, 4, 4),
        (nodes_of(5, gpus=8), 2, 2, 2),
        (nodes_of(4, gpus=4), 4, 1, None),
        ([*nodes_of(4, gpus=4), Node("head", 1)], 4, 1, 1),  # decode tasks find a CPU on the head
        (nodes_of(2, 2, gpus=2), 4, 1, None),  # 4 CPUs and 4 GPUs in all
        (nodes_of(2, 2, gpus=2), 3, 1, 1),
        ([Node("a", 1, 4), Node("b", 16)], 2, None, None),  # enough of both, but not on one node
    ],
)
def test_trainings_on_gpus(nodes: list[Node], workers: int, kept: int | None, decoded: int | None):
    for experiment, expected in ((KEPT, kept), (DECODED, decoded)):
        asked = override(experiment, {"cluster.workers": workers})
        if expected is None:
            with pytest.raises(ConfigError, match=r"cluster\.workers: "):
                plan(nodes, asked)
        else:
            assert plan(nodes, asked) == WorkerResources(1.0, 1, expected)


@pytest.mark.parametrize(
    ("cpus", "workers", "trials", "kept", "decoded"),
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
def test_trials_side_by_side(cpus, workers: int, trials: int, kept, decoded):
    for experiment, (share, side_by_side) in ((KEPT, kept), (DECODED, decoded)):
        asked = override(experiment, {"search.workers": workers, "search.trials": trials})
        assert plan_trials(nodes_of(*cpus), asked) == WorkerResources(share, 0, side_by_side)


def test_nodes_that_an_autoscaler_may_add_are_counted_on_only_where_they_are_needed():
    head, large, small = Node("head", 4), Node("large", 16, count=8, live=False), Node("small", 2, count=1, live=False)
    endless = Node("endless", 16, count=2**63, live=False)
    for group in (large, endless):
        for workers, cpus in ((1, 4), (2, 2), (4, 1), (8, 2), (16, 1), (20, 1), (21, 1)):
            share = plan([head, small, group], override(KEPT, {"cluster.workers": workers}))
            assert share == WorkerResources(cpus, 0, 1), workers
            assert ("to be added" in share.summary) == (workers > 4)
    assert plan([head, small], override(KEPT, {"cluster.workers": 6})) == WorkerResources(1, 0, 1)
    assert plan([head, small], override(KEPT, {"cluster.workers": 7})) == WorkerResources(0.8, 0, 1)
    assert plan(
        [Node("head", 4), Node("gpu", 8, 1, count=4, live=False)], override(DECODED, {"cluster.workers": 4})
    ) == WorkerResources(1, 1, 1)


def test_what_each_worker_gets_is_said():
    two = {"cluster.workers": 2}
    assert (
        plan(nodes_of(9, 8), override(DECODED, two)).summary
        == "2 workers, 8 CPUs each (a: 1, b: 1); 1 CPU for Ray Data"
    )
    assert plan(nodes_of(8, 8), override(KEPT, two)).summary == "2 workers, 8 CPUs each (a: 1, b: 1)"
    assert plan(nodes_of(2, 2), override(DECODED, {"cluster.workers": 4})).summary == (
        "4 workers, 0.5 CPU each (a: 2, b: 2); 2 CPUs for Ray Data"
    )
    assert plan(nodes_of(8, 8, gpus=2), override(KEPT, {"cluster.workers": [1, 3]})).summary == (
        "1 to 3 workers, 1 CPU and 1 GPU each (a: 2, b: 1)"
    )
    assert plan_trials(nodes_of(16), override(KEPT, {"search.trials": 4})).summary == (
        "4 trials at a time, 1 worker each, 4 CPUs a worker"
    )


def test_an_elastic_training_is_planned_for_as_many_workers_as_are_safe():
    asked = override(DECODED, {"cluster.workers": [1, 2]})
    assert plan(nodes_of(1, 1), asked) == WorkerResources(1, 0, 1)
    with pytest.raises(ConfigError, match=r"at most 1 workers of 1 CPU fit .*data\.cache_decoded=false\) \(value 2\)"):
        plan(nodes_of(1, 1), override(DECODED, {"cluster.workers": [2, 3]}))


def placements(rooms: list[int], workers: int):
    """All ways to put so many workers on nodes with so much room."""
    return (counts for counts in itertools.product(*(range(room + 1) for room in rooms)) if sum(counts) == workers)


CPUS = st.lists(st.integers(0, 9).map(float) | st.sampled_from([0.5, 1.5, 2.5]), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(CPUS, st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(1, 5), st.booleans())
@example([2.0, 2.0], [0, 0, 0], 4, False)
def test_whatever_the_placement_workers_fit_and_a_decode_task_does_where_it_is_needed(cpus, gpus, workers, keep):
    nodes = [Node("abc"[number], amount, gpus[number]) for number, amount in enumerate(cpus)]
    has_gpus = any(node.gpus for node in nodes)
    try:
        share = plan(nodes, override(Experiment(), {"cluster.workers": workers, "data.cache_decoded": keep}))
        each = share.cpus_per_worker
    except ConfigError:
        share, each = None, 1.0

    def safe(each: float) -> bool:
        """Tried with all placements."""
        rooms = [math.floor(node.cpus / each + 1e-9) for node in nodes]
        rooms = [min(room, node.gpus) if has_gpus else room for room, node in zip(rooms, nodes, strict=True)]
        free = [
            max(node.cpus - each * count for node, count in zip(nodes, counts, strict=True))
            for counts in placements([min(room, workers) for room in rooms], workers)
        ]
        return bool(free) and sum(rooms) >= workers and (keep or min(free) >= 1 - 1e-9)

    if share:
        assert safe(each)
        assert each == 1 if has_gpus else each < 1 or each == int(each)
        assert sum(place(nodes, workers, each, share.gpus_per_worker).values()) == workers
    elif max(cpus) >= 1:  # nor would it be safe with another share
        assert not any(safe(other) for other in ([1.0] if has_gpus else [0.1, 0.25, 0.5, 1.0, 2.0, 3.0]))


@settings(max_examples=40, deadline=None)
@given(CPUS, st.integers(1, 6), st.booleans())
def test_no_larger_share_is_safe(cpus, workers, decodes):
    nodes = nodes_of(*cpus)
    share = largest_share(nodes, workers, decodes)
    larger = [grain / 200 for grain in range(1, 200)] + [float(whole) for whole in range(1, 10)]
    for other in larger:
        if other > (share or 0) + 1e-4:
            assert most_workers(nodes, other, 0, decodes) < workers


@settings(max_examples=40, deadline=None)
@given(CPUS, st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_trials_fit_side_by_side(cpus, workers, trials, keep):
    nodes = nodes_of(*cpus)
    experiment = override(
        Experiment(), {"search.workers": workers, "search.trials": trials, "data.cache_decoded": keep}
    )
    try:
        plan(nodes, override(experiment, {"cluster.workers": workers}))
    except ConfigError:
        assume(False)
    share = plan_trials(nodes, experiment)
    assert 1 <= share.trainings <= trials
    assert most_workers(nodes, share.cpus_per_worker, 0, not keep) >= share.trainings * workers
