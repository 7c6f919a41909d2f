"""Takes out of a run what makes clips: python jobs/publish.py [EXPERIMENT.yaml] [name=... storage=...]

Of the checkpoint with the best validation, or of the newest where none was validated: the weights, and of the
experiment the fields that make clips (clip, model, train.seed). The folder that is written, published/NAME in a
local `storage`, is a checkpoint that evaluate.runs and train.init_from take.
"""

import functools
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.storage import is_local


def main(experiment: Experiment) -> None:
    if not is_local(experiment.storage):
        raise ConfigError(f"storage: publishing writes into a local folder (value {experiment.storage!r})")
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.training import checkpoints

    folder = Path(experiment.storage, "published", experiment.name)
    choose = functools.partial(checkpoints.select, experiment)  # a training may be running
    location, _ = checkpoints.read_chosen(choose, lambda chosen: checkpoints.export_weights(chosen, folder))
    print(f"publishing {checkpoints.describe(location)}")
    print(folder)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "between.yaml", needs_data=False)
