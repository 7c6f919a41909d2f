"""What a user types: tables of command lines, exit codes and messages. Jobs are stubs, and no Ray is started."""

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

from giffy_ray import cli
from giffy_ray.cluster import local, resources
from giffy_ray.config import ConfigError, Experiment, load, override, to_yaml
from giffy_ray.core.storage import write_text
from tests.conftest import ROOT

JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
DEMO = ROOT / "jobs" / "experiments" / "demo.yaml"
OWN_VIDEOS = str(DEMO.parent / "own-videos.yaml")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.yaml").write_text("name: a\n")
    (tmp_path / "a=b.yaml").write_text("name: ab\n")
    (tmp_path / "own.yaml").write_text("data:\n  root: ???\n")
    return tmp_path


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a job with these words; returns the exit code and what stderr got."""
    monkeypatch.setattr(resources, "connect", lambda: None)

    def type_in(job: Callable[[Experiment], None], *words: str, **settings) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/stub.py", *words])
        code = 0
        try:
            cli.run(job, "What it does.", DEMO, **settings)
        except SystemExit as ended:
            code = ended.code  # type: ignore[assignment]
        return code, capsys.readouterr().err

    return type_in


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "demo"),
        (["a.yaml"], "a"),
        (["a=b.yaml"], "ab"),
        (["a.yaml", "name=mine"], "mine"),
        (["name=mine", "a.yaml"], "mine"),
        (["--resume", "never", "name=mine", "--profile"], "mine"),
        (["--resume=must", "name=2024-01-02"], "2024-01-02"),
    ],
)
def test_the_job_gets_the_experiment(type_in, place: Path, words: list[str], name: str):
    got: list[Experiment] = []
    code, said = type_in(got.append, *words)
    assert (code, said) == (0, "")
    assert got[0].name == name
    assert got[0].storage == f"{place}/runs"
    assert got[0].search.resume == ("never" if "never" in words else "must" if "--resume=must" in words else "auto")
    assert got[0].speed.profile == ("--profile" in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foo"], "unrecognized arguments: --foo"),
        (["--resum", "never"], "unrecognized arguments: --resum"),
        (["--resume"], "--resume: expected one argument"),
        (["--resume", "soon"], "invalid choice: 'soon'"),
        (["a.yaml", "b.yaml"], "unexpected 'b.yaml': the experiment file is 'a.yaml'"),
        (["a.yaml", "train.epochs"], "unexpected 'train.epochs'"),
        ([""], "unexpected '': expected an experiment file"),
        (["", "name=mine"], "unexpected '': expected an experiment file"),
        (["b.yaml"], "b.yaml: no such experiment file"),
        (["."], ".: is a folder"),
        (["optim.lrr=1"], "optim.lrr: no such field (value 1); did you mean 'optim.lr'?"),
        (["data.root="], "data.root: is empty"),
        (["data.root=nowhere"], "data.root: no such folder or list (.csv, .parquet) of videos (value 'nowhere')"),
        (["own.yaml"], "data.root: this experiment needs a value of your own; give data.root=/path/to/videos"),
        ([OWN_VIDEOS], "data.root: this experiment needs a value of your own; give data.root=/path/to/videos"),
        (["storage=file"], "storage: cannot be written: it is no folder"),
        (["storage=file/runs"], "storage: cannot be written: Not a directory"),
        (["storage=/proc/runs"], "storage: cannot be written: No such file or directory (value '/proc/runs')"),
        (["storage=https://host/x"], "storage: https:// is not supported"),
        (["storage=s3://key:hush@bucket/x"], "storage: the address appears in logs"),
        (["tracking.uri=127.0.0.1:5000"], "give http://127.0.0.1:5000"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(type_in, words: list[str], message: str):
    def never(_: Experiment) -> None:
        raise AssertionError("the job was begun")

    code, said = type_in(never, *words)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert "hush" not in said
    (line,) = [line for line in said.splitlines() if not line.startswith(("usage: ", " "))]
    assert line.startswith("stub.py: ")


@pytest.mark.parametrize(("words", "given"), [([], set()), (["--dry-run", "a.yaml", "--prune"], {"prune", "dry_run"})])
def test_a_job_gets_its_own_options_by_name(type_in, words: list[str], given: set[str]):
    got = {}
    flags = {"prune": "remove", "dry_run": "list"}
    assert type_in(lambda experiment, **named: got.update(named), *words, flags=flags) == (0, "")
    assert got == {name: name in given for name in flags}


def test_an_option_of_another_job_is_refused(type_in):
    code, err = type_in(lambda experiment: None, "--prune")
    assert code == 2 and "unrecognized arguments: --prune" in err


def test_a_dry_run_is_one_of_pruning():
    with pytest.raises(ConfigError, match="give --prune --dry-run"):
        runpy.run_path(str(ROOT / "jobs" / "prepare.py"))["main"](Experiment(), dry_run=True)


def test_pruning_prints_what_it_removes(place: Path, capsys: pytest.CaptureFixture[str]):
    folder = place / "runs" / "stores" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text('{"version": 2}')
    main = runpy.run_path(str(ROOT / "jobs" / "prepare.py"))["main"]
    experiment = override(Experiment(), {"storage": str(place / "runs")})
    printed = []
    for dry_run in (True, False):
        main(experiment, prune=True, dry_run=dry_run)
        printed.append(" ".join(capsys.readouterr().out.split()))
        assert folder.exists() == dry_run
    assert "would be removed from" in printed[0] and "removing from" in printed[1]
    for text in printed:
        assert re.search(r"store 0123456789abcdef │ 1 │ 14 │ version 2 of decoding; it is 3 now", text)


def test_a_job_without_data_needs_no_root(type_in):
    assert type_in(lambda _: None, "own.yaml", needs_data=False) == (0, "")


def failed_training() -> Exception:
    """As Ray Train raises it: of two workers one found a mistake, wrapped twice."""
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    inner = ValueError("a loss is\n  not finite")
    return WorkerGroupError("[Rank 1]\nTraceback ...", {1: UserExceptionWithTraceback(inner, "Traceback ...\nmore")})


def failed_task(error: Exception) -> Exception:
    return RayTaskError("decode", "Traceback ...\nmore", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(13, "Permission denied", "/x"), 1, "PermissionError: [Errno 13] Permission denied: '/x'"),
        (RuntimeError("a\n\n  b"), 1, "RuntimeError: a b (test_command.py:"),
        (ZeroDivisionError("division"), 1, "ZeroDivisionError: division (test_command.py:"),
        (OSError("no s3://key:hush@bucket"), 1, "OSError: no s3://***@bucket"),
        (failed_training(), 1, "ValueError: a loss is not finite"),
        (failed_task(KeyError("x")), 1, "KeyError: 'x'"),
        (failed_task(ConfigError("optim.lr: is wrong")), 2, "stub.py: optim.lr: is wrong"),
        (TrainingFailedError("Training failed"), 1, "TrainingFailedError: Training failed"),
        (KeyboardInterrupt(), 130, "stub.py: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_its_traceback_is_kept(
    type_in, monkeypatch: pytest.MonkeyPatch, place: Path, error: BaseException, code: int, message: str
):
    monkeypatch.setattr("tempfile.tempdir", str(place))

    def fail(_: Experiment) -> None:
        raise error

    ended, said = type_in(fail)
    assert ended == code
    assert message in said
    assert "Traceback" not in said
    kept = list(place.glob("giffy_ray-stub-*.log"))
    assert len(kept) == (code == 1)
    for path in kept:
        assert f"the traceback is in {path}" in said
        text = path.read_text()
        assert text.startswith("Traceback")
        assert "in fail" in text
        assert "hush" not in text
        assert path.stat().st_mode & 0o077 == 0
    if code != 130:
        assert "in fail" in type_in(fail, "--debug")[1]


def test_a_code_that_the_job_ends_with_is_its_own(type_in):
    assert type_in(lambda _: sys.exit(143))[0] == 143


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
def test_an_address_without_a_ray_is_refused_at_once(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(resources, "_ANSWER_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ports = {"CLOSED": closed.getsockname()[1], "SILENT": silent.getsockname()[1]}
        for word, port in ports.items():
            address = address.replace(word, str(port))
        monkeypatch.setenv("RAY_ADDRESS", address)
        # On a machine with one address, Ray resolves loopback to it, where nobody listens either.
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=message) as raised:
            resources.connect()
    assert time.monotonic() - began_s < 15
    assert "hush" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cluster_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch):
    """`ray start` leaves its address in a file, which outlives it."""
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
def test_a_folder_too_long_for_sockets_is_told_before_ray_starts(variable: str, monkeypatch: pytest.MonkeyPatch):
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


def test_the_longest_folder_is_the_one_that_the_system_takes(tmp_path: Path):
    """The name of Ray's longest socket in the longest folder that is accepted is the longest that can be bound."""
    pid = str(os.getpid())
    most = local._LONGEST_SOCKET_BYTES - local._SESSION_BYTES - len(pid)
    local.refuse_long_folder("x" * most, len(pid))
    with pytest.raises(ConfigError):
        local.refuse_long_folder("x" * (most + 1), len(pid))
    below = f"/session_2025-01-31_23-59-59_123456_{pid}/sockets/dash_TaskEventsHead"
    for length, fits in ((most, True), (most + 1, False)):
        name = f"\0{'x' * (length - 1)}{below}"  # abstract: of the same length, without a folder
        with socket.socket(socket.AF_UNIX) as bound:
            if fits:
                bound.bind(name)
            else:
                with pytest.raises(OSError, match="too long"):
                    bound.bind(name + "x")


def run_job(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "http://127.0.0.1:1"}
    job = [sys.executable, str(ROOT / "jobs" / name), *words]
    return subprocess.run(job, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_says_what_it_does_without_ray(name: str):
    done = run_job(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"jobs/{name}" in done.stdout
    assert "--debug" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to evaluate"),
        (["evaluate.runs=[published/between]"], "say what to evaluate"),
        (["name=mine", "optim.lrr=1"], "optim.lrr: no such field"),
        (["name=mine", "evaluate.runs=[a]"], "RAY_ADDRESS: http:// is a dashboard"),  # all else was right
    ],
)
def test_an_evaluation_is_told_what_to_evaluate(place: Path, words: list[str], message: str):
    done = run_job("evaluate.py", f"storage={place}/runs", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "runs" / "demo").exists()


def test_a_run_is_evaluated_as_it_was_trained(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    import evaluate

    trained = load(ROOT / "tests" / "tiny.yaml", [f"storage={place}", "name=mine", "train.epochs=7"])
    write_text(f"{place}/mine/experiment.yaml", to_yaml(trained))
    words = ["name=mine", f"storage={place}", "evaluate.samples=2"]
    got = evaluate.without_file(load(DEMO, words), words)
    assert (got.clip, got.train.epochs, got.evaluate.samples) == (trained.clip, 7, 2)
    assert evaluate.without_file(load(DEMO, ["name=new"]), ["name=new"]).clip == load(DEMO).clip


def test_an_interrupt_while_a_job_starts_shows_no_traceback(place: Path):
    (place / "slow.py").write_text(
        "import time\nfrom giffy_ray import cluster, command\n"
        "cluster.connect = lambda: (print('begun', flush=True), time.sleep(60))\n"
        f"command.run(print, None, {str(DEMO)!r}, needs_data=False)\n"
    )
    job = [sys.executable, "slow.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(job, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "slow.py: interrupted\n"
