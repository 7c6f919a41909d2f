"""The bytes of a video -> one Clip. Neither torch nor ray is imported: decode tasks start in a third of the time.

Anything may be in those bytes. This module checks what a file says of itself before it decodes; what a file may do
to the process that decodes it is the business of `sandbox`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from giffy_ray.config import ClipConfig, LimitsConfig

# Containers that hold pictures. Playlists and concat scripts, which open other files, are not among them.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
# Averaging every source pixel, with accurate rounding and full chroma: some videos fall to 25 dB without.
_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNREADABLE = (av.error.FFmpegError, UnknownCodecError, EOFError, IndexError, ValueError)
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


class Sampled(NamedTuple):
    clip: np.ndarray  # uint8 [frames, height, width, 3]
    times_s: np.ndarray  # float64 [frames]: when each was shown, after the first
    padded: int  # how many frames of a clip, at its end, repeat the last one, because the video was too short
    source: Source


class _Chosen(NamedTuple):
    packets: list[av.Packet]  # of the first seconds, in decoding order
    times: list[int]  # when each frame of the clip is shown, in units of the stream
    times_s: np.ndarray
    padded: int
    droppable: bool  # whether each packet says when it is shown, so that unwanted ones may be left undecoded


def decode_clip(video: bytes, clip: ClipConfig) -> np.ndarray:
    """The clip of a video: uint8 [frames, height, width, 3], RGB. Raises RejectedVideo."""
    return sample_clip(video, clip).clip


def sample_clip(video: bytes, clip: ClipConfig, limits: LimitsConfig = _LIMITS) -> Sampled:
    """Takes the frames nearest in time to 0, 1/fps, 2/fps, ... s after the first and averages them down.

    At 30 frames a second and `clip.fps` 10 these are source frames 0, 3, 6, ..., 87. A video that ends too soon
    repeats its last frame. The picture is turned upright and brought to size as `clip.fit` says; transparency is
    left out. Raises RejectedVideo.
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
        raise RejectedVideo("not_video", f"no mp4, mov, mkv, webm or avi: {_short(error)}") from error
    with container:
        try:
            stream, source = _inspect(container, limits)
            chosen = _choose(container, stream, clip, limits, every)
            frames = _decode(stream, chosen, clip)
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


def _choose(
    container, stream: av.VideoStream, clip: ClipConfig, limits: LimitsConfig, every: bool
) -> _Chosen:
    """Reads the packets of the first seconds, undecoded, and picks frames by their presentation times."""
    unit_s = float(stream.time_base)  # type: ignore[arg-type]
    last_wanted_s = (clip.frames - 1) / clip.fps
    packets, times, droppable = [], [], True
    for packet in container.demux(stream):
        if packet.pts is None and packet.dts is None:
            continue  # the flush packet
        packets.append(packet)
        if len(packets) > limits.frames:
            raise RejectedVideo("too_long", f"more than data.limits.frames={limits.frames} in its first seconds")
        droppable &= packet.pts is not None
        if not packet.is_discard:
            times.append(packet.pts if packet.pts is not None else packet.dts)
        # Packets come in decoding order, and none is shown before its decoding time.
        begin = min(times, default=0)
        if packet.dts is not None and (packet.dts - begin) * unit_s > last_wanted_s + 1:
            break
    if not times:
        raise RejectedVideo("no_frames", "the video stream holds no frames")
    shown = np.unique(np.asarray(times, dtype=np.int64))
    if len(shown) < 2:
        raise RejectedVideo("still", "it has a single frame; a clip needs a start and an end")
    seconds = (shown - shown[0]) * unit_s
    taken = nearest_frames(seconds, clip)
    # A frame stays on screen until the next; the last for about as long as the one before it.
    stays_s = max(float(np.median(np.diff(seconds))), 1e-6)
    padded = int((np.arange(clip.frames) / clip.fps >= seconds[-1] + stays_s - 1e-6).sum())
    if every:
        taken = np.arange(taken[-1] + 1)
    return _Chosen(packets, shown[taken].tolist(), seconds[taken], padded, droppable)


def _decode(stream: av.VideoStream, chosen: _Chosen, clip: ClipConfig) -> dict[int, np.ndarray]:
    """Decodes the packets and converts the wanted frames: presentation time -> uint8 [height, width, 3].

    An unwanted frame that no other frame is predicted from is not decoded at all: with x264's defaults that is
    about half of the frames, and the others stay bit by bit what they would have been.
    """
    context, wanted = stream.codec_context, set(chosen.times)
    context.thread_count = 1  # Ray runs one task a core
    scaler, frames = None, {}
    for packet in [*chosen.packets, None]:
        if packet is not None and chosen.droppable:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the frame at {frame.time or 0:.2f} s is corrupt")
            time = frame.pts if frame.pts is not None else frame.dts
            if time not in wanted or time in frames:
                continue
            scaler = scaler or _Scaler(frame, clip)
            frames[time] = scaler(frame)
            if len(frames) == len(wanted):
                return frames
    return frames


class _Scaler:
    """Decoded frames of one video -> uint8 [height, width, 3], RGB, upright and to size."""

    def __init__(self, first: av.VideoFrame, clip: ClipConfig):
        self.turns = round(first.rotation / 90) % 4  # counterclockwise, to be upright
        self.height, self.width = (clip.height, clip.width) if self.turns % 2 == 0 else (clip.width, clip.height)
        self.fit, self.reformatter = clip.fit, VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        height, width = self.height, self.width
        if self.fit != "stretch":
            height, width = _fitted(frame.height, frame.width, height, width, self.fit)
        small = self.reformatter.reformat(
            frame,
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
        return np.rot90(picture, self.turns) if self.turns else picture


def _fitted(source_height: int, source_width: int, height: int, width: int, fit: str) -> tuple[int, int]:
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
