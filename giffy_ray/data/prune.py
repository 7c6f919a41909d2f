"""Finds and deletes files that neither an experiment nor a running job needs: stores, sets, shards, built-in videos.

Needed are the experiment's built-in videos, its set, and the shards that contain frames of its videos. So is everything
used by a job with a live lease: the folder of a training's run names its set, and a job that decodes holds a lease
inside the store.
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
from giffy_ray.core.storage import PARTIAL_SUFFIX, filesystem_of, is_local, join, read_text
from giffy_ray.data import clip_dataset, shards
from giffy_ray.data.catalog import Catalog, read_catalog
from giffy_ray.data.shards import STALE_S, VERSION, DecodeConfig
from giffy_ray.data.synthetic import dataset as synthetic_dataset

DATASET_LOCATION_FILE = "data_set_location"  # in the folder of a run
_FINGERPRINT_FILE = "data_set"  # in the folder of a run
_JOBS_FOLDER = "jobs"  # in a store, with a lease of each job that decodes into it
_READ_THREADS = 16


@dataclass(frozen=True)
class Removal:
    """Unneeded files of one kind.

    Attributes:
        description: What the files are.
        files: Number of files.
        bytes: Their total size.
        reason: Why they are not needed.
        remove: Deletes them.
    """

    description: str
    files: int
    bytes: int
    reason: str
    remove: Callable[[], None]


class PruningPlan(NamedTuple):
    removals: list[Removal]
    kept_reasons: list[str]  # why files stay that the experiment does not need


class _SetId(NamedTuple):
    store_key: str
    set_key: str


class _Usage(NamedTuple):
    """What running jobs use."""

    sets: set[_SetId]
    store_keys: set[str]
    unknown: list[str]  # jobs whose sets are unknown, which forbid any removal
    reasons: list[str]


@contextmanager
def protect_store(experiment: Experiment, store_location: str) -> Iterator[None]:
    """Inside the block, `plan` spares the store and all built-in videos."""
    job = override(experiment, {"storage": join(store_location, _JOBS_FOLDER), "name": uuid.uuid4().hex})
    lease = run_lock.RunLock(job.run_dir)  # never checked for loss: other processes only read it
    lease.acquire()
    try:
        yield
    finally:
        lease.release()
        filesystem, folder = filesystem_of(job.run_dir)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(folder)


def plan(experiment: Experiment) -> PruningPlan:
    """Finds what can be deleted from the experiment's storage. Read-only; renders and decodes nothing.

    Raises:
        ConfigError: The experiment's videos cannot be listed.
    """
    storage = experiment.storage
    catalog, root = _load_catalog(experiment)
    decode_config = DecodeConfig(
        experiment.clip, keep_all_frames=experiment.data.segments.frames > 0, cache=experiment.data.cache_decoded
    )
    store_keys = _list_folders(join(storage, "stores"))
    usage = _find_usage(storage, store_keys)
    if usage.unknown:
        return PruningPlan([], [f"everything: {reason}" for reason in usage.unknown])
    needed_sets = set(usage.sets)
    current_set = clip_dataset.find_set(join(storage, "stores", decode_config.key), catalog) if catalog else None
    if current_set:
        needed_sets.add(_SetId(decode_config.key, current_set.rpartition("/")[2]))
    removals = []
    for store_key in store_keys:
        store_location = join(storage, "stores", store_key)
        if store_key in usage.store_keys:
            continue
        set_keys = {needed.set_key for needed in needed_sets if needed.store_key == store_key}
        is_own_store = store_key == decode_config.key
        if is_own_store or set_keys:
            removals += _plan_store(store_location, set_keys, catalog if is_own_store else None)
        else:
            reason = _explain_other_store(store_location, decode_config)
            removals.append(_plan_folder(f"store {store_key}", store_location, reason))
    roots = {_read_root(_locate_set(storage, needed)) for needed in needed_sets} | {root}
    if not usage.store_keys:
        removals += _plan_built_in_videos(storage, roots)
    removals += _plan_stale_partials(storage, usage.store_keys)
    return PruningPlan([removal for removal in removals if removal.files], usage.reasons)


def _load_catalog(experiment: Experiment) -> tuple[Catalog | None, str]:
    """Returns the experiment's videos and their root. No catalog if built-in videos are not rendered yet."""
    data = experiment.data
    if data.root is not None:
        return read_catalog(data.root, data), data.root
    root, _ = synthetic_dataset.resolve_root(join(experiment.storage, "data"), data.synthetic, data.categories)
    is_complete = synthetic_dataset.is_complete(root)
    catalog = read_catalog(root, data, name=synthetic_dataset.NAME) if is_complete else None
    return catalog, root


def _locate_set(storage: str, set_id: _SetId) -> str:
    return join(storage, "stores", set_id.store_key, "sets", set_id.set_key)


# --- running jobs


def _find_usage(storage: str, store_keys: Sequence[str]) -> _Usage:
    usage = _Usage(set(), set(), [], [])
    for store_key in store_keys:
        jobs_location = join(storage, "stores", store_key, _JOBS_FOLDER)
        for job in _list_folders(jobs_location):
            if run_lock.is_live(join(jobs_location, job, "lease.json")):
                usage.store_keys.add(store_key)
                usage.reasons.append(f"store {store_key}, and built-in videos: a job decodes into it")
    for run_dir in _find_live_runs(storage):
        name = run_dir.removeprefix(storage).strip("/")
        sets = _find_sets_of_run(storage, store_keys, run_dir)
        usage.sets.update(sets)
        for set_id in sets:
            usage.reasons.append(f"store {set_id.store_key}, set {set_id.set_key}: used by the running job {name}")
        if not sets:
            usage.unknown.append(f"{name} is running and has not recorded its dataset yet")
    return usage


def _find_live_runs(storage: str) -> list[str]:
    """Returns the folders of runs, searches and trials that hold a live lease."""
    tops = [join(storage, name) for name in _list_folders(storage) if name not in ("stores", "data")]
    with ThreadPoolExecutor(_READ_THREADS) as readers:
        subfolders = readers.map(lambda top: [join(top, name) for name in _list_folders(top)], tops)
        folders = [*tops, *(folder for group in subfolders for folder in group)]
        live = readers.map(lambda folder: run_lock.is_live(join(folder, "lease.json")), folders)
        return [folder for folder, is_live in zip(folders, live, strict=True) if is_live]


def _find_sets_of_run(storage: str, store_keys: Sequence[str], run_dir: str) -> set[_SetId]:
    location = read_text(join(run_dir, DATASET_LOCATION_FILE))
    if location is not None:
        store_location, _, set_key = location.rstrip("/").rsplit("/", 2)
        return {_SetId(store_location.rpartition("/")[2], set_key)}
    fingerprint = read_text(join(run_dir, _FINGERPRINT_FILE))  # runs of older versions have no location
    matches = set()
    for store_key in store_keys:
        for set_key in _list_folders(join(storage, "stores", store_key, "sets")):
            set_id = _SetId(store_key, set_key)
            if _read_set_info(storage, set_id).get("fingerprint", "") == fingerprint:
                matches.add(set_id)
    return matches


# --- unneeded files


def _plan_store(store_location: str, needed_sets: set[str], catalog: Catalog | None) -> list[Removal]:
    """Plans the removals from a store of which some is needed.

    Args:
        store_location: The store.
        needed_sets: Keys of the sets to keep.
        catalog: The experiment's videos if this is its store. All that is known about them is kept.
    """
    store_key = store_location.rpartition("/")[2]
    removals = []
    for set_key in _list_folders(join(store_location, "sets")):
        if set_key not in needed_sets:
            set_location = join(store_location, "sets", set_key)
            description = f"store {store_key}, set {set_key}"
            removals.append(_plan_folder(description, set_location, "of other videos, splits or results"))
    pointers = [
        info
        for info in _list_files(join(store_location, "catalogs"))
        if not info.path.endswith(PARTIAL_SUFFIX) and not _is_needed_pointer(store_location, info, needed_sets)
    ]
    removals.append(_plan_files(f"store {store_key}, catalogs", store_location, pointers, "point to no needed set"))
    for job in _list_folders(join(store_location, _JOBS_FOLDER)):
        lease_location = join(store_location, _JOBS_FOLDER, job)
        removals.append(_plan_folder(f"store {store_key}, leases", lease_location, "left by a killed job"))
    return [*removals, *_plan_shards(store_location, store_key, needed_sets, catalog)]


def _is_needed_pointer(store_location: str, info: fs.FileInfo, needed_sets: set[str]) -> bool:
    name = _get_name(info)
    is_needed = read_text(join(store_location, "catalogs", name.removesuffix(".lock"))) in needed_sets
    if name.endswith(".lock"):  # its pointer exists or may be about to be written
        return is_needed or time.time() - info.mtime_ns / 1e9 < STALE_S
    return is_needed


def _plan_shards(store_location: str, store_key: str, needed_sets: set[str], catalog: Catalog | None) -> list[Removal]:
    listings = {
        path: shards.ROW_SCHEMA.empty_table() if listing is None else listing
        for path, listing in shards.read_listings(store_location).items()
    }
    rows = pa.concat_tables([shards.ROW_SCHEMA.empty_table(), *listings.values()])
    infos = {_get_stem(info): info for info in _list_files(join(store_location, "shards")) if info.path.endswith(".u8")}
    identities = [video.identity for video in catalog.videos] if catalog else []
    stored_rows = rows.filter(_is_in(rows["shard"], infos) | np.asarray(rows["shard"].is_null()))
    chosen = shards.choose_rows(stored_rows.filter(_is_in(stored_rows["identity"], identities)))
    needed_shards = set(chosen["shard"].drop_null().to_pylist())
    for set_key in needed_sets:
        set_rows = clip_dataset.read_set(join(store_location, "sets", set_key))
        needed_shards.update(set_rows["shard"].drop_null().to_pylist())

    # Keeps clips of needed shards, and rejects of the experiment's videos or, in other stores, all rejects. Of all
    # listings at once, because `is_in` hashes its values in every call.
    is_known_video = _is_in(rows["identity"], identities) if catalog else np.full(len(rows), True)
    is_reject = np.asarray(rows["shard"].is_null())
    is_needed = np.where(is_reject, is_known_video, _is_in(rows["shard"], needed_shards))
    replacements, first = {}, 0
    for path, listing in listings.items():
        needed_rows = listing.filter(is_needed[first : first + len(listing)])
        first += len(listing)
        if len(needed_rows) < max(1, len(listing)):
            replacements[path] = needed_rows
    emptied_paths = [path for path, needed_rows in replacements.items() if not len(needed_rows)]
    emptied = filesystem_of(store_location)[0].get_file_info(emptied_paths)
    listed_shards = set(rows["shard"].drop_null().to_pylist())
    unneeded_shards, known_shards = listed_shards - needed_shards, listed_shards | needed_shards
    unused = [*(info for shard, info in infos.items() if shard in unneeded_shards), *emptied]
    orphans = [info for shard, info in infos.items() if shard not in known_shards]

    def remove() -> None:
        for path, needed_rows in replacements.items():  # first: a video counts as stored while it is listed
            shards.replace_listing(store_location, path, needed_rows)
        _delete_files(store_location, unused)

    description = f"store {store_key}, shards"
    return [
        Removal(description, len(unused), _sum_bytes(unused), "contain no needed video", remove),
        _plan_files(description, store_location, orphans, "in no listing: left by a killed job"),
    ]


def _is_in(column: pa.ChunkedArray, values: Iterable[str]) -> np.ndarray:
    """Returns bool [rows]."""
    return np.asarray(pc.is_in(column, value_set=pa.array(list(values), pa.string())))  # type: ignore[attr-defined]


def _plan_built_in_videos(storage: str, roots: set[str]) -> list[Removal]:
    """Plans the removal of built-in videos outside `roots`. They are rendered again on demand."""
    removals = []
    needed_paths = {
        filesystem_of(root)[1].rstrip("/") for root in roots if root and is_local(root) == is_local(storage)
    }
    for name in _list_folders(join(storage, "data")):
        folder = join(storage, "data", name)
        path = filesystem_of(folder)[1].rstrip("/")
        is_needed = any(f"{needed_path}/".startswith(f"{path}/") for needed_path in needed_paths)
        if not name.startswith(f"{synthetic_dataset.NAME}-") or is_needed:
            continue
        reason = "no needed set contains them"
        if not synthetic_dataset.is_complete(folder):
            newest_ns = max((info.mtime_ns or 0 for info in _list_files(folder, recursive=True)), default=0)
            if time.time() - newest_ns / 1e9 < STALE_S:  # a job may be rendering them
                continue
            reason = "left by a killed job"
        removals.append(_plan_folder(f"built-in videos {name}", folder, reason))
    return removals


def _plan_stale_partials(storage: str, busy_store_keys: set[str]) -> list[Removal]:
    stale = []
    for folder, recursive in ((storage, False), (join(storage, "stores"), True), (join(storage, "data"), True)):
        for info in _list_files(folder, recursive):
            is_stale = info.path.endswith(PARTIAL_SUFFIX) and time.time() - (info.mtime_ns or 0) / 1e9 > STALE_S
            if is_stale and not any(f"/stores/{key}/" in info.path for key in busy_store_keys):
                stale.append(info)
    return [_plan_files("partial files", storage, stale, f"not written to for {STALE_S // 60} minutes")]


def _explain_other_store(store_location: str, decode_config: DecodeConfig) -> str:
    text = read_text(join(store_location, "recipe.json"))
    if text is None:
        return "no recipe.json: nothing was stored in it"
    try:
        stored = _flatten_clip(json.loads(text))
        current = _flatten_clip(json.loads(decode_config.to_json()))
    except ValueError:
        return "its recipe.json cannot be read"
    if stored.get("version") != VERSION:
        return f"decoder version {stored.get('version')}, the current version is {VERSION}"
    differences = [f"{name}={stored.get(name)}" for name in current if stored.get(name) != current[name]]
    return f"other decode settings: {', '.join(differences)}"


def _flatten_clip(fields: dict) -> dict:
    return {**{name: value for name, value in fields.items() if name != "clip"}, **fields.get("clip", {})}


def _read_set_info(storage: str, set_id: _SetId) -> dict:
    text = read_text(join(_locate_set(storage, set_id), "set.json"))
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _read_root(set_location: str) -> str:
    text = read_text(join(set_location, "set.json"))
    return json.loads(text)["root"] if text else ""


# --- files


def _plan_folder(description: str, location: str, reason: str) -> Removal:
    infos = _list_files(location, recursive=True)

    def remove() -> None:
        filesystem, path = filesystem_of(location)
        # Pointers before what they point to: an interrupted removal must not leave anything that looks complete.
        for name in ("catalogs", "sets", "set.json"):
            with contextlib.suppress(FileNotFoundError):
                entry_path = f"{path}/{name}"
                kind = filesystem.get_file_info(entry_path).type
                if kind == fs.FileType.Directory:
                    filesystem.delete_dir(entry_path)
                elif kind == fs.FileType.File:
                    filesystem.delete_file(entry_path)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)

    return Removal(description, len(infos), _sum_bytes(infos), reason, remove)


def _plan_files(description: str, location: str, infos: Sequence[fs.FileInfo], reason: str) -> Removal:
    return Removal(description, len(infos), _sum_bytes(infos), reason, lambda: _delete_files(location, infos))


def _sum_bytes(infos: Iterable[fs.FileInfo]) -> int:
    return sum(info.size or 0 for info in infos)


def _delete_files(location: str, infos: Sequence[fs.FileInfo]) -> None:
    filesystem, _ = filesystem_of(location)
    for info in infos:
        with contextlib.suppress(FileNotFoundError):  # deleted by another job, or with its folder
            filesystem.delete_file(info.path)


def _list_files(location: str, recursive: bool = False) -> list[fs.FileInfo]:
    filesystem, path = filesystem_of(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return [info for info in infos if info.type == fs.FileType.File]


def _list_folders(location: str) -> list[str]:
    filesystem, path = filesystem_of(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(_get_name(info) for info in infos if info.type == fs.FileType.Directory)


def _get_name(info: fs.FileInfo) -> str:
    return info.path.rstrip("/").rpartition("/")[2]


def _get_stem(info: fs.FileInfo) -> str:
    return _get_name(info).partition(".")[0]
