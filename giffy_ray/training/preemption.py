"""Stop requests, node preemption notices and the loss of the run lock, for a running training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from giffy_ray.config import Experiment
from giffy_ray.core import distributed
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import delete_file, is_file, join, write_text
from giffy_ray.training import planned_restarts

_STOP_FILE = "stop"  # a file of this name in the run folder stops the training, with a checkpoint
_STOP_POLL_S = 1.0
_PREEMPTION_POLL_S = 5.0  # also the interval of the run lock, and the longest wait for the thread to end
_log = logging.getLogger(__name__)


def request_stop(experiment: Experiment) -> None:
    write_text(join(experiment.run_dir, _STOP_FILE), "")


def clear_stop_request(experiment: Experiment) -> None:
    delete_file(join(experiment.run_dir, _STOP_FILE))


class PreemptionMonitor:
    """Polls for stop requests and preemption notices, and gives all ranks the same answer at the same step.

    A thread of rank 0 polls the storage; every rank sees its flags one step later, through an asynchronous all-reduce.
    Use it as a context manager: the thread ends however the block exits.
    """

    def __init__(
        self,
        experiment: Experiment,
        rank: int,
        device: torch.device,
        get_preemption_info: Callable[[], Any],
        lock_watcher: RunLockWatcher | None = None,
    ):
        """Starts the thread on rank 0.

        Args:
            device: Where the process group reduces the flags.
            get_preemption_info: Returns a new value when a node of the training is about to be preempted.
            lock_watcher: Watches the run lock, if given.
        """
        self.location = join(experiment.run_dir, _STOP_FILE)
        self._get_preemption_info = get_preemption_info
        self._reduce_flags = distributed.DelayedAnyReduce(device)
        self._lock_watcher = lock_watcher
        self._stop_requested = threading.Event()
        self._preemption_poll_due = threading.Event()
        self._closed = threading.Event()
        self._last_preemption_info: Any = None
        self._lock_lost_reason = ""
        self._thread: threading.Thread | None = None
        if rank == 0:
            self._thread = threading.Thread(target=self._poll_storage, name="preemption-monitor", daemon=True)
            self._thread.start()

    def __enter__(self) -> PreemptionMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:  # perhaps on this rank alone: the others would not join the last all-reduce
            self._join_thread()
        else:
            self.close()

    def poll(self) -> tuple[bool, bool]:
        """Returns the same on all ranks. Every rank must call it once per step.

        Returns:
            Whether the training must stop; and whether the workers are about to be restarted and must take a checkpoint
            first. The second is true once for each preemption notice and each request of Ray Train's controller.

        Raises:
            RunLockLost: Another process trains the run now. All ranks raise at the same step.
        """
        poll_due = self._preemption_poll_due.is_set()
        flags = [
            self._stop_requested.is_set(),
            poll_due,
            planned_restarts.pop_checkpoint_request(),
            bool(self._lock_lost_reason),
        ]
        stop, poll_preemption, checkpoint_requested, lock_lost = self._reduce_flags(flags)
        if lock_lost:
            raise RunLockLost(self._lock_lost_reason or "rank 0 lost the run lock")
        if poll_due:
            self._preemption_poll_due.clear()
        info = self._get_preemption_info() if poll_preemption else self._last_preemption_info
        is_new_notice = info is not None and info != self._last_preemption_info
        self._last_preemption_info = info
        return stop, is_new_notice or checkpoint_requested

    def close(self) -> None:
        """Ends the thread and waits for the last all-reduce, which all ranks have started."""
        self._join_thread()
        self._reduce_flags.wait()

    def _join_thread(self) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join(_PREEMPTION_POLL_S)  # a read that hangs must not block the training

    def _poll_storage(self) -> None:
        since_preemption_poll_s, failing = 0.0, False
        while not self._closed.wait(_STOP_POLL_S):
            since_preemption_poll_s += _STOP_POLL_S
            poll_due = since_preemption_poll_s >= _PREEMPTION_POLL_S
            if poll_due:
                since_preemption_poll_s = 0.0
                self._preemption_poll_due.set()
            try:
                self._read_storage(check_lock=poll_due)
            except Exception as failure:
                if not failing:
                    _log.warning("%s: cannot read the storage (%r); retrying", self.location, failure)
                failing = True
            else:
                if failing:
                    _log.warning("%s: the storage is readable again", self.location)
                failing = False

    def _read_storage(self, check_lock: bool) -> None:
        if is_file(self.location):  # the content is ignored: some shells write UTF-16
            self._stop_requested.set()
        if check_lock and self._lock_watcher and not self._lock_lost_reason:
            self._lock_lost_reason = self._lock_watcher.poll()
