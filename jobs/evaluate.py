"""Compares trained runs with baselines: python jobs/evaluate.py [EXPERIMENT.yaml] [name=... evaluate.runs=[a, b]]

Without evaluate.runs it is the run of the experiment's `storage` and `name`; of each run the checkpoint with the
best validation is used, or the newest where none was validated.
What is given with a slash, such as published/between or s3://bucket/checkpoint, is where a checkpoint lies. Writes
evaluation.csv, one row per method and clip, evaluation.html, in which all clips play side by side, a contact sheet and
an animation into the experiment's folder and into an MLflow run of its own, NAME-evaluation, under that of the run.
"""

from pathlib import Path

from giffy_ray import cluster, command
from giffy_ray.config import Experiment
from giffy_ray.data.prepare import prepare
from giffy_ray.results import show_results, trained_runs
from giffy_ray.tracking import check_tracking, open_evaluation


def main(experiment: Experiment) -> None:
    cluster.share_of(experiment)
    check_tracking(experiment)
    runs = trained_runs(experiment, experiment.clip)
    store = prepare(experiment)
    with open_evaluation(experiment) as tracker:
        show_results(experiment, runs, store, [tracker])


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml")
