from pathlib import Path

import pytest
import yaml

from giffy_ray.config import (
    BetweenConfig,
    ConfigError,
    CVAEConfig,
    Experiment,
    differences,
    flatten,
    from_yaml,
    load,
    override,
    to_yaml,
)

EXPERIMENTS = sorted((Path(__file__).parent.parent / "jobs" / "experiments").glob("*.yaml"))


def test_the_defaults_are_the_reports_values():
    experiment = Experiment()
    assert experiment.model.reconstruction_weight == experiment.model.ends_weight == 2.0
    assert (experiment.optim.lr, experiment.optim.beta1) == (1e-4, 0.8)
    assert (experiment.train.batch, experiment.train.epochs) == (20, 100)
    assert (experiment.clip.frames, experiment.clip.height, experiment.clip.width) == (30, 64, 64)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_loads(path: Path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert experiment != Experiment()


def test_words_override_the_file(tmp_path: Path):
    (tmp_path / "small.yaml").write_text("name: small\noptim: {lr: 1e-3}\n")
    experiment = load(tmp_path / "small.yaml", ["optim.lr=3e-4", "data.categories=[erupting, skiing]"])
    assert (experiment.name, experiment.optim.lr) == ("small", 3e-4)
    assert experiment.data.categories == ("erupting", "skiing")


@pytest.mark.parametrize(
    ("word", "field", "value", "nearest"),
    [
        ("optm.lr=3", "optm.lr", "3", "'optim.lr'"),
        ("optim.lrr=3", "optim.lrr", "3", "'optim.lr'"),
        ("train.lr=1", "train.lr", "1", "'optim.lr'"),
        ("modle.latent=8", "modle.latent", "8", "'model.latent'"),
        ("model.label_smoothing=0.9", "model.label_smoothing", "0.9", "model."),
        ("name.of=x", "name.of", "'x'", "'name'"),
        ("optim.lr=fast", "optim.lr", "'fast'", "number"),
        ("optim.lr=.inf", "optim.lr", "inf", "finite"),
        ("train.batch=0", "train.batch", "0", "greater than 0"),
        ("train.epochs=2.5", "train.epochs", "2.5", "integer"),
        ("model.kind=cvea", "model.kind", "'cvea'", "'cvae'"),
        ("model.video_widths=[8, 8]", "model.video_widths", "", "required"),
        ("optim=3", "optim", "3", "section"),
        ("name=a b", "name", "'a b'", "pattern"),
    ],
)
def test_a_mistake_names_field_value_and_what_would_do(word: str, field: str, value: str, nearest: str):
    with pytest.raises(ConfigError) as raised:
        load(None, [word])
    message = str(raised.value)
    assert message.startswith(field)
    assert value in message
    assert nearest in message


def test_another_kind_of_model_has_its_own_fields_and_defaults(tmp_path: Path):
    between = load(None, ["model.kind=between", "model.latent=2"])
    assert between.model == BetweenConfig(latent=2)
    assert from_yaml(to_yaml(between)) == between
    assert yaml.safe_load(differences(between)) == {"model": {"kind": "between", "latent": 2}}
    with pytest.raises(ConfigError, match=r"model\.latend: no such field \(value 7\); did you mean 'model\.latent'"):
        override(between, {"model.latend": 7})
    (tmp_path / "file.yaml").write_text("model: {latent: 7}\n")
    assert load(tmp_path / "file.yaml").model == CVAEConfig(latent=7)  # the report's where none is named


def test_a_misspelt_section_in_a_file_is_as_clear_as_a_word(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("optimiser: {lr: 1e-3}\n")
    with pytest.raises(ConfigError, match=r"optimiser.lr: no such field.*'optim.lr'"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1"])
def test_a_file_that_is_no_experiment_is_named(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load(tmp_path / "missing.yaml")


def test_a_word_without_a_value_is_shown():
    with pytest.raises(ConfigError, match=r"'train\.epochs'"):
        load(None, ["train.epochs"])


def test_flatten_and_override_are_inverse():
    experiment = load(EXPERIMENTS[0], ["search.space={optim.lr: {log_uniform: [1e-4, 1e-2]}}"])
    assert override(Experiment(), flatten(experiment)) == experiment
    assert flatten(experiment)["search.space"] == {"optim.lr": {"log_uniform": (1e-4, 1e-2)}}


def test_yaml_round_trip_full_and_differences(tmp_path: Path):
    experiment = load(EXPERIMENTS[0], ["optim.lr=3e-4"])
    assert from_yaml(to_yaml(experiment)) == experiment
    (tmp_path / "short.yaml").write_text(differences(experiment))
    assert load(tmp_path / "short.yaml") == experiment
    assert len(differences(experiment)) < len(to_yaml(experiment))


def test_override_does_not_change_its_argument():
    experiment = Experiment()
    assert override(experiment, {"optim.lr": 1.0}).optim.lr == 1.0
    assert experiment.optim.lr == 1e-4
