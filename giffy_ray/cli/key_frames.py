"""Clips of key frames: which frames they have, and how these become files.

    pictures --KeyFrames--> uint8 of one size --Interpolator--> frames --save_frames--> clip

Frames are written as they are generated, and pictures read as they are needed, so memory grows with neither's number.
torch is imported with the first frame: the plan and the pictures are checked without it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from giffy_ray.core.errors import InputError
from giffy_ray.inference.clip import output_format, png_pattern, save_frames
from giffy_ray.inference.images import Fit, match_sizes, read_image

if TYPE_CHECKING:
    from giffy_ray.inference.interpolator import Ease, Interpolator


class KeyFrames:
    """The pictures of a clip, all with the size and channels of the first. They are read when they are needed.

    Args:
        paths: Two or more pictures. All are read once, so that a damaged one is reported before any work.
        fit: What happens to pictures of another shape than the first; see `match_sizes`.
        loop: End with the first picture again.

    Raises:
        InputError: A picture cannot be used.
    """

    def __init__(self, paths: Sequence[str | Path], fit: Fit, loop: bool):
        self._read = functools.lru_cache(maxsize=2)(_read_picture)
        self._count = len(paths)
        self._paths = (*paths, *paths[: int(loop)])
        self._fit: Fit = fit
        has_alpha = [self._read(path).shape[2] == 4 for path in paths]
        self._has_alpha = any(has_alpha)

    def __len__(self) -> int:
        """Returns the number of pictures, without the repetition of the first."""
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields uint8 [height, width, 3], or 4 channels if any of the pictures has transparency."""
        first = self._read(self._paths[0])
        if self._has_alpha and first.shape[2] == 3:
            first = np.dstack([first, np.full(first.shape[:2], 255, np.uint8)])
        yield first
        for path in self._paths[1:]:
            yield match_sizes(first, self._read(path), self._fit)[1]


def _read_picture(path: str | Path) -> np.ndarray:
    try:
        return read_image(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def plan_segments(pictures: int, frames: int, duration_s: float | None, fps: float, loop: bool) -> list[int]:
    """Returns the number of frames from each picture to the next, both counted.

    Args:
        pictures: Number of key frames, without the repetition of the first.
        frames: Length of each segment, if there is no duration.
        duration_s: Length of the whole clip. Segments differ by at most one frame.
        fps: Frames per second.
        loop: The clip returns to the first picture, but does not show it again.

    Raises:
        InputError: The duration is too short to show all pictures.
    """
    segments = pictures if loop else pictures - 1
    if duration_s is None:
        return [frames] * segments
    total = round(duration_s * fps)
    steps = total if loop else total - 1
    if steps < segments:
        raise InputError(
            f"--duration: {duration_s:g} s at {fps:g} frames per second are {total} frames, fewer than the {pictures} "
            "pictures; raise --duration or --fps"
        )
    edges = [round(index * steps / segments) for index in range(segments + 1)]
    return [end - start + 1 for start, end in itertools.pairwise(edges)]


def count_frames(segments: Sequence[int], loop: bool) -> int:
    """Returns the length of a clip. Neighbouring segments share the picture between them."""
    return sum(frames - 1 for frames in segments) + (not loop)


@dataclass
class ClipWriter:
    """Writes the samples of one list of key frames.

    Attributes:
        interpolator: The model.
        key_frames: The pictures.
        segments: Frames from each picture to the next; see `plan_segments`.
        loop: Leave out the last frame, which is the first one again.
        ease: See `frame_times`.
        seed: Determines the samples.
        resize: See `Interpolator`.
        motion_size: In pixels; None chooses one for each segment. See `Interpolator`.
    """

    interpolator: Interpolator
    key_frames: KeyFrames
    segments: Sequence[int]
    loop: bool
    ease: Ease
    seed: int
    resize: bool
    motion_size: int | None

    def __post_init__(self) -> None:
        self.motion_sizes: list[int] = []  # of the segments so far; all samples share them
        self.width = self.height = 0  # of the frames that were written

    def write(self, path: Path, sample: int, fps: float, quality: int, on_frame: Callable[[], None]) -> None:
        """Writes a clip.

        Args:
            path: The output; see `save_frames`. PNG files of an earlier, longer clip are removed.
            sample: Which sample, from 0.
            fps: Frames per second.
            quality: 0 to 100.
            on_frame: Called after each frame.

        Raises:
            OSError: The file cannot be written.
        """
        old_files = find_outputs(path)
        count = save_frames(self._watch(self._iter_frames(sample), on_frame), path, fps, quality)
        if output_format(path) == "png":
            folder, pattern = png_pattern(path)
            new_files = {folder / (pattern % number) for number in range(1, count + 1)}
            for old_file in set(old_files) - new_files:
                old_file.unlink()

    def _watch(self, frames: Iterable[np.ndarray], on_frame: Callable[[], None]) -> Iterator[np.ndarray]:
        for frame in frames:
            self.height, self.width = frame.shape[:2]
            yield frame
            on_frame()

    def _iter_frames(self, sample: int) -> Iterator[np.ndarray]:
        """Yields the frames of a clip. The picture at the end of a segment is the first frame of the next one."""
        from giffy_ray.inference.interpolator import frame_times

        last = len(self.segments) - 1
        for segment, (start, end) in enumerate(itertools.pairwise(self.key_frames)):
            if segment == len(self.motion_sizes):
                self.motion_sizes.append(self.motion_size or self.interpolator.choose_motion_size(start, end))
            generated = self.interpolator.iter_frames(
                start,
                end,
                frame_times(self.segments[segment], self.ease),
                sample=sample,
                seed=self.seed,
                motion_size=self.motion_sizes[segment],
                resize=self.resize,
            )
            shows_end = segment == last and not self.loop
            yield from itertools.islice(generated, self.segments[segment] - (not shows_end))


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the block, which writes to `path`, into an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written: {reason}; choose another --output") from error


def sample_paths(output: Path, samples: int) -> list[Path]:
    """Returns the outputs: out.mp4 for one sample, out-1.mp4, out-2.mp4, ... for several."""
    if samples == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, samples + 1)]


def find_outputs(path: Path) -> list[Path]:
    """Returns the files of an output that exist: the file, or the PNG files of a folder or pattern."""
    if output_format(path) != "png":
        return [path] if path.exists() else []
    folder, pattern = png_pattern(path)
    before, after = re.split(r"%\d*d", pattern)
    matcher = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in sorted(names) if matcher.fullmatch(name)]
