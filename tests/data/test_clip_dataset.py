"""What is stored of a data set, shard by shard; Ray Data's part in it is in tests/data/test_prepare.py."""

import hashlib
import json
import shutil
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from giffy_ray.config import ClipConfig, ConfigError, DataConfig, LimitsConfig
from giffy_ray.core.storage import filesystem_of, read_bytes, write_bytes
from giffy_ray.data import catalog as catalogs
from giffy_ray.data import clip_dataset as stores
from giffy_ray.data import shards
from giffy_ray.data.catalog import Catalog, Video, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import RejectedVideo, decode_clip, sample_source
from giffy_ray.data.shards import DecodeConfig
from tests.conftest import moving_video

CLIP = ClipConfig(frames=6, fps=10, height=16, width=16)
LIMITS = LimitsConfig()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for number in range(3):
        path = root / "training" / "x" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 20, 30))
    (root / "validation" / "y").mkdir(parents=True)
    (root / "validation" / "y" / "held.mp4").write_bytes(moving_video(9, 6, 30))
    (root / "training" / "x" / "broken.mp4").write_bytes(b"no video")
    names = ("0", "1", "2", "broken", "gone")
    (root / "trainingSet.csv").write_text("".join(f"x/{name}.mp4,x,3,0\n" for name in names))
    return root


def catalog_of(root: Path) -> Catalog:
    return read_catalog(str(root), DataConfig())


def decode(catalog: Catalog, recipe: DecodeConfig, location: str, chunks: Iterable[pa.Table] | None = None) -> None:
    shards.write_recipe(location, recipe)
    for chunk in shards.chunks_of(catalog.videos) if chunks is None else chunks:
        shards.decode_shard(chunk, catalog.filesystem, recipe, LIMITS, location)


def stored(root: Path, location: Path, recipe: DecodeConfig) -> ClipDataset:
    catalog = catalog_of(root)
    decode(catalog, recipe, str(location))
    return ClipDataset(stores.write_set(str(location), catalog, shards.read_index(str(location)), LIMITS))


def test_gather_gives_the_clip_of_every_row(root: Path, tmp_path: Path):
    store = stored(root, tmp_path / "store", DecodeConfig(CLIP))
    assert store.ids == [*(f"training/x/{number}.mp4" for number in range(3)), "validation/y/held.mp4"]
    expected = np.stack([decode_clip((root / clip_id).read_bytes(), CLIP) for clip_id in store.ids])
    for order in ([3, 0, 2, 1], [1, 1], []):
        assert np.array_equal(store.get_clips(np.asarray(order, dtype=int)), expected[order])


@pytest.mark.parametrize(
    "recipe",
    [DecodeConfig(CLIP, keep_all_frames=True), DecodeConfig(CLIP, cache=False), DecodeConfig(CLIP, True, False)],
)
def test_what_is_kept_changes_no_clip(root: Path, tmp_path: Path, recipe: DecodeConfig):
    usual = stored(root, tmp_path / "store", DecodeConfig(CLIP))
    other = stored(root, tmp_path / "other", recipe)
    assert np.array_equal(other.get_clips(np.arange(4)), usual.get_clips(np.arange(4)))
    if recipe.keep_all_frames:
        frames, times_s = other.frames_of(0)
        source = sample_source((root / other.ids[0]).read_bytes(), CLIP)
        assert np.array_equal(frames, source.clip)
        # 6 frames at 10 a second end after 0.5 s, which are 16 frames at 30 a second.
        assert np.allclose(times_s, np.arange(16) / 30)
    if not recipe.cache:
        assert other.bytes == 0
        assert not list((tmp_path / "other" / "shards").glob("*.u8"))


def test_rows_and_rejects_account_for_every_video(root: Path, tmp_path: Path):
    store = stored(root, tmp_path / "store", DecodeConfig(CLIP))
    assert {reject["id"]: reject["reason"] for reject in store.rejects} == {
        "training/x/broken.mp4": "not_video",
        "training/x/gone.mp4": "missing",
    }
    assert all(reject["detail"] for reject in store.rejects)
    assert store.split_indices("training").tolist() == [0, 1, 2]
    assert store.split_indices("validation").tolist() == [3]
    # 6 frames at 30 a second are 0.2 s: two frames at 10 a second.
    assert store.facts["padded"].to_pylist() == [0, 0, 0, 4]
    assert store.facts["codec"].to_pylist() == ["h264"] * 4
    assert store.facts["source_fps"].to_pylist() == [30] * 4
    assert store.facts["source_width"].to_pylist() == [64] * 4


def test_a_video_that_nobody_accounts_for_is_an_error(root: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 clips and 0 rejects do not account for the 6 videos"):
        stores.write_set(str(tmp_path / "store"), catalog_of(root), shards.ROW_SCHEMA.empty_table(), LIMITS)
    assert not (tmp_path / "store").exists()


def test_only_what_is_new_is_decoded_and_sets_share_it(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    before = stored(root, location, DecodeConfig(CLIP))
    files = {path: path.stat().st_mtime_ns for path in (location / "shards").iterdir()}
    (root / "validation" / "y" / "more.mp4").write_bytes(moving_video(4, 20, 30))
    catalog = catalog_of(root)
    index = shards.read_index(str(location))
    new = [video for video in catalog.videos if video.identity not in set(index["identity"].to_pylist())]
    assert [video.id for video in new] == ["validation/y/more.mp4"]
    decode(catalog, DecodeConfig(CLIP), str(location), shards.chunks_of(new))
    after = ClipDataset(stores.write_set(str(location), catalog, shards.read_index(str(location)), LIMITS))
    assert files.items() <= {path: path.stat().st_mtime_ns for path in (location / "shards").iterdir()}.items()
    assert after.ids == [*before.ids, "validation/y/more.mp4"]
    assert np.array_equal(after.get_clips(np.arange(4)), before.get_clips(np.arange(4)))
    assert after.fingerprint != before.fingerprint
    assert ClipDataset(before.location).ids == before.ids


def test_another_setting_is_another_store_and_another_place_is_the_same_data(root: Path, tmp_path: Path):
    recipes = [
        DecodeConfig(CLIP),
        DecodeConfig(ClipConfig()),
        DecodeConfig(ClipConfig(frames=6, fps=10, height=16, width=16, fit="crop")),
        DecodeConfig(CLIP, keep_all_frames=True),
        DecodeConfig(CLIP, cache=False),
    ]
    assert len({recipe.key for recipe in recipes}) == len(recipes)
    assert all(DecodeConfig.from_json(recipe.to_json()) == recipe for recipe in recipes)
    first = stored(root, tmp_path / "store", DecodeConfig(CLIP))
    moved = root.rename(tmp_path / "elsewhere")
    moved.joinpath("training/x/gone.mp4").unlink(missing_ok=True)
    assert stored(moved, tmp_path / "store", DecodeConfig(CLIP)).fingerprint == first.fingerprint


def test_damage_is_found_and_forgotten(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    store = stored(root, location, DecodeConfig(CLIP))
    index = shards.read_index(str(location))
    assert shards.damaged_shards(str(location), index) == {}
    (shard,) = (location / "shards").glob("*.u8")
    content = bytearray(shard.read_bytes())
    assert hashlib.sha256(content).hexdigest() == shard.stem
    content[1000] ^= 1
    shard.write_bytes(content)
    damaged = shards.damaged_shards(str(location), index)
    assert list(damaged) == [shard.stem]
    assert "sha256" in damaged[shard.stem]
    shard.unlink()
    assert shards.damaged_shards(str(location), index) == {shard.stem: "it is gone"}
    shards.delete_shards(str(location), damaged)
    assert sorted(shards.read_index(str(location))["reason"].to_pylist()) == ["missing", "not_video"]
    decode(catalog_of(root), DecodeConfig(CLIP), str(location))
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == shard.stem
    assert np.array_equal(ClipDataset(store.location).get_clips(np.arange(4)), store.get_clips(np.arange(4)))


def test_a_clip_goes_before_a_reject_of_the_same_video(root: Path, tmp_path: Path):
    catalog, location = catalog_of(root), str(tmp_path / "store")
    shards.write_recipe(location, DecodeConfig(CLIP))
    tight = LimitsConfig(pixels=16)
    for chunk in shards.chunks_of(catalog.videos):
        shards.decode_shard(chunk, catalog.filesystem, DecodeConfig(CLIP), tight, location)
    reasons = shards.read_index(location)["reason"].to_pylist()
    assert sorted(map(str, reasons)) == ["missing", "not_video", "too_large", "too_large", "too_large", "too_large"]
    decode(catalog, DecodeConfig(CLIP), location, shards.chunks_of(catalog.videos[:2]))
    index = shards.read_index(location)
    assert len(index) == 6
    assert index["reason"].null_count == 2


def test_what_a_killed_job_left_half_written_is_no_clip(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    (location / "shards").mkdir(parents=True)
    (location / "shards" / "abc.u8").write_bytes(b"frames without a list")
    (location / "shards" / "def.parquet.123.partial").write_bytes(b"PAR1")
    assert len(shards.read_index(str(location))) == 0
    assert len(stored(root, location, DecodeConfig(CLIP))) == 4


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.symlink_to(path), "missing|unreadable|not_file"),
        (lambda path: path.symlink_to("nowhere"), "missing"),
        (lambda path: path.mkdir(), "not_file"),
        (lambda path: __import__("os").mkfifo(path), "not_file"),
        (lambda path: path.symlink_to("/proc/self/mem"), "unreadable"),
        (lambda path: path.symlink_to("/dev/zero"), "not_file"),
        (lambda path: path.write_bytes(bytes(2**20 + 1)), "too_large"),
    ],
)
def test_what_cannot_be_read_has_a_reason(tmp_path: Path, make, reason: str):
    path = tmp_path / "x.mp4"
    make(path)
    with pytest.raises(RejectedVideo) as raised:
        shards.read_video(fs.LocalFileSystem(), str(path), LimitsConfig(file_mb=1))
    assert raised.value.reason in reason.split("|")


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("Empty path component in path bucket/a//x.mp4"),
        pa.ArrowNotImplementedError("no such thing"),
        PermissionError(13, "Permission denied"),
        OSError("When reading information for key: AWS Error EXPIRED_TOKEN"),
        TimeoutError("no answer"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RuntimeError("a filesystem of somebody else's"),
    ],
)
@pytest.mark.parametrize("when", ["get_file_info", "open_input_stream"])
def test_whatever_reading_a_file_raises_is_one_reject(tmp_path: Path, error: Exception, when: str):
    class Failing:
        def __getattr__(self, name: str):
            return getattr(fs.LocalFileSystem(), name)

    def fail(path: str):
        raise error

    path, failing = tmp_path / "x.mp4", Failing()
    path.write_bytes(b"video")
    setattr(failing, when, fail)
    with pytest.raises(RejectedVideo) as raised:
        shards.read_video(failing, str(path), LIMITS)  # type: ignore[arg-type]
    assert raised.value.reason == "unreadable"
    assert raised.value.detail == f"{type(error).__name__}: {error}"


def test_what_decoding_lacks_ends_the_job(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A decoder that does not start is no fault of the videos."""
    catalog = catalog_of(root)
    (chunk,) = shards.chunks_of(catalog.videos)
    with pytest.raises(RuntimeError, match="the decoding process did not start"):
        shards.decode_shard(
            chunk, catalog.filesystem, DecodeConfig(CLIP), LIMITS, str(tmp_path / "store"), "no.such.module:sample"
        )
    assert not (tmp_path / "store").exists()


def test_keys_with_empty_parts_are_listed_as_they_are_and_rejected_by_name(bucket: str, tmp_path: Path):
    import boto3

    keys = ["cats/0.mp4", "cats/1.mp4", "cats//2.mp4", "/3.mp4", "dogs///4.mp4", "3.mp4"]
    videos = {key: moving_video(seed, 20, 30) for seed, key in enumerate(keys)}
    for key, video in videos.items():
        boto3.client("s3").put_object(Bucket="bucket", Key=f"empty parts/{key}", Body=video)
    catalog = read_catalog(f"{bucket}/empty parts", DataConfig())
    assert {video.id: video.category for video in catalog.videos} == {
        "cats/0.mp4": "cats",
        "cats/1.mp4": "cats",
        "cats//2.mp4": "cats",
        "/3.mp4": "empty parts",
        "dogs///4.mp4": "dogs",
        "3.mp4": "empty parts",
    }
    location = str(tmp_path / "store")
    decode(catalog, DecodeConfig(CLIP), location)
    store = ClipDataset(stores.write_set(location, catalog, shards.read_index(location), LIMITS))
    assert store.ids == ["3.mp4", "cats/0.mp4", "cats/1.mp4"]
    expected = np.stack([decode_clip(videos[name], CLIP) for name in store.ids])
    assert np.array_equal(store.get_clips(np.arange(3)), expected)
    assert [reject["id"] for reject in store.rejects] == ["/3.mp4", "cats//2.mp4", "dogs///4.mp4"]
    for reject in store.rejects:
        assert reject["reason"] == "unreadable"
        assert reject["path"] == f"bucket/empty parts/{reject['id']}"
        assert f"Empty path component in path {reject['path']}" in reject["detail"]


def test_a_bucket_that_cannot_be_listed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    class Away:
        def get_file_info(self, path):
            raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(catalogs, "filesystem_of", lambda root: (Away(), "bucket/set"))
    with pytest.raises(ConfigError, match=r"data\.root: it cannot be read: AWS Error ACCESS_DENIED .*s3://bucket/set"):
        read_catalog("s3://bucket/set", DataConfig())


# --- many rows, of videos that nobody decodes

ROWS = 5_000


def large_catalog(count: int = ROWS) -> Catalog:
    splits = ("training", "training", "training", "validation", "test")
    videos = [
        Video(
            id=f"c{number % 7}/é {number:06}.mp4",
            path=f"/videos/c{number % 7}/é {number:06}.mp4",
            category=f"c{number % 7}",
            split=splits[number % 5],
            source=f"film {number // 3}",
            size_bytes=number,
            modified_ns=1,
        )
        for number in range(count)
    ]
    return Catalog(
        "large", "/videos", fs.LocalFileSystem(), tuple(sorted(videos, key=lambda video: video.id)), "/videos"
    )


def large_index(catalog: Catalog) -> pa.Table:
    """Of every tenth video a reject, of the others a clip, 32 to a shard."""
    columns: dict[str, list] = {name: [] for name in shards.ROW_SCHEMA.names}
    for number, video in enumerate(catalog.videos):
        known = number % 10 > 0
        row = {"identity": video.identity, "frames": 6, "first": number % 32 * 6, "codec": "h264", "hdr": False}
        row |= {"shard": hashlib.sha256(b"%d" % (number // 32)).hexdigest(), "shard_bytes": 32 * 6 * 16 * 16 * 3}
        row |= {"sha256": hashlib.sha256(video.id.encode()).hexdigest(), "padded": number % 2}
        if not known:
            row = {"identity": video.identity, "reason": f"reason {number % 3}", "detail": str(number)}
        for name, column in columns.items():
            column.append(row.get(name))
    return pa.table(columns, shards.ROW_SCHEMA)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Catalog]:
    """(location, catalog) of a set of many rows, in more than one batch of Arrow."""
    location, catalog = str(tmp_path_factory.mktemp("large") / "store"), large_catalog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_BATCH_ROWS", 2000)
        shards.write_recipe(location, DecodeConfig(CLIP))
        return stores.write_set(location, catalog, large_index(catalog), LIMITS), catalog


def test_opening_a_store_maps_its_rows_and_copies_none(large: tuple[str, Catalog]):
    location, _ = large
    ClipDataset(location)  # what is imported on first use
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    store = ClipDataset(location)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - allocated < 10_000
    assert taken < 100_000  # the ids alone take 350 kB as Python strings
    assert f"{location}/rows.arrow" in Path("/proc/self/maps").read_text()
    assert len(store) == ROWS * 9 // 10
    row = store.split_indices("validation")[-1]
    assert store.ids[row] and store.categories[row] and store.sources[row]
    assert pa.total_allocated_bytes() - allocated < 10_000


def test_columns_are_the_lists_of_the_catalog(large: tuple[str, Catalog]):
    location, catalog = large
    store = ClipDataset(location)
    clips = [video for number, video in enumerate(catalog.videos) if number % 10]
    for column, field in ((store.ids, "id"), (store.categories, "category"), (store.sources, "source")):
        expected = [getattr(video, field) for video in clips]
        assert list(column) == expected and column == expected and expected == column
        assert column != expected[:-1] and column != [*expected[:-1], "other"] and column != "text"
        assert column[17] == column[np.int64(17)] == expected[17] and column[-1] == expected[-1]
        assert column[3:4400:2] == expected[3:4400:2] and column[:0] == []
        assert np.asarray(column).tolist() == expected
        assert column.index(expected[4_200]) == expected.index(expected[4_200])
        assert column.count(expected[5]) == expected.count(expected[5])
        assert "no such text" not in column
        with pytest.raises(IndexError):
            column[len(expected)]
    splits = np.asarray([video.split for video in clips])
    for split in ("training", "validation", "test", "ood"):
        rows = store.split_indices(split)
        assert rows.dtype == np.int64 and np.array_equal(rows, np.flatnonzero(splits == split))
    assert store.counts() == {**Counter(splits.tolist()), "rejects": ROWS // 10}
    assert store.category_counts() == Counter((video.category, video.split) for video in clips)
    assert store.bytes == len(clips) * 6 * 16 * 16 * 3
    assert store.facts["padded"].to_pylist() == [number % 2 for number in range(ROWS) if number % 10]


def test_rejects_are_read_when_they_are_asked_for(large: tuple[str, Catalog]):
    location, catalog = large
    store = ClipDataset(location)
    rejected = [(number, video) for number, video in enumerate(catalog.videos) if number % 10 == 0]
    expected = [
        {name: getattr(video, name) for name in ("id", "path", "category", "split")}
        | {"reason": f"reason {number % 3}", "detail": str(number)}
        for number, video in rejected
    ]
    assert store.rejects == expected and len(store.rejects) == ROWS // 10 and store.rejects[:2] == expected[:2]
    assert store.reject_counts() == Counter(reject["reason"] for reject in expected)
    none = ClipDataset(
        stores.write_set(location.rpartition("/sets/")[0], large_catalog(0), large_index(large_catalog(0)), LIMITS)
    )
    assert not none.rejects and not none.ids and list(none.split_indices("training")) == []
    assert none.counts() == {"rejects": 0} and none.reject_counts() == {}


def test_the_fingerprint_is_stored_and_what_it_always_was(large: tuple[str, Catalog], tmp_path: Path):
    location, _ = large
    digest = hashlib.sha256()
    for row in stores.read_set(location).to_pylist():
        digest.update("{id}\0{split}\0{size_bytes}\0{sha256}\n".format(**row).encode())
    assert ClipDataset(location).fingerprint == digest.hexdigest()[:16]
    copy = tmp_path / "store" / "sets" / "key"
    shutil.copytree(Path(location).parent.parent, tmp_path / "store")
    Path(tmp_path, "store", "sets", Path(location).name).rename(copy)
    about = json.loads((copy / "set.json").read_text())
    (copy / "set.json").write_text(json.dumps(about | {"fingerprint": "as stored"}))
    assert ClipDataset(str(copy)).fingerprint == "as stored"


def test_a_set_whose_rows_are_lost_or_cut_off_is_told_and_is_no_set(large: tuple[str, Catalog], tmp_path: Path):
    location, catalog = large
    store = tmp_path / "store"
    shutil.copytree(Path(location).parent.parent, store)
    place = str(store / "sets" / Path(location).name)
    assert stores.choose_set(str(store), catalog, place) == place == stores.set_location(str(store), catalog)
    rows = Path(place, "rows.arrow")
    rows.write_bytes(rows.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match=r"rows\.arrow: .*; run jobs/prepare\.py"):
        ClipDataset(place)
    assert not stores.is_whole(place)  # so prepare writes it again
    rows.unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.arrow: no such file; run jobs/prepare\.py"):
        ClipDataset(place)
    assert not stores.is_whole(place)  # so prepare writes it again


def test_a_node_copies_the_rows_of_a_remote_set_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    location, catalog = f"{bucket}/remote rows", large_catalog(50)
    shards.write_recipe(location, DecodeConfig(CLIP))
    place = stores.write_set(location, catalog, large_index(catalog), LIMITS)
    filesystem, remote = filesystem_of(f"{place}/rows.arrow")
    content = read_bytes(f"{place}/rows.arrow")
    write_bytes(f"{place}/rows.arrow", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=r"rows\.arrow: its sha256 is .*; run jobs/prepare\.py"):
        ClipDataset(place)
    write_bytes(f"{place}/rows.arrow", content)
    assert ClipDataset(place).ids == [video.id for number, video in enumerate(catalog.videos) if number % 10]
    filesystem.delete_file(remote)
    assert ClipDataset(place).ids[0] == catalog.videos[1].id
    (copy,) = tmp_path.glob("giffy_ray-*/sets/*/*.arrow")
    assert copy.read_bytes() == content


def test_members_of_shards_are_found_in_one_pass():
    rows = large_index(large_catalog(3000))
    twice = pa.concat_tables([rows, rows]).take(np.random.default_rng(0).permutation(6000))
    wanted = list(dict.fromkeys(shard for shard in rows["shard"].to_pylist() if shard))[::2]
    by_order = sorted((r for r in rows.to_pylist() if r["shard"]), key=lambda row: row["first"])
    expected = {shard: [row["identity"] for row in by_order if row["shard"] == shard] for shard in wanted}
    assert shards.members_of(twice, wanted) == expected
    assert shards.members_of(twice, {}) == {} == shards.members_of(twice, ["no such shard"])
    assert shards.are_in(rows, wanted).to_pylist() == [row["shard"] in wanted for row in rows.to_pylist()]
