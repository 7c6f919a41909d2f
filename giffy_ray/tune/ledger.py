"""What a search knows: an Optuna study in a storage that outlives the process that searches.

Trials that such a process left behind are handed out again first, under their numbers. Poor ones are ended by
asynchronous successive halving (ASHA; Li et al. 2020, arXiv 1810.05934), Optuna's, since its rungs lie in the same
storage; Ray Tune's forgets them with the process.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from giffy_ray.config import ConfigError, Experiment, SearchConfig
from giffy_ray.storage import is_local, join
from giffy_ray.tracking import sqlite_address
from giffy_ray.tune.space import Values, distributions

ENDED = "ended"  # attribute of a trial that did not end well: why
EPOCH = "epoch"  # attribute of a trial with several objectives: that of its last report
_SEARCHED_S = "searched_s"
# What a trial counts for that failed: finite, so that the sampler learns to keep away from it.
WORST = 1e6
_FIRST_RANDOM = 4  # trials, before TPE has something to tell apart
_FEWEST_TO_TELL = 8  # trials, with which the most important field is named rightly three times in four


class Ledger:
    """Numbers are those of the trials, from 0; values are those of `search.space`."""

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        """Opens the study of the experiment's name, or a new one, which tries `points` first."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._settings, self._space = experiment.search, distributions(experiment)
        self.objectives = objectives(self._settings)
        storage = _opened(address(experiment))
        known = optuna.get_all_study_names(storage)
        self.is_new = experiment.name not in known
        self._study = optuna.create_study(
            storage=storage,
            study_name=experiment.name,
            directions=["minimize" if better == "smaller" else "maximize" for better in self.objectives.values()],
            load_if_exists=True,
        )
        self._study.sampler = _sampler(self._settings, len(self._study.trials))
        self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            self._settings.grace_epochs, self._settings.reduction_factor
        )
        if self.is_new:
            for point in points:
                self._study.enqueue_trial(point)
        self._stale = deque(self._study.get_trials(states=[TrialState.RUNNING]))
        self._open: dict[int, optuna.Trial] = {}
        self._began_s, self._before_s = time.monotonic(), self._study.user_attrs.get(_SEARCHED_S, 0.0)

    def ask(self) -> tuple[int, Values] | None:
        """The next trial, or None where the search has come to its end."""
        if self._stale:
            left = self._stale.popleft()
            self._open[left.number] = optuna.Trial(self._study, left._trial_id)
            return left.number, dict(left.params)
        if self.why_ended():
            return None
        number = self._begun()
        return number, self.values(number)

    def turn(self, number: int) -> dict[str, Any]:
        """What else the trial is to know that was handed out."""
        return {}

    def values(self, number: int) -> Values:
        return dict(self._study.get_trials(deepcopy=False)[number].params)

    def why_ended(self) -> str:
        """Why no more trials are begun, or an empty string."""
        settings, begun = self._settings, self.trials()
        if len(begun) >= settings.trials:
            return f"search.trials={settings.trials} are done"
        if self._hours_over():
            return self._hours_over()
        done = [trial for trial in begun if trial.state.is_finished()]
        if settings.patience and len(self.objectives) == 1 and len(done) > settings.patience:
            best = self._study.best_trial.number if any(trial.state == TrialState.COMPLETE for trial in done) else -1
            since = sum(trial.number > best for trial in done)
            if since >= settings.patience:
                return f"none of the last search.patience={settings.patience} trials was better"
        return ""

    def report(self, number: int, epoch: int, reported: Mapping[str, Any]) -> bool:
        """Takes down a report. Returns whether the trial is to end: it diverged, or is worse than others by then."""
        if number not in self._open:
            return True
        values = [reported.get(name, math.nan) for name in self.objectives]
        for name, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                self.end(number, f"diverged: {name} was {value} after epoch {epoch}")
                return True
        trial = self._open[number]
        if len(values) > 1:  # Optuna keeps intermediate values of a single objective only, and ASHA needs one
            trial.set_user_attr("values", values)
            trial.set_user_attr(EPOCH, epoch)
            return False
        if epoch not in self._frozen(trial).intermediate_values:
            trial.report(values[0], epoch)
        if not self._settings.asha or epoch >= self._settings.epochs or not trial.should_prune():
            return False
        self._tell(number, state=TrialState.PRUNED)
        return True

    def end(self, number: int, why: str = "") -> None:
        """A trial is over: well, with its best values, or without any because of `why`. Once is enough."""
        if number not in self._open:
            return
        trial = self._open[number]
        values = self.values_of(self._frozen(trial))
        if not values:
            why = why or "it reported nothing"
        if why:
            trial.set_user_attr(ENDED, why)
            values = [WORST if better == "smaller" else -WORST for better in self.objectives.values()]
        self._tell(number, values=values)

    def unfinished(self) -> bool:
        """Whether trials are to be handed out again that were left behind."""
        return bool(self._stale)

    def trials(self) -> list[FrozenTrial]:
        """Those that were begun, in order."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def best(self) -> list[FrozenTrial]:
        """The best trial that ended well, or, of several objectives, those that no other is better than in all."""
        return [trial for trial in self._study.best_trials if ENDED not in trial.user_attrs]

    def values_of(self, trial: FrozenTrial) -> list[float]:
        """Its best of the single objective, or its last of several; nothing where it reported nothing."""
        if len(self.objectives) > 1:
            return trial.user_attrs.get("values", [])
        best = min if next(iter(self.objectives.values())) == "smaller" else max
        return [best(trial.intermediate_values.values())] if trial.intermediate_values else []

    def importances(self) -> dict[str, dict[str, float]]:
        """Objective -> field -> its share of the variance of what trials reached, largest first.

        By functional ANOVA (Hutter et al. 2014), with the trials that were ended early as far as they came and without
        those that failed. Nothing where there are too few trials to tell.
        """
        told = [trial for trial in self.trials() if ENDED not in trial.user_attrs and self.values_of(trial)]
        if len(told) < _FEWEST_TO_TELL:
            return {}
        reached = optuna.create_study(directions=self._study.directions)
        for trial in told:
            distributions, values = trial.distributions, self.values_of(trial)
            reached.add_trial(optuna.create_trial(params=trial.params, distributions=distributions, values=values))
        return {name: _importances_for(place, reached) for place, name in enumerate(self.objectives)}

    def _begun(self) -> int:
        trial = self._study.ask(self._space)
        self._open[trial.number] = trial
        return trial.number

    def _hours_over(self) -> str:
        most, hours = self._settings.max_hours, (self._before_s + time.monotonic() - self._began_s) / 3600
        return f"search.max_hours={most:g} are over" if most is not None and hours >= most else ""

    def _tell(self, number: int, **what: Any) -> None:
        self._study.tell(self._open.pop(number), **what)
        self._study.set_user_attr(_SEARCHED_S, self._before_s + time.monotonic() - self._began_s)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return trial.storage.get_trial(trial._trial_id)


def _importances_for(objective: int, study: optuna.Study) -> dict[str, float]:
    if len({trial.values[objective] for trial in study.trials}) == 1:
        return {}  # nothing made a difference
    evaluator = FanovaImportanceEvaluator(seed=0)
    shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[objective])
    return {name: float(share) for name, share in shares.items()}


def objectives(settings: SearchConfig) -> dict[str, str]:
    """Metric -> which is better, smaller or larger."""
    return dict(settings.objectives) or {settings.metric: "smaller"}


def address(experiment: Experiment) -> str:
    """`search.storage`, or an SQLite file in the study's folder. Raises ConfigError where that is not on a disk."""
    if experiment.search.storage:
        return experiment.search.storage
    if not is_local(experiment.storage):
        raise ConfigError(
            "search.storage: give Optuna a database, postgresql://..., or a journal file on a disk that is shared, "
            f"/path/NAME.log; {experiment.storage!r} can hold neither"
        )
    folder = join(experiment.storage, experiment.name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return sqlite_address(join(folder, "optuna.db"))


def _opened(where: str) -> BaseStorage:
    if "://" in where:
        return RDBStorage(where)
    return JournalStorage(JournalFileBackend(where))


def _sampler(settings: SearchConfig, trials: int) -> BaseSampler:
    # Another seed where a search goes on, which would else draw the same values again.
    seed = settings.seed + trials
    if settings.sampler in ("random", "pbt"):
        return RandomSampler(seed)
    # Without warnings of what is experimental: how trials that run beside are counted in, and parameters together.
    return TPESampler(seed=seed, n_startup_trials=_FIRST_RANDOM, multivariate=True, constant_liar=True)
