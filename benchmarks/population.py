"""Measures the overhead of a turn in population-based training: what Ray Tune and the study take for a generation.

    PYTHONPATH=. python benchmarks/population.py [--trials 50] [--epochs 20]

The trials train nothing: each turn only reports a value. Prints the milliseconds per turn for every hundred turns,
which should not grow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import load
from giffy_ray.tuning import tuner
from giffy_ray.tuning.population import Population

BLOCK_TURNS = 100


def report_only(config: dict[str, Any], **_study: Any) -> None:
    """Replaces `run_trial`."""
    epoch = config["stop_epoch"]
    tune.report({"epoch": epoch, "val/l2_paper": abs(config["values"]["optim.lr"] - 0.01) + 1 / epoch})


def measure_turns(folder: Path, trials: int, epochs: int) -> list[float]:
    """Runs a study. Returns the time of the end of each turn, in seconds."""
    (folder / "runs" / "study").mkdir(parents=True)
    fields = ["search.sampler=pbt", f"search.trials={trials}", f"search.epochs={epochs}", f"storage={folder}/runs"]
    experiment = load(None, ["search.space={optim.lr: {log_uniform: [1e-3, 0.5]}}", "name=study", *fields])
    ends_s: list[float] = []
    end_turn = Population.end

    def record_end(population: Population, number: int, failure: str = "") -> None:
        end_turn(population, number, failure)
        ends_s.append(time.perf_counter())

    Population.end, tuner.run_trial = record_end, report_only
    dataset: Any = SimpleNamespace(location=str(folder / "set"))
    lock: Any = SimpleNamespace(lost_reason="", holder="benchmark", check=lambda: None)
    tuner.run_trials(experiment, dataset, WorkerResources(1, 0, 2), "", [], lock)
    return ends_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="giffy_ray-", ignore_cleanup_errors=True) as name:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 2**20,
            _temp_dir=f"{name}/ray",
        )
        ends_s = measure_turns(Path(name), arguments.trials, arguments.epochs)
        ray.shutdown()
    print(f"{'turns':>12}  ms per turn")
    for first in range(0, len(ends_s) - 1, BLOCK_TURNS):
        block_s = ends_s[first : first + BLOCK_TURNS + 1]
        turns = len(block_s) - 1
        print(f"{first + 1:5} to {first + turns:4}  {(block_s[-1] - block_s[0]) / turns * 1000:.0f}")


if __name__ == "__main__":
    main()
