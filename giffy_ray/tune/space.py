"""`search.space` as Optuna's distributions, and the points of it that are tried first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray.config import ConfigError, Distribution, Experiment, flatten, override

Values = dict[str, Any]  # of the experiment's fields, by dotted name


def distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
    """By dotted field. Every bound is tried on the experiment first. Raises ConfigError."""
    if not experiment.search.space:
        raise ConfigError("search.space: nothing to search; give it fields such as optim.lr: {log_uniform: [...]}")
    space = {}
    for name, spec in experiment.search.space.items():
        if len(spec) != 1:
            raise ConfigError(f"search.space.{name}: give one distribution, as {{uniform: [0, 1]}} (value {spec!r})")
        kind, values = next(iter(spec.items()))
        for value in values:
            override(experiment, {name: value})
        space[name] = _distribution(f"search.space.{name}", kind, values)
    return space


def _distribution(where: str, kind: Distribution, values: Sequence[Any]) -> BaseDistribution:
    if kind == "choice":
        return CategoricalDistribution(values)
    if len(values) != 2 or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} needs [low, high] with low < high (value {list(values)!r})")
    if kind == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"{where}: log_uniform needs low > 0 (value {list(values)!r})")
    if kind == "int":
        return IntDistribution(*values)
    return FloatDistribution(*values, log=kind == "log_uniform")


def reports_point(experiment: Experiment) -> Values | None:
    """The report's values of what is searched: what the others must beat. None where the space does not hold them."""
    defaults = flatten(override(Experiment(), {"model.kind": experiment.model.kind}))
    report = {name: defaults[name] for name in experiment.search.space}
    space = distributions(experiment)
    return None if _outside(report, space) else report


def earlier_point(experiment: Experiment, run_id: str, params: Mapping[str, Any]) -> Values:
    """What an earlier run had of the space's fields, `params` being those that MLflow knows of it.

    Raises ConfigError where one is missing, or outside the space.
    """
    space = distributions(experiment)
    missing = [name for name in space if name not in params]
    if missing:
        raise ConfigError(f"search.enqueue: the run {run_id!r} has no {missing[0]} to begin with")
    values = {name: flatten(override(experiment, {name: params[name]}))[name] for name in space}
    outside = _outside(values, space)
    if outside:
        raise ConfigError(
            f"search.enqueue: {outside[0]} is {values[outside[0]]!r} in the run {run_id!r}, and search.space holds "
            f"{experiment.search.space[outside[0]]!r}"
        )
    return values


def _outside(values: Values, space: Mapping[str, BaseDistribution]) -> list[str]:
    def holds(name: str) -> bool:
        distribution = space[name]
        if isinstance(distribution, CategoricalDistribution):
            return values[name] in distribution.choices
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return distribution.low <= values[name] <= distribution.high

    return [name for name in values if not holds(name)]
