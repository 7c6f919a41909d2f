"""Sends undelivered events to MLflow: python jobs/replay_tracking.py [EXPERIMENT] [section.field=value ...]"""

from giffy_ray.cli.jobs import REPLAY_TRACKING, run_job

if __name__ == "__main__":
    run_job(REPLAY_TRACKING)
