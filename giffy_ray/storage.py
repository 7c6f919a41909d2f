"""Where things are written: a local folder or an address such as s3://bucket/folder, through pyarrow.fs alike."""

from __future__ import annotations

import functools
import re
import uuid
from pathlib import Path

from pyarrow import fs

# User and password of an address: up to the last @ of its host. A password may also hold what it should not, such as /:
# where there is no port after a colon, it is hidden up to the last @ of the word, or of the next address.
_USER_INFO = re.compile(r"(://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d*(?:[/?#\s]|$))(?:(?!://)\S)*)@")
# A value of a query whose name says that it is a credential (sig, X-Amz-Signature, access_key, sslpassword, ...), or of
# a list of settings (password=... host=...).
_NAME, _VALUE = r"""[^\s=&;?#'"]*""", r"""[^\s&;#'"<>]+?(?=[])},.:]*(?:[\s&;#'"<>]|$))"""
_CREDENTIAL = re.compile(
    rf"([?&;#]{_NAME}(?:pass|pwd|token|secret|sig|cred|(?<!viewStateShare)key|auth|jwt|sas|session|odbc_connect){_NAME}="
    rf"|(?:^|\s){_NAME}(?:password|passwd|pwd|secret|token){_NAME}=){_VALUE}",
    re.IGNORECASE,
)
PARTIAL = ".partial"  # how the name of a file ends that is still being written


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """(filesystem, path on it) of a local path, relative or not, or of an address."""
    scheme, separator, rest = location.partition("://")
    if scheme in ("s3", "gs"):
        return _bucket(f"{scheme}://{rest.partition('/')[0]}"), rest.rstrip("/")
    if separator:
        return fs.FileSystem.from_uri(location)
    return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())


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
    path, here = Path(location).expanduser(), Path.cwd()
    if not path.is_absolute():
        path = (Path.home() / "giffy_ray" if "runtime_resources" in here.parts else here) / path
    return str(path)


def read_text(location: str) -> str | None:
    """The text of a file, or none where there is no such file."""
    filesystem, path = filesystem_of(location)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode()


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
    with filesystem.open_output_stream(written) as stream:
        stream.write(content)
    if written != path:
        filesystem.move(written, path)


def write_if_different(location: str, content: bytes) -> None:
    """`write_bytes`, unless the file is there with this content: it then keeps its place and its time of change."""
    try:
        if read_bytes(location) == content:
            return
    except FileNotFoundError:
        pass
    write_bytes(location, content)
