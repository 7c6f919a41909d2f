"""The console script: help, start-up time, and the commands that pass their work on."""

import inspect
import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from giffy_ray.cli import main
from giffy_ray.inference import export, service
from giffy_ray.inference.service_guard import ServiceLimits
from giffy_ray.tracking import server
from tests.cli.conftest import Result
from tests.conftest import ROOT

Run = Callable[..., Result]
JOBS = ("train", "tune", "evaluate", "prepare")


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "giffy_ray.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"giffy": f"{main.__name__}:{main.main.__name__}"}


@pytest.mark.parametrize("command", ["", *main.giffy.commands])
def test_every_command_prints_its_help(run_giffy: Run, command: str):
    result = run_giffy(*command.split(), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.lower().startswith(f"usage: giffy {command}".rstrip())
    for name in main.giffy.commands if not command else ():
        assert f"\n  {name} " in result.stdout


def test_no_command_prints_the_help(run_giffy: Run):
    result = run_giffy()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: giffy")


def test_the_version(run_giffy: Run):
    assert run_giffy("--version").stdout.startswith("giffy, version ")


def test_the_help_takes_less_than_a_third_of_a_second():
    """Measured as CPU time of the best of five starts, which the load of the machine changes least."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("interpolat", "giffy: No such command 'interpolat'. Did you mean 'interpolate'? See 'giffy --help'."),
        ("--verbose", "giffy: No such option '--verbose'. Did you mean '--version'? See 'giffy --help'."),
        ("ui --port 0", "giffy: Invalid value for '--port': 0 is not in the range 1<=x<=65535. See 'giffy ui --help'."),
        ("ui a b", "giffy: Got unexpected extra argument (b) See 'giffy ui --help'."),
        ("export --format onnx", "giffy: Missing option '-o' / '--output'. See 'giffy export --help'."),
        ("serve --workers 0", "giffy: Invalid value for '--workers': 0 is not in the range x>=1. See"),
        ("serve --limit queue", "giffy: --limit: queue must be a number of type int (value '')"),
        ("serve --limit queue=1.5", "giffy: --limit: queue must be a number of type int (value '1.5')"),
        ("serve --limit quee=3", "giffy: --limit: there is no 'quee'; did you mean 'queue'?"),
        ("serve --limit zzz=3", "giffy: --limit: there is no 'zzz'; expected one of upload_mb, "),
        ("serve --limit queue=0", "giffy: limits.queue: must be above 0 (value 0)"),
        ("train betwen", "giffy train: betwen: no such experiment file; did you mean 'between'?"),
        ("train demo optim.lrr=1", "giffy train: optim.lrr: no such field (value 1); did you mean 'optim.lr'?"),
        (
            "prepare own-videos",
            "giffy prepare: data.root: is required by this experiment; set data.root=/path",
        ),
        ("evaluate", "giffy evaluate: nothing to evaluate: give an experiment, name=RUN"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    run_giffy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(service, "run_service", lambda **_: pytest.fail("the service started"))
    result = run_giffy(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", JOBS)
def test_the_help_of_a_job_is_that_of_its_runner(run_giffy: Run, command: str):
    text = run_giffy(command, "--help").stdout
    assert f"giffy {command} " in text.split("\n\n")[1]  # what to type
    assert "own-videos" in text.replace("\n", "")
    assert "--resume {auto,never,must}" in text


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [*((f"{job} demo", "ray", "train") for job in JOBS), ("ui", "mlflow", "train"), ("serve", "fastapi", "serve")],
)
def test_a_core_install_says_what_is_missing(
    run_giffy: Run, monkeypatch: pytest.MonkeyPatch, command: str, library: str, extra: str
):
    monkeypatch.setitem(sys.modules, library, None)  # as if it was not installed
    result = run_giffy(*command.split())
    assert result.exit_code == 2
    assert f": needs {library}, which the core install lacks; pip install 'giffy_ray[{extra}]'\n" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ui_serves_the_given_storage(run_giffy: Run, monkeypatch: pytest.MonkeyPatch):
    served: list[tuple[Path, int]] = []
    monkeypatch.setattr(server, "serve_ui", lambda storage, port: served.append((storage, port)))
    assert run_giffy("ui").exit_code == 0
    assert run_giffy("ui", "other", "--port", 5001).exit_code == 0
    assert served == [(Path("runs"), 5000), (Path("other"), 5001)]


def test_ui_without_runs_fails(run_giffy: Run, tmp_path: Path):
    result = run_giffy("ui", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}/mlflow.db: no such file" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_serve_passes_its_options(run_giffy: Run, monkeypatch: pytest.MonkeyPatch):
    calls: list[dict[str, Any]] = []
    parameters = inspect.signature(service.run_service).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    monkeypatch.setattr(service, "run_service", lambda **options: calls.append(options))
    monkeypatch.delenv("GIFFY_RAY_TOKEN", raising=False)
    assert run_giffy("serve").exit_code == 0
    assert calls.pop() == defaults | {"limits": ServiceLimits()}
    monkeypatch.setenv("GIFFY_RAY_TOKEN", "secret")
    limits = ["--limit", "queue=3", "--limit", "image_megapixels=1.5"]
    options = ["--model", "models:/giffy_ray@champion", "--host", "::1", "--port", 0, "--workers", 2, "--device", "cpu"]
    assert run_giffy("serve", *options, *limits, "--reload-interval", 5).exit_code == 0
    assert calls.pop() == {
        "model": "models:/giffy_ray@champion",
        "host": "::1",
        "port": 0,
        "token": "secret",
        "device": "cpu",
        "workers": 2,
        "limits": ServiceLimits(queue=3, image_megapixels=1.5),
        "reload_interval_s": 5.0,
    }


@pytest.mark.parametrize("file_format", ["torch-export", "onnx", "huggingface"])
def test_export_passes_its_options(run_giffy: Run, monkeypatch: pytest.MonkeyPatch, file_format: str):
    calls = []
    monkeypatch.setattr(export, "export_model", lambda *arguments: calls.append(arguments) or Path("written"))
    result = run_giffy("export", "--format", file_format, "--model", "between-sharp", "-o", "folder/out")
    assert result == (0, "written\n", "")
    assert calls == [("between-sharp", Path("folder/out"), file_format)]


def test_a_model_is_exported(run_giffy: Run, model: str, tmp_path: Path):
    result = run_giffy("export", "--format", "huggingface", "--model", model, "-o", tmp_path / "exported")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/exported\n"), result.stderr
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(tmp_path / "exported"))


def test_a_pipe_that_closes_early_prints_no_traceback():
    command = [sys.executable, "-m", "giffy_ray.cli.main", "interpolate", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


CORE_INSTALL = """
import sys
for name in ("ray", "mlflow", "optuna", "pyarrow", "matplotlib", "torchmetrics", "sklearn", "psutil", "boto3",
             "filelock", "tenacity", "pynvml", "fastapi", "onnx"):
    sys.modules[name] = None  # makes importing it fail
from giffy_ray.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["interpolate 0.png 1.png -o out.mp4 --json", "doctor --json"])
def test_the_core_install_is_enough_for(command: str, pictures: list[str]):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = [sys.executable, "-c", CORE_INSTALL, *command.split()]
    completed = subprocess.run(process, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert json.loads(completed.stdout)
