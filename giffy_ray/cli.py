"""The command line of all jobs: NAME.py [EXPERIMENT.yaml] [section.field=value ...] [options].

Nothing heavy is imported before the experiment is known to be right: a mistake is answered in a second, without Ray.
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

from giffy_ray.config import ConfigError, Experiment, load, override, refuse_missing
from giffy_ray.core.messages import redact_output
from giffy_ray.core.storage import check_readable, check_writable, redact_credentials, resolve_path

_OVERRIDE = re.compile(r"[\w.-]*=")
_LONGEST_MESSAGE = 600  # characters of an unexpected error; the rest is in its traceback
_INTERRUPTED = 130  # as shells say it: 128 + SIGINT


class Arguments(NamedTuple):
    path: str | None  # of the experiment file
    words: list[str]  # overrides, section.field=value
    debug: bool
    flags: dict[str, bool]  # of the job's own options


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
    """Reads the experiment, joins the cluster and does the job. Exit code 0 only when the work was done.

    Without an experiment file `default` is read; `without_file` is then given that experiment and the overrides, and
    returns the one to use. `flags` are options of this job alone, name -> help: the job gets each as a named argument,
    True where it was given. `needs_data`: the job reads videos or clips, so `data.root` is checked. `check` raises
    ConfigError before Ray starts. A mistake in the experiment ends with code 2, any other error with 1, each with one
    clear message; --debug adds the traceback.
    """
    redact_output()
    arguments = parse(usage, sys.argv[1:], flags)
    with one_line_errors(arguments.debug):
        experiment = load(arguments.path or default, arguments.words)
        experiment = override(experiment, {"storage": resolve_path(experiment.storage)})
        _check_storage(experiment)
        if without_file and arguments.path is None:
            experiment = without_file(experiment, arguments.words)
        if needs_data:
            _check_data(experiment)
        check(experiment)
        from giffy_ray.cluster import resources

        resources.connect()
        job(experiment, **arguments.flags)


def parse(usage: str | None, words: Sequence[str], flags: Mapping[str, str] = MappingProxyType({})) -> Arguments:
    """The command line as arguments. Ends the process after --help, and with code 2 for an unknown option."""
    parser = argparse.ArgumentParser(
        description=usage, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT.yaml or section.field=value")
    parser.add_argument("--profile", action="store_true", help="record a torch.profiler trace (speed.profile=true)")
    parser.add_argument("--resume", choices=("auto", "never", "must"), help="an interrupted search (search.resume)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, text in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    options = parser.parse_intermixed_args(words)
    if "" in options.words:  # "$EXPERIMENT" where the variable is not set
        parser.error("unexpected '': expected an experiment file or section.field=value")
    files = [word for word in options.words if _is_file(word)]
    if len(files) > 1:
        parser.error(f"unexpected {files[1]!r}: the experiment file is {files[0]!r}; expected section.field=value")
    overrides = [word for word in options.words if not _is_file(word)]
    if options.profile:
        overrides.append("speed.profile=true")
    if options.resume:
        overrides.append(f"search.resume={options.resume}")
    given = {name: getattr(options, name) for name in flags}
    return Arguments(files[0] if files else None, overrides, options.debug, given)


def _is_file(word: str) -> bool:
    return not _OVERRIDE.match(word) or (word.endswith((".yaml", ".yml")) and Path(word).is_file())


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Ends the process with a message and an exit code where the block raises: no user error shows a traceback."""
    program = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        _say(f"{program}: interrupted")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        root = _root_cause(error)
        trace = redact_credentials("".join(traceback.format_exception(error)))
        if debug:
            _say(trace.rstrip())
        if isinstance(root, ConfigError):
            _say(f"{program}: {redact_credentials(str(root))}")
            sys.exit(2)
        message = redact_credentials(" ".join(str(root).split()))[:_LONGEST_MESSAGE]
        _say(f"{program}: {type(root).__name__}: {message}{_place_of(error)}")
        if not debug:
            _say(f"  {_kept_trace(program, trace)}")
        sys.exit(1)


def _check_storage(experiment: Experiment) -> None:
    try:
        check_writable(experiment.storage)
    except (OSError, ValueError) as error:
        raise ConfigError(f"storage: cannot be written: {_reason(error)} (value {experiment.storage!r})") from error


def _check_data(experiment: Experiment) -> None:
    refuse_missing(experiment)
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
    """What a worker or a task of Ray raised, without what Ray wraps around it."""
    seen = []
    while error not in seen:
        seen.append(error)
        failures = getattr(error, "worker_failures", None) or {}  # ray.train.WorkerGroupError, by rank
        inner = (
            *(failures[rank] for rank in sorted(failures)[:1]),
            getattr(error, "controller_failure", None),  # ray.train.ControllerError
            getattr(error, "_base_exc", None),  # Ray Train's UserExceptionWithTraceback
            getattr(error, "cause", None),  # ray.exceptions.RayTaskError
        )
        error = next((one for one in inner if isinstance(one, BaseException)), error)
    return error


def _place_of(error: BaseException) -> str:
    """The innermost line outside libraries that was running, as ' (train.py:12)'."""
    libraries = ("<", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(libraries)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _kept_trace(program: str, trace: str) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"giffy_ray-{Path(program).stem}-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
    except OSError:
        return "run again with --debug for the traceback"
    return f"the traceback is in {file.name}; --debug shows it here"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
