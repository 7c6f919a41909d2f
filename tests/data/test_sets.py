"""A name in the store never stands for other clips, whatever jobs decode, mend or reject at the same time."""

import hashlib
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from giffy_ray.config import ConfigError, DataConfig, Experiment, LimitsConfig, override
from giffy_ray.data import clip_dataset as stores
from giffy_ray.data import loader, shards
from giffy_ray.data import prepare as preparing
from giffy_ray.data.catalog import Catalog, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.prepare import prepare
from giffy_ray.data.shards import DecodeConfig
from tests.conftest import moving_video
from tests.data.hostile import mark_flaky

FLAKY = "tests.data.hostile:sample_flaky"
VIDEOS, SLOW = 6, 2  # of these videos, the one that some machines are too slow for


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: map(decode, chunks))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for number in range(VIDEOS):
        path = tmp_path / "videos" / ("cats", "dogs")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        video = moving_video(number, 20, 30)
        path.write_bytes(mark_flaky(video) if number == SLOW else video)
    fields = {"clip.frames": 4, "clip.height": 8, "clip.width": 8, "data.max_reject_fraction": 0.5}
    return override(Experiment(), fields | {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs")})


def expected_of(store: ClipDataset) -> np.ndarray:
    return np.stack([decode_clip((Path(store.root) / name).read_bytes(), store.clip) for name in store.ids])


def whole(store: ClipDataset) -> bool:
    return np.array_equal(store.get_clips(np.arange(len(store))), expected_of(store))


def files_in(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """The files of shards and sets: name -> inode and time of writing."""
    found = [path for place in ("shards/*", "sets/*/*") for path in tmp_path.glob(f"runs/stores/*/{place}")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


# --- shards


@pytest.mark.parametrize("first", ["tests.data.hostile:sample", FLAKY])
def test_two_jobs_of_which_one_rejects_a_video_leave_each_other_their_clips(experiment, tmp_path, first):
    catalog = read_catalog(experiment.data.root, DataConfig())
    recipe, location = DecodeConfig(experiment.clip), str(tmp_path / "runs" / "stores" / "key")
    shards.write_recipe(location, recipe)

    def job(decoder: str) -> ClipDataset:
        (chunk,) = shards.chunks_of(catalog.videos)
        rows = shards.decode_shard(chunk, catalog.filesystem, recipe, LimitsConfig(), location, decoder)
        return ClipDataset(stores.write_set(location, catalog, rows, LimitsConfig()))

    (second,) = {"tests.data.hostile:sample", FLAKY} - {first}
    earlier = job(first)
    opened = ClipDataset(earlier.location)  # it maps its shard only now
    later = job(second)
    assert {len(earlier), len(later)} == {VIDEOS, VIDEOS - 1}
    for store in (earlier, opened, later, ClipDataset(earlier.location)):
        assert whole(store)
    # What both know is one clip of each video, whichever listing is read first.
    index = shards.read_index(location)
    assert index["identity"].to_pylist() == sorted(video.identity for video in catalog.videos)
    assert index["reason"].null_count == VIDEOS
    rows = shards.read_rows(location)
    assert len(rows) == 2 * VIDEOS
    assert shards.choose_rows(rows.take(np.arange(len(rows))[::-1])).equals(index)
    assert shards.damaged_shards(location, rows) == {}


def test_every_file_of_a_shard_is_named_by_its_content_and_written_once(experiment, tmp_path):
    prepare(experiment, decoder=FLAKY)
    prepare(experiment, again=True)
    before = files_in(tmp_path)
    names = [Path(name) for name in before if "/shards/" in name]
    assert len(names) == 4
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in names)
    shutil.rmtree(next(tmp_path.glob("runs/stores/*/catalogs")))
    for path in names:
        if path.suffix == ".parquet":
            path.unlink()  # as where a job was killed before it listed what it had written
    assert whole(prepare(experiment, decoder=FLAKY))
    after = files_in(tmp_path)
    assert {name: when for name, when in before.items() if name.endswith(".u8")}.items() <= after.items()


def test_a_video_is_one_row_however_often_it_was_rejected(experiment, tmp_path):
    catalog = read_catalog(experiment.data.root, DataConfig())
    recipe, location = DecodeConfig(experiment.clip), str(tmp_path / "store")
    (chunk,) = shards.chunks_of(catalog.videos[:1])
    path = Path(catalog.videos[0].path)
    path.rename(tmp_path / "aside")
    shards.decode_shard(chunk, catalog.filesystem, recipe, LimitsConfig(), location)
    assert shards.read_index(location)["reason"].to_pylist() == ["missing"]
    path.write_bytes(b"no video")
    shards.decode_shard(chunk, catalog.filesystem, recipe, LimitsConfig(), location)
    assert shards.read_index(location)["reason"].to_pylist() == ["not_video"]  # which no other try changes


# --- damage


def test_a_damaged_shard_is_mended_under_a_training_and_for_every_set(experiment, tmp_path, capsys):
    store = prepare(experiment)
    cats = prepare(override(experiment, {"data.categories": ("cats",)}))
    assert len(cats) == VIDEOS // 2
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    assert whole(store)  # and so mapped
    shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "videos" / "dogs" / "more.mp4").write_bytes(moving_video(9, 20, 30))
    more = prepare(experiment, again=True)
    assert f"{shard}: its sha256 is " in capsys.readouterr().err
    assert len(more) == VIDEOS + 1 and whole(more)
    for location in (store.location, cats.location):
        assert whole(ClipDataset(location))


def test_what_was_lost_of_a_prepared_set_is_decoded_again_unasked(experiment, tmp_path, capsys):
    store = prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    for damage, said in (
        (shard.unlink, "it is gone"),
        (lambda: shard.write_bytes(shard.read_bytes()[:-100]), "bytes and should have"),
    ):
        damage()
        with pytest.raises(RuntimeError, match=rf"{shard.name}: .*; run jobs/prepare\.py"):
            ClipDataset(store.location).get_clips(np.arange(VIDEOS))
        mended = prepare(experiment)
        assert f"{shard}: " in (told := capsys.readouterr().err) and said in told
        assert mended.location == store.location and whole(mended)


def test_a_lost_shard_whose_videos_decode_otherwise_now_is_another_set(experiment, tmp_path):
    store = prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.write_bytes(bytes(shard.stat().st_size))
    fewer = prepare(experiment, again=True, decoder=FLAKY)
    assert len(fewer) == VIDEOS - 1 and whole(fewer)
    assert fewer.fingerprint != store.fingerprint
    assert not shard.exists()  # nobody reads zeros for clips
    with pytest.raises(RuntimeError, match=r"run jobs/prepare\.py"):
        ClipDataset(store.location).get_clips(np.arange(VIDEOS))


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(2000)])
def test_a_damaged_listing_counts_as_not_there(experiment, tmp_path, capsys, content):
    prepare(experiment)
    (listing,) = tmp_path.glob("runs/stores/*/shards/*.parquet")
    before = listing.read_bytes()
    listing.write_bytes(content)
    assert whole(prepare(experiment, again=True))
    assert f"{listing}: damaged" in capsys.readouterr().err
    assert listing.read_bytes() == before


def test_a_reject_stays_known_where_the_shard_beside_it_was_lost(experiment, tmp_path):
    (tmp_path / "videos" / "cats" / "broken.mp4").write_bytes(b"no video")
    prepare(experiment)
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.write_bytes(bytes(shard.stat().st_size))
    # Decoded otherwise, so that the shard cannot be written again under its name.
    store = prepare(experiment, again=True, decoder=FLAKY)
    assert {reject["id"]: reject["reason"] for reject in store.rejects} == {
        "cats/broken.mp4": "not_video",
        "cats/2.mp4": "timeout",
    }
    assert whole(store) and not shard.exists()
    # Of a shard that another category shares, only what is asked for is decoded; the rest when that is asked for.
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.unlink()
    for category in ("cats", "dogs"):
        assert whole(prepare(override(experiment, {"data.categories": (category,)}), again=True))
    assert whole(prepare(experiment))


# --- sets


def test_a_set_does_not_change_where_a_reject_decodes_later(experiment, tmp_path):
    first = prepare(experiment, decoder=FLAKY)
    assert [reject["reason"] for reject in first.rejects] == ["timeout"]
    before, fingerprint, ids = files_in(tmp_path), first.fingerprint, first.ids
    assert prepare(experiment).location == first.location  # it stays as it was prepared
    second = prepare(experiment, again=True)
    assert len(second) == VIDEOS and whole(second)
    assert second.fingerprint != fingerprint
    assert before.items() <= files_in(tmp_path).items()
    started_again = ClipDataset(first.location)
    assert (started_again.ids, started_again.fingerprint) == (ids, fingerprint) and whole(started_again)
    assert prepare(experiment).location == second.location
    assert prepare(experiment, again=True).location == second.location


def test_jobs_at_once_that_see_other_results_end_with_one_set(experiment, tmp_path, monkeypatch):
    """Each reads the index before the other has written to it."""
    gate = threading.Barrier(2)
    decode, found = preparing._decode, {}
    monkeypatch.setattr(preparing, "_decode", lambda *words: (gate.wait(), decode(*words)))

    def job(decoder: str) -> None:
        found[decoder] = prepare(experiment, decoder=decoder)

    jobs = [threading.Thread(target=job, args=[decoder]) for decoder in ("tests.data.hostile:sample", FLAKY)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    one, other = found.values()
    assert one.location == other.location == prepare(experiment).location
    assert one.fingerprint == other.fingerprint and whole(one)


def test_of_many_that_choose_a_set_at_once_all_choose_the_same(experiment, tmp_path):
    catalog = read_catalog(experiment.data.root, DataConfig())
    location, places, chosen = str(tmp_path / "store"), [], []
    for number in range(8):
        place = f"{location}/sets/{number:016}"
        Path(place).mkdir(parents=True)
        (Path(place) / "set.json").write_text("{}")
        places.append(place)
    threads = [
        threading.Thread(target=lambda place=place: chosen.append(stores.choose_set(location, catalog, place)))
        for place in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == 8 and len(set(chosen)) == 1
    assert stores.set_location(location, catalog) == chosen[0]
    assert stores.choose_set(location, catalog, places[5], replace=True) == places[5]
    assert stores.set_location(location, catalog) == places[5]
    shutil.rmtree(places[5])  # somebody tidied up
    assert stores.set_location(location, catalog) is None


@pytest.mark.parametrize("content", [b"", b"{"])
@pytest.mark.parametrize("name", ["recipe.json", "catalogs/*", "set.json", "rows.arrow", "rejects.parquet"])
def test_what_a_power_cut_left_of_a_set_is_written_again(experiment, tmp_path, capsys, name, content):
    """A file that was renamed to its place may be there and empty."""
    first = prepare(experiment, decoder=FLAKY)
    pattern = name if "/" in name or name == "recipe.json" else f"sets/*/{name}"
    (damaged,) = (path for path in tmp_path.glob(f"runs/stores/*/{pattern}") if path.suffix != ".lock")
    before = damaged.read_bytes()
    damaged.write_bytes(content)
    mended = prepare(experiment)
    assert mended.location == first.location and whole(mended)
    assert damaged.read_bytes() == before
    told = f"{first.location}: damaged; it is written again\n"
    assert (told in capsys.readouterr().err) == ("sets/" in pattern)


# --- the fingerprint


def test_the_fingerprint_is_of_the_pixels_whatever_shard_they_lie_in(experiment, tmp_path, monkeypatch):
    store = prepare(experiment)
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 2)
    dealt = prepare(override(experiment, {"storage": str(tmp_path / "dealt")}))
    assert len(list(tmp_path.glob("dealt/stores/*/shards/*.u8"))) == 3
    assert dealt.fingerprint == store.fingerprint
    every = prepare(override(experiment, {"data.segments.frames": 3}))
    not_kept = prepare(override(experiment, {"data.cache_decoded": False}))
    assert {every.fingerprint, not_kept.fingerprint} == {store.fingerprint}


def test_the_fingerprint_tells_videos_of_the_same_names_and_sizes_apart(experiment, tmp_path):
    path, fingerprints = tmp_path / "videos" / "cats" / "0.mp4", set()
    videos = moving_video(0, 20, 30), moving_video(77, 20, 30)
    size = max(map(len, videos)) + 8
    for video in videos:
        padding = size - len(video)
        path.write_bytes(video + struct.pack("!I4s", padding, b"free") + bytes(padding - 8))
        assert path.stat().st_size == size
        store = prepare(experiment)
        assert whole(store)
        fingerprints.add(store.fingerprint)
    assert len(fingerprints) == 2


# --- a folder that goes away


def test_videos_are_not_rejected_because_their_folder_went_away(experiment, tmp_path, monkeypatch):
    """An unmounted disk is no fault of the videos: nothing is written down against them."""
    listed = preparing.read_catalog

    def then_gone(*words, **named) -> Catalog:
        catalog = listed(*words, **named)
        (tmp_path / "videos").rename(tmp_path / "unmounted")
        return catalog

    monkeypatch.setattr(preparing, "read_catalog", then_gone)
    with pytest.raises(ConfigError, match=rf"data\.root: {VIDEOS} videos were not read, .*start the job again"):
        prepare(override(experiment, {"data.max_reject_fraction": 1.0}))
    (tmp_path / "unmounted").rename(tmp_path / "videos")
    monkeypatch.undo()
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: map(decode, chunks))
    store = prepare(experiment)
    assert len(store) == VIDEOS and not store.rejects


def test_files_that_are_not_used_are_named_by_their_ending(experiment, tmp_path, capsys):
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
def test_rows_of_a_set_that_are_lost_are_written_again_and_nothing_is_decoded(experiment, monkeypatch, damage):
    store = prepare(experiment)
    content = (rows := Path(store.location) / "rows.arrow").read_bytes()
    damage(rows)
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: pytest.fail("decoded"))
    again = prepare(experiment)
    assert again.location == store.location and rows.read_bytes() == content and whole(again)
    rows.write_bytes(bytes(len(content)))
    assert whole(prepare(experiment, again=True)) and rows.read_bytes() == content


def test_a_set_of_another_format_is_written_again_and_nothing_is_decoded(experiment, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_FORMAT", 1)
        before = prepare(experiment)
    (Path(before.location) / "rows.arrow").unlink()
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: pytest.fail("decoded"))
    after = prepare(experiment)
    assert after.fingerprint == before.fingerprint and whole(after)


def test_many_damaged_shards_take_one_pass_over_the_rows(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 1)
    store = prepare(experiment, decoder="tests.data.hostile:sample")
    before = files_in(tmp_path)
    for path in tmp_path.glob("runs/stores/*/shards/*.u8"):
        path.unlink()
    calls, members_of = [], shards.members_of
    monkeypatch.setattr(shards, "members_of", lambda rows, found: calls.append(len(found)) or members_of(rows, found))
    assert whole(prepare(experiment))
    assert calls == [len(store)] and files_in(tmp_path).keys() == before.keys()
