import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from giffy_ray.config import ConfigError, Experiment, flatten, load, override
from giffy_ray.training import learners, train_loop
from giffy_ray.training.throughput import ThroughputMonitor
from giffy_ray.tuning import tuner
from giffy_ray.tuning.objectives import reported_by
from giffy_ray.tuning.search_space import combinations, distributions, earlier_point, key_of, reports_point, untried
from tests.conftest import TINY


def searching(space: str, *words: str) -> Experiment:
    return load(None, [f"search.space={space}", *words])


def test_a_space_becomes_distributions():
    space = distributions(
        searching(
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
    params = {"optim.lr": "0.001", "model.latent": "64", "train.global_batch_size": "20"}
    assert earlier_point(search, "abc", params) == {"optim.lr": 1e-3, "model.latent": 64}
    with pytest.raises(ConfigError, match=r"search\.enqueue: the run 'abc' has no model\.latent"):
        earlier_point(search, "abc", {"optim.lr": "0.001"})
    with pytest.raises(ConfigError, match=r"search.enqueue: optim.lr is 0.1 in the run 'abc'.*log_uniform"):
        earlier_point(search, "abc", params | {"optim.lr": "0.1"})


def test_the_name_of_a_search_says_whether_it_goes_on(tmp_path: Path):
    given = load(None, ["name=mine", f"storage={tmp_path}"])
    assert tuner.resolve_study(given).name == "mine-study"
    never = load(None, ["name=mine", f"storage={tmp_path}", "search.resume=never"])
    assert tuner.resolve_study(never).name.startswith("mine-study-2")
    must = load(None, ["name=mine", f"storage={tmp_path}", "search.resume=must"])
    with pytest.raises(ConfigError, match=r"search\.resume: there is no search 'mine-study'"):
        tuner.resolve_study(must)
    (tmp_path / "mine-study").mkdir()
    (tmp_path / "mine-study" / "experiment.yaml").write_text("")
    assert tuner.resolve_study(must).name == "mine-study"


def test_a_name_that_leaves_no_room_for_that_of_the_best_training_is_refused_before_the_search():
    assert tuner.resolve_study(override(Experiment(), {"name": "x" * 189})).name.endswith("x-study")
    with pytest.raises(ConfigError, match=r"name: .*at most 200 characters"):
        tuner.resolve_study(override(Experiment(), {"name": "x" * 190}))


REFUSED = {
    "name": "a name of its own",
    "storage": "the search's folder",
    "data.root": "one set of clips",
    "data.cache_decoded": "one set of clips",
    "data.limits.frames": "one set of clips",
    "data.synthetic.training_clips": "one set of clips",
    "clip.fps": "one set of clips",
    "clip.frames": "one set of clips",
    "train.epochs": r"search\.epochs",
    "train.validate_every": "watched and kept",
    "train.keep_checkpoints": "watched and kept",
    "cluster.workers": r"search\.workers",
    "cluster.gpu": r"search\.workers",
    "tracking.experiment": "where runs are recorded",
    "evaluate.samples": "after the training",
    "search.epochs": "describes the search",
    "search.seed": "describes the search",
    "speed.profile": "only records a trace",
    "data.segments.frames": "what is stored",
    "data.segments.shortest_s": r"acts only with data\.segments\.frames above 0",
    "data.augment.pan": r"acts only with data\.augment\.crop below 1",
    "speed.sync_batch_norm": r"acts only with search\.workers above 1",
    "optim.discriminator_lr": "no discriminator",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_nothing_in_a_trial_cannot_be_searched(name: str):
    value = {"name": "a", "storage": "a", "data.root": "a", "tracking.experiment": "a"}.get(name, 1)
    with pytest.raises(ConfigError, match=rf"search\.space\.{name}: cannot be searched: .*{REFUSED[name]}"):
        tuner.check_search(searching(f"{{{name}: {{choice: [{value}]}}}}"))


def test_every_field_is_searchable_or_refused_with_a_reason():
    """Those of the sections that a trial learns by are accepted, and no other."""
    learnt = ("model.", "optim.", "data.augment.", "train.global_batch_size", "train.seed", "train.init_from", "speed.")
    words = ["model.kind=cgan", "search.workers=2", "data.augment.crop=0.9"]
    for name, value in flatten(load(None, words)).items():
        if not isinstance(value, bool | int | float | str):
            continue
        text = f"{{{name}: {{choice: [{str(value).lower() if isinstance(value, bool) else value}]}}}}"
        if name.startswith(learnt) and name not in ("speed.profile", "model.kind"):
            tuner.check_search(searching(text, *words))
        elif name != "model.kind":
            with pytest.raises(ConfigError, match=rf"search\.space\.{name}: cannot be searched: "):
                tuner.check_search(searching(text, *words))


def test_a_field_that_acts_because_another_is_searched_may_be_searched():
    tuner.check_search(searching("{data.augment.pan: {uniform: [0, 1]}, data.augment.crop: {uniform: [0.5, 1]}}"))
    space = "{data.segments.frames: {int: [4, 8]}, data.segments.shortest_s: {uniform: [0.2, 1]}}"
    tuner.check_search(searching(space, "model.kind=between", "data.segments.frames=6"))
    judged = "{model.adversarial_weight: {uniform: [0, 1]}, optim.discriminator_lr: {log_uniform: [1e-5, 1e-3]}}"
    tuner.check_search(searching(judged, "model.kind=between"))


@pytest.mark.parametrize(
    ("field", "spec", "message"),
    [
        ("optim.lr", "{choice: []}", "one value at least"),
        ("optim.lr", "{uniform: []}", "low, high"),
        ("optim.lr", "{}", "give one distribution"),
        ("optim.lr", "{choice: [1e-3, 1e-3]}", "each of them once"),
        ("optim.lr", "{choice: [[1e-3]]}", "numbers, words, true, false or null"),
        ("model.generator_widths", "{choice: [[2, 2, 2, 2, 2]]}", "numbers, words, true, false or null"),
        ("optim.lr", "{uniform: [a, b]}", r"optim\.lr"),
        ("optim.lr", "{uniform: [0.1, .nan]}", r"optim\.lr"),
        ("optim.lr", "{uniform: [0.1, .inf]}", r"optim\.lr"),
        ("optim.lr", "{choice: [true, 0.1]}", "valid number"),
        ("optim.max_grad_norm", "{uniform: [1, .inf]}", "finite"),
        ("optim.max_grad_norm", "{uniform: [null, 1]}", "needs numbers"),
        ("optim.schedule", "{uniform: [constant, cosine]}", "needs numbers; for others use choice"),
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
def test_what_a_field_cannot_be_searched_by_is_said_in_one_line(field: str, spec: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        tuner.check_search(searching(f"{{{field}: {spec}}}"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "spec", "words"),
    [
        ("model.self_ensemble", "{int: [1, 4]}", ["model.kind=between"]),  # 1, 2 or 4
        ("model.self_ensemble", "{uniform: [1, 2]}", ["model.kind=between"]),
    ],
)
def test_values_between_the_bounds_are_tried_too(field: str, spec: str, words: list[str]):
    with pytest.raises(ConfigError, match=rf"search\.space\.{field}: .* draws values that it cannot take"):
        tuner.check_search(searching(f"{{{field}: {spec}}}", *words))


def test_a_field_whose_default_is_none_may_be_searched():
    """The discriminator's rate is that of the generator where it is none; a norm that is not clipped is no number."""
    gan = ["model.kind=cgan", "optim.lr=1e-3"]
    rate = searching("{optim.discriminator_lr: {log_uniform: [1e-5, 1e-2]}}", *gan)
    assert reports_point(rate) == {"optim.discriminator_lr": 1e-4}
    assert tuner.initial_points(rate) == [{"optim.discriminator_lr": 1e-4}]
    assert reports_point(searching("{optim.max_grad_norm: {uniform: [0.1, 10]}}")) is None
    either = searching("{optim.max_grad_norm: {choice: [null, 1.0]}, model.batch_norm: {choice: [true, false]}}")
    assert reports_point(either) == {"optim.max_grad_norm": None, "model.batch_norm": True}
    assert distributions(either)["model.batch_norm"] == CategoricalDistribution((True, False))
    params = {"optim.discriminator_lr": "None", "optim.lr": "0.003"}  # as MLflow keeps them
    assert earlier_point(rate, "abc", params) == {"optim.discriminator_lr": 3e-3}
    assert earlier_point(either, "abc", {"optim.max_grad_norm": "None", "model.batch_norm": "False"}) == {
        "optim.max_grad_norm": None,
        "model.batch_norm": False,
    }
    with pytest.raises(ConfigError, match=r"search\.enqueue: the run 'abc' has other fields or values: .*batch_norm"):
        earlier_point(either, "abc", {"optim.max_grad_norm": "None", "model.batch_norm": "maybe"})


def test_a_population_with_a_mistake_in_its_space_is_told_so():
    words = ["search.sampler=pbt", "model.kind=between"]
    with pytest.raises(ConfigError, match=r"search\.space\.model\.adversarial_weight: give one distribution"):
        tuner.initial_points(searching("{model.adversarial_weight: {}}", *words))


NAMES = st.sampled_from([*flatten(load(None)), "optim.nothing", "optim", "", "a.b"])
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.floats(0, 2), st.integers(0, 99), st.text(max_size=4)),
    st.sampled_from(["cosine", "constant", "1e-3", "float32", "nan", "inf"]),
)
SPECS = st.dictionaries(
    st.sampled_from(["uniform", "log_uniform", "int", "choice"]),
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.lists(SCALARS, min_size=2, max_size=2)),
    max_size=2,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, SPECS, max_size=2), st.sampled_from(["cvae", "cgan", "between"]))
def test_any_space_is_refused_in_words_or_can_be_drawn_from(space: dict, kind: str):
    try:
        asked = override(load(None, [f"model.kind={kind}"]), {"search.space": space})
        tuner.initial_points(asked)
    except ConfigError:
        return
    drawn = distributions(asked)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(5):
        override(asked, study.ask(drawn).params)


def test_combinations_are_counted_and_untried_ones_found():
    space = distributions(searching("{model.latent: {int: [2, 4]}, optim.schedule: {choice: [constant, cosine]}}"))
    assert combinations(space) == 6
    assert combinations({**space, "optim.lr": FloatDistribution(0.1, 1)}) is None
    tried: set[tuple] = set()
    for _ in range(6):
        point = untried(space, tried, random.Random(0))
        tried.add(key_of(point, space))
    assert tried == {(latent, schedule) for latent in (2, 3, 4) for schedule in ("constant", "cosine")}
    large = {"a": IntDistribution(0, 10**9)}
    assert untried(large, {(5,)}, random.Random(0)).keys() == {"a"}
    assert tuner.most_trials(searching("{train.global_batch_size: {choice: [4, 8]}}")) == 2
    assert tuner.most_trials(searching("{optim.lr: {uniform: [0.1, 1]}}")) == 12


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        *[("val/l2_paper", "minimize"), ("val/psnr", "maximize"), ("val/skill", "maximize"), ("val/blur", "minimize")],
        *[("train/kl", "minimize"), ("speed/step_ms", "minimize"), ("speed/clips_per_s", "maximize")],
    ],
)
def test_a_metric_is_optimised_in_its_own_direction(metric: str, better: str):
    asked = searching("{optim.lr: {uniform: [0.1, 1]}}", f"search.metric={metric}")
    tuner.check_search(asked)
    assert tuner.objectives(asked.search) == {metric: better}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search.metric=val/pnsr"], r"search\.metric: no such metric.*did you mean 'val/psnr'"),
        (["search.metric=psnr"], r"did you mean 'val/psnr'"),
        (["search.metric=time_total_s"], r"no such metric.*known: "),
        (["search.metric=val/ssim"], r"no such metric"),
        (["search.metric=train/d_real", "model.kind=cgan"], r"search\.objectives=\{train/d_real: maximize\}"),
        (["search.metric=train/g_loss"], r"search\.metric: a training with model\.kind=cvae does not report it"),
        (["search.objectives={val/sharp: maximize, val/psnr: maximize}"], r"search\.objectives: .*does not report it"),
        (
            ["search.metric=train/loss", "search.space={model.ends_weight: {uniform: [0, 1]}}"],
            r"train/loss is computed from model\.ends_weight",
        ),
        (
            [
                *("search.metric=train/d_loss", "model.kind=between", "model.adversarial_weight=1"),
                "search.space={model.adversarial_weight: {choice: [0, 1]}}",
            ],
            r"a training with model\.adversarial_weight=0 does not report it",
        ),
    ],
)
def test_a_metric_that_cannot_be_compared_is_refused_before_anything_starts(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        tuner.initial_points(searching("{optim.lr: {uniform: [0.1, 1]}}", *words))


def test_the_direction_of_a_metric_without_one_can_be_stated():
    words = ["search.objectives={train/d_real: maximize}", "model.kind=cgan"]
    asked = searching("{optim.lr: {uniform: [0.1, 1]}}", *words)
    tuner.check_search(asked)
    assert tuner.objectives(asked.search) == {"train/d_real": "maximize"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cvae", []),
        ("between", []),
        ("between", ["model.posterior_fraction=0"]),
        ("between", ["model.adversarial_weight=1", "model.discriminator_widths=[2, 2, 2]"]),
        ("between", ["model.adversarial_weight=1", "model.adversarial_from_step=1"]),
        ("cgan", []),
        ("two_stream", ["model.widths=[2, 2, 2, 2]"]),
        ("direct_3d", ["model.generator_widths=[2, 2, 2]", "model.discriminator_widths=[2, 2, 2, 2]"]),
    ],
)
def test_what_a_training_reports_is_known(kind: str, words: list[str]):
    """Against a step of each learner, as the meter names its losses, and the loop's own validation."""
    clip = ["clip.frames=6", "clip.height=32", "clip.width=32"] if kind in ("cvae", "between", "cgan") else []
    narrow: dict[str, dict[str, Any]] = {
        "cvae": TINY,
        "between": {"model.widths": (4, 6, 8), "model.latent": 2},
        "cgan": {"model.image_widths": (2, 2, 2, 2), "model.generator_widths": (2, 2, 2, 2, 2)},
        "direct_3d": {"model.image_widths": (2, 2, 2, 2), "model.latent_width": 2},
    }
    asked = override(
        load(None, [f"model.kind={kind}", "train.global_batch_size=2", *clip, *words]), narrow.get(kind, {})
    )
    learner = learners.build(asked, torch.device("cpu"))
    size = (asked.clip.frames, asked.clip.height, asked.clip.width)
    clips = torch.randint(0, 255, (2, *size, 3), dtype=torch.uint8)
    times = torch.linspace(0, 1, size[0]).expand(2, -1)
    meter = ThroughputMonitor({}, 2, torch.device("cpu"))
    meter.add(0, learner.update(clips, times, torch.arange(2)), 2)

    class Clips:
        ids: ClassVar = ["a", "b"]

        def split_indices(self, split: str) -> np.ndarray:
            return np.arange(2)

        def get_clips(self, rows: np.ndarray) -> np.ndarray:
            return clips.numpy()[rows]

    store: Any = Clips()
    measured = train_loop.validate(lambda start, end, ids: clips, store, 2, torch.device("cpu"))
    known = {name for name in reported_by(asked) if name not in ("speed/gpu_memory_gb", "speed/model_flop_utilisation")}
    assert {**meter.compute(), **measured}.keys() == known


@pytest.mark.parametrize(
    ("space", "words", "message"),
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
def test_values_with_which_a_training_cannot_run_are_refused(
    space: str, words: list[str], message: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=rf"search\.space: {message}"):
        tuner.check_trainings(searching(space, f"storage={tmp_path}", *words))


@pytest.mark.parametrize(
    "space",
    [
        "{data.augment.pan: {uniform: [0.1, 0.5]}, data.augment.crop: {uniform: [0.5, 1]}}",
        "{model.batch_norm: {choice: [true, false]}, model.image_batch_statistics: {choice: [true, false]}}",
        "{train.global_batch_size: {int: [2, 40]}}",
    ],
)
def test_what_has_no_effect_in_some_trials_only_may_be_searched(space: str, tmp_path: Path):
    tuner.check_trainings(searching(space, f"storage={tmp_path}"))


def test_patience_with_several_objectives_is_refused():
    words = ["search.objectives={val/skill: maximize, val/blur: minimize}", "search.patience=3"]
    with pytest.raises(ConfigError, match=r"search\.patience: has no effect with several"):
        tuner.check_search(searching("{optim.lr: {uniform: [0.1, 1]}}", *words))
