"""Renders the built-in data set: python jobs/make_dataset.py [EXPERIMENT.yaml] [data.synthetic.training_clips=400 ...]

Real mp4 files in the layout of Moments in Time, below the experiment's storage. Every job does this on first use;
here it is done alone, to look at the videos or to use them elsewhere.
"""

import time
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment


def main(experiment: Experiment) -> None:
    if experiment.data.root is not None:
        raise ConfigError(f"data.root: is for videos that are there already (value {experiment.data.root!r})")
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import catalog_of

    resources.check_folders(experiment)

    began_s = time.perf_counter()
    catalog = catalog_of(experiment)
    took_s = time.perf_counter() - began_s
    rate = 60 * len(catalog.videos) / took_s
    print(f"{len(catalog.videos)} videos in {took_s:.0f} s ({rate:.0f} a minute): {catalog.root}")


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml")
