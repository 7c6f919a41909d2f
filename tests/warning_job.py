"""A job whose driver has credentials in its environment and whose workers warn.

tests/core/test_messages.py submits it."""

import logging
import os
import sys

import ray
from ray import tune

from giffy_ray.cluster import resources
from giffy_ray.core.messages import redact_output
from giffy_ray.tuning.tuner import withhold_credentials


def warn(source: str) -> None:
    print(f"{source} prints", file=sys.stderr)
    logging.getLogger("ray.data").warning("%s has noise", source)
    log = logging.getLogger("giffy_ray.training.checkpoint_selection")
    log.info("%s informs", source)
    log.warning(
        "%s warns of s3://me:%s@bucket\nand continues", source, os.environ.get("AWS_SECRET_ACCESS_KEY", "nothing")
    )
    log.warning("all warn")


def main() -> None:
    redact_output()
    # Joined, so that this file, which Ray stores, does not contain the value itself.
    os.environ["AWS_SECRET_ACCESS_KEY"] = "-".join(["of", "the", "driver"])
    resources.connect()
    ray.get(ray.remote(warn).options(num_cpus=0).remote("a task"))
    future = ray.remote(lambda: os.environ.get("AWS_SECRET_ACCESS_KEY")).options(num_cpus=0).remote()
    print("forwarded:", ray.get(future) == os.environ["AWS_SECRET_ACCESS_KEY"])
    warn("the driver")
    withhold_credentials()
    tune.Tuner(
        tune.with_resources(lambda config: warn("a trial"), {"CPU": 0.1}),
        run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0),
    ).fit()


if __name__ == "__main__":
    main()
