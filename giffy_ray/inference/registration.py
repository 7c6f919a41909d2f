"""Registers a run's best checkpoint in MLflow's model registry and promotes it to champion if it scores better."""

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
from giffy_ray.training import checkpoint_format
from giffy_ray.training.checkpoint_selection import SELECTION_METRIC, best_checkpoint, select_and_read

_LOADER_MODULE = "giffy_ray.inference.pyfunc_model"
# Metrics of two models are comparable only if these tags are equal.
_COMPARABILITY_TAGS = ("data.fingerprint", "data.split", "clip")


def try_register(experiment: Experiment) -> None:
    """Registers the run under `tracking.model` if that is set, and prints the outcome.

    Prints errors, with the command to retry, instead of raising them: a failed registration must not fail a training.
    """
    if experiment.tracking.model is None:
        return
    try:
        print(register(experiment), flush=True)
    except Exception as error:
        overrides = f"name={experiment.name} storage={experiment.storage} tracking.model={experiment.tracking.model}"
        if experiment.tracking.uri:
            overrides += f" tracking.uri={experiment.tracking.uri}"
        reason = redact_credentials(str(error)).strip() or type(error).__name__
        print(
            f"the model was not registered: {reason}\n"
            f"  Retry with: python jobs/register.py {redact_credentials(overrides)}",
            flush=True,
        )


def register(experiment: Experiment) -> str:
    """Registers the checkpoint with the best validation and promotes it to champion if it beats the current one.

    Returns:
        A message with the registered version and whether it was promoted.

    Raises:
        ConfigError: The run has no validated checkpoint, or MLflow has no record of the run.
        MlflowException: The registry failed.
    """
    run_dir = experiment.run_dir
    model_name = experiment.tracking.model
    uri = tracking_uri(experiment)
    if model_name is None:
        raise ConfigError("tracking.model: set the name to register the model under (value None)")
    mlflow_run_id = read_text(join(run_dir, "mlflow_run"))
    if mlflow_run_id is None:
        raise ConfigError(
            f"name: MLflow has no run for {run_dir} yet; upload it with jobs/replay_tracking.py "
            f"(value {experiment.name!r})"
        )
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, model_registry.CHECKPOINT)

        def read(checkpoint_dir: str) -> dict[str, Any]:
            state = checkpoint_format.read_train_state(checkpoint_dir)
            checkpoint_format.export_weights(checkpoint_dir, exported)
            return state

        _, state = select_and_read(functools.partial(best_checkpoint, experiment, SELECTION_METRIC), read)
        learner, trained = checkpoint_format.load_learner(str(exported))
        model_registry.write_mlmodel(Path(folder), trained.clip, learner.latent, _LOADER_MODULE)
        digest = hashlib.sha256((exported / checkpoint_format.MANIFEST).read_bytes()).hexdigest()
        tags = version_tags(experiment, trained, state)
        version = model_registry.add_version(uri, model_name, mlflow_run_id, Path(folder), digest, tags)
    current_champion = model_registry.get_champion(uri, model_name)
    promoted, outcome = compare_to_champion(version, current_champion)
    if promoted:
        model_registry.set_champion(uri, version)
    return f"models:/{model_name}/{version.number}: {outcome}"


def version_tags(experiment: Experiment, trained: Experiment, state: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of a registered version: its validation metrics, and the clips they were measured on.

    Args:
        experiment: Names the run.
        trained: The experiment stored in the checkpoint.
        state: The train state stored in the checkpoint.
    """
    run_dir = experiment.run_dir
    tags = {
        "giffy_ray.run": redact_credentials(run_dir),
        "model.kind": trained.model.kind,
        "steps_done": str(state["steps_done"]),
        "data.fingerprint": read_text(join(run_dir, "data_set")) or "",
        "data.split": "validation",
        "clip": _describe_clip(trained.clip),
    }
    return tags | {name: repr(value) for name, value in state["metrics"].items() if name.startswith("val/")}


def compare_to_champion(version: Version, champion: Version | None) -> tuple[bool, str]:
    """Returns whether to promote `version` to champion, and a message with the reason."""
    value = _metric_of(version)
    if champion is None:
        if not math.isfinite(value):
            return False, f"not promoted: its {SELECTION_METRIC} is {value}"
        return True, f"promoted to champion, as the first version; {SELECTION_METRIC} {value:.2f}"
    if champion.number == version.number:
        return False, f"is the champion already; {SELECTION_METRIC} {value:.2f}"
    for tag in _COMPARABILITY_TAGS:
        if version.tags.get(tag) != champion.tags.get(tag):
            return False, (
                f"not promoted: version {champion.number} was measured on different clips "
                f"({tag} {champion.tags.get(tag, 'unknown')!r}, not {version.tags.get(tag)!r})"
            )
    champion_value = _metric_of(champion)
    scores = f"{SELECTION_METRIC} {champion_value:.2f}, this version {value:.2f}"
    if not value < champion_value:
        return False, f"not promoted: version {champion.number} has {scores}"
    return True, f"promoted to champion; version {champion.number} has {scores}"


def _metric_of(version: Version) -> float:
    return float(version.tags.get(SELECTION_METRIC, "nan"))


def _describe_clip(clip: ClipConfig) -> str:
    return f"{clip.frames} frames of {clip.height}x{clip.width} at {clip.fps:g} fps, {clip.fit}"
