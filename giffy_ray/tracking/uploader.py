"""Uploads the events of an outbox to MLflow, in a thread.

There are two queues: `events` (the run itself, parameters, metrics, status) and `files`, which wait for the events and
never block them. An event that fails while others succeed does not block its queue either. To tell a bad event from a
bad server, the uploader sends a request that must succeed, rather than trust the error code: a proxy or a wrong port
may answer anything. Only what a working server rejects is refused; everything else stays in the outbox and is retried.

Uses MlflowClient, never MLflow's global state: many trials and workers share a machine. The thread imports mlflow,
because that takes two seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giffy_ray.config import ConfigError
from giffy_ray.core.messages import print_message
from giffy_ray.core.storage import PARTIAL_SUFFIX, join, read_text, redact_credentials, write_text
from giffy_ray.tracking.outbox import Event, Outbox, parse_kind
from giffy_ray.tracking.ui_view import ORDER_TAG, build_experiment_tags, format_order
from giffy_ray.tracking.uri import explain_restore, sqlite_address, sqlite_path

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PATIENCE_S = 30.0  # how long `close` waits for a server that does not answer
_LAST_TRY_S = 2.0  # the same, if the server has already been away for PATIENCE_S
_SLOW_SERVER_S = 30.0  # added to PATIENCE_S for a server that answers slowly
_RETRY_DELAYS_S = (0.5, 1, 2, 4, 8, 15)
_MAX_FAILED_EVENTS = 3  # single failures in a queue before the rest of it waits for the next attempt
# MLflow's own limits are four minutes per request, during which nothing else could be sent.
_CLIENT_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL of a run would include the password in the address
}
_MAX_RUN_NAME = 250  # characters, MLflow's limit
_RUN_DIR_TAG = "giffy_ray.run"
_RUN_DIR_HASH_TAG = "giffy_ray.run_sha256"  # a folder's name may hold characters that MLflow's filters cannot express
_TRANSIENT_STATUSES = (408, 409, 425, 429)  # HTTP statuses below 500 that do not mean that the request is wrong
_MAX_SHOWN_REFUSALS = 3
_log = logging.getLogger(__name__)

# Start of the current outage on time.monotonic(), by server, experiment and queue, shared by all runs of this process:
# a trial does not wait again for a server that the previous trial waited for.
_FAILING_SINCE_S: dict[tuple[str, str, str], float] = {}
# By outbox: a thread that `close` left behind in a request must not upload at the same time as its successor.
_UPLOAD_LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class _Queue:
    """Retry state of one queue."""

    def __init__(self, uri: str, experiment: str, name: str):
        self._key = uri, experiment, name
        self._retry_at_s = 0.0
        self._tries = 0
        self.blocked = False  # whether the last attempt ended because the server failed

    def retry_in_s(self) -> float:
        return max(0.0, self._retry_at_s - time.monotonic())

    def failing_s(self) -> float:
        """Seconds since an attempt of this process last succeeded, or 0 if the last one did."""
        since_s = _FAILING_SINCE_S.get(self._key)
        return 0.0 if since_s is None else time.monotonic() - since_s

    def record_success(self) -> None:
        self.blocked = False
        self.retry_now()
        _FAILING_SINCE_S.pop(self._key, None)

    def record_failure(self, blocked: bool) -> None:
        self.blocked = blocked
        self._retry_at_s = time.monotonic() + _RETRY_DELAYS_S[min(self._tries, len(_RETRY_DELAYS_S) - 1)]
        self._tries += 1
        _FAILING_SINCE_S.setdefault(self._key, time.monotonic())

    def retry_now(self) -> None:
        self._retry_at_s = 0.0
        self._tries = 0


class MlflowUploader:
    """A thread that uploads the events of one run until `close`."""

    def __init__(self, outbox: Outbox, uri: str, experiment: str, artifacts: str | None, run_dir: str):
        """Starts the thread.

        Args:
            outbox: The events of the run.
            uri: The MLflow server or database.
            experiment: Name of the MLflow experiment, which is created if needed.
            artifacts: Artifact location of a new experiment; None leaves it to the server.
            run_dir: The run's folder, which identifies the MLflow run.
        """
        self.outbox = outbox
        self.uri = uri
        self.experiment = experiment
        self.artifacts = artifacts
        self.run_dir = run_dir
        self._run_id: str | None = read_text(join(run_dir, "mlflow_run"), "replace")
        self._event_queue = _Queue(uri, experiment, "events")
        self._file_queue = _Queue(uri, experiment, "files")
        self._current_queue = self._event_queue
        self._kinds: dict[str, str] = {}  # of events whose name does not contain it
        self._failure_counts: Counter[str] = Counter()  # of events that failed while others succeeded
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._run_ready = threading.Event()
        self._abandoned = threading.Event()  # `close` has given up: the thread must send nothing more
        self._closing_since_s = float("inf")
        self._last_upload_s = 0.0
        self._failure = ""
        self._logged_failures = set[str]()  # since all events were last delivered
        self._thread = threading.Thread(target=self._upload_until_closed, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tells the thread that the outbox has a new event."""
        self._wake.set()

    def wait_for_run_id(self) -> str:
        """Waits until MLflow has the run, and returns its id. Raises TimeoutError after PATIENCE_S."""
        if not self._run_ready.wait(PATIENCE_S):
            raise TimeoutError(self._describe_silence())
        assert self._run_id
        return self._run_id

    def flush(self) -> None:
        """Waits until the outbox is empty. Raises TimeoutError after PATIENCE_S."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.outbox.unwritten_count or self.outbox.waiting_names():
            if time.monotonic() > deadline_s:
                raise TimeoutError(self._describe_silence())
            time.sleep(0.02)

    def close(self) -> int:
        """Uploads the remaining events, ends the thread, and prints what MLflow did not accept.

        Waits PATIENCE_S for a server that does not answer, less the time that this process has waited for it already,
        and _SLOW_SERVER_S longer for a slow one.

        Returns:
            The number of events that MLflow does not have.
        """
        self._closing_since_s = time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            now_s = time.monotonic()
            idle_s = now_s - max(self._closing_since_s, self._last_upload_s)
            is_hopeless = self._current_queue.failing_s() >= PATIENCE_S and idle_s > _LAST_TRY_S
            if is_hopeless or now_s - self._closing_since_s > PATIENCE_S + _SLOW_SERVER_S:
                break
        self._abandoned.set()
        try:
            return self._report_undelivered()
        except OSError as failure:
            print_message(f"cannot read {self.outbox.folder}: {redact_credentials(str(failure))}")
            return 1

    def is_server_away(self) -> bool:
        """Returns whether MLflow has accepted nothing from this process for PATIENCE_S."""
        return self._event_queue.failing_s() >= PATIENCE_S

    def _report_undelivered(self) -> int:
        waiting = len(self.outbox.waiting_names())
        refused = self.outbox.refused_names()
        unwritten = self.outbox.unwritten_count
        server = f"MLflow at {redact_credentials(self.uri)}"
        if waiting:
            print_message(
                f"{server} has not received {_count_events(waiting)} ({self._failure}), stored in "
                f"{self.outbox.folder}; send them by restarting the run or with jobs/replay_tracking.py"
            )
        if refused:
            lines = [
                f"{server} refused {_count_events(len(refused))}, stored in {join(self.outbox.folder, 'refused')}; "
                "fix the cause, then send them with jobs/replay_tracking.py:"
            ]
            lines += [f"  {self._describe_refusal(name)}" for name in refused[:_MAX_SHOWN_REFUSALS]]
            if len(refused) > _MAX_SHOWN_REFUSALS:
                lines.append(f"  and {len(refused) - _MAX_SHOWN_REFUSALS} more")
            print_message("\n".join(lines))
        if unwritten:
            print_message(f"could not write to {self.outbox.folder}: lost {_count_events(unwritten)}")
        return waiting + len(refused) + unwritten

    def _describe_refusal(self, name: str) -> str:
        try:
            payload = self.outbox.read(name, "refused").payload
        except ValueError as damage:
            return f"{name}: {damage}"
        return f"{_describe_event(payload)}: {payload.get('refusal', 'an earlier version stored no reason')}"

    def _describe_silence(self) -> str:
        return f"MLflow at {redact_credentials(self.uri)} did not answer for {PATIENCE_S:.0f} s: {self._failure}"

    # ------------------------------------------------------------------------------- the thread
    def _upload_until_closed(self) -> None:
        closing = False
        while not self._abandoned.is_set():
            self._wake.clear()
            if self._closing.is_set() and not closing:
                closing = True
                for queue in (self._event_queue, self._file_queue):
                    queue.retry_now()
            with _UPLOAD_LOCKS[self.outbox.folder]:
                unfinished = self._attempt()
            if self._wake.is_set() and self._event_queue not in unfinished:
                continue
            if closing:
                if all(self._is_out_of_patience(queue) for queue in unfinished):
                    return
                self._abandoned.wait(min(queue.retry_in_s() for queue in unfinished))
            elif self._event_queue in unfinished:  # ignores `_wake`: new events do not shorten the delay of an outage
                self._closing.wait(self._event_queue.retry_in_s())
            else:
                self._wake.wait(self._file_queue.retry_in_s() if unfinished else None)

    def _is_out_of_patience(self, queue: _Queue) -> bool:
        return max(time.monotonic() - self._closing_since_s, queue.failing_s()) >= PATIENCE_S

    def _attempt(self) -> list[_Queue]:
        """Uploads the queues that are due. Returns those that still hold events."""
        try:
            self.outbox.write_pending()
            names = self.outbox.waiting_names()
            files = [name for name in names if self._get_kind(name) == "files"]
            events = [name for name in names if self._get_kind(name) != "files"]
            client = create_client(self.uri) if names else None
        except Exception as failure:  # of the storage or the database: training continues and the events stay
            self._note_failure(failure)
            self._event_queue.record_failure(blocked=True)
            return [self._event_queue]
        unfinished = []
        if events and not self._upload_queue(self._event_queue, client, events):
            unfinished.append(self._event_queue)
        # Files need the run, and a server that has just failed would fail again.
        must_wait = unfinished and (self._run_id is None or self._event_queue.blocked)
        if files and not must_wait and not self._upload_queue(self._file_queue, client, files):
            unfinished.append(self._file_queue)
        if not unfinished:
            self._failure = ""
            self._logged_failures.clear()
        return unfinished

    def _get_kind(self, name: str) -> str:
        kind = parse_kind(name) or self._kinds.get(name)
        if kind is None:
            try:
                kind = self.outbox.read(name).kind
            except ValueError:
                kind = "damaged"
            self._kinds[name] = kind
        return kind

    def _upload_queue(self, queue: _Queue, client: Any, names: Sequence[str]) -> bool:
        """Returns whether all events of the queue are done."""
        if queue.retry_in_s():
            return False
        self._current_queue = queue
        failed = 0
        for name in sorted(names, key=self._priority):
            if self._abandoned.is_set() or (queue is self._file_queue and self._wake.is_set()):
                return False  # new events take precedence over files
            try:
                done = self._process(client, name)
            except Exception as failure:  # of the server: the events stay
                self._note_failure(self._explain_failure(client, failure))
                queue.record_failure(blocked=True)
                return False
            if done:
                self._last_upload_s = time.monotonic()
                continue
            failed += 1
            if failed == _MAX_FAILED_EVENTS:
                break
        if failed:
            queue.record_failure(blocked=False)
            return False
        queue.record_success()
        return True

    def _priority(self, name: str) -> tuple[bool, int, str]:
        """Sort key: the event that creates the run, then events by time, those that failed before last."""
        creates_run = self._run_id is None and self._get_kind(name) == "begin"
        return not creates_run, self._failure_counts[name], name

    def _note_failure(self, failure: Exception) -> None:
        """Logs a failure once per outage."""
        self._failure = _format_failure(failure)
        text = re.sub("0x[0-9a-f]+", "", self._failure)  # memory addresses differ at each attempt
        if text not in self._logged_failures:
            self._logged_failures.add(text)
            _log.warning("MLflow at %s: %s", redact_credentials(self.uri), self._failure)

    def _process(self, client: Any, name: str) -> bool:
        """Returns whether the event is done: delivered, or refused by a working server.

        False if it failed while others succeed. Raises if the server is broken, and for events that must keep their
        order.
        """
        try:
            event = self.outbox.read(name)
        except ValueError as damage:
            _log.error("%s in %s is damaged and moves to refused/: %s", name, self.outbox.folder, damage)
            self.outbox.refuse_damaged(name)
            return True
        try:
            self._deliver(client, event)
        except Exception as failure:
            if event.kind == "begin" or self._run_id is None or not self._is_server_working(client, event.kind):
                raise
            if not _is_refusal(failure):
                if event.kind == "status":
                    raise
                self._failure_counts[name] += 1
                self._note_failure(failure)
                return False
            self._deliver_or_refuse(client, event)
        if event.kind == "params":
            self._run_ready.set()
        return True

    def _deliver(self, client: Any, event: Event) -> None:
        if event.kind != "begin" and self._run_id is None:
            raise LookupError("MLflow does not have the run yet; restart it, or use jobs/replay_tracking.py")
        self._upload(client, event)
        self.outbox.mark_delivered(event)

    def _upload(self, client: Any, event: Event) -> None:
        _UPLOADERS[event.kind](self, client, event)

    def _deliver_or_refuse(self, client: Any, event: Event) -> None:
        """Tries a rejected event again, as two processes may have raced, then each of its values alone."""
        try:
            self._deliver(client, event)
            return
        except Exception as failure:
            if not _is_refusal(failure):
                raise
            reason = failure
        values = event.payload.get("values", {})
        if len(values) > 1:
            refused = {}
            for name, value in values.items():
                part = replace(event, payload={**event.payload, "values": {name: value}})
                try:
                    self._upload(client, part)
                except Exception as failure:
                    if not _is_refusal(failure):
                        raise
                    refused[name], reason = value, failure
            if not refused:
                self.outbox.mark_delivered(event)
                return
            event = replace(event, payload={**event.payload, "values": refused})
        reason_text = _format_failure(reason)
        server = redact_credentials(self.uri)
        _log.error("MLflow at %s refuses %s: %s", server, _describe_event(event.payload), reason_text)
        self.outbox.refuse(event, reason_text)

    def _is_server_working(self, client: Any, kind: str) -> bool:
        """Repeats a request of the same type that succeeded before. If it succeeds, the failure is the event's."""
        from mlflow.entities import RunTag

        begin = self.outbox.load_begin()
        try:
            if kind != "files":
                client.log_batch(self._run_id, tags=[RunTag(_RUN_DIR_TAG, redact_credentials(self.run_dir))])
            elif begin:
                client.log_text(self._run_id, begin.content.decode(), "experiment.yaml")
            else:
                client.list_artifacts(self._run_id)
        except Exception:  # the caller reports the first failure
            return False
        return True

    def _explain_failure(self, client: Any, failure: Exception) -> Exception:
        """Returns the failure, or a clearer one if MLflow has no run to log to. May create another run."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None or not isinstance(failure, MlflowException) or not _is_refusal(failure):
            return failure
        try:
            self._replace_deleted_run(client)
        except LookupError as explanation:
            return explanation
        except Exception:  # the storage, or the server again: the caller reports the first failure
            return failure
        return failure

    def _replace_deleted_run(self, client: Any) -> None:
        """Creates another run if the run was deleted and then restarted.

        Also if `tracking.uri` or `tracking.experiment` has changed since. Otherwise raises LookupError.
        """
        from mlflow.exceptions import MlflowException

        assert self._run_id
        restarts = [name for name in self.outbox.waiting_names() if self._get_kind(name) == "begin"]
        begin = self.outbox.read(restarts[-1]) if restarts else self.outbox.load_begin()
        try:
            run = client.get_run(self._run_id)
        except MlflowException as failure:
            if failure.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run:
            if run.info.lifecycle_stage == "active":
                return
            experiment_changed = client.get_experiment(run.info.experiment_id).name != self.experiment
            if not restarts and not experiment_changed:
                self._get_or_create_experiment(client)  # raises if the experiment was deleted
                raise LookupError(
                    f"the run {self._run_id} was deleted in MLflow; restore it there, or restart the run, which "
                    "creates another one"
                )
        if begin is None:
            raise LookupError(f"MLflow has no run {self._run_id}; restart the run, which creates another one")
        self._begin_run(client, begin)

    # ------------------------------------------------------------------------------- one function per kind of event
    def _begin_run(self, client: MlflowClient, event: Event) -> None:
        """Finds or creates the run. What MLflow may refuse of it, once the run exists, becomes events of its own."""
        payload = event.payload
        if payload["parent"] and client.get_experiment_by_name(self.experiment) is None:
            raise LookupError("the experiment does not exist yet; the parent run creates it")
        experiment_id = self._get_or_create_experiment(client)
        existing = _find_run(client, experiment_id, self.run_dir)
        run_id = existing.info.run_id if existing else self._create_run(client, experiment_id, event)
        client.update_run(run_id, status="RUNNING")
        if not payload["parent"]:
            view = {"kind": "view", "experiment_id": experiment_id}
            view_id = _sha256(f"{self.uri} {experiment_id} {json.dumps(build_experiment_tags())}")[:16]
            self.outbox.put(view, key=f"view-{view_id}")
        self._run_id = run_id
        params_key = f"params-{run_id}"
        # Before the run's id is stored: after a kill at any point, the begin event is sent again.
        if (existing and existing.data.params) or self.outbox.has(params_key):
            self._run_ready.set()
        else:
            yaml = {"kind": "files", "folder": None, "names": ["experiment.yaml"], "tags": {}}
            self.outbox.put(yaml, event.content, f"experiment-{run_id}")
            self.outbox.put({"kind": "params", "values": payload["params"]}, key=params_key)
        write_text(join(self.run_dir, "mlflow_run"), run_id)
        self.outbox.save_begin(event)
        self._wake.set()

    def _create_run(self, client: MlflowClient, experiment_id: str, event: Event) -> str:
        payload = event.payload
        tags = {
            _RUN_DIR_TAG: redact_credentials(self.run_dir),
            _RUN_DIR_HASH_TAG: _sha256(self.run_dir),
            ORDER_TAG: format_order(event.time_ms),
            **payload["tags"],
        }
        if payload["parent"]:
            parent = _find_run(client, experiment_id, payload["parent"])
            if parent is None:
                raise LookupError(f"the parent run does not exist yet ({redact_credentials(payload['parent'])})")
            tags["mlflow.parentRunId"] = parent.info.run_id
            tags[ORDER_TAG] = format_order(event.time_ms, parent.info.start_time)
        if self._abandoned.is_set():  # a restart of the run may be about to create it
            raise LookupError("the run does not exist yet")
        name = payload["name"][:_MAX_RUN_NAME]
        return client.create_run(experiment_id, event.time_ms, tags, name).info.run_id

    def _save_view(self, client: MlflowClient, event: Event) -> None:
        for name, value in build_experiment_tags().items():
            client.set_experiment_tag(event.payload["experiment_id"], name, value)

    def _log_params(self, client: MlflowClient, event: Event) -> None:
        from mlflow.entities import Param

        client.log_batch(self._run_id or "", params=[Param(*item) for item in event.payload["values"].items()])

    def _log_inputs(self, client: MlflowClient, event: Event) -> None:
        """Logs the dataset. MLflow stores it once, however often it is sent.

        If two runs log the same dataset at the same moment, MLflow rejects the second, and accepts it when retried.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(**event.payload["dataset"])
        client.log_inputs(self._run_id or "", [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _log_metrics(self, client: MlflowClient, event: Event) -> None:
        """MLflow stores an event that is sent twice, as after a kill, once: its timestamp is the same."""
        from mlflow.entities import Metric

        payload = event.payload
        metrics = [
            Metric(name, value, payload["time_ms"], payload["step"]) for name, value in payload["values"].items()
        ]
        client.log_batch(self._run_id or "", metrics)

    def _log_files(self, client: MlflowClient, event: Event) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in event.payload["names"]:
                Path(folder, name).write_bytes(event.content)
            client.log_artifacts(self._run_id or "", folder, event.payload["folder"])
        client.get_run(self._run_id or "")  # only MLflow can answer this: a login page accepts any upload
        for name, value in event.payload["tags"].items():
            client.set_tag(self._run_id or "", name, value)

    def _set_status(self, client: MlflowClient, event: Event) -> None:
        client.set_terminated(self._run_id or "", event.payload["status"], event.time_ms)

    def _close_children(self, client: MlflowClient, event: Event) -> None:
        """Ends the running children that had started by then; a training that starts later stays open."""
        experiment_id = client.get_run(self._run_id or "").info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{self._run_id}' and attributes.status = 'RUNNING'"
        query += f" and attributes.start_time <= {event.time_ms}"
        for run in client.search_runs([experiment_id], query):
            client.set_terminated(run.info.run_id, "KILLED", event.time_ms)

    def _get_or_create_experiment(self, client: MlflowClient) -> str:
        """Returns the id of `tracking.experiment`. Raises LookupError if it was deleted."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                return client.create_experiment(self.experiment, self.artifacts)
            except MlflowException as failure:
                if failure.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(self.experiment)  # another process was faster
            assert experiment
        if experiment.lifecycle_stage != "active":
            raise LookupError(explain_restore(self.experiment, experiment.experiment_id, self.uri))
        return experiment.experiment_id


_UPLOADERS: dict[str, Callable[[MlflowUploader, Any, Event], None]] = {
    "begin": MlflowUploader._begin_run,
    "view": MlflowUploader._save_view,
    "params": MlflowUploader._log_params,
    "inputs": MlflowUploader._log_inputs,
    "metrics": MlflowUploader._log_metrics,
    "files": MlflowUploader._log_files,
    "status": MlflowUploader._set_status,
    "close_children": MlflowUploader._close_children,
}


def create_client(uri: str) -> MlflowClient:
    """Creates a client with short timeouts, and the SQLite file of `uri` if there is none."""
    for name, value in _CLIENT_ENV.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # they log every table of a new SQLite file
        logging.getLogger(name).setLevel(logging.WARNING)
    _create_sqlite_atomically(uri)
    return MlflowClient(uri)


def _create_sqlite_atomically(uri: str) -> None:
    """Creates the SQLite file of `uri` under a temporary name and links it, unless there is one.

    MLflow migrates a new file in forty steps, and cannot use one that was left between two of them.
    """
    from mlflow.tracking import MlflowClient

    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    temporary_path = Path(f"{path}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    MlflowClient(sqlite_address(temporary_path)).search_experiments(max_results=1)
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.link(temporary_path, path)
    os.remove(temporary_path)


def fetch_params(uri: str, run_id: str) -> dict[str, str]:
    """Returns the parameters of a run. Raises ConfigError if MLflow has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return create_client(uri).get_run(run_id).data.params
    except MlflowException as error:
        raise ConfigError(
            redact_credentials(f"search.enqueue: MLflow at {uri} reports: {error} (value {run_id!r})")
        ) from error


def _find_run(client: MlflowClient, experiment_id: str, run_dir: str) -> Run | None:
    """Finds a run by its folder, which identifies it however often it is started.

    Searches for the hash of the folder, because strings in MLflow's filters cannot escape quotes. Runs of earlier
    versions have only the folder itself, which could not contain a quote.
    """
    queries = [f"tags.`{_RUN_DIR_HASH_TAG}` = '{_sha256(run_dir)}'"]
    redacted = redact_credentials(run_dir)
    if "'" not in redacted and "\\" not in redacted:
        queries.append(f"tags.`{_RUN_DIR_TAG}` = '{redacted}'")
    for query in queries:
        runs = client.search_runs([experiment_id], query, max_results=1)
        if runs:
            return runs[0]
    return None


def _sha256(text: str) -> str:
    return hashlib.sha256(redact_credentials(text).encode()).hexdigest()


def _format_failure(failure: Exception) -> str:
    """Formats a failure as one line without credentials."""
    lines = redact_credentials(str(failure)).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def _is_refusal(failure: Exception) -> bool:
    """Returns whether the failure claims that the request is wrong. A second request must confirm it."""
    status = _get_http_status(failure)
    return 400 <= status < 500 and status not in _TRANSIENT_STATUSES


def _get_http_status(failure: Exception) -> int:
    """Returns the HTTP status behind a failure of MLflow or requests, or 500 if there is none."""
    from mlflow.exceptions import MlflowException

    if isinstance(failure, MlflowException):
        # MLflow has no code for some statuses, such as 413, and calls them internal errors.
        match = re.search(r"failed with error code (\d{3})", str(failure))
        return int(match[1]) if match else failure.get_http_status_code()
    return getattr(getattr(failure, "response", None), "status_code", 500)


def _count_events(count: int) -> str:
    return "1 logged event" if count == 1 else f"{count} logged events"


def _describe_event(payload: Mapping[str, Any]) -> str:
    match payload["kind"]:
        case "metrics":
            return f"metrics of step {payload['step']} ({_list_first(payload['values'])})"
        case "params":
            return f"parameters ({_list_first(payload['values'])})"
        case "files":
            return f"file {_list_first(payload['names'])}"
        case "inputs":
            return f"dataset {payload['dataset']['name']}"
        case "status":
            return f"status {payload['status']}"
        case kind:
            return kind


def _list_first(names: Mapping[str, Any] | Sequence[str]) -> str:
    text = ", ".join(name[:60] for name in list(names)[:3])
    return f"{text}, ..." if len(names) > 3 else text
