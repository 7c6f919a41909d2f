"""Read back with MLflow's own client."""

import contextlib
import io
import json
import math
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import BAD_REQUEST, MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from giffy_ray.cluster.local import free_port
from giffy_ray.config import ConfigError, Experiment, flatten, from_yaml, override
from giffy_ray.core.storage import redact_credentials
from giffy_ray.tracking import outbox, uploader, uri
from giffy_ray.tracking.outbox import Outbox
from giffy_ray.tracking.tracker import Tracker, check_tracking, open_run, replay, sqlite_address, tracking_uri
from tests.conftest import ROOT


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    uploader._make_whole(sqlite_address(path))
    return path


@pytest.fixture
def client(experiment: Experiment, empty_database: Path) -> MlflowClient:
    return client_for(experiment, empty_database)


def client_for(experiment: Experiment, empty_database: Path) -> MlflowClient:
    address = tracking_uri(experiment)
    shutil.copy(empty_database, Path(experiment.storage, "mlflow.db"))
    return MlflowClient(address)


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
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_that_was_made_and_no_more_when_we_were_killed_is_filled(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise SystemExit  # ends the carrier's thread, as a kill would

    monkeypatch.setattr(MlflowClient, "log_batch", killed)
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
    many = {"model.kind": "cgan", "data.max_videos": {f"category {number}": {"training": 1} for number in range(1000)}}
    long = override(experiment, many)
    tracker = open_run(long)
    params = client.get_run(tracker.run_id).data.params
    assert params.keys() == flatten(long).keys()
    assert len(params) > 100
    assert params["data.max_videos"] == str(long.data.max_videos)[:6000]


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
    assert {"val/l2_paper", "val/psnr"} <= {chart.get("metricKey") for chart in charts}


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
def impatient() -> Iterator[None]:
    with impatience():
        yield


@contextmanager
def impatience() -> Iterator[None]:
    """Inside, the end of a run waits half a second for what MLflow does not take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "PATIENCE_S", 0.5)
        patch.setattr(uploader, "_WAITS_S", (0.05,))
        yield


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
    told = [record for record in caplog.records if record.name == "giffy_ray.tracking.uploader"]
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
    storage = "postgresql://me:secret@host/optuna"
    tracker = open_run(override(experiment, {"search.storage": storage}))
    tracker.flush()
    assert client.get_run(tracker.run_id).data.params["search.storage"] == "postgresql://***@host/optuna"
    yaml = Path(client.download_artifacts(tracker.run_id, "experiment.yaml", str(tmp_path))).read_text()
    assert "secret" not in yaml and "postgresql://***@host/optuna" in yaml


def test_passwords_are_taken_out_of_every_address_of_a_text():
    said = "to s3://key:word@bucket/a@b and http://me@host:80/: sqlite:///runs/mlflow.db me@host"
    kept = "to s3://***@bucket/a@b and http://***@host:80/: sqlite:///runs/mlflow.db me@host"
    assert redact_credentials(said) == kept


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
        patch.setattr(uploader.os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            uploader._make_whole(uri)
    assert not (tmp_path / "mlflow.db").exists()
    uploader._make_whole(uri)
    assert MlflowClient(uri).search_experiments()
    made = (tmp_path / "mlflow.db").stat().st_ino
    uploader._make_whole(uri)  # which it already is
    assert (tmp_path / "mlflow.db").stat().st_ino == made


def run_of(experiment: Experiment, client: MlflowClient) -> Any:
    """The only run of the experiment's name in its MLflow experiment."""
    found = client.get_experiment_by_name(experiment.tracking.experiment)
    (run,) = [run for run in client.search_runs([found.experiment_id]) if run.info.run_name == experiment.name]
    return run


def refused_of(experiment: Experiment) -> list[str]:
    return sorted(path.name for path in Path(experiment.storage, experiment.name).glob("tracking/refused/*"))


def waiting_of(experiment: Experiment) -> list[str]:
    return sorted(path.name for path in Path(experiment.storage, experiment.name).glob("tracking/waiting/*"))


@pytest.mark.parametrize("name", ["it's mine", "50%25 of? #1", "back\\slash\\", 'ü "quoted"; `here`'])
def test_a_storage_path_may_hold_any_character(tmp_path: Path, empty_database: Path, name: str):
    experiment = override(Experiment(), {"name": "run", "storage": str(tmp_path / name)})
    client = client_for(experiment, empty_database)
    check_tracking(experiment)
    for step in (1, 2):
        tracker = open_run(experiment)
        tracker.log_metrics({"val/psnr": 10.0 + step}, step)
        tracker.finish()
    run = run_of(experiment, client)
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "val/psnr")] == [11.0, 12.0]
    assert run.data.params.keys() == flatten(experiment).keys()
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]
    assert Path(experiment.storage, "artifacts").is_dir()
    with closing(sqlite3.connect(Path(experiment.storage, "mlflow.db"))) as database:  # this file and no other
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run.info.run_id,)]
    assert not refused_of(experiment)


def test_a_run_that_an_earlier_version_made_goes_on(experiment: Experiment, client: MlflowClient):
    """It has the tag with the folder, and no other."""
    experiment_id = client.create_experiment("giffy_ray", Path(experiment.storage, "artifacts").as_uri())
    place = f"{experiment.storage}/{experiment.name}"
    earlier = client.create_run(experiment_id, tags={"giffy_ray.run": place}, run_name="run")
    assert open_run(experiment).run_id == earlier.info.run_id


def test_what_is_logged_to_an_experiment_that_was_deleted_waits(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    tracker = open_run(experiment)
    run_id = tracker.run_id
    experiment_id = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment_id)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    assert f"mlflow experiments restore --experiment-id {experiment_id}" in capsys.readouterr().out
    assert len(waiting_of(experiment)) == 2
    with pytest.raises(ConfigError, match=r"tracking\.experiment: .*restore.*\(value 'giffy_ray'\)"):
        check_tracking(experiment)

    again = open_run(experiment)  # as a trial of a search, which was checked before it was deleted
    again.log_metrics({"val/psnr": 2.0}, 2)
    with impatience():
        again.finish()
    assert not refused_of(experiment)
    client.restore_experiment(experiment_id)
    assert replay(experiment) == 0
    assert [metric.value for metric in client.get_metric_history(run_id, "val/psnr")] == [1.0, 2.0]
    assert run_of(experiment, client).info.status == "FINISHED"


def test_what_waits_for_a_deleted_experiment_is_sent_to_another_one(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    client.delete_experiment(client.get_run(tracker.run_id).info.experiment_id)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    other = override(experiment, {"tracking.experiment": "other"})
    assert replay(other) == 0
    run = run_of(other, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert run.data.params.keys() == flatten(experiment).keys()
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]


def test_a_run_that_was_deleted_is_made_again_when_it_is_started_again(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    tracker = open_run(experiment)
    client.delete_run(tracker.run_id)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    assert f"the run {tracker.run_id} was deleted in MLflow" in capsys.readouterr().out
    again = open_run(experiment)
    assert again.run_id != tracker.run_id
    again.log_metrics({"val/psnr": 2.0}, 2)
    again.finish()
    run = run_of(experiment, client)
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "val/psnr")] == [1.0, 2.0]
    assert run.info.status == "FINISHED"
    assert not refused_of(experiment)


def test_a_storage_that_fails_while_a_deleted_run_is_looked_for_ends_no_thread(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uploader, "_WAITS_S", (0.02,))
    tracker = open_run(experiment)
    tracker.flush()
    client.delete_run(tracker.run_id)
    looked = []

    def fail(*_: object) -> None:
        looked.append(threading.current_thread())
        raise OSError("Input/output error")

    with monkeypatch.context() as away:
        away.setattr(uploader.MlflowUploader, "_make_another_run", fail)
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        deadline_s = time.monotonic() + 5
        while len(looked) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    client.restore_run(tracker.run_id)
    tracker.finish()
    assert len(looked) >= 3
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 1.0}


@pytest.mark.parametrize("name", ["", "x" * 600])
def test_a_run_that_mlflow_does_not_let_begin_is_kept_whole(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture, name: str
):
    wrong = override(experiment, {"tracking.experiment": name})
    with pytest.raises(ConfigError, match=r"tracking\.experiment"):
        check_tracking(wrong)
    tracker = open_run(wrong)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.log_text("words", "notes.txt")
    with impatience():
        tracker.finish()
    assert "has not taken 4 of the things" in capsys.readouterr().out
    assert not refused_of(experiment)
    assert replay(experiment) == 0
    run = run_of(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_what_earlier_versions_lost_with_a_refused_begin_is_sent(experiment: Experiment, client: MlflowClient):
    refused = Path(experiment.storage, "run", "tracking", "refused")
    refused.mkdir(parents=True)
    letters = [
        ("", {"kind": "begin", "name": "run", "parent": None, "tags": {}, "params": {"model.kind": "cvae"}}),
        ("metrics-000000001", {"kind": "metrics", "values": {"val/psnr": 3.0}, "step": 1, "time_ms": 1}),
        ("", {"kind": "files", "folder": None, "names": ["notes.txt"], "tags": {}}),
        ("", {"kind": "status", "status": "FINISHED"}),
    ]
    for number, (key, head) in enumerate(letters):
        (refused / f"{10**18 + number:020}-{key}").write_bytes(json.dumps(head).encode() + b"\nwords")
    assert replay(experiment) == 0
    run = run_of(experiment, client)
    assert (run.data.metrics, run.data.params) == ({"val/psnr": 3.0}, {"model.kind": "cvae"})
    assert (run.info.status, run.info.end_time) == ("FINISHED", 10**12)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}
    assert not list(refused.iterdir())


def test_only_what_mlflow_rejects_of_a_step_is_put_aside_and_finish_says_so(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    tracker = open_run(experiment)
    tracker.log_metrics({"val/psnr": 2.0, "what?": 1.0, "val/skill": 3.0}, 7)
    tracker.finish()
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 2.0, "val/skill": 3.0}
    said = capsys.readouterr().out
    assert f"refused 1 of the things that were logged; they are kept in {tracker.place}/tracking/refused" in said
    assert "metrics of step 7 (what?): MlflowException: " in said
    assert replay(experiment) == 1  # it is sent again, and refused again
    (kept,) = refused_of(experiment)
    head = json.loads(Path(tracker.place, "tracking", "refused", kept).read_bytes())
    assert (head["values"], head["step"]) == ({"what?": 1.0}, 7)


def test_metrics_of_any_value_and_number_are_taken(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    many = {f"many/{number}": float(number) for number in range(1234)}
    tracker.log_metrics(many | {"nan": math.nan, "inf": math.inf}, 1)
    tracker.finish()
    metrics = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics.pop("nan")) and metrics.pop("inf") > 1e308
    assert metrics == many


def test_a_letter_that_is_damaged_blocks_nothing(experiment: Experiment, client: MlflowClient):
    waiting = Path(experiment.storage, "run", "tracking", "waiting")
    waiting.mkdir(parents=True)
    (waiting / "00000000000000000001-").write_bytes(b"\xff{")
    tracker = open_run(experiment)
    tracker.finish()
    assert run_of(experiment, client).info.status == "FINISHED"
    assert refused_of(experiment) == ["00000000000000000001-"]


def test_files_of_a_run_that_are_damaged_block_nothing(experiment: Experiment, client: MlflowClient):
    """The copy of the letter that began it, and the id of its run, which is found again by its folder."""
    open_run(experiment).finish()
    Path(experiment.storage, "run", "mlflow_run").write_bytes(b"\xff\xfe")
    tracker = open_run(experiment)
    tracker.flush()
    Path(experiment.storage, "run", "tracking", "begun").write_bytes(b"\xff[]")
    tracker.log_metrics({"": 1.0}, 1)  # which MLflow refuses
    tracker.log_metrics({"val/psnr": 1.0}, 2)
    tracker.finish()
    run = run_of(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert len(refused_of(experiment)) == 1


def test_letters_keep_their_order_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Outbox(str(tmp_path)).put({"kind": "status"})
    monkeypatch.setattr(outbox.time, "time_ns", lambda: 5)
    again = Outbox(str(tmp_path))
    again.put({"kind": "begin"})
    assert [again.read(name).kind for name in again.waiting()] == ["status", "begin"]


def test_a_storage_that_is_away_for_a_moment_loses_nothing(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    tracker = open_run(experiment)
    tracker.flush()

    def away(*_: object) -> None:
        raise OSError("the storage is away")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "write_bytes", away)
        patch.setattr(outbox, "_names", away)
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        tracker.log_metrics({"val/psnr": 2.0}, 2)
        time.sleep(0.2)
    tracker.finish()
    history = client.get_metric_history(tracker.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_folder_of_artifacts_that_cannot_be_written_keeps_no_metrics_back(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    artifacts = Path(experiment.storage, "artifacts")
    artifacts.write_text("in the way")
    tracker = open_run(experiment)
    tracker.log_text("words", "notes.txt")
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    run = run_of(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert run.data.params.keys() == flatten(experiment).keys()
    assert "has not taken 2 of the things that were logged (NotADirectoryError: " in capsys.readouterr().out
    artifacts.unlink()
    assert replay(experiment) == 0
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


Fault = Callable[[str, str, int], tuple[int, str] | None]


class FaultyServer:
    """MLflow's own application on loopback. `fault` answers requests in its place.

    It gets method, path and length of the content, and returns a status and a text, or None to let it pass.
    """

    def __init__(self, application: Any):
        self.application, self.address = application, ""
        self.fault: Fault | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        answer = self.fault and self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"], length)
        if not answer:
            return self.application(environ, start_response)
        environ["wsgi.input"].read(length)
        status, text = answer
        start_response(f"{status} Fault", [("Content-Type", "text/html"), ("Content-Length", str(len(text)))])
        return [text.encode()]


@pytest.fixture(scope="module")
def running_server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    """In this process; as MLflow's server keeps its settings in the environment and globals, these are put back."""
    from werkzeug.serving import make_server

    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", sqlite_address(shutil.copy(empty_database, folder / "mlflow.db")))
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(folder / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        from mlflow.server import app, handlers

        patch.setattr(handlers, "_tracking_store", None)
        patch.setattr(handlers, "_artifact_repo", None)
        patch.setattr(handlers.utils, "set_tracking_uri", lambda _: None)
        faulty = FaultyServer(app)
        server = make_server("127.0.0.1", 0, faulty, threaded=True)
        faulty.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield faulty
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running_server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield running_server
    running_server.fault = None


@pytest.fixture
def served(experiment: Experiment, server: FaultyServer, request: pytest.FixtureRequest) -> Experiment:
    changes = {"tracking.uri": server.address, "tracking.experiment": request.node.name}
    return override(experiment, changes)


EVERYTHING: dict[str, Fault] = {
    "an https port": lambda *_: (400, "Client sent an HTTP request to an HTTPS server."),
    "no password": lambda *_: (401, "You are not authenticated"),
    "a JSON program": lambda *_: (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}'),
    "a login page": lambda *_: (200, "<html>please log in</html>"),
    "nothing is too small": lambda *_: (413, "too large"),
    "read only": lambda method, path, length: None if method == "GET" else (403, "Permission denied"),
}


@pytest.mark.parametrize("fault", EVERYTHING)
def test_a_server_that_takes_nothing_is_waited_for(served: Experiment, server: FaultyServer, fault: str):
    """From the beginning, and in the middle of a run."""
    late = override(served, {"name": "late"})
    begun = open_run(served)
    begun.flush()
    server.fault = EVERYTHING[fault]
    for tracker in (begun, open_run(late)):
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        tracker.log_text("words", "notes.txt")
        tracker.log_data_set("clips", "abc", "/videos", {"training": 3})
        with impatience():
            tracker.finish()
    assert not refused_of(served) + refused_of(late)
    assert (len(waiting_of(served)), len(waiting_of(late))) == (4, 5)
    server.fault = None
    assert replay(served) + replay(late) == 0
    client = MlflowClient(server.address)
    for experiment in (served, late):
        run = run_of(experiment, client)
        assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_a_file_that_a_login_page_has_taken_is_sent_again(served: Experiment, server: FaultyServer):
    """It answers 200 to everything, so that only what MLflow itself would say tells it apart."""
    tracker = open_run(served)
    tracker.flush()
    server.fault = EVERYTHING["a login page"]
    tracker.log_text("words", "notes.txt")
    deadline_s = time.monotonic() + 5
    while not (failure := tracker._carrier._failure) and time.monotonic() < deadline_s:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert "not in a valid JSON format" in failure
    server.fault = None
    tracker.finish()
    client = MlflowClient(server.address)
    assert "notes.txt" in {item.path for item in client.list_artifacts(run_of(served, client).info.run_id)}


def test_a_proxy_that_takes_no_large_file_keeps_nothing_else_back(
    served: Experiment, server: FaultyServer, capsys: pytest.CaptureFixture
):
    server.fault = lambda method, path, length: (413, "Request Entity Too Large") if length > 2**20 else None
    tracker = open_run(served)
    tracker.log_text("x" * (2**20 + 1), "large.txt")
    tracker.log_text("words", "notes.txt")
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.finish()
    client = MlflowClient(server.address)
    run = run_of(served, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}
    said = capsys.readouterr().out
    assert "refused 1 of the things that were logged" in said and "file large.txt: HTTPError: 413" in said
    server.fault = None
    assert replay(served) == 0
    assert "large.txt" in {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("status", [500, 413])
def test_one_thing_that_always_fails_keeps_nothing_else_back(
    served: Experiment, server: FaultyServer, monkeypatch: pytest.MonkeyPatch, status: int
):
    """A fault of the server, or one that MLflow's client takes for one, with a single kind of requests."""
    monkeypatch.setattr(uploader, "PATIENCE_S", 5.0)
    server.fault = lambda method, path, length: (status, "sorry") if path.endswith("log-inputs") else None
    tracker = open_run(served)
    for number in range(5):
        tracker.log_data_set("clips", "abc", "/videos", {"training": number})
        tracker.log_metrics({"val/psnr": 1.0}, number)
    tracker.finish()
    run = run_of(served, MlflowClient(server.address))
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    left = [*waiting_of(served), *refused_of(served)]
    assert len(left) == 1 and "inputs" in left[0]
    server.fault = None
    assert replay(served) == 0


def test_a_server_that_is_away_is_waited_for_once_by_a_process(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploader, "PATIENCE_S", 2.0)
    monkeypatch.setattr(uploader, "_WAITS_S", (0.1,))
    away, took_s = override(experiment, {"tracking.uri": nobody_there()}), []
    for number in range(4):
        trial = open_run(override(away, {"name": f"trial-{number}"}))
        began_s = time.monotonic()
        trial.finish("KILLED")
        took_s.append(time.monotonic() - began_s)
        assert len(waiting_of(override(experiment, {"name": f"trial-{number}"}))) == 2
        trial._carrier._thread.join(3)  # type: ignore[union-attr]
        assert not trial._carrier._thread.is_alive()  # type: ignore[union-attr]
    assert sum(took_s) < 3 * 2.0  # four waits would be 8 s
    assert max(took_s[1:]) < 2.0


def test_a_server_that_takes_connections_and_says_nothing_is_waited_for_once(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uploader, "PATIENCE_S", 1.0)
    monkeypatch.setattr(uploader, "_LAST_TRY_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        silent = override(experiment, {"tracking.uri": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        open_run(override(silent, {"name": "first"})).finish("KILLED")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        second = open_run(override(silent, {"name": "second"}))
        second.finish("KILLED")
        thread = second._carrier._thread  # type: ignore[union-attr]
        assert thread.is_alive()  # its request is not over: `finish` did not wait for it
        thread.join(20)
        assert not thread.is_alive()


def test_the_end_of_a_search_sends_what_its_trials_could_not(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    parent.flush()
    away = override(experiment, {"tracking.uri": nobody_there(), "storage": parent.place})
    for name in ("trial-0", "trial-1"):
        trial = open_run(override(away, {"name": name}), parent=parent.place)
        trial.log_metrics({"val/psnr": 1.0}, 1)
        if name == "trial-0":
            with impatience():
                trial.finish("FINISHED")  # and the other one was killed
    parent.close_children()
    best = open_run(override(experiment, {"name": "best"}), parent=parent.place)
    best.flush()
    parent.finish()
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "run": "FINISHED",
        "trial-0": "FINISHED",
        "trial-1": "KILLED",
        "best": "RUNNING",
    }
    assert [runs[name].data.metrics for name in ("trial-0", "trial-1")] == [{"val/psnr": 1.0}] * 2


WRONG = {
    "mysql+nothing://me:secret@host/mlflow": "SQLAlchemy says",
    "mssql+pyodbc://me:secret@host/mlflow": "not installed",
    "sqlite:///{folder}": "is a folder, not an SQLite file",
    "sqlite:///{folder}/text.db": "is not an SQLite file",
    "sqlite:///{folder}/text.db/mlflow.db": "is not a folder",
}


@pytest.mark.parametrize("uri", WRONG)
def test_an_address_that_can_never_answer_is_refused_at_the_start(experiment: Experiment, tmp_path: Path, uri: str):
    (tmp_path / "text.db").write_text("text, and no database at all")
    wrong = override(experiment, {"tracking.uri": uri.format(folder=tmp_path)})
    with pytest.raises(ConfigError, match=rf"tracking\.uri: .*{WRONG[uri]}") as refusal:
        check_tracking(wrong)
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match=WRONG[uri]):
        replay(wrong)


def test_a_database_that_cannot_be_written_is_refused_at_the_start(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uri.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*/runs cannot be written"):
        check_tracking(experiment)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "https://me:secret@host/path", "sqlite:///{folder}/new/a.db"])
def test_a_server_that_is_away_is_no_mistake(experiment: Experiment, tmp_path: Path, uri: str):
    check_tracking(override(experiment, {"tracking.uri": uri.format(folder=tmp_path)}))


def test_nothing_is_replayed_of_a_run_that_is_not_there(experiment: Experiment):
    with pytest.raises(ConfigError, match=r"name: nothing was logged in .*/run \(value 'run'\)"):
        replay(experiment)
