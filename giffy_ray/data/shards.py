"""Decodes videos into shards and records the outcome of every video that was ever decoded.

    <storage>/stores/<key of the decode config>/
        recipe.json                 the decode config that the key stands for
        shards/<sha256>.u8          frames of up to SHARD_VIDEOS videos: raw uint8, concatenated
        shards/<sha256>.parquet     listing: one row of ROW_SCHEMA per video of a task, written after the frames
        sets/..., catalogs/...      see `clip_dataset`

Every file in shards/ is named after the sha256 of its content, so a name never refers to different frames. Decoding a
video twice may give different results (a timeout, a crash); both are stored. A video counts as stored only once its
listing exists, and files appear atomically. A video is identified by its path, size and modification time. So adding
videos decodes only the new ones, and the work of a killed job is not lost.

In this module `location` is the path or URI of a store.
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
from giffy_ray.core.storage import PARTIAL_SUFFIX, filesystem_of, join, write_if_changed
from giffy_ray.data.catalog import Video
from giffy_ray.data.decode import DecodedClip, RejectedVideo, nearest_frame_indices
from giffy_ray.data.sandbox import get_sandbox

SHARD_VIDEOS = 32
VERSION = 3  # of the decoder; increment when the same video would give a different clip
# Possibly transient reject reasons, retried by prepare(again=True).
RETRYABLE_REASONS = ("missing", "unreadable", "not_file", "timeout", "crash", "memory", "too_large", "too_long")
ROW_SCHEMA = pa.schema(
    {
        "identity": pa.string(),
        "reason": pa.string(),  # null: the video gave a clip
        "detail": pa.string(),
        "shard": pa.string(),  # sha256 of the shard's frames; null: no frames are cached
        "first": pa.int64(),  # index of the first frame in the shard
        "frames": pa.int32(),
        "times_s": pa.list_(pa.float64()),  # presentation time of each frame; null: the clip's regular times
        "padded": pa.int32(),  # frames at the clip's end that repeat the last frame of a short video
        "codec": pa.string(),
        "source_width": pa.int32(),
        "source_height": pa.int32(),
        "source_fps": pa.float64(),  # 0: not in the file
        "seconds": pa.float64(),  # 0: not in the file
        "hdr": pa.bool_(),  # PQ or HLG, tone-mapped
        "shard_bytes": pa.int64(),
        "sha256": pa.string(),  # of the clip's `clip.frames` frames, even if more frames are cached
    }
)
STALE_S = 3600  # partial files older than this belong to a killed job
_READ_THREADS = 16  # an object store takes about 20 ms to answer a request


@dataclass(frozen=True)
class DecodeConfig:
    """Settings that determine what is stored of a video. Each config has its own store."""

    clip: ClipConfig
    keep_all_frames: bool = False  # store all source frames in the clip's time span, not only the clip's frames
    cache: bool = True  # false: record only the outcome of each video and store no frames

    @property
    def key(self) -> str:
        """Name of the store's folder: 16 hex digits, a hash of the config and the decoder's version."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def decoder(self) -> str:
        """The function that samples a video, as "module:function"."""
        return f"giffy_ray.data.decode:{'sample_all_frames' if self.keep_all_frames else 'sample_clip'}"

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> DecodeConfig:
        fields = json.loads(text)
        return DecodeConfig(ClipConfig(**fields["clip"]), fields["keep_all_frames"], fields["cache"])


def chunk_videos(videos: Sequence[Video]) -> list[pa.Table]:
    """Divides videos into tables of SHARD_VIDEOS rows (identity, path). Each is one task and one shard."""
    return [make_chunk(videos[first : first + SHARD_VIDEOS]) for first in range(0, len(videos), SHARD_VIDEOS)]


def make_chunk(videos: Iterable[Video]) -> pa.Table:
    """Returns the input of one decode task: a table with columns identity and path."""
    return pa.Table.from_pylist([{"identity": video.identity, "path": video.path} for video in videos])


def decode_shard(
    videos: pa.Table,
    filesystem: fs.FileSystem,
    decode_config: DecodeConfig,
    limits: LimitsConfig,
    location: str,
    decoder: str | None = None,
    root: str | None = None,
) -> pa.Table:
    """Decodes the videos of one shard and writes its frames and its listing. This is the body of a decode task.

    Args:
        videos: Table with columns identity and path, as returned by `make_chunk`.
        filesystem: File system of the videos.
        decode_config: What to store of each video.
        limits: Limits beyond which a video is rejected.
        location: Path or URI of the store.
        decoder: "module:function" to use instead of `decode_config.decoder`, with the same parameters and result.
        root: Folder on `filesystem` that contains all videos. If videos are unreadable and `root` is unreachable too,
            the videos are not at fault and nothing is written.

    Returns:
        One row of ROW_SCHEMA per video.
    """
    sandbox = get_sandbox(decode_config.clip, limits, decoder or decode_config.decoder)
    rows, clips, first = [], [], 0
    for video in videos.to_pylist():
        row = {"identity": video["identity"]}
        try:
            sampled = sandbox.sample(read_video(filesystem, video["path"], limits))
        except RejectedVideo as rejected:
            row |= {"reason": rejected.reason, "detail": rejected.detail}
        else:
            row |= {"first": first, "frames": len(sampled.clip), **_describe_clip(sampled, decode_config)}
            first += len(sampled.clip)
            clips.append(sampled.clip)
        rows.append(row)
    pixels = np.concatenate(clips).tobytes() if clips and decode_config.cache else b""
    shard = hashlib.sha256(pixels).hexdigest() if pixels else None
    for row in rows:
        row["shard_bytes"] = len(pixels)
        if shard is not None and "first" in row:
            row["shard"] = shard
    table = pa.Table.from_pylist(rows, ROW_SCHEMA)
    any_unread = any(row.get("reason") in ("missing", "unreadable") for row in rows)
    if any_unread and root is not None and not is_reachable(filesystem, root):
        return table
    if shard is not None:
        write_if_changed(get_shard_path(location, shard), pixels)
    _write_listing(location, table)
    return table


def is_reachable(filesystem: fs.FileSystem, folder: str) -> bool:
    try:
        return filesystem.get_file_info(folder).type == fs.FileType.Directory
    except Exception:  # file systems raise various errors for a lost network, server or permission
        return False


def get_shard_path(location: str, shard: str) -> str:
    """Returns the path or URI of a shard's frames."""
    return join(location, "shards", f"{shard}.u8")


def read_video(filesystem: fs.FileSystem, path: str, limits: LimitsConfig) -> bytes:
    """Reads a whole video file.

    Raises:
        RejectedVideo: `path` is missing, unreadable, not a regular file, or larger than `limits.file_mb`.
    """
    max_bytes = limits.file_mb * 2**20
    try:
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise RejectedVideo("missing", "there is no such file")
        if kind != fs.FileType.File:  # reading a pipe would block forever
            raise RejectedVideo("not_file", "it is not a regular file")
        with filesystem.open_input_stream(path) as stream:
            video = stream.read(max_bytes + 1)
    except RejectedVideo:
        raise
    except FileNotFoundError as error:
        raise RejectedVideo("missing", str(error)) from error
    except MemoryError as error:
        raise RejectedVideo("memory", f"reading it: {error}") from error
    except Exception as error:  # pyarrow also raises non-OSErrors, such as ArrowInvalid for a key with an empty part
        raise RejectedVideo("unreadable", f"{type(error).__name__}: {error}") from error
    if len(video) > max_bytes:
        raise RejectedVideo("too_large", f"the file is over data.limits.file_mb={limits.file_mb}")
    return video


def read_index(location: str) -> pa.Table:
    """Returns one row of ROW_SCHEMA for each identity that was ever decoded into this store."""
    return choose_rows(read_rows(location))


def read_rows(location: str) -> pa.Table:
    """Reads the rows of all listings: ROW_SCHEMA. Removes stale partial files.

    A video has several rows if two jobs decoded it or it was retried. Listings that do not match their checksum are
    skipped and reported on stderr.
    """
    filesystem, base = filesystem_of(location)
    for info in filesystem.get_file_info(fs.FileSelector(f"{base}/shards", allow_not_found=True)):
        if info.path.endswith(PARTIAL_SUFFIX) and time.time() - info.mtime_ns / 1e9 > STALE_S:
            _delete(filesystem, info.path)
    tables = []
    for path, table in read_listings(location).items():
        if table is None:
            print(f"{path}: damaged; decoding its videos again", file=sys.stderr)
        else:
            tables.append(table)
    return pa.concat_tables([ROW_SCHEMA.empty_table(), *tables])


def read_listings(location: str) -> dict[str, pa.Table | None]:
    """Reads all listings of a store: path to rows, or to None if the content does not match its checksum."""
    filesystem, base = filesystem_of(join(location, "shards"))
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    with ThreadPoolExecutor(_READ_THREADS) as readers:
        return dict(zip(paths, readers.map(functools.partial(_read_listing, filesystem), paths), strict=True))


def replace_listing(location: str, path: str, rows: pa.Table) -> None:
    """Replaces the listing at `path` by one of `rows`, or only deletes it if there are none."""
    if len(rows):
        _write_listing(location, rows)
    _delete(filesystem_of(location)[0], path)


def choose_rows(rows: pa.Table) -> pa.Table:
    """Selects one row per identity, independently of the order of `rows`.

    Clips take precedence over rejects, and permanent rejects over retryable ones.
    """
    if not len(rows):
        return rows
    retryable = pc.is_in(rows["reason"], value_set=pa.array(RETRYABLE_REASONS))  # type: ignore[attr-defined]
    rank = pc.add(rows["reason"].is_valid().cast(pa.int8()), retryable.cast(pa.int8()))  # type: ignore[attr-defined]
    order = ["identity", "rank", "reason", "detail", "sha256", "shard", "first"]
    ordered = rows.append_column("rank", rank).sort_by([(name, "ascending") for name in order])
    identities = np.asarray(ordered["identity"])
    starts = np.flatnonzero(np.r_[True, identities[1:] != identities[:-1]])
    return ordered.take(starts).drop_columns("rank")


def write_decode_config(location: str, decode_config: DecodeConfig) -> None:
    write_if_changed(join(location, "recipe.json"), decode_config.to_json().encode())


def find_damaged_shards(location: str, rows: pa.Table, contents: bool = True) -> dict[str, str]:
    """Finds missing or damaged shards among those that `rows` refers to.

    Args:
        location: Path or URI of the store.
        rows: Table of ROW_SCHEMA.
        contents: Compare checksums, which reads every shard. Otherwise compare sizes, which costs one folder listing.

    Returns:
        Name of each damaged shard to a description of the damage.
    """
    filesystem, base = filesystem_of(join(location, "shards"))
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    sizes = {_get_stem(info.path): info.size for info in infos if info.path.endswith(".u8")}
    expected = rows.filter(rows["shard"].is_valid()).group_by("shard").aggregate([("shard_bytes", "max")])

    def find_damage(shard: str, size: int) -> str:
        if shard not in sizes:
            return "it is missing"
        if sizes[shard] != size:
            return f"it has {sizes[shard]} bytes instead of {size}"
        if contents:
            with filesystem.open_input_stream(f"{base}/{shard}.u8") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            if sha256 != shard:
                return f"its sha256 is {sha256[:12]}... instead of {shard[:12]}..."
        return ""

    pairs = zip(expected["shard"].to_pylist(), expected["shard_bytes_max"].to_pylist(), strict=True)
    damage_by_shard = {shard: find_damage(shard, size) for shard, size in sorted(pairs)}
    return {shard: damage for shard, damage in damage_by_shard.items() if damage}


def is_in_shards(rows: pa.Table, shards: Collection[str]) -> pa.ChunkedArray:
    """Returns bool [rows]: whether a row's frames are in one of `shards`. False where no frames are cached."""
    return pc.is_in(rows["shard"], value_set=pa.array(shards, pa.string()))  # type: ignore[attr-defined]


def group_by_shard(rows: pa.Table, shards: Collection[str]) -> dict[str, list[str]]:
    """Returns the identities of the videos of each shard that has rows, in the order of their frames."""
    ordered = rows.filter(is_in_shards(rows, shards)).sort_by([("shard", "ascending"), ("first", "ascending")])
    members: dict[str, dict[str, None]] = defaultdict(dict)
    for shard, identity in zip(ordered["shard"].to_pylist(), ordered["identity"].to_pylist(), strict=True):
        members[shard][identity] = None  # a dict removes duplicates, which appear if two jobs decoded a video
    return {shard: list(identities) for shard, identities in members.items()}


def delete_shards(location: str, shards: Collection[str]) -> None:
    """Deletes shards, the rows of their clips, and all damaged listings, so that these videos are decoded again."""
    filesystem, base = filesystem_of(join(location, "shards"))
    for info in filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True)):
        if info.path.endswith(".parquet"):  # before the frames: a video counts as stored while it is listed
            listing = _read_listing(filesystem, info.path)
            if listing is not None:
                remaining = listing.filter(pc.invert(is_in_shards(listing, shards)))  # type: ignore[attr-defined]
                if len(remaining) == len(listing):
                    continue
                replace_listing(location, info.path, remaining)
            else:
                _delete(filesystem, info.path)
    for shard in shards:
        _delete(filesystem, f"{base}/{shard}.u8")


def _write_listing(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    listing = sink.getvalue().to_pybytes()
    write_if_changed(join(location, "shards", f"{hashlib.sha256(listing).hexdigest()}.parquet"), listing)


def _read_listing(filesystem: fs.FileSystem, path: str) -> pa.Table | None:
    """Returns the rows of a listing, or None if its content does not match its checksum."""
    try:
        with filesystem.open_input_stream(path) as stream:
            listing = stream.read()
    except FileNotFoundError:  # another job has deleted it since the folder was listed
        return ROW_SCHEMA.empty_table()
    if hashlib.sha256(listing).hexdigest() != _get_stem(path):
        return None
    rows = pq.ParquetFile(pa.BufferReader(listing)).read()  # takes half the time of pq.read_table
    return rows if rows.schema.equals(ROW_SCHEMA) else pq.read_table(pa.BufferReader(listing), schema=ROW_SCHEMA)


def _delete(filesystem: fs.FileSystem, path: str) -> None:
    with suppress(FileNotFoundError):  # a concurrent job may have deleted it
        filesystem.delete_file(path)


def _get_stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _describe_clip(sampled: DecodedClip, decode_config: DecodeConfig) -> dict:
    """Returns the columns of ROW_SCHEMA that follow from the sampled frames and their source."""
    source = sampled.source
    all_frames = decode_config.keep_all_frames
    clip = sampled.clip[nearest_frame_indices(sampled.times_s, decode_config.clip)] if all_frames else sampled.clip
    return {
        "sha256": hashlib.sha256(np.ascontiguousarray(clip).data).hexdigest(),
        "times_s": sampled.times_s.tolist() if all_frames else None,
        "padded": sampled.padding_frames,
        "codec": source.codec,
        "source_width": source.width,
        "source_height": source.height,
        "source_fps": source.fps,
        "seconds": source.duration_s,
        "hdr": source.hdr,
    }
