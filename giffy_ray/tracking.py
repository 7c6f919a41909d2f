"""Everything that goes to MLflow, and the only importer of mlflow.

A run is named by its id and written through MlflowClient, never through MLflow's global state: many trials and
workers share a machine. Only rank 0 of a training writes; the other ranks hold a Tracker that keeps silent.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.tracking import MlflowClient

from giffy_ray.config import ConfigError, Experiment, flatten, to_yaml
from giffy_ray.storage import is_local, join

_LONGEST_PARAM = 6000


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
    """Writes to one MLflow run. On ranks other than 0 every call returns at once."""

    def __init__(self, uri: str, run_id: str, rank: int = 0):
        self.run_id = run_id
        self._client = MlflowClient(uri) if rank == 0 else None
        self._logged_to = self._last_step() if self._client else 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs `phase/name` values in one call. A step that was logged before an interruption is not logged again."""
        if self._client and step > self._logged_to:
            now_ms = int(time.time() * 1000)
            self._client.log_batch(
                self.run_id, [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
            )

    def log_text(self, text: str, name: str) -> None:
        if self._client:
            self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if self._client:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_animation(self, draw: Callable[[], bytes], key: str, step: int) -> None:
        """Draws an animated WebP and logs it under the name that MLflow's image grid, with its step slider, wants."""
        if self._client:
            name = f"{key}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}.webp"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                path.write_bytes(draw())
                self._client.log_artifact(self.run_id, str(path), "images")
            self._client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if self._client:
            self._client.log_batch(self.run_id, tags=[RunTag(name, str(tags[name])) for name in tags])

    def finish(self, succeeded: bool = True) -> None:
        if self._client:
            status = RunStatus.FINISHED if succeeded else RunStatus.FAILED
            self._client.set_terminated(self.run_id, RunStatus.to_string(status))

    def _last_step(self) -> int:
        assert self._client
        names = list(self._client.get_run(self.run_id).data.metrics)
        return self._client.get_metric_history(self.run_id, names[0])[-1].step if names else 0


def start_run(experiment: Experiment, parent: str | None = None, tags: Mapping[str, str] | None = None) -> Tracker:
    """Makes an MLflow run that holds the experiment: every field as a parameter, and its YAML.

    `parent` is the id of the run that this one is shown under.
    """
    uri = tracking_uri(experiment)
    client = MlflowClient(uri)
    tags = {"mlflow.source.git.commit": _git_commit(), **(tags or {})}
    if parent:
        tags["mlflow.parentRunId"] = parent
    run = client.create_run(_experiment_id(client, experiment), tags=tags, run_name=experiment.name)
    params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in flatten(experiment).items()]
    client.log_batch(run.info.run_id, params=params)
    tracker = Tracker(uri, run.info.run_id)
    tracker.log_text(to_yaml(experiment), "experiment.yaml")
    return tracker


def reopen_run(experiment: Experiment, run_id: str) -> Tracker:
    """Goes on with a run that was interrupted."""
    uri = tracking_uri(experiment)
    MlflowClient(uri).update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
    return Tracker(uri, run_id)


def _experiment_id(client: MlflowClient, experiment: Experiment) -> str:
    name = experiment.tracking.experiment
    known = client.get_experiment_by_name(name)
    if known:
        return known.experiment_id
    if experiment.tracking.uri:
        return client.create_experiment(name)
    artifacts = Path(experiment.storage, "artifacts").as_uri()
    return client.create_experiment(name, artifact_location=artifacts)


def _git_commit() -> str:
    """The commit of the code that runs, or 'unknown' where it is not a checkout (a copy made by Ray, a wheel)."""
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return git.stdout.strip()
