"""The command line of jobs: arguments, exit codes and messages. Jobs are stubs, and Ray does not start."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import TrainingFailedError

from giffy_ray import workflows
from giffy_ray.cli import jobs, main
from giffy_ray.cluster import local, resources
from giffy_ray.config import ConfigError, Experiment, load, override, to_yaml
from giffy_ray.core.packaged import packaged_path
from giffy_ray.core.storage import write_text
from tests.conftest import ROOT

JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
DEMO = packaged_path("experiments", "demo")


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.yaml").write_text("name: a\n")
    (tmp_path / "a=b.yaml").write_text("name: ab\n")
    (tmp_path / "own.yaml").write_text("data:\n  root: ???\n")
    (tmp_path / "cgan-demo").write_text("name: file\n")
    (tmp_path / "small").mkdir()
    return tmp_path


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a function as a job with command-line arguments; returns its exit code and stderr."""
    monkeypatch.setattr(resources, "connect", lambda: None)

    def run_cli(function: Callable[[Experiment], None], *arguments: str, **settings) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/stub.py", *arguments])
        code = 0
        try:
            jobs.run_job(jobs.Job(function, "What it does.", **settings))
        except SystemExit as system_exit:
            code = system_exit.code  # type: ignore[assignment]
        return code, capsys.readouterr().err

    return run_cli


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "demo"),
        (["a.yaml"], "a"),
        (["a=b.yaml"], "ab"),
        (["small/cgan"], "small-cgan"),
        (["cgan-demo"], "file"),  # a path wins over a name
        (["a.yaml", "name=mine"], "mine"),
        (["name=mine", "a.yaml"], "mine"),
        (["--resume", "never", "name=mine", "--profile"], "mine"),
        (["--resume=must", "name=2024-01-02"], "2024-01-02"),
    ],
)
def test_a_job_receives_the_experiment(run_cli, working_dir: Path, arguments: list[str], name: str):
    received: list[Experiment] = []
    code, stderr = run_cli(received.append, *arguments)
    assert (code, stderr) == (0, "")
    (experiment,) = received
    assert experiment.name == name
    assert experiment.storage == f"{working_dir}/runs"
    resume = "never" if "never" in arguments else "must" if "--resume=must" in arguments else "auto"
    assert experiment.search.resume == resume
    assert experiment.speed.profile == ("--profile" in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo"], "unrecognized arguments: --foo"),
        (["--resum", "never"], "unrecognized arguments: --resum"),
        (["--resume"], "--resume: expected one argument"),
        (["--resume", "soon"], "invalid choice: 'soon'"),
        (["a.yaml", "b.yaml"], "unexpected 'b.yaml': the experiment is 'a.yaml'"),
        (["a.yaml", "train.epochs"], "unexpected 'train.epochs'"),
        ([""], "unexpected '': expected an experiment or section.field=value"),
        (["", "name=mine"], "unexpected '': expected an experiment"),
        (["b.yaml"], "b.yaml: no such experiment file; giffy_ray comes with between, between-sharp, cgan-demo"),
        (["betwen"], "betwen: no such experiment file; did you mean 'between'?"),
        (["jobs/experiments/demo.yaml"], "jobs/experiments/demo.yaml: no such experiment file; did you mean 'demo'?"),
        (["small/cgam"], "small/cgam: no such experiment file; did you mean 'small/cgan'?"),
        (["small"], "small: is a folder"),
        (["."], ".: is a folder"),
        (["optim.lrr=1"], "optim.lrr: no such field (value 1); did you mean 'optim.lr'?"),
        (["data.root="], "data.root: is empty"),
        (["data.root=nowhere"], "data.root: no such folder or list (.csv, .parquet) of videos (value 'nowhere')"),
        (["own.yaml"], "data.root: is required by this experiment; set data.root=/path/to/videos"),
        (["own-videos"], "data.root: is required by this experiment; set data.root=/path/to/videos"),
        (["storage=file"], "storage: cannot be written: not a folder"),
        (["storage=file/runs"], "storage: cannot be written: Not a directory"),
        (["storage=/proc/runs"], "storage: cannot be written: No such file or directory (value '/proc/runs')"),
        (["storage=https://host/x"], "storage: https:// is not supported"),
        (["storage=s3://key:hush@bucket/x"], "storage: the address appears in logs"),
        (["tracking.uri=127.0.0.1:5000"], "use http://127.0.0.1:5000"),
    ],
)
def test_a_mistake_prints_one_message_and_exits_with_2(run_cli, arguments: list[str], message: str):
    def fail(_: Experiment) -> None:
        raise AssertionError("the job started")

    code, stderr = run_cli(fail, *arguments)
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert "hush" not in stderr
    (line,) = [line for line in stderr.splitlines() if not line.startswith(("usage: ", " "))]
    assert line.startswith("stub.py: ")


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], set()), (["--dry-run", "a.yaml", "--prune"], {"prune", "dry_run"})]
)
def test_a_job_receives_its_flags_as_keyword_arguments(run_cli, arguments: list[str], expected: set[str]):
    received = {}
    flags = {"prune": "remove", "dry_run": "list"}
    assert run_cli(lambda experiment, **values: received.update(values), *arguments, flags=flags) == (0, "")
    assert received == {name: name in expected for name in flags}


def test_a_flag_of_another_job_is_rejected(run_cli):
    code, stderr = run_cli(lambda experiment: None, "--prune")
    assert code == 2
    assert "unrecognized arguments: --prune" in stderr


def test_a_dry_run_requires_prune():
    with pytest.raises(ConfigError, match="use --prune --dry-run"):
        workflows.prepare_dataset(Experiment(), dry_run=True)


def test_pruning_prints_what_it_removes(working_dir: Path, capsys: pytest.CaptureFixture[str]):
    folder = working_dir / "runs" / "stores" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text('{"version": 2}')
    experiment = override(Experiment(), {"storage": str(working_dir / "runs")})
    printed = []
    for dry_run in (True, False):
        workflows.prepare_dataset(experiment, prune=True, dry_run=dry_run)
        printed.append(" ".join(capsys.readouterr().out.split()))
        assert folder.exists() == dry_run
    assert "would be removed from" in printed[0]
    assert "removing from" in printed[1]
    for text in printed:
        assert re.search(r"store 0123456789abcdef │ 1 │ 14 │ decoder version 2, the current version is 3", text)


def test_a_job_without_data_does_not_require_a_root(run_cli):
    assert run_cli(lambda _: None, "own.yaml", needs_data=False) == (0, "")


def training_error() -> Exception:
    """The exception that Ray Train raises if one of two workers fails, with two wrappers."""
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    inner = ValueError("a loss is\n  not finite")
    return WorkerGroupError("[Rank 1]\nTraceback ...", {1: UserExceptionWithTraceback(inner, "Traceback ...\nmore")})


def task_error(error: Exception) -> Exception:
    return RayTaskError("decode", "Traceback ...\nmore", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(13, "Permission denied", "/x"), 1, "PermissionError: [Errno 13] Permission denied: '/x'"),
        (RuntimeError("a\n\n  b"), 1, "RuntimeError: a b (test_jobs.py:"),
        (ZeroDivisionError("division"), 1, "ZeroDivisionError: division (test_jobs.py:"),
        (OSError("no s3://key:hush@bucket"), 1, "OSError: no s3://***@bucket"),
        (training_error(), 1, "ValueError: a loss is not finite"),
        (task_error(KeyError("x")), 1, "KeyError: 'x'"),
        (task_error(ConfigError("optim.lr: is wrong")), 2, "stub.py: optim.lr: is wrong"),
        (TrainingFailedError("Training failed"), 1, "TrainingFailedError: Training failed"),
        (KeyboardInterrupt(), 130, "stub.py: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_prints_one_line_and_saves_its_traceback(
    run_cli, monkeypatch: pytest.MonkeyPatch, working_dir: Path, error: BaseException, code: int, message: str
):
    monkeypatch.setattr("tempfile.tempdir", str(working_dir))

    def fail(_: Experiment) -> None:
        raise error

    exit_code, stderr = run_cli(fail)
    assert exit_code == code
    assert message in stderr
    assert "Traceback" not in stderr
    saved = list(working_dir.glob("giffy_ray-stub-*.log"))
    assert len(saved) == (code == 1)
    for path in saved:
        assert f"the traceback is in {path}" in stderr
        text = path.read_text()
        assert text.startswith("Traceback")
        assert "in fail" in text
        assert "hush" not in text
        assert path.stat().st_mode & 0o077 == 0
    if code != 130:
        assert "in fail" in run_cli(fail, "--debug")[1]


def test_the_exit_code_of_a_job_is_kept(run_cli):
    assert run_cli(lambda _: sys.exit(143))[0] == 143


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "http:// is a dashboard; submit the job with"),
        ("ray://127.0.0.1:10001", "ray:// is Ray Client"),
        ("tcp://me:hush@host", "tcp:// is no address of Ray"),
        ("nonsense", "Invalid address format"),
        ("127.0.0.1:CLOSED", "no Ray answers at"),
        ("127.0.0.1:SILENT", "no Ray answers at"),
    ],
)
def test_an_address_without_ray_is_rejected_at_once(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(resources, "_CONNECT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ports = {"CLOSED": closed.getsockname()[1], "SILENT": silent.getsockname()[1]}
        for placeholder, port in ports.items():
            address = address.replace(placeholder, str(port))
        monkeypatch.setenv("RAY_ADDRESS", address)
        # On a machine with a single address, Ray resolves loopback to it; nothing listens there either.
        start_s = time.monotonic()
        with pytest.raises(ConfigError, match=message) as raised:
            resources.connect()
    assert time.monotonic() - start_s < 15
    assert "hush" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_stale_cluster_address_is_reported(monkeypatch: pytest.MonkeyPatch):
    """`ray start` writes its address to a file that outlives it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(resources.services, "canonicalize_bootstrap_address", lambda _: gone)
        with pytest.raises(ConfigError, match=r"no Ray answers at .*ray_current_cluster"):
            resources.connect()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_rejected_before_ray_starts(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    started: list[dict] = []
    monkeypatch.setattr(ray, "init", lambda **settings: started.append(settings))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv(variable, "/tmp/" + "é" * 20)
    with pytest.raises(ConfigError, match=r"TMPDIR: Ray's folder /tmp/é+/ray is too long.*RAY_TMPDIR=/tmp"):
        resources.connect()
    assert not started
    monkeypatch.setenv(variable, "/tmp/ok")
    resources.connect()
    assert started


def test_the_longest_accepted_folder_is_the_longest_that_can_be_bound(tmp_path: Path):
    """In the longest accepted folder, the name of Ray's longest socket is the longest that can be bound."""
    pid = str(os.getpid())
    most = local._MAX_SOCKET_BYTES - local._SESSION_BYTES - len(pid)
    local.check_temp_dir_length("x" * most, len(pid))
    with pytest.raises(ConfigError):
        local.check_temp_dir_length("x" * (most + 1), len(pid))
    below = f"/session_2025-01-31_23-59-59_123456_{pid}/sockets/dash_TaskEventsHead"
    for length, fits in ((most, True), (most + 1, False)):
        name = f"\0{'x' * (length - 1)}{below}"  # an abstract socket of the same length needs no folder
        with socket.socket(socket.AF_UNIX) as bound:
            if fits:
                bound.bind(name)
            else:
                with pytest.raises(OSError, match="too long"):
                    bound.bind(name + "x")


def run_job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "http://127.0.0.1:1"}
    job = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(job, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_prints_its_help_without_ray(name: str):
    completed = run_job(name, "--help")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert f"jobs/{name}" in completed.stdout
    assert "--debug" in completed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["evaluate.runs=[between]"], "nothing to evaluate"),
        (["name=mine", "optim.lrr=1"], "optim.lrr: no such field"),
        (["name=mine", "evaluate.runs=[a]"], "RAY_ADDRESS: http:// is a dashboard"),  # the last check before Ray starts
    ],
)
def test_an_evaluation_requires_something_to_evaluate(working_dir: Path, arguments: list[str], message: str):
    completed = run_job("evaluate.py", f"storage={working_dir}/runs", *arguments)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not (working_dir / "runs" / "demo").exists()


def test_a_run_is_evaluated_with_its_own_experiment(working_dir: Path):
    trained = load(ROOT / "tests" / "tiny.yaml", [f"storage={working_dir}", "name=mine", "train.epochs=7"])
    write_text(f"{working_dir}/mine/experiment.yaml", to_yaml(trained))
    overrides = ["name=mine", f"storage={working_dir}", "evaluate.samples=2"]
    experiment = workflows.experiment_of_run(load(DEMO, overrides), overrides)
    assert (experiment.clip, experiment.train.epochs, experiment.evaluate.samples) == (trained.clip, 7, 2)
    assert workflows.experiment_of_run(load(DEMO, ["name=new"]), ["name=new"]).clip == load(DEMO).clip


@pytest.mark.parametrize("library", ["ray", "mlflow", "optuna"])
def test_a_missing_library_is_named(run_cli, monkeypatch: pytest.MonkeyPatch, library: str):
    monkeypatch.setitem(sys.modules, library, None)  # as if it was not installed
    code, stderr = run_cli(lambda _: pytest.fail("the job started"))
    assert code == 2
    assert stderr == f"stub.py: needs {library}, which the core install lacks; pip install 'giffy_ray[train]'\n"


@pytest.mark.parametrize("name", ["train", "tune", "evaluate", "prepare"])
def test_a_command_of_giffy_runs_the_same_job(name: str, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(jobs, "run_job", lambda job, **options: calls.append((job, options)))
    monkeypatch.setattr(sys, "argv", ["giffy", name, "demo", "name=mine", "--resume", "never", "--debug"])
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert not exit_info.value.code
    runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    (job, options), (script_job, script_options) = calls
    assert job is script_job
    assert options == {"program": f"giffy {name}", "argv": ("demo", "name=mine", "--resume", "never", "--debug")}
    assert script_options == {}


def test_an_interrupt_during_the_start_prints_no_traceback(working_dir: Path):
    (working_dir / "slow.py").write_text(
        "import time\nfrom giffy_ray.cli.jobs import Job, run_job\nfrom giffy_ray.cluster import resources\n"
        "resources.connect = lambda: (print('started', flush=True), time.sleep(60))\n"
        "run_job(Job(print, '', needs_data=False))\n"
    )
    job = [sys.executable, "slow.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(job, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        stderr = process.stderr.read()
    assert process.returncode == 130
    assert stderr == "slow.py: interrupted\n"
