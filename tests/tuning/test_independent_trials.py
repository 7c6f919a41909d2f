"""Independent trials: their order, results and pruning, and studies that resume."""

import math
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from giffy_ray.config import ConfigError, Experiment, load
from giffy_ray.tuning import tuner
from giffy_ray.tuning.independent_trials import IndependentTrials
from giffy_ray.tuning.optuna_storage import resolve_storage_address
from giffy_ray.tuning.optuna_study import FAILURE_ATTR
from giffy_ray.tuning.population import Population
from giffy_ray.tuning.search_space import Values
from giffy_ray.tuning.trial_source import TrialSource

SPACE = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 4]}}"
FINITE_SPACE = "{model.latent: {int: [2, 4]}, optim.schedule: {choice: [constant, cosine]}}"


def load_experiment(folder: Path, *overrides: str) -> Experiment:
    common = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.trials=4", "search.epochs=4"]
    return load(None, [*common, "search.grace_period=1", *overrides])


def ask(source: TrialSource) -> tuple[int, Values]:
    proposal = source.ask()
    assert proposal
    return proposal


def start_trial(source: TrialSource) -> int:
    number, _ = ask(source)
    return number


def run_trial(source: TrialSource, reports: list[float], metric: str = "val/l2_paper") -> bool:
    """Runs a trial that reports one value per epoch. Returns whether it completed."""
    number = start_trial(source)
    for epoch, value in enumerate(reports, start=1):
        if source.report(number, epoch, {metric: value}):
            return False
    source.end(number)
    return True


def best_numbers(source: TrialSource) -> list[int]:
    return [trial.number for trial in source.study.best()]


def test_objective_of_a_trial_is_its_best_report(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path, "search.asha=false"))
    for reports in ([5, 3, 4], [9, 8, 7], [4, 2.5, 6], [3, 3, 3]):
        assert run_trial(source, reports)
    assert source.ask() is None
    assert "search.trials=4" in source.stop_reason()
    assert [trial.value for trial in source.study.trials()] == [3, 7, 2.5, 3]
    assert best_numbers(source) == [2]


def test_asha_prunes_weak_trials_at_the_rungs(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path))
    assert run_trial(source, [4, 3, 2, 1])
    assert not run_trial(source, [8, 8, 8, 8])
    assert run_trial(source, [3, 2, 1, 0.5])
    trials = source.study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert list(trials[1].intermediate_values) == [1]  # at the first rung, search.grace_period


@pytest.mark.parametrize("bad_value", [math.nan, math.inf, None])
def test_diverged_trial_has_a_finite_objective_and_a_reason(tmp_path: Path, bad_value: float | None):
    source = IndependentTrials(load_experiment(tmp_path))
    number = start_trial(source)
    assert not source.report(number, 1, {"val/l2_paper": 5.0})
    assert source.report(number, 2, {} if bad_value is None else {"val/l2_paper": bad_value})
    source.end(number)  # Ray Tune ends it a second time
    (trial,) = source.study.trials()
    assert trial.state == TrialState.COMPLETE
    assert math.isfinite(trial.value or math.nan)
    assert "diverged: val/l2_paper" in trial.user_attrs[FAILURE_ATTR]
    assert source.study.best() == []


def test_maximized_metric_prefers_large_values(tmp_path: Path):
    """Applies to a trial's best report, to ASHA, to patience and to failures."""
    overrides = ["search.metric=val/psnr", "search.trials=9", "search.patience=3"]
    source = IndependentTrials(load_experiment(tmp_path, *overrides))
    assert run_trial(source, [20, 24, 22, 21], "val/psnr")
    assert not run_trial(source, [10, 10, 10, 10], "val/psnr")
    assert run_trial(source, [25, 30, 31, 30], "val/psnr")
    source.end(start_trial(source), "out of memory")
    trials = source.study.trials()
    assert trials[0].value == 24
    assert trials[2].value == 31
    assert (trials[3].value or 0) < -1000
    assert best_numbers(source) == [2]
    assert [trial.state for trial in trials[:3]] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert source.stop_reason() == ""
    run_trial(source, [1], "val/psnr")
    run_trial(source, [2], "val/psnr")
    assert "search.patience=3" in source.stop_reason()  # since trial 2
    study = tuner.collect_study(source)
    assert [trial.number for trial in study.trials[:2]] == [2, 0]
    assert study.best[0].objectives == (31,)


def test_stored_study_with_another_direction_is_rejected(tmp_path: Path):
    experiment = load_experiment(tmp_path, "search.metric=val/psnr")
    optuna.create_study(storage=resolve_storage_address(experiment), study_name="study", direction="minimize")
    with pytest.raises(ConfigError, match=r"search\.metric: the stored study 'study' would minimize val/psnr"):
        IndependentTrials(experiment)


def test_failed_trial_is_never_the_best_on_any_scale(tmp_path: Path):
    single = IndependentTrials(load_experiment(tmp_path / "one", "search.metric=train/loss", "search.asha=false"))
    run_trial(single, [3e7, 2e7], "train/loss")
    single.end(start_trial(single), "out of memory")
    run_trial(single, [4e7], "train/loss")
    assert best_numbers(single) == [0]
    objectives = "search.objectives={train/loss: minimize, val/blur: minimize}"
    several = IndependentTrials(load_experiment(tmp_path / "two", objectives))
    for loss, blur in ((3e7, 0.1), (2e7, 0.2), (3e7, 0.3)):
        number = start_trial(several)
        several.report(number, 1, {"train/loss": loss, "val/blur": blur})
        several.end(number)
    several.end(start_trial(several), "out of memory")
    assert best_numbers(several) == [0, 1]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_finite_space_is_tried_once_and_ends_the_study(tmp_path: Path, sampler: str):
    overrides = [f"search.space={FINITE_SPACE}", "search.trials=20", f"search.sampler={sampler}"]
    points = [{"model.latent": 3, "optim.schedule": "cosine"}] * 2
    source = IndependentTrials(load_experiment(tmp_path, *overrides), points)
    tried = []
    while proposal := source.ask():
        number, values = proposal
        tried.append((values["model.latent"], values["optim.schedule"]))
        if number == 1:
            source.end(number, "out of memory")  # a failed point is not repeated either
        for epoch in (1, 2):
            source.report(number, epoch, {"val/l2_paper": 10 - number})
        source.end(number)
    assert tried[0] == (3, "cosine")
    assert sorted(tried) == [(latent, schedule) for latent in (2, 3, 4) for schedule in ("constant", "cosine")]
    assert source.stop_reason() == "all 6 combinations of search.space have been tried"
    assert len(IndependentTrials(load_experiment(tmp_path, *overrides)).study.trials()) == 6
    assert IndependentTrials(load_experiment(tmp_path, *overrides)).ask() is None


def test_concurrent_and_interrupted_trials_repeat_no_point(tmp_path: Path):
    experiment = load_experiment(tmp_path, f"search.space={FINITE_SPACE}", "search.trials=20")
    points: dict[int, tuple] = {}
    for _ in range(6):  # each process resumes the trials of its predecessors, starts one more, and is killed
        source = IndependentTrials(experiment)
        for _ in range(len(points) + 1):
            number, values = source.ask() or (-1, {})
            point = (values["model.latent"], values["optim.schedule"])
            assert points.setdefault(number, point) == point
    assert len(set(points.values())) == len(points) == 6
    assert "all 6 combinations" in source.stop_reason()
    assert source.ask() is None


def test_tpe_repeats_no_point_of_a_large_finite_space(tmp_path: Path):
    """Near the optimum, TPE alone would draw the same point again."""
    overrides = ["search.space={model.latent: {int: [2, 40]}}", "search.trials=30", f"search.storage={tmp_path}/a.log"]
    source = IndependentTrials(load_experiment(tmp_path, *overrides))
    tried = []
    while proposal := source.ask():
        number, values = proposal
        tried.append(values["model.latent"])
        source.report(number, 4, {"val/l2_paper": (tried[-1] - 20.0) ** 2})
        source.end(number)
    assert len(set(tried)) == len(tried) == 30


@pytest.mark.parametrize("is_enqueued", [True, False])
@pytest.mark.parametrize("source_class", [IndependentTrials, Population])
def test_orphan_with_some_values_draws_the_others(
    tmp_path: Path, source_class: type[IndependentTrials] | type[Population], is_enqueued: bool
):
    """A process that is killed within Study.ask, which stores one value after another, leaves such a trial."""
    space = "search.space={optim.lr: {log_uniform: [1e-5, 1e-1]}, model.ends_weight: {uniform: [1, 4]}}"
    sampler = ["search.sampler=pbt"] if source_class is Population else []
    experiment = load_experiment(tmp_path, space, *sampler)
    address = resolve_storage_address(experiment)
    study = optuna.create_study(storage=address, study_name="study", directions=["minimize"])
    if is_enqueued:
        study.enqueue_trial({"optim.lr": 1e-3, "model.ends_weight": 2.5})
    orphan = study.ask({"optim.lr": FloatDistribution(1e-5, 1e-1, log=True)})
    source = source_class(experiment)
    number, values = next(proposal for proposal in iter(source.ask, None) if proposal[0] == orphan.number)
    assert values.keys() == {"optim.lr", "model.ends_weight"}
    assert values["optim.lr"] == orphan.params["optim.lr"]
    assert values["model.ends_weight"] == 2.5 if is_enqueued else 1 <= values["model.ends_weight"] <= 4
    stored = optuna.load_study(study_name="study", storage=address).trials[0]
    assert stored.params == values
    tuner.trial_experiment(experiment, number, values)


def test_next_process_enqueues_points_that_a_killed_one_had_not(tmp_path: Path):
    experiment = load_experiment(tmp_path)
    points = [{"optim.lr": 1e-4, "model.latent": 3}, {"optim.lr": 1e-3, "model.latent": 2}]
    IndependentTrials(experiment, points[:1])  # killed before it had enqueued the second
    source = IndependentTrials(experiment, points)
    proposals = [ask(source) for _ in range(3)]
    assert [values for _, values in proposals[:2]] == points
    assert proposals[2][1] not in points


def test_trial_without_reports_fails_with_a_reason(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path))
    source.end(start_trial(source))
    source.end(start_trial(source), "the trial's process died")
    reasons = [trial.user_attrs[FAILURE_ATTR] for trial in source.study.trials()]
    assert reasons == ["reported no metrics", "the trial's process died"]


def test_next_process_resumes_running_trials_and_repeats_none(tmp_path: Path):
    experiment = load_experiment(tmp_path)
    point = {"optim.lr": 1e-4, "model.latent": 3}
    first = IndependentTrials(experiment, [point])
    number, values = ask(first)
    assert values == point
    first.report(number, 1, {"val/l2_paper": 5.0})
    other_number, other_values = ask(first)
    run_trial(first, [9])

    second = IndependentTrials(experiment, [point])  # the process of `first` is gone
    assert second.has_unfinished_trials()
    assert second.ask() == (number, point)
    assert second.ask() == (other_number, other_values)
    assert not second.report(number, 1, {"val/l2_paper": 5.0})  # the same report, repeated from its checkpoint
    second.report(number, 2, {"val/l2_paper": 4.0})
    second.end(number)
    second.end(other_number)
    assert start_trial(second) == 3
    second.end(3)
    assert second.ask() is None
    trials = optuna.load_study(study_name="study", storage=resolve_storage_address(experiment)).trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state.is_finished() for trial in trials)
    assert [trial.params for trial in trials].count(point) == 1
    assert trials[0].intermediate_values == {1: 5.0, 2: 4.0}


def test_resumed_study_draws_new_values(tmp_path: Path):
    experiment = load_experiment(tmp_path, "search.sampler=random")
    _, drawn = ask(IndependentTrials(experiment))
    resumed = IndependentTrials(experiment)
    assert ask(resumed)[1] == drawn  # the orphan
    assert ask(resumed)[1] != drawn


def test_more_trials_can_be_added_later(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path, "search.trials=1"))
    run_trial(source, [1])
    assert source.ask() is None
    assert start_trial(IndependentTrials(load_experiment(tmp_path, "search.trials=2"))) == 1


def test_study_ends_after_its_hours_or_its_patience(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path / "hours", "search.max_hours=1e-9"))
    assert source.ask() is None
    assert "search.max_hours" in source.stop_reason()
    overrides = ["search.trials=9", "search.patience=2", "search.asha=false"]
    source = IndependentTrials(load_experiment(tmp_path / "patience", *overrides))
    for value in (3.0, 2.0, 5.0, 4.0):
        assert run_trial(source, [value])
    assert source.ask() is None
    assert "search.patience=2" in source.stop_reason()


def test_several_objectives_have_a_pareto_front_and_no_pruning(tmp_path: Path):
    source = IndependentTrials(load_experiment(tmp_path, "search.objectives={val/skill: maximize, val/blur: minimize}"))
    for skill, blur in ((0.5, 0.3), (0.6, 0.4), (0.4, 0.5), (0.1, 0.1)):
        number = start_trial(source)
        for epoch in (1, 2):
            assert not source.report(number, epoch, {"val/skill": skill * epoch / 2, "val/blur": blur})
        source.end(number)
    assert sorted(best_numbers(source)) == [0, 1, 3]  # 2 is worse than 0 in both
