"""Measures the overhead of a trial, and compares TPE with random sampling.

    PYTHONPATH=. python benchmarks/search.py [--seeds N] [--trials N]

The overhead is measured on a CVAE whose training takes next to no time: its trials run one after the other, first with
one report each, then with many. The comparison alternates between searches of the experiment `demo` by TPE and by
random sampling. Their best trials, and the trial with the paper's values (the first of every search), are evaluated on
test clips, which no search uses.
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
from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import Experiment, load
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.evaluation import metrics
from giffy_ray.models.sampling import LearnerMethod
from giffy_ray.tracking.tracker import open_run
from giffy_ray.training import checkpoint_format, checkpoint_selection
from giffy_ray.tuning import tuner
from giffy_ray.tuning.tuner import Study, Trial

ROOT = Path(__file__).parent.parent
TINY_EXPERIMENT = ROOT / "tests" / "tiny.yaml"
DEMO_EXPERIMENT = ROOT / "giffy_ray" / "experiments" / "demo.yaml"
MANY_EPOCHS = 21  # reports of a trial
OVERHEAD_TRIALS = 6
TEST_BATCHES = 10


def run_search(experiment: Experiment, dataset: ClipDataset, worker_resources: WorkerResources) -> Study:
    with open_run(experiment) as parent:
        points = tuner.initial_points(experiment)
        study = tuner.search(experiment, dataset, worker_resources, parent.run_dir, points)
        parent.finish()
    return study


def measure_overhead_s(storage: str, trials: int) -> tuple[float, float]:
    """Returns the seconds of a trial with one report, and of each further report with its checkpoint.

    The mean includes the start of the process, which the first trial of a search waits for.
    """
    trial_s = {}
    for epochs in (1, MANY_EPOCHS):
        overrides = [
            f"storage={storage}",
            f"name=cost-{epochs}",
            f"search.trials={trials}",
            f"search.epochs={epochs}",
            "search.asha=false",
            "data.synthetic.training_clips=4",
            "data.synthetic.validation_clips=1",
            "cluster.workers=1",
        ]
        experiment = load(TINY_EXPERIMENT, overrides)
        dataset = prepare(experiment)
        start_s = time.perf_counter()
        run_search(experiment, dataset, WorkerResources(1.0, 0, 1))
        trial_s[epochs] = (time.perf_counter() - start_s) / trials
    return trial_s[1], (trial_s[MANY_EPOCHS] - trial_s[1]) / (MANY_EPOCHS - 1)


def measure_test_l2(experiment: Experiment, trial: Trial, dataset: ClipDataset) -> float:
    """Returns a trial's mean l2 distance on the test clips, in the paper's unit."""
    trial_experiment = tuner.trial_experiment(experiment, trial.number, trial.values)
    checkpoint = checkpoint_selection.latest_checkpoint(trial_experiment)
    learner, _ = checkpoint_format.load_learner(checkpoint)
    method = LearnerMethod(learner, trial_experiment.train.seed)
    distances: list[float] = []
    for indices in np.array_split(dataset.split_indices("test"), TEST_BATCHES):
        target = torch.from_numpy(dataset.get_clips(indices))
        generated = method(target[:, 0], target[:, -1], [dataset.ids[index] for index in indices])
        distances += metrics.l2_paper(generated, target).tolist()
    return statistics.mean(distances)


def compare_samplers(storage: str, seeds: int, trials: int) -> Table:
    table = Table(title=f"l2 on test clips, {trials} trials per search", title_justify="left")
    for heading in ("seed", "paper's values", "TPE", "minutes", "random", "minutes"):
        table.add_column(heading, justify="right")
    rows: list[list[float]] = []
    for seed in range(seeds):
        row: list[float] = []
        for sampler in ("tpe", "random"):
            overrides = [
                f"storage={storage}",
                f"name={sampler}-{seed}",
                f"search.sampler={sampler}",
                f"search.seed={seed}",
                f"search.trials={trials}",
                "data.synthetic.test_clips=20",
            ]
            experiment = load(DEMO_EXPERIMENT, overrides)
            dataset = prepare(experiment)
            start_s = time.perf_counter()
            study = run_search(experiment, dataset, resources.trial_resources_for(experiment))
            minutes = (time.perf_counter() - start_s) / 60
            paper_trial = next(trial for trial in study.trials if trial.number == 0)
            paper_l2 = measure_test_l2(experiment, paper_trial, dataset)
            best_l2 = measure_test_l2(experiment, study.best[0], dataset)
            if not row:  # both samplers start with the same trial
                row.append(paper_l2)
            row += [best_l2, minutes]
            print(f"seed {seed}, {sampler}: paper {paper_l2:.1f}, best {best_l2:.1f}, {minutes:.1f} min", flush=True)
        rows.append(row)
        table.add_row(str(seed), *(f"{value:.1f}" for value in row))
    table.add_row("mean", *(f"{statistics.mean(column):.1f}" for column in zip(*rows, strict=True)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="searches per sampler")
    parser.add_argument("--trials", type=int, default=12, help="trials per search")
    arguments = parser.parse_args()
    resources.connect()
    with tempfile.TemporaryDirectory() as storage:
        trial_s, report_s = measure_overhead_s(storage, OVERHEAD_TRIALS)
        print(f"overhead of a trial: {trial_s:.1f} s; of a report, with validation and checkpoint: {report_s:.3f} s")
        Console(width=100).print(compare_samplers(storage, arguments.seeds, arguments.trials))


if __name__ == "__main__":
    main()
