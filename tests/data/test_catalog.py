from pathlib import Path

import pytest

from giffy_ray.config import ConfigError, DataConfig
from giffy_ray.data.catalog import read_catalog


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))


def rows(root: Path, **fields) -> list[tuple[str, str, str]]:
    return [(v.id, v.category, v.split) for v in read_catalog(str(root), DataConfig(**fields)).videos]


def test_moments_in_time_without_lists(tmp_path: Path):
    touch(
        tmp_path,
        "training/skiing/a.mp4",
        "training/erupting/-b c.mp4",
        "validation/skiing/é.mp4",
        "readme.txt",
    )
    assert rows(tmp_path) == [
        ("training/erupting/-b c.mp4", "erupting", "training"),
        ("training/skiing/a.mp4", "skiing", "training"),
        ("validation/skiing/é.mp4", "skiing", "validation"),
    ]


def test_a_list_decides_where_there_is_one(tmp_path: Path):
    touch(tmp_path, "training/skiing/a.mp4", "training/skiing/unlisted.mp4", "validation/skiing/c.mp4")
    (tmp_path / "trainingSet.csv").write_text("skiing/a.mp4,skiing,3,0\nskiing/gone.mp4,skiing,2,1\n")
    assert [row[0] for row in rows(tmp_path)] == [
        "training/skiing/a.mp4",
        "training/skiing/gone.mp4",  # rejected by name when it is read
        "validation/skiing/c.mp4",
    ]


def test_class_folders_hold_out_a_share_that_adding_videos_does_not_move(tmp_path: Path):
    touch(tmp_path, *(f"cat {c}/{i}.mov" for c in "ab" for i in range(200)))
    before = {video_id: split for video_id, _, split in rows(tmp_path, validation_fraction=0.25)}
    assert {category for _, category, _ in rows(tmp_path)} == {"cat a", "cat b"}
    # 400 draws at 0.25: 100 +- 3 * 8.7
    assert 74 <= list(before.values()).count("validation") <= 126
    touch(tmp_path, *(f"cat a/new{i}.mkv" for i in range(50)))
    after = {video_id: split for video_id, _, split in rows(tmp_path, validation_fraction=0.25)}
    assert {name: after[name] for name in before} == before


def test_a_flat_folder_is_one_category_with_something_held_out(tmp_path: Path):
    touch(tmp_path / "holiday", "1.mp4", "2.MP4", "3.webm", "notes.txt")
    found = rows(tmp_path / "holiday", validation_fraction=0.01)
    assert {category for _, category, _ in found} == {"holiday"}
    assert sorted(split for _, _, split in found) == ["training", "training", "validation"]


def test_categories_are_chosen_or_refused_by_name(tmp_path: Path):
    touch(tmp_path, "training/skiing/a.mp4", "training/erupting/b.mp4")
    assert [row[1] for row in rows(tmp_path, categories=("skiing",))] == ["skiing"]
    with pytest.raises(ConfigError, match=r"data.categories: 'sking'.*erupting, skiing"):
        rows(tmp_path, categories=("sking",))


@pytest.mark.parametrize("make", [lambda root: None, Path.mkdir, lambda root: touch(root, "a.txt")])
def test_a_folder_without_videos_is_refused_by_name(tmp_path: Path, make):
    root = tmp_path / "nowhere"
    make(root)
    with pytest.raises(ConfigError, match=r"data\.root.*nowhere"):
        rows(root)


def test_the_fingerprint_changes_with_the_videos_and_only_with_them(tmp_path: Path):
    touch(tmp_path / "a", "training/x/1.mp4", "validation/x/2.mp4")
    touch(tmp_path / "b", "training/x/1.mp4", "validation/x/2.mp4")

    def fingerprint(name: str) -> str:
        return read_catalog(str(tmp_path / name), DataConfig()).fingerprint

    assert fingerprint("a") == fingerprint("b")
    (tmp_path / "b/training/x/1.mp4").write_bytes(b"another")
    assert fingerprint("a") != fingerprint("b")
    touch(tmp_path / "a", "training/x/3.mp4")
    assert fingerprint("a") != fingerprint("b")
