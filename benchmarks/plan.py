"""Predicts time, cost and bottleneck of each job at any number of videos, and checks the prediction on this machine.

    PYTHONPATH=. python benchmarks/plan.py            # predictions for CLUSTERS at 10^4, 10^6 and 10^8 videos
    PYTHONPATH=. python benchmarks/plan.py --check    # measures RATES here, then two sizes against the prediction

Preparing is simulated event by event: one driver hands out blocks of 32 videos and takes their results, one after the
other, and each core decodes one block at a time. The other jobs are closed forms:

    training    start + steps x max(step, clips of a node x misses x shard / bandwidth of a node) + validation
    evaluation  start + clips x methods x time of one / actors
    search      trials x (overhead + a training on one GPU) / trials at once

`misses` is the share of clips whose shard is not on the node: a shuffled epoch visits shards at random, so it is
1 - cache / data set, and each miss fetches a whole shard.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import logging
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console
from rich.table import Table

from giffy_ray.cluster import resources
from giffy_ray.cluster.local import DEFAULT_NICENESS_ENV
from giffy_ray.cluster.resources import resources_for
from giffy_ray.config import DataConfig, Experiment, LimitsConfig, SyntheticConfig, load, override
from giffy_ray.data import loader, shards
from giffy_ray.data.catalog import read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.data.shards import SHARD_VIDEOS, DecodeConfig
from giffy_ray.data.synthetic import dataset
from giffy_ray.evaluation.evaluator import BATCH
from giffy_ray.evaluation.report import MakeEvaluator, TrainedModel
from giffy_ray.training import checkpoints, trainer

ROOT = Path(__file__).parent.parent
SIZES = (10**4, 10**6, 10**8)
CHECKED_VIDEOS, CHECKED_STEPS, CHECKED_CLIPS = (320, 1280), (100, 400), (64, 192)
CLIP_BYTES = 30 * 64 * 64 * 3
HOUR_S = 3600


@dataclass(frozen=True)
class Rates:
    """Seconds, as measured on one machine."""

    video_s: float  # to decode a video of 256x256 and 90 frames, on a core that Ray uses as well
    list_s: float  # to list a video
    row_s: float  # of the driver, for each video: bookkeeping before and after decoding
    block_s: float  # of the driver, for each block of 32 videos: to hand it out and take its result
    prepare_start_s: float
    step_s: float  # of a training, at the batch of a worker
    train_start_s: float  # until the first step, and after the last
    evaluated_s: float  # a clip and method, on one actor
    evaluate_start_s: float
    trial_s: float  # of a search, for each trial, besides its steps


# Medians of docs/performance.md and of --check, on two cores.
RATES = Rates(
    video_s=0.025,
    list_s=2.1e-5,
    row_s=8e-5,
    block_s=0.003,
    prepare_start_s=2.0,
    step_s=0.021,
    train_start_s=20.0,
    evaluated_s=0.1,
    evaluate_start_s=8.0,
    trial_s=4.7,
)


@dataclass(frozen=True)
class Cluster:
    """What a job runs on, and what it costs. Prices are of 2026 in US dollars, on demand, rounded."""

    name: str
    nodes: int  # each with 32 cores and 8 GPUs
    cores: int = 32
    gpus: int = 8
    cache_bytes: float = 3.5e12  # of local NVMe
    network: float = 1.25e9  # bytes a second from the object store to a node
    node_hour_usd: float = 30.0  # with GPUs; a node of cores alone costs a twentieth
    cores_hour_usd: float = 1.5


CLUSTERS = {10**4: Cluster("1 node", 1), 10**6: Cluster("8 nodes", 8), 10**8: Cluster("64 nodes", 64)}
GPU_BATCH, EPOCHS, TRIALS, TRIAL_EPOCHS = 20, 20, 50, 2
EVALUATED_CLIPS, METHODS = 1000, 11  # linear, flow, the mean, and eight samples of a model


@dataclass(frozen=True)
class Prediction:
    duration_s: float
    bottleneck: str


def simulate_prepare(rates: Rates, videos: int, cores: int, seed: int = 0, spread: float = 0.3) -> Prediction:
    """`spread`: standard deviation of a video's decoding time, over its mean."""
    random = np.random.default_rng(seed)
    blocks = -(-videos // SHARD_VIDEOS)
    sizes = np.full(blocks, SHARD_VIDEOS)
    sizes[-1] = videos - SHARD_VIDEOS * (blocks - 1)
    times_s = sizes * rates.video_s * random.normal(1, spread / np.sqrt(sizes)).clip(0.1)
    driver_s, ends_s = 0.0, list[float]()
    for block_s in times_s.tolist():
        if len(ends_s) == cores:  # the driver waits for a core, and takes its result
            driver_s = max(driver_s, heapq.heappop(ends_s)) + rates.block_s / 2
        driver_s += rates.block_s / 2
        heapq.heappush(ends_s, driver_s + block_s)
    decoding_s = max(ends_s) + rates.block_s / 2
    serial_s = rates.prepare_start_s + videos * (rates.list_s + rates.row_s)
    shares = {
        "decoding on the cores": float(times_s.sum()) / cores,
        "the driver's blocks": blocks * rates.block_s,
        "the driver's rows": serial_s,
    }
    return Prediction(serial_s + decoding_s, max(shares, key=lambda name: shares[name]))


def predict_training(rates: Rates, videos: int, cluster: Cluster) -> Prediction:
    steps = EPOCHS * max(1, videos // (GPU_BATCH * cluster.gpus * cluster.nodes))
    compute_s = steps * rates.step_s
    fetching_s = first_fetch_s(videos, cluster) + steps * cluster.gpus * missed_s(videos, cluster)
    duration_s = rates.train_start_s + max(compute_s, fetching_s)
    return Prediction(duration_s, "fetching shards" if fetching_s > compute_s else "the GPUs' steps")


def first_fetch_s(videos: int, cluster: Cluster) -> float:
    """Until the cache of a node is full, or has the whole data set."""
    return min(videos * CLIP_BYTES, cluster.cache_bytes) / cluster.network


def missed_s(videos: int, cluster: Cluster) -> float:
    """What a node's network takes for the misses of one GPU's batch, of a shard each."""
    misses = max(0.0, 1 - cluster.cache_bytes / (videos * CLIP_BYTES))
    return GPU_BATCH * misses * SHARD_VIDEOS * CLIP_BYTES / cluster.network


def predict_evaluation(rates: Rates, clips: int, actors: int, methods: int = METHODS) -> Prediction:
    clips = min(clips, EVALUATED_CLIPS)
    batches = -(-clips // BATCH)
    rounds = -(-batches // min(actors, batches))
    return Prediction(rates.evaluate_start_s + rounds * min(BATCH, clips) * methods * rates.evaluated_s, "the actors")


def predict_search(rates: Rates, videos: int, cluster: Cluster) -> Prediction:
    """Each trial has one GPU; the trials of a node share its cache and its network."""
    steps = TRIAL_EPOCHS * max(1, videos // GPU_BATCH)
    compute_s, fetching_s = steps * rates.step_s, steps * cluster.gpus * missed_s(videos, cluster)
    rounds = -(-TRIALS // (cluster.gpus * cluster.nodes))
    duration_s = rounds * (rates.trial_s + max(compute_s, fetching_s)) + first_fetch_s(videos, cluster)
    return Prediction(duration_s, "fetching shards" if fetching_s > compute_s else "the GPUs' steps")


def predictions(rates: Rates) -> Table:
    table = Table("videos", "cluster", "job", "time", "cost, USD", "bottleneck")
    for videos in SIZES:
        cluster = CLUSTERS[videos]
        cores = cluster.nodes * cluster.cores
        jobs = {
            "prepare": (simulate_prepare(rates, videos, cores), cluster.cores_hour_usd),
            f"train {EPOCHS} epochs": (predict_training(rates, videos, cluster), cluster.node_hour_usd),
            "evaluate": (predict_evaluation(rates, videos // 10, cores), cluster.cores_hour_usd),
            f"search, {TRIALS} trials of {TRIAL_EPOCHS} epochs": (
                predict_search(rates, videos, cluster),
                cluster.node_hour_usd,
            ),
        }
        for job, (predicted, node_hour_usd) in jobs.items():
            usd = predicted.duration_s / HOUR_S * cluster.nodes * node_hour_usd
            table.add_row(
                f"{videos:,}", cluster.name, job, time_of(predicted.duration_s), f"{usd:,.2f}", predicted.bottleneck
            )
    return table


def time_of(seconds: float) -> str:
    for unit, unit_s in (("days", 24 * HOUR_S), ("h", HOUR_S), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:,.1f} {unit}"
    return f"{seconds:.0f} s"


def seconds_of(function) -> float:
    began_s = time.perf_counter()
    function()
    return time.perf_counter() - began_s


# ------------------------------------------------------------------------------------------ the check on this machine
def make_videos(folder: Path, count: int, distinct: int = 64) -> Path:
    """Copies of a few of the built-in videos, under names of their own."""
    root = folder / f"videos{count}" / "training" / "x"
    root.mkdir(parents=True)
    plan = dataset.plan(SyntheticConfig(training_clips=distinct // 2, validation_clips=1))[:distinct]
    contents = [dataset.video(planned) for planned in plan]
    for number in range(count):
        (root / f"{number:06}.mp4").write_bytes(contents[number % distinct])
    return root.parents[1]


def experiment_of(root: Path, storage: Path) -> Experiment:
    fields = {"storage": str(storage), "data.root": str(root), "data.validation_fraction": 1e-9}
    return override(Experiment(), fields)


def no_decoding(block: pa.Table) -> pa.Table:
    return block


def check_prepare(folder: Path, cores: int) -> tuple[Rates, list[tuple[int, float, float]]]:
    root = make_videos(folder, 320)
    catalog = read_catalog(str(root), DataConfig(validation_fraction=1e-9))
    blocks = shards.chunks_of(catalog.videos * 10)
    list(loader.decode_all(blocks[:1], no_decoding))
    start_s = seconds_of(lambda: list(loader.decode_all(blocks[:1], no_decoding)))
    block_s = (seconds_of(lambda: list(loader.decode_all(blocks, no_decoding))) - start_s) / len(blocks)
    decode = functools.partial(
        shards.decode_shard,
        filesystem=catalog.filesystem,
        recipe=DecodeConfig(experiment_of(root, folder).clip),
        limits=LimitsConfig(),
        location=str(folder / "measured"),
    )
    ends_s, done = [], []
    for table in loader.decode_all(shards.chunks_of(catalog.videos), decode):
        ends_s.append(time.perf_counter())
        done.append(len(table))
    # The first `cores` shards end at about the same time, as do the last.
    video_s = cores * (ends_s[-1] - ends_s[cores - 1]) / sum(done[cores:]) - block_s / SHARD_VIDEOS
    rates = replace(RATES, video_s=video_s, block_s=block_s, prepare_start_s=start_s + 0.1)
    measured = []
    for videos in CHECKED_VIDEOS:
        experiment = experiment_of(make_videos(folder / "checked", videos), folder / f"runs{videos}")
        took_s = seconds_of(functools.partial(prepare, experiment))
        measured.append((videos, simulate_prepare(rates, videos, cores).duration_s, took_s))
    return rates, measured


def check_training(folder: Path, store: ClipDataset) -> tuple[float, float, list[tuple[int, float, float]]]:
    """One worker that trains the demo's CVAE: step_s and train_start_s from two short runs, then two longer ones."""
    demo = load(ROOT / "jobs/experiments/demo.yaml")

    def run(steps: int) -> float:
        fields = {
            "storage": str(folder / "runs"),
            "name": f"steps{steps}",
            "cluster.workers": 1,
            "train.global_batch_size": 8,
        }
        epochs = max(1, steps * 8 // len(store.split_indices("training")))
        experiment = override(demo, fields | {"train.epochs": epochs, "train.validate_every": epochs})
        return seconds_of(lambda: trainer.train(experiment, store, resources_for(experiment)))

    run(40)
    short_s, long_s = run(41), run(80)
    step_s = (long_s - short_s) / 40
    start_s = short_s - 40 * step_s
    return step_s, start_s, [(steps, start_s + steps * step_s, run(steps)) for steps in CHECKED_STEPS]


def check_evaluation(folder: Path, actors: int) -> tuple[float, float, list[tuple[int, float, float]]]:
    learner, trained = checkpoints.load(str(ROOT / "published/between"))
    synthetic_clips = {
        "data.synthetic.training_clips": 1,
        "data.synthetic.validation_clips": -(-max(CHECKED_CLIPS) // 2),
    }
    experiment = override(trained, {"storage": str(folder / "evaluated"), **synthetic_clips})
    store = prepare(experiment)
    make = MakeEvaluator(experiment, (TrainedModel("between", learner, trained),), store, frozenset(), frozenset())
    rows = store.split_indices("validation")
    asked = {"num_cpus": 1, "runtime_env": {"env_vars": resources.MALLOC_ENV}}

    def run(clips: int) -> float:
        mapped = functools.partial(
            loader.map_rows, rows[:clips], make, batch=BATCH, actors=actors, title="evaluating", resources=asked
        )
        return seconds_of(lambda: list(mapped()))

    short_s, long_s = run(2 * BATCH), run(6 * BATCH)
    clip_s = (long_s - short_s) / (4 * BATCH)
    start_s = short_s - 2 * BATCH * clip_s
    measured = [(clips, start_s + clips * clip_s, run(clips)) for clips in CHECKED_CLIPS]
    return clip_s * actors / METHODS, start_s, measured


def check(console: Console) -> None:
    table = Table("job", "size", "predicted, s", "measured, s", "measured / predicted")
    with tempfile.TemporaryDirectory(prefix="giffy_ray-plan-") as name:
        folder = Path(name)
        os.environ |= DEFAULT_NICENESS_ENV  # as in the Ray that a job starts for itself
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        rates, prepared = check_prepare(folder, 2)
        clips = ClipDataset(next((folder / "runs320").glob("stores/*/sets/*")).as_posix())
        step_s, train_start_s, trained = check_training(folder, clips)
        evaluated_s, evaluate_start_s, evaluated = check_evaluation(folder, 2)
        ray.shutdown()
    for job, unit, rows in (
        ("prepare", "videos", prepared),
        ("train", "steps", trained),
        ("evaluate", "clips", evaluated),
    ):
        for size, predicted_s, measured_s in rows:
            ratio = f"{measured_s / predicted_s:.2f}"
            table.add_row(job, f"{size} {unit}", f"{predicted_s:.1f}", f"{measured_s:.1f}", ratio)
    console.print(
        replace(
            rates,
            step_s=step_s,
            train_start_s=train_start_s,
            evaluated_s=evaluated_s,
            evaluate_start_s=evaluate_start_s,
        )
    )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the rates here, and two sizes of each job")
    console = Console(width=110)
    if parser.parse_args().check:
        check(console)
    else:
        console.print(predictions(RATES))


if __name__ == "__main__":
    main()
