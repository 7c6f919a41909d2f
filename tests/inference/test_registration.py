"""Registration of models, checked with MLflow's own client, and loading by MLflow without pickle."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.models import get_model_info
from mlflow.tracking import MlflowClient

from giffy_ray import workflows
from giffy_ray.config import ClipConfig, ConfigError, Experiment, flatten, from_yaml, override
from giffy_ray.core.storage import write_text
from giffy_ray.inference import registration
from giffy_ray.inference.loading import load_trained_models
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.tracking.model_registry import Version
from giffy_ray.tracking.tracker import open_run, tracking_uri
from giffy_ray.training import checkpoint_format, checkpoint_selection, checkpoints
from tests.conftest import ROOT, TINY
from tests.tracking.test_tracker import unreachable_server
from tests.training.test_checkpoints import build_learner, step

EXPORTED_FILES = {"cvae.safetensors", "experiment.yaml", "manifest.json"}


def create_finished_run(
    base: Experiment, storage: Path, name: str, l2: float, fingerprint: str = "abc", steps: int = 1
) -> Experiment:
    """Creates a finished run with two validated checkpoints, of which the first is better, and a newer one."""
    experiment = override(base, {"name": name, "storage": str(storage), "train.global_batch_size": 4})
    learner = build_learner(experiment)
    for number in range(steps):
        step(learner, experiment, number)
    with torch.no_grad():  # a barely trained network generates grey clips for any input
        for parameter in learner.networks["cvae"].parameters():
            parameter.mul_(3)
    checkpoint_metrics = [
        {"val/l2_paper": l2, "val/skill": 0.1},
        {"val/l2_paper": l2 + 1, "val/skill": 0.1},
        {"train/loss": 1.0},
    ]
    for number, metrics in enumerate(checkpoint_metrics):
        folder = storage / name / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        state = checkpoint_format.TrainState(10 * number, metrics)
        checkpoints.Snapshot(learner, experiment, state).save(folder)
    write_text(str(storage / name / "data_set"), fingerprint)
    open_run(experiment).finish()
    return experiment


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    base = override(Experiment(), TINY)
    experiment = create_finished_run(base, tmp_path_factory.mktemp("runs"), "first", 50.0)
    message = registration.register(experiment)
    assert message == "models:/giffy_ray/1: promoted to champion, as the first version; val/l2_paper 50.00"
    return experiment


def champion_number(experiment: Experiment) -> int:
    client = MlflowClient(tracking_uri(experiment))
    return int(client.get_model_version_by_alias(str(experiment.tracking.model), "champion").version)


def test_best_checkpoint_is_registered_with_its_metrics_as_tags(champion: Experiment):
    client = MlflowClient(tracking_uri(champion))
    version = client.get_model_version("giffy_ray", "1")
    assert version.run_id == (Path(champion.storage) / "first" / "mlflow_run").read_text()
    assert version.tags["val/l2_paper"] == "50.0"
    assert version.tags["steps_done"] == "0"
    assert version.tags["data.fingerprint"] == "abc"
    assert version.tags["clip"] == "6 frames of 16x16 at 2 fps, stretch"
    files = [item.path for item in client.list_artifacts(version.run_id) if item.is_dir]
    assert len(files) == 1
    inside = {item.path.rpartition("/")[2] for item in client.list_artifacts(version.run_id, f"{files[0]}/checkpoint")}
    assert inside == EXPORTED_FILES


def test_registering_again_returns_the_same_version(champion: Experiment):
    assert registration.register(champion) == "models:/giffy_ray/1: is the champion already; val/l2_paper 50.00"
    assert len(MlflowClient(tracking_uri(champion)).search_model_versions("name = 'giffy_ray'")) == 1


@pytest.mark.parametrize(
    ("name", "l2", "fingerprint", "outcome", "champion_version"),
    [
        ("better", 40.0, "abc", "promoted to champion; version 1 has val/l2_paper 50.00, this version 40.00", 2),
        ("equal", 50.0, "abc", "not promoted: version 1 has val/l2_paper 50.00, this version 50.00", 1),
        ("broken", math.nan, "abc", "not promoted: version 1 has val/l2_paper 50.00, this version nan", 1),
        (
            "elsewhere",
            40.0,
            "xyz",
            "not promoted: version 1 was measured on different clips (data.fingerprint 'abc', not 'xyz')",
            1,
        ),
    ],
)
def test_champion_is_the_best_version_on_the_same_clips(
    champion: Experiment, name: str, l2: float, fingerprint: str, outcome: str, champion_version: int
):
    renamed = override(champion, {"tracking.model": name})
    registration.register(renamed)
    other = create_finished_run(renamed, Path(champion.storage), name, l2, fingerprint, steps=2)
    assert registration.register(other) == f"models:/{name}/2: {outcome}"
    assert champion_number(other) == champion_version


def test_models_of_different_or_unknown_clips_are_not_compared():
    clip = registration._describe_clip(ClipConfig())
    version = Version("m", 2, {"val/l2_paper": "1", "data.fingerprint": "a", "data.split": "validation", "clip": clip})
    longer = registration._describe_clip(ClipConfig(frames=60))
    for tags, reason in (
        (dict(version.tags) | {"clip": longer}, "(clip '60 frames of 64x64 at 10 fps, stretch', not '30 frames"),
        (dict(version.tags) | {"data.split": "test"}, "(data.split 'test', not 'validation')"),
        ({}, "(data.fingerprint 'unknown', not 'a')"),
    ):
        promoted, outcome = registration.compare_to_champion(version, Version("m", 1, tags))
        assert not promoted
        assert reason in outcome
    assert registration.compare_to_champion(Version("m", 1, {"val/l2_paper": "nan"}), None)[0] is False


def test_mlflow_loads_the_champion_without_pickle_and_it_generates_the_same_clips(champion: Experiment, tmp_path: Path):
    pairs = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16, 3), np.uint8)
    np.save(tmp_path / "pairs.npy", pairs)
    code = f"""
import mlflow, numpy as np
mlflow.set_tracking_uri({tracking_uri(champion)!r})
model = mlflow.pyfunc.load_model("models:/giffy_ray@champion")
start, end = np.load("pairs.npy")
np.savez("clips.npz", mean=model.predict({{"start": start, "end": end}}),
         sample=model.predict({{"start": start, "end": end}}, params={{"seed": 3}}))
try:
    model.predict({{"start": start / 255, "end": end}})
except mlflow.exceptions.MlflowException as error:
    print("does not match" in str(error))
"""
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "True"
    learner, _ = checkpoint_format.load_learner(checkpoint_selection.best_checkpoint(champion, "val/l2_paper"))
    start, end = torch.from_numpy(pairs)
    clips = np.load(tmp_path / "clips.npz")
    assert np.array_equal(clips["mean"], learner.generate(start, end, torch.zeros(3, 3)).numpy())
    assert np.array_equal(clips["sample"], learner.generate(start, end, noise_from_keys(3, range(3), 3)).numpy())
    assert not np.array_equal(clips["sample"], clips["mean"])

    uri = MlflowClient(tracking_uri(champion)).get_model_version_download_uri("giffy_ray", "1")
    folder = uri.removeprefix("file://")
    files = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    files -= {"registered_model_meta"}  # written by MLflow when it loaded the model by name
    assert files == {"MLmodel", *(f"checkpoint/{name}" for name in EXPORTED_FILES)}  # neither code nor pickle
    signature = get_model_info(folder).signature
    assert [spec.shape for spec in signature.inputs.inputs] == [(-1, 16, 16, 3)] * 2
    assert signature.outputs.inputs[0].shape == (-1, 6, 16, 16, 3)


def test_registered_checkpoint_is_also_the_evaluated_one(champion: Experiment, capsys):
    """And the exported one: the checkpoint with the best validation, here the oldest."""
    best = checkpoint_selection.best_checkpoint(champion, "val/l2_paper")
    assert best.endswith("checkpoint_0")
    assert checkpoint_selection.latest_checkpoint(champion).endswith("checkpoint_2")
    (model,) = load_trained_models(champion, champion.clip)
    assert f"evaluating {best} (epoch None, val/l2_paper 50.00)" in capsys.readouterr().out
    learner, _ = checkpoint_format.load_learner(best)
    for name, weight in learner.networks["cvae"].state_dict().items():
        assert torch.equal(model.learner.networks["cvae"].state_dict()[name], weight)


def test_champion_can_be_evaluated_by_its_address(champion: Experiment):
    experiment = override(champion, {"evaluate.runs": ["models:/giffy_ray@champion", "models:/giffy_ray/1", "first"]})
    models = load_trained_models(experiment, champion.clip)
    assert [model.name for model in models] == ["giffy_ray@champion", "giffy_ray/1", "first"]
    weights = [torch.nn.utils.parameters_to_vector(model.learner.networks["cvae"].parameters()) for model in models]
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("run", ["models:/giffy_ray@nobody", "models:/nothing@champion", "models:/giffy_ray/7"])
def test_missing_model_is_reported_by_name(champion: Experiment, run: str):
    with pytest.raises(ConfigError, match=rf"evaluate\.runs: MLflow at sqlite.* reports: .*\(value '{run}'\)"):
        load_trained_models(override(champion, {"evaluate.runs": [run]}), champion.clip)


def test_model_that_giffy_ray_did_not_register_is_rejected(champion: Experiment, tmp_path: Path):
    client = MlflowClient(tracking_uri(champion))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "MLmodel").write_text("flavors: {}")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(tmp_path / "foreign"))
    with pytest.raises(ConfigError, match=r"evaluate\.runs: foreign 1 was not registered by giffy_ray"):
        load_trained_models(override(champion, {"evaluate.runs": ["models:/foreign/1"]}), champion.clip)


@pytest.mark.parametrize("job", ["register", "evaluate", "publish"])
def test_checkpoint_deleted_by_a_running_training_is_selected_again(
    champion: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
):
    """A training deletes a checkpoint after it was selected and before it is read."""
    run = override(champion, {"name": "training"})
    folders = [tmp_path / "runs" / "training" / f"checkpoint_{number}" for number in range(2)]
    run = override(run, {"storage": str(tmp_path / "runs"), "tracking.uri": tracking_uri(champion)})
    for folder, l2 in zip(folders, (5.0, 4.0), strict=True):
        folder.mkdir(parents=True)
        state = checkpoint_format.TrainState(int(l2), {"val/l2_paper": l2})
        checkpoints.Snapshot(build_learner(run), run, state).save(folder)
    shutil.copy(Path(champion.storage, champion.name, "mlflow_run"), folders[0].parent)
    load_learner = checkpoint_format.load_learner
    loaded = []

    def delete_before_loading(checkpoint_dir: str) -> object:
        loaded.append(checkpoint_dir)
        if checkpoint_dir == str(folders[1]):
            checkpoint_selection.delete_checkpoint(checkpoint_dir)
        return load_learner(checkpoint_dir)

    monkeypatch.setattr(checkpoint_format, "load_learner", delete_before_loading)
    if job == "register":
        assert "val/l2_paper 5.00" in registration.register(override(run, {"tracking.model": "raced"}))
    elif job == "evaluate":
        load_trained_models(run, run.clip)
    else:
        workflows.publish(run)
        checkpoint_format.verify(str(tmp_path / "runs" / "published" / "training"))
    assert loaded[:2] == [str(folders[1]), str(folders[0])]


def test_unavailable_registry_does_not_fail_a_training_and_prints_how_to_retry(
    champion: Experiment, capsys: pytest.CaptureFixture
):
    address = unreachable_server().replace("://", "://me:secret@")
    registration.try_register(override(champion, {"tracking.uri": address}))
    output = capsys.readouterr().out
    assert "the model was not registered: " in output
    assert (
        f"Retry with: python jobs/register.py name=first storage={champion.storage} tracking.model=giffy_ray" in output
    )
    assert "secret" not in output


def test_registration_requires_a_model_name_and_a_run_in_mlflow(champion: Experiment, capsys: pytest.CaptureFixture):
    registration.try_register(override(champion, {"tracking.model": None}))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"evaluate\.runs: a registered model is models:/NAME@champion"):
        load_trained_models(override(champion, {"evaluate.runs": ["models:/giffy_ray"]}), champion.clip)
    with pytest.raises(ConfigError, match=r"tracking\.model"):
        registration.register(override(champion, {"tracking.model": None}))
    with pytest.raises(ConfigError, match=r"name: MLflow has no run for .*nobody.*replay_tracking"):
        registration.register(override(champion, {"name": "nobody"}))


PRIVATE = {
    "name": "client-project",
    "storage": "s3://bucket/secret/runs",
    "data.root": "s3://bucket/secret/videos",
    "data.categories": ["client"],
    "data.max_videos": {"client": {"training": 3}},
    "train.init_from": "s3://bucket/secret/checkpoint",
    "tracking.uri": "http://me:secret@host",
    "tracking.experiment": "client",
    "tracking.model": "client",
    "evaluate.runs": ["s3://bucket/secret/other"],
    "evaluate.weights": {"lpips": "/home/me/secret"},
    "search.storage": "postgresql://me:secret@host/optuna",
    "search.enqueue": ["0123secret"],
    "search.space": {"optim.lr": {"choice": [1e-3]}},
    "optim.lr": 0.25,
}


@pytest.mark.parametrize("kind", ["cvae", "between"])
def test_export_holds_only_the_fields_that_determine_clips(tmp_path: Path, kind: str):
    shape = {name: value for name, value in TINY.items() if name.startswith("clip.")}
    model = {name: value for name, value in TINY.items() if kind == "cvae" and name.startswith("model.")}
    experiment = override(Experiment(), {"model.kind": kind, **shape, **model, "train.seed": 7, **PRIVATE})
    (tmp_path / "trained").mkdir()
    checkpoints.Snapshot(build_learner(experiment), experiment, checkpoint_format.TrainState(0)).save(
        tmp_path / "trained"
    )
    checkpoint_format.export_weights(str(tmp_path / "trained"), tmp_path / "published")
    text = (tmp_path / "published" / "experiment.yaml").read_text()
    assert not re.search("secret|client|bucket", text)
    published, trained, default = flatten(from_yaml(text)), flatten(experiment), flatten(Experiment())
    for name, value in published.items():
        exported = name.startswith(("clip.", "model.")) or name == "train.seed"
        assert value == (trained if exported else default)[name], name


def test_export_holds_no_password(tiny: Experiment, tmp_path: Path):
    secret = {"tracking.uri": "http://me:secret@host", "search.storage": "postgresql://me:secret@host/optuna"}
    experiment = override(tiny, secret | {"data.root": "s3://bucket/secret/videos"})
    (tmp_path / "trained").mkdir()
    checkpoints.Snapshot(build_learner(experiment), experiment, checkpoint_format.TrainState(0)).save(
        tmp_path / "trained"
    )
    checkpoint_format.export_weights(str(tmp_path / "trained"), tmp_path / "published")
    assert "secret" not in (tmp_path / "published" / "experiment.yaml").read_text()
