"""A private Ray head on this machine, for the demo and the tests. Other Ray clusters may run next to it.

The dashboard and the jobs API use free ports, and a token keeps other users out. The head ends with the process that
started it, even if that is killed: it runs as long as its standard input is open.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tenacity

from giffy_ray.config import ConfigError

# Holds only tables and indices; clips are read from memory maps.
_OBJECT_STORE_BYTES = 256 * 2**20
# For `ray start`. By default Ray runs workers at nice 15, so that any other process delays them. If all cores train,
# even a wake-up of Ray's own processes slows a step.
DEFAULT_NICENESS_ENV = {"RAY_worker_niceness": "0"}
# For `ray start --head`, which passes it to the supervisors of jobs: how long `ray job stop` lets a job write its last
# checkpoint before it kills the job. Ray's default is 3 s.
JOB_STOP_WAIT_ENV = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}

# The path of a Unix socket has at most 107 bytes. Ray's longest is
# FOLDER/session_2025-01-31_23-59-59_123456_PID/sockets/dash_TaskEventsHead.
_MAX_SOCKET_BYTES = 107
_SESSION_BYTES = len("/session_2025-01-31_23-59-59_123456_/sockets/dash_TaskEventsHead")


def check_temp_dir_length(folder: str, pid_digits: int = 7) -> None:
    """Raises ConfigError if the paths of Ray's sockets below `folder` would be too long for the system.

    Args:
        folder: Ray's temporary folder.
        pid_digits: Digits of the process id that Ray appends.
    """
    max_bytes = _MAX_SOCKET_BYTES - _SESSION_BYTES - pid_digits
    if len(os.fsencode(folder)) > max_bytes:
        raise ConfigError(
            f"TMPDIR: Ray's folder {folder} is too long for the sockets below it: at most {max_bytes} bytes; set "
            f"RAY_TMPDIR=/tmp, or TMPDIR to a shorter path"
        )


@dataclass(frozen=True)
class Head:
    """A running Ray head.

    Attributes:
        dashboard: Address of the dashboard and of the jobs API.
        environment: For processes that submit jobs to the head, or join it.
    """

    dashboard: str
    environment: dict[str, str]


@contextmanager
def local_head(cpus: int | None = None) -> Iterator[Head]:
    """Runs a head. Its logs are kept only if the block raises.

    Args:
        cpus: CPUs of the head. None: all of the machine.

    Raises:
        ConfigError: TMPDIR is too long for the head's sockets.
        RuntimeError: The head did not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="giffy_ray-"))
    try:
        check_temp_dir_length(str(folder))
    except ConfigError:
        folder.rmdir()
        raise
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    environment = (
        JOB_STOP_WAIT_ENV
        | os.environ
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # So that jobs find python and ray of this environment even if it is not activated.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            **DEFAULT_NICENESS_ENV,
        }
    )
    command = [sys.executable, "-m", "giffy_ray.cluster.local", str(folder), str(cpus or os.cpu_count())]
    log = (folder / "head.log").open("w")
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        try:
            assert process.stdin and process.stdout
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the Ray head did not start:\n{(folder / 'head.log').read_text()}")
            addresses = json.loads(line)
            yield Head(addresses["dashboard"], environment | {"RAY_ADDRESS": addresses["dashboard"]})
        except BaseException:
            print(f"Ray's logs are in {folder}", file=sys.stderr)
            raise
        else:
            process.stdin.close()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            log.close()
            process.stdin.close()  # type: ignore[union-attr]


def _main(folder: str, cpus: int) -> None:
    port = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    # Free ports throughout: on the default ports, the jobs API of a second Ray on the machine does not work.
    command += ["--port=0", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-port={port}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) as ray:
        try:
            _wait_for_jobs(f"http://127.0.0.1:{port}", ray)
            print(json.dumps({"dashboard": f"http://127.0.0.1:{port}"}), flush=True)
            sys.stdin.read()
        finally:
            ray.terminate()


@tenacity.retry(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(60), reraise=True)
def _wait_for_jobs(dashboard: str, ray: subprocess.Popen) -> None:
    from ray.job_submission import JobSubmissionClient

    if ray.poll() is not None:
        raise SystemExit(f"`ray start` failed with exit code {ray.returncode}")
    JobSubmissionClient(dashboard).list_jobs()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
