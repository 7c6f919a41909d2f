"""Everything that goes to MLflow.

What is logged is put into an outbox in the run's folder, and a thread takes it to MLflow: a server that is down, slow
or broken neither stops nor slows a training, and what it has not taken is sent when the run is started again, or by
jobs/replay_tracking.py. Only rank 0 of a training writes; the other ranks hold a Tracker that keeps silent.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from pyarrow import fs

from giffy_ray.config import ConfigError, Experiment, flatten, to_yaml
from giffy_ray.lease import LeaseLost
from giffy_ray.storage import filesystem_of, is_local, join, without_secrets
from giffy_ray.tracking.carrier import Carrier, params_of
from giffy_ray.tracking.outbox import Outbox
from giffy_ray.tracking.system import Sampler
from giffy_ray.tracking.view import colour

__all__ = ["Tracker", "open_run", "params_of", "replay", "tracking_uri"]

_LONGEST_PARAM = 6000  # characters, of MLflow


def tracking_uri(experiment: Experiment) -> str:
    """`tracking.uri`, or the SQLite file in a local storage. Raises ConfigError."""
    if experiment.tracking.uri:
        return experiment.tracking.uri
    if not is_local(experiment.storage):
        raise ConfigError(
            f"tracking.uri: give the address of an MLflow server; without one runs are kept in an SQLite file, "
            f"which cannot be on {experiment.storage!r}"
        )
    Path(experiment.storage).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{join(experiment.storage, 'mlflow.db')}"


class Tracker:
    """Writes to one MLflow run. On ranks other than 0 there is none, and every call returns at once."""

    def __init__(self, outbox: Outbox | None = None, carrier: Carrier | None = None, place: str = ""):
        self.place = place  # of the run: its folder, which is what others know it by
        self._outbox, self._carrier = outbox, carrier
        self._sampler: Sampler | None = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What ends before it called `finish` was ended from outside, as trials are, or failed.

        Where another process has taken the run, its status is that process's to tell.
        """
        if kind and issubclass(kind, LeaseLost):
            if self._sampler:
                self._sampler.end(sample=False)
            if self._carrier:
                self._carrier.end()
        elif kind:
            self.finish("KILLED" if issubclass(kind, SystemExit | KeyboardInterrupt) else "FAILED")

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
            "source": json.dumps({"uri": without_secrets(source)}),
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
        self._files([name], None, text.encode())

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if self._outbox:
            self._files([path.name], folder, path.read_bytes())

    def log_drawn(self, draw: Callable[[], bytes], name: str, step: int) -> None:
        """Draws a file and logs it, in place of that of an earlier step; once for each step."""
        letter = f"{name}-{step:09}"
        if self._outbox and not self._outbox.has(letter):
            self._put({"kind": "files", "folder": None, "names": [name], "tags": {}}, draw(), letter)

    def log_animation(self, draw: Callable[[], bytes], key: str, step: int) -> None:
        """Draws an animated WebP and logs it under the names that MLflow's image grid, with its step slider, wants.

        The slider stands at step 0 first; the small picture in the grid is the one called compressed.
        """
        letter = f"animation-{key}-{step:09}"
        if self._outbox and not self._outbox.has(letter):
            name = f"{key}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
            names = [f"{name}.webp", f"{name}+compressed.webp"]
            head = {"kind": "files", "folder": "images", "names": names, "tags": {"mlflow.loggedImages": "True"}}
            self._put(head, draw(), letter)

    def close_children(self) -> None:
        """Marks the runs under this one that were ended from outside, by the search, as killed."""
        self._put({"kind": "close_children"})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run, and waits a while for what MLflow has not taken yet; what is left is said, and kept."""
        if self._sampler:
            self._sampler.end()
        try:
            self._put({"kind": "status", "status": status})
        finally:  # whatever the storage says: the thread ends with the run
            if self._carrier:
                self._carrier.end()

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
    tracker = Tracker(*_connected(experiment, place), place)
    source = {"mlflow.source.name": "giffy_ray", "mlflow.source.type": "LOCAL"}  # the page shows the commit beside it
    own_tags = {**source, **colour(experiment.name), **_git(), "requirements.sha256": _lock_sha256(), **(tags or {})}
    params = {name: without_secrets(str(value))[:_LONGEST_PARAM] for name, value in flatten(experiment).items()}
    begin = {"kind": "begin", "name": experiment.name, "parent": parent, "tags": own_tags, "params": params}
    tracker._put(begin, without_secrets(to_yaml(experiment)).encode())
    return tracker


def replay(experiment: Experiment) -> int:
    """Sends what MLflow has not taken of the run of the experiment's name, and of the trials below it.

    Returns how many letters still wait. Nobody else may write to these runs meanwhile.
    """
    place = join(experiment.storage, experiment.name)
    filesystem, path = filesystem_of(place)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    trials = sorted(join(place, info.base_name) for info in infos if info.type == fs.FileType.Directory)
    carriers = [_connected(experiment, each)[1] for each in (place, *trials) if Outbox.is_at(join(each, "tracking"))]
    return sum(carrier.end() for carrier in carriers)


def _connected(experiment: Experiment, place: str) -> tuple[Outbox, Carrier]:
    artifacts = None if experiment.tracking.uri else Path(experiment.storage, "artifacts").as_uri()
    outbox = Outbox(join(place, "tracking"))
    return outbox, Carrier(outbox, tracking_uri(experiment), experiment.tracking.experiment, artifacts, place)


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
