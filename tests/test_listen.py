"""What a running training hears."""

import time
from pathlib import Path

import pytest
import torch

from giffy_ray import listen, restarts
from giffy_ray.config import Experiment, override
from giffy_ray.listen import Listener, ask_to_stop, forget_stop


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(listen, "_LOOK_S", 0.02)
    monkeypatch.setattr(listen, "_ASK_S", 0.04)
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
    listener = Listener(experiment, 0, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert listener.heard() == (False, False)
    ask_to_stop(experiment)
    assert until(lambda: listener.heard()[0])
    listener.end()
    forget_stop(experiment)
    forget_stop(experiment)  # which is not there
    another = Listener(experiment, 0, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert another.heard() == (False, False)
    another.end()


def test_a_notice_is_told_once(experiment: Experiment):
    notices = [None]
    listener = Listener(experiment, 0, torch.device("cpu"), lambda: notices[0])
    for notice in ("node a goes away", "node b goes away"):
        notices[0] = notice  # type: ignore[call-overload]
        assert until(lambda: listener.heard()[1])
        assert not any(listener.heard()[1] for _ in range(20) if not time.sleep(0.01))
    listener.end()


def test_a_request_of_the_controller_is_reported_once(experiment: Experiment):
    listener = Listener(experiment, 0, torch.device("cpu"), nothing)
    for _ in range(2):
        assert listener.heard() == (False, False)
        restarts.ask_for_checkpoint()
        assert listener.heard() == (False, True)
        assert not any(listener.heard()[1] for _ in range(3))
    listener.end()


def test_other_ranks_do_not_look(experiment: Experiment):
    ask_to_stop(experiment)
    listener = Listener(experiment, 1, torch.device("cpu"), nothing)
    time.sleep(0.1)
    assert listener.heard() == (False, False)
