"""A search's memory: what it hands out, what it takes down, and that it outlives whoever searches."""

import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from giffy_ray.config import ConfigError, Experiment, load
from giffy_ray.tune.ledger import ENDED, Ledger, address

SPACE = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 4]}}"


def experiment(folder: Path, *words: str) -> Experiment:
    given = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.trials=4", "search.epochs=4"]
    return load(None, [*given, "search.grace_epochs=1", *words])


def ask(ledger: Ledger) -> int:
    asked = ledger.ask()
    assert asked
    return asked[0]


def run(ledger: Ledger, values: list[float]) -> bool:
    """A trial that reports these, one each epoch. Returns whether it was let to its end."""
    number = ask(ledger)
    for epoch, value in enumerate(values, start=1):
        if ledger.report(number, epoch, {"val/l2_report": value}):
            return False
    ledger.end(number)
    return True


def test_the_best_of_its_reports_is_what_a_trial_is_worth(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path, "search.asha=false"))
    for values in ([5, 3, 4], [9, 8, 7], [4, 2.5, 6], [3, 3, 3]):
        assert run(ledger, values)
    assert ledger.ask() is None
    assert "search.trials=4" in ledger.why_ended()
    assert [trial.value for trial in ledger.trials()] == [3, 7, 2.5, 3]
    assert [trial.number for trial in ledger.best()] == [2]


def test_poor_trials_are_ended_at_the_rungs_and_good_ones_are_not(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path))
    assert run(ledger, [4, 3, 2, 1])
    assert not run(ledger, [8, 8, 8, 8])
    assert run(ledger, [3, 2, 1, 0.5])
    states = [trial.state for trial in ledger.trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert list(ledger.trials()[1].intermediate_values) == [1]  # at the first rung, search.grace_epochs


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_trial_that_diverges_has_a_finite_result_that_says_so(tmp_path: Path, bad: float | None):
    ledger = Ledger(experiment(tmp_path))
    number = ask(ledger)
    assert not ledger.report(number, 1, {"val/l2_report": 5.0})
    assert ledger.report(number, 2, {} if bad is None else {"val/l2_report": bad})
    ledger.end(number)  # Ray Tune says it again
    (trial,) = ledger.trials()
    assert trial.state == TrialState.COMPLETE
    assert math.isfinite(trial.value or math.nan)
    assert "diverged: val/l2_report" in trial.user_attrs[ENDED]
    assert ledger.best() == []


def test_a_trial_that_reported_nothing_is_marked(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path))
    ledger.end(ask(ledger))
    ledger.end(ask(ledger), "its process died")
    assert [trial.user_attrs[ENDED] for trial in ledger.trials()] == ["it reported nothing", "its process died"]


def test_what_was_left_running_is_handed_out_again_and_nothing_twice(tmp_path: Path):
    asked = experiment(tmp_path)
    point = {"optim.lr": 1e-4, "model.latent": 3}
    first = Ledger(asked, [point])
    number, values = first.ask() or (-1, {})
    assert values == point
    first.report(number, 1, {"val/l2_report": 5.0})
    other, other_values = first.ask() or (-1, {})
    run(first, [9])

    second = Ledger(asked, [point])  # the process that held `first` is gone
    assert second.unfinished()
    assert second.ask() == (number, point)
    assert second.ask() == (other, other_values)
    assert not second.report(number, 1, {"val/l2_report": 5.0})  # its checkpoint's, once more
    second.report(number, 2, {"val/l2_report": 4.0})
    for one in (number, other):
        second.end(one)
    assert ask(second) == 3
    second.end(3)
    assert second.ask() is None
    trials = optuna.load_study(study_name="study", storage=address(asked)).trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state.is_finished() for trial in trials)
    assert [trial.params for trial in trials].count(point) == 1
    assert trials[0].intermediate_values == {1: 5.0, 2: 4.0}


def test_a_search_that_goes_on_does_not_draw_the_same_values_again(tmp_path: Path):
    drawn = [(Ledger(experiment(tmp_path, "search.sampler=random")).ask() or (0, {}))[1] for _ in range(1)]
    again = Ledger(experiment(tmp_path, "search.sampler=random"))
    assert (again.ask() or (0, {}))[1] == drawn[0]  # the one left behind
    assert (again.ask() or (0, {}))[1] != drawn[0]


def test_more_trials_may_be_asked_for_later(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path, "search.trials=1"))
    run(ledger, [1])
    assert ledger.ask() is None
    assert ask(Ledger(experiment(tmp_path, "search.trials=2"))) == 1


def test_the_budget_of_hours_and_of_patience(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path / "hours", "search.max_hours=1e-9"))
    assert ledger.ask() is None
    assert "search.max_hours" in ledger.why_ended()
    patient = Ledger(experiment(tmp_path / "patience", "search.trials=9", "search.patience=2", "search.asha=false"))
    for value in (3.0, 2.0, 5.0, 4.0):
        assert run(patient, [value])
    assert patient.ask() is None
    assert "search.patience=2" in patient.why_ended()


def test_several_objectives_have_a_front_and_no_trial_is_ended_early(tmp_path: Path):
    ledger = Ledger(experiment(tmp_path, "search.objectives={val/skill: larger, val/blur: smaller}"))
    for skill, blur in ((0.5, 0.3), (0.6, 0.4), (0.4, 0.5), (0.1, 0.1)):
        number = ask(ledger)
        for epoch in (1, 2):
            assert not ledger.report(number, epoch, {"val/skill": skill * epoch / 2, "val/blur": blur})
        ledger.end(number)
    assert sorted(trial.number for trial in ledger.best()) == [0, 1, 3]  # 2 is worse than 0 in both


def test_a_journal_file_and_an_address_that_can_hold_neither(tmp_path: Path):
    journal = experiment(tmp_path, f"search.storage={tmp_path}/study.log")
    run(Ledger(journal), [1])
    assert len(Ledger(journal).trials()) == 1
    assert (tmp_path / "study.log").exists()
    with pytest.raises(ConfigError, match=r"search\.storage: give Optuna a database.*s3://bucket"):
        address(load(None, ["storage=s3://bucket/runs"]))
