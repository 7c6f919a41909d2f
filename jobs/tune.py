"""Tunes hyperparameters: python jobs/tune.py [EXPERIMENT.yaml] [section.field=value ...]

Searches the `search` section's space, trains the best configuration to completion and evaluates it. MLflow shows the
trials and the final training below the search. Started again, an interrupted search resumes; --resume=never starts a
new search, and --resume=must fails if there is none to resume.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.tune, __doc__, _DEFAULT, check=workflows.check_tuning, flags=workflows.TUNE_FLAGS)
