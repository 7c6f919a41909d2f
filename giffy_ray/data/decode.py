"""Decodes the bytes of one video file into a clip.

Imports neither torch nor ray, which makes a decode task start three times as fast.

Input files are untrusted. This module checks what a file states about itself before it decodes anything; `sandbox`
contains what a malicious file can do to the process that decodes it.
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
from giffy_ray.data.headers import Crop, is_matroska_truncated, read_fragments, read_matroska_crop, read_mp4_crop
from giffy_ray.data.scaling import FrameScaler, TooLargeError, UnsupportedColourError

# Video containers only. Playlists and concat scripts are left out because they open other files.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
_DECODE_ERRORS = (av.error.FFmpegError, UnknownCodecError, EOFError, IndexError, ValueError)
# Decoders that read `skip_frame` for each packet. libdav1d (AV1) reads it only when it is opened.
_SKIP_FRAME_DECODERS = ("h264", "hevc", "vp9", "mpeg4")
# Decoders that fail on packets before the first keyframe or invent their frames. Others drop them without an error.
_KEYFRAME_FIRST_DECODERS = ("vp8", "vp9", "mpeg4")
_DURATION_TOLERANCE_S = 0.2  # a complete file may end this much earlier than it states
# Longest undecodable start of a video: x264's longest group of pictures, 250 frames, at 24 fps.
_MAX_LEADING_S = 10.5
_MAX_REORDER_FRAMES = 16  # frames that an H.264 or HEVC decoder may hold back
_MIN_FILM_FPS = 2  # a slower track next to a faster one is a thumbnail track
_DEFAULT_LIMITS = LimitsConfig()


class RejectedVideo(Exception):
    """A video that yields no clip.

    Attributes:
        reason: Short code, used for counting and for deciding whether to retry.
        detail: Description of the problem for the user.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SourceInfo:
    """Properties that the file states about its video stream."""

    codec: str
    width: int
    height: int
    fps: float  # 0 if not stated
    duration_s: float  # 0 if not stated
    hdr: bool = False  # PQ or HLG, tone-mapped to SDR


class DecodedClip(NamedTuple):
    clip: np.ndarray  # uint8 [frames, height, width, 3], RGB
    times_s: np.ndarray  # float64 [frames]: presentation times relative to the first frame
    padding_frames: int  # frames at the end of the clip that repeat the last frame of a video that is too short
    source: SourceInfo


class _DemuxedPackets(NamedTuple):
    packets: list[av.Packet]  # in decoding order
    times: list[int]  # presentation times of the frames that are shown, in units of the time base, in any order
    has_timestamps: bool  # whether the container stores the presentation time of each packet
    time_base_s: float
    truncation: str  # how the file contradicts its stated length; empty if it does not


class _FrameSelection(NamedTuple):
    packets: list[av.Packet]
    shown_times: list[int]  # presentation times of all shown frames, ascending, in units of the time base
    clip_times: list[int]  # the subset that the clip takes; repeats where the clip repeats a frame
    times_s: np.ndarray
    padding_frames: int
    has_timestamps: bool
    time_base_s: float


class _UndecodableStart(Exception):
    """The first frames reference frames that are not in the file; `time` belongs to the first frame that decodes."""

    def __init__(self, time: int):
        super().__init__(time)
        self.time = time


def decode_clip(video: bytes, clip: ClipConfig) -> np.ndarray:
    """Returns the clip of a video: uint8 [frames, height, width, 3], RGB. Raises RejectedVideo."""
    return sample_clip(video, clip).clip


def sample_clip(video: bytes, clip: ClipConfig, limits: LimitsConfig = _DEFAULT_LIMITS) -> DecodedClip:
    """Decodes the frames of one clip and scales them.

    The clip takes the frames nearest in time to 0, 1/fps, 2/fps, ... s after the first decodable frame. For a video of
    30 frames per second and `clip.fps` 10 these are source frames 0, 3, 6, ..., 87. A video that ends too soon repeats
    its last frame.

    Frames are cropped as the container states, rotated upright and area-averaged to the clip's size as `clip.fit` says,
    with non-square pixels taken into account. Alpha is dropped. HDR is tone-mapped to SDR (see `colour`).

    Raises:
        RejectedVideo: The file is broken, unsupported or exceeds `limits`.
    """
    return _decode_video(video, clip, limits, all_frames=False)


def sample_all_frames(video: bytes, clip: ClipConfig, limits: LimitsConfig = _DEFAULT_LIMITS) -> DecodedClip:
    """Like `sample_clip`, but returns every source frame from the clip's first frame to its last."""
    return _decode_video(video, clip, limits, all_frames=True)


def nearest_frame_indices(times_s: np.ndarray, clip: ClipConfig) -> np.ndarray:
    """Selects the frames of a clip.

    Args:
        times_s: Presentation times, [source frames].
        clip: Gives the sampling times 0, 1/fps, 2/fps, ... s.

    Returns:
        int64 [clip.frames]: index of the source frame nearest to each sampling time.
    """
    sampling_times_s = np.arange(clip.frames) / clip.fps
    # Rounding to the nanosecond makes argmin pick the earlier of two equally near frames.
    return np.abs(times_s[None, :] - sampling_times_s[:, None]).round(9).argmin(axis=1)


def _decode_video(video: bytes, clip: ClipConfig, limits: LimitsConfig, all_frames: bool) -> DecodedClip:
    """Decodes the best stream; falls back to the next one, and to a later start, where that stream has no clip."""
    if not video:
        raise RejectedVideo("empty", "the file has no bytes")
    rank, start = 0, None
    while True:
        with _open(video, limits) as container:
            streams = _rank_streams(container)
            try:
                return _decode_stream(video, container, streams[rank], start, clip, limits, all_frames)
            except _UndecodableStart as undecodable:
                if start is not None:
                    detail = "decoding fails again after skipping the frames at the start that do not decode"
                    raise RejectedVideo("damaged", detail) from undecodable
                start = undecodable.time
            except RejectedVideo as rejected:
                if rejected.reason not in ("still", "no_frames") or rank + 1 == len(streams):
                    raise
                rank, start = rank + 1, None


def _open(video: bytes, limits: LimitsConfig) -> InputContainer:
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(limits.pixels)}
    try:
        return av.open(io.BytesIO(video), "r", options=options)
    except (MemoryError, av.error.MemoryError) as error:
        raise RejectedVideo("memory", f"out of memory while opening the file: {_describe(error)}") from error
    except _DECODE_ERRORS as error:
        detail = f"not readable as mp4, mov, mkv, webm or avi: {_describe(error)}"
        raise RejectedVideo("not_video", detail) from error


def _rank_streams(container: InputContainer) -> list[av.VideoStream]:
    """Sorts the video streams by ffmpeg's preference, with still images and thumbnail tracks last.

    ffmpeg prefers the stream with the most pixels and adds five million to that number for the default flag.
    """
    streams = _video_streams(container)
    if not streams:
        raise RejectedVideo("no_video", "the file has no video stream")

    def rank(stream: av.VideoStream) -> tuple:
        is_thumbnails = stream.frames == 1 or 0 < (stream.average_rate or 0) < _MIN_FILM_FPS
        is_default = bool(stream.disposition & Disposition.default)
        pixels = stream.width * stream.height if stream.codec_context else 0
        return stream.codec_context is None, is_thumbnails, -(pixels + 5_000_000 * is_default), stream.index

    return sorted(streams, key=rank)


def _video_streams(container: InputContainer) -> list[av.VideoStream]:
    """The video streams without cover art."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _decode_stream(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    start: int | None,
    clip: ClipConfig,
    limits: LimitsConfig,
    all_frames: bool,
) -> DecodedClip:
    """Decodes the clip of one stream.

    Args:
        start: Presentation time of the first decodable frame, None for the first frame of the stream.

    Raises:
        RejectedVideo: The stream yields no clip.
        _UndecodableStart: The stream yields a clip from a later start.
    """
    try:
        source = _inspect_stream(container, stream, limits)
        demuxed = _demux(video, container, stream, start, clip, limits)
        selection = _select_frames(demuxed, start, clip, limits, all_frames)
        crop = _read_crop(video, container, stream)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        scaler = FrameScaler(clip, pixel_aspect, crop, (source.height, source.width), limits.pixels)
        frames = _decode_frames(stream, selection, scaler, limits)
    except TooLargeError as error:
        raise RejectedVideo("too_large", f"{error} exceeds data.limits.pixels={limits.pixels}") from error
    except UnsupportedColourError as error:
        raise RejectedVideo("no_decoder", str(error)) from error
    except (MemoryError, av.error.MemoryError) as error:
        raise RejectedVideo("memory", _describe(error)) from error
    except _DECODE_ERRORS as error:
        raise RejectedVideo("damaged", _describe(error)) from error
    stacked = np.stack([frames[time] for time in selection.clip_times])
    source = dataclasses.replace(source, hdr=scaler.hdr)
    return DecodedClip(stacked, selection.times_s, selection.padding_frames, source)


def _inspect_stream(container: InputContainer, stream: av.VideoStream, limits: LimitsConfig) -> SourceInfo:
    """Reads the stated properties of a stream and checks them against the limits."""
    if stream.codec_context is None:
        raise RejectedVideo("no_decoder", "FFmpeg does not support the codec of its video stream")
    duration_s = (container.duration or 0) / av.time_base
    if stream.duration and stream.time_base:
        duration_s = stream.duration * stream.time_base
    source = SourceInfo(
        stream.codec_context.name, stream.width, stream.height, float(stream.average_rate or 0), float(duration_s)
    )
    if source.width * source.height > limits.pixels:
        raise RejectedVideo("too_large", f"{source.width}x{source.height} exceeds data.limits.pixels={limits.pixels}")
    if source.width < 1 or source.height < 1:
        raise RejectedVideo("no_frames", f"the stated frame size is {source.width}x{source.height}")
    if stream.frames > limits.frames:
        raise RejectedVideo("too_long", f"{stream.frames} frames exceed data.limits.frames={limits.frames}")
    if source.duration_s > limits.seconds:
        raise RejectedVideo("too_long", f"{source.duration_s:.0f} s exceeds data.limits.seconds={limits.seconds}")
    return source


def _demux(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    start: int | None,
    clip: ClipConfig,
    limits: LimitsConfig,
) -> _DemuxedPackets:
    """Reads the packets of the clip's duration from `start` on, and the earlier ones that they depend on."""
    time_base_s = float(stream.time_base)  # type: ignore[arg-type]
    clip_duration_s = (clip.frames - 1) / clip.fps
    packets: list[av.Packet] = []
    times: list[int] = []
    # avi stores no presentation times. Those that FFmpeg guesses are wrong for H.264 and for packed B-frames.
    has_timestamps = container.format.name != "avi"
    first, begin, end = math.inf, math.inf, -math.inf
    demuxed = container.demux(stream)
    if stream.codec_context.name in _KEYFRAME_FIRST_DECODERS:
        demuxed = _drop_before_first_keyframe(demuxed, _MAX_LEADING_S / time_base_s, limits.frames)
    for packet in demuxed:
        use_pts = packet.pts is not None and (has_timestamps or packet.dts is None)
        time = packet.pts if use_pts else packet.dts
        if time is None:
            if packet.size:  # never shown (mkv stores no negative times), but other frames may reference it
                packets.append(packet)
            continue
        first, end = min(first, time), max(end, time + (packet.duration or 0))
        if not packet.size:
            continue  # prolongs the previous frame; a decoder would take it for the end of the stream
        packets.append(packet)
        if len(packets) > limits.frames:
            raise RejectedVideo("too_long", f"its first seconds exceed data.limits.frames={limits.frames}")
        has_timestamps &= packet.pts is not None
        if not packet.is_discard and (start is None or time >= start):
            times.append(time)
            begin = min(begin, time)
        # Packets arrive in decoding order, and no frame is shown before its decoding time.
        if packet.dts is not None and (packet.dts - begin) * time_base_s > clip_duration_s + 1:
            return _DemuxedPackets(packets, times, has_timestamps, time_base_s, "")
    first_s, end_s = first * time_base_s, end * time_base_s
    frame_s = (end - begin) * time_base_s / len(times) if times else 0.0
    truncation = _find_truncation(video, container, stream, first_s, end_s, frame_s, limits) if times else ""
    if not truncation and len(set(times)) < 2 <= stream.frames:
        truncation = f"it lists {stream.frames} frames, but only {len(packets)} can be read"
    return _DemuxedPackets(packets, times, has_timestamps, time_base_s, truncation)


def _drop_before_first_keyframe(
    packets: Iterable[av.Packet], max_duration: float, max_packets: int
) -> Iterator[av.Packet]:
    """Drops the packets before the first keyframe, because the frames that they reference are missing.

    Keeps them if no keyframe is marked within `max_duration`, in units of the time base, or `max_packets`.
    """
    leading: list[av.Packet] | None = []  # None once the first keyframe is reached
    for packet in packets:
        if leading is None or packet.is_keyframe:
            leading = None
            yield packet
            continue
        leading.append(packet)
        if len(leading) > max_packets or (packet.dts or 0) - (leading[0].dts or 0) > max_duration:
            yield from leading
            leading = None
    yield from leading or ()


def _select_frames(
    demuxed: _DemuxedPackets, start: int | None, clip: ClipConfig, limits: LimitsConfig, all_frames: bool
) -> _FrameSelection:
    """Selects the frames of the clip by their presentation times."""
    shown_times = np.unique(np.asarray(demuxed.times, dtype=np.int64))
    if len(shown_times) < 2 and demuxed.truncation:
        raise RejectedVideo("damaged", demuxed.truncation)
    if len(shown_times) < 2 and start is not None:
        raise RejectedVideo("damaged", f"only {len(shown_times)} of its frames can be decoded")
    if len(shown_times) == 0:
        raise RejectedVideo("no_frames", "the video stream has no frames")
    if len(shown_times) == 1:
        raise RejectedVideo("still", "it has a single frame; a clip needs a start and an end")
    if (int(shown_times[-1]) - int(shown_times[0])) * demuxed.time_base_s > limits.seconds:
        raise RejectedVideo("too_long", f"its presentation times span more than data.limits.seconds={limits.seconds}")
    times_s = (shown_times - shown_times[0]) * demuxed.time_base_s
    selected = nearest_frame_indices(times_s, clip)
    # A frame is shown until the next one; the last frame for a typical frame duration.
    last_duration_s = max(float(np.median(np.diff(times_s))), 1e-6)
    padding_frames = int((np.arange(clip.frames) / clip.fps >= times_s[-1] + last_duration_s - 1e-6).sum())
    if padding_frames and demuxed.truncation:
        raise RejectedVideo("damaged", demuxed.truncation)
    if all_frames:
        selected = np.arange(selected[-1] + 1)
    return _FrameSelection(
        packets=demuxed.packets,
        shown_times=shown_times.tolist(),
        clip_times=shown_times[selected].tolist(),
        times_s=times_s[selected],
        padding_frames=padding_frames,
        has_timestamps=demuxed.has_timestamps,
        time_base_s=demuxed.time_base_s,
    )


def _find_truncation(
    video: bytes,
    container: InputContainer,
    stream: av.VideoStream,
    first_s: float,
    end_s: float,
    frame_s: float,
    limits: LimitsConfig,
) -> str:
    """Compares the stated length of a file with that of its packets.

    Only needed for formats without a frame list. A truncated mp4 that is not fragmented lists frames that are missing.

    Args:
        first_s: Presentation time of the first packet.
        end_s: End of the last packet.
        frame_s: Mean frame duration.

    Returns:
        What is missing; empty if the file is complete as far as its headers say.
    """
    track_end_s, movie_end_s = 0.0, (container.duration or 0) / av.time_base
    if container.format.name == "avi":
        # FFmpeg shortens the duration to fit the file size; the frame count of the header is unchanged.
        stated = max(stream.duration or 0, stream.frames)
        track_end_s = movie_end_s = float(stated * stream.time_base)  # type: ignore[operator]
    elif "matroska" in container.format.name:
        duration_tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
        if duration_tag:
            parts = zip((3600, 60, 1), duration_tag.groups(), strict=True)
            track_end_s = movie_end_s = sum(unit * float(part) for unit, part in parts)
        elif not movie_end_s and is_matroska_truncated(video):
            return f"it is truncated: it ends within an element, after {end_s:.2f} s"
    else:
        fragments = read_fragments(video, stream.id)
        if fragments is None:
            return ""
        if fragments.is_truncated:
            return f"it is truncated: it ends within a fragment, after {end_s:.2f} s"
        track_end_s, movie_end_s = first_s + fragments.track_s, fragments.movie_s
    tolerance_s = max(_DURATION_TOLERANCE_S, frame_s)
    if end_s + tolerance_s < track_end_s:
        return f"it is truncated: its video ends after {end_s:.2f} s, but its header states {track_end_s:.2f} s"
    if end_s + tolerance_s < movie_end_s:
        # A longer audio stream may account for the stated length.
        last_end_s = _presentation_end_s(video, limits)
        if last_end_s + tolerance_s < movie_end_s:
            return f"it is truncated: it ends after {last_end_s:.2f} s, but its header states {movie_end_s:.2f} s"
    return ""


def _presentation_end_s(video: bytes, limits: LimitsConfig) -> float:
    """The end of the last packet of any stream."""
    end_s = 0.0
    with _open(video, limits) as container:
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                end_s = max(end_s, float((time + (packet.duration or 0)) * packet.time_base))
    return end_s


def _read_crop(video: bytes, container: InputContainer, stream: av.VideoStream) -> Crop:
    """The cropping that the container states for the stream."""
    if container.format.name == "avi":
        return Crop()
    if "matroska" in container.format.name:
        streams = _video_streams(container)
        return read_matroska_crop(video, streams.index(stream), len(streams))
    return read_mp4_crop(video, stream.id, stream.width, stream.height)


def _decode_frames(
    stream: av.VideoStream, selection: _FrameSelection, scaler: FrameScaler, limits: LimitsConfig
) -> dict[int, np.ndarray]:
    """Decodes the packets and scales the selected frames.

    The first attempt skips frames that are neither selected nor referenced: about half of all frames with x264's
    defaults, while the others stay bit-identical. If that does not yield all selected frames, or if the container has
    no timestamps, every frame is decoded. Without timestamps frames are identified by their order, and decoders output
    them in presentation order.

    Returns:
        Presentation time -> uint8 [height, width, 3].

    Raises:
        RejectedVideo: Selected frames do not decode.
        _UndecodableStart: Only the frames at the start do not decode.
    """
    context = stream.codec_context
    context.thread_count = 1  # Ray runs one task per core
    context.options = {"max_pixels": str(limits.pixels)}  # the frame size may change within a stream
    if selection.has_timestamps and context.name in _SKIP_FRAME_DECODERS:
        try:
            frames, _ = _decode_packets(context, selection, scaler, skip_unreferenced=True)
        except (MemoryError, av.error.MemoryError):
            raise
        except (RejectedVideo, *_DECODE_ERRORS):
            frames = {}
        if len(frames) == len(set(selection.clip_times)):
            return frames
        context.flush_buffers()
    frames, first = _decode_packets(context, selection, scaler, skip_unreferenced=False)
    missing = [time for time in selection.clip_times if time not in frames]
    # Decoders drop frames at the start without an error if the frames that they reference are missing.
    starts_late = first is not None and 0 < (first - selection.shown_times[0]) * selection.time_base_s <= _MAX_LEADING_S
    if first is not None and starts_late:
        only_start_missing = bool(missing) and missing[-1] < first
        if not selection.has_timestamps or only_start_missing:
            raise _UndecodableStart(first)
    if not missing:
        return frames
    raise RejectedVideo("damaged", f"{len(missing)} of {len(selection.clip_times)} frames did not decode")


def _decode_packets(
    context: av.VideoCodecContext, selection: _FrameSelection, scaler: FrameScaler, skip_unreferenced: bool
) -> tuple[dict[int, np.ndarray], int | None]:
    """Returns (selected frames by presentation time, presentation time of the first frame that decodes)."""
    selected_times = set(selection.clip_times)
    times_in_order = iter(selection.shown_times)
    frames: dict[int, np.ndarray] = {}
    # For each decoded frame its time, or the number of its packet if the container has no timestamps.
    decoded_pts: list[int] = []
    for number, packet in enumerate([*selection.packets, None]):
        if skip_unreferenced and packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in selected_times else "NONREF"
        elif packet is selection.packets[0]:
            context.skip_frame = "DEFAULT"
        if packet is not None and not selection.has_timestamps:
            packet.pts = number  # decoders copy it to the frame
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the frame at {frame.time or 0:.2f} s is corrupt")
            if frame.pts is not None:
                decoded_pts.append(frame.pts)
            time = frame.pts if selection.has_timestamps else next(times_in_order, None)
            if time not in selected_times or time in frames:
                continue
            frames[time] = scaler(frame)
            is_first_known = selection.has_timestamps or len(decoded_pts) > _MAX_REORDER_FRAMES
            if len(frames) == len(selected_times) and is_first_known:
                return frames, _first_decoded_time(selection, decoded_pts)
    return frames, _first_decoded_time(selection, decoded_pts)


def _first_decoded_time(selection: _FrameSelection, decoded_pts: list[int]) -> int | None:
    """Presentation time of the first frame that decodes; None if unknown. `decoded_pts`: see `_decode_packets`."""
    if selection.has_timestamps:
        return min((time for time in decoded_pts if time >= selection.shown_times[0]), default=None)
    if len(decoded_pts) < 2:
        return None
    # The frames that the decoder drops are shown before the first keyframe and follow it in the file.
    dropped = sorted(decoded_pts)[1] - 1 - (len(selection.packets) - len(selection.shown_times))
    return selection.shown_times[dropped] if 0 <= dropped < len(selection.shown_times) else None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": '<none>'")
