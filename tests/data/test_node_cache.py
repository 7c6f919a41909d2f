"""Copies of shards on a node: real processes on a real disk of 2 MB, and data sets that are larger than it."""

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
from giffy_ray.data import prepare as preparing
from giffy_ray.data import shards
from giffy_ray.data import store as stores
from giffy_ray.data.catalog import Catalog, Video
from giffy_ray.data.node_cache import NodeCache
from giffy_ray.data.store import Store
from giffy_ray.storage import PARTIAL, write_bytes

SHARD_BYTES, DISK_BYTES = 2**18, 2**21
REMOTE = fs.LocalFileSystem()  # stands for a bucket


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a cache on a disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place / "shards"
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(path, sha256) of 20 shards, 5 MB together."""
    folder = tmp_path_factory.mktemp("remote")
    return [write_remote(folder, SHARD_BYTES, seed) for seed in range(20)]


def write_remote(folder: Path, size: int, seed: int = 0) -> tuple[str, str]:
    content = np.random.default_rng(seed).bytes(size)
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / "remote" / sha256
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path), sha256


def mapped(cache: NodeCache, shard: tuple[str, str]) -> np.ndarray:
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
    """What a worker does: maps shards in random order, and holds the newest 256 of them."""
    held: list[np.ndarray] = []
    cache = NodeCache(folder, limit_bytes, release=held.clear)
    for number in np.random.default_rng(seed).integers(len(shards), size=40):
        held.append(mapped(cache, shards[number]))
    assert used_bytes(folder) <= (limit_bytes or 0.9 * DISK_BYTES)


def is_in_memory(content: np.ndarray) -> bool:
    return not isinstance(content, np.memmap)


def test_thread_that_waits_for_a_download_uses_it_although_others_map_it(tmp_path, remote):
    """Its readers hold shared locks on the file for good, so whoever waits for an exclusive one would wait forever."""
    path, sha256 = remote[0]
    cache = NodeCache(tmp_path / "cache")
    copy = cache.folder / "key" / f"{sha256}.u8"
    copy.parent.mkdir(parents=True)
    partial = copy.with_name(copy.name + PARTIAL)
    with partial.open("xb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        waiting = threading.Thread(target=mapped, args=(cache, remote[0]), daemon=True)
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
def test_processes_share_a_disk_that_is_smaller_than_the_data(disk, remote, limit_bytes):
    fork = multiprocessing.get_context("fork")  # a new interpreter takes seconds to import all this
    processes = [fork.Process(target=read_at_random, args=(disk, remote, seed, limit_bytes)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    copies = list(disk.glob("*/*"))
    assert {path.suffix for path in copies} == {".u8"} and sum(map(os.path.getsize, copies)) >= 4 * SHARD_BYTES


def test_the_least_recently_mapped_copy_is_evicted_first(tmp_path, remote):
    cache = NodeCache(tmp_path / "cache", 3 * SHARD_BYTES)
    for number in (0, 1, 2, 0, 3):
        mapped(cache, remote[number])
    assert [is_copied(cache, remote[number]) for number in range(4)] == [True, False, True, True]


def test_a_copy_that_is_mapped_stays_and_the_rest_is_read_into_memory(tmp_path, remote):
    theirs, ours = (NodeCache(tmp_path / "cache", 3 * SHARD_BYTES) for _ in range(2))
    held = [mapped(theirs, shard) for shard in remote[:3]]
    assert is_in_memory(mapped(ours, remote[3]))
    assert [is_copied(ours, shard) for shard in remote[:4]] == [True, True, True, False]
    del held[0]
    assert not is_in_memory(mapped(ours, remote[3]))
    assert [is_copied(ours, shard) for shard in remote[:4]] == [False, True, True, True]


def test_our_own_maps_are_dropped_where_nothing_else_makes_room(tmp_path, remote):
    held: list[np.ndarray] = []
    cache = NodeCache(tmp_path / "cache", 3 * SHARD_BYTES, release=held.clear)
    held += [cache.map(f"key/{sha256}.u8", REMOTE, path, sha256) for path, sha256 in remote[:1]]
    other = [mapped(NodeCache(tmp_path / "cache", 3 * SHARD_BYTES), shard) for shard in remote[1:3]]
    assert not is_in_memory(mapped(cache, remote[3]))
    assert not held and not is_copied(cache, remote[0]) and len(other) == 2


def test_a_process_keeps_few_maps(tmp_path, remote):
    """Each 32nd of the cache, or one: other processes can then evict the rest."""
    held: list[np.ndarray] = []
    cache = NodeCache(tmp_path / "cache", 64 * SHARD_BYTES, release=held.clear)
    for shard in remote:
        held.append(mapped(cache, shard))
        assert len(held) <= 3
    assert all(is_copied(cache, shard) for shard in remote)


@pytest.mark.parametrize(
    ("limit_bytes", "message"),
    [
        (SHARD_BYTES - 1, r"data\.node_cache_gb: one shard of the clips has 0\.000262 GB \(value 0\.000262143\)"),
        (
            None,
            r"0\.0 GB are free, too little for one shard .* \(0\.0021 GB\); set TMPDIR to a larger disk",
        ),
    ],
)
def test_one_shard_that_does_not_fit_is_an_error(disk, tmp_path, remote, limit_bytes, message):
    shard = remote[0] if limit_bytes else write_remote(tmp_path, DISK_BYTES + 1)
    with pytest.raises(ConfigError, match=message):
        mapped(NodeCache(disk, limit_bytes), shard)
    assert not list(disk.glob("*/*"))


def fill(path: Path) -> None:
    """Writes until the disk takes no more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**12))


def test_a_disk_that_is_full_meanwhile_evicts_and_tries_again(disk, remote, monkeypatch):
    """The file system says that there is space, and then that there is none, as where others write, or by a quota."""
    cache = NodeCache(disk)
    for shard in remote[:4]:
        mapped(cache, shard)
    fill(disk.parent / "of others")
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=DISK_BYTES))
    monkeypatch.setattr("os.posix_fallocate", lambda *words: None)
    assert not is_in_memory(mapped(cache, remote[4]))
    assert [is_copied(cache, shard) for shard in remote[:5]] == [False, True, True, True, True]


def test_a_full_disk_without_copies_to_evict_is_told(disk, remote):
    fill(disk.parent / "of others")
    with pytest.raises(ConfigError, match="set TMPDIR to a larger disk"):
        mapped(NodeCache(disk), remote[0])


def test_a_file_system_that_cannot_allocate_is_used_all_the_same(tmp_path, remote, monkeypatch):
    def refuse(*words: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    assert not is_in_memory(mapped(NodeCache(tmp_path / "cache"), remote[0]))


def hang_while_copying(folder: Path, shard: tuple[str, str]) -> None:
    cache = NodeCache(folder)
    allocate = cache._allocate

    def then_hang(*words, **named) -> bool:
        allocate(*words, **named)
        time.sleep(60)
        return True

    cache._allocate = then_hang  # type: ignore[method-assign]
    mapped(cache, shard)


def test_what_a_killed_process_was_copying_takes_no_space(disk, remote):
    process = multiprocessing.get_context("fork").Process(target=hang_while_copying, args=(disk, remote[0]))
    process.start()
    deadline_s = time.monotonic() + 30
    while used_bytes(disk.parent) < SHARD_BYTES and time.monotonic() < deadline_s:
        time.sleep(0.02)
    (partial,) = disk.glob("*/*")
    assert partial.suffix == ".partial" and process.pid
    cache = NodeCache(disk, 2 * SHARD_BYTES)
    mapped(cache, remote[1])
    mapped(cache, remote[2])
    assert partial.exists() and not is_copied(cache, remote[1])  # it is being written, and counts
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    mapped(cache, remote[1])
    assert not partial.exists() and is_copied(cache, remote[1])
    mapped(cache, remote[0])
    assert is_copied(cache, remote[0])


def test_a_damaged_arrival_is_not_kept(tmp_path, remote):
    cache, (path, _) = NodeCache(tmp_path / "cache"), remote[0]
    with pytest.raises(RuntimeError, match=r"its sha256 is .*, not 0000; run jobs/prepare\.py"):
        cache.map("key/0000.u8", REMOTE, path, "0000")
    assert not list(cache.folder.glob("*/*"))


def test_a_node_with_a_small_disk_reads_a_data_set_that_is_larger(disk, tmp_path, monkeypatch):
    clip = ClipConfig(frames=4, fps=4, height=64, width=64)
    recipe, location = shards.Recipe(clip), str(tmp_path / "store")
    clips = np.random.default_rng(0).integers(256, size=(45, 2, 4, 64, 64, 3), dtype=np.uint8)
    place, whole = written_set(location, recipe, clips), clips.reshape(-1, 4, 64, 64, 3)
    monkeypatch.setattr(tempfile, "tempdir", str(disk.parent))
    monkeypatch.setattr(stores, "is_local", lambda location: False)
    store = Store(place)
    assert store.bytes == whole.nbytes > 2 * DISK_BYTES
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(len(store))
        for first in range(0, len(order), 20):
            chosen = order[first : first + 20]
            assert np.array_equal(store.gather(chosen), whole[chosen])
    assert used_bytes(disk.parent) <= 0.9 * DISK_BYTES


def test_nodes_that_cannot_keep_the_clips_are_named_before_the_start(tmp_path, monkeypatch, capsys):
    recipe = shards.Recipe(ClipConfig(frames=4, fps=4, height=64, width=64))
    clips = np.random.default_rng(0).integers(256, size=(2, 3, 4, 64, 64, 3), dtype=np.uint8)
    place = written_set(str(tmp_path / "store"), recipe, clips)
    shard = 3 * 4 * 64 * 64 * 3
    monkeypatch.setattr(preparing, "is_local", lambda location: False)

    def told(**capacities: float) -> str:
        monkeypatch.setattr(preparing, "_node_cache_bytes", lambda limit_gb: capacities)
        preparing._check_node_caches(Store(place, 1.5))
        return capsys.readouterr().err

    assert told(a=2 * shard, b=1e12) == ""
    assert told(a=1e12, b=2 * shard - 1).startswith("warning: data.node_cache_gb: the node b may keep")
    with pytest.raises(ConfigError, match=r"data\.node_cache_gb: the node c may keep .*\(value 1\.5\), and a shard"):
        told(a=1e12, c=shard - 1)


def test_the_capacity_is_the_limit_or_what_is_free_and_ours(disk, remote):
    cache = NodeCache(disk)
    for _ in range(2):
        assert cache.capacity_bytes() == pytest.approx(0.9 * DISK_BYTES, abs=2**14)
        mapped(cache, remote[0])
    assert NodeCache(disk, SHARD_BYTES).capacity_bytes() == SHARD_BYTES
    assert NodeCache(disk, 10 * DISK_BYTES).capacity_bytes() == pytest.approx(DISK_BYTES, abs=2**14)


def written_set(location: str, recipe: shards.Recipe, clips: np.ndarray) -> str:
    """uint8 [shards, clips of each, frames, height, width, 3] as a set, without any video."""
    shards.write_recipe(location, recipe)
    rows, videos = [], []
    for number, together in enumerate(clips):
        content = together.tobytes()
        shard = hashlib.sha256(content).hexdigest()
        write_bytes(shards.shard_path(location, shard), content)
        for place, clip in enumerate(together):
            video = Video(f"{number:03}-{place}", f"{number:03}-{place}", "a", "training", "source", 1, 1)
            videos.append(video)
            row = {"identity": video.identity, "shard": shard, "shard_bytes": len(content), "first": place * len(clip)}
            row |= {"frames": len(clip), "padded": 0, "codec": "h264", "hdr": False, "sha256": video.id}
            rows.append(row | {"source_width": 64, "source_height": 64, "source_fps": 4.0, "seconds": 1.0})
    index = pa.Table.from_pylist(rows, shards.ROW_SCHEMA)
    return stores.write_set(location, Catalog("name", "root", REMOTE, tuple(videos)), index, LimitsConfig())
