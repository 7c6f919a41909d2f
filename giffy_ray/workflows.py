"""The work of the jobs: prepare a dataset, train, evaluate, tune, publish.

Call `giffy_ray.cluster.resources.connect` first: all functions but the checks and `prune_storage` need a Ray cluster.
Functions import torch, Ray and MLflow themselves, so that a job reports a mistake in its experiment within a second.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giffy_ray.config import ConfigError, Experiment, from_yaml, override, to_minimal_yaml
from giffy_ray.core.packaged import packaged_path
from giffy_ray.core.storage import is_local, join, read_text, write_text

if TYPE_CHECKING:
    from giffy_ray.cluster.placement import WorkerResources
    from giffy_ray.data.clip_dataset import ClipDataset
    from giffy_ray.models.sampling import TrainedModel
    from giffy_ray.tracking.tracker import Tracker

PREPARE_FLAGS = {
    "prune": "remove from `storage` what this experiment's videos do not need",
    "dry_run": "with --prune: only list what would be removed",
}
TUNE_FLAGS = {"compare_published": "evaluate the published model `between` too"}
_log = logging.getLogger(__name__)


def render_dataset(experiment: Experiment) -> None:
    """Renders the built-in dataset and prints its location.

    Raises:
        ConfigError: `data.root` names other videos.
    """
    if experiment.data.root is not None:
        raise ConfigError(
            f"data.root: the built-in dataset is rendered only with data.root=null (value {experiment.data.root!r})"
        )
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import load_catalog

    resources.check_folders(experiment)
    start_s = time.perf_counter()
    catalog = load_catalog(experiment)
    elapsed_s = time.perf_counter() - start_s
    videos = len(catalog.videos)
    print(f"{videos} videos in {elapsed_s:.0f} s ({60 * videos / elapsed_s:.0f} a minute): {catalog.root}")


def prepare_dataset(experiment: Experiment, *, prune: bool = False, dry_run: bool = False) -> None:
    """Decodes a dataset, verifies what is cached, and prints and draws what it contains.

    Videos that were rejected for a possibly transient reason are decoded again.

    Args:
        experiment: The experiment; its `data` and `clip` sections define the dataset.
        prune: Decode nothing; remove from `storage` what the experiment's videos do not need.
        dry_run: With `prune`: only list what would be removed.

    Raises:
        ConfigError: The videos cannot be read, or too many are rejected.
    """
    if dry_run and not prune:
        raise ConfigError("--dry-run: has an effect only with --prune; use --prune --dry-run")
    if prune:
        prune_storage(experiment, dry_run)
        return
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import report_dataset

    resources.check_folders(experiment)
    report_dataset(prepare(experiment, again=True))


def prune_storage(experiment: Experiment, dry_run: bool = False) -> None:
    """Removes from `storage` what the experiment's videos do not need, and prints a table of it.

    Args:
        experiment: The experiment whose videos stay.
        dry_run: Only print the table.
    """
    from rich.console import Console

    from giffy_ray.data import prune
    from giffy_ray.evaluation.tables import TABLE_WIDTH, removals_table

    plan = prune.plan(experiment)
    Console(width=TABLE_WIDTH).print(removals_table(plan.removals, experiment.storage, dry_run))
    for reason in plan.kept_reasons:
        print(f"kept: {reason}")
    if not dry_run:
        for removal in plan.removals:
            removal.remove()


def check_training(experiment: Experiment) -> None:
    """Checks what `train_and_evaluate` can check without a cluster and clips.

    Raises:
        ConfigError: The training or its evaluation cannot run.
    """
    from giffy_ray.training.trainer import check_experiment

    check_experiment(experiment)
    check_evaluation(experiment)


def check_evaluation(experiment: Experiment, dataset: ClipDataset | None = None) -> None:
    """Checks what an evaluation can check without a cluster, and with the dataset that its split has clips.

    Raises:
        ConfigError: The evaluation cannot run.
    """
    from giffy_ray.evaluation import report

    report.check_evaluation(experiment, dataset)


def train_and_evaluate(
    experiment: Experiment,
    *,
    dataset: ClipDataset | None = None,
    worker_resources: WorkerResources | None = None,
    parent: Tracker | None = None,
    compare_with: Sequence[TrainedModel] = (),
) -> None:
    """Trains a model or resumes its run, evaluates the best checkpoint against the baselines, and registers it.

    Args:
        experiment: The training; its name identifies the run.
        dataset: The clips. None prepares the experiment's dataset.
        worker_resources: CPUs and GPUs of each worker. None divides the cluster.
        parent: MLflow run of the search that the training belongs to. It logs the evaluation too and stays open.
        compare_with: More models to evaluate.

    Raises:
        ConfigError: The training or its evaluation cannot run. Nothing has started.
        ray.train.TrainingFailedError: The workers failed more than `cluster.max_failures` times.
        SystemExit: The training stopped after a signal and saved a checkpoint.
    """
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.tracking.tracker import check_tracking

    if worker_resources is None:
        worker_resources = resources.resources_for(experiment)
    if dataset is None:
        check_tracking(experiment)
        dataset = prepare(experiment)
    check_evaluation(experiment, dataset)
    _print_training_summary(experiment, dataset)
    _train(experiment, dataset, worker_resources, parent)
    _evaluate_and_register(experiment, dataset, parent, compare_with)


def _print_training_summary(experiment: Experiment, dataset: ClipDataset) -> None:
    from giffy_ray.evaluation.tables import format_count

    cluster = experiment.cluster
    workers = str(cluster.max_workers)
    if cluster.min_workers < cluster.max_workers:
        workers = f"{cluster.min_workers} to {cluster.max_workers}"
    clips = len(dataset.split_indices("training"))
    held_out = len(dataset.split_indices("validation"))
    validated = format_count(min(held_out, experiment.train.validate_clips), held_out)
    print(f"training {experiment.name}: {clips} clips, {workers} workers; validation: {validated} clips", flush=True)


def _train(
    experiment: Experiment, dataset: ClipDataset, worker_resources: WorkerResources, parent: Tracker | None
) -> None:
    """Trains and prints a line per validation. Marks the MLflow run as failed if Ray Train gives up."""
    from ray.train import TrainingFailedError

    from giffy_ray.training.progress_callback import format_epoch, relay_metrics
    from giffy_ray.training.trainer import train

    def print_epoch(metrics: Mapping[str, Any]) -> None:
        if "epoch" in metrics:  # not for a checkpoint without validation
            print(format_epoch(metrics, experiment.train.epochs), flush=True)

    try:
        with relay_metrics(print_epoch) as callback:
            train(experiment, dataset, worker_resources, parent.run_dir if parent else None, [callback])
    except TrainingFailedError:
        _mark_failed(experiment)
        raise


def _mark_failed(experiment: Experiment) -> None:
    """Sets the status of the MLflow run, because killed workers could not."""
    from giffy_ray.core.run_lock import run_lock
    from giffy_ray.tracking.tracker import open_run

    try:
        with run_lock(experiment.run_dir), open_run(experiment) as tracker:
            tracker.finish("FAILED")
    except Exception as failure:  # must not hide why the training failed
        _log.warning("could not mark run %r as FAILED in MLflow (%r)", experiment.name, failure)


def _evaluate_and_register(
    experiment: Experiment, dataset: ClipDataset, parent: Tracker | None, compare_with: Sequence[TrainedModel]
) -> None:
    from giffy_ray.core.run_lock import run_lock
    from giffy_ray.evaluation.report import log_dataset_report, report_evaluation
    from giffy_ray.inference import registration
    from giffy_ray.models.sampling import TrainedModel
    from giffy_ray.tracking.tracker import open_run
    from giffy_ray.training import checkpoint_format, checkpoint_selection

    # The training has released its lock; another one must not write to the same run.
    with run_lock(experiment.run_dir):
        checkpoint = checkpoint_selection.select_checkpoint(experiment)
        print(f"evaluating {checkpoint_selection.describe_checkpoint(checkpoint)}", flush=True)
        trained = TrainedModel(experiment.model.kind, *checkpoint_format.load_learner(checkpoint))
        with open_run(experiment) as tracker:
            trackers = [tracker]
            if parent is None:
                log_dataset_report(dataset, trackers)
            else:
                trackers.append(parent)
            report_evaluation(experiment, [trained, *compare_with], dataset, trackers)
        registration.try_register(experiment)


def evaluate(experiment: Experiment) -> None:
    """Compares the runs of `evaluate.runs`, or the experiment's own run, with each other and with the baselines.

    Writes tables and pictures to the experiment's folder, and to an MLflow run of their own.

    Raises:
        ConfigError: A run does not exist, or its model cannot generate the experiment's clips.
    """
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import report_evaluation
    from giffy_ray.inference.loading import load_trained_models
    from giffy_ray.tracking.tracker import check_tracking, open_evaluation

    resources.resources_for(experiment)
    check_tracking(experiment)
    runs = load_trained_models(experiment, experiment.clip)
    dataset = prepare(experiment)
    with open_evaluation(experiment) as tracker:
        report_evaluation(experiment, runs, dataset, [tracker])


def experiment_of_run(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Returns the experiment of the run `name` with the overrides applied, or `experiment` if there is no such run.

    Raises:
        ConfigError: The overrides set no name, so the results would replace those of the default run.
    """
    if not any(assignment.startswith("name=") for assignment in overrides):
        raise ConfigError(
            "nothing to evaluate: give an experiment, name=RUN to evaluate a run with its own experiment, or "
            "evaluate.runs=[a, b] with name=NAME for the results; see --help"
        )
    text = read_text(join(experiment.run_dir, "experiment.yaml"))
    if text is None:
        return experiment
    return override(from_yaml(text, overrides), {"storage": experiment.storage})


def publish(experiment: Experiment) -> None:
    """Exports the run's best checkpoint to published/NAME in a local `storage`, and prints the folder.

    Raises:
        ConfigError: The storage is a bucket, or the run has no checkpoint.
    """
    if not is_local(experiment.storage):
        raise ConfigError(
            f"storage: publishing needs a local folder; download the run first (value {experiment.storage!r})"
        )
    from giffy_ray.training import checkpoint_format, checkpoint_selection

    folder = Path(experiment.storage, "published", experiment.name)
    select = functools.partial(checkpoint_selection.select_checkpoint, experiment)
    checkpoint_dir, _ = checkpoint_selection.select_and_read(
        select, lambda selected: checkpoint_format.export_weights(selected, folder)
    )
    print(f"published {checkpoint_selection.describe_checkpoint(checkpoint_dir)}")
    print(folder)


def register(experiment: Experiment) -> None:
    """Registers the run's best model in MLflow, and prints its version."""
    from giffy_ray.inference import registration

    print(registration.register(experiment))


def replay_tracking(experiment: Experiment) -> None:
    """Sends MLflow the events of a run that it has not received.

    Raises:
        SystemExit: MLflow still does not have all of them.
    """
    from giffy_ray.core import run_lock
    from giffy_ray.tracking import tracker

    with run_lock.run_lock(experiment.run_dir):  # a running job sends its own events
        undelivered = tracker.replay(experiment)
    if undelivered:
        sys.exit(1)


def check_tuning(experiment: Experiment) -> None:
    """Checks what `tune` can check without a cluster and clips.

    Raises:
        ConfigError: The search, a trial, the training of the best trial or its evaluation cannot run.
    """
    from giffy_ray.tuning import tuner

    tuner.check_search(experiment)
    tuner.check_trainings(experiment)
    check_evaluation(experiment)


def tune(experiment: Experiment, *, compare_published: bool = False) -> None:
    """Searches hyperparameters or resumes the search, then trains and evaluates the best configuration.

    Writes the best configuration to `best.yaml` in the search's folder. MLflow shows its training below the search.

    Args:
        experiment: The experiment; its `search` section defines the search.
        compare_published: Evaluate the published model `between` too.

    Raises:
        ConfigError: The search or its evaluation cannot run. Nothing has started.
        RuntimeError: No trial completed successfully.
    """
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import log_dataset_report
    from giffy_ray.tracking.tracker import check_tracking, open_run
    from giffy_ray.tuning import tuner
    from giffy_ray.tuning.report import show_search

    study_experiment = tuner.resolve_study(experiment)
    check_tracking(study_experiment)
    worker_resources = resources.resources_for(study_experiment)
    trial_resources = resources.trial_resources_for(study_experiment)
    points = tuner.initial_points(study_experiment)  # rejects an invalid space before anything is decoded
    dataset = prepare(study_experiment)
    check_evaluation(experiment, dataset)
    compare_with = [_load_published_model(experiment, dataset)] if compare_published else []

    with tuner.lock_study(study_experiment, dataset) as lock, open_run(study_experiment) as parent:
        log_dataset_report(dataset, [parent])
        trials = tuner.max_trials(study_experiment)
        print(
            f"searching {study_experiment.name}: {trials} trials, {trial_resources.max_concurrent} at a time",
            flush=True,
        )
        study = tuner.run_trials(study_experiment, dataset, trial_resources, parent.run_dir, points, lock, parent)
        parent.close_children()
        show_search(study_experiment, study, dataset, parent)

        best = tuner.refit_experiment(experiment, study_experiment, study)
        best_file = join(study_experiment.storage, study_experiment.name, "best.yaml")
        write_text(best_file, to_minimal_yaml(best))
        parent.log_text(to_minimal_yaml(best), "best.yaml")
        print(f"the best trial is {study.best[0].name}: {best_file}")
        train_and_evaluate(
            best, dataset=dataset, worker_resources=worker_resources, parent=parent, compare_with=compare_with
        )


def _load_published_model(experiment: Experiment, dataset: ClipDataset) -> TrainedModel:
    """Loads the published `between`, which generates clips of the dataset's size and length."""
    from giffy_ray.inference.loading import load_trained_models

    comparison = override(experiment, {"evaluate.runs": (str(packaged_path("models", "between")),)})
    (model,) = load_trained_models(comparison, dataset.clip)
    return model._replace(name="published between")  # the trained model may be a `between` too
