"""Compares a trained run with interpolation: python jobs/evaluate.py [EXPERIMENT.yaml] [name=... evaluate.split=...]

The run is found by the experiment's `storage` and `name`; its newest checkpoint is used. Writes evaluation.csv, one
row per method and clip, a contact sheet and an animation into the run's folder and into its MLflow run.
"""

from pathlib import Path

from giffy_ray import checkpoints, cluster, command
from giffy_ray.config import Experiment
from giffy_ray.data.prepare import prepare
from giffy_ray.results import show_results
from giffy_ray.tracking import open_run


def main(experiment: Experiment) -> None:
    cluster.share_of(experiment)
    learner, trained = checkpoints.load(checkpoints.newest(experiment))
    tracker = open_run(experiment)
    show_results(trained, learner, prepare(experiment), experiment.evaluate.split, [tracker])
    tracker.finish()


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml")
