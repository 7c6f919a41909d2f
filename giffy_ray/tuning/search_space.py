"""`search.space` as Optuna's distributions, and the points of it that are tried first."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray.config import Adversarial, ConfigError, Distribution, Experiment, effects, flatten, override

Values = dict[str, Any]  # of the experiment's fields, by dotted name

_SEARCHABLE = (
    *("model.", "optim.", "data.augment.", "data.segments."),
    *("train.global_batch_size", "train.seed", "train.init_from", "speed."),
)
# Field, or section that ends with a point -> why a search cannot vary it. The longest name that fits counts.
_REFUSED = {
    "name": "each trial has a name of its own, in the search's folder",
    "storage": "all trials write into the search's folder",
    "data.": "all trials share one set of clips, which is prepared before the first of them",
    "clip.": "all trials share one set of clips, which is prepared before the first of them",
    "train.": "it says how a run is watched and kept, not what it learns",
    "train.epochs": "a trial trains for search.epochs",
    "speed.profile": "it only records a trace",
    "cluster.": "a trial runs on search.workers workers",
    "tracking.": "it says where runs are recorded",
    "evaluate.": "it acts after the training",
    "search.": "it describes the search, not a trial",
}
# As `effects.NEEDS`, of a trial.
_NEEDS = effects.NEEDS | {
    "speed.sync_batch_norm": ("search.workers", lambda workers: workers > 1, "above 1"),
    "speed.compress_gradients": ("search.workers", lambda workers: workers > 1, "above 1"),
}
# A field whose default is none -> the field whose value it then takes.
_FALLBACK = {"optim.discriminator_lr": "optim.lr"}
_LARGEST_INT = 2**53  # up to which Optuna, which keeps floats, tells one from the next
_FEW = 16  # whole numbers between two bounds that are all tried: literals such as 1, 2, 4 have gaps
_MOST_LISTED = 10_000  # combinations


def distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
    """By dotted field. Every bound and choice is tried on the experiment first. Raises ConfigError."""
    space = experiment.search.space
    if not space:
        raise ConfigError("search.space: nothing to search; give it fields such as optim.lr: {log_uniform: [...]}")
    for name, spec in space.items():
        if name not in flatten(experiment):
            override(experiment, {name: next(itertools.chain(*spec.values()), None)})  # says what was meant
        why = _why_refused(experiment, name)
        if why:
            raise ConfigError(f"search.space.{name}: cannot be searched: {why}")
        if len(spec) != 1:
            raise ConfigError(f"search.space.{name}: give one distribution, as {{uniform: [0, 1]}} (value {spec!r})")
    kinds = space.get("model.kind", {}).get("choice", (experiment.model.kind,))
    models = [override(experiment, {"model.kind": kind}) for kind in kinds]
    return {name: _distribution(models, name, *next(iter(spec.items()))) for name, spec in space.items()}


def _why_refused(experiment: Experiment, name: str) -> str:
    space, fields = experiment.search.space, flatten(experiment)
    if name == "data.segments.frames":
        values = [fields[name], *itertools.chain(*space[name].values())]
        return "" if all(values) else "what is stored of the videos depends on whether it is 0"
    refused = [prefix for prefix in _REFUSED if name == prefix or (prefix[-1] == "." and name.startswith(prefix))]
    longest = max(refused, key=len, default="")
    if longest and not any(name.startswith(prefix) and len(prefix) > len(longest) for prefix in _SEARCHABLE):
        return _REFUSED[longest]
    if not name.startswith(_SEARCHABLE):
        return f"a search varies {', '.join(f'{one}*' if one[-1] == '.' else one for one in _SEARCHABLE)}"
    if "model.kind" in space:  # whether it acts depends on the trial
        return ""
    if name == "optim.discriminator_lr" and not isinstance(experiment.model, Adversarial):
        judged = fields.get("model.adversarial_weight") or "model.adversarial_weight" in space
        return "" if judged else "this model has no discriminator"
    needed, acts, words = _NEEDS.get(name, ("", bool, ""))
    if needed in fields and needed not in space and not acts(fields[needed]):
        return f"it acts only with {needed} {words} (value {fields.get(needed)!r})"
    return ""


def _distribution(
    models: Sequence[Experiment], name: str, kind: Distribution, values: Sequence[Any]
) -> BaseDistribution:
    """`models`: the experiment, as each of the kinds of model that are searched."""
    where, shown = f"search.space.{name}", f"(value {list(values)!r})"
    taken = [flatten(override(model, {name: value}))[name] for model in models for value in values]
    wrong = _wrong_choices(values, taken) if kind == "choice" else _wrong_bounds(kind, values, taken)
    if wrong:
        raise ConfigError(f"{where}: {wrong} {shown}")
    if kind == "choice":
        return CategoricalDistribution(values)
    if kind == "int":
        low, high, other = int(values[0]), int(values[1]), "choice"
        distribution, between = IntDistribution(low, high), [*range(low, high)] if high - low <= _FEW else []
    else:
        start, end, other = float(values[0]), float(values[1]), "int or choice"
        distribution = FloatDistribution(start, end, log=kind == "log_uniform")
        between = [start + (end - start) / math.e]
    for model, value in itertools.product(models, between):
        try:
            override(model, {name: value})
        except ConfigError as error:
            raise ConfigError(f"{where}: {kind} draws values that it cannot take; use {other}: {error}") from None
    return distribution


def _wrong_choices(values: Sequence[Any], taken: Sequence[Any]) -> str:
    """What is wrong with choices, as which the experiment has `taken` them; an empty string for nothing."""
    if not all(_is_finite(value) for value in values):
        return "choice needs finite numbers"
    if not values or len(set(values)) < len(values):
        return "choice needs one value at least, and each of them once"
    if any(isinstance(value, bool) for value in values) and not all(isinstance(one, bool) for one in taken):
        return "is neither true nor false"
    return ""


def _wrong_bounds(kind: Distribution, values: Sequence[Any], taken: Sequence[Any]) -> str:
    """The same of two bounds."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return f"{kind} needs numbers; for others use choice"
    if any(isinstance(one, bool) for one in taken):
        return "is true or false; use choice: [true, false]"
    if len(values) != 2 or not values[0] < values[1]:
        return f"{kind} needs [low, high] with low < high"
    low, high = values
    if kind == "log_uniform" and low <= 0:
        return "log_uniform needs low > 0"
    if kind == "int":
        whole = not low % 1 and not high % 1 and max(-low, high) <= _LARGEST_INT
        return "" if whole else f"int needs whole numbers, up to {_LARGEST_INT}"
    finite = _is_finite(low) and _is_finite(high) and _is_finite(float(high) - float(low))
    return "" if finite else f"{kind} needs finite numbers, as far apart as a float can hold"


def _is_finite(value: Any) -> bool:
    """Whether it is no number, or one that a float can hold."""
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def edges(distribution: BaseDistribution) -> Sequence[Any]:
    """All choices, or both bounds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def combinations(space: Mapping[str, BaseDistribution]) -> int | None:
    """How many points the space has; None where it has fields of real numbers."""
    product = 1
    for distribution in space.values():
        values = _values_of(distribution)
        if values is None:
            return None
        product *= len(values)
    return product


def key_of(values: Values, space: Mapping[str, BaseDistribution]) -> tuple[Any, ...]:
    return tuple(values[name] for name in space)


def untried(space: Mapping[str, BaseDistribution], tried: Collection[tuple[Any, ...]], draw: random.Random) -> Values:
    """A random point of a space of finitely many, whose `key_of` is not among `tried`. One has to be left."""
    values = [_values_of(distribution) or () for distribution in space.values()]
    if math.prod(map(len, values)) <= _MOST_LISTED:
        left = [point for point in itertools.product(*values) if point not in tried]
        return dict(zip(space, draw.choice(left), strict=True))
    while (point := tuple(draw.choice(some) for some in values)) in tried:
        pass
    return dict(zip(space, point, strict=True))


def _values_of(distribution: BaseDistribution) -> Sequence[Any] | None:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return range(distribution.low, distribution.high + 1) if isinstance(distribution, IntDistribution) else None


def reports_point(experiment: Experiment) -> Values | None:
    """The report's values of what is searched: what the others must beat. None where the space does not hold them."""
    defaults = flatten(override(Experiment(), {"model.kind": experiment.model.kind}))
    space = distributions(experiment)
    report = {name: _or_fallback(name, defaults, space[name]) for name in space}
    return None if _outside(report, space) else report


def earlier_point(experiment: Experiment, run_id: str, params: Mapping[str, Any]) -> Values:
    """What an earlier run had of the space's fields, `params` being those that MLflow knows of it.

    Raises ConfigError where one is missing, or outside the space.
    """
    space = distributions(experiment)
    missing = [name for name in space if name not in params]
    if missing:
        raise ConfigError(f"search.enqueue: the run {run_id!r} has no {missing[0]} to begin with")
    known = {name: None if value == "None" else value for name, value in params.items()}  # as MLflow writes them
    needed = {name: known[name] for name in (*space, *_FALLBACK.values()) if name in known}
    try:
        fields = flatten(override(experiment, needed))
    except ConfigError as error:
        raise ConfigError(f"search.enqueue: the run {run_id!r} has other fields or values: {error}") from None
    values = {name: _or_fallback(name, fields, space[name]) for name in space}
    outside = _outside(values, space)
    if outside:
        raise ConfigError(
            f"search.enqueue: {outside[0]} is {values[outside[0]]!r} in the run {run_id!r}, and search.space holds "
            f"{experiment.search.space[outside[0]]!r}"
        )
    return values


def _or_fallback(name: str, fields: Mapping[str, Any], distribution: BaseDistribution) -> Any:
    if fields[name] is None and name in _FALLBACK and not isinstance(distribution, CategoricalDistribution):
        return fields[_FALLBACK[name]]
    return fields[name]


def _outside(values: Values, space: Mapping[str, BaseDistribution]) -> list[str]:
    def holds(name: str) -> bool:
        distribution, value = space[name], values[name]
        if isinstance(distribution, CategoricalDistribution):
            return value in distribution.choices
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return isinstance(value, int | float) and distribution.low <= value <= distribution.high

    return [name for name in values if not holds(name)]
