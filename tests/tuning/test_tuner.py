"""Names of studies, and the check that every trial can run."""

from pathlib import Path

import pytest

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.tuning import tuner


def test_name_of_a_study_decides_whether_it_resumes(tmp_path: Path):
    experiment = load(None, ["name=mine", f"storage={tmp_path}"])
    assert tuner.resolve_study(experiment).name == "mine-study"
    never = override(experiment, {"search.resume": "never"})
    assert tuner.resolve_study(never).name.startswith("mine-study-2")
    must = override(experiment, {"search.resume": "must"})
    with pytest.raises(ConfigError, match=r"search\.resume: there is no study 'mine-study'"):
        tuner.resolve_study(must)
    (tmp_path / "mine-study").mkdir()
    (tmp_path / "mine-study" / "experiment.yaml").write_text("")
    assert tuner.resolve_study(must).name == "mine-study"


def test_name_too_long_for_the_training_of_the_best_trial_is_rejected_before_the_study():
    assert tuner.resolve_study(override(Experiment(), {"name": "x" * 189})).name.endswith("x-study")
    with pytest.raises(ConfigError, match=r"name: .*at most 200 characters"):
        tuner.resolve_study(override(Experiment(), {"name": "x" * 190}))


def test_max_trials_is_limited_by_a_finite_space():
    finite = load(None, ["search.space={train.global_batch_size: {choice: [4, 8]}}"])
    assert tuner.max_trials(finite) == 2
    continuous = load(None, ["search.space={optim.lr: {uniform: [0.1, 1]}}"])
    assert tuner.max_trials(continuous) == 12


@pytest.mark.parametrize(
    ("space", "overrides", "message"),
    [
        (
            "{train.global_batch_size: {int: [1, 8]}}",
            [],
            r"a trial with train\.global_batch_size=1 cannot run: train\.global_batch_size",
        ),
        (
            "{train.global_batch_size: {int: [2, 8]}}",
            ["cluster.workers=2"],
            r"the training of the best trial with train\.global_batch_size=2",
        ),
        ("{speed.micro_batch_size: {choice: [0, 4]}}", [], r"a trial with speed\.micro_batch_size=4 cannot run"),
        ("{train.init_from: {choice: [null, nothing]}}", [], r"a trial with train\.init_from=nothing cannot run"),
        ("{data.segments.frames: {choice: [30, 9]}}", ["data.segments.frames=30"], r"a trial with data\.segments"),
    ],
)
def test_values_with_which_a_training_cannot_run_are_rejected(
    space: str, overrides: list[str], message: str, tmp_path: Path
):
    experiment = load(None, [f"search.space={space}", f"storage={tmp_path}", *overrides])
    with pytest.raises(ConfigError, match=rf"search\.space: {message}"):
        tuner.check_trainings(experiment)


@pytest.mark.parametrize(
    "space",
    [
        "{data.augment.pan: {uniform: [0.1, 0.5]}, data.augment.crop: {uniform: [0.5, 1]}}",
        "{model.batch_norm: {choice: [true, false]}, model.image_batch_statistics: {choice: [true, false]}}",
        "{train.global_batch_size: {int: [2, 40]}}",
    ],
)
def test_fields_without_effect_in_some_trials_are_accepted(space: str, tmp_path: Path):
    tuner.check_trainings(load(None, [f"search.space={space}", f"storage={tmp_path}"]))
