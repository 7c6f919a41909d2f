"""The clips of one data set, by row: memory-mapped out of the shards that decoding left.

    <storage>/stores/<key of the recipe>/
        sets/<key of its content>/
            rows.arrow          id, category, split, source, path and what `shards` knows: one row a clip, sorted by id;
                                an uncompressed Arrow IPC file, so that processes map it instead of reading it
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
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from giffy_ray.config import ConfigError, LimitsConfig
from giffy_ray.core.storage import filesystem_of, is_local, join, read_bytes, read_text, write_if_different, write_text
from giffy_ray.data.catalog import Catalog, Video
from giffy_ray.data.decode import RejectedVideo, nearest_frames
from giffy_ray.data.node_cache import NodeCache
from giffy_ray.data.sandbox import sandbox_for
from giffy_ray.data.shards import DecodeConfig, read_video, shard_path

_FORMAT = 2  # of the files of a set; sets of another format are written again, from the same shards
_VIDEO_SCHEMA = pa.schema(
    {name: pa.string() for name in ("identity", "id", "path", "category", "split", "source")}
    | {"size_bytes": pa.int64()}
)
_REPEATED = ("category", "split", "codec", "shard")  # columns with few values, each of which is stored once
_BATCH_ROWS = 2**20  # of an IPC file: Arrow's strings hold at most 2 GiB a batch
_READ_ROWS = 2**14  # turned into Python objects at a time
_ROWS = "rows.arrow"
_SET_FILES = (_ROWS, "rejects.parquet", "set.json")
_REJECT_COLUMNS = ["id", "path", "category", "split", "reason", "detail"]
_MAPPED_SHARDS = 256  # at a time: each takes one of the files that a process may have open


def set_location(location: str, catalog: Catalog) -> str | None:
    """Where the finished set of these videos is in the store at `location`; none where there is none."""
    return _set_of(location, _pointer(location, catalog))


def _set_of(location: str, pointer: str) -> str | None:
    try:
        key = read_text(pointer)
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
        present = None if replace else _set_of(location, pointer)
        if present is None:
            write_text(pointer, place.rpartition("/")[2])
        return present or place


def _pointer(location: str, catalog: Catalog) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\0{catalog.name}".encode())
    for video in catalog.videos:
        digest.update(f"\0{video.id}\0{video.split}\0{video.category}\0{video.source}\0{video.identity}".encode())
    return join(location, "catalogs", digest.hexdigest()[:16])


def write_set(location: str, catalog: Catalog, index: pa.Table, limits: LimitsConfig) -> str:
    """Writes the set of a catalog whose videos are all in the index. Returns its location.

    Rows in are clips and rejects: a video that is neither is a RuntimeError.
    """
    videos = _table_of(catalog.videos)
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
    mapped = _ipc_file(rows)
    facts = {
        "name": catalog.name,
        "root": catalog.root,
        "videos": catalog.fingerprint,
        "fingerprint": fingerprint_of(rows),
        "clips": len(rows),
        "rejects": len(rejects),
        "frames": pc.sum(rows["frames"]).as_py() or 0,  # type: ignore[attr-defined]
        "rows_bytes": mapped.size,
        "rows_sha256": hashlib.sha256(mapped).hexdigest(),
        "limits": dataclasses.asdict(limits),
    }
    files = {
        _ROWS: mapped.to_pybytes(),
        "rejects.parquet": _parquet(rejects),
        "set.json": json.dumps(facts, indent=2).encode(),
    }
    place = join(location, "sets", _key_of(list(files.values())))
    for name, content in files.items():
        write_if_different(join(place, name), content)
    return place


def _table_of(videos: Sequence[Video]) -> pa.Table:
    """By column: a dictionary for each row would take ten times the memory."""
    columns = [[getattr(video, name) for video in videos] for name in _VIDEO_SCHEMA.names]
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, _VIDEO_SCHEMA.types, strict=True)], _VIDEO_SCHEMA
    )


def _ipc_file(rows: pa.Table) -> pa.Buffer:
    for name in _REPEATED:
        rows = rows.set_column(rows.column_names.index(name), name, rows[name].dictionary_encode())
    rows = rows.combine_chunks().unify_dictionaries()  # an IPC file has one dictionary for all batches of a column
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=_BATCH_ROWS)
    return content.getvalue()


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
    """The rows of a finished set, one a clip, mapped from a file on this node. Raises FileNotFoundError, RuntimeError.

    On s3:// and gs:// the first process of a node that asks for it copies the file.
    """
    path = filesystem_of(join(location, _ROWS))[1] if is_local(location) else str(_rows_on_this_node(location))
    try:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; run jobs/prepare.py with the same experiment") from error
    except (pa.ArrowException, OSError) as error:
        raise RuntimeError(f"{path}: {error}; run jobs/prepare.py with the same experiment") from error


def _rows_on_this_node(location: str) -> Path:
    """A copy of the rows of a remote set that all processes of this node share."""
    store, _, key = location.rsplit("/", 2)
    copy = _node_folder() / "sets" / store.rpartition("/")[2] / f"{key}.arrow"
    if copy.exists():
        return copy
    filesystem, remote = filesystem_of(join(location, _ROWS))
    sha256 = json.loads(_text(join(location, "set.json")))["rows_sha256"]
    if not node_cache(None).download(copy, filesystem, remote, sha256):
        raise ConfigError(f"{copy.parent}: the disk is full; free some of it, or set TMPDIR to a larger one")
    return copy


def _node_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"giffy_ray-{os.getuid()}"


class Column(Sequence[Any]):
    """The values of an Arrow column as a sequence. An item becomes a Python object only when it is asked for.

    Slices are lists. Equal to any sequence, such as a list, of the same values.
    """

    def __init__(self, values: pa.ChunkedArray):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        if isinstance(index, slice):
            return self._values[index].to_pylist()
        return self._values[index].as_py()

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _READ_ROWS):
            yield from self._values.slice(first, _READ_ROWS).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list's

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[len]: objects, of which equal ones of a column with few values are the same."""
        return np.asarray(self._values.to_numpy(zero_copy_only=False), dtype)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Column([{shown}{', ...' if len(self) > 3 else ''}], {len(self)} values)"


class ClipDataset:
    """Random access to the clips of a finished set. Shards on s3:// or gs:// come to this node's disk on first use.

    Opening it maps its columns: it takes the same time and memory however many clips there are.

    `node_cache_gb`: the most that these copies may take on a node, as `data.node_cache_gb`.
    """

    def __init__(self, location: str, node_cache_gb: float | None = None):
        self.location, self.node_cache_gb = location, node_cache_gb
        self._store = location.rsplit("/", 2)[0]
        about = json.loads(_text(join(location, "set.json")))
        self.name: str = about["name"]  # of the data set
        self.root: str = about["root"]  # where its videos were when it was prepared
        self.fingerprint: str = about["fingerprint"]  # see `fingerprint_of`
        self._limits = LimitsConfig(**about["limits"])
        self._reject_count: int = about["rejects"]
        self.recipe = DecodeConfig.from_json(_text(join(self._store, "recipe.json")))
        self.clip = self.recipe.clip
        rows = read_set(location)
        self.ids = Column(rows["id"])
        self._categories = rows["category"]
        self.categories = Column(self._categories)
        self.sources = Column(rows["source"])  # what each clip was cut from
        self.facts: pa.Table = rows.select(
            ["codec", "source_width", "source_height", "source_fps", "seconds", "hdr", "padded", "frames"]
        )
        self._splits, self._paths, self._times_s = rows["split"], rows["path"], rows["times_s"]
        self._shards, self._firsts, self._frames = rows["shard"], rows["first"], rows["frames"]
        self.bytes = about["frames"] * self.clip.height * self.clip.width * 3 if self.recipe.cache else 0
        self._mapped = functools.lru_cache(maxsize=_MAPPED_SHARDS)(self._map)

    def __reduce__(self):
        return ClipDataset, (self.location, self.node_cache_gb)  # what is mapped stays in its process

    def __len__(self) -> int:
        return len(self.ids)

    def split_indices(self, split: str) -> np.ndarray:
        """int64: the rows of the clips of a split, in order of their ids."""
        # By the numbers of the dictionary, so that no text is compared.
        chosen = [part.indices.to_numpy() == part.dictionary.index(split).as_py() for part in self._splits.chunks]
        return np.flatnonzero(np.concatenate([np.empty(0, bool), *chosen]))

    def frames_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """All frames that are kept of a video: uint8 [frames, height, width, 3], not to be written to; float64
        [frames]: the times they are shown at, in seconds after the first.

        Where no frames are kept the video is decoded; one that was good before and is not now is a RuntimeError.
        """
        if not self.recipe.cache:
            return self._decoded(row)
        shard, first, frames = (column[row].as_py() for column in (self._shards, self._firsts, self._frames))
        pixels = self._mapped(shard)[first : first + frames]
        if len(pixels) != frames:
            path = shard_path(self._store, shard)
            raise RuntimeError(f"{path}: it was cut off; run jobs/prepare.py, which decodes its videos again")
        return pixels, self._times_of(row)

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        """Copies clips out: uint8 [len(rows), frames, height, width, 3]."""
        clips = np.empty((len(rows), self.clip.frames, self.clip.height, self.clip.width, 3), np.uint8)
        for place, row in enumerate(rows):
            frames, times_s = self.frames_of(int(row))
            clips[place] = frames[nearest_frames(times_s, self.clip)] if self.recipe.keep_all_frames else frames
        return clips

    def counts(self) -> dict[str, int]:
        """How many clips there are of each split, and rejects."""
        return {**_counted(self._splits), "rejects": self._reject_count}

    def category_counts(self) -> Counter[tuple[str, str]]:
        """How many clips there are of each category in each split: (category, split) -> clips."""
        pairs = pa.table({"category": self._categories, "split": self._splits})
        counted = pairs.group_by(["category", "split"], use_threads=False).aggregate([([], "count_all")])
        return Counter({(row["category"], row["split"]): row["count_all"] for row in counted.to_pylist()})

    @property
    def rejects(self) -> Sequence[dict[str, Any]]:
        """The videos that gave no clip, in order of their ids: id, path, category, split, reason, detail."""
        return Column(pa.chunked_array(self._rejects.to_struct_array()))

    @functools.cached_property
    def _rejects(self) -> pa.Table:
        """Read on first use: workers do without it."""
        return _table(join(self.location, "rejects.parquet"))

    def reject_counts(self) -> Counter[str]:
        return _counted(self._rejects["reason"])

    def _times_of(self, row: int) -> np.ndarray:
        if self.recipe.keep_all_frames:
            return self._times_s[row].values.to_numpy()
        return np.arange(self.clip.frames) / self.clip.fps

    def _map(self, shard: str) -> np.ndarray:
        path = shard_path(self._store, shard)
        copy = None if is_local(path) else self._on_this_node(shard)
        try:
            content = np.memmap(filesystem_of(path)[1], np.uint8, "r") if copy is None else copy
            return content.reshape(-1, self.clip.height, self.clip.width, 3)
        except (OSError, ValueError) as error:  # ValueError: it is empty, or ends within a frame
            raise RuntimeError(f"{path}: {error}; run jobs/prepare.py, which decodes its videos again") from error

    @functools.cached_property
    def _node_cache(self) -> NodeCache:
        return node_cache(self.node_cache_gb, release=self._mapped.cache_clear)

    def _on_this_node(self, shard: str) -> np.ndarray:
        """uint8 [bytes] of a remote shard, out of a copy that all processes of this node share."""
        filesystem, path = filesystem_of(shard_path(self._store, shard))
        return self._node_cache.map(f"{self.recipe.key}/{shard}.u8", filesystem, path, sha256=shard)

    def _decoded(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        filesystem, _ = filesystem_of(self.root)
        path = self._paths[row].as_py()
        try:
            video = read_video(filesystem, path, self._limits)
            sampled = sandbox_for(self.clip, self._limits, self.recipe.decoder).sample(video)
        except RejectedVideo as rejected:
            raise RuntimeError(f"{path}: gave a clip when the data set was prepared, and now: {rejected}") from rejected
        return sampled.clip, sampled.times_s


def node_cache(limit_gb: float | None, release: Callable[[], None] = lambda: None) -> NodeCache:
    """Of this node, for shards that lie on s3:// or gs://. `release` drops the maps of this process."""
    return NodeCache(_node_folder() / "shards", None if limit_gb is None else limit_gb * 1e9, release)


def fingerprint_of(rows: pa.Table) -> str:
    """Changes with the clips that there are, their pixels, their videos and their splits; not with where they lie, nor
    with what else is kept of the videos.
    """
    digest = hashlib.sha256()
    for first in range(0, len(rows), _READ_ROWS):
        columns = (rows[name].slice(first, _READ_ROWS).to_pylist() for name in ("id", "split", "size_bytes", "sha256"))
        digest.update("".join("{}\0{}\0{}\0{}\n".format(*row) for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()[:16]


def _counted(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in values.value_counts().to_pylist()})


def _text(location: str) -> str:
    text = read_text(location)
    if text is None:
        raise FileNotFoundError(f"{location}: no such file; run jobs/prepare.py with the same experiment")
    return text


def _table(location: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(location)))
