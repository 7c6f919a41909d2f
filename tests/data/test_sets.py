"""Names in a store never refer to other clips, whatever concurrent jobs decode, repair or reject."""

import hashlib
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from giffy_ray.config import ConfigError, DataConfig, Experiment, LimitsConfig, override
from giffy_ray.data import clip_dataset, loader, shards
from giffy_ray.data import prepare as prepare_module
from giffy_ray.data.catalog import Catalog, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.prepare import prepare
from giffy_ray.data.shards import DecodeConfig
from tests.conftest import moving_video
from tests.data.hostile import mark_flaky

FLAKY = "tests.data.hostile:sample_flaky"
VIDEOS, SLOW = 6, 2  # number of videos, and which of them times out with the flaky decoder


@pytest.fixture(autouse=True)
def decode_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: map(decode, chunks))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for number in range(VIDEOS):
        path = tmp_path / "videos" / ("cats", "dogs")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        video = moving_video(number, 20, 30)
        path.write_bytes(mark_flaky(video) if number == SLOW else video)
    fields = {"clip.frames": 4, "clip.height": 8, "clip.width": 8, "data.max_reject_fraction": 0.5}
    return override(Experiment(), fields | {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs")})


def decode_expected_clips(dataset: ClipDataset) -> np.ndarray:
    return np.stack([decode_clip((Path(dataset.root) / name).read_bytes(), dataset.clip) for name in dataset.ids])


def has_expected_clips(dataset: ClipDataset) -> bool:
    return np.array_equal(dataset.get_clips(np.arange(len(dataset))), decode_expected_clips(dataset))


def list_files(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """The files of shards and sets: path -> inode and modification time."""
    stats = {}
    for pattern in ("shards/*", "sets/*/*"):
        for path in tmp_path.glob(f"runs/stores/*/{pattern}"):
            stats[str(path)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return stats


# --- shards


@pytest.mark.parametrize("first", ["tests.data.hostile:sample", FLAKY])
def test_jobs_with_different_results_keep_their_own_clips(experiment, tmp_path, first):
    catalog = read_catalog(experiment.data.root, DataConfig())
    decode_config, location = DecodeConfig(experiment.clip), str(tmp_path / "runs" / "stores" / "key")
    shards.write_decode_config(location, decode_config)

    def run_job(decoder: str) -> ClipDataset:
        (chunk,) = shards.chunk_videos(catalog.videos)
        rows = shards.decode_shard(chunk, catalog.filesystem, decode_config, LimitsConfig(), location, decoder)
        return ClipDataset(clip_dataset.write_set(location, catalog, rows, LimitsConfig()))

    (second,) = {"tests.data.hostile:sample", FLAKY} - {first}
    earlier = run_job(first)
    opened = ClipDataset(earlier.location)  # maps its shard after the second job
    later = run_job(second)
    assert {len(earlier), len(later)} == {VIDEOS, VIDEOS - 1}
    for dataset in (earlier, opened, later, ClipDataset(earlier.location)):
        assert has_expected_clips(dataset)
    # Together they have one clip of each video, whichever listing is read first.
    index = shards.read_index(location)
    assert index["identity"].to_pylist() == sorted(video.identity for video in catalog.videos)
    assert index["reason"].null_count == VIDEOS
    rows = shards.read_rows(location)
    assert len(rows) == 2 * VIDEOS
    assert shards.choose_rows(rows.take(np.arange(len(rows))[::-1])).equals(index)
    assert shards.find_damaged_shards(location, rows) == {}


def test_shard_files_are_named_by_content_and_written_once(experiment, tmp_path):
    prepare(experiment, decoder=FLAKY)
    prepare(experiment, again=True)
    before = list_files(tmp_path)
    names = [Path(name) for name in before if "/shards/" in name]
    assert len(names) == 4
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in names)
    shutil.rmtree(next(tmp_path.glob("runs/stores/*/catalogs")))
    for path in names:
        if path.suffix == ".parquet":
            path.unlink()  # as if a job was killed before it wrote the listing
    assert has_expected_clips(prepare(experiment, decoder=FLAKY))
    after = list_files(tmp_path)
    assert {name: stat for name, stat in before.items() if name.endswith(".u8")}.items() <= after.items()


def test_video_rejected_twice_has_one_row_in_the_index(experiment, tmp_path):
    catalog = read_catalog(experiment.data.root, DataConfig())
    decode_config, location = DecodeConfig(experiment.clip), str(tmp_path / "store")
    (chunk,) = shards.chunk_videos(catalog.videos[:1])
    path = Path(catalog.videos[0].path)
    path.rename(tmp_path / "aside")
    shards.decode_shard(chunk, catalog.filesystem, decode_config, LimitsConfig(), location)
    assert shards.read_index(location)["reason"].to_pylist() == ["missing"]
    path.write_bytes(b"no video")
    shards.decode_shard(chunk, catalog.filesystem, decode_config, LimitsConfig(), location)
    assert shards.read_index(location)["reason"].to_pylist() == ["not_video"]  # permanent, so it replaces `missing`


# --- damage


def test_damaged_shard_is_repaired_for_open_datasets_and_every_set(experiment, tmp_path, capsys):
    dataset = prepare(experiment)
    cats = prepare(override(experiment, {"data.categories": ("cats",)}))
    assert len(cats) == VIDEOS // 2
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    assert has_expected_clips(dataset)  # maps the shard
    shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "videos" / "dogs" / "more.mp4").write_bytes(moving_video(9, 20, 30))
    more = prepare(experiment, again=True)
    assert f"{shard}: its sha256 is " in capsys.readouterr().err
    assert len(more) == VIDEOS + 1 and has_expected_clips(more)
    for location in (dataset.location, cats.location):
        assert has_expected_clips(ClipDataset(location))


def test_lost_shard_is_decoded_without_again(experiment, tmp_path, capsys):
    dataset = prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    for damage, message in (
        (shard.unlink, "it is missing"),
        (lambda: shard.write_bytes(shard.read_bytes()[:-100]), "bytes instead of"),
    ):
        damage()
        with pytest.raises(RuntimeError, match=rf"{shard.name}: .*; run jobs/prepare\.py"):
            ClipDataset(dataset.location).get_clips(np.arange(VIDEOS))
        repaired = prepare(experiment)
        errors = capsys.readouterr().err
        assert f"{shard}: " in errors and message in errors
        assert repaired.location == dataset.location and has_expected_clips(repaired)


def test_lost_shard_that_decodes_differently_gives_another_set(experiment, tmp_path):
    dataset = prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.write_bytes(bytes(shard.stat().st_size))
    fewer = prepare(experiment, again=True, decoder=FLAKY)
    assert len(fewer) == VIDEOS - 1 and has_expected_clips(fewer)
    assert fewer.fingerprint != dataset.fingerprint
    assert not shard.exists()  # otherwise zeros would be read as clips
    with pytest.raises(RuntimeError, match=r"run jobs/prepare\.py"):
        ClipDataset(dataset.location).get_clips(np.arange(VIDEOS))


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(2000)])
def test_damaged_listing_is_ignored(experiment, tmp_path, capsys, content):
    prepare(experiment)
    (listing,) = tmp_path.glob("runs/stores/*/shards/*.parquet")
    before = listing.read_bytes()
    listing.write_bytes(content)
    assert has_expected_clips(prepare(experiment, again=True))
    assert f"{listing}: damaged" in capsys.readouterr().err
    assert listing.read_bytes() == before


def test_reject_stays_known_if_its_shard_is_lost(experiment, tmp_path):
    (tmp_path / "videos" / "cats" / "broken.mp4").write_bytes(b"no video")
    prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.write_bytes(bytes(shard.stat().st_size))
    # The result differs, so the shard is not written again under its name.
    dataset = prepare(experiment, again=True, decoder=FLAKY)
    assert {reject["id"]: reject["reason"] for reject in dataset.rejects} == {
        "cats/broken.mp4": "not_video",
        "cats/2.mp4": "timeout",
    }
    assert has_expected_clips(dataset) and not shard.exists()
    # Only the requested category of a lost shard is decoded; the other one when it is requested.
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.unlink()
    for category in ("cats", "dogs"):
        assert has_expected_clips(prepare(override(experiment, {"data.categories": (category,)}), again=True))
    assert has_expected_clips(prepare(experiment))


# --- sets


def test_set_does_not_change_if_a_reject_decodes_later(experiment, tmp_path):
    first = prepare(experiment, decoder=FLAKY)
    assert [reject["reason"] for reject in first.rejects] == ["timeout"]
    before, fingerprint, ids = list_files(tmp_path), first.fingerprint, first.ids
    assert prepare(experiment).location == first.location  # unchanged without `again`
    second = prepare(experiment, again=True)
    assert len(second) == VIDEOS and has_expected_clips(second)
    assert second.fingerprint != fingerprint
    assert before.items() <= list_files(tmp_path).items()
    reopened = ClipDataset(first.location)
    assert (reopened.ids, reopened.fingerprint) == (ids, fingerprint) and has_expected_clips(reopened)
    assert prepare(experiment).location == second.location
    assert prepare(experiment, again=True).location == second.location


def test_concurrent_jobs_with_different_results_share_one_set(experiment, tmp_path, monkeypatch):
    """Each job reads the index before the other one writes to it."""
    gate = threading.Barrier(2)
    decode_chunks, datasets = prepare_module._decode_chunks, {}

    def wait_and_decode(*arguments) -> None:
        gate.wait()
        decode_chunks(*arguments)

    monkeypatch.setattr(prepare_module, "_decode_chunks", wait_and_decode)

    def run_job(decoder: str) -> None:
        datasets[decoder] = prepare(experiment, decoder=decoder)

    jobs = [threading.Thread(target=run_job, args=[decoder]) for decoder in ("tests.data.hostile:sample", FLAKY)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    first, second = datasets.values()
    assert first.location == second.location == prepare(experiment).location
    assert first.fingerprint == second.fingerprint and has_expected_clips(first)


def test_concurrent_calls_choose_the_same_set(experiment, tmp_path):
    catalog = read_catalog(experiment.data.root, DataConfig())
    location, sets, chosen = str(tmp_path / "store"), [], []
    for number in range(8):
        set_location = f"{location}/sets/{number:016}"
        Path(set_location).mkdir(parents=True)
        (Path(set_location) / "set.json").write_text("{}")
        sets.append(set_location)

    def choose(set_location: str) -> None:
        chosen.append(clip_dataset.choose_set(location, catalog, set_location))

    threads = [threading.Thread(target=choose, args=[set_location]) for set_location in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == 8 and len(set(chosen)) == 1
    assert clip_dataset.find_set(location, catalog) == chosen[0]
    assert clip_dataset.choose_set(location, catalog, sets[5], replace=True) == sets[5]
    assert clip_dataset.find_set(location, catalog) == sets[5]
    shutil.rmtree(sets[5])  # deleted by a user
    assert clip_dataset.find_set(location, catalog) is None


@pytest.mark.parametrize("content", [b"", b"{"])
@pytest.mark.parametrize("name", ["recipe.json", "catalogs/*", "set.json", "rows.arrow", "rejects.parquet"])
def test_file_damaged_by_a_power_failure_is_written_again(experiment, tmp_path, capsys, name, content):
    """A file that was renamed to its final path may be empty."""
    first = prepare(experiment, decoder=FLAKY)
    pattern = name if "/" in name or name == "recipe.json" else f"sets/*/{name}"
    (damaged,) = (path for path in tmp_path.glob(f"runs/stores/*/{pattern}") if path.suffix != ".lock")
    before = damaged.read_bytes()
    damaged.write_bytes(content)
    repaired = prepare(experiment)
    assert repaired.location == first.location and has_expected_clips(repaired)
    assert damaged.read_bytes() == before
    message = f"{first.location}: damaged; writing it again\n"
    assert (message in capsys.readouterr().err) == ("sets/" in pattern)


# --- the fingerprint


def test_fingerprint_does_not_depend_on_the_shards(experiment, tmp_path, monkeypatch):
    dataset = prepare(experiment)
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 2)
    resharded = prepare(override(experiment, {"storage": str(tmp_path / "resharded")}))
    assert len(list(tmp_path.glob("resharded/stores/*/shards/*.u8"))) == 3
    assert resharded.fingerprint == dataset.fingerprint
    all_frames = prepare(override(experiment, {"data.segments.frames": 3}))
    uncached = prepare(override(experiment, {"data.cache_decoded": False}))
    assert {all_frames.fingerprint, uncached.fingerprint} == {dataset.fingerprint}


def test_fingerprint_depends_on_the_pixels(experiment, tmp_path):
    path, fingerprints = tmp_path / "videos" / "cats" / "0.mp4", set()
    videos = moving_video(0, 20, 30), moving_video(77, 20, 30)
    size = max(map(len, videos)) + 8
    for video in videos:
        padding = size - len(video)
        path.write_bytes(video + struct.pack("!I4s", padding, b"free") + bytes(padding - 8))
        assert path.stat().st_size == size
        dataset = prepare(experiment)
        assert has_expected_clips(dataset)
        fingerprints.add(dataset.fingerprint)
    assert len(fingerprints) == 2


# --- unreachable folders and unused files


def test_unreachable_folder_does_not_reject_videos(experiment, tmp_path, monkeypatch):
    """With an unmounted disk the videos are not at fault, so no rejects are recorded."""
    original_read_catalog = prepare_module.read_catalog

    def read_catalog_and_unmount(*arguments, **keywords) -> Catalog:
        catalog = original_read_catalog(*arguments, **keywords)
        (tmp_path / "videos").rename(tmp_path / "unmounted")
        return catalog

    monkeypatch.setattr(prepare_module, "read_catalog", read_catalog_and_unmount)
    with pytest.raises(ConfigError, match=rf"data\.root: {VIDEOS} videos were not read, .*start the job again"):
        prepare(override(experiment, {"data.max_reject_fraction": 1.0}))
    (tmp_path / "unmounted").rename(tmp_path / "videos")
    monkeypatch.undo()
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: map(decode, chunks))
    dataset = prepare(experiment)
    assert len(dataset) == VIDEOS and not dataset.rejects


def test_unused_files_are_printed_by_extension(experiment, tmp_path, capsys):
    for name in ("cats/a.wmv", "cats/b.WMV", "dogs/c.wmv", "dogs/d.wmv", "dogs/new\nline.mpg"):
        (tmp_path / "videos" / name).write_bytes(b"another container")
    prepare(experiment)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        f"5 files below {tmp_path}/videos are not used as videos (ffmpeg -i FILE FILE.mp4 converts them):",
        r"  1 .mpg: dogs/new\nline.mpg",
        "  4 .wmv: cats/a.wmv, cats/b.WMV, dogs/c.wmv, ...",
    ]


@pytest.mark.parametrize("damage", [lambda rows: rows.unlink(), lambda rows: rows.write_bytes(rows.read_bytes()[:-1])])
def test_lost_rows_of_a_set_are_written_again_without_decoding(experiment, monkeypatch, damage):
    dataset = prepare(experiment)
    rows = Path(dataset.location) / "rows.arrow"
    content = rows.read_bytes()
    damage(rows)
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: pytest.fail("decoded"))
    repaired = prepare(experiment)
    assert repaired.location == dataset.location and rows.read_bytes() == content and has_expected_clips(repaired)
    rows.write_bytes(bytes(len(content)))
    assert has_expected_clips(prepare(experiment, again=True)) and rows.read_bytes() == content


def test_set_of_another_format_is_written_again_without_decoding(experiment, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clip_dataset, "_FORMAT", 1)
        before = prepare(experiment)
    (Path(before.location) / "rows.arrow").unlink()
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: pytest.fail("decoded"))
    after = prepare(experiment)
    assert after.fingerprint == before.fingerprint and has_expected_clips(after)


def test_damaged_shards_are_grouped_in_one_pass(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 1)
    dataset = prepare(experiment, decoder="tests.data.hostile:sample")
    before = list_files(tmp_path)
    for path in tmp_path.glob("runs/stores/*/shards/*.u8"):
        path.unlink()
    group_by_shard = shards.group_by_shard
    calls = []

    def count_and_group(rows, damaged) -> dict[str, list[str]]:
        calls.append(len(damaged))
        return group_by_shard(rows, damaged)

    monkeypatch.setattr(shards, "group_by_shard", count_and_group)
    assert has_expected_clips(prepare(experiment))
    assert calls == [len(dataset)] and list_files(tmp_path).keys() == before.keys()
