"""A Ray head of one's own: for the demo and the tests, beside whatever other Rays the machine runs.

Dashboard and jobs API are on free ports, and a token of its own keeps others out. It ends with the process that
asked for it, however that ends: it lives as long as its standard input is open.
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

# Only tables and positions pass through it; clips are read from memory maps.
_OBJECT_STORE_BYTES = 256 * 2**20
# For a Ray that is started with it: by default each worker stands back behind everything else on its machine (nice 15),
# and where all cores train, each waking of Ray's own processes then costs a step more than it has to.
DEFAULT_NICENESS_ENV = {"RAY_worker_niceness": "0"}
# How long `ray job stop` waits for a job to write its last checkpoint before it kills it; Ray's default is 3 s. The
# process on the head that supervises the job reads it, with the environment of `ray start`.
JOB_STOP_WAIT_ENV = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


# Sockets of Unix have names of at most 107 bytes. Ray's longest is
# FOLDER/session_2025-01-31_23-59-59_123456_PID/sockets/dash_TaskEventsHead.
_LONGEST_SOCKET_BYTES = 107
_SESSION_BYTES = len("/session_2025-01-31_23-59-59_123456_/sockets/dash_TaskEventsHead")


def refuse_long_folder(folder: str, pid_digits: int = 7) -> None:
    """Raises ConfigError where the names of Ray's sockets below its `folder` are too long for the system."""
    most = _LONGEST_SOCKET_BYTES - _SESSION_BYTES - pid_digits
    if len(os.fsencode(folder)) > most:
        raise ConfigError(
            f"TMPDIR: Ray's folder {folder} is too long for the sockets below it: at most {most} bytes; set "
            f"RAY_TMPDIR=/tmp, or TMPDIR to a shorter path"
        )


@dataclass(frozen=True)
class Head:
    dashboard: str  # also the address of the jobs API
    environment: dict[str, str]  # of a process that is to submit jobs to it, or to join it


@contextmanager
def local_head(cpus: int | None = None) -> Iterator[Head]:
    """A head with `cpus` CPUs (none: all of the machine's). Its logs are kept only where the block raises.

    Raises ConfigError where TMPDIR, below which it keeps its sockets, is too long.
    """
    folder = Path(tempfile.mkdtemp(prefix="giffy_ray-"))
    try:
        refuse_long_folder(str(folder))
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
            # Jobs find this environment's python and ray, whether it was activated or not.
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
    # All of them free ones: on its usual ports, the jobs API of a machine's second Ray does not work.
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
        raise SystemExit(f"`ray start` ended with {ray.returncode}")
    JobSubmissionClient(dashboard).list_jobs()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
