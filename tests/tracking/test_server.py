"""Real MLflow servers on loopback: that of `make ui`, and that of a cluster, with passwords and a bucket."""

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
from giffy_ray.inference.loading import load_trained_models
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.tracker import open_run
from giffy_ray.tracking.ui_view import VIEW_QUERY
from tests.conftest import ROOT, TINY
from tests.inference.test_registration import EXPORTED_FILES, create_finished_run

PASSWORD = "only-for-this-test"


def start_ui(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "giffy_ray.cli.main", "ui", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_make_ui_without_runs_names_the_missing_file(tmp_path: Path):
    _, stderr = (job := start_ui(tmp_path, "--port", free_port())).communicate(timeout=60)
    assert job.returncode == 2
    assert f"{tmp_path}/mlflow.db: no such file" in stderr
    assert "make demo" in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("port", "reason"),
    [
        ("abc", "'abc' is not a valid integer range."),
        ("0", "0 is not in the range 1<=x<=65535."),
        ("70000", "70000 is not in the range 1<=x<=65535."),
        ("-1", "-1 is not in the range 1<=x<=65535."),
    ],
)
def test_an_invalid_port_is_rejected(tmp_path: Path, port: str, reason: str):
    _, stderr = (job := start_ui(tmp_path, "--port", port)).communicate(timeout=60)
    assert job.returncode == 2
    assert stderr.strip() == f"giffy: Invalid value for '--port': {reason} See 'giffy ui --help'."


def test_a_port_in_use_is_rejected_with_a_suggestion(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        _, stderr = (job := start_ui(tmp_path, "--port", port)).communicate(timeout=60)
    assert job.returncode == 2
    assert f"port {port}: another program uses it; choose another one, such as --port {port + 1}" in stderr
    assert len(stderr.splitlines()) == 1


def test_make_ui_prints_the_address_of_the_view_and_ends_with_ctrl_c(tmp_path: Path):
    open_run(override(Experiment(), {"name": "run", "storage": str(tmp_path)})).finish()
    job = start_ui(tmp_path, "--port", port := free_port())
    assert job.stdout
    for line in job.stdout:
        if "/#/experiments/" in line:
            break
    assert line.strip() == f"http://127.0.0.1:{port}/#/experiments/1/runs?{VIEW_QUERY}"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
        assert b"MLflow" in page.read()
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.fixture(scope="module")
def cluster_server(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a password, as in cluster/README.md except for PostgreSQL."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    arguments = ["--app-name", "basic-auth", "--artifacts-destination", f"{bucket}/mlflow"]
    arguments += ["--allowed-hosts", f"127.0.0.1:{port}"]
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
    }
    start_s = time.monotonic()
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", port, arguments, environment) as server:
        print(f"the server took {time.monotonic() - start_s:.0f} s to start")
        yield server.address


@contextlib.contextmanager
def use_password(password: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield


def test_a_server_with_passwords_and_a_bucket_accepts_runs_files_and_models(
    cluster_server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for password in (None, "wrong"):
        credentials = use_password(password) if password else contextlib.nullcontext()
        with credentials, pytest.raises(MlflowException, match=r"401|not authenticated"):
            MlflowClient(cluster_server).search_experiments()
    request = urllib.request.Request(f"{cluster_server}/", headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=20)

    with use_password(PASSWORD):
        base = override(Experiment(), TINY | {"tracking.uri": cluster_server})
        experiment = create_finished_run(base, tmp_path / "runs", "first", 50.0)
        tracker = open_run(experiment)
        tracker.log_metrics({"val/psnr": 20.5}, 1)
        tracker.log_text("words", "notes.txt")
        tracker.finish()
        assert registration.register(experiment).startswith("models:/giffy_ray/1: promoted to champion")
        client = MlflowClient(cluster_server)
        run = client.get_run(tracker.run_id)
        assert run.data.metrics == {"val/psnr": 20.5}
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        champion = override(experiment, {"evaluate.runs": ["models:/giffy_ray@champion"]})
        (model,) = load_trained_models(champion, base.clip)
        assert model.name == "giffy_ray@champion"
        mlflow.set_tracking_uri(cluster_server)
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        try:
            assert mlflow.pyfunc.load_model("models:/giffy_ray@champion").metadata.signature is not None
        finally:
            mlflow.set_tracking_uri(None)
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="mlflow/")["Contents"]
    stored = {entry["Key"].partition("/artifacts/")[2] for entry in listed}
    assert {"notes.txt", "experiment.yaml"} <= stored
    assert {key.rpartition("/")[2] for key in stored if "/checkpoint/" in key} == EXPORTED_FILES


def test_a_password_in_the_address_works_and_is_not_shown(
    cluster_server: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    address = cluster_server.replace("://", f"://admin:{PASSWORD}@")
    experiment = override(Experiment(), {"name": "second", "storage": str(tmp_path / "runs"), "tracking.uri": address})
    tracker = open_run(experiment)
    tracker.finish()
    with use_password(PASSWORD):
        run = MlflowClient(cluster_server).get_run(tracker.run_id)
    assert run.data.params["tracking.uri"] == cluster_server.replace("://", "://***@")
    assert PASSWORD not in str(run.to_dictionary()) + capsys.readouterr().out
