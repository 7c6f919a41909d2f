"""Trained models by run name, checkpoint path or registered version."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import torch

from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError, Experiment, override
from giffy_ray.core.storage import resolve_path
from giffy_ray.evaluation.evaluator import (
    BASELINE,
    REAL,
)
from giffy_ray.evaluation.report import TrainedModel
from giffy_ray.tracking.model_registry import fetch
from giffy_ray.tracking.tracker import tracking_uri
from giffy_ray.training import checkpoints, learners
from giffy_ray.training.learners import Learner

_REGISTERED = "models:/"  # in MLflow's registry


def trained_runs(experiment: Experiment, clip: ClipConfig) -> list[TrainedModel]:
    """The learners of `evaluate.runs`, or of the experiment's own run; of each run the checkpoint that
    `checkpoints.select` chooses, which is printed.

    Raises ConfigError where there is no such run, or where it cannot make clips of the size and length of `clip`.
    """
    if not experiment.evaluate.runs:
        learner, trained = _selected(experiment)
        return [_fitting(TrainedModel(trained.model.kind, learner, trained), "name", clip)]
    runs = [TrainedModel(_short(run), *_loaded(experiment, run)) for run in experiment.evaluate.runs]
    names = Counter(run.name for run in runs)
    names.update([REAL, BASELINE, *experiment.evaluate.baselines])
    for run in runs:
        if names[run.name] > 1:
            raise ConfigError(f"evaluate.runs: another method or run is called that too (value {run.name!r})")
    return [_fitting(run, "evaluate.runs", clip) for run in runs]


def _loaded(experiment: Experiment, run: str) -> tuple[Learner, Experiment]:
    """`run`: a name, or, with a slash in it, where a checkpoint lies, or models:/NAME@champion, models:/NAME/3."""
    try:
        if run.startswith(_REGISTERED):
            with tempfile.TemporaryDirectory() as folder:
                return checkpoints.load(fetch(tracking_uri(experiment), run, Path(folder)))
        return checkpoints.load(resolve_path(run)) if "/" in run else _selected(override(experiment, {"name": run}))
    except (ConfigError, FileNotFoundError, checkpoints.DamagedCheckpoint) as error:
        raise ConfigError(f"evaluate.runs: {error} (value {run!r})") from error


def _selected(experiment: Experiment) -> tuple[Learner, Experiment]:
    choose = functools.partial(checkpoints.select, experiment)  # a training may be running
    location, loaded = checkpoints.read_chosen(choose, checkpoints.load)
    print(f"evaluating {checkpoints.describe(location)}", flush=True)
    return loaded


def _short(run: str) -> str:
    """What a run is called in the tables: of a checkpoint the folder that it lies in, unless it has a name itself."""
    if run.startswith(_REGISTERED):
        return run.removeprefix(_REGISTERED)
    *folders, last = run.rstrip("/").split("/")
    return folders[-1] if folders and last.startswith("checkpoint_") else last


def _fitting(run: TrainedModel, field: str, clip: ClipConfig) -> TrainedModel:
    """The run as it makes clips of the size and length of `clip`. Only `between` can make others than it learned."""
    ours = run.experiment.clip
    others = [name for name in ("frames", "height", "width") if getattr(ours, name) != getattr(clip, name)]
    if others and isinstance(run.experiment.model, BetweenConfig):
        return _resized(run, field, clip)
    for name in others:
        raise ConfigError(
            f"{field}: {run.name} was trained with clip.{name}={getattr(ours, name)} and cannot make clips of "
            f"clip.{name}={getattr(clip, name)}; evaluate it with an experiment that has its `clip` section"
        )
    return run


def _resized(run: TrainedModel, field: str, clip: ClipConfig) -> TrainedModel:
    """The same networks as the learner of an experiment with another clip; its discriminators stay behind."""
    changes = {f"clip.{name}": getattr(clip, name) for name in ("frames", "height", "width")}
    experiment = override(run.experiment, changes | {"model.adversarial_weight": 0.0})
    try:
        learner = learners.build(experiment, torch.device("cpu"))
    except ConfigError as error:
        raise ConfigError(f"{field}: {run.name} cannot make these clips: {error}") from error
    for name, network in learner.networks.items():
        network.load_state_dict(run.learner.networks[name].state_dict())
    return TrainedModel(run.name, learner, experiment)
