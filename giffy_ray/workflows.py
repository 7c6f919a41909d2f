"""What is shown at the end of a job: tables, CSV, pictures, a page; on the terminal, in the storage, in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from rich.console import Console

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import Experiment
from giffy_ray.core import run_lock
from giffy_ray.data import prune
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.report import TrainedModel, check_evaluation, log_data_set, show_results
from giffy_ray.evaluation.tables import (
    WIDTH,
    count_of,
    removals_table,
)
from giffy_ray.inference import registration
from giffy_ray.tracking.tracker import Tracker, open_run
from giffy_ray.training import checkpoints
from giffy_ray.training.progress_callback import format_epoch, relay_metrics
from giffy_ray.training.trainer import train

_log = logging.getLogger(__name__)


def prune_storage(experiment: Experiment, dry_run: bool) -> None:
    """Removes from the storage what the experiment's videos do not need, and prints what; `dry_run`: only prints it."""
    found = prune.plan(experiment)
    Console(width=WIDTH).print(removals_table(found.removals, experiment.storage, dry_run))
    for reason in found.kept:
        print(f"kept: {reason}")
    if not dry_run:
        for removal in found.removals:
            removal.remove()


def train_and_show(
    experiment: Experiment, store: ClipDataset, share: WorkerResources, parent: Tracker | None = None
) -> None:
    """Trains, then shows the trained model beside linear interpolation on the validation clips, and registers it.

    It is the checkpoint with the best validation in both cases. Everything goes to the training's own MLflow run, and
    to `parent`, the search that it belongs to, which goes on.
    """
    check_evaluation(experiment, store)
    clips, asked = len(store.split_indices("training")), experiment.cluster
    workers = (
        str(asked.max_workers)
        if asked.min_workers == asked.max_workers
        else f"{asked.min_workers} to {asked.max_workers}"
    )
    held_out = len(store.split_indices("validation"))
    validated = count_of(min(held_out, experiment.train.validate_clips), held_out)
    print(f"training {experiment.name}: {clips} clips, {workers} workers; validation: {validated} clips", flush=True)

    def show(metrics: Mapping[str, Any]) -> None:
        if "epoch" in metrics:  # and not only a checkpoint
            print(format_epoch(metrics, experiment.train.epochs), flush=True)

    try:
        with relay_metrics(show) as relay:
            train(experiment, store, share, parent.place if parent else None, [relay])
    except ray.train.TrainingFailedError:
        try:
            with (
                run_lock.run_lock(experiment.run_dir),
                open_run(experiment) as tracker,
            ):  # workers that were killed have not said so
                tracker.finish("FAILED")
        except Exception as failure:  # must not hide why the training failed
            _log.warning("MLflow was not told that %r has failed (%r)", experiment.name, failure)
        raise
    with run_lock.run_lock(experiment.run_dir):  # the training's is over, and another one would write to the same run
        checkpoint = checkpoints.select(experiment)
        print(f"evaluating {checkpoints.describe(checkpoint)}", flush=True)
        trained = TrainedModel(experiment.model.kind, *checkpoints.load(checkpoint))
        with open_run(experiment) as tracker:
            if parent is None:
                log_data_set(store, [tracker])
            show_results(experiment, [trained], store, [tracker, *([parent] if parent else [])])
        registration.try_register(experiment)
