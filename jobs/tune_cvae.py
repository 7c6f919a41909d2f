"""Tunes a conditional VAE: python jobs/tune_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

The same as jobs/tune.py, with demo.yaml as the default experiment.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.tune, __doc__, _DEFAULT, check=workflows.check_tuning, flags=workflows.TUNE_FLAGS)
