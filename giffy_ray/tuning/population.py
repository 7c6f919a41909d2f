"""Population-based training (PBT; Jaderberg et al. 2017, arXiv 1711.09846): values that change while trials train.

All trials train side by side, in turns of one validation each. When all have reported, each of the worst quarter takes
over weights and values of one of the best quarter, and goes on with the values a little larger or smaller. Who takes
from whom follows from the reports and the seed alone: not from which trial was first, nor from where a search was cut.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from giffy_ray.config import Adversarial, ConfigError, Experiment, flatten
from giffy_ray.tuning.optuna_study import WORST, OptunaStudy
from giffy_ray.tuning.search_space import Values

_SHARE = 4  # one in so many is of the best, and one of the worst
_FACTORS = (0.8, 1.2)  # of the paper
_TAKEN, _CLOSED = "taken", "closed"
_ALWAYS = ("optim.lr", "optim.discriminator_lr")  # may change while a training runs


class Population(OptunaStudy):
    """As a OptunaStudy whose trials are handed out again and again, until all of them have had `search.epochs`."""

    def __init__(self, experiment: Experiment, points: Iterable[Values] = ()):
        check(experiment)
        super().__init__(experiment, points)
        # In memory too: this process alone writes, and Ray Tune asks again and again while trials train.
        begun = self.trials()
        self._begun_count = len(begun)
        self._epochs = {trial.number: max(trial.intermediate_values, default=0) for trial in begun}
        # [epoch, whose weights, its values from then on] of each time that a trial took over another.
        self._taken: dict[int, list[list[Any]]] = {
            trial.number: list(trial.user_attrs.get(_TAKEN, [])) for trial in begun
        }
        self._closed: int = self._study.user_attrs.get(_CLOSED, 0)
        self._open = {left.number: self._reopened(left) for left in self._orphaned}
        self._orphaned.clear()
        self._busy: dict[int, int] = {}  # trial -> the epoch that its turn ends with
        every, last = experiment.train.validate_every, self._settings.epochs
        self._ends = sorted({*range(every, last + 1, every), last})

    def ask(self) -> tuple[int, Values] | None:
        """The next turn, or None where there is none now: others have to report first, or the search is over."""
        if self._hours_over():
            for number in [one for one in self._open if one not in self._busy]:
                super().end(number)
            return None
        if self._begun_count < self._settings.trials:
            number = self._begun()
            self._begun_count += 1
            self._epochs[number], self._taken[number] = 0, []
            self._busy[number] = self._ends[0]
            return number, self.values(number)
        reached = min((self._epochs[number] for number in self._open), default=0)
        if reached and self._closed < reached:
            self._close(reached)
        for number in sorted(self._open):
            if number not in self._busy and self._epochs[number] == reached:
                self._busy[number] = next(end for end in self._ends if end > reached)
                return number, self.values(number)
        return None

    def turn(self, number: int) -> dict[str, Any]:
        """`until`: the epoch that its turn ends with; `take`: (epoch, trial) whose weights it starts from, or None."""
        epoch, taken = self._epochs[number], self._taken[number]
        take = taken[-1][:2] if taken and taken[-1][0] == epoch else None
        return {"until": self._busy[number], "take": take}

    def report(self, number: int, epoch: int, reported: Mapping[str, Any]) -> bool:
        """Takes down a report; a trial is never to end because of one. What diverged is the worst, and taken over."""
        if number not in self._open:
            return True
        (metric,) = self.objectives
        value = reported.get(metric, math.nan)
        trial = self._open[number]
        if epoch not in self._frozen(trial).intermediate_values:
            trial.report(value if math.isfinite(value) else self._sign * WORST, epoch)
            self._epochs[number] = max(epoch, self._epochs[number])
        return False

    def end(self, number: int, why: str = "") -> None:
        """A turn is over, or because of `why` the trial. One that ended before its turn did was told to stop."""
        until = self._busy.pop(number, None)
        if number not in self._open:
            return
        epoch = self._epochs[number]
        if not why and until is not None and epoch < until:
            why = f"it was stopped after epoch {epoch}"
        if why or epoch == self._ends[-1] or self._hours_over():
            diverged = self.values_of(self._frozen(self._open[number])) == [self._sign * WORST]
            super().end(number, why or ("diverged: its last report was not finite" if diverged else ""))

    def stop_reason(self) -> str:
        if self._hours_over():
            return self._hours_over()
        if self._open or self._begun_count < self._settings.trials:
            return ""
        return f"the search.trials={self._settings.trials} of the population have had search.epochs={self._ends[-1]}"

    def unfinished(self) -> bool:
        return bool(self._open)

    def values_of(self, trial: FrozenTrial) -> list[float]:
        """Its last: earlier ones are not of the weights that it has."""
        reports = trial.intermediate_values
        return [reports[max(reports)]] if reports else []

    def values(self, number: int) -> Values:
        """Those that a trial has now."""
        taken = self._taken[number]
        return dict(taken[-1][2]) if taken else super().values(number)

    def params_of(self, trial: FrozenTrial) -> Values:
        """Those that a trial had last."""
        taken = trial.user_attrs.get(_TAKEN)
        return dict(taken[-1][2]) if taken else super().params_of(trial)

    def importances(self) -> dict[str, dict[str, float]]:
        """None: what a trial reached is not due to one value."""
        return {}

    def _close(self, epoch: int) -> None:
        """Notes who takes over from whom after `epoch`. Cut in the middle, it is done again with the same result."""
        trials = {trial.number: trial for trial in self.trials()}
        values = {number: trials[number].intermediate_values[epoch] for number in self._open}
        reached = {
            number: math.inf if value == self._sign * WORST else self._sign * value for number, value in values.items()
        }
        before = {number: [one for one in self._taken[number] if one[0] < epoch] for number in reached}
        now = {
            number: dict(taken[-1][2]) if taken else super(Population, self).values(number)
            for number, taken in before.items()
        }
        for number, (source, new) in exploit_and_explore(
            reached, now, self._space, f"{self._settings.seed} {epoch}"
        ).items():
            self._taken[number] = [*before[number], [epoch, source, new]]
            self._open[number].set_user_attr(_TAKEN, self._taken[number])
        self._study.set_user_attr(_CLOSED, epoch)
        self._closed = epoch


def exploit_and_explore(
    reached: Mapping[int, float], values: Mapping[int, Values], space: Mapping[str, BaseDistribution], seed: str
) -> dict[int, tuple[int, Values]]:
    """Who takes over from whom, and its new values. `reached`, smaller is better, and `values` are by trial."""
    ranked = sorted(reached, key=lambda number: (reached[number], number))
    count = max(1, len(ranked) // _SHARE)
    if len(ranked) < 2:
        return {}
    best, worst = ranked[:count], ranked[-count:]
    taken = {}
    for number in worst:
        drawn = random.Random(f"{seed} {number}")
        source = drawn.choice(best)
        taken[number] = source, {name: _perturb(values[source][name], space[name], drawn) for name in space}
    return taken


def _perturb(value: Any, distribution: BaseDistribution, drawn: random.Random) -> Any:
    """A little more or less, inside the space; of a choice the one before or after it."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        place = choices.index(value) + drawn.choice((-1, 1))
        return choices[min(max(place, 0), len(choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    moved = min(max(value * drawn.choice(_FACTORS), distribution.low), distribution.high)
    return round(moved) if isinstance(distribution, IntDistribution) else moved


def check(experiment: Experiment) -> None:
    """What a population cannot do. Raises ConfigError."""
    search = experiment.search
    weights = [name for name in flatten(experiment) if name.startswith("model.") and name.endswith("_weight")]
    may = [*_ALWAYS, *(["model.real_label"] if isinstance(experiment.model, Adversarial) else []), *weights]
    for name, spec in search.space.items():
        if name not in may:
            raise ConfigError(
                f"search.space.{name}: cannot change while a training runs, as search.sampler=pbt does; "
                f"it can search {', '.join(may)}"
            )
        if name == "model.adversarial_weight" and 0 in next(iter(spec.values())):
            raise ConfigError(f"search.space.{name}: with 0 there is no discriminator; start above it (value {spec!r})")
    if len(search.objectives) > 1:
        raise ConfigError(
            "search.objectives: search.sampler=pbt ranks trials by one number; give search.metric alone "
            f"(value {search.objectives!r})"
        )
    for field, value, wanted in (
        ("workers", search.workers, search.workers == 1),
        ("patience", search.patience, search.patience is None),
        ("trials", search.trials, search.trials >= 2),
    ):
        if not wanted:
            needs = {"workers": "one worker a trial", "patience": "none", "trials": "two at least"}[field]
            raise ConfigError(f"search.{field}: search.sampler=pbt needs {needs} (value {value!r})")
