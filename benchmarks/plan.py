"""Predicts time, cost and bottleneck of each job at any number of videos, and checks the prediction on this machine.

    PYTHONPATH=. python benchmarks/plan.py            # predictions for CLUSTERS at 10^4, 10^6 and 10^8 videos
    PYTHONPATH=. python benchmarks/plan.py --check    # measures RATES here and compares two sizes with the prediction

The preparation of a dataset is simulated event by event: one driver hands out blocks of 32 videos and takes their
results, one after the other, and each core decodes one block at a time. The other jobs have closed forms:

    training    start + steps x max(step, clips of a node x miss rate x shard / bandwidth of a node) + validation
    evaluation  start + clips x methods x time per clip / actors
    search      trials x (overhead + a training on one GPU) / concurrent trials

The miss rate is the share of clips whose shard is not on the node. A shuffled epoch visits shards at random, so it is
1 - cache / dataset. Each miss downloads a whole shard.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import logging
import os
import tempfile
import time
from collections.abc import Callable
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
from giffy_ray.data.synthetic.dataset import plan_videos, render_video
from giffy_ray.evaluation.evaluator import BATCH_SIZE
from giffy_ray.evaluation.report import EvaluatorFactory
from giffy_ray.models.sampling import TrainedModel
from giffy_ray.training import checkpoint_format, trainer

ROOT = Path(__file__).parent.parent
DATASET_SIZES = (10**4, 10**6, 10**8)  # videos
CHECKED_VIDEOS, CHECKED_STEPS, CHECKED_CLIPS = (320, 1280), (120, 400), (64, 192)
CHECK_CPUS, CHECK_BATCH_SIZE = 2, 8
CLIP_BYTES = 30 * 64 * 64 * 3
HOUR_S = 3600


@dataclass(frozen=True)
class Rates:
    """Durations measured on one machine, in seconds."""

    decode_video_s: float  # one video of 256x256 and 90 frames, on a core that Ray's own processes share
    list_video_s: float
    driver_video_s: float  # the driver's bookkeeping before and after decoding, per video
    driver_block_s: float  # the driver hands out one block of 32 videos and takes its result
    prepare_start_s: float
    step_s: float  # one training step, at the batch of one worker
    train_start_s: float  # until the first step, and after the last
    evaluate_clip_s: float  # one clip of one method, on one actor
    evaluate_start_s: float
    trial_overhead_s: float  # of a search, per trial, besides its steps


# Medians of docs/performance.md and of --check, on two cores.
RATES = Rates(
    decode_video_s=0.021,
    list_video_s=2.1e-5,
    driver_video_s=8e-5,
    driver_block_s=0.028,
    prepare_start_s=0.2,
    step_s=0.021,
    train_start_s=13.0,
    evaluate_clip_s=0.077,
    evaluate_start_s=38.0,
    trial_overhead_s=4.7,
)


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job and their price. Prices are on-demand US dollars of 2026, rounded."""

    name: str
    nodes: int  # each with 32 cores and 8 GPUs
    cores: int = 32
    gpus: int = 8
    cache_bytes: float = 3.5e12  # local NVMe
    network: float = 1.25e9  # bytes per second from the object store to a node
    node_hour_usd: float = 30.0  # with GPUs; a node of cores alone costs a twentieth
    cores_hour_usd: float = 1.5


CLUSTERS = {10**4: Cluster("1 node", 1), 10**6: Cluster("8 nodes", 8), 10**8: Cluster("64 nodes", 64)}
GPU_BATCH_SIZE, EPOCHS, TRIALS, TRIAL_EPOCHS = 20, 20, 50, 2
EVALUATED_CLIPS, METHODS = 1000, 11  # linear, flow, the mean, and eight samples of a model


@dataclass(frozen=True)
class Prediction:
    duration_s: float
    bottleneck: str


Measurement = tuple[int, float, float]  # size, predicted seconds, measured seconds


def simulate_prepare(rates: Rates, videos: int, cores: int, seed: int = 0, spread: float = 0.3) -> Prediction:
    """Simulates the driver and the cores that decode.

    Args:
        rates: Measured durations.
        videos: Number of videos.
        cores: Cores that decode.
        seed: Seed of the decoding times.
        spread: Standard deviation of a video's decoding time, divided by its mean.
    """
    random = np.random.default_rng(seed)
    blocks = -(-videos // SHARD_VIDEOS)
    sizes = np.full(blocks, SHARD_VIDEOS)
    sizes[-1] = videos - SHARD_VIDEOS * (blocks - 1)
    decode_block_s = sizes * rates.decode_video_s * random.normal(1, spread / np.sqrt(sizes)).clip(0.1)
    driver_time_s = 0.0
    end_times_s: list[float] = []
    for duration_s in decode_block_s.tolist():
        if len(end_times_s) == cores:  # the driver waits for a core and takes its result
            driver_time_s = max(driver_time_s, heapq.heappop(end_times_s)) + rates.driver_block_s / 2
        driver_time_s += rates.driver_block_s / 2
        heapq.heappush(end_times_s, driver_time_s + duration_s)
    decoding_s = max(end_times_s) + rates.driver_block_s / 2
    serial_s = rates.prepare_start_s + videos * (rates.list_video_s + rates.driver_video_s)
    parts_s = {
        "decoding on the cores": float(decode_block_s.sum()) / cores,
        "the driver's blocks": blocks * rates.driver_block_s,
        "the driver's rows": serial_s,
    }
    return Prediction(serial_s + decoding_s, max(parts_s, key=lambda name: parts_s[name]))


def predict_training(rates: Rates, videos: int, cluster: Cluster) -> Prediction:
    steps = EPOCHS * max(1, videos // (GPU_BATCH_SIZE * cluster.gpus * cluster.nodes))
    compute_s = steps * rates.step_s
    download_s = cache_fill_s(videos, cluster) + steps * cluster.gpus * batch_miss_s(videos, cluster)
    duration_s = rates.train_start_s + max(compute_s, download_s)
    return Prediction(duration_s, name_training_bottleneck(compute_s, download_s))


def predict_evaluation(rates: Rates, clips: int, actors: int, methods: int = METHODS) -> Prediction:
    clips = min(clips, EVALUATED_CLIPS)
    batches = -(-clips // BATCH_SIZE)
    rounds = -(-batches // min(actors, batches))
    batch_s = min(BATCH_SIZE, clips) * methods * rates.evaluate_clip_s
    return Prediction(rates.evaluate_start_s + rounds * batch_s, "the actors")


def predict_search(rates: Rates, videos: int, cluster: Cluster) -> Prediction:
    """Each trial has one GPU. The trials of a node share its cache and its network."""
    steps = TRIAL_EPOCHS * max(1, videos // GPU_BATCH_SIZE)
    compute_s = steps * rates.step_s
    download_s = steps * cluster.gpus * batch_miss_s(videos, cluster)
    rounds = -(-TRIALS // (cluster.gpus * cluster.nodes))
    duration_s = rounds * (rates.trial_overhead_s + max(compute_s, download_s)) + cache_fill_s(videos, cluster)
    return Prediction(duration_s, name_training_bottleneck(compute_s, download_s))


def name_training_bottleneck(compute_s: float, download_s: float) -> str:
    return "fetching shards" if download_s > compute_s else "the GPUs' steps"


def cache_fill_s(videos: int, cluster: Cluster) -> float:
    """Returns the time until a node's cache is full or holds the whole dataset."""
    return min(videos * CLIP_BYTES, cluster.cache_bytes) / cluster.network


def batch_miss_s(videos: int, cluster: Cluster) -> float:
    """Returns the time in which a node downloads one shard for each cache miss of one GPU's batch."""
    miss_rate = max(0.0, 1 - cluster.cache_bytes / (videos * CLIP_BYTES))
    return GPU_BATCH_SIZE * miss_rate * SHARD_VIDEOS * CLIP_BYTES / cluster.network


def tabulate_predictions(rates: Rates) -> Table:
    table = Table("videos", "cluster", "job", "time", "cost, USD", "bottleneck")
    for videos in DATASET_SIZES:
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
        for job, (prediction, node_hour_usd) in jobs.items():
            usd = prediction.duration_s / HOUR_S * cluster.nodes * node_hour_usd
            duration = format_duration(prediction.duration_s)
            table.add_row(f"{videos:,}", cluster.name, job, duration, f"{usd:,.2f}", prediction.bottleneck)
    return table


def format_duration(duration_s: float) -> str:
    for unit, unit_s in (("days", 24 * HOUR_S), ("h", HOUR_S), ("min", 60)):
        if duration_s >= 2 * unit_s:
            return f"{duration_s / unit_s:,.1f} {unit}"
    return f"{duration_s:.0f} s"


def measure_s(function: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


# ---------------------------------------------------------------------------------------- the check on this machine
def write_videos(folder: Path, count: int, distinct: int = 64) -> Path:
    """Writes copies of a few built-in videos under different names. Returns the root of the dataset."""
    category = folder / f"videos{count}" / "training" / "x"
    category.mkdir(parents=True)
    specs = plan_videos(SyntheticConfig(training_clips=distinct // 2, validation_clips=1))[:distinct]
    contents = [render_video(spec) for spec in specs]
    for number in range(count):
        (category / f"{number:06}.mp4").write_bytes(contents[number % distinct])
    return category.parents[1]


def build_experiment(root: Path, storage: Path) -> Experiment:
    fields = {"storage": str(storage), "data.root": str(root), "data.validation_fraction": 1e-9}
    return override(Experiment(), fields)


def skip_decoding(block: pa.Table) -> pa.Table:
    return block


def check_prepare(folder: Path, cores: int) -> tuple[Rates, list[Measurement]]:
    root = write_videos(folder, 320)
    catalog = read_catalog(str(root), DataConfig(validation_fraction=1e-9))
    blocks = shards.chunk_videos(catalog.videos * 10)
    list(loader.decode_blocks(blocks[:1], skip_decoding))
    start_s = measure_s(lambda: list(loader.decode_blocks(blocks[:1], skip_decoding)))
    driver_block_s = (measure_s(lambda: list(loader.decode_blocks(blocks, skip_decoding))) - start_s) / len(blocks)
    decode = functools.partial(
        shards.decode_shard,
        filesystem=catalog.filesystem,
        decode_config=DecodeConfig(build_experiment(root, folder).clip),
        limits=LimitsConfig(),
        location=str(folder / "measured"),
    )
    end_times_s, video_counts = [], []
    for table in loader.decode_blocks(shards.chunk_videos(catalog.videos), decode):
        end_times_s.append(time.perf_counter())
        video_counts.append(len(table))
    # The first `cores` shards end at about the same time, as do the last.
    core_s = cores * (end_times_s[-1] - end_times_s[cores - 1]) / sum(video_counts[cores:])
    rates = replace(
        RATES,
        decode_video_s=core_s - driver_block_s / SHARD_VIDEOS,
        driver_block_s=driver_block_s,
        prepare_start_s=start_s + 0.1,
    )
    measurements = []
    for videos in CHECKED_VIDEOS:
        experiment = build_experiment(write_videos(folder / "checked", videos), folder / f"runs{videos}")
        measured_s = measure_s(functools.partial(prepare, experiment))
        measurements.append((videos, simulate_prepare(rates, videos, cores).duration_s, measured_s))
    return rates, measurements


def check_training(folder: Path, dataset: ClipDataset) -> tuple[float, float, list[Measurement]]:
    """Trains the demo's CVAE with one worker.

    Returns:
        step_s and train_start_s from two short runs, and the measurements of two longer ones.
    """
    demo = load(ROOT / "giffy_ray/experiments/demo.yaml")
    training_clips = len(dataset.split_indices("training"))

    def run(steps: int) -> float:
        epochs = max(1, steps * CHECK_BATCH_SIZE // training_clips)
        overrides = {
            "storage": str(folder / "runs"),
            "name": f"steps{steps}",
            "cluster.workers": 1,
            "train.global_batch_size": CHECK_BATCH_SIZE,
            "train.epochs": epochs,
            "train.validate_every": epochs,
        }
        experiment = override(demo, overrides)
        return measure_s(lambda: trainer.train(experiment, dataset, resources_for(experiment)))

    run(40)
    short_s, long_s = run(41), run(80)
    step_s = (long_s - short_s) / 40
    start_s = short_s - 40 * step_s
    return step_s, start_s, [(steps, start_s + steps * step_s, run(steps)) for steps in CHECKED_STEPS]


def check_evaluation(folder: Path, actors: int) -> tuple[float, float, list[Measurement]]:
    learner, trained = checkpoint_format.load_learner(str(ROOT / "giffy_ray/pretrained/between"))
    overrides = {
        "storage": str(folder / "evaluated"),
        "data.synthetic.training_clips": 1,
        "data.synthetic.validation_clips": -(-max(CHECKED_CLIPS) // 2),
    }
    experiment = override(trained, overrides)
    dataset = prepare(experiment)
    runs = (TrainedModel("between", learner, trained),)
    make_evaluator = EvaluatorFactory(experiment, runs, dataset, frozenset(), frozenset())
    indices = dataset.split_indices("validation")
    actor_resources = {"num_cpus": 1, "runtime_env": {"env_vars": resources.MALLOC_ENV}}

    def run(clips: int) -> float:
        batches = loader.map_batches_with_models(
            indices[:clips],
            make_evaluator,
            batch_size=BATCH_SIZE,
            actors=actors,
            title="evaluating",
            resources=actor_resources,
        )
        return measure_s(lambda: list(batches))

    short_s, long_s = run(2 * BATCH_SIZE), run(6 * BATCH_SIZE)
    clip_s = (long_s - short_s) / (4 * BATCH_SIZE)
    start_s = short_s - 2 * BATCH_SIZE * clip_s
    measurements = [(clips, start_s + clips * clip_s, run(clips)) for clips in CHECKED_CLIPS]
    return clip_s * actors / METHODS, start_s, measurements


def check(console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="giffy_ray-plan-") as name:
        folder = Path(name)
        os.environ |= DEFAULT_NICENESS_ENV  # as in the Ray that a job starts for itself
        ray.init(
            address="local",
            num_cpus=CHECK_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        rates, prepare_measurements = check_prepare(folder, CHECK_CPUS)
        dataset = ClipDataset(next((folder / "runs320").glob("stores/*/sets/*")).as_posix())
        step_s, train_start_s, train_measurements = check_training(folder, dataset)
        evaluate_clip_s, evaluate_start_s, evaluate_measurements = check_evaluation(folder, CHECK_CPUS)
        ray.shutdown()
    rates = replace(
        rates,
        step_s=step_s,
        train_start_s=train_start_s,
        evaluate_clip_s=evaluate_clip_s,
        evaluate_start_s=evaluate_start_s,
    )
    console.print(rates)
    table = Table("job", "size", "predicted, s", "measured, s", "measured / predicted")
    for job, unit, measurements in (
        ("prepare", "videos", prepare_measurements),
        ("train", "steps", train_measurements),
        ("evaluate", "clips", evaluate_measurements),
    ):
        for size, predicted_s, measured_s in measurements:
            ratio = f"{measured_s / predicted_s:.2f}"
            table.add_row(job, f"{size} {unit}", f"{predicted_s:.1f}", f"{measured_s:.1f}", ratio)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the rates here, and two sizes of each job")
    console = Console(width=110)
    if parser.parse_args().check:
        check(console)
    else:
        console.print(tabulate_predictions(RATES))


if __name__ == "__main__":
    main()
