"""Sends undelivered events to MLflow: python jobs/replay_tracking.py [EXPERIMENT.yaml] [name=RUN]

Sends the events of a run, and of the trials below it, that MLflow has not received or has refused; fix the cause of
refusals first. Exits with 1 if MLflow still does not have all of them. Fails while a job writes to the run.
"""

import sys
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Deferred imports: they load only after the experiment is validated.
    from giffy_ray.core import run_lock
    from giffy_ray.tracking import tracker

    with run_lock.run_lock(experiment.run_dir):  # a running job sends its own events
        undelivered = tracker.replay(experiment)
    if undelivered:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", needs_data=False)
