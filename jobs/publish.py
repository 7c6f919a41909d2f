"""Exports a run's trained model: python jobs/publish.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import PUBLISH, run_job

if __name__ == "__main__":
    run_job(PUBLISH)
