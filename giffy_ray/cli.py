"""The command line of all jobs: NAME.py [EXPERIMENT.yaml] [section.field=value ...] [options].

Validation comes before heavy imports, so that a mistake in the experiment is reported within a second, without Ray.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from giffy_ray.config import ConfigError, Experiment, check_required_fields, load, override
from giffy_ray.core.messages import redact_output
from giffy_ray.core.storage import check_readable, check_writable, redact_credentials, resolve_path

_OVERRIDE = re.compile(r"[\w.-]*=")
_MAX_MESSAGE_CHARS = 600  # of an unexpected error; the traceback has the rest
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells


class Arguments(NamedTuple):
    """The parsed command line of a job."""

    path: str | None  # of the experiment file
    overrides: list[str]  # section.field=value
    debug: bool
    flags: dict[str, bool]  # the job's own options


def run(
    job: Callable[..., None],
    usage: str | None,
    default: Path,
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
    needs_data: bool = True,
    check: Callable[[Experiment], object] = lambda experiment: None,
    without_file: Callable[[Experiment, Sequence[str]], Experiment] | None = None,
) -> None:
    """Runs a job from the command line: loads the experiment, validates it, connects to Ray and calls the job.

    The exit code is 0 if the job returns, 2 for a mistake in the experiment and 1 for any other error. An error prints
    one message; --debug adds the traceback.

    Args:
        job: The job. Called with the experiment, and with a keyword argument for each of its flags.
        usage: The text of --help.
        default: The experiment file if the command line names none.
        flags: Options of this job and their help texts, by name.
        needs_data: Whether the job reads videos or clips, so that `data.root` must be readable.
        check: Validates the experiment before Ray starts. Raises ConfigError.
        without_file: Called if the command line names no experiment file, with the default experiment and the
            overrides. Returns the experiment to use.
    """
    redact_output()
    arguments = parse(usage, sys.argv[1:], flags)
    with report_errors(arguments.debug):
        experiment = load(arguments.path or default, arguments.overrides)
        experiment = override(experiment, {"storage": resolve_path(experiment.storage)})
        _check_storage(experiment)
        if without_file and arguments.path is None:
            experiment = without_file(experiment, arguments.overrides)
        if needs_data:
            _check_data(experiment)
        check(experiment)
        from giffy_ray.cluster import resources

        resources.connect()
        job(experiment, **arguments.flags)


def parse(usage: str | None, argv: Sequence[str], flags: Mapping[str, str] = MappingProxyType({})) -> Arguments:
    """Parses a command line. Exits with code 0 after --help, and with code 2 for an invalid option."""
    parser = argparse.ArgumentParser(
        description=usage, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", metavar="EXPERIMENT.yaml or section.field=value")
    parser.add_argument("--profile", action="store_true", help="record a torch.profiler trace (speed.profile=true)")
    parser.add_argument("--resume", choices=("auto", "never", "must"), help="an interrupted search (search.resume)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, text in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    options = parser.parse_intermixed_args(argv)
    if "" in options.arguments:  # "$EXPERIMENT" with an unset variable
        parser.error("unexpected '': expected an experiment file or section.field=value")
    files = [argument for argument in options.arguments if _is_file(argument)]
    if len(files) > 1:
        parser.error(f"unexpected {files[1]!r}: the experiment file is {files[0]!r}; expected section.field=value")
    overrides = [argument for argument in options.arguments if not _is_file(argument)]
    if options.profile:
        overrides.append("speed.profile=true")
    if options.resume:
        overrides.append(f"search.resume={options.resume}")
    flag_values = {name: getattr(options, name) for name in flags}
    return Arguments(files[0] if files else None, overrides, options.debug, flag_values)


def _is_file(argument: str) -> bool:
    return not _OVERRIDE.match(argument) or (argument.endswith((".yaml", ".yml")) and Path(argument).is_file())


@contextmanager
def report_errors(debug: bool = False) -> Iterator[None]:
    """Turns an exception in the block into one message on stderr and an exit code, without a traceback."""
    program = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        _print_error(f"{program}: interrupted")
        sys.exit(_EXIT_INTERRUPTED)
    except Exception as error:
        root = _root_cause(error)
        trace = redact_credentials("".join(traceback.format_exception(error)))
        if debug:
            _print_error(trace.rstrip())
        if isinstance(root, ConfigError):
            _print_error(f"{program}: {redact_credentials(str(root))}")
            sys.exit(2)
        message = redact_credentials(" ".join(str(root).split()))[:_MAX_MESSAGE_CHARS]
        _print_error(f"{program}: {type(root).__name__}: {message}{_format_location(error)}")
        if not debug:
            _print_error(f"  {_save_traceback(program, trace)}")
        sys.exit(1)


def _check_storage(experiment: Experiment) -> None:
    try:
        check_writable(experiment.storage)
    except (OSError, ValueError) as error:
        raise ConfigError(f"storage: cannot be written: {_reason(error)} (value {experiment.storage!r})") from error


def _check_data(experiment: Experiment) -> None:
    check_required_fields(experiment)
    root = experiment.data.root
    if root is None:
        return
    try:
        check_readable(root)
    except FileNotFoundError as error:
        message = f"data.root: no such folder or list (.csv, .parquet) of videos (value {root!r})"
        raise ConfigError(message) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.root: cannot be read: {_reason(error)} (value {root!r})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _root_cause(error: BaseException) -> BaseException:
    """Returns the exception that a Ray worker or task raised, without Ray's wrappers."""
    visited = []
    while error not in visited:
        visited.append(error)
        failures = getattr(error, "worker_failures", None) or {}  # ray.train.WorkerGroupError, by rank
        causes = (
            *(failures[rank] for rank in sorted(failures)[:1]),
            getattr(error, "controller_failure", None),  # ray.train.ControllerError
            getattr(error, "_base_exc", None),  # Ray Train's UserExceptionWithTraceback
            getattr(error, "cause", None),  # ray.exceptions.RayTaskError
        )
        error = next((cause for cause in causes if isinstance(cause, BaseException)), error)
    return error


def _format_location(error: BaseException) -> str:
    """Formats the innermost line outside of libraries, as in ` (train.py:12)`."""
    libraries = ("<", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _save_traceback(program: str, trace: str) -> str:
    """Writes a traceback to a temporary file. Returns the message that names it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"giffy_ray-{Path(program).stem}-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
    except OSError:
        return "run again with --debug to see the traceback"
    return f"the traceback is in {file.name}; --debug prints it"


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
