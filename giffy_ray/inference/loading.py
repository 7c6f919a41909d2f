"""Loads trained models: runs, pretrained models, checkpoints and registered versions. Imports neither Ray nor MLflow.

MLflow is imported only for an address in its registry, such as `models:/giffy_ray@champion`.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import torch

from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError, Experiment, override
from giffy_ray.core.storage import resolve_path
from giffy_ray.evaluation.evaluator import BASELINE, REAL
from giffy_ray.inference.pretrained import REGISTRY_SCHEME
from giffy_ray.models.sampling import TrainedModel
from giffy_ray.training import checkpoint_format, checkpoint_selection, learners
from giffy_ray.training.learners import Learner

_CLIP_SIZE_FIELDS = ("frames", "height", "width")


def load_trained_models(experiment: Experiment, clip: ClipConfig) -> list[TrainedModel]:
    """Loads the models of `evaluate.runs`, or of the experiment's own run if that is empty.

    Of a run, loads the checkpoint that `select_checkpoint` returns, and prints which one that is.

    Args:
        experiment: Names the runs and their storage.
        clip: Clip size and length that the models must generate.

    Raises:
        ConfigError: A run does not exist, or its model cannot generate such clips.
    """
    if not experiment.evaluate.runs:
        learner, trained = _load_selected(experiment)
        return [_fit_to_clip(TrainedModel(trained.model.kind, learner, trained), "name", clip)]
    models = [TrainedModel(_display_name(run), *_load_run(experiment, run)) for run in experiment.evaluate.runs]
    names = Counter(model.name for model in models)
    names.update([REAL, BASELINE, *experiment.evaluate.baselines])
    for model in models:
        if names[model.name] > 1:
            raise ConfigError(
                f"evaluate.runs: two runs or methods have this name; give one of them another (value {model.name!r})"
            )
    return [_fit_to_clip(model, "evaluate.runs", clip) for model in models]


def _load_run(experiment: Experiment, run: str) -> tuple[Learner, Experiment]:
    """Loads a run by its name, a checkpoint by path or URI, or a registered model by its models:/ address.

    A path or URI is recognized by a slash. A name that no run has may be that of a pretrained model.
    """
    try:
        if run.startswith(REGISTRY_SCHEME):
            return _load_registered(experiment, run)
        if "/" in run:
            return checkpoint_format.load_learner(resolve_path(run))
        named = override(experiment, {"name": run})
        pretrained = checkpoint_selection.find_pretrained(named)
        return _load_selected(named) if pretrained is None else checkpoint_format.load_learner(pretrained)
    except (ConfigError, FileNotFoundError, checkpoint_format.CorruptCheckpoint) as error:
        raise ConfigError(f"evaluate.runs: {error} (value {run!r})") from error


def _load_registered(experiment: Experiment, address: str) -> tuple[Learner, Experiment]:
    from giffy_ray.tracking.model_registry import download_checkpoint
    from giffy_ray.tracking.tracker import tracking_uri

    with tempfile.TemporaryDirectory() as folder:
        return checkpoint_format.load_learner(download_checkpoint(tracking_uri(experiment), address, Path(folder)))


def _load_selected(experiment: Experiment) -> tuple[Learner, Experiment]:
    select = functools.partial(checkpoint_selection.select_checkpoint, experiment)
    checkpoint_dir, loaded = checkpoint_selection.select_and_read(select, checkpoint_format.load_learner)
    print(f"evaluating {checkpoint_selection.describe_checkpoint(checkpoint_dir)}", flush=True)
    return loaded


def _display_name(run: str) -> str:
    """Returns the name of a run for tables: a checkpoint of a run is shown under the name of its run."""
    if run.startswith(REGISTRY_SCHEME):
        return run.removeprefix(REGISTRY_SCHEME)
    *folders, last = run.rstrip("/").split("/")
    return folders[-1] if folders and last.startswith("checkpoint_") else last


def _fit_to_clip(model: TrainedModel, field: str, clip: ClipConfig) -> TrainedModel:
    """Returns a model that generates clips of the size and length of `clip`. Only `between` can change its own."""
    trained_clip = model.experiment.clip
    differing = [name for name in _CLIP_SIZE_FIELDS if getattr(trained_clip, name) != getattr(clip, name)]
    if differing and isinstance(model.experiment.model, BetweenConfig):
        return _resize(model, field, clip)
    for name in differing:
        raise ConfigError(
            f"{field}: {model.name} was trained with clip.{name}={getattr(trained_clip, name)} and cannot generate "
            f"clips with clip.{name}={getattr(clip, name)}; use an experiment with the `clip` section of the training "
            f"(value {model.name!r})"
        )
    return model


def _resize(model: TrainedModel, field: str, clip: ClipConfig) -> TrainedModel:
    """Rebuilds a `between` model for another clip size with the same weights, without its discriminators."""
    changes = {f"clip.{name}": getattr(clip, name) for name in _CLIP_SIZE_FIELDS}
    experiment = override(model.experiment, changes | {"model.adversarial_weight": 0.0})
    try:
        learner = learners.build(experiment, torch.device("cpu"))
    except ConfigError as error:
        raise ConfigError(f"{field}: {model.name} cannot generate these clips: {error}") from error
    for name, network in learner.networks.items():
        network.load_state_dict(model.learner.networks[name].state_dict())
    return TrainedModel(model.name, learner, experiment)
