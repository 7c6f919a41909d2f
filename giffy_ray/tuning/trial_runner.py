"""One trial of a search, as Ray Tune's actor runs it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.cluster.shared_storage import storage_problem
from giffy_ray.config import Experiment, flatten, from_yaml, override
from giffy_ray.core.run_lock import RunLockWatcher
from giffy_ray.core.storage import filesystem_of, join, redact_credentials
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.tracking.tracker import open_run, tracking_uri
from giffy_ray.training import checkpoints, train_loop
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.trainer import MAY_CHANGE, locked_run, train
from giffy_ray.tuning.search_space import Values

Take = Callable[[], Snapshot] | None  # of what is reported, where it is to be kept
FAILED = "failed"  # what a trial reports instead of a metric: why it ended
# A trial that is ended leaves its loop at the next report, and its actor is used again if that takes no longer.
_LEAVE_S = 60


def name_of(number: int) -> str:
    return f"trial-{number:04}"


def experiment_of(study: Experiment, number: int, values: Values) -> Experiment:
    """The training that a trial is: in the study's folder, under its number, with its values."""
    changes = {
        "name": name_of(number),
        "storage": join(study.storage, study.name),
        "tracking.uri": tracking_uri(study),
        "train.epochs": study.search.epochs,
        "cluster.workers": study.search.workers,
    }
    return override(study, changes | values)


def trial(
    config: dict[str, Any], study: str, store: str, share: WorkerResources, parent: str, token: str | None = None
) -> None:
    """`config`: {"number", "values"}, of a population also {"until", "take"}.

    A failure is reported, then raised: it ends this trial and its process. The next trial gets a new process, as an
    error of CUDA stays in the one that it came up in.
    """
    os.chdir(os.environ["TUNE_ORIG_WORKING_DIR"])  # which train.init_from may be a path from
    whole = from_yaml(study)
    problem = storage_problem(whole, token)
    if problem:
        raise RuntimeError(problem)  # of this node, not of the values: the trial is tried again, on any node
    experiment = experiment_of(whole, config["number"], config["values"])
    clips = functools.partial(ClipDataset, store, experiment.data.node_cache_gb)
    try:
        if experiment.cluster.max_workers > 1:
            train(experiment, clips(), share, parent, [TuneReportCallback()], whole.search.space)
        elif "until" in config:
            _turn(experiment, whole, clips(), parent, config["until"], config["take"])
        else:
            _alone(experiment, clips(), parent)
    except Exception as failure:
        tune.report({FAILED: redact_credentials(f"{type(failure).__name__}: {failure}")})
        raise


def _alone(experiment: Experiment, store: ClipDataset, parent: str) -> None:
    """The training in this process: neither a worker group nor Ray Train's reports, which take seconds."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_LEAVE_S)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tags = {"data.fingerprint": store.fingerprint}
    with locked_run(experiment, store, searched=experiment.search.space) as lease:
        done = checkpoints.last_metrics(experiment)
        if done:  # it may have been cut before the search took it down
            tune.report(done)
        watch = RunLockWatcher(experiment.run_dir, lease.holder)
        with open_run(experiment, parent=parent, tags=tags) as tracker:
            tell = functools.partial(_report, experiment, watch)
            train_loop.run(experiment, store, tracker, device, tell, watch=watch)


class _TurnIsOver(SystemExit):
    """As a trial that Ray Tune ends leaves its loop."""


def _turn(
    experiment: Experiment, study: Experiment, store: ClipDataset, parent: str, until: int, take: tuple[int, int] | None
) -> None:
    """The training of one of a population, up to epoch `until`. `take`: (epoch, number) of whose weights it goes on.

    Of what a run was started with, only the fields of `search.space` may be others by now.
    """
    tags = {"data.fingerprint": store.fingerprint}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space = study.search.space
    with locked_run(experiment, store, (*MAY_CHANGE, *space), space) as lease, contextlib.suppress(_TurnIsOver):
        watch = RunLockWatcher(experiment.run_dir, lease.holder)
        if take:
            checkpoints.copy_checkpoint_from(experiment, override(experiment, {"name": name_of(take[1])}), take[0])
        done = checkpoints.last_metrics(experiment)
        if done and done["epoch"] == until:  # it was cut before the search took it down
            tune.report(done)
            if until < experiment.train.epochs:
                return
        with open_run(experiment, parent=parent, tags=tags) as tracker:
            values = flatten(experiment)
            tracker.log_metrics({f"searched/{name}": values[name] for name in study.search.space}, until, "searched")
            tell = functools.partial(_report_turn, experiment, watch, until)
            train_loop.run(experiment, store, tracker, device, tell, watch=watch)


def _report_turn(experiment: Experiment, watch: RunLockWatcher, until: int, named: dict[str, Any], take: Take) -> None:
    _report(experiment, watch, named, take, epochs=2)  # others may still take over the one before
    if named.get("epoch") == until < experiment.train.epochs:
        raise _TurnIsOver


def _report(experiment: Experiment, watch: RunLockWatcher, named: dict[str, Any], take: Take, epochs: int = 0) -> None:
    """The checkpoint first: what was reported need not be done again. Only the newest is kept, and of `epochs`."""
    assert take
    take().write(*filesystem_of(checkpoints.place_of_new(experiment)), watch.check)
    checkpoints.remove_older(experiment, epochs)
    if "epoch" in named:
        tune.report(named)
