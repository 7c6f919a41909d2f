"""Trials that train independently, with values from an Optuna sampler, and are pruned by ASHA.

ASHA is asynchronous successive halving (Li et al. 2020, arXiv 1810.05934). Optuna's implementation keeps its rungs in
the study's storage, so they survive a restart; Ray Tune's are lost with the process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from giffy_ray.config import Experiment
from giffy_ray.tuning.optuna_study import FAILURE_ATTR, OptunaStudy
from giffy_ray.tuning.search_space import Values

EPOCH_ATTR = "epoch"  # user attribute of a trial with several objectives: the epoch of its last report
_VALUES_ATTR = "values"  # and the objective values of that report


class IndependentTrials:
    """Resumes orphans first, under their numbers, then starts new trials. See `TrialSource` for the methods."""

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        """Loads or creates the study; a new one tries `points` first. Raises ConfigError."""
        self.study = OptunaStudy(experiment, points)
        self._settings = experiment.search
        self._orphans = deque(self.study.orphans)
        self._running: dict[int, optuna.Trial] = {}

    def ask(self) -> tuple[int, Values] | None:
        if self._orphans:
            trial = self.study.reopen(self._orphans.popleft())
        elif self.stop_reason():
            return None
        else:
            trial = self.study.start_trial()
        self._running[trial.number] = trial
        return trial.number, dict(trial.params)

    def trial_directive(self, number: int) -> dict[str, Any]:
        return {}

    def report(self, number: int, epoch: int, metrics: Mapping[str, Any]) -> bool:
        """Stops a trial that diverged or that ASHA prunes."""
        if number not in self._running:
            return True
        values = [metrics.get(name, math.nan) for name in self.study.objectives]
        for name, value in zip(self.study.objectives, values, strict=True):
            if not math.isfinite(value):
                self.end(number, f"diverged: {name} was {value} after epoch {epoch}")
                return True
        trial = self._running[number]
        if len(values) > 1:  # Optuna stores intermediate values of a single objective only, and ASHA needs one
            trial.set_user_attr(_VALUES_ATTR, values)
            trial.set_user_attr(EPOCH_ATTR, epoch)
            return False
        if epoch not in self.study.freeze(trial).intermediate_values:
            trial.report(values[0], epoch)
        if not self._settings.asha or epoch >= self._settings.epochs or not trial.should_prune():
            return False
        self.study.prune(self._running.pop(number))
        return True

    def end(self, number: int, failure: str = "") -> None:
        if number in self._running:
            trial = self._running.pop(number)
            self.study.complete(trial, self.objective_values(self.study.freeze(trial)), failure)

    def stop_reason(self) -> str:
        trials = self.study.trials()
        if len(trials) >= self._settings.trials:
            return f"search.trials={self._settings.trials} reached"
        time_limit = self.study.time_limit_reason()
        if time_limit:
            return time_limit
        combinations = self.study.combinations
        if combinations is not None and len(self.study.tried_points()) >= combinations:
            return f"all {combinations} combinations of search.space have been tried"
        patience = self._settings.patience
        finished_trials = [trial for trial in trials if trial.state.is_finished()]
        if patience and len(self.study.objectives) == 1 and len(finished_trials) > patience:
            best = self.study.best()
            best_number = best[0].number if best else -1
            if sum(trial.number > best_number for trial in finished_trials) >= patience:
                return f"no improvement in the last search.patience={patience} trials"
        return ""

    def has_unfinished_trials(self) -> bool:
        return bool(self._orphans)

    def final_values(self, trial: FrozenTrial) -> Values:
        return dict(trial.params)

    def objective_values(self, trial: FrozenTrial) -> list[float]:
        """Returns the best report of a single objective, the last report of several."""
        if len(self.study.objectives) > 1:
            return trial.user_attrs.get(_VALUES_ATTR, [])
        (direction,) = self.study.objectives.values()
        choose = min if direction == "minimize" else max
        return [choose(trial.intermediate_values.values())] if trial.intermediate_values else []

    def importances(self) -> dict[str, dict[str, float]]:
        """Includes pruned trials with what they had reached, and leaves out failed ones."""
        values = {
            trial.number: self.objective_values(trial)
            for trial in self.study.trials()
            if FAILURE_ATTR not in trial.user_attrs
        }
        return self.study.importances({number: results for number, results in values.items() if results})
