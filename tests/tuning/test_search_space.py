"""The search space: its distributions, the fields and values that it rejects, and the points to try first."""

import random

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray.config import ConfigError, Experiment, flatten, load, override
from giffy_ray.tuning import tuner
from giffy_ray.tuning.search_space import (
    build_distributions,
    count_combinations,
    draw_untried_point,
    paper_point,
    point_from_run,
    point_key,
)


def load_experiment(space: str, *overrides: str) -> Experiment:
    return load(None, [f"search.space={space}", *overrides])


def test_each_kind_of_field_becomes_its_distribution():
    space = build_distributions(
        load_experiment(
            "{optim.lr: {log_uniform: [1e-4, 1e-2]}, optim.beta1: {uniform: [0.5, 0.9]}, "
            "model.latent: {int: [16, 64]}, train.global_batch_size: {choice: [8, 16]}}"
        )
    )
    assert space == {
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "optim.beta1": FloatDistribution(0.5, 0.9),
        "model.latent": IntDistribution(16, 64),
        "train.global_batch_size": CategoricalDistribution((8, 16)),
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
def test_invalid_space_is_rejected(space: str, message: str):
    with pytest.raises(ConfigError, match=message):
        build_distributions(load_experiment(space))


def test_paper_point_requires_that_the_space_contains_it():
    inside = load_experiment("{optim.lr: {log_uniform: [1e-5, 1e-2]}, model.ends_weight: {choice: [1, 2]}}")
    assert paper_point(inside) == {"optim.lr": 1e-4, "model.ends_weight": 2.0}
    assert paper_point(load_experiment("{optim.lr: {log_uniform: [1e-3, 1e-2]}}")) is None
    cgan = load_experiment("{model.real_label: {uniform: [0.7, 1]}, optim.lr: {uniform: [1e-5, 1]}}", "model.kind=cgan")
    assert paper_point(cgan) == {"model.real_label": 0.9, "optim.lr": 1e-4}


def test_point_from_run_parses_mlflow_params():
    experiment = load_experiment("{optim.lr: {log_uniform: [1e-5, 1e-2]}, model.latent: {int: [2, 700]}}")
    params = {"optim.lr": "0.001", "model.latent": "64", "train.global_batch_size": "20"}
    assert point_from_run(experiment, "abc", params) == {"optim.lr": 1e-3, "model.latent": 64}
    with pytest.raises(ConfigError, match=r"search\.enqueue: run 'abc' has no param model\.latent"):
        point_from_run(experiment, "abc", {"optim.lr": "0.001"})
    with pytest.raises(ConfigError, match=r"search.enqueue: optim.lr of run 'abc' is outside .*log_uniform.*value 0.1"):
        point_from_run(experiment, "abc", params | {"optim.lr": "0.1"})


# Field -> part of the reason why it cannot be searched.
UNSEARCHABLE = {
    "name": "a name of its own",
    "storage": "the study's folder",
    "data.root": "one set of clips",
    "data.cache_decoded": "one set of clips",
    "data.limits.frames": "one set of clips",
    "data.synthetic.training_clips": "one set of clips",
    "clip.fps": "one set of clips",
    "clip.frames": "one set of clips",
    "train.epochs": r"search\.epochs",
    "train.validate_every": "monitored and saved",
    "train.keep_checkpoints": "monitored and saved",
    "cluster.workers": r"search\.workers",
    "cluster.gpu": r"search\.workers",
    "tracking.experiment": "where runs are recorded",
    "evaluate.samples": "after the training",
    "search.epochs": "describes the search",
    "search.seed": "describes the search",
    "speed.profile": "only records a trace",
    "data.segments.frames": "the stored clips differ",
    "data.segments.shortest_s": r"has an effect only with data\.segments\.frames above 0",
    "data.augment.pan": r"has an effect only with data\.augment\.crop below 1",
    "speed.sync_batch_norm": r"has an effect only with search\.workers above 1",
    "optim.discriminator_lr": "no discriminator",
}


@pytest.mark.parametrize("name", UNSEARCHABLE)
def test_field_without_effect_on_a_trial_is_rejected(name: str):
    value = {"name": "a", "storage": "a", "data.root": "a", "tracking.experiment": "a"}.get(name, 1)
    with pytest.raises(ConfigError, match=rf"search\.space\.{name}: cannot be searched: .*{UNSEARCHABLE[name]}"):
        tuner.check_search(load_experiment(f"{{{name}: {{choice: [{value}]}}}}"))


def test_every_field_is_either_searchable_or_rejected_with_a_reason():
    searchable = (
        "model.",
        "optim.",
        "data.augment.",
        "train.global_batch_size",
        "train.seed",
        "train.init_from",
        "speed.",
    )
    overrides = ["model.kind=cgan", "search.workers=2", "data.augment.crop=0.9"]
    for name, value in flatten(load(None, overrides)).items():
        if not isinstance(value, bool | int | float | str):
            continue
        literal = str(value).lower() if isinstance(value, bool) else value
        experiment = load_experiment(f"{{{name}: {{choice: [{literal}]}}}}", *overrides)
        if name.startswith(searchable) and name not in ("speed.profile", "model.kind"):
            tuner.check_search(experiment)
        elif name != "model.kind":
            with pytest.raises(ConfigError, match=rf"search\.space\.{name}: cannot be searched: "):
                tuner.check_search(experiment)


def test_field_is_searchable_if_the_field_it_depends_on_is_searched():
    space = "{data.augment.pan: {uniform: [0, 1]}, data.augment.crop: {uniform: [0.5, 1]}}"
    tuner.check_search(load_experiment(space))
    space = "{data.segments.frames: {int: [4, 8]}, data.segments.shortest_s: {uniform: [0.2, 1]}}"
    tuner.check_search(load_experiment(space, "model.kind=between", "data.segments.frames=6"))
    space = "{model.adversarial_weight: {uniform: [0, 1]}, optim.discriminator_lr: {log_uniform: [1e-5, 1e-3]}}"
    tuner.check_search(load_experiment(space, "model.kind=between"))


@pytest.mark.parametrize(
    ("field", "spec", "message"),
    [
        ("optim.lr", "{choice: []}", "at least one value"),
        ("optim.lr", "{uniform: []}", "low, high"),
        ("optim.lr", "{}", "give one distribution"),
        ("optim.lr", "{choice: [1e-3, 1e-3]}", "no value twice"),
        ("optim.lr", "{choice: [[1e-3]]}", "a number, text, true, false or null"),
        ("model.generator_widths", "{choice: [[2, 2, 2, 2, 2]]}", "a number, text, true, false or null"),
        ("optim.lr", "{uniform: [a, b]}", r"optim\.lr"),
        ("optim.lr", "{uniform: [0.1, .nan]}", r"optim\.lr"),
        ("optim.lr", "{uniform: [0.1, .inf]}", r"optim\.lr"),
        ("optim.lr", "{choice: [true, 0.1]}", "valid number"),
        ("optim.max_grad_norm", "{uniform: [1, .inf]}", "finite"),
        ("optim.max_grad_norm", "{uniform: [null, 1]}", "needs numbers"),
        ("optim.schedule", "{uniform: [constant, cosine]}", "needs numbers; use choice for other values"),
        ("model.batch_norm", "{int: [0, 1]}", r"choice: \[true, false\]"),
        ("model.batch_norm", "{uniform: [false, true]}", "needs numbers"),
        ("model.latent", "{uniform: [8, 64]}", "use int or choice"),
        ("model.latent", "{log_uniform: [8, 64]}", "use int or choice"),
        ("model.ends_weight", "{int: [1.5, 3]}", "whole numbers"),
        ("model.latent", "{int: [8, 100000000000000000000]}", "less than 2147483648"),
        (
            "model.ends_weight",
            f"{{uniform: [0, 1{'0' * 400}]}}",
            r"search\.space\.model\.ends_weight|model\.ends_weight",
        ),
        ("model.ends_weight", "3", r"model\.ends_weight"),
        ("optim", "{choice: [1]}", "is a section"),
        ("model.kind", "{choice: [cvae, gan]}", r"model\.kind: must be one of"),
    ],
)
def test_invalid_distribution_is_rejected_in_one_line(field: str, spec: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        tuner.check_search(load_experiment(f"{{{field}: {spec}}}"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("spec", ["{int: [1, 4]}", "{uniform: [1, 2]}"])
def test_values_between_the_bounds_are_checked(spec: str):
    """`model.self_ensemble` accepts 1, 2 and 4 only."""
    message = r"search\.space\.model\.self_ensemble: .* draws values that the field does not accept"
    with pytest.raises(ConfigError, match=message):
        tuner.check_search(load_experiment(f"{{model.self_ensemble: {spec}}}", "model.kind=between"))


def test_field_whose_default_is_none_is_searchable():
    """The discriminator's learning rate defaults to the generator's. A gradient norm of None is not a number."""
    rate = load_experiment("{optim.discriminator_lr: {log_uniform: [1e-5, 1e-2]}}", "model.kind=cgan", "optim.lr=1e-3")
    assert paper_point(rate) == {"optim.discriminator_lr": 1e-4}
    assert tuner.initial_points(rate) == [{"optim.discriminator_lr": 1e-4}]
    assert paper_point(load_experiment("{optim.max_grad_norm: {uniform: [0.1, 10]}}")) is None
    space = "{optim.max_grad_norm: {choice: [null, 1.0]}, model.batch_norm: {choice: [true, false]}}"
    choices = load_experiment(space)
    assert paper_point(choices) == {"optim.max_grad_norm": None, "model.batch_norm": True}
    assert build_distributions(choices)["model.batch_norm"] == CategoricalDistribution((True, False))
    params = {"optim.discriminator_lr": "None", "optim.lr": "0.003"}  # MLflow stores strings
    assert point_from_run(rate, "abc", params) == {"optim.discriminator_lr": 3e-3}
    assert point_from_run(choices, "abc", {"optim.max_grad_norm": "None", "model.batch_norm": "False"}) == {
        "optim.max_grad_norm": None,
        "model.batch_norm": False,
    }
    with pytest.raises(ConfigError, match=r"search\.enqueue: the params of run 'abc' do not fit .*batch_norm"):
        point_from_run(choices, "abc", {"optim.max_grad_norm": "None", "model.batch_norm": "maybe"})


def test_population_with_an_invalid_space_is_rejected():
    overrides = ["search.sampler=pbt", "model.kind=between"]
    with pytest.raises(ConfigError, match=r"search\.space\.model\.adversarial_weight: give one distribution"):
        tuner.initial_points(load_experiment("{model.adversarial_weight: {}}", *overrides))


NAMES = st.sampled_from([*flatten(load(None)), "optim.nothing", "optim", "", "a.b"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.floats(0, 2),
    st.integers(0, 99),
    st.text(max_size=4),
    st.sampled_from(["cosine", "constant", "1e-3", "float32", "nan", "inf"]),
)
SPECS = st.dictionaries(
    st.sampled_from(["uniform", "log_uniform", "int", "choice"]),
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.lists(SCALARS, min_size=2, max_size=2)),
    max_size=2,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, SPECS, max_size=2), st.sampled_from(["cvae", "cgan", "between"]))
def test_any_space_raises_config_error_or_can_be_sampled(space: dict, kind: str):
    try:
        experiment = override(load(None, [f"model.kind={kind}"]), {"search.space": space})
        tuner.initial_points(experiment)
    except ConfigError:
        return
    distributions = build_distributions(experiment)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(5):
        override(experiment, study.ask(distributions).params)


def test_untried_points_cover_all_combinations():
    space = build_distributions(
        load_experiment("{model.latent: {int: [2, 4]}, optim.schedule: {choice: [constant, cosine]}}")
    )
    assert count_combinations(space) == 6
    assert count_combinations({**space, "optim.lr": FloatDistribution(0.1, 1)}) is None
    tried: set[tuple] = set()
    for _ in range(6):
        point = draw_untried_point(space, tried, random.Random(0))
        tried.add(point_key(point, space))
    assert tried == {(latent, schedule) for latent in (2, 3, 4) for schedule in ("constant", "cosine")}
    large_space = {"a": IntDistribution(0, 10**9)}
    assert draw_untried_point(large_space, {(5,)}, random.Random(0)).keys() == {"a"}
