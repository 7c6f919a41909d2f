"""How data sets lie in a folder: names of files and texts of lists in, a row for each video out. Nothing is read here.

    manifest          a .csv or .parquet with columns path, category and, where wanted, split and source
    moments_in_time   training/<category>/*.mp4, validation/<category>/*.mp4 with trainingSet.csv or validationSet.csv
                      (no header, first column `category/file.mp4`; v1 and v2 alike), which say what the split holds
    ucf101            <Class>/v_<Class>_g<group>_c<clip>.avi with trainlist01.txt and testlist01.txt, in
                      ucfTrainTestlist/ or beside the classes; the test list is the validation split
    kinetics          <youtube id>_<start>_<end>.mp4 in any folder, with lists such as train.csv, whose header names
                      label, youtube_id, time_start, time_end and split. Lists without labels are not used
    split_folders     training/<category>/*.mp4, validation/<category>/*.mp4, or train/ and val/; also test/, ood/
    class_folders     <category>/*.mp4, or *.mp4 as one category

A list decides: files that it does not name are not used, and files that it names and that are not there stay as rows,
so that they are counted. A function gives no rows where its layout is not the one that it is shown.

Lists come from many programs. Cells are separated by commas, semicolons, tabs or bars; spaces around a cell do not
count. A path names the file that is spelled exactly so, or else the only one that is spelled alike (see `Spellings`).
Categories are in Unicode's composed form (NFC), however a list or a file system spells them.
"""

from __future__ import annotations

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

# How data sets spell them, as folders and in lists.
SPLIT_NAMES: dict[str, str] = {split: split for split in SPLITS} | {
    "train": "training",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
}
MANIFEST_COLUMNS = ("path", "category", "split", "source")
_NEEDED_COLUMNS = {"path", "category"}
_DELIMITERS = ",;\t|"
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


class Spellings:
    """Names of files, to be found as a list may spell them.

    Exactly so; else with backslashes, spaces around the parts of a path, or another form of Unicode (macOS writes "é"
    as two characters); else in other cases too. Of several that are alike none is taken.
    """

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)

    def find(self, name: str) -> str | None:
        """The name of the file that is meant, or none."""
        if name in self._names:
            return name
        alike = self._alike.get(spelling(name)) or self._folded.get(spelling(name).casefold(), [])
        return alike[0] if len(alike) == 1 else None

    @functools.cached_property
    def _alike(self) -> dict[str, list[str]]:
        return _grouped(self._names, spelling)

    @functools.cached_property
    def _folded(self) -> dict[str, list[str]]:
        return _grouped(self._names, lambda name: spelling(name).casefold())


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def spelling(path: str) -> str:
    """A path without what differs between systems and programs: slashes, spaces around its parts, forms of Unicode."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return posixpath.normpath("/".join(part.strip() for part in parts))


def is_list(name: str) -> bool:
    """Whether a file may be one of the lists that `moments_in_time`, `ucf101` and `kinetics` ask for."""
    return ("/" not in name and name.endswith(".csv")) or _UCF_LIST.fullmatch(name) is not None


def is_kinetics(text: str) -> bool:
    """Whether a list begins with the header of Kinetics."""
    header = _first_line(text)
    return any(set(_cells(header, delimiter)) >= _KINETICS_COLUMNS for delimiter in _DELIMITERS)


def manifest(
    where: str,
    columns: Iterable[str],
    records: Iterable[tuple[int, Mapping[str, Any]]],
    find: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {},
) -> list[Row]:
    """Rows of the records of a list, each with its number in the file `where`. Raises ConfigError.

    `find`: paths as the list spells them -> names of the files that are meant, of those that are there.
    """
    present = list(columns)
    for column in ("path", "category"):
        if column not in present:
            raise ConfigError(f"{where}: no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; add it")
    for column, count in Counter(present).items():
        if column in MANIFEST_COLUMNS and count > 1:
            raise ConfigError(f"{where}: {count} columns are named {column!r}; rename or remove all but one")
    listed = []
    for number, record in records:
        at = f"{where}, row {number}"
        path, category, split, source = (_text_of(record.get(column), column, at) for column in MANIFEST_COLUMNS)
        category, split, source = category.strip(), split.strip(), source.strip()
        name = _below(path, at)
        if not category:
            raise ConfigError(f"{at}: {path!r} has no category; give it one")
        listed.append((number, path, name, category, _split_named(split, at) if split else None, source))
    places = find({name for _, _, name, *_ in listed})
    rows: dict[str, Row] = {}
    first: dict[str, tuple[int, str]] = {}
    for number, path, name, category, split, source in listed:
        place = places.get(name, _portable(name))
        if place in rows:
            before, spelled = first[place]
            same = "" if spelled == name else f", where it is spelled {spelled!r},"
            raise ConfigError(
                f"{where}, row {number}: {path!r} is in row {before}{same} already; leave one of them out"
            )
        rows[place] = Row(place, _composed(category), split, source or source_of(place))
        first[place] = number, name
    return list(rows.values())


def records_of(
    text: str, where: str, needed: Collection[str] = _NEEDED_COLUMNS
) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """(columns, records with the number of their line) of the text of a list with a header.

    The delimiter is the one by which the header has the columns that are `needed`. Raises ConfigError.
    """
    header = _first_line(text)
    marked = re.fullmatch(r"sep=(.)", header)  # spreadsheets write and hide such a line
    delimiter = marked[1] if marked else _delimiter_of(header, set(needed))
    lines = _lines(text, where, delimiter)
    if marked:
        next(lines)
    _, header_cells = next(lines, (1, []))
    columns = [cell.strip() for cell in header_cells]
    for column, count in Counter(columns).items():
        if column in needed and count > 1:
            raise ConfigError(f"{where}: {count} columns are named {column!r}; rename or remove all but one")

    def record_of(number: int, line: list[str]) -> tuple[int, dict[str, str]]:
        if any(cell.strip() for cell in line[len(columns) :]):
            raise ConfigError(
                f"{where}, row {number}: {len(line)} cells, but {len(columns)} columns; put a cell that holds "
                f"{delimiter!r} in double quotes"
            )
        return number, dict(zip(columns, line, strict=False))

    return columns, (record_of(number, line) for number, line in lines)


def moments_in_time(names: Iterable[str], texts: Mapping[str, str]) -> list[Row]:
    """By its lists; splits without one by their folders."""
    listed = {split: texts[name] for name, split in MOMENTS_LISTS.items() if name in texts}
    if not listed:
        return []
    names = list(names)
    files = Spellings(names)
    rows = {}
    for split, text in listed.items():
        for number, line in _lines(text, f"{split}Set.csv", _delimiter_without_header(text)):
            at = f"{split}Set.csv, row {number}"
            path = _below(line[0], at)
            if "/" not in _portable(path):
                raise ConfigError(f"{at}: {line[0]!r} is not 'category/file.mp4'; the list has no header")
            place = files.find(f"{split}/{path}") or f"{split}/{_portable(path)}"
            below = place.partition("/")[2]
            rows[place] = Row(place, _composed(_first_folder(below)), split, source_of(below))
    return [*rows.values(), *(row for row in _below_splits(names) if row.split not in listed)]


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
    files = Spellings(places)
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
            path = files.find(path) or _portable(path)
            if path.count("/") != 1:
                raise ConfigError(f"{at}: {line!r} is not 'Class/v_Class_g01_c01.avi'")
            if path in rows and rows[path].split != split:
                raise ConfigError(f"{at}: {path!r} is in trainlist0{number}.txt too; leave it out of one of the lists")
            rows[path] = Row(places.get(path, path), _composed(path.split("/")[0]), split, source_of(path))
    return list(rows.values())


def kinetics(names: Iterable[str], texts: Mapping[str, str]) -> list[Row]:
    lists = {name: text for name, text in sorted(texts.items()) if is_kinetics(text)}
    places = defaultdict(list)
    for name in names if lists else ():
        places[posixpath.splitext(posixpath.basename(name))[0]].append(name)
    rows: dict[str, Row] = {}
    for where, text in lists.items():
        for number, record in records_of(text, where, _KINETICS_COLUMNS)[1]:
            at = f"{where}, row {number}"
            video, label = (_composed(record.get(column, "").strip()) for column in ("youtube_id", "label"))
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
            own = [name for name in found if _composed(posixpath.basename(posixpath.dirname(name))) in labels]
            name = (own or found)[0]
            # One file is one video: a clip that is listed again, in another list or class, is the same.
            rows.setdefault(name, Row(name, label, split, video))
    return list(rows.values())


def class_folders(names: Iterable[str], alone: str) -> list[Row]:
    """`alone` is the category of the files that are in no folder."""
    return [Row(name, _composed(_first_folder(name) or alone), None, source_of(name)) for name in names]


def _below_splits(names: Iterable[str]) -> list[Row]:
    """Of the files in categories of folders that are named like splits."""
    rows = []
    for name in names:
        top, _, path = name.partition("/")
        if top in SPLIT_NAMES and _first_folder(path):
            rows.append(Row(name, _composed(_first_folder(path)), SPLIT_NAMES[top], source_of(path)))
    return rows


def _first_folder(name: str) -> str:
    """The first folder of a path, or nothing. Keys of object stores may have empty parts, which are no folders."""
    *folders, _ = (part for part in name.split("/") if part)
    return folders[0] if folders else ""


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _text_of(value: Any, column: str, at: str) -> str:
    """The text of a cell of a list; nothing for a missing one. Raises ConfigError."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{at}: the {column} {value!r} is not UTF-8 text at byte {error.start}") from None
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers where some are missing
        return str(int(value))
    if isinstance(value, list | dict):
        raise ConfigError(f"{at}: the {column} is {value!r}; give one text for each video")
    return str(value)


def _first_line(text: str) -> str:
    return re.match(r"\s*([^\r\n]*)", text)[1].strip(" ")  # type: ignore[index]


def _cells(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in cells]


def _delimiter_of(header: str, needed: set[str]) -> str:
    return max(_DELIMITERS, key=lambda delimiter: (needed <= set(cells := _cells(header, delimiter)), len(cells)))


def _delimiter_without_header(text: str) -> str:
    """Of a list whose first cells are files: the first delimiter by which such a cell ends like the name of one."""
    line = _first_line(text)
    fit = (d for d in _DELIMITERS if re.fullmatch(r"\.\w{2,5}", posixpath.splitext((_cells(line, d) or [""])[0])[1]))
    return next(fit, ",")


def _lines(text: str, where: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of the lines of a list that are not empty. Raises ConfigError."""
    raw: list[str] = []  # the lines of the record that is being read

    def physical() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            raw.append(line)
            yield line

    reader = csv.reader(physical(), delimiter=delimiter, skipinitialspace=True)
    record: list[str] | None = None
    number, last = 0, []
    try:
        for line in reader:
            if record is not None:
                yield number, record
            record = line if any(cell.strip() for cell in line) else None
            number, last = reader.line_num, raw.copy()
            raw.clear()
    except csv.Error as error:
        raise ConfigError(f"{where}, row {reader.line_num}: {error}") from None
    if _is_open(last, delimiter):
        first = number - len(last) + 1
        raise ConfigError(f"{where}, row {first}: a double quote is opened and never closed; close it")
    if record is not None:
        yield number, record


def _is_open(lines: list[str], delimiter: str) -> bool:
    """Whether a quote is still open at the end of a record. Python's reader takes all that follows it for one cell."""
    try:
        list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _below(path: str, at: str) -> str:
    """The path below the folder, less `./` and the like: what a list names is never looked for elsewhere."""
    for name in (posixpath.normpath(path), _portable(path)):
        outside = name.startswith("/") or name.split("/")[0] == ".." or re.match("[A-Za-z]:/", name)
        if name == "." or outside or "://" in path or "\0" in path:
            raise ConfigError(f"{at}: {path!r} is no path of a file below the folder; give it relative to the folder")
    return posixpath.normpath(path)


def _portable(path: str) -> str:
    """A path as we write it, of a list that was written under Windows or has spaces around its cells."""
    return posixpath.normpath(path.strip().replace("\\", "/"))


def _split_named(text: str, at: str) -> str:
    split = SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ConfigError(f"{at}: no split {text!r}; known: {', '.join(SPLIT_NAMES)}")
    return split
