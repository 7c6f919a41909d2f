"""The main job as a user runs it, on a Ray head of its own: python jobs/demo.py [section.field=value ...]

Starts a local head with its dashboard on free ports, submits jobs/tune_cvae.py to it, and ends the head again. Other
Rays on the machine are neither used nor disturbed.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

from giffy_ray import cli
from giffy_ray.cluster.local import local_head
from giffy_ray.config import ConfigError, load
from giffy_ray.core.messages import redact_output
from giffy_ray.core.storage import resolve_path

_CHECKOUT = Path(__file__).resolve().parent.parent
_EXPERIMENT = "jobs/experiments/demo.yaml"
# What `ray job submit` says of itself; its errors are let through.
_RAY_SAYS = re.compile(r"(\d{4}-\d\d-\d\d [\d:,]+\s+)?(INFO|SUCC|WARNING) \S+\.py:\d+ -- |Running entrypoint")


def main(arguments: cli.Arguments) -> int:
    redact_output()
    if arguments.path is not None:
        raise ConfigError(f"{arguments.path!r}: the demo has its own experiment file, {_EXPERIMENT}")
    words = [f"storage={_CHECKOUT / 'runs'}", *arguments.words]
    # The storage is given in full because Ray runs the job in a copy of this folder.
    words.append(f"storage={resolve_path(load(_CHECKOUT / _EXPERIMENT, words).storage)}")
    words += ["--debug"] if arguments.debug else []
    began_s = time.monotonic()
    print("starting a local Ray head", flush=True)
    with local_head() as head:
        job = ["python", "jobs/tune_cvae.py", _EXPERIMENT, *words]
        submit = ["ray", "job", "submit", "--log-color=false", "--working-dir=.", "--", *job]
        print(f"{' '.join(submit)}\n  dashboard: {head.dashboard}", flush=True)
        code = _stream(submit, head.environment)
    if code == 0:
        minutes = (time.monotonic() - began_s) / 60
        print(f"\ndone in {minutes:.1f} minutes; 'make ui' shows the runs and their clips on http://127.0.0.1:5000")
    return code


def _stream(submit: list[str], environment: dict[str, str]) -> int:
    with subprocess.Popen(
        submit, cwd=_CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if not _RAY_SAYS.match(line):
                print(line, end="", flush=True)
    return process.returncode


if __name__ == "__main__":
    given = cli.parse(__doc__, sys.argv[1:])
    with cli.one_line_errors(given.debug):
        sys.exit(main(given))
