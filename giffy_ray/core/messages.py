"""What reaches the user's terminal: warnings of all processes of a job, and no credentials.

Ray shows a driver either every line that any process of its job prints, or none. Here workers mark what the logger
`giffy_ray` says, and the driver shows the marked lines alone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from giffy_ray.core.storage import redact_credentials

# Environment variables of the driver that all processes of its job get, by how their names begin: credentials, and
# where servers are.
_PASSED_ON = ("MLFLOW_", "AWS_", "GOOGLE_")
_MARK = "[giffy_ray] "
_LAST_S = 0.5  # Ray looks for new lines ten times a second


class RedactedStream:
    """A text stream that writes addresses without credentials."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact_credentials(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """From now on stdout and stderr are without credentials: tables, warnings, and tracebacks of what ends us."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), RedactedStream):
            setattr(sys, name, RedactedStream(getattr(sys, name)))


class MarkedHandler(logging.StreamHandler):
    """Writes a record to stderr as one line that `show_worker_messages` finds, however many lines it has."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        return _marked(super().format(record))


def _marked(text: str) -> str:
    return _MARK + json.dumps(redact_credentials(text))


def mark_warnings() -> None:
    """In a worker: has `MarkedHandler` write what the logger `giffy_ray` says, and nobody else."""
    logger = logging.getLogger("giffy_ray")
    logger.handlers = [MarkedHandler()]
    logger.propagate = False  # Ray Train's own handlers would write it to their files, credentials and all


def say(text: str) -> None:
    """Prints, also from a worker."""
    if any(isinstance(handler, MarkedHandler) for handler in logging.getLogger("giffy_ray").handlers):
        sys.stderr.write(_marked(text) + "\n")  # Ray Train replaces print in its workers
        sys.stderr.flush()
    else:
        print(text, flush=True)


def worker_setup(environment: Mapping[str, str]) -> Callable[[], None]:
    """Ray's `worker_process_setup_hook`: every process of the job calls it when it starts.

    It carries the variables to pass on. Ray stores it in its own table: in a `runtime_env`, values would be shown on
    the dashboard and written to Ray's logs.
    """
    passed_on = {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}

    def prepare_giffy_ray_worker() -> None:
        os.environ.update(passed_on)
        with contextlib.suppress(
            ImportError
        ):  # else Ray starts processes for ever, and no task can say what is missing
            from giffy_ray.core.messages import mark_warnings

            mark_warnings()

    return prepare_giffy_ray_worker


def show_worker_messages() -> None:
    """To be called after `ray.init(log_to_driver=True)`: prints what workers marked, each text once, and drops the rest
    of what they print. At the end this process waits a moment for the last of it."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher  # no public way to choose what is shown

    shown = set[str]()
    atexit.register(time.sleep, _LAST_S)

    def show(batch: Mapping[str, Any]) -> None:
        for text in messages_in(batch["lines"]):
            if text not in shown:
                shown.add(text)
                with contextlib.suppress(OSError):  # nobody may read it any more
                    print(text, file=sys.stderr, flush=True)

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("ray_print_logs", show)  # Ray removes it by this name


def messages_in(lines: list[str]) -> list[str]:
    """The texts that `MarkedHandler` wrote among the lines of a process."""
    found = []
    for line in lines:
        _, mark, text = line.partition(_MARK)
        if mark:
            try:
                found.append(str(json.loads(text)))
            except ValueError:  # another thread wrote into the same line
                found.append(text)
    return found
