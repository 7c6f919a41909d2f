"""What a running training is told from outside: to stop, or that its machine is about to be taken away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from giffy_ray import ranks, restarts
from giffy_ray.config import Experiment
from giffy_ray.storage import filesystem_of, join, read_text, write_text

_STOP = "stop"  # a file of this name in a run's folder ends it, with a checkpoint
_LOOK_S = 1.0
_ASK_S = 5.0


def ask_to_stop(experiment: Experiment) -> None:
    write_text(join(experiment.storage, experiment.name, _STOP), "")


def forget_stop(experiment: Experiment) -> None:
    location = join(experiment.storage, experiment.name, _STOP)
    if read_text(location) is not None:
        filesystem, path = filesystem_of(location)
        filesystem.delete_file(path)


class Listener:
    """Rank 0 looks for the file in a thread; at each step all workers hear of what it had seen at the one before."""

    def __init__(self, experiment: Experiment, rank: int, device: torch.device, notice: Callable[[], Any]):
        self.location = join(experiment.storage, experiment.name, _STOP)
        self.notice, self._any_of_each = notice, ranks.AnyOfEach(device)
        self._stop, self._ask, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._known = None
        if rank == 0:
            threading.Thread(target=self._look, daemon=True).start()

    def heard(self) -> tuple[bool, bool]:
        """Whether the training is to stop, and whether it is to take a checkpoint, as its workers will be restarted.

        The same on all workers, which must call it equally often. Each notice that a machine goes away, and each
        request of Ray Train's controller, is reported once.
        """
        asked = self._ask.is_set()
        stop, ask, requested = self._any_of_each([self._stop.is_set(), asked, restarts.take_checkpoint_request()])
        if asked:
            self._ask.clear()
        notice = self.notice() if ask else self._known
        is_new, self._known = notice is not None and notice != self._known, notice
        return stop, is_new or requested

    def end(self) -> None:
        self._ended.set()
        self._any_of_each.end()

    def _look(self) -> None:
        waited_s = 0.0
        while not self._ended.wait(_LOOK_S):
            waited_s += _LOOK_S
            if read_text(self.location) is not None:
                self._stop.set()
            if waited_s >= _ASK_S:
                waited_s = 0.0
                self._ask.set()
