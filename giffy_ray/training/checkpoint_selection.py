"""Choice among the checkpoints of a run: the newest, the best, the one to resume, the ones to delete. Imports no Ray.

A run keeps its checkpoints in folders `checkpoint_<time>` below its run folder. Those with more steps are newer. The
time in the name only breaks ties, because a machine's clock may be set back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from giffy_ray.config import ConfigError, Experiment, override
from giffy_ray.core.packaged import packaged_models, packaged_path
from giffy_ray.core.storage import filesystem_of, is_local, join, read_text
from giffy_ray.training.checkpoint_format import MANIFEST, CorruptCheckpoint, read_train_state, verify

SELECTION_METRIC = "val/l2_paper"  # the best checkpoint of a run has the smallest
_log = logging.getLogger(__name__)

Result = TypeVar("Result")
TrainStates = Mapping[str, Mapping[str, Any]]  # by checkpoint folder; empty where the state cannot be read


def latest_checkpoint(experiment: Experiment) -> str:
    """Returns the valid checkpoint with the most steps of the experiment's run.

    Corrupt checkpoints are logged and skipped. Raises ConfigError where no checkpoint is valid.
    """
    return first_valid(experiment, list(list_checkpoints(experiment)))


def latest_resumable(experiment: Experiment) -> str | None:
    """Returns the newest valid checkpoint, and deletes the unusable ones that are newer.

    The caller must hold the run's lock, so that nobody is writing a checkpoint. Deletes checkpoints whose writing was
    interrupted, and corrupt ones newer than the one returned, so that no remaining checkpoint has more steps.

    Returns:
        The checkpoint's path or URI; None if the run has not completed any.

    Raises:
        ConfigError: Every checkpoint is corrupt.
    """
    completed = []
    for checkpoint_dir in list_checkpoints(experiment):
        if read_text(join(checkpoint_dir, MANIFEST)) is None:
            _log.warning("%s: writing this checkpoint was interrupted; deleting it", checkpoint_dir)
            delete_checkpoint(checkpoint_dir)
        else:
            completed.append(checkpoint_dir)
    if not completed:
        return None
    latest = first_valid(experiment, completed)
    for checkpoint_dir in completed[: completed.index(latest)]:
        _log.warning("%s: deleting this corrupt checkpoint; the run resumes from %s", checkpoint_dir, latest)
        delete_checkpoint(checkpoint_dir)
    return latest


def best_checkpoint(experiment: Experiment, metric: str, smaller: bool = True) -> str:
    """Returns the valid checkpoint with the best value of `metric`.

    Among equal values the newest wins; NaN ranks last.

    Args:
        experiment: The experiment of the run.
        metric: Name of a metric in the checkpoints' train states.
        smaller: Whether smaller values are better.

    Raises:
        ConfigError: No valid checkpoint has the metric.
    """
    metrics = _list_metrics(list_checkpoints(experiment))
    values = {checkpoint_dir: named[metric] for checkpoint_dir, named in metrics.items() if metric in named}
    available = {name for named in metrics.values() for name in named}
    if available and not values:
        raise ConfigError(f"{metric!r} was not measured at any checkpoint; available: {', '.join(sorted(available))}")
    return first_valid(experiment, _rank(values, smaller))


def select_checkpoint(experiment: Experiment) -> str:
    """Returns the checkpoint that represents a run in evaluation, publishing and the model registry.

    That is the valid one with the best validation, or the newest where none was validated. Raises ConfigError.
    """
    states = list_checkpoints(experiment)
    metrics = _list_metrics(states)
    validated = {
        checkpoint_dir: named[SELECTION_METRIC]
        for checkpoint_dir, named in metrics.items()
        if SELECTION_METRIC in named
    }
    unvalidated = [checkpoint_dir for checkpoint_dir in states if checkpoint_dir not in validated]
    return first_valid(experiment, [*_rank(validated), *unvalidated])


def select_and_read(select: Callable[[], str], read: Callable[[str], Result]) -> tuple[str, Result]:
    """Selects a checkpoint and reads it, again if a running training deletes it in between.

    Returns:
        The checkpoint's path or URI, and what `read` returned for it.
    """
    while True:
        checkpoint_dir = select()
        try:
            return checkpoint_dir, read(checkpoint_dir)
        except (FileNotFoundError, CorruptCheckpoint):
            if read_text(join(checkpoint_dir, MANIFEST)) is not None:  # a deletion removes the manifest first
                raise


def describe_checkpoint(checkpoint_dir: str) -> str:
    """Returns the checkpoint's path or URI for a message, with the metric that it was selected by."""
    state = read_train_state(checkpoint_dir)
    if SELECTION_METRIC not in state.get("metrics", {}):
        return checkpoint_dir
    value = state["metrics"][SELECTION_METRIC]
    return f"{checkpoint_dir} (epoch {state.get('epoch')}, {SELECTION_METRIC} {value:.2f})"


def last_metrics(experiment: Experiment) -> dict[str, Any] | None:
    """Returns metrics, `epoch` and `steps_done` of the newest valid checkpoint; None if no epoch ended there.

    The caller must hold the run's lock, as for `latest_resumable`.
    """
    checkpoint_dir = latest_resumable(experiment)
    state = read_train_state(checkpoint_dir) if checkpoint_dir else {}
    if state.get("epoch") is None:
        return None
    return {"steps_done": state["steps_done"], "epoch": state["epoch"], **state["metrics"]}


def resolve_init_from(experiment: Experiment) -> str | None:
    """Returns the checkpoint named by `train.init_from`: a path or URI as it is, or a run's newest checkpoint.

    A trial stores its runs in the study's folder, so its `train.init_from` may also name a run beside that folder. A
    name that no run has may be that of a pretrained model. Raises ConfigError where none of these is a valid
    checkpoint.
    """
    init_from = experiment.train.init_from
    if init_from is None or "/" in init_from:
        return init_from
    run = override(experiment, {"name": init_from})
    parent = experiment.storage.rstrip("/").rpartition("/")[0]
    if parent.partition("://")[2 if "://" in experiment.storage else 0] and not list_checkpoints(run):
        run_beside_study = override(run, {"storage": parent})
        run = run_beside_study if list_checkpoints(run_beside_study) else run
    return find_pretrained(run) or latest_checkpoint(run)


def find_pretrained(run: Experiment) -> str | None:
    """Returns the pretrained model of the run's name. None if there is none, or if the run has checkpoints itself."""
    if run.name not in packaged_models() or list_checkpoints(run):
        return None
    return str(packaged_path("models", run.name))


def available_bytes(experiment: Experiment) -> float:
    """Returns the disk space for the run's checkpoints: free space plus what they occupy. Infinite for a bucket."""
    if not is_local(experiment.storage):
        return math.inf
    filesystem, folder = filesystem_of(experiment.run_dir)
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    occupied = sum(info.size or 0 for info in infos if "/checkpoint_" in info.path)
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free + occupied


def remove_superseded(experiment: Experiment) -> None:
    """Deletes all completed checkpoints except the newest two and the `train.keep_checkpoints` best validations.

    Only the writer of the run's checkpoints may call this, after each checkpoint. Storage errors are logged; the next
    call tries again.
    """

    def select_kept(states: TrainStates) -> list[str]:
        values = {path: state["metrics"].get(SELECTION_METRIC, math.nan) for path, state in states.items()}
        best = _rank({path: value for path, value in values.items() if not math.isnan(value)})
        return [*list(states)[:2], *best[: experiment.train.keep_checkpoints]]

    _delete_all_except(experiment, select_kept)


def remove_older(experiment: Experiment, epochs: int = 0) -> None:
    """Deletes all completed checkpoints except the newest, and the newest `epochs` that end an epoch.

    The conditions of `remove_superseded` apply.
    """

    def select_kept(states: TrainStates) -> list[str]:
        epoch_ends = [path for path, state in states.items() if state.get("epoch") is not None]
        return [*list(states)[:1], *epoch_ends[:epochs]]

    _delete_all_except(experiment, select_kept)


def _delete_all_except(experiment: Experiment, select_kept: Callable[[TrainStates], list[str]]) -> None:
    """Deletes the completed checkpoints that `select_kept` does not return. Others may still be being written."""
    try:
        completed = {path: state for path, state in list_checkpoints(experiment).items() if state}
        for checkpoint_dir in completed.keys() - select_kept(completed):
            delete_checkpoint(checkpoint_dir)
    except OSError as error:
        run_dir = experiment.run_dir
        _log.warning("%s: could not delete older checkpoints (%r); trying again after the next one", run_dir, error)


def delete_checkpoint(checkpoint_dir: str) -> None:
    """Deletes a checkpoint, its manifest first: an interrupted deletion leaves an incomplete one, not a corrupt one."""
    filesystem, path = filesystem_of(checkpoint_dir)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{path}/{MANIFEST}")
    filesystem.delete_dir(path)


def list_checkpoints(experiment: Experiment) -> TrainStates:
    """Returns the train states of a run's checkpoints by folder, newest first.

    Newest means most steps, then the later name. Incomplete and corrupt checkpoints, whose steps are unknown, come
    first, so that the search for a valid one reports them.
    """
    run_dir = experiment.run_dir
    filesystem, base = filesystem_of(run_dir)
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    names = [info.base_name for info in infos if info.type == fs.FileType.Directory]
    folders = [join(run_dir, name) for name in sorted(names, reverse=True) if name.startswith("checkpoint_")]
    states = {folder: read_train_state(folder) for folder in folders}
    return dict(sorted(states.items(), key=lambda item: -item[1].get("steps_done", math.inf)))


def first_valid(experiment: Experiment, checkpoint_dirs: list[str]) -> str:
    """Returns the first checkpoint whose files match its manifest. Raises ConfigError, listing all problems."""
    problems = []
    for checkpoint_dir in checkpoint_dirs:
        try:
            verify(checkpoint_dir)
        except (CorruptCheckpoint, FileNotFoundError) as error:  # a running training may have deleted it
            _log.warning("%s; skipping this checkpoint", error)
            problems.append(str(error))
        else:
            return checkpoint_dir
    run_dir = experiment.run_dir
    raise ConfigError("\n  ".join([f"name: no valid checkpoint in {run_dir} (value {experiment.name!r})", *problems]))


def _list_metrics(states: TrainStates) -> dict[str, Mapping[str, float]]:
    return {checkpoint_dir: state.get("metrics", {}) for checkpoint_dir, state in states.items()}


def _rank(values: Mapping[str, float], smaller: bool = True) -> list[str]:
    """Sorts the keys by value, best first and NaN, which compares with nothing, last."""
    return sorted(values, key=lambda key: (math.isnan(values[key]), values[key] if smaller else -values[key]))
