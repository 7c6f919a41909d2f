"""The outputs of a finished study: a table of its trials, and the page study.html."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core import media
from giffy_ray.core.storage import join, redact_credentials, write_bytes
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.evaluator import REAL
from giffy_ray.evaluation.report import log_files, select_typical_clips
from giffy_ray.evaluation.tables import TABLE_WIDTH
from giffy_ray.models.sampling import LearnerMethod
from giffy_ray.tracking.tracker import Tracker
from giffy_ray.training import checkpoint_format, checkpoint_selection
from giffy_ray.tuning.html_report import ClipStrip, render_study
from giffy_ray.tuning.tables import trials_table
from giffy_ray.tuning.tuner import Study, trial_experiment

_MAX_TRIALS = 5  # that the page shows clips of
_MAX_CLIPS = 6  # of each of these trials


def show_search(experiment: Experiment, study: Study, dataset: ClipDataset, tracker: Tracker) -> None:
    """Prints the table of trials, and saves study.html in the study's folder and in MLflow.

    Args:
        experiment: The experiment of the study.
        study: The result of the study.
        dataset: The clips of the study; validation clips are shown.
        tracker: MLflow run of the study.
    """
    print(f"study ended: {study.stop_reason}")
    Console(width=TABLE_WIDTH).print(trials_table(study, experiment.search))
    indices = np.asarray(select_typical_clips(dataset, dataset.split_indices("validation"))[:_MAX_CLIPS])
    clip_ids = [dataset.ids[index] for index in indices]
    target = torch.from_numpy(dataset.get_clips(indices))
    strips = _generate_strips(experiment, study, target, clip_ids)
    page = render_study(experiment, study, dataset.clip, clip_ids, strips)
    path = join(experiment.run_dir, "study.html")
    write_bytes(path, page)
    print(f"  {path}")
    log_files({"study.html": page}, [tracker])


def _generate_strips(
    experiment: Experiment, study: Study, target: torch.Tensor, clip_ids: list[str]
) -> list[ClipStrip]:
    """Returns the target clips, then the clips that each of the best trials generates from their endpoints."""
    strips = [ClipStrip(REAL, tuple(media.encode_sprite(clip) for clip in target.numpy()))]
    best = {trial.number for trial in study.best}
    others = [trial for trial in study.trials if trial.number not in best and not trial.failure]
    for trial in [*study.best, *others][:_MAX_TRIALS]:
        try:
            checkpoint = checkpoint_selection.select_checkpoint(
                trial_experiment(experiment, trial.number, trial.values)
            )
            learner, trained_experiment = checkpoint_format.load_learner(checkpoint)
        except ConfigError as error:  # the checkpoint has been deleted since
            strips.append(ClipStrip(trial.name, (), redact_credentials(str(error))))
            continue
        method = LearnerMethod(learner, trained_experiment.train.seed)
        generated = method(target[:, 0], target[:, -1], clip_ids)
        strips.append(ClipStrip(trial.name, tuple(media.encode_sprite(clip) for clip in generated.numpy())))
    return strips
