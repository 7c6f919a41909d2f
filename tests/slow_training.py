"""jobs/train.py for test_chaos.py, with slow checkpoints and steps. Rank 0 lists its steps in `steps.txt`."""

import time
from pathlib import Path
from typing import Any

import ray

from giffy_ray.cli.jobs import Job, run_job
from giffy_ray.cluster import resources
from giffy_ray.config import Experiment, from_yaml
from giffy_ray.core import distributed
from giffy_ray.data.prepare import prepare
from giffy_ray.training import trainer
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.throughput import ThroughputMonitor
from giffy_ray.training.train_loop import train_loop_per_worker

CHECKPOINT_S = 5.0  # longer than Ray's 3 s between SIGTERM and SIGKILL
STEP_S = 0.05  # long enough to count steps


def slow_train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Runs in a worker, which receives this function by value.

    Writes a line for each step: its number, the number of workers, and the node of rank 0.
    """
    save, add_step = Snapshot.save, ThroughputMonitor.add_step
    steps_file = Path(from_yaml(settings["experiment"].get_secret_value()).storage, "steps.txt")

    def save_slowly(self: Snapshot, *args: Any) -> None:
        time.sleep(CHECKPOINT_S)
        save(self, *args)

    def add_step_slowly(self: ThroughputMonitor, step: int, *args: Any) -> None:
        time.sleep(STEP_S)
        if distributed.rank() == 0:
            with steps_file.open("a") as file:
                file.write(f"{step} {distributed.world_size()} {ray.get_runtime_context().get_node_id()}\n")
        add_step(self, step, *args)

    Snapshot.save = save_slowly  # type: ignore[method-assign]
    ThroughputMonitor.add_step = add_step_slowly  # type: ignore[method-assign]
    train_loop_per_worker(settings)


def main(experiment: Experiment) -> None:
    worker_resources, dataset = resources.resources_for(experiment), prepare(experiment)
    trainer.train_loop_per_worker = slow_train_loop_per_worker
    trainer.train(experiment, dataset, worker_resources)


if __name__ == "__main__":
    run_job(Job(main, __doc__, experiment=Path("tests/tiny.yaml")))
