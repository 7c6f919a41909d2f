"""What Ray Tune needs from a study: the next trial, and where to send reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from optuna.trial import FrozenTrial

from giffy_ray.tuning.optuna_study import OptunaStudy
from giffy_ray.tuning.search_space import Values


class TrialSource(Protocol):
    """Proposes trials and records their reports in `study`. Trial numbers are Optuna's, from 0."""

    study: OptunaStudy

    def ask(self) -> tuple[int, Values] | None:
        """Returns the number and values of the next trial to run, or None if there is none now."""
        ...

    def trial_directive(self, number: int) -> dict[str, Any]:
        """Returns what else the trial runner needs to know about a trial that `ask` has returned."""
        ...

    def report(self, number: int, epoch: int, metrics: Mapping[str, Any]) -> bool:
        """Records a trial's metrics. Returns whether the trial must stop."""
        ...

    def end(self, number: int, failure: str = "") -> None:
        """Records that a trial has stopped running, and why if it failed. Repeated calls have no effect."""
        ...

    def stop_reason(self) -> str:
        """Returns why no more trials start, or an empty string."""
        ...

    def has_unfinished_trials(self) -> bool:
        """Returns whether trials of an earlier process are waiting to resume."""
        ...

    def final_values(self, trial: FrozenTrial) -> Values:
        """Returns the values of the searched fields that a trial ended with."""
        ...

    def objective_values(self, trial: FrozenTrial) -> list[float]:
        """Returns a trial's value of each objective, or an empty list if it reported none."""
        ...

    def importances(self) -> dict[str, dict[str, float]]:
        """Returns objective -> field -> share of the variance, or an empty dict if that is unknown."""
        ...
