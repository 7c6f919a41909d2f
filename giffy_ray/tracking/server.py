"""A local MLflow server in a separate process, for `giffy ui`, tests and benchmarks."""

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

from giffy_ray.core.errors import InputError
from giffy_ray.tracking.ui_view import VIEW_QUERY
from giffy_ray.tracking.uri import sqlite_address

_START_TIMEOUT_S = 300  # a start on two busy cores takes a minute


class Server:
    """A running `mlflow server`.

    Attributes:
        address: http://127.0.0.1:PORT.
    """

    def __init__(self, address: str, process: subprocess.Popen):
        self.address = address
        self._process = process

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> None:
        """Ends the server and its child processes, which would outlive it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal_number)
        self._process.wait()

    def wait(self) -> int:
        """Waits until the server ends by itself. Returns its exit code."""
        return self._process.wait()

    def wait_until_ready(self) -> bool:
        """Returns True at the server's first answer, or False if it ends before that or takes too long."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return True
            except OSError:
                time.sleep(0.2)
        return False


@contextmanager
def mlflow_server(
    backend: str, port: int, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Runs a server on loopback.

    Args:
        backend: The address of its database.
        port: The port.
        arguments: More arguments of `mlflow server`.
        environment: More environment variables.

    Raises:
        RuntimeError: The server did not start.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    # MLflow's jobs are for language models, and would run in two more processes.
    defaults = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = {**defaults, **os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            if not server.wait_until_ready():
                log.seek(0)
                raise RuntimeError(f"MLflow's server did not start:\n{log.read()[-3000:]}")
            yield server
        finally:
            server.stop()


def serve_ui(storage: Path, port: int) -> None:
    """Serves the runs of a local storage on loopback until interrupted.

    Raises:
        InputError: There are no runs, or the port is in use.
        RuntimeError: The server did not start, or ended by itself.
    """
    database = storage / "mlflow.db"
    if not database.is_file():
        raise InputError(
            f"{database}: no such file, so there are no runs to show; create some with 'make demo' or 'giffy train', "
            "or name the folder of others"
        )
    if not is_port_free(port):
        raise InputError(f"port {port}: another program uses it; choose another one, such as --port {port + 1}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    print("starting MLflow's server; this takes about half a minute", flush=True)
    try:
        with mlflow_server(sqlite_address(database.absolute()), port) as server:
            print(
                f"MLflow shows the runs of {storage} at {server.address}; Ctrl-C stops it. Curves and moving clips:",
                flush=True,
            )
            # The first experiment of a new database has id 1; 0 is MLflow's `Default`.
            print(f"{server.address}/#/experiments/1/runs?{VIEW_QUERY}", flush=True)
            raise RuntimeError(f"MLflow's server ended unexpectedly, with exit code {server.wait()}")
    except KeyboardInterrupt:
        print("\nstopped")


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        # Otherwise a port whose server has just ended would seem to be in use (TIME_WAIT).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
