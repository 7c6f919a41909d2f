"""The progress of a search in its parent run: the best result so far, and the clips of the best trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from giffy_ray.tracking.tracker import Tracker

_ANIMATION = "validation"  # the image key that trainings use, so that MLflow's grid shows both in one row


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial that has ended.

    Attributes:
        name: The trial's folder in that of the parent run.
        values: Value of each objective; empty if the trial failed or was pruned.
    """

    name: str
    values: tuple[float, ...]


class SearchProgress:
    """Logs `best/<metric>` for each objective, and the clips of the best trial by the first one, to the parent run.

    Step `n` is the best of trials 0 to `n`. It is logged once these have all ended, so that the curves do not depend on
    the order in which parallel trials end, and a resumed search continues them.
    """

    def __init__(self, tracker: Tracker, objectives: Mapping[str, str]):
        """Creates the logger.

        Args:
            tracker: The parent run.
            objectives: Metric -> "minimize" or "maximize".
        """
        self._tracker = tracker
        self._objectives = dict(objectives)

    def update(self, results: Mapping[int, TrialResult]) -> None:
        """Logs the steps that are complete. Steps that were logged before are skipped.

        Args:
            results: Trial number -> result, of all trials that have ended.
        """
        best: dict[str, TrialResult] = {}
        for step in range(len(results)):
            if step not in results:  # a running trial
                return
            if results[step].values:
                self._replace_worse(best, results[step])
            if best:
                self._log(best, step)

    def _replace_worse(self, best: dict[str, TrialResult], result: TrialResult) -> None:
        for index, (metric, direction) in enumerate(self._objectives.items()):
            sign = 1 if direction == "minimize" else -1
            if metric not in best or sign * result.values[index] < sign * best[metric].values[index]:
                best[metric] = result

    def _log(self, best: Mapping[str, TrialResult], step: int) -> None:
        metrics = {}
        for index, metric in enumerate(self._objectives):
            metrics[f"best/{metric}"] = best[metric].values[index]
        self._tracker.log_metrics(metrics, step, "best")
        first_objective = next(iter(self._objectives))
        self._tracker.copy_last_animation(best[first_objective].name, _ANIMATION, step)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the tracker, whose thread cannot be pickled. Ray Tune saves its searcher; we never restore it."""
        return {}
