"""Read back with MLflow's own client."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import BAD_REQUEST, MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from giffy_ray.config import ConfigError, Experiment, flatten, from_yaml, override
from giffy_ray.head import free_port
from giffy_ray.storage import without_secrets
from giffy_ray.tracking import Tracker, carrier, open_run, replay, tracking_uri
from giffy_ray.tracking.outbox import Outbox


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


@pytest.fixture
def client(experiment: Experiment) -> MlflowClient:
    return MlflowClient(tracking_uri(experiment))


def test_a_run_holds_the_experiment(experiment: Experiment, client: MlflowClient, tmp_path: Path):
    tracker = open_run(experiment, tags={"data.fingerprint": "abc"})
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "run"
    assert run.data.params == {name: str(value) for name, value in flatten(experiment).items()}
    assert run.data.tags["data.fingerprint"] == "abc"
    assert run.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    assert run.data.tags["mlflow.source.git.dirty"] == str(dirty).lower()
    assert re.fullmatch("[0-9a-f]{64}", run.data.tags["requirements.sha256"])
    tracker.flush()
    yaml = client.download_artifacts(tracker.run_id, "experiment.yaml", str(tmp_path))
    assert from_yaml(Path(yaml).read_text()) == experiment


def git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_that_was_made_and_no_more_when_we_were_killed_is_filled(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise SystemExit  # ends the carrier's thread, as a kill would

    monkeypatch.setattr(MlflowClient, "log_text", killed)
    open_run(experiment)._carrier._thread.join()  # type: ignore[union-attr]
    (made,) = client.search_runs([client.get_experiment_by_name("giffy_ray").experiment_id])
    assert not made.data.params
    monkeypatch.undo()
    open_run(experiment).finish()
    run = client.get_run(made.info.run_id)
    assert run.data.params == {name: str(value) for name, value in flatten(experiment).items()}
    assert [item.path for item in client.list_artifacts(made.info.run_id)] == ["experiment.yaml"]


def test_what_mlflow_takes_of_a_parameter_is_kept_of_a_long_one(experiment: Experiment, client: MlflowClient):
    """Its limits are 6000 characters, and 100 parameters in one call: there are more."""
    many = {"model.kind": "cgan", "data.caps": {f"category {number}": {"training": 1} for number in range(1000)}}
    long = override(experiment, many)
    tracker = open_run(long)
    params = client.get_run(tracker.run_id).data.params
    assert params.keys() == flatten(long).keys()
    assert len(params) > 100
    assert params["data.caps"] == str(long.data.caps)[:6000]


def test_a_run_names_its_data_set_once_however_often_it_is_started(experiment: Experiment, client: MlflowClient):
    for _ in range(2):
        tracker = open_run(experiment)
        tracker.log_data_set("clips", "0123456789abcdef", "s3://me:secret@bucket/videos", {"training": 9, "rejects": 1})
        tracker.finish()
        shutil.rmtree(Path(tracker.place, "tracking"))  # as if we had been killed before we knew that it came
    (used,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("clips", "0123456789abcdef")
    assert (used.dataset.source_type, json.loads(used.dataset.source)) == ("s3", {"uri": "s3://***@bucket/videos"})
    assert json.loads(used.dataset.profile) == {"training": 9, "rejects": 1}
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}


def test_a_run_that_is_opened_again_goes_on_without_doubled_steps(experiment: Experiment, client: MlflowClient):
    first = open_run(experiment)
    for step in (1, 2):
        first.log_metrics({"val/psnr": 10.0 + step}, step)
    first.finish()
    again = open_run(experiment)
    assert again.run_id == first.run_id
    for step in (2, 3):
        again.log_metrics({"val/psnr": 20.0 + step}, step)
    again.flush()
    history = client.get_metric_history(again.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert client.get_run(again.run_id).info.status == "RUNNING"
    assert open_run(override(experiment, {"name": "other"})).run_id != first.run_id


def test_children_that_were_ended_from_outside_are_closed(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    done, cut = (open_run(override(experiment, {"name": name}), parent=parent.place) for name in ("done", "cut"))
    done.finish()
    cut.flush()
    parent.close_children()
    parent.finish("RUNNING")
    statuses = [client.get_run(tracker.run_id).info.status for tracker in (parent, done, cut)]
    assert statuses == ["RUNNING", "FINISHED", "KILLED"]
    assert client.get_run(cut.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def animated(frames: int = 9, size: int = 64) -> bytes:
    """An animated WebP of noise, which hardly compresses."""
    noise = np.random.default_rng(0).integers(0, 255, (frames, size, size, 3), np.uint8)
    first, *others = [Image.fromarray(frame) for frame in noise]
    out = io.BytesIO()
    first.save(out, "WEBP", quality=80, save_all=True, append_images=others, duration=100, loop=0)
    return out.getvalue()


def test_an_animation_has_the_name_that_the_image_grid_looks_for(
    experiment: Experiment, client: MlflowClient, tmp_path: Path
):
    tracker, picture = open_run(experiment), animated()
    for content in (picture, b"drawn again after an interruption"):
        tracker.log_animation(lambda content=content: content, "validation", step=3)
    tracker.flush()
    # MLflow's page wants both, and finds the one by the name of the other.
    small, image = (item.path for item in client.list_artifacts(tracker.run_id, "images"))
    assert image.startswith("images/validation+step+3+timestamp+")
    assert small.replace("+compressed", "") == image
    assert image.endswith(".webp")
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"
    # It plays the one, and opens the other: the animation itself is stored once.
    assert Path(client.download_artifacts(tracker.run_id, small, str(tmp_path))).read_bytes() == picture
    opened = Path(client.download_artifacts(tracker.run_id, image, str(tmp_path)))
    with Image.open(opened) as still, Image.open(io.BytesIO(picture)) as playing:
        assert getattr(still, "n_frames", 1) == 1
        playing.seek(4)
        middle = np.asarray(playing.convert("RGB")).astype(float)
        assert np.abs(np.asarray(still.convert("RGB")) - middle).mean() < 20  # it is lossy, and frames differ by 85
    assert opened.stat().st_size < len(picture) / 5


def test_an_animation_can_be_turned_off(experiment: Experiment, client: MlflowClient):
    tracker = open_run(override(experiment, {"tracking.samples": False}))
    tracker.log_animation(lambda: pytest.fail("drawn for nobody"), "validation", step=3)
    tracker.log_drawn(lambda: b"last", "samples.gif", 5)
    tracker.finish()
    assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["experiment.yaml", "samples.gif"]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")],
)
def test_how_a_block_ends_is_how_its_run_ended(
    experiment: Experiment, client: MlflowClient, raised: type[BaseException] | None, status: str
):
    with contextlib.suppress(ValueError, SystemExit, KeyboardInterrupt), open_run(experiment) as tracker:
        tracker.log_results({"data/clips": 1.0})
        if raised:
            raise raised
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == (status, {"data/clips": 1.0})
    with open_run(experiment) as again:
        again.finish("KILLED")  # as a training that was stopped does
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_picture_of_the_end_is_drawn_once_for_each_step_and_replaces_the_one_before(
    experiment: Experiment, client: MlflowClient, tmp_path: Path
):
    tracker = open_run(experiment)
    tracker.log_drawn(lambda: b"first", "samples.gif", 3)
    tracker.log_drawn(lambda: pytest.fail("drawn again"), "samples.gif", 3)
    tracker.log_drawn(lambda: b"last", "samples.gif", 5)
    tracker.flush()
    assert Path(client.download_artifacts(tracker.run_id, "samples.gif", str(tmp_path))).read_bytes() == b"last"


def test_the_page_has_our_view_and_trials_have_colours(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    trials = [open_run(override(experiment, {"name": f"trial-{n:04}"}), parent=parent.place) for n in (0, 1, 10)]
    first, second, eleventh = (client.get_run(trial.run_id).data.tags["mlflow.runColor"] for trial in trials)
    assert first == eleventh != second
    run = client.get_run(parent.run_id)
    assert "mlflow.runColor" not in run.data.tags
    view = json.loads(client.get_experiment(run.info.experiment_id).tags["mlflow.sharedViewState.giffy_ray"])
    charts = json.loads(view["state"])["compareRunCharts"]
    assert {"val/l2_report", "val/psnr"} <= {chart.get("metricKey") for chart in charts}


def test_other_ranks_write_nothing_and_draw_nothing(experiment: Experiment, tmp_path: Path):
    tracker = open_run(experiment, rank=1)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.log_animation(lambda: pytest.fail("drawn for nobody"), "validation", 1)
    tracker.log_drawn(lambda: pytest.fail("drawn for nobody"), "samples.gif", 1)
    tracker.sample(1, 0)
    tracker.finish()
    assert isinstance(tracker, Tracker)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "PATIENCE_S", 0.5)
    monkeypatch.setattr(carrier, "_WAITS_S", (0.05,))


def nobody_there() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_what_a_server_that_is_away_has_not_taken_is_sent_later_and_once(
    experiment: Experiment,
    client: MlflowClient,
    impatient: None,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    away = override(experiment, {"tracking.uri": nobody_there()})
    tracker, began_s = open_run(away), time.monotonic()
    for step in (1, 2):
        tracker.log_metrics({"val/psnr": 10.0 + step}, step)
    tracker.log_text("words", "notes.txt")
    assert time.monotonic() - began_s < 1  # nobody waited for the server
    with pytest.raises(TimeoutError, match="MLflow at http"):
        tracker.flush()
    tracker.finish()
    assert "has not taken 5 of the things that were logged (MlflowException: " in capsys.readouterr().out
    told = [record for record in caplog.records if record.name == "giffy_ray.tracking.carrier"]
    assert len(told) == 1  # however often it was tried
    assert replay(away) == 5

    again = open_run(experiment)  # at the next chance, to a server that answers
    for step in (2, 3):
        again.log_metrics({"val/psnr": 20.0 + step}, step)
    again.finish()
    assert replay(experiment) == 0
    (run,) = client.search_runs([client.get_experiment_by_name("giffy_ray").experiment_id])
    history = client.get_metric_history(run.info.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_the_trials_below_a_run_are_replayed_too(experiment: Experiment, client: MlflowClient, impatient: None):
    away = override(experiment, {"tracking.uri": nobody_there()})
    trial = override(away, {"storage": f"{experiment.storage}/run", "name": "trial-1"})
    parent = open_run(away)
    child = open_run(trial, parent=parent.place)
    child.log_metrics({"val/psnr": 1.0}, 1)
    assert [each.finish() for each in (child, parent)]
    assert replay(experiment) == 0
    found = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert found["trial-1"].data.tags["mlflow.parentRunId"] == found["run"].info.run_id
    assert found["trial-1"].data.metrics == {"val/psnr": 1.0}


def test_a_letter_that_came_though_nobody_knew_is_stored_once(
    experiment: Experiment, client: MlflowClient, monkeypatch
):
    monkeypatch.setattr(Outbox, "delivered", lambda *_: None)  # as if we were killed right before
    first = open_run(experiment)
    first.log_metrics({"val/psnr": 1.0}, 1)
    run_id = first.run_id
    while not client.get_metric_history(run_id, "val/psnr"):
        time.sleep(0.05)
    monkeypatch.undo()
    open_run(experiment).finish()
    assert len(client.get_metric_history(run_id, "val/psnr")) == 1
    assert len(client.search_runs(["1"])) == 1


def test_what_mlflow_will_never_take_is_put_aside_and_the_rest_goes_on(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    tracker.log_metrics({"x" * 1000: 1.0}, 1)
    tracker.log_metrics({"val/psnr": 2.0}, 2)
    tracker.finish()
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 2.0}
    assert len(list(Path(tracker.place, "tracking", "refused").iterdir())) == 1


def test_a_data_set_that_another_run_names_at_the_same_moment_is_named_all_the_same(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    log_inputs, refusals = MlflowClient.log_inputs, [MlflowException("UNIQUE constraint failed", BAD_REQUEST)]

    def refused_once(*words: Any, **named: Any) -> None:
        if refusals:
            raise refusals.pop()
        log_inputs(*words, **named)

    monkeypatch.setattr(MlflowClient, "log_inputs", refused_once)
    tracker = open_run(experiment)
    tracker.log_data_set("videos", "abc", "/videos", {"training": 3})
    tracker.finish()
    assert not refusals
    (used,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert used.dataset.digest == "abc"
    assert not Path(tracker.place, "tracking", "refused").exists()


def test_no_password_of_an_address_is_logged(experiment: Experiment, client: MlflowClient, tmp_path: Path):
    tracker = open_run(override(experiment, {"data.root": "https://me:secret@host/videos"}))
    tracker.flush()
    assert client.get_run(tracker.run_id).data.params["data.root"] == "https://***@host/videos"
    yaml = Path(client.download_artifacts(tracker.run_id, "experiment.yaml", str(tmp_path))).read_text()
    assert "secret" not in yaml and "https://***@host/videos" in yaml


def test_passwords_are_taken_out_of_every_address_of_a_text():
    said = "to s3://key:word@bucket/a@b and http://me@host:80/: sqlite:///runs/mlflow.db me@host"
    kept = "to s3://***@bucket/a@b and http://***@host:80/: sqlite:///runs/mlflow.db me@host"
    assert without_secrets(said) == kept


def test_a_remote_storage_needs_a_server(experiment: Experiment):
    remote = override(experiment, {"storage": "s3://bucket/runs"})
    with pytest.raises(ConfigError, match=r"tracking\.uri.*s3://bucket/runs"):
        tracking_uri(remote)
    assert tracking_uri(override(remote, {"tracking.uri": "http://127.0.0.1:5000"})) == "http://127.0.0.1:5000"


def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that is killed while MLflow makes its tables leaves nothing that the next one would stumble over."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(carrier.os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            carrier._make_whole(uri)
    assert not (tmp_path / "mlflow.db").exists()
    carrier._make_whole(uri)
    assert MlflowClient(uri).search_experiments()
    made = (tmp_path / "mlflow.db").stat().st_ino
    carrier._make_whole(uri)  # which it already is
    assert (tmp_path / "mlflow.db").stat().st_ino == made
