"""Videos -> shards: what a task decodes and writes, and what is known of every video that was ever decoded.

    <storage>/stores/<key of the recipe>/
        recipe.json             what the key stands for
        shards/<members>.u8         the frames of up to SHARD_VIDEOS videos, raw uint8, one after another
        shards/<members>.parquet    a row for each of these videos, of ROW_SCHEMA; written after the frames
        sets/...                    see `store`

A shard is named by the identities of its videos, so two jobs that decode the same ones write the same file. Nothing
counts as stored before its Parquet file is there, and every file appears whole or not at all. A video is known by its
path, size and time of change, so adding videos decodes only these, and what a killed job has stored stays stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.catalog import Video
from giffy_ray.data.decode import RejectedVideo, Sampled
from giffy_ray.data.sandbox import sandbox_for
from giffy_ray.storage import PARTIAL, filesystem_of, join, write_bytes, write_text

SHARD_VIDEOS = 32
VERSION = 3  # of what decoding gives; raise it when the same video would give another clip
# What another try, a mended file server or a wider limit may change; such videos are tried again by `again`.
PASSING = ("missing", "unreadable", "not_file", "timeout", "crash", "memory", "too_large", "too_long")
ROW_SCHEMA = pa.schema(
    {
        "identity": pa.string(),
        "reason": pa.string(),  # null where there is a clip
        "detail": pa.string(),
        "shard": pa.string(),
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
        "sha256": pa.string(),  # of the shard
    }
)
_STALE_S = 3600  # after which a partial file belongs to a job that was killed


@dataclass(frozen=True)
class Recipe:
    """What is made of a video: the settings that clips are stored under."""

    clip: ClipConfig
    every: bool = False  # keep all source frames of the clip's span, not only those of the clip
    keep: bool = True  # false: only what became of each video is written down, no frames

    @property
    def key(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def decoder(self) -> str:
        return f"giffy_ray.data.decode:{'sample_source' if self.every else 'sample_clip'}"

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        fields = json.loads(text)
        return Recipe(ClipConfig(**fields["clip"]), fields["every"], fields["keep"])


def chunks_of(videos: Sequence[Video]) -> list[pa.Table]:
    """The videos in tables of SHARD_VIDEOS rows (identity, path): one task and one shard each."""
    rows = [{"identity": video.identity, "path": video.path} for video in videos]
    return [pa.Table.from_pylist(rows[first : first + SHARD_VIDEOS]) for first in range(0, len(rows), SHARD_VIDEOS)]


def decode_shard(
    videos: pa.Table,
    filesystem: fs.FileSystem,
    recipe: Recipe,
    limits: LimitsConfig,
    location: str,
    decoder: str | None = None,
) -> pa.Table:
    """One task's work: the videos of one shard -> its two files. Returns their rows, of ROW_SCHEMA.

    `decoder` ("module:function") takes the place of the recipe's own, with its parameters and results.
    """
    sandbox = sandbox_for(recipe.clip, limits, decoder or recipe.decoder)
    name = hashlib.sha256("".join(videos["identity"].to_pylist()).encode()).hexdigest()[:24]
    rows, kept, first = [], [], 0
    for video in videos.to_pylist():
        row = {"identity": video["identity"]}
        try:
            sampled = sandbox.sample(read_video(filesystem, video["path"], limits))
        except RejectedVideo as rejected:
            row |= {"reason": rejected.reason, "detail": rejected.detail}
        else:
            row |= {"shard": name, "first": first, "frames": len(sampled.clip), **_facts_of(sampled, recipe)}
            first += len(sampled.clip)
            kept.append(sampled.clip)
        rows.append(row)
    pixels = np.concatenate(kept).tobytes() if kept and recipe.keep else b""
    digest = hashlib.sha256(pixels).hexdigest()
    table = pa.Table.from_pylist([row | {"shard_bytes": len(pixels), "sha256": digest} for row in rows], ROW_SCHEMA)
    if pixels:
        write_bytes(shard_path(location, name), pixels)
    listing = pa.BufferOutputStream()
    pq.write_table(table, listing)
    write_bytes(join(location, "shards", f"{name}.parquet"), listing.getvalue().to_pybytes())
    return table


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
    except FileNotFoundError as error:
        raise RejectedVideo("missing", str(error)) from error
    except OSError as error:
        raise RejectedVideo("unreadable", str(error)) from error
    if len(video) > most_bytes:
        raise RejectedVideo("too_large", f"the file is over data.limits.file_mb={limits.file_mb}")
    return video


def read_index(location: str) -> pa.Table:
    """What is known of the videos that were ever decoded into this store: ROW_SCHEMA, one row for each identity."""
    filesystem, base = filesystem_of(location)
    paths = []
    for info in filesystem.get_file_info(fs.FileSelector(f"{base}/shards", allow_not_found=True)):
        if info.path.endswith(".parquet"):
            paths.append(info.path)
        elif info.path.endswith(PARTIAL) and time.time() - info.mtime_ns / 1e9 > _STALE_S:
            filesystem.delete_file(info.path)
    if not paths:
        return ROW_SCHEMA.empty_table()
    index = pq.read_table(sorted(paths), filesystem=filesystem, schema=ROW_SCHEMA)
    # A video may be in two shards: of jobs at the same time, or tried again. A clip goes before a reject.
    order = np.argsort(np.asarray(index["shard"].is_null(), dtype=bool), kind="stable")
    identities = np.asarray(index["identity"])[order]
    _, places = np.unique(identities, return_index=True)
    return index.take(order[np.sort(places)])


def write_recipe(location: str, recipe: Recipe) -> None:
    write_text(join(location, "recipe.json"), recipe.to_json())


def damaged_shards(location: str, index: pa.Table) -> dict[str, str]:
    """The shards in the index whose frames are not what was written: name -> what is wrong with it."""
    shards = index.filter(index["shard"].is_valid()).group_by(["shard", "shard_bytes", "sha256"]).aggregate([])
    damaged = {}
    for shard in shards.to_pylist():
        if not shard["shard_bytes"]:
            continue
        filesystem, path = filesystem_of(shard_path(location, shard["shard"]))
        if filesystem.get_file_info(path).type != fs.FileType.File:
            damaged[shard["shard"]] = "it is gone"
            continue
        with filesystem.open_input_stream(path) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != shard["sha256"]:
            damaged[shard["shard"]] = f"its sha256 is {found[:12]}... and should be {shard['sha256'][:12]}..."
    return damaged


def forget(location: str, shards: Iterable[str]) -> None:
    """Removes shards, so that their videos are decoded again."""
    for shard in shards:
        filesystem, path = filesystem_of(join(location, "shards", shard))
        for suffix in (".parquet", ".u8"):  # in this order: what is not listed is not stored
            if filesystem.get_file_info(path + suffix).type == fs.FileType.File:
                filesystem.delete_file(path + suffix)


def _facts_of(sampled: Sampled, recipe: Recipe) -> dict:
    source = sampled.source
    return {
        "times_s": sampled.times_s.tolist() if recipe.every else None,
        "padded": sampled.padded,
        "codec": source.codec,
        "source_width": source.width,
        "source_height": source.height,
        "source_fps": source.fps,
        "seconds": source.seconds,
        "hdr": source.hdr,
    }
