from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from giffy_ray.config import (
    BetweenConfig,
    ConfigError,
    CVAEConfig,
    Experiment,
    check_required_fields,
    flatten,
    from_yaml,
    load,
    override,
    to_minimal_yaml,
    to_yaml,
)
from tests.conftest import ROOT

EXPERIMENTS = sorted((ROOT / "giffy_ray" / "experiments").glob("*.yaml"))


def test_the_defaults_are_the_papers_values():
    experiment = Experiment()
    assert experiment.model.reconstruction_weight == experiment.model.ends_weight == 2.0
    assert (experiment.optim.lr, experiment.optim.beta1) == (1e-4, 0.8)
    assert (experiment.train.global_batch_size, experiment.train.epochs) == (20, 100)
    assert (experiment.clip.frames, experiment.clip.height, experiment.clip.width) == (30, 64, 64)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_loads(path: Path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert experiment != Experiment()


def test_overrides_take_precedence_over_the_file(tmp_path: Path):
    (tmp_path / "small.yaml").write_text("name: small\noptim: {lr: 1e-3}\n")
    experiment = load(tmp_path / "small.yaml", ["optim.lr=3e-4", "data.categories=[erupting, skiing]"])
    assert (experiment.name, experiment.optim.lr) == ("small", 3e-4)
    assert experiment.data.categories == ("erupting", "skiing")


@pytest.mark.parametrize(
    ("text", "field", "value", "suggestion"),
    [
        ("optm.lr=3", "optm.lr", "3", "'optim.lr'"),
        ("optim.lrr=3", "optim.lrr", "3", "'optim.lr'"),
        ("train.lr=1", "train.lr", "1", "'optim.lr'"),
        ("modle.latent=8", "modle.latent", "8", "'model.latent'"),
        ("model.label_smoothing=0.9", "model.label_smoothing", "0.9", "model."),
        ("name.of=x", "name.of", "'x'", "'name'"),
        ("optim.lr=fast", "optim.lr", "'fast'", "number"),
        ("optim.lr=.inf", "optim.lr", "inf", "finite"),
        ("train.global_batch_size=0", "train.global_batch_size", "0", "greater than 0"),
        ("train.epochs=2.5", "train.epochs", "2.5", "integer"),
        ("model.kind=cvea", "model.kind", "'cvea'", "'cvae'"),
        ("model.video_widths=[8, 8]", "model.video_widths", "", "too few values"),
        ("optim=3", "optim", "3", "section"),
        ("name=a b", "name", "'a b'", "pattern"),
        (f"name={'x' * 201}", "name", "xxx", "at most 200 characters"),
    ],
)
def test_an_error_names_the_field_the_value_and_a_valid_alternative(text: str, field: str, value: str, suggestion: str):
    with pytest.raises(ConfigError) as raised:
        load(None, [text])
    message = str(raised.value)
    assert message.startswith(field)
    assert value in message
    assert suggestion in message


def test_each_kind_of_model_has_its_own_fields_and_defaults(tmp_path: Path):
    between = load(None, ["model.kind=between", "model.latent=2"])
    assert between.model == BetweenConfig(latent=2)
    assert from_yaml(to_yaml(between)) == between
    assert yaml.safe_load(to_minimal_yaml(between)) == {"model": {"kind": "between", "latent": 2}}
    with pytest.raises(ConfigError, match=r"model\.latend: no such field \(value 7\); did you mean 'model\.latent'"):
        override(between, {"model.latend": 7})
    (tmp_path / "file.yaml").write_text("model: {latent: 7}\n")
    assert load(tmp_path / "file.yaml").model == CVAEConfig(latent=7)  # the default kind


def test_a_misspelled_section_in_a_file_suggests_the_valid_field(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("optimiser: {lr: 1e-3}\n")
    with pytest.raises(ConfigError, match=r"optimiser.lr: no such field.*'optim.lr'"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1"])
def test_an_error_names_a_file_that_is_not_an_experiment(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load(tmp_path / "missing.yaml")


def test_an_override_without_a_value_is_rejected():
    with pytest.raises(ConfigError, match=r"'train\.epochs'"):
        load(None, ["train.epochs"])


def test_override_inverts_flatten():
    experiment = load(EXPERIMENTS[0], ["search.space={optim.lr: {log_uniform: [1e-4, 1e-2]}}"])
    assert override(Experiment(), flatten(experiment)) == experiment
    assert flatten(experiment)["search.space"] == {"optim.lr": {"log_uniform": (1e-4, 1e-2)}}


def test_full_and_minimal_yaml_restore_the_experiment(tmp_path: Path):
    experiment = load(EXPERIMENTS[0], ["optim.lr=3e-4"])
    assert from_yaml(to_yaml(experiment)) == experiment
    (tmp_path / "short.yaml").write_text(to_minimal_yaml(experiment))
    assert load(tmp_path / "short.yaml") == experiment
    assert len(to_minimal_yaml(experiment)) < len(to_yaml(experiment))


def test_override_does_not_change_its_argument():
    experiment = Experiment()
    assert override(experiment, {"optim.lr": 1.0}).optim.lr == 1.0
    assert experiment.optim.lr == 1e-4


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("storage=/data/runs #1", "/data/runs #1"),
        ("storage=/data/a: b", "/data/a: b"),
        ("storage=~/runs", f"{HOME}/runs"),
        ("storage=S3://bucket/runs", "s3://bucket/runs"),
        ("storage=file:///data/my%20runs", "/data/my runs"),
        ("data.root=~", HOME),
        ("data.root=null", None),
        ("name=1", "1"),
        ("name=010", "010"),
        ("name=1e3", "1e3"),
        ("name=on", "on"),
        ("name=2024-01-02", "2024-01-02"),
        ("tracking.experiment=[a]", "[a]"),
        ("tracking.experiment='a'", "'a'"),
        ("data.categories=skiing", ("skiing",)),
        ("data.categories=a, b", ("a", "b")),
        ("data.categories=[a, b]", ("a", "b")),
        ("data.categories=[on, 1, 010, 1:30, 2024-01-02, 'null']", ("on", "1", "010", "1:30", "2024-01-02", "null")),
        ("data.categories=[]", ()),
        ("evaluate.runs=~/run,models:/giffy_ray@champion", (f"{HOME}/run", "models:/giffy_ray@champion")),
        ("evaluate.weights={lpips: ~/lpips.pt}", {"lpips": f"{HOME}/lpips.pt"}),
        ("train.epochs=010", 10),
        ("train.epochs=1e3", 1000),
        ("train.epochs=1_000", 1000),
        ("optim.lr=1e-4", 1e-4),
        ("optim.discriminator_lr=null", None),
        ("cluster.workers=2,8", (2, 8)),
        ("cluster.gpu=off", False),
        ("data.max_videos={on: {training: 5}}", {"on": {"training": 5}}),
        ("search.space={optim.lr: {choice: [1e-4, 1]}}", {"optim.lr": {"choice": (1e-4, 1)}}),
        ("search.space={speed.compile: {choice: [on, off]}}", {"speed.compile": {"choice": (True, False)}}),
        (
            "search.space={optim.schedule: {choice: [constant, cosine]}}",
            {"optim.schedule": {"choice": ("constant", "cosine")}},
        ),
    ],
)
def test_the_type_of_a_field_decides_how_an_override_is_parsed(text: str, value: object):
    field = text.partition("=")[0]
    assert flatten(load(None, [text]))[field] == value
    assert from_yaml(to_yaml(load(None, [text]))) == load(None, [text])


@pytest.mark.parametrize(
    "field", ["data.root", "storage", "name", "optim.lr", "cluster.gpu", "data.categories", "data.max_videos"]
)
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_value_is_rejected(field: str, text: str):
    with pytest.raises(ConfigError, match=rf"^{field}: is empty; set {field}=VALUE"):
        load(None, [f"{field}={text}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storage=null", "storage: must not be null"),
        ("data.root=~nobody-here/x", "data.root: there is no home folder ~nobody-here"),
        ("data.categories=a,", "data.categories: is empty"),
        ("data.categories=[a] #1", "data.categories: unexpected '#1' after the value"),
        ("data.categories=[a #1, b]", r"data.categories: invalid YAML: .*value '\[a #1, b\]'"),
        ("data.categories=[~]", "data.categories: ~ is ambiguous"),
        ("data.max_videos={a: {training: 1}, a: {training: 2}}", "data.max_videos.a: is given twice"),
        ("data.root=\udcff", "data.root: is not valid UTF-8 text"),
        ("storage=https://host/runs", "storage: https:// is not supported; expected a folder, s3://"),
        ("storage=abfs://container@account/runs", "storage: abfs:// is not supported"),
        ("storage=hdfs://host/runs", "storage: hdfs:// is not supported"),
        ("storage=s3:/bucket/runs", "storage: an address begins with s3://"),
        ("storage=s3:bucket/runs", "storage: an address begins with s3://"),
        ("storage=s3:///runs", "storage: '' is not a bucket name"),
        ("storage=s3://bucket/runs?endpoint_override=localhost:1", "storage: options in the address.*AWS_ENDPOINT_URL"),
        ("storage=file://host/runs", "storage: expected file:///FOLDER"),
        ("data.root=https://host/videos", "data.root: https:// is not supported"),
        ("train.init_from=ftp://host/x", "train.init_from: ftp:// is not supported"),
        ("evaluate.runs=[a, http://host/x]", "evaluate.runs.1: http:// is not supported"),
        ("tracking.uri=127.0.0.1:5000", "tracking.uri: has no URI scheme; use http://127.0.0.1:5000 "),
        ("tracking.uri=./mlruns", "tracking.uri: has no URI scheme; use http://HOST:PORT or sqlite:"),
        ("tracking.uri=htp://host:5000", "tracking.uri: MLflow does not support htp://"),
        ("tracking.uri=http://host:port", "tracking.uri: the port is not a number"),
        ("tracking.uri=http://", "tracking.uri: has no server"),
        ("train.seed=4294967296", "train.seed: .*less than 2147483648"),
        ("search.seed=-1", "search.seed: .*greater than or equal to 0"),
        ("cluster.workers=[3, 2]", r"^cluster.workers: expected \[min, max\] with min <= max \(value \[3, 2\]\)$"),
        ("search.gpus_per_worker=1.5", r"^search.gpus_per_worker: must be a whole number above 1, .*\(value 1.5\)$"),
        (
            "search.space={optim.lr: {choice: [{a: 1}]}}",
            r"^search.space.optim.lr.choice.0: must be a number, text, true, false or null \(value \{'a': ",
        ),
    ],
)
def test_an_invalid_value_is_rejected_in_one_line(text: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        load(None, [text])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "storage=s3://AKIA:hush/hush@bucket/runs",
        "data.root=s3://AKIA:hush@bucket",
        "train.init_from=abfs://AKIA:hush/hush@container/x",
        "tracking.uri=htp://me:hush/hush@host",
        "storge=s3://AKIA:hush@bucket",
    ],
)
def test_messages_hide_passwords(text: str):
    with pytest.raises(ConfigError) as raised:
        load(None, [text])
    assert "hush" not in str(raised.value)


def test_a_tracking_uri_may_contain_a_password():
    uri = "http://me:p%40ss@host:5000"
    assert load(None, [f"tracking.uri={uri}"]).tracking.uri == uri


def test_the_last_override_of_a_field_wins():
    experiment = load(None, ["optim.lr=1", "optim={lr: 2, beta1: 0.5}", "optim.beta1=0.6"])
    assert (experiment.optim.lr, experiment.optim.beta1) == (2, 0.6)
    # An override of a section keeps the fields that it does not name.
    assert load(None, ["optim.ema_decay=0.5", "optim={lr: 2}"]).optim.ema_decay == 0.5


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("name: 2024-01-02", "name", "2024-01-02"),
        ("name: on", "name", "on"),
        ("name: 1", "name", "1"),
        ("name: 1_000", "name", "1_000"),
        ("data: {categories: [on, 1, 010, 1:30]}", "data.categories", ("on", "1", "010", "1:30")),
        ("data: {root: null}", "data.root", None),
        ("data: {root: 'null'}", "data.root", "null"),
        ("optim: {lr: 1e-4}", "optim.lr", 1e-4),
        ("train: {epochs: 010}", "train.epochs", 10),
        ("train: {epochs: 0x10}", "train.epochs", 16),
        ("\ufeffname: mark", "name", "mark"),
        ("name: !!str 5", "name", "5"),
        ("clip: &c {frames: 5}\nname: x", "clip.frames", 5),
        ("model: {image_widths: &w [8, 8, 8, 8], video_widths: *w}", "model.video_widths", (8, 8, 8, 8)),
        ("optim: {<<: {lr: 0.5, beta1: 0.3}, beta1: 0.1}", "optim.beta1", 0.1),
        ("optim: {<<: {lr: 0.5, beta1: 0.3}, beta1: 0.1}", "optim.lr", 0.5),
    ],
)
def test_the_type_of_a_field_decides_how_a_file_is_parsed(tmp_path: Path, text: str, field: str, value: object):
    (tmp_path / "file.yaml").write_text(text)
    assert flatten(load(tmp_path / "file.yaml"))[field] == value


# Each line holds nine aliases of the line before: 9**9 values once expanded.
ALIAS_BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"optim: {lr: 1}\nname: x\noptim: {beta1: 0.5}", "line 3: optim: is given twice (also on line 1)"),
        (b"optim:\n  lr: 1\n  lr: 2", "line 3: optim.lr: is given twice (also on line 2)"),
        (b"name: a\nname: a", "line 2: name: is given twice (also on line 1)"),
        (b"name: x\ndata: {root: caf\xe9}", "line 2: is not valid UTF-8 (byte 0xe9)"),
        ("name: x".encode("utf-16"), "line 1: is not valid UTF-8 (byte 0xff)"),
        (b"name: a\n---\nname: b", "line 2, column 1: invalid YAML: but found another document"),
        (b"optim:\n\tlr: 1", "line 2, column 1: invalid YAML: found character"),
        (b"name: x\0", "invalid YAML: special characters are not allowed"),
        (b"[a]: 1", "line 1: a key must be a name"),
        (b"data: {root: ~}", "line 1: data.root: ~ is ambiguous"),
        (b"data:\n  root:\n", "line 2: data.root: is empty; set a value, or null"),
        (b"data: {root: ''}", "line 1: data.root: is empty"),
        (b"optim:", "line 1: optim: is empty"),
        (b"name: !!python/name:os.system x", "line 1: name: YAML tags are not supported"),
        (b"name: &a [*a]", "nested too deeply"),
        (b"optim: &a {<<: *a}", "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"- a", "expected sections such as 'optim:', found a list"),
        (b"just words", "expected sections such as 'optim:', found 'just words'"),
        (ALIAS_BOMB.encode(), "more than 20000 values"),
        (b"x" * 2**21, "is larger than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_file_is_rejected_in_one_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "bad.yaml")
    assert str(raised.value).startswith(f"{tmp_path}/bad.yaml: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_and_devices_are_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"^{tmp_path}: is a folder"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"^/dev/zero: is larger than"):
        load("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read"):
        load("/proc/self/mem")
    with pytest.raises(ConfigError, match="cannot be read"):
        load("a\0b")


def test_a_dotted_name_in_a_file_is_rejected_with_the_section_to_write(tmp_path: Path):
    (tmp_path / "dotted.yaml").write_text("optim.lr: 3\n")
    with pytest.raises(
        ConfigError, match=r"optim.lr: dotted names are for overrides; in a file, write optim: \{lr: 3\}"
    ):
        load(tmp_path / "dotted.yaml")


def test_own_videos_requires_a_data_root():
    path = EXPERIMENTS[0].parent / "own-videos.yaml"
    with pytest.raises(ConfigError, match=r"^data.root: is required by this experiment; set data.root=/path/to/videos"):
        check_required_fields(load(path))
    check_required_fields(load(path, ["data.root=/videos"]))
    check_required_fields(load(path, ["data.root=null"]))  # explicitly: the built-in dataset


FIELD_NAMES = sorted(
    {*flatten(Experiment()), *flatten(load(None, ["model.kind=between"])), "optim", "model", "data.max_videos.x", "a.b"}
)
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from("[]{}:,#&*!|>'\"%@`~-? \n\t=.0123456789eon/s")), max_size=30)


@given(st.lists(st.tuples(st.one_of(st.sampled_from(FIELD_NAMES), TEXTS), TEXTS), max_size=3))
@example([("optim", "{lr: 1}"), ("optim.lr", "{a: b}")])
@example([("model", "[1]"), ("model.kind", "between")])
def test_overrides_raise_only_config_errors(pairs: list[tuple[str, str]]):
    try:
        experiment = load(None, [f"{field}={text}" for field, text in pairs])
    except ConfigError:
        return
    assert from_yaml(to_yaml(experiment)) == experiment


@given(
    st.one_of(
        TEXTS,
        st.lists(st.tuples(st.sampled_from(FIELD_NAMES), TEXTS)).map(
            lambda pairs: "\n".join(
                f"{field.replace('.', ': {')}: {text}{'}' * field.count('.')}" for field, text in pairs
            )
        ),
    )
)
def test_files_raise_only_config_errors(text: str):
    try:
        experiment = from_yaml(text)
    except ConfigError:
        return
    assert from_yaml(to_yaml(experiment)) == experiment


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("null ")
@example("# a")
@example("a #1")
def test_a_text_field_takes_its_text_literally(text: str):
    if not text.strip() or text in ("null", "Null", "NULL"):
        return
    experiment = load(None, [f"tracking.experiment={text}"])
    assert experiment.tracking.experiment == text
    assert from_yaml(to_yaml(experiment)) == experiment


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("train.epochs=true", "train: {epochs: true}"),
        ("data.augment.crop=True", "data: {augment: {crop: True}}"),
        ("cluster.workers=false", "cluster: {workers: false}"),
    ],
)
def test_a_number_field_rejects_booleans(text: str, file: str, tmp_path: Path):
    (tmp_path / "experiment.yaml").write_text(file)
    for path, overrides in ((None, [text]), (tmp_path / "experiment.yaml", [])):
        with pytest.raises(ConfigError, match=text.partition("=")[0]):
            load(path, overrides)


@pytest.mark.parametrize(
    "text", ["cluster.workers=x", "cluster.workers=[1]", "data.segments.frames=1", "model.image_widths=8,8"]
)
def test_an_error_in_a_field_with_several_types_is_one_line(text: str):
    with pytest.raises(ConfigError) as raised:
        load(None, [text])
    (line,) = str(raised.value).splitlines()
    assert line.startswith(text.partition("=")[0] + ": ")
    assert "constrained-int" not in line
    assert "literal[0]" not in line


@pytest.mark.parametrize(
    "field", ["clip.frames", "train.epochs", "model.latent", "optim.warmup_steps", "search.trials"]
)
def test_a_count_is_limited_to_32_bits(field: str):
    with pytest.raises(ConfigError, match=rf"{field}: .*less than 2147483648"):
        load(None, [f"{field}=99999999999999999999"])


def test_an_empty_document_gives_the_defaults(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("---\n")
    assert load(tmp_path / "empty.yaml") == Experiment()


def test_a_search_space_may_contain_null():
    space = "{model.frame_weight: {choice: [null, 1]}}"
    assert load(None, ["model.kind=two_stream", f"search.space={space}"]).search.space == {
        "model.frame_weight": {"choice": (None, 1)}
    }
