"""End to end: from somebody's folder of mp4 files to MLflow, through `ray job submit`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from giffy_ray.cluster.local import Head
from giffy_ray.config import load
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.training import checkpoints
from tests.conftest import BROKEN, EXPERIMENT, ROOT, submit


def runs_in(storage: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("giffy_ray")
    assert experiment
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def test_broken_files_are_reported_by_name_and_the_job_goes_on(tuned: str, storage: Path):
    assert "3 of 23 videos rejected" in tuned
    for name in BROKEN:
        assert f"{name}: " in tuned
    (location,) = storage.glob("stores/*/sets/*")
    store = ClipDataset(str(location))
    assert len(store) == 20
    assert {reject["id"] for reject in store.rejects} == set(BROKEN)


def test_mlflow_holds_the_search_its_trials_and_the_best(tuned: str, storage: Path):
    parent, *children = runs_in(storage)
    assert len(children) == 3
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    best, *trials = sorted(children, key=lambda run: run.info.run_name)  # trials may start in any order
    # The report's learning rate is the first trial's.
    assert float(trials[0].data.params["optim.lr"]) == 1e-4
    for run, epochs in ((trials[0], 1), (trials[1], 1), (best, 2)):
        history = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_metric_history(run.info.run_id, "val/l2_paper")
        assert [metric.step for metric in history] == list(range(1, epochs + 1))
        assert {"train/loss", "train/kl", "val/psnr", "speed/clips_per_s"} <= set(run.data.metrics)
        assert run.data.tags["data.fingerprint"] == best.data.tags["data.fingerprint"]
        assert len(run.data.tags["mlflow.source.git.commit"]) >= 40
    winner = min(trials, key=lambda run: run.data.metrics["val/l2_paper"])
    assert best.data.params["optim.lr"] == winner.data.params["optim.lr"]
    artifacts = {item.path for item in MlflowClient(f"sqlite:///{storage}/mlflow.db").list_artifacts(best.info.run_id)}
    assert {"experiment.yaml", "evaluation.csv", "contact_sheet.png", "clips.gif", "images"} <= artifacts
    of_parent = MlflowClient(f"sqlite:///{storage}/mlflow.db").list_artifacts(parent.info.run_id)
    assert {"study.html", "best.yaml"} <= {item.path for item in of_parent}
    assert (storage / "tiny-study" / "study.html").read_bytes().count(b'"state": "whole"') == 2
    assert {"samples.mp4", "samples.gif"} <= artifacts
    for run in children:
        assert run.data.metrics["cost/cpu_hours"] > run.data.metrics["cost/gpu_hours"] == 0
        assert 0 < run.data.metrics["system/system_memory_usage_percentage"] < 100
        (used,) = run.inputs.dataset_inputs
        assert used.dataset.digest == run.data.tags["data.fingerprint"]
        assert sum(json.loads(used.dataset.profile).values()) == 23
    champion = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_model_version_by_alias("giffy_ray", "champion")
    assert champion.run_id == best.info.run_id  # a search registers its best, and none of its trials
    assert int(champion.version) == 1


def test_the_results_lie_in_the_storage(tuned: str, storage: Path):
    (folder,) = storage.glob("tiny-study-best")
    rows = list(csv.DictReader((folder / "evaluation.csv").open()))
    (location,) = storage.glob("stores/*/sets/*")
    store = ClipDataset(str(location))
    held_out = {store.ids[row] for row in store.split_indices("validation")}
    for method in ("linear", "cvae"):
        assert {row["clip_id"] for row in rows if row["method"] == method} == held_out
    assert not held_out & {store.ids[row] for row in store.split_indices("training")}
    # Linear interpolation's figure again, from the store alone.
    row = next(row for row in rows if row["method"] == "linear")
    clip = store.get_clips(np.asarray([store.ids.index(row["clip_id"])]))[0].astype(float)
    line = np.round(clip[0] + np.linspace(0, 1, 6)[:, None, None, None] * (clip[-1] - clip[0]))
    assert float(row["l2_paper"]) == pytest.approx(np.sqrt(((line - clip) ** 2).sum()) / 100, rel=1e-2)
    assert Image.open(folder / "contact_sheet.png").width > 500
    assert Image.open(folder / "clips.gif").n_frames == 6
    assert "linear" in tuned
    assert "cvae" in tuned


def test_a_run_started_again_goes_on_and_its_best_yaml_is_ready(head: Head, storage: Path, videos: Path, tuned: str):
    (best,) = storage.glob("tiny-study/best.yaml")
    experiment = load(best)
    assert experiment.data.root == str(videos)
    words = [f"storage={storage}", "name=again", "cluster.workers=1"]
    first = submit(head, "jobs/train_cvae.py", str(best), *words, "train.epochs=1", copied=False)
    assert "epoch 1/1" in first
    second = submit(head, "jobs/train_cvae.py", str(best), *words, "train.epochs=3")
    assert "epoch 1/3" not in second
    assert "epoch 3/3" in second
    third = submit(head, "jobs/train_cvae.py", str(best), *words, "train.epochs=3")
    assert "/3  train" not in third  # nothing was left to do, and what there is is shown once more
    assert "cvae" in third
    (run,) = [run for run in runs_in(storage) if run.info.run_name == "again"]
    history = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]

    learner, restored = checkpoints.load(checkpoints.latest_checkpoint(load(best, words)))
    assert restored.train.epochs == 3
    assert learner.optimizers.keys() == {"cvae"}


def test_own_videos_are_learned_on_from_the_checkpoint_that_comes_with_the_project(
    head: Head, storage: Path, videos: Path
):
    words = [f"data.root={videos}", "data.validation_fraction=0.3", f"storage={storage}", "cluster.workers=1"]
    words += ["train.epochs=1", "train.validate_every=1", "evaluate.samples=1"]
    said = submit(head, "jobs/train_cvae.py", "jobs/experiments/own-videos.yaml", *words)
    assert "epoch 1/1" in said
    learner, experiment = checkpoints.load(
        checkpoints.latest_checkpoint(load(ROOT / "jobs/experiments/own-videos.yaml", words))
    )
    assert experiment.train.init_from == "published/between"
    assert len(learner.networks["between"].mirrors) == 4


def test_a_mistake_ends_the_job_with_one_clear_message(head: Head, tmp_path: Path):
    job = [sys.executable, "jobs/train_cvae.py", EXPERIMENT, f"storage={tmp_path}"]
    for word, message in (
        ("optim.lrr=1", "train_cvae.py: optim.lrr: no such field (value 1); did you mean 'optim.lr'?"),
        (f"data.root={tmp_path}/nowhere", "train_cvae.py: data.root: no such folder"),
    ):
        environment = {key: value for key, value in head.environment.items() if key != "RAY_ADDRESS"}
        environment["RAY_ADDRESS"] = "local"
        done = subprocess.run(
            [*job, word], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
