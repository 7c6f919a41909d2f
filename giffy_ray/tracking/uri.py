"""Addresses of MLflow servers and databases, and early checks of `tracking.*`."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from giffy_ray.config import ConfigError
from giffy_ray.core.storage import redact_credentials

if TYPE_CHECKING:
    from sqlalchemy import URL

_DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")  # that MLflow supports
_MAX_EXPERIMENT_NAME = 256  # characters, the width of the column in MLflow's database
_SQLITE_HEADER = b"SQLite format 3\0"


def sqlite_address(path: str | Path) -> str:
    """Returns SQLAlchemy's address of an SQLite file, with `%` and `?` quoted."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of an SQLite address, or None for any other address and for a database in memory."""
    if not uri.startswith("sqlite:"):
        return None
    database = _parse(uri).database or ":memory:"
    return None if database == ":memory:" or database.startswith("file:") else Path(database)


def check_address(uri: str) -> None:
    """Raises ConfigError if `uri` is a database that can never work. Asks no server: it may be down for a while.

    The config has already checked the syntax of the address.
    """
    if uri.partition("://")[0].partition("+")[0].lower() in _DATABASE_SCHEMES:
        _check_database(uri)


def check_experiment_name(uri: str, name: str) -> None:
    """Raises ConfigError if MLflow does not accept `name` as an experiment.

    In an SQLite file, also if an experiment of this name was deleted. Asks no server.
    """
    if not name.strip():
        raise ConfigError(f"tracking.experiment: is empty; give a name (value {name!r})")
    if len(name) > _MAX_EXPERIMENT_NAME:
        raise ConfigError(
            f"tracking.experiment: has {len(name)} characters, and MLflow allows {_MAX_EXPERIMENT_NAME}; shorten it "
            f"(value {name[:40] + '...'!r})"
        )
    path = sqlite_path(uri)
    deleted_id = _find_deleted_experiment(path, name) if path and path.is_file() else None
    if deleted_id is not None:
        raise ConfigError(f"tracking.experiment: {explain_restore(name, deleted_id, uri)} (value {name!r})")


def explain_restore(name: str, experiment_id: str, uri: str) -> str:
    """Returns how to restore a deleted experiment."""
    command = (
        f"MLFLOW_TRACKING_URI={redact_credentials(uri)} mlflow experiments restore --experiment-id {experiment_id}"
    )
    return (
        f"the experiment {name!r} was deleted in MLflow, which reserves its name; restore it ({command}), or set "
        "another tracking.experiment"
    )


def _check_database(uri: str) -> None:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        _parse(uri).get_dialect().import_dbapi()
    except ImportError as error:
        raise _error(uri, f"needs a Python package that is not installed: {error}") from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _error(uri, f"SQLAlchemy reports: {error}") from error
    path = sqlite_path(uri)
    if path:
        _check_file(uri, path.absolute())


def _check_file(uri: str, path: Path) -> None:
    try:
        if path.is_dir():
            raise _error(uri, f"{path} is a folder, not an SQLite file")
        if path.exists():
            with path.open("rb") as file:
                header = file.read(len(_SQLITE_HEADER))
            if header not in (b"", _SQLITE_HEADER):
                raise _error(uri, f"{path} is not an SQLite file")
        parent = next(folder for folder in path.parents if folder.exists())
        target = path if path.exists() else parent
        if not parent.is_dir():
            raise _error(uri, f"{parent} is not a folder")
        if not os.access(target, os.W_OK) or not os.access(parent, os.W_OK):
            raise _error(uri, f"{target} is not writable")
    except OSError as error:
        raise _error(uri, f"{path}: {error.strerror or error}") from error


def _find_deleted_experiment(path: Path, name: str) -> str | None:
    """Returns the id of a deleted experiment in MLflow's SQLite file, or None."""
    query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
    try:
        database = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=5)
        try:
            row = database.execute(query, [name]).fetchone()
        finally:
            database.close()
    except sqlite3.Error:  # no tables yet, or locked: MLflow reports any real problem later
        return None
    return str(row[0]) if row else None


def _parse(uri: str) -> URL:
    import sqlalchemy

    return sqlalchemy.make_url(uri)


def _error(uri: str, problem: str) -> ConfigError:
    return ConfigError(f"tracking.uri: {redact_credentials(problem)} (value {redact_credentials(uri)!r})")
