"""Console output of a job: warnings from all of its processes, without credentials.

Ray shows a driver either every line that any process of its job prints, or none. Here workers mark the warnings of the
logger `giffy_ray`, and the driver shows only the marked lines.
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

# Prefixes of the driver's environment variables that all processes of its job receive: credentials and servers.
_FORWARDED_PREFIXES = ("MLFLOW_", "AWS_", "GOOGLE_")
_MARK = "[giffy_ray] "
_FINAL_WAIT_S = 0.5  # Ray polls the workers' output ten times a second


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
    """Removes credentials from everything that this process prints from now on, tracebacks included."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), RedactedStream):
            setattr(sys, name, RedactedStream(getattr(sys, name)))


class MarkedHandler(logging.StreamHandler):
    """Writes each record to stderr as one line, which `show_worker_messages` recognizes."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        return _mark(super().format(record))


def mark_warnings() -> None:
    """Makes `MarkedHandler` the only handler of the logger `giffy_ray` in a worker."""
    logger = logging.getLogger("giffy_ray")
    logger.handlers = [MarkedHandler()]
    logger.propagate = False  # Ray Train's own handlers would write credentials to their files


def print_message(text: str) -> None:
    """Prints to the driver's console, also from a worker."""
    if any(isinstance(handler, MarkedHandler) for handler in logging.getLogger("giffy_ray").handlers):
        sys.stderr.write(_mark(text) + "\n")  # Ray Train replaces print in its workers
        sys.stderr.flush()
    else:
        print(text, flush=True)


def make_worker_setup_hook(environment: Mapping[str, str]) -> Callable[[], None]:
    """Returns Ray's `worker_process_setup_hook`, which every process of the job calls when it starts.

    The hook carries the variables to forward. Ray keeps it in an internal table, whereas it would show variables of a
    `runtime_env` on the dashboard and write them to its logs.
    """
    forwarded = {name: value for name, value in environment.items() if name.startswith(_FORWARDED_PREFIXES)}

    def prepare_giffy_ray_worker() -> None:
        os.environ.update(forwarded)
        # If the hook failed, Ray would restart the process forever, and no task could report the missing package.
        with contextlib.suppress(ImportError):
            from giffy_ray.core.messages import mark_warnings

            mark_warnings()

    return prepare_giffy_ray_worker


def show_worker_messages() -> None:
    """Prints the workers' marked lines, each text once, and drops the rest of their output.

    Call it after `ray.init(log_to_driver=True)`. At exit, the process waits a moment for the last lines.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher  # Ray has no public filter

    shown = set[str]()
    atexit.register(time.sleep, _FINAL_WAIT_S)

    def show(batch: Mapping[str, Any]) -> None:
        for text in parse_messages(batch["lines"]):
            if text not in shown:
                shown.add(text)
                with contextlib.suppress(OSError):  # the reader of a pipe may be gone
                    print(text, file=sys.stderr, flush=True)

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("ray_print_logs", show)  # Ray removes it by this name


def parse_messages(lines: list[str]) -> list[str]:
    """Returns the texts that `MarkedHandler` wrote among the lines of a process."""
    messages = []
    for line in lines:
        _, mark, text = line.partition(_MARK)
        if mark:
            try:
                messages.append(str(json.loads(text)))
            except ValueError:  # another thread wrote into the same line
                messages.append(text)
    return messages


def _mark(text: str) -> str:
    return _MARK + json.dumps(redact_credentials(text))
