"""The clips of one data set, by row: memory-mapped out of the shards that decoding left.

    <storage>/stores/<key of the recipe>/
        sets/<key of its content>/
            rows.parquet        id, category, split, source, path and what `shards` knows: one row a clip, sorted by id
            rejects.parquet     id, path, category, split, reason, detail: the videos that gave no clip
            set.json            name, root, fingerprint and counts; written last, so a set without it is not finished
        catalogs/<key of the videos>    the key of the set that these videos gave: the only file that ever changes

Several sets share the shards of a store: all of a folder, one category of it, the folder as it was last week. A set
never changes: where a video that was rejected decodes later, the same videos have another set, and a training that
reads the first one is not disturbed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from pyarrow import fs

from giffy_ray.config import ConfigError, LimitsConfig
from giffy_ray.data.catalog import Catalog
from giffy_ray.data.decode import RejectedVideo, nearest_frames
from giffy_ray.data.sandbox import sandbox_for
from giffy_ray.data.shards import Recipe, read_video, shard_path
from giffy_ray.storage import filesystem_of, is_local, join, read_bytes, read_text, write_if_different, write_text

_VIDEO_SCHEMA = pa.schema(
    {name: pa.string() for name in ("identity", "id", "path", "category", "split", "source")}
    | {"size_bytes": pa.int64()}
)
_SET_FILES = ("rows.parquet", "rejects.parquet", "set.json")
_REJECT_COLUMNS = ["id", "path", "category", "split", "reason", "detail"]
_MAPPED_SHARDS = 256  # at a time: each takes one of the files that a process may have open


def set_location(location: str, catalog: Catalog) -> str | None:
    """Where the finished set of these videos is in the store at `location`; none where there is none."""
    try:
        key = read_text(_pointer(location, catalog))
        place = join(location, "sets", key) if key and key.isalnum() else None
        return place if place and read_text(join(place, "set.json")) is not None else None
    except UnicodeDecodeError:  # a file that was damaged
        return None


def choose_set(location: str, catalog: Catalog, place: str, replace: bool = False) -> str:
    """Makes the set at `place` the one of these videos, unless they have one already. Returns the location of theirs.

    So all jobs that prepare the same videos at once go on with the same set. With `replace` the set at `place` takes
    over from the one before. On object stores there is no lock: two jobs that come here within the same milliseconds
    go on with a set of their own each.
    """
    pointer = _pointer(location, catalog)
    if is_local(pointer):
        Path(filesystem_of(pointer)[1]).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{filesystem_of(pointer)[1]}.lock") if is_local(pointer) else nullcontext():
        present = None if replace else set_location(location, catalog)
        if present is None:
            write_text(pointer, place.rpartition("/")[2])
        return present or place


def _pointer(location: str, catalog: Catalog) -> str:
    digest = hashlib.sha256(catalog.name.encode())
    for video in catalog.videos:
        digest.update(f"\0{video.id}\0{video.split}\0{video.category}\0{video.source}\0{video.identity}".encode())
    return join(location, "catalogs", digest.hexdigest()[:16])


def write_set(location: str, catalog: Catalog, index: pa.Table, limits: LimitsConfig) -> str:
    """Writes the set of a catalog whose videos are all in the index. Returns its location.

    Rows in are clips and rejects: a video that is neither is a RuntimeError.
    """
    videos = pa.Table.from_pylist(
        [{name: getattr(video, name) for name in _VIDEO_SCHEMA.names} for video in catalog.videos], _VIDEO_SCHEMA
    )
    places = pc.index_in(videos["identity"], value_set=index["identity"])  # type: ignore[attr-defined]
    known = videos.filter(places.is_valid())
    for name, column in zip(index.column_names, index.take(places.drop_null()).columns, strict=True):
        if name != "identity":
            known = known.append_column(name, column)
    joined = known.sort_by("id")
    rows = joined.filter(joined["reason"].is_null())
    rejects = joined.filter(joined["reason"].is_valid()).select(_REJECT_COLUMNS)
    if len(rows) + len(rejects) != len(catalog.videos):
        raise RuntimeError(
            f"{location}: {len(rows)} clips and {len(rejects)} rejects do not account for the "
            f"{len(catalog.videos)} videos of {catalog.name}"
        )
    rows = rows.drop_columns(["reason", "detail"])
    facts = {
        "name": catalog.name,
        "root": catalog.root,
        "videos": catalog.fingerprint,
        "fingerprint": fingerprint_of(rows),
        "clips": len(rows),
        "rejects": len(rejects),
        "limits": dataclasses.asdict(limits),
    }
    files = {
        "rows.parquet": _parquet(rows),
        "rejects.parquet": _parquet(rejects),
        "set.json": json.dumps(facts, indent=2).encode(),
    }
    place = join(location, "sets", _key_of(list(files.values())))
    for name, content in files.items():
        write_if_different(join(place, name), content)
    return place


def is_whole(place: str) -> bool:
    """Whether a set is what was written: a power cut may leave files empty that were there already."""
    try:
        return place.rpartition("/")[2] == _key_of([read_bytes(join(place, name)) for name in _SET_FILES])
    except FileNotFoundError:
        return False


def _key_of(contents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _parquet(table: pa.Table) -> bytes:
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    return content.getvalue().to_pybytes()


def read_set(location: str) -> pa.Table:
    """The rows of a finished set, one a clip."""
    return _table(join(location, "rows.parquet"))


class Store:
    """Random access to the clips of a finished set. Shards on s3:// or gs:// come to this node's disk on first use."""

    def __init__(self, location: str):
        self.location = location
        self._store = location.rsplit("/", 2)[0]
        about = json.loads(_text(join(location, "set.json")))
        self.name: str = about["name"]  # of the data set
        self.root: str = about["root"]  # where its videos were when it was prepared
        self._limits = LimitsConfig(**about["limits"])
        self.recipe = Recipe.from_json(_text(join(self._store, "recipe.json")))
        self.clip = self.recipe.clip
        self.rejects: list[dict] = _table(join(location, "rejects.parquet")).to_pylist()
        rows = read_set(location)
        self.ids: list[str] = rows["id"].to_pylist()
        self.categories: list[str] = rows["category"].to_pylist()
        self.sources: list[str] = rows["source"].to_pylist()  # what each clip was cut from
        self.facts: pa.Table = rows.select(
            ["codec", "source_width", "source_height", "source_fps", "seconds", "hdr", "padded", "frames"]
        )
        self._splits = np.asarray(rows["split"].to_pylist(), dtype=str)
        self._paths, self._times_s = rows["path"], rows["times_s"]
        self._shards: list[str] = rows["shard"].to_pylist()
        self._firsts, self._frames = rows["first"].to_numpy(), rows["frames"].to_numpy()
        self.bytes = int(self._frames.sum()) * self.clip.height * self.clip.width * 3 if self.recipe.keep else 0
        self.fingerprint = fingerprint_of(rows)
        self._mapped = functools.lru_cache(maxsize=_MAPPED_SHARDS)(self._map)

    def __reduce__(self):
        return Store, (self.location,)  # what is mapped stays in its process

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, split: str) -> np.ndarray:
        """int64: the rows of the clips of a split, in order of their ids."""
        return np.flatnonzero(self._splits == split)

    def frames_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """All frames that are kept of a video: uint8 [frames, height, width, 3], not to be written to; float64
        [frames]: the times they are shown at, in seconds after the first.

        Where no frames are kept the video is decoded; one that was good before and is not now is a RuntimeError.
        """
        if not self.recipe.keep:
            return self._decoded(row)
        first, frames = self._firsts[row], self._frames[row]
        pixels = self._mapped(self._shards[row])[first : first + frames]
        if len(pixels) != frames:
            path = shard_path(self._store, self._shards[row])
            raise RuntimeError(f"{path}: it was cut off; run jobs/prepare.py, which decodes its videos again")
        return pixels, self._times_of(row)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copies clips out: uint8 [len(rows), frames, height, width, 3]."""
        clips = np.empty((len(rows), self.clip.frames, self.clip.height, self.clip.width, 3), np.uint8)
        for place, row in enumerate(rows):
            frames, times_s = self.frames_of(int(row))
            clips[place] = frames[nearest_frames(times_s, self.clip)] if self.recipe.every else frames
        return clips

    def counts(self) -> dict[str, int]:
        """How many clips there are of each split, and rejects."""
        return {**Counter(self._splits.tolist()), "rejects": len(self.rejects)}

    def reject_counts(self) -> Counter[str]:
        return Counter(reject["reason"] for reject in self.rejects)

    def _times_of(self, row: int) -> np.ndarray:
        if self.recipe.every:
            return self._times_s[row].values.to_numpy()
        return np.arange(self.clip.frames) / self.clip.fps

    def _map(self, shard: str) -> np.ndarray:
        path = self._on_this_node(shard)
        try:
            return np.memmap(path, np.uint8, "r").reshape(-1, self.clip.height, self.clip.width, 3)
        except (OSError, ValueError) as error:  # ValueError: it is empty, or ends within a frame
            raise RuntimeError(f"{path}: {error}; run jobs/prepare.py, which decodes its videos again") from error

    def _on_this_node(self, shard: str) -> Path:
        """A shard on a local disk: where it is, or a copy that all processes of this node share."""
        remote = shard_path(self._store, shard)
        filesystem, path = filesystem_of(remote)
        if is_local(remote):
            return Path(path)
        cache = Path(tempfile.gettempdir()) / f"giffy_ray-{os.getuid()}" / "shards" / self.recipe.key
        copy = cache / f"{shard}.u8"
        if copy.exists():
            return copy
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{shard}.lock"):
            if not copy.exists():
                _bring(filesystem, path, copy, shard)
        return copy

    def _decoded(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        filesystem, _ = filesystem_of(self.root)
        path = self._paths[row].as_py()
        try:
            video = read_video(filesystem, path, self._limits)
            sampled = sandbox_for(self.clip, self._limits, self.recipe.decoder).sample(video)
        except RejectedVideo as rejected:
            raise RuntimeError(f"{path}: gave a clip when the data set was prepared, and now: {rejected}") from rejected
        return sampled.clip, sampled.times_s


def _bring(filesystem: fs.FileSystem, remote: str, copy: Path, sha256: str) -> None:
    """Copies a shard to this node, and checks it before it has its name."""
    size, free = filesystem.get_file_info(remote).size, shutil.disk_usage(copy.parent).free
    if free < 2 * size:
        raise ConfigError(
            f"{copy.parent}: {free / 1e9:.1f} GB are free, too little for the clips that this node reads; "
            f"set TMPDIR to a larger disk, or data.keep=false"
        )
    partial = copy.with_suffix(".partial")
    fs.copy_files(remote, str(partial), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    with partial.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(
            f"{remote}: its sha256 is {found}, not {sha256}; run jobs/prepare.py, which decodes it again"
        )
    partial.rename(copy)


def fingerprint_of(rows: pa.Table) -> str:
    """Changes with the clips that there are, their pixels, their videos and their splits; not with where they lie, nor
    with what else is kept of the videos.
    """
    digest = hashlib.sha256()
    for row in rows.select(["id", "split", "size_bytes", "sha256"]).to_pylist():
        digest.update("{id}\0{split}\0{size_bytes}\0{sha256}\n".format(**row).encode())
    return digest.hexdigest()[:16]


def _text(location: str) -> str:
    text = read_text(location)
    if text is None:
        raise FileNotFoundError(f"{location}: no such file; run jobs/prepare.py with the same experiment")
    return text


def _table(location: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(location)))
