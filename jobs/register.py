"""Registers a run's best model in MLflow: python jobs/register.py [EXPERIMENT.yaml] [name=... storage=...]

Every training registers its model when it ends. Run this job if the registry was unavailable then, or to register the
model under another name (tracking.model=...). It registers the checkpoint with the best validation, which becomes
models:/giffy_ray@champion if it scores better than the current champion on the same clips.
"""

from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here because torch is slow to import: mistakes in the experiment are reported before.
    from giffy_ray.inference import registration

    print(registration.register(experiment))


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "between.yaml", needs_data=False)
