from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray import tune
from giffy_ray.config import ConfigError, Experiment, load
from giffy_ray.tune.space import distributions, earlier_point, reports_point


def searching(space: str, *words: str) -> Experiment:
    return load(None, [f"search.space={space}", *words])


def test_a_space_becomes_distributions():
    space = distributions(
        searching(
            "{optim.lr: {log_uniform: [1e-4, 1e-2]}, optim.beta1: {uniform: [0.5, 0.9]}, "
            "model.latent: {int: [16, 64]}, train.batch: {choice: [8, 16]}}"
        )
    )
    assert space == {
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "optim.beta1": FloatDistribution(0.5, 0.9),
        "model.latent": IntDistribution(16, 64),
        "train.batch": CategoricalDistribution((8, 16)),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{}", "search.space: nothing to search"),
        ("{optim.lrr: {uniform: [0, 1]}}", "optim.lrr: no such field"),
        ("{optim.lr: {log_uniform: [0.1, 0.01]}}", "search.space.optim.lr.*low < high"),
        ("{optim.lr: {uniform: [0.1]}}", "search.space.optim.lr.*low, high"),
        ("{optim.lr: {uniform: [-1, 1]}}", "optim.lr: .*greater than 0"),
        ("{model.ends_weight: {log_uniform: [0, 1]}}", "search.space.model.ends_weight.*low > 0"),
        ("{model.latent: {int: [8, 16], choice: [1]}}", "search.space.model.latent: give one"),
        ("{optim.beta1: {choice: [0.5, high]}}", "optim.beta1"),
    ],
)
def test_a_mistake_in_the_space_is_told_before_any_trial(space: str, message: str):
    with pytest.raises(ConfigError, match=message):
        distributions(searching(space))


def test_the_reports_values_are_tried_first_where_the_space_holds_them():
    inside = searching("{optim.lr: {log_uniform: [1e-5, 1e-2]}, model.ends_weight: {choice: [1, 2]}}")
    assert reports_point(inside) == {"optim.lr": 1e-4, "model.ends_weight": 2.0}
    assert reports_point(searching("{optim.lr: {log_uniform: [1e-3, 1e-2]}}")) is None
    cgan = searching("{model.real_label: {uniform: [0.7, 1]}, optim.lr: {uniform: [1e-5, 1]}}", "model.kind=cgan")
    assert reports_point(cgan) == {"model.real_label": 0.9, "optim.lr": 1e-4}


def test_an_earlier_runs_values_are_read_as_mlflow_holds_them():
    search = searching("{optim.lr: {log_uniform: [1e-5, 1e-2]}, model.latent: {int: [2, 700]}}")
    params = {"optim.lr": "0.001", "model.latent": "64", "train.batch": "20"}
    assert earlier_point(search, "abc", params) == {"optim.lr": 1e-3, "model.latent": 64}
    with pytest.raises(ConfigError, match=r"search\.enqueue: the run 'abc' has no model\.latent"):
        earlier_point(search, "abc", {"optim.lr": "0.001"})
    with pytest.raises(ConfigError, match=r"search.enqueue: optim.lr is 0.1 in the run 'abc'.*log_uniform"):
        earlier_point(search, "abc", params | {"optim.lr": "0.1"})


def test_the_name_of_a_search_says_whether_it_goes_on(tmp_path: Path):
    given = load(None, ["name=mine", f"storage={tmp_path}"])
    assert tune.named(given).name == "mine-study"
    never = load(None, ["name=mine", f"storage={tmp_path}", "search.resume=never"])
    assert tune.named(never).name.startswith("mine-study-2")
    must = load(None, ["name=mine", f"storage={tmp_path}", "search.resume=must"])
    with pytest.raises(ConfigError, match=r"search\.resume: there is no search 'mine-study'"):
        tune.named(must)
    (tmp_path / "mine-study").mkdir()
    (tmp_path / "mine-study" / "experiment.yaml").write_text("")
    assert tune.named(must).name == "mine-study"
