"""What an MLflow server that is away costs a training: benchmarks/tracking.py [--rounds N] [--seconds S]

The demo's CVAE on two clips a step, in this process, with what is logged of a training and far more often: losses with
each step, an animation every fifty, the machine every ten seconds. In each round the server, a real one, is there for S
seconds and then killed for S seconds. When it is back, all that was logged has to be there once.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from giffy_ray.cluster.local import free_port
from giffy_ray.config import load, override
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.tracker import Tracker, open_run
from giffy_ray.training import learners

EXPERIMENT = Path(__file__).parent.parent / "jobs" / "experiments" / "demo.yaml"
ANIMATION_EVERY = 50  # steps
Steps = list[tuple[float, float]]
PICTURE = b"\0" * 300_000  # bytes, about those of an animation


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--seconds", type=float, default=60)
    asked = words.parse_args()
    torch.set_num_threads(1)  # the server, and what sends to it, have the other core
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        changes = {
            "storage": folder,
            "name": "run",
            "train.global_batch_size": 2,
            "cluster.workers": 1,
            "tracking.uri": f"http://127.0.0.1:{port}",
        }
        experiment = override(load(EXPERIMENT), changes)
        training = Training(experiment)
        backend, files = f"sqlite:///{folder}/server.db", ["--artifacts-destination", f"{folder}/artifacts"]
        there, away = [], []
        tracker = None
        for _ in range(asked.rounds):
            with mlflow_server(backend, port, files) as server:
                if tracker is None:
                    tracker = open_run(experiment)
                    tracker.sample(1, 0)
                    training.steps(tracker, 5)  # the first ones are not those of a training
                tracker.flush()
                there.append(training.steps(tracker, asked.seconds))
                server.end(signal.SIGKILL)
                away.append(training.steps(tracker, asked.seconds))
        assert tracker
        with mlflow_server(backend, port, files) as server:
            tracker.finish()
            print_out(there, away, training.logged, server.address, tracker.run_id)


class Training:
    def __init__(self, experiment):
        self.learner = learners.build(experiment, torch.device("cpu"), steps=10**6)
        clip, self.batch = experiment.clip, experiment.train.global_batch_size
        self.clips = torch.randint(0, 256, (self.batch, clip.frames, clip.height, clip.width, 3), dtype=torch.uint8)
        self.times = torch.linspace(0, 1, clip.frames).expand(self.batch, -1)
        self.step, self.logged = 0, dict[int, float]()

    def steps(self, tracker: Tracker, seconds: float) -> Steps:
        """Milliseconds of each step in so many seconds, and those that it waited for what was logged."""
        took_ms, end_s = [], time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            positions = torch.arange(self.step * self.batch, (self.step + 1) * self.batch)
            losses = self.learner.update(self.clips, self.times, positions)
            self.step += 1
            self.logged[self.step] = float(losses["loss"])
            computed_s = time.perf_counter()
            tracker.log_metrics({"train/loss": self.logged[self.step]}, self.step)
            if self.step % ANIMATION_EVERY == 0:
                tracker.log_animation(lambda: PICTURE, "validation", self.step)
            now_s = time.perf_counter()
            took_ms.append((1000 * (now_s - began_s), 1000 * (now_s - computed_s)))
        return took_ms


def print_out(there: list[Steps], away: list[Steps], logged: dict[int, float], address: str, run_id: str) -> None:
    title = "demo.yaml, two clips a step, one core; medians"
    table = Table("MLflow's server", "step, ms, by round", "all", "of it logging, ms", title=title)
    for name, rounds in (("there", there), ("killed", away)):
        every = [one for each in rounds for one in each]
        by_round = ", ".join(f"{median(each):.1f}" for each in rounds)
        table.add_row(name, by_round, f"{median(every):.1f}", f"{median(every, 1):.2f}")
    Console().print(table)
    ratios = [median(killed) / median(up) for up, killed in zip(there, away, strict=True)]
    said = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"killed over there, by round: {said}; in the middle {statistics.median(ratios):.3f}")
    history = MlflowClient(address).get_metric_history(run_id, "train/loss")
    same = {one.step: one.value for one in history} == logged and len(history) == len(logged)
    print(f"{len(logged)} losses were logged, {len(history)} are there, {'the same' if same else 'NOT the same'}")


def median(steps: Steps, part: int = 0) -> float:
    return statistics.median(step[part] for step in steps)


if __name__ == "__main__":
    main()
