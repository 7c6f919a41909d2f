"""Compares trained runs with the baselines: python jobs/evaluate.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import EVALUATE, run_job

if __name__ == "__main__":
    run_job(EVALUATE)
