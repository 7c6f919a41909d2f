"""Searches for a better CGAN, then trains it: python jobs/tune_cgan.py [EXPERIMENT.yaml] [section.field=value ...]

As tune_cvae.py does.
"""

from pathlib import Path

from tune_cvae import check, main  # every model is searched by the same job

from giffy_ray import cli

if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "cgan-demo.yaml", check=check)
