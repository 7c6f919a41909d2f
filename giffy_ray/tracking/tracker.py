"""Logging to MLflow.

Trackers put events into an outbox in the run's folder, and a thread uploads them. A server that is down, slow or broken
neither stops nor delays a training; what it has not received is sent when the run restarts, or by
jobs/replay_tracking.py. Only rank 0 of a training logs; the other ranks have a Tracker without a run.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from pyarrow import fs

from giffy_ray.config import ConfigError, Experiment, flatten, to_yaml
from giffy_ray.core.messages import print_message
from giffy_ray.core.run_lock import RunLockLost
from giffy_ray.core.storage import (
    filesystem_of,
    is_file,
    is_local,
    join,
    read_bytes,
    read_text,
    redact_credentials,
    write_bytes,
)
from giffy_ray.tracking.outbox import Outbox, has_waiting, parse_kind
from giffy_ray.tracking.system_metrics import SystemMetricsSampler
from giffy_ray.tracking.ui_view import run_colour_tags
from giffy_ray.tracking.uploader import MlflowUploader, fetch_params
from giffy_ray.tracking.uri import check_address, check_experiment_name, sqlite_address

__all__ = [
    "Tracker",
    "check_tracking",
    "fetch_params",
    "open_evaluation",
    "open_run",
    "replay",
    "sqlite_address",
    "tracking_uri",
]

_MAX_PARAM_LENGTH = 6000  # characters, MLflow's limit
_LAST_ANIMATION = "last_animation.webp"  # in a child run's folder `tracking`, for its parent run
_log = logging.getLogger(__name__)


def tracking_uri(experiment: Experiment) -> str:
    """Returns `tracking.uri`, or the address of an SQLite file in a local `storage`.

    Raises:
        ConfigError: `storage` is a bucket and `tracking.uri` is not set.
    """
    if experiment.tracking.uri:
        return experiment.tracking.uri
    if not is_local(experiment.storage):
        raise ConfigError(
            f"tracking.uri: give the address of an MLflow server; the default is an SQLite file in `storage`, which "
            f"cannot be in a bucket ({redact_credentials(experiment.storage)!r}) (value None)"
        )
    Path(experiment.storage).mkdir(parents=True, exist_ok=True)
    return sqlite_address(join(experiment.storage, "mlflow.db"))


def check_tracking(experiment: Experiment) -> None:
    """Checks `tracking.*` without asking a server: one that is down does not prevent a training.

    Raises:
        ConfigError: The address or the experiment name can never work.
    """
    uri = tracking_uri(experiment)
    check_address(uri)
    check_experiment_name(uri, experiment.tracking.experiment)


class Tracker:
    """Logs to one MLflow run. Without an outbox, as on ranks other than 0, every method returns at once.

    As a context manager it finishes the run: as FINISHED, as KILLED on SystemExit and KeyboardInterrupt, and otherwise
    as FAILED. If another process has taken over the run, its status is left to that process.

    Attributes:
        run_dir: The run's folder, which identifies it.
    """

    def __init__(
        self,
        outbox: Outbox | None = None,
        uploader: MlflowUploader | None = None,
        run_dir: str = "",
        log_animations: bool = True,
        keep_last_animation: bool = False,
        send_trials: Callable[[], int] = lambda: 0,
    ):
        """Creates a tracker; see `open_run`.

        Args:
            outbox: Where events are stored.
            uploader: Sends them to MLflow.
            run_dir: The run's folder.
            log_animations: `tracking.samples`.
            keep_last_animation: Keep the last animation in the run's folder, for `copy_last_animation`.
            send_trials: Sends the undelivered events of child runs; returns how many remain.
        """
        self.run_dir = run_dir
        self._outbox = outbox
        self._uploader = uploader
        self._log_animations = log_animations
        self._keep_last_animation = keep_last_animation
        self._send_trials = send_trials
        self._undelivered_of_trials = 0
        self._sampler: SystemMetricsSampler | None = None
        self._finished = False

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and issubclass(kind, RunLockLost):
            if self._sampler:
                self._sampler.stop(sample=False)
            if self._uploader:
                self._uploader.close()
        elif not self._finished:
            if kind is None:
                status = "FINISHED"
            elif issubclass(kind, SystemExit | KeyboardInterrupt):
                status = "KILLED"
            else:
                status = "FAILED"
            self.finish(status)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run. Waits until the run exists; raises TimeoutError if MLflow does not answer."""
        assert self._uploader
        return self._uploader.wait_for_run_id()

    def flush(self) -> None:
        """Waits until MLflow has received everything so far. Raises TimeoutError if it does not answer."""
        if self._uploader:
            self._uploader.flush()

    def sample_system_metrics(self, cpus: float, gpus: float) -> None:
        """Samples this machine until the run finishes.

        `cost/cpu_hours` and `cost/gpu_hours` continue from the previous start of the run.

        Args:
            cpus: CPUs that the training holds.
            gpus: GPUs that it holds.
        """
        if self._outbox and not self._sampler:
            self._sampler = SystemMetricsSampler(self._put_metrics, self.run_dir, cpus, gpus)

    def log_dataset(self, name: str, fingerprint: str, source: str, counts: Mapping[str, int]) -> None:
        """Logs the training dataset as an input of the run."""
        source_type = source.partition("://")[0] if "://" in source else "local"
        dataset = {
            "name": name,
            "digest": fingerprint,
            "source_type": source_type,
            "source": json.dumps({"uri": redact_credentials(source)}),
            "profile": json.dumps(dict(counts)),
        }
        self._put({"kind": "inputs", "dataset": dataset}, key="inputs")

    def log_metrics(self, metrics: Mapping[str, float], step: int, group: str = "metrics") -> None:
        """Logs the metrics of a step once, even if the step runs again after an interruption.

        Args:
            metrics: `section/name` -> value.
            step: The step.
            group: Distinguishes several calls for the same step.
        """
        self._put_metrics(metrics, step, f"{group}-{step:09}")

    def log_results(self, results: Mapping[str, float]) -> None:
        """Logs values of the run as a whole."""
        self._put_metrics(results, 0)

    def log_text(self, text: str, name: str) -> None:
        """Logs a text file, without the credentials in it."""
        self._put_file(name, None, redact_credentials(text).encode())

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if self._outbox:
            self._put_file(path.name, folder, path.read_bytes())

    def log_rendered(self, render: Callable[[], bytes], name: str, step: int) -> None:
        """Renders and logs a file once per step. It replaces the file of an earlier step."""
        key = f"{name}-{step:09}"
        if self._outbox and not self._outbox.has(key):
            self._put({"kind": "files", "folder": None, "names": [name], "tags": {}}, render(), key)

    def log_animation(self, render: Callable[[], bytes], name: str, step: int) -> None:
        """Renders and logs an animated WebP once per step, for MLflow's image grid; see `tracking.samples`.

        The grid plays `<name>+compressed.webp`, reads the step only from `<name>.webp`, and opens the latter on a
        click. So the latter is a still image, of 4 % of the size. The grid's slider starts at step 0.
        """
        key = _animation_key(name, step)
        if self._outbox and self._log_animations and not self._outbox.has(key):
            self._put_animation(render(), name, step, key)

    def copy_last_animation(self, child: str, name: str, step: int) -> None:
        """Logs the last animation of a child run as one of this run, once per step, if the child has one.

        Args:
            child: The child's folder in that of this run.
            name: Name of the animation in this run.
            step: The step.
        """
        key = _animation_key(name, step)
        if self._outbox and self._log_animations and not self._outbox.has(key):
            path = join(self.run_dir, child, "tracking", _LAST_ANIMATION)
            try:
                animation = read_bytes(path) if is_file(path) else None
            except OSError as failure:  # the search must not end because of it; the next call tries again
                _log.warning("cannot read %s: %s", path, redact_credentials(str(failure)))
                return
            if animation is not None:
                self._put_animation(animation, name, step, key)

    def close_children(self) -> None:
        """Marks child runs that the search stopped as KILLED.

        First sends their undelivered events: each of them waited only a while for a server that was down.
        """
        self._undelivered_of_trials = self._send_trials()
        self._put({"kind": "close_children"})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run. Waits a while for MLflow, and prints which events remain in the outbox."""
        self._finished = True
        if self._sampler:
            self._sampler.stop()
        try:
            self._put({"kind": "status", "status": status})
        finally:  # a storage failure must not leave the thread running
            if self._uploader:
                self._uploader.close()
        if self._undelivered_of_trials:
            self._undelivered_of_trials = self._send_trials()

    def _put_metrics(self, metrics: Mapping[str, float], step: int, key: str = "") -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._put({"kind": "metrics", "values": values, "step": step, "time_ms": int(time.time() * 1000)}, key=key)

    def _put_file(self, name: str, folder: str | None, content: bytes) -> None:
        self._put({"kind": "files", "folder": folder, "names": [name], "tags": {}}, content)

    def _put_animation(self, animation: bytes, name: str, step: int, key: str) -> None:
        stem = f"{name}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
        payload = {"kind": "files", "folder": "images", "tags": {"mlflow.loggedImages": "True"}}
        self._put({**payload, "names": [f"{stem}.webp"]}, _extract_middle_frame(animation))
        self._put({**payload, "names": [f"{stem}+compressed.webp"]}, animation, key)
        if self._keep_last_animation:
            try:
                write_bytes(join(self.run_dir, "tracking", _LAST_ANIMATION), animation)
            except OSError as failure:  # the training must not end because of it
                _log.warning("cannot write to %s: %s", self.run_dir, redact_credentials(str(failure)))

    def _put(self, payload: Mapping, content: bytes = b"", key: str = "") -> None:
        if self._outbox and self._uploader:
            self._outbox.put(payload, content, key)
            self._uploader.wake()


def open_run(
    experiment: Experiment, rank: int = 0, parent: str | None = None, tags: Mapping[str, str] | None = None
) -> Tracker:
    """Opens the MLflow run of an experiment: resumes an interrupted run, or creates one.

    A new run has every field of the experiment as a parameter, and its YAML as a file.

    Args:
        experiment: The experiment; its name identifies the run.
        rank: On ranks other than 0 the tracker logs nothing.
        parent: Folder of the run that MLflow shows this one under.
        tags: More tags of a new run.
    """
    if rank != 0:
        return Tracker()
    send_trials = functools.partial(_send_trials, experiment)
    return _open(experiment, experiment.name, experiment.run_dir, parent, tags or {}, send_trials)


def open_evaluation(experiment: Experiment) -> Tracker:
    """Creates an MLflow run called NAME-evaluation, below the run of the experiment if MLflow has it.

    It has a folder of its own, inside that of the run, because a training may log to the run meanwhile.
    """
    run_dir = experiment.run_dir
    run_id = read_text(join(run_dir, "mlflow_run"))
    # A tag rather than `parent`, which would wait for the run: it may be on another server.
    tags = {"mlflow.parentRunId": run_id} if run_id else {}
    evaluation_dir = join(run_dir, f"evaluation_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")
    return _open(experiment, f"{experiment.name}-evaluation", evaluation_dir, None, tags)


def replay(experiment: Experiment) -> int:
    """Sends the undelivered and refused events of a run, and of the trials below it.

    The caller makes sure that nothing else writes to these runs.

    Returns:
        The number of events that MLflow still does not have.

    Raises:
        ConfigError: There is no such run.
    """
    check_tracking(experiment)
    run_dir = experiment.run_dir
    run_dirs = [path for path in (run_dir, *_list_subfolders(run_dir)) if Outbox.exists_in(join(path, "tracking"))]
    if not run_dirs:
        raise ConfigError(
            f"name: no logged events in {redact_credentials(run_dir)}; give the name of a run (value "
            f"{experiment.name!r})"
        )
    for path in run_dirs:
        Outbox(join(path, "tracking")).requeue_refused(has_run=read_text(join(path, "mlflow_run")) is not None)
    return sum(_send(experiment, run_dirs))


def _open(
    experiment: Experiment,
    name: str,
    run_dir: str,
    parent: str | None,
    tags: Mapping[str, str],
    send_trials: Callable[[], int] = lambda: 0,
) -> Tracker:
    outbox, uploader = _connect(experiment, run_dir)
    tracker = Tracker(
        outbox,
        uploader,
        run_dir,
        log_animations=experiment.tracking.samples,
        keep_last_animation=parent is not None,
        send_trials=send_trials,
    )
    run_tags = {
        "mlflow.source.name": "giffy_ray",  # the page shows the commit next to it
        "mlflow.source.type": "LOCAL",
        **run_colour_tags(name),
        **_git_tags(),
        "requirements.sha256": _hash_requirements(),
        **tags,
    }
    run_tags = {tag: redact_credentials(value) for tag, value in run_tags.items()}
    params = {field: redact_credentials(str(value))[:_MAX_PARAM_LENGTH] for field, value in flatten(experiment).items()}
    begin = {"kind": "begin", "name": name, "parent": parent, "tags": run_tags, "params": params}
    tracker._put(begin, redact_credentials(to_yaml(experiment)).encode())
    return tracker


def _connect(experiment: Experiment, run_dir: str) -> tuple[Outbox, MlflowUploader]:
    artifacts = None if experiment.tracking.uri else Path(experiment.storage, "artifacts").as_uri()
    outbox = Outbox(join(run_dir, "tracking"))
    uri = tracking_uri(experiment)
    return outbox, MlflowUploader(outbox, uri, experiment.tracking.experiment, artifacts, run_dir)


def _send_trials(experiment: Experiment) -> int:
    """Sends the undelivered events of the runs below that of the experiment. Returns how many remain."""
    trial_dirs = _list_subfolders(experiment.run_dir)
    with ThreadPoolExecutor(16) as pool:  # each is a request, of a bucket perhaps
        waiting = list(pool.map(lambda trial_dir: has_waiting(join(trial_dir, "tracking")), trial_dirs))
    return sum(_send(experiment, [path for path, waits in zip(trial_dirs, waiting, strict=True) if waits]))


def _send(experiment: Experiment, run_dirs: Sequence[str]) -> Iterator[int]:
    """Sends the events of runs that have ended, one run at a time. Yields how many remain of each."""
    uploader = None
    for index, run_dir in enumerate(run_dirs):
        if uploader and uploader.is_server_away():
            print_message(f"MLflow still does not answer: the events of {len(run_dirs) - index} more runs wait too")
            yield from (len(Outbox(join(path, "tracking")).waiting_names()) for path in run_dirs[index:])
            return
        if run_dir != experiment.run_dir:
            _close_killed(Outbox(join(run_dir, "tracking")))
        _, uploader = _connect(experiment, run_dir)
        yield uploader.close()


def _close_killed(outbox: Outbox) -> None:
    """Ends a run that was killed before MLflow had it: `close_children` did not find it."""
    kinds = [parse_kind(name) for name in outbox.waiting_names()]
    if "begin" in kinds and "status" not in kinds:
        outbox.put({"kind": "status", "status": "KILLED"})


def _list_subfolders(run_dir: str) -> list[str]:
    """Lists the folders in a run's folder, among them those of its trials."""
    filesystem, path = filesystem_of(run_dir)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(join(run_dir, info.base_name) for info in infos if info.type == fs.FileType.Directory)


def _animation_key(name: str, step: int) -> str:
    return f"animation-{name}-{step:09}"


def _extract_middle_frame(animation: bytes) -> bytes:
    """Returns the middle frame of an animated WebP, and any other bytes unchanged."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(animation)) as frames:
            frames.seek(getattr(frames, "n_frames", 1) // 2)
            buffer = io.BytesIO()
            frames.convert("RGB").save(buffer, "WEBP", quality=80)
    except UnidentifiedImageError:
        return animation
    return buffer.getvalue()


def _hash_requirements() -> str:
    """Hashes the versions of all installed packages."""
    versions = sorted(f"{package.name}=={package.version}" for package in distributions())
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()


def _git_tags() -> dict[str, str]:
    """Returns the commit of the running code, and whether files differ from it; 'unknown' without a checkout.

    `ray job submit --working-dir` runs a copy without its .git. Then the checkout of an editable installation, from
    which the copy was most likely made, supplies the commit.
    """
    for folder in (Path(__file__).parent, _editable_install_dir()):
        try:
            command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            continue
        commit, _, dirty = result.stdout.strip().partition("-")
        return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(dirty)).lower()}
    return {"mlflow.source.git.commit": "unknown"}


def _editable_install_dir() -> str:
    """Returns the folder of an editable installation, or an empty string."""
    try:
        url = json.loads(distribution("giffy_ray").read_text("direct_url.json") or "{}").get("url", "")
    except PackageNotFoundError:
        return ""
    return url.removeprefix("file://")
