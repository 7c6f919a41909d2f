"""The clips of one dataset, accessed by index and memory-mapped from shards.

    <storage>/stores/<key of the decode config>/
        sets/<key of its content>/
            rows.arrow          id, category, split, source, path and the columns of `shards.ROW_SCHEMA`: one row per
                                clip, sorted by id; an uncompressed Arrow IPC file, which processes map
            rejects.parquet     id, path, category, split, reason, detail of the rejected videos
            set.json            name, root, fingerprint and counts; written last, so its absence marks an unfinished set
        catalogs/<key of the videos>    pointer: the key of the set for these videos; the only file that ever changes

Several sets share the shards of a store: a whole folder, one category of it, last week's state of the folder. A set is
immutable. If a rejected video decodes later, its dataset gets another set, and trainings that read the first one are
not affected.

In this module `store_location` and `set_location` are paths or URIs.
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
from giffy_ray.core.storage import filesystem_of, is_local, join, read_bytes, read_text, write_if_changed, write_text
from giffy_ray.data.catalog import Catalog, Video
from giffy_ray.data.decode import RejectedVideo, nearest_frame_indices
from giffy_ray.data.node_cache import NodeCache
from giffy_ray.data.sandbox import get_sandbox
from giffy_ray.data.shards import DecodeConfig, get_shard_path, read_video

_FORMAT = 2  # of a set's files; sets of other formats are rewritten from the same shards
_VIDEO_SCHEMA = pa.schema(
    {name: pa.string() for name in ("identity", "id", "path", "category", "split", "source")}
    | {"size_bytes": pa.int64()}
)
_DICTIONARY_COLUMNS = ("category", "split", "codec", "shard")  # few distinct values, each stored once
_BATCH_ROWS = 2**20  # per IPC batch: Arrow's strings hold at most 2 GiB per batch
_READ_ROWS = 2**14  # converted to Python objects at a time
_ROWS_FILE = "rows.arrow"
_SET_FILES = (_ROWS_FILE, "rejects.parquet", "set.json")
_REJECT_COLUMNS = ["id", "path", "category", "split", "reason", "detail"]
_MAX_MAPPED_SHARDS = 256  # per process: each takes one file descriptor


def find_set(store_location: str, catalog: Catalog) -> str | None:
    """Returns the location of the finished set for the videos of `catalog`, or None."""
    return _follow_pointer(store_location, _pointer_location(store_location, catalog))


def _follow_pointer(store_location: str, pointer: str) -> str | None:
    try:
        key = read_text(pointer)
        set_location = join(store_location, "sets", key) if key and key.isalnum() else None
        is_finished = set_location and read_text(join(set_location, "set.json")) is not None
        return set_location if is_finished else None
    except UnicodeDecodeError:  # a damaged file
        return None


def choose_set(store_location: str, catalog: Catalog, set_location: str, replace: bool = False) -> str:
    """Makes a set the current one for its videos, unless they already have one.

    All jobs that prepare the same videos concurrently therefore use the same set. Object stores have no lock: two jobs
    that call this within the same milliseconds each use their own set.

    Args:
        store_location: The store that contains the set.
        catalog: The videos of the set.
        set_location: The set.
        replace: Replace the current set.

    Returns:
        Location of the set to use.
    """
    pointer = _pointer_location(store_location, catalog)
    if is_local(pointer):
        Path(filesystem_of(pointer)[1]).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{filesystem_of(pointer)[1]}.lock") if is_local(pointer) else nullcontext():
        current = None if replace else _follow_pointer(store_location, pointer)
        if current is None:
            write_text(pointer, set_location.rpartition("/")[2])
        return current or set_location


def _pointer_location(store_location: str, catalog: Catalog) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\0{catalog.name}".encode())
    for video in catalog.videos:
        digest.update(f"\0{video.id}\0{video.split}\0{video.category}\0{video.source}\0{video.identity}".encode())
    return join(store_location, "catalogs", digest.hexdigest()[:16])


def write_set(store_location: str, catalog: Catalog, index: pa.Table, limits: LimitsConfig) -> str:
    """Writes the set of a catalog.

    Args:
        store_location: The store that contains the shards.
        catalog: The videos.
        index: One row of `shards.ROW_SCHEMA` per identity; other videos are allowed.
        limits: Limits to decode with if the store holds no frames.

    Returns:
        Location of the set.

    Raises:
        RuntimeError: A video of the catalog is not in the index.
    """
    videos = _make_video_table(catalog.videos)
    positions = pc.index_in(videos["identity"], value_set=index["identity"])  # type: ignore[attr-defined]
    joined = videos.filter(positions.is_valid())
    for name, column in zip(index.column_names, index.take(positions.drop_null()).columns, strict=True):
        if name != "identity":
            joined = joined.append_column(name, column)
    joined = joined.sort_by("id")
    rows = joined.filter(joined["reason"].is_null())
    rejects = joined.filter(joined["reason"].is_valid()).select(_REJECT_COLUMNS)
    if len(rows) + len(rejects) != len(catalog.videos):
        raise RuntimeError(
            f"{store_location}: {len(rows)} clips and {len(rejects)} rejects do not account for the "
            f"{len(catalog.videos)} videos of {catalog.name}"
        )
    rows = rows.drop_columns(["reason", "detail"])
    ipc_file = _to_ipc_file(rows)
    set_info = {
        "name": catalog.name,
        "root": catalog.root,
        "videos": catalog.fingerprint,
        "fingerprint": compute_fingerprint(rows),
        "clips": len(rows),
        "rejects": len(rejects),
        "frames": pc.sum(rows["frames"]).as_py() or 0,  # type: ignore[attr-defined]
        "rows_bytes": ipc_file.size,
        "rows_sha256": hashlib.sha256(ipc_file).hexdigest(),
        "limits": dataclasses.asdict(limits),
    }
    files = {
        _ROWS_FILE: ipc_file.to_pybytes(),
        "rejects.parquet": _to_parquet_file(rejects),
        "set.json": json.dumps(set_info, indent=2).encode(),
    }
    set_location = join(store_location, "sets", _compute_set_key(list(files.values())))
    for name, content in files.items():
        write_if_changed(join(set_location, name), content)
    return set_location


def _make_video_table(videos: Sequence[Video]) -> pa.Table:
    """Builds the table by columns: one dictionary per row would take ten times the memory."""
    columns = []
    for field in _VIDEO_SCHEMA:
        values = [getattr(video, field.name) for video in videos]
        columns.append(pa.array(values, field.type))
    return pa.table(columns, _VIDEO_SCHEMA)


def _to_ipc_file(rows: pa.Table) -> pa.Buffer:
    for name in _DICTIONARY_COLUMNS:
        rows = rows.set_column(rows.column_names.index(name), name, rows[name].dictionary_encode())
    rows = rows.combine_chunks().unify_dictionaries()  # an IPC file has one dictionary for all batches of a column
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=_BATCH_ROWS)
    return content.getvalue()


def is_intact(set_location: str) -> bool:
    """Whether a set's files match its key. A power failure can leave empty files behind."""
    try:
        contents = [read_bytes(join(set_location, name)) for name in _SET_FILES]
    except FileNotFoundError:
        return False
    return set_location.rpartition("/")[2] == _compute_set_key(contents)


def _compute_set_key(contents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _to_parquet_file(table: pa.Table) -> bytes:
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    return content.getvalue().to_pybytes()


def read_set(set_location: str) -> pa.Table:
    """Maps the rows of a finished set, one per clip. Downloads a remote file once per node.

    Raises:
        FileNotFoundError: The set does not exist.
        RuntimeError: The set is damaged.
    """
    is_remote = not is_local(set_location)
    path = str(_download_rows(set_location)) if is_remote else filesystem_of(join(set_location, _ROWS_FILE))[1]
    try:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; run jobs/prepare.py with the same experiment") from error
    except (pa.ArrowException, OSError) as error:
        raise RuntimeError(f"{path}: {error}; run jobs/prepare.py with the same experiment") from error


def _download_rows(set_location: str) -> Path:
    """Returns the node's copy of the rows of a remote set, shared by its processes."""
    store_location, _, key = set_location.rsplit("/", 2)
    copy = _node_folder() / "sets" / store_location.rpartition("/")[2] / f"{key}.arrow"
    if copy.exists():
        return copy
    filesystem, remote = filesystem_of(join(set_location, _ROWS_FILE))
    sha256 = json.loads(_read_existing_text(join(set_location, "set.json")))["rows_sha256"]
    if not open_node_cache(None).download(copy, filesystem, remote, sha256):
        raise ConfigError(f"{copy.parent}: the disk is full; free some space or set TMPDIR to a larger disk")
    return copy


def _node_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"giffy_ray-{os.getuid()}"


class Column(Sequence[Any]):
    """An Arrow column as a sequence. Converts items to Python objects on access.

    Slices are lists. A column is equal to any sequence of the same values, such as a list.
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
        return len(self) == len(other) and all(left == right for left, right in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns object [len]. Equal items of a dictionary-encoded column are the same object."""
        return np.asarray(self._values.to_numpy(zero_copy_only=False), dtype)

    def __repr__(self) -> str:
        first_items = ", ".join(map(repr, self[:3]))
        return f"Column([{first_items}{', ...' if len(self) > 3 else ''}], {len(self)} values)"


class ClipDataset:
    """Random access to the clips of a finished set.

    Opening a dataset maps its columns: time and memory do not depend on the number of clips. Shards on s3:// or gs://
    are downloaded to the node's disk on first use. A pickled dataset is its location only.

    Args:
        location: Path or URI of a finished set.
        node_cache_gb: Maximum size of a node's copies of remote shards, as `data.node_cache_gb`.

    Attributes:
        location: Path or URI of the set.
        name: Name of the dataset.
        root: Where its videos were when it was prepared.
        fingerprint: 16 hex digits, see `compute_fingerprint`.
        decode_config: What the store holds of each video.
        clip: Length, frame rate and size of the clips.
        ids: str [clips], sorted: paths of the videos below `root`.
        categories: str [clips].
        sources: str [clips]: the video that each clip was cut from.
        metadata: Arrow table, one row per clip: codec, source_width, source_height (pixels), source_fps, seconds, hdr,
            padded (repeated frames at the end), frames (number of stored frames).
        size_bytes: Size of all stored frames, 0 if none are stored.

    Raises:
        FileNotFoundError: There is no finished set at `location`.
        RuntimeError: The set is damaged.
    """

    def __init__(self, location: str, node_cache_gb: float | None = None):
        self.location = location
        self.node_cache_gb = node_cache_gb
        self._store_location = location.rsplit("/", 2)[0]
        set_info = json.loads(_read_existing_text(join(location, "set.json")))
        self.name: str = set_info["name"]
        self.root: str = set_info["root"]
        self.fingerprint: str = set_info["fingerprint"]
        self._limits = LimitsConfig(**set_info["limits"])
        self._reject_count: int = set_info["rejects"]
        self.decode_config = DecodeConfig.from_json(_read_existing_text(join(self._store_location, "recipe.json")))
        self.clip = self.decode_config.clip
        rows = read_set(location)
        self.ids = Column(rows["id"])
        self._categories = rows["category"]
        self.categories = Column(self._categories)
        self.sources = Column(rows["source"])
        self.metadata: pa.Table = rows.select(
            ["codec", "source_width", "source_height", "source_fps", "seconds", "hdr", "padded", "frames"]
        )
        self._splits = rows["split"]
        self._paths = rows["path"]
        self._times_s = rows["times_s"]
        self._shards = rows["shard"]
        self._first_frames = rows["first"]
        self._frame_counts = rows["frames"]
        frame_bytes = self.clip.height * self.clip.width * 3
        self.size_bytes = set_info["frames"] * frame_bytes if self.decode_config.cache else 0
        self._map_shard = functools.lru_cache(maxsize=_MAX_MAPPED_SHARDS)(self._map_shard_uncached)

    def __reduce__(self):
        return ClipDataset, (self.location, self.node_cache_gb)  # maps stay in their process

    def __len__(self) -> int:
        return len(self.ids)

    def split_indices(self, split: str) -> np.ndarray:
        """Returns the indices of the clips of a split: int64 [clips of the split], ascending."""
        # Compares dictionary codes instead of strings.
        masks = [part.indices.to_numpy() == part.dictionary.index(split).as_py() for part in self._splits.chunks]
        return np.flatnonzero(np.concatenate([np.empty(0, bool), *masks]))

    def get_frames(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns all stored frames of a video. Decodes the video if the store holds no frames.

        Args:
            index: Index of the clip.

        Returns:
            frames: uint8 [frames, height, width, 3], read-only.
            times_s: float64 [frames], presentation times in seconds after the first frame.

        Raises:
            RuntimeError: The shard is damaged, or the video can no longer be decoded.
        """
        if not self.decode_config.cache:
            return self._decode(index)
        shard = self._shards[index].as_py()
        first = self._first_frames[index].as_py()
        frame_count = self._frame_counts[index].as_py()
        frames = self._map_shard(shard)[first : first + frame_count]
        if len(frames) != frame_count:
            path = get_shard_path(self._store_location, shard)
            raise RuntimeError(f"{path}: truncated; run jobs/prepare.py, which decodes its videos again")
        return frames, self._get_times_s(index)

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        """Copies clips into memory.

        Args:
            indices: int [n], in any order, may repeat.

        Returns:
            uint8 [n, frames, height, width, 3].

        Raises:
            RuntimeError: As `get_frames`.
        """
        clips = np.empty((len(indices), self.clip.frames, self.clip.height, self.clip.width, 3), np.uint8)
        for position, index in enumerate(indices):
            frames, times_s = self.get_frames(int(index))
            if self.decode_config.keep_all_frames:
                frames = frames[nearest_frame_indices(times_s, self.clip)]
            clips[position] = frames
        return clips

    def count_by_split(self) -> dict[str, int]:
        """Returns the number of clips of each split, and of all rejects as `rejects`."""
        return {**_count_values(self._splits), "rejects": self._reject_count}

    def count_by_category(self) -> Counter[tuple[str, str]]:
        """Returns the number of clips of each (category, split)."""
        pairs = pa.table({"category": self._categories, "split": self._splits})
        groups = pairs.group_by(["category", "split"], use_threads=False).aggregate([([], "count_all")])
        return Counter({(group["category"], group["split"]): group["count_all"] for group in groups.to_pylist()})

    @property
    def rejects(self) -> Sequence[dict[str, Any]]:
        """The rejected videos, sorted by id: dictionaries of id, path, category, split, reason and detail."""
        return Column(pa.chunked_array(self._reject_table.to_struct_array()))

    @functools.cached_property
    def _reject_table(self) -> pa.Table:
        """Read on first use, because workers do not need it."""
        return pq.read_table(pa.BufferReader(read_bytes(join(self.location, "rejects.parquet"))))

    def count_rejects_by_reason(self) -> Counter[str]:
        """Returns the number of rejected videos for each reason."""
        return _count_values(self._reject_table["reason"])

    def _get_times_s(self, index: int) -> np.ndarray:
        if self.decode_config.keep_all_frames:
            return self._times_s[index].values.to_numpy()
        return np.arange(self.clip.frames) / self.clip.fps

    def _map_shard_uncached(self, shard: str) -> np.ndarray:
        """Maps a shard: uint8 [frames, height, width, 3], read-only."""
        path = get_shard_path(self._store_location, shard)
        copy = None if is_local(path) else self._map_node_copy(shard)
        try:
            content = np.memmap(filesystem_of(path)[1], np.uint8, "r") if copy is None else copy
            return content.reshape(-1, self.clip.height, self.clip.width, 3)
        except (OSError, ValueError) as error:  # ValueError: it is empty or ends within a frame
            raise RuntimeError(f"{path}: {error}; run jobs/prepare.py, which decodes its videos again") from error

    @functools.cached_property
    def _node_cache(self) -> NodeCache:
        return open_node_cache(self.node_cache_gb, release=self._map_shard.cache_clear)

    def _map_node_copy(self, shard: str) -> np.ndarray:
        """Maps this node's copy of a remote shard: uint8 [bytes], read-only."""
        filesystem, path = filesystem_of(get_shard_path(self._store_location, shard))
        return self._node_cache.map(f"{self.decode_config.key}/{shard}.u8", filesystem, path, sha256=shard)

    def _decode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        filesystem, _ = filesystem_of(self.root)
        path = self._paths[index].as_py()
        try:
            video = read_video(filesystem, path, self._limits)
            sampled = get_sandbox(self.clip, self._limits, self.decode_config.decoder).sample(video)
        except RejectedVideo as rejected:
            raise RuntimeError(
                f"{path}: gave a clip when the dataset was prepared, but is now rejected: {rejected}; "
                "run jobs/prepare.py with the same experiment"
            ) from rejected
        return sampled.clip, sampled.times_s


def open_node_cache(limit_gb: float | None, release: Callable[[], None] = lambda: None) -> NodeCache:
    """Opens this node's cache of remote shards. `release` must drop the maps of this process."""
    return NodeCache(_node_folder() / "shards", None if limit_gb is None else limit_gb * 1e9, release)


def compute_fingerprint(rows: pa.Table) -> str:
    """Hashes the ids, splits, file sizes and pixels of clips to 16 hex digits.

    Does not depend on the location of the videos or on which further frames are stored.
    """
    digest = hashlib.sha256()
    for first in range(0, len(rows), _READ_ROWS):
        columns = (rows[name].slice(first, _READ_ROWS).to_pylist() for name in ("id", "split", "size_bytes", "sha256"))
        digest.update("".join("{}\0{}\0{}\0{}\n".format(*row) for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()[:16]


def _count_values(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in values.value_counts().to_pylist()})


def _read_existing_text(location: str) -> str:
    text = read_text(location)
    if text is None:
        raise FileNotFoundError(f"{location}: no such file; run jobs/prepare.py with the same experiment")
    return text
