"""The best model of a run in MLflow's registry, and whether it is the champion of its name."""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from giffy_ray.config import ClipConfig, ConfigError, Experiment
from giffy_ray.core.storage import join, read_text, redact_credentials
from giffy_ray.tracking import model_registry
from giffy_ray.tracking.model_registry import Version
from giffy_ray.tracking.tracker import tracking_uri
from giffy_ray.training import checkpoints

_METRIC = checkpoints.METRIC  # by which the champion is chosen, as a run's best checkpoint is: smaller is better
# What has to be the same of two models for their metrics to be comparable.
_CLIPS = ("data.fingerprint", "data.split", "clip")


def try_register(experiment: Experiment) -> None:
    """Registers the run of the experiment's name under `tracking.model`, and says what came of it.

    Whatever goes wrong is said, with how to do it again: a training is not lost with a registry that is away.
    """
    if experiment.tracking.model is None:
        return
    try:
        print(register(experiment), flush=True)
    except Exception as failure:
        words = f"name={experiment.name} storage={experiment.storage} tracking.model={experiment.tracking.model}"
        words += f" tracking.uri={experiment.tracking.uri}" if experiment.tracking.uri else ""
        words, why = redact_credentials(words), redact_credentials(str(failure)).strip() or type(failure).__name__
        print(
            f"the model was not registered: {why}\n  once that is mended: python jobs/register.py {words}", flush=True
        )


def register(experiment: Experiment) -> str:
    """Registers the checkpoint with the best validation, and gives it the alias `champion` where that is its due.

    Returns what came of it, in words. Raises ConfigError where the run has no such checkpoint or is not in MLflow, and
    what MLflow raises.
    """
    place, name, uri = join(experiment.storage, experiment.name), experiment.tracking.model, tracking_uri(experiment)
    if name is None:
        raise ConfigError("tracking.model: give the name to register it under (value None)")
    run_id = read_text(join(place, "mlflow_run"))
    if run_id is None:
        why = "run jobs/replay_tracking.py, which sends it"
        raise ConfigError(f"name: MLflow has no run of {place} yet (value {experiment.name!r}); {why}")
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder, model_registry.CHECKPOINT)

        def read(location: str) -> dict[str, Any]:
            position = checkpoints.position_of(location)
            checkpoints.export_weights(location, published)
            return position

        _, position = checkpoints.read_chosen(functools.partial(checkpoints.best, experiment, _METRIC), read)
        learner, trained = checkpoints.load(str(published))
        model_registry.write_mlmodel(Path(folder), trained.clip, learner.latent, "giffy_ray.inference.pyfunc_model")
        digest = hashlib.sha256((published / "manifest.json").read_bytes()).hexdigest()
        version = model_registry.add(
            uri, name, run_id, Path(folder), digest, version_tags(experiment, trained, position)
        )
    before = model_registry.champion(uri, name)
    crowned, why = compare_to_champion(version, before)
    if crowned:
        model_registry.set_champion(uri, version)
    return f"models:/{name}/{version.number}: {why}"


def version_tags(experiment: Experiment, trained: Experiment, position: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a checkpoint, as tags of its version: its metrics, and on which clips they were measured."""
    place = join(experiment.storage, experiment.name)
    tags = {
        "giffy_ray.run": redact_credentials(place),
        "model.kind": trained.model.kind,
        "steps_done": str(position["steps_done"]),
        "data.fingerprint": read_text(join(place, "data_set")) or "",
        "data.split": "validation",
        "clip": _words(trained.clip),
    }
    return tags | {name: repr(value) for name, value in position["metrics"].items() if name.startswith("val/")}


def compare_to_champion(new: Version, champion: Version | None) -> tuple[bool, str]:
    """Whether `new` becomes the champion in place of `champion`, and why, or why not."""
    ours = _metric(new.tags)
    if champion is None:
        if not math.isfinite(ours):
            return False, f"not the champion: its {_METRIC} is {ours}"
        return True, f"the champion, as the first; {_METRIC} {ours:.2f}"
    if champion.number == new.number:
        return False, f"the champion, as it was; {_METRIC} {ours:.2f}"
    stays = f"not the champion: version {champion.number} stays, "
    for field in _CLIPS:
        if new.tags.get(field) != champion.tags.get(field):
            said = f"{champion.tags.get(field, 'unknown')!r}, not {new.tags.get(field)!r}"
            return False, f"{stays}which was measured on other clips ({field} {said})"
    theirs = _metric(champion.tags)
    if not ours < theirs:
        return False, f"{stays}whose {_METRIC} is {theirs:.2f}, and this one's {ours:.2f}"
    return True, f"the champion; {_METRIC} {ours:.2f}, and {theirs:.2f} of version {champion.number}"


def _metric(tags: Mapping[str, str]) -> float:
    return float(tags.get(_METRIC, "nan"))


def _words(clip: ClipConfig) -> str:
    return f"{clip.frames} frames of {clip.height}x{clip.width} at {clip.fps:g} fps, {clip.fit}"
