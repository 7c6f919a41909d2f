"""Trains a conditional VAE: python jobs/train_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

Started again with the same name=..., a run goes on from its last checkpoint.
"""

from pathlib import Path

from giffy_ray import command
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray import cluster
    from giffy_ray.data.prepare import prepare
    from giffy_ray.results import train_and_show
    from giffy_ray.tracking import check_tracking

    share = cluster.share_of(experiment)
    check_tracking(experiment)
    store = prepare(experiment)
    train_and_show(experiment, store, share)


def check(experiment: Experiment) -> None:
    from giffy_ray.results import check_evaluation
    from giffy_ray.train import check_experiment

    check_experiment(experiment)
    check_evaluation(experiment)


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", check=check)
