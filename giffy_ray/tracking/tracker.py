"""Everything that goes to MLflow.

What is logged is put into an outbox in the run's folder, and a thread takes it to MLflow: a server that is down, slow
or broken neither stops nor slows a training, and what it has not taken is sent when the run is started again, or by
jobs/replay_tracking.py. Only rank 0 of a training writes; the other ranks hold a Tracker that keeps silent.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
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
from giffy_ray.core.messages import say
from giffy_ray.core.run_lock import RunLockLost
from giffy_ray.core.storage import filesystem_of, is_local, join, read_text, redact_credentials
from giffy_ray.tracking.outbox import Outbox, has_waiting, kind_in
from giffy_ray.tracking.system_metrics import Sampler
from giffy_ray.tracking.ui_view import colour
from giffy_ray.tracking.uploader import MlflowUploader, params_of
from giffy_ray.tracking.uri import check_address, check_experiment_name, sqlite_address

__all__ = [
    "Tracker",
    "check_tracking",
    "open_evaluation",
    "open_run",
    "params_of",
    "replay",
    "sqlite_address",
    "tracking_uri",
]

_LONGEST_PARAM = 6000  # characters, of MLflow


def tracking_uri(experiment: Experiment) -> str:
    """`tracking.uri`, or the SQLite file in a local storage. Raises ConfigError."""
    if experiment.tracking.uri:
        return experiment.tracking.uri
    if not is_local(experiment.storage):
        raise ConfigError(
            f"tracking.uri: give the address of an MLflow server; without one runs are kept in an SQLite file, "
            f"which cannot be on {redact_credentials(experiment.storage)!r}"
        )
    Path(experiment.storage).mkdir(parents=True, exist_ok=True)
    return sqlite_address(join(experiment.storage, "mlflow.db"))


def check_tracking(experiment: Experiment) -> None:
    """Raises ConfigError for what can be known to be wrong with `tracking.*` before anything starts.

    Waits for no server: one that is away is no reason not to train.
    """
    uri = tracking_uri(experiment)
    check_address(uri)
    check_experiment_name(uri, experiment.tracking.experiment)


class Tracker:
    """Writes to one MLflow run. On ranks other than 0 there is none, and every call returns at once."""

    def __init__(
        self,
        outbox: Outbox | None = None,
        carrier: MlflowUploader | None = None,
        place: str = "",
        samples: bool = True,
        send_trials: Callable[[], int] = lambda: 0,
    ):
        """`send_trials` sends what MLflow has not taken of the runs below this one."""
        self.place = place  # of the run: its folder, which is what others know it by
        self._outbox, self._carrier, self._samples, self._send_trials = outbox, carrier, samples, send_trials
        self._unsent_of_trials = 0
        self._sampler: Sampler | None = None
        self._finished = False

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes the run unless `finish` was called: as KILLED where it was stopped from outside, as FAILED where
        something else was raised. Where another process has taken the run, its status is that process's to tell.
        """
        if kind and issubclass(kind, RunLockLost):
            if self._sampler:
                self._sampler.end(sample=False)
            if self._carrier:
                self._carrier.end()
        elif not self._finished:
            killed = kind is not None and issubclass(kind, SystemExit | KeyboardInterrupt)
            self.finish("FINISHED" if kind is None else "KILLED" if killed else "FAILED")

    @property
    def run_id(self) -> str:
        """MLflow's. Waits until the run is there; raises TimeoutError where MLflow does not answer."""
        assert self._carrier
        return self._carrier.run_id()

    def flush(self) -> None:
        """Waits until MLflow has taken what was logged so far. Raises TimeoutError where it does not answer."""
        if self._carrier:
            self._carrier.flush()

    def sample(self, cpus: float, gpus: float) -> None:
        """Has this machine sampled until the run is finished, and what it costs: `cpus` and `gpus` are what it holds.

        `cost/cpu_hours` and `cost/gpu_hours` go on where an earlier start of the run left them.
        """
        if self._outbox and not self._sampler:
            self._sampler = Sampler(self._metrics, self.place, cpus, gpus)

    def log_data_set(self, name: str, fingerprint: str, source: str, counts: Mapping[str, int]) -> None:
        """Names the data set among the run's inputs, as what it was trained on."""
        kind = source.partition("://")[0] if "://" in source else "local"
        dataset = {
            "name": name,
            "digest": fingerprint,
            "source_type": kind,
            "source": json.dumps({"uri": redact_credentials(source)}),
            "profile": json.dumps(dict(counts)),
        }
        self._put({"kind": "inputs", "dataset": dataset}, key="inputs")

    def log_metrics(self, metrics: Mapping[str, float], step: int, what: str = "metrics") -> None:
        """Logs `phase/name` values in one call. A step that was logged before an interruption is not logged again.

        `what` tells apart those that are logged at the same step in several calls.
        """
        self._metrics(metrics, step, f"{what}-{step:09}")

    def log_results(self, results: Mapping[str, float]) -> None:
        """Logs values that belong to the run as a whole."""
        self._metrics(results, 0)

    def log_text(self, text: str, name: str) -> None:
        """Logs a text file, without the credentials of addresses."""
        self._files([name], None, redact_credentials(text).encode())

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if self._outbox:
            self._files([path.name], folder, path.read_bytes())

    def log_drawn(self, draw: Callable[[], bytes], name: str, step: int) -> None:
        """Draws a file and logs it, in place of that of an earlier step; once for each step."""
        letter = f"{name}-{step:09}"
        if self._outbox and not self._outbox.has(letter):
            self._put({"kind": "files", "folder": None, "names": [name], "tags": {}}, draw(), letter)

    def log_animation(self, draw: Callable[[], bytes], key: str, step: int) -> None:
        """Draws an animated WebP and logs it for MLflow's image grid, with its step slider; not where
        `tracking.samples` is off.

        The grid plays `<name>+compressed.webp`, knows the step only from `<name>.webp`, and shows the latter when it
        is clicked: that one is a still, 4 % of the size. The slider starts at step 0.
        """
        letter = f"animation-{key}-{step:09}"
        if self._outbox and self._samples and not self._outbox.has(letter):
            name = f"{key}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
            head = {"kind": "files", "folder": "images", "tags": {"mlflow.loggedImages": "True"}}
            picture = draw()
            self._put({**head, "names": [f"{name}.webp"]}, _still(picture))
            self._put({**head, "names": [f"{name}+compressed.webp"]}, picture, letter)

    def close_children(self) -> None:
        """Marks the runs under this one that were ended from outside, by the search, as killed.

        First what MLflow has not taken of them is sent: each waited only a while for a server that was away.
        """
        self._unsent_of_trials = self._send_trials()
        self._put({"kind": "close_children"})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run, and waits a while for what MLflow has not taken yet; what is left is said, and kept."""
        self._finished = True
        if self._sampler:
            self._sampler.end()
        try:
            self._put({"kind": "status", "status": status})
        finally:  # whatever the storage says: the thread ends with the run
            if self._carrier:
                self._carrier.end()
        if self._unsent_of_trials:
            self._unsent_of_trials = self._send_trials()

    def _metrics(self, metrics: Mapping[str, float], step: int, key: str = "") -> None:
        values = {name: float(value) for name, value in metrics.items()}
        head = {"kind": "metrics", "values": values, "step": step, "time_ms": int(time.time() * 1000)}
        self._put(head, key=key)

    def _files(self, names: list[str], folder: str | None, content: bytes) -> None:
        self._put({"kind": "files", "folder": folder, "names": names, "tags": {}}, content)

    def _put(self, head: Mapping, content: bytes = b"", key: str = "") -> None:
        if self._outbox and self._carrier:
            self._outbox.put(head, content, key)
            self._carrier.wake()


def open_run(
    experiment: Experiment, rank: int = 0, parent: str | None = None, tags: Mapping[str, str] | None = None
) -> Tracker:
    """The MLflow run of the experiment's name: the one that an interrupted run left, or a new one.

    A new one holds the experiment: every field as a parameter, and its YAML. `parent` is the place of the run that it
    is shown under.
    """
    if rank != 0:
        return Tracker()
    place = join(experiment.storage, experiment.name)
    send_trials = functools.partial(_send_trials, experiment)
    return _opened(experiment, experiment.name, place, parent, tags or {}, send_trials)


def open_evaluation(experiment: Experiment) -> Tracker:
    """A new MLflow run, NAME-evaluation, shown under the run of the experiment's name where MLflow has that.

    It has a folder of its own, below that of the run: a training may be writing to the run itself meanwhile.
    """
    place = join(experiment.storage, experiment.name)
    evaluated = read_text(join(place, "mlflow_run"))
    # The tag, not `parent`, for which it would wait: the run may be on another server.
    tags = {"mlflow.parentRunId": evaluated} if evaluated else {}
    own = join(place, f"evaluation_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")
    return _opened(experiment, f"{experiment.name}-evaluation", own, None, tags)


def _opened(
    experiment: Experiment,
    name: str,
    place: str,
    parent: str | None,
    tags: Mapping[str, str],
    send_trials: Callable[[], int] = lambda: 0,
) -> Tracker:
    tracker = Tracker(*_connected(experiment, place), place, experiment.tracking.samples, send_trials)
    source = {"mlflow.source.name": "giffy_ray", "mlflow.source.type": "LOCAL"}  # the page shows the commit beside it
    own_tags = {**source, **colour(name), **_git(), "requirements.sha256": _lock_sha256(), **tags}
    own_tags = {tag: redact_credentials(value) for tag, value in own_tags.items()}
    params = {name: redact_credentials(str(value))[:_LONGEST_PARAM] for name, value in flatten(experiment).items()}
    begin = {"kind": "begin", "name": name, "parent": parent, "tags": own_tags, "params": params}
    tracker._put(begin, redact_credentials(to_yaml(experiment)).encode())
    return tracker


def _still(picture: bytes) -> bytes:
    """The middle frame of an animated WebP; any other bytes as they are."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture)) as frames:
            frames.seek(getattr(frames, "n_frames", 1) // 2)
            out = io.BytesIO()
            frames.convert("RGB").save(out, "WEBP", quality=80)
    except UnidentifiedImageError:
        return picture
    return out.getvalue()


def replay(experiment: Experiment) -> int:
    """Sends what MLflow has not taken, or has refused, of the run of the experiment's name and of the trials below it.

    Returns how many letters MLflow still does not have. Nobody else may write to these runs meanwhile. Raises
    ConfigError if there is no such run.
    """
    check_tracking(experiment)
    place = join(experiment.storage, experiment.name)
    places = [each for each in (place, *_below(place)) if Outbox.is_at(join(each, "tracking"))]
    if not places:
        raise ConfigError(f"name: nothing was logged in {redact_credentials(place)} (value {experiment.name!r})")
    for each in places:
        Outbox(join(each, "tracking")).readmit(has_run=read_text(join(each, "mlflow_run")) is not None)
    return sum(_send(experiment, places))


def _send_trials(experiment: Experiment) -> int:
    """Sends what MLflow has not taken of the runs below that of the experiment's name. Returns what is left."""
    trials = _below(join(experiment.storage, experiment.name))
    with ThreadPoolExecutor(16) as pool:  # one listing each, of a bucket perhaps
        waiting = list(pool.map(lambda trial: has_waiting(join(trial, "tracking")), trials))
    return sum(_send(experiment, [trial for trial, waits in zip(trials, waiting, strict=True) if waits]))


def _send(experiment: Experiment, places: Sequence[str]) -> Iterator[int]:
    """Sends what is in the outboxes of runs that have ended, one by one. Yields how many letters are left of each."""
    carrier = None
    for number, place in enumerate(places):
        if carrier and carrier.is_away():
            say(f"MLflow still does not answer: what {len(places) - number} more runs have logged waits too")
            yield from (len(Outbox(join(each, "tracking")).waiting()) for each in places[number:])
            return
        if place != join(experiment.storage, experiment.name):
            _close_killed(Outbox(join(place, "tracking")))
        carrier = _connected(experiment, place)[1]
        yield carrier.end()


def _close_killed(outbox: Outbox) -> None:
    """Ends a run that was killed before MLflow heard of it, and so before it was closed with the others."""
    kinds = [kind_in(name) for name in outbox.waiting()]
    if "begin" in kinds and "status" not in kinds:
        outbox.put({"kind": "status", "status": "KILLED"})


def _below(place: str) -> list[str]:
    """The folders in `place`; those of trials are among them."""
    filesystem, path = filesystem_of(place)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(join(place, info.base_name) for info in infos if info.type == fs.FileType.Directory)


def _connected(experiment: Experiment, place: str) -> tuple[Outbox, MlflowUploader]:
    artifacts = None if experiment.tracking.uri else Path(experiment.storage, "artifacts").as_uri()
    outbox = Outbox(join(place, "tracking"))
    return outbox, MlflowUploader(outbox, tracking_uri(experiment), experiment.tracking.experiment, artifacts, place)


def _lock_sha256() -> str:
    """Of the versions that are installed here."""
    versions = sorted(f"{each.name}=={each.version}" for each in distributions())
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()


def _git() -> dict[str, str]:
    """The commit of the code that runs, and whether files differ from it; 'unknown' without a checkout.

    `ray job submit --working-dir` runs a copy without its .git; the checkout that it was most likely copied from is
    the one that is installed here.
    """
    for folder in (Path(__file__).parent, _installed_from()):
        try:
            git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
            said = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
        commit, _, dirty = said.partition("-")
        return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(dirty)).lower()}
    return {"mlflow.source.git.commit": "unknown"}


def _installed_from() -> str:
    """The folder of an editable installation, or an empty string."""
    try:
        url = json.loads(distribution("giffy_ray").read_text("direct_url.json") or "{}").get("url", "")
    except PackageNotFoundError:
        return ""
    return url.removeprefix("file://")
