"""One process at a time trains a run."""

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
def in_bucket(bucket: str, tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(run_lock, "EXPIRES_S", 2.0)
    return override(experiment, {"storage": f"{bucket}/lease-{tmp_path.name}"})


def file_of(experiment: Experiment) -> Path:
    return Path(experiment.storage, "run", "lease.json")


def text_of(experiment: Experiment) -> str | None:
    return read_text(run_lock.location_of(experiment.run_dir))


def leave(experiment: Experiment, **other: Any) -> str:
    """A lease of this very process, but for what is other; returns its text."""
    text = json.dumps({"holder": "x", **run_lock._this_process(), **other, "renewed_s": 0})
    write_text(run_lock.location_of(experiment.run_dir), text)
    return text


def seconds_to_get(experiment: Experiment) -> float:
    began_s = time.monotonic()
    with run_lock.run_lock(experiment.run_dir):
        return time.monotonic() - began_s


# What another process does: one line of JSON for each that it is told on its standard input.
ANOTHER = """
import json, sys
from giffy_ray.core import run_lock as lease
from giffy_ray.config import Experiment, override
lease.EXPIRES_S, lease._RENEW_S, lease._SETTLE_S = json.loads(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    storage, name = json.loads(line)
    try:
        with lease.held(override(Experiment(), {"storage": storage, "name": name}).run_dir) as held:
            print(held.holder, flush=True)
            sys.stdin.readline()
        print("released", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


class Another:
    """A process that takes leases when it is told to."""

    def __init__(self, expires_s: float = 1.0, renew_s: float = 0.05, settle_s: float = 0.1):
        times = json.dumps([expires_s, renew_s, settle_s])
        self.process = subprocess.Popen(
            [sys.executable, "-c", ANOTHER, times], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.said() == "ready"

    def said(self) -> str:
        assert self.process.stdout
        while (line := self.process.stdout.readline().strip()).startswith("waiting up to"):
            pass
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def take(self, experiment: Experiment, name: str = "run") -> None:
        self.tell(json.dumps([experiment.storage, name]))

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@contextmanager
def others(number: int, **times: float) -> Iterator[list[Another]]:
    started: list[Another] = []
    try:
        started += [Another(**times) for _ in range(number)]
        yield started
    finally:
        for one in started:
            one.end()


def test_a_run_that_is_held_is_refused_and_one_that_was_left_is_not(experiment: Experiment):
    with run_lock.run_lock(experiment.run_dir):
        message = rf"name: the run 'run' is being trained by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=message), run_lock.run_lock(experiment.run_dir):
            pass
        assert file_of(experiment).exists()
    assert not file_of(experiment).exists()
    with run_lock.run_lock(experiment.run_dir):
        pass


def test_the_lease_of_a_process_of_this_machine_that_was_killed_is_free_at_once(experiment: Experiment):
    with others(1) as (other,):
        other.take(experiment)
        assert other.said()
        other.process.kill()
        while "Z" not in Path(f"/proc/{other.process.pid}/stat").read_text().rpartition(")")[2]:
            time.sleep(0.01)
        assert seconds_to_get(experiment) < run_lock.EXPIRES_S  # nobody has waited for it yet
        leave(experiment, pid=other.process.pid)
        other.end()
        assert seconds_to_get(experiment) < run_lock.EXPIRES_S


def test_a_process_that_has_the_number_of_the_holder_now_does_not_keep_its_lease(experiment: Experiment):
    leave(experiment, started_ticks=1)
    assert seconds_to_get(experiment) < run_lock.EXPIRES_S


@pytest.mark.parametrize(
    "other",
    [
        {"host": "another machine"},
        {"boot_id": "another machine of the same name"},
        {"pid_namespace": 1},  # another container of this machine, where numbers of processes are others
        {"boot_id": None},
        {"pid": "?"},
    ],
)
def test_what_cannot_be_looked_up_here_is_free_when_nobody_renews_it(
    other: dict, experiment: Experiment, capsys: pytest.CaptureFixture
):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    leave(experiment, **{"pid": ended.pid} | other)
    assert seconds_to_get(experiment) >= run_lock.EXPIRES_S
    assert "waiting up to 1 s to see whether 'run' is still being trained" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b"\0\0\0", b"\xff\xfe{", b"[" * 100_000], ids=range(5))
def test_a_lease_that_cannot_be_read_expires_as_any_other(content: bytes, experiment: Experiment):
    file_of(experiment).write_bytes(content)
    assert "has taken the run" in RunLockWatcher(experiment.run_dir, "x").look()
    assert seconds_to_get(experiment) >= run_lock.EXPIRES_S


def come_at_once(experiment: Experiment) -> list[str]:
    together, outcomes = threading.Barrier(4), []

    def come() -> None:
        together.wait()
        try:
            with run_lock.run_lock(experiment.run_dir):
                outcomes.append("held")
                time.sleep(1.5 * run_lock.EXPIRES_S)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_of_several_that_come_at_once_one_gets_it(experiment: Experiment):
    outcomes = come_at_once(experiment)
    assert outcomes.count("held") == 1
    assert sum("is being trained by" in outcome for outcome in outcomes) == 3


def test_of_several_that_come_at_once_to_a_bucket_one_gets_it(in_bucket: Experiment):
    outcomes = come_at_once(in_bucket)
    assert outcomes.count("held") == 1
    assert sum("is being trained by" in outcome for outcome in outcomes) == 3
    assert text_of(in_bucket) is None


@pytest.mark.parametrize("expired", [False, True], ids=["free", "expired"])
def test_of_processes_that_come_at_once_one_gets_it_each_time(expired: bool, experiment: Experiment):
    with others(3, expires_s=0.3, renew_s=0.02, settle_s=0.01) as processes:
        for number in range(6 if expired else 20):
            name = f"run-{number}"
            if expired:
                leave(override(experiment, {"name": name}), host="another machine")
            for process in processes:
                process.take(experiment, name)
            said = [process.said() for process in processes]
            (winner,) = (place for place, line in enumerate(said) if not line.startswith("ConfigError"))
            assert sum("is being trained by" in line for line in said) == 2, said
            processes[winner].tell("")
            assert processes[winner].said() == "released"


def test_a_holder_that_was_paused_leaves_the_new_ones_lease_alone_and_is_told(experiment: Experiment):
    with others(1) as (paused,):
        paused.take(experiment)
        assert paused.said()
        paused.process.send_signal(signal.SIGSTOP)
        with run_lock.run_lock(experiment.run_dir) as ours:
            paused.process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            paused.tell("")
            line = paused.said()
            assert line.startswith("LeaseLost: the lease of the run 'run' is lost"), line
            assert json.loads(text_of(experiment) or "")["holder"] == ours.holder
            assert not ours.lost


def test_a_holder_that_is_paused_while_it_writes_leaves_the_new_ones_lease_alone(
    experiment: Experiment, in_bucket: Experiment
):
    """The moment between looking whose lease it is and writing it again."""
    for each in (experiment, in_bucket):
        file = run_lock._file_at(run_lock.location_of(each.run_dir))
        leave(each)
        seen = file.read()
        theirs = leave(each, holder="y")
        for text, before in (("ours", seen), (None, seen), ("ours", run_lock._Seen(None))):
            with pytest.raises(run_lock._Changed):
                file.write(text, before)
        assert text_of(each) == theirs
        file.write("ours", file.read())
        assert text_of(each) == "ours"
        file.write(None, file.read())
        assert text_of(each) is None


def test_a_lease_in_a_bucket_is_renewed_and_taken_over(in_bucket: Experiment):
    with run_lock.run_lock(in_bucket.run_dir) as held:
        first = text_of(in_bucket)
        with pytest.raises(ConfigError, match="is being trained by process"), run_lock.run_lock(in_bucket.run_dir):
            pass
        assert text_of(in_bucket) != first
        assert not held.lost
    leave(in_bucket, host="another machine")
    assert seconds_to_get(in_bucket) >= run_lock.EXPIRES_S
    assert text_of(in_bucket) is None


def test_a_bucket_without_conditional_requests_is_compared_before_each_write(
    in_bucket: Experiment, monkeypatch: pytest.MonkeyPatch
):
    """As of servers that answer "A header you provided implies functionality that is not implemented"."""
    file: Any = run_lock._file_at(run_lock.location_of(in_bucket.run_dir))

    def without_conditions(method: Any) -> Any:
        def refuse(**request: Any) -> Any:
            if {"IfMatch", "IfNoneMatch"} & request.keys():
                raise ClientError({"Error": {"Code": "NotImplemented"}}, method.__name__)
            return method(**request)

        return refuse

    for name in ("put_object", "delete_object"):
        monkeypatch.setattr(file._client, name, without_conditions(getattr(file._client, name)))
    file.write("ours", file.read())
    seen = file.read()
    assert seen.text == "ours"
    leave(in_bucket)
    for text in ("ours again", None):
        with pytest.raises(run_lock._Changed):
            file.write(text, seen)
    file.write(None, file.read())
    assert text_of(in_bucket) is None


def test_a_storage_that_fails_for_a_moment_costs_nothing(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with run_lock.run_lock(experiment.run_dir) as held:
        for broken in ("read_text", "write_text"):
            before = text_of(experiment)
            with monkeypatch.context() as away:
                away.setattr(run_lock, broken, fail)
                time.sleep(0.4)
                assert text_of(experiment) == before
            time.sleep(0.4)
            assert text_of(experiment) != before
        assert not held.lost
    told = [record.message for record in caplog.records if "could not be renewed" in record.message]
    assert len(told) == 2 and "Input/output error" in told[0]
    assert not file_of(experiment).exists()


def fail(*_: object) -> None:
    raise OSError("Input/output error")


def test_a_lease_that_could_not_be_renewed_in_time_is_lost(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir) as held:
            monkeypatch.setattr(run_lock, "write_text", fail)
            time.sleep(0.5)
            assert not held.lost
            time.sleep(0.8)
            assert held.lost

    with pytest.raises(RunLockLost, match=r"'run' is lost .*could not be renewed for 1 s .*Input/output error"):
        hold()


def test_what_another_process_has_taken_stays_its_own(experiment: Experiment):
    def hold(seconds: float) -> None:
        with run_lock.run_lock(experiment.run_dir) as held:
            leave(experiment, holder="y", host="there", pid=7)
            time.sleep(seconds)
            assert held.lost or not seconds

    for seconds in (0.3, 0):  # without waiting it is seen at the end
        with pytest.raises(RunLockLost, match=r"lost .*: process 7 on there has taken the run"):
            hold(seconds)
        assert json.loads(text_of(experiment) or "")["holder"] == "y"
        file_of(experiment).unlink()


def test_an_error_inside_gives_it_back(experiment: Experiment):
    with pytest.raises(ZeroDivisionError), run_lock.run_lock(experiment.run_dir):
        raise ZeroDivisionError
    assert not file_of(experiment).exists()


@pytest.mark.parametrize("broken", ["deleted", "storage away"])
def test_what_goes_wrong_at_the_end_does_not_hide_the_error_inside(
    broken: str, experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir):
            if broken == "deleted":
                file_of(experiment).unlink()
            else:
                monkeypatch.setattr(run_lock, "read_text", fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        hold()
    if broken == "deleted":
        assert "its file was deleted" in raised.value.__notes__[0]
    else:
        assert "could not be deleted" in caplog.text


def test_no_thread_is_left(experiment: Experiment):
    def hold() -> None:
        with run_lock.run_lock(experiment.run_dir):
            assert threading.active_count() == before + 1
            raise SystemExit

    before = threading.active_count()
    with pytest.raises(SystemExit):
        hold()
    assert threading.active_count() == before


def test_a_worker_follows_the_lease_of_its_training(experiment: Experiment):
    with run_lock.run_lock(experiment.run_dir) as held:
        watch = RunLockWatcher(experiment.run_dir, held.holder)
        for _ in range(3):
            assert watch.look() == ""
            time.sleep(0.5)
        watch.check()
    # Outside: the holder looks too, and may be the first to find it.
    leave(experiment, holder="y", host="there", pid=7)
    assert "'run' is lost" in watch.look() and "process 7 on there" in watch.look()
    with pytest.raises(RunLockLost, match="process 7 on there"):
        watch.check()
    filesystem, path = filesystem_of(run_lock.location_of(experiment.run_dir))
    filesystem.delete_file(path)
    with pytest.raises(RunLockLost, match="its file was deleted"):
        watch.check()


def test_a_worker_notices_that_nobody_renews_the_lease_of_its_training(experiment: Experiment):
    leave(experiment)
    watch = RunLockWatcher(experiment.run_dir, "x")
    watch.check()
    time.sleep(0.5)
    watch.check()
    leave(experiment, pid=3)  # renewed
    time.sleep(0.7)
    watch.check()
    time.sleep(0.7)
    watch.check()  # nothing was looked at for long: it counts from what was seen
    time.sleep(1.1)
    with pytest.raises(RunLockLost, match="was not renewed for 1 s"):
        watch.check()


def test_whether_a_lease_may_be_held_is_told_at_once(experiment):
    location, now_s = run_lock.location_of(experiment.run_dir), time.time()
    assert not run_lock.is_live(location)
    with run_lock.run_lock(experiment.run_dir):
        assert run_lock.is_live(location)
    assert not run_lock.is_live(location)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for other, is_live in (
        ({"pid": ended.pid}, False),
        ({"host": "another", "renewed_s": now_s - 60}, True),
        ({"host": "another", "renewed_s": now_s + 300}, True),  # by its own clock
        ({"host": "another", "renewed_s": now_s - 2 * 3600}, False),
        ({"host": "another", "renewed_s": None}, True),
    ):
        write_text(location, json.dumps({"renewed_s": now_s, **run_lock._this_process(), **other}))
        assert run_lock.is_live(location) == is_live, other
