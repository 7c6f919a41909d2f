"""Planned restarts of a training's workers: first a checkpoint, then the restart.

Ray Train restarts all workers to change their number, and when one of their nodes is about to be preempted. On its own
it takes no checkpoint before the first, and waits for the node's deadline before the second, so that the steps in
between are lost. Here its controller asks rank 0 for a checkpoint; all workers idle once their state is copied; and the
controller restarts them as soon as the checkpoint is committed.

Ray has no public hooks for this, and pyproject.toml pins Ray to one minor version: the tests fail where a hook
is not as it was.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state  # no public function tells which nodes drain
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

from giffy_ray.cluster.placement import Node, most_workers

# Keys of what a worker reports to Ray Train.
BEFORE_RESTART = "before_restart"  # true where the controller asked for this checkpoint: the workers idle after it
CHECKPOINT_S = "checkpoint_s"  # how long this checkpoint took to write, with its upload

# Longer than any checkpoint takes; then a resize goes ahead without one, and workers that nobody restarts train on.
_LONGEST_CHECKPOINT_S = 900.0
# How long a preempted training waits, beyond the deadline of the node, for a checkpoint that is still being written.
_GRACE_CHECKPOINTS = 2.0  # of the time that the last one took, as several workers may write at once after a notice
_SHORTEST_GRACE_S, _UNMEASURED_GRACE_S, _LONGEST_GRACE_S = 10.0, 60.0, 600.0
POLL_DRAINS_S = 1.0  # Ray's default of 5 s is a sixth of the half minute that some clouds give

# In the process of rank 0.
_checkpoint_asked = threading.Event()


# ------------------------------------------------------------------------------------------------------- workers
def ask_for_checkpoint() -> None:
    """Runs in the process of rank 0, sent there by the controller."""
    _checkpoint_asked.set()


def take_checkpoint_request() -> bool:
    """Whether the controller asked this process for a checkpoint since the last call."""
    asked = _checkpoint_asked.is_set()
    if asked:
        _checkpoint_asked.clear()
    return asked


def wait_for_restart() -> None:
    """Idles until Ray Train ends this process: a step after the checkpoint before a restart would be lost.

    Idle workers also survive the loss of the preempted node, which would break a step's all-reduce and cut off the
    upload of the checkpoint.
    """
    time.sleep(_LONGEST_CHECKPOINT_S)


# ---------------------------------------------------------------------------------------------------- controller
class Trainer(TorchTrainer):
    """A TorchTrainer that takes a checkpoint before it changes the number of workers.

    `decodes`: videos are decoded while it trains, so an elastic training leaves a whole CPU free on one node.
    """

    def __init__(self, *arguments: Any, decodes: bool = False, **named: Any):
        super().__init__(*arguments, **named)
        self._decodes = decodes

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = CheckpointBeforeResize(self.scaling_config, self._decodes)
        return super()._initialize_and_run_controller(**arguments)


class CheckpointBeforeResize(ElasticScalingPolicy):
    """Holds the decision to resize running workers back until all of them have reported a checkpoint for it."""

    def __init__(self, scaling_config: ScalingConfig, decodes: bool = False):
        super().__init__(scaling_config)
        self._decodes, self._nodes = decodes, list[Node]()
        self._held: ResizeDecision | None = None
        self._asked_s, self._reported = -math.inf, set[int]()
        self._draining, self._looked_s = dict[str, int](), -math.inf

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._held = None
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        if self._held is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                self._held, self._asked_s, self._reported = decision, time.monotonic(), set()
                _ask(worker_group_state.workers)
                return NoopDecision()
            return decision
        self._maybe_send_resource_request()  # the request for the new workers' resources expires otherwise
        self._reported |= {
            rank
            for rank, status in worker_group_status.worker_statuses.items()
            if status.training_report and status.training_report.metrics.get(BEFORE_RESTART)
        }
        late = time.monotonic() - self._asked_s > _LONGEST_CHECKPOINT_S
        if len(self._reported) < worker_group_state.num_workers and not late:
            return NoopDecision()
        decision, self._held = self._held, None
        return decision

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """A draining node is still alive, but nothing is scheduled on it: a start that counts on it would time out."""
        if time.monotonic() - self._looked_s > POLL_DRAINS_S:  # while no worker runs, this is called without a pause
            self._draining, self._looked_s = state.get_draining_nodes(), time.monotonic()
            self._nodes = self._undrained_nodes() if self._decodes else []
        fitting = super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node not in self._draining}
        )
        if not self._decodes:
            return fitting
        one: dict[str, Any] = self.scaling_config._resources_per_worker_not_none
        return min(fitting, most_workers(self._nodes, one["CPU"], one.get("GPU", 0), decodes=True))

    def _undrained_nodes(self) -> list[Node]:
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self._draining]
        return [
            Node(node["NodeID"], node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0)))
            for node in alive
        ]


class CheckpointBeforePreemption(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Asks for a checkpoint when a node is about to be preempted, and restarts the workers once it is committed.

    Where the deadline comes first, the workers that are left get a grace period by how long a checkpoint takes.
    """

    def __init__(self) -> None:
        self._workers: Sequence[Any] = ()
        self._checkpoint_s: float | None = None
        self._asked = self._committed = False
        self._preempted: Sequence[int] | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        # The controller reads the grace period from here at each look.
        self._failure_config = train_run_context.run_config.failure_config

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._workers, self._asked, self._committed, self._preempted = worker_group.get_workers(), False, False, None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if not isinstance(current_state, PreemptingState):
            return
        self._preempted = current_state.preemption_info.preempted_ranks
        if not self._asked:
            self._asked = True
            _ask(self._workers)
        self._set_grace()

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self._checkpoint_s = metrics[0].get(CHECKPOINT_S, self._checkpoint_s)
        self._committed |= bool(metrics[0].get(BEFORE_RESTART))
        self._set_grace()

    def _set_grace(self) -> None:
        if self._preempted is None:
            return
        if self._committed:
            grace = -math.inf  # the deadline has passed: there is nothing to wait for
        elif 0 in self._preempted:
            grace = 0.0  # the checkpoint is written on the node that goes away
        else:
            grace = compute_grace_s(self._checkpoint_s)
        self._failure_config.preemption_grace_s = grace


def compute_grace_s(checkpoint_s: float | None) -> float:
    """Seconds beyond the deadline of a preempted node, where a checkpoint took `checkpoint_s` (None: not known)."""
    if checkpoint_s is None:
        return _UNMEASURED_GRACE_S
    return min(max(_GRACE_CHECKPOINTS * checkpoint_s, _SHORTEST_GRACE_S), _LONGEST_GRACE_S)


def _ask(workers: Sequence[Any]) -> None:
    """Where rank 0 is gone, the controller finds that out by itself."""
    if workers:
        workers[0].execute_async(ask_for_checkpoint)
