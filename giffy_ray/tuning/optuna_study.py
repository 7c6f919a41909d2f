"""What a search knows: an Optuna study in a storage that outlives the process that searches.

Trials that such a process left behind are handed out again first, under their numbers. Poor ones are ended by
asynchronous successive halving (ASHA; Li et al. 2020, arXiv 1810.05934), Optuna's, since its rungs lie in the same
storage; Ray Tune's forgets them with the process. A space of finitely many points is never searched twice at one point.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from giffy_ray.config import ConfigError, Experiment, SearchConfig
from giffy_ray.tuning.objectives import objectives
from giffy_ray.tuning.optuna_storage import opened
from giffy_ray.tuning.search_space import Values, combinations, distributions, key_of, untried

ENDED = "ended"  # attribute of a trial that did not end well: why
EPOCH = "epoch"  # attribute of a trial with several objectives: that of its last report
_SEARCHED_S = "searched_s"
# What a trial counts for that failed: finite, so that the sampler learns to keep away from it.
WORST = 1e6
_FIRST_RANDOM = 4  # trials, before TPE has something to tell apart
_FEWEST_TO_TELL = 8  # trials, with which the most important field is named rightly three times in four
_DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
_REDRAWS = 10  # of the sampler, before an untried point is taken at random


class OptunaStudy:
    """Numbers are those of the trials, from 0; values are those of `search.space`."""

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        """Opens the study of the experiment's name, or a new one, which tries `points` first."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._settings, self._space = experiment.search, distributions(experiment)
        self._combinations = combinations(self._space)
        self.objectives = objectives(self._settings)
        # Of what is measured, times this: the smaller the better.
        self._sign = 1 if next(iter(self.objectives.values())) == "minimize" else -1
        directions = [_DIRECTIONS[better] for better in self.objectives.values()]
        self._study = optuna.create_study(
            storage=opened(experiment), study_name=experiment.name, directions=directions, load_if_exists=True
        )
        if self._study.directions != directions:
            stored, asked = (
                ", ".join(one.name.lower() for one in some) for some in (self._study.directions, directions)
            )
            raise ConfigError(
                f"search.metric: the stored search {experiment.name!r} would {stored} {', '.join(self.objectives)}, "
                f"and the experiment asks to {asked}; start a new search with --resume never"
            )
        self._study.sampler = _sampler(self._settings, len(self._study.trials))
        self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            self._settings.grace_period, self._settings.reduction_factor
        )
        if not self.trials():  # also where a process was killed before it had noted all points
            for point in points:
                self._study.enqueue_trial(point, skip_if_exists=True)
        self._orphaned = deque(self._study.get_trials(states=[TrialState.RUNNING]))
        self._running: dict[int, optuna.Trial] = {}
        self._began_s, self._before_s = time.monotonic(), self._study.user_attrs.get(_SEARCHED_S, 0.0)

    def ask(self) -> tuple[int, Values] | None:
        """The next trial, or None where the search has come to its end."""
        if self._orphaned:
            left = self._orphaned.popleft()
            self._running[left.number] = self._reopened(left)
            return left.number, self.values(left.number)
        if self.stop_reason():
            return None
        number = self._begun()
        return number, self.values(number)

    def trial_directive(self, number: int) -> dict[str, Any]:
        """What else the trial is to know that was handed out."""
        return {}

    def values(self, number: int) -> Values:
        """Those of a trial that was handed out and is not over."""
        return dict(self._running[number].params)

    def params_of(self, trial: FrozenTrial) -> Values:
        """Those of any trial."""
        return dict(trial.params)

    def stop_reason(self) -> str:
        """Why no more trials are begun, or an empty string."""
        settings, begun = self._settings, self.trials()
        if len(begun) >= settings.trials:
            return f"search.trials={settings.trials} are done"
        if self._hours_over():
            return self._hours_over()
        if self._combinations is not None and len(self._tried()) >= self._combinations:
            return f"all {self._combinations} combinations of search.space have been tried"
        done = [trial for trial in begun if trial.state.is_finished()]
        if settings.patience and len(self.objectives) == 1 and len(done) > settings.patience:
            best = self.best()[0].number if self.best() else -1
            since = sum(trial.number > best for trial in done)
            if since >= settings.patience:
                return f"none of the last search.patience={settings.patience} trials was better"
        return ""

    def report(self, number: int, epoch: int, reported: Mapping[str, Any]) -> bool:
        """Takes down a report. Returns whether the trial is to end: it diverged, or is worse than others by then."""
        if number not in self._running:
            return True
        values = [reported.get(name, math.nan) for name in self.objectives]
        for name, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                self.end(number, f"diverged: {name} was {value} after epoch {epoch}")
                return True
        trial = self._running[number]
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
        if number not in self._running:
            return
        trial = self._running[number]
        values = self.values_of(self._frozen(trial))
        if not values:
            why = why or "it reported nothing"
        if why:
            trial.set_user_attr(ENDED, why)
            values = [WORST if better == "minimize" else -WORST for better in self.objectives.values()]
        self._tell(number, values=values)

    def unfinished(self) -> bool:
        """Whether trials are to be handed out again that were left behind."""
        return bool(self._orphaned)

    def trials(self) -> list[FrozenTrial]:
        """Those that were begun, in order."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def best(self) -> list[FrozenTrial]:
        """The best trial that ended well, or, of several objectives, those that no other is better than in all.

        Told from these alone: Optuna would count WORST, which a metric on a large scale may be worse than.
        """
        well = [
            trial for trial in self.trials() if trial.state == TrialState.COMPLETE and ENDED not in trial.user_attrs
        ]
        signs = [1 if better == "minimize" else -1 for better in self.objectives.values()]
        costs = {
            trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in well
        }
        if len(signs) == 1:
            return [min(well, key=lambda trial: costs[trial.number])] if well else []
        return [trial for trial in well if not any(_dominates(other, costs[trial.number]) for other in costs.values())]

    def values_of(self, trial: FrozenTrial) -> list[float]:
        """Its best of the single objective, or its last of several; nothing where it reported nothing."""
        if len(self.objectives) > 1:
            return trial.user_attrs.get("values", [])
        best = min if next(iter(self.objectives.values())) == "minimize" else max
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
        point = self._untried_point()
        if point is not None:
            self._study.enqueue_trial(point)  # and whoever is killed before the next line begins with it
        trial = self._study.ask(self._space)
        self._running[trial.number] = trial
        return trial.number

    def _untried_point(self) -> Values | None:
        """Where the space is finite, a point that no trial had; None where the sampler is free to draw any.

        The sampler is asked a few times, on a copy of the study, as one that nears the best draws the same again.
        """
        tried = self._tried()
        waiting = self._study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if waiting or self._combinations is None or len(tried) >= self._combinations:
            return None
        copy = optuna.create_study(directions=self._study.directions, sampler=self._study.sampler)
        copy.add_trials(self._study.get_trials(deepcopy=False))
        for _ in range(_REDRAWS):
            point = copy.ask(self._space).params
            if key_of(point, self._space) not in tried:
                return point
        return untried(self._space, tried, random.Random(f"{self._settings.seed} {len(tried)}"))

    def _tried(self) -> set[tuple[Any, ...]]:
        """The points of all trials that were begun, however they ended."""
        params = [trial.params for trial in self.trials()]
        return {key_of(values, self._space) for values in params if self._space.keys() <= values.keys()}

    def _reopened(self, left: FrozenTrial) -> optuna.Trial:
        """A trial that another process left running. One killed while it drew the values has only some of them."""
        trial = optuna.Trial(self._study, left._trial_id)
        for name, distribution in self._space.items():
            trial._suggest(name, distribution)  # what it has already, or what it lacks: as Study.ask does
        return trial

    def _hours_over(self) -> str:
        most, hours = self._settings.max_hours, (self._before_s + time.monotonic() - self._began_s) / 3600
        return f"search.max_hours={most:g} are over" if most is not None and hours >= most else ""

    def _tell(self, number: int, **what: Any) -> None:
        self._study.tell(self._running.pop(number), **what)
        self._study.set_user_attr(_SEARCHED_S, self._before_s + time.monotonic() - self._began_s)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return trial.storage.get_trial(trial._trial_id)


def _importances_for(objective: int, study: optuna.Study) -> dict[str, float]:
    if len({trial.values[objective] for trial in study.trials}) == 1:
        return {}  # nothing made a difference
    evaluator = FanovaImportanceEvaluator(seed=0)
    shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[objective])
    return {name: float(share) for name, share in shares.items()}


def _dominates(costs: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `costs`, where smaller is better, are nowhere worse than `others` and somewhere better."""
    pairs = list(zip(costs, others, strict=True))
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def _sampler(settings: SearchConfig, trials: int) -> BaseSampler:
    # Another seed where a search goes on, which would else draw the same values again.
    seed = settings.seed + trials
    if settings.sampler in ("random", "pbt"):
        return RandomSampler(seed)
    # Without warnings of what is experimental: how trials that run beside are counted in, and parameters together.
    return TPESampler(seed=seed, n_startup_trials=_FIRST_RANDOM, multivariate=True, constant_liar=True)
