"""A Ray head of one's own: for the demo and the tests, beside whatever other Rays the machine runs.

Dashboard and jobs API are on free ports, and a token of its own keeps others out. It ends with the process that
asked for it, however that ends: it lives as long as its standard input is open.
"""

from __future__ import annotations

import json
import logging
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

# Only tables and positions pass through it; clips are read from memory maps.
_OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Head:
    dashboard: str  # also the address of the jobs API
    environment: dict[str, str]  # of a process that is to submit jobs to it, or to join it


@contextmanager
def local_head(cpus: int | None = None) -> Iterator[Head]:
    """A head with `cpus` CPUs (none: all of the machine's). Its logs are kept only where the block raises."""
    folder = Path(tempfile.mkdtemp(prefix="giffy_ray-"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs find this environment's python and ray, whether it was activated or not.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "giffy_ray.head", str(folder), str(cpus or os.cpu_count())]
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
    import ray

    context = ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=True,
        dashboard_port=_free_port(),
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=folder,
    )
    print(json.dumps({"dashboard": f"http://{context.dashboard_url}"}), flush=True)
    sys.stdin.read()
    ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
