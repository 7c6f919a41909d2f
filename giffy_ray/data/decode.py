"""The bytes of a video -> one Clip. Neither torch nor ray is imported: decode tasks start in a third of the time."""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.video.reformatter import Interpolation, VideoReformatter

from giffy_ray.config import ClipConfig

# Containers that hold pictures. Playlists and concat scripts, which open other files, are not among them.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
# Averaging every source pixel, with accurate rounding and full chroma: some videos fall to 25 dB without.
_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNREADABLE = (av.error.FFmpegError, UnknownCodecError, EOFError, IndexError, ValueError, MemoryError)


class RejectedVideo(Exception):
    """A video that gives no clip: `reason` is a short code to count by, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Sampled(NamedTuple):
    clip: np.ndarray  # uint8 [frames, height, width, 3]
    padded: int  # how many frames at the end repeat the last one, because the video was too short


def decode_clip(video: bytes, clip: ClipConfig) -> np.ndarray:
    """The clip of a video: uint8 [frames, height, width, 3], RGB. Raises RejectedVideo."""
    return sample_clip(video, clip).clip


def sample_clip(video: bytes, clip: ClipConfig) -> Sampled:
    """Takes the frames nearest in time to 0, 1/fps, 2/fps, ... s after the first and averages them down.

    At 30 frames a second and `clip.fps` 10 these are source frames 0, 3, 6, ..., 87. A video that ends too soon
    repeats its last frame. The picture is scaled to the clip's height and width whatever its own shape.
    Raises RejectedVideo.
    """
    if not video:
        raise RejectedVideo("empty", "the file has no bytes")
    try:
        container = av.open(io.BytesIO(video), options={"format_whitelist": _CONTAINERS})
    except _UNREADABLE as error:
        raise RejectedVideo("not_video", f"no mp4, mov, mkv, webm or avi: {_short(error)}") from error
    with container:
        if not container.streams.video:
            raise RejectedVideo("no_video", "the file has no video stream")
        stream = container.streams.video[0]
        try:
            packets, wanted, padded = _choose(container, stream, clip)
            frames = _decode(stream, packets, set(wanted), clip)
        except _UNREADABLE as error:
            raise RejectedVideo("damaged", _short(error)) from error
    missing = [time for time in wanted if time not in frames]
    if missing:
        raise RejectedVideo("damaged", f"{len(missing)} of {clip.frames} frames did not decode")
    return Sampled(np.stack([frames[time] for time in wanted]), padded)


def _choose(container, stream, clip: ClipConfig) -> tuple[list, list[int], int]:
    """Reads the packets of the first seconds, undecoded, and picks frames by their presentation times.

    Returns the packets, the time of each frame of the clip in units of the stream, and how many are padding.
    """
    unit_s = float(stream.time_base)
    last_wanted_s = (clip.frames - 1) / clip.fps
    packets, times = [], []
    for packet in container.demux(stream):
        if packet.pts is None and packet.dts is None:
            continue  # the flush packet
        packets.append(packet)
        if not packet.is_discard:
            times.append(packet.pts if packet.pts is not None else packet.dts)
        # Packets come in decoding order, and none is shown before its decoding time.
        begin = min(times, default=0)
        if packet.dts is not None and (packet.dts - begin) * unit_s > last_wanted_s + 1:
            break
    if not times:
        raise RejectedVideo("no_frames", "the video stream holds no frames")
    shown = np.unique(np.asarray(times, dtype=np.int64))
    seconds = (shown - shown[0]) * unit_s
    wanted_s = np.arange(clip.frames) / clip.fps
    # Rounded to the nanosecond, so that of two equally near frames it is always the earlier.
    nearest = np.abs(seconds[None, :] - wanted_s[:, None]).round(9).argmin(axis=1)
    # A frame stays on screen until the next; the last for about as long as the one before it.
    frame_s = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    padded = int((wanted_s >= seconds[-1] + max(frame_s, 1e-6)).sum())
    return packets, shown[nearest].tolist(), padded


def _decode(stream, packets: list, wanted: set[int], clip: ClipConfig) -> dict[int, np.ndarray]:
    """Decodes the packets and converts the wanted frames: presentation time -> uint8 [height, width, 3]."""
    stream.codec_context.thread_count = 1  # Ray runs one task a core
    reformatter, frames = VideoReformatter(), {}
    for packet in [*packets, None]:
        for frame in stream.codec_context.decode(packet):
            time = frame.pts if frame.pts is not None else frame.dts
            if time not in wanted or time in frames:
                continue
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the frame at {frame.time:.2f} s is corrupt")
            small = reformatter.reformat(frame, clip.width, clip.height, format="rgb24", interpolation=_SCALING)
            frames[time] = small.to_ndarray()
            if len(frames) == len(wanted):
                return frames
    return frames


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": '<none>'")
