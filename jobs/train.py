"""Trains a model: python jobs/train.py [EXPERIMENT.yaml] [section.field=value ...]

Evaluates the checkpoint with the best validation score against the baselines, and registers it in MLflow. Started again
with the same name=..., an interrupted run resumes from its last checkpoint.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.train_and_evaluate, __doc__, _DEFAULT, check=workflows.check_training)
