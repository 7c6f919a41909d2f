import os
import socket
from collections import Counter, defaultdict
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from pyarrow import fs

from giffy_ray.config import ClipConfig, ConfigError, DataConfig
from giffy_ray.data import catalog as catalog_module
from giffy_ray.data.catalog import Catalog, Video, assign_splits, read_catalog
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.layouts import VideoEntry
from tests.conftest import moving_video


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name.encode()))


def list_videos(root: Path, **fields) -> list[tuple[str, str, str]]:
    videos = read_catalog(str(root), DataConfig(**fields)).videos
    return [(video.id, video.category, video.split) for video in videos]


def list_splits(root: Path, **fields) -> dict[str, str]:
    return {video.id: video.split for video in read_catalog(str(root), DataConfig(**fields)).videos}


def list_sizes(root: Path) -> dict[str, int]:
    return {video.id: video.size_bytes for video in read_catalog(str(root), DataConfig()).videos}


# --- layouts


def test_video_describes_its_file(tmp_path: Path):
    touch(tmp_path / "set", "training/skiing/yt-abc_1.mp4", "validation/skiing/b.MOV")
    os.utime(tmp_path / "set/training/skiing/yt-abc_1.mp4", ns=(5, 1_700_000_000_123_456_789))
    os.utime(tmp_path / "set/validation/skiing/b.MOV", ns=(5, 7))
    catalog = read_catalog(str(tmp_path / "set"), DataConfig())
    assert (catalog.name, catalog.root) == ("set", str(tmp_path / "set"))
    assert catalog.videos == (
        Video(
            id="training/skiing/yt-abc_1.mp4",
            path=f"{tmp_path}/set/training/skiing/yt-abc_1.mp4",
            category="skiing",
            split="training",
            source="yt-abc",
            size_bytes=28,
            modified_ns=1_700_000_000_123_456_789,
        ),
        Video(
            id="validation/skiing/b.MOV",
            path=f"{tmp_path}/set/validation/skiing/b.MOV",
            category="skiing",
            split="validation",
            source="skiing/b",
            size_bytes=23,
            modified_ns=7,
        ),
    )
    assert read_catalog(str(tmp_path / "set"), DataConfig(), name="mine").name == "mine"


def test_identity_depends_on_path_size_and_modification_time():
    video = Video("a.mp4", "/data/a.mp4", "x", "training", "a", 3, 5)
    assert video.identity == "a0e91da3a0953e176925f755e3f454fb"
    others = [
        Video("a.mp4", "/data/b.mp4", "x", "training", "a", 3, 5),
        Video("a.mp4", "/data/a.mp4", "x", "training", "a", 4, 5),
        Video("a.mp4", "/data/a.mp4", "x", "training", "a", 3, 6),
    ]
    assert len({other.identity for other in [video, *others]}) == 4
    assert Video("b/a.mp4", "/data/a.mp4", "y", "test", "b", 3, 5).identity == video.identity


def test_moments_in_time_is_read_with_a_list_for_one_split(tmp_path: Path):
    touch(tmp_path, "training/skiing/a.mp4", "training/skiing/unlisted.mp4", "validation/skiing/é.mp4", "notes.txt")
    (tmp_path / "trainingSet.csv").write_text("skiing/a.mp4,skiing,3,0\nskiing/gone.mp4,skiing,2,1\n")
    (tmp_path / "moments_categories.txt").write_text("skiing,0\n")
    assert list_videos(tmp_path) == [
        ("training/skiing/a.mp4", "skiing", "training"),
        ("training/skiing/gone.mp4", "skiing", "training"),  # rejected when it is decoded
        ("validation/skiing/é.mp4", "skiing", "validation"),
    ]
    assert list_sizes(tmp_path)["training/skiing/gone.mp4"] == -1


def test_ucf101_is_read_with_its_lists(tmp_path: Path):
    touch(tmp_path, "Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g08_c01.avi")
    touch(tmp_path, *(f"ucfTrainTestlist/{name}" for name in ("trainlist01.txt", "testlist01.txt")))
    (tmp_path / "ucfTrainTestlist/trainlist02.txt").write_text("Archery/v_Archery_g01_c01.avi 1\n")
    (tmp_path / "ucfTrainTestlist/testlist02.txt").write_text("Archery/v_Archery_g08_c01.avi\n")
    assert list_videos(tmp_path, ucf101_list=2) == [
        ("Archery/v_Archery_g01_c01.avi", "Archery", "training"),
        ("Archery/v_Archery_g08_c01.avi", "Archery", "validation"),
    ]


def test_ucf101_without_lists_keeps_groups_together(tmp_path: Path):
    touch(tmp_path, *(f"Archery/v_Archery_g{g:02}_c{c:02}.avi" for g in range(1, 26) for c in range(1, 5)))
    split_by_name = list_splits(tmp_path, validation_fraction=0.3)
    groups = defaultdict(set)
    for name, split in split_by_name.items():
        groups[name.partition("_c")[0]].add(split)
    assert len(groups) == 25 and all(len(group_splits) == 1 for group_splits in groups.values())
    assert Counter(split_by_name.values()) == {"training": 76, "validation": 24}


def test_kinetics_keeps_missing_videos(tmp_path: Path):
    touch(tmp_path, "train/ski jumping/abc_000001_000011.mp4", "val/ski_jumping/-bc_000002_000012.mp4")
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(f"{header}ski jumping,abc,1,11,train\nski jumping,gone,0,10,train\n")
    (tmp_path / "validate.csv").write_text(f"\ufeff{header}ski jumping,-bc,2,12,validate\n", encoding="utf-8")
    (tmp_path / "other.csv").write_bytes(b"\xff a table of another program")
    videos = read_catalog(str(tmp_path), DataConfig()).videos
    assert [(v.id, v.category, v.split, v.source, v.size_bytes) for v in videos] == [
        ("train/ski jumping/abc_000001_000011.mp4", "ski jumping", "training", "abc", 39),
        ("train/ski jumping/gone_000000_000010.mp4", "ski jumping", "training", "gone", -1),
        ("val/ski_jumping/-bc_000002_000012.mp4", "ski jumping", "validation", "-bc", 37),
    ]


def test_flat_folder_is_one_category_with_a_validation_split(tmp_path: Path):
    touch(tmp_path / "holiday", "1.mp4", "2.MP4", "3.webm", "notes.txt")
    videos = list_videos(tmp_path / "holiday", validation_fraction=0.01)
    assert {category for _, category, _ in videos} == {"holiday"}
    assert sorted(split for _, _, split in videos) == ["training", "training", "validation"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_manifest_lists_the_videos(tmp_path: Path, ending: str):
    touch(tmp_path, "x/a.mp4", "x/unlisted.mp4", "y/a film.m4v", ".hidden/c.mp4")
    records = [
        {"path": "x/a.mp4", "category": "x", "split": "training", "source": "film 1", "seconds": "3"},
        {"path": "y/a film.m4v", "category": "y", "split": "val", "source": None, "seconds": "3"},
        {"path": ".hidden/c.mp4", "category": "y", "split": "test", "source": None, "seconds": "3"},
        {"path": "gone.mp4", "category": "x", "split": "train", "source": None, "seconds": "3"},
    ]
    root = tmp_path / f"mine.v2.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), root)
    else:
        lines = [",".join(records[0])] + [",".join(value or "" for value in record.values()) for record in records]
        root.write_text("\n".join(lines))
    catalog = read_catalog(str(root), DataConfig())
    assert catalog.name == "mine.v2"
    assert [(v.id, v.category, v.split, v.source, v.size_bytes) for v in catalog.videos] == [
        (".hidden/c.mp4", "y", "test", ".hidden/c", 13),
        ("gone.mp4", "x", "training", "gone", -1),
        ("x/a.mp4", "x", "training", "film 1", 7),
        ("y/a film.m4v", "y", "validation", "y/a film", 12),
    ]
    assert catalog.videos[2].path == f"{tmp_path}/x/a.mp4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"path,category\na.mp4,caf\xe9\n", r"list\.csv: not UTF-8 text at byte 23; save it as UTF-8"),
        ("list.parquet", b"path,category\na.mp4,x\n", r"list\.parquet: not a valid Parquet file"),
        ("list.parquet", b"", r"list\.parquet: not a valid Parquet file"),
        ("list.csv", b"path,category\n../a.mp4,x\n", r"list\.csv, row 2: '\.\./a\.mp4' is not a file"),
        ("list.csv", b"path,category\n", r"data\.root: no training videos.*list\.csv"),
        ("list.txt", b"a.mp4\n", r"data\.root: no such folder or list \(\.csv, \.parquet\).*list\.txt"),
    ],
)
def test_invalid_manifest_is_rejected(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list_videos(tmp_path / name)


def test_damaged_parquet_file_is_rejected(tmp_path: Path):
    root = tmp_path / "list.parquet"
    pq.write_table(pa.table({"path": ["a.mp4"], "category": ["x"]}), root)
    content = root.read_bytes()
    root.write_bytes(content[:8] + b"\xff" * 100 + content[108:])
    with pytest.raises(ConfigError, match=r"list\.parquet: not a valid Parquet file"):
        list_videos(root)


def test_rows_of_a_parquet_manifest_are_counted_from_one(tmp_path: Path):
    pq.write_table(pa.table({"path": ["a.mp4", None], "category": ["x", "x"]}), tmp_path / "list.parquet")
    with pytest.raises(ConfigError, match=r"list\.parquet, row 2: '' is not a file"):
        list_videos(tmp_path / "list.parquet")


@pytest.mark.parametrize("make", [lambda root: None, Path.mkdir, lambda root: touch(root, "a.txt"), os.mkfifo])
def test_folder_without_videos_is_rejected(tmp_path: Path, make):
    root = tmp_path / "nowhere"
    make(root)
    with pytest.raises(ConfigError, match=r"data\.root.*nowhere"):
        list_videos(root)


# --- folders


def test_unusual_names_are_listed(tmp_path: Path):
    names = [
        "a\nb.mp4",
        "-d.mp4",
        " s  p .MKV",
        "\u00e9.mp4",
        "e\u0301.mp4",
        "%20?#&.mp4",
        "a\\b.avi",
        "#'\".webm",
        "日本.mov",
    ]
    touch(tmp_path, *(f"x y/{name}" for name in names), "x y/._a.mp4", "x y/.b.mp4", "x y/.c/d.mp4", "x y/mp4")
    assert list_sizes(tmp_path) == {f"x y/{name}": len(f"x y/{name}".encode()) for name in names}


def test_entries_that_are_no_regular_files_stay_without_a_size(tmp_path: Path):
    touch(tmp_path, "x/a.mp4", "x/folder.mp4/inside.mp4")
    os.mkfifo(tmp_path / "x/pipe.mp4")
    (tmp_path / "x/gone.mp4").symlink_to("nowhere")
    (tmp_path / "x/itself.mp4").symlink_to("itself.mp4")
    (tmp_path / "x/link.mp4").symlink_to("a.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "x/s.mp4"))
    assert list_sizes(tmp_path) == {
        "x/a.mp4": 7,
        "x/folder.mp4": -1,
        "x/folder.mp4/inside.mp4": 23,
        "x/gone.mp4": -1,
        "x/itself.mp4": -1,
        "x/link.mp4": 7,
        "x/pipe.mp4": -1,
        "x/s.mp4": -1,
    }
    assert {v.modified_ns for v in read_catalog(str(tmp_path), DataConfig()).videos if v.size_bytes < 0} == {0}


def test_pipe_named_like_a_list_does_not_block(tmp_path: Path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4")
    os.mkfifo(tmp_path / "trainingSet.csv")
    assert list(list_sizes(tmp_path)) == ["x/a.mp4", "x/b.mp4"]


def test_name_that_is_not_utf8_is_escaped_and_has_no_size(tmp_path: Path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4")
    (tmp_path / "x" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"content")
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff") / "c.mp4").write_bytes(b"content")
    assert list_sizes(tmp_path) == {"\\xff/c.mp4": -1, "x/a.mp4": 7, "x/b.mp4": 7, "x/caf\\xe9.mp4": -1}


def test_links_to_folders_are_followed_without_cycles(tmp_path: Path):
    touch(tmp_path, "all/skiing/a.mp4", "all/erupting/b.mp4", "set/notes.txt")
    for split, category in (("training", "skiing"), ("validation", "erupting")):
        (tmp_path / "set" / split).mkdir()
        (tmp_path / "set" / split / category).symlink_to(tmp_path / "all" / category)
    for name in ("one", "two", "three"):  # 3^40 cycles
        (tmp_path / "set/training" / name).symlink_to(tmp_path / "set")
        (tmp_path / "all/skiing" / name).symlink_to("..")
    assert list_sizes(tmp_path / "set") == {"training/skiing/a.mp4": 16, "validation/erupting/b.mp4": 18}


def test_folders_that_link_to_each_other_are_listed_at_most_twice(tmp_path: Path):
    names = [f"c{number}" for number in range(12)]  # 12! paths
    touch(tmp_path, *(f"{name}/{name}.mp4" for name in names))
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    sizes = list_sizes(tmp_path)
    assert {f"{name}/{name}.mp4" for name in names} <= set(sizes) and len(sizes) <= 24


def test_error_names_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "x/a.mp4", "y/b.mp4")

    def scandir(path: str, scan=os.scandir):
        if path.rstrip("/").endswith("/y"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"data\.root: '.*/y/' cannot be listed: Permission denied"):
        list_videos(tmp_path)


def make_bucket(monkeypatch: pytest.MonkeyPatch, *names: str, **lists: str) -> None:
    """Replaces all file systems by an object store with bucket/set/<names> and bucket/set/<lists>.csv."""
    store = fs._MockFileSystem()  # type: ignore[attr-defined]
    content = {name: b"x" * len(name) for name in names} | {
        f"{name}.csv": text.encode() for name, text in lists.items()
    }
    for name, data in content.items():
        path = f"bucket/set/{name}"
        store.create_dir(path.rpartition("/")[0], recursive=True)
        with store.open_output_stream(path) as stream:
            stream.write(data)
    monkeypatch.setattr(catalog_module, "filesystem_of", lambda root: (store, root.removeprefix("s3://").rstrip("/")))


def test_object_store_is_listed_like_a_folder(monkeypatch: pytest.MonkeyPatch):
    make_bucket(
        monkeypatch,
        "training/skiing/a.mp4",
        "training/skiing/._a.mp4",
        "training/.cache/a.mp4",
        "training/skiing/x.mp4/part",
        "validation/skiing/b.mp4",
        trainingSet="skiing/a.mp4,skiing\nskiing/gone.mp4,skiing\nskiing/x.mp4,skiing\n",
    )
    catalog = read_catalog("s3://bucket/set/", DataConfig())
    assert catalog.name == "set"
    assert [(v.id, v.path, v.size_bytes) for v in catalog.videos] == [
        ("training/skiing/a.mp4", "bucket/set/training/skiing/a.mp4", 21),
        ("training/skiing/gone.mp4", "bucket/set/training/skiing/gone.mp4", -1),
        ("training/skiing/x.mp4", "bucket/set/training/skiing/x.mp4", -1),
        ("validation/skiing/b.mp4", "bucket/set/validation/skiing/b.mp4", 23),
    ]


def test_manifest_in_an_object_store_is_read(monkeypatch: pytest.MonkeyPatch):
    make_bucket(
        monkeypatch,
        "x/a.m4v",
        "x/b.mp4",
        "x/c.mp4",
        list="path,category,split\nx/a.m4v,x,train\nx/b.mp4,x,val\ngone,x,test\n",
    )
    catalog = read_catalog("s3://bucket/set/list.csv", DataConfig())
    assert catalog.name == "list"
    assert [(v.id, v.path, v.split, v.size_bytes) for v in catalog.videos] == [
        ("gone", "bucket/set/gone", "test", -1),
        ("x/a.m4v", "bucket/set/x/a.m4v", "training", 7),
        ("x/b.mp4", "bucket/set/x/b.mp4", "validation", 7),
    ]


# --- splits


def test_adding_videos_does_not_change_the_splits_of_a_folder(tmp_path: Path):
    touch(tmp_path, *(f"cat {c}/{i}.mov" for c in "ab" for i in range(200)))
    before = list_splits(tmp_path, validation_fraction=0.25)
    assert {category for _, category, _ in list_videos(tmp_path)} == {"cat a", "cat b"}
    # 400 draws at 0.25: 100 +- 3 * 8.7
    assert 74 <= list(before.values()).count("validation") <= 126
    # 400 draws at 0.1: 40 +- 3 * 6
    assert 22 <= list(list_splits(tmp_path).values()).count("validation") <= 58
    touch(tmp_path, *(f"cat a/new{i}.mkv" for i in range(50)))
    after = list_splits(tmp_path, validation_fraction=0.25)
    assert {name: after[name] for name in before} == before


def assign(fraction: float | None, *labels: tuple[str, str | None]) -> list[str]:
    """Assigns splits to videos with these (source, split)."""
    entries = [VideoEntry(f"{number}.mp4", "x", split, source) for number, (source, split) in enumerate(labels)]
    return assign_splits(entries, fraction)


# The hashes of these sources begin: a 0.79, b 0.24, c 0.18, d 0.09, e 0.25.
@pytest.mark.parametrize(
    ("fraction", "labels", "expected"),
    [
        (
            None,
            [("a", None), ("d", None), ("c", None), ("d", None)],
            ["training", "validation", "training", "validation"],
        ),
        (None, [("a", None), ("b", None)], ["training", "validation"]),  # the smallest hash, as none is below 0.1
        (None, [("a", None), ("a", None)], ["training", "training"]),  # cuts of one source stay together
        (0.9, [("a", None), ("b", None)], ["training", "validation"]),  # the largest hash, as all are below 0.9
        (None, [("d", "training"), ("a", "validation")], ["training", "validation"]),  # has a validation split
        (None, [("a", "training"), ("d", "training")], ["training", "validation"]),  # has no validation split
        (None, [("a", "training"), ("d", "training"), ("b", "test")], ["training", "validation", "test"]),
        (
            0.2,  # divides training; the validation split becomes a test split
            [("a", "training"), ("c", "training"), ("d", "validation"), ("b", "test"), ("b", "ood")],
            ["training", "validation", "test", "test", "ood"],
        ),
        # Videos without a split follow other cuts of their source.
        (
            None,
            [("a", "validation"), ("a", None), ("d", "training"), ("d", None)],
            ["validation"] * 2 + ["training"] * 2,
        ),
        (
            0.2,
            [("a", "validation"), ("a", None), ("b", "training"), ("b", None)],
            ["test", "test", "training", "training"],
        ),
        (None, [], []),
    ],
)
def test_splits_are_assigned(fraction: float | None, labels: list, expected: list[str]):
    assert assign(fraction, *labels) == expected


SOURCES = st.text("abcdefghij", min_size=1, max_size=2)


@given(
    st.lists(st.tuples(SOURCES, st.sampled_from([None, "training", "validation", "test"])), max_size=60),
    st.one_of(st.none(), st.floats(0.01, 0.99)),
)
def test_sources_share_a_split(labels: list[tuple[str, str | None]], fraction: float | None):
    splits = assign(fraction, *labels)
    dataset_splits = {split for _, split in labels}
    assigned_by_source, fixed_by_source = defaultdict(set), defaultdict(set)
    for (source, dataset_split), split in zip(labels, splits, strict=True):
        (assigned_by_source if dataset_split is None else fixed_by_source)[source].add(split)
        if dataset_split == "test":
            assert split == "test"
        elif dataset_split == "validation":
            assert split == ("validation" if fraction is None else "test")
        elif dataset_split == "training":
            assert split in ("training", "validation")
            assert split == "training" or fraction is not None or "validation" not in dataset_splits
    for source, assigned in assigned_by_source.items():
        assert len(assigned) == 1
        # If the dataset keeps a source together, so does the assignment.
        assert source not in fixed_by_source or assigned <= fixed_by_source[source]
    training_splits = defaultdict(set)
    for (source, dataset_split), split in zip(labels, splits, strict=True):
        if dataset_split == "training":
            training_splits[source].add(split)
    assert all(len(source_splits) == 1 for source_splits in training_splits.values())


@given(st.lists(SOURCES, max_size=40), st.lists(SOURCES, max_size=40), st.floats(0.01, 0.99))
def test_adding_videos_does_not_change_assigned_splits(before: list[str], added: list[str], fraction: float):
    # Hashes 0.0001 and 0.9997: no source has to move to fill an empty split.
    anchors = ["s5091", "s227"]
    first = assign(fraction, *((source, None) for source in anchors + before))
    later = assign(fraction, *((source, None) for source in anchors + before + added))
    assert first[:2] == ["validation", "training"]
    assert later[: len(first)] == first


# --- selection


def test_categories_are_selected_or_rejected_by_name(tmp_path: Path):
    touch(tmp_path, "training/skiing/a.mp4", "training/erupting/b.mp4")
    assert [row[1] for row in list_videos(tmp_path, categories=("skiing",))] == ["skiing"]
    with pytest.raises(ConfigError, match=r"data.categories: 'sking'.*erupting, skiing"):
        list_videos(tmp_path, categories=("sking",))


def test_max_videos_limits_a_category_in_a_split(tmp_path: Path):
    numbers = range(30)
    touch(tmp_path, *(f"training/{c}/{n}.mp4" for c in ("skiing", "erupting", "rowing") for n in numbers))
    touch(tmp_path, *(f"validation/skiing/{n}.mp4" for n in numbers))

    def count_videos(caps: dict) -> dict[tuple[str, str], int]:
        return dict(Counter((category, split) for _, category, split in list_videos(tmp_path, max_videos=caps)))

    assert count_videos({"skiing": {"training": 7}, "*": {"training": 5, "validation": 1}}) == {
        ("skiing", "training"): 7,
        ("skiing", "validation"): 30,
        ("erupting", "training"): 5,
        ("rowing", "training"): 5,
    }
    assert count_videos({"rowing": {"training": 3}})["erupting", "training"] == 30
    assert count_videos({"rowing": {"training": 31, "test": 1}})["rowing", "training"] == 30


def test_added_video_replaces_at_most_one(tmp_path: Path):
    touch(tmp_path, *(f"training/skiing/{n}.mp4" for n in range(40)), "validation/skiing/a.mp4")
    caps = {"skiing": {"training": 10}}
    replaced = 0
    for added in range(20):
        before = {row for row in list_videos(tmp_path, max_videos=caps) if row[2] == "training"}
        touch(tmp_path, f"training/skiing/new{added}.mp4")
        after = {row for row in list_videos(tmp_path, max_videos=caps) if row[2] == "training"}
        assert len(after) == 10 and len(after - before) <= 1
        replaced += len(after - before)
    assert 1 <= replaced <= 12  # expected 4 +- 3 * 1.8: each with probability 10 in 41 to 60


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sking", r"data\.max_videos\.sking: no such category in '.*'; did you mean 'skiing'\?"),
        ("chess", r"data\.max_videos\.chess: no such category in '.*'; it has erupting, skiing"),
    ],
)
def test_max_videos_of_an_unknown_category_is_rejected(tmp_path: Path, name: str, message: str):
    touch(tmp_path, "training/skiing/a.mp4", "training/erupting/b.mp4")
    with pytest.raises(ConfigError, match=message):
        list_videos(tmp_path, max_videos={name: {"training": 1}, "*": {"training": 1}})
    assert len(list_videos(tmp_path, categories=("skiing",), max_videos={"erupting": {"training": 1}})) == 1


# --- the fingerprint


def read_manifest(folder: Path, text: str) -> Catalog:
    touch(folder, "x/1.mp4", "x/2.mp4", "x/3.mp4")
    (folder / "list.csv").write_text("path,category,split,source\n" + text)
    return read_catalog(str(folder / "list.csv"), DataConfig())


def test_fingerprint_depends_only_on_the_videos(tmp_path: Path):
    base = "x/1.mp4,a,train,s\nx/2.mp4,a,val,t\n"
    here = read_manifest(tmp_path / "here", base).fingerprint
    assert read_manifest(tmp_path / "there", base).fingerprint == here
    changed = [
        base + "x/3.mp4,a,val,t\n",
        base.replace("x/2", "x/3"),
        base.replace("x/2.mp4,a,val", "x/2.mp4,a,train"),
        base.replace("x/2.mp4,a", "x/2.mp4,b"),
        base.replace("val,t", "val,u"),
    ]
    assert len({here, *(read_manifest(tmp_path / "here", text).fingerprint for text in changed)}) == 6
    (tmp_path / "here/x/1.mp4").write_bytes(b"longer than it was")
    (tmp_path / "here/list.csv").write_text("path,category,split,source\n" + base)
    assert read_catalog(str(tmp_path / "here/list.csv"), DataConfig()).fingerprint != here


@pytest.mark.parametrize("names", [("1.mp4", "2.mp4"), ("a/1.mp4", "a/2.mp4")])
def test_fingerprint_does_not_depend_on_the_name_of_the_root(tmp_path: Path, names: tuple[str, ...]):
    for folder in ("a", "b"):
        touch(tmp_path / folder, *names)
    first, second = (read_catalog(str(tmp_path / folder), DataConfig()).fingerprint for folder in ("a", "b"))
    assert first == second


# --- lists and their files


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("listed_form", "file_form"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
@pytest.mark.parametrize("folder", [NFC, NFD])
def test_list_finds_files_in_either_unicode_form(tmp_path, listed_form: str, file_form: str, folder: str):
    touch(tmp_path, f"{folder}/{file_form}.mp4", "x/b.mp4")
    (tmp_path / "list.csv").write_text(f"path,category\n{listed_form}/{listed_form}.mp4,{listed_form}\nx/b.mp4,x\n")
    catalog = read_catalog(
        str(tmp_path / "list.csv"), DataConfig(categories=(NFD, "x"), max_videos={NFD: {"training": 5}})
    )
    video = next(video for video in catalog.videos if video.category == NFC)
    assert video.id == f"{folder}/{file_form}.mp4"
    assert video.path == f"{tmp_path}/{folder}/{file_form}.mp4"
    assert video.size_bytes == len(f"{folder}/{file_form}.mp4".encode())


def test_names_in_both_unicode_forms_are_two_files(tmp_path: Path):
    touch(tmp_path, f"{NFC}.mp4", f"{NFD}.mp4")
    (tmp_path / "list.csv").write_text(f"path,category\n{NFC}.mp4,x\n{NFD}.mp4,x\n")
    assert list_sizes(tmp_path / "list.csv") == {f"{NFC}.mp4": 9, f"{NFD}.mp4": 10}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (r"x\a b.mp4", "x/a b.mp4"),
        (r".\x\a b.mp4", "x/a b.mp4"),
        (r"y\z.mp4", r"y\z.mp4"),  # a valid file name on Linux
        (" x/a b.mp4 ", "x/a b.mp4"),
        ("x/a b.MP4", "x/a b.mp4"),
        ("X/A B.Mp4", "x/a b.mp4"),
        (" lead.mp4", " lead.mp4"),
        ("trail.mp4 ", "trail.mp4 "),
    ],
)
def test_listed_path_finds_the_file_with_an_equivalent_name(tmp_path: Path, line: str, name: str):
    touch(tmp_path, "x/a b.mp4", r"y\z.mp4", "y/z.mp4", " lead.mp4", "trail.mp4 ")
    (tmp_path / "list.csv").write_text(f"path;category\n{line};x\n")
    assert list_sizes(tmp_path / "list.csv") == {name: len(name.encode())}


def test_ambiguous_name_matches_no_file(tmp_path: Path):
    touch(tmp_path, "A.mp4", "a.MP4", "x/b.mp4")
    (tmp_path / "list.csv").write_text("path,category\na.mp4,x\nx/b.mp4,x\n")
    assert list_sizes(tmp_path / "list.csv") == {"a.mp4": -1, "x/b.mp4": 7}


@pytest.mark.parametrize("paths", [(f"x/{NFC}.mp4", f"x/{NFD}.mp4"), ("x/a.mp4", "x\\a.mp4"), ("x/a.mp4", "X/A.mp4")])
def test_error_names_both_rows_of_one_file(tmp_path: Path, paths: tuple[str, str]):
    touch(tmp_path, paths[0])
    (tmp_path / "list.csv").write_text(f"path,category\nother.mp4,x\n{paths[0]},x\n{paths[1]},y\n")
    with pytest.raises(ConfigError) as error:
        list_videos(tmp_path / "list.csv")
    message = f"list.csv, row 4: {paths[1]!r} is already in row 3, where it is spelled {paths[0]!r}; remove"
    assert message in str(error.value)


def test_listed_names_cannot_leave_the_folder(tmp_path: Path):
    touch(tmp_path, "secret.mp4", "set/a.mp4")
    (tmp_path / "set" / "list.csv").write_text("path,category\nx/.. /secret.mp4,x\na.mp4,x\n")
    assert {name: size for name, size in list_sizes(tmp_path / "set/list.csv").items() if size >= 0} == {"a.mp4": 9}


def test_list_in_an_object_store_finds_equivalent_names(monkeypatch: pytest.MonkeyPatch):
    make_bucket(
        monkeypatch,
        f"{NFD}/a.MP4",
        "x/b.mp4",
        list=f"path,category\n{NFC}\\a.mp4,{NFC}\n x/b.mp4 , x\ngone.mp4,x\n",
    )
    catalog = read_catalog("s3://bucket/set/list.csv", DataConfig())
    assert {(v.id, v.path, v.size_bytes) for v in catalog.videos} == {
        (f"{NFD}/a.MP4", f"bucket/set/{NFD}/a.MP4", 11),
        ("x/b.mp4", "bucket/set/x/b.mp4", 7),
        ("gone.mp4", "bucket/set/gone.mp4", -1),
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_encodings_of_spreadsheets_are_read(tmp_path: Path, encoding: str, delimiter: str):
    touch(tmp_path, "ski\u00e9/a.mp4", "ski\u00e9/b_000001_000011.mp4")
    lines = ["path,category,split", "ski\u00e9/a.mp4,\u65e5\u672c,train", "ski\u00e9/gone.mp4,\u65e5\u672c,train"]
    (tmp_path / "list.csv").write_bytes("\r\n".join(lines).replace(",", delimiter).encode(encoding))
    assert [row[1] for row in list_videos(tmp_path / "list.csv", validation_fraction=0.5)] == ["\u65e5\u672c"] * 2
    assert list_sizes(tmp_path / "list.csv") == {"ski\u00e9/a.mp4": 11, "ski\u00e9/gone.mp4": -1}
    (tmp_path / "list.csv").unlink()
    kinetics = "label,youtube_id,time_start,time_end,split\nski\u00e9,b,1,11,train\nski\u00e9,c,1,11,train\n"
    (tmp_path / "train.csv").write_bytes(kinetics.replace(",", delimiter).encode(encoding))
    assert [row[0] for row in list_videos(tmp_path)] == [
        "ski\u00e9/b_000001_000011.mp4",
        "train/ski\u00e9/c_000001_000011.mp4",
    ]


def test_parquet_file_written_by_pandas_is_read(tmp_path: Path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = pa.table(
        {
            "path": pa.array(["a.mp4", "b.mp4", "c.mp4"], pa.large_string()),
            "category": pa.array(["x", "y", "x"]).dictionary_encode(),
            "split": pa.array(["train", None, "val"], pa.string()),
            "source": pa.array([1.0, float("nan"), 3.0]),
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    catalog = read_catalog(str(tmp_path / "list.parquet"), DataConfig())
    assert [(v.id, v.category, v.source) for v in catalog.videos] == [
        ("a.mp4", "x", "1"),
        ("b.mp4", "y", "b"),
        ("c.mp4", "x", "3"),
    ]
    columns = {"path": pa.array([b"a.mp4", b"b.mp4"]), "category": pa.array([1, 2], pa.int8())}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert [row[:2] for row in list_videos(tmp_path / "list.parquet")] == [("a.mp4", "1"), ("b.mp4", "2")]
    columns["category"] = pa.array([1.0, float("nan")])
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(ConfigError, match=r"list\.parquet, row 2: 'b\.mp4' has no category; give it one"):
        list_videos(tmp_path / "list.parquet")


def test_parquet_file_with_duplicate_columns_is_rejected(tmp_path: Path):
    touch(tmp_path, "a.mp4")
    columns = [pa.array(["a.mp4"]), pa.array(["x"]), pa.array(["y"])]
    pq.write_table(pa.table(columns, names=["path", "category", "category"]), tmp_path / "list.parquet")
    with pytest.raises(
        ConfigError, match=r"list\.parquet: 2 columns are named 'category'; rename or remove all but one"
    ):
        list_videos(tmp_path / "list.parquet")


# --- files that may be videos


def test_supported_containers_are_used_with_any_extension(tmp_path: Path):
    kinds = {"a.mp4": "mp4", "b.M4V": "mp4", "c.qt": "mov", "d.3gp": "3gp", "e.3g2": "3g2", "f.mk3d": "matroska"}
    kinds |= {
        "g.divx": "avi",
        "h.F4V": "mp4",
        "i.webm": "matroska",
        "j.wmv": "mp4",
        "k.mpg": "avi",
        "l.dat": "matroska",
    }
    kinds |= {"no ending": "mov", "no. 2 of 3": "mp4", "and so on...": "avi"}
    for name, kind in kinds.items():
        path = tmp_path / "x" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(moving_video(0, 10, 30, kind=kind))
        assert decode_clip(path.read_bytes(), ClipConfig(frames=3)).shape == (3, 64, 64, 3)
    touch(tmp_path, "x/README", "x/notes.txt", "x/cover.jpg", "x/sound.wav", "x/.DS_Store", "x/a.mp4.partial")
    catalog = read_catalog(str(tmp_path), DataConfig())
    assert {video.id for video in catalog.videos} == {f"x/{name}" for name in kinds}
    assert catalog.unused_files == ()


def test_unused_files_are_listed(tmp_path: Path):
    touch(
        tmp_path, "train/x/a.mp4", "val/x/b.mp4", "train/x/c.wmv", "train/x/d.MTS", "train/loose.mp4", "extra/y/e.mov"
    )
    touch(tmp_path, "train/x/README", "train/x/a.srt", "train/x/.f.wmv")
    os.mkfifo(tmp_path / "train/x/pipe.wmv")
    os.mkfifo(tmp_path / "train/x/pipe")
    catalog = read_catalog(str(tmp_path), DataConfig())
    assert [video.id for video in catalog.videos] == ["train/x/a.mp4", "val/x/b.mp4"]
    assert catalog.unused_files == ("extra/y/e.mov", "train/loose.mp4", "train/x/c.wmv", "train/x/d.MTS")


def test_error_names_unused_files_of_a_folder_without_supported_videos(tmp_path: Path):
    touch(tmp_path, "x/a.wmv", "x/b.mpg")
    with pytest.raises(
        ConfigError,
        match=r"no training videos.*; 2 files are not used, such as 'x/a\.wmv': convert other videos with ffmpeg -i",
    ):
        list_videos(tmp_path)


def test_list_has_no_unused_files(tmp_path: Path):
    touch(tmp_path, "x/a.mp4", "x/b.wmv", "x/c.mp4", "x/d.mp4")
    (tmp_path / "list.csv").write_text("path,category\nx/a.mp4,x\nx/b.wmv,x\n")
    catalog = read_catalog(str(tmp_path / "list.csv"), DataConfig())
    assert [video.id for video in catalog.videos] == ["x/a.mp4", "x/b.wmv"]
    assert catalog.unused_files == ()


def test_files_in_an_object_store_are_not_inspected(monkeypatch: pytest.MonkeyPatch):
    make_bucket(monkeypatch, "x/a.mp4", "x/b.m4v", "x/c.wmv", "x/no ending", "x/notes.txt")
    monkeypatch.setattr(catalog_module, "_has_video_signature", lambda path: pytest.fail(f"{path} was opened"))
    catalog = read_catalog("s3://bucket/set", DataConfig())
    assert [video.id for video in catalog.videos] == ["x/a.mp4", "x/b.m4v"]
    assert catalog.unused_files == ("x/c.wmv", "x/no ending")
