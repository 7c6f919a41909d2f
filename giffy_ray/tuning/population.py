"""Population-based training (PBT; Jaderberg et al. 2017, arXiv 1711.09846): values change while trials train.

All trials train in generations, from one validation to the next. When every trial has reported, each of the worst
quarter copies the weights and values of a trial of the best quarter, and perturbs the values. Who copies from whom
depends only on the reports and the seed, not on the order of the reports or on interruptions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from giffy_ray.config import AdversarialConfig, ConfigError, Experiment, flatten
from giffy_ray.tuning.optuna_study import WORST, OptunaStudy
from giffy_ray.tuning.search_space import Values

_QUANTILES = 4  # the best and the worst trials are one quarter each
_PERTURBATION_FACTORS = (0.8, 1.2)  # of Jaderberg et al.
_EXPLOITS_ATTR = "taken"  # user attribute of a trial: [epoch, source trial, new values] of each exploit
_FINISHED_EPOCH_ATTR = "closed"  # user attribute of the study: the last epoch after which the exploits are stored
_LEARNING_RATES = ("optim.lr", "optim.discriminator_lr")


class Population:
    """Hands out the same trials generation after generation, until all have trained for `search.epochs`.

    See `TrialSource` for the methods. Here `end` ends a trial's part in a generation, and a trial only if it failed or
    reached its last epoch.
    """

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        """Loads or creates the study; a new one tries `points` first.

        Raises:
            ConfigError: A population cannot train the experiment (`check_population`), or the study cannot be loaded.
        """
        check_population(experiment)
        self.study = OptunaStudy(experiment, points)
        self._settings = experiment.search
        (self._metric,) = self.study.objectives
        self._sign = self.study.sign(self._metric)
        # In memory as well as in the storage: only this process writes, and Ray Tune calls `ask` all the time.
        trials = self.study.trials()
        self._trial_count = len(trials)
        self._epochs = {trial.number: max(trial.intermediate_values, default=0) for trial in trials}
        self._exploits: dict[int, list[list[Any]]] = {
            trial.number: list(trial.user_attrs.get(_EXPLOITS_ATTR, [])) for trial in trials
        }
        self._finished_epoch: int = self.study.user_attrs.get(_FINISHED_EPOCH_ATTR, 0)
        self._running: dict[int, optuna.Trial] = {
            orphan.number: self.study.reopen(orphan) for orphan in self.study.orphans
        }
        self._stop_epochs: dict[int, int] = {}  # trial that is training now -> the epoch at which it stops
        interval, last = experiment.train.validate_every, self._settings.epochs
        self._generation_ends = sorted({*range(interval, last + 1, interval), last})

    def ask(self) -> tuple[int, Values] | None:
        """Returns None while the remaining trials of the generation train, and after the last one."""
        if self.study.time_limit_reason():
            for number in [number for number in self._running if number not in self._stop_epochs]:
                self._complete(number)
            return None
        if self._trial_count < self._settings.trials:
            return self._start_trial()
        epoch = min((self._epochs[number] for number in self._running), default=0)
        if epoch and self._finished_epoch < epoch:
            self.finish_generation(epoch)
        for number in sorted(self._running):
            if number not in self._stop_epochs and self._epochs[number] == epoch:
                self._stop_epochs[number] = next(end for end in self._generation_ends if end > epoch)
                return number, self._current_values(number)
        return None

    def trial_directive(self, number: int) -> dict[str, Any]:
        """Returns `stop_epoch`, and `exploit_from`: [epoch, trial] of the weights to start from, or None."""
        exploits = self._exploits[number]
        is_due = bool(exploits) and exploits[-1][0] == self._epochs[number]
        return {"stop_epoch": self._stop_epochs[number], "exploit_from": exploits[-1][:2] if is_due else None}

    def report(self, number: int, epoch: int, metrics: Mapping[str, Any]) -> bool:
        """Never stops a running trial. One that diverged ranks last, and so copies another."""
        if number not in self._running:
            return True
        value = metrics.get(self._metric, math.nan)
        trial = self._running[number]
        if epoch not in self.study.freeze(trial).intermediate_values:
            trial.report(value if math.isfinite(value) else self._sign * WORST, epoch)
            self._epochs[number] = max(epoch, self._epochs[number])
        return False

    def end(self, number: int, failure: str = "") -> None:
        """Ends the trial too if it failed, was stopped before `stop_epoch`, or reached its last epoch."""
        stop_epoch = self._stop_epochs.pop(number, None)
        if number not in self._running:
            return
        epoch = self._epochs[number]
        if not failure and stop_epoch is not None and epoch < stop_epoch:
            failure = f"stopped after epoch {epoch}"
        if failure or epoch == self._generation_ends[-1] or self.study.time_limit_reason():
            last = self.objective_values(self.study.freeze(self._running[number]))
            if last == [self._sign * WORST]:
                failure = failure or "diverged: its last report was not finite"
            self._complete(number, failure)

    def stop_reason(self) -> str:
        time_limit = self.study.time_limit_reason()
        if time_limit:
            return time_limit
        if self._running or self._trial_count < self._settings.trials:
            return ""
        return f"all search.trials={self._settings.trials} trials reached search.epochs={self._generation_ends[-1]}"

    def has_unfinished_trials(self) -> bool:
        return bool(self._running)

    def final_values(self, trial: FrozenTrial) -> Values:
        exploits = trial.user_attrs.get(_EXPLOITS_ATTR)
        return dict(exploits[-1][2] if exploits else trial.params)

    def objective_values(self, trial: FrozenTrial) -> list[float]:
        """Returns the last report: earlier ones belong to weights that may have been replaced."""
        reports = trial.intermediate_values
        return [reports[max(reports)]] if reports else []

    def importances(self) -> dict[str, dict[str, float]]:
        """Returns nothing: a trial's result does not depend on one value of each field."""
        return {}

    def finish_generation(self, epoch: int) -> None:
        """Stores who copies from whom after `epoch`. If interrupted, it runs again with the same result."""
        trials = {trial.number: trial for trial in self.study.trials()}
        costs = {}
        for number in self._running:
            value = trials[number].intermediate_values[epoch]
            costs[number] = math.inf if value == self._sign * WORST else self._sign * value
        earlier_exploits = {
            number: [exploit for exploit in self._exploits[number] if exploit[0] < epoch] for number in costs
        }
        values = {number: self._values_after(number, exploits) for number, exploits in earlier_exploits.items()}
        seed = f"{self._settings.seed} {epoch}"
        for number, (source, new_values) in exploit_and_explore(costs, values, self.study.space, seed).items():
            self._exploits[number] = [*earlier_exploits[number], [epoch, source, new_values]]
            self._running[number].set_user_attr(_EXPLOITS_ATTR, self._exploits[number])
        self.study.set_user_attr(_FINISHED_EPOCH_ATTR, epoch)
        self._finished_epoch = epoch

    def _start_trial(self) -> tuple[int, Values]:
        trial = self.study.start_trial()
        number = trial.number
        self._trial_count += 1
        self._running[number] = trial
        self._epochs[number] = 0
        self._exploits[number] = []
        self._stop_epochs[number] = self._generation_ends[0]
        return number, self._current_values(number)

    def _complete(self, number: int, failure: str = "") -> None:
        trial = self._running.pop(number)
        self.study.complete(trial, self.objective_values(self.study.freeze(trial)), failure)

    def _current_values(self, number: int) -> Values:
        return self._values_after(number, self._exploits[number])

    def _values_after(self, number: int, exploits: list[list[Any]]) -> Values:
        return dict(exploits[-1][2] if exploits else self._running[number].params)


def exploit_and_explore(
    costs: Mapping[int, float], values: Mapping[int, Values], space: Mapping[str, BaseDistribution], seed: str
) -> dict[int, tuple[int, Values]]:
    """Selects a source for each of the worst trials, and perturbs the source's values.

    Args:
        costs: Trial -> objective, where lower is better. Ties rank by trial number.
        values: Trial -> its current values.
        space: Distributions of the searched fields.
        seed: Determines the result together with the other arguments.

    Returns:
        Trial of the worst quarter -> (source trial of the best quarter, new values).
    """
    ranking = sorted(costs, key=lambda number: (costs[number], number))
    if len(ranking) < 2:
        return {}
    count = max(1, len(ranking) // _QUANTILES)
    best, worst = ranking[:count], ranking[-count:]
    exploits = {}
    for number in worst:
        generator = random.Random(f"{seed} {number}")
        source = generator.choice(best)
        exploits[number] = source, {name: _perturb(values[source][name], space[name], generator) for name in space}
    return exploits


def _perturb(value: Any, distribution: BaseDistribution, generator: random.Random) -> Any:
    """Scales a number within its bounds; moves a choice to a neighbour."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        index = choices.index(value) + generator.choice((-1, 1))
        return choices[min(max(index, 0), len(choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    scaled_value = min(max(value * generator.choice(_PERTURBATION_FACTORS), distribution.low), distribution.high)
    return round(scaled_value) if isinstance(distribution, IntDistribution) else scaled_value


def check_population(experiment: Experiment) -> None:
    """Raises ConfigError if the search needs more than population-based training supports."""
    search = experiment.search
    loss_weights = [name for name in flatten(experiment) if name.startswith("model.") and name.endswith("_weight")]
    label_smoothing = ["model.real_label"] if isinstance(experiment.model, AdversarialConfig) else []
    searchable = [*_LEARNING_RATES, *label_smoothing, *loss_weights]
    for name, spec in search.space.items():
        if name not in searchable:
            raise ConfigError(
                f"search.space.{name}: cannot change during a training, as search.sampler=pbt requires; "
                f"search one of {', '.join(searchable)}"
            )
        if name == "model.adversarial_weight" and 0 in next(iter(spec.values())):
            raise ConfigError(
                f"search.space.{name}: at 0 there is no discriminator; use values above 0 (value {spec!r})"
            )
    if len(search.objectives) > 1:
        raise ConfigError(
            "search.objectives: search.sampler=pbt ranks trials by one number; give search.metric alone "
            f"(value {search.objectives!r})"
        )
    if search.workers != 1:
        raise ConfigError(f"search.workers: search.sampler=pbt needs one worker per trial (value {search.workers!r})")
    if search.patience is not None:
        raise ConfigError(f"search.patience: search.sampler=pbt ignores it; remove it (value {search.patience!r})")
    if search.trials < 2:
        raise ConfigError(f"search.trials: search.sampler=pbt needs at least two trials (value {search.trials!r})")
