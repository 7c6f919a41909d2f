"""What surrounds the steps: means over steps and workers, and a run that is cut anywhere."""

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
from giffy_ray.training import checkpoints, learners, preemption, train_loop, trainer
from giffy_ray.training.learners import Learner
from giffy_ray.training.throughput import ThroughputMonitor, peak_tflops, profiler
from tests.test_experiments import moving_squares
from tests.test_workflows import FakeStore
from tests.training.test_checkpoints import assert_equal_weights, built, step

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=6))
def test_every_clip_is_seen_once_an_epoch_wherever_a_run_is_cut(clips: int, batch: int, cuts: list[tuple[int, int]]):
    """A run of 4 epochs is cut again and again some steps after its last checkpoint, and goes on with other workers."""
    rows, last, saved = np.arange(clips), -(-4 * clips // batch), 0
    kept: list[int] = []  # positions whose steps are in the weights
    for steps, workers in [*cuts, (last, 2)]:
        end = min(last, saved + steps)
        seen = [
            np.concatenate([rank_indices(at, batch, rank, workers) for rank in range(workers)])
            for at in range(saved, end)
        ]
        checkpoint = saved + len(seen) // 2 if end < last else end  # what came after it is lost with the workers
        kept += [int(position) for positions in seen[: checkpoint - saved] for position in positions]
        saved = checkpoint
    assert kept == list(range(last * batch))
    ids = shuffled_indices(np.asarray(kept[: 4 * clips]), rows, seed=3).reshape(4, clips)
    assert all(sorted(epoch) == list(range(clips)) for epoch in ids.tolist())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_that_was_cut_ends_with_the_same_weights_and_the_same_means(cut: int, tiny: Experiment, tmp_path: Path):
    experiment = override(tiny, {"train.global_batch_size": 4, "optim.ema_decay": 0.9, "optim.schedule": "cosine"})

    def go_on(learner: Learner, meter: ThroughputMonitor, steps: range) -> None:
        for number in steps:
            meter.add(number, step(learner, experiment, number), 4)

    whole, meter = built(experiment), ThroughputMonitor({}, 4, CPU)
    go_on(whole, meter, range(4))
    expected = meter.compute()

    before, meter = built(experiment), ThroughputMonitor({}, 4, CPU)
    go_on(before, meter, range(cut))
    checkpoints.Snapshot(before, experiment, checkpoints.TrainState(cut, {}, meter.sums())).save(tmp_path)
    after = learners.build(override(experiment, {"train.seed": 9}), CPU, steps=10)
    position = checkpoints.restore(str(tmp_path), after)
    after.experiment = experiment  # type: ignore[attr-defined]
    meter = ThroughputMonitor(position.sums, 4, CPU)
    go_on(after, meter, range(cut, 4))
    assert_equal_weights(whole, after)
    found = meter.compute()
    assert {name: value for name, value in found.items() if name.startswith("train/")} == pytest.approx(
        {name: value for name, value in expected.items() if name.startswith("train/")}, rel=1e-12
    )


class Mirror:
    """Stands for a learner that makes clips again upside down in brightness, or, as a GAN, does not."""

    def __init__(self, sees: bool):
        self.sees = sees

    def reconstruct(self, clips: torch.Tensor) -> torch.Tensor | None:
        return 255 - clips if self.sees else None


@pytest.mark.parametrize("sees", [True, False])
def test_samples_are_rows_of_real_reconstructed_and_made_clips(sees: bool, tmp_path: Path):
    store: Any = FakeStore(tmp_path)

    def make(start: torch.Tensor, end: torch.Tensor, clip_ids: list[str]) -> torch.Tensor:
        assert clip_ids == store.ids
        return torch.stack([start, start, end, end], dim=1)

    drawn = train_loop.samples(Mirror(sees), make, store, "gif")  # type: ignore[arg-type]
    picture, side = Image.open(io.BytesIO(drawn)), 128 + 3
    assert picture.height == 2 * 14 + (3 if sees else 2) * side - 3
    picture.seek(1)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    # The second frame of the last of four clips is of level 50, and its start of level 30.
    levels = [int(pixels[14 + row * side + 64, -14 - 64].mean()) for row in range(3 if sees else 2)]
    assert levels == pytest.approx([50, 205, 30] if sees else [50, 30], abs=8)


def test_means_count_the_steps_that_had_a_loss():
    meter = ThroughputMonitor({}, batch=2, device=CPU)
    none = torch.tensor(0.0)
    meter.add(0, {"loss": torch.tensor(1.0), "skipped": none}, 2)
    nan = torch.tensor(math.nan)
    meter.add(1, {"loss": nan, "g_loss": nan, "skipped": torch.tensor(1.0)}, 2)
    means = meter.compute()
    assert (means["train/loss"], means["train/skipped"]) == (1, 1)
    assert math.isnan(means["train/g_loss"])  # no step had one that was not skipped
    assert meter.skipped == 1
    meter.add(2, {"loss": torch.tensor(7.0), "skipped": none}, 2)
    assert meter.compute()["train/loss"] == 7
    assert meter.skipped == 1
    assert ThroughputMonitor({}, 2, CPU, skipped=3).skipped == 3


def test_a_run_starts_from_the_networks_of_another(tiny: Experiment, tmp_path: Path):
    other = built(override(tiny, {"train.seed": 5}))
    place = tmp_path / "other" / "checkpoint_1"
    place.mkdir(parents=True)
    checkpoints.Snapshot(other, tiny, checkpoints.TrainState(7)).save(place)
    for start in ("other", str(place)):
        experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": start})
        learner = built(experiment)
        assert train_loop.begin(learner, experiment).steps_done == 0
        assert_equal_weights(other, learner)
    trial = override(tiny, {"storage": str(tmp_path / "study"), "name": "trial-0000", "train.init_from": "other"})
    learner = built(trial)
    train_loop.begin(learner, trial)  # a trial of a search, whose folder lies beside that of the run
    assert_equal_weights(other, learner)
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*nowhere"):
        train_loop.begin(built(tiny), override(experiment, {"train.init_from": "nowhere"}))
    wider = override(experiment, {"train.init_from": "other", "model.image_code": 5})
    with pytest.raises(ConfigError, match=r"train\.init_from: .*is of another model"):
        train_loop.begin(built(wider), wider)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_starts_from_the_average_and_its_own_average_starts_there_too(
    tiny: Experiment, tmp_path: Path, ema: float
):
    theirs = override(tiny, {"train.seed": 5, "optim.ema_decay": 0.9, "optim.lr": 0.1, "train.global_batch_size": 4})
    other = built(theirs)
    for number in range(3):
        step(other, theirs, number)
    place = tmp_path / "other" / "checkpoint_1"
    place.mkdir(parents=True)
    checkpoints.Snapshot(other, theirs, checkpoints.TrainState(3)).save(place)
    experiment = override(
        tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": "other", "optim.ema_decay": ema}
    )
    learner = built(experiment)
    train_loop.begin(learner, experiment)
    expected = other.networks["cvae_average"].module.state_dict()  # type: ignore[union-attr]
    assert not torch.equal(
        expected["generator.seed.0.weight"], other.networks["cvae"].state_dict()["generator.seed.0.weight"]
    )
    for network in (learner.networks["cvae"], learner.descent.eval_module):  # type: ignore[attr-defined]
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_output_that_is_not_finite_gives_metrics_that_are_nan_and_no_picture_of_it(tmp_path: Path):
    store: Any = FakeStore(tmp_path)

    def make(start: torch.Tensor, end: torch.Tensor, clip_ids: list[str]) -> torch.Tensor:
        raise NonFiniteOutput("diverged")

    measured = train_loop.validate(make, store, 2, CPU)
    assert measured
    assert all(math.isnan(value) for value in measured.values())
    drawn = train_loop.samples(Mirror(False), make, store, "gif")  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(drawn)).height == 2 * 14 + 128  # the real clips alone


def test_precision_float32_turns_tf32_off_for_products_and_convolutions():
    try:
        train_loop.set_precision(SpeedConfig(precision="float32"))
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        train_loop.set_precision(SpeedConfig())
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_all_workers_start_from_the_checkpoint_that_rank_0_has_chosen(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
):
    """Of a run that is still being trained, which has another newest one by the time that a second worker looks."""
    started, answers = [], iter([[None, None], ["the first's", None]])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: next(answers))
    monkeypatch.setattr(checkpoints, "origin", lambda _: "a newer one")
    monkeypatch.setattr(checkpoints, "start_from", lambda origin, _: started.append(origin))
    train_loop.begin(built(tiny), tiny)
    assert started == ["the first's"]


def test_a_worker_returns_why_the_lease_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(train_loop, "Store", lambda *_: SimpleNamespace(location="", fingerprint="abc"))
    run = override(Experiment(), {"storage": str(tmp_path), "name": "run"})
    write_text(run_lock.location_of(run.run_dir), '{"holder": "they", "pid": 7, "host": "there"}')
    settings = {"experiment": SecretStr(to_yaml(run)), "store": "", "fingerprint": "abc", "holder": "we"}
    assert "process 7 on there has taken the run" in train_loop.train_loop(settings)


def test_a_run_that_was_begun_goes_on_and_does_not_start_from_another(tiny: Experiment, tmp_path: Path):
    ours = built(override(tiny, {"train.seed": 5}))
    place = tmp_path / "mine" / "checkpoint_1"
    place.mkdir(parents=True)
    checkpoints.Snapshot(ours, tiny, checkpoints.TrainState(7, {"val/psnr": 3.0}, {"loss": math.pi})).save(place)
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": "nowhere"})
    learner = built(experiment)
    assert train_loop.begin(learner, experiment) == checkpoints.TrainState(7, {"val/psnr": 3.0}, {"loss": math.pi})
    assert_equal_weights(ours, learner)


def test_the_operations_of_a_step_are_those_of_its_products_and_counting_changes_no_bit(tiny: Experiment):
    meter, weights = ThroughputMonitor({}, 4, CPU), torch.ones(5, 3, requires_grad=True)
    with meter.count_flops_once():
        (torch.ones(7, 5) @ weights).sum().backward()
    assert meter.flops == 2 * 7 * 5 * 3 * 2  # a product, and that of its gradient
    with meter.count_flops_once():
        torch.ones(9, 9) @ torch.ones(9, 9)
    assert meter.flops == 2 * 7 * 5 * 3 * 2  # of the first step only
    one, other = built(tiny), built(tiny)
    with ThroughputMonitor({}, 4, CPU).count_flops_once():
        step(one, tiny, 0)
    step(other, tiny, 0)
    assert_equal_weights(one, other)


def test_the_peak_of_a_gpu_is_found_by_its_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-40GB") == 312
    assert (peak_tflops("NVIDIA A10G"), peak_tflops("NVIDIA L40S"), peak_tflops("Tesla T4")) == (70, 362, 65)
    assert peak_tflops("Some GPU") is None


# As NVML and torch.cuda.get_device_name give them; GPUs whose peak is not in our table have none.
@pytest.mark.parametrize(
    ("name", "peak"),
    [
        *(("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("A100-SXM4-40GB", 312)),
        *(("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989)),
        *(("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA H800", 989), ("NVIDIA H20", 148), ("NVIDIA B200", 2250)),
        *(("NVIDIA A10", 125), ("NVIDIA A30", 165), ("NVIDIA A40", 150), ("NVIDIA L4", 121), ("NVIDIA L40", 181)),
        *(("NVIDIA H100 80GB HBM2e", 756), ("NVIDIA H20-3e", 148), ("Tesla V100-FHHL-16GB", 105)),
        *(("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla V100S-PCIE-32GB", 130)),
        *((name, None) for name in ("NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA A100X", "NVIDIA A16", "NVIDIA A2")),
        *((name, None) for name in ("NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA T1000", "NVIDIA T4G", "NVIDIA L40G")),
        *((name, None) for name in ("Tesla K80", "NVIDIA GeForce RTX 4090", "NVIDIA A10M", "Quadro T2000", "")),
        # Slices, which have a part of the peak.
        *((name, None) for name in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10-24Q", "GRID T4-16C")),
        *((name, None) for name in ("NVIDIA A100-1-5CME", "GRID A100D-1-10CME", "GRID T4", "NVIDIA H100-40C")),
        *((name, None) for name in ("NVIDIA A100-1-5C", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA L4-4A")),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name_alone(name: str, peak: float | None):
    assert peak_tflops(name) == peak


def test_a_trace_of_five_steps_is_kept():
    traces: list[str] = []
    profile = profiler(True, lambda path: traces.append(gzip.decompress(path.read_bytes()).decode()))
    for _ in range(20):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profile.step()
    profile.stop()
    (trace,) = traces
    events = json.loads(trace)["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 5


def test_a_worker_that_skips_too_many_steps_says_why_and_is_not_started_again(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It returns, for Ray Train starts workers that raise again; `train` then raises."""
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.init_from": None})

    class Ended:
        fingerprint, location = "abc", "the-store"
        statuses: ClassVar[list[object]] = []

        def __init__(self, location: str = "", holder: str = ""):
            self.location, self.holder = location, holder

        def split_indices(self, split: str) -> np.ndarray:
            return np.arange(30)

        def __enter__(self) -> "Ended":
            return self

        def __exit__(self, kind: object, *_: object) -> None:
            self.statuses.append(kind)

        def fit(self) -> None:
            settings = {"experiment": SecretStr(to_yaml(experiment)), "store": "the-store", "parent": None}
            train_loop.train_loop(settings | {"fingerprint": "abc", "holder": self.holder})

    def diverge(*_: object) -> None:
        raise train_loop.RunFailure("11 steps")

    monkeypatch.setattr(train_loop, "Store", Ended)
    monkeypatch.setattr(train_loop, "open_run", lambda *_, **__: Ended())
    monkeypatch.setattr(train_loop, "run", diverge)
    monkeypatch.setattr(train_loop.ray.train.torch, "get_device", lambda: CPU)
    monkeypatch.setattr(trainer, "_trainer", lambda *settings: Ended("the-store", settings[-1]))
    for _ in range(2):  # what an earlier start left does not count
        with pytest.raises(train_loop.RunFailure, match="11 steps"):
            trainer.train(experiment, Ended(), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert Ended.statuses == [train_loop.RunFailure] * 2
    monkeypatch.setattr(train_loop, "run", lambda *_: None)
    monkeypatch.setattr(checkpoints, "newest", lambda _: "the checkpoint")
    assert trainer.train(experiment, Ended(), WorkerResources(1, 0, 1)) == "the checkpoint"  # type: ignore[arg-type]


def test_the_message_about_skipped_steps_names_the_clips_of_the_whole_step(tiny: Experiment, tmp_path: Path):
    store: Any = FakeStore(tmp_path)
    rows = store.split_indices("validation")
    store.split_indices = lambda split: rows
    meter = ThroughputMonitor({}, 2, CPU, skipped=10)
    meter.add(3, {"skipped": torch.tensor(1.0)}, 2)
    meter.sums()
    message = train_loop.too_many_skipped(meter, store, override(tiny, {"train.global_batch_size": 2}))
    named = [store.ids[row] for row in shuffled_indices(np.asarray([6, 7]), store.split_indices("validation"), 0)]
    assert (
        f"11 steps had no finite loss or gradient (value 10); the last is step 3, with the clips {', '.join(named)}"
        in message
    )


def test_a_worker_that_starts_again_on_other_clips_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    store = SimpleNamespace(location="here/sets/abc", fingerprint="now")
    monkeypatch.setattr(train_loop, "Store", lambda *_: store)
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    settings = {"experiment": SecretStr(to_yaml(experiment)), "store": "here/sets/abc", "parent": None}
    settings["fingerprint"] = "before"
    write_text(run_lock.location_of(experiment.run_dir), '{"holder": "we"}')
    train_loop.train_loop(settings | {"holder": "we"})  # without an error, at which Ray Train would start it again
    why = (tmp_path / "mine" / train_loop.FAILURE).read_text()
    assert why.startswith("here/sets/abc: its clips have changed")
    assert "(fingerprint now, not before)" in why


class Silent:
    """A tracker that logs nothing."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


def start(
    monkeypatch: pytest.MonkeyPatch, tiny: Experiment, folder: Path, tell, watch: RunLockWatcher | None = None
) -> None:
    """`loop.run` of three steps with a validation after each, without Ray and without clips."""
    experiment = override(
        tiny, {"storage": str(folder), "name": "run", "train.global_batch_size": 4, "train.epochs": 3}
    )
    store: Any = SimpleNamespace(rows_of=lambda split: range(4))
    clips = moving_squares(tiny.clip.frames, tiny.clip.height, tiny.clip.width)
    times = torch.linspace(0, 1, tiny.clip.frames).expand(len(clips), -1)
    batch = SimpleNamespace(clips=clips, times=times, positions=torch.arange(len(clips)))
    monkeypatch.setattr(train_loop.loader, "batches", lambda *_: itertools.repeat(batch))
    monkeypatch.setattr(train_loop, "introduce", lambda *_: None)
    monkeypatch.setattr(train_loop, "validate", lambda *_: {"val/l2_paper": 1.0})
    train_loop.run(experiment, store, Silent(), CPU, tell, watch=watch)  # type: ignore[arg-type]


def test_trials_that_are_cut_leave_no_threads(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def cut(*_: object) -> None:
        assert any(thread.name == "listener" for thread in threading.enumerate())
        raise SystemExit  # as Ray Tune ends a trial, in its report

    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(SystemExit):
            start(monkeypatch, tiny, tmp_path, cut)
    assert threading.active_count() == before


def test_a_run_that_another_process_has_taken_ends_without_a_checkpoint(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preemption, "_LOOK_S", 0.01)
    monkeypatch.setattr(preemption, "_ASK_S", 0.01)
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    write_text(run_lock.location_of(run.run_dir), '{"holder": "we"}')
    reports = []

    def tell(named: dict[str, Any], take: Any) -> None:
        reports.append(named["steps_done"])
        write_text(run_lock.location_of(run.run_dir), '{"holder": "they", "pid": 7, "host": "there"}')
        time.sleep(0.3)

    with pytest.raises(RunLockLost, match="process 7 on there has taken the run"):
        start(monkeypatch, tiny, tmp_path, tell, RunLockWatcher(run.run_dir, "we"))
    assert reports == [1]
    with pytest.raises(RunLockLost):
        train_loop.check_lease(RunLockWatcher(run.run_dir, "we"))


def test_a_worker_keeps_the_promise_about_its_checkpoints(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray Train is stood in for: it calls what uploads a checkpoint with the name that it gave it."""
    run = override(tiny, {"storage": str(tmp_path), "name": "run", "train.keep_checkpoints": 2})
    write_text(run_lock.location_of(run.run_dir), '{"holder": "we"}')
    learner, names, errors = built(run), itertools.count(), []

    def report(named: dict[str, Any], nothing: Any, checkpoint_upload_fn: Any, **_: object) -> None:
        try:
            checkpoint_upload_fn(nothing, f"checkpoint_{next(names)}")
        except RunLockLost as error:
            errors.append(error)

    storage = SimpleNamespace(storage_filesystem=fs.LocalFileSystem(), experiment_fs_path=str(tmp_path / "run"))
    monkeypatch.setattr(train_loop.ray.train, "report", report)
    monkeypatch.setattr(train_loop.ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    tell = train_loop.RayTrainReporter(run, RunLockWatcher(run.run_dir, "we"))
    for steps, l2 in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        train_loop.report(learner, run, checkpoints.TrainState(steps, {"val/l2_paper": l2}, epoch=steps), tell)
    folders = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert folders == ["checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4"]
    assert checkpoints.best(run, "val/l2_paper").endswith("checkpoint_1")

    write_text(run_lock.location_of(run.run_dir), '{"holder": "they"}')
    train_loop.report(learner, run, checkpoints.TrainState(5, {"val/l2_paper": 0.0}, epoch=5), tell)
    assert len(errors) == 1
    assert checkpoints.latest_checkpoint(run).endswith("checkpoint_4")
    assert folders == sorted(path.name for path in (tmp_path / "run").glob("checkpoint_[0-4]"))
