"""File access: locations, atomic writes, and the checks before a job starts."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from giffy_ray.core import storage
from giffy_ray.core.storage import (
    check_readable,
    check_writable,
    filesystem_of,
    normalize_location,
    read_text,
    write_bytes,
    write_text,
)


@pytest.mark.parametrize(
    ("location", "normalized"),
    [
        ("runs/", "runs/"),
        ("/data/a:b", "/data/a:b"),
        ("run:1/x", "run:1/x"),
        ("~/runs", f"{Path.home()}/runs"),
        ("./~runs", "./~runs"),
        ("S3://Bucket/Runs", "s3://Bucket/Runs"),
        ("GS://bucket", "gs://bucket"),
        ("s3://bucket/a?b/c@d", "s3://bucket/a?b/c@d"),  # valid in keys
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
    ],
)
def test_locations_are_normalized(location: str, normalized: str):
    assert normalize_location(location) == normalized
    assert normalize_location(normalized) == normalized


@pytest.mark.parametrize("location", ["abfs://c@a.dfs.core.windows.net/x", "https://h/x", "hdfs://h/x", "mock://x", ""])
def test_a_scheme_is_rejected_before_a_client_is_created(location: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object):
        raise AssertionError("a client was created")

    monkeypatch.setattr(storage, "_open_bucket", fail)
    with pytest.raises(ValueError, match=r"not supported|is empty"):
        filesystem_of(location)


def test_check_writable_creates_the_folder_and_leaves_it_empty(tmp_path: Path):
    check_writable(str(tmp_path / "new" / "runs"))
    assert list((tmp_path / "new" / "runs").iterdir()) == []
    check_readable(str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        check_readable(str(tmp_path / "other"))


def test_check_writable_raises_os_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for location, reason in (
        (tmp_path / "file", "not a folder"),
        (tmp_path / "file" / "runs", "Not a directory"),
        (Path("/proc/runs"), "No such file or directory"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(OSError, match=reason):
            check_writable(str(location))


def test_a_bucket_is_tested_in_a_separate_process(bucket: str):
    check_writable(f"{bucket}/probe/runs")
    assert read_text(f"{bucket}/probe/runs/nothing") is None
    write_text(f"{bucket}/probe/videos/one.mp4", "x")
    check_readable(f"{bucket}/probe/videos")
    check_readable(f"{bucket}/probe/videos/one.mp4")
    with pytest.raises(OSError, match="no such file or folder"):
        check_readable(f"{bucket}/probe/nothing")
    with pytest.raises(OSError, match=r"(?i)bucket"):
        check_writable("s3://no-such-bucket/runs")


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that accepts connections and never answers; S3 requests go there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        port = server.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield port
        for connection in connections:
            connection.close()


def test_a_silent_bucket_times_out(silent_server: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "_PROBE_TIMEOUT_S", 3)
    start_s = time.monotonic()
    with pytest.raises(TimeoutError, match="s3://bucket/runs did not answer within 3 s"):
        check_writable("s3://bucket/runs")
    assert time.monotonic() - start_s < 20
    assert os.environ["AWS_ENDPOINT_URL"].endswith(str(silent_server))


@pytest.mark.parametrize("location", ["a://b", "1://b", "://b", "s3 ://b", "/data/a://b"])
def test_malformed_addresses_are_rejected(location: str):
    with pytest.raises(ValueError, match="expected a folder, s3://"):
        normalize_location(location)


def test_a_folder_named_tilde_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message about unknown home folders suggests this spelling."""
    monkeypatch.chdir(tmp_path)
    assert storage.resolve_path("./~") == f"{tmp_path}/~"
    assert storage.resolve_path("~/runs") == f"{Path.home()}/runs"


def test_a_failed_write_leaves_no_partial_file(tmp_path: Path):
    """As on a full disk: the old file is unchanged, and the partial one does not take up space."""
    write_bytes(f"{tmp_path}/a.bin", b"before")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(f"{tmp_path}/a.bin", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"before"
