"""The Experiment: the complete, frozen and validated configuration of one training.

An experiment file (YAML) holds only what differs from the defaults, and overrides such as `optim.lr=3e-4` only what
differs from the file. All changes go through `override`, which validates the whole experiment. An unknown section or
field, a value of the wrong type or a field of another kind of model raises a `ConfigError` that names the dotted field,
the value and the closest valid name.

`sections` and `models` define the fields, `parsing` converts text to values, and `reference` renders the
documentation of all fields.
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

from giffy_ray.config import parsing
from giffy_ray.config.models import (
    AdvancedCVAEConfig,
    AdversarialConfig,
    BaseCVAEConfig,
    BetweenConfig,
    CGANConfig,
    CVAEConfig,
    Direct3DConfig,
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
    SyntheticConfig,
    UserSuppliedMetric,
)
from giffy_ray.core.errors import ConfigError
from giffy_ray.core.storage import SecretInAddress, redact_credentials

__all__ = [
    "MISSING",
    "SPLITS",
    "VIDEO_LIST_SUFFIXES",
    "AdvancedCVAEConfig",
    "AdversarialConfig",
    "AugmentConfig",
    "BaseCVAEConfig",
    "BetweenConfig",
    "CGANConfig",
    "CVAEConfig",
    "ClipConfig",
    "ConfigError",
    "DataConfig",
    "Direct3DConfig",
    "Distribution",
    "Experiment",
    "LimitsConfig",
    "ModelConfig",
    "OptimConfig",
    "PerceptualMetric",
    "SearchConfig",
    "SegmentsConfig",
    "SpeedConfig",
    "SyntheticConfig",
    "TwoStreamConfig",
    "UserSuppliedMetric",
    "check_required_fields",
    "flatten",
    "from_yaml",
    "load",
    "override",
    "to_minimal_yaml",
    "to_yaml",
]

MISSING = "???"  # marks a text field of an experiment file that the user must set
_EXPERIMENT = TypeAdapter(Experiment)
# Fields whose keys the user chooses: values, not sections.
_MAPPING_FIELDS = ("search.space", "data.max_videos", "evaluate.weights", "search.objectives")
_KIND = "model.kind"
# Parts of a pydantic error location that name a member of a union, not a field.
_UNION_MEMBER = re.compile(r"constrained-\w+|\w*\[.*\]")


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Experiment:
    """Loads an experiment file and applies overrides to it.

    The type of a field decides how its value is parsed: text is taken literally, a list is `[a, b]` or `a,b`, and only
    `null` means none. The last override of a field wins.

    Args:
        path: The experiment file. None starts from the defaults.
        overrides: Overrides such as `optim.lr=3e-4`.

    Raises:
        ConfigError: The file or an override is invalid.
    """
    tree = {} if path is None else parsing.parse_file(path, Experiment)
    return _apply_overrides(_validate(tree), overrides)


def from_yaml(text: str, overrides: Iterable[str] = ()) -> Experiment:
    """Parses the text of an experiment file, the inverse of `to_yaml`, and applies overrides as `load` does.

    Raises:
        ConfigError: The text or an override is invalid.
    """
    return _apply_overrides(_validate(parsing.parse_text(text, Experiment, "experiment")), overrides)


def check_required_fields(experiment: Experiment) -> None:
    """Checks that no field is still `???`, which an experiment file uses for fields that the user must set.

    Raises:
        ConfigError: A field is not set.
    """
    missing = [name for name, value in flatten(experiment).items() if value == MISSING]
    if missing:
        example = "/path/to/videos" if missing == ["data.root"] else "VALUE"
        raise ConfigError(f"{missing[0]}: is required by this experiment; set {missing[0]}={example}")


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """Returns a copy of an experiment with changed fields.

    A new `model.kind` resets the other fields of the model to the defaults of that kind.

    Args:
        experiment: The experiment to copy.
        changes: New values by dotted field, such as `{"optim.lr": 3e-4}`.

    Raises:
        ConfigError: A field does not exist, or the new experiment is invalid.
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
            raise ConfigError(f"{dotted}: is a section, not a field; set {dotted}.FIELD=VALUE (value {_shown(value)})")
        node[name] = value
    return _validate(tree)


def flatten(experiment: Experiment) -> dict[str, Any]:
    """Returns the value of every dotted field, as `override` accepts it and MLflow shows it."""
    return dict(_leaves(_tree(experiment)))


def to_yaml(experiment: Experiment) -> str:
    """Serializes every field of an experiment. `from_yaml` restores an equal experiment."""
    return yaml.safe_dump(_EXPERIMENT.dump_python(experiment, mode="json"), sort_keys=False)


def to_minimal_yaml(experiment: Experiment) -> str:
    """Serializes only the fields that differ from the defaults, like an experiment file written by hand."""
    defaults = flatten(Experiment())
    defaults |= {**_defaults(experiment.model.kind), _KIND: defaults[_KIND]}
    tree: dict[str, Any] = {}
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
    """Returns the default of every dotted field for a kind of model."""
    return flatten(_EXPERIMENT.validate_python({"model": {"kind": kind}}))


def _tree(experiment: Experiment) -> dict[str, Any]:
    return dataclasses.asdict(experiment)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and prefix + name not in _MAPPING_FIELDS:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _apply_overrides(experiment: Experiment, overrides: Iterable[str]) -> Experiment:
    """The last override of a field wins, so that a script can put its own before those of its user."""
    texts: list[tuple[str, str]] = []
    for text in overrides:
        dotted, equals, value_text = text.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"{text!r}: expected section.field=value, such as optim.lr=3e-4")
        texts.append((dotted, value_text))
    kind = dict(texts).get(_KIND, experiment.model.kind)
    changes: dict[str, Any] = {}
    for dotted, value_text in texts:
        value = parsing.parse_override(dotted, value_text, Experiment, kind)
        # A whole section, as in optim={lr: 1e-3}, changes only the fields that it names, as a file does.
        if isinstance(value, dict) and parsing.is_section(parsing.type_of_field(Experiment, dotted, kind)):
            changes |= dict(_leaves(value, f"{dotted}."))
        else:
            changes[dotted] = value
    return override(experiment, changes)


def _validate(tree: Mapping[str, Any]) -> Experiment:
    model = tree.get("model")
    if isinstance(model, Mapping):
        tree = {**tree, "model": {"kind": Experiment().model.kind, **model}}
    try:
        return _EXPERIMENT.validate_python(tree)
    except ValidationError as error:
        # pydantic reports one error per member of a union and per missing element of a tuple: merge them by field.
        by_field: dict[str, list[str]] = {}
        for details in error.errors():
            field, _, message = _explain(details).partition(": ")
            by_field.setdefault(field, []).append(message)
        lines = [f"{field}: {'; or: '.join(dict.fromkeys(messages))}" for field, messages in by_field.items()]
        raise ConfigError("\n".join(lines)) from None


def _explain(error: Any) -> str:
    """Formats a pydantic error as `section.field: message (value ...)`."""
    path, value, kind = list(error["loc"]), error["input"], Experiment().model.kind
    if error["type"] == "union_tag_invalid":
        return f"{_KIND}: must be one of {error['ctx']['expected_tags']} (value {error['ctx']['tag']!r})"
    if path[:1] == ["model"] and len(path) > 1:
        kind = path.pop(1)
    path = [part for part in path if not _UNION_MEMBER.fullmatch(str(part))]
    if error["type"] == "missing":
        return f"{'.'.join(map(str, path[:-1]))}: has too few values (value {_shown(value)})"
    dotted = ".".join(str(part) for part in path)
    if error["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        message = error["msg"].removeprefix("Value error, ")
        if isinstance(value, Mapping) and message.startswith(f"{dotted}."):  # a section names the field itself
            return message
        if isinstance(error.get("ctx", {}).get("error"), SecretInAddress):  # no value, which may hold a password
            return f"{dotted}: {message}"
        return f"{dotted}: {message} (value {_shown(value)})"
    if len(path) == 1 and "." in dotted and dotted in _defaults(kind):
        section, _, name = dotted.partition(".")
        return f"{dotted}: dotted names are for overrides; in a file, write {section}: {{{name}: {_shown(value)}}}"
    while isinstance(value, Mapping) and value:  # in a misspelled section: name the first field of it
        name, value = next(iter(value.items()))
        dotted += f".{name}"
    return f"{dotted}: no such field (value {_shown(value)}){_suggest(dotted, kind)}"


def _shown(value: Any) -> str:
    """Formats a value for a message: redacted, and truncated to one line."""
    text = redact_credentials(repr(value))
    return text if len(text) <= parsing.MAX_SHOWN_CHARS else f"{text[: parsing.MAX_SHOWN_CHARS]}..."


def _suggest(dotted: str, kind: str = "cvae") -> str:
    """Suggests a similarly spelled sibling, the same field in another section, or any similarly spelled field."""
    fields = list(_defaults(kind))
    section, _, last = dotted.rpartition(".")
    siblings = [name for name in fields if name.rpartition(".")[0] == section]
    matches = (
        difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.8)
        or [name for name in fields if name.rpartition(".")[2] == last][:1]
        or difflib.get_close_matches(dotted, fields, n=1, cutoff=0.6)
    )
    valid = siblings or [f"{name}." for name in _tree(Experiment())]
    return f"; did you mean {matches[0]!r}?" if matches else f"; valid here: {', '.join(valid)}"
