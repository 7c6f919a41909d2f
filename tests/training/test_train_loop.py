"""The training loop: means over steps and ranks, interrupted runs, reports, and failures."""

import gzip
import io
import itertools
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs
from pydantic import SecretStr

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import ConfigError, Experiment, SpeedConfig, override, to_yaml
from giffy_ray.core import distributed, run_lock
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import write_text
from giffy_ray.core.tensor_types import NonFiniteOutput
from giffy_ray.data.sampler import rank_indices, shuffled_indices
from giffy_ray.training import checkpoint_selection, checkpoints, learners, preemption, train_loop, trainer
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.learners import Learner
from giffy_ray.training.throughput import ThroughputMonitor, peak_tflops, start_profiler
from tests.test_experiments import moving_squares
from tests.test_workflows import FakeDataset
from tests.training.test_checkpoints import assert_equal_weights, build_learner, step

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=6))
def test_each_clip_is_used_once_per_epoch_after_any_interruptions(clips: int, batch: int, cuts: list[tuple[int, int]]):
    """A run of 4 epochs is interrupted repeatedly after a checkpoint, and resumes with another number of workers."""
    last_step = -(-4 * clips // batch)
    resume_step = 0
    trained: list[int] = []  # sample indices whose steps are in the weights
    for steps, workers in [*cuts, (last_step, 2)]:
        end = min(last_step, resume_step + steps)
        sample_indices_by_step = [
            np.concatenate([rank_indices(step, batch, rank, workers) for rank in range(workers)])
            for step in range(resume_step, end)
        ]
        # The steps after the checkpoint are lost with the workers.
        checkpoint_step = resume_step + len(sample_indices_by_step) // 2 if end < last_step else end
        for sample_indices in sample_indices_by_step[: checkpoint_step - resume_step]:
            trained += sample_indices.tolist()
        resume_step = checkpoint_step
    assert trained == list(range(last_step * batch))
    indices = shuffled_indices(np.asarray(trained[: 4 * clips]), np.arange(clips), seed=3).reshape(4, clips)
    assert all(sorted(epoch) == list(range(clips)) for epoch in indices.tolist())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_resumed_run_ends_with_the_same_weights_and_means(cut: int, tiny: Experiment, tmp_path: Path):
    experiment = override(tiny, {"train.global_batch_size": 4, "optim.ema_decay": 0.9, "optim.schedule": "cosine"})

    def train(learner: Learner, throughput: ThroughputMonitor, steps: range) -> None:
        for number in steps:
            throughput.add_step(number, step(learner, experiment, number), 4)

    uninterrupted, throughput = build_learner(experiment), ThroughputMonitor({}, 4, CPU)
    train(uninterrupted, throughput, range(4))
    expected = throughput.compute()

    before, throughput = build_learner(experiment), ThroughputMonitor({}, 4, CPU)
    train(before, throughput, range(cut))
    checkpoints.Snapshot(before, experiment, TrainState(cut, {}, throughput.reduce_sums())).save(tmp_path)
    after = learners.build(override(experiment, {"train.seed": 9}), CPU, steps=10)
    state = checkpoints.restore(str(tmp_path), after)
    after.experiment = experiment  # type: ignore[attr-defined]
    throughput = ThroughputMonitor(state.sums, 4, CPU)
    train(after, throughput, range(cut, 4))
    assert_equal_weights(uninterrupted, after)
    means = throughput.compute()
    assert {name: value for name, value in means.items() if name.startswith("train/")} == pytest.approx(
        {name: value for name, value in expected.items() if name.startswith("train/")}, rel=1e-12
    )


class InvertingLearner:
    """A learner whose reconstructions have inverted brightness; without `reconstructs` it has none, as a GAN."""

    def __init__(self, reconstructs: bool):
        self.reconstructs = reconstructs

    def reconstruct(self, clips: torch.Tensor) -> torch.Tensor | None:
        return 255 - clips if self.reconstructs else None


@pytest.mark.parametrize("reconstructs", [True, False])
def test_samples_show_target_reconstruction_and_generated_clips(reconstructs: bool, tmp_path: Path):
    dataset: Any = FakeDataset(tmp_path)

    def generate(start: torch.Tensor, end: torch.Tensor, clip_ids: list[str]) -> torch.Tensor:
        assert clip_ids == dataset.ids
        return torch.stack([start, start, end, end], dim=1)

    animation = train_loop.render_samples(InvertingLearner(reconstructs), generate, dataset, "gif")  # type: ignore[arg-type]
    picture, side = Image.open(io.BytesIO(animation)), 128 + 3
    assert picture.height == 2 * 14 + (3 if reconstructs else 2) * side - 3
    picture.seek(1)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    # The second frame of the last of four clips is of level 50, and its start of level 30.
    levels = [int(pixels[14 + row * side + 64, -14 - 64].mean()) for row in range(3 if reconstructs else 2)]
    assert levels == pytest.approx([50, 205, 30] if reconstructs else [50, 30], abs=8)


def test_means_count_only_the_steps_that_had_the_loss():
    throughput = ThroughputMonitor({}, global_batch_size=2, device=CPU)
    not_skipped = torch.tensor(0.0)
    throughput.add_step(0, {"loss": torch.tensor(1.0), "skipped": not_skipped}, 2)
    nan = torch.tensor(math.nan)
    throughput.add_step(1, {"loss": nan, "g_loss": nan, "skipped": torch.tensor(1.0)}, 2)
    means = throughput.compute()
    assert (means["train/loss"], means["train/skipped"]) == (1, 1)
    assert math.isnan(means["train/g_loss"])  # only a skipped step had it
    assert throughput.skipped_steps == 1
    throughput.add_step(2, {"loss": torch.tensor(7.0), "skipped": not_skipped}, 2)
    assert throughput.compute()["train/loss"] == 7
    assert throughput.skipped_steps == 1
    assert ThroughputMonitor({}, 2, CPU, skipped_steps=3).skipped_steps == 3


def test_init_from_loads_the_networks_of_another_run(tiny: Experiment, tmp_path: Path):
    other = build_learner(override(tiny, {"train.seed": 5}))
    checkpoint_dir = tmp_path / "other" / "checkpoint_1"
    checkpoint_dir.mkdir(parents=True)
    checkpoints.Snapshot(other, tiny, TrainState(7)).save(checkpoint_dir)
    for start in ("other", str(checkpoint_dir)):
        experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": start})
        learner = build_learner(experiment)
        assert train_loop.restore_or_initialize(learner, experiment).steps_done == 0
        assert_equal_weights(other, learner)
    trial = override(tiny, {"storage": str(tmp_path / "study"), "name": "trial-0000", "train.init_from": "other"})
    learner = build_learner(trial)
    train_loop.restore_or_initialize(learner, trial)  # a trial of a study, whose folder is next to that of the run
    assert_equal_weights(other, learner)
    with pytest.raises(ConfigError, match=r"no valid checkpoint in .*nowhere"):
        train_loop.restore_or_initialize(build_learner(tiny), override(experiment, {"train.init_from": "nowhere"}))
    wider = override(experiment, {"train.init_from": "other", "model.image_code": 5})
    with pytest.raises(ConfigError, match=r"train\.init_from: .*belongs to a different model"):
        train_loop.restore_or_initialize(build_learner(wider), wider)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_init_from_loads_the_average_into_network_and_average(tiny: Experiment, tmp_path: Path, ema: float):
    changes = {"train.seed": 5, "optim.ema_decay": 0.9, "optim.lr": 0.1, "train.global_batch_size": 4}
    source_experiment = override(tiny, changes)
    other = build_learner(source_experiment)
    for number in range(3):
        step(other, source_experiment, number)
    checkpoint_dir = tmp_path / "other" / "checkpoint_1"
    checkpoint_dir.mkdir(parents=True)
    checkpoints.Snapshot(other, source_experiment, TrainState(3)).save(checkpoint_dir)
    experiment = override(
        tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": "other", "optim.ema_decay": ema}
    )
    learner = build_learner(experiment)
    train_loop.restore_or_initialize(learner, experiment)
    expected = other.networks["cvae_average"].module.state_dict()  # type: ignore[union-attr]
    assert not torch.equal(
        expected["generator.seed.0.weight"], other.networks["cvae"].state_dict()["generator.seed.0.weight"]
    )
    for network in (learner.networks["cvae"], learner.module.eval_module):  # type: ignore[attr-defined]
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_non_finite_output_gives_nan_metrics_and_no_samples(tmp_path: Path):
    dataset: Any = FakeDataset(tmp_path)

    def generate(start: torch.Tensor, end: torch.Tensor, clip_ids: list[str]) -> torch.Tensor:
        raise NonFiniteOutput("diverged")

    metrics = train_loop.validate(generate, dataset, 2, CPU)
    assert metrics
    assert all(math.isnan(value) for value in metrics.values())
    animation = train_loop.render_samples(InvertingLearner(reconstructs=False), generate, dataset, "gif")  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(animation)).height == 2 * 14 + 128  # the target clips alone


def test_float32_precision_disables_tf32():
    try:
        train_loop.set_precision(SpeedConfig(precision="float32"))
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        train_loop.set_precision(SpeedConfig())
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_all_ranks_load_the_checkpoint_chosen_by_rank_0(tiny: Experiment, monkeypatch: pytest.MonkeyPatch):
    """The source run is still training, so another rank would find a newer checkpoint."""
    loaded, broadcasts = [], iter([[None, None], ["chosen by rank 0", None]])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast_objects", lambda _: next(broadcasts))
    monkeypatch.setattr(checkpoint_selection, "resolve_init_from", lambda _: "a newer one")
    monkeypatch.setattr(checkpoints, "load_pretrained", lambda checkpoint, _: loaded.append(checkpoint))
    train_loop.restore_or_initialize(build_learner(tiny), tiny)
    assert loaded == ["chosen by rank 0"]


def test_worker_returns_why_the_run_lock_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(train_loop, "ClipDataset", lambda *_: SimpleNamespace(location="", fingerprint="abc"))
    run = override(Experiment(), {"storage": str(tmp_path), "name": "run"})
    write_text(run_lock.lock_path(run.run_dir), '{"holder": "they", "pid": 7, "host": "there"}')
    settings = {"experiment": SecretStr(to_yaml(run)), "dataset": "", "fingerprint": "abc", "holder": "we"}
    assert "process 7 on there has taken over the run" in train_loop.train_loop_per_worker(settings)


def test_resumed_run_ignores_init_from(tiny: Experiment, tmp_path: Path):
    trained = build_learner(override(tiny, {"train.seed": 5}))
    checkpoint_dir = tmp_path / "mine" / "checkpoint_1"
    checkpoint_dir.mkdir(parents=True)
    checkpoints.Snapshot(trained, tiny, TrainState(7, {"val/psnr": 3.0}, {"loss": math.pi})).save(checkpoint_dir)
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": "nowhere"})
    learner = build_learner(experiment)
    assert train_loop.restore_or_initialize(learner, experiment) == TrainState(7, {"val/psnr": 3.0}, {"loss": math.pi})
    assert_equal_weights(trained, learner)


def test_flops_are_counted_once_and_counting_does_not_change_the_weights(tiny: Experiment):
    throughput, weights = ThroughputMonitor({}, 4, CPU), torch.ones(5, 3, requires_grad=True)
    with throughput.count_flops_once():
        (torch.ones(7, 5) @ weights).sum().backward()
    assert throughput.flops_per_step == 2 * 7 * 5 * 3 * 2  # a matmul and that of its gradient
    with throughput.count_flops_once():
        torch.ones(9, 9) @ torch.ones(9, 9)
    assert throughput.flops_per_step == 2 * 7 * 5 * 3 * 2  # of the first step only
    counted, uncounted = build_learner(tiny), build_learner(tiny)
    with ThroughputMonitor({}, 4, CPU).count_flops_once():
        step(counted, tiny, 0)
    step(uncounted, tiny, 0)
    assert_equal_weights(counted, uncounted)


def test_peak_tflops_is_looked_up_by_device_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-40GB") == 312
    assert peak_tflops("NVIDIA A10G") == 70
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("Tesla T4") == 65
    assert peak_tflops("Some GPU") is None


# Names as NVML and torch.cuda.get_device_name report them. GPUs that are not in the table have no peak.
@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA A30", 165),
        ("NVIDIA A40", 150),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA H100 80GB HBM2e", 756),
        ("NVIDIA H20-3e", 148),
        ("Tesla V100-FHHL-16GB", 105),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A16", None),
        ("NVIDIA A2", None),
        ("NVIDIA T400", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA T1000", None),
        ("NVIDIA T4G", None),
        ("NVIDIA L40G", None),
        ("Tesla K80", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10M", None),
        ("Quadro T2000", None),
        ("", None),
        # Slices have only part of the peak.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10-24Q", None),
        ("GRID T4-16C", None),
        ("NVIDIA A100-1-5CME", None),
        ("GRID A100D-1-10CME", None),
        ("GRID T4", None),
        ("NVIDIA H100-40C", None),
        ("NVIDIA A100-1-5C", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L4-4A", None),
    ],
)
def test_peak_tflops_distinguishes_similar_names_and_slices(name: str, peak: float | None):
    assert peak_tflops(name) == peak


def test_profiler_saves_a_trace_of_five_steps():
    traces: list[str] = []
    profiler = start_profiler(True, lambda path: traces.append(gzip.decompress(path.read_bytes()).decode()))
    for _ in range(20):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.step()
    profiler.stop()
    (trace,) = traces
    events = json.loads(trace)["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 5


def test_worker_that_skips_too_many_steps_is_not_restarted(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The worker returns, because Ray Train restarts workers that raise; `train` raises instead."""
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": None})

    class Fake:
        """Stands in for the dataset, the tracker and the TorchTrainer."""

        fingerprint, location = "abc", "the-dataset"
        statuses: ClassVar[list[object]] = []

        def __init__(self, location: str = "", holder: str = ""):
            self.location, self.holder = location, holder

        def split_indices(self, split: str) -> np.ndarray:
            return np.arange(30)

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, kind: object, *_: object) -> None:
            self.statuses.append(kind)

        def fit(self) -> None:
            settings = {"experiment": SecretStr(to_yaml(experiment)), "dataset": "the-dataset", "parent": None}
            train_loop.train_loop_per_worker(settings | {"fingerprint": "abc", "holder": self.holder})

    def diverge(*_: object) -> None:
        raise train_loop.RunFailure("11 steps")

    monkeypatch.setattr(train_loop, "ClipDataset", Fake)
    monkeypatch.setattr(train_loop, "open_run", lambda *_, **__: Fake())
    monkeypatch.setattr(train_loop, "run", diverge)
    monkeypatch.setattr(train_loop.ray.train.torch, "get_device", lambda: CPU)
    monkeypatch.setattr(trainer, "_build_trainer", lambda *settings: Fake("the-dataset", settings[-1]))
    for _ in range(2):  # the failure file of an earlier start is ignored
        with pytest.raises(train_loop.RunFailure, match="11 steps"):
            trainer.train(experiment, Fake(), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert Fake.statuses == [train_loop.RunFailure] * 2
    monkeypatch.setattr(train_loop, "run", lambda *_: None)
    monkeypatch.setattr(checkpoint_selection, "latest_checkpoint", lambda _: "the checkpoint")
    assert trainer.train(experiment, Fake(), WorkerResources(1, 0, 1)) == "the checkpoint"  # type: ignore[arg-type]


def test_skipped_steps_message_names_the_clips_of_the_global_batch(tiny: Experiment, tmp_path: Path):
    dataset: Any = FakeDataset(tmp_path)
    indices = dataset.split_indices("validation")
    dataset.split_indices = lambda split: indices
    throughput = ThroughputMonitor({}, 2, CPU, skipped_steps=10)
    throughput.add_step(3, {"skipped": torch.tensor(1.0)}, 2)
    throughput.reduce_sums()
    experiment = override(tiny, {"train.global_batch_size": 2})
    message = train_loop.describe_skipped_steps(throughput, dataset, experiment)
    clip_ids = ", ".join(dataset.ids[index] for index in shuffled_indices(np.asarray([6, 7]), indices, 0))
    assert (
        f"11 steps had no finite loss or gradient (value 10); the last is step 3, with the clips {clip_ids}" in message
    )


def test_worker_that_restarts_with_other_clips_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    dataset = SimpleNamespace(location="here/sets/abc", fingerprint="now")
    monkeypatch.setattr(train_loop, "ClipDataset", lambda *_: dataset)
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    settings = {"experiment": SecretStr(to_yaml(experiment)), "dataset": "here/sets/abc", "parent": None}
    settings["fingerprint"] = "before"
    write_text(run_lock.lock_path(experiment.run_dir), '{"holder": "we"}')
    train_loop.train_loop_per_worker(settings | {"holder": "we"})  # does not raise: Ray Train would restart it
    failure = (tmp_path / "mine" / train_loop.FAILURE_FILE).read_text()
    assert failure.startswith("here/sets/abc: its clips changed")
    assert "(fingerprint now, not before)" in failure


class NullTracker:
    """A tracker that logs nothing."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


def run_three_steps(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Experiment,
    folder: Path,
    report_fn: Any,
    lock_watcher: RunLockWatcher | None = None,
) -> None:
    """Calls `train_loop.run` for three steps with a validation after each, without Ray and without clips."""
    experiment = override(
        tiny, {"storage": str(folder), "name": "run", "train.global_batch_size": 4, "train.epochs": 3}
    )
    dataset: Any = SimpleNamespace(split_indices=lambda split: range(4))
    clips = moving_squares(tiny.clip.frames, tiny.clip.height, tiny.clip.width)
    times = torch.linspace(0, 1, tiny.clip.frames).expand(len(clips), -1)
    batch = SimpleNamespace(clips=clips, times=times, sample_indices=torch.arange(len(clips)))
    monkeypatch.setattr(train_loop.loader, "iter_training_batches", lambda *_: itertools.repeat(batch))
    monkeypatch.setattr(train_loop, "log_run_metadata", lambda *_: None)
    monkeypatch.setattr(train_loop, "validate", lambda *_: {"val/l2_paper": 1.0})
    tracker: Any = NullTracker()
    train_loop.run(experiment, dataset, tracker, CPU, report_fn, lock_watcher=lock_watcher)


def test_stopped_trials_leave_no_threads(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def exit_as_ray_tune_does(*_: object) -> None:
        assert any(thread.name == "preemption-monitor" for thread in threading.enumerate())
        raise SystemExit  # Ray Tune stops a trial when it reports

    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(SystemExit):
            run_three_steps(monkeypatch, tiny, tmp_path, exit_as_ray_tune_does)
    assert threading.active_count() == before


def test_run_taken_over_by_another_process_ends_without_a_checkpoint(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preemption, "_STOP_POLL_S", 0.01)
    monkeypatch.setattr(preemption, "_PREEMPTION_POLL_S", 0.01)
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    write_text(run_lock.lock_path(run.run_dir), '{"holder": "we"}')
    reports = []

    def report_fn(metrics: dict[str, Any], make_snapshot: Any) -> None:
        reports.append(metrics["steps_done"])
        write_text(run_lock.lock_path(run.run_dir), '{"holder": "they", "pid": 7, "host": "there"}')
        time.sleep(0.3)

    with pytest.raises(RunLockLost, match="process 7 on there has taken over the run"):
        run_three_steps(monkeypatch, tiny, tmp_path, report_fn, RunLockWatcher(run.run_dir, "we"))
    assert reports == [1]
    with pytest.raises(RunLockLost):
        train_loop.check_run_lock(RunLockWatcher(run.run_dir, "we"))


def test_worker_keeps_the_best_and_the_newest_checkpoints(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fake Ray Train calls the upload function with the name that it chose for the checkpoint."""
    run = override(tiny, {"storage": str(tmp_path), "name": "run", "train.keep_checkpoints": 2})
    write_text(run_lock.lock_path(run.run_dir), '{"holder": "we"}')
    learner, names, errors = build_learner(run), itertools.count(), []

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_fn: Any, **_: object) -> None:
        try:
            checkpoint_upload_fn(checkpoint, f"checkpoint_{next(names)}")
        except RunLockLost as error:
            errors.append(error)

    storage = SimpleNamespace(storage_filesystem=fs.LocalFileSystem(), experiment_fs_path=str(tmp_path / "run"))
    monkeypatch.setattr(train_loop.ray.train, "report", report)
    monkeypatch.setattr(train_loop.ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    report_fn = train_loop.RayTrainReporter(run, RunLockWatcher(run.run_dir, "we"))
    for steps, l2 in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        train_loop.report_progress(learner, run, TrainState(steps, {"val/l2_paper": l2}, epoch=steps), report_fn)
    folders = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert folders == ["checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4"]
    assert checkpoint_selection.best_checkpoint(run, "val/l2_paper").endswith("checkpoint_1")

    write_text(run_lock.lock_path(run.run_dir), '{"holder": "they"}')
    train_loop.report_progress(learner, run, TrainState(5, {"val/l2_paper": 0.0}, epoch=5), report_fn)
    assert len(errors) == 1
    assert checkpoint_selection.latest_checkpoint(run).endswith("checkpoint_4")
    assert folders == sorted(path.name for path in (tmp_path / "run").glob("checkpoint_[0-4]"))
