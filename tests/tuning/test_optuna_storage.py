"""Optuna's storage: addresses, and errors that say what to do without showing passwords."""

import socket
import sqlite3
from pathlib import Path

import pytest

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.tuning import tuner
from giffy_ray.tuning.independent_trials import IndependentTrials
from giffy_ray.tuning.optuna_storage import open_storage, resolve_storage_address


def load_experiment(folder: Path, *overrides: str) -> Experiment:
    space = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 4]}}"
    return load(None, [f"search.space={space}", f"storage={folder}", "name=study", *overrides])


def complete_trial(source: IndependentTrials) -> None:
    proposal = source.ask()
    assert proposal
    number, _ = proposal
    source.report(number, 1, {"val/l2_paper": 1.0})
    source.end(number)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{}/missing/study.log", "there is no folder '{}/missing'; create it"),
        ("{}", "is a folder; give a file in it"),
        ("{}/text", "is not an Optuna journal"),
        ("{}/text/study.log", "there is no folder '{}/text'"),
        ("sqlite:///{}/missing/study.db", "there is no folder '{}/missing'; create it"),
        ("sqlite:///{}", "is a folder; give a file in it"),
        ("sqlite:///{}/text", "file is not a database"),
        ("sqlite://", "ends with the process"),
        ("sqlite:///:memory:", "ends with the process"),
        ("mysql+pymysql://me:hush@host/db", "the driver of mysql.pymysql is missing"),
        ("mysql://me:hush@host/db", "pip install 'mysqlclient'"),
        ("postgresql+psycopg2://me:hush@host/db", "the driver of postgresql.psycopg2 is missing"),
        ("redis://me:hush@host/0", "does not support this database; give postgresql://"),
        ("postgres://me:hush@host/db", "does not support this database; give postgresql://"),
        ("s3://bucket/study.log", "does not support this database"),
        ("postgresql://me:hush@host:port/db", "port"),
        ("://", "does not support this database"),
    ],
)
def test_storage_that_cannot_be_opened_raises_one_line(tmp_path: Path, address: str, message: str):
    (tmp_path / "text").write_text("not\na journal\n")
    experiment = override(load_experiment(tmp_path / "runs"), {"search.storage": address.format(tmp_path)})
    with pytest.raises(ConfigError, match=r"search\.storage: .*" + message.format(tmp_path)) as caught:
        tuner.initial_points(experiment)
    assert "hush" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unreachable_postgresql_server_raises_one_line(tmp_path: Path):
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    with socket.socket() as unused:  # bound, but not listening
        unused.bind(("127.0.0.1", 0))
        address = f"postgresql://me:hush@127.0.0.1:{unused.getsockname()[1]}/db"
        with pytest.raises(ConfigError, match=r"search\.storage: .*refused") as caught:
            open_storage(load_experiment(tmp_path, f"search.storage={address}"))
    assert "hush" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("postgresql://me:hush@host/db", "postgresql://you@host/db"),
        ("postgresql+psycopg://me:hush@host:1/db?connect_timeout=3", "postgresql://host:1/db"),
        ("sqlite:///{}/mlflow.db", None),
    ],
)
def test_database_shared_with_mlflow_is_rejected(tmp_path: Path, storage: str, tracking: str | None):
    """Both store their schema version in a table alembic_version; test_chaos.py tries it on a server."""
    changes = {"search.storage": storage.format(tmp_path), "tracking.uri": tracking}
    with pytest.raises(ConfigError, match=r"search\.storage: is the database of tracking\.uri") as caught:
        tuner.initial_points(override(load_experiment(tmp_path), changes))
    assert "hush" not in str(caught.value)


def test_database_with_foreign_tables_is_rejected(tmp_path: Path):
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("create table alembic_version (version_num varchar(32))")
        connection.execute("insert into alembic_version values ('867495a8f9d4')")
    connection.close()
    experiment = override(load_experiment(tmp_path), {"search.storage": f"sqlite:///{tmp_path}/other.db"})
    with pytest.raises(
        ConfigError, match=r"search\.storage: its tables belong to another version of Optuna, or to MLflow"
    ):
        tuner.initial_points(experiment)


def test_relative_address_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for address in ("study.log", "sqlite:///study.db"):
        complete_trial(IndependentTrials(load_experiment(tmp_path, f"search.storage={address}")))
    assert resolve_storage_address(load_experiment(tmp_path, "search.storage=study.log")) == f"{tmp_path}/study.log"
    assert (tmp_path / "study.log").is_file()
    assert (tmp_path / "study.db").is_file()


def test_journal_file_stores_trials(tmp_path: Path):
    experiment = load_experiment(tmp_path, f"search.storage={tmp_path}/study.log")
    complete_trial(IndependentTrials(experiment))
    assert len(IndependentTrials(experiment).study.trials()) == 1
    assert (tmp_path / "study.log").exists()


def test_bucket_without_search_storage_is_rejected():
    with pytest.raises(ConfigError, match=r"search\.storage: Optuna cannot store its study in 's3://bucket"):
        resolve_storage_address(load(None, ["storage=s3://bucket/runs"]))
