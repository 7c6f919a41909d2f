"""Planned restarts of a training's workers, with a checkpoint first, so that no step is lost.

Ray Train restarts all workers to change their number, and when a node is about to be preempted. On its own it takes no
checkpoint before a resize, and before a preemption it trains until the node's deadline: the steps since the last
checkpoint are lost. Here the controller requests a checkpoint from rank 0, all workers idle once their state is
copied, and the controller restarts them as soon as the checkpoint is committed.

Ray has no public hooks for this. pyproject.toml pins Ray to one minor version, and the tests fail if a hook changes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state  # no public function lists draining nodes
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, TrainControllerState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, WorkerGroupState

from giffy_ray.cluster.placement import Node, count_safe_workers

# Keys in the metrics that a worker reports to Ray Train.
BEFORE_RESTART = "before_restart"  # true if the controller requested this checkpoint: the workers idle after it
CHECKPOINT_S = "checkpoint_s"  # seconds to write this checkpoint, upload included

# Longer than any checkpoint takes. After that a resize proceeds without one, and workers that were not restarted train.
_CHECKPOINT_TIMEOUT_S = 900.0
# Grace period after a node's deadline for a checkpoint that is still being written, as a multiple of the time that the
# last one took: several workers may write at once after a notice.
_GRACE_PER_CHECKPOINT = 2.0
_MIN_GRACE_S, _MAX_GRACE_S = 10.0, 600.0
_DEFAULT_GRACE_S = 60.0  # before the first checkpoint is measured
DRAIN_POLL_S = 1.0  # Ray's default of 5 s is a sixth of the 30 s notice that some clouds give

# Set in the process of rank 0.
_checkpoint_requested = threading.Event()


# ------------------------------------------------------------------------------------------------------- workers
def request_checkpoint() -> None:
    """Runs in the process of rank 0; the controller sends it there."""
    _checkpoint_requested.set()


def pop_checkpoint_request() -> bool:
    """Whether the controller requested a checkpoint from this process since the last call."""
    requested = _checkpoint_requested.is_set()
    if requested:
        _checkpoint_requested.clear()
    return requested


def wait_for_restart() -> None:
    """Idles until Ray Train ends this process: a step after the checkpoint would be lost.

    Idle workers also survive the loss of the preempted node, which would break the all-reduce of a step and interrupt
    the upload of the checkpoint.
    """
    time.sleep(_CHECKPOINT_TIMEOUT_S)


# ---------------------------------------------------------------------------------------------------- controller
class ElasticTorchTrainer(TorchTrainer):
    """A TorchTrainer that takes a checkpoint before it changes the number of workers.

    Args:
        decodes: Tasks decode videos during the training, so an elastic training leaves a whole CPU free on one node.
    """

    def __init__(self, *args: Any, decodes: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._decodes = decodes

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            kwargs["scaling_policy"] = CheckpointBeforeResize(self.scaling_config, self._decodes)
        return super()._initialize_and_run_controller(**kwargs)


class CheckpointBeforeResize(ElasticScalingPolicy):
    """A scaling policy that delays a resize until every running worker has reported a checkpoint for it."""

    def __init__(self, scaling_config: ScalingConfig, decodes: bool = False):
        super().__init__(scaling_config)
        self._decodes = decodes
        self._pending_resize: ResizeDecision | None = None
        self._requested_at_s = -math.inf
        self._ranks_reported: set[int] = set()
        self._draining_nodes: dict[str, int] = {}  # node id -> deadline
        self._drains_polled_at_s = -math.inf
        self._usable_nodes: list[Node] = []

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._pending_resize = None
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        if self._pending_resize is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if not isinstance(decision, ResizeDecision):
                return decision
            self._pending_resize = decision
            self._requested_at_s = time.monotonic()
            self._ranks_reported = set()
            _request_checkpoint_from(worker_group_state.workers)
            return NoopDecision()
        self._maybe_send_resource_request()  # otherwise the request for the new workers' resources expires
        self._ranks_reported |= {
            rank
            for rank, status in worker_group_status.worker_statuses.items()
            if status.training_report and status.training_report.metrics.get(BEFORE_RESTART)
        }
        timed_out = time.monotonic() - self._requested_at_s > _CHECKPOINT_TIMEOUT_S
        if len(self._ranks_reported) < worker_group_state.num_workers and not timed_out:
            return NoopDecision()
        decision, self._pending_resize = self._pending_resize, None
        return decision

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """Ignores draining nodes: Ray schedules nothing on them, so a start there would time out."""
        # Ray calls this without a pause while no worker runs.
        if time.monotonic() - self._drains_polled_at_s > DRAIN_POLL_S:
            self._draining_nodes = state.get_draining_nodes()
            self._drains_polled_at_s = time.monotonic()
            self._usable_nodes = self._list_usable_nodes() if self._decodes else []
        usable_resources = {
            node: resources for node, resources in reserved_resources.items() if node not in self._draining_nodes
        }
        workers = super()._count_possible_workers(usable_resources)
        if not self._decodes:
            return workers
        per_worker: dict[str, Any] = self.scaling_config._resources_per_worker_not_none
        return min(
            workers, count_safe_workers(self._usable_nodes, per_worker["CPU"], per_worker.get("GPU", 0), decodes=True)
        )

    def _list_usable_nodes(self) -> list[Node]:
        """The nodes that are alive and not draining."""
        return [
            Node(node["NodeID"], node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in self._draining_nodes
        ]


class CheckpointBeforePreemption(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Requests a checkpoint when a node is about to be preempted, and restarts the workers once it is committed.

    If the deadline comes first, the remaining workers get a grace period that depends on how long a checkpoint takes.
    """

    def __init__(self) -> None:
        self._workers: Sequence[Any] = ()
        self._checkpoint_s: float | None = None
        self._checkpoint_requested = False
        self._checkpoint_committed = False
        self._preempted_ranks: Sequence[int] | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        # The controller reads the grace period from here each time it polls.
        self._failure_config = train_run_context.run_config.failure_config

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._workers = worker_group.get_workers()
        self._checkpoint_requested = False
        self._checkpoint_committed = False
        self._preempted_ranks = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if not isinstance(current_state, PreemptingState):
            return
        self._preempted_ranks = current_state.preemption_info.preempted_ranks
        if not self._checkpoint_requested:
            self._checkpoint_requested = True
            _request_checkpoint_from(self._workers)
        self._update_grace()

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self._checkpoint_s = metrics[0].get(CHECKPOINT_S, self._checkpoint_s)
        self._checkpoint_committed |= bool(metrics[0].get(BEFORE_RESTART))
        self._update_grace()

    def _update_grace(self) -> None:
        if self._preempted_ranks is None:
            return
        if self._checkpoint_committed:
            grace_s = -math.inf  # counts as past the deadline: nothing is left to wait for
        elif 0 in self._preempted_ranks:
            grace_s = 0.0  # the node that goes away is the one that writes the checkpoint
        else:
            grace_s = compute_grace_s(self._checkpoint_s)
        self._failure_config.preemption_grace_s = grace_s


def compute_grace_s(checkpoint_s: float | None) -> float:
    """Grace period in seconds after the deadline of a preempted node.

    Args:
        checkpoint_s: Seconds that the last checkpoint took; None if none was measured.
    """
    if checkpoint_s is None:
        return _DEFAULT_GRACE_S
    return min(max(_GRACE_PER_CHECKPOINT * checkpoint_s, _MIN_GRACE_S), _MAX_GRACE_S)


def _request_checkpoint_from(workers: Sequence[Any]) -> None:
    """If rank 0 is gone, the controller notices on its own."""
    if workers:
        workers[0].execute_async(request_checkpoint)
