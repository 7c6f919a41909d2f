"""Trains a conditional VAE: python jobs/train_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

Started again with the same name=..., a run goes on from its last checkpoint.
"""

from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.tracking.tracker import check_tracking
    from giffy_ray.workflows import train_and_show

    share = resources.resources_for(experiment)
    check_tracking(experiment)
    store = prepare(experiment)
    train_and_show(experiment, store, share)


def check(experiment: Experiment) -> None:
    from giffy_ray.evaluation.report import check_evaluation
    from giffy_ray.training.trainer import check_experiment

    check_experiment(experiment)
    check_evaluation(experiment)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", check=check)
