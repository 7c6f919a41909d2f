"""Checkpoints come back bit by bit, or are refused by name."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from torch import nn

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.core.run_lock import RunLockLost
from giffy_ray.core.storage import filesystem_of
from giffy_ray.training import checkpoints, learners, train_loop
from giffy_ray.training.checkpoints import DamagedCheckpoint, TrainState
from giffy_ray.training.learners import Learner
from tests.test_experiments import BATCH, EXPERIMENTS, TINY, moving_squares

ONE_OF_EACH_KIND = list({load(path).model.kind: path for path in EXPERIMENTS}.values())


def cut_down(path: Path) -> Experiment:
    experiment = load(path)
    changes = {"train.global_batch_size": BATCH, "cluster.workers": 1, "optim.ema_decay": 0.9, "name": "run"}
    return override(experiment, TINY[experiment.model.kind] | changes)


def step(learner: Learner, experiment: Experiment, number: int) -> dict[str, torch.Tensor]:
    clip = experiment.clip
    times = torch.linspace(0, 1, clip.frames).expand(BATCH, -1)
    positions = torch.arange(number * BATCH, (number + 1) * BATCH)
    return learner.update(moving_squares(clip.frames, clip.height, clip.width), times, positions)


def built(experiment: Experiment) -> Learner:
    return learners.build(experiment, torch.device("cpu"), steps=10)


def assert_equal_weights(one: Learner, other: Learner) -> None:
    for name, network in one.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, other.networks[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize("path", ONE_OF_EACH_KIND, ids=lambda path: path.stem)
def test_a_restored_training_goes_on_bit_by_bit(path: Path, tmp_path: Path):
    experiment = cut_down(path)
    learner = built(experiment)
    for number in range(2):
        step(learner, experiment, number)
    position = TrainState(2, {"val/psnr": 20.5}, {"loss": 0.1 + 0.2})
    checkpoints.Snapshot(learner, experiment, position).save(tmp_path)

    restored = built(override(experiment, {"train.seed": 1}))
    assert checkpoints.restore(str(tmp_path), restored) == position
    assert_equal_weights(learner, restored)
    restored.experiment = experiment  # type: ignore[attr-defined]  # of the other seed only the weights were wanted
    for number in range(2, 4):
        ours, theirs = step(learner, experiment, number), step(restored, experiment, number)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_equal_weights(learner, restored)


class Bare:
    """What of a learner a checkpoint holds: one parameter and its optimiser."""

    latent = 0

    def __init__(self, optimizer: type[torch.optim.Optimizer], size: int = 3, **settings):
        torch.manual_seed(0)
        network = torch.nn.Linear(size, 2, dtype=torch.float64)
        self.networks, self.optimizers = {"net": network}, {"net": optimizer(network.parameters(), **settings)}

    def descend(self) -> None:
        self.optimizers["net"].zero_grad()
        self.networks["net"](torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
        self.optimizers["net"].step()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.3, 0.99), "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Rprop, {"lr": 0.1}),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_what_an_optimizer_holds_comes_back_as_it_was(optimizer, settings, steps: int, tmp_path: Path):
    ours, theirs = Bare(optimizer, **settings), Bare(optimizer, **settings)
    for _ in range(steps):
        ours.descend()
    checkpoints.Snapshot(ours, Experiment(), TrainState(steps)).save(tmp_path)  # type: ignore[arg-type]
    checkpoints.restore(str(tmp_path), theirs)  # type: ignore[arg-type]
    before, after = ours.optimizers["net"].state_dict(), theirs.optimizers["net"].state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, of_parameter in before["state"].items():
        assert of_parameter.keys() == after["state"][index].keys()
        for key, value in of_parameter.items():
            found = after["state"][index][key]
            assert (
                torch.equal(value, found) and value.dtype == found.dtype if torch.is_tensor(value) else value == found
            )


def test_the_optimizer_of_another_experiment_is_refused(tmp_path: Path):
    ours = Bare(torch.optim.AdamW)
    ours.descend()
    checkpoints.Snapshot(ours, Experiment(), TrainState(1)).save(tmp_path)  # type: ignore[arg-type]
    theirs = Bare(torch.optim.AdamW, size=4)
    theirs.networks = {}
    with pytest.raises(ValueError, match=r"optimizer 'net', parameter 0.*\[2, 3\].*\[2, 4\]"):
        checkpoints.restore(str(tmp_path), theirs)  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def folder(tiny: Experiment, tmp_path: Path) -> Path:
    """A run with two checkpoints; this is the newer."""
    learner = built(override(tiny, {"name": "run"}))
    for steps, name in ((1, "checkpoint_1"), (2, "checkpoint_2")):
        place = tmp_path / "run" / name
        place.mkdir(parents=True)
        checkpoints.Snapshot(learner, tiny, TrainState(steps, {"val/psnr": 30.0 - steps})).save(place)
    return place


def run_of(folder: Path) -> Experiment:
    return override(Experiment(), {"storage": str(folder.parent.parent), "name": "run"})


@pytest.mark.parametrize("name", ["cvae.safetensors", "optimizers.safetensors", "position.json", "experiment.yaml"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "bytes, not"), (flip_a_bit, "sha256 differs"), (Path.unlink, "is missing")],
    ids=["truncated", "a bit flipped", "missing"],
)
def test_a_damaged_file_is_told_and_the_checkpoint_before_it_is_used(
    name: str, damage, words: str, folder: Path, caplog: pytest.LogCaptureFixture
):
    damage(folder / name)
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint_2/{name}.*{words}"):
        checkpoints.verify(str(folder))
    assert checkpoints.latest_checkpoint(run_of(folder)).endswith("checkpoint_1")
    assert checkpoints.latest_resumable(run_of(folder)) == str(folder.parent / "checkpoint_1")
    assert name in caplog.text and words in caplog.text


@pytest.mark.parametrize("name", ["cvae.safetensors", "optimizers.safetensors"])
def test_nothing_of_a_damaged_file_is_loaded(name: str, folder: Path, tiny: Experiment):
    flip_a_bit(folder / name)
    learner = built(tiny)
    before = {key: value.clone() for key, value in learner.networks["cvae"].state_dict().items()}
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoints.restore(str(folder), learner)
    assert all(torch.equal(value, before[key]) for key, value in learner.networks["cvae"].state_dict().items())
    if name == "cvae.safetensors":
        with pytest.raises(DamagedCheckpoint, match=name):
            checkpoints.load(str(folder))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"../cvae": {"bytes": 1, "sha256": ""}}}'],
)
def test_a_manifest_that_is_none_is_refused(text: str, folder: Path):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint_2/manifest\.json"):
        checkpoints.verify(str(folder))


def test_a_manifest_has_to_name_what_is_loaded(folder: Path):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    del files["cvae.safetensors"]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(DamagedCheckpoint, match=r"does not name cvae\.safetensors"):
        checkpoints.load(str(folder))


def test_files_beside_those_of_the_manifest_do_no_harm(folder: Path):
    (folder / ".DS_Store").write_text("")
    checkpoints.verify(str(folder))


class Cut(Exception):
    pass


@pytest.mark.parametrize("files_copied", range(5))
def test_an_upload_that_was_cut_off_is_removed(
    files_copied: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    copied, copy = [], fs.copy_files

    def copy_some(*names) -> None:
        if len(copied) == files_copied:
            raise Cut
        copied.append(copy(*names))

    monkeypatch.setattr(fs, "copy_files", copy_some)
    place = folder.parent / "checkpoint_3"
    with pytest.raises(Cut):
        checkpoints.copied(folder, fs.LocalFileSystem(), str(place))
    assert len(list(place.iterdir())) == files_copied
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        checkpoints.verify(str(place))
    assert checkpoints.latest_resumable(run_of(folder)) == str(folder)
    assert not place.exists()
    assert "checkpoint_3" in caplog.text


def test_where_nothing_is_whole_a_user_is_told_of_each(folder: Path, tmp_path: Path):
    assert checkpoints.latest_resumable(override(run_of(folder), {"name": "another"})) is None
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*another"):
        checkpoints.latest_checkpoint(override(run_of(folder), {"name": "another"}))
    for name in ("checkpoint_1", "checkpoint_2"):
        truncate(folder.parent / name / "position.json")
    for choose in (checkpoints.latest_checkpoint, checkpoints.latest_resumable):
        with pytest.raises(ConfigError, match=r"(?s)checkpoint_2/position.json.*checkpoint_1/position.json"):
            choose(run_of(folder))


def test_the_best_is_chosen_by_what_was_measured(folder: Path):
    assert checkpoints.best(run_of(folder), "val/psnr", smaller=False).endswith("checkpoint_1")
    assert checkpoints.best(run_of(folder), "val/psnr").endswith("checkpoint_2")
    with pytest.raises(ConfigError, match=r"'val/fid' was not measured.*val/psnr"):
        checkpoints.best(run_of(folder), "val/fid")
    truncate(folder.parent / "checkpoint_1" / "cvae.safetensors")
    assert checkpoints.best(run_of(folder), "val/psnr", smaller=False).endswith("checkpoint_2")


def test_a_snapshot_is_of_its_moment_wherever_and_whenever_it_is_written(bucket: str, tiny: Experiment, tmp_path: Path):
    learner, before = Bare(torch.optim.AdamW), tmp_path / "before"
    learner.descend()
    snapshot = checkpoints.Snapshot(learner, tiny, TrainState(1))  # type: ignore[arg-type]
    snapshot.write(fs.LocalFileSystem(), str(before))
    learner.descend()
    for place in (str(tmp_path / "after"), f"{bucket}/snapshots/after"):
        snapshot.write(*filesystem_of(place))
        assert checkpoints.manifest(place) == checkpoints.manifest(str(before))
        checkpoints.verify(place)


def test_a_snapshot_whose_writing_was_cut_off_has_no_manifest(folder: Path, tiny: Experiment, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    place = folder.parent / "checkpoint_3"
    with pytest.raises(OSError, match="No space"):
        checkpoints.Snapshot(built(tiny), tiny, TrainState(3)).write(fs.LocalFileSystem(), str(place))
    assert checkpoints.latest_resumable(run_of(folder)) == str(folder)


def test_a_bucket_holds_checkpoints_as_a_folder_does(folder: Path, bucket: str, tiny: Experiment):
    place = f"{bucket}/checkpoints/run"
    for name in ("checkpoint_1", "checkpoint_2"):
        checkpoints.copied(folder.parent / name, *filesystem_of(f"{place}/{name}"))
    experiment = override(tiny, {"storage": f"{bucket}/checkpoints", "name": "run"})
    assert checkpoints.latest_checkpoint(experiment) == f"{place}/checkpoint_2"
    learner, restored = checkpoints.load(f"{place}/checkpoint_2")
    assert restored == tiny
    other = built(override(tiny, {"train.seed": 1}))
    assert checkpoints.restore(f"{place}/checkpoint_2", other).steps_done == 2
    assert_equal_weights(learner, other)

    filesystem, path = filesystem_of(place)
    with filesystem.open_output_stream(f"{path}/checkpoint_2/cvae.safetensors") as stream:
        stream.write(b"short")
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint_2/cvae.safetensors: has 5 bytes"):
        checkpoints.restore(f"{place}/checkpoint_2", other)
    filesystem.delete_file(f"{path}/checkpoint_2/cvae.safetensors")
    with pytest.raises(DamagedCheckpoint, match="missing"):
        checkpoints.restore(f"{place}/checkpoint_2", other)
    assert checkpoints.latest_checkpoint(experiment) == f"{place}/checkpoint_1"


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path.stem in ("between-sharp", "cgan-erupting")])
def test_what_is_published_makes_the_same_clips_and_is_smaller(path: Path, tmp_path: Path):
    experiment = cut_down(path)
    learner, trained, published = built(experiment), tmp_path / "trained", tmp_path / "published"
    trained.mkdir()
    for number in range(3):
        step(learner, experiment, number)
    checkpoints.Snapshot(learner, experiment, TrainState(3)).save(trained)
    checkpoints.export_weights(str(trained), published)
    checkpoints.verify(str(published))
    with pytest.raises(FileExistsError, match="published: is not empty"):
        checkpoints.export_weights(str(trained), published)

    ends = moving_squares(experiment.clip.frames, experiment.clip.height, experiment.clip.width)[:, [0, -1]]
    noise = torch.ones(BATCH, learner.latent)
    clips = [each.generate(ends[:, 0], ends[:, 1], noise) for each in (learner, checkpoints.load(str(published))[0])]
    assert torch.equal(*clips)
    size = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (published, trained)]
    assert size[0] < 0.4 * size[1]
    assert not list(published.glob("*discriminator*")) or "cgan" in path.stem
    start = override(experiment, {"storage": str(tmp_path), "name": "next", "train.init_from": str(published)})
    followed = built(start)
    train_loop.begin(followed, start)
    weights = nn.utils.parameters_to_vector(followed.networks[next(iter(learner.networks))].parameters())
    (average,) = (network for name, network in learner.networks.items() if name.endswith("_average"))
    assert torch.equal(weights, nn.utils.parameters_to_vector(average.parameters()))


def saved(run: Experiment, name: str, steps: int, l2: float | None = None, epoch: int | None = None) -> Path:
    """A small whole checkpoint; one that has an epoch is of a validation."""
    place = Path(run.storage, run.name, name)
    place.mkdir(parents=True)
    metrics = {} if l2 is None else {"val/l2_paper": l2}
    position = TrainState(steps, metrics, epoch=steps if l2 is not None and epoch is None else epoch)
    checkpoints.Snapshot(Bare(torch.optim.SGD, lr=0.1), run, position).save(place)  # type: ignore[arg-type]
    return place


@pytest.fixture
def run(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


def names_in(run: Experiment) -> set[str]:
    return {path.name.removeprefix("checkpoint_") for path in Path(run.storage, run.name).glob("checkpoint_*")}


def test_a_clock_that_steps_back_changes_neither_what_is_resumed_nor_what_is_removed(run: Experiment):
    for steps, hour in ((10, 12), (20, 13), (30, 11), (40, 10)):
        saved(run, f"checkpoint_2026-11-28_{hour}-00-00.000000", steps, l2=100.0 - steps)
    newest = f"{run.storage}/run/checkpoint_2026-11-28_10-00-00.000000"
    assert checkpoints.latest_checkpoint(run) == checkpoints.latest_resumable(run) == newest
    assert checkpoints.last_metrics(run) == {"steps_done": 40, "epoch": 40, "val/l2_paper": 60.0}
    checkpoints.remove_superseded(run)
    assert names_in(run) == {"2026-11-28_11-00-00.000000", "2026-11-28_10-00-00.000000"}
    checkpoints.remove_older(run)
    assert names_in(run) == {"2026-11-28_10-00-00.000000"}


def test_of_as_many_steps_the_later_name_is_newest(run: Experiment):
    for name in ("b", "c", "a"):
        saved(run, f"checkpoint_{name}", 10)
    assert checkpoints.latest_checkpoint(run).endswith("checkpoint_c")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_best_validations_and_the_newest_two_are_kept(keep: int, run: Experiment):
    run = override(run, {"train.keep_checkpoints": keep})
    # Steps, and the metric of those that were validated; the best are of 30, 10, 50.
    for steps, l2 in ((10, 2.0), (20, None), (30, 1.0), (40, math.nan), (50, 3.0), (60, 4.0), (70, None), (80, None)):
        saved(run, f"checkpoint_{steps}", steps, l2)
        checkpoints.remove_superseded(run)
    assert names_in(run) == {"70", "80", *["30", "10", "50"][:keep]}
    saved(run, "checkpoint_90", 90, 9.0)
    checkpoints.remove_superseded(run)
    assert names_in(run) == {"80", "90", *["30", "10", "50"][:keep]}


def test_what_is_being_written_is_neither_removed_nor_counted(run: Experiment):
    for steps in (10, 20, 30):
        saved(run, f"checkpoint_{steps}", steps)
    (saved(run, "checkpoint_15", 15) / "manifest.json").unlink()
    (saved(run, "checkpoint_40", 40) / "manifest.json").unlink()
    checkpoints.remove_superseded(run)
    assert names_in(run) == {"15", "20", "30", "40"}
    checkpoints.remove_older(run)
    assert names_in(run) == {"15", "30", "40"}
    assert checkpoints.latest_resumable(run) == f"{run.storage}/run/checkpoint_30"
    assert names_in(run) == {"30"}


@pytest.mark.parametrize("name", ["net.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_checkpoints_do_not_push_out_whole_ones(damage, name: str, run: Experiment):
    for steps in (10, 20, 30, 40):
        place = saved(run, f"checkpoint_{steps}", steps)
        if steps > 20:
            damage(place / name)
    assert checkpoints.latest_checkpoint(run).endswith("checkpoint_20")
    assert names_in(run) == {"10", "20", "30", "40"}  # whoever only reads removes nothing
    assert str(checkpoints.latest_resumable(run)).endswith("checkpoint_20")
    for steps, kept in ((25, {"20", "25"}), (30, {"25", "30"}), (35, {"30", "35"})):
        saved(run, f"checkpoint_{steps}", steps)
        checkpoints.remove_superseded(run)
        assert names_in(run) == kept


def test_a_digit_that_was_changed_in_its_position_makes_no_checkpoint_newer(run: Experiment):
    place = saved(run, "checkpoint_1", 10)
    saved(run, "checkpoint_2", 20)
    position = place / "position.json"
    position.write_text(position.read_text().replace('"steps_done": 10', '"steps_done": 90'))
    assert checkpoints.position_of(str(place)) == {}
    assert checkpoints.latest_checkpoint(run).endswith("checkpoint_2")


def test_a_removal_that_is_cut_off_leaves_an_unfinished_checkpoint(run: Experiment, monkeypatch: pytest.MonkeyPatch):
    for steps in (10, 20, 30):
        saved(run, f"checkpoint_{steps}", steps)

    class Failing:
        def __init__(self, filesystem: fs.FileSystem):
            self.filesystem = filesystem

        def __getattr__(self, name: str):
            return getattr(self.filesystem, name)

        def delete_dir(self, path: str) -> None:
            raise OSError("Input/output error")

    with monkeypatch.context() as away:
        away.setattr(checkpoints, "filesystem_of", lambda place: (Failing(filesystem_of(place)[0]), place))
        checkpoints.remove_superseded(run)  # a training does not end for it
    assert names_in(run) == {"10", "20", "30"}
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        checkpoints.verify(f"{run.storage}/run/checkpoint_10")
    assert checkpoints.latest_resumable(run) == f"{run.storage}/run/checkpoint_30"
    assert names_in(run) == {"20", "30"}


def test_what_was_taken_over_is_newest_whatever_its_name_says(run: Experiment, monkeypatch: pytest.MonkeyPatch):
    other = override(run, {"name": "other"})
    saved(other, "checkpoint_1", 20, 1.0, epoch=2)
    saved(run, "checkpoint_3", 20, 2.0, epoch=2)  # of a clock that was set back since
    saved(run, "checkpoint_2", 10, 3.0, epoch=1)
    monkeypatch.setattr(checkpoints, "place_of_new", lambda run: f"{run.storage}/{run.name}/checkpoint_0")
    checkpoints.copy_checkpoint_from(run, other, 2)
    assert checkpoints.latest_checkpoint(run).endswith("run/checkpoint_0")
    assert checkpoints.last_metrics(run) == {"steps_done": 20, "epoch": 2, "val/l2_paper": 1.0}
    assert names_in(run) == {"0", "2"}


@pytest.mark.parametrize("smaller", [True, False])
def test_a_metric_that_is_nan_is_never_the_best(smaller: bool, run: Experiment):
    for steps, l2 in ((10, math.nan), (20, 2.0), (30, math.nan), (40, 1.0), (50, 1.0), (60, 2.0), (70, math.nan)):
        saved(run, f"checkpoint_{steps}", steps, l2)
    assert checkpoints.best(run, "val/l2_paper", smaller).endswith("checkpoint_50" if smaller else "checkpoint_60")


def test_a_checkpoint_of_a_run_that_was_lost_is_never_finished(run: Experiment, bucket: str):
    def lost() -> None:
        raise RunLockLost("it is another's")

    snapshot = checkpoints.Snapshot(Bare(torch.optim.SGD, lr=0.1), run, TrainState(1))  # type: ignore[arg-type]
    for place in (f"{run.storage}/run/checkpoint_1", f"{bucket}/lost/checkpoint_1"):
        with pytest.raises(RunLockLost):
            snapshot.write(*filesystem_of(place), lost)
        with pytest.raises(DamagedCheckpoint, match="cut off"):
            checkpoints.verify(place)


def test_ray_trains_list_of_checkpoints_is_forgotten(run: Experiment):
    """It refuses a run of which a checkpoint in it is missing."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    checkpoints.forget_reported(run)  # of a new run there is none
    listed = Path(run.storage, run.name, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    listed.parent.mkdir()
    listed.write_text("{}")
    checkpoints.forget_reported(run)
    assert not listed.exists()


WITHOUT_DIRECT_3D = [path for path in ONE_OF_EACH_KIND if path.stem != "direct-3d"]  # the slowest


@pytest.mark.parametrize("path", WITHOUT_DIRECT_3D, ids=lambda path: path.stem)
def test_the_size_of_a_checkpoint_is_known_before_there_is_one(path: Path):
    experiment = cut_down(path)
    with torch.device("meta"):
        estimated = checkpoints.estimate_bytes(learners.build(experiment, torch.device("meta")))
    learner = built(experiment)
    step(learner, experiment, 0)
    snapshot = checkpoints.Snapshot(learner, experiment, TrainState(1))
    tensors = [*snapshot.tensors.values(), *(one for weights in snapshot.networks.values() for one in weights.values())]
    actual = sum(tensor.nbytes for tensor in tensors)
    counters = 4 * len(snapshot.tensors)  # Adam counts the steps of each parameter
    assert actual - counters <= estimated <= actual


def test_the_checkpoints_that_a_run_has_are_not_counted_against_it(tmp_path: Path):
    experiment = override(Experiment(), {"storage": str(tmp_path / "not there yet"), "name": "run"})
    free = shutil.disk_usage(tmp_path).free
    assert checkpoints.free_bytes(experiment) == pytest.approx(free, abs=10**10)
    (tmp_path / "not there yet" / "run" / "checkpoint_1").mkdir(parents=True)
    with (tmp_path / "not there yet" / "run" / "checkpoint_1" / "a").open("wb") as file:
        file.truncate(10**13)  # a sparse file: it takes no space
    assert checkpoints.free_bytes(experiment) - 10**13 == pytest.approx(free, abs=10**10)
    assert checkpoints.free_bytes(override(experiment, {"storage": "s3://bucket/runs"})) == math.inf
