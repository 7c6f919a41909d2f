"""Prepares the dataset of an experiment: renders the built-in videos if needed, lists videos and decodes new ones."""

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
from giffy_ray.core.progress import ProgressBar
from giffy_ray.core.storage import filesystem_of, is_local, join
from giffy_ray.data import clip_dataset, loader, prune, shards
from giffy_ray.data.catalog import Catalog, get_extension, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.shards import RETRYABLE_REASONS, DecodeConfig
from giffy_ray.data.synthetic import dataset as synthetic_dataset

_TYPICAL_FPS = 30
_NODE_TIMEOUT_S = 60  # for a node to report its cache capacity
_MAX_PRINTED_REJECTS = 20
_MAX_PRINTED_UNUSED = 3  # per extension


def load_catalog(experiment: Experiment) -> Catalog:
    """Lists the videos of `data.root`, or of the built-in dataset, which is rendered on first use.

    Raises:
        ConfigError: As `read_catalog`.
    """
    data = experiment.data
    if data.root is not None:
        return read_catalog(data.root, data)
    root = synthetic_dataset.ensure_rendered(join(experiment.storage, "data"), data.synthetic, data.categories)
    return read_catalog(root, data, name=synthetic_dataset.NAME)


def prepare(experiment: Experiment, again: bool = False, decoder: str | None = None) -> ClipDataset:
    """Decodes the videos that are not stored yet and prints which were rejected and why.

    A dataset that was prepared before does not change, so that a resumed training sees the same clips. Only lost or
    damaged parts of it are decoded again.

    Args:
        experiment: Selects the videos and how to decode them.
        again: Verify the checksums of everything stored, and retry videos with a retryable reject reason.
        decoder: Replaces the decoder, see `shards.decode_shard`.

    Raises:
        ConfigError: The videos cannot be listed or read, do not fit, or too many of them are rejected.
    """
    catalog = load_catalog(experiment)
    data = experiment.data
    decode_config = DecodeConfig(experiment.clip, keep_all_frames=data.segments.frames > 0, cache=data.cache_decoded)
    store_location = join(experiment.storage, "stores", decode_config.key)
    shards.write_decode_config(store_location, decode_config)
    set_location = clip_dataset.find_set(store_location, catalog)
    is_damaged = set_location is not None and not clip_dataset.is_intact(set_location)
    if is_damaged:
        print(f"{set_location}: damaged; writing it again", file=sys.stderr)
    elif set_location is not None and not again:  # `again` verifies all contents anyway
        rows = clip_dataset.read_set(set_location)
        is_damaged = bool(shards.find_damaged_shards(store_location, rows, contents=False))
    if set_location is None or is_damaged or again:
        with prune.protect_store(experiment, store_location):
            index = _decode_missing(experiment, catalog, decode_config, store_location, again, decoder)
            new_set = clip_dataset.write_set(store_location, catalog, index, data.limits)
            set_location = clip_dataset.choose_set(store_location, catalog, new_set, replace=is_damaged or again)
    dataset = ClipDataset(set_location, data.node_cache_gb)
    _check_node_caches(dataset)
    _print_unused_files(catalog)
    _print_hdr_count(dataset)
    _print_rejects(dataset, len(catalog.videos))
    _check_reject_fraction(dataset, len(catalog.videos), data.max_reject_fraction)
    return dataset


def _decode_missing(
    experiment: Experiment,
    catalog: Catalog,
    decode_config: DecodeConfig,
    store_location: str,
    again: bool,
    decoder: str | None,
) -> pa.Table:
    """Decodes the videos of a catalog that are new, lost or to be retried. Returns the store's index."""
    data = experiment.data
    rows = shards.read_rows(store_location)
    damaged = _find_and_print_damage(store_location, rows, contents=again)
    intact_rows = rows.filter(pc.invert(shards.is_in_shards(rows, damaged)))  # type: ignore[attr-defined]
    index = shards.choose_rows(intact_rows)
    reasons = dict(zip(index["identity"].to_pylist(), index["reason"].to_pylist(), strict=True))
    new = {video.identity: video for video in catalog.videos if video.identity not in reasons}
    retries = [video for video in catalog.videos if again and reasons.get(video.identity) in RETRYABLE_REASONS]
    # The videos of a lost shard are decoded together again. The new shard then has the old name, which repairs every
    # set and every training that reads it. A running training keeps the pages that it has mapped.
    lost_groups = []
    for identities in shards.group_by_shard(rows, damaged).values():
        if all(identity in new for identity in identities):
            lost_groups.append([new.pop(identity) for identity in identities])
    if new or retries or lost_groups:
        new_videos = list(new.values())
        lost_count = sum(map(len, lost_groups))
        _check_space(store_location, decode_config, data.cache_max_gb, intact_rows, len(new_videos) + lost_count)
        # Separate chunks, so that retries do not change which new videos share a shard.
        chunks = [
            *map(shards.make_chunk, lost_groups),
            *shards.chunk_videos(new_videos),
            *shards.chunk_videos(retries),
        ]
        decode_chunk = functools.partial(
            shards.decode_shard,
            filesystem=catalog.filesystem,
            decode_config=decode_config,
            limits=data.limits,
            location=store_location,
            decoder=decoder,
            root=catalog.base,
        )
        _decode_chunks(catalog.name, chunks, decode_chunk, len(new_videos) + len(retries) + lost_count)
        rows = shards.read_rows(store_location)
    if damaged or again:
        suspects = rows.filter(shards.is_in_shards(rows, damaged))
        shards.delete_shards(store_location, shards.find_damaged_shards(store_location, suspects))
        rows = shards.read_rows(store_location)
    index = shards.choose_rows(rows)
    decoded = set(index["identity"].to_pylist())
    unread_count = sum(video.identity not in decoded for video in catalog.videos)
    if unread_count:
        raise ConfigError(
            f"data.root: {unread_count} videos were not read, because their folder became unreachable, or is not "
            f"reachable from every node of the cluster (value {catalog.root!r}). Make it reachable and start the job "
            "again; decoded videos are cached"
        )
    return index


def _decode_chunks(name: str, chunks: Sequence[pa.Table], decode_chunk: functools.partial, video_count: int) -> None:
    start_s = time.perf_counter()
    total_bytes = 0
    clip_count = 0
    with ProgressBar(f"decoding {name}", video_count, "videos") as bar:
        for table in loader.decode_blocks(chunks, decode_chunk):
            bar.advance(len(table))
            clip_count += table["reason"].null_count
            total_bytes += table["shard_bytes"][0].as_py() if len(table) else 0
    duration_s = time.perf_counter() - start_s
    print(f"{clip_count} clips, {total_bytes / 1e9:.2f} GB, {clip_count / duration_s:.0f} clips/s")


def _find_and_print_damage(store_location: str, rows: pa.Table, contents: bool) -> dict[str, str]:
    """Returns the damaged shards, as `shards.find_damaged_shards`, and prints them to stderr."""
    damaged = shards.find_damaged_shards(store_location, rows, contents)
    for shard, damage in damaged.items():
        path = shards.get_shard_path(store_location, shard)
        print(f"{path}: {damage}; decoding its videos again", file=sys.stderr)
    return damaged


def _check_space(
    store_location: str, decode_config: DecodeConfig, cache_max_gb: float | None, rows: pa.Table, video_count: int
) -> None:
    """Checks before decoding that `video_count` further videos fit. Raises ConfigError."""
    if not decode_config.cache:
        return
    clip = decode_config.clip
    frames = clip.frames
    if decode_config.keep_all_frames:
        frames = max(clip.frames, (clip.frames - 1) / clip.fps * _TYPICAL_FPS)
    needed_bytes = video_count * frames * clip.height * clip.width * 3
    stored_shards = rows.filter(rows["shard"].is_valid()).group_by("shard").aggregate([("shard_bytes", "max")])
    stored_bytes = sum(stored_shards["shard_bytes_max"].to_pylist())
    if cache_max_gb is not None and stored_bytes + needed_bytes > cache_max_gb * 1e9:
        raise ConfigError(
            f"data.cache_max_gb: {video_count} more videos take about {needed_bytes / 1e9:.1f} GB in addition to the "
            f"{stored_bytes / 1e9:.1f} GB in {store_location} (value {cache_max_gb}); increase it, use fewer videos "
            "(data.max_videos), or set data.cache_decoded=false"
        )
    if is_local(store_location):
        free_bytes = shutil.disk_usage(filesystem_of(store_location)[1]).free
        if needed_bytes > free_bytes:
            raise ConfigError(
                f"storage: {video_count} videos take about {needed_bytes / 1e9:.1f} GB, but the disk of "
                f"{store_location} has {free_bytes / 1e9:.1f} GB free; use another folder, fewer videos "
                "(data.max_videos), or data.cache_decoded=false"
            )


def _check_node_caches(dataset: ClipDataset) -> None:
    """Raises ConfigError if a node's cache cannot hold one shard. Warns if it cannot hold all."""
    if is_local(dataset.location) or not dataset.decode_config.cache or not len(dataset):
        return
    max_shard_bytes = pc.max(clip_dataset.read_set(dataset.location)["shard_bytes"]).as_py()  # type: ignore[attr-defined]
    for node, capacity_bytes in sorted(_node_cache_bytes(dataset.node_cache_gb).items()):
        if capacity_bytes < max_shard_bytes:
            raise ConfigError(
                f"data.node_cache_gb: node {node} can cache {capacity_bytes / 1e9:.3g} GB (value "
                f"{dataset.node_cache_gb}), but one shard has {max_shard_bytes / 1e9:.3g} GB; increase the field, "
                "set TMPDIR to a larger disk, or set data.cache_decoded=false"
            )
        if capacity_bytes < dataset.size_bytes:
            print(
                f"warning: data.node_cache_gb: node {node} can cache {capacity_bytes / 1e9:.3g} GB of the "
                f"{dataset.size_bytes / 1e9:.3g} GB of clips (value {dataset.node_cache_gb}); it downloads the others "
                "again in each epoch",
                file=sys.stderr,
            )


def _node_cache_bytes(limit_gb: float | None) -> dict[str, float]:
    """Returns the capacity of the shard cache of each node of the cluster, by its address."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():  # as in a notebook: this process reads the clips
        return {"here": _local_capacity_bytes(limit_gb)}
    measure = ray.remote(num_cpus=0, max_retries=0)(_local_capacity_bytes)
    tasks = {
        node["NodeManagerAddress"]: measure.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(limit_gb)
        for node in ray.nodes()
        if node["Alive"]
    }
    finished, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_NODE_TIMEOUT_S)
    capacities = {}
    for node, task in tasks.items():
        if task in finished:
            with contextlib.suppress(RayError):  # the node has left; nodes that join later evict as needed
                capacities[node] = ray.get(task)
    return capacities


def _local_capacity_bytes(limit_gb: float | None) -> float:
    return clip_dataset.open_node_cache(limit_gb).capacity_bytes()


def _print_unused_files(catalog: Catalog) -> None:
    if not catalog.unused_files:
        return
    by_extension: dict[str, list[str]] = {}
    for name in catalog.unused_files:
        by_extension.setdefault(get_extension(name) or "without an extension", []).append(name)
    print(
        f"{len(catalog.unused_files)} files below {catalog.root} are not used as videos "
        "(ffmpeg -i FILE FILE.mp4 converts them):",
        file=sys.stderr,
    )
    for extension, names in sorted(by_extension.items()):
        examples = ", ".join(map(_escape_unprintable, names[:_MAX_PRINTED_UNUSED]))
        ellipsis = ", ..." if len(names) > _MAX_PRINTED_UNUSED else ""
        print(f"  {len(names)} {extension}: {examples}{ellipsis}", file=sys.stderr)


def _print_hdr_count(dataset: ClipDataset) -> None:
    hdr_count = pc.sum(dataset.metadata["hdr"]).as_py()  # type: ignore[attr-defined]
    if hdr_count:
        print(f"{hdr_count} of {len(dataset)} clips are from HDR videos, tone-mapped to SDR")


def _print_rejects(dataset: ClipDataset, video_count: int) -> None:
    if not dataset.rejects:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dataset.count_rejects_by_reason().items()))
    print(f"{len(dataset.rejects)} of {video_count} videos rejected ({counts}):", file=sys.stderr)
    for reject in dataset.rejects[:_MAX_PRINTED_REJECTS]:
        line = f"{reject['id']}: {reject['reason']}: {reject['detail']}"
        print(f"  {_escape_unprintable(line)}", file=sys.stderr)
    if len(dataset.rejects) > _MAX_PRINTED_REJECTS:
        print(f"  and {len(dataset.rejects) - _MAX_PRINTED_REJECTS} more", file=sys.stderr)
    print(f"  {join(dataset.location, 'rejects.parquet')}", file=sys.stderr)


def _escape_unprintable(line: str) -> str:
    return line if line.isprintable() else line.encode("unicode_escape").decode()


def _check_reject_fraction(dataset: ClipDataset, video_count: int, max_fraction: float) -> None:
    if len(dataset.rejects) > max_fraction * video_count:
        raise ConfigError(
            f"data.max_reject_fraction: {len(dataset.rejects)} of {video_count} videos were rejected (value "
            f"{max_fraction}); see {join(dataset.location, 'rejects.parquet')}. Fix them or increase the field. "
            f"jobs/prepare.py retries those rejected as {', '.join(RETRYABLE_REASONS[:-1])} or {RETRYABLE_REASONS[-1]}"
        )
