"""Sends MLflow what it did not take or refused: python jobs/replay_tracking.py [EXPERIMENT.yaml] [name=...]

Of the run of that name, and of all runs below its folder: the trials of a search. What was refused is sent again, for
when the cause is fixed. Exit code 1 while MLflow does not have all of it. Refused while a job writes to the run.
"""

import sys
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.core import run_lock
    from giffy_ray.tracking import tracker

    with run_lock.run_lock(experiment.run_dir):  # a run that is still trained sends its own
        left = tracker.replay(experiment)
    if left:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", needs_data=False)
