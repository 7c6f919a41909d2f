"""The bytes of a video -> one Clip. Neither torch nor ray is imported: decode tasks start in a third of the time.

Anything may be in those bytes. This module checks what a file says of itself before it decodes; what a file may do
to the process that decodes it is the business of `sandbox`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.container import InputContainer
from av.stream import Disposition

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data.headers import Crop, fragments_of, is_matroska_cut, matroska_crop, mp4_crop
from giffy_ray.data.scaling import FrameScaler, TooLargeError, UnsupportedColourError

# Containers that hold pictures. Playlists and concat scripts, which open other files, are not among them.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
_UNREADABLE = (av.error.FFmpegError, UnknownCodecError, EOFError, IndexError, ValueError)
# Decoders that read `skip_frame` at each packet. libdav1d (AV1) reads it once, when it is opened.
_DROPPING_DECODERS = ("h264", "hevc", "vp9", "mpeg4")
# Decoders that fail at what comes before the first keyframe, or make it up. Others leave it out without an error.
_KEYFRAME_FIRST_DECODERS = ("vp8", "vp9", "mpeg4")
_SLACK_S = 0.2  # by which a file may end sooner than it says
# How much of a video may lack the frames that it is predicted from: x264's longest group, 250 frames, at 24 fps.
_MAX_LEADING_S = 10.5
_MAX_REORDERED = 16  # frames that a decoder may keep back: of H.264 and HEVC
_THUMBNAILS_FPS = 2  # a track with fewer, beside one with more, is not the film
_LIMITS = LimitsConfig()


class RejectedVideo(Exception):
    """A video that gives no clip: `reason` is a short code to count by, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Source:
    """What a file says of its video."""

    codec: str
    width: int
    height: int
    fps: float  # 0 where it does not say
    seconds: float  # 0 where it does not say
    hdr: bool = False  # PQ or HLG, tone-mapped to SDR


class Sampled(NamedTuple):
    clip: np.ndarray  # uint8 [frames, height, width, 3]
    times_s: np.ndarray  # float64 [frames]: when each was shown, after the first
    padded: int  # how many frames of a clip, at its end, repeat the last one, because the video was too short
    source: Source


class _Read(NamedTuple):
    packets: list[av.Packet]  # of the first seconds, in decoding order
    times: list[int]  # when those that are shown are shown, in units of the stream, in any order
    stamped: bool  # whether the container itself says of each packet when it is shown
    unit_s: float
    missing: str  # what the file says that it holds and does not


class _Chosen(NamedTuple):
    packets: list[av.Packet]
    shown: list[int]  # when each of their frames is shown, ascending, in units of the stream
    times: list[int]  # of these, when each frame of the clip is shown
    times_s: np.ndarray
    padded: int
    stamped: bool
    unit_s: float


def decode_clip(video: bytes, clip: ClipConfig) -> np.ndarray:
    """The clip of a video: uint8 [frames, height, width, 3], RGB. Raises RejectedVideo."""
    return sample_clip(video, clip).clip


def sample_clip(video: bytes, clip: ClipConfig, limits: LimitsConfig = _LIMITS) -> Sampled:
    """Takes the frames nearest in time to 0, 1/fps, 2/fps, ... s after the first that decodes and averages them down.

    At 30 frames a second and `clip.fps` 10 these are source frames 0, 3, 6, ..., 87. A video that ends too soon
    repeats its last frame. The picture is cropped as the container says, turned upright and brought to size as
    `clip.fit` says, by the shape that it is shown in where its pixels are not square. Transparency is left out; HDR is
    tone-mapped to SDR (see `colour`). Raises RejectedVideo.
    """
    return _sample(video, clip, limits, every=False)


def sample_source(video: bytes, clip: ClipConfig, limits: LimitsConfig = _LIMITS) -> Sampled:
    """Takes every frame that the video has between the first and the last that `sample_clip` takes."""
    return _sample(video, clip, limits, every=True)


def nearest_frames(times_s: np.ndarray, clip: ClipConfig) -> np.ndarray:
    """int64 [clip.frames]: for each moment of a clip the frame nearest to it, of frames shown at `times_s`."""
    wanted_s = np.arange(clip.frames) / clip.fps
    # Rounded to the nanosecond, so that of two equally near frames it is always the earlier.
    return np.abs(times_s[None, :] - wanted_s[:, None]).round(9).argmin(axis=1)


class _LaterStart(Exception):
    """The first frames do not decode, since what they are predicted from is not in the file; `time` is that of the
    first that does."""

    def __init__(self, time: int):
        super().__init__(time)
        self.time = time


def _sample(video: bytes, clip: ClipConfig, limits: LimitsConfig, every: bool) -> Sampled:
    if not video:
        raise RejectedVideo("empty", "the file has no bytes")
    place, start = 0, None
    while True:
        with _opened(video, limits) as container:
            streams = _ranked_streams(container)
            try:
                return _sample_stream(video, container, streams[place], start, clip, limits, every)
            except _LaterStart as later:
                if start is not None:
                    raise RejectedVideo("damaged", "its frames do not decode from any of the first on") from later
                start = later.time
            except RejectedVideo as rejected:
                if rejected.reason not in ("still", "no_frames") or place + 1 == len(streams):
                    raise
                place, start = place + 1, None


def _opened(video: bytes, limits: LimitsConfig) -> InputContainer:
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(limits.pixels)}
    try:
        return av.open(io.BytesIO(video), "r", options=options)
    except (MemoryError, av.error.MemoryError) as error:
        raise RejectedVideo("memory", f"opening it: {_short(error)}") from error
    except _UNREADABLE as error:
        raise RejectedVideo("not_video", f"not readable as mp4, mov, mkv, webm or avi: {_short(error)}") from error


def _ranked_streams(container: InputContainer) -> list[av.VideoStream]:
    """The video streams of a file in the order in which ffmpeg would choose them, without pictures and thumbnails.

    ffmpeg takes the one with most pixels, where being marked as default counts as five million of them.
    """
    videos = _videos(container)
    if not videos:
        raise RejectedVideo("no_video", "the file has no video stream")

    def rank(stream: av.VideoStream) -> tuple:
        thumbnails = stream.frames == 1 or 0 < (stream.average_rate or 0) < _THUMBNAILS_FPS
        is_default = bool(stream.disposition & Disposition.default)
        pixels = stream.width * stream.height if stream.codec_context else 0
        return stream.codec_context is None, thumbnails, -(pixels + 5_000_000 * is_default), stream.index

    return sorted(videos, key=rank)


def _videos(container: InputContainer) -> list[av.VideoStream]:
    """The video streams that are no cover picture."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _sample_stream(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    start: int | None,
    clip: ClipConfig,
    limits: LimitsConfig,
    every: bool,
) -> Sampled:
    """`start`: the frames before this time do not decode. Raises RejectedVideo, _LaterStart."""
    try:
        source = _inspect(container, stream, limits)
        chosen = _choose(_read(video, container, stream, start, clip, limits), start, clip, limits, every)
        crop = _crop(video, container, stream)
        shape = float(stream.sample_aspect_ratio or 1)
        scaler = FrameScaler(clip, shape, crop, (source.height, source.width), limits.pixels)
        frames = _decode(stream, chosen, scaler, limits)
    except TooLargeError as error:
        raise RejectedVideo("too_large", f"{error} is over data.limits.pixels={limits.pixels}") from error
    except UnsupportedColourError as error:
        raise RejectedVideo("no_decoder", str(error)) from error
    except (MemoryError, av.error.MemoryError) as error:
        raise RejectedVideo("memory", _short(error)) from error
    except _UNREADABLE as error:
        raise RejectedVideo("damaged", _short(error)) from error
    pictures = np.stack([frames[time] for time in chosen.times])
    return Sampled(pictures, chosen.times_s, chosen.padded, dataclasses.replace(source, hdr=scaler.hdr))


def _inspect(container: InputContainer, stream: av.VideoStream, limits: LimitsConfig) -> Source:
    """What the file says of the stream, if it is within the limits."""
    if stream.codec_context is None:
        raise RejectedVideo("no_decoder", "its video is in a format that this FFmpeg does not know")
    length = (container.duration or 0) / av.time_base
    if stream.duration and stream.time_base:
        length = stream.duration * stream.time_base
    source = Source(
        stream.codec_context.name, stream.width, stream.height, float(stream.average_rate or 0), float(length)
    )
    if source.width * source.height > limits.pixels:
        raise RejectedVideo("too_large", f"{source.width}x{source.height} is over data.limits.pixels={limits.pixels}")
    if source.width < 1 or source.height < 1:
        raise RejectedVideo("no_frames", f"its size is {source.width}x{source.height}")
    if stream.frames > limits.frames:
        raise RejectedVideo("too_long", f"{stream.frames} frames are over data.limits.frames={limits.frames}")
    if source.seconds > limits.seconds:
        raise RejectedVideo("too_long", f"{source.seconds:.0f} s are over data.limits.seconds={limits.seconds}")
    return source


def _read(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    start: int | None,
    clip: ClipConfig,
    limits: LimitsConfig,
) -> _Read:
    """The packets of the first seconds from `start` on, undecoded, with those that they need."""
    unit_s = float(stream.time_base)  # type: ignore[arg-type]
    last_wanted_s = (clip.frames - 1) / clip.fps
    # An avi has no presentation times. Those that FFmpeg makes up are wrong for H.264 and for packed B-frames.
    packets, times, stamped = [], [], container.format.name != "avi"
    first, begin, end = math.inf, math.inf, -math.inf
    demuxed = container.demux(stream)
    if stream.codec_context.name in _KEYFRAME_FIRST_DECODERS:
        demuxed = _from_first_keyframe(demuxed, _MAX_LEADING_S / unit_s, limits.frames)
    for packet in demuxed:
        time = packet.pts if packet.pts is not None and (stamped or packet.dts is None) else packet.dts
        if time is None:
            if packet.size:  # not to be shown (an mkv cannot hold negative times), but others are predicted from it
                packets.append(packet)
            continue
        first, end = min(first, time), max(end, time + (packet.duration or 0))
        if not packet.size:
            continue  # the frame before is shown for longer; a decoder would take it for the end
        packets.append(packet)
        if len(packets) > limits.frames:
            raise RejectedVideo("too_long", f"more than data.limits.frames={limits.frames} in its first seconds")
        stamped &= packet.pts is not None
        if not packet.is_discard and (start is None or time >= start):
            times.append(time)
            begin = min(begin, time)
        # Packets come in decoding order, and none is shown before its decoding time.
        if packet.dts is not None and (packet.dts - begin) * unit_s > last_wanted_s + 1:
            return _Read(packets, times, stamped, unit_s, "")
    frame_s = (end - begin) * unit_s / len(times) if times else 0.0
    missing = _missing_end(video, container, stream, first * unit_s, end * unit_s, frame_s, limits) if times else ""
    if not missing and len(set(times)) < 2 <= stream.frames:
        missing = f"it lists {stream.frames} frames, but {len(packets)} could be read"
    return _Read(packets, times, stamped, unit_s, missing)


def _from_first_keyframe(packets: Iterable[av.Packet], longest: float, most: int) -> Iterator[av.Packet]:
    """Without those before the first keyframe, which lack what they are predicted from.

    All of them where no keyframe is marked within `longest` (in units of the stream) or `most` packets.
    """
    before: list[av.Packet] | None = []
    for packet in packets:
        if before is None or packet.is_keyframe:
            before = None
            yield packet
            continue
        before.append(packet)
        if len(before) > most or (packet.dts or 0) - (before[0].dts or 0) > longest:
            yield from before
            before = None
    yield from before or ()


def _choose(read: _Read, start: int | None, clip: ClipConfig, limits: LimitsConfig, every: bool) -> _Chosen:
    """Picks frames by their presentation times."""
    shown = np.unique(np.asarray(read.times, dtype=np.int64))
    if len(shown) < 2 and read.missing:
        raise RejectedVideo("damaged", read.missing)
    if len(shown) < 2 and start is not None:
        raise RejectedVideo("damaged", f"only {len(shown)} of its frames can be decoded")
    if len(shown) == 0:
        raise RejectedVideo("no_frames", "the video stream holds no frames")
    if len(shown) == 1:
        raise RejectedVideo("still", "it has a single frame; a clip needs a start and an end")
    if (int(shown[-1]) - int(shown[0])) * read.unit_s > limits.seconds:
        raise RejectedVideo("too_long", f"its frames lie further apart than data.limits.seconds={limits.seconds}")
    seconds = (shown - shown[0]) * read.unit_s
    taken = nearest_frames(seconds, clip)
    # A frame stays on screen until the next; the last for about as long as the one before it.
    stays_s = max(float(np.median(np.diff(seconds))), 1e-6)
    padded = int((np.arange(clip.frames) / clip.fps >= seconds[-1] + stays_s - 1e-6).sum())
    if padded and read.missing:
        raise RejectedVideo("damaged", read.missing)
    if every:
        taken = np.arange(taken[-1] + 1)
    times = shown[taken].tolist()
    return _Chosen(read.packets, shown.tolist(), times, seconds[taken], padded, read.stamped, read.unit_s)


def _missing_end(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    first_s: float,
    end_s: float,
    frame_s: float,
    limits: LimitsConfig,
) -> str:
    """What is missing by what the file says of its length, if its frames are shown from `first_s` to `end_s`.

    Only of files that have no list of frames to check. An mp4 that is not fragmented gives itself away when it was
    cut off: it lists frames that are not there.
    """
    track_end_s, movie_end_s = 0.0, (container.duration or 0) / av.time_base
    if container.format.name == "avi":
        # FFmpeg shortens the duration to what the file has room for. The header's count of frames stays as it is.
        stated = max(stream.duration or 0, stream.frames)
        track_end_s = movie_end_s = float(stated * stream.time_base)  # type: ignore[operator]
    elif "matroska" in container.format.name:
        clock = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
        if clock:
            parts = zip((3600, 60, 1), clock.groups(), strict=True)
            track_end_s = movie_end_s = sum(unit * float(part) for unit, part in parts)
        elif not movie_end_s and is_matroska_cut(video):
            return f"it ends within an element, after {end_s:.2f} s: it was cut off"
    else:
        fragments = fragments_of(video, stream.id)
        if fragments is None:
            return ""
        if fragments.is_cut:
            return f"it ends within a fragment, after {end_s:.2f} s: it was cut off"
        track_end_s, movie_end_s = first_s + fragments.track_s, fragments.movie_s
    shortest_s = end_s + max(_SLACK_S, frame_s)
    if shortest_s < track_end_s:
        return f"it ends after {end_s:.2f} s, but states {track_end_s:.2f} s: it was cut off"
    # The sound may be what lasts longer.
    if shortest_s < movie_end_s and (last_s := _last_end_s(video, limits)) + max(_SLACK_S, frame_s) < movie_end_s:
        return f"all of it ends after {last_s:.2f} s, but it states {movie_end_s:.2f} s: it was cut off"
    return ""


def _last_end_s(video: bytes, limits: LimitsConfig) -> float:
    """When the last of all streams ends."""
    last_s = 0.0
    with _opened(video, limits) as container:
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                last_s = max(last_s, float((time + (packet.duration or 0)) * packet.time_base))
    return last_s


def _crop(video: bytes, container: InputContainer, stream: av.VideoStream) -> Crop:
    """What the container says is not to be shown of the stream's pictures."""
    if container.format.name == "avi":
        return Crop()
    if "matroska" in container.format.name:
        videos = _videos(container)
        return matroska_crop(video, videos.index(stream), len(videos))
    return mp4_crop(video, stream.id, stream.width, stream.height)


def _decode(
    stream: av.VideoStream, chosen: _Chosen, scaler: FrameScaler, limits: LimitsConfig
) -> dict[int, np.ndarray]:
    """Decodes the packets and converts the wanted frames: presentation time -> uint8 [height, width, 3].

    An unwanted frame that no other frame is predicted from is not decoded at all: with x264's defaults that is
    about half of the frames, and the others stay bit by bit what they would have been. Where that does not give all
    wanted frames, all are decoded. So they are where the container does not say when each is shown: they come out in
    the order in which they are shown. Raises RejectedVideo, _LaterStart.
    """
    context = stream.codec_context
    context.thread_count = 1  # Ray runs one task a core
    context.options = {"max_pixels": str(limits.pixels)}  # a stream may change its size on its way
    if chosen.stamped and context.name in _DROPPING_DECODERS:
        try:
            frames, _ = _decode_packets(context, chosen, scaler, dropping=True)
        except (MemoryError, av.error.MemoryError):
            raise
        except (RejectedVideo, *_UNREADABLE):
            frames = {}
        if len(frames) == len(set(chosen.times)):
            return frames
        context.flush_buffers()
    frames, first = _decode_packets(context, chosen, scaler, dropping=False)
    missing = [time for time in chosen.times if time not in frames]
    # Said without an error: what the decoder leaves out at the start lacks what it is predicted from.
    late = first is not None and 0 < (first - chosen.shown[0]) * chosen.unit_s <= _MAX_LEADING_S
    if first is not None and late and (not chosen.stamped or (missing and missing[-1] < first)):
        raise _LaterStart(first)
    if not missing:
        return frames
    raise RejectedVideo("damaged", f"{len(missing)} of {len(chosen.times)} frames did not decode")


def _decode_packets(
    context: av.VideoCodecContext, chosen: _Chosen, scaler: FrameScaler, dropping: bool
) -> tuple[dict[int, np.ndarray], int | None]:
    """(the wanted frames that decode, when the first of all that decode is shown)"""
    wanted, in_order, frames = set(chosen.times), iter(chosen.shown), {}
    out: list[int] = []  # of each frame, its time; or the number of its packet where the container gives no times
    for number, packet in enumerate([*chosen.packets, None]):
        if dropping and packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        elif packet is chosen.packets[0]:
            context.skip_frame = "DEFAULT"
        if packet is not None and not chosen.stamped:
            packet.pts = number  # a decoder gives it to the frame
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the frame at {frame.time or 0:.2f} s is corrupt")
            if frame.pts is not None:
                out.append(frame.pts)
            time = frame.pts if chosen.stamped else next(in_order, None)
            if time not in wanted or time in frames:
                continue
            frames[time] = scaler(frame)
            if len(frames) == len(wanted) and (chosen.stamped or len(out) > _MAX_REORDERED):
                return frames, _first_shown(chosen, out)
    return frames, _first_shown(chosen, out)


def _first_shown(chosen: _Chosen, out: list[int]) -> int | None:
    """When the first frame that decodes is shown; none where that is not known. `out`: see `_decode_packets`."""
    if chosen.stamped:
        return min((time for time in out if time >= chosen.shown[0]), default=None)
    if len(out) < 2:
        return None
    # The frames that are left out at the start are shown before the first keyframe, and follow it in the file.
    left_out = sorted(out)[1] - 1 - (len(chosen.packets) - len(chosen.shown))
    return chosen.shown[left_out] if 0 <= left_out < len(chosen.shown) else None


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": '<none>'")
