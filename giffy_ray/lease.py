"""A lease on a run's folder, so that two processes do not train the same run at once.

A file says who holds it and is written again every few seconds. One that has not been for `EXPIRES_S` seconds was left
by a process that is gone. Whoever finds it free writes its own name and looks a moment later whose name it is: storage
such as S3 has no locks.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.storage import filesystem_of, join, read_text, write_text

EXPIRES_S = 30.0
_RENEW_S = 5.0
_SETTLE_S = 0.5


@contextmanager
def held(experiment: Experiment) -> Iterator[None]:
    """Inside, the run of the experiment's name is ours. Waits for a lease that nobody renews. Raises ConfigError."""
    location = join(experiment.storage, experiment.name, "lease.json")
    ours = {"holder": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    _wait_until_free(location, experiment.name)
    _write(location, ours)
    time.sleep(_SETTLE_S)
    theirs = _read(location)
    if theirs is None or theirs["holder"] != ours["holder"]:
        raise _taken(location, experiment.name, theirs or {})
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW_S):
            _write(location, ours)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        filesystem, path = filesystem_of(location)
        filesystem.delete_file(path)


def _wait_until_free(location: str, name: str) -> None:
    """Clocks of machines differ, so what counts is whether the time written in the file changes while we look."""
    first = _read(location)
    if first is None or _is_gone(first):
        return
    print(f"waiting up to {EXPIRES_S:.0f} s to see whether {name!r} is still being trained elsewhere", flush=True)
    deadline = time.monotonic() + EXPIRES_S
    while time.monotonic() < deadline:
        time.sleep(_SETTLE_S)
        lease = _read(location)
        if lease is None:
            return
        if lease != first:
            raise _taken(location, name, lease)


def _is_gone(lease: dict) -> bool:
    """Whether its holder was a process of this machine that has ended."""
    if lease.get("host") != socket.gethostname():
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _taken(location: str, name: str, lease: dict) -> ConfigError:
    return ConfigError(
        f"name: the run {name!r} is being trained by process {lease.get('pid')} on {lease.get('host')} ({location}); "
        "give another name=..., or end that process"
    )


def _read(location: str) -> dict | None:
    text = read_text(location)
    return None if text is None else json.loads(text)


def _write(location: str, ours: dict) -> None:
    write_text(location, json.dumps(ours | {"renewed_s": time.time()}))
