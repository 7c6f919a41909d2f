"""Tunes hyperparameters: python jobs/tune.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import TUNE, run_job

if __name__ == "__main__":
    run_job(TUNE)
