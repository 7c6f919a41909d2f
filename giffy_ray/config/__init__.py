"""The Experiment: everything that describes one training, frozen and validated.

A YAML file holds what differs from the defaults below; words such as `optim.lr=3e-4` hold what differs from the
file. `override` is the one door for changes (command line, Ray Tune, tests), so every Experiment that exists has
been checked: an unknown section or field, a value of the wrong type or another model's field is a `ConfigError`
that names the dotted field, the value and the nearest name that exists. The sections are in `sections` and `models`;
`reading` turns text into values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from giffy_ray.config import reading
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
    VIDEO_LIST_SUFFIXES,
    AugmentConfig,
    ClipConfig,
    DataConfig,
    Distribution,
    Experiment,
    LimitsConfig,
    OptimConfig,
    PerceptualMetric,
    SearchConfig,
    SegmentsConfig,
    SpeedConfig,
    Supplied,
    SyntheticConfig,
)
from giffy_ray.core.errors import ConfigError
from giffy_ray.core.storage import SecretInAddress, redact_credentials

__all__ = [
    "MISSING",
    "SPLITS",
    "VIDEO_LIST_SUFFIXES",
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
    "LimitsConfig",
    "ModelConfig",
    "OptimConfig",
    "PerceptualMetric",
    "SearchConfig",
    "SegmentsConfig",
    "SpeedConfig",
    "Supplied",
    "SyntheticConfig",
    "TwoStreamConfig",
    "differences",
    "flatten",
    "from_yaml",
    "load",
    "override",
    "refuse_missing",
    "to_yaml",
]

_EXPERIMENT = TypeAdapter(Experiment)
# Fields whose names the user chooses: values, not sections.
_OPEN = ("search.space", "data.max_videos", "evaluate.weights", "search.objectives")
_KIND = "model.kind"
_TYPE = re.compile(r"constrained-\w+|\w*\[.*\]")  # in the place of a pydantic error: which type of a union it is of
MISSING = "???"  # the value of a text field in an experiment file that the user must give


def load(path: str | Path | None = None, words: Iterable[str] = ()) -> Experiment:
    """Reads an experiment file and applies `section.field=value` overrides to it.

    Without a path the experiment is the defaults. The type of the field decides how `value` is read: text as it is
    typed, lists as `[a, b]` or `a,b`, none as `null`. Of several overrides of a field the last counts. Raises
    ConfigError.
    """
    tree = {} if path is None else reading.read_file(path, Experiment)
    return _with_overrides(_validate(tree), words)


def from_yaml(text: str, words: Iterable[str] = ()) -> Experiment:
    """The inverse of `to_yaml`, then overridden as `load` does. Raises ConfigError."""
    return _with_overrides(_validate(reading.read_text(text, Experiment, "experiment")), words)


def refuse_missing(experiment: Experiment) -> None:
    """Raises ConfigError where a field is still `???`: its experiment file leaves it to the user."""
    missing = [name for name, value in flatten(experiment).items() if value == MISSING]
    if missing:
        hint = "=/path/to/videos" if missing == ["data.root"] else "=VALUE"
        raise ConfigError(f"{missing[0]}: this experiment needs a value of your own; give {missing[0]}{hint}")


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
            raise ConfigError(f"{dotted}: no such field (value {_shown(value)}){_suggest(dotted)}")
        if isinstance(node.get(name), dict) and not isinstance(value, Mapping):
            raise ConfigError(f"{dotted}: is a section, not a field; give {dotted}.FIELD=value (got {_shown(value)})")
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


def _with_overrides(experiment: Experiment, words: Iterable[str]) -> Experiment:
    """The last of several overrides of one field counts, so that a script may put its own before those of its user."""
    texts: list[tuple[str, str]] = []
    for word in words:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"{word!r}: expected section.field=value, such as optim.lr=3e-4")
        texts.append((dotted, text))
    kind = dict(texts).get(_KIND, experiment.model.kind)
    changes: dict[str, Any] = {}
    for dotted, text in texts:
        value = reading.read_override(dotted, text, Experiment, kind)
        # A section as a whole, optim={lr: 1e-3}, changes the fields that it names, as a file does.
        section = isinstance(value, dict) and reading.is_section(reading.hint_of(Experiment, dotted, kind))
        changes |= dict(_leaves(value, f"{dotted}.")) if section else {dotted: value}
    return override(experiment, changes)


def _validate(tree: Mapping[str, Any]) -> Experiment:
    model = tree.get("model")
    if isinstance(model, Mapping):
        tree = {**tree, "model": {"kind": Experiment().model.kind, **model}}
    try:
        return _EXPERIMENT.validate_python(tree)
    except ValidationError as error:
        # pydantic has an error for each type of a union, and for each value that a list lacks.
        by_field: dict[str, list[str]] = {}
        for one in error.errors():
            field, _, message = _explain(one).partition(": ")
            by_field.setdefault(field, []).append(message)
        lines = [f"{field}: {'; or: '.join(dict.fromkeys(messages))}" for field, messages in by_field.items()]
        raise ConfigError("\n".join(lines)) from None


def _explain(error: Any) -> str:
    path, value, kind = list(error["loc"]), error["input"], Experiment().model.kind
    if error["type"] == "union_tag_invalid":
        return f"{_KIND}: must be one of {error['ctx']['expected_tags']} (value {error['ctx']['tag']!r})"
    if path[:1] == ["model"] and len(path) > 1:
        kind = path.pop(1)
    path = [part for part in path if not _TYPE.fullmatch(str(part))]
    if error["type"] == "missing":
        return f"{'.'.join(map(str, path[:-1]))}: more values are required (value {_shown(value)})"
    dotted = ".".join(str(part) for part in path)
    if error["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        message = error["msg"].removeprefix("Value error, ")
        whole_section = isinstance(value, Mapping) and error["type"] == "value_error"
        if whole_section or isinstance(error.get("ctx", {}).get("error"), SecretInAddress):
            return f"{dotted}: {message}"
        return f"{dotted}: {message} (value {_shown(value)})"
    if len(path) == 1 and "." in dotted and dotted in _defaults(kind):
        section, _, name = dotted.partition(".")
        return f"{dotted}: a file has sections; write {section}: {{{name}: {_shown(value)}}}"
    while isinstance(value, Mapping) and value:  # a misspelt section: name the field that was meant in it
        name, value = next(iter(value.items()))
        dotted += f".{name}"
    return f"{dotted}: no such field (value {_shown(value)}){_suggest(dotted, kind)}"


def _shown(value: Any) -> str:
    """For a message: no secrets of addresses, and not more than a line."""
    text = redact_credentials(repr(value))
    return text if len(text) <= reading.LONGEST_SHOWN else f"{text[: reading.LONGEST_SHOWN]}..."


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
