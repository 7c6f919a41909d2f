"""The training loop, as each worker of Ray Train runs it, and a trial of a search in its own process."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from giffy_ray.cluster.placement import DATA_CPUS
from giffy_ray.cluster.shared_storage import root_problem, storage_problem
from giffy_ray.config import Experiment, SpeedConfig, from_yaml
from giffy_ray.core import distributed, media
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import join, write_text
from giffy_ray.core.tensor_types import NonFiniteOutput
from giffy_ray.data import loader
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.sampler import rank_indices, sample_rows, shuffled_indices
from giffy_ray.evaluation import metrics
from giffy_ray.models import baselines
from giffy_ray.models.sampling import Method, learner_method
from giffy_ray.tracking.tracker import Tracker, open_run
from giffy_ray.training import checkpoints, learners, restarts
from giffy_ray.training.checkpoints import Snapshot, TrainState
from giffy_ray.training.learners import Learner
from giffy_ray.training.preemption import PreemptionMonitor
from giffy_ray.training.throughput import ThroughputMonitor, profiler

_log = logging.getLogger(__name__)
_SAMPLES = 4  # clips, by two or three rows: about a square, as MLflow's page gives pictures one


# Takes what is reported, and, of rank 0, what makes a snapshot for a checkpoint of it.
ReportFn = Callable[[dict[str, Any], Callable[[], Snapshot] | None], None]

FAILURE = "failure"  # a file of this name in a run's folder says why the run must not be tried again


class RunFailure(RuntimeError):
    """A failure that all workers of a run meet at the same place, and would meet again if they were restarted."""


def train_loop(settings: dict[str, Any]) -> str:
    """What a worker of Ray Train runs. Returns why the lease of the run is lost; an empty string where it is not.

    `settings`: the experiment as YAML (SecretStr, as addresses may hold passwords), where its store is, the fingerprint
    that the store had when the training began, the place of the run that this one is shown under, who holds the lease
    of the run, and by what to tell that this node shares the folders of the node that started the training (`token`,
    `root`, `files`).
    """
    experiment = from_yaml(settings["experiment"].get_secret_value())
    if not _shares_folders(experiment, settings):
        return ""
    if not experiment.data.cache_decoded:
        _warn_of_full_nodes()
    store = ClipDataset(settings["store"], experiment.data.node_cache_gb)
    watch, tags = RunLockWatcher(experiment.run_dir, settings["holder"]), {"data.fingerprint": store.fingerprint}
    try:
        check_lease(watch)
        _check_clips(store, settings["fingerprint"])
        with open_run(experiment, distributed.rank(), settings["parent"], tags) as tracker:
            tell = RayTrainReporter(experiment, watch)
            run(experiment, store, tracker, ray.train.torch.get_device(), tell, ray.train.get_preemption_info, watch)
    # Not raised here: Ray Train would start the workers again, to fail in the same way.
    except RunLockLost as lost:
        _log.error("%s", lost)
        return str(lost)  # `train` raises it
    except RunFailure as failure:
        if distributed.rank() == 0:
            write_text(join(experiment.storage, experiment.name, FAILURE), str(failure))
    return ""


def _shares_folders(experiment: Experiment, settings: dict[str, Any]) -> bool:
    """Whether the nodes of all workers do. Where not, one that sees `storage` tells `train`, and none is restarted."""
    unseen = storage_problem(experiment, settings.get("token"))
    problem = unseen or root_problem(settings.get("root"), settings.get("files", {}))
    answers = distributed.from_all((problem, bool(unseen)))
    told = " ".join(dict.fromkeys(problem for problem, _ in answers if problem))
    if told and all(unseen for _, unseen in answers):
        raise RuntimeError(told)  # nobody can tell `train`, so Ray Train tries again, cluster.max_failures times
    if told and distributed.rank() == [unseen for _, unseen in answers].index(False):
        write_text(join(experiment.storage, experiment.name, FAILURE), told)
    return not told


def _warn_of_full_nodes() -> None:
    """Where a node was lost, and its workers fit on the others, no CPU may be left for the tasks that decode."""
    context = ray.get_runtime_context()
    homes = distributed.from_all(context.get_node_id())
    if distributed.rank() > 0:
        return
    cpus, taken = context.get_assigned_resources().get("CPU", 0.0), Counter(homes)
    free = [node["Resources"].get("CPU", 0.0) - cpus * taken[node["NodeID"]] for node in ray.nodes() if node["Alive"]]
    if max(free) < DATA_CPUS:
        _log.warning(
            "the workers leave no node a whole CPU, so no video can be decoded (data.cache_decoded=false): the training "
            "waits "
            "for another node; stop it and start it again to train on these nodes with less for each worker"
        )


def _check_clips(store: ClipDataset, fingerprint: str) -> None:
    if store.fingerprint != fingerprint:
        raise RunFailure(
            f"{store.location}: its clips have changed since the training began (fingerprint {store.fingerprint}, not "
            f"{fingerprint}); restore the folder, or start a run under another name=..."
        )


def run(
    experiment: Experiment,
    store: ClipDataset,
    tracker: Tracker,
    device: torch.device,
    tell: ReportFn,
    notice: Callable[[], Any] = lambda: None,
    watch: RunLockWatcher | None = None,
) -> None:
    """Trains to the end, or to where it is told to stop.

    `notice` returns something new when a machine of the training is about to be taken away. `watch` follows the lease
    of the run; LeaseLost is raised where it is lost.
    """
    set_precision(experiment.speed)
    torch.backends.cudnn.benchmark = True  # batches are all of one shape; its first guesses for 3D are slow ones
    train, clips = experiment.train, len(store.split_indices("training"))
    validated, held_out = validations(clips, experiment), sample_rows(store, "validation", train.validate_clips)
    last = max(validated)
    learner = learners.build(experiment, device, steps=last)
    make = learner_method(learner, train.seed)

    position, rank = begin(learner, experiment), distributed.rank()
    steps_done, meter = (
        position.steps_done,
        ThroughputMonitor(position.sums, train.global_batch_size, device, position.skipped),
    )
    steps = range(steps_done, last)
    batches = loader.batches(
        store, experiment.data, train.seed, train.global_batch_size, rank, distributed.world_size(), steps
    )
    introduce(tracker, store)
    draw = functools.partial(samples, learner, make, store)
    if steps_done == 0:
        tracker.log_animation(functools.partial(draw, "webp"), "validation", step=0)

    stopped = False
    # Threads end however the loop is left: a trial that is cut raises SystemExit.
    with contextlib.ExitStack() as leaving:
        listener = leaving.enter_context(PreemptionMonitor(experiment, rank, device, notice, watch))
        profile = profiler(experiment.speed.profile and rank == 0, tracker.log_file)
        leaving.callback(profile.stop)
        # ------------------------------------------------------------------------------ the training
        while steps_done < last and not stopped:
            asked_s = time.perf_counter()
            dealt = next(batches)
            meter.add_data_wait(time.perf_counter() - asked_s)
            with meter.count_flops_once():
                named = learner.update(dealt.clips, dealt.times, dealt.positions)
            profile.step()
            meter.add(steps_done, named, len(dealt.clips))
            steps_done += 1

            stopped, warned = listener.poll()
            due = train.checkpoint_every and steps_done % train.checkpoint_every == 0
            epoch, measured = validated.get(steps_done), {}
            if epoch is not None:
                distributed.broadcast_buffers(learner.networks.values())
                measured = meter.compute() | validate(
                    make, store, train.global_batch_size // distributed.world_size(), device, held_out
                )
                tracker.log_metrics(measured, step=epoch)
                tracker.log_animation(functools.partial(draw, "webp"), "validation", step=epoch)
            if epoch is not None or due or stopped or warned:
                sums = meter.sums()
                report(learner, experiment, TrainState(steps_done, measured, sums, epoch, meter.skipped), tell, warned)
            if meter.skipped > train.max_skipped_steps:
                raise RunFailure(too_many_skipped(meter, store, experiment))
            if warned and steps_done < last and not stopped:
                restarts.wait_for_restart()
            if epoch is not None:
                meter.reset()
        # ------------------------------------------------------------------------------
    tracker.log_drawn(functools.partial(draw, "mp4"), "samples.mp4", steps_done)
    tracker.log_drawn(functools.partial(draw, "gif"), "samples.gif", steps_done)
    tracker.finish("KILLED" if stopped else "FINISHED")


def set_precision(speed: SpeedConfig) -> None:
    """Whether a GPU may compute float32 products and convolutions with TF32, which has 10 bits of mantissa."""
    exact = speed.precision == "float32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def introduce(tracker: Tracker, store: ClipDataset) -> None:
    """Tells of the clips, and of the CPUs and GPUs that Ray keeps for the workers; Ray Data's tasks come on top."""
    tracker.log_data_set(store.name, store.fingerprint, store.root, store.counts())
    own = ray.get_runtime_context().get_assigned_resources()
    tracker.sample(distributed.world_size() * own.get("CPU", 0.0), distributed.world_size() * own.get("GPU", 0.0))


def validations(clips: int, experiment: Experiment) -> dict[int, int]:
    """The number of steps after which there is a validation -> the epochs that have then been seen whole.

    Batches run on across epochs. There is one after the last.
    """
    train = experiment.train
    epochs = {*range(train.validate_every, train.epochs + 1, train.validate_every), train.epochs}
    return {-(-epoch * clips // train.global_batch_size): epoch for epoch in sorted(epochs)}


def begin(learner: Learner, experiment: Experiment) -> TrainState:
    """Where the run of the experiment's name was cut, or its start; the learner is put in that state on all workers."""
    location = distributed.on_first(lambda: checkpoints.latest_resumable(experiment))
    if location is not None:
        return checkpoints.restore(location, learner)
    # Rank 0's, as a run that is being trained may have a newer one at any moment.
    origin = distributed.on_first(lambda: checkpoints.resolve_init_from(experiment))
    if origin is not None:
        checkpoints.load_pretrained(origin, learner)
    return TrainState(0)


def check_lease(watch: RunLockWatcher) -> None:
    """Raises LeaseLost on all workers where rank 0 finds the lease of the run to be lost."""
    lost = distributed.on_first(watch.look)
    if lost:
        raise RunLockLost(lost)


def report(
    learner: Learner, experiment: Experiment, position: TrainState, tell: ReportFn, before_restart: bool = False
) -> None:
    """Tells of the metrics, with a checkpoint."""
    named: dict[str, Any] = {"steps_done": position.steps_done}
    if position.epoch is not None:
        named |= {"epoch": position.epoch, **position.metrics}
    if before_restart:
        named[restarts.BEFORE_RESTART] = True
    tell(named, functools.partial(Snapshot, learner, experiment, position) if distributed.rank() == 0 else None)


class RayTrainReporter:
    """Reports to Ray Train. A checkpoint is written while the training goes on, one at a time: it takes memory.

    Which checkpoints are kept is decided here too, when one is complete: Ray Train is told to keep all.
    """

    def __init__(self, experiment: Experiment, watch: RunLockWatcher) -> None:
        self._experiment, self._watch = experiment, watch
        self._idle = threading.Semaphore()

    def __call__(self, named: dict[str, Any], take: Callable[[], Snapshot] | None) -> None:
        if take is None:
            ray.train.report(named, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self._idle.acquire()
        began_s = time.perf_counter()
        snapshot, storage = take(), cast(Any, ray.train.get_context().get_storage())

        def write(_: Checkpoint, name: str) -> Checkpoint:
            try:
                place = f"{storage.experiment_fs_path}/{name}"
                written = snapshot.write(storage.storage_filesystem, place, self._watch.check)
                checkpoints.remove_superseded(self._experiment)
                named[restarts.CHECKPOINT_S] = time.perf_counter() - began_s
                return written
            finally:
                self._idle.release()

        # Ray Train wants a local folder to upload, and removes it: an empty one, for the snapshot is still in memory.
        nothing = Checkpoint.from_directory(tempfile.mkdtemp(prefix="giffy_ray-"))
        ray.train.report(named, nothing, checkpoint_upload_mode=CheckpointUploadMode.ASYNC, checkpoint_upload_fn=write)


def validate(
    make: Method, store: ClipDataset, share: int, device: torch.device, rows: np.ndarray | None = None
) -> dict[str, float]:
    """Over the validation clips, or those of `rows`, `share` at a time on each worker, which takes every workers-th.

    Means of l2 and PSNR; the skill against linear interpolation; and, as `blur`, the mean distance of the sharpness
    ratio from 1, over clips where that is finite. All are NaN if the learner's output is not finite.
    """
    rows = (store.split_indices("validation") if rows is None else rows)[distributed.rank() :: distributed.world_size()]
    parts = [torch.zeros(6, dtype=torch.float64)]
    for first in range(0, len(rows), share):
        chosen = rows[first : first + share]
        real = torch.from_numpy(store.get_clips(chosen))
        start, end = real[:, 0], real[:, -1]
        try:
            made = make(start, end, [store.ids[row] for row in chosen])
        except NonFiniteOutput:
            parts.append(torch.full((6,), math.nan, dtype=torch.float64))
            continue
        blur = (metrics.sharpness_ratio(made, real) - 1).abs()
        linear_sse = metrics.squared_error(baselines.linear(start, end, real.shape[1]), real)
        each = (
            *(metrics.l2_paper(made, real), metrics.psnr(made, real), metrics.squared_error(made, real), linear_sse),
            *(blur.where(blur.isfinite(), 0), blur.isfinite()),
        )
        parts.append(torch.stack([one.double().sum() for one in each]))
    totals = distributed.all_reduce_sum([*torch.stack(parts).sum(0).tolist(), len(rows)], device)
    l2, psnr, sse, linear_sse, blur, sharp, clips = totals
    named = {"l2_paper": l2 / clips, "psnr": psnr / clips}
    named |= {"skill": 1 - sse / linear_sse if linear_sse else 0.0, "blur": blur / sharp if sharp else 0.0}
    return {f"val/{name}": value for name, value in named.items()}


def too_many_skipped(meter: ThroughputMonitor, store: ClipDataset, experiment: Experiment) -> str:
    train, step = experiment.train, meter.last_skipped
    positions = rank_indices(step, train.global_batch_size, rank=0, workers=1)
    ids = [store.ids[row] for row in shuffled_indices(positions, store.split_indices("training"), train.seed)]
    return (
        f"train.max_skipped_steps: {meter.skipped} steps had no finite loss or gradient "
        f"(value {train.max_skipped_steps}); "
        f"the last is step {step}, with the clips {', '.join(ids)}. Lower optim.lr or set optim.max_grad_norm, under "
        "another name; or raise train.max_skipped_steps, and the run resumes from its newest checkpoint"
    )


def samples(learner: Learner, make: Method, store: ClipDataset, kind: media.Kind) -> bytes:
    """The first validation clips, side by side and moving; below them what the learner makes of all their frames, where
    it sees them, and what it makes of their ends and noise."""
    rows = store.split_indices("validation")[:_SAMPLES]
    real = torch.from_numpy(store.get_clips(rows))
    shown: dict[str, torch.Tensor | None] = {"real": real}
    with suppress(NonFiniteOutput):  # such clips cannot be drawn; the metrics are NaN
        shown["reconstruction"] = learner.reconstruct(real)
        shown["prior sample"] = make(real[:, 0], real[:, -1], [store.ids[row] for row in rows])
    return media.animation({name: one.numpy() for name, one in shown.items() if one is not None}, store.clip.fps, kind)
