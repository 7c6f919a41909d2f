"""End to end through `ray job submit`: from a folder of video files to results in MLflow."""

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
from giffy_ray.training import checkpoint_format, checkpoint_selection
from tests.conftest import BROKEN, EXPERIMENT, ROOT, submit


def find_runs(storage: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("giffy_ray")
    assert experiment
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def open_dataset(storage: Path) -> ClipDataset:
    (location,) = storage.glob("stores/*/sets/*")
    return ClipDataset(str(location))


def test_a_job_reports_broken_files_by_name_and_continues(tune_output: str, storage: Path):
    assert "3 of 23 videos rejected" in tune_output
    for name in BROKEN:
        assert f"{name}: " in tune_output
    dataset = open_dataset(storage)
    assert len(dataset) == 20
    assert {reject["id"] for reject in dataset.rejects} == set(BROKEN)


def test_mlflow_shows_the_search_its_trials_and_the_final_training(tune_output: str, storage: Path):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent, *children = find_runs(storage)
    assert len(children) == 3
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    best, *trials = sorted(children, key=lambda run: run.info.run_name)  # trials may start in any order
    # The first trial has the paper's learning rate.
    assert float(trials[0].data.params["optim.lr"]) == 1e-4
    for run, epochs in ((trials[0], 1), (trials[1], 1), (best, 2)):
        history = client.get_metric_history(run.info.run_id, "val/l2_paper")
        assert [metric.step for metric in history] == list(range(1, epochs + 1))
        assert {"train/loss", "train/kl", "val/psnr", "speed/clips_per_s"} <= set(run.data.metrics)
        assert run.data.tags["data.fingerprint"] == best.data.tags["data.fingerprint"]
        assert len(run.data.tags["mlflow.source.git.commit"]) >= 40
    winner = min(trials, key=lambda run: run.data.metrics["val/l2_paper"])
    assert best.data.params["optim.lr"] == winner.data.params["optim.lr"]
    artifacts = {item.path for item in client.list_artifacts(best.info.run_id)}
    assert {"experiment.yaml", "evaluation.csv", "contact_sheet.png", "clips.gif", "images"} <= artifacts
    parent_artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"study.html", "best.yaml"} <= parent_artifacts
    assert (storage / "tiny-study" / "study.html").read_bytes().count(b'"state": "completed"') == 2
    assert {"samples.mp4", "samples.gif"} <= artifacts
    for run in children:
        assert run.data.metrics["cost/cpu_hours"] > run.data.metrics["cost/gpu_hours"] == 0
        assert 0 < run.data.metrics["system/system_memory_usage_percentage"] < 100
        (dataset_input,) = run.inputs.dataset_inputs
        assert dataset_input.dataset.digest == run.data.tags["data.fingerprint"]
        assert sum(json.loads(dataset_input.dataset.profile).values()) == 23
    champion = client.get_model_version_by_alias("giffy_ray", "champion")
    assert champion.run_id == best.info.run_id  # a search registers its final training, and none of its trials
    assert int(champion.version) == 1


def test_storage_holds_the_results(tune_output: str, storage: Path):
    (folder,) = storage.glob("tiny-study-best")
    rows = list(csv.DictReader((folder / "evaluation.csv").open()))
    dataset = open_dataset(storage)
    held_out = {dataset.ids[index] for index in dataset.split_indices("validation")}
    for method in ("linear", "cvae", "published between"):
        assert {row["clip_id"] for row in rows if row["method"] == method} == held_out
    assert not held_out & {dataset.ids[index] for index in dataset.split_indices("training")}
    # The error of linear interpolation, computed from the dataset alone.
    row = next(row for row in rows if row["method"] == "linear")
    clip = dataset.get_clips(np.asarray([dataset.ids.index(row["clip_id"])]))[0].astype(float)
    interpolated = np.round(clip[0] + np.linspace(0, 1, 6)[:, None, None, None] * (clip[-1] - clip[0]))
    assert float(row["l2_paper"]) == pytest.approx(np.sqrt(((interpolated - clip) ** 2).sum()) / 100, rel=1e-2)
    assert Image.open(folder / "contact_sheet.png").width > 500
    assert Image.open(folder / "clips.gif").n_frames == 6
    for method in ("linear", "cvae", "published between"):
        assert method in tune_output


def test_a_run_resumes_and_best_yaml_is_an_experiment_file(head: Head, storage: Path, videos: Path, tune_output: str):
    (best,) = storage.glob("tiny-study/best.yaml")
    experiment = load(best)
    assert experiment.data.root == str(videos)
    overrides = [f"storage={storage}", "name=again", "cluster.workers=1"]
    first = submit(head, "jobs/train_cvae.py", str(best), *overrides, "train.epochs=1", upload=False)
    assert "epoch 1/1" in first
    second = submit(head, "jobs/train_cvae.py", str(best), *overrides, "train.epochs=3")
    assert "epoch 1/3" not in second
    assert "epoch 3/3" in second
    third = submit(head, "jobs/train_cvae.py", str(best), *overrides, "train.epochs=3")
    assert "/3  train" not in third  # the training is complete; only its evaluation runs again
    assert "cvae" in third
    (run,) = [run for run in find_runs(storage) if run.info.run_name == "again"]
    history = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]

    learner, restored = checkpoint_format.load_learner(checkpoint_selection.latest_checkpoint(load(best, overrides)))
    assert restored.train.epochs == 3
    assert learner.optimizers.keys() == {"cvae"}


def test_own_videos_starts_from_the_published_checkpoint(head: Head, storage: Path, videos: Path):
    overrides = [f"data.root={videos}", "data.validation_fraction=0.3", f"storage={storage}", "cluster.workers=1"]
    overrides += ["train.epochs=1", "train.validate_every=1", "evaluate.samples=1"]
    output = submit(head, "jobs/train_cvae.py", "giffy_ray/experiments/own-videos.yaml", *overrides)
    assert "epoch 1/1" in output
    learner, experiment = checkpoint_format.load_learner(
        checkpoint_selection.latest_checkpoint(load(ROOT / "giffy_ray/experiments/own-videos.yaml", overrides))
    )
    assert experiment.train.init_from == "between"
    assert len(learner.networks["between"].mirrors) == 4


def test_a_job_reports_a_mistake_in_one_message(head: Head, tmp_path: Path):
    job = [sys.executable, "jobs/train_cvae.py", EXPERIMENT, f"storage={tmp_path}"]
    for override, message in (
        ("optim.lrr=1", "train_cvae.py: optim.lrr: no such field (value 1); did you mean 'optim.lr'?"),
        (f"data.root={tmp_path}/nowhere", "train_cvae.py: data.root: no such folder"),
    ):
        environment = {key: value for key, value in head.environment.items() if key != "RAY_ADDRESS"}
        environment["RAY_ADDRESS"] = "local"
        completed = subprocess.run(
            [*job, override], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert completed.returncode == 2
        assert message in completed.stderr
        assert "Traceback" not in completed.stderr
