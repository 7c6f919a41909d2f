"""Renders the built-in dataset: python jobs/make_dataset.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import MAKE_DATASET, run_job

if __name__ == "__main__":
    run_job(MAKE_DATASET)
