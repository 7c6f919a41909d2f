"""`giffy doctor`: what it reports of this machine, and what it concludes about others."""

import dataclasses
import http.server
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import ray
import torch

from giffy_ray.cli import doctor, facts
from giffy_ray.cli.facts import Facts, Folder, Gpu, Service
from giffy_ray.core import packaged
from tests.cli.conftest import Result

Run = Callable[..., Result]
NONE = Service(None, "not set")
HEALTHY = Facts(
    platform="Linux 6, x86_64",
    versions={"torch": "2.13", "ray": "2.60", "mlflow": "3.17", "optuna": "5"},
    import_errors={},
    cores=8,
    machine_cores=8,
    torch_threads=8,
    free_memory_bytes=16_000_000_000,
    shared_memory_bytes=8_000_000_000,
    gpus=(Gpu("H100", 79_000_000_000, 80_000_000_000),),
    has_mps=False,
    has_nvidia_driver=True,
    ffmpeg="8.1",
    filters={"minterpolate": True, "zscale": True, "tonemap": True},
    encoders={"libx264": True, "libwebp": True},
    missing_modules=(),
    folders=(Folder("temporary", "/tmp", 10**12, None), Folder("current", "/home", 10**12, None)),
    models=("between",),
    self_test_s=0.5,
    self_test_error=None,
    ray=NONE,
    mlflow=NONE,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # a cluster that happens to run here is no part of the test


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that answers /api/version with 401 and /broken/health with 500; its address and what it was asked."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            status = 401 if "version" in self.path else 500 if "broken" in self.path else 200
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}", requests
        running.shutdown()


def test_json_holds_the_facts(run_giffy: Run):
    result = run_giffy("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, result.stderr, report["ok"]) == (0, "", True)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["ray"] == ray.__version__
    assert report["versions"]["Python"] == sys.version.split()[0]
    assert report["ffmpeg"] == av.ffmpeg_version_info
    assert report["torch_threads"] == torch.get_num_threads()
    assert report["filters"]["minterpolate"] == ("minterpolate" in av.filter.filters_available)
    assert report["encoders"]["libx264"] is True
    assert report["models"] == packaged.packaged_models()
    assert 0 < report["self_test_s"] < 60
    assert {folder["purpose"] for folder in report["folders"]} == {"temporary", "cache", "current"}
    assert {finding["severity"] for finding in report["findings"]} <= {"fails", "slow"}
    assert bool(report["gpus"]) == torch.cuda.is_available()


def test_the_table_fits_80_columns(run_giffy: Run, monkeypatch: pytest.MonkeyPatch):
    long = Folder("current", "/home/somebody/" + "a_long_name_without_spaces/" * 6, 10**12, None)
    unhealthy = dataclasses.replace(
        HEALTHY, folders=(long,), gpus=(), self_test_error="x" * 200, ray=Service("h:1", "from RAY_ADDRESS", "refused")
    )
    for shown in (HEALTHY, unhealthy):
        monkeypatch.setattr(facts, "collect_facts", lambda _, shown=shown: shown)
        lines = run_giffy("doctor").stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert not [line for line in lines if "…" in line]
    assert "Nothing is slow or fails here" not in lines
    text = " ".join(" ".join(lines).split())
    assert "broken An interpolation of two small images failed" in text
    assert "No Ray answers at h:1: refused Remedy: set RAY_ADDRESS" in text


@pytest.mark.parametrize(
    ("changes", "severity", "problem", "remedy"),
    [
        ({"import_errors": {"torch": "OSError: no libc"}}, "broken", "torch cannot be imported: OSError", "reinstall"),
        ({"models": ()}, "broken", "no pretrained model", "reinstall"),
        ({"self_test_error": "InputError: bad"}, "broken", "failed: InputError: bad", "reinstall"),
        ({"encoders": {"libx264": False}}, "broken", "no libx264, so it writes no .mp4", "pip install"),
        ({"encoders": {"libwebp": False}}, "fails", "no libwebp, so it writes no .webp", "pip install"),
        ({"folders": (Folder("temporary", "/t", 1, "denied"),)}, "broken", "/t cannot be written: denied", "TMPDIR"),
        ({"folders": (Folder("current", "/x", 1, "denied"),)}, "fails", "/x cannot be written: denied", "another"),
        ({"folders": (Folder("cache", "/x", 9 * 10**8, None),)}, "fails", "/x has only 0.9 GB free", "free some space"),
        ({"free_memory_bytes": 10**9}, "fails", "1.0 GB of memory are free", "smaller pictures"),
        ({"versions": {}}, "fails", "ray, mlflow, optuna not installed", "pip install 'giffy_ray[train]'"),
        ({"ray": Service("h:1", "", "refused")}, "fails", "No Ray answers at h:1: refused", "RAY_ADDRESS=local"),
        ({"mlflow": Service("h", "", "gone")}, "fails", "MLflow does not answer at h: gone", "MLFLOW_TRACKING_URI"),
        ({"filters": {"minterpolate": False}}, "fails", "no minterpolate", "evaluate.baselines=[linear, hold]"),
        ({"missing_modules": ("fcntl",)}, "fails", "no fcntl: videos are decoded without a sandbox", "on Linux"),
        ({"gpus": ()}, "slow", "There is an NVIDIA GPU, but torch 2.13 cannot use it", "https://download.pytorch.org"),
        ({"gpus": (), "has_nvidia_driver": False}, "slow", "There is no GPU: the networks run on 8 CPU", "with a GPU"),
        ({"cores": 0.5, "torch_threads": 1}, "slow", "may use 0.5 CPU cores", "allow two cores"),
        ({"cores": 2.5, "torch_threads": 64}, "slow", "64 threads, and this process may use 2.5", "OMP_NUM_THREADS=2"),
        ({"shared_memory_bytes": 64 * 2**20}, "slow", "/dev/shm has 0.1 GB free", "--shm-size"),
    ],
)  # fmt: skip
def test_a_defect_has_a_remedy(changes: dict, severity: str, problem: str, remedy: str):
    assert doctor.diagnose(HEALTHY) == []
    (finding,) = doctor.diagnose(dataclasses.replace(HEALTHY, **changes))
    assert finding.severity == severity
    assert problem in finding.problem
    assert remedy in finding.remedy


def test_the_most_severe_comes_first():
    findings = doctor.diagnose(dataclasses.replace(HEALTHY, gpus=(), models=(), missing_modules=("pwd",)))
    assert [finding.severity for finding in findings] == ["broken", "fails", "slow"]


def test_unknown_facts_are_no_defects():
    unknown = {"torch_threads": None, "free_memory_bytes": None, "shared_memory_bytes": None, "filters": {}}
    assert doctor.diagnose(dataclasses.replace(HEALTHY, **unknown, encoders={}, ffmpeg=None)) == []


def test_the_exit_code_is_1_if_interpolation_is_broken(run_giffy: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged, "_FOLDERS", {"models": Path("/nowhere"), "experiments": Path("/nowhere")})
    result = run_giffy("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"], report["self_test_s"]) == (1, False, None)
    assert report["findings"][0]["problem"] == "The package holds no pretrained model."


def test_a_library_that_cannot_be_imported_is_reported(run_giffy: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run_giffy("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert re.match("torch cannot be imported: ModuleNotFoundError", report["findings"][0]["problem"])
    assert report["torch_threads"] is None


def test_the_self_test_reports_what_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("giffy_ray.inference.clip._encode_mp4", lambda *_: 1 / 0)
    assert facts._test_interpolation() == (None, "ZeroDivisionError: division by zero")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert facts._find_write_problem(tmp_path) is None
    assert facts._find_write_problem(tmp_path / "file") == "Not a directory"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    folders = {folder.purpose: folder for folder in facts._inspect_folders()}
    assert folders["cache"].path == str(tmp_path / "not" / "yet")
    assert folders["cache"].problem is None
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_ray_is_asked_where_it_is_configured(server: tuple[str, list[str]], tmp_path: Path):
    address, requests = server
    assert facts.find_ray({"RAY_ADDRESS": "local"}).problem is None
    assert facts.find_ray({"RAY_ADDRESS": address}).problem is None
    assert facts.find_ray({"RAY_ADDRESS": f"ray://{address}"}).problem is None
    assert requests == []
    dashboard = facts.find_ray({"RAY_ADDRESS": f"http://me:hush@{address}/"})
    assert (dashboard.problem, requests) == (None, ["/api/version"])  # which wants a token, so it runs
    assert "hush" not in str(dashboard)
    assert facts.find_ray({"RAY_ADDRESS": "nonsense"}).problem == "it is not HOST:PORT"
    assert facts.find_ray({"RAY_TMPDIR": str(tmp_path)}) == Service(None, "not set: jobs start Ray on this machine")
    automatic = {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "auto"}
    assert facts.find_ray(automatic).problem == "no cluster runs on this machine"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
    running = Service(address, f"from {tmp_path}/ray/ray_current_cluster")
    assert facts.find_ray({"RAY_TMPDIR": str(tmp_path)}) == facts.find_ray(automatic) == running


def test_mlflow_is_asked_where_it_is_configured(server: tuple[str, list[str]]):
    address, requests = server
    assert facts.find_mlflow({}).address is None
    assert facts.find_mlflow({"MLFLOW_TRACKING_URI": f"http://me:hush@{address}"}) == Service(
        f"http://***@{address}", "server"
    )
    assert facts.find_mlflow({"MLFLOW_TRACKING_URI": f"http://{address}/broken/"}).problem == "HTTP status 500"
    assert requests == ["/health", "/broken/health"]
    assert facts.find_mlflow({"MLFLOW_TRACKING_URI": "sqlite:///x.db"}).problem is None
    assert facts.find_mlflow({"MLFLOW_TRACKING_URI": "http://[broken"}).problem


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_service_that_does_not_answer_is_reported_at_once(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(facts, "_TIMEOUT_S", 0.2)
    start_s = time.monotonic()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if kind == "silent":
            bound.listen()
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert facts.find_mlflow({"MLFLOW_TRACKING_URI": f"http://{address}"}).problem
        assert facts.find_ray({"RAY_ADDRESS": f"http://{address}"}).problem
        if kind == "closed":
            assert facts.find_ray({"RAY_ADDRESS": address}).problem == "Connection refused"
    assert time.monotonic() - start_s < 5
