"""Measures how much an unreachable MLflow server slows down a training.

    PYTHONPATH=. python benchmarks/tracking.py [--rounds N] [--seconds S]

The demo's CVAE trains in this process on two clips per step. It logs what a training logs, but far more often: losses
at every step, an animation every fifty steps, and system metrics every ten seconds. In each round a real server runs
for S seconds, and the training continues for S seconds after the server was killed. After the last restart, MLflow must
have each value exactly once.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from giffy_ray.cluster.local import free_port
from giffy_ray.config import Experiment, load, override
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.tracker import Tracker, open_run
from giffy_ray.training import learners

EXPERIMENT = Path(__file__).parent.parent / "giffy_ray" / "experiments" / "demo.yaml"
BATCH_SIZE = 2
ANIMATION_EVERY_STEPS = 50
ANIMATION = b"\0" * 300_000  # about the size of a real one
WARMUP_S = 5


class StepTime(NamedTuple):
    total_ms: float
    logging_ms: float


class Training:
    """Trains on random clips and logs each step."""

    def __init__(self, experiment: Experiment):
        self.learner = learners.build(experiment, torch.device("cpu"), steps=10**6)
        clip = experiment.clip
        self.batch_size = experiment.train.global_batch_size
        shape = (self.batch_size, clip.frames, clip.height, clip.width, 3)
        self.clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.times = torch.linspace(0, 1, clip.frames).expand(self.batch_size, -1)
        self.step = 0
        self.logged_losses: dict[int, float] = {}

    def run(self, tracker: Tracker, duration_s: float) -> list[StepTime]:
        """Trains for `duration_s`. Returns the time of each step, and the part of it that logging takes."""
        step_times = []
        end_s = time.perf_counter() + duration_s
        while (start_s := time.perf_counter()) < end_s:
            sample_indices = torch.arange(self.step * self.batch_size, (self.step + 1) * self.batch_size)
            losses = self.learner.update(self.clips, self.times, sample_indices)
            self.step += 1
            self.logged_losses[self.step] = float(losses["loss"])
            computed_s = time.perf_counter()
            tracker.log_metrics({"train/loss": self.logged_losses[self.step]}, self.step)
            if self.step % ANIMATION_EVERY_STEPS == 0:
                tracker.log_animation(lambda: ANIMATION, "validation", self.step)
            logged_s = time.perf_counter()
            step_times.append(StepTime(1000 * (logged_s - start_s), 1000 * (logged_s - computed_s)))
        return step_times


def median_total_ms(step_times: Sequence[StepTime]) -> float:
    return statistics.median(step_time.total_ms for step_time in step_times)


def median_logging_ms(step_times: Sequence[StepTime]) -> float:
    return statistics.median(step_time.logging_ms for step_time in step_times)


def print_step_times(running_rounds: list[list[StepTime]], killed_rounds: list[list[StepTime]]) -> None:
    title = "demo.yaml, two clips per step, one core; medians"
    table = Table("MLflow server", "step, ms, by round", "all rounds", "of it logging, ms", title=title)
    for name, rounds in (("running", running_rounds), ("killed", killed_rounds)):
        step_times = [step_time for round_times in rounds for step_time in round_times]
        by_round = ", ".join(f"{median_total_ms(round_times):.1f}" for round_times in rounds)
        table.add_row(name, by_round, f"{median_total_ms(step_times):.1f}", f"{median_logging_ms(step_times):.2f}")
    Console().print(table)
    ratios = [
        median_total_ms(killed) / median_total_ms(running)
        for running, killed in zip(running_rounds, killed_rounds, strict=True)
    ]
    by_round = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"killed / running, by round: {by_round}; median {statistics.median(ratios):.3f}")


def print_completeness(logged_losses: dict[int, float], address: str, run_id: str) -> None:
    history = MlflowClient(address).get_metric_history(run_id, "train/loss")
    is_equal = {metric.step: metric.value for metric in history} == logged_losses and len(history) == len(logged_losses)
    verdict = "equal" if is_equal else "NOT equal"
    print(f"{len(logged_losses)} losses were logged, MLflow has {len(history)}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # leaves the other core to the server and to the uploader
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        overrides = {
            "storage": folder,
            "name": "run",
            "train.global_batch_size": BATCH_SIZE,
            "cluster.workers": 1,
            "tracking.uri": f"http://127.0.0.1:{port}",
        }
        experiment = override(load(EXPERIMENT), overrides)
        training = Training(experiment)
        database = f"sqlite:///{folder}/server.db"
        options = ["--artifacts-destination", f"{folder}/artifacts"]
        running_rounds: list[list[StepTime]] = []
        killed_rounds: list[list[StepTime]] = []
        tracker = None
        for _ in range(arguments.rounds):
            with mlflow_server(database, port, options) as server:
                if tracker is None:
                    tracker = open_run(experiment)
                    tracker.sample_system_metrics(1, 0)
                    training.run(tracker, WARMUP_S)
                tracker.flush()
                running_rounds.append(training.run(tracker, arguments.seconds))
                server.stop(signal.SIGKILL)
                killed_rounds.append(training.run(tracker, arguments.seconds))
        assert tracker
        with mlflow_server(database, port, options) as server:
            tracker.finish()
            print_step_times(running_rounds, killed_rounds)
            print_completeness(training.logged_losses, server.address, tracker.run_id)


if __name__ == "__main__":
    main()
