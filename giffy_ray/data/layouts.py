"""How data sets lie in a folder: names of files and texts of lists in, a row for each video out. Nothing is read here.

    manifest          a .csv or .parquet with columns path, category and, where wanted, split and source
    moments_in_time   training/<category>/*.mp4, validation/<category>/*.mp4 with trainingSet.csv or validationSet.csv
                      (no header, first column `category/file.mp4`; v1 and v2 alike), which say what the split holds
    ucf101            <Class>/v_<Class>_g<group>_c<clip>.avi with trainlist01.txt and testlist01.txt, in
                      ucfTrainTestlist/ or beside the classes; the test list is the validation split
    kinetics          <youtube id>_<start>_<end>.mp4 in any folder, with lists such as train.csv, whose header names
                      label, youtube_id, time_start, time_end and split. Lists without labels are not used
    split_folders     training/<category>/*.mp4, validation/<category>/*.mp4, or train/ and val/; also test/, shifted/
    class_folders     <category>/*.mp4, or *.mp4 as one category

A list decides: files that it does not name are not used, and files that it names and that are not there stay as rows,
so that they are counted. A function gives no rows where its layout is not the one that it is shown.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from giffy_ray.config import SPLITS, ConfigError

# How data sets spell them, as folders and in lists.
SPLIT_NAMES: dict[str, str] = {split: split for split in SPLITS} | {
    "train": "training",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
}
MANIFEST_COLUMNS = ("path", "category", "split", "source")
MOMENTS_LISTS: dict[str, str] = {f"{split}Set.csv": split for split in SPLITS}
_UCF_FOLDER = "ucfTrainTestlist/"
_UCF_LIST = re.compile(rf"(?:{_UCF_FOLDER})?(?:train|test)list0[123]\.txt")
_KINETICS_COLUMNS = {"label", "youtube_id", "time_start", "time_end", "split"}
# Names that say what a clip was cut from: of UCF101, of Kinetics, and of Moments in Time.
_CUT_FROM = (
    re.compile(r"(v_\w+_g\d+)_c\d+", re.IGNORECASE),
    re.compile(r"(.+)_\d{6}_\d{6}"),
    re.compile(r"((?:yt|flickr|getty|giphy|vine)-.+)_\d+"),
)


class Row(NamedTuple):
    """One video of a data set, before it is looked for."""

    id: str  # path below the folder
    category: str
    split: str | None  # none: the data set does not say
    source: str  # what it was cut from


def source_of(path: str) -> str:
    """What a video was cut from, if its name says so; else its path less the ending: itself, in any format."""
    stem, _ = posixpath.splitext(path)
    name = posixpath.basename(stem)
    for pattern in _CUT_FROM:
        if match := pattern.fullmatch(name):
            return match[1]
    return stem


def is_list(name: str) -> bool:
    """Whether a file may be one of the lists that `moments_in_time`, `ucf101` and `kinetics` ask for."""
    return ("/" not in name and name.endswith(".csv")) or _UCF_LIST.fullmatch(name) is not None


def is_kinetics(text: str) -> bool:
    """Whether a list begins with the header of Kinetics."""
    header = text.partition("\n")[0].split(",")
    return _KINETICS_COLUMNS.issubset(column.strip(' "\r') for column in header)


def manifest(where: str, columns: Iterable[str], records: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Row]:
    """Rows of the records of a list, each with its number in the file `where`. Raises ConfigError."""
    present = list(columns)
    for column in ("path", "category"):
        if column not in present:
            raise ConfigError(f"{where}: no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; add it")
    rows: dict[str, Row] = {}
    numbers: dict[str, int] = {}
    for number, record in records:
        at = f"{where}, row {number}"
        path, category, split, source = (
            "" if record.get(column) is None else str(record[column]) for column in MANIFEST_COLUMNS
        )
        name = _below(path, at)
        if name in rows:
            raise ConfigError(f"{at}: {path!r} is in row {numbers[name]} already; leave one of them out")
        if not category:
            raise ConfigError(f"{at}: {path!r} has no category; give it one")
        rows[name] = Row(name, category, _split_named(split, at) if split else None, source or source_of(name))
        numbers[name] = number
    return list(rows.values())


def records_of(text: str, where: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """(columns, records with the number of their line) of the text of a .csv with a header."""
    lines = _lines(text, where)
    _, header = next(lines, (1, []))
    columns = [column.strip() for column in header]
    return columns, ((number, dict(zip(columns, line, strict=False))) for number, line in lines)


def moments_in_time(names: Iterable[str], texts: Mapping[str, str]) -> list[Row]:
    """By its lists; splits without one by their folders."""
    listed = {split: texts[name] for name, split in MOMENTS_LISTS.items() if name in texts}
    rows = {}
    for split, text in listed.items():
        for number, line in _lines(text, f"{split}Set.csv"):
            at = f"{split}Set.csv, row {number}"
            path = _below(line[0], at)
            if "/" not in path:
                raise ConfigError(f"{at}: {line[0]!r} is not 'category/file.mp4'; the list has no header")
            rows[split, path] = Row(f"{split}/{path}", path.split("/")[0], split, source_of(path))
    rest = [row for row in _below_splits(names) if row.split not in listed] if listed else []
    return [*rows.values(), *rest]


def split_folders(names: Iterable[str]) -> list[Row]:
    rows = _below_splits(names)
    folders = {row.id.partition("/")[0] for row in rows}
    # A folder `train` may be a class too. It is none where another split lies beside it.
    beside = "train" in folders and any(SPLIT_NAMES[folder] != "training" for folder in folders)
    return rows if "training" in folders or beside else []


def ucf101(names: Iterable[str], texts: Mapping[str, str], number: int) -> list[Row]:
    """`number` says which of the three pairs of lists is read."""
    if not any(_UCF_LIST.fullmatch(name) for name in texts):
        return []
    places = {"/".join(name.split("/")[-2:]): name for name in names}  # the classes may lie in UCF-101/
    rows: dict[str, Row] = {}
    for name, split in ((f"trainlist0{number}.txt", "training"), (f"testlist0{number}.txt", "validation")):
        text = texts.get(name, texts.get(_UCF_FOLDER + name))
        if text is None:
            raise ConfigError(
                f"data.ucf101_list: {name} is not there (value {number}); choose another, or add the list"
            )
        for line_number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            at = f"{name}, row {line_number}"
            path = _below(line.split()[0], at)
            if path.count("/") != 1:
                raise ConfigError(f"{at}: {line!r} is not 'Class/v_Class_g01_c01.avi'")
            if path in rows and rows[path].split != split:
                raise ConfigError(f"{at}: {path!r} is in trainlist0{number}.txt too; leave it out of one of the lists")
            rows[path] = Row(places.get(path, path), path.split("/")[0], split, source_of(path))
    return list(rows.values())


def kinetics(names: Iterable[str], texts: Mapping[str, str]) -> list[Row]:
    lists = {name: text for name, text in sorted(texts.items()) if is_kinetics(text)}
    places = defaultdict(list)
    for name in names if lists else ():
        places[posixpath.splitext(posixpath.basename(name))[0]].append(name)
    rows: dict[str, Row] = {}
    for where, text in lists.items():
        for number, record in records_of(text, where)[1]:
            at = f"{where}, row {number}"
            video, label = (record.get(column, "").strip() for column in ("youtube_id", "label"))
            split = _split_named(record.get("split", ""), at)
            if not video or not label:
                raise ConfigError(f"{at}: expected a youtube_id and a label, found {record!r}")
            try:
                start, end = (int(float(record.get(column, ""))) for column in ("time_start", "time_end"))
            except (ValueError, OverflowError):
                raise ConfigError(f"{at}: time_start and time_end are not seconds in {record!r}") from None
            clip = f"{video}_{start:06d}_{end:06d}"
            # By its name alone, as copies of Kinetics differ in how they spell and nest their folders.
            found = places.get(clip) or [_below(f"{record['split'].strip()}/{label}/{clip}.mp4", at)]
            labels = (label, label.replace(" ", "_"))
            own = [name for name in found if posixpath.basename(posixpath.dirname(name)) in labels]
            name = (own or found)[0]
            # One file is one video: a clip that is listed again, in another list or class, is the same.
            rows.setdefault(name, Row(name, label, split, video))
    return list(rows.values())


def class_folders(names: Iterable[str], alone: str) -> list[Row]:
    """`alone` is the category of the files that are in no folder."""
    return [Row(name, name.split("/")[0] if "/" in name else alone, None, source_of(name)) for name in names]


def _below_splits(names: Iterable[str]) -> list[Row]:
    """Of the files in categories of folders that are named like splits."""
    rows = []
    for name in names:
        top, _, path = name.partition("/")
        if top in SPLIT_NAMES and "/" in path:
            rows.append(Row(name, path.split("/")[0], SPLIT_NAMES[top], source_of(path)))
    return rows


def _lines(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of the lines of a .csv that are not empty."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for line in reader:
            if any(line):
                yield reader.line_num, line
    except csv.Error as error:
        raise ConfigError(f"{where}, row {reader.line_num}: {error}") from None


def _below(path: str, at: str) -> str:
    """The one spelling of a path below the folder: what a list names is never looked for elsewhere."""
    name = posixpath.normpath(path)
    if name == "." or name.startswith("/") or "://" in path or name.split("/")[0] == ".." or "\0" in path:
        raise ConfigError(f"{at}: {path!r} is no path of a file below the folder; give it relative to the folder")
    return name


def _split_named(text: str, at: str) -> str:
    split = SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ConfigError(f"{at}: no split {text!r}; known: {', '.join(SPLIT_NAMES)}")
    return split
