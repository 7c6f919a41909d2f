"""What a running training hears."""

import threading
import time
from pathlib import Path

import pytest
import torch

from giffy_ray.config import Experiment, override
from giffy_ray.core import run_lock
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import write_text
from giffy_ray.training import preemption, restarts
from giffy_ray.training.preemption import PreemptionMonitor, clear_stop_request, request_stop


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(preemption, "_LOOK_S", 0.02)
    monkeypatch.setattr(preemption, "_ASK_S", 0.04)
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


def until(heard) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if heard():
            return True
        time.sleep(0.01)
    return False


def nothing() -> None: ...


def test_a_file_in_its_folder_stops_a_run(experiment: Experiment):
    listener = PreemptionMonitor(experiment, 0, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert listener.poll() == (False, False)
    request_stop(experiment)
    assert until(lambda: listener.poll()[0])
    listener.end()
    clear_stop_request(experiment)
    clear_stop_request(experiment)  # which is not there
    another = PreemptionMonitor(experiment, 0, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert another.poll() == (False, False)
    another.end()


def test_a_stop_file_may_hold_anything(experiment: Experiment, tmp_path: Path):
    """Such as the byte order mark of UTF-16, which some shells write."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").write_bytes("\r\n".encode("utf-16"))
    with PreemptionMonitor(experiment, 0, torch.device("cpu"), nothing) as listener:
        assert until(lambda: listener.poll()[0])
    clear_stop_request(experiment)
    assert not (tmp_path / "run" / "stop").exists()


def test_a_notice_is_told_once(experiment: Experiment):
    notices = [None]
    listener = PreemptionMonitor(experiment, 0, torch.device("cpu"), lambda: notices[0])
    for notice in ("node a goes away", "node b goes away"):
        notices[0] = notice  # type: ignore[call-overload]
        assert until(lambda: listener.poll()[1])
        assert not any(listener.poll()[1] for _ in range(20) if not time.sleep(0.01))
    listener.end()


def test_a_request_of_the_controller_is_reported_once(experiment: Experiment):
    listener = PreemptionMonitor(experiment, 0, torch.device("cpu"), nothing)
    for _ in range(2):
        assert listener.poll() == (False, False)
        restarts.ask_for_checkpoint()
        assert listener.poll() == (False, True)
        assert not any(listener.poll()[1] for _ in range(3))
    listener.end()


def test_other_ranks_do_not_look(experiment: Experiment):
    request_stop(experiment)
    listener = PreemptionMonitor(experiment, 1, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert listener.poll() == (False, False)


def alive() -> int:
    return sum(thread.name == "listener" for thread in threading.enumerate())


def test_a_storage_that_fails_for_a_moment_does_not_make_it_deaf(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(location: str) -> None:
        raise OSError("Input/output error")

    notices = [None]
    with PreemptionMonitor(experiment, 0, torch.device("cpu"), lambda: notices[0]) as listener:
        with monkeypatch.context() as away:
            away.setattr(preemption, "is_file", fail)
            time.sleep(0.2)  # ten looks
            notices[0] = "node a goes away"  # type: ignore[call-overload]
            assert until(lambda: listener.poll()[1])  # Ray is asked all the same
        request_stop(experiment)
        assert until(lambda: listener.poll()[0])
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "Input/output error" in told[0] and "can be read again" in told[1]


@pytest.mark.parametrize("error", [SystemExit, ValueError, KeyboardInterrupt])
def test_its_thread_ends_however_the_block_is_left(error: type[BaseException], experiment: Experiment):
    def leave() -> None:
        with PreemptionMonitor(experiment, 0, torch.device("cpu"), nothing) as listener:
            listener._any_of_each._asked = "a question that nobody answers"  # type: ignore[assignment]
            assert alive() == 1
            raise error

    with pytest.raises(error):
        leave()
    assert alive() == 0


def test_a_training_whose_lease_is_lost_ends(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    location = run_lock.location_of(experiment.run_dir)
    write_text(location, '{"holder": "we"}')
    with PreemptionMonitor(
        experiment, 0, torch.device("cpu"), nothing, RunLockWatcher(experiment.run_dir, "we")
    ) as listener:
        time.sleep(0.2)
        assert listener.poll() == (False, False)
        write_text(location, '{"holder": "they", "pid": 7, "host": "there"}')
        with pytest.raises(RunLockLost, match=r"'run' is lost .*process 7 on there"):
            until(lambda: listener.poll()[0])
