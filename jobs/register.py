"""Registers a run's best model in MLflow: python jobs/register.py [EXPERIMENT.yaml] [name=... storage=...]

Every training does so at its end; this is for when the registry was away, or for another name (tracking.model=...).
Of the checkpoint with the best validation. It becomes models:/giffy_ray@champion where it is better, on the same clips,
than the one that is.
"""

from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.inference import registration

    print(registration.register(experiment))


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "between.yaml", needs_data=False)
