"""Takes letters from an outbox to MLflow, and is the only importer of mlflow.

Through MlflowClient, never through MLflow's global state: many trials and workers share a machine. mlflow is imported
in the thread, as that takes two seconds.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giffy_ray.config import ConfigError
from giffy_ray.storage import join, read_text, write_text
from giffy_ray.tracking.outbox import Letter, Outbox
from giffy_ray.tracking.view import TAG, saved_view

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PATIENCE_S = 30.0  # at the end of a run, with a server that does not answer
_WAITS_S = (0.5, 1, 2, 4, 8, 15)  # between tries
# MLflow's own patience is four minutes for a request, in which nothing else is sent or given up.
_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# What a letter says is wrong, and will be: it is put aside.
_HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}
_log = logging.getLogger(__name__)


class Carrier:
    """A thread that delivers until it is ended. `place` is the run's folder, by which MLflow's run is found again."""

    def __init__(self, outbox: Outbox, uri: str, experiment: str, artifacts: str | None, place: str):
        self.outbox, self.uri, self.experiment, self.artifacts, self.place = outbox, uri, experiment, artifacts, place
        self._run_id: str | None = read_text(join(place, "mlflow_run"))
        self._news, self._ended, self._begun = threading.Event(), threading.Event(), threading.Event()
        self._failure = ""
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def run_id(self) -> str:
        if not self._begun.wait(PATIENCE_S):
            raise TimeoutError(f"MLflow at {self.uri} did not answer for {PATIENCE_S:.0f} s: {self._failure}")
        assert self._run_id
        return self._run_id

    def flush(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.outbox.waiting():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"MLflow at {self.uri} did not answer for {PATIENCE_S:.0f} s: {self._failure}")
            time.sleep(0.02)

    def end(self) -> int:
        """Delivers what there is, for `PATIENCE_S` seconds at most. Returns how many letters wait, and says so."""
        self._deadline_s = time.monotonic() + PATIENCE_S
        self._ended.set()
        self._news.set()
        self._thread.join(PATIENCE_S + 30)
        waiting = len(self.outbox.waiting())
        if waiting:
            print(
                f"MLflow at {self.uri} has not taken {waiting} of the things that were logged ({self._failure}); they "
                f"wait in {self.outbox.folder}, and are sent when the run is started again or by "
                "jobs/replay_tracking.py",
                flush=True,
            )
        return waiting

    def _deliver(self) -> None:
        tries = 0
        while True:
            self._news.clear()
            ended = self._ended.is_set()
            if self._delivered_all():
                tries = 0
                if ended:
                    return
                self._news.wait()
                continue
            if time.monotonic() > self._deadline_s:
                return
            # Not `_news`: a server that is away is not asked again with each letter.
            (time.sleep if ended else self._ended.wait)(_WAITS_S[min(tries, len(_WAITS_S) - 1)])
            tries += 1

    def _delivered_all(self) -> bool:
        try:
            names = self.outbox.waiting()
            client = self._client() if names else None
            for name in names:
                self._send(client, self.outbox.read(name))
        except Exception as failure:  # whatever it is, training goes on and the letter stays
            self._failure = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
            _log.warning("MLflow at %s: %s", self.uri, self._failure)
            return False
        return True

    def _send(self, client: Any, letter: Letter) -> None:
        from mlflow.exceptions import MlflowException

        try:
            getattr(self, f"_{letter.head['kind']}")(client, letter)
        except MlflowException as refusal:
            if refusal.error_code not in _HOPELESS:
                raise
            _log.error("MLflow at %s refuses %s: %s; it is put aside", self.uri, letter.name, refusal)
            self.outbox.refused(letter)
        else:
            self.outbox.delivered(letter)

    def _begin(self, client: MlflowClient, letter: Letter) -> None:
        from mlflow.entities import Param

        head = letter.head
        if head["parent"] and client.get_experiment_by_name(self.experiment) is None:
            raise LookupError("the experiment is not there yet; the run that this one is shown under makes it")
        experiment_id = self._experiment_id(client)
        if not head["parent"]:
            client.set_experiment_tag(experiment_id, TAG, saved_view())
        known = _found(client, experiment_id, self.place)
        if known:
            self._run_id = known
            client.update_run(known, status="RUNNING")
        else:
            tags = {"giffy_ray.run": self.place, **head["tags"]}
            if head["parent"]:
                parent = _found(client, experiment_id, head["parent"])
                if parent is None:
                    raise LookupError(f"the run that it is shown under is not there yet ({head['parent']})")
                tags["mlflow.parentRunId"] = parent
            self._run_id = client.create_run(experiment_id, tags=tags, run_name=head["name"]).info.run_id
            client.log_batch(self._run_id, params=[Param(name, value) for name, value in head["params"].items()])
            client.log_text(self._run_id, letter.content.decode(), "experiment.yaml")
        write_text(join(self.place, "mlflow_run"), self._run_id)
        self._begun.set()

    def _metrics(self, client: MlflowClient, letter: Letter) -> None:
        """Sent twice, as when we are killed before we know that it came, it is stored once: the time is the same."""
        from mlflow.entities import Metric

        head = letter.head
        metrics = [Metric(name, value, head["time_ms"], head["step"]) for name, value in head["values"].items()]
        client.log_batch(self._run_id or "", metrics)

    def _files(self, client: MlflowClient, letter: Letter) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in letter.head["names"]:
                Path(folder, name).write_bytes(letter.content)
            client.log_artifacts(self._run_id or "", folder, letter.head["folder"])
        for name, value in letter.head["tags"].items():
            client.set_tag(self._run_id or "", name, value)

    def _status(self, client: MlflowClient, letter: Letter) -> None:
        client.set_terminated(self._run_id or "", letter.head["status"])

    def _close_children(self, client: MlflowClient, letter: Letter) -> None:
        query = f"tags.`mlflow.parentRunId` = '{self._run_id}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([self._experiment_id(client)], query):
            client.set_terminated(run.info.run_id, "KILLED")

    def _client(self) -> MlflowClient:
        for name, value in _CLIENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table of a new SQLite file
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(self.uri)

    def _experiment_id(self, client: MlflowClient) -> str:
        known = client.get_experiment_by_name(self.experiment)
        return known.experiment_id if known else client.create_experiment(self.experiment, self.artifacts)


def params_of(uri: str, run_id: str) -> dict[str, str]:
    """The parameters of a run. Raises ConfigError where MLflow has no such run."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        return MlflowClient(uri).get_run(run_id).data.params
    except MlflowException as error:
        raise ConfigError(f"search.enqueue: MLflow at {uri} says: {error} (value {run_id!r})") from error


def _found(client: MlflowClient, experiment_id: str, place: str) -> str | None:
    """The storage folder is what makes a run one run, however often it is started."""
    known = client.search_runs([experiment_id], f"tags.`giffy_ray.run` = '{place}'", max_results=1)
    return known[0].info.run_id if known else None
