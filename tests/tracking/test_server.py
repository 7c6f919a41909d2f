"""A real MLflow server on loopback: `make ui`, and one as a cluster has it, with passwords and a bucket."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from giffy_ray.cluster.local import free_port
from giffy_ray.config import Experiment, override
from giffy_ray.inference import registration
from giffy_ray.inference.loading import trained_runs
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.tracker import open_run
from tests.conftest import ROOT, TINY
from tests.inference.test_registration import KEPT, trained

PASSWORD = "only-for-this-test"


def ui(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "giffy_ray.tracking.server", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_where_there_are_no_runs_the_page_is_not_started(tmp_path: Path):
    _, said = (job := ui(tmp_path, free_port())).communicate(timeout=60)
    assert job.returncode == 1
    assert f"{tmp_path}/mlflow.db: there is no such file" in said
    assert "make demo" in said


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1"])
def test_a_port_that_is_none_is_named(tmp_path: Path, port: str):
    _, said = (job := ui(tmp_path, port)).communicate(timeout=60)
    assert job.returncode == 1
    assert said.strip() == f"port {port}: must be a number from 1 to 65535; 'make ui PORT=5001'"


def test_a_port_that_is_taken_is_named_and_another_one_offered(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, said = (job := ui(tmp_path, port)).communicate(timeout=60)
    assert job.returncode == 1
    assert f"port {port}: another program listens there; 'make ui PORT={port + 1}'" in said


def test_the_page_says_where_it_is_when_it_answers_and_ends_with_ctrl_c(tmp_path: Path):
    open_run(override(Experiment(), {"name": "run", "storage": str(tmp_path)})).finish()
    job = ui(tmp_path, port := free_port())
    assert job.stdout
    for line in job.stdout:
        if "shows the runs" in line:
            break
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
        assert b"MLflow" in page.read()
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.fixture(scope="module")
def cluster_server(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server as cluster/README.md starts it, but for PostgreSQL; with a password."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    words = ["--app-name", "basic-auth", "--artifacts-destination", f"{bucket}/mlflow"]
    words += ["--allowed-hosts", f"127.0.0.1:{port}"]
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
    }
    began_s = time.monotonic()
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", port, words, environment) as server:
        print(f"the server took {time.monotonic() - began_s:.0f} s to start")
        yield server.address


@contextlib.contextmanager
def logged_in(password: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield


def test_a_server_with_passwords_and_a_bucket_takes_runs_files_and_models(
    cluster_server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for password in (None, "wrong"):
        known = logged_in(password) if password else contextlib.nullcontext()
        with known, pytest.raises(MlflowException, match=r"401|not authenticated"):
            MlflowClient(cluster_server).search_experiments()
    request = urllib.request.Request(f"{cluster_server}/", headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=20)

    with logged_in(PASSWORD):
        base = override(Experiment(), TINY | {"tracking.uri": cluster_server})
        experiment = trained(base, tmp_path / "runs", "first", 50.0)
        tracker = open_run(experiment)
        tracker.log_metrics({"val/psnr": 20.5}, 1)
        tracker.log_text("words", "notes.txt")
        tracker.finish()
        assert registration.register(experiment).startswith("models:/giffy_ray/1: the champion")
        client = MlflowClient(cluster_server)
        run = client.get_run(tracker.run_id)
        assert run.data.metrics == {"val/psnr": 20.5}
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        (other,) = trained_runs(override(experiment, {"evaluate.runs": ["models:/giffy_ray@champion"]}), base.clip)
        assert other.name == "giffy_ray@champion"
        mlflow.set_tracking_uri(cluster_server)
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        try:
            assert mlflow.pyfunc.load_model("models:/giffy_ray@champion").metadata.signature is not None
        finally:
            mlflow.set_tracking_uri(None)
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="mlflow/")["Contents"]
    kept = {entry["Key"].partition("/artifacts/")[2] for entry in listed}
    assert {"notes.txt", "experiment.yaml"} <= kept
    assert {key.rpartition("/")[2] for key in kept if "/checkpoint/" in key} == KEPT


def test_a_password_in_the_address_works_and_is_shown_nowhere(
    cluster_server: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    address = cluster_server.replace("://", f"://admin:{PASSWORD}@")
    experiment = override(Experiment(), {"name": "second", "storage": str(tmp_path / "runs"), "tracking.uri": address})
    tracker = open_run(experiment)
    tracker.finish()
    with logged_in(PASSWORD):
        run = MlflowClient(cluster_server).get_run(tracker.run_id)
    assert run.data.params["tracking.uri"] == cluster_server.replace("://", "://***@")
    assert PASSWORD not in str(run.to_dictionary()) + capsys.readouterr().out
