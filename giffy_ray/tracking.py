"""Everything that goes to MLflow, and the only importer of mlflow.

A run is written through MlflowClient, never through MLflow's global state: many trials and workers share a machine.
Only rank 0 of a training writes; the other ranks hold a Tracker that keeps silent, and do not import mlflow, which
takes two seconds.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from giffy_ray.config import ConfigError, Experiment, flatten, to_yaml
from giffy_ray.storage import is_local, join

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

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
    """Writes to one MLflow run. On ranks other than 0 there is none, and every call returns at once."""

    def __init__(self, client: MlflowClient | None = None, run_id: str = ""):
        self._client, self.run_id = client, run_id
        self._logged_to = self._last_step() if client else 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs `phase/name` values in one call. A step that was logged before an interruption is not logged again."""
        if self._client and step > self._logged_to:
            self._log(metrics, step)

    def log_results(self, results: Mapping[str, float]) -> None:
        """Logs values that belong to the run as a whole."""
        if self._client:
            self._log(results, 0)

    def log_text(self, text: str, name: str) -> None:
        if self._client:
            self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if self._client:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_animation(self, draw: Callable[[], bytes], key: str, step: int) -> None:
        """Draws an animated WebP and logs it under the names that MLflow's image grid, with its step slider, wants.

        The slider stands at step 0 first; the small picture in the grid is the one called compressed.
        """
        if self._client:
            name = f"{key}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
            with tempfile.TemporaryDirectory() as folder:
                content = draw()
                for path in (Path(folder) / f"{name}.webp", Path(folder) / f"{name}+compressed.webp"):
                    path.write_bytes(content)
                self._client.log_artifacts(self.run_id, folder, "images")
            self._client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def finish(self, status: str = "FINISHED") -> None:
        if self._client:
            self._client.set_terminated(self.run_id, status)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        assert self._client
        now_ms = int(time.time() * 1000)
        batch = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, batch)

    def _last_step(self) -> int:
        assert self._client
        names = self._client.get_run(self.run_id).data.metrics
        histories = [self._client.get_metric_history(self.run_id, name) for name in names]
        return max((history[-1].step for history in histories), default=0)


def open_run(
    experiment: Experiment, rank: int = 0, parent: str | None = None, tags: Mapping[str, str] | None = None
) -> Tracker:
    """The MLflow run of the experiment's name: the one that an interrupted run left, or a new one.

    A new one holds the experiment: every field as a parameter, and its YAML. `parent` is the id of the run that it
    is shown under.
    """
    if rank != 0:
        return Tracker()
    from mlflow.entities import Param

    client = _client(experiment)
    experiment_id, place = _experiment_id(client, experiment), join(experiment.storage, experiment.name)
    # The storage folder is what makes a run one run, however often it is started.
    known = client.search_runs([experiment_id], f"tags.`giffy_ray.run` = '{place}'", max_results=1)
    if known:
        run_id = known[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return Tracker(client, run_id)
    run_tags = {"giffy_ray.run": place, "mlflow.source.git.commit": _git_commit(), **(tags or {})}
    if parent:
        run_tags["mlflow.parentRunId"] = parent
    run_id = client.create_run(experiment_id, tags=run_tags, run_name=experiment.name).info.run_id
    params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in flatten(experiment).items()]
    client.log_batch(run_id, params=params)
    tracker = Tracker(client, run_id)
    tracker.log_text(to_yaml(experiment), "experiment.yaml")
    return tracker


def close_children(experiment: Experiment, parent: Tracker) -> None:
    """Marks the runs under `parent` that were ended from outside, by the search, as killed."""
    client = _client(experiment)
    here = [_experiment_id(client, experiment)]
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    for run in client.search_runs(here, query):
        client.set_terminated(run.info.run_id, "KILLED")


def _client(experiment: Experiment) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table of a new SQLite file
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri(experiment))


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
    """The commit of the code that runs, with '-dirty' where files differ from it; 'unknown' without a checkout.

    `ray job submit --working-dir` runs a copy without its .git; the checkout that it was most likely copied from is
    the one that is installed here.
    """
    for folder in (Path(__file__).parent, _installed_from()):
        try:
            git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
            return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
    return "unknown"


def _installed_from() -> str:
    """The folder of an editable installation, or an empty string."""
    try:
        url = json.loads(distribution("giffy_ray").read_text("direct_url.json") or "{}").get("url", "")
    except PackageNotFoundError:
        return ""
    return url.removeprefix("file://")
