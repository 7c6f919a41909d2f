"""A training as the process sees it that asks for one: what is checked, the TorchTrainer, and how it is ended."""

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
from giffy_ray.data.prune import DATA_SET_LOCATION
from giffy_ray.training import checkpoints, learners, preemption, restarts
from giffy_ray.training.train_loop import FAILURE, RunFailure, train_loop

_WORKER = RayTrainWorker.__name__
_log = logging.getLogger(__name__)
# What may differ when a run is started again under its name.
MAY_CHANGE = (
    *(
        "train.epochs",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.max_skipped_steps",
        "train.validate_clips",
    ),
    *("storage", "data.root", "data.node_cache_gb", "speed.", "cluster.", "tracking.", "evaluate.", "search."),
)
# Ray Train looks for reports and dead workers this often; its default of 2 s is the price of every report.
_POLL_S = 0.2
# Seconds between looks whether a training that was asked to end has workers that could hear of it, and how many of
# these looks find none before its process ends.
_LOOK_S, _LOOKS_WITHOUT_WORKERS = 1.0, 5
_RESIZE_S = 60.0  # between looks whether there is room for more workers, each of which costs a restart
_START_TIMEOUT_S = 900  # a cloud node has to boot
# A machine that is lost while workers start spoils that start, and the next two, which still count on it.
_START_RETRIES = 3
_FEWEST_CHECKPOINTS = 2  # that a run keeps at once
_MIN_WORKERS_TIMEOUT_S = 60  # before a training that may do with fewer workers starts with those that there are


def train(
    experiment: Experiment,
    store: ClipDataset,
    share: WorkerResources,
    parent: str | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    searched: Collection[str] = (),
) -> str:
    """Trains to the end, or goes on where the run of this name was cut. Returns where the last checkpoint lies.

    `parent` is the place of the run that this one is shown under. `searched`: in a trial, the fields that its search
    varies. Raises ConfigError before anything starts,
    ray.train.TrainingFailedError or loop.RunFailure after. On SIGTERM and Ctrl-C the training ends after the
    step that it is at, with a checkpoint; then SystemExit is raised. Where it has no workers, as it waits for machines,
    the process ends.
    """
    failure = join(experiment.storage, experiment.name, FAILURE)
    # Beside the main thread, where Ray would take the signals for itself and leave no checkpoint.
    aside = ThreadPoolExecutor(1)
    with locked_run(experiment, store, searched=searched) as lease, _ended_by_signals(experiment) as signals:
        _warn_of_little_space(experiment)
        delete_file(failure)
        checkpoints.forget_reported(experiment)
        shared_storage.leave_token(experiment, lease.holder)
        if share.summary:
            print(share.summary, flush=True)
        training = aside.submit(_trainer(experiment, store, share, parent, callbacks, lease.holder).fit)
        aside.shutdown(wait=False)  # its thread ends with the training
        looks, asked = 0, False
        while wait([training], _LOOK_S).not_done and looks < _LOOKS_WITHOUT_WORKERS:
            asked = asked or (bool(signals) and _ask_to_stop(experiment))
            looks = looks + 1 if signals and not _worker_runs() else 0
        if training.done():
            shared_storage.remove_token(experiment, lease.holder)
            _end(training, RunLockWatcher(experiment.run_dir, lease.holder))
    if not training.done():
        print("no worker runs, so there is nothing to save", flush=True)
        os._exit(128 + signals[0])  # while Ray waits for machines, `fit` cannot be interrupted
    why = read_text(failure)
    if why is not None:
        raise RunFailure(why)
    if signals:
        raise SystemExit(128 + signals[0])
    return checkpoints.latest_checkpoint(experiment)


def _end(training: Future, watch: RunLockWatcher) -> None:
    """Raises what `fit` raised, or LeaseLost where its workers have ended because another process has the run."""
    try:
        result = training.result()
    except ray.train.TrainingFailedError as error:
        lost = _look(watch)
        if lost:
            raise RunLockLost(lost) from error
        raise
    # Rank 0 may have found it to be lost when this process did not, as where it was paused and goes on.
    lost = (result and result.return_value) or _look(watch)
    if lost:
        raise RunLockLost(lost)


def _look(watch: RunLockWatcher) -> str:
    """As `watch.look`. A storage that fails does not hide how the training ended: the lease has its own deadline."""
    try:
        return watch.look()
    except Exception as failure:
        _log.warning("%s: could not be read (%r)", watch.location, failure)
        return ""


@contextmanager
def locked_run(
    experiment: Experiment,
    store: ClipDataset,
    may_change: tuple[str, ...] = MAY_CHANGE,
    searched: Collection[str] = (),
) -> Iterator[RunLock]:
    """Inside, the run of the experiment's name is ours, and is of this experiment and these clips. Raises ConfigError.

    LeaseLost at the end of the block where it was lost. `may_change`: what may differ from before, fields, and sections
    that end with a point. `searched`: see learners.check.
    """
    check(experiment, store, searched)
    with run_lock(experiment.run_dir) as lease:
        _claim(experiment, store, may_change)
        yield lease


def _trainer(
    experiment: Experiment,
    store: ClipDataset,
    share: WorkerResources,
    parent: str | None,
    callbacks: Sequence[ray.train.UserCallback],
    holder: str,
) -> restarts.Trainer:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(restarts.POLL_DRAINS_S))
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # train.init_from may be a path from where the job was started
    cluster = experiment.cluster
    timeout_s = _START_TIMEOUT_S if cluster.min_workers == cluster.max_workers else _MIN_WORKERS_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_s)
    resources = {"CPU": share.cpus_per_worker, "GPU": share.gpus_per_worker}
    root = store.root if not experiment.data.cache_decoded and is_local(store.root) else None
    return restarts.Trainer(
        train_loop,
        decodes=not experiment.data.cache_decoded,
        train_loop_config={
            "experiment": SecretStr(to_yaml(experiment)),  # Ray's dashboard shows these settings
            "store": store.location,
            "fingerprint": store.fingerprint,
            "parent": parent,
            "holder": holder,
            "token": holder if is_local(experiment.storage) else None,
            **({"root": root, "files": shared_storage.sample_files(filesystem_of(root)[1])} if root else {}),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=share.gpus_per_worker > 0,
            # GPUs of a node have the fastest links among each other; cores are shared less the farther apart we are.
            placement_strategy="PACK" if share.gpus_per_worker else "SPREAD",
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=experiment.name,
            storage_path=experiment.storage,
            worker_runtime_env={"env_vars": MALLOC_ENV},
            # Ray takes its controller's own kind of callbacks here too.
            callbacks=[*callbacks, restarts.CheckpointBeforePreemption()],  # type: ignore[list-item]
            # All: rank 0 removes those that are not kept, as Ray Train keeps only the newest besides the best.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=_START_RETRIES * max(1, cluster.max_failures),
                max_preemption_failures=cluster.max_preemptions,
                # The callback sets it anew once it knows how long a checkpoint takes, and which workers are lost.
                preemption_grace_s=restarts.compute_grace_s(None),
                relax_collectives_on_preemption=True,
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def check_experiment(experiment: Experiment, searched: Collection[str] = ()) -> None:
    """What can be known to be wrong without clips and a cluster. `searched`: see learners.check. Raises ConfigError."""
    learners.check(experiment, searched)
    _build_on_meta(experiment.model, experiment.clip, experiment.data.segments.frames)
    batch, workers = experiment.train.global_batch_size, experiment.cluster.max_workers
    if batch < workers:
        raise ConfigError(
            f"train.global_batch_size: there must be a clip for each of cluster.workers={workers} (value {batch})"
        )
    if read_text(join(experiment.storage, experiment.name, "experiment.yaml")) is None:
        _check_start(experiment)


@functools.lru_cache(maxsize=32)
def _build_on_meta(model: ModelConfig, clip: ClipConfig, frames: int, ema: float = 0.0) -> learners.Learner:
    """The learner, without the memory that it takes, that trains on parts of `frames` frames, or on whole clips if 0.

    Raises ConfigError for what the model cannot do.
    """
    data = DataConfig(segments=SegmentsConfig(frames=frames))
    try:
        with torch.device("meta"):
            experiment = Experiment(model=model, clip=clip, data=data, optim=OptimConfig(ema_decay=ema))
            return learners.build(experiment, torch.device("meta"))
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes whose product torch cannot hold
        why = str(error).partition("\n")[0]
        raise ConfigError(f"model: torch cannot build a {model.kind} of these sizes: {why}") from error


def check(experiment: Experiment, store: ClipDataset, searched: Collection[str] = ()) -> None:
    """What can be known to be wrong before anything starts. Raises ConfigError."""
    check_experiment(experiment, searched)
    for split in ("training", "validation"):
        if not len(store.split_indices(split)):
            raise ConfigError(f"data.root: no {split} clips in it; see {store.location} for what was rejected")


def checkpoint_bytes(experiment: Experiment) -> int:
    """About how much a checkpoint of the experiment's training takes."""
    frames, ema = experiment.data.segments.frames, experiment.optim.ema_decay
    return checkpoints.estimate_bytes(_build_on_meta(experiment.model, experiment.clip, frames, ema))


def _check_space(experiment: Experiment) -> None:
    """Raises ConfigError where a checkpoint does not fit into the storage, beside the one that it takes over from."""
    size, free = checkpoint_bytes(experiment), checkpoints.free_bytes(experiment)
    if _FEWEST_CHECKPOINTS * size > free:
        raise ConfigError(
            f"storage: a checkpoint of {experiment.name!r} takes about {size / 1e9:.2g} GB, and the last one stays "
            f"until the next is complete, but {free / 1e9:.2g} GB are free on its disk (value {experiment.storage!r}); "
            "free some, or give another folder"
        )


def _warn_of_little_space(experiment: Experiment) -> None:
    train = experiment.train
    size, free = checkpoint_bytes(experiment), checkpoints.free_bytes(experiment)
    most = train.keep_checkpoints + 3  # those of the best validations, the newest two, and one that is being written
    if not train.checkpoint_every:
        most = min(most, math.ceil(train.epochs / train.validate_every))
    if most * size > free:
        print(
            f"warning: train.keep_checkpoints: up to {most} checkpoints of {size / 1e9:.2g} GB each are kept at once "
            f"(value "
            f"{train.keep_checkpoints}), and {free / 1e9:.2g} GB are free on the disk of {experiment.storage}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _ended_by_signals(experiment: Experiment) -> Iterator[list[int]]:
    """Inside, a second SIGTERM or Ctrl-C ends this process at once. Yields the list of those that came, one for now.

    In a thread of Ray Tune's there are none: Tune stops its trials itself.
    """
    preemption.clear_stop_request(experiment)
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(128 + number)
        with suppress(OSError):  # nobody may read it any more
            print("stopping after this step, with a checkpoint; a second signal ends the job at once", flush=True)

    for number in before:
        signal.signal(number, ask)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        try:
            preemption.clear_stop_request(experiment)
        except Exception as failure:  # must not hide what the block raises; the next start forgets it too
            _log.warning("the stop file of %r could not be removed (%r)", experiment.name, failure)


def _ask_to_stop(experiment: Experiment) -> bool:
    """Whether the request has reached the storage. Not in the signal handler: what it raises would end the training."""
    try:
        preemption.request_stop(experiment)
    except Exception as failure:
        _log.warning("the stop file of %r could not be written (%r); trying again", experiment.name, failure)
        return False
    return True


def _worker_runs() -> bool:
    """Whether this job has a worker of Ray Train, of any training, on any node."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, job_id=job, actor_state_name="ALIVE")
    return any(actor["ActorClassName"].startswith(_WORKER) for actor in actors.values())


def _claim(experiment: Experiment, store: ClipDataset, may_change: tuple[str, ...]) -> None:
    """Leaves the experiment and its clips' fingerprint in the run's folder, or compares them with what is there.

    Also where its clips are, which `jobs/prepare.py --prune` leaves alone while the run's lease is held.
    """
    folder = join(experiment.storage, experiment.name)
    text = read_text(join(folder, "experiment.yaml"), "replace")
    if text is None:
        _check_start(experiment)
        _check_space(experiment)
        write_text(join(folder, "data_set"), store.fingerprint)
        write_text(join(folder, DATA_SET_LOCATION), store.location)
        write_text(join(folder, "experiment.yaml"), to_yaml(experiment))
        return
    if read_text(join(folder, "data_set")) != store.fingerprint:
        raise ConfigError(
            f"data.root: the run {experiment.name!r} was started with other clips than there are now in "
            f"{store.location}; give another name=..., or remove {folder}"
        )
    try:
        before, now = flatten(from_yaml(text)), flatten(experiment)
    except ConfigError as error:
        raise ConfigError(f"{join(folder, 'experiment.yaml')}, which the run was started with: {error}") from error
    if experiment.optim.schedule == "cosine" and before["train.epochs"] != now["train.epochs"]:
        raise ConfigError(
            f"train.epochs: the cosine schedule of the run {experiment.name!r} ends after {before['train.epochs']} "
            f"epochs, so its learning rate would jump (value {now['train.epochs']}); give another name=... and "
            f"train.init_from={experiment.name}"
        )
    for name in ("model.kind", *now):  # the kind first: another one has other fields
        if redact_credentials(str(before[name])) != redact_credentials(str(now[name])) and not name.startswith(
            may_change
        ):
            raise ConfigError(
                f"{name}: the run {experiment.name!r} was started with {before[name]!r} (value {now[name]!r}); "
                f"give another name=..., or remove {folder}"
            )
    _check_space(experiment)
    write_text(join(folder, DATA_SET_LOCATION), store.location)


def _check_start(experiment: Experiment) -> None:
    """Raises ConfigError where a new run is to start from what is not there, or from a network of other layers."""
    try:
        origin = checkpoints.resolve_init_from(experiment)
        if origin is not None:
            ours = _build_on_meta(experiment.model, experiment.clip, experiment.data.segments.frames)
            checkpoints.check_start(origin, ours)
    except (ConfigError, checkpoints.DamagedCheckpoint) as error:
        start = experiment.train.init_from
        raise ConfigError(f"train.init_from: {error} (value {start!r}; a path is read from {os.getcwd()})") from error
