"""Which videos there are: a folder, or a list of its videos -> rows of id, path, category, split and source.

Nothing is read but lists, and the first bytes of local files whose names do not say what they hold; `layouts` knows
how data sets lie. What looks like a video and is none (a pipe, a link to nowhere, a file that a list names and that is
gone) stays a row of no size, so that decoding rejects it by its name. What may be a video and is not used is `skipped`.

Videos without a split are dealt by a hash of what they were cut from: two cuts of one video are never parted, and
adding videos moves none that are there.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import hashlib
import heapq
import os
import re
import stat
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from giffy_ray.config import VIDEO_LIST_SUFFIXES, ConfigError, DataConfig
from giffy_ray.core.storage import filesystem_of, join
from giffy_ray.data import layouts
from giffy_ray.data.layouts import Row, Spellings, spelling

# Of files in a container that `decode` reads, whichever of them it is: mp4 and mov, Matroska and WebM, or avi.
EXTENSIONS = (
    *(".mp4", ".m4v", ".f4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".3gp2"),
    *(".mkv", ".mk3d", ".webm", ".avi", ".divx"),
)
# Of other videos. A file may hold one of these containers all the same, so local ones are looked into. The others are
# not read: MPEG program streams give no times for many frames, and in transport streams, asf, flv and ogg nothing tells
# a file that was cut off from a whole one.
OTHER_EXTENSIONS = (
    *(".wmv", ".asf", ".wtv", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".evo", ".dat", ".tod", ".mod"),
    *(".ts", ".mts", ".m2ts", ".m2t", ".flv", ".amv", ".ogv", ".ogm", ".ogx", ".rm", ".rmvb", ".swf", ".mxf", ".gxf"),
    *(".dv", ".nut", ".nsv", ".bik", ".vro", ".y4m", ".ivf", ".obu", ".h264", ".264", ".h265", ".265", ".hevc"),
)
_SIGNATURE_BYTES = 12
VALIDATION_FRACTION = 0.1  # where neither the user nor the data set says
_HEADER_BYTES = 4096  # enough of a list to see whether it is one of Kinetics

Facts = tuple[int, int]  # bytes, and time of the last change in nanoseconds
NO_FILE: Facts = (-1, 0)


@dataclass(frozen=True, slots=True)
class Video:
    """One row. `id` is the path below the root: unique, and the same on every machine."""

    id: str
    path: str  # as `filesystem` takes it
    category: str
    split: str
    source: str  # what it was cut from; one source is in one split, unless the data set parts it
    size_bytes: int  # -1: there is no regular file
    modified_ns: int  # 0: there is no regular file

    @property
    def identity(self) -> str:
        """What a store knows the video by: another file, or the same one changed, has another."""
        return hashlib.sha256(f"{self.path}\0{self.size_bytes}\0{self.modified_ns}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Catalog:
    name: str  # of the data set, for tables and tags
    root: str
    filesystem: fs.FileSystem
    videos: tuple[Video, ...]  # sorted by id
    base: str = ""  # path of the folder on `filesystem`
    skipped: tuple[str, ...] = ()  # paths below it of what may be videos and is not used, though no list decides

    @property
    def fingerprint(self) -> str:
        """Changes when a video is added, removed, resized, renamed or moved to another split, category or source."""
        digest = hashlib.sha256()
        listed = self.root.lower().endswith(VIDEO_LIST_SUFFIXES)
        for v in self.videos:
            # The category of files in no folder is the root's name, which says where the root lies.
            alone = not listed and "/" not in v.id and v.category == PurePosixPath(v.path).parent.name
            category = "" if alone else v.category
            digest.update(f"{v.id}\0{category}\0{v.split}\0{v.source}\0{v.size_bytes}\n".encode())
        return digest.hexdigest()[:16]


def read_catalog(root: str, data: DataConfig, name: str | None = None) -> Catalog:
    """Lists the videos of `root`, a folder or a list (.csv, .parquet), that `data` asks for. Raises ConfigError."""
    filesystem, base = filesystem_of(root)
    try:
        return _read_catalog(filesystem, base, root, data, name)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.root: it cannot be read: {error} (value {root!r})") from error


def _read_catalog(
    filesystem: fs.FileSystem, base: str, root: str, data: DataConfig, name: str | None = None
) -> Catalog:
    kind = filesystem.get_file_info(base).type
    skipped: tuple[str, ...] = ()
    if kind == fs.FileType.Directory:
        found = dict(_listed(filesystem, base, _may_matter))
        title = PurePosixPath(base).name
        rows, skipped = _rows_of_folder(filesystem, base, found, data)
    elif kind == fs.FileType.File and base.lower().endswith(VIDEO_LIST_SUFFIXES):
        title = PurePosixPath(base).stem
        path, base = base, base.rpartition("/")[0]
        found: dict[str, Facts] = {}

        def find(names: Collection[str]) -> dict[str, str]:
            places = _located(filesystem, base, names)
            found.update(places.values())
            return {name: place for name, (place, _) in places.items()}

        rows = _rows_of_manifest(filesystem, path, root, find)
    else:
        raise ConfigError(f"data.root: no such folder or list (.csv, .parquet) of videos (value {root!r})")
    wanted = {unicodedata.normalize("NFC", category) for category in data.categories}
    _check_categories(rows, data, root)
    rows = [row for row in rows if not wanted or row.category in wanted]
    videos = [
        Video(row.id, join(base, row.id), row.category, split, row.source, *found.get(row.id, NO_FILE))
        for row, split in zip(rows, deal_splits(rows, data.validation_fraction), strict=True)
    ]
    videos = _capped(
        videos, {unicodedata.normalize("NFC", category): caps for category, caps in data.max_videos.items()}
    )
    if not any(video.split == "training" for video in videos):
        raise ConfigError(
            f"data.root: no training videos ({', '.join(EXTENSIONS)}); expected training/<category>/, <category>/ or "
            f"the files themselves below a folder, or a list that names some (value {root!r}){_hint(skipped)}"
        )
    return Catalog(name or title, root, filesystem, tuple(sorted(videos, key=lambda video: video.id)), base, skipped)


def _hint(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    return f"; {len(skipped)} files are not used, such as {skipped[0]!r}: ffmpeg -i FILE FILE.mp4 converts other videos"


def deal_splits(rows: Sequence[Row], fraction: float | None) -> list[str]:
    """The split of each row. `fraction` of the sources of what is dealt go to validation.

    Dealt is what has no split, and training too where `fraction` is given or there is no validation split; the data
    set's own validation then is `test`.
    """
    own = any(row.split == "validation" for row in rows)
    carved = fraction is not None

    def given(row: Row) -> str | None:
        if row.split == "training" and (carved or not own):
            return None
        return "test" if row.split == "validation" and carved else row.split

    splits = [given(row) for row in rows]
    # What has no split goes where the data set put other cuts of the same source.
    placed = {row.source: split for row, split in zip(rows, splits, strict=True) if split}
    splits = [split if row.split else placed.get(row.source) for row, split in zip(rows, splits, strict=True)]
    hashes = {row.source: _hash(row.source) for row, split in zip(rows, splits, strict=True) if not split}
    share = VALIDATION_FRACTION if fraction is None else fraction
    held_out = {source for source, drawn in hashes.items() if drawn < share}
    if len(hashes) > 1:  # neither split stays empty
        if not held_out and "validation" not in splits:
            held_out = {min(hashes, key=hashes.__getitem__)}
        elif len(held_out) == len(hashes) and "training" not in splits:
            held_out.remove(max(hashes, key=hashes.__getitem__))
    dealt = {source: "validation" if source in held_out else "training" for source in hashes}
    return [split or dealt[row.source] for row, split in zip(rows, splits, strict=True)]


def _hash(text: str) -> float:
    """In [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _capped(videos: list[Video], caps: Mapping[str, Mapping[Any, int]]) -> list[Video]:
    """At most so many of a category in a split, by a hash of their ids: adding a video replaces one or none."""
    groups = defaultdict(list)
    for video in videos:
        groups[video.category, video.split].append(video)
    kept = []
    for (category, split), group in groups.items():
        most = caps.get(category, caps.get("*", {})).get(split)
        kept += group if most is None else heapq.nsmallest(most, group, key=lambda video: _hash(video.id))
    return kept


def _check_categories(rows: Sequence[Row], data: DataConfig, root: str) -> None:
    present = sorted({row.category for row in rows})
    for category in data.categories:
        if unicodedata.normalize("NFC", category) not in present:
            raise ConfigError(
                f"data.categories: {category!r} is not in {root!r}, which has {', '.join(present) or 'none'}"
            )
    for category in data.max_videos:
        if unicodedata.normalize("NFC", category) not in present and category != "*":
            near = difflib.get_close_matches(category, present, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(present) or 'none'}"
            raise ConfigError(f"data.max_videos.{category}: no such category in {root!r}; {hint}")


def _rows_of_folder(
    filesystem: fs.FileSystem, base: str, found: Mapping[str, Facts], data: DataConfig
) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of a folder, and the names of what may be videos and is not used, where no list says what is."""
    texts = {
        name: _text(filesystem, join(base, name))
        for name, facts in found.items()
        # A pipe would keep us waiting, and other tables are not read to their end.
        if layouts.is_list(name) and facts != NO_FILE and _is_ours(filesystem, base, name)
    }
    local = isinstance(filesystem, fs.LocalFileSystem)
    names, others = [], []
    for name, (size_bytes, _) in sorted(found.items()):
        if name.lower().endswith(EXTENSIONS) or (local and size_bytes > 0 and _holds_video(join(base, name))):
            names.append(name)
        elif size_bytes > 0 and not layouts.is_list(name) and (not local or ending_of(name)):
            others.append(name)
    rows = (
        layouts.moments_in_time(names, texts)
        or layouts.ucf101(names, texts, data.ucf101_list)
        or layouts.kinetics(names, texts)
    )
    if rows:
        return rows, ()
    rows = layouts.split_folders(names) or layouts.class_folders(names, PurePosixPath(base).name)
    return rows, tuple(sorted([*others, *set(names).difference(row.id for row in rows)]))


def _rows_of_manifest(
    filesystem: fs.FileSystem, path: str, root: str, find: Callable[[Collection[str]], Mapping[str, str]]
) -> list[Row]:
    if path.lower().endswith(".csv"):
        return layouts.manifest(root, *layouts.records_of(_text(filesystem, path), root), find)
    try:
        with filesystem.open_input_file(path) as stream:
            table = pq.ParquetFile(stream)
            columns = table.schema_arrow.names
            records = table.read([name for name in layouts.MANIFEST_COLUMNS if name in columns]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{root}: not a whole Parquet file: {error}") from None
    return layouts.manifest(root, columns, enumerate(records, start=1), find)


def _is_ours(filesystem: fs.FileSystem, base: str, name: str) -> bool:
    if name in layouts.MOMENTS_LISTS or not name.endswith(".csv"):
        return True
    with filesystem.open_input_stream(join(base, name)) as stream:
        head = stream.read(_HEADER_BYTES)
    return layouts.is_kinetics(head.decode(_encoding_of(head), errors="replace"))


def _text(filesystem: fs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    encoding = _encoding_of(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise ConfigError(f"{path}: not {name} text at byte {error.start}; save it as UTF-8") from None


def _encoding_of(content: bytes) -> str:
    """Of a list: UTF-8, or UTF-16, which spreadsheets call Unicode text."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark: a list begins with a letter of ASCII, of which a half is zero.
    return {b"\0": "utf-16-be"}.get(content[:1], "utf-16-le" if content[1:2] == b"\0" else "utf-8-sig")


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its point; nothing for `film` and `film no. 2 of 3`."""
    ending = os.path.splitext(name.rpartition("/")[2])[1].lower()
    return ending if re.fullmatch(r"\.\w{1,10}", ending) else ""


def _holds_video(path: str) -> bool:
    """Whether a local file begins like one in a container that `decode` reads."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SIGNATURE_BYTES)
    except OSError:
        return False
    matroska, avi = head.startswith(b"\x1aE\xdf\xa3"), head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return matroska or avi or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def _may_matter(name: str) -> bool:
    """What may be a video or a list, but nothing hidden: `._a.mp4` is what macOS leaves beside a.mp4, and no video."""
    ending = ending_of(name)
    video = name.lower().endswith(EXTENSIONS) or ending in OTHER_EXTENSIONS or not ending
    return (video or layouts.is_list(name)) and "/." not in f"/{name}"


def _located(filesystem: fs.FileSystem, base: str, names: Collection[str]) -> dict[str, tuple[str, Facts]]:
    """Of the files that a list names, whatever their endings, those that are there: (name, facts) of each."""
    if isinstance(filesystem, fs.LocalFileSystem):
        files = functools.cache(lambda folder: Spellings(_entries(join(base, folder))))
        places = {name: _place(base, name, files) for name in names}
        return {name: (place, _stat(join(base, place))) for name, place in places.items() if place}
    # A thousand names a request, where each would cost one.
    wanted, alike = set(names), {spelling(name).casefold() for name in names}
    listed = dict(_listed(filesystem, base, lambda name: name in wanted or spelling(name).casefold() in alike))
    found = Spellings(listed)
    places = {name: found.find(name) for name in names}
    return {name: (place, listed[place]) for name, place in places.items() if place}


def _place(base: str, name: str, files: Callable[[str], Spellings]) -> str | None:
    """Where a file is that a list names, part by part, as each may be spelled otherwise; none where it is not there."""
    if os.path.lexists(join(base, name)):
        return name
    place = ""
    for part in spelling(name).split("/"):
        below = files(place).find(part)
        if below is None:
            return None
        place = f"{place}/{below}" if place else below
    return place


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _listed(filesystem: fs.FileSystem, base: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Facts]]:
    """(name below `base`, facts) of the entries that are `wanted` by their names."""
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _walked(base, wanted)
        return
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive=True)):
        name = info.path[len(base) + 1 :]  # which may begin with a slash: keys may have empty parts
        if wanted(name):
            yield name, (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else NO_FILE


def _walked(base: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Facts]]:
    """`_listed` of a local folder.

    Not with pyarrow's FileSelector: it leaves out links to nowhere, follows a link to a folder above 40 times (two of
    them 2^40 times), and one name that is not UTF-8 ends the whole listing.
    """
    through_links: set[tuple[int, int]] = set()
    pending: deque[tuple[str, tuple[tuple[int, int], ...], bool]] = deque([("", (), False)])
    while pending:
        below, above, linked = pending.popleft()  # those nearest to the root first
        try:
            about = os.stat(join(base, below))
            here = about.st_dev, about.st_ino
            # Besides its own place, a folder is listed in one that links lead to, however they cross.
            if here in above or (linked and here in through_links):
                continue
            if linked:
                through_links.add(here)
            with os.scandir(join(base, below)) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"data.root: {join(base, below)!r} cannot be listed: {error.strerror}") from error
        for entry in entries:
            name = below + entry.name
            if wanted(name):
                yield _speakable(name, _stat(entry.path))
            if not entry.name.startswith(".") and _is_folder(entry):
                pending.append((f"{name}/", (*above, here), linked or entry.is_symlink()))


def _speakable(name: str, facts: Facts) -> tuple[str, Facts]:
    """A name that is not UTF-8 is escaped and has no file: pyarrow opens such a file only by bytes, and no string of
    Arrow or Parquet can hold its name. So it becomes one reject instead of an error about all the others.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode(errors="backslashreplace"), NO_FILE
    return name, facts


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stat(path: str) -> Facts:
    try:
        about = os.stat(path)
    except OSError:
        return NO_FILE
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else NO_FILE
