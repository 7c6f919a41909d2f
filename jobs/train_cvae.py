"""Trains a conditional VAE: python jobs/train_cvae.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import TRAIN, run_job
from giffy_ray.core.packaged import packaged_path

if __name__ == "__main__":
    run_job(TRAIN, experiment=packaged_path("experiments", "demo"))
