"""Prepares a dataset: python jobs/prepare.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import PREPARE, run_job

if __name__ == "__main__":
    run_job(PREPARE)
