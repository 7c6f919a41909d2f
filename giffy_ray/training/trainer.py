"""Driver side of a training: config checks, the TorchTrainer, and signal handling."""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
import ray.train
import torch
from pydantic import SecretStr
from ray._private.state import state  # the public list of actors needs the dashboard
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from giffy_ray.cluster import shared_storage
from giffy_ray.cluster.resources import MALLOC_ENV, WorkerResources
from giffy_ray.config import (
    ClipConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    SegmentsConfig,
    flatten,
    from_yaml,
    to_yaml,
)
from giffy_ray.core.run_lock import RunLock, RunLockLost, RunLockWatcher, run_lock
from giffy_ray.core.storage import delete_file, filesystem_of, is_local, join, read_text, redact_credentials, write_text
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prune import DATASET_LOCATION_FILE
from giffy_ray.training import (
    checkpoint_format,
    checkpoint_selection,
    checkpoints,
    learners,
    planned_restarts,
    preemption,
)
from giffy_ray.training.train_loop import FAILURE_FILE, RunFailure, train_loop_per_worker

# Fields, and sections that end with a dot, that say where and how fast something runs, and not what it computes.
ENVIRONMENT_FIELDS = (
    "storage",
    "data.root",
    "data.node_cache_gb",
    "speed.",
    "cluster.",
    "tracking.",
    "evaluate.",
)
# The fields and sections that may differ when a run resumes.
MUTABLE_FIELDS = (
    *ENVIRONMENT_FIELDS,
    "train.epochs",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
    "train.validate_clips",
    "search.",
)

_EXPERIMENT_FILE, _FINGERPRINT_FILE = "experiment.yaml", "data_set"  # in the run folder
_WORKER_ACTOR_CLASS = RayTrainWorker.__name__
_MIN_CHECKPOINTS = 2  # that a run keeps at once: the last one stays until the next is complete
# Interval at which Ray Train polls for reports and dead workers. Its default of 2 s would delay every report.
_HEALTH_CHECK_S = 0.2
# Interval at which a training that was asked to stop is checked for workers that can react, and the number of checks
# without any after which the process exits.
_STOP_POLL_S, _MAX_POLLS_WITHOUT_WORKERS = 1.0, 5
_RESIZE_POLL_S = 60.0  # interval of checks for capacity for more workers, each of which costs a restart
_START_TIMEOUT_S = 900  # a cloud node has to boot
# How long an elastic training waits for its maximum number of workers before it starts with fewer.
_MIN_WORKERS_TIMEOUT_S = 60
# A node that is lost while workers start fails this start and the next two, which still count on it.
_START_RETRIES = 3
_log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    dataset: ClipDataset,
    worker_resources: WorkerResources,
    parent: str | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    searched_fields: Collection[str] = (),
) -> str:
    """Trains to the end, or resumes an interrupted run of this name.

    On SIGTERM or Ctrl-C the training stops after the current step and saves a checkpoint. Without workers, as while it
    waits for nodes, the process exits.

    Args:
        experiment: The training; its name identifies the run.
        dataset: The training and validation clips.
        worker_resources: CPUs and GPUs of each worker.
        parent: Folder of the parent run in MLflow.
        callbacks: Passed to Ray Train.
        searched_fields: In a trial, the fields that its study varies.

    Returns:
        The location of the latest checkpoint.

    Raises:
        ConfigError: Before anything starts.
        ray.train.TrainingFailedError: The workers failed more than `cluster.max_failures` times.
        RunFailure: The training failed in a way that a restart would repeat.
        RunLockLost: Another process trains the run now.
        SystemExit: The training stopped after a signal.
    """
    failure_file = join(experiment.run_dir, FAILURE_FILE)
    # `fit` does not run in the main thread: there Ray would handle the signals and leave no checkpoint.
    executor = ThreadPoolExecutor(1)
    with (
        locked_run(experiment, dataset, searched_fields=searched_fields) as lock,
        _handle_signals(experiment) as signals,
    ):
        _warn_if_disk_is_small(experiment)
        delete_file(failure_file)
        checkpoints.delete_ray_checkpoint_list(experiment)
        shared_storage.write_token(experiment, lock.holder)
        if worker_resources.summary:
            print(worker_resources.summary, flush=True)
        trainer = _build_trainer(experiment, dataset, worker_resources, parent, callbacks, lock.holder)
        training = executor.submit(trainer.fit)
        executor.shutdown(wait=False)  # its thread ends with the training
        polls_without_workers, stop_requested = 0, False
        while wait([training], _STOP_POLL_S).not_done and polls_without_workers < _MAX_POLLS_WITHOUT_WORKERS:
            if signals and not stop_requested:
                stop_requested = _try_request_stop(experiment)
            polls_without_workers = polls_without_workers + 1 if signals and not _has_live_worker() else 0
        if training.done():
            shared_storage.remove_token(experiment, lock.holder)
            _raise_training_error(training, RunLockWatcher(experiment.run_dir, lock.holder))
    if not training.done():
        print("No worker is running, so there is nothing to save.", flush=True)
        os._exit(128 + signals[0])  # while Ray waits for nodes, `fit` cannot be interrupted
    failure = read_text(failure_file)
    if failure is not None:
        raise RunFailure(failure)
    if signals:
        raise SystemExit(128 + signals[0])
    return checkpoint_selection.latest_checkpoint(experiment)


def _raise_training_error(training: Future, lock_watcher: RunLockWatcher) -> None:
    """Raises what `fit` raised, or RunLockLost if the workers ended because another process has the run."""
    try:
        result = training.result()
    except ray.train.TrainingFailedError as error:
        reason = _read_lock_lost_reason(lock_watcher)
        if reason:
            raise RunLockLost(reason) from error
        raise
    # Rank 0 may have found the lock lost when this process did not, as after this process was paused and continued.
    reason = (result and result.return_value) or _read_lock_lost_reason(lock_watcher)
    if reason:
        raise RunLockLost(reason)


def _read_lock_lost_reason(lock_watcher: RunLockWatcher) -> str:
    """Polls the lock. An unreadable storage does not hide how the training ended: the lock expires on its own."""
    try:
        return lock_watcher.poll()
    except Exception as failure:
        _log.warning("%s: cannot read the run lock (%r)", lock_watcher.path, failure)
        return ""


@contextmanager
def locked_run(
    experiment: Experiment,
    dataset: ClipDataset,
    mutable_fields: tuple[str, ...] = MUTABLE_FIELDS,
    searched_fields: Collection[str] = (),
) -> Iterator[RunLock]:
    """Holds the lock of the run, whose folder records or matches this experiment and dataset.

    Args:
        mutable_fields: Fields, and sections that end with a dot, that may differ from those the run started with.
        searched_fields: In a trial, the fields that its study varies.

    Raises:
        ConfigError: The experiment or dataset cannot be trained, or the run started with different ones.
        RunLockLost: At the end of the block, if the lock was lost inside.
    """
    check_run(experiment, dataset, searched_fields)
    with run_lock(experiment.run_dir) as lock:
        _validate_run_config(experiment, dataset, mutable_fields)
        yield lock


# ------------------------------------------------------------------------------------------------- the TorchTrainer
def _build_trainer(
    experiment: Experiment,
    dataset: ClipDataset,
    worker_resources: WorkerResources,
    parent: str | None,
    callbacks: Sequence[ray.train.UserCallback],
    holder: str,
) -> planned_restarts.ElasticTorchTrainer:
    cluster, data = experiment.cluster, experiment.data
    timeout_s = _START_TIMEOUT_S if cluster.min_workers == cluster.max_workers else _MIN_WORKERS_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_HEALTH_CHECK_S))
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(planned_restarts.DRAIN_POLL_S))
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # train.init_from may be relative to the job's working directory
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_s)
    resources = {"CPU": worker_resources.cpus_per_worker, "GPU": worker_resources.gpus_per_worker}
    return planned_restarts.ElasticTorchTrainer(
        train_loop_per_worker,
        decodes=not data.cache_decoded,
        train_loop_config=_worker_settings(experiment, dataset, parent, holder),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            elastic_resize_monitor_interval_s=_RESIZE_POLL_S,
            use_gpu=worker_resources.gpus_per_worker > 0,
            # GPUs of one node have the fastest links to each other; CPU workers compete less for memory when spread.
            placement_strategy="PACK" if worker_resources.gpus_per_worker else "SPREAD",
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=experiment.name,
            storage_path=experiment.storage,
            worker_runtime_env={"env_vars": MALLOC_ENV},
            # Ray also accepts its controller's own kind of callbacks here.
            callbacks=[*callbacks, planned_restarts.CheckpointBeforePreemption()],  # type: ignore[list-item]
            # Ray keeps all, and rank 0 removes superseded ones: Ray itself would keep only the best and the newest.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=_START_RETRIES * max(1, cluster.max_failures),
                max_preemption_failures=cluster.max_preemptions,
                # CheckpointBeforePreemption updates it once it knows the checkpoint's duration and the preempted ranks.
                preemption_grace_s=planned_restarts.compute_grace_s(None),
                relax_collectives_on_preemption=True,
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _worker_settings(experiment: Experiment, dataset: ClipDataset, parent: str | None, holder: str) -> dict[str, Any]:
    """The argument of `train_loop_per_worker`, which documents the keys."""
    settings: dict[str, Any] = {
        "experiment": SecretStr(to_yaml(experiment)),  # Ray's dashboard shows these settings
        "dataset": dataset.location,
        "fingerprint": dataset.fingerprint,
        "parent": parent,
        "holder": holder,
        "token": holder if is_local(experiment.storage) else None,
    }
    root = dataset.root if not experiment.data.cache_decoded and is_local(dataset.root) else None
    if root:
        settings["root"] = root
        settings["files"] = shared_storage.sample_files(filesystem_of(root)[1])
    return settings


def _has_live_worker() -> bool:
    """Whether this job has a Ray Train worker, of any training, on any node."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, job_id=job, actor_state_name="ALIVE")
    return any(actor["ActorClassName"].startswith(_WORKER_ACTOR_CLASS) for actor in actors.values())


# ------------------------------------------------------------------------------------------------------- signals
@contextmanager
def _handle_signals(experiment: Experiment) -> Iterator[list[int]]:
    """Yields a list that collects SIGTERM and SIGINT. A second signal exits the process at once.

    Handles none in a thread of Ray Tune, which stops its trials itself.
    """
    preemption.clear_stop_request(experiment)
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        with suppress(OSError):  # stdout may be closed
            print("Stopping after this step; saving a checkpoint. Press Ctrl-C again to quit immediately.", flush=True)

    for number in previous_handlers:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        try:
            preemption.clear_stop_request(experiment)
        except Exception as failure:  # must not hide what the block raises; the next start clears it too
            _log.warning("cannot remove the stop file of the run %r (%r)", experiment.name, failure)


def _try_request_stop(experiment: Experiment) -> bool:
    """Whether the request was written. Not called in the signal handler, whose errors would end the training."""
    try:
        preemption.request_stop(experiment)
    except Exception as failure:
        _log.warning("cannot write the stop file of the run %r (%r); retrying", experiment.name, failure)
        return False
    return True


# -------------------------------------------------------------------------------------------------------- checks
def check_experiment(experiment: Experiment, searched_fields: Collection[str] = ()) -> None:
    """Checks all that needs neither clips nor a cluster.

    Args:
        searched_fields: In a trial, the fields that its study varies.

    Raises:
        ConfigError: The experiment cannot be trained.
    """
    learners.check(experiment, searched_fields)
    _build_on_meta(experiment.model, experiment.clip, experiment.data.segments.frames)
    batch_size, workers = experiment.train.global_batch_size, experiment.cluster.max_workers
    if batch_size < workers:
        raise ConfigError(
            f"train.global_batch_size: must have a clip for each of cluster.workers={workers} (value {batch_size})"
        )
    if read_text(join(experiment.run_dir, _EXPERIMENT_FILE)) is None:
        _check_init_from(experiment)


def check_run(experiment: Experiment, dataset: ClipDataset, searched_fields: Collection[str] = ()) -> None:
    """Checks all that can be known before anything starts: `check_experiment`, and that there are clips.

    Raises:
        ConfigError: The experiment cannot be trained on the dataset.
    """
    check_experiment(experiment, searched_fields)
    for split in ("training", "validation"):
        if not len(dataset.split_indices(split)):
            raise ConfigError(f"data.root: contains no {split} clips; {dataset.location} lists the rejected videos")


@functools.lru_cache(maxsize=32)
def _build_on_meta(model: ModelConfig, clip: ClipConfig, frames: int, ema_decay: float = 0.0) -> learners.Learner:
    """Builds the learner on the meta device, where it takes no memory.

    Args:
        frames: `data.segments.frames`: frames of the training segments, or 0 for whole clips.

    Raises:
        ConfigError: The model cannot have these sizes.
    """
    data = DataConfig(segments=SegmentsConfig(frames=frames))
    try:
        with torch.device("meta"):
            experiment = Experiment(model=model, clip=clip, data=data, optim=OptimConfig(ema_decay=ema_decay))
            return learners.build(experiment, torch.device("meta"))
    except (RuntimeError, TypeError, OverflowError) as error:  # a tensor size beyond what torch supports
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model: torch cannot build a {model.kind} of these sizes: {reason}") from error


def estimate_checkpoint_bytes(experiment: Experiment) -> int:
    """Approximate size of one checkpoint of the experiment's training."""
    frames, ema_decay = experiment.data.segments.frames, experiment.optim.ema_decay
    return checkpoints.estimate_bytes(_build_on_meta(experiment.model, experiment.clip, frames, ema_decay))


def _check_disk_space(experiment: Experiment) -> None:
    """Raises ConfigError if the storage has no room for a checkpoint next to the one that it supersedes."""
    size, available = estimate_checkpoint_bytes(experiment), checkpoint_selection.available_bytes(experiment)
    if _MIN_CHECKPOINTS * size > available:
        raise ConfigError(
            f"storage: a checkpoint of {experiment.name!r} takes about {size / 1e9:.2g} GB, and the last one stays "
            f"until the next is complete, but only {available / 1e9:.2g} GB are available on the disk "
            f"(value {experiment.storage!r}); free some space, or use another folder"
        )


def _warn_if_disk_is_small(experiment: Experiment) -> None:
    train = experiment.train
    size, available = estimate_checkpoint_bytes(experiment), checkpoint_selection.available_bytes(experiment)
    max_checkpoints = train.keep_checkpoints + 3  # the best validations, the newest two, and one that is being written
    if not train.checkpoint_every:
        max_checkpoints = min(max_checkpoints, math.ceil(train.epochs / train.validate_every))
    if max_checkpoints * size > available:
        print(
            f"warning: train.keep_checkpoints: up to {max_checkpoints} checkpoints of {size / 1e9:.2g} GB each are "
            f"kept at once (value {train.keep_checkpoints}), but only {available / 1e9:.2g} GB are available on the "
            f"disk of {experiment.storage}",
            file=sys.stderr,
            flush=True,
        )


def _validate_run_config(experiment: Experiment, dataset: ClipDataset, mutable_fields: tuple[str, ...]) -> None:
    """Records the experiment and dataset in the folder of a new run, or compares them with those of an existing run.

    Also records the dataset's location, which `jobs/prepare.py --prune` leaves alone while the run lock is held.

    Raises:
        ConfigError: The run started with other clips, or with other values of fields that are not mutable.
    """
    run_dir = experiment.run_dir
    recorded_yaml = read_text(join(run_dir, _EXPERIMENT_FILE), "replace")
    if recorded_yaml is None:
        _check_init_from(experiment)
        _check_disk_space(experiment)
        write_text(join(run_dir, _FINGERPRINT_FILE), dataset.fingerprint)
        write_text(join(run_dir, DATASET_LOCATION_FILE), dataset.location)
        write_text(join(run_dir, _EXPERIMENT_FILE), to_yaml(experiment))
        return
    if read_text(join(run_dir, _FINGERPRINT_FILE)) != dataset.fingerprint:
        raise ConfigError(
            f"data.root: the run {experiment.name!r} was started with other clips than those that are now in "
            f"{dataset.location}; use another name=..., or remove {run_dir}"
        )
    _check_immutable_fields(experiment, recorded_yaml, mutable_fields)
    _check_disk_space(experiment)
    write_text(join(run_dir, DATASET_LOCATION_FILE), dataset.location)


def _check_immutable_fields(experiment: Experiment, recorded_yaml: str, mutable_fields: tuple[str, ...]) -> None:
    run_dir = experiment.run_dir
    try:
        before, now = flatten(from_yaml(recorded_yaml)), flatten(experiment)
    except ConfigError as error:
        raise ConfigError(
            f"{join(run_dir, _EXPERIMENT_FILE)}: cannot read the experiment that the run was started with: {error}"
        ) from error
    if experiment.optim.schedule == "cosine" and before["train.epochs"] != now["train.epochs"]:
        raise ConfigError(
            f"train.epochs: the cosine schedule of the run {experiment.name!r} ends after {before['train.epochs']} "
            f"epochs, so its learning rate would jump (value {now['train.epochs']}); use another name=... and "
            f"train.init_from={experiment.name}"
        )
    for name in ("model.kind", *now):  # the kind first: another model has other fields
        if name.startswith(mutable_fields):
            continue
        if redact_credentials(str(before[name])) != redact_credentials(str(now[name])):
            raise ConfigError(
                f"{name}: the run {experiment.name!r} was started with {before[name]!r} (value {now[name]!r}); "
                f"use another name=..., or remove {run_dir}"
            )


def _check_init_from(experiment: Experiment) -> None:
    """Raises ConfigError if `train.init_from` has no valid checkpoint, or one whose networks do not match."""
    try:
        checkpoint = checkpoint_selection.resolve_init_from(experiment)
        if checkpoint is not None:
            learner = _build_on_meta(experiment.model, experiment.clip, experiment.data.segments.frames)
            checkpoints.check_pretrained(checkpoint, learner)
    except (ConfigError, checkpoint_format.CorruptCheckpoint) as error:
        raise ConfigError(
            f"train.init_from: {error} (value {experiment.train.init_from!r}; relative paths start at {os.getcwd()})"
        ) from error
