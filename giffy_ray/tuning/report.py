"""What a search ends with: the table of its trials and study.html."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core import media
from giffy_ray.core.storage import join, redact_credentials, write_bytes
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.evaluator import (
    REAL,
)
from giffy_ray.evaluation.report import _log_files, _typical
from giffy_ray.evaluation.tables import (
    WIDTH,
)
from giffy_ray.models.sampling import learner_method
from giffy_ray.tracking.tracker import Tracker
from giffy_ray.training import checkpoints
from giffy_ray.tuning.html_report import ClipStrip, render_study
from giffy_ray.tuning.tables import trials_table
from giffy_ray.tuning.tuner import Study, experiment_of

_MOST_TRIALS, _MOST_CLIPS = 5, 6  # of a search, and of each of these, that its page shows


def show_search(study: Experiment, found: Study, store: ClipDataset, tracker: Tracker) -> None:
    """A search's trials as a table, and as `study.html` in its folder and in MLflow: plots, and clips of the best."""
    print(found.stop_reason)
    Console(width=WIDTH).print(trials_table(found, study.search))
    rows = np.asarray(_typical(store, store.split_indices("validation"))[:_MOST_CLIPS])
    ids = [store.ids[row] for row in rows]
    real = torch.from_numpy(store.get_clips(rows))
    reels = [ClipStrip(REAL, tuple(media.sprite(clip) for clip in real.numpy()))]
    best = {trial.number for trial in found.best}
    others = [trial for trial in found.trials if trial.number not in best and not trial.ended]
    for trial in [*found.best, *others][:_MOST_TRIALS]:
        try:
            location = checkpoints.select(experiment_of(study, trial.number, trial.values))
            learner, trained = checkpoints.load(location)
        except ConfigError as error:  # it was removed since; the others are shown
            reels.append(ClipStrip(trial.name, (), redact_credentials(str(error))))
            continue
        made = learner_method(learner, trained.train.seed)(real[:, 0], real[:, -1], ids)
        reels.append(ClipStrip(trial.name, tuple(media.sprite(clip) for clip in made.numpy())))
    files = {"study.html": render_study(study, found, store.clip, ids, reels)}
    write_bytes(join(study.storage, study.name, "study.html"), files["study.html"])
    print(f"  {join(study.storage, study.name, 'study.html')}")
    _log_files(files, [tracker])
