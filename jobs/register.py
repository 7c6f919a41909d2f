"""Registers a run's best model in MLflow: python jobs/register.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import REGISTER, run_job

if __name__ == "__main__":
    run_job(REGISTER)
