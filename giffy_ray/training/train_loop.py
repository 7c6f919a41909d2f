"""The training loop that every Ray Train worker runs, and a single-process trial runs directly.

`train_loop_per_worker` is Ray Train's entry point. `run` is one training: `_set_up` builds the learner and restores the
latest checkpoint, `_train_steps` is the loop over steps, and `_validate_epoch` and `report_progress` end an epoch.
Forward, backward and optimizer step are in `Learner.update`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor
from torch.profiler import profile

from giffy_ray.cluster.placement import DATA_CPUS
from giffy_ray.cluster.shared_storage import find_root_problem, find_storage_problem
from giffy_ray.config import Experiment, SpeedConfig, from_yaml
from giffy_ray.core import distributed, media
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import join, write_text
from giffy_ray.core.tensor_types import Clips, NonFiniteOutput
from giffy_ray.data import loader
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.sampler import rank_indices, shuffled_indices, subsample_split
from giffy_ray.evaluation.metrics import l2_paper, psnr, sharpness_ratio, squared_error
from giffy_ray.models import baselines
from giffy_ray.models.sampling import LearnerMethod, Method
from giffy_ray.tracking.tracker import Tracker, open_run
from giffy_ray.training import checkpoint_selection, checkpoints, learners, planned_restarts
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.checkpoints import Snapshot
from giffy_ray.training.learners import Learner
from giffy_ray.training.preemption import PreemptionMonitor
from giffy_ray.training.throughput import NullProfiler, ThroughputMonitor, start_profiler

# report(metrics, make_snapshot). make_snapshot copies the state to checkpoint; it is None except on rank 0.
ReportFn = Callable[[dict[str, Any], Callable[[], Snapshot] | None], None]

# A file of this name in the run folder holds the reason why the run must not be retried.
FAILURE_FILE = "failure"

_SAMPLE_CLIPS = 4  # four columns by two or three rows: roughly square, which suits MLflow's image grid
# Sums that `validate` accumulates over clips. `finite_blurs` counts the clips whose sharpness ratio is finite.
_VALIDATION_SUMS = ("l2_paper", "psnr", "squared_error", "linear_squared_error", "blur", "finite_blurs")
_log = logging.getLogger(__name__)


class RunFailure(RuntimeError):
    """A failure that every rank reaches at the same step, and would reach again after a restart."""


# ------------------------------------------------------------------------------------------ entry point of a worker
def train_loop_per_worker(settings: dict[str, Any]) -> str:
    """Runs one Ray Train worker.

    Args:
        settings: The keys are
            `experiment`: the experiment as YAML, in a SecretStr because addresses may contain passwords;
            `dataset`: location of the ClipDataset;
            `fingerprint`: fingerprint of the dataset when the training started;
            `parent`: folder of the parent run in MLflow, or None;
            `holder`: holder of the run lock;
            `token`, `root`, `files`: what proves that this node shares the folders of the driver's node.

    Returns:
        The reason why the run lock was lost, or an empty string.
    """
    experiment = from_yaml(settings["experiment"].get_secret_value())
    if not _nodes_share_folders(experiment, settings):
        return ""
    if not experiment.data.cache_decoded:
        _warn_if_no_cpu_can_decode()
    dataset = ClipDataset(settings["dataset"], experiment.data.node_cache_gb)
    lock_watcher = RunLockWatcher(experiment.run_dir, settings["holder"])
    tags = {"data.fingerprint": dataset.fingerprint}
    try:
        check_run_lock(lock_watcher)
        _check_fingerprint(dataset, settings["fingerprint"])
        with open_run(experiment, distributed.rank(), settings["parent"], tags) as tracker:
            device, report_fn = ray.train.torch.get_device(), RayTrainReporter(experiment, lock_watcher)
            run(experiment, dataset, tracker, device, report_fn, ray.train.get_preemption_info, lock_watcher)
    # Neither error propagates: Ray Train would restart the workers, which would fail in the same way.
    except RunLockLost as error:
        _log.error("%s", error)
        return str(error)  # `train` raises it
    except RunFailure as failure:
        if distributed.rank() == 0:
            write_text(join(experiment.run_dir, FAILURE_FILE), str(failure))
    return ""


def _nodes_share_folders(experiment: Experiment, settings: dict[str, Any]) -> bool:
    """Whether the nodes of all ranks see the driver's folders. Every rank gets the same answer.

    If not, the lowest rank that sees `storage` writes the reason there: `train` raises it, and nothing is restarted.

    Raises:
        RuntimeError: No rank sees `storage`. Ray Train then retries up to `cluster.max_failures` times.
    """
    storage_error = find_storage_problem(experiment, settings.get("token"))
    error = storage_error or find_root_problem(settings.get("root"), settings.get("files", {}))
    answers = distributed.all_gather_object((error, bool(storage_error)))
    message = " ".join(dict.fromkeys(error for error, _ in answers if error))
    if not message:
        return True
    ranks_with_storage = [rank for rank, (_, storage_missing) in enumerate(answers) if not storage_missing]
    if not ranks_with_storage:
        raise RuntimeError(message)
    if distributed.rank() == ranks_with_storage[0]:
        write_text(join(experiment.run_dir, FAILURE_FILE), message)
    return False


def _warn_if_no_cpu_can_decode() -> None:
    """Warns if the workers occupy every whole CPU, as after the loss of a node whose workers moved to the others."""
    context = ray.get_runtime_context()
    node_ids = distributed.all_gather_object(context.get_node_id())
    if distributed.rank() > 0:
        return
    cpus_per_worker = context.get_assigned_resources().get("CPU", 0.0)
    workers_by_node = Counter(node_ids)
    free_cpus = [
        node["Resources"].get("CPU", 0.0) - cpus_per_worker * workers_by_node[node["NodeID"]]
        for node in ray.nodes()
        if node["Alive"]
    ]
    if max(free_cpus) < DATA_CPUS:
        _log.warning(
            "data.cache_decoded: the workers leave no whole CPU on any node to decode videos, so the training waits "
            "for another node (value False); stop and restart it to use smaller workers on the current nodes"
        )


def _check_fingerprint(dataset: ClipDataset, fingerprint: str) -> None:
    if dataset.fingerprint != fingerprint:
        raise RunFailure(
            f"{dataset.location}: its clips changed after the training started (fingerprint {dataset.fingerprint}, "
            f"not {fingerprint}); restore the folder, or start a run under another name=..."
        )


def check_run_lock(lock_watcher: RunLockWatcher) -> None:
    """Raises RunLockLost on every rank if rank 0 finds that the run lock is lost."""
    reason = distributed.run_on_rank_zero(lock_watcher.poll)
    if reason:
        raise RunLockLost(reason)


# ---------------------------------------------------------------------------------------------------------- the loop
@dataclass
class _TrainingContext:
    """What the loop of one worker uses, and its progress."""

    experiment: Experiment
    dataset: ClipDataset
    tracker: Tracker
    device: torch.device
    learner: Learner
    method: Method  # one clip for each pair of images, with noise from `train.seed`
    throughput: ThroughputMonitor
    batches: Iterator[loader.Batch]
    schedule: dict[int, int]  # see validation_schedule
    validation_indices: np.ndarray
    last_step: int
    steps_done: int

    def render_samples(self, file_format: media.AnimationFormat) -> bytes:
        return render_samples(self.learner, self.method, self.dataset, file_format)


def run(
    experiment: Experiment,
    dataset: ClipDataset,
    tracker: Tracker,
    device: torch.device,
    report_fn: ReportFn,
    get_preemption_info: Callable[[], Any] = lambda: None,
    lock_watcher: RunLockWatcher | None = None,
) -> None:
    """Trains until the last epoch or a stop request. Resumes from the latest checkpoint of the run.

    Args:
        experiment: The training; its name identifies the run.
        dataset: The training and validation clips.
        tracker: Receives metrics and sample clips.
        device: Where the networks are.
        report_fn: Receives the metrics of an epoch and writes checkpoints.
        get_preemption_info: Returns a new value when a node of the training is about to be preempted.
        lock_watcher: Watches the run lock, if given.

    Raises:
        RunLockLost: Another process trains the run now. All ranks raise at the same step.
        RunFailure: More than `train.max_skipped_steps` steps had no finite loss or gradient.
    """
    ctx = _set_up(experiment, dataset, tracker, device)
    rank = distributed.rank()
    # The stack ends the threads however the loop exits: a trial that Ray Tune stops raises SystemExit.
    with contextlib.ExitStack() as stack:
        monitor = stack.enter_context(PreemptionMonitor(experiment, rank, device, get_preemption_info, lock_watcher))
        profiler = start_profiler(experiment.speed.profile and rank == 0, tracker.log_file)
        stack.callback(profiler.stop)
        stopped = _train_steps(ctx, monitor, profiler, report_fn)
    tracker.log_rendered(functools.partial(ctx.render_samples, "mp4"), "samples.mp4", ctx.steps_done)
    tracker.log_rendered(functools.partial(ctx.render_samples, "gif"), "samples.gif", ctx.steps_done)
    tracker.finish("KILLED" if stopped else "FINISHED")


def _train_steps(
    ctx: _TrainingContext, monitor: PreemptionMonitor, profiler: profile | NullProfiler, report_fn: ReportFn
) -> bool:
    """Runs the remaining steps. Returns whether a stop was requested."""
    experiment, learner, throughput = ctx.experiment, ctx.learner, ctx.throughput
    stopped = False
    while ctx.steps_done < ctx.last_step and not stopped:
        # ---------------------------------------------------------------------------------- one training step
        batch = _next_batch(ctx)
        with throughput.count_flops_once():
            losses = learner.update(batch.clips, batch.times, batch.sample_indices)
        profiler.step()
        throughput.add_step(ctx.steps_done, losses, len(batch.clips))
        ctx.steps_done += 1

        # ---------------------------------------------------------------------------------- end of an epoch
        stopped, restart_pending = monitor.poll()
        epoch = ctx.schedule.get(ctx.steps_done)
        epoch_metrics = {} if epoch is None else _validate_epoch(ctx, epoch)

        # ---------------------------------------------------------------------------------- report and checkpoint
        if epoch is not None or _checkpoint_is_due(ctx) or stopped or restart_pending:
            sums = throughput.reduce_sums()
            state = TrainState(ctx.steps_done, epoch_metrics, sums, epoch, throughput.skipped_steps)
            report_progress(learner, experiment, state, report_fn, restart_pending)
        if throughput.skipped_steps > experiment.train.max_skipped_steps:
            raise RunFailure(describe_skipped_steps(throughput, ctx.dataset, experiment))
        if restart_pending and ctx.steps_done < ctx.last_step and not stopped:
            planned_restarts.wait_for_restart()
        if epoch is not None:
            throughput.reset()
    return stopped


def _set_up(experiment: Experiment, dataset: ClipDataset, tracker: Tracker, device: torch.device) -> _TrainingContext:
    """Builds the learner, restores the latest checkpoint, and opens the batches of the remaining steps."""
    set_precision(experiment.speed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape, and the default 3D algorithms are slow
    train = experiment.train
    schedule = validation_schedule(len(dataset.split_indices("training")), experiment)
    validation_indices = subsample_split(dataset, "validation", train.validate_clips)
    last_step = max(schedule)
    learner = learners.build(experiment, device, steps=last_step)
    method = LearnerMethod(learner, train.seed)

    state = restore_or_initialize(learner, experiment)
    throughput = ThroughputMonitor(state.sums, train.global_batch_size, device, state.skipped)
    batches = loader.iter_training_batches(
        dataset,
        experiment.data,
        train.seed,
        train.global_batch_size,
        distributed.rank(),
        distributed.world_size(),
        range(state.steps_done, last_step),
    )
    ctx = _TrainingContext(
        experiment=experiment,
        dataset=dataset,
        tracker=tracker,
        device=device,
        learner=learner,
        method=method,
        throughput=throughput,
        batches=batches,
        schedule=schedule,
        validation_indices=validation_indices,
        last_step=last_step,
        steps_done=state.steps_done,
    )
    log_run_metadata(tracker, dataset)
    if ctx.steps_done == 0:
        tracker.log_animation(functools.partial(ctx.render_samples, "webp"), "validation", step=0)
    return ctx


def _next_batch(ctx: _TrainingContext) -> loader.Batch:
    start_s = time.perf_counter()
    batch = next(ctx.batches)
    ctx.throughput.add_data_wait(time.perf_counter() - start_s)
    return batch


def _validate_epoch(ctx: _TrainingContext, epoch: int) -> dict[str, float]:
    """Validates at the end of `epoch` and logs the result with the epoch's training metrics and sample clips."""
    distributed.broadcast_buffers(ctx.learner.networks.values())
    clips_per_batch = ctx.experiment.train.global_batch_size // distributed.world_size()
    epoch_metrics = ctx.throughput.compute() | validate(
        ctx.method, ctx.dataset, clips_per_batch, ctx.device, ctx.validation_indices
    )
    ctx.tracker.log_metrics(epoch_metrics, step=epoch)
    ctx.tracker.log_animation(functools.partial(ctx.render_samples, "webp"), "validation", step=epoch)
    return epoch_metrics


def _checkpoint_is_due(ctx: _TrainingContext) -> bool:
    every_steps = ctx.experiment.train.checkpoint_every
    return every_steps > 0 and ctx.steps_done % every_steps == 0


# -------------------------------------------------------------------------------------------------- parts of the set-up
def set_precision(speed: SpeedConfig) -> None:
    """Allows TF32 (10 bits of mantissa) for float32 matmuls and convolutions, unless `speed.precision` is float32."""
    full_precision = speed.precision == "float32"
    torch.set_float32_matmul_precision("highest" if full_precision else "high")
    torch.backends.cudnn.allow_tf32 = not full_precision


def log_run_metadata(tracker: Tracker, dataset: ClipDataset) -> None:
    """Logs the dataset, and the CPUs and GPUs that Ray reserves for all workers. Ray Data's tasks are not included."""
    tracker.log_dataset(dataset.name, dataset.fingerprint, dataset.root, dataset.count_by_split())
    assigned = ray.get_runtime_context().get_assigned_resources()
    workers = distributed.world_size()
    tracker.sample_system_metrics(workers * assigned.get("CPU", 0.0), workers * assigned.get("GPU", 0.0))


def validation_schedule(clips: int, experiment: Experiment) -> dict[int, int]:
    """Maps a number of steps to the epoch that is complete then and gets validated.

    Batches continue across epoch boundaries. The last epoch is always validated.
    """
    train = experiment.train
    epochs = {*range(train.validate_every, train.epochs + 1, train.validate_every), train.epochs}
    return {-(-epoch * clips // train.global_batch_size): epoch for epoch in sorted(epochs)}


def restore_or_initialize(learner: Learner, experiment: Experiment) -> TrainState:
    """Restores the latest checkpoint of the run, or initializes a new run, from `train.init_from` if that is given.

    Every rank must call this. Rank 0 chooses the checkpoint: the source of `train.init_from` may still be training,
    so another rank could find a newer one.
    """
    checkpoint = distributed.run_on_rank_zero(lambda: checkpoint_selection.latest_resumable(experiment))
    if checkpoint is not None:
        return checkpoints.restore(checkpoint, learner)
    init_from = distributed.run_on_rank_zero(lambda: checkpoint_selection.resolve_init_from(experiment))
    if init_from is not None:
        checkpoints.load_pretrained(init_from, learner)
    return TrainState(0)


# ------------------------------------------------------------------------------------------- reports and checkpoints
def report_progress(
    learner: Learner, experiment: Experiment, state: TrainState, report_fn: ReportFn, before_restart: bool = False
) -> None:
    """Reports the state's metrics with a checkpoint.

    Args:
        before_restart: The workers are about to be restarted, and idle after this checkpoint.
    """
    metrics: dict[str, Any] = {"steps_done": state.steps_done}
    if state.epoch is not None:
        metrics |= {"epoch": state.epoch, **state.metrics}
    if before_restart:
        metrics[planned_restarts.BEFORE_RESTART] = True
    make_snapshot = functools.partial(Snapshot, learner, experiment, state)
    report_fn(metrics, make_snapshot if distributed.rank() == 0 else None)


class RayTrainReporter:
    """A ReportFn that reports to Ray Train and writes checkpoints in the background.

    A snapshot takes memory, so the next one waits until the previous checkpoint is complete. Ray Train keeps all
    checkpoints; superseded ones are removed here, after each write.
    """

    def __init__(self, experiment: Experiment, lock_watcher: RunLockWatcher) -> None:
        self._experiment, self._lock_watcher = experiment, lock_watcher
        self._writer_idle = threading.Semaphore()

    def __call__(self, metrics: dict[str, Any], make_snapshot: Callable[[], Snapshot] | None) -> None:
        if make_snapshot is None:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self._writer_idle.acquire()
        start_s = time.perf_counter()
        snapshot = make_snapshot()
        storage = cast(Any, ray.train.get_context().get_storage())

        def write(_: Checkpoint, name: str) -> Checkpoint:
            try:
                path = f"{storage.experiment_fs_path}/{name}"
                checkpoint = snapshot.write(storage.storage_filesystem, path, self._lock_watcher.check)
                checkpoint_selection.remove_superseded(self._experiment)
                metrics[planned_restarts.CHECKPOINT_S] = time.perf_counter() - start_s
                return checkpoint
            finally:
                self._writer_idle.release()

        # Ray Train requires a local folder to upload, then deletes it. The snapshot is in memory, so this one is empty.
        empty = Checkpoint.from_directory(tempfile.mkdtemp(prefix="giffy_ray-"))
        ray.train.report(metrics, empty, checkpoint_upload_mode=CheckpointUploadMode.ASYNC, checkpoint_upload_fn=write)


# -------------------------------------------------------------------------------------------- validation and samples
def validate(
    method: Method, dataset: ClipDataset, batch_size: int, device: torch.device, indices: np.ndarray | None = None
) -> dict[str, float]:
    """Measures `method` on validation clips, divided among the ranks.

    Args:
        batch_size: Clips that each rank generates at a time.
        device: Where the process group reduces the sums.
        indices: Dataset indices of the clips; None for the whole validation split.

    Returns:
        `val/l2_paper` and `val/psnr`: means over clips. `val/skill`: 1 minus the ratio of the squared error to that of
        linear interpolation. `val/blur`: mean |sharpness ratio - 1| over the clips where it is finite. All are NaN if
        the method's output is not finite.
    """
    if indices is None:
        indices = dataset.split_indices("validation")
    indices = indices[distributed.rank() :: distributed.world_size()]
    batch_sums = [torch.zeros(len(_VALIDATION_SUMS), dtype=torch.float64)]
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        target = torch.from_numpy(dataset.get_clips(chosen))
        try:
            generated = method(target[:, 0], target[:, -1], [dataset.ids[index] for index in chosen])
        except NonFiniteOutput:
            batch_sums.append(torch.full((len(_VALIDATION_SUMS),), math.nan, dtype=torch.float64))
        else:
            batch_sums.append(_sum_over_clips(generated, target))
    totals = distributed.all_reduce_sum([*torch.stack(batch_sums).sum(0).tolist(), len(indices)], device)
    sums = dict(zip((*_VALIDATION_SUMS, "clips"), totals, strict=True))
    linear_squared_error, finite_blurs = sums["linear_squared_error"], sums["finite_blurs"]
    return {
        "val/l2_paper": sums["l2_paper"] / sums["clips"],
        "val/psnr": sums["psnr"] / sums["clips"],
        "val/skill": 1 - sums["squared_error"] / linear_squared_error if linear_squared_error else 0.0,
        "val/blur": sums["blur"] / finite_blurs if finite_blurs else 0.0,
    }


def _sum_over_clips(generated: Clips, target: Clips) -> Tensor:
    """float64 [len(_VALIDATION_SUMS)]: the sums over a batch, in that order."""
    linear = baselines.linear(target[:, 0], target[:, -1], target.shape[1])
    blur = (sharpness_ratio(generated, target) - 1).abs()
    per_clip = {
        "l2_paper": l2_paper(generated, target),
        "psnr": psnr(generated, target),
        "squared_error": squared_error(generated, target),
        "linear_squared_error": squared_error(linear, target),
        "blur": blur.where(blur.isfinite(), 0),
        "finite_blurs": blur.isfinite(),
    }
    return torch.stack([per_clip[name].double().sum() for name in _VALIDATION_SUMS])


def describe_skipped_steps(throughput: ThroughputMonitor, dataset: ClipDataset, experiment: Experiment) -> str:
    """The message of the RunFailure after too many skipped steps. Names the clips of the last one, over all ranks."""
    train, step = experiment.train, throughput.last_skipped_step
    sample_indices = rank_indices(step, train.global_batch_size, rank=0, world_size=1)
    indices = shuffled_indices(sample_indices, dataset.split_indices("training"), train.seed)
    clip_ids = ", ".join(dataset.ids[index] for index in indices)
    return (
        f"train.max_skipped_steps: {throughput.skipped_steps} steps had no finite loss or gradient "
        f"(value {train.max_skipped_steps}); the last is step {step}, with the clips {clip_ids}. Lower optim.lr or set "
        "optim.max_grad_norm under another name=..., or raise train.max_skipped_steps to resume this run from its "
        "latest checkpoint"
    )


def render_samples(learner: Learner, method: Method, dataset: ClipDataset, file_format: media.AnimationFormat) -> bytes:
    """Renders the first validation clips as an animation, one column per clip.

    Rows: the target; its reconstruction, if the learner encodes whole clips; and a sample from its endpoints and noise.
    """
    indices = dataset.split_indices("validation")[:_SAMPLE_CLIPS]
    target = torch.from_numpy(dataset.get_clips(indices))
    rows: dict[str, Tensor | None] = {"real": target}
    with suppress(NonFiniteOutput):  # such clips cannot be rendered; the metrics show NaN
        rows["reconstruction"] = learner.reconstruct(target)
        rows["prior sample"] = method(target[:, 0], target[:, -1], [dataset.ids[index] for index in indices])
    arrays = {label: clips.numpy() for label, clips in rows.items() if clips is not None}
    return media.render_animation(arrays, dataset.clip.fps, file_format)
