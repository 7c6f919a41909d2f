"""Where things are written: which addresses are understood, and what is tried before anything starts."""

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
    checked_location,
    filesystem_of,
    read_text,
    write_bytes,
    write_text,
)


@pytest.mark.parametrize(
    ("location", "same"),
    [
        ("runs/", "runs/"),
        ("/data/a:b", "/data/a:b"),
        ("run:1/x", "run:1/x"),
        ("~/runs", f"{Path.home()}/runs"),
        ("./~runs", "./~runs"),
        ("S3://Bucket/Runs", "s3://Bucket/Runs"),
        ("GS://bucket", "gs://bucket"),
        ("s3://bucket/a?b/c@d", "s3://bucket/a?b/c@d"),  # a key may hold them
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
    ],
)
def test_a_location_has_one_spelling(location: str, same: str):
    assert checked_location(location) == same
    assert checked_location(same) == same


@pytest.mark.parametrize("location", ["abfs://c@a.dfs.core.windows.net/x", "https://h/x", "hdfs://h/x", "mock://x", ""])
def test_a_scheme_is_refused_before_any_client_is_made(location: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object):
        raise AssertionError("a client was made")

    monkeypatch.setattr(storage, "_bucket", refuse)
    with pytest.raises(ValueError, match=r"not supported|is empty"):
        filesystem_of(location)


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path):
    check_writable(str(tmp_path / "new" / "runs"))
    assert list((tmp_path / "new" / "runs").iterdir()) == []
    check_readable(str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        check_readable(str(tmp_path / "other"))


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for location, reason in (
        (tmp_path / "file", "no folder"),
        (tmp_path / "file" / "runs", "Not a directory"),
        (Path("/proc/runs"), "No such file or directory"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(OSError, match=reason):
            check_writable(str(location))


def test_a_bucket_is_tried_by_a_process_of_its_own(bucket: str):
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
    """The port of a server that takes connections and says nothing; S3 is sent there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        port = server.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield port
        for one in taken:
            one.close()


def test_a_bucket_that_does_not_answer_is_waited_for_a_bounded_time(
    silent_server: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "_PROBE_S", 3)
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match="s3://bucket/runs did not answer within 3 s"):
        check_writable("s3://bucket/runs")
    assert time.monotonic() - began_s < 20
    assert os.environ["AWS_ENDPOINT_URL"].endswith(str(silent_server))


@pytest.mark.parametrize("location", ["a://b", "1://b", "://b", "s3 ://b", "/data/a://b"])
def test_what_looks_like_an_address_and_is_none_is_refused(location: str):
    with pytest.raises(ValueError, match="expected a folder, s3://"):
        checked_location(location)


def test_a_folder_called_tilde_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message about unknown home folders names this spelling."""
    monkeypatch.chdir(tmp_path)
    assert storage.resolve_path("./~") == f"{tmp_path}/~"
    assert storage.resolve_path("~/runs") == f"{Path.home()}/runs"


def test_what_could_not_be_written_leaves_no_partial_file(tmp_path: Path):
    """As on a full disk: the file is as it was, and what was begun does not take the last room."""
    write_bytes(f"{tmp_path}/a.bin", b"before")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(f"{tmp_path}/a.bin", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"before"
