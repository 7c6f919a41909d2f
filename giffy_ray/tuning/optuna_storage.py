"""Optuna's storage of a study: `search.storage`, or an SQLite file in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.storage import is_local, join, redact_credentials, resolve_path
from giffy_ray.tracking.tracker import sqlite_address

_CONNECT_TIMEOUT_S = 10
_DRIVER_PACKAGES = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient"}  # pip packages of SQLAlchemy's defaults
_SUPPORTED = "postgresql://USER@HOST/DATABASE, or a journal file on a shared disk, /path/NAME.log"
_SQLITE_PREFIX = "sqlite:///"


def resolve_storage_address(experiment: Experiment) -> str:
    """Returns a database URL or the absolute path of a journal file.

    Without `search.storage`, this is an SQLite file in the study's folder, which is created.

    Raises:
        ConfigError: `search.storage` is not set, and `storage` is a bucket.
    """
    address = experiment.search.storage
    if address:
        if address.startswith(_SQLITE_PREFIX) and ":memory:" not in address:
            return f"{_SQLITE_PREFIX}{resolve_path(address.removeprefix(_SQLITE_PREFIX))}"
        return address if "://" in address else resolve_path(address)
    if not is_local(experiment.storage):
        raise ConfigError(
            f"search.storage: Optuna cannot store its study in {experiment.storage!r}; give {_SUPPORTED} (value None)"
        )
    folder = experiment.run_dir
    Path(folder).mkdir(parents=True, exist_ok=True)
    return sqlite_address(join(folder, "optuna.db"))


def open_storage(experiment: Experiment) -> BaseStorage:
    """Connects to the storage, and creates its tables or file.

    Raises:
        ConfigError: The storage cannot be opened. The message is one line, without passwords.
    """
    address = resolve_storage_address(experiment)
    url = None
    try:
        if "://" in address:
            url = make_url(address)
            storage = _connect_database(url)
        else:
            storage = JournalStorage(JournalFileBackend(address))
        storage.get_all_studies()  # the first access reads a journal file
    except Exception as error:  # each database driver raises errors of its own
        problem = _describe_problem(error, address, url)
        raise ConfigError(f"search.storage: {problem} (value {redact_credentials(address)!r})") from None
    return storage


def reject_shared_database(tracking_uri: str, experiment: Experiment) -> None:
    """Raises ConfigError if `search.storage` is also MLflow's database.

    Optuna and MLflow both store their schema version in a table called alembic_version, so they cannot share one.
    """
    address = resolve_storage_address(experiment)
    if "://" not in address or "://" not in tracking_uri:
        return
    try:
        optuna_url, mlflow_url = make_url(address), make_url(tracking_uri)
    except (ArgumentError, ValueError):  # `open_storage` reports what is wrong with the address
        return
    if _database_key(optuna_url) == _database_key(mlflow_url):
        raise ConfigError(
            "search.storage: is the database of tracking.uri, and Optuna and MLflow cannot share one; create another "
            f"database on the same server (value {redact_credentials(address)!r})"
        )


def _database_key(url: URL) -> tuple[Any, ...]:
    if url.get_backend_name() == "sqlite":
        return "sqlite", str(Path(url.database or "").absolute())
    return url.drivername.partition("+")[0], url.host, url.port, url.database


# When two studies use an empty database for the first time, both create the tables, and one of them fails.
@retry(
    retry=retry_if_exception_type((IntegrityError, ProgrammingError)),
    stop=stop_after_attempt(5),
    wait=wait_random(0.2, 1),
    reraise=True,
)
def _connect_database(url: URL) -> RDBStorage:
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("an in-memory database ends with the process; give a file, sqlite:////path/NAME.db")
    engine_options: dict[str, Any] = {}
    if backend != "sqlite":
        engine_options["pool_pre_ping"] = True  # the server may restart between two reports
        if backend in _DRIVER_PACKAGES and "connect_timeout" not in url.query:
            engine_options["connect_args"] = {"connect_timeout": _CONNECT_TIMEOUT_S}
    return RDBStorage(url.render_as_string(hide_password=False), engine_options)


def _describe_problem(error: Exception, address: str, url: URL | None) -> str:
    """Returns one line that says what is wrong and what to do. `url` is None if the address could not be parsed."""
    if isinstance(error, NoSuchModuleError | ArgumentError):
        return f"SQLAlchemy does not support this database; give {_SUPPORTED}"
    if isinstance(error, ImportError) and url is not None:
        package = _DRIVER_PACKAGES.get(url.drivername)
        remedy = f"pip install '{package}'" if package else "install it"
        return f"the driver of {url.drivername} is missing ({error.__cause__ or error}); {remedy}"
    is_journal = url is None and "://" not in address
    if is_journal or (url is not None and url.get_backend_name() == "sqlite" and url.database):
        path = Path(address if is_journal else str(url and url.database))
        if path.is_dir():
            return "is a folder; give a file in it"
        if not path.parent.is_dir():
            return f"there is no folder {str(path.parent)!r}; create it"
        if is_journal and not isinstance(error, OSError):
            return f"is not an Optuna journal ({type(error).__name__}); give another file"
    if isinstance(error, RuntimeError) and "table schema" in str(error):
        return "its tables belong to another version of Optuna, or to MLflow; give an empty database"
    lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    message = redact_credentials(lines[0])
    return message.replace(str(url.password), "***") if url is not None and url.password else message
