"""The registry read with MLflow's own client, and a registered model loaded by MLflow, without pickle."""

import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.models import get_model_info
from mlflow.tracking import MlflowClient

from giffy_ray.config import ClipConfig, ConfigError, Experiment, flatten, from_yaml, override
from giffy_ray.core.storage import write_text
from giffy_ray.inference import registration
from giffy_ray.inference.loading import trained_runs
from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.tracking.model_registry import Version
from giffy_ray.tracking.tracker import open_run, tracking_uri
from giffy_ray.training import checkpoints
from tests.conftest import ROOT, TINY
from tests.tracking.test_tracker import nobody_there
from tests.training.test_checkpoints import built, step

KEPT = {"cvae.safetensors", "experiment.yaml", "manifest.json"}


def trained(base: Experiment, storage: Path, name: str, l2: float, clips: str = "abc", steps: int = 1) -> Experiment:
    """A run that has ended, with two checkpoints, the first of which was the better."""
    experiment = override(base, {"name": name, "storage": str(storage), "train.global_batch_size": 4})
    learner = built(experiment)
    for number in range(steps):
        step(learner, experiment, number)
    with torch.no_grad():  # what was hardly trained makes grey clips, whatever it is given
        for parameter in learner.networks["cvae"].parameters():
            parameter.mul_(3)
    for number, (measured, more) in enumerate([(l2, {}), (l2 + 1, {}), (None, {"train/loss": 1.0})]):
        folder = storage / name / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        metrics = more if measured is None else {"val/l2_paper": measured, "val/skill": 0.1, **more}
        checkpoints.Snapshot(learner, experiment, checkpoints.TrainState(10 * number, metrics)).save(folder)
    write_text(str(storage / name / "data_set"), clips)
    open_run(experiment).finish()
    return experiment


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = trained(override(Experiment(), TINY), tmp_path_factory.mktemp("runs"), "first", 50.0)
    assert registration.register(experiment) == "models:/giffy_ray/1: the champion, as the first; val/l2_paper 50.00"
    return experiment


def crowned(experiment: Experiment) -> int:
    client = MlflowClient(tracking_uri(experiment))
    return int(client.get_model_version_by_alias(str(experiment.tracking.model), "champion").version)


def test_the_best_of_a_run_is_registered_with_what_is_known_of_it(champion: Experiment):
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
    assert inside == KEPT


def test_a_model_that_is_registered_again_is_the_same_version(champion: Experiment):
    assert registration.register(champion) == "models:/giffy_ray/1: the champion, as it was; val/l2_paper 50.00"
    assert len(MlflowClient(tracking_uri(champion)).search_model_versions("name = 'giffy_ray'")) == 1


@pytest.mark.parametrize(
    ("name", "l2", "clips", "said", "stays"),
    [
        ("better", 40.0, "abc", "the champion; val/l2_paper 40.00, and 50.00 of version 1", False),
        (
            "equal",
            50.0,
            "abc",
            "not the champion: version 1 stays, whose val/l2_paper is 50.00, and this one's 50.00",
            True,
        ),
        (
            "broken",
            math.nan,
            "abc",
            "not the champion: version 1 stays, whose val/l2_paper is 50.00, and this one's nan",
            True,
        ),
        (
            "elsewhere",
            40.0,
            "xyz",
            "version 1 stays, which was measured on other clips (data.fingerprint 'abc', not 'xyz')",
            True,
        ),
    ],
)
def test_the_champion_is_the_best_on_the_same_clips(
    champion: Experiment, name: str, l2: float, clips: str, said: str, stays: bool
):
    registration.register(override(champion, {"tracking.model": name}))
    other = trained(override(champion, {"tracking.model": name}), Path(champion.storage), name, l2, clips, steps=2)
    told = registration.register(other)
    assert told.startswith(f"models:/{name}/2: ")
    assert said in told
    assert crowned(other) == (1 if stays else 2)


def test_models_of_other_clips_or_unknown_ones_are_not_compared():
    clip = registration._words(ClipConfig())
    ours = Version("m", 2, {"val/l2_paper": "1", "data.fingerprint": "a", "data.split": "validation", "clip": clip})
    longer = registration._words(ClipConfig(frames=60))
    for tags, why in (
        (dict(ours.tags) | {"clip": longer}, "(clip '60 frames of 64x64 at 10 fps, stretch', not '30 frames"),
        (dict(ours.tags) | {"data.split": "test"}, "(data.split 'test', not 'validation')"),
        ({}, "(data.fingerprint 'unknown', not 'a')"),
    ):
        crowned, said = registration.compare_to_champion(ours, Version("m", 1, tags))
        assert not crowned
        assert why in said
    assert registration.compare_to_champion(Version("m", 1, {"val/l2_paper": "nan"}), None)[0] is False


def test_mlflow_loads_the_champion_without_pickle_and_it_makes_the_same_clips(champion: Experiment, tmp_path: Path):
    pairs = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16, 3), np.uint8)
    np.save(tmp_path / "pairs.npy", pairs)
    code = f"""
import mlflow, numpy as np
mlflow.set_tracking_uri({tracking_uri(champion)!r})
model = mlflow.pyfunc.load_model("models:/giffy_ray@champion")
start, end = np.load("pairs.npy")
np.savez("made.npz", mean=model.predict({{"start": start, "end": end}}),
         sample=model.predict({{"start": start, "end": end}}, params={{"seed": 3}}))
try:
    model.predict({{"start": start / 255, "end": end}})
except mlflow.exceptions.MlflowException as refusal:
    print("does not match" in str(refusal))
"""
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
    learner, _ = checkpoints.load(checkpoints.best(champion, "val/l2_paper"))
    start, end = torch.from_numpy(pairs)
    made = np.load(tmp_path / "made.npz")
    assert np.array_equal(made["mean"], learner.generate(start, end, torch.zeros(3, 3)).numpy())
    assert np.array_equal(made["sample"], learner.generate(start, end, noise_from_keys(3, range(3), 3)).numpy())
    assert not np.array_equal(made["sample"], made["mean"])

    place = MlflowClient(tracking_uri(champion)).get_model_version_download_uri("giffy_ray", "1")
    place = place.removeprefix("file://")
    files = {path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()}
    files -= {"registered_model_meta"}  # MLflow's own, since it was loaded by its name
    assert files == {"MLmodel", *(f"checkpoint/{name}" for name in KEPT)}  # so neither code nor pickle
    signature = get_model_info(place).signature
    assert [one.shape for one in signature.inputs.inputs] == [(-1, 16, 16, 3)] * 2
    assert signature.outputs.inputs[0].shape == (-1, 6, 16, 16, 3)


def test_the_model_that_is_registered_is_the_one_that_is_evaluated(champion: Experiment, capsys):
    """And published: the checkpoint with the best validation, of those in the folder the oldest."""
    best = checkpoints.best(champion, "val/l2_paper")
    assert best.endswith("checkpoint_0")
    assert checkpoints.latest_checkpoint(champion).endswith("checkpoint_2")
    (run,) = trained_runs(champion, champion.clip)
    assert f"evaluating {best} (epoch None, val/l2_paper 50.00)" in capsys.readouterr().out
    weights, _ = checkpoints.load(best)
    for name, weight in weights.networks["cvae"].state_dict().items():
        assert torch.equal(run.learner.networks["cvae"].state_dict()[name], weight)


def test_the_champion_is_evaluated_by_its_name(champion: Experiment):
    asked = override(champion, {"evaluate.runs": ["models:/giffy_ray@champion", "models:/giffy_ray/1", "first"]})
    runs = trained_runs(asked, champion.clip)
    assert [run.name for run in runs] == ["giffy_ray@champion", "giffy_ray/1", "first"]
    weights = [torch.nn.utils.parameters_to_vector(run.learner.networks["cvae"].parameters()) for run in runs]
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("run", ["models:/giffy_ray@nobody", "models:/nothing@champion", "models:/giffy_ray/7"])
def test_a_model_that_is_not_there_is_named(champion: Experiment, run: str):
    with pytest.raises(ConfigError, match=rf"evaluate\.runs: MLflow at sqlite.* says: .*\(value '{run}'\)"):
        trained_runs(override(champion, {"evaluate.runs": [run]}), champion.clip)


def test_a_model_of_others_is_refused(champion: Experiment, tmp_path: Path):
    client = MlflowClient(tracking_uri(champion))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "MLmodel").write_text("flavors: {}")
    client.create_registered_model("theirs")
    client.create_model_version("theirs", str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match=r"evaluate\.runs: theirs 1 was not registered by giffy_ray"):
        trained_runs(override(champion, {"evaluate.runs": ["models:/theirs/1"]}), champion.clip)


@pytest.mark.parametrize("job", ["register", "evaluate", "publish"])
def test_a_checkpoint_that_a_training_removes_meanwhile_is_chosen_anew(
    champion: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
):
    """As the training has a better one now, with which the search for it ends."""
    run = override(champion, {"name": "training"})
    folders = [tmp_path / "runs" / "training" / f"checkpoint_{number}" for number in range(2)]
    run = override(run, {"storage": str(tmp_path / "runs"), "tracking.uri": tracking_uri(champion)})
    for folder, l2 in zip(folders, (5.0, 4.0), strict=True):
        folder.mkdir(parents=True)
        position = checkpoints.TrainState(int(l2), {"val/l2_paper": l2})
        checkpoints.Snapshot(built(run), run, position).save(folder)
    shutil.copy(Path(champion.storage, champion.name, "mlflow_run"), folders[0].parent)
    load, loaded = checkpoints.load, []

    def load_late(location: str) -> object:
        loaded.append(location)
        if location == str(folders[1]):
            checkpoints._remove(location)
        return load(location)

    monkeypatch.setattr(checkpoints, "load", load_late)
    if job == "register":
        assert "val/l2_paper 5.00" in registration.register(override(run, {"tracking.model": "raced"}))
    elif job == "evaluate":
        trained_runs(run, run.clip)
    else:
        main = runpy.run_path(str(ROOT / "jobs" / "publish.py"))["main"]
        main(run)
        checkpoints.verify(str(tmp_path / "runs" / "published" / "training"))
    assert loaded[:2] == [str(folders[1]), str(folders[0])]


def test_a_registry_that_is_away_fails_no_training_and_how_to_repeat_it_is_said(
    champion: Experiment, capsys: pytest.CaptureFixture
):
    address = nobody_there().replace("://", "://me:secret@")
    registration.try_register(override(champion, {"tracking.uri": address}))
    said = capsys.readouterr().out
    assert "the model was not registered: " in said
    assert f"python jobs/register.py name=first storage={champion.storage} tracking.model=giffy_ray" in said
    assert "secret" not in said


def test_what_is_registered_is_asked_for_and_known(champion: Experiment, capsys: pytest.CaptureFixture):
    registration.try_register(override(champion, {"tracking.model": None}))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"evaluate\.runs: a registered model is models:/NAME@champion"):
        trained_runs(override(champion, {"evaluate.runs": ["models:/giffy_ray"]}), champion.clip)
    with pytest.raises(ConfigError, match=r"tracking\.model"):
        registration.register(override(champion, {"tracking.model": None}))
    with pytest.raises(ConfigError, match=r"name: MLflow has no run of .*nobody.*replay_tracking"):
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
def test_what_is_published_is_what_makes_clips_and_no_more(tmp_path: Path, kind: str):
    shape = {name: value for name, value in TINY.items() if name.startswith("clip.")}
    model = {name: value for name, value in TINY.items() if kind == "cvae" and name.startswith("model.")}
    experiment = override(Experiment(), {"model.kind": kind, **shape, **model, "train.seed": 7, **PRIVATE})
    (tmp_path / "trained").mkdir()
    checkpoints.Snapshot(built(experiment), experiment, checkpoints.TrainState(0)).save(tmp_path / "trained")
    checkpoints.export_weights(str(tmp_path / "trained"), tmp_path / "published")
    text = (tmp_path / "published" / "experiment.yaml").read_text()
    assert not re.search("secret|client|bucket", text)
    published, trained, default = flatten(from_yaml(text)), flatten(experiment), flatten(Experiment())
    for name, value in published.items():
        kept = name.startswith(("clip.", "model.")) or name == "train.seed"
        assert value == (trained if kept else default)[name], name


def test_no_password_is_published(tiny: Experiment, tmp_path: Path):
    secret = {"tracking.uri": "http://me:secret@host", "search.storage": "postgresql://me:secret@host/optuna"}
    experiment = override(tiny, secret | {"data.root": "s3://bucket/secret/videos"})
    (tmp_path / "trained").mkdir()
    checkpoints.Snapshot(built(experiment), experiment, checkpoints.TrainState(0)).save(tmp_path / "trained")
    checkpoints.export_weights(str(tmp_path / "trained"), tmp_path / "published")
    assert "secret" not in (tmp_path / "published" / "experiment.yaml").read_text()
