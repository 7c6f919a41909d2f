"""Parsers of dataset layouts: names of files and texts of lists in, one `VideoEntry` per video out. Pure functions.

    manifest          a .csv or .parquet with columns path, category and optionally split and source
    moments_in_time   training/<category>/*.mp4, validation/<category>/*.mp4 with trainingSet.csv or validationSet.csv
                      (no header, first column `category/file.mp4`, v1 and v2), which list the videos of the split
    ucf101            <Class>/v_<Class>_g<group>_c<clip>.avi with trainlist01.txt and testlist01.txt, in
                      ucfTrainTestlist/ or next to the classes; the test list is the validation split
    kinetics          <youtube id>_<start>_<end>.mp4 in any folder, with lists such as train.csv, whose header has
                      label, youtube_id, time_start, time_end and split. Lists without labels are not used
    split_folders     training/<category>/*.mp4, validation/<category>/*.mp4, or train/ and val/; also test/, ood/
    class_folders     <category>/*.mp4, or *.mp4 as a single category

Lists are authoritative: unlisted files are not used, and listed files that are missing stay as entries, so that they
count as rejects. A parser returns no entries if its layout does not match.

Lists come from many programs. Cells are separated by commas, semicolons, tabs or bars; spaces around a cell are
ignored. A path refers to the file with exactly that name, or else to the only file with an equivalent one (see
`PathMatcher`). Categories are in Unicode's composed form (NFC), whichever form a list or a file system uses.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import math
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from giffy_ray.config import SPLITS, ConfigError

# Names of splits, as folders and in lists.
SPLIT_NAMES: dict[str, str] = {split: split for split in SPLITS} | {
    "train": "training",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
}
MANIFEST_COLUMNS = ("path", "category", "split", "source")
_REQUIRED_COLUMNS = {"path", "category"}
_DELIMITERS = ",;\t|"
MOMENTS_LISTS: dict[str, str] = {f"{split}Set.csv": split for split in SPLITS}
_UCF_FOLDER = "ucfTrainTestlist/"
_UCF_LIST = re.compile(rf"(?:{_UCF_FOLDER})?(?:train|test)list0[123]\.txt")
_KINETICS_COLUMNS = {"label", "youtube_id", "time_start", "time_end", "split"}
# File names that identify the source video: UCF101, Kinetics, Moments in Time.
_SOURCE_PATTERNS = (
    re.compile(r"(v_\w+_g\d+)_c\d+", re.IGNORECASE),
    re.compile(r"(.+)_\d{6}_\d{6}"),
    re.compile(r"((?:yt|flickr|getty|giphy|vine)-.+)_\d+"),
)


class VideoEntry(NamedTuple):
    """One video of a dataset, which may not exist."""

    id: str  # path below the dataset's folder
    category: str
    split: str | None  # None: the dataset does not define it
    source: str  # the video that it was cut from


def infer_source(path: str) -> str:
    """Infers the source of a video from its name. Defaults to the path without extension: a source of its own."""
    stem, _ = posixpath.splitext(path)
    name = posixpath.basename(stem)
    for pattern in _SOURCE_PATTERNS:
        if match := pattern.fullmatch(name):
            return match[1]
    return stem


class PathMatcher:
    """Finds files by the names that a list gives them.

    Tries the exact name, then ignores backslashes, spaces around path parts and Unicode normalization (macOS writes "é"
    as two characters), then also case. Ambiguous names match no file.
    """

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)

    def find(self, name: str) -> str | None:
        """Returns the name of the matching file, or None."""
        if name in self._names:
            return name
        normalized = normalize_path(name)
        candidates = self._by_normalized.get(normalized) or self._by_folded.get(normalized.casefold(), [])
        return candidates[0] if len(candidates) == 1 else None

    @functools.cached_property
    def _by_normalized(self) -> dict[str, list[str]]:
        return _group_names(self._names, normalize_path)

    @functools.cached_property
    def _by_folded(self) -> dict[str, list[str]]:
        return _group_names(self._names, lambda name: normalize_path(name).casefold())


def _group_names(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def normalize_path(path: str) -> str:
    """Removes differences between systems and programs: backslashes, spaces around parts, Unicode normalization."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return posixpath.normpath("/".join(part.strip() for part in parts))


def is_list(name: str) -> bool:
    """Whether a file may be a list for `parse_moments_in_time`, `parse_ucf101` or `parse_kinetics`."""
    return ("/" not in name and name.endswith(".csv")) or _UCF_LIST.fullmatch(name) is not None


def is_kinetics(text: str) -> bool:
    """Whether a list starts with the header of Kinetics."""
    header = _get_first_line(text)
    return any(set(_split_cells(header, delimiter)) >= _KINETICS_COLUMNS for delimiter in _DELIMITERS)


def parse_manifest(
    list_name: str,
    columns: Iterable[str],
    records: Iterable[tuple[int, Mapping[str, Any]]],
    find_files: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {},
) -> list[VideoEntry]:
    """Parses the records of a list of videos.

    Args:
        list_name: Name of the list, for error messages.
        columns: Column names.
        records: (row number in the list, cells by column).
        find_files: Maps paths as the list spells them to names of existing files; missing files are left out.

    Raises:
        ConfigError: The list is malformed.
    """
    present = list(columns)
    for column in ("path", "category"):
        if column not in present:
            present_names = ", ".join(map(repr, present)) or "none"
            raise ConfigError(f"{list_name}: no column {column!r}, only {present_names}; add it")
    for column, count in Counter(present).items():
        if column in MANIFEST_COLUMNS and count > 1:
            raise ConfigError(f"{list_name}: {count} columns are named {column!r}; rename or remove all but one")
    parsed = []
    for number, record in records:
        row_name = f"{list_name}, row {number}"
        path, category, split, source = (_convert_cell(record.get(name), name, row_name) for name in MANIFEST_COLUMNS)
        category, split, source = category.strip(), split.strip(), source.strip()
        name = _to_relative_path(path, row_name)
        if not category:
            raise ConfigError(f"{row_name}: {path!r} has no category; give it one")
        parsed.append((number, path, name, category, _parse_split(split, row_name) if split else None, source))
    files = find_files({name for _, _, name, *_ in parsed})
    entries: dict[str, VideoEntry] = {}
    first_mentions: dict[str, tuple[int, str]] = {}
    for number, path, name, category, split, source in parsed:
        file = files.get(name, _to_posix_path(name))
        if file in entries:
            first_number, first_name = first_mentions[file]
            spelling = "" if first_name == name else f", where it is spelled {first_name!r}"
            raise ConfigError(
                f"{list_name}, row {number}: {path!r} is already in row {first_number}{spelling}; remove one of them"
            )
        entries[file] = VideoEntry(file, _normalize_category(category), split, source or infer_source(file))
        first_mentions[file] = number, name
    return list(entries.values())


def detect_encoding(content: bytes) -> str:
    """Detects UTF-8, UTF-16 (which spreadsheets call Unicode text) and UTF-32."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a byte order mark: a list starts with an ASCII character, one byte of which is zero in UTF-16.
    if content[:1] == b"\0":
        return "utf-16-be"
    return "utf-16-le" if content[1:2] == b"\0" else "utf-8-sig"


def parse_records(
    text: str, list_name: str, required: Collection[str] = _REQUIRED_COLUMNS
) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Parses the text of a list with a header.

    The delimiter is the one that gives the header the `required` columns.

    Returns:
        Column names, and records as (line number, cells by column).

    Raises:
        ConfigError: The list is malformed.
    """
    header = _get_first_line(text)
    sep_line = re.fullmatch(r"sep=(.)", header)  # spreadsheets write such a line and hide it
    delimiter = sep_line[1] if sep_line else _detect_delimiter(header, set(required))
    lines = _parse_lines(text, list_name, delimiter)
    if sep_line:
        next(lines)
    _, header_cells = next(lines, (1, []))
    columns = [cell.strip() for cell in header_cells]
    for column, count in Counter(columns).items():
        if column in required and count > 1:
            raise ConfigError(f"{list_name}: {count} columns are named {column!r}; rename or remove all but one")

    def make_record(number: int, cells: list[str]) -> tuple[int, dict[str, str]]:
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise ConfigError(
                f"{list_name}, row {number}: {len(cells)} cells, but {len(columns)} columns; put a cell that contains "
                f"{delimiter!r} in double quotes"
            )
        return number, dict(zip(columns, cells, strict=False))

    return columns, (make_record(number, cells) for number, cells in lines)


def parse_moments_in_time(names: Iterable[str], texts: Mapping[str, str]) -> list[VideoEntry]:
    """Parses the lists of Moments in Time. Splits without a list use their folders."""
    lists = {split: texts[name] for name, split in MOMENTS_LISTS.items() if name in texts}
    if not lists:
        return []
    names = list(names)
    files = PathMatcher(names)
    entries = {}
    for split, text in lists.items():
        for number, cells in _parse_lines(text, f"{split}Set.csv", _detect_delimiter_without_header(text)):
            row_name = f"{split}Set.csv, row {number}"
            path = _to_relative_path(cells[0], row_name)
            if "/" not in _to_posix_path(path):
                raise ConfigError(f"{row_name}: {cells[0]!r} is not 'category/file.mp4'; the list has no header")
            file = files.find(f"{split}/{path}") or f"{split}/{_to_posix_path(path)}"
            path_in_split = file.partition("/")[2]
            category = _normalize_category(_get_first_folder(path_in_split))
            entries[file] = VideoEntry(file, category, split, infer_source(path_in_split))
    return [*entries.values(), *(entry for entry in _parse_all_split_folders(names) if entry.split not in lists)]


def parse_split_folders(names: Iterable[str]) -> list[VideoEntry]:
    entries = _parse_all_split_folders(names)
    folders = {entry.id.partition("/")[0] for entry in entries}
    # A folder `train` may be a class. It is a split if there is another split.
    is_train_split = "train" in folders and any(SPLIT_NAMES[folder] != "training" for folder in folders)
    return entries if "training" in folders or is_train_split else []


def parse_ucf101(names: Iterable[str], texts: Mapping[str, str], list_number: int) -> list[VideoEntry]:
    """Parses one of the three pairs of lists of UCF101, chosen by `list_number` (1 to 3)."""
    if not any(_UCF_LIST.fullmatch(name) for name in texts):
        return []
    full_names = {"/".join(name.split("/")[-2:]): name for name in names}  # the classes may be in UCF-101/
    files = PathMatcher(full_names)
    entries: dict[str, VideoEntry] = {}
    for list_name, split in (
        (f"trainlist0{list_number}.txt", "training"),
        (f"testlist0{list_number}.txt", "validation"),
    ):
        text = texts.get(list_name, texts.get(_UCF_FOLDER + list_name))
        if text is None:
            raise ConfigError(
                f"data.ucf101_list: {list_name} is missing (value {list_number}); choose another number or add the list"
            )
        for line_number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            row_name = f"{list_name}, row {line_number}"
            path = _to_relative_path(line.split()[0], row_name)
            path = files.find(path) or _to_posix_path(path)
            if path.count("/") != 1:
                raise ConfigError(f"{row_name}: {line!r} is not 'Class/v_Class_g01_c01.avi'; correct the line")
            if path in entries and entries[path].split != split:
                raise ConfigError(
                    f"{row_name}: {path!r} is in trainlist0{list_number}.txt too; remove it from one of the lists"
                )
            category = _normalize_category(path.split("/")[0])
            entries[path] = VideoEntry(full_names.get(path, path), category, split, infer_source(path))
    return list(entries.values())


def parse_kinetics(names: Iterable[str], texts: Mapping[str, str]) -> list[VideoEntry]:
    lists = {name: text for name, text in sorted(texts.items()) if is_kinetics(text)}
    files_by_clip = defaultdict(list)
    for name in names if lists else ():
        files_by_clip[posixpath.splitext(posixpath.basename(name))[0]].append(name)
    entries: dict[str, VideoEntry] = {}
    for list_name, text in lists.items():
        _, records = parse_records(text, list_name, _KINETICS_COLUMNS)
        for number, record in records:
            row_name = f"{list_name}, row {number}"
            video = _normalize_category(record.get("youtube_id", "").strip())
            label = _normalize_category(record.get("label", "").strip())
            split = _parse_split(record.get("split", ""), row_name)
            if not video or not label:
                raise ConfigError(f"{row_name}: expected a youtube_id and a label (value {record!r}); add them")
            try:
                start_s, end_s = (int(float(record.get(column, ""))) for column in ("time_start", "time_end"))
            except (ValueError, OverflowError):
                raise ConfigError(
                    f"{row_name}: time_start and time_end are not seconds (value {record!r}); correct them"
                ) from None
            clip = f"{video}_{start_s:06d}_{end_s:06d}"
            # Matched by file name alone, because copies of Kinetics spell and nest their folders differently.
            default_path = f"{record['split'].strip()}/{label}/{clip}.mp4"
            files = files_by_clip.get(clip) or [_to_relative_path(default_path, row_name)]
            labels = (label, label.replace(" ", "_"))
            labelled = [
                file for file in files if _normalize_category(posixpath.basename(posixpath.dirname(file))) in labels
            ]
            file = (labelled or files)[0]
            # One file is one video, even if several lists or classes contain the clip.
            entries.setdefault(file, VideoEntry(file, label, split, video))
    return list(entries.values())


def parse_class_folders(names: Iterable[str], default_category: str) -> list[VideoEntry]:
    """Uses the first folder of each file as category, and `default_category` for files in no folder."""
    return [
        VideoEntry(name, _normalize_category(_get_first_folder(name) or default_category), None, infer_source(name))
        for name in names
    ]


def _parse_all_split_folders(names: Iterable[str]) -> list[VideoEntry]:
    entries = []
    for name in names:
        top, _, path = name.partition("/")
        if top in SPLIT_NAMES and _get_first_folder(path):
            category = _normalize_category(_get_first_folder(path))
            entries.append(VideoEntry(name, category, SPLIT_NAMES[top], infer_source(path)))
    return entries


def _get_first_folder(name: str) -> str:
    """Returns the first folder of a path, or "". Ignores empty parts, which keys of object stores may have."""
    *folders, _ = (part for part in name.split("/") if part)
    return folders[0] if folders else ""


def _normalize_category(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _convert_cell(value: Any, column: str, row_name: str) -> str:
    """Converts a cell to text, "" if it is missing. Raises ConfigError."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{row_name}: the {column} {value!r} is not UTF-8 text at byte {error.start}; save it as UTF-8"
            ) from None
    if isinstance(value, float) and value.is_integer():  # pandas converts integer columns with gaps to floats
        return str(int(value))
    if isinstance(value, list | dict):
        raise ConfigError(f"{row_name}: the {column} is {value!r}; give one text per video")
    return str(value)


def _get_first_line(text: str) -> str:
    return re.match(r"\s*([^\r\n]*)", text)[1].strip(" ")  # type: ignore[index]


def _split_cells(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in cells]


def _detect_delimiter(header: str, required: set[str]) -> str:
    """Returns the delimiter that gives the required columns, or else the most cells."""

    def score(delimiter: str) -> tuple[bool, int]:
        cells = _split_cells(header, delimiter)
        return required <= set(cells), len(cells)

    return max(_DELIMITERS, key=score)


def _detect_delimiter_without_header(text: str) -> str:
    """Returns the first delimiter for which the first cell ends like a file name, or a comma."""
    line = _get_first_line(text)
    for delimiter in _DELIMITERS:
        first_cell = (_split_cells(line, delimiter) or [""])[0]
        if re.fullmatch(r"\.\w{2,5}", posixpath.splitext(first_cell)[1]):
            return delimiter
    return ","


def _parse_lines(text: str, list_name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of the records that are not empty. Raises ConfigError."""
    raw_lines: list[str] = []  # of the record that the reader is parsing

    def read_lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            raw_lines.append(line)
            yield line

    reader = csv.reader(read_lines(), delimiter=delimiter, skipinitialspace=True)
    record: list[str] | None = None
    number = 0
    last_lines: list[str] = []
    try:
        for cells in reader:
            if record is not None:
                yield number, record
            record = cells if any(cell.strip() for cell in cells) else None
            number = reader.line_num
            last_lines = raw_lines.copy()
            raw_lines.clear()
    except csv.Error as error:
        raise ConfigError(f"{list_name}, row {reader.line_num}: {error}; correct the row") from None
    if _has_open_quote(last_lines, delimiter):
        first = number - len(last_lines) + 1
        raise ConfigError(f"{list_name}, row {first}: a double quote is opened and never closed; close it")
    if record is not None:
        yield number, record


def _has_open_quote(lines: list[str], delimiter: str) -> bool:
    """Whether a record ends inside a quoted cell. Python's reader then takes the rest of the file for one cell."""
    try:
        list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _to_relative_path(path: str, row_name: str) -> str:
    """Normalizes a listed path. Raises ConfigError if it could refer to a file outside the dataset's folder."""
    for name in (posixpath.normpath(path), _to_posix_path(path)):
        is_outside = name.startswith("/") or name.split("/")[0] == ".." or re.match("[A-Za-z]:/", name)
        if name == "." or is_outside or "://" in path or "\0" in path:
            raise ConfigError(
                f"{row_name}: {path!r} is not a file below the dataset's folder; give a path relative to the folder"
            )
    return posixpath.normpath(path)


def _to_posix_path(path: str) -> str:
    """Converts a path from a Windows list, or with spaces around it, to a POSIX path."""
    return posixpath.normpath(path.strip().replace("\\", "/"))


def _parse_split(text: str, row_name: str) -> str:
    split = SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ConfigError(f"{row_name}: no split {text!r}; use one of {', '.join(SPLIT_NAMES)}")
    return split
