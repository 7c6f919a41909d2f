"""A search's memory: what it hands out, what it takes down, and that it outlives whoever searches."""

import math
import socket
import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.tuning import tuner
from giffy_ray.tuning.optuna_storage import address, opened
from giffy_ray.tuning.optuna_study import ENDED, OptunaStudy
from giffy_ray.tuning.population import Population

SPACE = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 4]}}"

FINITE = "{model.latent: {int: [2, 4]}, optim.schedule: {choice: [constant, cosine]}}"


def experiment(folder: Path, *words: str) -> Experiment:
    given = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.trials=4", "search.epochs=4"]
    return load(None, [*given, "search.grace_period=1", *words])


def ask(ledger: OptunaStudy) -> int:
    asked = ledger.ask()
    assert asked
    return asked[0]


def run(ledger: OptunaStudy, values: list[float], metric: str = "val/l2_paper") -> bool:
    """A trial that reports these, one each epoch. Returns whether it was let to its end."""
    number = ask(ledger)
    for epoch, value in enumerate(values, start=1):
        if ledger.report(number, epoch, {metric: value}):
            return False
    ledger.end(number)
    return True


def test_the_best_of_its_reports_is_what_a_trial_is_worth(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path, "search.asha=false"))
    for values in ([5, 3, 4], [9, 8, 7], [4, 2.5, 6], [3, 3, 3]):
        assert run(ledger, values)
    assert ledger.ask() is None
    assert "search.trials=4" in ledger.stop_reason()
    assert [trial.value for trial in ledger.trials()] == [3, 7, 2.5, 3]
    assert [trial.number for trial in ledger.best()] == [2]


def test_poor_trials_are_ended_at_the_rungs_and_good_ones_are_not(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path))
    assert run(ledger, [4, 3, 2, 1])
    assert not run(ledger, [8, 8, 8, 8])
    assert run(ledger, [3, 2, 1, 0.5])
    states = [trial.state for trial in ledger.trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert list(ledger.trials()[1].intermediate_values) == [1]  # at the first rung, search.grace_period


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_trial_that_diverges_has_a_finite_result_that_says_so(tmp_path: Path, bad: float | None):
    ledger = OptunaStudy(experiment(tmp_path))
    number = ask(ledger)
    assert not ledger.report(number, 1, {"val/l2_paper": 5.0})
    assert ledger.report(number, 2, {} if bad is None else {"val/l2_paper": bad})
    ledger.end(number)  # Ray Tune says it again
    (trial,) = ledger.trials()
    assert trial.state == TrialState.COMPLETE
    assert math.isfinite(trial.value or math.nan)
    assert "diverged: val/l2_paper" in trial.user_attrs[ENDED]
    assert ledger.best() == []


def test_the_largest_is_the_best_of_a_metric_that_is_to_be_large(tmp_path: Path):
    """A trial ranks by its largest report, ASHA cuts the small ones, patience and failures go by it too."""
    words = ["search.metric=val/psnr", "search.trials=9", "search.patience=3"]
    ledger = OptunaStudy(experiment(tmp_path, *words))
    assert run(ledger, [20, 24, 22, 21], "val/psnr")
    assert not run(ledger, [10, 10, 10, 10], "val/psnr")
    assert run(ledger, [25, 30, 31, 30], "val/psnr")
    ledger.end(ask(ledger), "out of memory")
    trials = ledger.trials()
    assert trials[0].value == 24
    assert trials[2].value == 31
    assert (trials[3].value or 0) < -1000
    assert [trial.number for trial in ledger.best()] == [2]
    assert [trial.state for trial in trials[:3]] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert ledger.stop_reason() == ""
    run(ledger, [1], "val/psnr")
    run(ledger, [2], "val/psnr")
    assert "search.patience=3" in ledger.stop_reason()  # since trial 2
    found = tuner._study(ledger)
    assert [trial.number for trial in found.trials[:2]] == [2, 0]
    assert found.best[0].objectives == (31,)


def test_a_search_that_was_begun_in_the_other_direction_is_refused(tmp_path: Path):
    asked = experiment(tmp_path, "search.metric=val/psnr")
    optuna.create_study(storage=address(asked), study_name="study", direction="minimize")
    with pytest.raises(ConfigError, match=r"search\.metric: the stored search 'study' would minimize val/psnr"):
        OptunaStudy(asked)


def test_what_failed_is_never_the_best_however_large_the_metric_is(tmp_path: Path):
    single = OptunaStudy(experiment(tmp_path / "one", "search.metric=train/loss", "search.asha=false"))
    run(single, [3e7, 2e7], "train/loss")
    single.end(ask(single), "out of memory")
    run(single, [4e7], "train/loss")
    assert [trial.number for trial in single.best()] == [0]
    two = OptunaStudy(experiment(tmp_path / "two", "search.objectives={train/loss: minimize, val/blur: minimize}"))
    for loss, blur in ((3e7, 0.1), (2e7, 0.2), (3e7, 0.3)):
        number = ask(two)
        two.report(number, 1, {"train/loss": loss, "val/blur": blur})
        two.end(number)
    two.end(ask(two), "out of memory")
    assert [trial.number for trial in two.best()] == [0, 1]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_small_space_is_searched_once_and_then_the_search_ends(tmp_path: Path, sampler: str):
    words = [f"search.space={FINITE}", "search.trials=20", f"search.sampler={sampler}"]
    ledger = OptunaStudy(experiment(tmp_path, *words), [{"model.latent": 3, "optim.schedule": "cosine"}] * 2)
    seen = []
    while asked := ledger.ask():
        number, values = asked
        seen.append((values["model.latent"], values["optim.schedule"]))
        if number == 1:
            ledger.end(number, "out of memory")  # would fail again
        for epoch in (1, 2):
            ledger.report(number, epoch, {"val/l2_paper": 10 - number})
        ledger.end(number)
    assert seen[0] == (3, "cosine")
    assert sorted(seen) == [(latent, how) for latent in (2, 3, 4) for how in ("constant", "cosine")]
    assert ledger.stop_reason() == "all 6 combinations of search.space have been tried"
    assert len(OptunaStudy(experiment(tmp_path, *words)).trials()) == 6
    assert OptunaStudy(experiment(tmp_path, *words)).ask() is None


def test_trials_side_by_side_and_searches_that_are_killed_try_nothing_twice(tmp_path: Path):
    asked = experiment(tmp_path, f"search.space={FINITE}", "search.trials=20")
    seen: dict[int, tuple] = {}
    for _ in range(6):  # each draws what two before it drew too, and one more, and is killed
        ledger = OptunaStudy(asked)
        for _ in range(len(seen) + 1):
            number, values = ledger.ask() or (-1, {})
            point = (values["model.latent"], values["optim.schedule"])
            assert seen.setdefault(number, point) == point
    assert len(set(seen.values())) == len(seen) == 6
    assert "all 6 combinations" in ledger.stop_reason()
    assert ledger.ask() is None


def test_a_large_finite_space_is_never_drawn_from_twice_although_tpe_nears_one_point(tmp_path: Path):
    words = ["search.space={model.latent: {int: [2, 40]}}", "search.trials=30", f"search.storage={tmp_path}/a.log"]
    ledger, seen = OptunaStudy(experiment(tmp_path, *words)), []
    while asked := ledger.ask():
        seen.append(asked[1]["model.latent"])
        ledger.report(asked[0], 4, {"val/l2_paper": (seen[-1] - 20.0) ** 2})
        ledger.end(asked[0])
    assert len(set(seen)) == len(seen) == 30


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", [OptunaStudy, Population])
def test_a_trial_whose_values_were_half_written_gets_the_others(tmp_path: Path, kind: type[OptunaStudy], fixed: bool):
    """As a process leaves it that is killed within Study.ask, which writes one value after another."""
    space = "search.space={optim.lr: {log_uniform: [1e-5, 1e-1]}, model.ends_weight: {uniform: [1, 4]}}"
    asked = experiment(tmp_path, space, *(["search.sampler=pbt"] if kind is Population else []))
    directions = ["minimize"]
    study = optuna.create_study(storage=address(asked), study_name="study", directions=directions)
    if fixed:
        study.enqueue_trial({"optim.lr": 1e-3, "model.ends_weight": 2.5})
    half = study.ask({"optim.lr": FloatDistribution(1e-5, 1e-1, log=True)})
    ledger = kind(asked)
    number, values = next(given for given in iter(ledger.ask, None) if given[0] == half.number)
    assert values.keys() == {"optim.lr", "model.ends_weight"}
    assert values["optim.lr"] == half.params["optim.lr"]
    assert values["model.ends_weight"] == 2.5 if fixed else 1 <= values["model.ends_weight"] <= 4
    stored = optuna.load_study(study_name="study", storage=address(asked)).trials[0]
    assert stored.params == values
    tuner.experiment_of(asked, number, values)


def test_points_are_noted_by_whoever_begins_after_a_process_that_was_killed(tmp_path: Path):
    asked, points = experiment(tmp_path), [{"optim.lr": 1e-4, "model.latent": 3}, {"optim.lr": 1e-3, "model.latent": 2}]
    OptunaStudy(asked, points[:1])  # and not the second, before it was killed
    ledger = OptunaStudy(asked, points)
    assert [(ledger.ask() or (0, {}))[1] for _ in range(2)] == points
    assert (ledger.ask() or (0, {}))[1] not in points


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{}/missing/study.log", "there is no folder '{}/missing'; create it"),
        ("{}", "is a folder; give a file in it"),
        ("{}/text", "is not a journal of Optuna"),
        ("{}/text/study.log", "there is no folder '{}/text'"),
        ("sqlite:///{}/missing/study.db", "there is no folder '{}/missing'; create it"),
        ("sqlite:///{}", "is a folder; give a file in it"),
        ("sqlite:///{}/text", "file is not a database"),
        ("sqlite://", "ends with the process"),
        ("sqlite:///:memory:", "ends with the process"),
        ("mysql+pymysql://me:hush@host/db", "the driver of mysql.pymysql is missing"),
        ("mysql://me:hush@host/db", "pip install 'mysqlclient'"),
        ("postgresql+psycopg2://me:hush@host/db", "the driver of postgresql.psycopg2 is missing"),
        ("redis://me:hush@host/0", "knows no such database; give postgresql://"),
        ("postgres://me:hush@host/db", "knows no such database; give postgresql://"),
        ("s3://bucket/study.log", "knows no such database"),
        ("postgresql://me:hush@host:port/db", "port"),
        ("://", "knows no such database"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path, where: str, message: str):
    (tmp_path / "text").write_text("not\na journal\n")
    asked = override(experiment(tmp_path / "runs"), {"search.storage": where.format(tmp_path)})
    with pytest.raises(ConfigError, match=r"search\.storage: .*" + message.format(tmp_path)) as caught:
        tuner.initial_points(asked)
    assert "hush" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_postgresql_server_that_is_not_there_is_told_in_one_line(tmp_path: Path):
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        where = f"postgresql://me:hush@127.0.0.1:{unused.getsockname()[1]}/db"
        with pytest.raises(ConfigError, match=r"search\.storage: .*refused") as caught:
            opened(experiment(tmp_path, f"search.storage={where}"))
    assert "hush" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("postgresql://me:hush@host/db", "postgresql://you@host/db"),
        ("postgresql+psycopg://me:hush@host:1/db?connect_timeout=3", "postgresql://host:1/db"),
        ("sqlite:///{}/mlflow.db", None),
    ],
)
def test_optuna_and_mlflow_cannot_share_a_database(tmp_path: Path, storage: str, tracking: str | None):
    """Both call the table of their version alembic_version: tried on a server in test_chaos.py."""
    asked = override(experiment(tmp_path), {"search.storage": storage.format(tmp_path), "tracking.uri": tracking})
    with pytest.raises(ConfigError, match=r"search\.storage: is the database of tracking\.uri") as caught:
        tuner.initial_points(asked)
    assert "hush" not in str(caught.value)


def test_a_database_of_others_is_told_as_such(tmp_path: Path):
    where = f"sqlite:///{tmp_path}/other.db"
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("create table alembic_version (version_num varchar(32))")
        other.execute("insert into alembic_version values ('867495a8f9d4')")
    other.close()
    with pytest.raises(ConfigError, match=r"search\.storage: its tables are of another version of Optuna, or MLflow's"):
        tuner.initial_points(override(experiment(tmp_path), {"search.storage": where}))


def test_a_relative_file_is_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for where in ("study.log", "sqlite:///study.db"):
        run(OptunaStudy(experiment(tmp_path, f"search.storage={where}")), [1])
    assert address(experiment(tmp_path, "search.storage=study.log")) == f"{tmp_path}/study.log"
    assert (tmp_path / "study.log").is_file()
    assert (tmp_path / "study.db").is_file()


def test_a_trial_that_reported_nothing_is_marked(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path))
    ledger.end(ask(ledger))
    ledger.end(ask(ledger), "its process died")
    assert [trial.user_attrs[ENDED] for trial in ledger.trials()] == ["it reported nothing", "its process died"]


def test_what_was_left_running_is_handed_out_again_and_nothing_twice(tmp_path: Path):
    asked = experiment(tmp_path)
    point = {"optim.lr": 1e-4, "model.latent": 3}
    first = OptunaStudy(asked, [point])
    number, values = first.ask() or (-1, {})
    assert values == point
    first.report(number, 1, {"val/l2_paper": 5.0})
    other, other_values = first.ask() or (-1, {})
    run(first, [9])

    second = OptunaStudy(asked, [point])  # the process that held `first` is gone
    assert second.unfinished()
    assert second.ask() == (number, point)
    assert second.ask() == (other, other_values)
    assert not second.report(number, 1, {"val/l2_paper": 5.0})  # its checkpoint's, once more
    second.report(number, 2, {"val/l2_paper": 4.0})
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
    drawn = [(OptunaStudy(experiment(tmp_path, "search.sampler=random")).ask() or (0, {}))[1] for _ in range(1)]
    again = OptunaStudy(experiment(tmp_path, "search.sampler=random"))
    assert (again.ask() or (0, {}))[1] == drawn[0]  # the one left behind
    assert (again.ask() or (0, {}))[1] != drawn[0]


def test_more_trials_may_be_asked_for_later(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path, "search.trials=1"))
    run(ledger, [1])
    assert ledger.ask() is None
    assert ask(OptunaStudy(experiment(tmp_path, "search.trials=2"))) == 1


def test_the_budget_of_hours_and_of_patience(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path / "hours", "search.max_hours=1e-9"))
    assert ledger.ask() is None
    assert "search.max_hours" in ledger.stop_reason()
    patient = OptunaStudy(
        experiment(tmp_path / "patience", "search.trials=9", "search.patience=2", "search.asha=false")
    )
    for value in (3.0, 2.0, 5.0, 4.0):
        assert run(patient, [value])
    assert patient.ask() is None
    assert "search.patience=2" in patient.stop_reason()


def test_several_objectives_have_a_front_and_no_trial_is_ended_early(tmp_path: Path):
    ledger = OptunaStudy(experiment(tmp_path, "search.objectives={val/skill: maximize, val/blur: minimize}"))
    for skill, blur in ((0.5, 0.3), (0.6, 0.4), (0.4, 0.5), (0.1, 0.1)):
        number = ask(ledger)
        for epoch in (1, 2):
            assert not ledger.report(number, epoch, {"val/skill": skill * epoch / 2, "val/blur": blur})
        ledger.end(number)
    assert sorted(trial.number for trial in ledger.best()) == [0, 1, 3]  # 2 is worse than 0 in both


def test_a_journal_file_and_an_address_that_can_hold_neither(tmp_path: Path):
    journal = experiment(tmp_path, f"search.storage={tmp_path}/study.log")
    run(OptunaStudy(journal), [1])
    assert len(OptunaStudy(journal).trials()) == 1
    assert (tmp_path / "study.log").exists()
    with pytest.raises(ConfigError, match=r"search\.storage: give Optuna a database.*s3://bucket"):
        address(load(None, ["storage=s3://bucket/runs"]))
