"""NodeCache with real processes on a real disk of 2 MB, smaller than the data."""

import contextlib
import errno
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from giffy_ray.config import ClipConfig, ConfigError, LimitsConfig
from giffy_ray.core.storage import PARTIAL_SUFFIX, write_bytes
from giffy_ray.data import clip_dataset, shards
from giffy_ray.data import prepare as prepare_module
from giffy_ray.data.catalog import Catalog, Video
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.node_cache import NodeCache

SHARD_BYTES, DISK_BYTES = 2**18, 2**21
REMOTE = fs.LocalFileSystem()  # stands in for a bucket


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a cache on its own disk."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount_point)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield mount_point / "shards"
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(path, sha256) of 20 shards, 5 MB in total."""
    folder = tmp_path_factory.mktemp("remote")
    return [write_remote(folder, SHARD_BYTES, seed) for seed in range(20)]


def write_remote(folder: Path, size: int, seed: int = 0) -> tuple[str, str]:
    content = np.random.default_rng(seed).bytes(size)
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / "remote" / sha256
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path), sha256


def map_and_check(cache: NodeCache, shard: tuple[str, str]) -> np.ndarray:
    path, sha256 = shard
    content = cache.map(f"key/{sha256}.u8", REMOTE, path, sha256)
    assert hashlib.sha256(content).hexdigest() == sha256
    return content


def is_copied(cache: NodeCache, shard: tuple[str, str]) -> bool:
    return (cache.folder / "key" / f"{shard[1]}.u8").exists()


def used_bytes(folder: Path) -> int:
    usage = shutil.disk_usage(folder)
    return usage.total - usage.free


def read_at_random(folder: Path, shards: list[tuple[str, str]], seed: int, limit_bytes: float | None) -> None:
    """Maps shards in random order and holds the maps until the cache releases them, as a worker does."""
    maps: list[np.ndarray] = []
    cache = NodeCache(folder, limit_bytes, release=maps.clear)
    for number in np.random.default_rng(seed).integers(len(shards), size=40):
        maps.append(map_and_check(cache, shards[number]))
    assert used_bytes(folder) <= (limit_bytes or 0.9 * DISK_BYTES)


def is_in_memory(content: np.ndarray) -> bool:
    return not isinstance(content, np.memmap)


def test_thread_that_waits_for_a_download_uses_it_although_others_map_it(tmp_path, remote):
    """Its readers hold shared locks on the file for good, so whoever waits for an exclusive one would wait forever."""
    path, sha256 = remote[0]
    cache = NodeCache(tmp_path / "cache")
    copy = cache.folder / "key" / f"{sha256}.u8"
    copy.parent.mkdir(parents=True)
    partial = copy.with_name(copy.name + PARTIAL_SUFFIX)
    with partial.open("xb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        waiting = threading.Thread(target=map_and_check, args=(cache, remote[0]), daemon=True)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        writer.write(Path(path).read_bytes())
        writer.flush()
        partial.rename(copy)
        fcntl.flock(writer, fcntl.LOCK_SH)  # as a map of it does
        waiting.join(10)
        assert not waiting.is_alive()


@pytest.mark.parametrize("limit_bytes", [None, 5 * SHARD_BYTES])
def test_processes_share_a_disk_smaller_than_the_data(disk, remote, limit_bytes):
    fork = multiprocessing.get_context("fork")  # a new interpreter takes seconds to import all this
    processes = [fork.Process(target=read_at_random, args=(disk, remote, seed, limit_bytes)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    copies = list(disk.glob("*/*"))
    assert {path.suffix for path in copies} == {".u8"} and sum(map(os.path.getsize, copies)) >= 4 * SHARD_BYTES


def test_least_recently_mapped_copy_is_evicted_first(tmp_path, remote):
    cache = NodeCache(tmp_path / "cache", 3 * SHARD_BYTES)
    for number in (0, 1, 2, 0, 3):
        map_and_check(cache, remote[number])
    assert [is_copied(cache, remote[number]) for number in range(4)] == [True, False, True, True]


def test_mapped_copies_stay_and_other_shards_are_read_into_memory(tmp_path, remote):
    other_cache, cache = (NodeCache(tmp_path / "cache", 3 * SHARD_BYTES) for _ in range(2))
    maps = [map_and_check(other_cache, shard) for shard in remote[:3]]
    assert is_in_memory(map_and_check(cache, remote[3]))
    assert [is_copied(cache, shard) for shard in remote[:4]] == [True, True, True, False]
    del maps[0]
    assert not is_in_memory(map_and_check(cache, remote[3]))
    assert [is_copied(cache, shard) for shard in remote[:4]] == [False, True, True, True]


def test_own_maps_are_released_if_nothing_else_makes_room(tmp_path, remote):
    maps: list[np.ndarray] = []
    cache = NodeCache(tmp_path / "cache", 3 * SHARD_BYTES, release=maps.clear)
    maps += [cache.map(f"key/{sha256}.u8", REMOTE, path, sha256) for path, sha256 in remote[:1]]
    other_maps = [map_and_check(NodeCache(tmp_path / "cache", 3 * SHARD_BYTES), shard) for shard in remote[1:3]]
    assert not is_in_memory(map_and_check(cache, remote[3]))
    assert not maps and not is_copied(cache, remote[0]) and len(other_maps) == 2


def test_process_holds_few_maps(tmp_path, remote):
    """A process maps at most 1/32 of the cache, or one copy, so that others can evict the rest."""
    maps: list[np.ndarray] = []
    cache = NodeCache(tmp_path / "cache", 64 * SHARD_BYTES, release=maps.clear)
    for shard in remote:
        maps.append(map_and_check(cache, shard))
        assert len(maps) <= 3
    assert all(is_copied(cache, shard) for shard in remote)


@pytest.mark.parametrize(
    ("limit_bytes", "message"),
    [
        (SHARD_BYTES - 1, r"data\.node_cache_gb: one shard has 0\.000262 GB \(value 0\.000262143\)"),
        (
            None,
            r"0\.0 GB are free, too little for one shard \(0\.0021 GB\); set TMPDIR to a larger disk",
        ),
    ],
)
def test_shard_that_does_not_fit_is_a_config_error(disk, tmp_path, remote, limit_bytes, message):
    shard = remote[0] if limit_bytes else write_remote(tmp_path, DISK_BYTES + 1)
    with pytest.raises(ConfigError, match=message):
        map_and_check(NodeCache(disk, limit_bytes), shard)
    assert not list(disk.glob("*/*"))


def fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**12))


def test_full_disk_despite_free_space_evicts_and_retries(disk, remote, monkeypatch):
    """The reported free space is wrong, as with a quota or if other programs write."""
    cache = NodeCache(disk)
    for shard in remote[:4]:
        map_and_check(cache, shard)
    fill_disk(disk.parent / "other")
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=DISK_BYTES))
    monkeypatch.setattr("os.posix_fallocate", lambda *arguments: None)
    assert not is_in_memory(map_and_check(cache, remote[4]))
    assert [is_copied(cache, shard) for shard in remote[:5]] == [False, True, True, True, True]


def test_full_disk_without_copies_is_a_config_error(disk, remote):
    fill_disk(disk.parent / "other")
    with pytest.raises(ConfigError, match="set TMPDIR to a larger disk"):
        map_and_check(NodeCache(disk), remote[0])


def test_file_system_without_allocation_is_supported(tmp_path, remote, monkeypatch):
    def refuse(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    assert not is_in_memory(map_and_check(NodeCache(tmp_path / "cache"), remote[0]))


def hang_while_copying(folder: Path, shard: tuple[str, str]) -> None:
    cache = NodeCache(folder)
    allocate = cache._allocate

    def allocate_and_hang(*arguments, **keywords) -> bool:
        allocate(*arguments, **keywords)
        time.sleep(60)
        return True

    cache._allocate = allocate_and_hang  # type: ignore[method-assign]
    map_and_check(cache, shard)


def test_partial_copy_of_a_killed_process_is_removed(disk, remote):
    process = multiprocessing.get_context("fork").Process(target=hang_while_copying, args=(disk, remote[0]))
    process.start()
    deadline_s = time.monotonic() + 30
    while used_bytes(disk.parent) < SHARD_BYTES and time.monotonic() < deadline_s:
        time.sleep(0.02)
    (partial,) = disk.glob("*/*")
    assert partial.suffix == ".partial" and process.pid
    cache = NodeCache(disk, 2 * SHARD_BYTES)
    map_and_check(cache, remote[1])
    map_and_check(cache, remote[2])
    assert partial.exists() and not is_copied(cache, remote[1])  # it is being written and counts
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    map_and_check(cache, remote[1])
    assert not partial.exists() and is_copied(cache, remote[1])
    map_and_check(cache, remote[0])
    assert is_copied(cache, remote[0])


def test_damaged_download_is_not_cached(tmp_path, remote):
    cache, (path, _) = NodeCache(tmp_path / "cache"), remote[0]
    with pytest.raises(RuntimeError, match=r"its sha256 is .* instead of 0000; run jobs/prepare\.py"):
        cache.map("key/0000.u8", REMOTE, path, "0000")
    assert not list(cache.folder.glob("*/*"))


def test_node_with_a_small_disk_reads_a_larger_dataset(disk, tmp_path, monkeypatch):
    clip = ClipConfig(frames=4, fps=4, height=64, width=64)
    decode_config, location = shards.DecodeConfig(clip), str(tmp_path / "store")
    clips = np.random.default_rng(0).integers(256, size=(45, 2, 4, 64, 64, 3), dtype=np.uint8)
    set_location = write_test_set(location, decode_config, clips)
    expected = clips.reshape(-1, 4, 64, 64, 3)
    monkeypatch.setattr(tempfile, "tempdir", str(disk.parent))
    monkeypatch.setattr(clip_dataset, "is_local", lambda location: False)
    dataset = ClipDataset(set_location)
    assert dataset.size_bytes == expected.nbytes > 2 * DISK_BYTES
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(len(dataset))
        for first in range(0, len(order), 20):
            indices = order[first : first + 20]
            assert np.array_equal(dataset.get_clips(indices), expected[indices])
    assert used_bytes(disk.parent) <= 0.9 * DISK_BYTES


def test_nodes_with_too_small_caches_are_named(tmp_path, monkeypatch, capsys):
    decode_config = shards.DecodeConfig(ClipConfig(frames=4, fps=4, height=64, width=64))
    clips = np.random.default_rng(0).integers(256, size=(2, 3, 4, 64, 64, 3), dtype=np.uint8)
    set_location = write_test_set(str(tmp_path / "store"), decode_config, clips)
    shard_bytes = 3 * 4 * 64 * 64 * 3
    monkeypatch.setattr(prepare_module, "is_local", lambda location: False)

    def check(**capacities: float) -> str:
        monkeypatch.setattr(prepare_module, "_node_cache_bytes", lambda limit_gb: capacities)
        prepare_module._check_node_caches(ClipDataset(set_location, 1.5))
        return capsys.readouterr().err

    assert check(a=2 * shard_bytes, b=1e12) == ""
    assert check(a=1e12, b=2 * shard_bytes - 1).startswith("warning: data.node_cache_gb: node b can cache")
    with pytest.raises(ConfigError, match=r"data\.node_cache_gb: node c can cache .*\(value 1\.5\), but one shard"):
        check(a=1e12, c=shard_bytes - 1)


def test_capacity_is_the_limit_or_free_space_plus_copies(disk, remote):
    cache = NodeCache(disk)
    for _ in range(2):
        assert cache.capacity_bytes() == pytest.approx(0.9 * DISK_BYTES, abs=2**14)
        map_and_check(cache, remote[0])
    assert NodeCache(disk, SHARD_BYTES).capacity_bytes() == SHARD_BYTES
    assert NodeCache(disk, 10 * DISK_BYTES).capacity_bytes() == pytest.approx(DISK_BYTES, abs=2**14)


def write_test_set(location: str, decode_config: shards.DecodeConfig, clips: np.ndarray) -> str:
    """Writes clips, uint8 [shards, clips per shard, frames, height, width, 3], as a set without videos."""
    shards.write_decode_config(location, decode_config)
    rows, videos = [], []
    for number, shard_clips in enumerate(clips):
        content = shard_clips.tobytes()
        shard = hashlib.sha256(content).hexdigest()
        write_bytes(shards.get_shard_path(location, shard), content)
        for position, clip in enumerate(shard_clips):
            video = Video(f"{number:03}-{position}", f"{number:03}-{position}", "a", "training", "source", 1, 1)
            videos.append(video)
            row = {
                "identity": video.identity,
                "shard": shard,
                "shard_bytes": len(content),
                "first": position * len(clip),
            }
            row |= {"frames": len(clip), "padded": 0, "codec": "h264", "hdr": False, "sha256": video.id}
            rows.append(row | {"source_width": 64, "source_height": 64, "source_fps": 4.0, "seconds": 1.0})
    index = pa.Table.from_pylist(rows, shards.ROW_SCHEMA)
    return clip_dataset.write_set(location, Catalog("name", "root", REMOTE, tuple(videos)), index, LimitsConfig())
