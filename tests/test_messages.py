"""What workers warn of is shown by the driver, once, and no credentials with it."""

import ast
import io
import logging
import string
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from rich.console import Console

from giffy_ray.head import Head
from giffy_ray.messages import MarkedHandler, messages_in, redact_output, worker_setup
from giffy_ray.storage import without_secrets
from tests.conftest import submit


def test_workers_warnings_and_nothing_else_are_shown_once(head: Head, tmp_path: Path):
    said = submit(head, "tests/warning_job.py", str(tmp_path))
    for who in ("a task", "a trial", "the driver"):
        assert said.count(f"{who} warns of s3://***@bucket\nand goes on") == 1, said
    assert said.count("all warn") == 2, said  # of the workers, and of the driver
    assert "passed on: True" in said
    for unwanted in ("a task prints", "a task has noise", "informs", "of-the-driver", "[giffy_ray]"):
        assert unwanted not in said
    # Neither Ray's logs nor its dashboard show the value that was passed on.
    folder = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).parent
    logs = [path for path in folder.rglob("*") if path.is_file() and "/logs/" in str(path)]
    assert any(b"all warn" in path.read_bytes() for path in logs)
    assert not [path for path in logs if b"of-the-driver" in path.read_bytes()]
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for page in ("api/jobs/", "api/v0/workers?detail=True"):
        request = urllib.request.Request(f"{head.dashboard}/{page}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request) as answer:
            assert b"of-the-driver" not in answer.read()


# What is given -> what is shown of it.
ADDRESSES = {
    "http://me:hush@host:5000/path": "http://***@host:5000/path",
    "https://hush@host": "https://***@host",
    "postgresql+psycopg://me:hush@host/optuna": "postgresql+psycopg://***@host/optuna",
    "postgresql://me:hu/sh@hush@host/optuna": "postgresql://***@host/optuna",
    "postgresql://me:hush://hush@host/optuna": "postgresql://***@host/optuna",
    "postgresql://me:hush#?@host/optuna?sslmode=require": "postgresql://***@host/optuna?sslmode=require",
    "postgresql://host/optuna?user=me&password=hush&sslmode=require": (
        "postgresql://host/optuna?user=me&password=***&sslmode=require"
    ),
    "mssql+pyodbc:///?odbc_connect=PWD%3Dhush%3B": "mssql+pyodbc:///?odbc_connect=***",
    "s3://AKIA:hush@bucket/runs?region=eu-west-1": "s3://***@bucket/runs?region=eu-west-1",
    "s3://bucket/x?access_key=hush&secret_key=hush&endpoint_override=http://host:9000": (
        "s3://bucket/x?access_key=***&secret_key=***&endpoint_override=http://host:9000"
    ),
    "https://bucket.s3.amazonaws.com/x.csv?X-Amz-Credential=hush&X-Amz-Date=1&X-Amz-Signature=hush": (
        "https://bucket.s3.amazonaws.com/x.csv?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***"
    ),
    "https://bucket/x?AWSAccessKeyId=hush&Signature=hush&Expires=3": (
        "https://bucket/x?AWSAccessKeyId=***&Signature=***&Expires=3"
    ),
    "https://account.blob.core.windows.net/x?sv=2024&sig=hush": "https://account.blob.core.windows.net/x?sv=2024&sig=***",
    "https://host/x?token=hush": "https://host/x?token=***",
    "https://host/x#access_token=hush": "https://host/x#access_token=***",
    "host=db password=hush dbname=optuna": "host=db password=*** dbname=optuna",
    "Server=db;Pwd=hush;Database=optuna": "Server=db;Pwd=***;Database=optuna",
    # Nothing in these is a secret.
    **{
        plain: plain
        for plain in (
            "/data/videos",
            "s3://bucket/runs",
            "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=giffy_ray&a=b",
            "models:/giffy_ray@champion",
            "me@example.org",
            "sqlite:////runs/mlflow.db",
            "epoch 3/12  train/loss 61,234",
            "sorted(runs, key=len)",
        )
    },
}
FRAMES = ("{}", "tracking.uri: no answer (value '{}')", '{{"uri": "{}"}}', "[{0}, {0}]", "a\nstorage: {}\nb: c")


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_credential_of_an_address_is_shown(address: str):
    for frame in FRAMES:
        assert without_secrets(frame.format(address)) == frame.format(ADDRESSES[address])
        assert without_secrets(without_secrets(frame.format(address))) == frame.format(ADDRESSES[address])
    assert "hush" not in without_secrets(address)


@given(st.text(string.ascii_letters + string.digits + string.punctuation, max_size=20))
def test_no_password_is_shown_whatever_is_in_it(characters: str):
    password = f"Zq{characters}qZ"
    for before, after in (("postgresql://me:", "@host/optuna"), ("data.root: s3://key:", "@bucket/x (value 3)")):
        shown = without_secrets(f"{before}{password}{after}")
        assert "Zq" not in shown
        assert shown.endswith(after)


def test_what_is_printed_passes_through(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # is put back
    redact_output()
    redact_output()
    print("to s3://me:secret@bucket", "and", 3)
    Console(width=80).print("[bold]from[/] s3://me:secret@bucket")
    logging.getLogger("giffy_ray.anything").warning("s3://me:secret@bucket is away")
    print(Path(), file=sys.stderr)
    said = capsys.readouterr()
    assert said.out == "to s3://***@bucket and 3\nfrom s3://***@bucket\n"
    assert said.err.endswith(".\n")
    assert sys.stdout.isatty() is False  # and what else a stream can do


def test_a_warning_of_many_lines_is_one_line_of_a_worker():
    out = io.StringIO()
    handler = MarkedHandler()
    handler.setStream(out)
    logger = logging.Logger("giffy_ray.x")
    logger.addHandler(handler)
    try:
        raise OSError("s3://me:secret@bucket\nis away")
    except OSError:
        logger.exception("read %d é", 3)
    logger.info("not a warning")
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    noise = ["(pid=3) [giffy_ray]", 'x[giffy_ray] "half', "Ray says so", *lines]
    (half, whole) = messages_in(noise)
    assert half == '"half'
    assert whole.startswith("read 3 é\nTraceback")
    assert whole.endswith("OSError: s3://***@bucket\nis away")


def test_credentials_are_passed_on_in_what_ray_does_not_show():
    names = ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
    hook = worker_setup(dict.fromkeys((*names, "PATH", "MY_AWS_KEY"), "value"))
    assert "value" not in f"{hook!r} {hook.__name__}"
    code = "import os, sys, pickle; pickle.load(sys.stdin.buffer)(); print(sorted(os.environ)); import logging"
    code += "; logging.getLogger('giffy_ray.x').warning('said')"
    code += "; from giffy_ray.messages import say; say('said, not warned')"
    pickled = cloudpickle.dumps(hook)  # type: ignore[attr-defined]
    done = subprocess.run([sys.executable, "-c", code], input=pickled, env={}, capture_output=True, check=True)
    assert set(ast.literal_eval(done.stdout.decode())) & {*names, "PATH", "MY_AWS_KEY"} == set(names)
    assert messages_in(done.stderr.decode().splitlines()) == ["said", "said, not warned"]
