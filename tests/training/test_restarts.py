"""Checkpoints before the restarts that Ray Train plans. No test starts a Ray; test_chaos.py has those that do."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import PreemptingState, RunningState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2._internal.execution.preemption import PreemptionInfo
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from giffy_ray.training import restarts, train_loop
from giffy_ray.training.checkpoints import TrainState
from giffy_ray.training.restarts import (
    BEFORE_RESTART,
    CHECKPOINT_S,
    CheckpointBeforePreemption,
    CheckpointBeforeResize,
    Trainer,
    compute_grace_s,
)


class Asked(Worker):
    """A worker that keeps what it is sent to do."""

    def __init__(self) -> None:
        super().__init__(actor=None, metadata=None, resources={})  # type: ignore[arg-type]
        self.sent: list[Any] = []

    def execute_async(self, fn: Any, *arguments: Any, **named: Any) -> Any:
        self.sent.append(fn)


def reports(*of_ranks: dict[str, Any] | None) -> WorkerGroupPollStatus:
    """A look at running workers; of each rank the metrics that it reported since the last one, if any."""
    report = [None if named is None else _TrainingReport(None, named, False) for named in of_ranks]
    return WorkerGroupPollStatus({rank: WorkerStatus(True, None, one) for rank, one in enumerate(report)})


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> CheckpointBeforeResize:
    """Of a training of 1 to 3 workers, on a cluster with room for three."""
    config = ray.train.ScalingConfig(num_workers=(1, 3), elastic_resize_monitor_interval_s=0.0)
    policy = CheckpointBeforeResize(config)
    nodes = {name: {"CPU": 1.0} for name in "abc"}
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: nodes)
    monkeypatch.setattr(restarts.state, "get_draining_nodes", dict)
    return policy


def group_of(workers: int) -> Any:
    return SimpleNamespace(workers=[Asked() for _ in range(workers)], num_workers=workers, start_time=-math.inf)


def test_running_workers_are_resized_only_after_all_have_reported_the_checkpoint_for_it(policy: Any):
    group, nothing, flagged = group_of(2), reports(None, None), {BEFORE_RESTART: True}
    decide = policy.make_decision_for_running_worker_group
    assert isinstance(decide(group, nothing), NoopDecision)
    assert [worker.sent for worker in group.workers] == [[restarts.ask_for_checkpoint], []]
    # A checkpoint that was on its way already is none for the resize.
    for status in (nothing, reports({"steps_done": 5}, {"steps_done": 5}), reports(None, flagged), nothing):
        assert isinstance(decide(group, status), NoopDecision)
    decision = decide(group, reports(flagged, None))
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 3
    assert len(group.workers[0].sent) == 1
    # Nothing is left over for the next resize.
    assert isinstance(decide(group, nothing), NoopDecision)
    assert len(group.workers[0].sent) == 2
    assert isinstance(decide(group, nothing), NoopDecision)


def test_workers_that_stay_as_many_are_asked_nothing(policy: Any):
    group = group_of(3)
    assert isinstance(policy.make_decision_for_running_worker_group(group, reports(None, None, None)), NoopDecision)
    assert not group.workers[0].sent


def test_a_resize_does_not_wait_for_ever_for_its_checkpoint(policy: Any, monkeypatch: pytest.MonkeyPatch):
    group, nothing = group_of(1), reports(None)
    assert isinstance(policy.make_decision_for_running_worker_group(group, nothing), NoopDecision)
    now = time.monotonic()
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now + 800)
    assert isinstance(policy.make_decision_for_running_worker_group(group, nothing), NoopDecision)
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now + 1000)
    assert isinstance(policy.make_decision_for_running_worker_group(group, nothing), ResizeDecision)


def test_a_resize_that_was_overtaken_by_a_failure_is_forgotten(policy: Any):
    group, flagged = group_of(1), reports({BEFORE_RESTART: True})
    policy.make_decision_for_running_worker_group(group, reports(None))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3  # nothing runs: no checkpoint to take
    assert isinstance(policy.make_decision_for_running_worker_group(group_of(3), flagged), NoopDecision)


def test_no_worker_is_expected_on_a_node_that_drains(policy: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restarts.state, "get_draining_nodes", lambda: {"b": 0, "elsewhere": 12})
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_ray_train_is_given_the_policy_where_the_number_of_workers_may_change(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    monkeypatch.setattr(
        "ray.train.v2.api.data_parallel_trainer.ObjectRefWrapper", lambda train_loop: train_loop
    )  # needs a Ray
    monkeypatch.setattr(
        DataParallelTrainer,
        "_initialize_and_run_controller",
        lambda self, **arguments: given.append(arguments["scaling_policy"]) or SimpleNamespace(error=None),
    )
    for workers in ((1, 2), 2):
        Trainer(print, scaling_config=ray.train.ScalingConfig(num_workers=workers)).fit()
    assert [type(policy).__name__ for policy in given] == ["CheckpointBeforeResize", "FixedScalingPolicy"]


@pytest.mark.parametrize(
    ("cpus", "each", "expected"),
    [((2, 2), 0.5, 4), ((2,), 0.5, 2), ((2,), 0.7, 1), ((1, 1), 1.0, 1), ((1,), 0.5, 0), ((8,), 7.0, 1)],
)
def test_an_elastic_training_that_decodes_leaves_a_whole_cpu_on_a_node(monkeypatch, cpus, each: float, expected: int):
    """Of the nodes that are there, as after the loss of one. A draining node does not count."""
    config = ray.train.ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": each})
    nodes = {f"node-{number}": {"CPU": float(amount)} for number, amount in enumerate(cpus)}
    table = [{"Alive": True, "NodeID": name, "Resources": resources} for name, resources in nodes.items()]
    table += [{"Alive": True, "NodeID": "drains", "Resources": {"CPU": 64.0}}, {"Alive": False, "NodeID": "dead"}]
    monkeypatch.setattr(restarts.state, "get_draining_nodes", lambda: {"drains": 1})
    monkeypatch.setattr("ray.nodes", lambda: table)
    for decodes in (True, False):
        policy = CheckpointBeforeResize(config, decodes)
        fitting = min(4, sum(int(amount / each + 1e-9) for amount in cpus))
        assert policy._count_possible_workers(nodes) == (expected if decodes else fitting)


class Preempted:
    """A controller's side of a preemption, as Ray Train calls it, and its own answer to whether time is up."""

    def __init__(self, ranks: list[int], workers: int = 3):
        self.failures = ray.train.FailureConfig(preemption_grace_s=compute_grace_s(None))
        self.callback, self.info = CheckpointBeforePreemption(), PreemptionInfo(1_000_000, {"node": ranks})
        self.callback.after_controller_start(SimpleNamespace(run_config=SimpleNamespace(failure_config=self.failures)))
        self.start(workers)

    def start(self, workers: int) -> None:
        self.workers = [Asked() for _ in range(workers)]
        self.callback.after_worker_group_start(SimpleNamespace(get_workers=lambda: self.workers))  # type: ignore[arg-type]

    def notice(self) -> None:
        state = PreemptingState(self.info, 900.0)
        self.callback.after_controller_state_update(RunningState(), state)
        self.callback.after_controller_state_update(state, state)

    def report(self, **named: Any) -> None:
        self.callback.after_report(_TrainingReport(None, named, False), [named])

    def is_over(self, at_s: float, monkeypatch: pytest.MonkeyPatch) -> bool:
        monkeypatch.setattr("ray.train.v2._internal.execution.controller.controller.time_seconds", lambda: at_s)
        return TrainController._is_preemption_deadline_exceeded(self.info, 900.0, self.failures.preemption_grace_s)


def test_a_notice_asks_once_and_the_restart_follows_the_commit_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch):
    training = Preempted([2])
    training.report(**{CHECKPOINT_S: 40.0})
    training.notice()
    assert [worker.sent for worker in training.workers] == [[restarts.ask_for_checkpoint], [], []]
    assert not training.is_over(990, monkeypatch)
    training.report(**{CHECKPOINT_S: 40.0})  # one that was on its way
    assert not training.is_over(990, monkeypatch)
    assert not training.is_over(1079, monkeypatch)  # the deadline is 1000 s, and a checkpoint may take twice as long
    assert training.is_over(1080, monkeypatch)
    training.report(**{CHECKPOINT_S: 40.0, BEFORE_RESTART: True})
    assert training.is_over(910, monkeypatch)
    training.start(2)
    training.notice()  # another, of the new workers
    assert len(training.workers[0].sent) == 1
    assert not training.is_over(990, monkeypatch)


def test_nobody_waits_for_a_checkpoint_that_is_lost_with_its_node(monkeypatch: pytest.MonkeyPatch):
    training = Preempted([0, 1])
    training.notice()
    assert not training.is_over(999, monkeypatch)
    assert training.is_over(1000, monkeypatch)


def test_a_notice_during_a_resize_restarts_from_the_checkpoint_of_the_resize(monkeypatch: pytest.MonkeyPatch):
    training = Preempted([2])
    training.report(**{BEFORE_RESTART: True})
    training.notice()
    assert training.is_over(900, monkeypatch)


@pytest.mark.parametrize(("checkpoint_s", "grace"), [(None, 60), (0.1, 10), (30, 60), (10_000, 600)])
def test_the_grace_period_follows_the_time_of_a_checkpoint_within_bounds(checkpoint_s: float | None, grace: float):
    assert compute_grace_s(checkpoint_s) == grace


def test_ray_counts_preemptions_apart_from_failures():
    policy = create_failure_policy(ray.train.FailureConfig(max_failures=1, max_preemption_failures=2))
    preempted = PreemptionError(PreemptionInfo(None, {"node": [0]}), drain_timed_out=True)
    failed = WorkerGroupError("out of memory", {0: RuntimeError("out of memory")})
    decisions = [policy.make_decision(error) for error in (preempted, failed, preempted, preempted, failed)]
    assert decisions == [FailureDecision.RETRY] * 3 + [FailureDecision.RAISE] * 2


def test_a_report_before_a_restart_says_so():
    told: list[dict[str, Any]] = []
    for before_restart in (True, False):
        train_loop.report(None, None, TrainState(3), lambda named, _: told.append(named), before_restart)  # type: ignore[arg-type]
    assert [named.get(BEFORE_RESTART, False) for named in told] == [True, False]
    assert [named["steps_done"] for named in told] == [3, 3]
