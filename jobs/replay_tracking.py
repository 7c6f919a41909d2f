"""Sends MLflow what it did not take or refused: python jobs/replay_tracking.py [EXPERIMENT.yaml] [name=...]

Of the run of that name, and of all runs below its folder: the trials of a search. What was refused is sent again, for
when the cause is fixed. Exit code 1 while MLflow does not have all of it. Refused while a job writes to the run.
"""

import sys
from pathlib import Path

from giffy_ray import command
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray import lease, tracking

    with lease.held(experiment):  # a run that is still trained sends its own
        left = tracking.replay(experiment)
    if left:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", needs_data=False)
