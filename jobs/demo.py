"""Runs the full pipeline on a local Ray head: python jobs/demo.py [section.field=value ...]

Starts a head with its dashboard on free ports, submits jobs/tune.py with the experiment `demo` to it, and stops the
head. Other Ray clusters on the machine are not affected. The final evaluation includes the published model `between`.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

from giffy_ray.cli import jobs
from giffy_ray.cli.errors import report_errors
from giffy_ray.cluster.local import local_head
from giffy_ray.config import ConfigError, load
from giffy_ray.core.messages import redact_output
from giffy_ray.core.packaged import packaged_path
from giffy_ray.core.storage import resolve_path

_CHECKOUT = Path(__file__).resolve().parent.parent
_EXPERIMENT = "demo"
_MODELS = (
    "'cvae' is the demo's model, trained for about a minute; 'published between' comes with the project and was "
    "trained for 20 minutes on two CPU cores."
)
# Messages of `ray job submit` itself. Its errors are not filtered out.
_RAY_MESSAGE = re.compile(r"(\d{4}-\d\d-\d\d [\d:,]+\s+)?(INFO|SUCC|WARNING) \S+\.py:\d+ -- |Running entrypoint")


def main(arguments: jobs.Arguments) -> int:
    redact_output()
    if arguments.experiment is not None:
        raise ConfigError(f"{arguments.experiment!r}: this job always runs the experiment {_EXPERIMENT!r}")
    overrides = [f"storage={_CHECKOUT / 'runs'}", *arguments.overrides]
    # The storage is absolute because Ray runs the job in a copy of the working directory.
    overrides.append(f"storage={resolve_path(load(packaged_path('experiments', _EXPERIMENT), overrides).storage)}")
    options = ["--compare-published", *(["--debug"] if arguments.debug else [])]
    start_s = time.monotonic()
    print("starting a local Ray head", flush=True)
    with local_head() as head:
        job = ["python", "jobs/tune.py", _EXPERIMENT, *overrides, *options]
        command = ["ray", "job", "submit", "--log-color=false", "--working-dir=.", "--", *job]
        print(f"{' '.join(command)}\n  dashboard: {head.dashboard}", flush=True)
        exit_code = _run_and_stream(command, head.environment)
    if exit_code == 0:
        minutes = (time.monotonic() - start_s) / 60
        print(f"\n{_MODELS}")
        print(f"done in {minutes:.1f} minutes; 'make ui' shows the runs and their clips on http://127.0.0.1:5000")
    return exit_code


def _run_and_stream(command: list[str], environment: dict[str, str]) -> int:
    with subprocess.Popen(
        command, cwd=_CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if not _RAY_MESSAGE.match(line):
                print(line, end="", flush=True)
    return process.returncode


if __name__ == "__main__":
    parsed = jobs.parse(__doc__, sys.argv[1:])
    with report_errors(Path(sys.argv[0]).name, parsed.debug):
        sys.exit(main(parsed))
