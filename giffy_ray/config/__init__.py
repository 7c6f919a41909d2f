"""The Experiment: everything that describes one training, frozen and validated.

A YAML file holds what differs from the defaults below; words such as `optim.lr=3e-4` hold what differs from the
file. `override` is the one door for changes (command line, Ray Tune, tests), so every Experiment that exists has
been checked: an unknown section or field, a value of the wrong type or another model's field is a `ConfigError`
that names the dotted field, the value and the nearest name that exists. The sections are in `sections` and `models`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from giffy_ray.config.models import (
    AdvancedCVAEConfig,
    Adversarial,
    BetweenConfig,
    CGANConfig,
    CVAEConfig,
    Direct3DConfig,
    Encoders,
    ModelConfig,
    TwoStreamConfig,
)
from giffy_ray.config.sections import (
    SPLITS,
    AugmentConfig,
    ClipConfig,
    DataConfig,
    Distribution,
    Experiment,
    IntervalsConfig,
    LimitsConfig,
    OptimConfig,
    PerceptualMetric,
    SearchConfig,
    SpeedConfig,
    Supplied,
    SyntheticConfig,
)
from giffy_ray.config.values import ConfigError

__all__ = [
    "SPLITS",
    "AdvancedCVAEConfig",
    "Adversarial",
    "AugmentConfig",
    "BetweenConfig",
    "CGANConfig",
    "CVAEConfig",
    "ClipConfig",
    "ConfigError",
    "DataConfig",
    "Direct3DConfig",
    "Distribution",
    "Encoders",
    "Experiment",
    "IntervalsConfig",
    "LimitsConfig",
    "ModelConfig",
    "OptimConfig",
    "PerceptualMetric",
    "SearchConfig",
    "SpeedConfig",
    "Supplied",
    "SyntheticConfig",
    "TwoStreamConfig",
    "differences",
    "flatten",
    "from_yaml",
    "load",
    "override",
    "to_yaml",
]

_EXPERIMENT = TypeAdapter(Experiment)
# Fields whose names the user chooses: values, not sections.
_OPEN = ("search.space", "data.caps", "evaluate.weights", "search.objectives")
_KIND = "model.kind"


def load(path: str | Path | None = None, words: Iterable[str] = ()) -> Experiment:
    """Reads an experiment file and applies `section.field=value` words to it.

    Without a path the experiment is the defaults. Values are YAML: `data.categories=[erupting, skiing]`.
    Raises ConfigError.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such experiment file") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not a YAML file: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected sections such as 'optim:', found {tree!r}")
    return override(_validate(tree), dict(_parse_word(word) for word in words))


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """A new Experiment with {"section.field": value} changed, validated as a whole. Raises ConfigError.

    With another `model.kind`, the model's other fields are the defaults of that kind.
    """
    tree = _tree(experiment)
    if changes.get(_KIND, experiment.model.kind) != experiment.model.kind:
        tree["model"] = {}
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: no such field (value {value!r}){_suggest(dotted)}")
        if isinstance(node.get(name), dict) and not isinstance(value, Mapping):
            raise ConfigError(f"{dotted}: is a section, not a field; give {dotted}.FIELD=value (got {value!r})")
        node[name] = value
    return _validate(tree)


def flatten(experiment: Experiment) -> dict[str, Any]:
    """{"section.field": value} of every field; what `override` accepts and what MLflow shows as parameters."""
    return dict(_leaves(_tree(experiment)))


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment, every field written out; `load` reads it back to an equal Experiment."""
    return yaml.safe_dump(_EXPERIMENT.dump_python(experiment, mode="json"), sort_keys=False)


def differences(experiment: Experiment) -> str:
    """The experiment as a file that a person would write: only what differs from the defaults."""
    defaults, tree = flatten(Experiment()), {}
    defaults |= {**_defaults(experiment.model.kind), _KIND: defaults[_KIND]}
    for dotted, value in flatten(from_yaml(to_yaml(experiment))).items():
        if value != defaults[dotted]:
            *sections, name = dotted.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
    plain = TypeAdapter(dict[str, Any]).dump_python(tree, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=110)


def from_yaml(text: str) -> Experiment:
    """The inverse of `to_yaml`. Raises ConfigError."""
    return _validate(yaml.safe_load(text))


def _defaults(kind: str) -> dict[str, Any]:
    """{"section.field": value} of an experiment that only says which kind of model it trains."""
    return flatten(_EXPERIMENT.validate_python({"model": {"kind": kind}}))


def _tree(experiment: Experiment) -> dict[str, Any]:
    return dataclasses.asdict(experiment)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and prefix + name not in _OPEN:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse_word(word: str) -> tuple[str, Any]:
    dotted, equals, text = word.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{word!r}: expected section.field=value, such as optim.lr=3e-4")
    try:
        return dotted, yaml.safe_load(text)
    except yaml.YAMLError:
        return dotted, text  # a path or address that YAML has another reading of


def _validate(tree: Mapping[str, Any]) -> Experiment:
    model = tree.get("model")
    if isinstance(model, Mapping):
        tree = {**tree, "model": {"kind": Experiment().model.kind, **model}}
    try:
        return _EXPERIMENT.validate_python(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(one) for one in error.errors())) from None


def _explain(error: Any) -> str:
    path, value, kind = list(error["loc"]), error["input"], Experiment().model.kind
    if error["type"] == "union_tag_invalid":
        return f"{_KIND}: must be one of {error['ctx']['expected_tags']} (value {error['ctx']['tag']!r})"
    if path[0] == "model" and len(path) > 1:
        kind = path.pop(1)
    dotted = ".".join(str(part) for part in path)
    if error["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{dotted}: {error['msg']} (value {value!r})"
    while isinstance(value, Mapping) and value:  # a misspelt section: name the field that was meant in it
        name, value = next(iter(value.items()))
        dotted += f".{name}"
    return f"{dotted}: no such field (value {value!r}){_suggest(dotted, kind)}"


def _suggest(dotted: str, kind: str = "cvae") -> str:
    """The nearest name that exists: the field itself in another section, a sibling, or anything spelt alike."""
    fields = list(_defaults(kind))
    section, _, last = dotted.rpartition(".")
    siblings = [name for name in fields if name.rpartition(".")[0] == section]
    near = (
        difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.8)
        or [name for name in fields if name.rpartition(".")[2] == last][:1]
        or difflib.get_close_matches(dotted, fields, n=1, cutoff=0.6)
    )
    known = siblings or [f"{name}." for name in _tree(Experiment())]
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
