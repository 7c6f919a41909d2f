"""Tunes a conditional GAN: python jobs/tune_cgan.py [EXPERIMENT.yaml] [section.field=value ...]

The same as jobs/tune.py, with cgan-demo.yaml as the default experiment.
"""

from pathlib import Path

from giffy_ray import cli, workflows

_DEFAULT = Path(__file__).parent / "experiments" / "cgan-demo.yaml"

if __name__ == "__main__":
    cli.run(workflows.tune, __doc__, _DEFAULT, check=workflows.check_tuning, flags=workflows.TUNE_FLAGS)
