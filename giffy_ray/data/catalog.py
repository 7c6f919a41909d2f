"""Lists the videos of a dataset: a folder or a list of videos in; id, path, category, split and source of each out.

Only lists are read, and the first bytes of local files whose names do not show whether they are videos. `layouts`
knows the folder structures of public datasets. A video that is not a regular file (a pipe, a broken link, a listed file
that is missing) stays in the catalog without a size, so that decoding reports it as a reject. Files that may be videos
but are not used are in `Catalog.unused_files`.

Videos without a split are assigned one by a hash of their source. Clips cut from one video therefore share a split,
and adding videos does not move existing ones.
"""

from __future__ import annotations

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
from giffy_ray.data.layouts import PathMatcher, VideoEntry, normalize_path

# Containers that `decode` reads: MP4 and MOV, Matroska and WebM, and AVI. The content decides, not the extension.
EXTENSIONS = (
    *(".mp4", ".m4v", ".f4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".3gp2"),
    *(".mkv", ".mk3d", ".webm", ".avi", ".divx"),
)
# Other video files. Local ones are inspected, because they may hold one of the containers above. Other containers are
# not supported: MPEG program streams lack timestamps for many frames, and a truncated transport stream, ASF, FLV or Ogg
# file cannot be told from a complete one.
OTHER_EXTENSIONS = (
    *(".wmv", ".asf", ".wtv", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".evo", ".dat", ".tod", ".mod"),
    *(".ts", ".mts", ".m2ts", ".m2t", ".flv", ".amv", ".ogv", ".ogm", ".ogx", ".rm", ".rmvb", ".swf", ".mxf", ".gxf"),
    *(".dv", ".nut", ".nsv", ".bik", ".vro", ".y4m", ".ivf", ".obu", ".h264", ".264", ".h265", ".265", ".hevc"),
)
DEFAULT_VALIDATION_FRACTION = 0.1  # if neither the config nor the dataset defines a validation split
_SIGNATURE_BYTES = 12
_LIST_HEADER_BYTES = 4096  # enough of a list to recognize the header of Kinetics

FileStat = tuple[int, int]  # size in bytes, modification time in ns
NO_FILE: FileStat = (-1, 0)


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a catalog.

    Attributes:
        id: Path below the dataset's root. Unique, and the same on every machine.
        path: Path on the catalog's file system.
        category: Class label.
        split: One of `SPLITS`.
        source: The video that this one was cut from. All cuts share a split, unless the dataset itself separates them.
        size_bytes: -1 if there is no regular file.
        modified_ns: Modification time, 0 if there is no regular file.
    """

    id: str
    path: str
    category: str
    split: str
    source: str
    size_bytes: int
    modified_ns: int

    @property
    def identity(self) -> str:
        """Key of the video in a store: 32 hex digits. Changes with the path, size or modification time of the file."""
        return hashlib.sha256(f"{self.path}\0{self.size_bytes}\0{self.modified_ns}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Catalog:
    """The videos of a dataset.

    Attributes:
        name: Name of the dataset, for tables and tags.
        root: The folder or list, as configured.
        filesystem: File system that the videos are on.
        videos: Sorted by id.
        base: Path on `filesystem` of the folder that contains the videos.
        unused_files: Paths below `base` of files that may be videos but are not used. Empty if a list names the videos.
    """

    name: str
    root: str
    filesystem: fs.FileSystem
    videos: tuple[Video, ...]
    base: str = ""
    unused_files: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change if a video is added, removed, renamed, resized or gets other labels."""
        digest = hashlib.sha256()
        is_list = self.root.lower().endswith(VIDEO_LIST_SUFFIXES)
        for video in self.videos:
            # Files directly in the root have its name as category, which must not make the fingerprint depend on it.
            in_root = not is_list and "/" not in video.id and video.category == PurePosixPath(video.path).parent.name
            category = "" if in_root else video.category
            digest.update(f"{video.id}\0{category}\0{video.split}\0{video.source}\0{video.size_bytes}\n".encode())
        return digest.hexdigest()[:16]


def read_catalog(root: str, data: DataConfig, name: str | None = None) -> Catalog:
    """Lists the videos of a dataset.

    Args:
        root: Path or URI of a folder or of a list of videos (.csv, .parquet).
        data: Selects categories, splits and the number of videos.
        name: Name of the dataset; defaults to the name of the folder or list.

    Raises:
        ConfigError: `root` cannot be read, is malformed, or has no training videos.
    """
    filesystem, path = filesystem_of(root)
    try:
        return _read_catalog(filesystem, path, root, data, name)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.root: cannot be read: {error} (value {root!r})") from error


def _read_catalog(filesystem: fs.FileSystem, path: str, root: str, data: DataConfig, name: str | None) -> Catalog:
    kind = filesystem.get_file_info(path).type
    unused_files: tuple[str, ...] = ()
    if kind == fs.FileType.Directory:
        base = path
        default_name = PurePosixPath(path).name
        stats = dict(_list_files(filesystem, base, _is_relevant))
        entries, unused_files = _read_folder_entries(filesystem, base, stats, data)
    elif kind == fs.FileType.File and path.lower().endswith(VIDEO_LIST_SUFFIXES):
        base = path.rpartition("/")[0]
        default_name = PurePosixPath(path).stem
        stats: dict[str, FileStat] = {}

        def find_files(names: Collection[str]) -> dict[str, str]:
            located = _locate_files(filesystem, base, names)
            stats.update(located.values())
            return {listed_name: file_name for listed_name, (file_name, _) in located.items()}

        entries = _read_list_entries(filesystem, path, root, find_files)
    else:
        raise ConfigError(f"data.root: no such folder or list (.csv, .parquet) of videos (value {root!r})")
    _check_categories(entries, data, root)
    wanted = {_normalize(category) for category in data.categories}
    entries = [entry for entry in entries if not wanted or entry.category in wanted]
    videos = []
    for entry, split in zip(entries, assign_splits(entries, data.validation_fraction), strict=True):
        size_bytes, modified_ns = stats.get(entry.id, NO_FILE)
        entry_path = join(base, entry.id)
        videos.append(Video(entry.id, entry_path, entry.category, split, entry.source, size_bytes, modified_ns))
    max_videos = {_normalize(category): limits for category, limits in data.max_videos.items()}
    videos = _limit_videos(videos, max_videos)
    if not any(video.split == "training" for video in videos):
        raise ConfigError(
            f"data.root: no training videos ({', '.join(EXTENSIONS)}); give a folder with training/<category>/, "
            f"<category>/ or video files in it, or a list of videos (value {root!r}){_conversion_hint(unused_files)}"
        )
    videos.sort(key=lambda video: video.id)
    return Catalog(name or default_name, root, filesystem, tuple(videos), base, unused_files)


def _conversion_hint(unused_files: Sequence[str]) -> str:
    if not unused_files:
        return ""
    return (
        f"; {len(unused_files)} files are not used, such as {unused_files[0]!r}: convert other videos with "
        "ffmpeg -i FILE FILE.mp4"
    )


def assign_splits(entries: Sequence[VideoEntry], validation_fraction: float | None) -> list[str]:
    """Returns the split of each entry.

    Entries without a split are divided into training and validation by a hash of their source. The dataset's own
    training split is divided too if `validation_fraction` is given or there is no validation split. If
    `validation_fraction` is given, the dataset's own validation split becomes `test`.

    Args:
        entries: Videos, with the split that the dataset gives them, if any.
        validation_fraction: Fraction of the divided sources to hold out, in (0, 1). Defaults to 0.1.
    """
    has_validation = any(entry.split == "validation" for entry in entries)
    carves_validation = validation_fraction is not None

    def get_fixed_split(entry: VideoEntry) -> str | None:
        if entry.split == "training" and (carves_validation or not has_validation):
            return None
        return "test" if entry.split == "validation" and carves_validation else entry.split

    splits = [get_fixed_split(entry) for entry in entries]
    # Entries without a split follow other cuts of the same source that the dataset has assigned.
    split_by_source = {entry.source: split for entry, split in zip(entries, splits, strict=True) if split}
    splits = [
        split if entry.split else split_by_source.get(entry.source)
        for entry, split in zip(entries, splits, strict=True)
    ]
    hashes = {entry.source: _hash(entry.source) for entry, split in zip(entries, splits, strict=True) if not split}
    threshold = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    held_out = {source for source, value in hashes.items() if value < threshold}
    if len(hashes) > 1:  # neither split may be empty
        if not held_out and "validation" not in splits:
            held_out = {min(hashes, key=hashes.__getitem__)}
        elif len(held_out) == len(hashes) and "training" not in splits:
            held_out.remove(max(hashes, key=hashes.__getitem__))
    assigned = {source: "validation" if source in held_out else "training" for source in hashes}
    return [split or assigned[entry.source] for entry, split in zip(entries, splits, strict=True)]


def _hash(text: str) -> float:
    """Hashes text to a number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _limit_videos(videos: list[Video], max_videos: Mapping[str, Mapping[Any, int]]) -> list[Video]:
    """Applies `data.max_videos`. Chooses by a hash of the ids, so that adding a video replaces at most one."""
    groups = defaultdict(list)
    for video in videos:
        groups[video.category, video.split].append(video)
    chosen = []
    for (category, split), group in groups.items():
        limit = max_videos.get(category, max_videos.get("*", {})).get(split)
        chosen += group if limit is None else heapq.nsmallest(limit, group, key=lambda video: _hash(video.id))
    return chosen


def _check_categories(entries: Sequence[VideoEntry], data: DataConfig, root: str) -> None:
    present = sorted({entry.category for entry in entries})
    for category in data.categories:
        if _normalize(category) not in present:
            raise ConfigError(
                f"data.categories: {category!r} is not in {root!r}, which has {', '.join(present) or 'none'}"
            )
    for category in data.max_videos:
        if _normalize(category) not in present and category != "*":
            close = difflib.get_close_matches(category, present, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(present) or 'none'}"
            raise ConfigError(f"data.max_videos.{category}: no such category in {root!r}; {hint}")


def _normalize(category: str) -> str:
    return unicodedata.normalize("NFC", category)


def _read_folder_entries(
    filesystem: fs.FileSystem, base: str, stats: Mapping[str, FileStat], data: DataConfig
) -> tuple[list[VideoEntry], tuple[str, ...]]:
    """Returns the videos of a folder, and the names of unused files that may be videos."""
    texts = {
        name: _read_list(filesystem, join(base, name))
        for name, file_stat in stats.items()
        # Reading a pipe would block, and unrelated tables are not read in full.
        if layouts.is_list(name) and file_stat != NO_FILE and _is_dataset_list(filesystem, base, name)
    }
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    names: list[str] = []
    others: list[str] = []
    for name, (size_bytes, _) in sorted(stats.items()):
        can_inspect = is_local and size_bytes > 0
        if name.lower().endswith(EXTENSIONS) or (can_inspect and _has_video_signature(join(base, name))):
            names.append(name)
        elif size_bytes > 0 and not layouts.is_list(name) and (not is_local or get_extension(name)):
            others.append(name)
    entries = (
        layouts.parse_moments_in_time(names, texts)
        or layouts.parse_ucf101(names, texts, data.ucf101_list)
        or layouts.parse_kinetics(names, texts)
    )
    if entries:
        return entries, ()
    entries = layouts.parse_split_folders(names) or layouts.parse_class_folders(names, PurePosixPath(base).name)
    unused_videos = set(names).difference(entry.id for entry in entries)
    return entries, tuple(sorted([*others, *unused_videos]))


def _read_list_entries(
    filesystem: fs.FileSystem, path: str, root: str, find_files: Callable[[Collection[str]], Mapping[str, str]]
) -> list[VideoEntry]:
    if path.lower().endswith(".csv"):
        columns, records = layouts.parse_records(_read_list(filesystem, path), root)
        return layouts.parse_manifest(root, columns, records, find_files)
    try:
        with filesystem.open_input_file(path) as stream:
            table = pq.ParquetFile(stream)
            columns = table.schema_arrow.names
            rows = table.read([name for name in layouts.MANIFEST_COLUMNS if name in columns]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{root}: not a valid Parquet file: {error}; write it again") from None
    return layouts.parse_manifest(root, columns, enumerate(rows, start=1), find_files)


def _is_dataset_list(filesystem: fs.FileSystem, base: str, name: str) -> bool:
    """Whether a list belongs to a known dataset. CSV files with other names must have the header of Kinetics."""
    if name in layouts.MOMENTS_LISTS or not name.endswith(".csv"):
        return True
    with filesystem.open_input_stream(join(base, name)) as stream:
        head = stream.read(_LIST_HEADER_BYTES)
    return layouts.is_kinetics(head.decode(layouts.detect_encoding(head), errors="replace"))


def _read_list(filesystem: fs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    encoding = layouts.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise ConfigError(f"{path}: not {name} text at byte {error.start}; save it as UTF-8") from None


def get_extension(name: str) -> str:
    """Returns the lower-case extension with its dot, or "" for names such as `film` and `film no. 2 of 3`."""
    extension = os.path.splitext(name.rpartition("/")[2])[1].lower()
    return extension if re.fullmatch(r"\.\w{1,10}", extension) else ""


def _has_video_signature(path: str) -> bool:
    """Whether a local file starts like a container that `decode` reads."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SIGNATURE_BYTES)
    except OSError:
        return False
    is_matroska = head.startswith(b"\x1aE\xdf\xa3")
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
    return is_matroska or is_avi or is_mp4


def _is_relevant(name: str) -> bool:
    """Whether a file may be a video or a list. Hidden files are not: macOS writes `._a.mp4` next to a.mp4."""
    extension = get_extension(name)
    may_be_video = name.lower().endswith(EXTENSIONS) or extension in OTHER_EXTENSIONS or not extension
    return (may_be_video or layouts.is_list(name)) and "/." not in f"/{name}"


def _locate_files(filesystem: fs.FileSystem, base: str, names: Collection[str]) -> dict[str, tuple[str, FileStat]]:
    """Finds files by the names in a list: listed name to (actual name, stat). Missing files are left out."""
    if isinstance(filesystem, fs.LocalFileSystem):
        match_in_folder = functools.cache(lambda folder: PathMatcher(_list_folder(join(base, folder))))
        located = {name: _find_file(base, name, match_in_folder) for name in names}
        return {name: (actual, _stat(join(base, actual))) for name, actual in located.items() if actual}
    # Listing the bucket takes one request per thousand names; looking up names takes one request each.
    exact = set(names)
    folded = {normalize_path(name).casefold() for name in names}
    stats = dict(_list_files(filesystem, base, lambda name: name in exact or normalize_path(name).casefold() in folded))
    matcher = PathMatcher(stats)
    located = {name: matcher.find(name) for name in names}
    return {name: (actual, stats[actual]) for name, actual in located.items() if actual}


def _find_file(base: str, name: str, match_in_folder: Callable[[str], PathMatcher]) -> str | None:
    """Returns the actual name of a listed file, matched part by part, or None if it is missing."""
    if os.path.lexists(join(base, name)):
        return name
    path = ""
    for part in normalize_path(name).split("/"):
        actual = match_in_folder(path).find(part)
        if actual is None:
            return None
        path = f"{path}/{actual}" if path else actual
    return path


def _list_folder(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _list_files(
    filesystem: fs.FileSystem, base: str, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, FileStat]]:
    """Yields (name below `base`, stat) of the entries whose names satisfy `is_wanted`."""
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _walk_local(base, is_wanted)
        return
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive=True)):
        name = info.path[len(base) + 1 :]  # may start with a slash, because keys may have empty parts
        if is_wanted(name):
            yield name, (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else NO_FILE


def _walk_local(base: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, FileStat]]:
    """`_list_files` for a local folder.

    pyarrow's FileSelector is not suitable. It omits broken links, follows a link to a parent folder 40 times (two of
    them 2^40 times), and fails for the whole folder if one name is not UTF-8.
    """
    linked_folders: set[tuple[int, int]] = set()
    pending: deque[tuple[str, tuple[tuple[int, int], ...], bool]] = deque([("", (), False)])
    while pending:
        prefix, parents, is_linked = pending.popleft()  # breadth first
        try:
            status = os.stat(join(base, prefix))
            inode = status.st_dev, status.st_ino
            # A folder is listed once at its own path and at most once through links, however they cross.
            if inode in parents or (is_linked and inode in linked_folders):
                continue
            if is_linked:
                linked_folders.add(inode)
            with os.scandir(join(base, prefix)) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"data.root: {join(base, prefix)!r} cannot be listed: {error.strerror}") from error
        for entry in entries:
            name = prefix + entry.name
            if is_wanted(name):
                yield _escape_non_utf8(name, _stat(entry.path))
            if not entry.name.startswith(".") and _is_folder(entry):
                pending.append((f"{name}/", (*parents, inode), is_linked or entry.is_symlink()))


def _escape_non_utf8(name: str, file_stat: FileStat) -> tuple[str, FileStat]:
    """Escapes a name that is not UTF-8 and drops its stat, so that the file becomes one reject.

    Arrow and Parquet strings cannot hold such a name, and pyarrow cannot open the file by it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode(errors="backslashreplace"), NO_FILE
    return name, file_stat


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stat(path: str) -> FileStat:
    try:
        status = os.stat(path)
    except OSError:
        return NO_FILE
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else NO_FILE
