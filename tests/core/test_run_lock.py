"""The run lock: only one process at a time holds it, however processes are paused, killed or cut off."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from giffy_ray.config import ConfigError, Experiment, override
from giffy_ray.core import run_lock
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import filesystem_of, read_text, write_text


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(run_lock, "EXPIRES_S", 1.0)
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.05)
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.1)
    (tmp_path / "run").mkdir()
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


@pytest.fixture
def bucket_experiment(
    bucket: str, tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> Experiment:
    monkeypatch.setattr(run_lock, "EXPIRES_S", 2.0)
    return override(experiment, {"storage": f"{bucket}/lease-{tmp_path.name}"})


def lease_file(experiment: Experiment) -> Path:
    return Path(experiment.storage, "run", "lease.json")


def read_lease(experiment: Experiment) -> str | None:
    return read_text(run_lock.lock_path(experiment.run_dir))


def write_lease(experiment: Experiment, **fields: Any) -> str:
    """Writes a lease of this process with some fields changed, and returns its text."""
    text = json.dumps({"holder": "x", **run_lock._describe_this_process(), **fields, "renewed_s": 0})
    write_text(run_lock.lock_path(experiment.run_dir), text)
    return text


def measure_acquire_s(experiment: Experiment) -> float:
    began_s = time.monotonic()
    with run_lock.run_lock(experiment.run_dir):
        return time.monotonic() - began_s


# Acquires and releases locks as told on its standard input: one line of JSON to acquire, an empty line to release.
HOLDER_SCRIPT = """
import json, sys
from giffy_ray.config import Experiment, override
from giffy_ray.core import run_lock
run_lock.EXPIRES_S, run_lock._RENEW_S, run_lock._SETTLE_S = json.loads(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    storage, name = json.loads(line)
    try:
        with run_lock.run_lock(override(Experiment(), {"storage": storage, "name": name}).run_dir) as lock:
            print(lock.holder, flush=True)
            sys.stdin.readline()
        print("released", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


class LockProcess:
    """A separate process that acquires and releases run locks on request."""

    def __init__(self, expires_s: float = 1.0, renew_s: float = 0.05, settle_s: float = 0.1):
        times = json.dumps([expires_s, renew_s, settle_s])
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER_SCRIPT, times], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read_line() == "ready"

    def read_line(self) -> str:
        assert self.process.stdout
        while (line := self.process.stdout.readline().strip()).startswith("waiting up to"):
            pass
        return line

    def write_line(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def acquire(self, experiment: Experiment, name: str = "run") -> None:
        self.write_line(json.dumps([experiment.storage, name]))

    def release(self) -> None:
        self.write_line("")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@contextmanager
def lock_processes(count: int, **times: float) -> Iterator[list[LockProcess]]:
    processes: list[LockProcess] = []
    try:
        processes += [LockProcess(**times) for _ in range(count)]
        yield processes
    finally:
        for process in processes:
            process.kill()


def test_lock_excludes_others_until_it_is_released(experiment: Experiment):
    with run_lock.run_lock(experiment.run_dir):
        message = rf"name: the run 'run' is being trained by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=message), run_lock.run_lock(experiment.run_dir):
            pass
        assert lease_file(experiment).exists()
    assert not lease_file(experiment).exists()
    with run_lock.run_lock(experiment.run_dir):
        pass


def test_lease_of_a_killed_process_of_this_machine_is_free_at_once(experiment: Experiment):
    with lock_processes(1) as (killed,):
        killed.acquire(experiment)
        assert killed.read_line()
        killed.process.kill()
        while "Z" not in Path(f"/proc/{killed.process.pid}/stat").read_text().rpartition(")")[2]:
            time.sleep(0.01)
        assert measure_acquire_s(experiment) < run_lock.EXPIRES_S  # nobody has reaped the process yet
        write_lease(experiment, pid=killed.process.pid)
        killed.kill()
        assert measure_acquire_s(experiment) < run_lock.EXPIRES_S


def test_reused_process_id_does_not_keep_a_lease(experiment: Experiment):
    write_lease(experiment, started_ticks=1)
    assert measure_acquire_s(experiment) < run_lock.EXPIRES_S


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "another machine"},
        {"boot_id": "another machine of the same name"},
        {"pid_namespace": 1},  # another container of this machine, with other process ids
        {"boot_id": None},
        {"pid": "?"},
    ],
)
def test_lease_of_an_unknown_process_is_free_if_nobody_renews_it(
    fields: dict, experiment: Experiment, capsys: pytest.CaptureFixture
):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    write_lease(experiment, **{"pid": ended.pid} | fields)
    assert measure_acquire_s(experiment) >= run_lock.EXPIRES_S
    assert "waiting up to 1 s to see whether 'run' is still being trained" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b"\0\0\0", b"\xff\xfe{", b"[" * 100_000], ids=range(5))
def test_invalid_lease_expires_like_any_other(content: bytes, experiment: Experiment):
    lease_file(experiment).write_bytes(content)
    assert "has taken over the run" in RunLockWatcher(experiment.run_dir, "x").poll()
    assert measure_acquire_s(experiment) >= run_lock.EXPIRES_S


def acquire_concurrently(experiment: Experiment) -> list[str]:
    """Acquires the lock in four threads at once. Returns "acquired" or the error message of each."""
    barrier = threading.Barrier(4)
    outcomes = []

    def acquire() -> None:
        barrier.wait()
        try:
            with run_lock.run_lock(experiment.run_dir):
                outcomes.append("acquired")
                time.sleep(1.5 * run_lock.EXPIRES_S)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=acquire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_only_one_of_several_threads_acquires_the_lock(experiment: Experiment):
    outcomes = acquire_concurrently(experiment)
    assert outcomes.count("acquired") == 1
    assert sum("is being trained by" in outcome for outcome in outcomes) == 3


def test_only_one_of_several_threads_acquires_the_lock_in_a_bucket(bucket_experiment: Experiment):
    outcomes = acquire_concurrently(bucket_experiment)
    assert outcomes.count("acquired") == 1
    assert sum("is being trained by" in outcome for outcome in outcomes) == 3
    assert read_lease(bucket_experiment) is None


@pytest.mark.parametrize("expired", [False, True], ids=["free", "expired"])
def test_only_one_of_several_processes_acquires_the_lock_each_time(expired: bool, experiment: Experiment):
    with lock_processes(3, expires_s=0.3, renew_s=0.02, settle_s=0.01) as processes:
        for number in range(6 if expired else 20):
            name = f"run-{number}"
            if expired:
                write_lease(override(experiment, {"name": name}), host="another machine")
            for process in processes:
                process.acquire(experiment, name)
            lines = [process.read_line() for process in processes]
            (winner,) = (index for index, line in enumerate(lines) if not line.startswith("ConfigError"))
            assert sum("is being trained by" in line for line in lines) == 2, lines
            processes[winner].release()
            assert processes[winner].read_line() == "released"


def test_paused_holder_keeps_the_new_lease_and_learns_of_its_loss(experiment: Experiment):
    with lock_processes(1) as (paused,):
        paused.acquire(experiment)
        assert paused.read_line()
        paused.process.send_signal(signal.SIGSTOP)
        with run_lock.run_lock(experiment.run_dir) as lock:
            paused.process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            paused.release()
            line = paused.read_line()
            assert line.startswith("RunLockLost: the lock of the run 'run' is lost"), line
            assert json.loads(read_lease(experiment) or "")["holder"] == lock.holder
            assert not lock.lost_reason


def test_write_after_a_concurrent_change_is_rejected(experiment: Experiment, bucket_experiment: Experiment):
    """A holder may be paused between reading the lease and writing it again."""
    for run in (experiment, bucket_experiment):
        file = run_lock._open_lock_file(run_lock.lock_path(run.run_dir))
        write_lease(run)
        outdated = file.read()
        new_lease = write_lease(run, holder="y")
        for text, expected in (("ours", outdated), (None, outdated), ("ours", run_lock._FileVersion(None))):
            with pytest.raises(run_lock._WriteConflict):
                file.write(text, expected)
        assert read_lease(run) == new_lease
        file.write("ours", file.read())
        assert read_lease(run) == "ours"
        file.write(None, file.read())
        assert read_lease(run) is None


def test_lease_in_a_bucket_is_renewed_and_taken_over(bucket_experiment: Experiment):
    with run_lock.run_lock(bucket_experiment.run_dir) as lock:
        first = read_lease(bucket_experiment)
        with (
            pytest.raises(ConfigError, match="is being trained by process"),
            run_lock.run_lock(bucket_experiment.run_dir),
        ):
            pass
        assert read_lease(bucket_experiment) != first
        assert not lock.lost_reason
    write_lease(bucket_experiment, host="another machine")
    assert measure_acquire_s(bucket_experiment) >= run_lock.EXPIRES_S
    assert read_lease(bucket_experiment) is None


def test_bucket_without_conditional_requests_is_compared_before_each_write(
    bucket_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    """Some servers answer "A header you provided implies functionality that is not implemented"."""
    file: Any = run_lock._open_lock_file(run_lock.lock_path(bucket_experiment.run_dir))

    def without_conditions(method: Any) -> Any:
        def reject_conditions(**request: Any) -> Any:
            if {"IfMatch", "IfNoneMatch"} & request.keys():
                raise ClientError({"Error": {"Code": "NotImplemented"}}, method.__name__)
            return method(**request)

        return reject_conditions

    for name in ("put_object", "delete_object"):
        monkeypatch.setattr(file._client, name, without_conditions(getattr(file._client, name)))
    file.write("ours", file.read())
    outdated = file.read()
    assert outdated.text == "ours"
    write_lease(bucket_experiment)
    for text in ("ours again", None):
        with pytest.raises(run_lock._WriteConflict):
            file.write(text, outdated)
    file.write(None, file.read())
    assert read_lease(bucket_experiment) is None


def test_short_storage_failure_does_not_lose_the_lock(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with run_lock.run_lock(experiment.run_dir) as lock:
        for broken in ("read_text", "write_text"):
            before = read_lease(experiment)
            with monkeypatch.context() as patch:
                patch.setattr(run_lock, broken, fail)
                time.sleep(0.4)
                assert read_lease(experiment) == before
            time.sleep(0.4)
            assert read_lease(experiment) != before
        assert not lock.lost_reason
    warnings = [record.message for record in caplog.records if "could not be renewed" in record.message]
    assert len(warnings) == 2 and "Input/output error" in warnings[0]
    assert not lease_file(experiment).exists()


def fail(*_: object) -> None:
    raise OSError("Input/output error")


def test_lock_is_lost_if_it_cannot_be_renewed_in_time(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir) as lock:
            monkeypatch.setattr(run_lock, "write_text", fail)
            time.sleep(0.5)
            assert not lock.lost_reason
            time.sleep(0.8)
            assert lock.lost_reason

    with pytest.raises(RunLockLost, match=r"'run' is lost .*could not be renewed for 1 s .*Input/output error"):
        hold()


def test_lease_taken_over_by_another_process_stays_its_own(experiment: Experiment):
    def hold(seconds: float) -> None:
        with run_lock.run_lock(experiment.run_dir) as lock:
            write_lease(experiment, holder="y", host="there", pid=7)
            time.sleep(seconds)
            assert lock.lost_reason or not seconds

    for seconds in (0.3, 0):  # without waiting, the loss is found at release
        with pytest.raises(RunLockLost, match=r"lost .*: process 7 on there has taken over the run"):
            hold(seconds)
        assert json.loads(read_lease(experiment) or "")["holder"] == "y"
        lease_file(experiment).unlink()


def test_error_inside_the_block_releases_the_lock(experiment: Experiment):
    with pytest.raises(ZeroDivisionError), run_lock.run_lock(experiment.run_dir):
        raise ZeroDivisionError
    assert not lease_file(experiment).exists()


@pytest.mark.parametrize("broken", ["deleted", "storage unavailable"])
def test_error_on_release_does_not_hide_the_error_inside_the_block(
    broken: str, experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir):
            if broken == "deleted":
                lease_file(experiment).unlink()
            else:
                monkeypatch.setattr(run_lock, "read_text", fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        hold()
    if broken == "deleted":
        assert "its file was deleted" in raised.value.__notes__[0]
    else:
        assert "could not be deleted" in caplog.text


def test_no_thread_is_left_running(experiment: Experiment):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir):
            assert threading.active_count() == before + 1
            raise SystemExit

    before = threading.active_count()
    with pytest.raises(SystemExit):
        hold()
    assert threading.active_count() == before


def test_watcher_reports_why_the_lock_is_lost(experiment: Experiment):
    with run_lock.run_lock(experiment.run_dir) as lock:
        watcher = RunLockWatcher(experiment.run_dir, lock.holder)
        for _ in range(3):
            assert watcher.poll() == ""
            time.sleep(0.5)
        watcher.check()
    # Outside the block, where the holder cannot find the loss first.
    write_lease(experiment, holder="y", host="there", pid=7)
    assert "'run' is lost" in watcher.poll() and "process 7 on there" in watcher.poll()
    with pytest.raises(RunLockLost, match="process 7 on there"):
        watcher.check()
    filesystem, path = filesystem_of(run_lock.lock_path(experiment.run_dir))
    filesystem.delete_file(path)
    with pytest.raises(RunLockLost, match="its file was deleted"):
        watcher.check()


def test_watcher_reports_that_nobody_renews_the_lock(experiment: Experiment):
    write_lease(experiment)
    watcher = RunLockWatcher(experiment.run_dir, "x")
    watcher.check()
    time.sleep(0.5)
    watcher.check()
    write_lease(experiment, pid=3)  # renewed
    time.sleep(0.7)
    watcher.check()
    time.sleep(0.7)
    watcher.check()  # without polls in between, the time counts from the last change seen
    time.sleep(1.1)
    with pytest.raises(RunLockLost, match="was not renewed for 1 s"):
        watcher.check()


def test_is_live_answers_without_waiting(experiment):
    path, now_s = run_lock.lock_path(experiment.run_dir), time.time()
    assert not run_lock.is_live(path)
    with run_lock.run_lock(experiment.run_dir):
        assert run_lock.is_live(path)
    assert not run_lock.is_live(path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for fields, is_live in (
        ({"pid": ended.pid}, False),
        ({"host": "another", "renewed_s": now_s - 60}, True),
        ({"host": "another", "renewed_s": now_s + 300}, True),  # by the clock of its machine
        ({"host": "another", "renewed_s": now_s - 2 * 3600}, False),
        ({"host": "another", "renewed_s": None}, True),
    ):
        write_text(path, json.dumps({"renewed_s": now_s, **run_lock._describe_this_process(), **fields}))
        assert run_lock.is_live(path) == is_live, fields
