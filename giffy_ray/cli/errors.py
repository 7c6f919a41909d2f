"""Errors of the command line: one line on stderr and an exit code; the traceback goes to a file.

Exit codes: 0 for success, 1 for a failure, 2 for wrong usage or input, 130 for an interrupt.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from giffy_ray.core.errors import InputError

FAILED, WRONG_INPUT = 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as in shells
_MAX_MESSAGE_CHARS = 600  # of an unexpected error; the traceback has the rest
_LIBRARIES_OF_EXTRAS = {
    "train": ("ray", "mlflow", "optuna", "pyarrow"),
    "serve": ("ray", "fastapi", "uvicorn", "python_multipart"),
}


def require_extra(extra: str) -> None:
    """Checks that the libraries of an optional dependency are installed, without importing them.

    Args:
        extra: Name of the optional dependency.

    Raises:
        InputError: A library is missing.
    """
    missing = [name for name in _LIBRARIES_OF_EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"needs {', '.join(missing)}, which the core install lacks; pip install 'giffy_ray[{extra}]'")


@contextmanager
def report_errors(program: str, debug: bool = False) -> Iterator[None]:
    """Turns an exception in the block into one message on stderr and an exit code, without a traceback.

    Args:
        program: What the message begins with.
        debug: Print the traceback too.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error(f"{program}: interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        from giffy_ray.core.storage import redact_credentials

        root = _root_cause(error)
        trace = redact_credentials("".join(traceback.format_exception(error)))
        if debug:
            print_error(trace.rstrip())
        if isinstance(root, InputError):
            print_error(f"{program}: {redact_credentials(str(root))}")
            sys.exit(WRONG_INPUT)
        message = redact_credentials(" ".join(str(root).split()))[:_MAX_MESSAGE_CHARS]
        print_error(f"{program}: {type(root).__name__}: {message}{_format_location(error)}")
        if not debug:
            print_error(f"  {_save_traceback(program, trace)}")
        sys.exit(FAILED)


def print_error(message: str) -> None:
    """Prints a line to stderr."""
    print(message, file=sys.stderr, flush=True)


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
    name = Path(program).stem.replace(" ", "-")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"giffy_ray-{name}-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
    except OSError:
        return "run again with --debug to see the traceback"
    return f"the traceback is in {file.name}; --debug prints it"
