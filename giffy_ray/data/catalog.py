"""Which videos there are: a folder -> rows of id, path, category and split. Nothing is opened here.

Three layouts are read, locally or on s3:// and gs://:

    training/<category>/*.mp4, validation/<category>/*.mp4     Moments in Time; `test/` likewise where there is one.
        Where trainingSet.csv or validationSet.csv (no header, first column `category/file.mp4`) is there too, it is
        the list: a file that it names and that is missing is rejected by name later; others are not used.
    <category>/*.mp4                                           class folders
    *.mp4                                                      one category, named like the folder

The last two have no splits, so a share of the clips is held out by a hash of their id: adding videos moves none.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow import fs

from giffy_ray.config import ConfigError, DataConfig
from giffy_ray.storage import filesystem_of, join, read_text

SPLITS = ("training", "validation", "test", "shifted")
EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Video:
    """One row. `id` is the path below the root: unique, and the same on every machine."""

    id: str
    path: str  # as `filesystem` takes it
    category: str
    split: str
    size_bytes: int


@dataclass(frozen=True)
class Catalog:
    name: str  # of the data set, for tables and tags
    root: str
    filesystem: fs.FileSystem
    videos: tuple[Video, ...]  # sorted by id

    @property
    def fingerprint(self) -> str:
        """Changes when a video is added, removed, resized, renamed or moved to another split."""
        digest = hashlib.sha256()
        for video in self.videos:
            digest.update(f"{video.id}\0{video.split}\0{video.size_bytes}\n".encode())
        return digest.hexdigest()[:16]


def read_catalog(root: str, data: DataConfig, name: str | None = None) -> Catalog:
    """Lists the videos below `root` that belong to `data.categories`. Raises ConfigError."""
    filesystem, base = filesystem_of(root)
    if filesystem.get_file_info(base).type != fs.FileType.Directory:
        raise ConfigError(f"data.root: no such folder (value {root!r})")
    sizes = {
        info.path.removeprefix(base).lstrip("/"): info.size
        for info in filesystem.get_file_info(fs.FileSelector(base, recursive=True))
        if info.type == fs.FileType.File and info.path.lower().endswith(EXTENSIONS)
    }
    listed = _moments_in_time(root, sizes) or _class_folders(base, sizes, data.validation_fraction)
    videos = [
        Video(video_id, f"{base}/{video_id}", category, split, sizes.get(video_id, 0))
        for video_id, category, split in sorted(listed)
    ]
    videos = _of_categories(videos, data.categories, root)
    if not any(video.split == "training" for video in videos):
        raise ConfigError(
            f"data.root: no training videos ({', '.join(EXTENSIONS)}) below it; expected "
            f"training/<category>/, <category>/ or the files themselves (value {root!r})"
        )
    return Catalog(name or PurePosixPath(base).name, root, filesystem, tuple(videos))


def _moments_in_time(root: str, found: Iterable[str]) -> list[tuple[str, str, str]]:
    """(id, category, split) of the files below training/, validation/ and test/; empty without such folders."""
    videos = []
    for split in SPLITS:
        text = read_text(join(root, f"{split}Set.csv"))
        if text is not None:
            names = [f"{split}/{line[0]}" for line in csv.reader(io.StringIO(text)) if line]
        else:
            names = [name for name in found if name.startswith(f"{split}/") and name.count("/") >= 2]
        videos += [(name, name.split("/")[1], split) for name in names]
    return videos


def _class_folders(base: str, found: Iterable[str], fraction: float) -> list[tuple[str, str, str]]:
    """(id, category, split) of <category>/*.mp4 or *.mp4, with `fraction` of them held out for validation."""
    names = list(found)
    hashes = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    held_out = {name for name in names if hashes[name] < fraction}
    if not held_out and len(names) > 1:
        held_out = {min(names, key=hashes.__getitem__)}
    alone = PurePosixPath(base).name
    return [
        (
            name,
            name.split("/")[0] if "/" in name else alone,
            "validation" if name in held_out else "training",
        )
        for name in names
    ]


def _of_categories(videos: list[Video], categories: tuple[str, ...], root: str) -> list[Video]:
    present = Counter(video.category for video in videos)
    missing = [category for category in categories if category not in present]
    if missing:
        raise ConfigError(
            f"data.categories: {missing[0]!r} is not in {root!r}, which has {', '.join(sorted(present)) or 'none'}"
        )
    return [video for video in videos if not categories or video.category in categories]
