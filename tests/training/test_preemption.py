"""Stop requests, preemption notices and a lost run lock reach the training at the right step."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from giffy_ray.config import Experiment, override
from giffy_ray.core import run_lock
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import write_text
from giffy_ray.training import planned_restarts, preemption
from giffy_ray.training.preemption import PreemptionMonitor, clear_stop_request, request_stop

CPU = torch.device("cpu")


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(preemption, "_STOP_POLL_S", 0.02)
    monkeypatch.setattr(preemption, "_PREEMPTION_POLL_S", 0.04)
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.01)
    return False


def no_preemption() -> None: ...


def start_monitor(experiment: Experiment, rank: int = 0) -> PreemptionMonitor:
    return PreemptionMonitor(experiment, rank, CPU, no_preemption)


def test_stop_file_in_the_run_folder_stops_the_run(experiment: Experiment):
    monitor = start_monitor(experiment)
    time.sleep(0.1)
    assert monitor.poll() == (False, False)
    request_stop(experiment)
    assert wait_until(lambda: monitor.poll()[0])
    monitor.close()
    clear_stop_request(experiment)
    clear_stop_request(experiment)  # a missing file is no error
    next_monitor = start_monitor(experiment)
    time.sleep(0.1)
    assert next_monitor.poll() == (False, False)
    next_monitor.close()


def test_stop_file_may_have_any_content(experiment: Experiment, tmp_path: Path):
    """For example the byte order mark of UTF-16, which some shells write."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").write_bytes("\r\n".encode("utf-16"))
    with start_monitor(experiment) as monitor:
        assert wait_until(lambda: monitor.poll()[0])
    clear_stop_request(experiment)
    assert not (tmp_path / "run" / "stop").exists()


def test_each_preemption_notice_is_reported_once(experiment: Experiment):
    notices: list[str | None] = [None]
    monitor = PreemptionMonitor(experiment, 0, CPU, lambda: notices[0])
    for notice in ("node a goes away", "node b goes away"):
        notices[0] = notice
        assert wait_until(lambda: monitor.poll()[1])
        assert not any(monitor.poll()[1] for _ in range(20) if not time.sleep(0.01))
    monitor.close()


def test_each_request_of_the_controller_is_reported_once(experiment: Experiment):
    monitor = start_monitor(experiment)
    for _ in range(2):
        assert monitor.poll() == (False, False)
        planned_restarts.request_checkpoint()
        assert monitor.poll() == (False, True)
        assert not any(monitor.poll()[1] for _ in range(3))
    monitor.close()


def test_other_ranks_do_not_poll_the_storage(experiment: Experiment):
    request_stop(experiment)
    monitor = start_monitor(experiment, rank=1)
    time.sleep(0.1)
    assert monitor.poll() == (False, False)


def count_monitor_threads() -> int:
    return sum(thread.name == "preemption-monitor" for thread in threading.enumerate())


def test_monitor_recovers_from_a_temporary_storage_failure(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(location: str) -> None:
        raise OSError("Input/output error")

    notices: list[str | None] = [None]
    with PreemptionMonitor(experiment, 0, CPU, lambda: notices[0]) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(preemption, "is_file", fail)
            time.sleep(0.2)  # ten polls
            notices[0] = "node a goes away"
            assert wait_until(lambda: monitor.poll()[1])  # Ray is still polled
        request_stop(experiment)
        assert wait_until(lambda: monitor.poll()[0])
    failed, recovered = [record.message for record in caplog.records]
    assert "Input/output error" in failed
    assert "is readable again" in recovered


@pytest.mark.parametrize("error", [SystemExit, ValueError, KeyboardInterrupt])
def test_thread_ends_however_the_block_exits(error: type[BaseException], experiment: Experiment):
    def exit_block() -> None:
        with start_monitor(experiment) as monitor:
            monitor._reduce_flags._pending = "an all-reduce that no other rank joins"  # type: ignore[assignment]
            assert count_monitor_threads() == 1
            raise error

    with pytest.raises(error):
        exit_block()
    assert count_monitor_threads() == 0


def test_lost_run_lock_ends_the_training(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    location = run_lock.lock_path(experiment.run_dir)
    write_text(location, '{"holder": "we"}')
    with PreemptionMonitor(experiment, 0, CPU, no_preemption, RunLockWatcher(experiment.run_dir, "we")) as monitor:
        time.sleep(0.2)
        assert monitor.poll() == (False, False)
        write_text(location, '{"holder": "they", "pid": 7, "host": "there"}')
        with pytest.raises(RunLockLost, match=r"'run' is lost .*process 7 on there"):
            wait_until(lambda: monitor.poll()[0])
