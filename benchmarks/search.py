"""What a search finds, and what a trial costs beside its training: benchmarks/search.py [--seeds N] [--trials N]

First the cost, on a CVAE so small that training it is nothing: searches of trials one after the other, with one report
each and with many. Then searches of jobs/experiments/demo.yaml, by TPE and at random, which take turns over seeds. The
best trial of each, and the one with the report's values (the first of every search), make the test clips, which no
search has seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from giffy_ray.cluster import resources
from giffy_ray.config import Experiment, load
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.evaluation import metrics
from giffy_ray.models.sampling import learner_method
from giffy_ray.tracking.tracker import open_run
from giffy_ray.training import checkpoints
from giffy_ray.tuning import tuner

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
MANY = 21  # reports of a trial


def searched(experiment: Experiment, store: ClipDataset, share: resources.WorkerResources) -> tuner.Study:
    with open_run(experiment) as parent:
        found = tuner.search(experiment, store, share, parent.place, tuner.initial_points(experiment))
        parent.finish()
    return found


def seconds_of_trials(storage: str, trials: int) -> tuple[float, float]:
    """Seconds of a trial that trains for next to nothing, and of each further report, with a checkpoint.

    One trial at a time; what the first of a search takes longer, while its process starts, is part of the mean.
    """
    taken_s = {}
    for epochs in (1, MANY):
        words = [f"storage={storage}", f"name=cost-{epochs}", f"search.trials={trials}", f"search.epochs={epochs}"]
        words += ["search.asha=false", "data.synthetic.training_clips=4", "data.synthetic.validation_clips=1"]
        experiment = load(TINY, [*words, "cluster.workers=1"])
        store = prepare(experiment)
        began_s = time.perf_counter()
        searched(experiment, store, resources.WorkerResources(1.0, 0, 1))
        taken_s[epochs] = (time.perf_counter() - began_s) / trials
    return taken_s[1], (taken_s[MANY] - taken_s[1]) / (MANY - 1)


def l2_of(trial: Experiment, store: ClipDataset) -> float:
    """On the test clips: the mean distance, in the report's unit."""
    learner, _ = checkpoints.load(checkpoints.latest_checkpoint(trial))
    make, distances = learner_method(learner, trial.train.seed), []
    for rows in np.array_split(store.split_indices("test"), 10):
        real = torch.from_numpy(store.get_clips(rows))
        made = make(real[:, 0], real[:, -1], [store.ids[row] for row in rows])
        distances += metrics.l2_paper(made, real).tolist()
    return statistics.mean(distances)


def compared(storage: str, seeds: int, trials: int) -> Table:
    table = Table(title=f"l2 on test clips, {trials} trials; minutes of two cores", title_justify="left")
    for heading in ("seed", "report's values", "TPE", "minutes", "at random", "minutes"):
        table.add_column(heading, justify="right")
    columns: list[list[float]] = []
    for seed in range(seeds):
        row = []
        for sampler in ("tpe", "random"):
            words = [f"storage={storage}", f"name={sampler}-{seed}", f"search.sampler={sampler}", f"search.seed={seed}"]
            words += [f"search.trials={trials}", "data.synthetic.test_clips=20"]
            experiment = load(ROOT / "jobs" / "experiments" / "demo.yaml", words)
            store = prepare(experiment)
            began_s = time.perf_counter()
            found = searched(experiment, store, resources.trial_resources_for(experiment))
            minutes = (time.perf_counter() - began_s) / 60
            report = next(trial for trial in found.trials if trial.number == 0)
            l2s = [
                l2_of(tuner.experiment_of(experiment, trial.number, trial.values), store)
                for trial in (report, found.best[0])
            ]
            row += [*l2s[len(row) > 0 :], minutes]
            print(f"seed {seed}, {sampler}: report {l2s[0]:.1f}, best {l2s[1]:.1f}, {minutes:.1f} min", flush=True)
        columns.append(row)
        table.add_row(str(seed), *(f"{value:.1f}" for value in row))
    table.add_row("mean", *(f"{statistics.mean(values):.1f}" for values in zip(*columns, strict=True)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    words = parser.parse_args()
    resources.connect()
    with tempfile.TemporaryDirectory() as storage:
        trial_s, report_s = seconds_of_trials(storage, 6)
        print(
            f"a trial beside its training: {trial_s:.1f} s; a report, with validation and checkpoint: {report_s:.3f} s"
        )
        Console(width=100).print(compared(storage, words.seeds, words.trials))


if __name__ == "__main__":
    main()
