"""Videos -> shards: what a task decodes and writes, and what is known of every video that was ever decoded.

    <storage>/stores/<key of the recipe>/
        recipe.json                 what the key stands for
        shards/<sha256>.u8          the frames of up to SHARD_VIDEOS videos, raw uint8, one after another
        shards/<sha256>.parquet     a row for each video of a task, of ROW_SCHEMA; written after the frames
        sets/..., catalogs/...      see `store`

Every file of shards/ is named by the sha256 of its content, so a name never stands for other frames: decoding the same
video twice need not give the same result (a time-out, a crash), and both results are kept. Nothing counts as stored
before its Parquet file is there, and every file appears whole or not at all. A video is known by its path, size and
time of change, so adding videos decodes only these, and what a killed job has stored stays stored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.core.storage import PARTIAL, filesystem_of, join, write_if_different
from giffy_ray.data.catalog import Video
from giffy_ray.data.decode import RejectedVideo, Sampled, nearest_frames
from giffy_ray.data.sandbox import sandbox_for

SHARD_VIDEOS = 32
VERSION = 3  # of what decoding gives; raise it when the same video would give another clip
# What another try, a mended file server or a wider limit may change; such videos are tried again by `again`.
RETRYABLE_REASONS = ("missing", "unreadable", "not_file", "timeout", "crash", "memory", "too_large", "too_long")
ROW_SCHEMA = pa.schema(
    {
        "identity": pa.string(),
        "reason": pa.string(),  # null where there is a clip
        "detail": pa.string(),
        "shard": pa.string(),  # sha256 of its frames; null where none are kept
        "first": pa.int64(),  # frame of the shard
        "frames": pa.int32(),
        "times_s": pa.list_(pa.float64()),  # when each frame is shown; null where they are those of the clip
        "padded": pa.int32(),  # frames at the clip's end that repeat the last one of a short video
        "codec": pa.string(),
        "source_width": pa.int32(),
        "source_height": pa.int32(),
        "source_fps": pa.float64(),  # 0: the file does not say
        "seconds": pa.float64(),  # 0: the file does not say
        "hdr": pa.bool_(),  # PQ or HLG, tone-mapped
        "shard_bytes": pa.int64(),
        "sha256": pa.string(),  # of the clip: `clip.frames` frames, whatever else is kept of the video
    }
)
STALE_S = 3600  # after which a partial file belongs to a job that was killed
_READERS = 16  # files that are read at once: an object store takes some 20 ms to answer


@dataclass(frozen=True)
class DecodeConfig:
    """What is made of a video: the settings that clips are stored under."""

    clip: ClipConfig
    keep_all_frames: bool = False  # keep all source frames of the clip's span, not only those of the clip
    cache: bool = True  # false: only what became of each video is written down, no frames

    @property
    def key(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def decoder(self) -> str:
        return f"giffy_ray.data.decode:{'sample_source' if self.keep_all_frames else 'sample_clip'}"

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> DecodeConfig:
        fields = json.loads(text)
        return DecodeConfig(ClipConfig(**fields["clip"]), fields["keep_all_frames"], fields["cache"])


def chunks_of(videos: Sequence[Video]) -> list[pa.Table]:
    """The videos in tables of SHARD_VIDEOS rows (identity, path): one task and one shard each."""
    return [chunk_of(videos[first : first + SHARD_VIDEOS]) for first in range(0, len(videos), SHARD_VIDEOS)]


def chunk_of(videos: Iterable[Video]) -> pa.Table:
    return pa.Table.from_pylist([{"identity": video.identity, "path": video.path} for video in videos])


def decode_shard(
    videos: pa.Table,
    filesystem: fs.FileSystem,
    recipe: DecodeConfig,
    limits: LimitsConfig,
    location: str,
    decoder: str | None = None,
    root: str | None = None,
) -> pa.Table:
    """One task's work: the videos of one shard -> its two files. Returns their rows, of ROW_SCHEMA.

    `decoder` ("module:function") takes the place of the recipe's own, with its parameters and results. `root` is a
    folder on `filesystem` that all of the videos lie below: where it cannot be reached either, the fault is not the
    videos', and nothing is written.
    """
    sandbox = sandbox_for(recipe.clip, limits, decoder or recipe.decoder)
    rows, kept, first = [], [], 0
    for video in videos.to_pylist():
        row = {"identity": video["identity"]}
        try:
            sampled = sandbox.sample(read_video(filesystem, video["path"], limits))
        except RejectedVideo as rejected:
            row |= {"reason": rejected.reason, "detail": rejected.detail}
        else:
            row |= {"first": first, "frames": len(sampled.clip), **_facts_of(sampled, recipe)}
            first += len(sampled.clip)
            kept.append(sampled.clip)
        rows.append(row)
    pixels = np.concatenate(kept).tobytes() if kept and recipe.cache else b""
    shard = {"shard": hashlib.sha256(pixels).hexdigest()} if pixels else {}
    rows = [row | {"shard_bytes": len(pixels)} | (shard if "first" in row else {}) for row in rows]
    table = pa.Table.from_pylist(rows, ROW_SCHEMA)
    unread = any(row.get("reason") in ("missing", "unreadable") for row in rows)
    if unread and root is not None and not is_reachable(filesystem, root):
        return table
    if pixels:
        write_if_different(shard_path(location, shard["shard"]), pixels)
    _write_listing(location, table)
    return table


def is_reachable(filesystem: fs.FileSystem, folder: str) -> bool:
    try:
        return filesystem.get_file_info(folder).type == fs.FileType.Directory
    except Exception:  # whatever a filesystem raises for a network, a server or a permission that is gone
        return False


def shard_path(location: str, shard: str) -> str:
    return join(location, "shards", f"{shard}.u8")


def read_video(filesystem: fs.FileSystem, path: str, limits: LimitsConfig) -> bytes:
    """The bytes of a file, if it is one and not larger than `limits.file_mb`. Raises RejectedVideo."""
    most_bytes = limits.file_mb * 2**20
    try:
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise RejectedVideo("missing", "there is no such file")
        if kind != fs.FileType.File:  # a pipe would keep us waiting for ever
            raise RejectedVideo("not_file", "it is no regular file")
        with filesystem.open_input_stream(path) as stream:
            video = stream.read(most_bytes + 1)
    except RejectedVideo:
        raise
    except FileNotFoundError as error:
        raise RejectedVideo("missing", str(error)) from error
    except MemoryError as error:
        raise RejectedVideo("memory", f"reading it: {error}") from error
    except Exception as error:  # pyarrow raises more than OSError, ArrowInvalid for a key with an empty part
        raise RejectedVideo("unreadable", f"{type(error).__name__}: {error}") from error
    if len(video) > most_bytes:
        raise RejectedVideo("too_large", f"the file is over data.limits.file_mb={limits.file_mb}")
    return video


def read_index(location: str) -> pa.Table:
    """What is known of the videos that were ever decoded into this store: ROW_SCHEMA, one row for each identity."""
    return choose_rows(read_rows(location))


def read_rows(location: str) -> pa.Table:
    """The rows of all listings: ROW_SCHEMA. A video has several where two jobs decoded it, or it was tried again.

    A listing whose content does not fit its name counts as not there, and is named on stderr.
    """
    filesystem, base = filesystem_of(location)
    for info in filesystem.get_file_info(fs.FileSelector(f"{base}/shards", allow_not_found=True)):
        if info.path.endswith(PARTIAL) and time.time() - info.mtime_ns / 1e9 > STALE_S:
            _delete(filesystem, info.path)
    tables = []
    for path, table in read_listings(location).items():
        if table is None:
            print(f"{path}: damaged; the videos that it lists are decoded again", file=sys.stderr)
        else:
            tables.append(table)
    return pa.concat_tables([ROW_SCHEMA.empty_table(), *tables])


def read_listings(location: str) -> dict[str, pa.Table | None]:
    """The rows of each listing of a store, by its path; none where its content does not fit its name."""
    filesystem, base = filesystem_of(join(location, "shards"))
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(paths, readers.map(functools.partial(_read_listing, filesystem), paths), strict=True))


def replace_listing(location: str, path: str, rows: pa.Table) -> None:
    """Puts a listing of `rows`, which may be empty, in the place of the one at `path`."""
    if len(rows):
        _write_listing(location, rows)
    _delete(filesystem_of(location)[0], path)


def choose_rows(rows: pa.Table) -> pa.Table:
    """One row for each identity, the same one whatever the order of `rows`.

    A clip goes before a reject, and a reason that stays before one that may pass.
    """
    if not len(rows):
        return rows
    passing = pc.is_in(rows["reason"], value_set=pa.array(RETRYABLE_REASONS))  # type: ignore[attr-defined]
    rank = pc.add(rows["reason"].is_valid().cast(pa.int8()), passing.cast(pa.int8()))  # type: ignore[attr-defined]
    order = ["identity", "rank", "reason", "detail", "sha256", "shard", "first"]
    ordered = rows.append_column("rank", rank).sort_by([(name, "ascending") for name in order])
    identities = np.asarray(ordered["identity"])
    starts = np.flatnonzero(np.r_[True, identities[1:] != identities[:-1]])
    return ordered.take(starts).drop_columns("rank")


def write_recipe(location: str, recipe: DecodeConfig) -> None:
    write_if_different(join(location, "recipe.json"), recipe.to_json().encode())


def damaged_shards(location: str, rows: pa.Table, contents: bool = True) -> dict[str, str]:
    """The shards in `rows` whose frames are not what was written: name -> what is wrong with it.

    Without `contents` only their sizes are looked at, which costs one listing of the store.
    """
    filesystem, base = filesystem_of(join(location, "shards"))
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    sizes = {_stem(info.path): info.size for info in infos if info.path.endswith(".u8")}
    wanted = rows.filter(rows["shard"].is_valid()).group_by("shard").aggregate([("shard_bytes", "max")])

    def problem(shard: str, size: int) -> str:
        if shard not in sizes:
            return "it is gone"
        if sizes[shard] != size:
            return f"it has {sizes[shard]} bytes and should have {size}"
        if contents:
            with filesystem.open_input_stream(f"{base}/{shard}.u8") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            if found != shard:
                return f"its sha256 is {found[:12]}... and should be {shard[:12]}..."
        return ""

    pairs = zip(wanted["shard"].to_pylist(), wanted["shard_bytes_max"].to_pylist(), strict=True)
    problems = {shard: problem(shard, size) for shard, size in sorted(pairs)}
    return {shard: found for shard, found in problems.items() if found}


def are_in(rows: pa.Table, shards: Collection[str]) -> pa.ChunkedArray:
    """Boolean [rows]: whether the frames of each row are in one of these shards. False where none are kept."""
    return pc.is_in(rows["shard"], value_set=pa.array(shards, pa.string()))  # type: ignore[attr-defined]


def members_of(rows: pa.Table, shards: Collection[str]) -> dict[str, list[str]]:
    """Of each shard that has rows, the identities of its videos in the order of their frames."""
    found = rows.filter(are_in(rows, shards)).sort_by([("shard", "ascending"), ("first", "ascending")])
    members: dict[str, dict[str, None]] = defaultdict(dict)
    for shard, identity in zip(found["shard"].to_pylist(), found["identity"].to_pylist(), strict=True):
        members[shard][identity] = None  # once, where two jobs have decoded it
    return {shard: list(identities) for shard, identities in members.items()}


def delete_shards(location: str, shards: Collection[str]) -> None:
    """Removes shards, the rows of their clips and listings that are damaged: these videos are decoded again."""
    filesystem, base = filesystem_of(join(location, "shards"))
    for info in filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True)):
        if info.path.endswith(".parquet"):  # these first: what is not listed is not stored
            listing = _read_listing(filesystem, info.path)
            if listing is not None:
                stays = listing.filter(pc.invert(are_in(listing, shards)))  # type: ignore[attr-defined]
                if len(stays) == len(listing):
                    continue
                replace_listing(location, info.path, stays)
            else:
                _delete(filesystem, info.path)
    for shard in shards:
        _delete(filesystem, f"{base}/{shard}.u8")


def _write_listing(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    listing = sink.getvalue().to_pybytes()
    write_if_different(join(location, "shards", f"{hashlib.sha256(listing).hexdigest()}.parquet"), listing)


def _read_listing(filesystem: fs.FileSystem, path: str) -> pa.Table | None:
    """The rows of a listing, or none where its content does not fit its name."""
    try:
        with filesystem.open_input_stream(path) as stream:
            listing = stream.read()
    except FileNotFoundError:  # another job has removed it since the folder was listed
        return ROW_SCHEMA.empty_table()
    if hashlib.sha256(listing).hexdigest() != _stem(path):
        return None
    rows = pq.ParquetFile(pa.BufferReader(listing)).read()  # in half of the time that pq.read_table takes
    return rows if rows.schema.equals(ROW_SCHEMA) else pq.read_table(pa.BufferReader(listing), schema=ROW_SCHEMA)


def _delete(filesystem: fs.FileSystem, path: str) -> None:
    with suppress(FileNotFoundError):  # of two jobs at once, the other has removed it
        filesystem.delete_file(path)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _facts_of(sampled: Sampled, recipe: DecodeConfig) -> dict:
    source = sampled.source
    clip = sampled.clip[nearest_frames(sampled.times_s, recipe.clip)] if recipe.keep_all_frames else sampled.clip
    return {
        "sha256": hashlib.sha256(np.ascontiguousarray(clip).data).hexdigest(),
        "times_s": sampled.times_s.tolist() if recipe.keep_all_frames else None,
        "padded": sampled.padded,
        "codec": source.codec,
        "source_width": source.width,
        "source_height": source.height,
        "source_fps": source.fps,
        "seconds": source.seconds,
        "hdr": source.hdr,
    }
