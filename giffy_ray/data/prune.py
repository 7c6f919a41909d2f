"""Finds and removes what neither the videos of an experiment nor a running job needs: stores, sets, shards, videos.

Needed are the built-in videos and the set of the experiment, shards with frames of its videos, and whatever a live
lease stands for: a run with one names its set in a file of its folder, and a job that decodes holds one in its store.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from giffy_ray.config import Experiment, override
from giffy_ray.core import run_lock
from giffy_ray.core.storage import PARTIAL, filesystem_of, is_local, join, read_text
from giffy_ray.data import clip_dataset as stores
from giffy_ray.data import shards
from giffy_ray.data.catalog import Catalog, read_catalog
from giffy_ray.data.shards import STALE_S, VERSION, DecodeConfig
from giffy_ray.data.synthetic import dataset

DATA_SET_LOCATION = "data_set_location"  # a file of a run's folder
_JOBS = "jobs"  # a folder of a store, with a lease of each job that decodes into it
_READERS = 16


@dataclass(frozen=True)
class Removal:
    """Files that nothing needs, of one kind and for one reason."""

    what: str
    files: int
    bytes: int
    why: str
    remove: Callable[[], None]


class Pruning(NamedTuple):
    removals: list[Removal]
    kept: list[str]  # why files that the experiment does not need stay


class _Set(NamedTuple):
    store: str  # key
    key: str


class _InUse(NamedTuple):
    """What jobs that are running use."""

    sets: set[_Set]
    stores: set[str]
    unknown: list[str]  # jobs of which it is not known, so nothing may be removed
    reasons: list[str]


@contextmanager
def protected(experiment: Experiment, location: str) -> Iterator[None]:
    """Inside, `plan` leaves the store at `location` and the built-in videos alone."""
    job = override(experiment, {"storage": join(location, _JOBS), "name": uuid.uuid4().hex})
    claim = run_lock.RunLock(job.run_dir)  # whose loss ends nothing: another process only reads it
    claim.acquire()
    try:
        yield
    finally:
        claim.release()
        filesystem, folder = filesystem_of(join(job.storage, job.name))
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(folder)


def plan(experiment: Experiment) -> Pruning:
    """Looks for what can be removed. Changes nothing, renders and decodes nothing. Raises ConfigError."""
    storage = experiment.storage
    catalog, root = _catalog_of(experiment)
    recipe = DecodeConfig(
        experiment.clip, keep_all_frames=experiment.data.segments.frames > 0, cache=experiment.data.cache_decoded
    )
    keys = _folders(join(storage, "stores"))
    in_use = _in_use(storage, keys)
    if in_use.unknown:
        return Pruning([], [f"everything: {reason}" for reason in in_use.unknown])
    needed = set(in_use.sets)
    current = stores.set_location(join(storage, "stores", recipe.key), catalog) if catalog else None
    if current:
        needed.add(_Set(recipe.key, current.rpartition("/")[2]))
    removals = []
    for key in keys:
        location = join(storage, "stores", key)
        if key in in_use.stores:
            continue
        kept = {one.key for one in needed if one.store == key}
        if key == recipe.key or kept:
            removals += _unused_in_store(location, kept, catalog if key == recipe.key else None)
        else:
            removals.append(_folder_removal(f"store {key}", location, _why_other(location, recipe)))
    roots = {_root_of(join(storage, "stores", one.store, "sets", one.key)) for one in needed} | {root}
    if not in_use.stores:
        removals += _unused_videos(storage, roots)
    removals += _stale_partials(storage, in_use.stores)
    return Pruning([removal for removal in removals if removal.files], in_use.reasons)


def _catalog_of(experiment: Experiment) -> tuple[Catalog | None, str]:
    """The videos of the experiment, none where the built-in ones are not rendered, and their root."""
    data = experiment.data
    if data.root is not None:
        return read_catalog(data.root, data), data.root
    root, _ = dataset.root_of(join(experiment.storage, "data"), data.synthetic, data.categories)
    catalog = read_catalog(root, data, name=dataset.NAME) if dataset.is_complete(root) else None
    return catalog, root


# --- jobs that are running


def _in_use(storage: str, keys: Sequence[str]) -> _InUse:
    found = _InUse(set(), set(), [], [])
    for key in keys:
        for job in _folders(join(storage, "stores", key, _JOBS)):
            if run_lock.is_live(join(storage, "stores", key, _JOBS, job, "lease.json")):
                found.stores.add(key)
                found.reasons.append(f"store {key}, and built-in videos: a job decodes into it")
    for folder in _live_runs(storage):
        name = folder.removeprefix(storage).strip("/")
        sets = _sets_of_run(storage, keys, folder)
        found.sets.update(sets)
        for one in sets:
            found.reasons.append(f"store {one.store}, set {one.key}: {name} is running")
        if not sets:
            found.unknown.append(f"{name} is running, and does not say yet which clips it uses")
    return found


def _live_runs(storage: str) -> list[str]:
    """The folders of runs, searches and their trials that a process holds the lease of."""
    tops = [join(storage, name) for name in _folders(storage) if name not in ("stores", "data")]
    with ThreadPoolExecutor(_READERS) as readers:
        below = readers.map(lambda top: [join(top, name) for name in _folders(top)], tops)
        folders = [*tops, *(folder for some in below for folder in some)]
        live = readers.map(lambda folder: run_lock.is_live(join(folder, "lease.json")), folders)
        return [folder for folder, is_live in zip(folders, live, strict=True) if is_live]


def _sets_of_run(storage: str, keys: Sequence[str], folder: str) -> set[_Set]:
    location = read_text(join(folder, DATA_SET_LOCATION))
    if location is not None:
        store, _, key = location.rstrip("/").rsplit("/", 2)
        return {_Set(store.rpartition("/")[2], key)}
    fingerprint = read_text(join(folder, "data_set"))  # of a run that was started before it left a location
    sets = {_Set(key, one) for key in keys for one in _folders(join(storage, "stores", key, "sets"))}
    return {one for one in sets if _about(storage, one).get("fingerprint", "") == fingerprint}


# --- what is left over


def _unused_in_store(location: str, sets: set[str], catalog: Catalog | None) -> list[Removal]:
    """Of a store of which some is needed: `sets`, and where it is the experiment's, what is known of its videos."""
    key = location.rpartition("/")[2]
    removals = [
        _folder_removal(f"store {key}, set {one}", join(location, "sets", one), "other videos, splits or results")
        for one in _folders(join(location, "sets"))
        if one not in sets
    ]
    pointers = [
        info
        for info in _files(join(location, "catalogs"))
        if not info.path.endswith(PARTIAL) and not _is_needed_pointer(location, info, sets)
    ]
    removals.append(_file_removal(f"store {key}, catalogs", location, pointers, "point to no set that is needed"))
    for job in _folders(join(location, _JOBS)):
        removals.append(_folder_removal(f"store {key}, leases", join(location, _JOBS, job), "of a job that was killed"))
    return [*removals, *_unused_shards(location, key, sets, catalog)]


def _is_needed_pointer(location: str, info: fs.FileInfo, sets: set[str]) -> bool:
    name = _name(info)
    pointer = join(location, "catalogs", name.removesuffix(".lock"))
    if name.endswith(".lock"):  # of a pointer that is there, or may be about to be
        return read_text(pointer) in sets or time.time() - info.mtime_ns / 1e9 < STALE_S
    return read_text(pointer) in sets


def _unused_shards(location: str, key: str, sets: set[str], catalog: Catalog | None) -> list[Removal]:
    listings = {
        path: shards.ROW_SCHEMA.empty_table() if listing is None else listing
        for path, listing in shards.read_listings(location).items()
    }
    known = pa.concat_tables([shards.ROW_SCHEMA.empty_table(), *listings.values()])
    infos = {_stem(info): info for info in _files(join(location, "shards")) if info.path.endswith(".u8")}
    identities = [video.identity for video in catalog.videos] if catalog else []
    stored = known.filter(_is_in(known["shard"], infos) | np.asarray(known["shard"].is_null()))
    chosen = shards.choose_rows(stored.filter(_is_in(stored["identity"], identities)))
    needed = set(chosen["shard"].drop_null().to_pylist())
    for one in sets:
        needed.update(stores.read_set(join(location, "sets", one))["shard"].drop_null().to_pylist())

    def left_of(listing: pa.Table) -> pa.Table:
        ours = _is_in(listing["identity"], identities) if catalog else np.full(len(listing), True)
        return listing.filter(np.where(listing["shard"].is_null(), ours, _is_in(listing["shard"], needed)))

    replaced = {
        path: left for path, listing in listings.items() if len(left := left_of(listing)) < max(1, len(listing))
    }
    emptied = filesystem_of(location)[0].get_file_info([path for path, rows in replaced.items() if not len(rows)])
    listed = set(known["shard"].drop_null().to_pylist())
    unused = [*(info for shard, info in infos.items() if shard in listed - needed), *emptied]
    orphans = [info for shard, info in infos.items() if shard not in listed | needed]

    def remove() -> None:
        for path, rows in replaced.items():  # these first: what is not listed is not stored
            shards.replace_listing(location, path, rows)
        _delete(location, unused)

    what = f"store {key}, shards"
    return [
        Removal(what, len(unused), _bytes(unused), "no video that is needed is in them", remove),
        _file_removal(what, location, orphans, "no listing names them: a job was killed"),
    ]


def _is_in(column: pa.ChunkedArray, values: Iterable[str]) -> np.ndarray:
    """bool [rows]"""
    return np.asarray(pc.is_in(column, value_set=pa.array(list(values), pa.string())))  # type: ignore[attr-defined]


def _unused_videos(storage: str, roots: set[str]) -> list[Removal]:
    """Built-in videos, which are rendered again where they are asked for."""
    removals = []
    used = {filesystem_of(root)[1].rstrip("/") for root in roots if root and is_local(root) == is_local(storage)}
    for name in _folders(join(storage, "data")):
        folder = join(storage, "data", name)
        path = filesystem_of(folder)[1].rstrip("/")
        if not name.startswith(f"{dataset.NAME}-") or any(f"{one}/".startswith(f"{path}/") for one in used):
            continue
        why = "no set that is needed is of these videos"
        if not dataset.is_complete(folder):
            newest_ns = max((info.mtime_ns or 0 for info in _files(folder, recursive=True)), default=0)
            if time.time() - newest_ns / 1e9 < STALE_S:  # a job may be rendering them
                continue
            why = "a job that rendered them was killed"
        removals.append(_folder_removal(f"built-in videos {name}", folder, why))
    return removals


def _stale_partials(storage: str, busy: set[str]) -> list[Removal]:
    stale = [
        info
        for folder, recursive in ((storage, False), (join(storage, "stores"), True), (join(storage, "data"), True))
        for info in _files(folder, recursive)
        if info.path.endswith(PARTIAL) and time.time() - (info.mtime_ns or 0) / 1e9 > STALE_S
        if not any(f"/stores/{key}/" in info.path for key in busy)
    ]
    return [_file_removal("partial files", storage, stale, f"not written to for {STALE_S // 60} minutes")]


def _why_other(location: str, recipe: DecodeConfig) -> str:
    text = read_text(join(location, "recipe.json"))
    if text is None:
        return "no recipe.json: nothing was stored in it"
    try:
        theirs, ours = _flat(json.loads(text)), _flat(json.loads(recipe.to_json()))
    except ValueError:
        return "its recipe.json cannot be read"
    if theirs.get("version") != VERSION:
        return f"version {theirs.get('version')} of decoding; it is {VERSION} now"
    other = [f"{name}={theirs.get(name)}" for name in ours if theirs.get(name) != ours[name]]
    return f"other decode settings: {', '.join(other)}"


def _flat(fields: dict) -> dict:
    return {**{name: value for name, value in fields.items() if name != "clip"}, **fields.get("clip", {})}


def _about(storage: str, one: _Set) -> dict:
    text = read_text(join(storage, "stores", one.store, "sets", one.key, "set.json"))
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _root_of(place: str) -> str:
    text = read_text(join(place, "set.json"))
    return json.loads(text)["root"] if text else ""


# --- files


def _folder_removal(what: str, location: str, why: str) -> Removal:
    infos = _files(location, recursive=True)

    def remove() -> None:
        filesystem, path = filesystem_of(location)
        # What points to others first: a removal that is cut off leaves nothing that claims to be whole.
        for name in ("catalogs", "sets", "set.json"):
            with contextlib.suppress(FileNotFoundError):
                inside = f"{path}/{name}"
                kind = filesystem.get_file_info(inside).type
                if kind == fs.FileType.Directory:
                    filesystem.delete_dir(inside)
                elif kind == fs.FileType.File:
                    filesystem.delete_file(inside)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)

    return Removal(what, len(infos), _bytes(infos), why, remove)


def _file_removal(what: str, location: str, infos: Sequence[fs.FileInfo], why: str) -> Removal:
    return Removal(what, len(infos), _bytes(infos), why, lambda: _delete(location, infos))


def _bytes(infos: Iterable[fs.FileInfo]) -> int:
    return sum(info.size or 0 for info in infos)


def _delete(location: str, infos: Sequence[fs.FileInfo]) -> None:
    filesystem, _ = filesystem_of(location)
    for info in infos:
        with contextlib.suppress(FileNotFoundError):  # its folder, or another job, was faster
            filesystem.delete_file(info.path)


def _files(location: str, recursive: bool = False) -> list[fs.FileInfo]:
    filesystem, path = filesystem_of(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return [info for info in infos if info.type == fs.FileType.File]


def _folders(location: str) -> list[str]:
    filesystem, path = filesystem_of(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(_name(info) for info in infos if info.type == fs.FileType.Directory)


def _name(info: fs.FileInfo) -> str:
    return info.path.rstrip("/").rpartition("/")[2]


def _stem(info: fs.FileInfo) -> str:
    return _name(info).partition(".")[0]
