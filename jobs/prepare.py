"""Decodes a data set and shows what is in it: python jobs/prepare.py [EXPERIMENT.yaml] [data.root=... ...]

Every job does this on its first use of a data set. Here it is done alone, before a cluster with GPUs is paid for; what
is stored is checked against its checksums, and videos that were rejected for a passing reason are tried once more.
"""

from pathlib import Path

from giffy_ray import command
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray import cluster
    from giffy_ray.data.prepare import prepare
    from giffy_ray.results import show_data_set

    cluster.check_folders(experiment)
    show_data_set(prepare(experiment, again=True))


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml")
