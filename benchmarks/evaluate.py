"""Throughput of an evaluation compared with its first implementation, and whether both give the same scores.

    python benchmarks/evaluate.py [RUN] [--clips 200] [--samples 8] [--actors 2] [--storage FOLDER]

before: one process with all cores; torchmetrics' SSIM, one call of the network per sample, all frames from FFmpeg.
now: in the same process, in one actor, and in --actors actors.

Prints seconds and clips per second of each, excluding the start of actors, and the largest differences between scores.
RUN is the path of a checkpoint, published/between by default. Uses the built-in synthetic clips.
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
from giffy_ray.data.loader import map_batches_with_models
from giffy_ray.data.prepare import prepare
from giffy_ray.evaluation import evaluator
from giffy_ray.evaluation.evaluator import BATCH_SIZE, EvaluatedBatch, Score
from giffy_ray.evaluation.report import EvaluatorFactory, build_methods
from giffy_ray.models import baselines
from giffy_ray.models.sampling import Method, TrainedModel
from giffy_ray.training import checkpoint_format


def ssim_by_torchmetrics(generated: Clips, target: Clips) -> PerClip:
    generated_frames = to_floats(generated[:, 1:-1].flatten(0, 1))
    target_frames = to_floats(target[:, 1:-1].flatten(0, 1))
    per_frame = structural_similarity_index_measure(generated_frames, target_frames, data_range=1.0, reduction="none")
    assert isinstance(per_frame, Tensor)
    return per_frame.view(len(generated), -1).mean(1).double()


def generate_separately(methods: dict[str, list[Method]], target: Clips, clip_ids: list[str]) -> dict[Method, Clips]:
    distinct = dict.fromkeys(method for variants in methods.values() for method in variants)
    return {method: method(target[:, 0], target[:, -1], clip_ids) for method in distinct}


def score_before(experiment: Experiment, run: TrainedModel, dataset: ClipDataset, indices: np.ndarray) -> list[Score]:
    """Scores clips in the driver, as the first implementation did."""
    with (
        mock.patch.object(evaluator, "_generate_clips", generate_separately),
        mock.patch.dict(evaluator._METRICS, {"ssim": ssim_by_torchmetrics}),
        mock.patch.object(baselines, "itertools", mock.Mock(islice=lambda frames, count: frames)),
    ):
        methods = build_methods(experiment, [run], dataset.clip)
        return evaluator.evaluate(methods, dataset, indices, dataset.sources)


class WarmedUpFactory:
    """Builds an evaluator and runs it once on a batch that is not timed."""

    def __init__(self, make_evaluator: EvaluatorFactory, warmup_indices: np.ndarray):
        self.make_evaluator = make_evaluator
        self.warmup_indices = warmup_indices

    def __call__(self) -> TimedEvaluator:
        evaluator = self.make_evaluator()
        evaluator(self.warmup_indices)
        return TimedEvaluator(evaluator)


class TimedEvaluator:
    """Adds the process id, start time and end time to each result."""

    def __init__(self, evaluator: evaluator.Evaluator):
        self.evaluator = evaluator

    def __call__(self, indices: np.ndarray) -> tuple[EvaluatedBatch, int, float, float]:
        start_s = time.time()
        batch = self.evaluator(indices)
        return batch, os.getpid(), start_s, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="giffy_ray/pretrained/between")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--storage")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        ray.init(
            address="local",
            num_cpus=arguments.actors,
            include_dashboard=False,
            _temp_dir=folder,
            logging_level=logging.ERROR,
        )
        learner, trained = checkpoint_format.load_learner(arguments.run)
        synthetic = {"training_clips": 1, "validation_clips": -(-arguments.clips // 2)}
        experiment = override(
            trained,
            {f"data.synthetic.{name}": value for name, value in synthetic.items()}
            | {
                "storage": arguments.storage or f"{folder}/runs",
                "name": "benchmark",
                "evaluate.samples": arguments.samples,
            },
        )
        dataset = prepare(experiment)
        indices = dataset.split_indices("validation")[: arguments.clips]
        run = TrainedModel("between", learner, trained)
        make_evaluator = EvaluatorFactory(experiment, (run,), dataset, frozenset(), frozenset())

        start_s = time.perf_counter()
        scores_before = score_before(experiment, run, dataset, indices)
        durations_s = [time.perf_counter() - start_s]
        print(f"before: {durations_s[0]:.1f} s, {len(indices) / durations_s[0]:.2f} clips per second", flush=True)
        for actors in dict.fromkeys((0, 1, arguments.actors)):
            scores, duration_s = score_now(make_evaluator, indices, actors)
            durations_s.append(duration_s)
            place = f"{actors} actors" if actors else "this process"
            print(
                f"now, in {place}: {duration_s:.1f} s, {len(indices) / duration_s:.2f} clips per second, "
                f"{durations_s[0] / duration_s:.1f} times the throughput of before",
                flush=True,
            )
            print("   " + "; ".join(describe_differences(scores_before, scores)), flush=True)
        print(f"{arguments.actors} actors are {durations_s[-2] / durations_s[-1]:.2f} times as fast as one")
        ray.shutdown()


def score_now(make_evaluator: EvaluatorFactory, indices: np.ndarray, actors: int) -> tuple[list[Score], float]:
    """Returns the scores and the mean busy time of the actors, which do not start at the same moment."""
    resources = {"num_cpus": 1, "runtime_env": {"env_vars": MALLOC_ENV}}
    results = list(
        map_batches_with_models(
            indices,
            WarmedUpFactory(make_evaluator, indices[:2]),
            batch_size=BATCH_SIZE,
            actors=actors,
            title="evaluating",
            resources=resources,
        )
    )
    scores = [score for batch, *_ in results for score in batch.scores]
    busy_s = sum(end_s - start_s for _, _, start_s, end_s in results)
    return scores, busy_s / len({process for _, process, *_ in results})


def describe_differences(before: list[Score], now: list[Score]) -> Iterator[str]:
    """Yields, for each column of the CSV, the number of differing values and their largest relative difference."""
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
        yield f"{name}: {count} values differ, by at most {largest[name]:.1e}"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
