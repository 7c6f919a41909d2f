"""Pairs in folders, buckets and tables, and what belongs to no pair."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from giffy_ray.core.errors import InputError
from giffy_ray.core.storage import write_bytes, write_text
from giffy_ray.inference.pairs import Pair, PairList, SkippedFile, find_pairs
from tests.conftest import ROOT

# Legal in file systems and in keys of buckets, and special in URLs, patterns, shells, CSV or formats.
ODD_NAMES = ["é ü", "a,b;c", 'say "hi"', "50%d", "#1&y?", "[ab]*{}", "$HOME", "-o", "back\\slash", "日本 🌋", "a..b"]


def make_files(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def as_tuples(found: PairList, root: str | Path) -> list[tuple[str, str, str]]:
    base = f"{root}/"
    return [(pair.name, pair.start.removeprefix(base), pair.end.removeprefix(base)) for pair in found.pairs]


def reasons(found: PairList, root: str | Path) -> dict[str, str]:
    return {file.path.removeprefix(f"{root}/"): file.reason for file in found.skipped}


def test_a_subfolder_with_two_images_is_a_pair_in_the_order_of_their_names(tmp_path):
    make_files(tmp_path, "shop/b.PNG", "shop/a.jpeg")
    assert as_tuples(find_pairs(str(tmp_path)), tmp_path) == [("shop", "shop/a.jpeg", "shop/b.PNG")]


def test_a_subfolder_with_more_images_has_a_pair_for_each_and_the_next_in_natural_order(tmp_path):
    make_files(tmp_path, "walk/10.png", "walk/2.png", "walk/1.png")
    assert as_tuples(find_pairs(str(tmp_path)), tmp_path) == [
        ("walk/1", "walk/1.png", "walk/2.png"),
        ("walk/2", "walk/2.png", "walk/10.png"),
    ]


def test_images_next_to_each_other_are_paired_by_the_ends_of_their_names(tmp_path):
    make_files(tmp_path, "cat_b.png", "cat_a.jpg", "two_words_1.png", "two_words_2.png", "x_START.png", "x_end.webp")
    assert as_tuples(find_pairs(str(tmp_path)), tmp_path) == [
        ("cat", "cat_a.jpg", "cat_b.png"),
        ("two_words", "two_words_1.png", "two_words_2.png"),
        ("x", "x_START.png", "x_end.webp"),
    ]


def test_what_is_in_no_pair_is_listed_with_the_reason_and_hidden_files_are_ignored(tmp_path):
    make_files(tmp_path, "ok_a.png", "ok_b.png", "dog_A.png", "n_1.png", "n_1.jpg", "n_2.png", "n_3.png", "notes.txt")
    make_files(tmp_path, "one/x.png", "one/y.txt", ".hidden_a.png", ".hidden/1.png", "two/.1.png", "two/2.png")
    found = find_pairs(str(tmp_path))
    assert [pair.name for pair in found.pairs] == ["ok"]
    assert reasons(found, tmp_path) == {
        "dog_A.png": "has no partner dog_b",
        "n_1.jpg": "is one of 3 images that end in _1 and _2",
        "n_1.png": "is one of 3 images that end in _1 and _2",
        "n_2.png": "is one of 3 images that end in _2 and _1",
        "n_3.png": "is not called NAME_a and NAME_b, NAME_1 and NAME_2, NAME_start and NAME_end",
        "notes.txt": "is not an image, by its suffix",
        "one": "has one image, and a pair needs two",
        "one/y.txt": "is not an image, by its suffix",
        "two": "has one image, and a pair needs two",
    }


def test_names_that_no_manifest_can_hold_are_skipped(tmp_path):
    make_files(tmp_path, "ok_a.png", "ok_b.png", "new\nline_a.png", "new\nline_b.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff_a.png")).touch()
    (tmp_path / "loop").symlink_to("loop")
    found = find_pairs(str(tmp_path))
    assert [pair.name for pair in found.pairs] == ["ok"]
    assert reasons(found, tmp_path) == {
        "bad\\xff_a.png": "has a name that is not UTF-8",
        "loop": "is not an image, by its suffix",
        "new\nline_a.png": "has a name with control characters",
        "new\nline_b.png": "has a name with control characters",
    }


def test_two_pairs_of_one_name_are_refused(tmp_path):
    make_files(tmp_path, "x/1.png", "x/2.png", "x_a.png", "x_b.png")
    with pytest.raises(InputError, match=r"two pairs have the name 'x' \(they start with .*give each"):
        find_pairs(str(tmp_path))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("empty", r"empty: has no pairs of images; expected subfolders of two images, or NAME_a and NAME_b"),
        ("single", r"single: has no pairs of images \(.*/x_a.png has no partner x_b\); expected"),
        ("missing", "missing: cannot be read as a folder or table of pairs: No such file or directory"),
        ("missing.csv", "missing.csv: cannot be read as a folder or table of pairs: No such file or directory"),
        ("file.png", "file.png: cannot be read as a folder or table of pairs: Not a directory"),
    ],
)
def test_a_location_without_pairs_is_refused(tmp_path, location: str, message: str):
    (tmp_path / "empty").mkdir()
    make_files(tmp_path, "file.png", "single/x_a.png")
    with pytest.raises(InputError, match=message):
        find_pairs(str(tmp_path / location))


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"https://x/y: cannot be read .* https:// is not supported"):
        find_pairs("https://x/y")


def test_a_table_may_name_pairs_and_lies_next_to_its_images(tmp_path):
    (tmp_path / "t.csv").write_text(
        "name,note,start,end\nfirst,x,a.png,sub/b.png\nsub/second,,/abs/a.png,s3://bucket/b.png\n,,c.png,d.png\n"
    )
    assert find_pairs(str(tmp_path / "t.csv")).pairs == (
        Pair("first", f"{tmp_path}/a.png", f"{tmp_path}/sub/b.png"),
        Pair("sub/second", "/abs/a.png", "s3://bucket/b.png"),
        Pair("000004", f"{tmp_path}/c.png", f"{tmp_path}/d.png"),
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets_are_read(tmp_path, encoding: str):
    (tmp_path / "t.csv").write_text('start;end\r\n"é;1.png"; b.png \r\n', encoding=encoding)
    (pair,) = find_pairs(str(tmp_path / "t.csv")).pairs
    assert (pair.start, pair.end) == (f"{tmp_path}/é;1.png", f"{tmp_path}/b.png")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",b,x", "has no start"),
        ("a,,x", "has no end"),
        ("a,b,../x", r"has a name that leaves the output folder or is hidden (value '../x'); expected a relative path"),
        ("a,b,/x", r"has a name that leaves the output folder or is hidden (value '/x'); expected a relative path"),
        ("a,b,x/", r"has a name that leaves the output folder or is hidden (value 'x/'); expected a relative path"),
        ("a,b,x/.y", r"has a name that leaves the output folder or is hidden (value 'x/.y'); expected a relative path"),
        ("a,b,x\ty", "has a name with control characters"),
    ],
)
def test_a_bad_row_does_not_spoil_the_table(tmp_path, row: str, reason: str):
    (tmp_path / "t.csv").write_text(f"start,end,name\n{row}\na,b,good\n")
    found = find_pairs(str(tmp_path / "t.csv"))
    assert [pair.name for pair in found.pairs] == ["good"]
    assert found.skipped == (SkippedFile("row 2", reason),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start,finish\na,b\n", "has no column 'end', only 'start', 'finish'; add it"),
        ("start,end,name,name\na,b,c,d\n", "2 columns are named 'name'; remove all but one"),
        ("start,end,name\na,b,x\nc,d,x\n", "two pairs have the name 'x'"),
        ("start,end\n", "has no pairs of images; expected rows with start and end"),
        ("", "has no column 'start', only none; add it"),
        ('start,end\n"a,b\n', "a double quote is opened and never closed"),
        ("start,end\na,b,c\n", "3 cells, but 2 columns"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, text: str, message: str):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        find_pairs(str(tmp_path / "t.csv"))


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"start,end\n\xe9,b\n")
    with pytest.raises(InputError, match=r"t\.csv: is not UTF-8 text at byte 10; save it as UTF-8"):
        find_pairs(str(tmp_path / "t.csv"))
    (tmp_path / "t.parquet").write_bytes(b"start,end\n")
    with pytest.raises(InputError, match=r"t\.parquet: is not a valid Parquet file"):
        find_pairs(str(tmp_path / "t.parquet"))


def test_a_parquet_table_is_read(tmp_path):
    columns = {"start": ["a.png", None, "c.png"], "end": ["b.png", "x", "d.png"], "name": [7.0, 8.0, float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "t.PARQUET")
    found = find_pairs(str(tmp_path / "t.PARQUET"))
    assert as_tuples(found, tmp_path) == [("7", "a.png", "b.png"), ("000003", "c.png", "d.png")]
    assert found.skipped == (SkippedFile("row 2", "has no start"),)
    pq.write_table(pa.table({"start": [["a"]], "end": ["b"]}), tmp_path / "lists.parquet")
    with pytest.raises(InputError, match=r"row 1 has a start that is not text \(value \['a'\]\)"):
        find_pairs(str(tmp_path / "lists.parquet"))


def test_pairs_of_a_bucket_are_those_of_a_folder(bucket: str, tmp_path):
    names = [f"{name}/{file}" for name in ODD_NAMES for file in ("1.png", "2.png")]
    names += [f"{name}_{side}.png" for name in ("flat", "é", "a+b") for side in "ab"]
    names += ["x/.hidden.png", "x/one.png", "too/deep/1.png", "too/deep/2.png"]
    make_files(tmp_path, *names)
    folder = f"{bucket}/pairs"
    for name in names:
        write_bytes(f"{folder}/{name}", b"")
    local, remote = find_pairs(str(tmp_path)), find_pairs(folder)
    assert sorted(pair.name for pair in local.pairs) == sorted([*ODD_NAMES, "flat", "é", "a+b"])
    assert as_tuples(local, tmp_path) == as_tuples(remote, folder)
    assert reasons(local, tmp_path) == reasons(remote, folder) == {"x": "has one image, and a pair needs two"}
    write_text(f"{folder}/t.csv", "start,end\nx/1.png,/local.png\n")
    assert find_pairs(f"{folder}/t.csv").pairs == (Pair("000002", f"{folder}/x/1.png", "/local.png"),)
    with pytest.raises(InputError, match="cannot be read"):
        find_pairs(f"{bucket}/no-such-folder")


def test_pairs_are_found_without_heavy_libraries(tmp_path):
    make_files(tmp_path, "x_a.png", "x_b.png")
    code = (
        "import sys\nfor name in ('torch', 'ray', 'mlflow', 'pyarrow'): sys.modules[name] = None\n"
        f"from giffy_ray.inference.pairs import find_pairs; print(len(find_pairs({str(tmp_path)!r}).pairs))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert completed.stdout.strip() == "1"
