"""The Experiment: everything that describes one training, frozen and validated.

A YAML file holds what differs from the defaults below; words such as `optim.lr=3e-4` hold what differs from the
file. `override` is the one door for changes (command line, Ray Tune, tests), so every Experiment that exists has
been checked: an unknown section or field, a value of the wrong type or another model's field is a `ConfigError`
that names the dotted field, the value and the nearest name that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Split = Literal["training", "validation", "test", "shifted"]
SPLITS: tuple[Split, ...] = get_args(Split)
Distribution = Literal["log_uniform", "uniform", "int", "choice"]
# Left to right, because YAML reads 1e-4 as a string.
SearchValue = Annotated[int | float | str, Field(union_mode="left_to_right")]


class ConfigError(ValueError):
    """A field that does not exist or a value that it cannot take; the message names both."""


class Strict:
    """Makes pydantic refuse unknown fields in every section that inherits from it."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class SyntheticConfig(Strict):
    """The built-in data set, rendered when `data.root` is not given. Counts are clips per category."""

    training_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 400
    validation_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 50
    test_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # seen by neither training nor tuning
    shifted_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # a test outside the range of the others
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class LimitsConfig(Strict):
    """What a video file may cost. One that asks for more is rejected by name, before it is decoded where possible."""

    file_mb: Positive = 256
    pixels: Positive = 4096 * 4096  # of one frame
    frames: Positive = 1_000_000
    seconds: Positive = 24 * 3600
    decode_s: Positive = 60  # of wall time, for one file
    memory_mb: Positive = 2048  # of the process that decodes


@dataclass(frozen=True)
class IntervalsConfig(Strict):
    """Training on parts of the videos: the store keeps all their frames, and random intervals of them are dealt."""

    frames: Literal[0] | Annotated[int, Field(ge=2)] = 0  # dealt of each interval; 0: whole clips are dealt
    shortest_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    moments: Literal["even", "random"] = "even"  # of the frames between start and end


@dataclass(frozen=True)
class AugmentConfig(Strict):
    """What may happen to a clip on its way to training, the same to all its frames."""

    flip: bool = False  # every other clip, left to right
    reverse: bool = False  # every other clip, in time
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # the smallest share of height and width that is cut out


@dataclass(frozen=True)
class DataConfig(Strict):
    # A folder of videos, or a list of them (.csv, .parquet); none: the built-in data set.
    root: str | None = None
    categories: tuple[str, ...] = ()  # empty: all that there are
    # The most videos of a category ('*': of each other one) in a split: {skiing: {training: 1800, validation: 81}}.
    caps: dict[str, dict[Split, Positive]] = field(default_factory=dict)
    # Share of the videos held out of training, by what they were cut from; the data set's own validation split then
    # becomes `test`. None: its own split, or a tenth where it has none.
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    ucf101_list: Literal[1, 2, 3] = 1  # which of its three split lists
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # nothing is trained on what is left over beyond
    keep: bool = True  # decoded clips are kept on disk; false: videos are decoded again whenever they are dealt
    keep_gb: Annotated[float, Field(gt=0)] | None = None  # the most that decoded clips may take; none: the disk
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class ClipConfig(Strict):
    """What is kept of a video: `frames` frames at `fps`, from its beginning (30 at 10 fps: the first 3 s)."""

    frames: Annotated[int, Field(ge=3)] = 30
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    height: Positive = 64
    width: Positive = 64
    # How a picture of another shape is brought to this one: whole but out of shape, cut at the sides, or with margins.
    fit: Literal["stretch", "crop", "pad"] = "stretch"


@dataclass(frozen=True)
class CVAEConfig(Strict):
    """The report's CVAE. The defaults are its Table 1: 485,486,299 parameters at 30x64x64."""

    kind: Literal["cvae"] = "cvae"
    image_widths: tuple[Positive, Positive, Positive, Positive] = (16, 32, 64, 128)
    image_hidden: Positive = 256
    image_code: Positive = 1000
    video_widths: tuple[Positive, Positive, Positive, Positive] = (64, 128, 256, 512)
    video_hidden: Positive = 1024
    latent: Positive = 600
    generator_widths: tuple[Positive, Positive, Positive, Positive, Positive] = (256, 128, 64, 32, 16)
    batch_norm: bool = True
    reconstruction_weight: Weight = 2.0  # lambda1 of equation 1
    ends_weight: Weight = 2.0  # lambda2 of equation 1


@dataclass(frozen=True)
class OptimConfig(Strict):
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.8
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999


@dataclass(frozen=True)
class TrainConfig(Strict):
    epochs: Positive = 100
    batch: Positive = 20  # clips per optimiser step, over all workers together
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class ClusterConfig(Strict):
    workers: Positive = 1  # DDP workers
    max_failures: Annotated[int, Field(ge=0)] = 3  # restarts from the last checkpoint before a run is given up
    gpu: bool | None = None  # a GPU for each worker; none: where the cluster has GPUs at the start


@dataclass(frozen=True)
class TrackingConfig(Strict):
    uri: str | None = None  # none: an SQLite file in `storage`
    experiment: str = "giffy_ray"


@dataclass(frozen=True)
class EvaluateConfig(Strict):
    split: Literal["validation", "test", "shifted"] = "validation"


@dataclass(frozen=True)
class SearchConfig(Strict):
    """What `jobs/tune_*.py` tries. `space` maps a field of the experiment to {distribution: [low, high]}."""

    trials: Positive = 12
    epochs: Positive = 20  # of the longest trial; ASHA ends poor ones sooner
    grace_epochs: Positive = 2  # no trial is ended before
    metric: str = "val/l2_report"  # minimised; must not depend on what is searched
    seed: Annotated[int, Field(ge=0)] = 0
    space: dict[str, dict[Distribution, tuple[SearchValue, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "default"
    storage: str = "runs/"  # where runs, stores and results are written: a folder, s3://... or gs://...
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    model: CVAEConfig = field(default_factory=CVAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


_EXPERIMENT = TypeAdapter(Experiment)
_OPEN = ("search.space", "data.caps")  # fields whose names the user chooses: values, not sections


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
    """A new Experiment with {"section.field": value} changed, validated as a whole. Raises ConfigError."""
    tree = _tree(experiment)
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
    try:
        return _EXPERIMENT.validate_python(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(one) for one in error.errors())) from None


def _explain(error: Any) -> str:
    dotted, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{dotted}: {error['msg']} (value {value!r})"
    while isinstance(value, Mapping) and value:  # a misspelt section: name the field that was meant in it
        name, value = next(iter(value.items()))
        dotted += f".{name}"
    return f"{dotted}: no such field (value {value!r}){_suggest(dotted)}"


def _suggest(dotted: str) -> str:
    """The nearest name that exists: the field itself in another section, a sibling, or anything spelt alike."""
    fields = list(flatten(Experiment()))
    section, _, last = dotted.rpartition(".")
    siblings = [name for name in fields if name.rpartition(".")[0] == section]
    near = (
        difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.8)
        or [name for name in fields if name.rpartition(".")[2] == last][:1]
        or difflib.get_close_matches(dotted, fields, n=1, cutoff=0.6)
    )
    known = siblings or [f"{name}." for name in _tree(Experiment())]
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
