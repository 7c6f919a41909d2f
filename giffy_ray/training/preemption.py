"""What a running training is told from outside: to stop, that a machine goes away, or that its lease is lost."""

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
from giffy_ray.training import restarts

_STOP = "stop"  # a file of this name in a run's folder ends it, with a checkpoint
_LOOK_S = 1.0
_ASK_S = 5.0
_log = logging.getLogger(__name__)


def request_stop(experiment: Experiment) -> None:
    write_text(join(experiment.storage, experiment.name, _STOP), "")


def clear_stop_request(experiment: Experiment) -> None:
    delete_file(join(experiment.storage, experiment.name, _STOP))


class PreemptionMonitor:
    """Rank 0 looks at the storage in a thread; at each step all workers hear of what it had seen at the one before.

    Used as a context manager, which ends the thread however the block is left. `watch` follows the lease of the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        rank: int,
        device: torch.device,
        notice: Callable[[], Any],
        watch: RunLockWatcher | None = None,
    ):
        self.location = join(experiment.storage, experiment.name, _STOP)
        self.notice, self._any_of_each, self._watch = notice, distributed.DelayedAnyReduce(device), watch
        self._stop, self._ask, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._known, self._lost = None, ""
        self._thread = threading.Thread(target=self._look, name="listener", daemon=True) if rank == 0 else None
        if self._thread:
            self._thread.start()

    def __enter__(self) -> PreemptionMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:  # on this worker alone, perhaps: the others would not answer
            self._end_thread()
        else:
            self.end()

    def poll(self) -> tuple[bool, bool]:
        """Whether the training is to stop, and whether it is to take a checkpoint, as its workers will be restarted.

        The same on all workers, which must call it equally often. Each notice that a machine goes away, and each
        request of Ray Train's controller, is reported once. Raises LeaseLost, on all workers at the same step, where
        another process trains the run now.
        """
        asked = self._ask.is_set()
        flags = [self._stop.is_set(), asked, restarts.take_checkpoint_request(), bool(self._lost)]
        stop, ask, requested, lost = self._any_of_each(flags)
        if lost:
            raise RunLockLost(self._lost or "rank 0 has found the lease of the run to be lost")
        if asked:
            self._ask.clear()
        notice = self.notice() if ask else self._known
        is_new, self._known = notice is not None and notice != self._known, notice
        return stop, is_new or requested

    def end(self) -> None:
        """Ends the thread, and waits for the answer to the last question, which all workers have asked."""
        self._end_thread()
        self._any_of_each.end()

    def _end_thread(self) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join(_ASK_S)  # a read that hangs keeps nobody waiting

    def _look(self) -> None:
        waited_s, fails = 0.0, False
        while not self._ended.wait(_LOOK_S):
            waited_s += _LOOK_S
            due = waited_s >= _ASK_S
            if due:
                waited_s = 0.0
                self._ask.set()
            try:
                self._read(due)
            except Exception as failure:
                if not fails:
                    _log.warning("%s: the storage cannot be read (%r); trying again", self.location, failure)
                fails = True
            else:
                if fails:
                    _log.warning("%s: the storage can be read again", self.location)
                fails = False

    def _read(self, due: bool) -> None:
        if is_file(self.location):  # its content does not matter: some shells write UTF-16
            self._stop.set()
        if due and self._watch and not self._lost:
            self._lost = self._watch.look()
