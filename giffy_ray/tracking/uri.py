"""Addresses of MLflow, and what can be known to be wrong with `tracking.*` before anything is logged."""

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

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # of MLflow
_LONGEST_EXPERIMENT = 256  # characters, of the column in MLflow's database
_SQLITE_HEADER = b"SQLite format 3\0"


def sqlite_address(path: str | Path) -> str:
    """The address of an SQLite file for SQLAlchemy, in which `%` and `?` of the path are quoted."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address. None for every other address, and for a database that is not a plain file."""
    if not uri.startswith("sqlite:"):
        return None
    database = _parsed(uri).database or ":memory:"
    return None if database == ":memory:" or database.startswith("file:") else Path(database)


def check_address(uri: str) -> None:
    """Raises ConfigError if `uri` is a database that can never be used. Asks no server: one may be away for a while.

    `config` has checked the spelling of the address.
    """
    if uri.partition("://")[0].partition("+")[0].lower() in _DATABASES:
        _check_database(uri)


def check_experiment_name(uri: str, name: str) -> None:
    """Raises ConfigError if MLflow does not accept `name` as tracking.experiment.

    An SQLite file also tells whether an experiment of this name was deleted; a server is not asked.
    """
    if not name.strip():
        raise ConfigError(f"tracking.experiment: give a name (value {name!r})")
    if len(name) > _LONGEST_EXPERIMENT:
        raise ConfigError(
            f"tracking.experiment: MLflow takes {_LONGEST_EXPERIMENT} characters at most, this name has {len(name)} "
            f"(value {name[:40] + '...'!r})"
        )
    path = sqlite_path(uri)
    deleted = _deleted_experiment(path, name) if path and path.is_file() else None
    if deleted is not None:
        raise ConfigError(f"tracking.experiment: {how_to_restore(name, deleted, uri)} (value {name!r})")


def how_to_restore(name: str, experiment_id: str, uri: str) -> str:
    restore = (
        f"MLFLOW_TRACKING_URI={redact_credentials(uri)} mlflow experiments restore --experiment-id {experiment_id}"
    )
    return (
        f"the experiment {name!r} was deleted in MLflow, which keeps its name; restore it ({restore}), or give another "
        "tracking.experiment"
    )


def _check_database(uri: str) -> None:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        _parsed(uri).get_dialect().import_dbapi()
    except ImportError as error:
        raise _wrong(uri, f"the database needs a Python package that is not installed: {error}") from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _wrong(uri, f"SQLAlchemy says: {error}") from error
    path = sqlite_path(uri)
    if path:
        _check_file(uri, path.absolute())


def _check_file(uri: str, path: Path) -> None:
    try:
        if path.is_dir():
            raise _wrong(uri, f"{path} is a folder, not an SQLite file")
        if path.exists():
            with path.open("rb") as file:
                header = file.read(len(_SQLITE_HEADER))
            if header not in (b"", _SQLITE_HEADER):
                raise _wrong(uri, f"{path} is not an SQLite file")
        above = next(folder for folder in path.parents if folder.exists())
        written = path if path.exists() else above
        if not above.is_dir():
            raise _wrong(uri, f"{above} is not a folder")
        if not os.access(written, os.W_OK) or not os.access(above, os.W_OK):
            raise _wrong(uri, f"{written} cannot be written")
    except OSError as error:
        raise _wrong(uri, f"{path}: {error.strerror or error}") from error


def _deleted_experiment(path: Path, name: str) -> str | None:
    """The id of a deleted experiment in MLflow's SQLite file, or None."""
    query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
    try:
        database = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=5)
        try:
            found = database.execute(query, [name]).fetchone()
        finally:
            database.close()
    except sqlite3.Error:  # it has no tables yet, or is locked: this is a look ahead, MLflow will tell
        return None
    return str(found[0]) if found else None


def _parsed(uri: str) -> URL:
    import sqlalchemy

    return sqlalchemy.make_url(uri)


def _wrong(uri: str, why: str) -> ConfigError:
    return ConfigError(f"tracking.uri: {redact_credentials(why)} (value {redact_credentials(uri)!r})")
