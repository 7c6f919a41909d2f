"""Checkpoints are restored bit by bit; corrupt ones are reported by name and never used."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from torch import nn

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.core.packaged import packaged_path
from giffy_ray.core.run_lock import RunLockLost
from giffy_ray.core.storage import filesystem_of
from giffy_ray.training import checkpoint_format, checkpoint_selection, checkpoints, learners, train_loop
from giffy_ray.training.checkpoint_format import CorruptCheckpoint, TrainState
from giffy_ray.training.learners import Learner
from tests.test_experiments import BATCH, EXPERIMENTS, TINY, moving_squares

ONE_EXPERIMENT_PER_KIND = list({load(path).model.kind: path for path in EXPERIMENTS}.values())


def shrink_experiment(path: Path) -> Experiment:
    experiment = load(path)
    changes = {"train.global_batch_size": BATCH, "cluster.workers": 1, "optim.ema_decay": 0.9, "name": "run"}
    return override(experiment, TINY[experiment.model.kind] | changes)


def step(learner: Learner, experiment: Experiment, number: int) -> dict[str, torch.Tensor]:
    clip = experiment.clip
    times = torch.linspace(0, 1, clip.frames).expand(BATCH, -1)
    sample_indices = torch.arange(number * BATCH, (number + 1) * BATCH)
    return learner.update(moving_squares(clip.frames, clip.height, clip.width), times, sample_indices)


def build_learner(experiment: Experiment) -> Learner:
    return learners.build(experiment, torch.device("cpu"), steps=10)


def assert_equal_weights(actual: Learner, expected: Learner) -> None:
    for name, network in actual.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, expected.networks[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize("path", ONE_EXPERIMENT_PER_KIND, ids=lambda path: path.stem)
def test_restored_training_continues_bit_by_bit(path: Path, tmp_path: Path):
    experiment = shrink_experiment(path)
    learner = build_learner(experiment)
    for number in range(2):
        step(learner, experiment, number)
    state = TrainState(2, {"val/psnr": 20.5}, {"loss": 0.1 + 0.2})
    checkpoints.Snapshot(learner, experiment, state).save(tmp_path)

    restored = build_learner(override(experiment, {"train.seed": 1}))
    assert checkpoints.restore(str(tmp_path), restored) == state
    assert_equal_weights(learner, restored)
    restored.experiment = experiment  # type: ignore[attr-defined]  # only the initial weights should differ
    for number in range(2, 4):
        expected_losses = step(learner, experiment, number)
        losses = step(restored, experiment, number)
        assert all(torch.equal(losses[name], expected_losses[name]) for name in expected_losses)
    assert_equal_weights(learner, restored)


class MinimalLearner:
    """The parts of a learner that a checkpoint holds: one network and its optimizer."""

    latent = 0

    def __init__(self, optimizer: type[torch.optim.Optimizer], size: int = 3, **settings):
        torch.manual_seed(0)
        network = torch.nn.Linear(size, 2, dtype=torch.float64)
        self.networks, self.optimizers = {"net": network}, {"net": optimizer(network.parameters(), **settings)}

    def take_step(self) -> None:
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
def test_optimizer_state_is_restored_exactly(optimizer, settings, steps: int, tmp_path: Path):
    learner, restored = MinimalLearner(optimizer, **settings), MinimalLearner(optimizer, **settings)
    for _ in range(steps):
        learner.take_step()
    checkpoints.Snapshot(learner, Experiment(), TrainState(steps)).save(tmp_path)  # type: ignore[arg-type]
    checkpoints.restore(str(tmp_path), restored)  # type: ignore[arg-type]
    before, after = learner.optimizers["net"].state_dict(), restored.optimizers["net"].state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, entries in before["state"].items():
        assert entries.keys() == after["state"][index].keys()
        for key, value in entries.items():
            restored_value = after["state"][index][key]
            if torch.is_tensor(value):
                assert torch.equal(value, restored_value)
                assert value.dtype == restored_value.dtype
            else:
                assert value == restored_value


def test_optimizer_state_of_a_different_experiment_is_rejected(tmp_path: Path):
    learner = MinimalLearner(torch.optim.AdamW)
    learner.take_step()
    checkpoints.Snapshot(learner, Experiment(), TrainState(1)).save(tmp_path)  # type: ignore[arg-type]
    larger = MinimalLearner(torch.optim.AdamW, size=4)
    larger.networks = {}
    with pytest.raises(ValueError, match=r"optimizer 'net', parameter 0.*\[2, 3\].*\[2, 4\]"):
        checkpoints.restore(str(tmp_path), larger)  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def folder(tiny: Experiment, tmp_path: Path) -> Path:
    """The newer of two checkpoints of a run."""
    learner = build_learner(override(tiny, {"name": "run"}))
    for steps, name in ((1, "checkpoint_1"), (2, "checkpoint_2")):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        checkpoints.Snapshot(learner, tiny, TrainState(steps, {"val/psnr": 30.0 - steps})).save(folder)
    return folder


def run_of(folder: Path) -> Experiment:
    return override(Experiment(), {"storage": str(folder.parent.parent), "name": "run"})


@pytest.mark.parametrize("name", ["cvae.safetensors", "optimizers.safetensors", "position.json", "experiment.yaml"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [(truncate, "bytes, not"), (flip_bit, "sha256 differs"), (Path.unlink, "is missing")],
    ids=["truncated", "bit flipped", "missing"],
)
def test_corrupt_file_is_reported_and_the_previous_checkpoint_is_used(
    name: str, damage, problem: str, folder: Path, caplog: pytest.LogCaptureFixture
):
    damage(folder / name)
    with pytest.raises(CorruptCheckpoint, match=f"checkpoint_2/{name}.*{problem}"):
        checkpoint_format.verify(str(folder))
    assert checkpoint_selection.latest_checkpoint(run_of(folder)).endswith("checkpoint_1")
    assert checkpoint_selection.latest_resumable(run_of(folder)) == str(folder.parent / "checkpoint_1")
    assert name in caplog.text and problem in caplog.text


@pytest.mark.parametrize("name", ["cvae.safetensors", "optimizers.safetensors"])
def test_nothing_is_loaded_from_a_corrupt_file(name: str, folder: Path, tiny: Experiment):
    flip_bit(folder / name)
    learner = build_learner(tiny)
    before = {key: value.clone() for key, value in learner.networks["cvae"].state_dict().items()}
    with pytest.raises(CorruptCheckpoint, match=name):
        checkpoints.restore(str(folder), learner)
    assert all(torch.equal(value, before[key]) for key, value in learner.networks["cvae"].state_dict().items())
    if name == "cvae.safetensors":
        with pytest.raises(CorruptCheckpoint, match=name):
            checkpoint_format.load_learner(str(folder))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"../cvae": {"bytes": 1, "sha256": ""}}}'],
)
def test_invalid_manifest_is_rejected(text: str, folder: Path):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"checkpoint_2/manifest\.json"):
        checkpoint_format.verify(str(folder))


def test_manifest_must_list_the_files_to_load(folder: Path):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    del files["cvae.safetensors"]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CorruptCheckpoint, match=r"does not list cvae\.safetensors"):
        checkpoint_format.load_learner(str(folder))


def test_files_that_the_manifest_does_not_list_are_ignored(folder: Path):
    (folder / ".DS_Store").write_text("")
    checkpoint_format.verify(str(folder))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("files_copied", range(5))
def test_interrupted_upload_is_deleted(
    files_copied: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    copied_files = []
    copy_files = fs.copy_files

    def copy_some(*names) -> None:
        if len(copied_files) == files_copied:
            raise Interrupted
        copied_files.append(copy_files(*names))

    monkeypatch.setattr(fs, "copy_files", copy_some)
    interrupted = folder.parent / "checkpoint_3"
    with pytest.raises(Interrupted):
        checkpoint_format.copy_checkpoint(folder, fs.LocalFileSystem(), str(interrupted))
    assert len(list(interrupted.iterdir())) == files_copied
    with pytest.raises(CorruptCheckpoint, match="interrupted"):
        checkpoint_format.verify(str(interrupted))
    assert checkpoint_selection.latest_resumable(run_of(folder)) == str(folder)
    assert not interrupted.exists()
    assert "checkpoint_3" in caplog.text


def test_error_lists_every_corrupt_checkpoint_if_none_is_valid(folder: Path, tmp_path: Path):
    assert checkpoint_selection.latest_resumable(override(run_of(folder), {"name": "another"})) is None
    with pytest.raises(ConfigError, match=r"no valid checkpoint in .*another"):
        checkpoint_selection.latest_checkpoint(override(run_of(folder), {"name": "another"}))
    for name in ("checkpoint_1", "checkpoint_2"):
        truncate(folder.parent / name / "position.json")
    for select in (checkpoint_selection.latest_checkpoint, checkpoint_selection.latest_resumable):
        with pytest.raises(ConfigError, match=r"(?s)checkpoint_2/position.json.*checkpoint_1/position.json"):
            select(run_of(folder))


def test_best_checkpoint_is_selected_by_metric(folder: Path):
    assert checkpoint_selection.best_checkpoint(run_of(folder), "val/psnr", smaller=False).endswith("checkpoint_1")
    assert checkpoint_selection.best_checkpoint(run_of(folder), "val/psnr").endswith("checkpoint_2")
    with pytest.raises(ConfigError, match=r"'val/fid' was not measured.*val/psnr"):
        checkpoint_selection.best_checkpoint(run_of(folder), "val/fid")
    truncate(folder.parent / "checkpoint_1" / "cvae.safetensors")
    assert checkpoint_selection.best_checkpoint(run_of(folder), "val/psnr", smaller=False).endswith("checkpoint_2")


def test_snapshot_keeps_its_moment_wherever_and_whenever_it_is_written(bucket: str, tiny: Experiment, tmp_path: Path):
    learner = MinimalLearner(torch.optim.AdamW)
    before = tmp_path / "before"
    learner.take_step()
    snapshot = checkpoints.Snapshot(learner, tiny, TrainState(1))  # type: ignore[arg-type]
    snapshot.write(fs.LocalFileSystem(), str(before))
    learner.take_step()
    for path in (str(tmp_path / "after"), f"{bucket}/snapshots/after"):
        snapshot.write(*filesystem_of(path))
        assert checkpoint_format.read_manifest(path) == checkpoint_format.read_manifest(str(before))
        checkpoint_format.verify(path)


def test_interrupted_snapshot_has_no_manifest(folder: Path, tiny: Experiment, monkeypatch):
    def fail_on_full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail_on_full_disk)
    interrupted = folder.parent / "checkpoint_3"
    with pytest.raises(OSError, match="No space"):
        checkpoints.Snapshot(build_learner(tiny), tiny, TrainState(3)).write(fs.LocalFileSystem(), str(interrupted))
    assert checkpoint_selection.latest_resumable(run_of(folder)) == str(folder)


def test_bucket_holds_checkpoints_like_a_folder(folder: Path, bucket: str, tiny: Experiment):
    run_dir = f"{bucket}/checkpoints/run"
    for name in ("checkpoint_1", "checkpoint_2"):
        checkpoint_format.copy_checkpoint(folder.parent / name, *filesystem_of(f"{run_dir}/{name}"))
    experiment = override(tiny, {"storage": f"{bucket}/checkpoints", "name": "run"})
    assert checkpoint_selection.latest_checkpoint(experiment) == f"{run_dir}/checkpoint_2"
    learner, restored = checkpoint_format.load_learner(f"{run_dir}/checkpoint_2")
    assert restored == tiny
    other = build_learner(override(tiny, {"train.seed": 1}))
    assert checkpoints.restore(f"{run_dir}/checkpoint_2", other).steps_done == 2
    assert_equal_weights(learner, other)

    filesystem, path = filesystem_of(run_dir)
    with filesystem.open_output_stream(f"{path}/checkpoint_2/cvae.safetensors") as stream:
        stream.write(b"short")
    with pytest.raises(CorruptCheckpoint, match=r"checkpoint_2/cvae.safetensors: has 5 bytes"):
        checkpoints.restore(f"{run_dir}/checkpoint_2", other)
    filesystem.delete_file(f"{path}/checkpoint_2/cvae.safetensors")
    with pytest.raises(CorruptCheckpoint, match="missing"):
        checkpoints.restore(f"{run_dir}/checkpoint_2", other)
    assert checkpoint_selection.latest_checkpoint(experiment) == f"{run_dir}/checkpoint_1"


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path.stem in ("between-sharp", "cgan-erupting")])
def test_exported_weights_generate_the_same_clips_and_are_smaller(path: Path, tmp_path: Path):
    experiment = shrink_experiment(path)
    learner = build_learner(experiment)
    trained = tmp_path / "trained"
    published = tmp_path / "published"
    trained.mkdir()
    for number in range(3):
        step(learner, experiment, number)
    checkpoints.Snapshot(learner, experiment, TrainState(3)).save(trained)
    checkpoint_format.export_weights(str(trained), published)
    checkpoint_format.verify(str(published))
    with pytest.raises(FileExistsError, match="published: is not empty"):
        checkpoint_format.export_weights(str(trained), published)

    ends = moving_squares(experiment.clip.frames, experiment.clip.height, experiment.clip.width)[:, [0, -1]]
    noise = torch.ones(BATCH, learner.latent)
    exported, _ = checkpoint_format.load_learner(str(published))
    expected = learner.generate(ends[:, 0], ends[:, 1], noise)
    assert torch.equal(exported.generate(ends[:, 0], ends[:, 1], noise), expected)
    exported_bytes, trained_bytes = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (published, trained)
    )
    assert exported_bytes < 0.4 * trained_bytes
    assert not list(published.glob("*discriminator*")) or "cgan" in path.stem
    next_experiment = override(
        experiment, {"storage": str(tmp_path), "name": "next", "train.init_from": str(published)}
    )
    initialized = build_learner(next_experiment)
    train_loop.restore_or_initialize(initialized, next_experiment)
    weights = nn.utils.parameters_to_vector(initialized.networks[next(iter(learner.networks))].parameters())
    (average,) = (network for name, network in learner.networks.items() if name.endswith("_average"))
    assert torch.equal(weights, nn.utils.parameters_to_vector(average.parameters()))


def save_checkpoint(run: Experiment, name: str, steps: int, l2: float | None = None, epoch: int | None = None) -> Path:
    """Writes a small valid checkpoint. With `l2` it is one of a validation, at the end of an epoch."""
    folder = Path(run.storage, run.name, name)
    folder.mkdir(parents=True)
    metrics = {} if l2 is None else {"val/l2_paper": l2}
    state = TrainState(steps, metrics, epoch=steps if l2 is not None and epoch is None else epoch)
    checkpoints.Snapshot(MinimalLearner(torch.optim.SGD, lr=0.1), run, state).save(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"storage": str(tmp_path), "name": "run"})


def checkpoint_names(run: Experiment) -> set[str]:
    return {path.name.removeprefix("checkpoint_") for path in Path(run.storage, run.name).glob("checkpoint_*")}


def test_clock_set_back_changes_neither_resuming_nor_deletion(run: Experiment):
    for steps, hour in ((10, 12), (20, 13), (30, 11), (40, 10)):
        save_checkpoint(run, f"checkpoint_2026-11-28_{hour}-00-00.000000", steps, l2=100.0 - steps)
    newest = f"{run.storage}/run/checkpoint_2026-11-28_10-00-00.000000"
    assert checkpoint_selection.latest_checkpoint(run) == checkpoint_selection.latest_resumable(run) == newest
    assert checkpoint_selection.last_metrics(run) == {"steps_done": 40, "epoch": 40, "val/l2_paper": 60.0}
    checkpoint_selection.remove_superseded(run)
    assert checkpoint_names(run) == {"2026-11-28_11-00-00.000000", "2026-11-28_10-00-00.000000"}
    checkpoint_selection.remove_older(run)
    assert checkpoint_names(run) == {"2026-11-28_10-00-00.000000"}


def test_later_name_is_newest_among_equal_steps(run: Experiment):
    for name in ("b", "c", "a"):
        save_checkpoint(run, f"checkpoint_{name}", 10)
    assert checkpoint_selection.latest_checkpoint(run).endswith("checkpoint_c")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_best_validations_and_the_newest_two_are_kept(keep: int, run: Experiment):
    run = override(run, {"train.keep_checkpoints": keep})
    # Steps, and the metric if validated; the best validations are those of 30, 10 and 50 steps.
    for steps, l2 in ((10, 2.0), (20, None), (30, 1.0), (40, math.nan), (50, 3.0), (60, 4.0), (70, None), (80, None)):
        save_checkpoint(run, f"checkpoint_{steps}", steps, l2)
        checkpoint_selection.remove_superseded(run)
    assert checkpoint_names(run) == {"70", "80", *["30", "10", "50"][:keep]}
    save_checkpoint(run, "checkpoint_90", 90, 9.0)
    checkpoint_selection.remove_superseded(run)
    assert checkpoint_names(run) == {"80", "90", *["30", "10", "50"][:keep]}


def test_incomplete_checkpoints_are_neither_deleted_nor_counted(run: Experiment):
    for steps in (10, 20, 30):
        save_checkpoint(run, f"checkpoint_{steps}", steps)
    (save_checkpoint(run, "checkpoint_15", 15) / "manifest.json").unlink()
    (save_checkpoint(run, "checkpoint_40", 40) / "manifest.json").unlink()
    checkpoint_selection.remove_superseded(run)
    assert checkpoint_names(run) == {"15", "20", "30", "40"}
    checkpoint_selection.remove_older(run)
    assert checkpoint_names(run) == {"15", "30", "40"}
    assert checkpoint_selection.latest_resumable(run) == f"{run.storage}/run/checkpoint_30"
    assert checkpoint_names(run) == {"30"}


@pytest.mark.parametrize("name", ["net.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_corrupt_checkpoints_do_not_displace_valid_ones(damage, name: str, run: Experiment):
    for steps in (10, 20, 30, 40):
        folder = save_checkpoint(run, f"checkpoint_{steps}", steps)
        if steps > 20:
            damage(folder / name)
    assert checkpoint_selection.latest_checkpoint(run).endswith("checkpoint_20")
    assert checkpoint_names(run) == {"10", "20", "30", "40"}  # a reader deletes nothing
    assert str(checkpoint_selection.latest_resumable(run)).endswith("checkpoint_20")
    for steps, expected in ((25, {"20", "25"}), (30, {"25", "30"}), (35, {"30", "35"})):
        save_checkpoint(run, f"checkpoint_{steps}", steps)
        checkpoint_selection.remove_superseded(run)
        assert checkpoint_names(run) == expected


def test_altered_step_count_does_not_make_a_checkpoint_newer(run: Experiment):
    folder = save_checkpoint(run, "checkpoint_1", 10)
    save_checkpoint(run, "checkpoint_2", 20)
    state_file = folder / "position.json"
    state_file.write_text(state_file.read_text().replace('"steps_done": 10', '"steps_done": 90'))
    assert checkpoint_format.read_train_state(str(folder)) == {}
    assert checkpoint_selection.latest_checkpoint(run).endswith("checkpoint_2")


def test_init_from_names_a_run_or_else_a_pretrained_model(tiny: Experiment, tmp_path: Path):
    storage = {"storage": str(tmp_path), "name": "mine"}
    experiment = override(tiny, storage | {"train.init_from": "between"})
    assert checkpoint_selection.resolve_init_from(experiment) == str(packaged_path("models", "between"))
    trial = override(experiment, {"storage": str(tmp_path / "study"), "name": "trial-0000"})
    assert checkpoint_selection.resolve_init_from(trial) == str(packaged_path("models", "between"))

    checkpoint_dir = tmp_path / "between" / "checkpoint_1"
    checkpoint_dir.mkdir(parents=True)
    checkpoints.Snapshot(build_learner(tiny), tiny, TrainState(1)).save(checkpoint_dir)
    for named in (experiment, trial):
        assert checkpoint_selection.resolve_init_from(named) == str(checkpoint_dir)
    (checkpoint_dir / "cvae.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"no valid checkpoint in .*between"):  # instead of other weights in silence
        checkpoint_selection.resolve_init_from(experiment)
    unknown = override(tiny, storage | {"train.init_from": "betwen"})
    with pytest.raises(ConfigError, match=r"no valid checkpoint in .*betwen"):
        checkpoint_selection.resolve_init_from(unknown)


def test_interrupted_deletion_leaves_an_incomplete_checkpoint(run: Experiment, monkeypatch: pytest.MonkeyPatch):
    for steps in (10, 20, 30):
        save_checkpoint(run, f"checkpoint_{steps}", steps)

    class FailingFileSystem:
        def __init__(self, filesystem: fs.FileSystem):
            self.filesystem = filesystem

        def __getattr__(self, name: str):
            return getattr(self.filesystem, name)

        def delete_dir(self, path: str) -> None:
            raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_selection, "filesystem_of", lambda path: (FailingFileSystem(filesystem_of(path)[0]), path)
        )
        checkpoint_selection.remove_superseded(run)  # does not fail the training
    assert checkpoint_names(run) == {"10", "20", "30"}
    with pytest.raises(CorruptCheckpoint, match="interrupted"):
        checkpoint_format.verify(f"{run.storage}/run/checkpoint_10")
    assert checkpoint_selection.latest_resumable(run) == f"{run.storage}/run/checkpoint_30"
    assert checkpoint_names(run) == {"20", "30"}


def test_copied_checkpoint_is_newest_whatever_its_name(run: Experiment, monkeypatch: pytest.MonkeyPatch):
    other = override(run, {"name": "other"})
    save_checkpoint(other, "checkpoint_1", 20, 1.0, epoch=2)
    save_checkpoint(run, "checkpoint_3", 20, 2.0, epoch=2)  # from before the clock was set back
    save_checkpoint(run, "checkpoint_2", 10, 3.0, epoch=1)
    monkeypatch.setattr(checkpoints, "new_checkpoint_path", lambda run: f"{run.storage}/{run.name}/checkpoint_0")
    checkpoints.copy_checkpoint_from(run, other, 2)
    assert checkpoint_selection.latest_checkpoint(run).endswith("run/checkpoint_0")
    assert checkpoint_selection.last_metrics(run) == {"steps_done": 20, "epoch": 2, "val/l2_paper": 1.0}
    assert checkpoint_names(run) == {"0", "2"}


@pytest.mark.parametrize("smaller", [True, False])
def test_nan_is_never_the_best_metric(smaller: bool, run: Experiment):
    for steps, l2 in ((10, math.nan), (20, 2.0), (30, math.nan), (40, 1.0), (50, 1.0), (60, 2.0), (70, math.nan)):
        save_checkpoint(run, f"checkpoint_{steps}", steps, l2)
    assert checkpoint_selection.best_checkpoint(run, "val/l2_paper", smaller).endswith(
        "checkpoint_50" if smaller else "checkpoint_60"
    )


def test_checkpoint_is_never_completed_after_the_run_lock_is_lost(run: Experiment, bucket: str):
    def raise_lost() -> None:
        raise RunLockLost("another process holds it")

    snapshot = checkpoints.Snapshot(MinimalLearner(torch.optim.SGD, lr=0.1), run, TrainState(1))  # type: ignore[arg-type]
    for path in (f"{run.storage}/run/checkpoint_1", f"{bucket}/lost/checkpoint_1"):
        with pytest.raises(RunLockLost):
            snapshot.write(*filesystem_of(path), raise_lost)
        with pytest.raises(CorruptCheckpoint, match="interrupted"):
            checkpoint_format.verify(path)


def test_ray_checkpoint_list_is_deleted(run: Experiment):
    """Ray Train refuses a run if a checkpoint in the list is missing."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    checkpoints.delete_ray_checkpoint_list(run)  # a new run has no list
    list_file = Path(run.storage, run.name, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    list_file.parent.mkdir()
    list_file.write_text("{}")
    checkpoints.delete_ray_checkpoint_list(run)
    assert not list_file.exists()


FAST_EXPERIMENTS = [path for path in ONE_EXPERIMENT_PER_KIND if path.stem != "direct-3d"]  # too slow


@pytest.mark.parametrize("path", FAST_EXPERIMENTS, ids=lambda path: path.stem)
def test_estimate_bytes_matches_the_size_of_a_checkpoint(path: Path):
    experiment = shrink_experiment(path)
    with torch.device("meta"):
        estimated = checkpoints.estimate_bytes(learners.build(experiment, torch.device("meta")))
    learner = build_learner(experiment)
    step(learner, experiment, 0)
    snapshot = checkpoints.Snapshot(learner, experiment, TrainState(1))
    network_bytes = sum(tensor.nbytes for weights in snapshot.networks.values() for tensor in weights.values())
    actual = network_bytes + sum(tensor.nbytes for tensor in snapshot.optimizer_tensors.values())
    counters = 4 * len(snapshot.optimizer_tensors)  # Adam has a step count per parameter
    assert actual - counters <= estimated <= actual


def test_available_bytes_include_the_checkpoints_of_the_run(tmp_path: Path):
    experiment = override(Experiment(), {"storage": str(tmp_path / "not there yet"), "name": "run"})
    free = shutil.disk_usage(tmp_path).free
    assert checkpoint_selection.available_bytes(experiment) == pytest.approx(free, abs=10**10)
    (tmp_path / "not there yet" / "run" / "checkpoint_1").mkdir(parents=True)
    with (tmp_path / "not there yet" / "run" / "checkpoint_1" / "a").open("wb") as file:
        file.truncate(10**13)  # a sparse file: it takes no space
    assert checkpoint_selection.available_bytes(experiment) - 10**13 == pytest.approx(free, abs=10**10)
    assert checkpoint_selection.available_bytes(override(experiment, {"storage": "s3://bucket/runs"})) == math.inf
