"""One process at a time trains a run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from giffy_ray import lease
from giffy_ray.config import ConfigError, Experiment, override


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    monkeypatch.setattr(lease, "_RENEW_S", 0.05)
    monkeypatch.setattr(lease, "_SETTLE_S", 0.1)
    (tmp_path / "run").mkdir()
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


def file_of(experiment: Experiment) -> Path:
    return Path(experiment.storage, "run", "lease.json")


def leave(experiment: Experiment, host: str, pid: int) -> None:
    file_of(experiment).write_text(json.dumps({"holder": "x", "host": host, "pid": pid, "renewed_s": 0}))


def test_a_run_that_is_held_is_refused_and_one_that_was_left_is_not(experiment: Experiment):
    with lease.held(experiment):
        message = rf"name: the run 'run' is being trained by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=message), lease.held(experiment):
            pass
        assert file_of(experiment).exists()
    assert not file_of(experiment).exists()
    with lease.held(experiment):
        pass


def test_the_lease_of_a_process_of_this_machine_that_has_ended_is_free_at_once(experiment: Experiment):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    leave(experiment, socket.gethostname(), ended.pid)
    began_s = time.monotonic()
    with lease.held(experiment):
        assert time.monotonic() - began_s < lease.EXPIRES_S


def test_the_lease_of_another_machine_is_free_when_nobody_renews_it(
    experiment: Experiment, capsys: pytest.CaptureFixture
):
    leave(experiment, "another machine", os.getpid())
    began_s = time.monotonic()
    with lease.held(experiment):
        assert time.monotonic() - began_s >= lease.EXPIRES_S
    assert "waiting up to 1 s to see whether 'run' is still being trained" in capsys.readouterr().out


def test_of_several_that_come_at_once_one_gets_it(experiment: Experiment):
    together, outcomes = threading.Barrier(4), []

    def come() -> None:
        together.wait()
        try:
            with lease.held(experiment):
                outcomes.append("held")
                time.sleep(1.5)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("held") == 1
    assert sum("is being trained by" in outcome for outcome in outcomes) == 3


def test_an_error_inside_gives_it_back(experiment: Experiment):
    with pytest.raises(ZeroDivisionError), lease.held(experiment):
        raise ZeroDivisionError
    assert not file_of(experiment).exists()
