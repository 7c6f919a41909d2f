"""The whole way from an Experiment to its Store: render the built-in videos if need be, list, decode what is new."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from giffy_ray.config import ConfigError, Experiment
from giffy_ray.core.progress import Bar
from giffy_ray.core.storage import filesystem_of, is_local, join
from giffy_ray.data import clip_dataset as stores
from giffy_ray.data import loader, prune, shards
from giffy_ray.data.catalog import Catalog, ending_of, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.shards import RETRYABLE_REASONS, DecodeConfig
from giffy_ray.data.synthetic import dataset

_USUAL_FPS = 30
_ANSWER_S = 60  # for a node to say how much it may keep
_LISTED_REJECTS = 20
_LISTED_SKIPPED = 3  # of each ending


def catalog_of(experiment: Experiment) -> Catalog:
    """The videos of `data.root`, or of the built-in data set, which is rendered on first use. Raises ConfigError."""
    if experiment.data.root is not None:
        return read_catalog(experiment.data.root, experiment.data)
    root = dataset.ensure(join(experiment.storage, "data"), experiment.data.synthetic, experiment.data.categories)
    return read_catalog(root, experiment.data, name=dataset.NAME)


def prepare(experiment: Experiment, again: bool = False, decoder: str | None = None) -> ClipDataset:
    """Decodes what is not stored yet, and says what was rejected and why. Raises ConfigError.

    `again`: also checks what is stored, and tries rejected videos again where another try may help. Without it a
    data set that was prepared stays as it is, so that a training that goes on sees the same clips; only what has been
    lost of it is decoded once more. `decoder`: see `shards.decode_shard`.
    """
    catalog, data = catalog_of(experiment), experiment.data
    recipe = DecodeConfig(experiment.clip, keep_all_frames=data.segments.frames > 0, cache=data.cache_decoded)
    location = join(experiment.storage, "stores", recipe.key)
    shards.write_recipe(location, recipe)
    place = stores.set_location(location, catalog)
    broken = place is not None and not stores.is_whole(place)
    if broken:
        print(f"{place}: damaged; it is written again", file=sys.stderr)
    elif place is not None and not again:  # `again` checks all contents anyway
        broken = bool(shards.damaged_shards(location, stores.read_set(place), contents=False))
    if place is None or broken or again:
        with prune.protected(experiment, location):
            index = _decode_missing(experiment, catalog, recipe, location, again, decoder)
            written = stores.write_set(location, catalog, index, data.limits)
            place = stores.choose_set(location, catalog, written, replace=broken or again)
    store = ClipDataset(place, data.node_cache_gb)
    _check_node_caches(store)
    _tell_skipped(catalog)
    _tell_hdr(store)
    _tell_rejects(store, len(catalog.videos))
    _check_reject_fraction(store, len(catalog.videos), data.max_reject_fraction)
    return store


def _decode_missing(
    experiment: Experiment, catalog: Catalog, recipe: DecodeConfig, location: str, again: bool, decoder: str | None
) -> pa.Table:
    """Decodes the videos of a catalog that the store does not know, or has lost. Returns its index."""
    data = experiment.data
    rows = shards.read_rows(location)
    damaged = _damaged(location, rows, contents=again)
    whole = rows.filter(pc.invert(shards.are_in(rows, damaged)))  # type: ignore[attr-defined]
    index = shards.choose_rows(whole)
    known = dict(zip(index["identity"].to_pylist(), index["reason"].to_pylist(), strict=True))
    new = {video.identity: video for video in catalog.videos if video.identity not in known}
    retried = [video for video in catalog.videos if again and known.get(video.identity) in RETRYABLE_REASONS]
    # The videos of a shard that was lost together, as before: their frames then have its name, so that every set and
    # every training that reads it is whole again. A training meanwhile keeps what it has mapped.
    groups = []
    for members in shards.members_of(rows, damaged).values():
        if all(identity in new for identity in members):
            groups.append([new.pop(identity) for identity in members])
    if new or retried or groups:
        rest = list(new.values())
        videos = [*rest, *retried, *(video for group in groups for video in group)]
        _check_space(location, recipe, data.cache_max_gb, whole, len(videos) - len(retried))
        # Apart from each other, so that the new ones are dealt to shards as if nothing had ever been rejected.
        chunks = [*map(shards.chunk_of, groups), *shards.chunks_of(rest), *shards.chunks_of(retried)]
        decode = functools.partial(
            shards.decode_shard,
            filesystem=catalog.filesystem,
            recipe=recipe,
            limits=data.limits,
            location=location,
            decoder=decoder,
            root=catalog.base,
        )
        _decode(catalog.name, chunks, decode, len(videos))
        rows = shards.read_rows(location)
    if damaged or again:
        suspects = rows.filter(shards.are_in(rows, damaged))
        shards.delete_shards(location, shards.damaged_shards(location, suspects))
        rows = shards.read_rows(location)
    index = shards.choose_rows(rows)
    decoded = set(index["identity"].to_pylist())
    unread = sum(video.identity not in decoded for video in catalog.videos)
    if unread:
        raise ConfigError(
            f"data.root: {unread} videos were not read, because their folder cannot be reached any more, or not from "
            f"every node of the cluster (value {catalog.root!r}). What was decoded is kept: start the job again when "
            "it can be reached"
        )
    return index


def _decode(name: str, chunks: Sequence[pa.Table], decode: functools.partial, videos: int) -> None:
    began_s, frames, clips = time.perf_counter(), 0, 0
    with Bar(f"decoding {name}", videos, "videos") as bar:
        for table in loader.decode_all(chunks, decode):
            bar.advance(len(table))
            clips += table["reason"].null_count
            frames += table["shard_bytes"][0].as_py() if len(table) else 0
    took_s = time.perf_counter() - began_s
    print(f"{clips} clips, {frames / 1e9:.2f} GB, {clips / took_s:.0f} clips a second")


def _damaged(location: str, rows: pa.Table, contents: bool) -> dict[str, str]:
    """The shards whose frames are not what was written, which are named on stderr."""
    damaged = shards.damaged_shards(location, rows, contents)
    for shard, found in damaged.items():
        print(f"{shards.shard_path(location, shard)}: {found}; its videos are decoded again", file=sys.stderr)
    return damaged


def _check_space(location: str, recipe: DecodeConfig, keep_gb: float | None, rows: pa.Table, videos: int) -> None:
    """Refuses, before anything is decoded, what would not fit. Raises ConfigError."""
    if not recipe.cache:
        return
    clip = recipe.clip
    frames = max(clip.frames, (clip.frames - 1) / clip.fps * _USUAL_FPS) if recipe.keep_all_frames else clip.frames
    needed = videos * frames * clip.height * clip.width * 3
    kept = rows.filter(rows["shard"].is_valid()).group_by("shard").aggregate([("shard_bytes", "max")])
    stored = sum(kept["shard_bytes_max"].to_pylist())
    if keep_gb is not None and stored + needed > keep_gb * 1e9:
        raise ConfigError(
            f"data.cache_max_gb: {videos} more videos take about {needed / 1e9:.1f} GB beside the {stored / 1e9:.1f} GB in "
            f"{location} (value {keep_gb}); give more, fewer videos (data.max_videos), or data.cache_decoded=false"
        )
    if is_local(location):
        free = shutil.disk_usage(filesystem_of(location)[1]).free
        if needed > free:
            raise ConfigError(
                f"storage: {videos} videos take about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on the "
                f"disk of {location}; give another folder, fewer videos (data.max_videos), or data.cache_decoded=false"
            )


def _check_node_caches(store: ClipDataset) -> None:
    """Refuses a node whose disk cannot take one shard, and warns of one that cannot take all. Raises ConfigError."""
    if is_local(store.location) or not store.recipe.cache or not len(store):
        return
    largest = pc.max(stores.read_set(store.location)["shard_bytes"]).as_py()  # type: ignore[attr-defined]
    for node, capacity in sorted(_node_cache_bytes(store.node_cache_gb).items()):
        if capacity < largest:
            raise ConfigError(
                f"data.node_cache_gb: the node {node} may keep copies of {capacity / 1e9:.3g} GB (value "
                f"{store.node_cache_gb}), and a shard of the clips has {largest / 1e9:.3g} GB; give the field a "
                "larger value, set TMPDIR to a larger disk, or data.cache_decoded=false"
            )
        if capacity < store.bytes:
            print(
                f"warning: data.node_cache_gb: the node {node} may keep copies of {capacity / 1e9:.3g} GB of the "
                f"{store.bytes / 1e9:.3g} GB of clips (value {store.node_cache_gb}); it fetches the others again in "
                "each epoch",
                file=sys.stderr,
            )


def _node_cache_bytes(limit_gb: float | None) -> dict[str, float]:
    """How much copies of shards may take on each node of the cluster, by its address."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():  # as in a notebook: the clips are read in this process
        return {"here": _capacity_bytes(limit_gb)}
    ask = ray.remote(num_cpus=0, max_retries=0)(_capacity_bytes)
    asked = {
        node["NodeManagerAddress"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(limit_gb)
        for node in ray.nodes()
        if node["Alive"]
    }
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
    answers = {}
    for node, task in asked.items():
        if task in answered:
            with contextlib.suppress(RayError):  # the node has left; those that come evict as they need
                answers[node] = ray.get(task)
    return answers


def _capacity_bytes(limit_gb: float | None) -> float:
    return stores.node_cache(limit_gb).capacity_bytes()


def _tell_skipped(catalog: Catalog) -> None:
    if not catalog.skipped:
        return
    by_ending: dict[str, list[str]] = {}
    for name in catalog.skipped:
        by_ending.setdefault(ending_of(name) or "without an ending", []).append(name)
    found = f"{len(catalog.skipped)} files below {catalog.root}"
    print(f"{found} are not used as videos (ffmpeg -i FILE FILE.mp4 converts them):", file=sys.stderr)
    for ending, names in sorted(by_ending.items()):
        shown = ", ".join(map(_printable, names[:_LISTED_SKIPPED])) + (", ..." if len(names) > _LISTED_SKIPPED else "")
        print(f"  {len(names)} {ending}: {shown}", file=sys.stderr)


def _tell_hdr(store: ClipDataset) -> None:
    hdr = pc.sum(store.facts["hdr"]).as_py()  # type: ignore[attr-defined]
    if hdr:
        print(f"{hdr} of {len(store)} clips are from HDR videos, tone-mapped to SDR")


def _tell_rejects(store: ClipDataset, videos: int) -> None:
    if not store.rejects:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(store.reject_counts().items()))
    print(f"{len(store.rejects)} of {videos} videos rejected ({counts}):", file=sys.stderr)
    for reject in store.rejects[:_LISTED_REJECTS]:
        line = f"{reject['id']}: {reject['reason']}: {reject['detail']}"
        print(f"  {_printable(line)}", file=sys.stderr)
    if len(store.rejects) > _LISTED_REJECTS:
        print(f"  and {len(store.rejects) - _LISTED_REJECTS} more", file=sys.stderr)
    print(f"  {join(store.location, 'rejects.parquet')}", file=sys.stderr)


def _printable(line: str) -> str:
    return line if line.isprintable() else line.encode("unicode_escape").decode()


def _check_reject_fraction(store: ClipDataset, videos: int, most: float) -> None:
    if len(store.rejects) > most * videos:
        raise ConfigError(
            f"data.max_reject_fraction: {len(store.rejects)} of {videos} videos gave no clip (value {most}); they are "
            f"listed in {join(store.location, 'rejects.parquet')}. Mend them, or raise the field. jobs/prepare.py "
            f"tries those again whose reason is {', '.join(RETRYABLE_REASONS[:-1])} or {RETRYABLE_REASONS[-1]}"
        )
