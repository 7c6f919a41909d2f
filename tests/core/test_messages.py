"""The driver shows the workers' warnings once, and no credentials."""

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

from giffy_ray.cluster.local import Head
from giffy_ray.core.messages import MarkedHandler, make_worker_setup_hook, parse_messages, redact_output
from giffy_ray.core.storage import redact_credentials
from tests.conftest import submit


def test_only_the_warnings_of_workers_are_shown_and_only_once(head: Head, tmp_path: Path):
    printed = submit(head, "tests/warning_job.py", str(tmp_path))
    for source in ("a task", "a trial", "the driver"):
        assert printed.count(f"{source} warns of s3://***@bucket\nand continues") == 1, printed
    assert printed.count("all warn") == 2, printed  # once for the workers, once for the driver
    assert "forwarded: True" in printed
    for unwanted in ("a task prints", "a task has noise", "informs", "of-the-driver", "[giffy_ray]"):
        assert unwanted not in printed
    # Neither Ray's logs nor its dashboard show the forwarded value.
    folder = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).parent
    logs = [path for path in folder.rglob("*") if path.is_file() and "/logs/" in str(path)]
    assert any(b"all warn" in path.read_bytes() for path in logs)
    assert not [path for path in logs if b"of-the-driver" in path.read_bytes()]
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for page in ("api/jobs/", "api/v0/workers?detail=True"):
        request = urllib.request.Request(f"{head.dashboard}/{page}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request) as answer:
            assert b"of-the-driver" not in answer.read()


# Text -> the text without credentials.
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
    # These contain no secrets.
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
TEMPLATES = ("{}", "tracking.uri: no answer (value '{}')", '{{"uri": "{}"}}', "[{0}, {0}]", "a\nstorage: {}\nb: c")


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_in_addresses_are_redacted(address: str):
    for template in TEMPLATES:
        assert redact_credentials(template.format(address)) == template.format(ADDRESSES[address])
        assert redact_credentials(redact_credentials(template.format(address))) == template.format(ADDRESSES[address])
    assert "hush" not in redact_credentials(address)


@given(st.text(string.ascii_letters + string.digits + string.punctuation, max_size=20))
def test_passwords_of_any_characters_are_redacted(characters: str):
    password = f"Zq{characters}qZ"
    for before, after in (("postgresql://me:", "@host/optuna"), ("data.root: s3://key:", "@bucket/x (value 3)")):
        shown = redact_credentials(f"{before}{password}{after}")
        assert "Zq" not in shown
        assert shown.endswith(after)


def test_output_without_credentials_is_unchanged(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # restored after the test
    redact_output()
    redact_output()
    print("to s3://me:secret@bucket", "and", 3)
    Console(width=80).print("[bold]from[/] s3://me:secret@bucket")
    logging.getLogger("giffy_ray.anything").warning("s3://me:secret@bucket is away")
    print(Path(), file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == "to s3://***@bucket and 3\nfrom s3://***@bucket\n"
    assert captured.err.endswith(".\n")
    assert sys.stdout.isatty() is False  # and other methods of a stream


def test_a_warning_of_several_lines_is_one_line_of_worker_output():
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
    partial, complete = parse_messages(noise)
    assert partial == '"half'
    assert complete.startswith("read 3 é\nTraceback")
    assert complete.endswith("OSError: s3://***@bucket\nis away")


def test_the_setup_hook_forwards_credentials_without_showing_them():
    names = ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
    hook = make_worker_setup_hook(dict.fromkeys((*names, "PATH", "MY_AWS_KEY"), "value"))
    assert "value" not in f"{hook!r} {hook.__name__}"
    code = "import os, sys, pickle; pickle.load(sys.stdin.buffer)(); print(sorted(os.environ)); import logging"
    code += "; logging.getLogger('giffy_ray.x').warning('warned')"
    code += "; from giffy_ray.core.messages import print_message; print_message('printed')"
    pickled = cloudpickle.dumps(hook)  # type: ignore[attr-defined]
    result = subprocess.run([sys.executable, "-c", code], input=pickled, env={}, capture_output=True, check=True)
    assert set(ast.literal_eval(result.stdout.decode())) & {*names, "PATH", "MY_AWS_KEY"} == set(names)
    assert parse_messages(result.stderr.decode().splitlines()) == ["warned", "printed"]
