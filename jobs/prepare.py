"""Decodes a data set and shows what is in it: python jobs/prepare.py [EXPERIMENT.yaml] [data.root=... ...]

Every job does this on its first use of a data set. Here it is done alone, before a cluster with GPUs is paid for; what
is stored is checked against its checksums, and videos that were rejected for a passing reason are tried once more.

With --prune nothing is decoded. It removes what this experiment's videos do not need from `storage`: stores of other
decode settings, sets and shards of other videos, built-in videos of other settings, and what killed jobs left. What a
training that is running uses stays. --prune --dry-run only lists it.
"""

from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment

FLAGS = {
    "prune": "remove from `storage` what this experiment's videos do not need",
    "dry_run": "with --prune: only list what would be removed",
}


def main(experiment: Experiment, prune: bool = False, dry_run: bool = False) -> None:
    if dry_run and not prune:
        raise ConfigError("--dry-run: lists what --prune removes; give --prune --dry-run")
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import show_data_set
    from giffy_ray.workflows import prune_storage

    if prune:
        prune_storage(experiment, dry_run)
        return
    resources.check_folders(experiment)
    show_data_set(prepare(experiment, again=True))


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", flags=FLAGS)
