"""Logs runs and reads them back with MLflow's own client."""

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
    """An MLflow database without runs: MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    uploader._create_sqlite_atomically(sqlite_address(path))
    return path


@pytest.fixture
def client(experiment: Experiment, empty_database: Path) -> MlflowClient:
    return client_for(experiment, empty_database)


def client_for(experiment: Experiment, empty_database: Path) -> MlflowClient:
    address = tracking_uri(experiment)
    shutil.copy(empty_database, Path(experiment.storage, "mlflow.db"))
    return MlflowClient(address)


def test_a_run_contains_the_experiment(experiment: Experiment, client: MlflowClient, tmp_path: Path):
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


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_without_params_after_a_kill_is_completed(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise SystemExit  # ends the uploader's thread, as a kill would

    monkeypatch.setattr(MlflowClient, "log_batch", killed)
    open_run(experiment)._uploader._thread.join()  # type: ignore[union-attr]
    (incomplete,) = client.search_runs([client.get_experiment_by_name("giffy_ray").experiment_id])
    assert not incomplete.data.params
    monkeypatch.undo()
    open_run(experiment).finish()
    run = client.get_run(incomplete.info.run_id)
    assert run.data.params == {name: str(value) for name, value in flatten(experiment).items()}
    assert [item.path for item in client.list_artifacts(incomplete.info.run_id)] == ["experiment.yaml"]


def test_long_and_many_params_are_logged_within_the_limits_of_mlflow(experiment: Experiment, client: MlflowClient):
    """The limits are 6000 characters per parameter, and 100 parameters per call."""
    many = {"model.kind": "cgan", "data.max_videos": {f"category {number}": {"training": 1} for number in range(1000)}}
    long = override(experiment, many)
    tracker = open_run(long)
    params = client.get_run(tracker.run_id).data.params
    assert params.keys() == flatten(long).keys()
    assert len(params) > 100
    assert params["data.max_videos"] == str(long.data.max_videos)[:6000]


def test_a_run_logs_its_dataset_once_over_several_starts(experiment: Experiment, client: MlflowClient):
    for _ in range(2):
        tracker = open_run(experiment)
        tracker.log_dataset("clips", "0123456789abcdef", "s3://me:secret@bucket/videos", {"training": 9, "rejects": 1})
        tracker.finish()
        shutil.rmtree(Path(tracker.run_dir, "tracking"))  # as after a kill before the delivery was recorded
    (logged,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("clips", "0123456789abcdef")
    assert (logged.dataset.source_type, json.loads(logged.dataset.source)) == ("s3", {"uri": "s3://***@bucket/videos"})
    assert json.loads(logged.dataset.profile) == {"training": 9, "rejects": 1}
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}


def test_a_resumed_run_logs_no_step_twice(experiment: Experiment, client: MlflowClient):
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


def test_children_that_the_search_stopped_are_closed(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    finished = open_run(override(experiment, {"name": "finished"}), parent=parent.run_dir)
    stopped = open_run(override(experiment, {"name": "stopped"}), parent=parent.run_dir)
    finished.finish()
    stopped.flush()
    parent.close_children()
    parent.finish("RUNNING")
    statuses = [client.get_run(tracker.run_id).info.status for tracker in (parent, finished, stopped)]
    assert statuses == ["RUNNING", "FINISHED", "KILLED"]
    assert client.get_run(stopped.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def animated(frames: int = 9, size: int = 64) -> bytes:
    """An animated WebP of noise, which hardly compresses."""
    noise = np.random.default_rng(0).integers(0, 255, (frames, size, size, 3), np.uint8)
    first, *others = [Image.fromarray(frame) for frame in noise]
    out = io.BytesIO()
    first.save(out, "WEBP", quality=80, save_all=True, append_images=others, duration=100, loop=0)
    return out.getvalue()


def test_an_animation_has_the_names_that_the_image_grid_expects(
    experiment: Experiment, client: MlflowClient, tmp_path: Path
):
    tracker, picture = open_run(experiment), animated()
    for content in (picture, b"rendered again after an interruption"):
        tracker.log_animation(lambda content=content: content, "validation", step=3)
    tracker.flush()
    # MLflow's page needs both files, and derives one name from the other.
    animation, image = (item.path for item in client.list_artifacts(tracker.run_id, "images"))
    assert image.startswith("images/validation+step+3+timestamp+")
    assert animation.replace("+compressed", "") == image
    assert image.endswith(".webp")
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"
    # It plays the first and opens the second on a click, so the animation is stored only once.
    assert Path(client.download_artifacts(tracker.run_id, animation, str(tmp_path))).read_bytes() == picture
    opened = Path(client.download_artifacts(tracker.run_id, image, str(tmp_path)))
    with Image.open(opened) as still, Image.open(io.BytesIO(picture)) as playing:
        assert getattr(still, "n_frames", 1) == 1
        playing.seek(4)
        middle = np.asarray(playing.convert("RGB")).astype(float)
        assert np.abs(np.asarray(still.convert("RGB")) - middle).mean() < 20  # lossy; frames differ by 85
    assert opened.stat().st_size < len(picture) / 5


def test_animations_can_be_disabled(experiment: Experiment, client: MlflowClient):
    tracker = open_run(override(experiment, {"tracking.samples": False}))
    tracker.log_animation(lambda: pytest.fail("rendered for nothing"), "validation", step=3)
    tracker.log_rendered(lambda: b"last", "samples.gif", 5)
    tracker.finish()
    assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["experiment.yaml", "samples.gif"]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")],
)
def test_the_end_of_the_block_sets_the_status_of_the_run(
    experiment: Experiment, client: MlflowClient, raised: type[BaseException] | None, status: str
):
    with contextlib.suppress(ValueError, SystemExit, KeyboardInterrupt), open_run(experiment) as tracker:
        tracker.log_results({"data/clips": 1.0})
        if raised:
            raise raised
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == (status, {"data/clips": 1.0})
    with open_run(experiment) as again:
        again.finish("KILLED")  # as a stopped training does
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_rendered_file_is_rendered_once_per_step_and_replaces_the_earlier_one(
    experiment: Experiment, client: MlflowClient, tmp_path: Path
):
    tracker = open_run(experiment)
    tracker.log_rendered(lambda: b"first", "samples.gif", 3)
    tracker.log_rendered(lambda: pytest.fail("rendered again"), "samples.gif", 3)
    tracker.log_rendered(lambda: b"last", "samples.gif", 5)
    tracker.flush()
    assert Path(client.download_artifacts(tracker.run_id, "samples.gif", str(tmp_path))).read_bytes() == b"last"


def test_trials_have_colours_and_their_search_has_none(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    trials = [open_run(override(experiment, {"name": f"trial-{n:04}"}), parent=parent.run_dir) for n in (0, 1, 10)]
    first, second, eleventh = (client.get_run(trial.run_id).data.tags["mlflow.runColor"] for trial in trials)
    assert first == eleventh != second
    assert "mlflow.runColor" not in client.get_run(parent.run_id).data.tags


def test_other_ranks_log_and_render_nothing(experiment: Experiment, tmp_path: Path):
    tracker = open_run(experiment, rank=1)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.log_animation(lambda: pytest.fail("rendered for nothing"), "validation", 1)
    tracker.log_rendered(lambda: pytest.fail("rendered for nothing"), "samples.gif", 1)
    tracker.sample_system_metrics(1, 0)
    tracker.finish()
    assert isinstance(tracker, Tracker)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def impatient() -> Iterator[None]:
    with impatience():
        yield


@contextmanager
def impatience() -> Iterator[None]:
    """Limits to half a second how long the end of a run waits for MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "PATIENCE_S", 0.5)
        patch.setattr(uploader, "_RETRY_DELAYS_S", (0.05,))
        yield


def unreachable_server() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_events_for_an_unreachable_server_are_sent_later_and_once(
    experiment: Experiment,
    client: MlflowClient,
    impatient: None,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    away = override(experiment, {"tracking.uri": unreachable_server()})
    tracker, began_s = open_run(away), time.monotonic()
    for step in (1, 2):
        tracker.log_metrics({"val/psnr": 10.0 + step}, step)
    tracker.log_text("words", "notes.txt")
    assert time.monotonic() - began_s < 1  # logging does not wait for the server
    with pytest.raises(TimeoutError, match="MLflow at http"):
        tracker.flush()
    tracker.finish()
    assert "has not received 5 logged events (MlflowException: " in capsys.readouterr().out
    warnings = [record for record in caplog.records if record.name == "giffy_ray.tracking.uploader"]
    assert len(warnings) == 1  # however many attempts failed
    assert replay(away) == 5

    again = open_run(experiment)  # restarts with a server that answers
    for step in (2, 3):
        again.log_metrics({"val/psnr": 20.0 + step}, step)
    again.finish()
    assert replay(experiment) == 0
    (run,) = client.search_runs([client.get_experiment_by_name("giffy_ray").experiment_id])
    history = client.get_metric_history(run.info.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_replay_includes_the_trials_below_a_run(experiment: Experiment, client: MlflowClient, impatient: None):
    away = override(experiment, {"tracking.uri": unreachable_server()})
    trial = override(away, {"storage": f"{experiment.storage}/run", "name": "trial-1"})
    parent = open_run(away)
    child = open_run(trial, parent=parent.run_dir)
    child.log_metrics({"val/psnr": 1.0}, 1)
    child.finish()
    parent.finish()
    assert replay(experiment) == 0
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert runs["trial-1"].data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
    assert runs["trial-1"].data.metrics == {"val/psnr": 1.0}


def test_an_event_that_is_sent_twice_is_stored_once(experiment: Experiment, client: MlflowClient, monkeypatch):
    monkeypatch.setattr(Outbox, "mark_delivered", lambda *_: None)  # as after a kill right before it
    first = open_run(experiment)
    first.log_metrics({"val/psnr": 1.0}, 1)
    run_id = first.run_id
    while not client.get_metric_history(run_id, "val/psnr"):
        time.sleep(0.05)
    monkeypatch.undo()
    open_run(experiment).finish()
    assert len(client.get_metric_history(run_id, "val/psnr")) == 1
    assert len(client.search_runs(["1"])) == 1


def test_a_rejected_event_is_refused_and_the_others_are_delivered(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    tracker.log_metrics({"x" * 1000: 1.0}, 1)
    tracker.log_metrics({"val/psnr": 2.0}, 2)
    tracker.finish()
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 2.0}
    assert len(list(Path(tracker.run_dir, "tracking", "refused").iterdir())) == 1


def test_a_dataset_that_another_run_logs_at_the_same_moment_is_logged(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    log_inputs, refusals = MlflowClient.log_inputs, [MlflowException("UNIQUE constraint failed", BAD_REQUEST)]

    def refuse_once(*args: Any, **kwargs: Any) -> None:
        if refusals:
            raise refusals.pop()
        log_inputs(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_inputs", refuse_once)
    tracker = open_run(experiment)
    tracker.log_dataset("videos", "abc", "/videos", {"training": 3})
    tracker.finish()
    assert not refusals
    (logged,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert logged.dataset.digest == "abc"
    assert not Path(tracker.run_dir, "tracking", "refused").exists()


def test_passwords_in_addresses_are_not_logged(experiment: Experiment, client: MlflowClient, tmp_path: Path):
    storage = "postgresql://me:secret@host/optuna"
    tracker = open_run(override(experiment, {"search.storage": storage}))
    tracker.flush()
    assert client.get_run(tracker.run_id).data.params["search.storage"] == "postgresql://***@host/optuna"
    yaml = Path(client.download_artifacts(tracker.run_id, "experiment.yaml", str(tmp_path))).read_text()
    assert "secret" not in yaml and "postgresql://***@host/optuna" in yaml


def test_passwords_are_redacted_in_every_address_of_a_text():
    text = "to s3://key:word@bucket/a@b and http://me@host:80/: sqlite:///runs/mlflow.db me@host"
    redacted = "to s3://***@bucket/a@b and http://***@host:80/: sqlite:///runs/mlflow.db me@host"
    assert redact_credentials(text) == redacted


def test_a_bucket_as_storage_needs_a_server(experiment: Experiment):
    remote = override(experiment, {"storage": "s3://bucket/runs"})
    with pytest.raises(ConfigError, match=r"tracking\.uri.*s3://bucket/runs"):
        tracking_uri(remote)
    assert tracking_uri(override(remote, {"tracking.uri": "http://127.0.0.1:5000"})) == "http://127.0.0.1:5000"


def test_a_database_is_created_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill while MLflow creates its tables leaves no partial database."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(uploader.os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            uploader._create_sqlite_atomically(uri)
    assert not (tmp_path / "mlflow.db").exists()
    uploader._create_sqlite_atomically(uri)
    assert MlflowClient(uri).search_experiments()
    inode = (tmp_path / "mlflow.db").stat().st_ino
    uploader._create_sqlite_atomically(uri)  # does nothing: it exists
    assert (tmp_path / "mlflow.db").stat().st_ino == inode


def find_run(experiment: Experiment, client: MlflowClient) -> Any:
    """The only run of the experiment's name in its MLflow experiment."""
    mlflow_experiment = client.get_experiment_by_name(experiment.tracking.experiment)
    (run,) = [
        run for run in client.search_runs([mlflow_experiment.experiment_id]) if run.info.run_name == experiment.name
    ]
    return run


def list_refused(experiment: Experiment) -> list[str]:
    return sorted(path.name for path in Path(experiment.storage, experiment.name).glob("tracking/refused/*"))


def list_waiting(experiment: Experiment) -> list[str]:
    return sorted(path.name for path in Path(experiment.storage, experiment.name).glob("tracking/waiting/*"))


@pytest.mark.parametrize("name", ["it's mine", "50%25 of? #1", "back\\slash\\", 'ü "quoted"; `here`'])
def test_a_storage_path_may_contain_any_character(tmp_path: Path, empty_database: Path, name: str):
    experiment = override(Experiment(), {"name": "run", "storage": str(tmp_path / name)})
    client = client_for(experiment, empty_database)
    check_tracking(experiment)
    for step in (1, 2):
        tracker = open_run(experiment)
        tracker.log_metrics({"val/psnr": 10.0 + step}, step)
        tracker.finish()
    run = find_run(experiment, client)
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "val/psnr")] == [11.0, 12.0]
    assert run.data.params.keys() == flatten(experiment).keys()
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]
    assert Path(experiment.storage, "artifacts").is_dir()
    with closing(sqlite3.connect(Path(experiment.storage, "mlflow.db"))) as database:  # this file and no other
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run.info.run_id,)]
    assert not list_refused(experiment)


def test_a_run_of_an_earlier_version_is_resumed(experiment: Experiment, client: MlflowClient):
    """It has the tag with the folder, but not the one with its hash."""
    experiment_id = client.create_experiment("giffy_ray", Path(experiment.storage, "artifacts").as_uri())
    earlier = client.create_run(experiment_id, tags={"giffy_ray.run": experiment.run_dir}, run_name="run")
    assert open_run(experiment).run_id == earlier.info.run_id


def test_events_of_a_deleted_experiment_wait(
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
    assert len(list_waiting(experiment)) == 2
    with pytest.raises(ConfigError, match=r"tracking\.experiment: .*restore.*\(value 'giffy_ray'\)"):
        check_tracking(experiment)

    again = open_run(experiment)  # as a trial: the search checked the experiment before it was deleted
    again.log_metrics({"val/psnr": 2.0}, 2)
    with impatience():
        again.finish()
    assert not list_refused(experiment)
    client.restore_experiment(experiment_id)
    assert replay(experiment) == 0
    assert [metric.value for metric in client.get_metric_history(run_id, "val/psnr")] == [1.0, 2.0]
    assert find_run(experiment, client).info.status == "FINISHED"


def test_events_of_a_deleted_experiment_can_be_sent_to_another_one(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    client.delete_experiment(client.get_run(tracker.run_id).info.experiment_id)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    other = override(experiment, {"tracking.experiment": "other"})
    assert replay(other) == 0
    run = find_run(other, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert run.data.params.keys() == flatten(experiment).keys()
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]


def test_a_deleted_run_is_created_again_when_it_restarts(
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
    run = find_run(experiment, client)
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "val/psnr")] == [1.0, 2.0]
    assert run.info.status == "FINISHED"
    assert not list_refused(experiment)


def test_a_storage_failure_while_a_deleted_run_is_replaced_does_not_end_the_thread(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uploader, "_RETRY_DELAYS_S", (0.02,))
    tracker = open_run(experiment)
    tracker.flush()
    client.delete_run(tracker.run_id)
    attempts = []

    def fail(*_: object) -> None:
        attempts.append(threading.current_thread())
        raise OSError("Input/output error")

    with monkeypatch.context() as away:
        away.setattr(uploader.MlflowUploader, "_replace_deleted_run", fail)
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        deadline_s = time.monotonic() + 5
        while len(attempts) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    client.restore_run(tracker.run_id)
    tracker.finish()
    assert len(attempts) >= 3
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 1.0}


@pytest.mark.parametrize("name", ["", "x" * 600])
def test_a_run_that_mlflow_cannot_begin_keeps_all_events(
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
    assert "has not received 4 logged events" in capsys.readouterr().out
    assert not list_refused(experiment)
    assert replay(experiment) == 0
    run = find_run(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_events_that_earlier_versions_refused_with_the_begin_are_sent(experiment: Experiment, client: MlflowClient):
    refused = Path(experiment.storage, "run", "tracking", "refused")
    refused.mkdir(parents=True)
    events = [
        ("", {"kind": "begin", "name": "run", "parent": None, "tags": {}, "params": {"model.kind": "cvae"}}),
        ("metrics-000000001", {"kind": "metrics", "values": {"val/psnr": 3.0}, "step": 1, "time_ms": 1}),
        ("", {"kind": "files", "folder": None, "names": ["notes.txt"], "tags": {}}),
        ("", {"kind": "status", "status": "FINISHED"}),
    ]
    for number, (key, payload) in enumerate(events):
        (refused / f"{10**18 + number:020}-{key}").write_bytes(json.dumps(payload).encode() + b"\nwords")
    assert replay(experiment) == 0
    run = find_run(experiment, client)
    assert (run.data.metrics, run.data.params) == ({"val/psnr": 3.0}, {"model.kind": "cvae"})
    assert (run.info.status, run.info.end_time) == ("FINISHED", 10**12)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}
    assert not list(refused.iterdir())


def test_only_the_rejected_metrics_of_a_step_are_refused_and_finish_reports_them(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    tracker = open_run(experiment)
    tracker.log_metrics({"val/psnr": 2.0, "what?": 1.0, "val/skill": 3.0}, 7)
    tracker.finish()
    assert client.get_run(tracker.run_id).data.metrics == {"val/psnr": 2.0, "val/skill": 3.0}
    printed = capsys.readouterr().out
    assert f"refused 1 logged event, stored in {tracker.run_dir}/tracking/refused" in printed
    assert "metrics of step 7 (what?): MlflowException: " in printed
    assert replay(experiment) == 1  # it is sent and refused again
    (name,) = list_refused(experiment)
    payload = json.loads(Path(tracker.run_dir, "tracking", "refused", name).read_bytes())
    assert (payload["values"], payload["step"]) == ({"what?": 1.0}, 7)


def test_metrics_of_any_value_and_number_are_logged(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    many = {f"many/{number}": float(number) for number in range(1234)}
    tracker.log_metrics(many | {"nan": math.nan, "inf": math.inf}, 1)
    tracker.finish()
    metrics = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics.pop("nan")) and metrics.pop("inf") > 1e308
    assert metrics == many


def test_a_damaged_event_blocks_nothing(experiment: Experiment, client: MlflowClient):
    waiting = Path(experiment.storage, "run", "tracking", "waiting")
    waiting.mkdir(parents=True)
    (waiting / "00000000000000000001-").write_bytes(b"\xff{")
    tracker = open_run(experiment)
    tracker.finish()
    assert find_run(experiment, client).info.status == "FINISHED"
    assert list_refused(experiment) == ["00000000000000000001-"]


def test_damaged_files_of_a_run_block_nothing(experiment: Experiment, client: MlflowClient):
    """The copy of its begin event, and the id of its run, which is found again by its folder."""
    open_run(experiment).finish()
    Path(experiment.storage, "run", "mlflow_run").write_bytes(b"\xff\xfe")
    tracker = open_run(experiment)
    tracker.flush()
    Path(experiment.storage, "run", "tracking", "begun").write_bytes(b"\xff[]")
    tracker.log_metrics({"": 1.0}, 1)  # which MLflow refuses
    tracker.log_metrics({"val/psnr": 1.0}, 2)
    tracker.finish()
    run = find_run(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert len(list_refused(experiment)) == 1


def test_events_keep_their_order_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Outbox(str(tmp_path)).put({"kind": "status"})
    monkeypatch.setattr(outbox.time, "time_ns", lambda: 5)
    again = Outbox(str(tmp_path))
    again.put({"kind": "begin"})
    assert [again.read(name).kind for name in again.waiting_names()] == ["status", "begin"]


def test_a_short_storage_outage_loses_nothing(
    experiment: Experiment, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    tracker = open_run(experiment)
    tracker.flush()

    def away(*_: object) -> None:
        raise OSError("the storage is away")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "write_bytes", away)
        patch.setattr(outbox, "_list_files", away)
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        tracker.log_metrics({"val/psnr": 2.0}, 2)
        time.sleep(0.2)
    tracker.finish()
    history = client.get_metric_history(tracker.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_unwritable_artifact_folder_does_not_block_metrics(
    experiment: Experiment, client: MlflowClient, capsys: pytest.CaptureFixture
):
    artifacts = Path(experiment.storage, "artifacts")
    artifacts.write_text("in the way")
    tracker = open_run(experiment)
    tracker.log_text("words", "notes.txt")
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    with impatience():
        tracker.finish()
    run = find_run(experiment, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert run.data.params.keys() == flatten(experiment).keys()
    assert "has not received 2 logged events (NotADirectoryError: " in capsys.readouterr().out
    artifacts.unlink()
    assert replay(experiment) == 0
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


Fault = Callable[[str, str, int], tuple[int, str] | None]


class FaultyServer:
    """MLflow's own application on loopback, with injected faults.

    `fault` receives the method, path and content length of a request. It returns a status and a text, or None to let
    the request pass.
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
    """Runs in this process. MLflow's server keeps settings in the environment and globals, which are restored."""
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


FAULTS: dict[str, Fault] = {
    "an https port": lambda *_: (400, "Client sent an HTTP request to an HTTPS server."),
    "no password": lambda *_: (401, "You are not authenticated"),
    "a JSON program": lambda *_: (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}'),
    "a login page": lambda *_: (200, "<html>please log in</html>"),
    "everything is too large": lambda *_: (413, "too large"),
    "read only": lambda method, path, length: None if method == "GET" else (403, "Permission denied"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_events_wait_for_a_server_that_accepts_nothing(served: Experiment, server: FaultyServer, fault: str):
    """From the beginning, and from the middle of a run."""
    late = override(served, {"name": "late"})
    started = open_run(served)
    started.flush()
    server.fault = FAULTS[fault]
    for tracker in (started, open_run(late)):
        tracker.log_metrics({"val/psnr": 1.0}, 1)
        tracker.log_text("words", "notes.txt")
        tracker.log_dataset("clips", "abc", "/videos", {"training": 3})
        with impatience():
            tracker.finish()
    assert not list_refused(served) + list_refused(late)
    assert (len(list_waiting(served)), len(list_waiting(late))) == (4, 5)
    server.fault = None
    assert replay(served) + replay(late) == 0
    client = MlflowClient(server.address)
    for experiment in (served, late):
        run = find_run(experiment, client)
        assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}


def test_a_file_that_a_login_page_accepted_is_sent_again(served: Experiment, server: FaultyServer):
    """It answers 200 to everything, so only an answer that MLflow alone can give reveals it."""
    tracker = open_run(served)
    tracker.flush()
    server.fault = FAULTS["a login page"]
    tracker.log_text("words", "notes.txt")
    deadline_s = time.monotonic() + 5
    while not (failure := tracker._uploader._failure) and time.monotonic() < deadline_s:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert "not in a valid JSON format" in failure
    server.fault = None
    tracker.finish()
    client = MlflowClient(server.address)
    assert "notes.txt" in {item.path for item in client.list_artifacts(find_run(served, client).info.run_id)}


def test_a_proxy_that_rejects_large_files_blocks_nothing_else(
    served: Experiment, server: FaultyServer, capsys: pytest.CaptureFixture
):
    server.fault = lambda method, path, length: (413, "Request Entity Too Large") if length > 2**20 else None
    tracker = open_run(served)
    tracker.log_text("x" * (2**20 + 1), "large.txt")
    tracker.log_text("words", "notes.txt")
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.finish()
    client = MlflowClient(server.address)
    run = find_run(served, client)
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"experiment.yaml", "notes.txt"}
    printed = capsys.readouterr().out
    assert "refused 1 logged event" in printed and "file large.txt: HTTPError: 413" in printed
    server.fault = None
    assert replay(served) == 0
    assert "large.txt" in {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("status", [500, 413])
def test_an_event_that_always_fails_blocks_nothing_else(
    served: Experiment, server: FaultyServer, monkeypatch: pytest.MonkeyPatch, status: int
):
    """A server error, or one that MLflow's client reports as such, for a single kind of request."""
    monkeypatch.setattr(uploader, "PATIENCE_S", 5.0)
    server.fault = lambda method, path, length: (status, "sorry") if path.endswith("log-inputs") else None
    tracker = open_run(served)
    for number in range(5):
        tracker.log_dataset("clips", "abc", "/videos", {"training": number})
        tracker.log_metrics({"val/psnr": 1.0}, number)
    tracker.finish()
    run = find_run(served, MlflowClient(server.address))
    assert (run.data.metrics, run.info.status) == ({"val/psnr": 1.0}, "FINISHED")
    left = [*list_waiting(served), *list_refused(served)]
    assert len(left) == 1 and "inputs" in left[0]
    server.fault = None
    assert replay(served) == 0


def test_a_process_waits_for_an_unreachable_server_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploader, "PATIENCE_S", 2.0)
    monkeypatch.setattr(uploader, "_RETRY_DELAYS_S", (0.1,))
    away, took_s = override(experiment, {"tracking.uri": unreachable_server()}), []
    for number in range(4):
        trial = open_run(override(away, {"name": f"trial-{number}"}))
        began_s = time.monotonic()
        trial.finish("KILLED")
        took_s.append(time.monotonic() - began_s)
        assert len(list_waiting(override(experiment, {"name": f"trial-{number}"}))) == 2
        trial._uploader._thread.join(3)  # type: ignore[union-attr]
        assert not trial._uploader._thread.is_alive()  # type: ignore[union-attr]
    assert sum(took_s) < 3 * 2.0  # four waits would be 8 s
    assert max(took_s[1:]) < 2.0


def test_a_process_waits_for_a_silent_server_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
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
        thread = second._uploader._thread  # type: ignore[union-attr]
        assert thread.is_alive()  # its request is pending: `finish` did not wait for it
        thread.join(20)
        assert not thread.is_alive()


def test_the_end_of_a_search_sends_the_undelivered_events_of_its_trials(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    parent.flush()
    away = override(experiment, {"tracking.uri": unreachable_server(), "storage": parent.run_dir})
    for name in ("trial-0", "trial-1"):
        trial = open_run(override(away, {"name": name}), parent=parent.run_dir)
        trial.log_metrics({"val/psnr": 1.0}, 1)
        if name == "trial-0":
            with impatience():
                trial.finish("FINISHED")  # and the other trial was killed
    parent.close_children()
    best = open_run(override(experiment, {"name": "best"}), parent=parent.run_dir)
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
    "mysql+nothing://me:secret@host/mlflow": "SQLAlchemy reports",
    "mssql+pyodbc://me:secret@host/mlflow": "not installed",
    "sqlite:///{folder}": "is a folder, not an SQLite file",
    "sqlite:///{folder}/text.db": "is not an SQLite file",
    "sqlite:///{folder}/text.db/mlflow.db": "is not a folder",
}


@pytest.mark.parametrize("uri", WRONG)
def test_an_address_that_can_never_work_is_rejected_at_the_start(experiment: Experiment, tmp_path: Path, uri: str):
    (tmp_path / "text.db").write_text("text, and no database at all")
    wrong = override(experiment, {"tracking.uri": uri.format(folder=tmp_path)})
    with pytest.raises(ConfigError, match=rf"tracking\.uri: .*{WRONG[uri]}") as refusal:
        check_tracking(wrong)
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match=WRONG[uri]):
        replay(wrong)


def test_an_unwritable_database_is_rejected_at_the_start(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uri.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*/runs is not writable"):
        check_tracking(experiment)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "https://me:secret@host/path", "sqlite:///{folder}/new/a.db"])
def test_an_unreachable_server_is_accepted_at_the_start(experiment: Experiment, tmp_path: Path, uri: str):
    check_tracking(override(experiment, {"tracking.uri": uri.format(folder=tmp_path)}))


def test_replay_rejects_an_unknown_run(experiment: Experiment):
    with pytest.raises(ConfigError, match=r"name: no logged events in .*/run; .* \(value 'run'\)"):
        replay(experiment)
