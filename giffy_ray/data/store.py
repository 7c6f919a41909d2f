"""Decoded clips on disk, written once and memory-mapped: the store of one catalog at one ClipConfig.

    <storage>/stores/<key>/
        clips-00000.u8 ...    up to SHARD_CLIPS clips each, raw uint8, one after another
        rows.parquet          id, category, split, padded, shard, index: one row a clip, sorted by id
        rejects.parquet       id, reason, detail: the videos that gave no clip
        store.json            counts and settings; written last, so a store without it is not finished

Shards are written by the tasks that decode them, straight to the storage, so no clip passes through the driver.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from giffy_ray.config import ClipConfig
from giffy_ray.data.catalog import Catalog
from giffy_ray.data.decode import RejectedVideo, sample_clip
from giffy_ray.storage import filesystem_of, is_local, join, read_text, write_text

SHARD_CLIPS = 32
VERSION = 1  # of what decoding gives; raise it when the same video would give another clip
ROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "category": pa.string(),
        "split": pa.string(),
        "padded": pa.int32(),
        "shard": pa.int32(),
        "index": pa.int32(),
    }
)
REJECT_SCHEMA = pa.schema({"id": pa.string(), "reason": pa.string(), "detail": pa.string()})
OUTCOME_SCHEMA = pa.unify_schemas([ROW_SCHEMA, REJECT_SCHEMA])


def store_key(catalog: Catalog, clip: ClipConfig) -> str:
    """Names the store of these videos at these settings; another video or setting is another store."""
    settings = json.dumps([VERSION, catalog.name, catalog.fingerprint, dataclasses.asdict(clip)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def decode_shard(videos: pa.Table, filesystem: fs.FileSystem, clip: ClipConfig, location: str) -> pa.Table:
    """One task's work: rows (shard, id, path, category, split) of one shard -> its file, and what became of each.

    Returns a row for each video: of OUTCOME_SCHEMA, with `reason` null where there is a clip.
    """
    clips, outcomes = [], []
    for video in videos.to_pylist():
        outcome = {name: video[name] for name in ("id", "category", "split")}
        try:
            sampled = sample_clip(_read(filesystem, video["path"]), clip)
        except RejectedVideo as rejected:
            outcome |= {"reason": rejected.reason, "detail": rejected.detail}
        else:
            outcome |= {"padded": sampled.padded, "shard": video["shard"], "index": len(clips)}
            clips.append(sampled.clip)
        outcomes.append(outcome)
    if clips:
        target, base = filesystem_of(location)
        target.create_dir(base, recursive=True)
        with target.open_output_stream(f"{base}/{_shard_name(videos['shard'][0].as_py())}") as stream:
            for one in clips:
                stream.write(one)
    return pa.Table.from_pylist(outcomes, OUTCOME_SCHEMA)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except OSError as error:
        raise RejectedVideo("unreadable", str(error)) from error


def finish_store(location: str, catalog: Catalog, clip: ClipConfig, outcomes: Sequence[Mapping]) -> None:
    """Writes the tables and the manifest of a store whose shards are there. Every video must be accounted for."""
    rows = [outcome for outcome in outcomes if outcome["reason"] is None]
    rejects = [outcome for outcome in outcomes if outcome["reason"] is not None]
    if {outcome["id"] for outcome in outcomes} != {video.id for video in catalog.videos}:
        raise RuntimeError(
            f"{location}: {len(rows)} clips and {len(rejects)} rejects do not account for the "
            f"{len(catalog.videos)} videos of {catalog.name}"
        )
    filesystem, base = filesystem_of(location)
    filesystem.create_dir(base, recursive=True)
    for name, schema, table in (("rows", ROW_SCHEMA, rows), ("rejects", REJECT_SCHEMA, rejects)):
        ordered = sorted(table, key=lambda row: row["id"])
        pq.write_table(pa.Table.from_pylist(ordered, schema), f"{base}/{name}.parquet", filesystem=filesystem)
    manifest = {
        "version": VERSION,
        "name": catalog.name,
        "fingerprint": catalog.fingerprint,
        "clip": dataclasses.asdict(clip),
        "clips": len(rows),
        "rejects": len(rejects),
    }
    write_text(join(location, "store.json"), json.dumps(manifest, indent=2))


def is_finished(location: str) -> bool:
    return read_text(join(location, "store.json")) is not None


class Store:
    """Random access to the clips of a finished store. Opening one on s3:// or gs:// copies it to this node once."""

    def __init__(self, location: str):
        self.location = location
        folder = _on_this_node(location)
        manifest = json.loads((folder / "store.json").read_text())
        self.name: str = manifest["name"]  # of the data set
        self.fingerprint: str = manifest["fingerprint"]
        self.clip = ClipConfig(**manifest["clip"])
        self.rejects: list[dict] = pq.read_table(folder / "rejects.parquet").to_pylist()
        rows = pq.read_table(folder / "rows.parquet")
        self.ids: list[str] = rows["id"].to_pylist()
        self.categories: list[str] = rows["category"].to_pylist()
        self._splits = np.asarray(rows["split"].to_pylist(), dtype=str)
        self.padded = rows["padded"].to_numpy()
        self._places = np.stack([rows["shard"].to_numpy(), rows["index"].to_numpy()], axis=1)
        shape = (self.clip.frames, self.clip.height, self.clip.width, 3)
        self._shards = {
            int(shard): np.memmap(folder / _shard_name(shard), np.uint8, "r").reshape(-1, *shape)
            for shard in np.unique(self._places[:, 0])
        }

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, split: str) -> np.ndarray:
        """int64: the rows of the clips of a split, in order of their ids."""
        return np.flatnonzero(self._splits == split)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copies clips out of the memory map: uint8 [len(rows), frames, height, width, 3]."""
        clips = np.empty((len(rows), self.clip.frames, self.clip.height, self.clip.width, 3), np.uint8)
        for place, (shard, index) in enumerate(self._places[rows]):
            clips[place] = self._shards[int(shard)][index]
        return clips

    def reject_counts(self) -> Counter[str]:
        return Counter(reject["reason"] for reject in self.rejects)


def _shard_name(shard: int) -> str:
    return f"clips-{shard:05d}.u8"


def _on_this_node(location: str) -> Path:
    """The store's folder on a local disk. A remote one is copied whole, then renamed, so readers see all or nothing."""
    filesystem, base = filesystem_of(location)
    if is_local(location):
        return Path(base)
    cache = Path(tempfile.gettempdir()) / f"giffy_ray-{os.getuid()}" / "stores"
    folder = cache / hashlib.sha256(location.encode()).hexdigest()[:16]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=cache)
        fs.copy_files(base, partial, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        try:
            os.rename(partial, folder)
        except OSError:  # another worker of this node was first
            shutil.rmtree(partial)
    return folder
