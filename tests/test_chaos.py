"""Tests that take minutes: killed jobs, lost nodes, and servers that go away. Run by `make chaos`."""

import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import ray.tune
import sqlalchemy.exc
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from giffy_ray.cluster.local import free_port, local_head
from giffy_ray.cluster.resources import WorkerResources, resources_for
from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.training import checkpoint_format, checkpoint_selection, trainer
from giffy_ray.training.train_loop import train_loop_per_worker
from giffy_ray.tuning import tuner
from giffy_ray.tuning.independent_trials import IndependentTrials
from giffy_ray.tuning.optuna_storage import open_storage
from tests import slow_training
from tests.conftest import ROOT, moving_video

pytestmark = pytest.mark.chaos
VIDEO_COUNT = 3000
KILLS = int(os.environ.get("GIFFY_RAY_KILLS", "20"))
LONG = {"train.epochs": 400, "train.global_batch_size": 4, "train.validate_every": 40, "train.checkpoint_every": 10}


def start_job(job: str, videos: Path, storage: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    # In its own process group, so that signals reach nothing else. Its Ray cluster ends with it.
    return subprocess.Popen(
        [sys.executable, f"jobs/{job}.py", "tests/tiny.yaml", f"data.root={videos}", f"storage={storage}", *overrides],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def list_shards(storage: Path) -> dict[str, tuple[int, int]]:
    """Maps the name of each finished shard file to its inode and modification time."""
    files = [path for path in storage.glob("stores/*/shards/*") if not path.name.endswith(".partial")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def open_dataset(storage: Path) -> ClipDataset:
    (location,) = storage.glob("stores/*/sets/*")
    return ClipDataset(str(location))


def test_prepare_job_killed_three_times_stores_the_same_clips(tmp_path: Path):
    videos = tmp_path / "videos"
    for number in range(VIDEO_COUNT):
        path = videos / ("cats", "dogs")[number % 2] / f"{number:04}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number % 50 == 7 else moving_video(number, 15, 30))

    generator, shards = random.Random(0), {}
    for kill in range(3):
        job = start_job("prepare", videos, tmp_path / "killed")
        shards_before_kill = (kill + 1) * 40 + generator.randrange(20)
        while len(list_shards(tmp_path / "killed")) < shards_before_kill:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
        time.sleep(2)  # until its Ray cluster has ended
        shards_after_kill = list_shards(tmp_path / "killed")
        assert shards.items() <= shards_after_kill.items()  # no shard is written again
        shards = shards_after_kill
    for storage in ("killed", "uninterrupted"):
        job = start_job("prepare", videos, tmp_path / storage)
        out, _ = job.communicate(timeout=500)
        assert job.returncode == 0, out
    assert shards.items() <= list_shards(tmp_path / "killed").items()

    killed, uninterrupted = open_dataset(tmp_path / "killed"), open_dataset(tmp_path / "uninterrupted")
    assert len(uninterrupted) == VIDEO_COUNT - VIDEO_COUNT // 50
    assert killed.ids == uninterrupted.ids
    assert killed.rejects == uninterrupted.rejects
    assert killed.fingerprint == uninterrupted.fingerprint
    killed_sha256, uninterrupted_sha256 = [
        hashlib.sha256(dataset.get_clips(np.arange(len(dataset)))).hexdigest() for dataset in (killed, uninterrupted)
    ]
    assert killed_sha256 == uninterrupted_sha256
    # Even the shards are the same files, and no video is in two of them.
    assert list_shards(tmp_path / "killed").keys() == list_shards(tmp_path / "uninterrupted").keys()
    tables = sorted(map(str, tmp_path.glob("killed/stores/*/shards/*.parquet")))
    identities = pq.read_table(tables, columns=["identity"])["identity"].to_pylist()
    assert len(identities) == len(set(identities)) == VIDEO_COUNT


# Both models have batch norm. The second also trains a discriminator, and averages the weights of its generator.
TWO_STREAM = {
    "clip.frames": 16,
    "model.kind": "two_stream",
    "model.widths": [2, 2, 2, 2],
    "optim.ema_decay": 0.9,
    "optim.lr": 1e-3,
}
BATCH_NORM = {"cvae": {}, "two_stream": TWO_STREAM}


def start_training(videos: Path, storage: Path, kind: str = "cvae") -> subprocess.Popen:
    overrides = [f"{name}={value}" for name, value in (LONG | BATCH_NORM[kind]).items()]
    return start_job("train", videos, storage, "name=run", "cluster.workers=2", "cluster.max_failures=99", *overrides)


def read_steps_saved(storage: Path) -> int:
    """Returns the steps of the latest valid checkpoint; 0 if there is none."""
    for folder in sorted(storage.glob("run/checkpoint_*"), reverse=True):
        try:
            checkpoint_format.verify(str(folder))
            return json.loads((folder / "position.json").read_text())["steps_done"]
        except (checkpoint_format.CorruptCheckpoint, OSError):
            continue  # it is being written or removed
    return 0


def list_workers(job: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    workers = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            if process.name().startswith("ray::RayTrain"):
                workers.append(process)
    return workers


def hash_weights(storage: Path) -> dict[str, str]:
    """Maps each file of networks and optimizers in the latest checkpoint to its sha256."""
    files = sorted(Path(find_latest_checkpoint(storage)).glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def find_latest_checkpoint(storage: Path) -> str:
    return checkpoint_selection.latest_checkpoint(override(Experiment(), {"storage": str(storage), "name": "run"}))


def load_only_run(storage: Path) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'giffy_ray'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return client, run


def load_curves(storage: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) of every metric of the only run, except speed and system metrics."""
    client, run = load_only_run(storage)
    names = [name for name in run.data.metrics if name.startswith(("train/", "val/"))]
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(metric.step, metric.value) for metric in history] for name, history in histories.items()}


def write_twelve_videos(folder: Path) -> Path:
    videos = folder / "videos"
    for number in range(12):
        path = videos / ("training", "validation")[number % 4 == 3] / "cats" / f"{number:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 30, 30))
    return videos


@pytest.mark.parametrize(("kind", "kills"), [("cvae", KILLS), ("two_stream", KILLS // 4)])
def test_training_killed_at_random_moments_ends_as_an_uninterrupted_one(kind: str, kills: int, tmp_path: Path):
    videos = write_twelve_videos(tmp_path)
    uninterrupted = start_training(videos, tmp_path / "uninterrupted", kind)
    out, _ = uninterrupted.communicate(timeout=600)
    assert uninterrupted.returncode == 0, out

    generator, job = random.Random(0), start_training(videos, tmp_path / "killed", kind)
    for kill in range(kills):
        steps_before_kill = read_steps_saved(tmp_path / "killed") + generator.choice([0, 10, 20])
        while read_steps_saved(tmp_path / "killed") < steps_before_kill or not (workers := list_workers(job)):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        time.sleep(generator.random())
        victim = generator.choice(["driver", "worker", "driver, with SIGTERM"])
        print(f"kill {kill + 1} at step {read_steps_saved(tmp_path / 'killed')}: {victim}", flush=True)
        if victim == "worker":
            generator.choice(workers).kill()
            continue
        os.kill(job.pid, signal.SIGKILL if victim == "driver" else signal.SIGTERM)
        out, _ = job.communicate(timeout=120)
        assert job.returncode == (-signal.SIGKILL if victim == "driver" else 128 + signal.SIGTERM), out
        job = start_training(videos, tmp_path / "killed", kind)
    out, _ = job.communicate(timeout=600)
    assert job.returncode == 0, out

    # Equal weights, so each step had the same clips.
    assert hash_weights(tmp_path / "killed") == hash_weights(tmp_path / "uninterrupted")
    assert_curves_match(tmp_path / "killed", tmp_path / "uninterrupted")


def assert_curves_match(storage: Path, expected_storage: Path) -> None:
    """Compares the curves of two runs: equal steps, and values that are equal but for rounding."""
    expected = load_curves(expected_storage)
    for name, curve in load_curves(storage).items():
        assert [step for step, _ in curve] == [step for step, _ in expected[name]]
        assert dict(curve) == pytest.approx(dict(expected[name]), rel=1e-9), name


def read_steps(storage: Path) -> list[tuple[int, int, str]]:
    """Returns (number, workers, node of rank 0) of each step in order, as `slow_training.py` lists them."""
    steps_file = storage / "steps.txt"
    lines = steps_file.read_text().splitlines() if steps_file.exists() else []
    return [(int(step), int(workers), node) for step, workers, node in (line.split() for line in lines)]


def test_ray_job_stop_waits_for_a_slow_checkpoint_and_the_run_resumes_there(tmp_path: Path):
    storage = tmp_path / "runs"
    arguments = ["tests/tiny.yaml", f"data.root={write_twelve_videos(tmp_path)}", f"storage={storage}", "name=run"]
    arguments += ["cluster.workers=1", "train.epochs=80", "train.validate_every=80"]
    job = ["--", "python", "tests/slow_training.py", *arguments]
    with local_head(cpus=2) as head:

        def ray_job(*command: str) -> str:
            process = subprocess.run(
                ["ray", "job", *command],
                check=False,
                env=head.environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=200,
            )
            return process.stdout + process.stderr

        ray_job("submit", "--no-wait", "--submission-id=first", *job)
        while len(read_steps(storage)) < 20:
            assert "FAILED" not in (status := ray_job("status", "first")), status + ray_job("logs", "first")
            time.sleep(0.5)
        out = ray_job("stop", "first")
        assert "stopped" in out, out
        assert 20 <= read_steps_saved(storage) == len(read_steps(storage)) < 180
        out = ray_job("submit", "--submission-id=second", *job)
        assert "succeeded" in out, out
    assert "`ray job stop` kills" not in out  # the head gives jobs enough time
    assert [step for step, *_ in read_steps(storage)] == list(range(180))  # 80 epochs of 9 clips in batches of 4


# Ray has only 2 of the 64 CPUs that the worker needs.
WAITING_TRAINING = """
import ray
from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import load, override
from giffy_ray.data.prepare import prepare
from giffy_ray.training import trainer

ray.init(address="local", num_cpus=2, log_to_driver=False)
experiment = override(load("tests/tiny.yaml"), {"data.root": VIDEOS, "storage": STORAGE, "name": "run"})
dataset = prepare(experiment)
print("waiting", flush=True)
trainer.train(experiment, dataset, WorkerResources(64.0, 0, 1))
"""


def test_training_that_waits_for_nodes_exits_on_sigterm(tmp_path: Path):
    code = WAITING_TRAINING.replace("VIDEOS", repr(str(write_twelve_videos(tmp_path)))).replace(
        "STORAGE", repr(str(tmp_path))
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        while "waiting" not in job.stdout.readline():
            assert job.poll() is None
        while not (tmp_path / "run" / "experiment.yaml").exists():
            time.sleep(0.1)
        time.sleep(10)  # until the controller waits for 64 CPUs
        job.send_signal(signal.SIGTERM)
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert "nothing to save" in out
    assert not (tmp_path / "run" / "stop").exists()
    assert not (tmp_path / "run" / "lease.json").exists()


OUTAGE_S = 60


def list_images(storage: Path) -> list[str]:
    """Returns `validation+step+7` for each image of the only run. Each animation has two."""
    _, run = load_only_run(storage)
    paths = sorted(storage.glob(f"**/{run.info.run_id}/artifacts/images/*.webp"))
    return [path.name.partition("+timestamp")[0] for path in paths]


def test_mlflow_outage_loses_and_duplicates_nothing(tmp_path: Path):
    """The server is killed in mid-training. A training without an outage writes to its own database."""
    videos, interrupted, port = write_twelve_videos(tmp_path), tmp_path / "interrupted", free_port()
    overrides = [
        "name=run",
        "cluster.workers=1",
        "train.global_batch_size=4",
        "train.epochs=2500",
        "train.validate_every=100",
    ]
    tracking_uri = f"tracking.uri=http://127.0.0.1:{port}"
    interrupted.mkdir()
    backend, files = f"sqlite:///{interrupted}/mlflow.db", ["--artifacts-destination", str(interrupted / "artifacts")]
    waiting = interrupted / "run" / "tracking" / "waiting"
    with mlflow_server(backend, port, files) as server:
        job = start_job("train", videos, interrupted, tracking_uri, *overrides)
        while not (interrupted / "run" / "tracking" / "sent" / "metrics-000000100").exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        server.stop(signal.SIGKILL)
        steps_before = read_steps_saved(interrupted)
        time.sleep(OUTAGE_S)
        steps_after, events = read_steps_saved(interrupted), list(waiting.iterdir())
    print(f"{steps_after - steps_before} steps and {len(events)} waiting events during the outage")
    assert steps_after > steps_before
    assert [event for event in events if "-metrics-" in event.name]
    with mlflow_server(backend, port, files):
        out, _ = job.communicate(timeout=900)
        assert job.returncode == 0, out
        replay = start_job("replay_tracking", videos, interrupted, tracking_uri, "name=run")
        out, _ = replay.communicate(timeout=300)
        assert replay.returncode == 0, out
    assert not list(waiting.iterdir())

    job = start_job("train", videos, tmp_path / "uninterrupted", *overrides)
    out, _ = job.communicate(timeout=900)
    assert job.returncode == 0, out
    assert load_curves(interrupted) == load_curves(tmp_path / "uninterrupted")  # to the last bit
    assert list_images(interrupted) == list_images(tmp_path / "uninterrupted")
    client, run = load_only_run(interrupted)
    for name in run.data.metrics:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert steps == sorted(set(steps)), name
    _, uninterrupted_run = load_only_run(tmp_path / "uninterrupted")
    names = {name for name in run.data.metrics if not name.startswith("system/gpu")}
    assert names >= uninterrupted_run.data.metrics.keys()


# Rates at which a GAN does not amplify rounding from step to step.
BETWEEN = {
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
    "model.kl_weight": 0.5,
    "model.posterior_fraction": 0.3,
    "model.adversarial_weight": 0.1,
    "model.discriminator_widths": (4, 6, 8),
    "optim.lr": 1e-5,
    "optim.ema_decay": 0.99,
    "train.epochs": 1500,
}


# At the rate of tiny.yaml, 1e-2, rounding errors grow a millionfold in 600 steps, in the one term that is nearly 0.
CVAE = {"model.batch_norm": False, "optim.lr": 1e-3}


@pytest.mark.parametrize("model", [CVAE, BETWEEN], ids=["cvae", "between"])
def test_training_that_loses_and_regains_nodes_has_the_curves_of_a_single_worker(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second of two nodes is lost and replaced three times. Each step has four clips, with any number of workers.

    Uses float64, where sums over one and over two workers differ too little to show after any number of steps, and no
    batch norm, whose statistics are those of one worker's clips.
    """

    def train_in_float64(settings: dict[str, Any]) -> None:  # local, because workers do not import tests
        torch.set_default_dtype(torch.float64)
        train_loop_per_worker(settings)

    monkeypatch.setattr(trainer, "train_loop_per_worker", train_in_float64)
    monkeypatch.setattr(trainer, "_MIN_WORKERS_TIMEOUT_S", 10)
    monkeypatch.setattr(trainer, "_RESIZE_POLL_S", 5.0)
    changes = {
        "data.root": str(write_twelve_videos(tmp_path)),
        "name": "run",
        "cluster.max_failures": 9,
        "train.global_batch_size": 4,
    }
    changes |= {"train.epochs": 3000, "train.validate_every": 300, "train.checkpoint_every": 50}
    changes |= model
    experiment = load(ROOT / "tests/tiny.yaml")
    single = override(experiment, changes | {"storage": str(tmp_path / "single"), "cluster.workers": 1})
    elastic = override(experiment, changes | {"storage": str(tmp_path / "elastic"), "cluster.workers": [1, 2]})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        trainer.train(single, prepare(single), WorkerResources(1.0, 0, 1))
        with ThreadPoolExecutor(1) as executor:
            training = executor.submit(trainer.train, elastic, prepare(elastic), WorkerResources(1.0, 0, 1))
            for loss in range(3):
                wait_for_workers(2, training)
                steps_before = read_steps_saved(tmp_path / "elastic")
                print(f"loss {loss + 1} at step {steps_before}", flush=True)
                cluster.remove_node(node, allow_graceful=False)
                while read_steps_saved(tmp_path / "elastic") < steps_before + 200:
                    assert not training.done(), training.result()
                    time.sleep(0.1)
                wait_for_workers(1, training)
                node = cluster.add_node(num_cpus=1)
            training.result(timeout=500)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert_curves_match(tmp_path / "elastic", tmp_path / "single")


ELASTIC = {
    "name": "run",
    "train.global_batch_size": 4,
    "train.epochs": 320,
    "train.validate_every": 320,
    "cluster.max_failures": 0,
}


@contextmanager
def slow_training_on_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], added: int, cpus_of_head: int
) -> Iterator[tuple[Cluster, list[Any], Future]]:
    """Yields a cluster, its added one-CPU nodes, and a training whose only checkpoints are the last and requested ones.

    Its network has batch norm, so its curves depend on the number of workers.
    """
    ray.cloudpickle.register_pickle_by_value(slow_training)  # workers do not import tests
    monkeypatch.setattr(trainer, "train_loop_per_worker", slow_training.slow_train_loop_per_worker)
    monkeypatch.setattr(trainer, "_MIN_WORKERS_TIMEOUT_S", 10)
    monkeypatch.setattr(trainer, "_RESIZE_POLL_S", 5.0)
    videos, storage = write_twelve_videos(tmp_path), str(tmp_path / "runs")
    experiment = override(
        load(ROOT / "tests/tiny.yaml"), ELASTIC | {"data.root": str(videos), "storage": storage} | changes
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus_of_head, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(added)]
        ray.init(address=cluster.address, log_to_driver=False)
        dataset = prepare(experiment)
        with ThreadPoolExecutor(1) as executor:
            yield cluster, nodes, executor.submit(trainer.train, experiment, dataset, WorkerResources(1.0, 0, 1))
    finally:
        ray.shutdown()
        cluster.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(slow_training)


def assert_each_step_ran_once_with_finite_losses(storage: Path) -> None:
    assert [step for step, *_ in read_steps(storage)] == list(range(720))  # 320 epochs of 9 clips in batches of 4
    curves = load_curves(storage)
    assert {"train/loss", "val/l2_paper"} <= curves.keys()
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)


def count_steps(storage: Path, workers: int) -> int:
    return sum(count == workers for _, count, _ in read_steps(storage))


def wait_for_steps(storage: Path, steps: int, workers: int, training: Future) -> None:
    """Waits until this number of workers has done `steps` more steps."""
    deadline_s, target = time.monotonic() + 200, count_steps(storage, workers) + steps
    while count_steps(storage, workers) < target:
        assert not training.done(), training.result()
        assert time.monotonic() < deadline_s, read_steps(storage)[-5:]
        time.sleep(0.1)


def drain(cluster: Cluster, node: Any, deadline_s: int) -> None:
    """Drains a node as a watcher of cloud preemption notices does."""
    command = [f"{Path(sys.executable).parent}/ray", "drain-node", f"--address={cluster.address}"]
    command += [f"--node-id={node.node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    subprocess.run([*command, f"--deadline-remaining-seconds={deadline_s}"], check=True, timeout=60)


def test_node_that_joins_costs_an_elastic_training_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage, changes = tmp_path / "runs", {"cluster.workers": [1, 2]}
    with slow_training_on_nodes(tmp_path, monkeypatch, changes, 0, 1) as (cluster, _, training):
        wait_for_steps(storage, 20, 1, training)
        cluster.add_node(num_cpus=1)
        wait_for_steps(storage, 20, 2, training)
        training.result(timeout=300)
    assert_each_step_ran_once_with_finite_losses(storage)


def test_drained_node_costs_no_step_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The node is removed at the deadline."""
    storage, changes = tmp_path / "runs", {"cluster.workers": [1, 2], "cluster.max_preemptions": 1}
    with slow_training_on_nodes(tmp_path, monkeypatch, changes, 1, 1) as (cluster, (node,), training):
        wait_for_steps(storage, 20, 2, training)
        drained_s = time.monotonic()
        drain(cluster, node, deadline_s=30)
        wait_for_steps(storage, 1, 1, training)
        print(f"training again {time.monotonic() - drained_s:.0f} s after the notice")
        time.sleep(max(0.0, drained_s + 30 - time.monotonic()))
        cluster.remove_node(node, allow_graceful=False)
        training.result(timeout=300)
    assert_each_step_ran_once_with_finite_losses(storage)


def test_checkpoint_after_a_notice_survives_the_loss_of_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The deadline is 1 s, a checkpoint takes 5 s, and the node is removed before it is written."""
    storage, changes = tmp_path / "runs", {"cluster.workers": [1, 2], "cluster.max_preemptions": 1}
    with slow_training_on_nodes(tmp_path, monkeypatch, changes, 2, 0) as (cluster, nodes, training):
        wait_for_steps(storage, 20, 2, training)
        (other_node,) = (node for node in nodes if node.node_id != read_steps(storage)[-1][2])
        drain(cluster, other_node, deadline_s=1)
        steps_done = -1
        while len(read_steps(storage)) > steps_done:
            steps_done = len(read_steps(storage))
            time.sleep(1)
        assert read_steps_saved(storage) == 0
        cluster.remove_node(other_node, allow_graceful=False)
        training.result(timeout=300)
    assert_each_step_ran_once_with_finite_losses(storage)


def test_four_workers_that_decode_train_on_two_nodes_of_two_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without a whole CPU on one node, the decode tasks would never start."""

    def train_and_log_resources(settings: dict[str, Any]) -> None:  # local, because workers do not import tests
        context = ray.get_runtime_context()
        line = f"{context.get_node_id()} {context.get_assigned_resources()['CPU']:g} {torch.get_num_threads()}\n"
        with open(tmp_path / "workers.txt", "a") as file:
            file.write(line)
        train_loop_per_worker(settings)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # Ray sets it to a worker's CPUs
    monkeypatch.setattr(trainer, "train_loop_per_worker", train_and_log_resources)
    changes = {
        "data.root": str(write_twelve_videos(tmp_path)),
        "storage": str(tmp_path / "runs"),
        "train.global_batch_size": 8,
    }
    changes |= {"train.epochs": 2, "cluster.max_failures": 0}
    experiment = override(load(ROOT / "tests/tiny.yaml"), changes)
    four_workers = override(experiment, {"name": "four", "cluster.workers": 4, "data.cache_decoded": False})
    one_worker = override(experiment, {"name": "one", "cluster.workers": 1})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        for run, expected in (
            (four_workers, WorkerResources(0.5, 0, 1)),
            (one_worker, WorkerResources(2.0, 0, 1)),
        ):
            worker_resources = resources_for(run)  # also checks that each node sees the folders
            assert worker_resources == expected
            with ThreadPoolExecutor(1) as executor:
                executor.submit(trainer.train, run, prepare(run), worker_resources).result(timeout=300)
    finally:
        ray.shutdown()
        cluster.shutdown()
    *lines_of_four, line_of_one = [line.split() for line in (tmp_path / "workers.txt").read_text().splitlines()]
    assert sorted(Counter(node for node, *_ in lines_of_four).values()) == [2, 2]
    assert {tuple(amounts) for _, *amounts in lines_of_four} == {("0.5", "1")}
    assert line_of_one[1:] == ["2", "2"]
    printed = capsys.readouterr().out
    assert re.search(r"^4 workers, 0\.5 CPU each \(\S+: 2, \S+: 2\); 2 CPUs for Ray Data$", printed, re.M)
    assert re.search(r"^1 worker, 2 CPUs each \(\S+: 1\)$", printed, re.M)
    assert checkpoint_selection.latest_checkpoint(four_workers)


def test_node_trains_on_a_dataset_larger_than_its_disk(bucket: str, tmp_path: Path):
    """Its curves equal those of a training whose disk holds the whole dataset."""
    videos, disk_bytes = tmp_path / "videos", 2**19
    for number in range(288):  # 9 shards
        path = videos / ("training", "validation")[number % 8 == 7] / "cats" / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 18, 30))
    for name in ("small", "large"):
        node_folder = tmp_path / name / f"giffy_ray-{os.getuid()}"
        node_folder.mkdir(parents=True)
        if name == "small":
            mount = ["mount", "-t", "tmpfs", "-o", f"size={disk_bytes}", "tmpfs", str(node_folder)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("a tmpfs cannot be mounted here")
        tracking_uri = f"sqlite:///{tmp_path}/{name}/mlflow.db"
        # Without a location of its own, MLflow puts artifacts into ./mlruns.
        artifacts = str(tmp_path / name / "artifacts")
        MlflowClient(tracking_uri).create_experiment("giffy_ray", artifact_location=artifacts)
        try:
            overrides = [
                "name=run",
                "train.epochs=3",
                "train.validate_every=1",
                f"storage={bucket}/{name}",
                f"tracking.uri={tracking_uri}",
            ]
            environment = {"TMPDIR": str(tmp_path / name), "RAY_TMPDIR": "/tmp"}
            job = start_job("train", videos, tmp_path / name, *overrides, **environment)
            out, _ = job.communicate(timeout=300)
            assert job.returncode == 0, out
            cached_bytes = sum(path.stat().st_size for path in node_folder.glob("shards/*/*.u8"))
        finally:
            if name == "small":
                subprocess.run(["umount", "--lazy", str(node_folder)], check=True)
        if name == "small":
            assert 0 < cached_bytes <= disk_bytes
    assert cached_bytes > 2 * disk_bytes
    assert load_curves(tmp_path / "small") == load_curves(tmp_path / "large")


def wait_for_workers(expected: int, training: Future) -> None:
    deadline_s = time.monotonic() + 200
    while (workers := len(list_workers(psutil.Process()))) != expected:
        assert not training.done(), training.result()
        assert time.monotonic() < deadline_s, f"{workers} workers, not {expected}"
        time.sleep(0.1)


def load_trials(storage: Path) -> list[optuna.trial.FrozenTrial]:
    database = storage / "tiny-study" / "optuna.db"
    try:
        return optuna.load_study(study_name="tiny-study", storage=f"sqlite:///{database}").trials
    except (KeyError, sqlalchemy.exc.SQLAlchemyError):  # the database is still being created
        return []


def run_search_with_five_kills(
    videos: Path, storage: Path, overrides: list[str], kill_is_due: Callable[[int], bool]
) -> None:
    """Kills the search up to 4 s after `kill_is_due(n)` for n = 0 to 4, restarts it, and lets it end."""
    generator, overrides = random.Random(0), ["cluster.workers=1", *overrides]
    job = start_job("tune", videos, storage, *overrides)
    for kill in range(5):
        while not kill_is_due(kill):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.2)
        time.sleep(4 * generator.random())
        trials = load_trials(storage)
        reports = sum(len(trial.intermediate_values) for trial in trials)
        print(f"kill {kill + 1} with {len(trials)} trials, {reports} reports", flush=True)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=120)
        time.sleep(2)  # until its Ray cluster has ended
        job = start_job("tune", videos, storage, *overrides)
    out, _ = job.communicate(timeout=900)
    assert job.returncode == 0, out


def load_statuses(storage: Path, trials: int) -> set[str]:
    """Returns the statuses of the MLflow runs of a search, and asserts that each run exists once."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'giffy_ray'")
    runs = client.search_runs([experiment.experiment_id])
    names = [f"trial-{number:04}" for number in range(trials)]
    assert sorted(run.info.run_name for run in runs) == ["tiny-study", "tiny-study-best", *names]
    return {run.info.status for run in runs}


def test_search_killed_five_times_has_each_trial_once(tmp_path: Path):
    storage, trial_count = tmp_path / "runs", 8
    overrides = [f"search.trials={trial_count}", "search.epochs=400", "train.validate_every=20", "search.asha=false"]
    videos = write_twelve_videos(tmp_path)
    run_search_with_five_kills(videos, storage, overrides, lambda kill: len(load_trials(storage)) > kill)

    trials = load_trials(storage)
    assert [trial.number for trial in trials] == list(range(trial_count))
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    assert len({tuple(trial.params.items()) for trial in trials}) == trial_count
    assert not [trial.user_attrs for trial in trials if trial.user_attrs]  # none failed
    assert all(list(trial.intermediate_values) == list(range(20, 401, 20)) for trial in trials)
    assert load_statuses(storage, trial_count) == {"FINISHED"}


def test_population_killed_five_times_ends_as_an_uninterrupted_one(tmp_path: Path):
    videos, trial_count = write_twelve_videos(tmp_path), 4
    overrides = [
        "search.sampler=pbt",
        f"search.trials={trial_count}",
        "search.epochs=120",
        "train.validate_every=20",
    ]

    def kill_is_due(kill: int) -> bool:
        trials = load_trials(tmp_path / "killed")
        return sum(len(trial.intermediate_values) for trial in trials) > 4 * kill

    run_search_with_five_kills(videos, tmp_path / "killed", overrides, kill_is_due)
    job = start_job("tune", videos, tmp_path / "uninterrupted", "cluster.workers=1", *overrides)
    out, _ = job.communicate(timeout=900)
    assert job.returncode == 0, out

    killed, uninterrupted = load_trials(tmp_path / "killed"), load_trials(tmp_path / "uninterrupted")
    assert {trial.state for trial in killed} == {optuna.trial.TrialState.COMPLETE}
    for trial, expected in zip(killed, uninterrupted, strict=True):
        assert trial.params == expected.params
        assert trial.user_attrs == expected.user_attrs  # which trials exploited which others, and the new values
        assert trial.intermediate_values == expected.intermediate_values  # to the last bit
    assert any(trial.user_attrs for trial in killed)
    assert load_statuses(tmp_path / "killed", trial_count) == {"FINISHED"}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Callable[[], str]]:
    """A function that creates a database on a PostgreSQL server on loopback and returns its address."""
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if not versions:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder, port, databases = Path(tempfile.mkdtemp(prefix="giffy_ray-")), free_port(), itertools.count()
    as_owner: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL}
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_owner |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    secret = folder / "secret"
    secret.write_text("hush@/ #%")
    server = f"127.0.0.1:{port}"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    data = ["-D", str(folder / "data")]
    subprocess.run(
        [versions[-1] / "initdb", *data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={secret}"],
        check=True,
        **as_owner,
    )
    control = [versions[-1] / "pg_ctl", *data, "-w", "-l", str(folder / "log")]
    subprocess.run([*control, "-o", options, "start"], check=True, **as_owner)
    try:
        server_address = f"postgresql://me:{quote(secret.read_text(), safe='')}@{server}/"

        def create() -> str:
            import psycopg

            name = f"db{next(databases)}"
            with psycopg.connect(f"{server_address}postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            return server_address + name

        yield create
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, **as_owner)
        shutil.rmtree(folder)


def search_experiment(address: str, folder: Path, name: str, *overrides: str) -> Experiment:
    space = "search.space={optim.lr: {log_uniform: [1e-4, 1e-1]}, optim.schedule: {choice: [constant, cosine]}}"
    fields = [
        space,
        f"name={name}",
        f"storage={folder}",
        "search.trials=5",
        "search.epochs=2",
        "search.metric=val/psnr",
    ]
    return override(load(None, [*fields, *overrides]), {"search.storage": address})


def run_search(address: str, folder: Path, name: str) -> list[int]:
    """Completes a search whose later trials are better. Returns the numbers of the best trials."""
    source = IndependentTrials(search_experiment(address, folder, name, "search.asha=false"))
    while proposal := source.ask():
        number, _ = proposal
        source.report(number, 2, {"val/psnr": 20.0 + number})
        source.end(number)
    return [trial.number for trial in source.study.best()]


def test_searches_in_postgresql_start_concurrently_and_resume_after_a_kill(postgresql, tmp_path: Path):
    address = postgresql()
    # They start in an empty database, where each tries to create the tables.
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(functools.partial(run_search, address, tmp_path), ["a", "b", "c"])) == [[4]] * 3
    killed = IndependentTrials(search_experiment(address, tmp_path, "killed"))
    number, values = killed.ask() or (-1, {})
    killed.report(number, 1, {"val/psnr": 21.0})
    resumed = IndependentTrials(search_experiment(address, tmp_path, "killed"))
    assert resumed.ask() == (number, values)
    resumed.report(number, 2, {"val/psnr": 22.0})
    resumed.end(number)
    assert resumed.study.trials()[0].intermediate_values == {1: 21.0, 2: 22.0}
    assert resumed.study.trials()[0].value == 22.0
    names = {study.study_name for study in open_storage(search_experiment(address, tmp_path, "any")).get_all_studies()}
    assert names == {"a", "b", "c", "killed"}
    for wrong_address, message in (
        (address.replace("//me:", "//you:"), "authentication failed"),
        (f"{address}x", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=rf"search\.storage: .*{message}") as error_info:
            open_storage(search_experiment(wrong_address, tmp_path, "any"))
        assert "hush" not in str(error_info.value)


def test_mlflow_stores_runs_in_postgresql_in_a_database_separate_from_optuna(postgresql, tmp_path: Path):
    address = postgresql()
    client = MlflowClient(address)
    run = client.create_run(client.create_experiment("test", f"file://{tmp_path}"))
    client.log_metric(run.info.run_id, "val/psnr", 21.0)
    assert client.get_run(run.info.run_id).data.metrics == {"val/psnr": 21.0}
    with pytest.raises(ConfigError, match=r"search\.storage: its tables belong to another version of Optuna"):
        open_storage(search_experiment(address, tmp_path, "any"))


def test_failed_trial_ends_its_process_and_is_not_retried(
    tiny: Experiment, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
):
    """A CUDA error persists in its process, and would make every later trial there fail."""
    changes = {"search.space": {"optim.lr": {"uniform": [0.1, 1]}}, "search.trials": 4, "search.epochs": 1}
    experiment = override(tiny, {**changes, "name": "study", "storage": str(tmp_path / "runs")})
    pids = tmp_path / "pids"
    pids.mkdir()

    def run_trial_with_cuda_error(
        config: dict[str, Any],
        experiment_yaml: str,
        dataset_path: str,
        worker_resources: WorkerResources,
        parent: str,
        token: str,
    ) -> None:
        def train_in_process(*_: Any) -> None:
            with open(pids / str(config["number"]), "a") as file:
                file.write(f"{os.getpid()}\n")
            if config["number"] == 1:
                os.environ["CUDA_ERROR"] = "1"
            if "CUDA_ERROR" in os.environ:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            ray.tune.report({"epoch": 1, "val/l2_paper": 1.0 + config["number"]})

        module: Any = importlib.import_module("giffy_ray.tuning.trial_runner")
        module.ClipDataset = lambda *_: None
        module._train_in_process = train_in_process
        module.run_trial(config, experiment_yaml, dataset_path, worker_resources, parent, token)

    monkeypatch.setattr(tuner, "run_trial", run_trial_with_cuda_error)
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    source = IndependentTrials(experiment)
    dataset: Any = SimpleNamespace(location="nowhere")
    lock: Any = SimpleNamespace(holder="we", lost_reason="")
    tuner.build_tuner(experiment, dataset, WorkerResources(1, 0, 1), "", source, lock).fit()
    study = tuner.collect_study(source)
    failures = [trial.failure for trial in sorted(study.trials, key=lambda trial: trial.number)]
    assert failures == ["", "RuntimeError: CUDA error: an illegal memory access was encountered", "", ""]
    assert [trial.objectives for trial in study.trials[:3]] == [(1.0,), (3.0,), (4.0,)]
    processes = [(pids / str(number)).read_text().split() for number in range(4)]
    assert all(len(attempts) == 1 for attempts in processes)  # although a trial on a lost node would restart
    assert processes[0] == processes[1]
    assert processes[2] == processes[3] != processes[1]
