"""Exports a run's trained model: python jobs/publish.py [EXPERIMENT.yaml] [name=... storage=...]

Exports the checkpoint with the best validation, or the newest if none was validated. The export holds the weights and
the config fields that determine the generated clips (clip, model, train.seed). It is written to published/NAME in a
local `storage`. evaluate.runs and train.init_from accept this folder.
"""

import functools
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.storage import is_local


def main(experiment: Experiment) -> None:
    if not is_local(experiment.storage):
        raise ConfigError(
            f"storage: publishing needs a local folder; download the run first (value {experiment.storage!r})"
        )
    # Imported here because torch is slow to import: mistakes in the experiment are reported before.
    from giffy_ray.training import checkpoint_format, checkpoint_selection

    folder = Path(experiment.storage, "published", experiment.name)
    select = functools.partial(checkpoint_selection.select_checkpoint, experiment)
    checkpoint_dir, _ = checkpoint_selection.select_and_read(
        select, lambda selected: checkpoint_format.export_weights(selected, folder)
    )
    print(f"published {checkpoint_selection.describe_checkpoint(checkpoint_dir)}")
    print(folder)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "between.yaml", needs_data=False)
