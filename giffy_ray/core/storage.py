"""File access to local folders, and through pyarrow.fs to buckets (s3://bucket/folder).

pyarrow is imported only where it is used: it takes as long to import as all that a job needs to check its experiment,
and generating clips needs none of it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

if TYPE_CHECKING:
    from pyarrow import fs

# User and password of an address: everything up to the last @ of its host. A password may contain characters that it
# should escape, such as /: if no port follows the colon, the match extends to the last @ before a space.
_USER_INFO = re.compile(r"(://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d*(?:[/?#\s]|$))\S*)@")
# A query value whose name suggests a credential (sig, X-Amz-Signature, access_key, sslpassword, ...), or one in a list
# of settings (password=... host=...).
_NAME, _VALUE = r"""[^\s=&;?#'"]*""", r"""[^\s&;#'"<>]+?(?=[])},.:]*(?:[\s&;#'"<>]|$))"""
_CREDENTIAL = re.compile(
    rf"([?&;#]{_NAME}(?:pass|pwd|token|secret|sig|cred|(?<!viewStateShare)key|auth|jwt|sas|session|odbc_connect){_NAME}="
    rf"|(?:^|\s){_NAME}(?:password|passwd|pwd|secret|token){_NAME}=){_VALUE}",
    re.IGNORECASE,
)
PARTIAL_SUFFIX = ".partial"  # of the name of a file that is being written
_EXPECTED = "a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
# Text that begins with one of these and a colon, but without //, is a misspelt address rather than a local path.
_SCHEMES = re.compile(r"s3[an]?|gc?s|file|https?|s?ftp|hdfs|viewfs|abfss?|az|wasbs?|dbfs")
_OPTIONS = re.compile(r"\?\w+=[^/?]*.*$", re.S)  # at the end of pyarrow's own addresses
_PROBE_TIMEOUT_S = 30
_COPY_BYTES = 2**24


class SecretInAddress(ValueError):
    """The address may contain a password, so messages must not show it."""


def normalize_location(location: str) -> str:
    """Returns the canonical spelling of a local path or of the address of a folder, with ~ expanded.

    Checks the text alone: pyarrow's clients for some schemes connect when they are created.

    Raises:
        ValueError: The location is empty, malformed, or has an unsupported scheme.
        SecretInAddress: It may contain a password.
    """
    if not location.strip() or "\0" in location:
        raise ValueError("is empty" if "\0" not in location else "a path cannot contain a null character")
    scheme, separator, rest = location.partition(":")
    scheme = scheme.lower()
    if "://" not in location:
        if separator and _SCHEMES.fullmatch(scheme):
            raise ValueError(f"an address begins with {scheme}://; expected {_EXPECTED}")
        return expand_home(location)
    if not rest.startswith("//"):
        raise ValueError(f"'://' is only allowed in addresses; expected {_EXPECTED}")
    if scheme not in ("s3", "gs", "file"):
        raise (SecretInAddress if "@" in rest else ValueError)(f"{scheme}:// is not supported; expected {_EXPECTED}")
    return _normalize_file(rest[2:]) if scheme == "file" else _normalize_bucket(scheme, rest[2:])


def _normalize_file(rest: str) -> str:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise ValueError(f"expected file:///FOLDER; or {_EXPECTED}")
    return f"/{unquote(path)}"


def _normalize_bucket(scheme: str, rest: str) -> str:
    bucket, slash, path = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        if scheme == "s3":
            hint = "credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and another server as AWS_ENDPOINT_URL"
        else:
            hint = "credentials as GOOGLE_APPLICATION_CREDENTIALS"
        raise SecretInAddress(
            f"the address appears in logs, so it may only name a bucket, as in {scheme}://BUCKET/FOLDER; give {hint}"
        )
    if _OPTIONS.search(rest):
        raise ValueError(
            "options in the address are not supported; set AWS_ENDPOINT_URL instead of endpoint_override, and "
            "AWS_REGION instead of region"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ValueError(f"{bucket!r} is not a bucket name; expected {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{bucket}{slash}{path}"


def expand_home(path: str) -> str:
    """Expands ~ or ~user at the start of `path`. Raises ValueError if there is no such home folder."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"there is no home folder {path.partition('/')[0]}; write ./{path} if that is the name")
    return expanded


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """Returns pyarrow's filesystem of a local path or an address, and the absolute path on it. Raises ValueError."""
    path = local_path(location)
    if path is None:
        scheme, _, rest = normalize_location(location).partition("://")
        return _open_bucket(f"{scheme}://{rest.partition('/')[0]}"), rest.rstrip("/")
    from pyarrow import fs

    return fs.LocalFileSystem(), str(path)


def local_path(location: str) -> Path | None:
    """Returns the absolute path of a local location, and None for an address of a bucket. Raises ValueError."""
    location = normalize_location(location)
    return None if "://" in location else Path(location).absolute()


@functools.lru_cache
def _open_bucket(address: str) -> fs.FileSystem:
    """Cached, because pyarrow looks up the bucket's region over the network."""
    try:
        from pyarrow import fs
    except ImportError as error:
        raise ValueError(f"{address}: buckets need pyarrow; pip install 'giffy_ray[train]'") from error
    return fs.FileSystem.from_uri(address)[0]


def is_local(location: str) -> bool:
    """Checks the text alone: creating a bucket's filesystem would access the network."""
    return "://" not in location or location.startswith("file://")


def join(location: str, *names: str) -> str:
    return "/".join([location.rstrip("/"), *names])


def redact_credentials(text: str) -> str:
    """Replaces credentials in addresses by ***: user and password, and query values such as token=..."""
    return _CREDENTIAL.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def resolve_path(location: str) -> str:
    """Returns a location that is valid in every process: addresses unchanged, local paths made absolute.

    `ray job submit --working-dir` runs a job in a copy of the folder, which Ray deletes later. There, relative paths
    are below ~/giffy_ray.
    """
    if "://" in location:
        return location
    path = Path(expand_home(location))
    if not path.is_absolute():
        is_ray_copy = "runtime_resources" in Path.cwd().parts
        base = Path.home() / "giffy_ray" if is_ray_copy else Path.cwd()
        path = base / path
    return str(path)


def open_stream(location: str) -> BinaryIO:
    """Opens a file for reading. Raises FileNotFoundError."""
    path = local_path(location)
    if path is not None:
        return path.open("rb")
    filesystem, key = filesystem_of(location)
    return filesystem.open_input_stream(key)


def download_file(location: str, path: Path) -> None:
    """Copies a file, which may lie in a bucket, to a local path. Raises FileNotFoundError."""
    with open_stream(location) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)


def read_text(location: str, errors: str = "strict") -> str | None:
    """Returns the text of a file, or None if it does not exist. `errors` is that of bytes.decode."""
    return read_bytes(location).decode(errors=errors) if is_file(location) else None


def is_file(location: str) -> bool:
    path = local_path(location)
    if path is not None:
        return path.is_file()
    filesystem, key = filesystem_of(location)
    return filesystem.get_file_info(key).is_file


def read_bytes(location: str) -> bytes:
    with open_stream(location) as stream:
        return stream.read()


def delete_file(location: str) -> None:
    """Deletes a file if it exists."""
    if not is_file(location):
        return
    path = local_path(location)
    if path is not None:
        path.unlink(missing_ok=True)
    else:
        filesystem, key = filesystem_of(location)
        filesystem.delete_file(key)


def write_text(location: str, text: str) -> None:
    write_bytes(location, text.encode())


def write_bytes(location: str, content: bytes) -> None:
    """Writes a file atomically, and creates its parent folders."""
    path = local_path(location)
    if path is None:  # an object store shows an object only when it is complete
        filesystem, key = filesystem_of(location)
        with filesystem.open_output_stream(key) as stream:
            stream.write(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # frees the space of a partial file, for example on a full disk
            partial.unlink()
        raise


def write_if_changed(location: str, content: bytes) -> None:
    """Writes a file atomically, unless it has this content already; then its modification time stays."""
    try:
        if read_bytes(location) == content:
            return
    except FileNotFoundError:
        pass
    write_bytes(location, content)


def check_writable(location: str) -> None:
    """Creates the folder if needed, and writes and removes a file in it. Raises OSError.

    A bucket is tested in a separate process: pyarrow retries failures for minutes, and cannot be interrupted.
    """
    _probe("write", location)


def check_readable(location: str) -> None:
    """Raises FileNotFoundError if there is no such file or folder, and OSError if it cannot be read."""
    _probe("read", location)


def _probe(verb: str, location: str) -> None:
    if is_local(location):
        _probe_in_process(verb, location)
        return
    # Runs this file rather than the module, which would import the whole package.
    command = [sys.executable, __file__, verb, location]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{location} did not answer within {_PROBE_TIMEOUT_S} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"the probe failed with exit code {result.returncode}"]
        raise OSError(lines[-1])


def _probe_in_process(verb: str, location: str) -> None:
    path = local_path(location)
    if path is None:
        _probe_bucket(verb, location)
    elif verb == "write":
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("not a folder")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
        probe.write_bytes(b"writable")
        probe.unlink()
    elif not path.exists():
        raise FileNotFoundError("no such file or folder")


def _probe_bucket(verb: str, location: str) -> None:
    filesystem, key = filesystem_of(location)
    if verb == "write":
        probe = f"{key}/.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"writable")
        filesystem.delete_file(probe)
    elif filesystem.get_file_info(key).type.name == "NotFound":
        raise FileNotFoundError("no such file or folder")


if __name__ == "__main__":
    try:
        _probe_in_process(*sys.argv[1:])
    except Exception as error:
        sys.exit(str(error).replace("\n", " "))
