"""Clips a second of an evaluation, before and now, and whether the figures are equal.

    python benchmarks/evaluate.py [RUN] [--clips 200] [--samples 8] [--actors 2] [--storage FOLDER]

before: one process with all cores; SSIM by torchmetrics, a call of the network for each sample, the whole of what
FFmpeg makes. now: the same in one process, in one actor, and in --actors actors. Prints seconds and clips a second of
each, without the time that actors take to start, and the largest differences between the figures. RUN is where a
checkpoint lies, published/between without. On the built-in clips.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import numpy as np
import ray
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from giffy_ray.cluster.resources import MALLOC_ENV
from giffy_ray.config import Experiment, override
from giffy_ray.core.tensor_types import Clips, PerClip, to_floats
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.loader import map_rows
from giffy_ray.data.prepare import prepare
from giffy_ray.evaluation import evaluator
from giffy_ray.evaluation.evaluator import BATCH, Evaluated, Score
from giffy_ray.evaluation.report import MakeEvaluator, TrainedModel, methods_of
from giffy_ray.models import baselines
from giffy_ray.models.sampling import Method
from giffy_ray.training import checkpoints


def ssim_by_torchmetrics(made: Clips, real: Clips) -> PerClip:
    ours, theirs = (to_floats(clips[:, 1:-1].flatten(0, 1)) for clips in (made, real))
    each = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(each, Tensor)
    return each.view(len(made), -1).mean(1).double()


def make_one_by_one(methods: dict[str, list[Method]], real: Clips, clip_ids: list[str]) -> dict[Method, Clips]:
    distinct = dict.fromkeys(method for several in methods.values() for method in several)
    return {method: method(real[:, 0], real[:, -1], clip_ids) for method in distinct}


def score_before(experiment: Experiment, run: TrainedModel, store: ClipDataset, rows: np.ndarray) -> list[Score]:
    """As the driver did it before there were actors."""
    with (
        mock.patch.object(evaluator, "_make", make_one_by_one),
        mock.patch.dict(evaluator._METRICS, {"ssim": ssim_by_torchmetrics}),
        mock.patch.object(baselines, "itertools", mock.Mock(islice=lambda frames, count: frames)),
    ):
        return evaluator.evaluate(methods_of(experiment, [run], store.clip), store, rows, store.sources)


class Warm:
    """Makes the mapper, and has it work once on a batch that does not count."""

    def __init__(self, make: MakeEvaluator, rows: np.ndarray):
        self.make, self.rows = make, rows

    def __call__(self) -> Timed:
        evaluator = self.make()
        evaluator(self.rows)
        return Timed(evaluator)


class Timed:
    def __init__(self, evaluator: evaluator.Evaluator):
        self.evaluator = evaluator

    def __call__(self, rows: np.ndarray) -> tuple[Evaluated, int, float, float]:
        began_s = time.time()
        done = self.evaluator(rows)
        return done, os.getpid(), began_s, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="published/between")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--storage")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        ray.init(
            address="local",
            num_cpus=asked.actors,
            include_dashboard=False,
            _temp_dir=folder,
            logging_level=logging.ERROR,
        )
        learner, trained = checkpoints.load(asked.run)
        synthetic = {"training_clips": 1, "validation_clips": -(-asked.clips // 2)}
        experiment = override(
            trained,
            {f"data.synthetic.{name}": value for name, value in synthetic.items()}
            | {"storage": asked.storage or f"{folder}/runs", "name": "benchmark", "evaluate.samples": asked.samples},
        )
        store = prepare(experiment)
        rows = store.split_indices("validation")[: asked.clips]
        run = TrainedModel("between", learner, trained)
        make = MakeEvaluator(experiment, (run,), store, frozenset(), frozenset())

        began_s = time.perf_counter()
        before = score_before(experiment, run, store, rows)
        seconds = [time.perf_counter() - began_s]
        print(f"before: {seconds[0]:.1f} s, {len(rows) / seconds[0]:.2f} clips a second", flush=True)
        for actors in dict.fromkeys((0, 1, asked.actors)):
            scores, took_s = scores_now(make, rows, actors)
            seconds.append(took_s)
            where = f"{actors} actors" if actors else "this process"
            print(
                f"now, in {where}: {took_s:.1f} s, {len(rows) / took_s:.2f} clips a second, "
                f"{seconds[0] / took_s:.1f} times as many as before",
                flush=True,
            )
            print("   " + "; ".join(differences(before, scores)), flush=True)
        print(f"{asked.actors} actors are {seconds[-2] / seconds[-1]:.2f} times as fast as one")
        ray.shutdown()


def scores_now(make: MakeEvaluator, rows: np.ndarray, actors: int) -> tuple[list[Score], float]:
    """The scores, and the seconds that the actors work, as a mean over them: they do not start at the same moment."""
    resources = {"num_cpus": 1, "runtime_env": {"env_vars": MALLOC_ENV}}
    parts = list(
        map_rows(rows, Warm(make, rows[:2]), batch=BATCH, actors=actors, title="evaluating", resources=resources)
    )
    scores = [score for done, *_ in parts for score in done.scores]
    return scores, sum(end - began for _, _, began, end in parts) / len({process for _, process, *_ in parts})


def differences(before: list[Score], now: list[Score]) -> Iterator[str]:
    """Returns the largest relative difference of each column of the CSV, and how many of its values differ."""
    counts: Counter[str] = Counter()
    largest: dict[str, float] = defaultdict(float)
    for old, new in zip(before, now, strict=True):
        assert (old.method, old.clip_id) == (new.method, new.clip_id)
        for name in vars(old):
            a, b = getattr(old, name), getattr(new, name)
            if isinstance(a, float) and a != b and not (np.isnan(a) and np.isnan(b)):
                counts[name] += 1
                largest[name] = max(largest[name], abs(a - b) / max(abs(a), abs(b)))
    yield f"{len(now)} scores"
    for name, count in counts.items():
        yield f"{name}: {count} differ, by {largest[name]:.1e} at most"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
