"""jobs/train_cvae.py for test_chaos.py: a checkpoint takes `SAVE_S`, and rank 0 lists its steps in `steps.txt`."""

import time
from pathlib import Path
from typing import Any

import ray

from giffy_ray import cli
from giffy_ray.cluster import resources
from giffy_ray.config import Experiment, from_yaml
from giffy_ray.core import distributed
from giffy_ray.data.prepare import prepare
from giffy_ray.training import trainer
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.throughput import ThroughputMonitor
from giffy_ray.training.train_loop import train_loop

SAVE_S, STEP_S = 5.0, 0.05  # longer than Ray's 3 s between SIGTERM and SIGKILL; long enough to count steps


def slow_loop(settings: dict[str, Any]) -> None:
    """Runs in a worker, which receives this function by value. A line: step, number of workers, node of rank 0."""
    save, add = Snapshot.save, ThroughputMonitor.add
    steps = Path(from_yaml(settings["experiment"].get_secret_value()).storage, "steps.txt")

    def save_slowly(self: Snapshot, *settings: Any) -> None:
        time.sleep(SAVE_S)
        save(self, *settings)

    def add_and_list(self: ThroughputMonitor, step: int, *rest: Any) -> None:
        time.sleep(STEP_S)
        if distributed.rank() == 0:
            with steps.open("a") as file:
                file.write(f"{step} {distributed.world_size()} {ray.get_runtime_context().get_node_id()}\n")
        add(self, step, *rest)

    Snapshot.save, ThroughputMonitor.add = save_slowly, add_and_list  # type: ignore[method-assign]
    train_loop(settings)


def main(experiment: Experiment) -> None:
    share, store = resources.resources_for(experiment), prepare(experiment)
    trainer.train_loop = slow_loop
    trainer.train(experiment, store, share)


if __name__ == "__main__":
    cli.run(main, __doc__, Path("tests/tiny.yaml"))
