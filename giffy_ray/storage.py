"""Where things are written: a local folder or an address such as s3://bucket/folder, through pyarrow.fs alike."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs

# User and password of an address: up to the last @ of its host. A password may also hold what it should not, such as /:
# where there is no port after a colon, it is hidden up to the last @ of the word, or of the next address.
_USER_INFO = re.compile(r"(://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d*(?:[/?#\s]|$))\S*)@")
# A value of a query whose name says that it is a credential (sig, X-Amz-Signature, access_key, sslpassword, ...), or of
# a list of settings (password=... host=...).
_NAME, _VALUE = r"""[^\s=&;?#'"]*""", r"""[^\s&;#'"<>]+?(?=[])},.:]*(?:[\s&;#'"<>]|$))"""
_CREDENTIAL = re.compile(
    rf"([?&;#]{_NAME}(?:pass|pwd|token|secret|sig|cred|(?<!viewStateShare)key|auth|jwt|sas|session|odbc_connect){_NAME}="
    rf"|(?:^|\s){_NAME}(?:password|passwd|pwd|secret|token){_NAME}=){_VALUE}",
    re.IGNORECASE,
)
PARTIAL = ".partial"  # how the name of a file ends that is still being written
_KNOWN = "a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
# Of these a text with a single slash, or none, is taken for a misspelt address rather than for a local path.
_SCHEMES = re.compile(r"s3[an]?|gc?s|file|https?|s?ftp|hdfs|viewfs|abfss?|az|wasbs?|dbfs")
_OPTIONS = re.compile(r"\?\w+=[^/?]*.*$", re.S)  # as pyarrow's own addresses end
_PROBE_S = 30  # for a bucket to answer


class SecretInAddress(ValueError):
    """An address that may hold a password. Messages must not show it."""


def checked_location(location: str) -> str:
    """A local path, or the address of a folder, in the one spelling that we use; ~ is the home folder.

    Decided by the text alone: pyarrow's clients for some schemes use the network when they are made. Raises
    ValueError, SecretInAddress.
    """
    if not location.strip() or "\0" in location:
        raise ValueError("is empty" if "\0" not in location else "a path cannot hold a null character")
    scheme, separator, rest = location.partition(":")
    scheme = scheme.lower()
    if "://" not in location:
        if separator and _SCHEMES.fullmatch(scheme):
            raise ValueError(f"an address begins with {scheme}://; expected {_KNOWN}")
        return expand_home(location)
    if not rest.startswith("//"):
        raise ValueError(f"'://' is for addresses only; expected {_KNOWN}")
    if scheme not in ("s3", "gs", "file"):
        raise (SecretInAddress if "@" in rest else ValueError)(f"{scheme}:// is not supported; expected {_KNOWN}")
    return _checked_file(rest[2:]) if scheme == "file" else _checked_bucket(scheme, rest[2:])


def _checked_file(rest: str) -> str:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise ValueError(f"expected file:///FOLDER; or {_KNOWN}")
    return f"/{unquote(path)}"


def _checked_bucket(scheme: str, rest: str) -> str:
    bucket, slash, path = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        instead = (
            "credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and another server as AWS_ENDPOINT_URL"
            if scheme == "s3"
            else "credentials as GOOGLE_APPLICATION_CREDENTIALS"
        )
        raise SecretInAddress(
            f"the address appears in logs, so it may only name a bucket, as in {scheme}://BUCKET/FOLDER; give {instead}"
        )
    if _OPTIONS.search(rest):
        raise ValueError(
            "options in the address are not supported; set AWS_ENDPOINT_URL instead of endpoint_override, and "
            "AWS_REGION instead of region"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ValueError(f"{bucket!r} is not the name of a bucket; expected {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{bucket}{slash}{path}"


def expand_home(path: str) -> str:
    """`path` with ~ or ~user at its beginning replaced. Raises ValueError where there is no such home folder."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"there is no home folder {path.partition('/')[0]}; write ./{path} for a path of that name")
    return expanded


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """(filesystem, path on it) of a local path, relative or not, or of an address. Raises ValueError."""
    location = checked_location(location)
    scheme, separator, rest = location.partition("://")
    if separator:
        return _bucket(f"{scheme}://{rest.partition('/')[0]}"), rest.rstrip("/")
    return fs.LocalFileSystem(), str(Path(location).absolute())


@functools.lru_cache
def _bucket(address: str) -> fs.FileSystem:
    """Asked once for each bucket, as pyarrow asks the network where it is."""
    return fs.FileSystem.from_uri(address)[0]


def is_local(location: str) -> bool:
    """Told by its spelling alone: asking for a bucket's filesystem would ask the network where the bucket is."""
    return "://" not in location or location.startswith("file://")


def join(location: str, *names: str) -> str:
    return "/".join([location.rstrip("/"), *names])


def without_secrets(text: str) -> str:
    """Without the credentials in its addresses: what stands before the @, and values of a query such as token=..."""
    return _CREDENTIAL.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def settle(location: str) -> str:
    """A location that means the same in every process: addresses as they are, local paths made absolute.

    `ray job submit --working-dir` runs a job in a copy of the folder that Ray deletes later; what is relative goes
    below ~/giffy_ray there.
    """
    if "://" in location:
        return location
    path, here = Path(expand_home(location)), Path.cwd()
    if not path.is_absolute():
        path = (Path.home() / "giffy_ray" if "runtime_resources" in here.parts else here) / path
    return str(path)


def read_text(location: str, errors: str = "strict") -> str | None:
    """The text of a file, or none where there is no such file. `errors`: as of bytes.decode."""
    filesystem, path = filesystem_of(location)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode(errors=errors)


def is_file(location: str) -> bool:
    filesystem, path = filesystem_of(location)
    return filesystem.get_file_info(path).type == fs.FileType.File


def read_bytes(location: str) -> bytes:
    filesystem, path = filesystem_of(location)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def delete_file(location: str) -> None:
    """Deletes a file, if there is one."""
    filesystem, path = filesystem_of(location)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def write_text(location: str, text: str) -> None:
    write_bytes(location, text.encode())


def write_bytes(location: str, content: bytes) -> None:
    """Writes a file, making the folders above it. Readers see it whole or not at all, whatever happens to us."""
    filesystem, path = filesystem_of(location)
    written = path
    # Object stores know no folders and show an object when it is complete; a local file is written beside its place.
    if is_local(location):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        written = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        with filesystem.open_output_stream(written) as stream:
            stream.write(content)
        if written != path:
            filesystem.move(written, path)
    except BaseException:
        if written != path:
            with suppress(OSError):  # a full disk need not hold what is of no use
                filesystem.delete_file(written)
        raise


def write_if_different(location: str, content: bytes) -> None:
    """`write_bytes`, unless the file is there with this content: it then keeps its place and its time of change."""
    try:
        if read_bytes(location) == content:
            return
    except FileNotFoundError:
        pass
    write_bytes(location, content)


def check_writable(location: str) -> None:
    """Writes a file into the folder, which is made if need be, and removes it. Raises OSError.

    A bucket is tried by a process of its own: pyarrow repeats what fails for minutes, and cannot be interrupted.
    """
    _probe("write", location)


def check_readable(location: str) -> None:
    """Raises FileNotFoundError where there is no such file or folder, OSError where it cannot be read."""
    _probe("read", location)


def _probe(verb: str, location: str) -> None:
    if is_local(location):
        _probe_here(verb, location)
        return
    # As a file: the package is not imported, and need not be installed.
    command = [sys.executable, __file__, verb, location]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{location} did not answer within {_PROBE_S} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise OSError(lines[-1])


def _probe_here(verb: str, location: str) -> None:
    filesystem, path = filesystem_of(location)
    if verb == "read":
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            raise FileNotFoundError("there is no such file or folder")
        return
    name = f"{path}/.{uuid.uuid4().hex}{PARTIAL}"
    if isinstance(filesystem, fs.LocalFileSystem):
        if Path(path).exists() and not Path(path).is_dir():
            raise NotADirectoryError("it is no folder")
        Path(path).mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(name) as stream:
        stream.write(b"can be written")
    filesystem.delete_file(name)


if __name__ == "__main__":
    try:
        _probe_here(*sys.argv[1:])
    except Exception as error:
        sys.exit(str(error).replace("\n", " "))
