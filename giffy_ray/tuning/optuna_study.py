"""The trials of a study, in an Optuna storage that outlives the process that runs them.

`IndependentTrials` and `Population` decide which trial runs next; both keep their trials here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from giffy_ray.config import ConfigError, Experiment, SearchConfig
from giffy_ray.tuning.objectives import resolve_objectives
from giffy_ray.tuning.optuna_storage import open_storage
from giffy_ray.tuning.search_space import (
    Values,
    build_distributions,
    count_combinations,
    draw_untried_point,
    point_key,
)

FAILURE_ATTR = "ended"  # user attribute of a failed trial: the reason
WORST = 1e6  # objective of a failed trial; finite, so that the sampler learns to avoid its region
_SEARCH_TIME_ATTR = "searched_s"  # user attribute of the study: time that all processes have spent on it
_RANDOM_TRIALS = 4  # before TPE, which needs some trials to tell good values from bad ones
_MIN_TRIALS_FOR_IMPORTANCES = 8  # with these, the top field is right three times in four
_MAX_REDRAWS = 10  # of the sampler, before an untried point is drawn at random
_DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}


class OptunaStudy:
    """The Optuna study of a search.

    Attributes:
        objectives: Metric -> "minimize" or "maximize".
        space: Dotted field -> distribution.
        combinations: Number of points in the space, or None if a field is continuous.
        orphans: Trials that an earlier process left running.
    """

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        """Loads the study called `experiment.name`, or creates it.

        Args:
            experiment: The experiment of the study.
            points: Tried first in a new study.

        Raises:
            ConfigError: The storage cannot be opened, or the stored study has other directions.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._settings = experiment.search
        self.space = build_distributions(experiment)
        self.combinations = count_combinations(self.space)
        self.objectives = resolve_objectives(self._settings)
        directions = [_DIRECTIONS[direction] for direction in self.objectives.values()]
        self._study = optuna.create_study(
            storage=open_storage(experiment), study_name=experiment.name, directions=directions, load_if_exists=True
        )
        if self._study.directions != directions:
            stored_directions = ", ".join(direction.name.lower() for direction in self._study.directions)
            requested_directions = ", ".join(direction.name.lower() for direction in directions)
            raise ConfigError(
                f"search.metric: the stored study {experiment.name!r} would {stored_directions} "
                f"{', '.join(self.objectives)}, but the experiment asks to {requested_directions}; start a new "
                "study with --resume never"
            )
        self._study.sampler = _build_sampler(self._settings, len(self._study.trials))
        self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            self._settings.grace_period, self._settings.reduction_factor
        )
        if not self.trials():  # an earlier process may have stopped before it had enqueued every point
            for point in points:
                self._study.enqueue_trial(point, skip_if_exists=True)
        self.orphans = self._study.get_trials(states=[TrialState.RUNNING])
        self._start_s = time.monotonic()
        self._earlier_s = self._study.user_attrs.get(_SEARCH_TIME_ATTR, 0.0)

    @property
    def user_attrs(self) -> dict[str, Any]:
        return self._study.user_attrs

    def set_user_attr(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials that have started, in order."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def best(self) -> list[FrozenTrial]:
        """Returns the best completed trial, or, with several objectives, the Pareto front.

        Failed trials are left out. Optuna would rank them by WORST, which a metric on a large scale can exceed.
        """
        completed_trials = [
            trial
            for trial in self.trials()
            if trial.state == TrialState.COMPLETE and FAILURE_ATTR not in trial.user_attrs
        ]
        signs = [self.sign(name) for name in self.objectives]
        costs = {
            trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)]
            for trial in completed_trials
        }
        if len(signs) == 1:
            return [min(completed_trials, key=lambda trial: costs[trial.number])] if completed_trials else []
        return [
            trial
            for trial in completed_trials
            if not any(_dominates(cost, costs[trial.number]) for cost in costs.values())
        ]

    def sign(self, objective: str) -> int:
        """Returns the factor that turns the objective into a cost, which is minimized."""
        return 1 if self.objectives[objective] == "minimize" else -1

    def time_limit_reason(self) -> str:
        """Returns why `search.max_hours` ends the study, or an empty string. Time before an interruption counts."""
        max_hours = self._settings.max_hours
        if max_hours is None or self._total_search_s() / 3600 < max_hours:
            return ""
        return f"search.max_hours={max_hours:g} elapsed"

    def start_trial(self) -> optuna.Trial:
        """Starts the next trial: an enqueued point, or one that the sampler draws. Never repeats a finite point."""
        point = self._draw_untried_point()
        if point is not None:
            self._study.enqueue_trial(point)  # a process that stops before the next line leaves it for its successor
        return self._study.ask(self.space)

    def reopen(self, orphan: FrozenTrial) -> optuna.Trial:
        """Returns a running trial for an orphan. One whose process stopped while it drew values lacks some of them."""
        trial = optuna.Trial(self._study, orphan._trial_id)
        for name, distribution in self.space.items():
            trial._suggest(name, distribution)  # as Study.ask does; returns the stored value if there is one
        return trial

    def freeze(self, trial: optuna.Trial) -> FrozenTrial:
        """Reads the current state of a running trial from the storage."""
        return trial.storage.get_trial(trial._trial_id)

    def complete(self, trial: optuna.Trial, values: Sequence[float], failure: str = "") -> None:
        """Ends a trial with its objective values, or, with a failure or without values, with the worst ones."""
        if not values:
            failure = failure or "reported no metrics"
        if failure:
            trial.set_user_attr(FAILURE_ATTR, failure)
            values = [self.sign(name) * WORST for name in self.objectives]
        self._study.tell(trial, values=values)
        self._save_search_time()

    def prune(self, trial: optuna.Trial) -> None:
        """Ends a trial early, with its last reported value."""
        self._study.tell(trial, state=TrialState.PRUNED)
        self._save_search_time()

    def tried_points(self) -> set[tuple[Any, ...]]:
        """Returns the point of each trial that has started, whatever its state."""
        params = [trial.params for trial in self.trials()]
        return {point_key(values, self.space) for values in params if self.space.keys() <= values.keys()}

    def importances(self, values: Mapping[int, Sequence[float]]) -> dict[str, dict[str, float]]:
        """Computes hyperparameter importances by functional ANOVA (Hutter et al. 2014).

        Args:
            values: Trial number -> its objective values, for all trials to include.

        Returns:
            Objective -> field -> share of the variance, largest first. Empty if there are too few trials.
        """
        if len(values) < _MIN_TRIALS_FOR_IMPORTANCES:
            return {}
        copy = optuna.create_study(directions=self._study.directions)
        for trial in self.trials():
            if trial.number in values:
                copy.add_trial(
                    optuna.create_trial(
                        params=trial.params, distributions=trial.distributions, values=values[trial.number]
                    )
                )
        return {name: _compute_importances(copy, index) for index, name in enumerate(self.objectives)}

    def _draw_untried_point(self) -> Values | None:
        """Returns an untried point of a finite space, or None if the sampler may draw any point.

        Asks the sampler a few times, on a copy of the study: close to the optimum it draws the same points again.
        """
        tried_points = self.tried_points()
        waiting_trials = self._study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if waiting_trials or self.combinations is None or len(tried_points) >= self.combinations:
            return None
        copy = optuna.create_study(directions=self._study.directions, sampler=self._study.sampler)
        copy.add_trials(self._study.get_trials(deepcopy=False))
        for _ in range(_MAX_REDRAWS):
            point = copy.ask(self.space).params
            if point_key(point, self.space) not in tried_points:
                return point
        return draw_untried_point(self.space, tried_points, random.Random(f"{self._settings.seed} {len(tried_points)}"))

    def _total_search_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._start_s

    def _save_search_time(self) -> None:
        self._study.set_user_attr(_SEARCH_TIME_ATTR, self._total_search_s())


def _compute_importances(study: optuna.Study, objective: int) -> dict[str, float]:
    if len({trial.values[objective] for trial in study.trials}) == 1:
        return {}  # no field made a difference
    evaluator = FanovaImportanceEvaluator(seed=0)
    shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[objective])
    return {name: float(share) for name, share in shares.items()}


def _dominates(costs: Sequence[float], other_costs: Sequence[float]) -> bool:
    """Returns whether `costs` are nowhere higher than `other_costs`, and somewhere lower."""
    pairs = list(zip(costs, other_costs, strict=True))
    return all(cost <= other_cost for cost, other_cost in pairs) and any(
        cost < other_cost for cost, other_cost in pairs
    )


def _build_sampler(settings: SearchConfig, trials: int) -> BaseSampler:
    seed = settings.seed + trials  # with the same seed, a resumed study would draw the same values again
    if settings.sampler in ("random", "pbt"):
        return RandomSampler(seed)
    # multivariate: samples fields jointly. constant_liar: counts running trials as poor ones.
    return TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, multivariate=True, constant_liar=True)
