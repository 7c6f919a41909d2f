"""What takes minutes: jobs that are killed. Run by `make chaos`."""

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

from giffy_ray import checkpoints, train, tune
from giffy_ray.cluster import Share, share_of
from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.data.prepare import prepare
from giffy_ray.data.store import Store
from giffy_ray.head import free_port, local_head
from giffy_ray.loop import train_loop
from giffy_ray.tune.ledger import Ledger
from giffy_ray.tune.stored import opened
from giffy_ray.ui import mlflow_server
from tests import slow_training
from tests.conftest import moving_video

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parent.parent
VIDEOS = 3000
LONG = {"train.epochs": 400, "train.batch": 4, "train.validate_every": 40, "train.checkpoint_every": 10}


def job_of(job: str, videos: Path, storage: Path, *words: str, **environment: str) -> subprocess.Popen:
    # In a process group of its own, so that nothing outside is hit; its Ray ends with it.
    return subprocess.Popen(
        [sys.executable, f"jobs/{job}.py", "tests/tiny.yaml", f"data.root={videos}", f"storage={storage}", *words],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def shards_in(storage: Path) -> dict[str, tuple[int, int]]:
    """Every finished file of the store: name -> inode and time of writing."""
    files = [path for path in storage.glob("stores/*/shards/*") if not path.name.endswith(".partial")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def store_in(storage: Path) -> Store:
    (place,) = storage.glob("stores/*/sets/*")
    return Store(str(place))


def test_a_job_that_is_killed_three_times_ends_with_what_an_undisturbed_one_ends_with(tmp_path: Path):
    videos = tmp_path / "videos"
    for number in range(VIDEOS):
        path = videos / ("cats", "dogs")[number % 2] / f"{number:04}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number % 50 == 7 else moving_video(number, 15, 30))

    drawn, seen = random.Random(0), {}
    for kill in range(3):
        job, wanted = job_of("prepare", videos, tmp_path / "killed"), (kill + 1) * 40 + drawn.randrange(20)
        while len(shards_in(tmp_path / "killed")) < wanted:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
        time.sleep(2)  # for its Ray to notice
        now = shards_in(tmp_path / "killed")
        assert seen.items() <= now.items()  # nothing that was stored is written again
        seen = now
    for storage in ("killed", "whole"):
        job = job_of("prepare", videos, tmp_path / storage)
        out, _ = job.communicate(timeout=500)
        assert job.returncode == 0, out
    assert seen.items() <= shards_in(tmp_path / "killed").items()

    killed, whole = store_in(tmp_path / "killed"), store_in(tmp_path / "whole")
    assert len(whole) == VIDEOS - VIDEOS // 50
    assert killed.ids == whole.ids
    assert killed.rejects == whole.rejects
    assert killed.fingerprint == whole.fingerprint
    sums = [hashlib.sha256(store.gather(np.arange(len(store)))).hexdigest() for store in (killed, whole)]
    assert sums[0] == sums[1]
    # Even the shards are the same files, and no video is in two of them.
    assert shards_in(tmp_path / "killed").keys() == shards_in(tmp_path / "whole").keys()
    listed = pq.read_table(sorted(map(str, tmp_path.glob("killed/stores/*/shards/*.parquet"))), columns=["identity"])
    assert len(listed) == len(set(listed["identity"].to_pylist())) == VIDEOS


KILLS = int(os.environ.get("GIFFY_RAY_KILLS", "20"))


# Both have batch norm. The second also trains a discriminator, and keeps an average of its generator.
TWO_STREAM = {
    "clip.frames": 16,
    "model.kind": "two_stream",
    "model.widths": [2, 2, 2, 2],
    "optim.ema": 0.9,
    "optim.lr": 1e-3,
}
BATCH_NORM = {"cvae": {}, "two_stream": TWO_STREAM}


def train_job(videos: Path, storage: Path, kind: str = "cvae") -> subprocess.Popen:
    words = [f"{name}={value}" for name, value in (LONG | BATCH_NORM[kind]).items()]
    return job_of("train_cvae", videos, storage, "name=run", "cluster.workers=2", "cluster.max_failures=99", *words)


def steps_saved(storage: Path) -> int:
    """Of the newest whole checkpoint; 0 where there is none."""
    for folder in sorted(storage.glob("run/checkpoint_*"), reverse=True):
        try:
            checkpoints.verify(str(folder))
            return json.loads((folder / "position.json").read_text())["steps_done"]
        except (checkpoints.DamagedCheckpoint, OSError):
            continue  # it is being written, or removed
    return 0


def workers_of(job: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    workers = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            if process.name().startswith("ray::RayTrain"):
                workers.append(process)
    return workers


def weights_in(storage: Path) -> dict[str, str]:
    """Of all networks and optimisers: the file's name -> its sha256."""
    files = sorted(Path(newest_in(storage)).glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def newest_in(storage: Path) -> str:
    return checkpoints.newest(override(Experiment(), {"storage": str(storage), "name": "run"}))


def only_run_in(storage: Path) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'giffy_ray'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return client, run


def curves_in(storage: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of everything that was logged to the only run that there is, but times."""
    client, run = only_run_in(storage)
    names = [name for name in run.data.metrics if name.startswith(("train/", "val/"))]
    return {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)] for name in names}


def few_videos(folder: Path) -> Path:
    videos = folder / "videos"
    for number in range(12):
        path = videos / ("training", "validation")[number % 4 == 3] / "cats" / f"{number:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 30, 30))
    return videos


@pytest.mark.parametrize(("kind", "kills"), [("cvae", KILLS), ("two_stream", KILLS // 4)])
def test_a_training_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(kind: str, kills: int, tmp_path: Path):
    videos = few_videos(tmp_path)
    whole = train_job(videos, tmp_path / "whole", kind)
    out, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, out

    drawn, job = random.Random(0), train_job(videos, tmp_path / "killed", kind)
    for kill in range(kills):
        wanted = steps_saved(tmp_path / "killed") + drawn.choice([0, 10, 20])
        while steps_saved(tmp_path / "killed") < wanted or not (workers := workers_of(job)):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        time.sleep(drawn.random())
        victim = drawn.choice(["driver", "worker", "driver, asked"])
        print(f"kill {kill + 1} at step {steps_saved(tmp_path / 'killed')}: {victim}", flush=True)
        if victim == "worker":
            drawn.choice(workers).kill()
            continue
        os.kill(job.pid, signal.SIGKILL if victim == "driver" else signal.SIGTERM)
        out, _ = job.communicate(timeout=120)
        assert job.returncode == (-signal.SIGKILL if victim == "driver" else 128 + signal.SIGTERM), out
        job = train_job(videos, tmp_path / "killed", kind)
    out, _ = job.communicate(timeout=600)
    assert job.returncode == 0, out

    assert weights_in(tmp_path / "killed") == weights_in(tmp_path / "whole")  # so each step had the same clips
    undisturbed = curves_in(tmp_path / "whole")
    for name, curve in curves_in(tmp_path / "killed").items():
        assert [step for step, _ in curve] == [step for step, _ in undisturbed[name]]
        assert dict(curve) == pytest.approx(dict(undisturbed[name]), rel=1e-9), name


def steps_in(storage: Path) -> list[tuple[int, int, str]]:
    """(number, workers, node of rank 0) of each step that was done, in order, as `slow_training.py` lists them."""
    steps = storage / "steps.txt"
    lines = steps.read_text().splitlines() if steps.exists() else []
    return [(int(step), int(workers), node) for step, workers, node in (line.split() for line in lines)]


def test_ray_job_stop_waits_for_a_slow_checkpoint_and_the_run_resumes_at_that_step(tmp_path: Path):
    storage = tmp_path / "runs"
    words = ["tests/tiny.yaml", f"data.root={few_videos(tmp_path)}", f"storage={storage}", "name=run"]
    words += ["cluster.workers=1", "train.epochs=80", "train.validate_every=80"]
    job = ["--", "python", "tests/slow_training.py", *words]
    with local_head(cpus=2) as head:

        def ray_job(*command: str) -> str:
            whole = {"env": head.environment, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
            done = subprocess.run(["ray", "job", *command], check=False, **whole)
            return done.stdout + done.stderr

        ray_job("submit", "--no-wait", "--submission-id=first", *job)
        while len(steps_in(storage)) < 20:
            assert "FAILED" not in (status := ray_job("status", "first")), status + ray_job("logs", "first")
            time.sleep(0.5)
        stopped = ray_job("stop", "first")
        assert "stopped" in stopped, stopped
        assert 20 <= steps_saved(storage) == len(steps_in(storage)) < 180
        out = ray_job("submit", "--submission-id=second", *job)
        assert "succeeded" in out, out
    assert "`ray job stop` kills" not in out  # the head gives jobs enough time
    assert [step for step, *_ in steps_in(storage)] == list(range(180))  # 80 epochs of 9 clips in batches of 4


WAITING = """
import ray
from giffy_ray import train
from giffy_ray.cluster import Share
from giffy_ray.config import load, override
from giffy_ray.data.prepare import prepare

ray.init(address="local", num_cpus=2, log_to_driver=False)
experiment = override(load("tests/tiny.yaml"), {"data.root": VIDEOS, "storage": STORAGE, "name": "run"})
store = prepare(experiment)
print("waiting", flush=True)
train.train(experiment, store, Share(64.0, 0, 1))
"""


def test_a_training_that_waits_for_machines_ends_when_it_is_asked_to(tmp_path: Path):
    code = WAITING.replace("VIDEOS", repr(str(few_videos(tmp_path)))).replace("STORAGE", repr(str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        while "waiting" not in job.stdout.readline():
            assert job.poll() is None
        while not (tmp_path / "run" / "experiment.yaml").exists():
            time.sleep(0.1)
        time.sleep(10)  # for the controller to wait for 64 CPUs
        job.send_signal(signal.SIGTERM)
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert "nothing to save" in out
    assert not (tmp_path / "run" / "stop").exists()
    assert not (tmp_path / "run" / "lease.json").exists()


AWAY_S = 60


def images_in(storage: Path) -> list[str]:
    """'validation+step+7' of each animation that MLflow has, twice each."""
    _, run = only_run_in(storage)
    paths = sorted(storage.glob(f"**/{run.info.run_id}/artifacts/images/*.webp"))
    return [path.name.partition("+timestamp")[0] for path in paths]


def test_an_mlflow_that_is_away_for_a_minute_misses_nothing_and_has_nothing_twice(tmp_path: Path):
    """A real server, killed in mid-training; an undisturbed training writes into a database of its own."""
    videos, disturbed, port = few_videos(tmp_path), tmp_path / "disturbed", free_port()
    words = ["name=run", "cluster.workers=1", "train.batch=4", "train.epochs=2500", "train.validate_every=100"]
    there = f"tracking.uri=http://127.0.0.1:{port}"
    disturbed.mkdir()
    backend, files = f"sqlite:///{disturbed}/mlflow.db", ["--artifacts-destination", str(disturbed / "artifacts")]
    waiting = disturbed / "run" / "tracking" / "waiting"
    with mlflow_server(backend, port, files) as server:
        job = job_of("train_cvae", videos, disturbed, there, *words)
        while not (disturbed / "run" / "tracking" / "sent" / "metrics-000000100").exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        server.end(signal.SIGKILL)
        before = steps_saved(disturbed)
        time.sleep(AWAY_S)
        after, letters = steps_saved(disturbed), list(waiting.iterdir())
    print(f"while it was away there were {after - before} steps and {len(letters)} letters")
    assert after > before
    assert [letter for letter in letters if "-metrics-" in letter.name]
    with mlflow_server(backend, port, files):
        out, _ = job.communicate(timeout=900)
        assert job.returncode == 0, out
        replay = job_of("replay_tracking", videos, disturbed, there, "name=run")
        out, _ = replay.communicate(timeout=300)
        assert replay.returncode == 0, out
    assert not list(waiting.iterdir())

    job = job_of("train_cvae", videos, tmp_path / "whole", *words)
    out, _ = job.communicate(timeout=900)
    assert job.returncode == 0, out
    assert curves_in(disturbed) == curves_in(tmp_path / "whole")  # to the last bit
    assert images_in(disturbed) == images_in(tmp_path / "whole")
    client, run = only_run_in(disturbed)
    for name in run.data.metrics:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert steps == sorted(set(steps)), name
    whole = only_run_in(tmp_path / "whole")[1]
    assert {name for name in run.data.metrics if not name.startswith("system/gpu")} >= whole.data.metrics.keys()


# Rates at which a GAN does not amplify rounding from step to step.
BETWEEN = {
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
    "model.kl_weight": 0.5,
    "model.sampled_share": 0.3,
    "model.adversarial_weight": 0.1,
    "model.discriminator_widths": (4, 6, 8),
    "optim.lr": 1e-5,
    "optim.ema": 0.99,
    "train.epochs": 1500,
}


# At the rate of tiny.yaml, 1e-2, rounding grows a millionfold in 600 steps, in the one term that is nearly 0.
CVAE = {"model.batch_norm": False, "optim.lr": 1e-3}


@pytest.mark.parametrize("model", [CVAE, BETWEEN], ids=["cvae", "between"])
def test_a_training_whose_machines_come_and_go_ends_with_the_curves_of_one_that_was_left_alone(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three times the second of two nodes is lost and comes back; steps are of four clips, whoever is there.

    In float64, where a sum that two workers make differs from one worker's by so little that no number of steps shows
    it, and without batch norm, which looks at one worker's clips.
    """

    def in_float64(settings: dict[str, Any]) -> None:  # in here, as workers do not import tests
        torch.set_default_dtype(torch.float64)
        train_loop(settings)

    monkeypatch.setattr(train, "train_loop", in_float64)
    monkeypatch.setattr(train, "_MAKE_DO_S", 10)
    monkeypatch.setattr(train, "_RESIZE_S", 5.0)
    changes = {"data.root": str(few_videos(tmp_path)), "name": "run", "cluster.max_failures": 9, "train.batch": 4}
    changes |= {"train.epochs": 3000, "train.validate_every": 300, "train.checkpoint_every": 50}
    changes |= model
    experiment = load(ROOT / "tests/tiny.yaml")
    lonely = override(experiment, changes | {"storage": str(tmp_path / "lonely"), "cluster.workers": 1})
    shared = override(experiment, changes | {"storage": str(tmp_path / "shared"), "cluster.workers": [1, 2]})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        train.train(lonely, prepare(lonely), Share(1.0, 0, 1))
        with ThreadPoolExecutor(1) as aside:
            training = aside.submit(train.train, shared, prepare(shared), Share(1.0, 0, 1))
            for loss in range(3):
                wait_for_workers(2, training)
                before = steps_saved(tmp_path / "shared")
                print(f"loss {loss + 1} at step {before}", flush=True)
                cluster.remove_node(node, allow_graceful=False)
                while steps_saved(tmp_path / "shared") < before + 200:
                    assert not training.done(), training.result()
                    time.sleep(0.1)
                wait_for_workers(1, training)
                node = cluster.add_node(num_cpus=1)
            training.result(timeout=500)
    finally:
        ray.shutdown()
        cluster.shutdown()
    undisturbed = curves_in(tmp_path / "lonely")
    for name, curve in curves_in(tmp_path / "shared").items():
        assert [step for step, _ in curve] == [step for step, _ in undisturbed[name]]
        assert dict(curve) == pytest.approx(dict(undisturbed[name]), rel=1e-9), name


ELASTIC = {"name": "run", "train.batch": 4, "train.epochs": 320, "train.validate_every": 320, "cluster.max_failures": 0}


@contextmanager
def slow_training_on_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], added: int, cpus_of_head: int
) -> Iterator[tuple[Cluster, list[Any], Future]]:
    """A cluster of one-CPU nodes, and a training on it with no checkpoints but the last and those asked for.

    Its network has batch norm, whose statistics are those of other clips with another number of workers.
    """
    ray.cloudpickle.register_pickle_by_value(slow_training)  # workers do not import tests
    monkeypatch.setattr(train, "train_loop", slow_training.slow_loop)
    monkeypatch.setattr(train, "_MAKE_DO_S", 10)
    monkeypatch.setattr(train, "_RESIZE_S", 5.0)
    videos, storage = few_videos(tmp_path), str(tmp_path / "runs")
    experiment = override(
        load(ROOT / "tests/tiny.yaml"), ELASTIC | {"data.root": str(videos), "storage": storage} | changes
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus_of_head, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(added)]
        ray.init(address=cluster.address, log_to_driver=False)
        store = prepare(experiment)
        with ThreadPoolExecutor(1) as aside:
            yield cluster, nodes, aside.submit(train.train, experiment, store, Share(1.0, 0, 1))
    finally:
        ray.shutdown()
        cluster.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(slow_training)


def assert_each_step_was_taken_once_with_finite_losses(storage: Path) -> None:
    assert [step for step, *_ in steps_in(storage)] == list(range(720))  # 320 epochs of 9 clips in batches of 4
    curves = curves_in(storage)
    assert {"train/loss", "val/l2_report"} <= curves.keys()
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)


def wait_for_steps(storage: Path, wanted: int, workers: int, training: Future) -> None:
    """Until `wanted` more steps were done by so many workers."""
    deadline, before = time.monotonic() + 200, sum(count == workers for _, count, _ in steps_in(storage))
    while sum(count == workers for _, count, _ in steps_in(storage)) < before + wanted:
        assert not training.done(), training.result()
        assert time.monotonic() < deadline, steps_in(storage)[-5:]
        time.sleep(0.1)


def drain(cluster: Cluster, node: Any, deadline_s: int) -> None:
    """As a watcher of a cloud's notices does."""
    command = [f"{Path(sys.executable).parent}/ray", "drain-node", f"--address={cluster.address}"]
    command += [f"--node-id={node.node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    subprocess.run([*command, f"--deadline-remaining-seconds={deadline_s}"], check=True, timeout=60)


def test_a_node_that_joins_costs_an_elastic_training_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage, changes = tmp_path / "runs", {"cluster.workers": [1, 2]}
    with slow_training_on_nodes(tmp_path, monkeypatch, changes, 0, 1) as (cluster, _, training):
        wait_for_steps(storage, 20, 1, training)
        cluster.add_node(num_cpus=1)
        wait_for_steps(storage, 20, 2, training)
        training.result(timeout=300)
    assert_each_step_was_taken_once_with_finite_losses(storage)


def test_a_node_that_is_drained_costs_no_step_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the deadline the node is gone."""
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
    assert_each_step_was_taken_once_with_finite_losses(storage)


def test_the_checkpoint_of_a_notice_outlasts_the_node_of_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The deadline is a second, a checkpoint takes five, and the node is gone before it is written."""
    storage, changes = tmp_path / "runs", {"cluster.workers": [1, 2], "cluster.max_preemptions": 1}
    with slow_training_on_nodes(tmp_path, monkeypatch, changes, 2, 0) as (cluster, nodes, training):
        wait_for_steps(storage, 20, 2, training)
        (other,) = (node for node in nodes if node.node_id != steps_in(storage)[-1][2])
        drain(cluster, other, deadline_s=1)
        done = -1
        while len(steps_in(storage)) > done:
            done = len(steps_in(storage))
            time.sleep(1)
        assert steps_saved(storage) == 0
        cluster.remove_node(other, allow_graceful=False)
        training.result(timeout=300)
    assert_each_step_was_taken_once_with_finite_losses(storage)


def test_four_workers_that_decode_train_on_two_nodes_of_two_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without a whole CPU on one node, the tasks that decode would wait for ever."""

    def noted(settings: dict[str, Any]) -> None:  # in here, as workers do not import tests
        context = ray.get_runtime_context()
        note = f"{context.get_node_id()} {context.get_assigned_resources()['CPU']:g} {torch.get_num_threads()}\n"
        with open(tmp_path / "workers.txt", "a") as file:
            file.write(note)
        train_loop(settings)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which Ray sets by a worker's CPUs
    monkeypatch.setattr(train, "train_loop", noted)
    changes = {"data.root": str(few_videos(tmp_path)), "storage": str(tmp_path / "runs"), "train.batch": 8}
    changes |= {"train.epochs": 2, "cluster.max_failures": 0}
    experiment = override(load(ROOT / "tests/tiny.yaml"), changes)
    four = override(experiment, {"name": "four", "cluster.workers": 4, "data.keep": False})
    one = override(experiment, {"name": "one", "cluster.workers": 1})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        for asked, expected in ((four, Share(0.5, 0, 1)), (one, Share(2.0, 0, 1))):
            share = share_of(asked)  # each node is asked whether it sees the folders
            assert share == expected
            with ThreadPoolExecutor(1) as aside:
                aside.submit(train.train, asked, prepare(asked), share).result(timeout=300)
    finally:
        ray.shutdown()
        cluster.shutdown()
    *of_four, of_one = [line.split() for line in (tmp_path / "workers.txt").read_text().splitlines()]
    assert sorted(Counter(node for node, *_ in of_four).values()) == [2, 2]
    assert {tuple(amounts) for _, *amounts in of_four} == {("0.5", "1")}
    assert of_one[1:] == ["2", "2"]
    printed = capsys.readouterr().out
    assert re.search(r"^4 workers, 0\.5 CPU each \(\S+: 2, \S+: 2\); 2 CPUs for Ray Data$", printed, re.M)
    assert re.search(r"^1 worker, 2 CPUs each \(\S+: 1\)$", printed, re.M)
    assert checkpoints.newest(four)


def test_a_node_trains_through_a_data_set_that_is_larger_than_its_disk(bucket: str, tmp_path: Path):
    """Against the same training with room for all: the curves are equal, and the disk is never overfull."""
    videos, disk_bytes = tmp_path / "videos", 2**19
    for number in range(288):  # 9 shards
        path = videos / ("training", "validation")[number % 8 == 7] / "cats" / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 18, 30))
    for name in ("small", "large"):
        place = tmp_path / name / f"giffy_ray-{os.getuid()}"
        place.mkdir(parents=True)
        if name == "small":
            mount = ["mount", "-t", "tmpfs", "-o", f"size={disk_bytes}", "tmpfs", str(place)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("a tmpfs cannot be mounted here")
        try:
            words = ["name=run", "train.epochs=3", "train.validate_every=1", f"storage={bucket}/{name}"]
            words += [f"tracking.uri=sqlite:///{tmp_path}/{name}/mlflow.db"]
            job = job_of("train_cvae", videos, tmp_path / name, *words, TMPDIR=str(tmp_path / name), RAY_TMPDIR="/tmp")
            out, _ = job.communicate(timeout=300)
            assert job.returncode == 0, out
            copies = sum(path.stat().st_size for path in place.glob("shards/*/*.u8"))
        finally:
            if name == "small":
                subprocess.run(["umount", "--lazy", str(place)], check=True)
        if name == "small":
            assert 0 < copies <= disk_bytes
    assert copies > 2 * disk_bytes
    assert curves_in(tmp_path / "small") == curves_in(tmp_path / "large")


def wait_for_workers(wanted: int, training: Future) -> None:
    deadline = time.monotonic() + 200
    while (found := len(workers_of(psutil.Process()))) != wanted:
        assert not training.done(), training.result()
        assert time.monotonic() < deadline, f"{found} workers, not {wanted}"
        time.sleep(0.1)


def trials_of(storage: Path) -> list[optuna.trial.FrozenTrial]:
    database = storage / "tiny-study" / "optuna.db"
    try:
        return optuna.load_study(study_name="tiny-study", storage=f"sqlite:///{database}").trials
    except (KeyError, sqlalchemy.exc.SQLAlchemyError):  # it is only being made
        return []


def search_killed_five_times(videos: Path, storage: Path, words: list[str], due: Callable[[int], bool]) -> None:
    """The search is killed for the n-th time a little after due(n)."""
    drawn, words = random.Random(0), ["cluster.workers=1", *words]
    job = job_of("tune_cvae", videos, storage, *words)
    for kill in range(5):
        while not due(kill):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.2)
        time.sleep(4 * drawn.random())
        found = trials_of(storage)
        reports = sum(len(trial.intermediate_values) for trial in found)
        print(f"kill {kill + 1} with {len(found)} trials, {reports} reports", flush=True)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=120)
        time.sleep(2)  # for its Ray to notice
        job = job_of("tune_cvae", videos, storage, *words)
    out, _ = job.communicate(timeout=900)
    assert job.returncode == 0, out


def statuses_in_mlflow(storage: Path, trials: int) -> set[str]:
    """Of the runs of a search, each of which is there once."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'giffy_ray'")
    runs = client.search_runs([experiment.experiment_id])
    names = [f"trial-{number:04}" for number in range(trials)]
    assert sorted(run.info.run_name for run in runs) == ["tiny-study", "tiny-study-best", *names]
    return {run.info.status for run in runs}


def test_a_search_that_is_killed_five_times_has_each_of_its_trials_once(tmp_path: Path):
    storage, trials = tmp_path / "runs", 8
    words = [f"search.trials={trials}", "search.epochs=400", "train.validate_every=20", "search.asha=false"]
    search_killed_five_times(few_videos(tmp_path), storage, words, lambda kill: len(trials_of(storage)) > kill)

    found = trials_of(storage)
    assert [trial.number for trial in found] == list(range(trials))
    assert {trial.state for trial in found} == {optuna.trial.TrialState.COMPLETE}
    assert len({tuple(trial.params.items()) for trial in found}) == trials
    assert not [trial.user_attrs for trial in found if trial.user_attrs]  # none failed
    assert all(list(trial.intermediate_values) == list(range(20, 401, 20)) for trial in found)
    assert statuses_in_mlflow(storage, trials) == {"FINISHED"}


def test_a_population_that_is_killed_five_times_ends_as_an_undisturbed_one(tmp_path: Path):
    videos, trials = few_videos(tmp_path), 4
    words = ["search.sampler=pbt", f"search.trials={trials}", "search.epochs=120", "train.validate_every=20"]

    def due(kill: int) -> bool:
        found = trials_of(tmp_path / "killed")
        return sum(len(trial.intermediate_values) for trial in found) > 4 * kill

    search_killed_five_times(videos, tmp_path / "killed", words, due)
    whole = job_of("tune_cvae", videos, tmp_path / "whole", "cluster.workers=1", *words)
    out, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, out

    killed, undisturbed = trials_of(tmp_path / "killed"), trials_of(tmp_path / "whole")
    assert {trial.state for trial in killed} == {optuna.trial.TrialState.COMPLETE}
    for one, other in zip(killed, undisturbed, strict=True):
        assert one.params == other.params
        assert one.user_attrs == other.user_attrs  # who took over from whom, and with what values
        assert one.intermediate_values == other.intermediate_values  # to the last bit
    assert any(trial.user_attrs for trial in killed)
    assert statuses_in_mlflow(tmp_path / "killed", trials) == {"FINISHED"}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of our own, on loopback; makes a database on it and returns its address."""
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if not folders:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder, port, databases = Path(tempfile.mkdtemp(prefix="giffy_ray-")), free_port(), itertools.count()
    as_owner: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL}
    if os.getuid() == 0:  # as which the server refuses to run
        shutil.chown(folder, "postgres", "postgres")
        as_owner |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    secret = folder / "secret"
    secret.write_text("hush@/ #%")
    server = f"127.0.0.1:{port}"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    data = ["-D", str(folder / "data")]
    subprocess.run(
        [folders[-1] / "initdb", *data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={secret}"], check=True, **as_owner
    )
    control = [folders[-1] / "pg_ctl", *data, "-w", "-l", str(folder / "log")]
    subprocess.run([*control, "-o", options, "start"], check=True, **as_owner)
    try:
        where = f"postgresql://me:{quote(secret.read_text(), safe='')}@{server}/"

        def create() -> str:
            import psycopg

            name = f"db{next(databases)}"
            with psycopg.connect(f"{where}postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            return where + name

        yield create
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, **as_owner)
        shutil.rmtree(folder)


def searching(where: str, folder: Path, name: str, *words: str) -> Experiment:
    space = "search.space={optim.lr: {log_uniform: [1e-4, 1e-1]}, optim.schedule: {choice: [constant, cosine]}}"
    given = [space, f"name={name}", f"storage={folder}", "search.trials=5", "search.epochs=2", "search.metric=val/psnr"]
    return override(load(None, [*given, *words]), {"search.storage": where})


def searched(where: str, folder: Path, name: str) -> list[int]:
    """A search whose later trials are better, to its end. Returns the numbers of the best."""
    ledger = Ledger(searching(where, folder, name, "search.asha=false"))
    while asked := ledger.ask():
        ledger.report(asked[0], 2, {"val/psnr": 20.0 + asked[0]})
        ledger.end(asked[0])
    return [trial.number for trial in ledger.best()]


def test_searches_in_postgresql_begin_side_by_side_and_go_on_after_a_kill(postgresql, tmp_path: Path):
    where = postgresql()
    # At once in an empty database, whose tables each of them would create.
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(functools.partial(searched, where, tmp_path), ["a", "b", "c"])) == [[4]] * 3
    killed = Ledger(searching(where, tmp_path, "killed"))
    number, values = killed.ask() or (-1, {})
    killed.report(number, 1, {"val/psnr": 21.0})
    resumed = Ledger(searching(where, tmp_path, "killed"))
    assert resumed.ask() == (number, values)
    resumed.report(number, 2, {"val/psnr": 22.0})
    resumed.end(number)
    assert resumed.trials()[0].intermediate_values == {1: 21.0, 2: 22.0}
    assert resumed.trials()[0].value == 22.0
    names = {study.study_name for study in opened(searching(where, tmp_path, "any")).get_all_studies()}
    assert names == {"a", "b", "c", "killed"}
    for wrong, said in ((where.replace("//me:", "//you:"), "authentication failed"), (f"{where}x", "does not exist")):
        with pytest.raises(ConfigError, match=rf"search\.storage: .*{said}") as caught:
            opened(searching(wrong, tmp_path, "any"))
        assert "hush" not in str(caught.value)


def test_mlflow_keeps_runs_in_postgresql_in_a_database_that_is_not_optunas(postgresql, tmp_path: Path):
    where = postgresql()
    client = MlflowClient(where)
    run = client.create_run(client.create_experiment("tried", f"file://{tmp_path}"))
    client.log_metric(run.info.run_id, "val/psnr", 21.0)
    assert client.get_run(run.info.run_id).data.metrics == {"val/psnr": 21.0}
    with pytest.raises(ConfigError, match=r"search\.storage: its tables are of another version of Optuna, or MLflow's"):
        opened(searching(where, tmp_path, "any"))


def test_a_trial_that_fails_ends_its_process_and_is_not_tried_again(
    tiny: Experiment, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
):
    """An error of CUDA stays in the process that it came up in, and would fail every later trial there."""
    words = {"search.space": {"optim.lr": {"uniform": [0.1, 1]}}, "search.trials": 4, "search.epochs": 1}
    asked = override(tiny, {**words, "name": "study", "storage": str(tmp_path / "runs")})
    notes = tmp_path / "notes"
    notes.mkdir()

    def poisoned(config: dict[str, Any], study: str, store: str, share: Share, parent: str, token: str) -> None:
        def alone(*_: Any) -> None:
            with open(notes / str(config["number"]), "a") as note:
                note.write(f"{os.getpid()}\n")
            if config["number"] == 1:
                os.environ["POISONED"] = "1"
            if "POISONED" in os.environ:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            ray.tune.report({"epoch": 1, "val/l2_report": 1.0 + config["number"]})

        module: Any = importlib.import_module("giffy_ray.tune.trial")
        module.Store, module._alone = lambda *_: None, alone
        module.trial(config, study, store, share, parent, token)

    monkeypatch.setattr(tune, "trial", poisoned)
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    ledger, store = Ledger(asked), type("Clips", (), {"location": "nowhere"})()
    lease: Any = SimpleNamespace(holder="we", lost="")
    tune._tuner(asked, store, Share(1, 0, 1), "", ledger, lease).fit()
    found = tune._study(ledger)
    assert [trial.ended for trial in sorted(found.trials, key=lambda trial: trial.number)] == [
        *("", "RuntimeError: CUDA error: an illegal memory access was encountered", "", "")
    ]
    assert [trial.objectives for trial in found.trials[:3]] == [(1.0,), (3.0,), (4.0,)]
    processes = [(notes / str(number)).read_text().split() for number in range(4)]
    assert all(len(each) == 1 for each in processes)  # although search trials are started again where a machine is lost
    assert processes[0] == processes[1]
    assert processes[2] == processes[3] != processes[1]
