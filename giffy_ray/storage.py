"""Where things are written: a local folder or an address such as s3://bucket/folder, through pyarrow.fs alike."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """(filesystem, path on it) of a local path, relative or not, or of an address."""
    if "://" in location:
        return fs.FileSystem.from_uri(location)
    return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())


def is_local(location: str) -> bool:
    """Told by its spelling alone: asking for a bucket's filesystem would ask the network where the bucket is."""
    return "://" not in location or location.startswith("file://")


def join(location: str, *names: str) -> str:
    return "/".join([location.rstrip("/"), *names])


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


def write_text(location: str, text: str) -> None:
    write_bytes(location, text.encode())


def write_bytes(location: str, content: bytes) -> None:
    """Writes a file, making the folders above it."""
    filesystem, path = filesystem_of(location)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)
