"""The bytes of a video -> one Clip. Neither torch nor ray is imported: decode tasks start in a third of the time.

Anything may be in those bytes. This module checks what a file says of itself before it decodes; what a file may do
to the process that decodes it is the business of `sandbox`.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from giffy_ray.config import ClipConfig, LimitsConfig

# Containers that hold pictures. Playlists and concat scripts, which open other files, are not among them.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
# Averaging every source pixel, of colour too (PSNR falls by 18 dB without), and with accurate rounding: what need not
# be scaled is off by four levels without.
_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNREADABLE = (av.error.FFmpegError, UnknownCodecError, EOFError, IndexError, ValueError)
_SLACK_S = 0.2  # by which a file may end sooner than it says
_PIXEL_SHAPES = 1 / 8, 8  # width over height; what is beyond is a mistake
_LIMITS = LimitsConfig()
_thread = threading.local()


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


class Sampled(NamedTuple):
    clip: np.ndarray  # uint8 [frames, height, width, 3]
    times_s: np.ndarray  # float64 [frames]: when each was shown, after the first
    padded: int  # how many frames of a clip, at its end, repeat the last one, because the video was too short
    source: Source


class _Read(NamedTuple):
    packets: list[av.Packet]  # of the first seconds, in decoding order
    times: list[int]  # when their frames are shown, in units of the stream, in any order
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


def decode_clip(video: bytes, clip: ClipConfig) -> np.ndarray:
    """The clip of a video: uint8 [frames, height, width, 3], RGB. Raises RejectedVideo."""
    return sample_clip(video, clip).clip


def sample_clip(video: bytes, clip: ClipConfig, limits: LimitsConfig = _LIMITS) -> Sampled:
    """Takes the frames nearest in time to 0, 1/fps, 2/fps, ... s after the first and averages them down.

    At 30 frames a second and `clip.fps` 10 these are source frames 0, 3, 6, ..., 87. A video that ends too soon
    repeats its last frame. The picture is turned upright and brought to size as `clip.fit` says, by the shape that it
    is shown in where its pixels are not square; transparency is left out. Raises RejectedVideo.
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


def _sample(video: bytes, clip: ClipConfig, limits: LimitsConfig, every: bool) -> Sampled:
    if not video:
        raise RejectedVideo("empty", "the file has no bytes")
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(limits.pixels)}
    try:
        container = av.open(io.BytesIO(video), options=options)
    except (MemoryError, av.error.MemoryError) as error:
        raise RejectedVideo("memory", f"opening it: {_short(error)}") from error
    except _UNREADABLE as error:
        raise RejectedVideo("not_video", f"not readable as mp4, mov, mkv, webm or avi: {_short(error)}") from error
    with container:
        try:
            stream, source = _inspect(container, limits)
            chosen = _choose(_read(container, stream, clip, limits), clip, limits, every)
            frames = _decode(stream, chosen, clip, limits)
        except (MemoryError, av.error.MemoryError) as error:
            raise RejectedVideo("memory", _short(error)) from error
        except _UNREADABLE as error:
            raise RejectedVideo("damaged", _short(error)) from error
    missing = [time for time in chosen.times if time not in frames]
    if missing:
        raise RejectedVideo("damaged", f"{len(missing)} of {len(chosen.times)} frames did not decode")
    return Sampled(np.stack([frames[time] for time in chosen.times]), chosen.times_s, chosen.padded, source)


def _inspect(container, limits: LimitsConfig) -> tuple[av.VideoStream, Source]:
    """The first video stream that is not a cover picture, if what it says of itself is within the limits."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise RejectedVideo("no_video", "the file has no video stream")
    stream = videos[0]
    if stream.codec_context is None:
        raise RejectedVideo("no_decoder", "its video is in a format that this FFmpeg does not know")
    length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
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
    return stream, source


def _read(container, stream: av.VideoStream, clip: ClipConfig, limits: LimitsConfig) -> _Read:
    """The packets of the first seconds, undecoded."""
    unit_s = float(stream.time_base)  # type: ignore[arg-type]
    last_wanted_s = (clip.frames - 1) / clip.fps
    # An avi has no presentation times. Those that FFmpeg makes up are wrong for H.264 and for packed B-frames.
    packets, times, stamped, begin, end = [], [], container.format.name != "avi", math.inf, -math.inf
    for packet in container.demux(stream):
        time = packet.pts if packet.pts is not None and (stamped or packet.dts is None) else packet.dts
        if time is None:
            continue  # the flush packet
        end = max(end, time + (packet.duration or 0))
        if not packet.size:
            continue  # the frame before is shown for longer; a decoder would take it for the end
        packets.append(packet)
        if len(packets) > limits.frames:
            raise RejectedVideo("too_long", f"more than data.limits.frames={limits.frames} in its first seconds")
        stamped &= packet.pts is not None
        if not packet.is_discard:
            times.append(time)
            begin = min(begin, time)
        # Packets come in decoding order, and none is shown before its decoding time.
        if packet.dts is not None and (packet.dts - begin) * unit_s > last_wanted_s + 1:
            return _Read(packets, times, stamped, unit_s, "")
    stated_s, missing = _stated_end_s(container, stream), ""
    if times and end * unit_s + max(_SLACK_S, (end - begin) * unit_s / len(times)) < stated_s:
        missing = f"it ends after {end * unit_s:.2f} s, but states {stated_s:.2f} s: it was cut off"
    elif len(set(times)) < 2 <= stream.frames:
        missing = f"it lists {stream.frames} frames, but {len(packets)} could be read"
    return _Read(packets, times, stamped, unit_s, missing)


def _choose(read: _Read, clip: ClipConfig, limits: LimitsConfig, every: bool) -> _Chosen:
    """Picks frames by their presentation times."""
    shown = np.unique(np.asarray(read.times, dtype=np.int64))
    if len(shown) < 2 and read.missing:
        raise RejectedVideo("damaged", read.missing)
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
    return _Chosen(read.packets, shown.tolist(), shown[taken].tolist(), seconds[taken], padded, read.stamped)


def _stated_end_s(container, stream: av.VideoStream) -> float:
    """When the video ends, by what an avi or mkv says that has no list of frames to check; 0 where it does not say.

    An mp4 that was cut off gives itself away: it lists frames that are not there.
    """
    if container.format.name == "avi":
        return float((stream.duration or 0) * stream.time_base)  # type: ignore[operator]
    if "matroska" not in container.format.name:
        return 0.0
    clock = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if clock:
        return sum(unit * float(part) for unit, part in zip((3600, 60, 1), clock.groups(), strict=True))
    alone = len(container.streams) == 1  # else the sound may be what lasts longer
    return (container.duration or 0) / av.time_base if alone else 0.0


def _decode(stream: av.VideoStream, chosen: _Chosen, clip: ClipConfig, limits: LimitsConfig) -> dict[int, np.ndarray]:
    """Decodes the packets and converts the wanted frames: presentation time -> uint8 [height, width, 3].

    An unwanted frame that no other frame is predicted from is not decoded at all: with x264's defaults that is
    about half of the frames, and the others stay bit by bit what they would have been. Where the container does not
    say when each is shown, all are decoded: they come out in the order in which they are shown.
    """
    context, wanted, in_order = stream.codec_context, set(chosen.times), iter(chosen.shown)
    context.thread_count = 1  # Ray runs one task a core
    context.options = {"max_pixels": str(limits.pixels)}  # a stream may change its size on its way
    scaler, frames = None, {}
    for packet in [*chosen.packets, None]:
        if packet is not None and chosen.stamped:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the frame at {frame.time or 0:.2f} s is corrupt")
            time = frame.pts if chosen.stamped else next(in_order, None)
            if time not in wanted or time in frames:
                continue
            scaler = scaler or _Scaler(frame, stream, clip, limits)
            frames[time] = scaler(frame)
            if len(frames) == len(wanted):
                return frames
    return frames


class _Scaler:
    """Decoded frames of one video -> uint8 [height, width, 3], RGB, upright and to size."""

    def __init__(self, first: av.VideoFrame, stream: av.VideoStream, clip: ClipConfig, limits: LimitsConfig):
        self.turns = round(first.rotation / 90) % 4  # counterclockwise, to be upright
        self.mirrored = _is_mirrored(first)  # upside down, before it is turned
        self.height, self.width = (clip.height, clip.width) if self.turns % 2 == 0 else (clip.width, clip.height)
        self.fit, self.most_pixels, self.reformatter = clip.fit, limits.pixels, _reformatter()
        shape = float(stream.sample_aspect_ratio or 1)
        self.pixel_shape = shape if _PIXEL_SHAPES[0] <= shape <= _PIXEL_SHAPES[1] else 1.0

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        height, width = self.height, self.width
        if self.fit != "stretch":
            height, width = _fitted(frame.height, frame.width * self.pixel_shape, height, width, self.fit)
            if height * width > self.most_pixels:
                found = f"{frame.width}x{frame.height}, scaled to {width}x{height} for clip.fit={self.fit},"
                raise RejectedVideo("too_large", f"{found} is over data.limits.pixels={self.most_pixels}")
        small = self.reformatter.reformat(
            _woven(frame) if frame.interlaced_frame else frame,
            width,
            height,
            format="rgb24",
            interpolation=_SCALING,
            src_color_range=frame.color_range,
            threads=1,
        )
        plane = small.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)  # type: ignore[arg-type]
        picture = rows[:, : 3 * width].reshape(height, width, 3)
        if (height, width) != (self.height, self.width):
            picture = _centred(picture, self.height, self.width)
        if self.mirrored:
            picture = picture[::-1]
        return np.rot90(picture, self.turns) if self.turns else picture


def _reformatter() -> VideoReformatter:
    """The one of this thread: setting one up costs as much as scaling a few frames."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    return _thread.reformatter


def _is_mirrored(frame: av.VideoFrame) -> bool:
    if "DISPLAYMATRIX" not in frame.side_data:
        return False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(frame.side_data["DISPLAYMATRIX"]))
    return a * d < b * c


def _woven(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame, its lines no longer marked as taken from two moments: each of these would be scaled by itself."""
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    graph.link_nodes(source, graph.add("setfield", "prog"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def _fitted(source_height: float, source_width: float, height: int, width: int, fit: str) -> tuple[int, int]:
    """The size that a picture is scaled to before it is cropped or padded to height and width."""
    scales = height / source_height, width / source_width
    scale = max(scales) if fit == "crop" else min(scales)
    return max(1, round(source_height * scale)), max(1, round(source_width * scale))


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts a picture to the size, or puts black around it."""
    for axis, size in ((0, height), (1, width)):
        surplus = picture.shape[axis] - size
        if surplus > 0:
            picture = picture.take(range(surplus // 2, surplus // 2 + size), axis=axis)
        elif surplus < 0:
            margins = [(0, 0)] * 3
            margins[axis] = (-surplus // 2, -surplus - -surplus // 2)
            picture = np.pad(picture, margins)
    return picture


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": '<none>'")
