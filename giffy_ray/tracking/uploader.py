"""Takes letters from an outbox to MLflow.

There are two queues: `events` (the run itself, parameters, metrics, status) and `files`, which wait for the events and
never block them. A letter that fails while others pass does not block its queue either. Whether a failure is due to the
letter or to the server is decided by a request that must succeed, not by the error code: a proxy or a wrong port may
answer anything. Only what a working server rejects is put aside; everything else waits and is tried again.

Through MlflowClient, never through MLflow's global state: many trials and workers share a machine. mlflow is imported
in the thread, as that takes two seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giffy_ray.config import ConfigError
from giffy_ray.core.messages import say
from giffy_ray.core.storage import PARTIAL, join, read_text, redact_credentials, write_text
from giffy_ray.tracking.outbox import Event, Outbox, kind_in
from giffy_ray.tracking.ui_view import TAG, saved_view
from giffy_ray.tracking.uri import how_to_restore, sqlite_address, sqlite_path

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PATIENCE_S = 30.0  # at the end of a run, with a server that does not answer
_LAST_TRY_S = 2.0  # the same, where it has not answered for PATIENCE_S already
_SLOW_S = 30.0  # added to it for a server that answers, but slowly
_WAITS_S = (0.5, 1, 2, 4, 8, 15)  # between tries
_FAILURES = 3  # letters of a queue that fail one by one before it is left until the next try
# MLflow's own patience is four minutes for a request, in which nothing else is sent or given up.
_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_CLIENT["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would tell its makers
_CLIENT["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # a run's address, with the password that is in it
_LONGEST_RUN_NAME = 250  # characters, of MLflow
_PLACE = "giffy_ray.run"  # tag: the run's folder
_PLACE_SHA256 = "giffy_ray.run_sha256"  # tag: of the folder, which may hold what a filter of MLflow cannot
_MAY_PASS_LATER = (408, 409, 425, 429)  # HTTP statuses below 500 that say nothing of the request
_SHOWN = 3  # of the refused letters, in the message at the end
_log = logging.getLogger(__name__)

# Of this process, by address, experiment and queue: when the attempts began to fail that have not passed since, on
# time.monotonic(). A trial does not wait again for a server that the trial before it has waited for.
_FAILING_SINCE_S: dict[tuple[str, str, str], float] = {}
# Of this process, by outbox: a thread that was left behind in a request and its successor do not send at once.
_DELIVERING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class _Queue:
    """The retries of one kind of letters."""

    def __init__(self, uri: str, experiment: str, name: str):
        self._key = uri, experiment, name
        self._due_s, self._tries = 0.0, 0
        self.blocked = False  # the last attempt ended with a failure of the server

    def due_in_s(self) -> float:
        return max(0.0, self._due_s - time.monotonic())

    def failing_s(self) -> float:
        """For how many seconds no attempt of this process has passed."""
        since_s = _FAILING_SINCE_S.get(self._key)
        return 0.0 if since_s is None else time.monotonic() - since_s

    def passed(self) -> None:
        self._due_s, self._tries, self.blocked = 0.0, 0, False
        _FAILING_SINCE_S.pop(self._key, None)

    def failed(self, blocked: bool) -> None:
        self.blocked = blocked
        self._due_s = time.monotonic() + _WAITS_S[min(self._tries, len(_WAITS_S) - 1)]
        self._tries += 1
        _FAILING_SINCE_S.setdefault(self._key, time.monotonic())

    def retry_at_once(self) -> None:
        self._due_s, self._tries = 0.0, 0


class MlflowUploader:
    """A thread that delivers until it is ended. `place` is the run's folder, by which MLflow's run is found again."""

    def __init__(self, outbox: Outbox, uri: str, experiment: str, artifacts: str | None, place: str):
        self.outbox, self.uri, self.experiment, self.artifacts, self.place = outbox, uri, experiment, artifacts, place
        self._run_id: str | None = read_text(join(place, "mlflow_run"), "replace")
        self._event_queue, self._file_queue = _Queue(uri, experiment, "events"), _Queue(uri, experiment, "files")
        self._current = self._event_queue  # the queue that is being sent
        self._kinds: dict[str, str] = {}  # of letters whose name does not say it
        self._failures: Counter[str] = Counter()  # of letters that failed while others passed
        self._news, self._ended, self._begun = threading.Event(), threading.Event(), threading.Event()
        self._abandoned = threading.Event()  # nobody waits for the thread any more: it sends nothing more
        self._ended_s = float("inf")
        self._sent_s = 0.0  # when the last letter was delivered
        self._failure = ""
        self._told = set[str]()  # the failures that were logged since all letters were delivered
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def run_id(self) -> str:
        if not self._begun.wait(PATIENCE_S):
            raise TimeoutError(self._silence())
        assert self._run_id
        return self._run_id

    def flush(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.outbox.unwritten or self.outbox.waiting():
            if time.monotonic() > deadline_s:
                raise TimeoutError(self._silence())
            time.sleep(0.02)

    def end(self) -> int:
        """Delivers what there is and ends the thread. Returns how many letters MLflow does not have, and says so.

        Waits `PATIENCE_S` for a server that does not answer, less the time for which this process has waited already,
        and `_SLOW_S` more for one that is slow.
        """
        self._ended_s = time.monotonic()
        self._ended.set()
        self._news.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            now_s = time.monotonic()
            idle_s = now_s - max(self._ended_s, self._sent_s)
            useless = self._current.failing_s() >= PATIENCE_S and idle_s > _LAST_TRY_S
            if useless or now_s - self._ended_s > PATIENCE_S + _SLOW_S:
                break
        self._abandoned.set()
        try:
            return self._report()
        except OSError as failure:
            say(f"{self.outbox.folder} cannot be read: {redact_credentials(str(failure))}")
            return 1

    def is_away(self) -> bool:
        """Whether MLflow has taken nothing from this process for as long as it would be waited for."""
        return self._event_queue.failing_s() >= PATIENCE_S

    def _report(self) -> int:
        waiting, refused, unwritten = len(self.outbox.waiting()), self.outbox.refused(), self.outbox.unwritten
        where = f"MLflow at {redact_credentials(self.uri)}"
        if waiting:
            say(
                f"{where} has not taken {waiting} of the things that were logged ({self._failure}); they wait in "
                f"{self.outbox.folder}, and are sent when the run is started again or by jobs/replay_tracking.py"
            )
        if refused:
            shown = [f"  {self._refusal(name)}" for name in refused[:_SHOWN]]
            more = [f"  and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
            head = (
                f"{where} refused {len(refused)} of the things that were logged; they are kept in "
                f"{join(self.outbox.folder, 'refused')}. Once the cause is fixed, jobs/replay_tracking.py sends them:"
            )
            say("\n".join([head, *shown, *more]))
        if unwritten:
            say(f"{self.outbox.folder} could not be written: {unwritten} of the things that were logged are lost")
        return waiting + len(refused) + unwritten

    def _refusal(self, name: str) -> str:
        try:
            head = self.outbox.read(name, "refused").head
        except ValueError as damage:
            return f"{name}: {damage}"
        return f"{_described(head)}: {head.get('refusal', 'an earlier version gave no reason')}"

    def _silence(self) -> str:
        return f"MLflow at {redact_credentials(self.uri)} did not answer for {PATIENCE_S:.0f} s: {self._failure}"

    # ------------------------------------------------------------------------------- the thread
    def _deliver(self) -> None:
        ended = False
        while not self._abandoned.is_set():
            self._news.clear()
            if self._ended.is_set() and not ended:
                ended = True
                for queue in (self._event_queue, self._file_queue):
                    queue.retry_at_once()
            with _DELIVERING[self.outbox.folder]:
                unsent = self._attempt()
            if self._news.is_set() and self._event_queue not in unsent:
                continue
            if ended:
                if all(self._gave_up(queue) for queue in unsent):
                    return
                self._abandoned.wait(min(queue.due_in_s() for queue in unsent))
            elif self._event_queue in unsent:  # not `_news`: a server that is away is not asked again with each letter
                self._ended.wait(self._event_queue.due_in_s())
            else:
                self._news.wait(self._file_queue.due_in_s() if unsent else None)

    def _gave_up(self, queue: _Queue) -> bool:
        return max(time.monotonic() - self._ended_s, queue.failing_s()) >= PATIENCE_S

    def _attempt(self) -> list[_Queue]:
        """Sends the letters of the queues that are due. Returns the queues in which letters are left."""
        try:
            self.outbox.write_pending()
            names = self.outbox.waiting()
            files = [name for name in names if self._kind(name) == "files"]
            events = [name for name in names if self._kind(name) != "files"]
            client = client_of(self.uri) if names else None
        except Exception as failure:  # the storage, or a database: training goes on and the letters stay
            self._note(failure)
            self._event_queue.failed(blocked=True)
            return [self._event_queue]
        unsent = []
        if events and not self._sent_all(self._event_queue, client, events):
            unsent.append(self._event_queue)
        # Files cannot be sent to a run that is not there, nor to a server that has just failed.
        useless = unsent and (self._run_id is None or self._event_queue.blocked)
        if files and not useless and not self._sent_all(self._file_queue, client, files):
            unsent.append(self._file_queue)
        if not unsent:
            self._failure = ""
            self._told.clear()
        return unsent

    def _kind(self, name: str) -> str:
        kind = kind_in(name) or self._kinds.get(name)
        if kind is None:
            try:
                kind = self.outbox.read(name).kind
            except ValueError:
                kind = "damaged"
            self._kinds[name] = kind
        return kind

    def _sent_all(self, queue: _Queue, client: Any, names: Sequence[str]) -> bool:
        """Whether no letter of the queue is left."""
        if queue.due_in_s():
            return False
        self._current, left = queue, 0
        for name in sorted(names, key=self._turn):
            if self._abandoned.is_set() or (queue is self._file_queue and self._news.is_set()):
                return False  # the events go first
            try:
                sent = self._send(client, name)
            except Exception as failure:  # of the server: the letters stay
                self._note(self._explained(client, failure))
                queue.failed(blocked=True)
                return False
            if sent:
                self._sent_s = time.monotonic()
                continue
            left += 1
            if left == _FAILURES:
                break
        if left:
            queue.failed(blocked=False)
            return False
        queue.passed()
        return True

    def _turn(self, name: str) -> tuple[bool, int, str]:
        """By time; before it the begin of a run that is not there, after it the letters that have failed."""
        begins = self._run_id is None and self._kind(name) == "begin"
        return not begins, self._failures[name], name

    def _note(self, failure: Exception) -> None:
        self._failure = _said(failure)
        told = re.sub("0x[0-9a-f]+", "", self._failure)  # without addresses in memory, new ones each time
        if told not in self._told:  # and not with every try
            self._told.add(told)
            _log.warning("MLflow at %s: %s", redact_credentials(self.uri), self._failure)

    def _send(self, client: Any, name: str) -> bool:
        """Whether the letter is done with: delivered, or put aside because MLflow rejects it.

        False: it fails while others pass. Raises if the server does not work, and for what has to keep its order.
        """
        try:
            letter = self.outbox.read(name)
        except ValueError as damage:
            _log.error("%s in %s is damaged: %s; it is put aside", name, self.outbox.folder, damage)
            self.outbox.put_aside_damaged(name)
            return True
        try:
            self._carry(client, letter)
        except Exception as failure:
            if letter.kind == "begin" or self._run_id is None or not self._works(client, letter.kind):
                raise
            if not _is_refusal(failure):
                if letter.kind == "status":
                    raise
                self._failures[name] += 1
                self._note(failure)
                return False
            self._carry_again(client, letter)
        if letter.kind == "params":
            self._begun.set()
        return True

    def _carry(self, client: Any, letter: Event) -> None:
        if letter.kind != "begin" and self._run_id is None:
            raise LookupError("the run is not there yet; jobs/replay_tracking.py, or starting it again, makes it")
        getattr(self, f"_{letter.kind}")(client, letter)
        self.outbox.delivered(letter)

    def _carry_again(self, client: Any, letter: Event) -> None:
        """Once more, as two processes may have done the same thing at the same moment. Then part by part."""
        values = letter.head.get("values", {})
        try:
            self._carry(client, letter)
            return
        except Exception as failure:
            if not _is_refusal(failure):
                raise
            reason = failure
        if len(values) > 1:
            refused = {}
            for name, value in values.items():
                part = replace(letter, head={**letter.head, "values": {name: value}})
                try:
                    getattr(self, f"_{letter.kind}")(client, part)
                except Exception as failure:
                    if not _is_refusal(failure):
                        raise
                    refused[name], reason = value, failure
            if not refused:
                self.outbox.delivered(letter)
                return
            letter = replace(letter, head={**letter.head, "values": refused})
        said = _said(reason)
        where = redact_credentials(self.uri)
        _log.error("MLflow at %s refuses %s: %s; it is put aside", where, _described(letter.head), said)
        self.outbox.put_aside(letter, said)

    def _works(self, client: Any, kind: str) -> bool:
        """Whether the server takes something that it took before, of the same sort: then a failure is the letter's."""
        from mlflow.entities import RunTag

        begun = self.outbox.begun()
        try:
            if kind != "files":
                client.log_batch(self._run_id, tags=[RunTag(_PLACE, redact_credentials(self.place))])
            elif begun:
                client.log_text(self._run_id, begun.content.decode(), "experiment.yaml")
            else:
                client.list_artifacts(self._run_id)
        except Exception:  # it is the first failure that is reported
            return False
        return True

    def _explained(self, client: Any, failure: Exception) -> Exception:
        """The failure, or why there is no run to log to. A new one is made where one is asked for."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None or not isinstance(failure, MlflowException) or not _is_refusal(failure):
            return failure
        try:
            self._make_another_run(client)
        except LookupError as why:
            return why
        except Exception:  # the storage, or the server again: it is the first failure that is reported
            return failure
        return failure

    def _make_another_run(self, client: Any) -> None:
        """Makes another run in place of one that was deleted, if the run was started again since.

        Also if `tracking.uri` or `tracking.experiment` by now names another place. Raises LookupError otherwise.
        """
        from mlflow.exceptions import MlflowException

        assert self._run_id
        again = [name for name in self.outbox.waiting() if self._kind(name) == "begin"]
        begin = self.outbox.read(again[-1]) if again else self.outbox.begun()
        try:
            run = client.get_run(self._run_id)
        except MlflowException as failure:
            if failure.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run:
            if run.info.lifecycle_stage == "active":
                return
            elsewhere = client.get_experiment(run.info.experiment_id).name != self.experiment
            if not again and not elsewhere:
                self._experiment_id(client)  # which may be what was deleted
                raise LookupError(
                    f"the run {self._run_id} was deleted in MLflow; restore it there, or start the run again, which "
                    "makes another one"
                )
        if begin is None:
            raise LookupError(f"MLflow has no run {self._run_id}; starting the run again makes another one")
        self._begin(client, begin)

    # ------------------------------------------------------------------------------- the letters
    def _begin(self, client: MlflowClient, letter: Event) -> None:
        """Finds or makes the run. What may be refused of it, with the run there, are letters of their own."""
        head = letter.head
        if head["parent"] and client.get_experiment_by_name(self.experiment) is None:
            raise LookupError("the experiment is not there yet; the run that this one is shown under makes it")
        experiment_id = self._experiment_id(client)
        known = _found(client, experiment_id, self.place)
        run_id = known.info.run_id if known else self._created(client, experiment_id, letter)
        client.update_run(run_id, status="RUNNING")
        if not head["parent"]:
            view = {"kind": "view", "experiment_id": experiment_id}
            self.outbox.put(view, key=f"view-{_sha256(f'{self.uri} {experiment_id} {saved_view()}')[:16]}")
        self._run_id, key = run_id, f"params-{run_id}"
        # Before the run's id is kept: we may be killed at any point, and the letter is then sent again.
        if (known and known.data.params) or self.outbox.has(key):
            self._begun.set()
        else:
            yaml = {"kind": "files", "folder": None, "names": ["experiment.yaml"], "tags": {}}
            self.outbox.put(yaml, letter.content, f"experiment-{run_id}")
            self.outbox.put({"kind": "params", "values": head["params"]}, key=key)
        write_text(join(self.place, "mlflow_run"), run_id)
        self.outbox.keep_begin(letter)
        self._news.set()

    def _created(self, client: MlflowClient, experiment_id: str, letter: Event) -> str:
        head = letter.head
        tags = {_PLACE: redact_credentials(self.place), _PLACE_SHA256: _sha256(self.place), **head["tags"]}
        if head["parent"]:
            parent = _found(client, experiment_id, head["parent"])
            if parent is None:
                raise LookupError(
                    f"the run that it is shown under is not there yet ({redact_credentials(head['parent'])})"
                )
            tags["mlflow.parentRunId"] = parent.info.run_id
        if self._abandoned.is_set():  # a later start of the run may be about to make it
            raise LookupError("the run is not there yet")
        name = head["name"][:_LONGEST_RUN_NAME]
        return client.create_run(experiment_id, letter.time_ms, tags, name).info.run_id

    def _view(self, client: MlflowClient, letter: Event) -> None:
        client.set_experiment_tag(letter.head["experiment_id"], TAG, saved_view())

    def _params(self, client: MlflowClient, letter: Event) -> None:
        from mlflow.entities import Param

        client.log_batch(self._run_id or "", params=[Param(*item) for item in letter.head["values"].items()])

    def _inputs(self, client: MlflowClient, letter: Event) -> None:
        """Sent twice, MLflow keeps it once.

        Of two runs that name one data set at the same moment it refuses the second, and takes it when asked again.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        used = DatasetInput(Dataset(**letter.head["dataset"]), [InputTag("mlflow.data.context", "training")])
        client.log_inputs(self._run_id or "", [used])

    def _metrics(self, client: MlflowClient, letter: Event) -> None:
        """Sent twice, as when we are killed before we know that it came, it is stored once: the time is the same."""
        from mlflow.entities import Metric

        head = letter.head
        metrics = [Metric(name, value, head["time_ms"], head["step"]) for name, value in head["values"].items()]
        client.log_batch(self._run_id or "", metrics)

    def _files(self, client: MlflowClient, letter: Event) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in letter.head["names"]:
                Path(folder, name).write_bytes(letter.content)
            client.log_artifacts(self._run_id or "", folder, letter.head["folder"])
        client.get_run(self._run_id or "")  # only MLflow can answer this: a login page takes any file without an error
        for name, value in letter.head["tags"].items():
            client.set_tag(self._run_id or "", name, value)

    def _status(self, client: MlflowClient, letter: Event) -> None:
        client.set_terminated(self._run_id or "", letter.head["status"], letter.time_ms)

    def _close_children(self, client: MlflowClient, letter: Event) -> None:
        """Of those that had begun by then: what is trained later under the same run goes on."""
        experiment_id = client.get_run(self._run_id or "").info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{self._run_id}' and attributes.status = 'RUNNING'"
        query += f" and attributes.start_time <= {letter.time_ms}"
        for run in client.search_runs([experiment_id], query):
            client.set_terminated(run.info.run_id, "KILLED", letter.time_ms)

    def _experiment_id(self, client: MlflowClient) -> str:
        """Of `tracking.experiment`, which is made if there is none. Raises LookupError if it was deleted."""
        from mlflow.exceptions import MlflowException

        known = client.get_experiment_by_name(self.experiment)
        if known is None:
            try:
                return client.create_experiment(self.experiment, self.artifacts)
            except MlflowException as failure:
                if failure.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = client.get_experiment_by_name(self.experiment)  # another process was faster
            assert known
        if known.lifecycle_stage != "active":
            raise LookupError(how_to_restore(self.experiment, known.experiment_id, self.uri))
        return known.experiment_id


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

    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    beside = Path(f"{path}.{uuid.uuid4().hex}{PARTIAL}")
    MlflowClient(sqlite_address(beside)).search_experiments(max_results=1)
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
            redact_credentials(f"search.enqueue: MLflow at {uri} says: {error} (value {run_id!r})")
        ) from error


def _found(client: MlflowClient, experiment_id: str, place: str) -> Run | None:
    """The storage folder is what makes a run one run, however often it is started.

    It is looked for by its hash: strings in MLflow's filters have no escape for quotes. Runs of earlier versions have
    the folder alone; those could not make a run in a folder with a quote.
    """
    queries = [f"tags.`{_PLACE_SHA256}` = '{_sha256(place)}'"]
    plain = redact_credentials(place)
    if "'" not in plain and "\\" not in plain:
        queries.append(f"tags.`{_PLACE}` = '{plain}'")
    for query in queries:
        known = client.search_runs([experiment_id], query, max_results=1)
        if known:
            return known[0]
    return None


def _sha256(place: str) -> str:
    return hashlib.sha256(redact_credentials(place).encode()).hexdigest()


def _said(failure: Exception) -> str:
    """One line, without passwords."""
    said = redact_credentials(str(failure)).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {said[0]}"


def _is_refusal(failure: Exception) -> bool:
    """Whether it says that the request is wrong; whether it is right in that, another request has to tell."""
    status = _status_of(failure)
    return 400 <= status < 500 and status not in _MAY_PASS_LATER


def _status_of(failure: Exception) -> int:
    """The HTTP status that a failure of MLflow or requests stands for; 500 where it has none."""
    from mlflow.exceptions import MlflowException

    if isinstance(failure, MlflowException):
        # MLflow knows no code for some statuses, such as 413, and calls them internal errors.
        stated = re.search(r"failed with error code (\d{3})", str(failure))
        return int(stated[1]) if stated else failure.get_http_status_code()
    return getattr(getattr(failure, "response", None), "status_code", 500)


def _described(head: Mapping[str, Any]) -> str:
    """What a letter holds, in a few words."""
    match head["kind"]:
        case "metrics":
            return f"metrics of step {head['step']} ({_first(head['values'])})"
        case "params":
            return f"parameters ({_first(head['values'])})"
        case "files":
            return f"file {_first(head['names'])}"
        case "inputs":
            return f"data set {head['dataset']['name']}"
        case "status":
            return f"status {head['status']}"
        case kind:
            return kind


def _first(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = ", ".join(name[:60] for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown
