"""Where Optuna keeps a search: `search.storage`, or an SQLite file in the search's folder."""

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

_CONNECT_S = 10  # a server that does not answer in this time is not there
_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient"}  # pip packages that SQLAlchemy loads by default
_KINDS = "postgresql://USER@HOST/DATABASE, or a journal file on a disk that is shared, /path/NAME.log"


def address(experiment: Experiment) -> str:
    """`search.storage`, or an SQLite file in the search's folder. Raises ConfigError where that is not on a disk."""
    if experiment.search.storage:
        where, sqlite = experiment.search.storage, "sqlite:///"
        if where.startswith(sqlite) and ":memory:" not in where:
            return f"{sqlite}{resolve_path(where.removeprefix(sqlite))}"
        return where if "://" in where else resolve_path(where)
    if not is_local(experiment.storage):
        raise ConfigError(f"search.storage: give Optuna a database, {_KINDS}; {experiment.storage!r} can hold neither")
    folder = join(experiment.storage, experiment.name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return sqlite_address(join(folder, "optuna.db"))


def opened(experiment: Experiment) -> BaseStorage:
    """Connects to Optuna's storage, and creates its tables or file. Raises ConfigError, without passwords."""
    where, url = address(experiment), None
    try:
        url = make_url(where) if "://" in where else None
        storage = JournalStorage(JournalFileBackend(where)) if url is None else _database(url)
        storage.get_all_studies()  # a journal is read here
    except Exception as error:  # of any of the many database drivers
        why = _why(error, where, url)
        raise ConfigError(f"search.storage: {why} (value {redact_credentials(where)!r})") from None
    return storage


def refuse_database_of(tracking_uri: str, experiment: Experiment) -> None:
    """Raises ConfigError where `search.storage` is the database of MLflow's runs.

    Both keep the version of their tables in one named alembic_version, and neither opens a database with the other's.
    """
    where = address(experiment)
    if "://" not in where or "://" not in tracking_uri:
        return
    try:
        ours, theirs = make_url(where), make_url(tracking_uri)
    except (ArgumentError, ValueError):  # `opened` says what is wrong with it
        return
    if _place(ours) == _place(theirs):
        raise ConfigError(
            "search.storage: is the database of tracking.uri, and Optuna and MLflow cannot share one; create another "
            f"on the same server (value {redact_credentials(where)!r})"
        )


def _place(url: URL) -> tuple[Any, ...]:
    if url.get_backend_name() == "sqlite":
        return "sqlite", str(Path(url.database or "").absolute())
    return url.drivername.partition("+")[0], url.host, url.port, url.database


# Two searches that are the first to use a server create the tables at once, and one of them fails.
@retry(
    retry=retry_if_exception_type((IntegrityError, ProgrammingError)),
    stop=stop_after_attempt(5),
    wait=wait_random(0.2, 1),
    reraise=True,
)
def _database(url: URL) -> RDBStorage:
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("a database in memory ends with the process; give a file, sqlite:////path/NAME.db")
    engine: dict[str, Any] = {}
    if url.get_backend_name() != "sqlite":
        engine["pool_pre_ping"] = True  # the server may have been restarted since the last report
        if url.get_backend_name() in _DRIVERS and "connect_timeout" not in url.query:
            engine["connect_args"] = {"connect_timeout": _CONNECT_S}
    return RDBStorage(url.render_as_string(hide_password=False), engine)


def _why(error: Exception, where: str, url: URL | None) -> str:
    """One line on what is wrong, and what to do. `url` is None where it is not one."""
    if isinstance(error, NoSuchModuleError | ArgumentError):
        return f"SQLAlchemy knows no such database; give {_KINDS}"
    if isinstance(error, ImportError) and url is not None:
        package = _DRIVERS.get(url.drivername)
        todo = f"pip install '{package}'" if package else "install it"
        return f"the driver of {url.drivername} is missing ({error.__cause__ or error}); {todo}"
    local = url is None and "://" not in where
    if local or (url is not None and url.get_backend_name() == "sqlite" and url.database):
        path = Path(where if local else str(url and url.database))
        if path.is_dir():
            return "is a folder; give a file in it"
        if not path.parent.is_dir():
            return f"there is no folder {str(path.parent)!r}; create it"
        if local and not isinstance(error, OSError):
            return f"is not a journal of Optuna ({type(error).__name__}); give another file"
    if isinstance(error, RuntimeError) and "table schema" in str(error):
        return "its tables are of another version of Optuna, or MLflow's; give an empty database"
    lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    said = redact_credentials(lines[0])
    return said.replace(str(url.password), "***") if url is not None and url.password else said
