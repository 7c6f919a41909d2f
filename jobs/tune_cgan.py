"""Tunes a conditional GAN: python jobs/tune_cgan.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import TUNE, run_job
from giffy_ray.core.packaged import packaged_path

if __name__ == "__main__":
    run_job(TUNE, experiment=packaged_path("experiments", "cgan-demo"))
