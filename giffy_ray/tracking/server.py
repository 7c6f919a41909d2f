"""MLflow's server as a process of its own, on loopback: for `make ui`, the tests and the benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from giffy_ray.tracking.ui_view import OPENED
from giffy_ray.tracking.uri import sqlite_address

_START_S = 300  # two busy cores take one


class Server:
    """`mlflow server`, which answers at `address`."""

    def __init__(self, address: str, process: subprocess.Popen):
        self.address, self._process = address, process

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it and the processes below it, which outlive it otherwise."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
        self._process.wait()

    def wait(self) -> int:
        """Until it ends by itself. Returns its exit code."""
        return self._process.wait()

    def answers(self) -> bool:
        """Waits for its first answer; False where it ended before."""
        deadline_s = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return True
            except OSError:
                time.sleep(0.2)
        return False


@contextmanager
def mlflow_server(
    backend: str, port: int, words: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server over the database `backend` that answers. Raises RuntimeError where it does not start."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), *words]
    # Its jobs are for language models, and would be two processes more.
    ours = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = {**ours, **os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            if not server.answers():
                log.seek(0)
                raise RuntimeError(f"MLflow's server did not start:\n{log.read()[-3000:]}")
            yield server
        finally:
            server.end()


def show(storage: Path, port: int) -> None:
    """Serves the runs of a local storage until it is interrupted. Raises SystemExit with what is wrong."""
    database = storage / "mlflow.db"
    if not database.is_file():
        sys.exit(
            f"{database}: there is no such file, so there are no runs to show; 'make demo' makes some, and "
            "'make ui RUNS=FOLDER' shows those of another storage"
        )
    if not is_free(port):
        sys.exit(f"port {port}: another program listens there; 'make ui PORT={port + 1}' takes another one")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    print("MLflow's server is starting; that takes half a minute", flush=True)
    try:
        with mlflow_server(sqlite_address(database.absolute()), port) as server:
            print(f"{server.address} shows the runs of {storage}; Ctrl-C ends it. Curves and samples:", flush=True)
            print(f"{server.address}/#/experiments/1/runs?{OPENED}", flush=True)  # the first that a database holds
            sys.exit(f"MLflow's server ended by itself, with code {server.wait()}")
    except KeyboardInterrupt:
        print("\nended")
    except RuntimeError as failure:
        sys.exit(str(failure))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended may be in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        sys.exit(f"port {text}: must be a number from 1 to 65535; 'make ui PORT=5001'")
    return int(text)


if __name__ == "__main__":
    show(Path(sys.argv[1]), _port(sys.argv[2]))
