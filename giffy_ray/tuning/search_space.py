"""Converts `search.space` to Optuna distributions, and selects the points to try first."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray.config import (
    AdversarialConfig,
    ConfigError,
    Distribution,
    Experiment,
    field_dependencies,
    flatten,
    override,
)
from giffy_ray.config.field_dependencies import Requirement

Values = dict[str, Any]  # dotted field of the experiment -> value

# Fields and section prefixes that a search may vary.
_SEARCHABLE = (
    "model.",
    "optim.",
    "data.augment.",
    "data.segments.",
    "train.global_batch_size",
    "train.seed",
    "train.init_from",
    "speed.",
)
# Field or section prefix -> why a search cannot vary it. The longest match applies.
_UNSEARCHABLE = {
    "name": "each trial has a name of its own in the study's folder",
    "storage": "all trials write to the study's folder",
    "data.": "all trials share one set of clips, which is prepared before the first trial",
    "clip.": "all trials share one set of clips, which is prepared before the first trial",
    "train.": "it controls how a run is monitored and saved, not what it learns",
    "train.epochs": "a trial trains for search.epochs",
    "speed.profile": "it only records a trace",
    "cluster.": "a trial runs on search.workers workers",
    "tracking.": "it says where runs are recorded",
    "evaluate.": "it applies after the training",
    "search.": "it describes the search, not a trial",
}
# A trial runs on `search.workers` workers; with a single worker, these fields have no effect.
_REQUIREMENTS = field_dependencies.REQUIREMENTS | {
    "speed.sync_batch_norm": Requirement("search.workers", lambda workers: workers > 1, "above 1"),
    "speed.compress_gradients": Requirement("search.workers", lambda workers: workers > 1, "above 1"),
}
_FALLBACKS = {"optim.discriminator_lr": "optim.lr"}  # field -> the field whose value it takes when it is None
_MAX_INT = 2**53  # Optuna stores floats, which represent all integers up to here
_MAX_CHECKED_INTS = 16  # An int range up to this size is checked value by value: a literal such as 1, 2, 4 has gaps
_MAX_LISTED_POINTS = 10_000  # Larger spaces are sampled by rejection


def build_distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
    """Builds the Optuna distribution of each searched field.

    Every bound and choice is validated against the experiment.

    Raises:
        ConfigError: The space is empty, or a field or one of its values cannot be searched.
    """
    space = experiment.search.space
    if not space:
        raise ConfigError("search.space: nothing to search; add fields such as optim.lr: {log_uniform: [1e-5, 1e-2]}")
    fields = flatten(experiment)
    for name, spec in space.items():
        if name not in fields:
            override(experiment, {name: next(itertools.chain(*spec.values()), None)})  # raises with a suggestion
        reason = _unsearchable_reason(experiment, name)
        if reason:
            raise ConfigError(f"search.space.{name}: cannot be searched: {reason}")
        if len(spec) != 1:
            raise ConfigError(f"search.space.{name}: give one distribution, as {{uniform: [0, 1]}} (value {spec!r})")
    kinds = space.get("model.kind", {}).get("choice", (experiment.model.kind,))
    variants = [override(experiment, {"model.kind": kind}) for kind in kinds]
    distributions = {}
    for name, spec in space.items():
        ((kind, values),) = spec.items()
        distributions[name] = _build_distribution(variants, name, kind, values)
    return distributions


def _unsearchable_reason(experiment: Experiment, name: str) -> str:
    """Returns why a search cannot vary the field, or an empty string."""
    space, fields = experiment.search.space, flatten(experiment)
    if name == "data.segments.frames":
        values = [fields[name], *itertools.chain(*space[name].values())]
        return "" if all(values) else "the stored clips differ between 0 and other values"
    prefixes = [prefix for prefix in _UNSEARCHABLE if name == prefix or (prefix[-1] == "." and name.startswith(prefix))]
    longest = max(prefixes, key=len, default="")
    if longest and not any(name.startswith(prefix) and len(prefix) > len(longest) for prefix in _SEARCHABLE):
        return _UNSEARCHABLE[longest]
    if not name.startswith(_SEARCHABLE):
        patterns = [f"{prefix}*" if prefix[-1] == "." else prefix for prefix in _SEARCHABLE]
        return f"a search can vary {', '.join(patterns)}"
    if "model.kind" in space:  # whether the field has an effect depends on the trial
        return ""
    if name == "optim.discriminator_lr" and not isinstance(experiment.model, AdversarialConfig):
        has_discriminator = fields.get("model.adversarial_weight") or "model.adversarial_weight" in space
        return "" if has_discriminator else "this model has no discriminator"
    requirement = _REQUIREMENTS.get(name)
    if requirement is None or requirement.field not in fields or requirement.field in space:
        return ""
    value = fields[requirement.field]
    if requirement.is_met(value):
        return ""
    return f"it has an effect only with {requirement.field} {requirement.description} (value {value!r})"


def _build_distribution(
    variants: Sequence[Experiment], name: str, kind: Distribution, values: Sequence[Any]
) -> BaseDistribution:
    """`variants`: the experiment with each of the searched kinds of model."""
    field = f"search.space.{name}"
    parsed_values = [flatten(override(variant, {name: value}))[name] for variant in variants for value in values]
    problem = (
        _choices_problem(values, parsed_values) if kind == "choice" else _bounds_problem(kind, values, parsed_values)
    )
    if problem:
        raise ConfigError(f"{field}: {problem} (value {list(values)!r})")
    if kind == "choice":
        return CategoricalDistribution(values)
    distribution: BaseDistribution
    inner_values: list[Any]
    if kind == "int":
        low, high = int(values[0]), int(values[1])
        distribution = IntDistribution(low, high)
        inner_values = [*range(low, high)] if high - low <= _MAX_CHECKED_INTS else []
        alternative = "choice"
    else:
        start, end = float(values[0]), float(values[1])
        distribution = FloatDistribution(start, end, log=kind == "log_uniform")
        inner_values = [start + (end - start) / math.e]  # an irrational fraction, so that no integer field accepts it
        alternative = "int or choice"
    for variant, value in itertools.product(variants, inner_values):
        try:
            override(variant, {name: value})
        except ConfigError as error:
            raise ConfigError(
                f"{field}: {kind} draws values that the field does not accept; use {alternative}: {error}"
            ) from None
    return distribution


def _choices_problem(values: Sequence[Any], parsed_values: Sequence[Any]) -> str:
    """Returns what is wrong with the choices, or an empty string. `parsed_values`: as the experiment reads them."""
    if not all(_is_finite(value) for value in values):
        return "choice needs finite numbers"
    if not values or len(set(values)) < len(values):
        return "choice needs at least one value, and no value twice"
    if any(isinstance(value, bool) for value in values) and not all(isinstance(value, bool) for value in parsed_values):
        return "does not accept true or false"
    return ""


def _bounds_problem(kind: Distribution, values: Sequence[Any], parsed_values: Sequence[Any]) -> str:
    """Returns what is wrong with the bounds, or an empty string. `parsed_values`: as the experiment reads them."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return f"{kind} needs numbers; use choice for other values"
    if any(isinstance(value, bool) for value in parsed_values):
        return "is true or false; use choice: [true, false]"
    if len(values) != 2 or not values[0] < values[1]:
        return f"{kind} needs [low, high] with low < high"
    low, high = values
    if kind == "log_uniform" and low <= 0:
        return "log_uniform needs low > 0"
    if kind == "int":
        is_valid = not low % 1 and not high % 1 and max(-low, high) <= _MAX_INT
        return "" if is_valid else f"int needs whole numbers up to {_MAX_INT}"
    is_valid = _is_finite(low) and _is_finite(high) and _is_finite(float(high) - float(low))
    return "" if is_valid else f"{kind} needs finite numbers whose difference is finite"


def _is_finite(value: Any) -> bool:
    """Returns whether the value is a number that fits a float, or not a number at all."""
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def edge_values(distribution: BaseDistribution) -> Sequence[Any]:
    """Returns all choices of a categorical distribution, both bounds of any other."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def count_combinations(space: Mapping[str, BaseDistribution]) -> int | None:
    """Returns the number of points in the space, or None if a field is continuous."""
    product = 1
    for distribution in space.values():
        values = _finite_values(distribution)
        if values is None:
            return None
        product *= len(values)
    return product


def point_key(values: Values, space: Mapping[str, BaseDistribution]) -> tuple[Any, ...]:
    """Returns the values in the order of the space, as a hashable key."""
    return tuple(values[name] for name in space)


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw_untried_point(
    space: Mapping[str, BaseDistribution], tried_points: Collection[tuple[Any, ...]], generator: random.Random
) -> Values:
    """Draws a random point of a finite space that has not been tried yet.

    Args:
        space: Distributions without continuous fields.
        tried_points: `point_key` of each point to exclude. At least one point must remain.
        generator: Source of randomness.
    """
    values = [_finite_values(distribution) or () for distribution in space.values()]
    if math.prod(map(len, values)) <= _MAX_LISTED_POINTS:
        remaining_points = [point for point in itertools.product(*values) if point not in tried_points]
        return dict(zip(space, generator.choice(remaining_points), strict=True))
    while True:
        point = tuple(generator.choice(field_values) for field_values in values)
        if point not in tried_points:
            return dict(zip(space, point, strict=True))


def _finite_values(distribution: BaseDistribution) -> Sequence[Any] | None:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return range(distribution.low, distribution.high + 1) if isinstance(distribution, IntDistribution) else None


def paper_point(experiment: Experiment) -> Values | None:
    """Returns the paper's value of each searched field, the baseline to beat; None if one is outside the space."""
    defaults = flatten(override(Experiment(), {"model.kind": experiment.model.kind}))
    space = build_distributions(experiment)
    values = {name: _value_or_fallback(name, defaults, space[name]) for name in space}
    return None if _fields_outside(values, space) else values


def point_from_run(experiment: Experiment, run_id: str, params: Mapping[str, Any]) -> Values:
    """Returns the value of each searched field in an earlier run.

    Args:
        experiment: The experiment of the study.
        run_id: MLflow's id of the run, for messages.
        params: The run's MLflow params.

    Raises:
        ConfigError: A value is missing, invalid, or outside the space.
    """
    space = build_distributions(experiment)
    missing = [name for name in space if name not in params]
    if missing:
        raise ConfigError(f"search.enqueue: run {run_id!r} has no param {missing[0]}; remove it from search.enqueue")
    params = {name: None if value == "None" else value for name, value in params.items()}  # MLflow stores strings
    changes = {name: params[name] for name in (*space, *_FALLBACKS.values()) if name in params}
    try:
        fields = flatten(override(experiment, changes))
    except ConfigError as error:
        raise ConfigError(f"search.enqueue: the params of run {run_id!r} do not fit this experiment: {error}") from None
    values = {name: _value_or_fallback(name, fields, space[name]) for name in space}
    outside = _fields_outside(values, space)
    if outside:
        name = outside[0]
        raise ConfigError(
            f"search.enqueue: {name} of run {run_id!r} is outside search.space.{name}="
            f"{experiment.search.space[name]!r} (value {values[name]!r}); widen the space or remove the run"
        )
    return values


def _value_or_fallback(name: str, fields: Mapping[str, Any], distribution: BaseDistribution) -> Any:
    if fields[name] is None and name in _FALLBACKS and not isinstance(distribution, CategoricalDistribution):
        return fields[_FALLBACKS[name]]
    return fields[name]


def _fields_outside(values: Values, space: Mapping[str, BaseDistribution]) -> list[str]:
    return [name for name, value in values.items() if not _contains(space[name], value)]


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high
