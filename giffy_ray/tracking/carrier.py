"""Takes letters from an outbox to MLflow.

Through MlflowClient, never through MLflow's global state: many trials and workers share a machine. mlflow is imported
in the thread, as that takes two seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giffy_ray.config import ConfigError
from giffy_ray.messages import say
from giffy_ray.storage import PARTIAL, join, read_text, without_secrets, write_text
from giffy_ray.tracking.outbox import Letter, Outbox
from giffy_ray.tracking.view import TAG, saved_view

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PATIENCE_S = 30.0  # at the end of a run, with a server that does not answer
_WAITS_S = (0.5, 1, 2, 4, 8, 15)  # between tries
# MLflow's own patience is four minutes for a request, in which nothing else is sent or given up.
_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_CLIENT["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would tell its makers
_CLIENT["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # a run's address, with the password that is in it
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
            raise TimeoutError(
                f"MLflow at {without_secrets(self.uri)} did not answer for {PATIENCE_S:.0f} s: {self._failure}"
            )
        assert self._run_id
        return self._run_id

    def flush(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.outbox.waiting():
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"MLflow at {without_secrets(self.uri)} did not answer for {PATIENCE_S:.0f} s: {self._failure}"
                )
            time.sleep(0.02)

    def end(self) -> int:
        """Delivers what there is, for `PATIENCE_S` seconds at most. Returns how many letters wait, and says so."""
        self._deadline_s = time.monotonic() + PATIENCE_S
        self._ended.set()
        self._news.set()
        self._thread.join(PATIENCE_S + 30)
        waiting = len(self.outbox.waiting())
        if waiting:
            say(
                f"MLflow at {without_secrets(self.uri)} has not taken {waiting} of the things that were logged "
                f"({self._failure}); they wait in {self.outbox.folder}, and are sent when the run is started again or "
                "by jobs/replay_tracking.py"
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
            client = client_of(self.uri) if names else None
            for name in names:
                self._send(client, self.outbox.read(name))
        except Exception as failure:  # whatever it is, training goes on and the letter stays
            said = without_secrets(str(failure)).strip().splitlines() or [""]
            told, self._failure = self._failure, f"{type(failure).__name__}: {said[0]}"
            if told != self._failure:  # and not with every try
                _log.warning("MLflow at %s: %s", without_secrets(self.uri), self._failure)
            return False
        self._failure = ""
        return True

    def _send(self, client: Any, letter: Letter) -> None:
        from mlflow.exceptions import MlflowException

        try:
            getattr(self, f"_{letter.head['kind']}")(client, letter)
        except MlflowException as refusal:
            if refusal.error_code not in _HOPELESS:
                raise
            _log.error("MLflow at %s refuses %s: %s; it is put aside", without_secrets(self.uri), letter.name, refusal)
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
        run_id = _found(client, experiment_id, self.place) or self._created(client, experiment_id, head)
        client.update_run(run_id, status="RUNNING")
        # Last the parameters, by which a run is known to be whole: we may have been killed right after it was made.
        if not client.get_run(run_id).data.params:
            client.log_text(run_id, letter.content.decode(), "experiment.yaml")
            client.log_batch(run_id, params=[Param(name, value) for name, value in head["params"].items()])
        self._run_id = run_id
        write_text(join(self.place, "mlflow_run"), self._run_id)
        self._begun.set()

    def _created(self, client: MlflowClient, experiment_id: str, head: Mapping[str, Any]) -> str:
        tags = {"giffy_ray.run": without_secrets(self.place), **head["tags"]}
        if head["parent"]:
            parent = _found(client, experiment_id, head["parent"])
            if parent is None:
                raise LookupError(f"the run that it is shown under is not there yet ({head['parent']})")
            tags["mlflow.parentRunId"] = parent
        return client.create_run(experiment_id, tags=tags, run_name=head["name"]).info.run_id

    def _inputs(self, client: MlflowClient, letter: Letter) -> None:
        """Sent twice, MLflow keeps it once.

        Of two runs that name one data set at the same moment it refuses the second, and takes it when asked again.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        used = DatasetInput(Dataset(**letter.head["dataset"]), [InputTag("mlflow.data.context", "training")])
        try:
            client.log_inputs(self._run_id or "", [used])
        except MlflowException as refusal:
            if refusal.error_code != "BAD_REQUEST":
                raise
            client.log_inputs(self._run_id or "", [used])

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

    def _experiment_id(self, client: MlflowClient) -> str:
        known = client.get_experiment_by_name(self.experiment)
        return known.experiment_id if known else client.create_experiment(self.experiment, self.artifacts)


def client_of(uri: str) -> MlflowClient:
    for name, value in _CLIENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table of a new SQLite file
        logging.getLogger(name).setLevel(logging.WARNING)
    _make_whole(uri)
    return MlflowClient(uri)


def _make_whole(uri: str) -> None:
    """Makes the SQLite file of `uri` beside its place where there is none, so that it is there whole or not at all.

    MLflow makes it in forty steps, and a file that was left between two of them is of no use to it ever after.
    """
    from mlflow.tracking import MlflowClient

    path = uri.removeprefix("sqlite:///")
    if path == uri or os.path.exists(path):
        return
    beside = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
    MlflowClient(f"sqlite:///{beside}").search_experiments(max_results=1)
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.link(beside, path)
    os.remove(beside)


def params_of(uri: str, run_id: str) -> dict[str, str]:
    """The parameters of a run. Raises ConfigError where MLflow has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return client_of(uri).get_run(run_id).data.params
    except MlflowException as error:
        raise ConfigError(
            without_secrets(f"search.enqueue: MLflow at {uri} says: {error} (value {run_id!r})")
        ) from error


def _found(client: MlflowClient, experiment_id: str, place: str) -> str | None:
    """The storage folder is what makes a run one run, however often it is started."""
    query = f"tags.`giffy_ray.run` = '{without_secrets(place)}'"
    known = client.search_runs([experiment_id], query, max_results=1)
    return known[0].info.run_id if known else None
