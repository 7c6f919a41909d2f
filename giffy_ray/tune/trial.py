"""One trial of a search, as Ray Tune's actor runs it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from giffy_ray import checkpoints, loop
from giffy_ray.checkpoints import Snapshot
from giffy_ray.cluster import Share
from giffy_ray.config import Experiment, from_yaml, override
from giffy_ray.data.store import Store
from giffy_ray.storage import filesystem_of, join
from giffy_ray.tracking import open_run, tracking_uri
from giffy_ray.train import claimed, train
from giffy_ray.tune.space import Values

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


def trial(config: dict[str, Any], study: str, store: str, share: Share, parent: str) -> None:
    """`config`: {"number", "values"}. What goes wrong is reported, and ends this trial alone."""
    experiment = experiment_of(from_yaml(study), config["number"], config["values"])
    try:
        if experiment.cluster.most > 1:
            train(experiment, Store(store), share, parent, [TuneReportCallback()])
        else:
            _alone(experiment, Store(store), parent)
    except Exception as failure:
        tune.report({FAILED: f"{type(failure).__name__}: {failure}"})


def _alone(experiment: Experiment, store: Store, parent: str) -> None:
    """The training in this process: neither a worker group nor Ray Train's reports, which take seconds."""
    done = checkpoints.reported(experiment)
    if done:  # it may have been cut before the search took it down
        tune.report(done)
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_LEAVE_S)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tags = {"data.fingerprint": store.fingerprint}
    with claimed(experiment, store), open_run(experiment, parent=parent, tags=tags) as tracker:
        loop.run(experiment, store, tracker, device, functools.partial(_report, experiment))


def _report(experiment: Experiment, named: dict[str, Any], take: Callable[[], Snapshot] | None) -> None:
    """The checkpoint first: what was reported need not be done again. Only the newest is kept."""
    assert take
    folder = join(experiment.storage, experiment.name)
    filesystem, place = filesystem_of(join(folder, f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"))
    take().write(filesystem, place)
    checkpoints.remove_older(experiment)
    if "epoch" in named:
        tune.report(named)
