import pytest
from ray.tune.search.sample import Categorical, Float, Integer

from giffy_ray.config import ConfigError, Experiment, load
from giffy_ray.tune import first_points, space_of


def searching(space: str) -> Experiment:
    return load(None, [f"search.space={space}"])


def test_a_space_becomes_distributions():
    space = space_of(
        searching(
            "{optim.lr: {log_uniform: [1e-4, 1e-2]}, optim.beta1: {uniform: [0.5, 0.9]}, "
            "model.latent: {int: [16, 64]}, train.batch: {choice: [8, 16]}}"
        )
    )
    lr, beta1, latent, batch = (space[name] for name in ("optim.lr", "optim.beta1", "model.latent", "train.batch"))
    assert isinstance(lr, Float)
    assert (lr.lower, lr.upper, lr.sampler.__class__.__name__) == (1e-4, 1e-2, "_LogUniform")
    assert (beta1.lower, beta1.upper) == (0.5, 0.9)
    assert isinstance(latent, Integer)
    assert (latent.lower, latent.upper) == (16, 65)  # both ends included
    assert isinstance(batch, Categorical)
    assert batch.categories == [8, 16]


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
        space_of(searching(space))


def test_the_reports_values_are_tried_first_where_the_space_holds_them():
    inside = searching("{optim.lr: {log_uniform: [1e-5, 1e-2]}, model.ends_weight: {choice: [1, 2]}}")
    assert first_points(inside.search) == [{"optim.lr": 1e-4, "model.ends_weight": 2.0}]
    assert first_points(searching("{optim.lr: {log_uniform: [1e-3, 1e-2]}}").search) == []
