"""Runs one trial of a study in a Ray Tune actor."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.cluster.shared_storage import find_storage_problem
from giffy_ray.config import Experiment, flatten, from_yaml, override
from giffy_ray.core.run_lock import RunLockWatcher
from giffy_ray.core.storage import filesystem_of, redact_credentials
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.tracking.tracker import open_run, tracking_uri
from giffy_ray.training import checkpoint_selection, checkpoints, train_loop
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.trainer import MUTABLE_FIELDS, locked_run, train
from giffy_ray.tuning.search_space import Values

MakeSnapshot = Callable[[], Snapshot] | None  # see train_loop.ReportFn
FAILURE_KEY = "failed"  # key that a failed trial reports instead of metrics; its value is the reason
# A stopped trial leaves its training loop at the next report. Ray Tune reuses its actor if that takes no longer.
_STOP_TIMEOUT_S = 60
_EXPLOITABLE_EPOCHS = 2  # epochs whose checkpoints a population keeps: slower trials may still copy the previous one


def trial_name(number: int) -> str:
    """Formats a trial number as the name of its run: `trial-0003`."""
    return f"trial-{number:04}"


def trial_experiment(experiment: Experiment, number: int, values: Values) -> Experiment:
    """Returns the experiment that a trial trains, with its run in the study's folder."""
    changes = {
        "name": trial_name(number),
        "storage": experiment.run_dir,
        "tracking.uri": tracking_uri(experiment),
        "train.epochs": experiment.search.epochs,
        "cluster.workers": experiment.search.workers,
    }
    return override(experiment, changes | values)


def run_trial(
    config: dict[str, Any],
    experiment_yaml: str,
    dataset_path: str,
    worker_resources: WorkerResources,
    parent: str,
    token: str | None = None,
) -> None:
    """Trains one trial, or one generation of a trial in a population.

    A failure is reported, then raised. This ends the actor's process too, because a CUDA error would make every later
    trial in it fail.

    Args:
        config: `number` and `values`; in a population also `stop_epoch` and `exploit_from`.
        experiment_yaml: The experiment of the study.
        dataset_path: Where the clips of the study are.
        worker_resources: Of each worker.
        parent: Folder of the run that MLflow shows the trial under.
        token: Proves that this node shares the study's local storage. None if it is a bucket.
    """
    os.chdir(os.environ["TUNE_ORIG_WORKING_DIR"])  # train.init_from may be a relative path
    study_experiment = from_yaml(experiment_yaml)
    problem = find_storage_problem(study_experiment, token)
    if problem:
        raise RuntimeError(problem)  # a problem of this node, not of the values: Ray Tune retries on any node
    experiment = trial_experiment(study_experiment, config["number"], config["values"])
    space = study_experiment.search.space
    open_dataset = functools.partial(ClipDataset, dataset_path, experiment.data.node_cache_gb)
    try:
        if experiment.cluster.max_workers > 1:
            train(experiment, open_dataset(), worker_resources, parent, [TuneReportCallback()], space)
        elif "stop_epoch" in config:
            stop_epoch, exploit_from = config["stop_epoch"], config["exploit_from"]
            _train_generation(experiment, study_experiment, open_dataset(), parent, stop_epoch, exploit_from)
        else:
            _train_in_process(experiment, open_dataset(), parent)
    except Exception as failure:
        tune.report({FAILURE_KEY: redact_credentials(f"{type(failure).__name__}: {failure}")})
        raise


def _train_in_process(experiment: Experiment, dataset: ClipDataset, parent: str) -> None:
    """Trains in this process, which saves the seconds that a worker group and Ray Train's reports take."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_STOP_TIMEOUT_S)
    tags = {"data.fingerprint": dataset.fingerprint}
    with locked_run(experiment, dataset, searched_fields=experiment.search.space) as lock:
        last_metrics = checkpoint_selection.last_metrics(experiment)
        if last_metrics:  # the driver may have stopped before it recorded this report
            tune.report(last_metrics)
        watcher = RunLockWatcher(experiment.run_dir, lock.holder)
        with open_run(experiment, parent=parent, tags=tags) as tracker:
            report_fn = functools.partial(_report, experiment, watcher)
            train_loop.run(experiment, dataset, tracker, _select_device(), report_fn, lock_watcher=watcher)


class _GenerationFinished(SystemExit):
    """Leaves the training loop at the end of a generation, as Ray Tune does when it stops a trial."""


def _train_generation(
    experiment: Experiment,
    study_experiment: Experiment,
    dataset: ClipDataset,
    parent: str,
    stop_epoch: int,
    exploit_from: Sequence[int] | None,
) -> None:
    """Trains a trial of a population in this process, up to the end of a generation.

    Only fields in `search.space` may differ from the values the run started with.

    Args:
        experiment: The trial's experiment.
        study_experiment: The experiment of the study.
        dataset: The clips of the study.
        parent: Folder of the run that MLflow shows the trial under.
        stop_epoch: The last epoch of the generation.
        exploit_from: (epoch, trial) of the checkpoint to copy first, or None.
    """
    tags = {"data.fingerprint": dataset.fingerprint}
    space = study_experiment.search.space
    with (
        locked_run(experiment, dataset, (*MUTABLE_FIELDS, *space), space) as lock,
        contextlib.suppress(_GenerationFinished),
    ):
        watcher = RunLockWatcher(experiment.run_dir, lock.holder)
        if exploit_from:
            source_epoch, source_number = exploit_from
            source = override(experiment, {"name": trial_name(source_number)})
            checkpoints.copy_checkpoint_from(experiment, source, source_epoch)
        last_metrics = checkpoint_selection.last_metrics(experiment)
        if last_metrics and last_metrics["epoch"] == stop_epoch:  # the driver stopped before it recorded this report
            tune.report(last_metrics)
            if stop_epoch < experiment.train.epochs:
                return
        with open_run(experiment, parent=parent, tags=tags) as tracker:
            fields = flatten(experiment)
            tracker.log_metrics({f"searched/{name}": fields[name] for name in space}, stop_epoch, "searched")
            report_fn = functools.partial(_report_generation, experiment, watcher, stop_epoch)
            train_loop.run(experiment, dataset, tracker, _select_device(), report_fn, lock_watcher=watcher)


def _select_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _report_generation(
    experiment: Experiment,
    watcher: RunLockWatcher,
    stop_epoch: int,
    metrics: dict[str, Any],
    make_snapshot: MakeSnapshot,
) -> None:
    _report(experiment, watcher, metrics, make_snapshot, _EXPLOITABLE_EPOCHS)
    if metrics.get("epoch") == stop_epoch < experiment.train.epochs:
        raise _GenerationFinished


def _report(
    experiment: Experiment,
    watcher: RunLockWatcher,
    metrics: dict[str, Any],
    make_snapshot: MakeSnapshot,
    kept_epochs: int = 0,
) -> None:
    """Writes a checkpoint, then reports: an epoch that was reported never has to run again.

    Keeps the latest checkpoint, and those of the last `kept_epochs` epochs.
    """
    assert make_snapshot
    make_snapshot().write(*filesystem_of(checkpoints.new_checkpoint_path(experiment)), watcher.check)
    checkpoint_selection.remove_older(experiment, kept_epochs)
    if "epoch" in metrics:
        tune.report(metrics)
