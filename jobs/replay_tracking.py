"""Sends MLflow what it did not take while it was away: python jobs/replay_tracking.py [EXPERIMENT.yaml] [name=...]

Of the run of that name, and of all runs below its folder: the trials of a search. Exit code 1 where some still waits.
"""

import sys
from pathlib import Path

from giffy_ray import command
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray import tracking

    if tracking.replay(experiment):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", needs_data=False)
