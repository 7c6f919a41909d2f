"""Checkpoints before planned restarts, without a Ray cluster. The tests with one are in tests/test_chaos.py."""

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

from giffy_ray.training import planned_restarts, train_loop
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.planned_restarts import (
    BEFORE_RESTART,
    CHECKPOINT_S,
    CheckpointBeforePreemption,
    CheckpointBeforeResize,
    ElasticTorchTrainer,
    compute_grace_s,
)


class RecordingWorker(Worker):
    """A worker that records the functions that it is asked to run."""

    def __init__(self) -> None:
        super().__init__(actor=None, metadata=None, resources={})  # type: ignore[arg-type]
        self.calls: list[Any] = []

    def execute_async(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(fn)


def poll_status(*metrics_by_rank: dict[str, Any] | None) -> WorkerGroupPollStatus:
    """The poll of a running worker group; for each rank the metrics that it reported since the last poll, if any."""
    statuses = {}
    for rank, metrics in enumerate(metrics_by_rank):
        report = None if metrics is None else _TrainingReport(None, metrics, False)
        statuses[rank] = WorkerStatus(True, None, report)
    return WorkerGroupPollStatus(statuses)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> CheckpointBeforeResize:
    """The policy of a training with 1 to 3 workers, on a cluster with capacity for three."""
    config = ray.train.ScalingConfig(num_workers=(1, 3), elastic_resize_monitor_interval_s=0.0)
    policy = CheckpointBeforeResize(config)
    nodes = {name: {"CPU": 1.0} for name in "abc"}
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: nodes)
    monkeypatch.setattr(planned_restarts.state, "get_draining_nodes", dict)
    return policy


def worker_group(workers: int) -> Any:
    return SimpleNamespace(
        workers=[RecordingWorker() for _ in range(workers)], num_workers=workers, start_time=-math.inf
    )


def test_resize_waits_until_all_workers_report_its_checkpoint(policy: Any):
    group, no_reports, before_restart = worker_group(2), poll_status(None, None), {BEFORE_RESTART: True}
    decide = policy.make_decision_for_running_worker_group
    assert isinstance(decide(group, no_reports), NoopDecision)
    assert [worker.calls for worker in group.workers] == [[planned_restarts.request_checkpoint], []]
    # A checkpoint that was already in progress does not count.
    for status in (
        no_reports,
        poll_status({"steps_done": 5}, {"steps_done": 5}),
        poll_status(None, before_restart),
        no_reports,
    ):
        assert isinstance(decide(group, status), NoopDecision)
    decision = decide(group, poll_status(before_restart, None))
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 3
    assert len(group.workers[0].calls) == 1
    # The next resize starts from scratch.
    assert isinstance(decide(group, no_reports), NoopDecision)
    assert len(group.workers[0].calls) == 2
    assert isinstance(decide(group, no_reports), NoopDecision)


def test_no_checkpoint_is_requested_if_the_number_of_workers_stays(policy: Any):
    group = worker_group(3)
    assert isinstance(policy.make_decision_for_running_worker_group(group, poll_status(None, None, None)), NoopDecision)
    assert not group.workers[0].calls


def test_resize_proceeds_after_the_checkpoint_timeout(policy: Any, monkeypatch: pytest.MonkeyPatch):
    group, no_reports = worker_group(1), poll_status(None)
    assert isinstance(policy.make_decision_for_running_worker_group(group, no_reports), NoopDecision)
    now_s = time.monotonic()
    monkeypatch.setattr(planned_restarts.time, "monotonic", lambda: now_s + 800)
    assert isinstance(policy.make_decision_for_running_worker_group(group, no_reports), NoopDecision)
    monkeypatch.setattr(planned_restarts.time, "monotonic", lambda: now_s + 1000)
    assert isinstance(policy.make_decision_for_running_worker_group(group, no_reports), ResizeDecision)


def test_failure_cancels_a_pending_resize(policy: Any):
    group, before_restart = worker_group(1), poll_status({BEFORE_RESTART: True})
    policy.make_decision_for_running_worker_group(group, poll_status(None))
    assert (
        policy.make_decision_for_non_running_worker_group().num_workers == 3
    )  # no worker runs, so no checkpoint is needed
    assert isinstance(policy.make_decision_for_running_worker_group(worker_group(3), before_restart), NoopDecision)


def test_draining_nodes_do_not_count_as_capacity(policy: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planned_restarts.state, "get_draining_nodes", lambda: {"b": 0, "elsewhere": 12})
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_elastic_trainer_uses_the_policy_only_for_a_range_of_workers(monkeypatch: pytest.MonkeyPatch):
    policies: list[Any] = []
    monkeypatch.setattr(
        "ray.train.v2.api.data_parallel_trainer.ObjectRefWrapper", lambda train_loop: train_loop
    )  # the original needs a Ray cluster
    monkeypatch.setattr(
        DataParallelTrainer,
        "_initialize_and_run_controller",
        lambda self, **kwargs: policies.append(kwargs["scaling_policy"]) or SimpleNamespace(error=None),
    )
    for workers in ((1, 2), 2):
        ElasticTorchTrainer(print, scaling_config=ray.train.ScalingConfig(num_workers=workers)).fit()
    assert [type(policy).__name__ for policy in policies] == ["CheckpointBeforeResize", "FixedScalingPolicy"]


@pytest.mark.parametrize(
    ("cpus", "cpus_per_worker", "expected"),
    [((2, 2), 0.5, 4), ((2,), 0.5, 2), ((2,), 0.7, 1), ((1, 1), 1.0, 1), ((1,), 0.5, 0), ((8,), 7.0, 1)],
)
def test_elastic_training_that_decodes_leaves_a_whole_cpu_on_a_node(
    monkeypatch, cpus, cpus_per_worker: float, expected: int
):
    """Counts only live nodes that are not draining."""
    config = ray.train.ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": cpus_per_worker})
    nodes = {f"node-{number}": {"CPU": float(amount)} for number, amount in enumerate(cpus)}
    table = [{"Alive": True, "NodeID": name, "Resources": resources} for name, resources in nodes.items()]
    table += [{"Alive": True, "NodeID": "drains", "Resources": {"CPU": 64.0}}, {"Alive": False, "NodeID": "dead"}]
    monkeypatch.setattr(planned_restarts.state, "get_draining_nodes", lambda: {"drains": 1})
    monkeypatch.setattr("ray.nodes", lambda: table)
    for decodes in (True, False):
        policy = CheckpointBeforeResize(config, decodes)
        fitting = min(4, sum(int(amount / cpus_per_worker + 1e-9) for amount in cpus))
        assert policy._count_possible_workers(nodes) == (expected if decodes else fitting)


class PreemptedTraining:
    """Calls the callback as Ray Train's controller does, and asks the controller whether the deadline is exceeded."""

    def __init__(self, ranks: list[int], workers: int = 3):
        self.failure_config = ray.train.FailureConfig(preemption_grace_s=compute_grace_s(None))
        self.callback = CheckpointBeforePreemption()
        self.info = PreemptionInfo(1_000_000, {"node": ranks})
        run_config = SimpleNamespace(failure_config=self.failure_config)
        self.callback.after_controller_start(SimpleNamespace(run_config=run_config))
        self.start(workers)

    def start(self, workers: int) -> None:
        self.workers = [RecordingWorker() for _ in range(workers)]
        self.callback.after_worker_group_start(SimpleNamespace(get_workers=lambda: self.workers))  # type: ignore[arg-type]

    def notice(self) -> None:
        state = PreemptingState(self.info, 900.0)
        self.callback.after_controller_state_update(RunningState(), state)
        self.callback.after_controller_state_update(state, state)

    def report(self, **metrics: Any) -> None:
        self.callback.after_report(_TrainingReport(None, metrics, False), [metrics])

    def is_deadline_exceeded(self, at_s: float, monkeypatch: pytest.MonkeyPatch) -> bool:
        monkeypatch.setattr("ray.train.v2._internal.execution.controller.controller.time_seconds", lambda: at_s)
        return TrainController._is_preemption_deadline_exceeded(
            self.info, 900.0, self.failure_config.preemption_grace_s
        )


def test_notice_requests_one_checkpoint_and_restarts_once_it_is_committed(monkeypatch: pytest.MonkeyPatch):
    training = PreemptedTraining([2])
    training.report(**{CHECKPOINT_S: 40.0})
    training.notice()
    assert [worker.calls for worker in training.workers] == [[planned_restarts.request_checkpoint], [], []]
    assert not training.is_deadline_exceeded(990, monkeypatch)
    training.report(**{CHECKPOINT_S: 40.0})  # one that was already in progress
    assert not training.is_deadline_exceeded(990, monkeypatch)
    assert not training.is_deadline_exceeded(1079, monkeypatch)  # deadline at 1000 s, grace of 2 x 40 s
    assert training.is_deadline_exceeded(1080, monkeypatch)
    training.report(**{CHECKPOINT_S: 40.0, BEFORE_RESTART: True})
    assert training.is_deadline_exceeded(910, monkeypatch)
    training.start(2)
    training.notice()  # another notice, for the new workers
    assert len(training.workers[0].calls) == 1
    assert not training.is_deadline_exceeded(990, monkeypatch)


def test_no_grace_period_if_rank_0_is_preempted(monkeypatch: pytest.MonkeyPatch):
    training = PreemptedTraining([0, 1])
    training.notice()
    assert not training.is_deadline_exceeded(999, monkeypatch)
    assert training.is_deadline_exceeded(1000, monkeypatch)


def test_notice_during_a_resize_uses_the_checkpoint_of_the_resize(monkeypatch: pytest.MonkeyPatch):
    training = PreemptedTraining([2])
    training.report(**{BEFORE_RESTART: True})
    training.notice()
    assert training.is_deadline_exceeded(900, monkeypatch)


@pytest.mark.parametrize(("checkpoint_s", "grace_s"), [(None, 60), (0.1, 10), (30, 60), (10_000, 600)])
def test_grace_period_is_twice_the_checkpoint_time_within_bounds(checkpoint_s: float | None, grace_s: float):
    assert compute_grace_s(checkpoint_s) == grace_s


def test_ray_counts_preemptions_separately_from_failures():
    policy = create_failure_policy(ray.train.FailureConfig(max_failures=1, max_preemption_failures=2))
    preempted = PreemptionError(PreemptionInfo(None, {"node": [0]}), drain_timed_out=True)
    failed = WorkerGroupError("out of memory", {0: RuntimeError("out of memory")})
    decisions = [policy.make_decision(error) for error in (preempted, failed, preempted, preempted, failed)]
    assert decisions == [FailureDecision.RETRY] * 3 + [FailureDecision.RAISE] * 2


def test_report_before_a_restart_is_flagged():
    reports: list[dict[str, Any]] = []
    for before_restart in (True, False):
        train_loop.report_progress(
            None, None, TrainState(3), lambda metrics, _: reports.append(metrics), before_restart
        )  # type: ignore[arg-type]
    assert [metrics.get(BEFORE_RESTART, False) for metrics in reports] == [True, False]
    assert [metrics["steps_done"] for metrics in reports] == [3, 3]
