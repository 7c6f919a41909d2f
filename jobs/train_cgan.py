"""Trains a conditional GAN: python jobs/train_cgan.py [EXPERIMENT.yaml] [section.field=value ...]

Started again with the same name=..., a run goes on from its last checkpoint.
"""

from pathlib import Path

from train_cvae import check, main  # every model is trained by the same job

from giffy_ray import cli

if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "cgan-demo.yaml", check=check)
