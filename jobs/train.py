"""Trains a model: python jobs/train.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import TRAIN, run_job

if __name__ == "__main__":
    run_job(TRAIN)
