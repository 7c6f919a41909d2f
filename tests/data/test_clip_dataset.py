"""Shards, sets and ClipDataset without Ray; tests/data/test_prepare.py covers decoding through Ray Data."""

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
from giffy_ray.data import catalog as catalog_module
from giffy_ray.data import clip_dataset, shards
from giffy_ray.data.catalog import Catalog, Video, read_catalog
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import RejectedVideo, decode_clip, sample_all_frames
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
    (root / "validation" / "y" / "brief.mp4").write_bytes(moving_video(9, 6, 30))
    (root / "training" / "x" / "broken.mp4").write_bytes(b"no video")
    names = ("0", "1", "2", "broken", "gone")
    (root / "trainingSet.csv").write_text("".join(f"x/{name}.mp4,x,3,0\n" for name in names))
    return root


def list_videos(root: Path) -> Catalog:
    return read_catalog(str(root), DataConfig())


def decode(
    catalog: Catalog, decode_config: DecodeConfig, location: str, chunks: Iterable[pa.Table] | None = None
) -> None:
    shards.write_decode_config(location, decode_config)
    for chunk in shards.chunk_videos(catalog.videos) if chunks is None else chunks:
        shards.decode_shard(chunk, catalog.filesystem, decode_config, LIMITS, location)


def make_dataset(root: Path, location: Path, decode_config: DecodeConfig) -> ClipDataset:
    catalog = list_videos(root)
    decode(catalog, decode_config, str(location))
    return ClipDataset(clip_dataset.write_set(str(location), catalog, shards.read_index(str(location)), LIMITS))


def test_get_clips_returns_the_clip_of_each_index(root: Path, tmp_path: Path):
    dataset = make_dataset(root, tmp_path / "store", DecodeConfig(CLIP))
    assert dataset.ids == [*(f"training/x/{number}.mp4" for number in range(3)), "validation/y/brief.mp4"]
    expected = np.stack([decode_clip((root / clip_id).read_bytes(), CLIP) for clip_id in dataset.ids])
    for order in ([3, 0, 2, 1], [1, 1], []):
        assert np.array_equal(dataset.get_clips(np.asarray(order, dtype=int)), expected[order])


@pytest.mark.parametrize(
    "decode_config",
    [DecodeConfig(CLIP, keep_all_frames=True), DecodeConfig(CLIP, cache=False), DecodeConfig(CLIP, True, False)],
)
def test_clips_do_not_depend_on_what_is_stored(root: Path, tmp_path: Path, decode_config: DecodeConfig):
    default = make_dataset(root, tmp_path / "store", DecodeConfig(CLIP))
    other = make_dataset(root, tmp_path / "other", decode_config)
    assert np.array_equal(other.get_clips(np.arange(4)), default.get_clips(np.arange(4)))
    if decode_config.keep_all_frames:
        frames, times_s = other.get_frames(0)
        source = sample_all_frames((root / other.ids[0]).read_bytes(), CLIP)
        assert np.array_equal(frames, source.clip)
        # 6 frames at 10 fps span 0.5 s, which are 16 frames at 30 fps.
        assert np.allclose(times_s, np.arange(16) / 30)
    if not decode_config.cache:
        assert other.size_bytes == 0
        assert not list((tmp_path / "other" / "shards").glob("*.u8"))


def test_clips_and_rejects_account_for_every_video(root: Path, tmp_path: Path):
    dataset = make_dataset(root, tmp_path / "store", DecodeConfig(CLIP))
    assert {reject["id"]: reject["reason"] for reject in dataset.rejects} == {
        "training/x/broken.mp4": "not_video",
        "training/x/gone.mp4": "missing",
    }
    assert all(reject["detail"] for reject in dataset.rejects)
    assert dataset.split_indices("training").tolist() == [0, 1, 2]
    assert dataset.split_indices("validation").tolist() == [3]
    # 6 frames at 30 fps last 0.2 s: two frames at 10 fps.
    assert dataset.metadata["padded"].to_pylist() == [0, 0, 0, 4]
    assert dataset.metadata["codec"].to_pylist() == ["h264"] * 4
    assert dataset.metadata["source_fps"].to_pylist() == [30] * 4
    assert dataset.metadata["source_width"].to_pylist() == [64] * 4


def test_write_set_requires_an_outcome_of_every_video(root: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 clips and 0 rejects do not account for the 6 videos"):
        clip_dataset.write_set(str(tmp_path / "store"), list_videos(root), shards.ROW_SCHEMA.empty_table(), LIMITS)
    assert not (tmp_path / "store").exists()


def test_sets_share_shards_and_only_new_videos_are_decoded(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    before = make_dataset(root, location, DecodeConfig(CLIP))
    files = {path: path.stat().st_mtime_ns for path in (location / "shards").iterdir()}
    (root / "validation" / "y" / "more.mp4").write_bytes(moving_video(4, 20, 30))
    catalog = list_videos(root)
    index = shards.read_index(str(location))
    new = [video for video in catalog.videos if video.identity not in set(index["identity"].to_pylist())]
    assert [video.id for video in new] == ["validation/y/more.mp4"]
    decode(catalog, DecodeConfig(CLIP), str(location), shards.chunk_videos(new))
    after = ClipDataset(clip_dataset.write_set(str(location), catalog, shards.read_index(str(location)), LIMITS))
    assert files.items() <= {path: path.stat().st_mtime_ns for path in (location / "shards").iterdir()}.items()
    assert after.ids == [*before.ids, "validation/y/more.mp4"]
    assert np.array_equal(after.get_clips(np.arange(4)), before.get_clips(np.arange(4)))
    assert after.fingerprint != before.fingerprint
    assert ClipDataset(before.location).ids == before.ids


def test_key_depends_on_settings_and_fingerprint_not_on_the_folder(root: Path, tmp_path: Path):
    decode_configs = [
        DecodeConfig(CLIP),
        DecodeConfig(ClipConfig()),
        DecodeConfig(ClipConfig(frames=6, fps=10, height=16, width=16, fit="crop")),
        DecodeConfig(CLIP, keep_all_frames=True),
        DecodeConfig(CLIP, cache=False),
    ]
    assert len({decode_config.key for decode_config in decode_configs}) == len(decode_configs)
    assert all(DecodeConfig.from_json(decode_config.to_json()) == decode_config for decode_config in decode_configs)
    first = make_dataset(root, tmp_path / "store", DecodeConfig(CLIP))
    moved = root.rename(tmp_path / "elsewhere")
    moved.joinpath("training/x/gone.mp4").unlink(missing_ok=True)
    assert make_dataset(moved, tmp_path / "store", DecodeConfig(CLIP)).fingerprint == first.fingerprint


def test_damaged_shard_is_found_deleted_and_decoded_again(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    dataset = make_dataset(root, location, DecodeConfig(CLIP))
    index = shards.read_index(str(location))
    assert shards.find_damaged_shards(str(location), index) == {}
    (shard,) = (location / "shards").glob("*.u8")
    content = bytearray(shard.read_bytes())
    assert hashlib.sha256(content).hexdigest() == shard.stem
    content[1000] ^= 1
    shard.write_bytes(content)
    damaged = shards.find_damaged_shards(str(location), index)
    assert list(damaged) == [shard.stem]
    assert "sha256" in damaged[shard.stem]
    shard.unlink()
    assert shards.find_damaged_shards(str(location), index) == {shard.stem: "it is missing"}
    shards.delete_shards(str(location), damaged)
    assert sorted(shards.read_index(str(location))["reason"].to_pylist()) == ["missing", "not_video"]
    decode(list_videos(root), DecodeConfig(CLIP), str(location))
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == shard.stem
    assert np.array_equal(ClipDataset(dataset.location).get_clips(np.arange(4)), dataset.get_clips(np.arange(4)))


def test_clip_takes_precedence_over_a_reject_of_the_same_video(root: Path, tmp_path: Path):
    catalog, location = list_videos(root), str(tmp_path / "store")
    shards.write_decode_config(location, DecodeConfig(CLIP))
    tight = LimitsConfig(pixels=16)
    for chunk in shards.chunk_videos(catalog.videos):
        shards.decode_shard(chunk, catalog.filesystem, DecodeConfig(CLIP), tight, location)
    reasons = shards.read_index(location)["reason"].to_pylist()
    assert sorted(map(str, reasons)) == ["missing", "not_video", "too_large", "too_large", "too_large", "too_large"]
    decode(catalog, DecodeConfig(CLIP), location, shards.chunk_videos(catalog.videos[:2]))
    index = shards.read_index(location)
    assert len(index) == 6
    assert index["reason"].null_count == 2


def test_incomplete_files_of_a_killed_job_are_ignored(root: Path, tmp_path: Path):
    location = tmp_path / "store"
    (location / "shards").mkdir(parents=True)
    (location / "shards" / "abc.u8").write_bytes(b"frames without a listing")
    (location / "shards" / "def.parquet.123.partial").write_bytes(b"PAR1")
    assert len(shards.read_index(str(location))) == 0
    assert len(make_dataset(root, location, DecodeConfig(CLIP))) == 4


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
def test_unreadable_file_is_rejected_with_a_reason(tmp_path: Path, make, reason: str):
    path = tmp_path / "x.mp4"
    make(path)
    with pytest.raises(RejectedVideo) as rejected:
        shards.read_video(fs.LocalFileSystem(), str(path), LimitsConfig(file_mb=1))
    assert rejected.value.reason in reason.split("|")


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("Empty path component in path bucket/a//x.mp4"),
        pa.ArrowNotImplementedError("no such thing"),
        PermissionError(13, "Permission denied"),
        OSError("When reading information for key: AWS Error EXPIRED_TOKEN"),
        TimeoutError("no answer"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RuntimeError("a custom file system"),
    ],
)
@pytest.mark.parametrize("when", ["get_file_info", "open_input_stream"])
def test_any_error_of_reading_a_file_is_one_reject(tmp_path: Path, error: Exception, when: str):
    class Failing:
        def __getattr__(self, name: str):
            return getattr(fs.LocalFileSystem(), name)

    def fail(path: str):
        raise error

    path, failing = tmp_path / "x.mp4", Failing()
    path.write_bytes(b"video")
    setattr(failing, when, fail)
    with pytest.raises(RejectedVideo) as rejected:
        shards.read_video(failing, str(path), LIMITS)  # type: ignore[arg-type]
    assert rejected.value.reason == "unreadable"
    assert rejected.value.detail == f"{type(error).__name__}: {error}"


def test_decoder_that_does_not_start_fails_the_job(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The videos are not at fault, so they must not become rejects."""
    catalog = list_videos(root)
    (chunk,) = shards.chunk_videos(catalog.videos)
    with pytest.raises(RuntimeError, match="the decoding process did not start"):
        shards.decode_shard(
            chunk, catalog.filesystem, DecodeConfig(CLIP), LIMITS, str(tmp_path / "store"), "no.such.module:sample"
        )
    assert not (tmp_path / "store").exists()


def test_keys_with_empty_parts_are_listed_and_rejected(bucket: str, tmp_path: Path):
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
    dataset = ClipDataset(clip_dataset.write_set(location, catalog, shards.read_index(location), LIMITS))
    assert dataset.ids == ["3.mp4", "cats/0.mp4", "cats/1.mp4"]
    expected = np.stack([decode_clip(videos[name], CLIP) for name in dataset.ids])
    assert np.array_equal(dataset.get_clips(np.arange(3)), expected)
    assert [reject["id"] for reject in dataset.rejects] == ["/3.mp4", "cats//2.mp4", "dogs///4.mp4"]
    for reject in dataset.rejects:
        assert reject["reason"] == "unreadable"
        assert reject["path"] == f"bucket/empty parts/{reject['id']}"
        assert f"Empty path component in path {reject['path']}" in reject["detail"]


def test_bucket_that_cannot_be_listed_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    class UnreachableFileSystem:
        def get_file_info(self, path):
            raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(catalog_module, "filesystem_of", lambda root: (UnreachableFileSystem(), "bucket/set"))
    with pytest.raises(ConfigError, match=r"data\.root: cannot be read: AWS Error ACCESS_DENIED .*s3://bucket/set"):
        read_catalog("s3://bucket/set", DataConfig())


# --- many rows, without decoding

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
    """Every tenth video is a reject, the others are clips, 32 per shard."""
    columns: dict[str, list] = {name: [] for name in shards.ROW_SCHEMA.names}
    for number, video in enumerate(catalog.videos):
        is_reject = number % 10 == 0
        row = {"identity": video.identity, "frames": 6, "first": number % 32 * 6, "codec": "h264", "hdr": False}
        row |= {"shard": hashlib.sha256(b"%d" % (number // 32)).hexdigest(), "shard_bytes": 32 * 6 * 16 * 16 * 3}
        row |= {"sha256": hashlib.sha256(video.id.encode()).hexdigest(), "padded": number % 2}
        if is_reject:
            row = {"identity": video.identity, "reason": f"reason {number % 3}", "detail": str(number)}
        for name, column in columns.items():
            column.append(row.get(name))
    return pa.table(columns, shards.ROW_SCHEMA)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Catalog]:
    """(set location, catalog) of a set with more than one Arrow batch."""
    location, catalog = str(tmp_path_factory.mktemp("large") / "store"), large_catalog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_dataset, "_BATCH_ROWS", 2000)
        shards.write_decode_config(location, DecodeConfig(CLIP))
        return clip_dataset.write_set(location, catalog, large_index(catalog), LIMITS), catalog


def test_opening_a_dataset_maps_its_rows_without_copying(large: tuple[str, Catalog]):
    location, _ = large
    ClipDataset(location)  # imports modules on first use
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    dataset = ClipDataset(location)
    python_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - allocated < 10_000
    assert python_bytes < 100_000  # the ids alone take 350 kB as Python strings
    assert f"{location}/rows.arrow" in Path("/proc/self/maps").read_text()
    assert len(dataset) == ROWS * 9 // 10
    index = dataset.split_indices("validation")[-1]
    assert dataset.ids[index] and dataset.categories[index] and dataset.sources[index]
    assert pa.total_allocated_bytes() - allocated < 10_000


def test_columns_equal_the_lists_of_the_catalog(large: tuple[str, Catalog]):
    location, catalog = large
    dataset = ClipDataset(location)
    clips = [video for number, video in enumerate(catalog.videos) if number % 10]
    for column, field in ((dataset.ids, "id"), (dataset.categories, "category"), (dataset.sources, "source")):
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
        indices = dataset.split_indices(split)
        assert indices.dtype == np.int64 and np.array_equal(indices, np.flatnonzero(splits == split))
    assert dataset.count_by_split() == {**Counter(splits.tolist()), "rejects": ROWS // 10}
    assert dataset.count_by_category() == Counter((video.category, video.split) for video in clips)
    assert dataset.size_bytes == len(clips) * 6 * 16 * 16 * 3
    assert dataset.metadata["padded"].to_pylist() == [number % 2 for number in range(ROWS) if number % 10]


def test_rejects_are_read(large: tuple[str, Catalog]):
    location, catalog = large
    dataset = ClipDataset(location)
    rejected = [(number, video) for number, video in enumerate(catalog.videos) if number % 10 == 0]
    expected = [
        {name: getattr(video, name) for name in ("id", "path", "category", "split")}
        | {"reason": f"reason {number % 3}", "detail": str(number)}
        for number, video in rejected
    ]
    assert dataset.rejects == expected and len(dataset.rejects) == ROWS // 10 and dataset.rejects[:2] == expected[:2]
    assert dataset.count_rejects_by_reason() == Counter(reject["reason"] for reject in expected)
    empty_catalog = large_catalog(0)
    store_location = location.rpartition("/sets/")[0]
    empty = ClipDataset(clip_dataset.write_set(store_location, empty_catalog, large_index(empty_catalog), LIMITS))
    assert not empty.rejects and not empty.ids and list(empty.split_indices("training")) == []
    assert empty.count_by_split() == {"rejects": 0} and empty.count_rejects_by_reason() == {}


def test_fingerprint_is_stored_and_stable(large: tuple[str, Catalog], tmp_path: Path):
    location, _ = large
    digest = hashlib.sha256()
    for row in clip_dataset.read_set(location).to_pylist():
        digest.update("{id}\0{split}\0{size_bytes}\0{sha256}\n".format(**row).encode())
    assert ClipDataset(location).fingerprint == digest.hexdigest()[:16]
    copy = tmp_path / "store" / "sets" / "key"
    shutil.copytree(Path(location).parent.parent, tmp_path / "store")
    Path(tmp_path, "store", "sets", Path(location).name).rename(copy)
    set_info = json.loads((copy / "set.json").read_text())
    (copy / "set.json").write_text(json.dumps(set_info | {"fingerprint": "as stored"}))
    assert ClipDataset(str(copy)).fingerprint == "as stored"


def test_set_with_lost_or_truncated_rows_is_rejected(large: tuple[str, Catalog], tmp_path: Path):
    location, catalog = large
    store = tmp_path / "store"
    shutil.copytree(Path(location).parent.parent, store)
    set_location = str(store / "sets" / Path(location).name)
    assert (
        clip_dataset.choose_set(str(store), catalog, set_location)
        == set_location
        == clip_dataset.find_set(str(store), catalog)
    )
    rows = Path(set_location, "rows.arrow")
    rows.write_bytes(rows.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match=r"rows\.arrow: .*; run jobs/prepare\.py"):
        ClipDataset(set_location)
    assert not clip_dataset.is_intact(set_location)  # so prepare writes it again
    rows.unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.arrow: no such file; run jobs/prepare\.py"):
        ClipDataset(set_location)
    assert not clip_dataset.is_intact(set_location)  # so prepare writes it again


def test_node_downloads_the_rows_of_a_remote_set_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    location, catalog = f"{bucket}/remote rows", large_catalog(50)
    shards.write_decode_config(location, DecodeConfig(CLIP))
    set_location = clip_dataset.write_set(location, catalog, large_index(catalog), LIMITS)
    filesystem, remote = filesystem_of(f"{set_location}/rows.arrow")
    content = read_bytes(f"{set_location}/rows.arrow")
    write_bytes(f"{set_location}/rows.arrow", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=r"rows\.arrow: its sha256 is .*; run jobs/prepare\.py"):
        ClipDataset(set_location)
    write_bytes(f"{set_location}/rows.arrow", content)
    assert ClipDataset(set_location).ids == [video.id for number, video in enumerate(catalog.videos) if number % 10]
    filesystem.delete_file(remote)
    assert ClipDataset(set_location).ids[0] == catalog.videos[1].id
    (copy,) = tmp_path.glob("giffy_ray-*/sets/*/*.arrow")
    assert copy.read_bytes() == content


def test_identities_are_grouped_by_shard():
    rows = large_index(large_catalog(3000))
    duplicated = pa.concat_tables([rows, rows]).take(np.random.default_rng(0).permutation(6000))
    wanted = list(dict.fromkeys(shard for shard in rows["shard"].to_pylist() if shard))[::2]
    by_order = sorted((row for row in rows.to_pylist() if row["shard"]), key=lambda row: row["first"])
    expected = {shard: [row["identity"] for row in by_order if row["shard"] == shard] for shard in wanted}
    assert shards.group_by_shard(duplicated, wanted) == expected
    assert shards.group_by_shard(duplicated, {}) == {} == shards.group_by_shard(duplicated, ["no such shard"])
    assert shards.is_in_shards(rows, wanted).to_pylist() == [row["shard"] in wanted for row in rows.to_pylist()]
