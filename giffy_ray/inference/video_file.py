"""Reads the frames of a film one by one, and writes them with the packets of its other streams.

Frames of the output are 8-bit yuv420p of even size, upright, progressive, for SDR displays. A source that is so already
keeps its pixels, colour matrix and range; others are converted to BT.709.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter

from giffy_ray.config import ClipConfig
from giffy_ray.core.errors import InputError
from giffy_ray.data.colour import is_hdr, is_wide_gamut
from giffy_ray.data.headers import Crop
from giffy_ray.data.scaling import SCALING_FLAGS, FrameScaler, TooLargeError, UnsupportedColourError
from giffy_ray.inference.clip import add_video_stream, pad_to_even
from giffy_ray.inference.images import MAX_PIXELS

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # FFmpeg's name by suffix

# Video containers only. Playlists and concat scripts are left out because they open other files.
_READABLE = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
_READ_ERRORS = (
    av.error.FFmpegError,
    UnknownCodecError,
    UnsupportedColourError,
    TooLargeError,
    EOFError,
    IndexError,
    ValueError,
)
_REGULAR_FRACTION = 0.9  # of the intervals of a film with a constant rate, at least
_MAX_RATE_DENOMINATOR = 1001
_DURATION_TOLERANCE_S = 1  # a complete file may end this much earlier than it states
_MAX_BACKWARD_S = 1  # frames whose time steps back by less are shown one after the other

# Colour matrices (ITU-T H.273) and pixel formats of frames that pass unchanged. FFmpeg reads 2, unspecified, as BT.601.
_MATRICES = {1: Colorspace.ITU709, 2: Colorspace.ITU601, 5: Colorspace.ITU601, 6: Colorspace.ITU601}
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")  # of limited and of full range
_LUMA_WEIGHTS = {Colorspace.ITU709: (0.2126, 0.0722), Colorspace.ITU601: (0.299, 0.114)}  # of red and blue
_BT709, _LIMITED_RANGE, _FULL_RANGE = 1, 1, 2

# FFmpeg's muxers refuse these, although it lists them for the container.
_REFUSED_CODECS = {"mp4": ("truehd",), "mov": ("truehd", "opus", "flac"), "matroska": ()}
_AAC_RATES_HZ = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}  # if not stated
_AAC_BITS_PER_CHANNEL_S = 96_000
# What muxers state about the file that they write, in lower case.
_STALE_METADATA = ("major_brand", "minor_version", "compatible_brands", "encoder", "duration", "rotate")
_STALE_STATISTICS = ("bps", "number_of_", "_statistics")


@dataclass(frozen=True)
class Film:
    """What is known of a film before its frames are read. Times are in seconds, as the container states them.

    Attributes:
        path: The file.
        stream_index: Index of its video stream.
        rate: Average frames per second.
        first: Time of the first frame.
        end: End of the last frame.
        start: Start of the video or of the audio, whichever is first.
        converter: Converts its frames.
    """

    path: Path
    stream_index: int
    rate: Fraction
    first: Fraction
    end: Fraction
    start: Fraction
    converter: FrameConverter


def open_film(path: Path) -> InputContainer:
    """Opens a video file. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a video file")
    with _reading(path, "is not a video that can be read; convert it to mp4 first"):
        options = {"format_whitelist": _READABLE, "max_pixels": str(MAX_PIXELS)}
        return av.open(str(path), "r", container_options=options)


def inspect_film(path: Path) -> Film:
    """Reads the times of all packets, and decodes the first frame.

    Raises:
        InputError: The file cannot be read, is truncated, or has no film.
    """
    with open_film(path) as container:
        stream = _select_stream(path, container)
        converter: FrameConverter | None = None
        times = array("q")  # of the frames that are shown, in units of the time base, in decoding order
        packets, end, file_end_s = 0, 0, Fraction(0)
        for packet in _demux(path, container):
            time = _packet_time(container, packet)
            if packet.size and time is not None:
                file_end_s = max(file_end_s, (time + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index != stream.index:
                continue
            if converter is None:
                converter = next((FrameConverter(path, frame) for frame in _decode(path, stream, packet)), None)
            packets += packet.size > 0
            if packet.size and time is not None and not packet.is_discard:
                times.append(time)
                end = max(end, time + (packet.duration or 0))
        _check_complete(path, container, packets < len(stream.index_entries), file_end_s)
        ordered = np.unique(np.frombuffer(times, np.int64))
        if converter is None or len(ordered) < 2:
            raise InputError(f"{path}: has fewer than two frames; give a film, or two pictures")
        time_base = stream.time_base or Fraction(1)
        rate = _average_rate(stream, ordered, time_base)
        first, last = int(ordered[0]) * time_base, int(ordered[-1]) * time_base
        end_s = max(end * time_base, last + Fraction(1, 2) / rate)
        sounds: list[Any] = [track for track in container.streams.audio if track.start_time is not None]
        start = min([first, *(sound.start_time * sound.time_base for sound in sounds)])
        return Film(path, stream.index, rate, first, end_s, start, converter)


def read_frames(
    container: InputContainer, film: Film, forward: Callable[[av.Packet], None]
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yields the presentation time of each frame, in seconds, and the frame as it may be written.

    Args:
        container: The film, opened.
        film: What `inspect_film` has found.
        forward: Called with the packets of all other streams as they are read.

    Raises:
        InputError: The file is damaged.
    """
    last: Fraction | None = None
    for frame in _deinterlace(film.path, _read_video(container, film, forward)):
        if frame.pts is None or frame.time_base is None:
            time = film.first if last is None else last + 1 / film.rate
        else:
            time = frame.pts * frame.time_base
        if last is not None and time <= last:
            if time < last - _MAX_BACKWARD_S:
                raise InputError(
                    f"{film.path}: its times jump from {float(last):.1f} s back to {float(time):.1f} s; correct them "
                    "first, for example with ffmpeg -i INPUT -c copy OUTPUT.mp4"
                )
            time = last + Fraction(1, 1_000_000)
        last = time
        with _reading(film.path, f"has a frame at {float(time):.1f} s that cannot be converted"):
            converted = film.converter.convert(frame)
        yield time, converted


class FrameConverter:
    """Converts frames of a film to those of the output, and these to arrays and back.

    Args:
        path: The film, for messages.
        first: Its first frame; later ones of another size are scaled to that of the first.
    """

    def __init__(self, path: Path, first: av.VideoFrame):
        is_sideways = round(first.rotation / 90) % 2 == 1
        height, width = (first.width, first.height) if is_sideways else (first.height, first.width)
        if min(height, width) < 2:
            raise InputError(f"{path}: has {width}x{height} pixels; at least 2x2 are needed")
        self.is_sideways = is_sideways
        self.height, self.width = height + height % 2, width + width % 2
        self._layout = _layout(first)
        self._passes = _can_pass(first)
        self.pixel_format = first.format.name if self._passes else "yuv420p"
        self.matrix, self.colour_range = first.colorspace, first.color_range
        self.primaries, self.transfer = first.color_primaries, first.color_trc
        if not self._passes:
            self.matrix, self.colour_range = _BT709, _LIMITED_RANGE
            self.primaries, self.transfer = _BT709, _BT709
        self.luma_weights = _LUMA_WEIGHTS[_MATRICES[self.matrix]]  # of red and blue
        self.is_full_range = self.colour_range == _FULL_RANGE
        source = ClipConfig(height=height, width=width)
        self._from_source = FrameScaler(source, 1.0, Crop(), (height, width), MAX_PIXELS)
        self._to_output = VideoReformatter()

    def convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Converts a frame of the film to one of the output; returns the frame itself where that is possible."""
        if self._passes and _layout(frame) == self._layout and _can_pass(frame):
            return frame
        return self.from_rgb(np.ascontiguousarray(self._from_source(frame)))

    def to_small_rgb(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """Scales a frame of the output to uint8 [height, width, 3] by area averages."""
        scaler = FrameScaler(ClipConfig(height=height, width=width), 1.0, Crop(), (height, width), MAX_PIXELS)
        return np.ascontiguousarray(scaler(frame))

    def to_planes(self, frame: av.VideoFrame) -> tuple[np.ndarray, np.ndarray]:
        """Returns luma, uint8 [height, width], and chroma, uint8 [2, height / 2, width / 2], of an output frame."""
        planes = frame.to_ndarray()
        luma, chroma = np.split(planes, [self.height])
        return luma, chroma.reshape(2, self.height // 2, self.width // 2)

    def from_planes(self, luma: np.ndarray, chroma: np.ndarray) -> av.VideoFrame:
        """Makes an output frame from uint8 [height, width] and [height / 2, width / 2, 2]."""
        planes = np.concatenate([luma.ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel()])
        frame = av.VideoFrame.from_ndarray(planes.reshape(-1, self.width), format=self.pixel_format)
        frame.colorspace, frame.color_range = self.matrix, self.colour_range
        return frame

    def from_rgb(self, rgb: np.ndarray) -> av.VideoFrame:
        """Converts uint8 [height, width, 3] to a frame of the output; an odd height or width is padded."""
        frame = av.VideoFrame.from_ndarray(pad_to_even(rgb), format="rgb24")
        return self._to_output.reformat(
            frame,
            format=self.pixel_format,
            dst_colorspace=_MATRICES[self.matrix],
            dst_color_range=self.colour_range or _LIMITED_RANGE,
            interpolation=SCALING_FLAGS,
        )


class FilmWriter:
    """Writes the frames of the output at a constant rate, and the other streams of the source beside them.

    All times are shifted alike, so that the streams stay in step: the earliest is at 0 or less than a frame later.

    Args:
        output: The output, opened.
        container: The source, opened.
        film: What `inspect_film` has found.
        rate: Frames per second of the output.
        quality: 0 to 100.
    """

    def __init__(self, output: OutputContainer, container: InputContainer, film: Film, rate: Fraction, quality: int):
        self._output, self._rate = output, rate
        self._number = math.ceil((film.first - film.start) * rate)  # of the next frame, from time 0 of the output
        shift = film.first - self._number / rate
        self.audio_copied, self.audio_encoded = 0, 0
        self.left_out: list[str] = []  # descriptions of streams
        source = container.streams[film.stream_index]
        self._video = _add_video(output, source, film.converter, rate, quality)
        self._others: dict[int, _CopiedStream | _EncodedAudio] = {}
        for stream in container.streams:
            if stream.index != film.stream_index:
                self._add_stream(stream, film, shift)
        output.metadata.update(_keep_metadata(container.metadata))
        output.set_chapters([_shift_chapter(chapter, shift) for chapter in container.chapters()])

    def write(self, frame: av.VideoFrame) -> None:
        """Writes the next frame. The same frame may be written several times."""
        frame.time_base, frame.pts, frame.duration = 1 / self._rate, self._number, 1
        frame.pict_type = 0  # otherwise x264 repeats the source's types of frames
        self._number += 1
        self._output.mux(self._video.encode(frame))

    def forward(self, packet: av.Packet) -> None:
        """Writes a packet of another stream, or what becomes of it."""
        stream = self._others.get(packet.stream.index)
        if stream is not None:
            self._output.mux(stream.convert(packet))

    def finish(self) -> None:
        """Writes what the encoders hold back."""
        self._output.mux(self._video.encode())
        for stream in self._others.values():
            self._output.mux(stream.finish())

    def _add_stream(self, stream: Any, film: Film, shift: Fraction) -> None:
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else None
        kind = self._output.format.name
        if stream.type in ("audio", "subtitle") and codec and codec not in _REFUSED_CODECS.get(kind, ()):
            try:
                self._others[stream.index] = _CopiedStream(self._output, stream, shift, film.start)
            except ValueError:  # the container cannot hold this codec
                pass
            else:
                self.audio_copied += stream.type == "audio"
                return
        if stream.type == "audio" and codec:
            self._others[stream.index] = _EncodedAudio(self._output, stream, shift, film.path)
            self.audio_encoded += 1
            return
        self.left_out.append(f"{stream.type} stream {stream.index} ({codec or 'unknown codec'})")


class _CopiedStream:
    """Copies packets without change, except of their times."""

    def __init__(self, output: OutputContainer, source: Any, shift: Fraction, start: Fraction):
        self._stream = output.add_stream_from_template(source)
        self._stream.disposition = source.disposition
        self._stream.metadata.update(_keep_metadata(source.metadata))
        self._shift = round(shift / source.time_base)
        self._start = math.ceil(start / source.time_base)
        self._last_dts: int | None = None

    def convert(self, packet: av.Packet) -> list[av.Packet]:
        is_cut_off = packet.is_discard and packet.pts is not None and packet.pts >= self._start
        if not packet.size or packet.pts is None or is_cut_off:
            return []
        dts = (packet.pts if packet.dts is None else packet.dts) - self._shift
        # Muxers refuse times that do not increase, which rounding or the end of an edit may produce.
        packet.dts = dts if self._last_dts is None else max(dts, self._last_dts + 1)
        packet.pts = max(packet.pts - self._shift, packet.dts)
        self._last_dts = packet.dts
        packet.stream = self._stream
        return [packet]

    def finish(self) -> list[av.Packet]:
        return []


class _EncodedAudio:
    """Decodes audio, and encodes it as AAC."""

    def __init__(self, output: OutputContainer, source: Any, shift: Fraction, path: Path):
        rate_hz = source.rate if source.rate in _AAC_RATES_HZ else 48000
        self._stream: Any = output.add_stream("aac", rate=rate_hz)
        self._stream.codec_context.layout = _LAYOUTS.get(source.layout.name, source.layout.name)
        self._stream.codec_context.bit_rate = _AAC_BITS_PER_CHANNEL_S * source.channels
        self._stream.disposition = source.disposition
        self._stream.metadata.update(_keep_metadata(source.metadata))
        self._source, self._shift, self._path = source, shift, path

    def convert(self, packet: av.Packet) -> list[av.Packet]:
        return self._encode(packet) if packet.size else []

    def finish(self) -> list[av.Packet]:
        return [*self._encode(None), *self._stream.encode()]

    def _encode(self, packet: av.Packet | None) -> list[av.Packet]:
        with _reading(self._path, "has audio that cannot be decoded"):
            frames = self._source.decode(packet)
        packets = []
        for frame in frames:
            if frame.pts is not None:
                frame.pts -= round(self._shift / frame.time_base)
            packets += self._stream.encode(frame)
        return packets


@contextmanager
def _reading(path: Path, problem: str) -> Iterator[None]:
    """Turns errors of FFmpeg into one line that names the file."""
    try:
        yield
    except _READ_ERRORS as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path}: {problem} ({reason})") from error


def _select_stream(path: Path, container: InputContainer) -> Any:
    """Returns the video stream that FFmpeg prefers, but no cover picture."""
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not films:
        raise InputError(f"{path}: has no video stream; give a film")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    if stream.codec_context is None:
        raise InputError(f"{path}: FFmpeg does not support the codec of its video; convert it to H.264 first")
    return stream


def _demux(path: Path, container: InputContainer) -> Iterator[av.Packet]:
    packets = container.demux()
    while True:
        with _reading(path, "is damaged; repair it first, for example with ffmpeg -i INPUT -c copy OUTPUT.mp4"):
            packet = next(packets, None)
        if packet is None:
            return
        yield packet


def _packet_time(container: InputContainer, packet: av.Packet) -> int | None:
    """Returns the presentation time of a packet; in avi, which stores none, its place in the order of decoding."""
    if packet.pts is None or container.format.name == "avi":
        return packet.dts
    return packet.pts


def _decode(path: Path, stream: Any, packet: av.Packet) -> list[av.VideoFrame]:
    """Decodes a packet of video. One without content ends the stream, unless it has a time."""
    if not packet.size and packet.dts is not None:
        return []
    with _reading(path, "is damaged and cannot be decoded"):
        frames = stream.decode(packet)
    for frame in frames:
        if frame.is_corrupt:
            raise InputError(f"{path}: is damaged: the frame at {frame.time or 0:.1f} s cannot be decoded")
    return frames


def _read_video(container: InputContainer, film: Film, forward: Callable[[av.Packet], None]) -> Iterator[av.VideoFrame]:
    stream = container.streams[film.stream_index]
    # Frames leave the decoder in the order of their times, so in avi each takes the next time of a packet.
    times: deque[int] = deque()
    stores_times = container.format.name != "avi"
    for packet in _demux(film.path, container):
        if packet.stream.index != stream.index:
            forward(packet)
            continue
        if not stores_times and packet.size and packet.dts is not None:
            times.append(packet.dts)
        for frame in _decode(film.path, stream, packet):
            if not stores_times:
                frame.pts = times.popleft() if times else None
            yield frame


def _deinterlace(path: Path, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Passes progressive frames. From the first interlaced one on, FFmpeg's yadif makes one frame of each."""
    graph: Graph | None = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        with _reading(path, "cannot be deinterlaced; do so first, for example with ffmpeg -vf yadif"):
            if graph is None:
                graph = _deinterlacing_graph(frame)
            graph.vpush(frame)
            deinterlaced = _pull_frames(graph)
        yield from deinterlaced
    if graph is not None:
        graph.vpush(None)
        yield from _pull_frames(graph)


def _deinterlacing_graph(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    graph.link_nodes(source, graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pull_frames(graph: Graph) -> list[av.VideoFrame]:
    frames = []
    while True:
        try:
            frames.append(graph.vpull())
        except (av.error.BlockingIOError, av.error.EOFError):
            return frames


def _check_complete(path: Path, container: InputContainer, lacks_packets: bool, end_s: Fraction) -> None:
    """Compares what the file states with what it holds. Of mp4, the list of frames counts; of mkv, the duration."""
    stated_s = Fraction(container.duration or 0, av.time_base)
    is_short = "matroska" in container.format.name and end_s + _DURATION_TOLERANCE_S < stated_s
    if is_short or lacks_packets:
        raise InputError(
            f"{path}: is truncated: it ends after {float(end_s):.1f} s; repair it first, for example with "
            "ffmpeg -i INPUT -c copy OUTPUT.mp4"
        )


def _average_rate(stream: Any, times: np.ndarray, time_base: Fraction) -> Fraction:
    """Returns the average frame rate.

    It is the stated one if nearly all intervals agree with that: times may be rounded, and a few frames may be missing.

    Args:
        stream: The video.
        times: int64 [frames], ascending.
        time_base: Their unit in seconds.
    """
    for stated in (stream.average_rate, stream.base_rate):
        if stated:
            interval = float(1 / stated / time_base)
            is_regular = np.abs(np.diff(times) - interval) <= min(1.0, interval / 10)
            if is_regular.mean() >= _REGULAR_FRACTION:
                return stated
    return (Fraction(len(times) - 1) / (int(times[-1] - times[0]) * time_base)).limit_denominator(_MAX_RATE_DENOMINATOR)


def _layout(frame: av.VideoFrame) -> tuple:
    return frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range


def _can_pass(frame: av.VideoFrame) -> bool:
    is_plain = frame.format.name in _PIXEL_FORMATS and frame.colorspace in _MATRICES
    is_sdr = not is_hdr(frame.color_trc) and not is_wide_gamut(frame.color_primaries)
    is_upright = "DISPLAYMATRIX" not in frame.side_data
    return is_plain and is_sdr and is_upright and frame.width % 2 == 0 and frame.height % 2 == 0


def _add_video(output: OutputContainer, source: Any, converter: FrameConverter, rate: Fraction, quality: int) -> Any:
    video = add_video_stream(output, rate, quality)
    video.height, video.width, video.pix_fmt = converter.height, converter.width, converter.pixel_format
    context = video.codec_context
    context.colorspace, context.color_range = converter.matrix, converter.colour_range
    context.color_primaries, context.color_trc = converter.primaries, converter.transfer
    aspect = source.sample_aspect_ratio
    if aspect:
        context.sample_aspect_ratio = 1 / aspect if converter.is_sideways else aspect
    video.metadata.update(_keep_metadata(source.metadata))
    return video


def _keep_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Drops what describes the source's file rather than the film."""
    return {
        name: text
        for name, text in metadata.items()
        if name.lower() not in _STALE_METADATA and not name.lower().startswith(_STALE_STATISTICS)
    }


def _shift_chapter(chapter: Any, shift: Fraction) -> Any:
    ticks = round(shift / chapter["time_base"])
    return {**chapter, "start": max(0, chapter["start"] - ticks), "end": max(0, chapter["end"] - ticks)}
