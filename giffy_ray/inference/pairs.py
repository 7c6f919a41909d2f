"""Finds pairs of images to interpolate: in a folder, or in a CSV or Parquet table. Imports neither torch nor Ray.

pyarrow is needed only for buckets and Parquet.

In a folder, hidden files are ignored, and these are pairs:

    shop/1.png  shop/2.png               a subfolder with two images, in the order of their names: `shop`
    walk/1.png  walk/2.png  walk/10.png  with more images, each and the next one: `walk/1`, `walk/2`
    cat_a.jpg   cat_b.png                images next to each other: `cat`; also cat_1 and cat_2, cat_start and cat_end

A table has the columns `start` and `end`, and optionally `name`; other columns are ignored. Paths are addresses,
absolute, or relative to the table.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from giffy_ray.core.errors import InputError
from giffy_ray.core.storage import filesystem_of, join, local_path, read_bytes
from giffy_ray.data.layouts import detect_encoding, parse_records

TABLE_SUFFIXES = (".csv", ".parquet")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_SIDES = (("a", "b"), ("1", "2"), ("start", "end"))  # what follows the last underscore of the two names
_SIDED_STEM = re.compile(rf"(.+)_({'|'.join(side for sides in _SIDES for side in sides)})", re.IGNORECASE | re.DOTALL)
_ENDINGS = ", ".join(f"NAME_{start} and NAME_{end}" for start, end in _SIDES)
_ROW_DIGITS = 6  # of the name of a pair that the table does not name


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images to interpolate.

    Attributes:
        name: Name of the clip without a suffix; a relative path, whose parts are separated by /.
        start: Absolute path, or address, of the first frame.
        end: The same of the last frame.
    """

    name: str
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file, subfolder or row of a table that belongs to no pair.

    Attributes:
        path: The file or subfolder, or `row 7` of a table.
        reason: Why it belongs to no pair, as the end of a sentence that begins with the path.
    """

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class PairList:
    """The pairs of a folder or table, in the order of their names or rows, and what is in none of them."""

    pairs: tuple[Pair, ...]
    skipped: tuple[SkippedFile, ...]


def is_table(location: str) -> bool:
    """Whether a location is a table rather than a folder, by its suffix."""
    return location.lower().endswith(TABLE_SUFFIXES)


def find_pairs(location: str) -> PairList:
    """Finds the pairs in a folder or table, local or in a bucket. Images are not opened.

    Raises:
        InputError: The folder or table cannot be read, has no pairs, or two of them have the same name.
    """
    try:
        location = str(local_path(location) or location)
        found = _read_table(location) if is_table(location) else _search_folder(location)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{location}: cannot be read as a folder or table of pairs: {reason}") from error
    if not found.pairs:
        example = f" ({found.skipped[0].path} {found.skipped[0].reason})" if found.skipped else ""
        expected = "rows with start and end" if is_table(location) else f"subfolders of two images, or {_ENDINGS}"
        raise InputError(f"{location}: has no pairs of images{example}; expected {expected}")
    _check_names(location, found.pairs)
    return found


def _check_names(location: str, pairs: Iterable[Pair]) -> None:
    by_name: dict[str, Pair] = {}
    for pair in pairs:
        other = by_name.setdefault(pair.name, pair)
        if other is not pair:
            raise InputError(
                f"{location}: two pairs have the name {pair.name!r} (they start with {other.start} and {pair.start}); "
                "give each a name of its own"
            )


def _search_folder(location: str) -> PairList:
    files, skipped = _list_files(location)
    images: dict[str, list[str]] = defaultdict(list)  # subfolder, or "" -> names
    for folder, name in files:
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            images[folder].append(name)
        else:
            skipped.append(SkippedFile(join(location, *filter(None, (folder, name))), "is not an image, by its suffix"))
    pairs, unpaired = _match_sides(location, images.pop("", []))
    for folder, names in images.items():
        pairs += _pair_neighbours(join(location, folder), folder, names)
        if len(names) == 1:
            unpaired.append(SkippedFile(join(location, folder), "has one image, and a pair needs two"))
    order = sorted(pairs, key=lambda pair: _natural_key(pair.name))
    return PairList(tuple(order), tuple(sorted([*skipped, *unpaired], key=lambda file: _natural_key(file.path))))


def _list_files(location: str) -> tuple[list[tuple[str, str]], list[SkippedFile]]:
    """Returns (subfolder or "", name) of the files of a folder and of its subfolders, and what cannot be listed."""
    if local_path(location):
        return _list_local_files(location)
    from pyarrow import fs

    filesystem, path = filesystem_of(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))  # one request per thousand keys
    files = []
    for info in infos:
        *folders, name = info.path[len(path) + 1 :].split("/")
        is_hidden = any(part.startswith(".") or not part for part in (*folders, name))
        if info.is_file and len(folders) <= 1 and not is_hidden:
            files.append(("".join(folders), name))
    return files, []


def _list_local_files(root: str) -> tuple[list[tuple[str, str]], list[SkippedFile]]:
    """`_list_files` for a local folder. pyarrow would fail for the whole folder if one name is not UTF-8."""
    files: list[tuple[str, str]] = []
    skipped: list[SkippedFile] = []
    subfolders = []
    for entry in _scan(root):
        if problem := _find_name_problem(entry.name):
            skipped.append(SkippedFile(f"{root}/{_escape(entry.name)}", problem))
        elif _is_folder(entry):
            subfolders.append(entry.name)
        else:
            files.append(("", entry.name))
    for folder in subfolders:
        try:
            entries = _scan(f"{root}/{folder}")
        except OSError as error:
            skipped.append(SkippedFile(f"{root}/{folder}", f"cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            if problem := _find_name_problem(entry.name):
                skipped.append(SkippedFile(f"{root}/{folder}/{_escape(entry.name)}", problem))
            elif not _is_folder(entry):
                files.append((folder, entry.name))
    return files, skipped


def _scan(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _pair_neighbours(location: str, folder: str, names: Iterable[str]) -> list[Pair]:
    """Pairs each image of a subfolder with the next one."""
    ordered = sorted(names, key=_natural_key)
    neighbours = list(itertools.pairwise(ordered))
    numbers = [f"/{number}" for number in range(1, len(neighbours) + 1)] if len(neighbours) > 1 else [""]
    return [
        Pair(f"{folder}{number}", join(location, start), join(location, end))
        for number, (start, end) in zip(numbers, neighbours, strict=False)
    ]


def _match_sides(location: str, names: Iterable[str]) -> tuple[list[Pair], list[SkippedFile]]:
    """Pairs images by the ends of their names, such as cat_a.png and cat_b.png."""
    sides: dict[tuple[str, str], list[str]] = defaultdict(list)  # name of the pair, side -> files
    skipped = []
    for name in sorted(names, key=_natural_key):
        match = _SIDED_STEM.fullmatch(PurePosixPath(name).stem)
        if match:
            sides[match[1], match[2].lower()].append(name)
        else:
            skipped.append(SkippedFile(join(location, name), f"is not called {_ENDINGS}"))
    pairs = []
    for (pair_name, side), files in sides.items():
        is_start, other_side = _find_other_side(side)
        others = sides.get((pair_name, other_side), [])
        if len(files) == len(others) == 1:
            if is_start:
                pairs.append(Pair(pair_name, join(location, files[0]), join(location, others[0])))
            continue
        if others:
            reason = f"is one of {len(files) + len(others)} images that end in _{side} and _{other_side}"
        else:
            reason = f"has no partner {pair_name}_{other_side}"
        skipped += [SkippedFile(join(location, file), reason) for file in files]
    return pairs, skipped


def _find_other_side(side: str) -> tuple[bool, str]:
    """Returns whether a side is that of the start, and the side of its partner."""
    start, end = next(sides for sides in _SIDES if side in sides)
    return side == start, end if side == start else start


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Orders 2.png before 10.png. Names that differ only in leading zeros are ordered as texts."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name


def _read_table(location: str) -> PairList:
    rows = _read_parquet_rows(location) if location.lower().endswith(".parquet") else _read_csv_rows(location)
    pairs, skipped = [], []
    for number, row in rows:
        try:
            name, start, end = (_read_cell(row, column) for column in ("name", "start", "end"))
            _check_row(name, start, end)
        except InputError as error:
            skipped.append(SkippedFile(f"row {number}", str(error)))
            continue
        pairs.append(Pair(name or f"{number:0{_ROW_DIGITS}}", _locate(location, start), _locate(location, end)))
    return PairList(tuple(pairs), tuple(skipped))


def _read_csv_rows(location: str) -> list[tuple[int, Mapping[str, Any]]]:
    content = read_bytes(location)
    try:
        text = content.decode(detect_encoding(content))
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    columns, records = parse_records(text, location, {"start", "end"})
    _check_columns(location, columns)
    return list(records)


def _read_parquet_rows(location: str) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{location}: Parquet needs pyarrow; pip install 'giffy_ray[train]'") from error
    try:
        table = pq.ParquetFile(io.BytesIO(read_bytes(location)))
        columns = table.schema_arrow.names
        _check_columns(location, columns)
        rows = table.read([name for name in ("name", "start", "end") if name in columns]).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{location}: is not a valid Parquet file ({error}); write it again") from None
    return list(enumerate(rows, start=1))


def _check_columns(location: str, columns: Iterable[str]) -> None:
    present = list(columns)
    for column in ("start", "end", "name"):
        if present.count(column) > 1:
            raise InputError(f"{location}: {present.count(column)} columns are named {column!r}; remove all but one")
        if column not in present and column != "name":
            names = ", ".join(map(repr, present)) or "none"
            raise InputError(f"{location}: has no column {column!r}, only {names}; add it")


def _read_cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value != value:  # NaN, which pandas writes for a missing text
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas converts integer columns with gaps to floats
        value = int(value)
    if not isinstance(value, str | int):
        raise InputError(f"has a {column} that is not text (value {value!r})")
    return str(value).strip()


def _check_row(name: str, start: str, end: str) -> None:
    for column, value in (("start", start), ("end", end)):
        if not value:
            raise InputError(f"has no {column}")
        if "\0" in value:
            raise InputError(f"has a null character in its {column}")
    if name and (problem := _find_name_problem(name)):
        raise InputError(problem)
    if any(not part.strip() or part.startswith(".") for part in name.split("/")) and name:
        raise InputError(
            f"has a name that leaves the output folder or is hidden (value {name!r}); expected a relative path"
        )


def _find_name_problem(name: str) -> str:
    """Returns why a name cannot be written to a manifest or used as a key of a bucket, or an empty string."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    return "has a name with control characters" if re.search(r"[\x00-\x1f\x7f]", name) else ""


def _escape(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _locate(table: str, path: str) -> str:
    """Returns a path of a table as an address or an absolute path."""
    if "://" in path or path.startswith(("/", "~")):
        return path
    folder, separator, _ = table.rpartition("/")
    return f"{folder}/{path}" if separator else path
