"""Raises the frame rate of a whole film, in memory that does not depend on its length.

    source --video_file.read_frames--> frames, each with its time
    frames --drop_duplicates--> pictures, which differ from each other or are still
    pictures --scene_cuts.mark_cuts--> pictures, and the cuts between them
    pairs of pictures --plan_segments, FilmMotion--> times of output frames, and the motion at these
    segments --render_segments, FilmRenderer--> output frames, at a constant rate
    output frames, packets of the other streams --video_file.FilmWriter--> output

A frame of the source that has the time of an output frame passes unchanged. Across a cut, and while nothing moves, the
nearest frame is repeated.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from os import PathLike
from pathlib import Path

import av

from giffy_ray.core.errors import InputError
from giffy_ray.inference.clip import DEFAULT_QUALITY
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.pair_motion import PairMotion
from giffy_ray.inference.scene_cuts import Thumbnail, ThumbnailMaker, is_duplicate, mark_cuts, measure_change
from giffy_ray.inference.video_file import CONTAINERS, FilmWriter, inspect_film, open_film, read_frames
from giffy_ray.inference.video_motion import FilmMotion, FilmRenderer

_MAX_FPS = 1000
_MAX_RATE_DENOMINATOR = 1001  # 29.97 frames per second are 30000/1001
# Matroska rounds times to milliseconds, so a source frame may be this far from the output frame of the same time.
_SAME_TIME_S = Fraction(1, 1000)
_MIN_SHOWN_FRACTION = Fraction(1, 4)  # of the last output frame; if the film ends earlier, it is left out
# Motion is spread over duplicates for at most this long: 24 frames per second drawn in sixes, or four mean intervals of
# a slower film. If a picture stays longer, the film is still.
_STILL_AFTER_S = Fraction(1, 4)
_STILL_AFTER_INTERVALS = 4
# Screen recorders write no frame while nothing changes, so the film is still in a gap that is longer.
_LONGEST_GAP_S = Fraction(1)
_SEGMENTS_AHEAD = 2  # whose motion is estimated while another one is rendered


@dataclass
class VideoReport:
    """What `interpolate_video` has done.

    Attributes:
        source_fps: Average frames per second of the source.
        target_fps: Frames per second of the output.
        frames_read: Frames of the source.
        frames_written: Frames of the output.
        frames_made: Those that the model has generated; the others are frames of the source.
        duplicates: Frames of the source that repeat an earlier one.
        cut_times_s: Time of the first frame after each cut, from the first frame of the film.
        audio_copied: Audio streams that were copied unchanged.
        audio_encoded: Audio streams that were encoded as AAC, because the container cannot hold their codec.
        left_out: Descriptions of the streams that the output does not have.
        elapsed_s: Duration of the work.
    """

    source_fps: float
    target_fps: float
    frames_read: int = 0
    frames_written: int = 0
    frames_made: int = 0
    duplicates: int = 0
    cut_times_s: list[float] = field(default_factory=list)
    audio_copied: int = 0
    audio_encoded: int = 0
    left_out: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def cuts(self) -> int:
        """Number of cuts."""
        return len(self.cut_times_s)


@dataclass(frozen=True)
class _Picture:
    """A frame of the source that differs from the picture before, or is still.

    Attributes:
        frame: As it may be written.
        thumbnail: Small versions of it.
        time: Presentation time in seconds.
        last_time: Time of the source frame before it, which shows what the picture before shows.
        is_still: Whether nothing moves between the picture before and this one.
    """

    frame: av.VideoFrame
    thumbnail: Thumbnail
    time: Fraction
    last_time: Fraction
    is_still: bool = False


@dataclass
class _Segment:
    """The output frames from one picture to the next.

    Attributes:
        repeated: Those that are frames of the source. They come first.
        start: The frame to begin the motion with, if there are others.
        end: The frame to end it with.
        between: Times of the others, above 0 at the start and below 1 at the end.
        motion: The motion from start to end, as soon as it is estimated.
    """

    repeated: list[av.VideoFrame]
    start: av.VideoFrame | None = None
    end: av.VideoFrame | None = None
    between: list[float] = field(default_factory=list)
    motion: Future[PairMotion] | None = None


def interpolate_video(
    interpolator: Interpolator,
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    times: float | None = None,
    fps: float | None = None,
    quality: int = DEFAULT_QUALITY,
    motion_size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda written, total: None,
) -> VideoReport:
    """Writes a film with another frame rate, which is constant, and the same duration.

    The output's first frame is the source's. Audio, subtitles that the output's container can hold, chapters and
    metadata are copied. Interlaced video is deinterlaced, rotation is applied, and HDR and wide-gamut colours become
    BT.709. The output appears under its name only when it is complete.

    Args:
        interpolator: Makes the frames between two.
        source: An mp4, mov, mkv, webm, avi, ts, mpg, flv, wmv or ogv file.
        output: An mp4, m4v, mov or mkv file. Its parent folder is created.
        times: Factor of the frame rate: 2 doubles it. If the source's rate is variable, its average counts.
        fps: Frame rate, instead of the factor.
        quality: 0 to 100, as for `save_frames`.
        motion_size: Longer side of the images that motion is estimated on; None chooses it by the size of the film.
        on_progress: Called after each frame with the number of frames written and their total.

    Raises:
        InputError: An argument is invalid, or the source cannot be read.
        OSError: The output cannot be written.
    """
    started_s = time.monotonic()
    path, target = Path(source), Path(output)
    _check_arguments(interpolator, path, target, quality, motion_size)
    rate_of = _parse_rate(times, fps)
    film = inspect_film(path)
    rate = rate_of(film.rate)
    report = VideoReport(float(film.rate), float(rate))
    grid = _TimeGrid(film.first, film.end, rate)
    film_motion = FilmMotion(interpolator, film.converter, motion_size)
    renderer = FilmRenderer(film.converter, interpolator.device)
    container_format = CONTAINERS[target.suffix.lower()]
    # Players can start before they have all of the file. Given as `options`, it would go to the encoders, too.
    options = {} if container_format == "matroska" else {"movflags": "+faststart"}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with (
            open_film(path) as container,
            av.open(str(partial), "w", format=container_format, container_options=options) as muxer,
        ):
            writer = FilmWriter(muxer, container, film, rate, quality)
            frames = read_frames(container, film, writer.forward)
            pictures = _drop_duplicates(frames, film.rate, report)
            segments = _plan_segments(pictures, grid, film_motion, report)
            with closing(segments):
                for frame in _render_segments(segments, renderer, report):
                    writer.write(frame)
                    report.frames_written += 1
                    on_progress(report.frames_written, grid.count)
            writer.finish()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    report.audio_copied, report.audio_encoded = writer.audio_copied, writer.audio_encoded
    report.left_out = writer.left_out
    report.elapsed_s = time.monotonic() - started_s
    return report


def _check_arguments(
    interpolator: Interpolator, source: Path, output: Path, quality: int, motion_size: int | None
) -> None:
    if not 0 <= quality <= 100:
        raise InputError(f"quality: must be 0 to 100 (value {quality})")
    if motion_size is not None and motion_size < 1:
        raise InputError(f"motion_size: must be at least 1 (value {motion_size})")
    if interpolator.fixed_size is not None:
        height, width = interpolator.fixed_size
        raise InputError(f"model: this one generates only clips of {width}x{height} pixels; for videos use between")
    if output.suffix.lower() not in CONTAINERS:
        raise InputError(f"{output}: a video is written as {', '.join(CONTAINERS)}; change the suffix")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"{output}: is the source; give the output another name")


def _parse_rate(times: float | None, fps: float | None) -> Callable[[Fraction], Fraction]:
    """Returns the function that gives the output's frame rate for that of the source."""
    if (times is None) == (fps is None):
        raise InputError("times, fps: give one of them, the factor or the frame rate of the output")
    for name, number in (("times", times), ("fps", fps)):
        if number is not None and not 0 < number <= _MAX_FPS:
            raise InputError(f"{name}: must be above 0 and at most {_MAX_FPS} (value {number:g})")

    def rate_of(source: Fraction) -> Fraction:
        rate = _to_rate(fps) if fps is not None else source * Fraction(times or 1).limit_denominator(1000)
        if rate > _MAX_FPS:
            raise InputError(f"times: {float(rate):g} frames per second are more than {_MAX_FPS} (value {times:g})")
        return rate

    return rate_of


def _to_rate(fps: float) -> Fraction:
    """Returns the rate that a number means: 29.97 is 30000/1001."""
    ntsc = Fraction(1000 * math.ceil(fps), 1001)
    is_ntsc = not float(fps).is_integer() and abs(float(ntsc) - fps) < 0.005
    return ntsc if is_ntsc else Fraction(fps).limit_denominator(_MAX_RATE_DENOMINATOR)


class _TimeGrid:
    """The times of the output frames in seconds: `first`, and on at a constant rate until `end`."""

    def __init__(self, first: Fraction, end: Fraction, rate: Fraction):
        self._first, self._rate = first, rate
        self.count = max(1, math.ceil((end - first) * rate - _MIN_SHOWN_FRACTION))
        self._taken = 0

    def take_before(self, end: Fraction | float) -> Iterator[Fraction]:
        """Yields the next times that are before `end`."""
        while self._taken < self.count:
            next_time = self._first + self._taken / self._rate
            if next_time >= end:
                return
            self._taken += 1
            yield next_time


def _drop_duplicates(
    frames: Iterable[tuple[Fraction, av.VideoFrame]], rate: Fraction, report: VideoReport
) -> Iterator[_Picture]:
    """Drops frames that repeat the last distinct one, for as long as the motion is to be spread over them.

    After that they are yielded as still pictures. So is the end of a gap in which the source has no frames.
    """
    make_thumbnail = ThumbnailMaker()
    still_after_s = max(_STILL_AFTER_S, _STILL_AFTER_INTERVALS / rate)
    longest_gap_s = max(_LONGEST_GAP_S, _STILL_AFTER_INTERVALS / rate)
    distinct: _Picture | None = None  # the last that differs from those before
    yielded: _Picture | None = None
    last_time, last_change = Fraction(0), 0.0
    for number, (frame_time, frame) in enumerate(frames, 1):
        report.frames_read = number
        picture = _Picture(frame, make_thumbnail(frame), frame_time, last_time)
        change = measure_change(distinct.thumbnail, picture.thumbnail) if distinct else math.inf
        if distinct and is_duplicate(change, last_change):
            report.duplicates += 1
            if frame_time - distinct.time > still_after_s:
                yielded = replace(picture, is_still=True)
                yield yielded
        else:
            if yielded and frame_time - last_time > longest_gap_s:
                gap_end = frame_time - 1 / rate
                yield replace(yielded, time=gap_end, last_time=last_time, is_still=True)
                picture = replace(picture, last_time=gap_end)
            last_change = change if distinct else 0.0
            distinct = yielded = picture
            yield picture
        last_time = frame_time


def _plan_segments(
    pictures: Iterable[_Picture], grid: _TimeGrid, film_motion: FilmMotion, report: VideoReport
) -> Generator[_Segment, None, None]:
    """Yields the segments of the output, whose motion a thread estimates."""
    start: _Picture | None = None
    first_time = Fraction(0)
    with ThreadPoolExecutor(1) as thread:
        for end, is_cut in mark_cuts(pictures):
            if start is None:
                start, first_time = end, end.time
                continue
            if is_cut:
                report.cut_times_s.append(float(end.time - first_time))
            segment = _plan_segment(start, end, is_cut, list(grid.take_before(end.time - _SAME_TIME_S)))
            if segment.between:
                segment.motion = thread.submit(film_motion.estimate, start.frame, end.frame)
            yield segment
            start = end
        if start is not None:
            yield _Segment([start.frame for _ in grid.take_before(math.inf)])


def _plan_segment(start: _Picture, end: _Picture, is_cut: bool, times: Sequence[Fraction]) -> _Segment:
    """Plans the output frames at `times`, which are after `start` and before `end`, or as good as at the start."""
    if is_cut or end.is_still:
        middle = (end.last_time + end.time) / 2
        return _Segment([start.frame if moment <= middle else end.frame for moment in times])
    between = [moment for moment in times if moment - start.time > _SAME_TIME_S]
    duration = end.time - start.time
    return _Segment(
        [start.frame] * (len(times) - len(between)),
        start.frame,
        end.frame,
        [float((moment - start.time) / duration) for moment in between],
    )


def _render_segments(
    segments: Iterator[_Segment], renderer: FilmRenderer, report: VideoReport
) -> Iterator[av.VideoFrame]:
    """Yields the output frames. Takes `_SEGMENTS_AHEAD` segments before it renders one."""
    waiting: deque[_Segment] = deque()
    while True:
        waiting.extend(itertools.islice(segments, _SEGMENTS_AHEAD + 1 - len(waiting)))
        if not waiting:
            return
        segment = waiting.popleft()
        yield from segment.repeated
        if segment.motion is not None and segment.start is not None and segment.end is not None:
            report.frames_made += len(segment.between)
            yield from renderer.iter_frames(segment.start, segment.end, segment.motion.result(), segment.between)
