"""Decoding selects the right frames and detects truncated files. Grey levels identify the source frames."""

import functools
import io
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from giffy_ray.config import ClipConfig
from giffy_ray.data.decode import RejectedVideo, decode_clip, nearest_frame_indices, sample_all_frames, sample_clip
from giffy_ray.data.scaling import SCALING_FLAGS
from tests.conftest import encode, grey_levels, grey_video
from tests.data.boxes import list_boxes, make_box, replace_box
from tests.data.corpus import INDEXED, encode_fragmented, keep_fragments, mux_packets, set_stated_duration

CLIP = ClipConfig()
_REPEATED_FRAME = b"\0\0\1\xb6\x50\0\0"  # an MPEG-4 frame that repeats the previous one
_TOLERANCE = 3  # grey levels of encoding error; adjacent frames differ by 37


def mean_levels(clip: np.ndarray) -> np.ndarray:
    return clip.reshape(len(clip), -1).mean(axis=1)


def test_clip_takes_every_third_frame_of_30_fps_video():
    clip = decode_clip(grey_video(90, 30), CLIP)
    assert clip.shape == (30, 64, 64, 3)
    assert clip.dtype == np.uint8
    assert np.allclose(mean_levels(clip), grey_levels(90)[0:90:3], atol=_TOLERANCE)


def test_frames_after_the_clip_are_ignored():
    assert np.allclose(mean_levels(decode_clip(grey_video(200, 30), CLIP)), grey_levels(200)[0:90:3], atol=_TOLERANCE)


@pytest.mark.parametrize(("fps", "frames"), [(60, 180), (25, 75), (24, 72), (15, 45), (10, 30)])
def test_other_frame_rates_are_sampled_by_time(fps: int, frames: int):
    nearest = [
        min(range(frames), key=lambda frame: (abs(Fraction(frame, fps) - Fraction(index, 10)), frame))
        for index in range(30)
    ]
    sampled = sample_clip(grey_video(frames, fps), CLIP)
    assert np.allclose(mean_levels(sampled.clip), grey_levels(frames)[nearest], atol=_TOLERANCE)
    assert sampled.padding_frames == 0


@pytest.mark.parametrize(("frames", "padding_frames"), [(60, 10), (45, 15), (4, 28), (3, 29), (2, 29)])
def test_short_video_repeats_its_last_frame(frames: int, padding_frames: int):
    sampled = sample_clip(grey_video(frames, 30), CLIP)
    levels = mean_levels(sampled.clip)
    source_frame_count = 30 - padding_frames
    assert sampled.padding_frames == padding_frames
    assert np.allclose(levels[:source_frame_count], grey_levels(frames)[: 3 * source_frame_count : 3], atol=_TOLERANCE)
    assert np.allclose(levels[source_frame_count:], grey_levels(frames)[-1], atol=_TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")]
)
def test_supported_containers_decode(kind: str, codec: str):
    video = encode(np.full((90, 48, 80, 3), 130, np.uint8), 30, kind, codec)
    assert np.abs(decode_clip(video, CLIP).astype(int) - 130).max() <= _TOLERANCE


def test_channels_are_rgb_and_rows_are_lines():
    frames = np.zeros((30, 128, 96, 3), np.uint8)
    frames[:, :64, :, 0] = 255  # red above
    frames[:, 64:, :, 2] = 255  # blue below
    clip = decode_clip(encode(frames, 10), CLIP)
    assert clip[0, 16, 32].tolist() == pytest.approx([254, 0, 0], abs=4)
    assert clip[0, 48, 32].tolist() == pytest.approx([0, 0, 254], abs=4)


def test_downscaling_averages_all_source_pixels():
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (256, 256, 1), dtype=np.uint8).repeat(3, axis=2)  # grey: no chroma to lose
    frames = np.repeat(picture[None], 3, axis=0)
    clip = decode_clip(encode(frames, 10, crf="1"), CLIP)
    averages = picture.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    error = clip[0].astype(float) - averages
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 42
    # Aliased subsampling would keep single pixels: a standard deviation of 74 instead of 74 / 4.
    assert clip[0].std() == pytest.approx(averages.std(), rel=0.05)


VALID = grey_video(90, 30)
PLAYLIST = b"#EXTM3U\n#EXTINF:3,\nfile:///etc/hostname\n"
SCRIPT = b"ffconcat version 1.0\nfile '/etc/hostname'\n"


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (b"", "empty"),
        (b"not a video at all", "not_video"),
        (PLAYLIST, "not_video"),
        (SCRIPT, "not_video"),
        (VALID[:64], "not_video"),
        (bytes(len(VALID)), "not_video"),
    ],
)
def test_non_video_is_rejected_with_a_reason(video: bytes, reason: str):
    with pytest.raises(RejectedVideo) as raised:
        decode_clip(video, CLIP)
    assert raised.value.reason == reason
    assert raised.value.detail


@pytest.mark.parametrize(
    ("kind", "codec", "tag"),
    [("matroska", "libx264", b"DURATION"), ("matroska", "libx264", b"DIRECTOR"), ("avi", "mpeg4", b"DURATION")],
)
def test_video_shorter_than_its_audio_is_complete(kind: str, codec: str, tag: bytes):
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        video, sound = container.add_stream(codec, rate=10), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt, sound.layout = 64, 64, "yuv420p", "mono"
        for level in grey_levels(10):
            picture = np.full((64, 64, 3), level, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.int16), format="s16", layout="mono")
        noise.sample_rate = 8000
        container.mux([*sound.encode(noise), *sound.encode()])
    sampled = sample_clip(out.getvalue().replace(b"DURATION", tag), CLIP)
    assert sampled.padding_frames == 20
    assert np.allclose(mean_levels(sampled.clip)[:10], grey_levels(10), atol=_TOLERANCE)


def test_avi_without_index_is_complete():
    video = grey_video(60, kind="avi")
    without_index, complete = sample_clip(video[: video.rindex(b"idx1")], CLIP), sample_clip(video, CLIP)
    assert np.array_equal(without_index.clip, complete.clip)
    assert without_index.padding_frames == complete.padding_frames == 10


def test_truncation_after_the_clip_is_ignored():
    video = grey_video(200, kind="matroska")
    with av.open(io.BytesIO(video)) as container:
        cut = next(packet.pos for packet in container.demux(video=0) if packet.pts >= 3300)
    assert np.array_equal(decode_clip(video[:cut], CLIP), decode_clip(video, CLIP))


def test_frames_that_the_decoder_drops_are_detected():
    first = encode(np.zeros((1, 64, 64, 3), np.uint8), 10, "avi", "mpeg4")
    with av.open(io.BytesIO(first)) as container:
        packet = bytes(next(container.demux(video=0)))
    video = mux_packets([packet, *[_REPEATED_FRAME] * 29], "mp4", 64, 64, "mpeg4")
    with pytest.raises(RejectedVideo, match="of 30 frames did not decode"):
        decode_clip(video, CLIP)


def encode_at_times(times: list[int], unit: Fraction, kind: str, codec: str = "libx264") -> bytes:
    """Encodes a grey video whose frame i has the presentation time `times[i]`, in units of `unit` seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = unit
        for level, time in zip(grey_levels(len(times)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def exact_nearest_frames(times: list[int], unit: Fraction) -> list[int]:
    """The index of the frame nearest to each clip time, the earlier of two equally near ones, in exact arithmetic."""
    relative = [(time - times[0]) * unit for time in times]
    return [min(range(len(times)), key=lambda i: (abs(relative[i] - Fraction(k, 10)), i)) for k in range(30)]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_frames_at_uneven_times_are_sampled_by_time(kind: str):
    times = np.random.default_rng(0).integers(5, 200, 60).cumsum().tolist()
    sampled = sample_clip(encode_at_times(times, Fraction(1, 1000), kind), CLIP)
    expected = exact_nearest_frames(times, Fraction(1, 1000))
    assert np.allclose(mean_levels(sampled.clip), grey_levels(60)[expected], atol=_TOLERANCE)
    assert np.allclose(sampled.times_s, [(times[i] - times[0]) / 1000 for i in expected], atol=2e-3)


def test_avi_with_skipped_frames_is_sampled_by_time():
    times = [0, 1, 2, 10, 11, 20, 21, 22, 23, 40, 41, 42, 43, 44, 60, 70, 80, 90]
    sampled = sample_clip(encode_at_times(times, Fraction(1, 30), "avi", "mpeg4"), CLIP)
    expected = exact_nearest_frames(times, Fraction(1, 30))
    assert np.allclose(mean_levels(sampled.clip), grey_levels(len(times))[expected], atol=_TOLERANCE)


@pytest.mark.parametrize(
    ("entries", "first", "last"),
    [
        ([(3000, 1024)], 0, 89),
        ([(2500, 1024 + 15 * 512)], 15, 89),  # earlier frames have negative times: decoded but not shown
        ([(1000, 1024 + 30 * 512)], 30, 59),
        ([(400, -1), (3000, 1024)], 0, 89),  # 0.4 s without a frame
    ],
)
def test_edit_list_selects_the_shown_frames(entries: list[tuple[int, int]], first: int, last: int):
    packed = b"".join(struct.pack(">IiI", length, start, 1 << 16) for length, start in entries)
    video = replace_box(VALID, "moov/trak/edts/elst", make_box("elst", struct.pack(">II", 0, len(entries)), packed))
    sampled = sample_clip(video, CLIP)
    shown = [min(first + 3 * index, last) for index in range(30)]
    assert np.allclose(mean_levels(sampled.clip), grey_levels(90)[shown], atol=_TOLERANCE)
    assert sampled.padding_frames == sum(first + 3 * index > last for index in range(30))


X264 = "bframes=5:b-adapt=0:b-pyramid=normal:ref=6:open-gop=1:keyint=24"
FRAME_ORDERS = {
    "h264": ("mp4", "libx264", {}),
    "h264 with pyramids and open groups": ("mp4", "libx264", {"x264-params": X264}),
    "h264 without B-frames": ("mp4", "libx264", {"x264-params": "bframes=0"}),
    "h264 in mkv": ("matroska", "libx264", {}),
    "h264 in avi": ("avi", "libx264", {}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none"}),
    "vp9": ("webm", "libvpx-vp9", {"lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "5", "deadline": "good"}),
    "mpeg4 in mp4": ("mp4", "mpeg4", {"bf": "2"}),
    "mpeg4 in avi": ("avi", "mpeg4", {}),
    "mpeg4 in avi, with B-frames": ("avi", "mpeg4", {"bf": "2"}),
}


@functools.cache
def moving_frames() -> np.ndarray:
    """uint8 [90, 64, 64, 3]: coloured blocks that move to the right; all frames differ."""
    blocks = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(blocks, shift, axis=1)[:, :64] for shift in range(90)])


def decode_all_frames(video: bytes) -> np.ndarray:
    """Decodes every frame in the decoder's output order and scales it as the product does."""
    scaler, frames = VideoReformatter(), []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            small = scaler.reformat(frame, 64, 64, "rgb24", interpolation=SCALING_FLAGS, threads=1)
            frames.append(small.to_ndarray())
    return np.stack(frames)


@pytest.mark.parametrize("order", [*FRAME_ORDERS, "mpeg4 in avi, packed"])
def test_skipping_frames_does_not_change_the_others(order: str):
    video = (
        encode_packed_avi()
        if "packed" in order
        else encode(moving_frames(), 30, FRAME_ORDERS[order][0], FRAME_ORDERS[order][1], **FRAME_ORDERS[order][2])
    )
    plain = decode_all_frames(video)
    # The decoder outputs the frames in their original order.
    decoded_lines, source_lines = plain[:, ::8].astype(int), moving_frames()[:, ::8]
    assert [np.abs(source_lines - frame).mean(axis=(1, 2, 3)).argmin() for frame in decoded_lines] == list(range(90))
    sampled, source = sample_clip(video, CLIP), sample_all_frames(video, CLIP)
    assert np.array_equal(sampled.clip, plain[0:90:3])
    assert np.array_equal(source.clip, plain[:88])
    assert np.allclose(source.times_s, np.arange(88) / 30, atol=1e-3)
    assert np.array_equal(source.clip[nearest_frame_indices(source.times_s, CLIP)], sampled.clip)
    assert sampled.padding_frames == source.padding_frames == 0


def encode_packed_avi() -> bytes:
    """A packed bitstream as of DivX and Xvid: one packet holds a frame and its predecessor, the next one is empty."""
    plain = encode(moving_frames(), 30, "avi", "mpeg4", bf="1", b_strategy="0", sc_threshold="1000000000")
    name = b"\0\0\1\xb2"
    with av.open(io.BytesIO(plain)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    begin = packets[0].index(name)
    end = packets[0].index(b"\0\0\1", begin + 4)
    packed = [packets[0][:begin] + name + b"DivX503b1393p" + packets[0][end:]]
    for packet in packets[1:]:
        if packet[packet.index(b"\0\0\1\xb6") + 4] >> 6 == 2:  # a B-frame: shown before the previous packet
            packed[-1:] = [packed[-1] + packet, _REPEATED_FRAME]
        else:
            packed.append(packet)
    return mux_packets(packed, "avi", 64, 64, "mpeg4", 30)


def test_sample_all_frames_returns_the_whole_short_video():
    source = sample_all_frames(grey_video(20, 30), CLIP)
    assert np.allclose(mean_levels(source.clip), grey_levels(20), atol=_TOLERANCE)
    assert source.padding_frames == 23


# Frames at the start reference frames before it, as in a film that was split without re-encoding.
LEADING = {
    "h264, open groups": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=24:min-keyint=24:scenecut=0:bframes=3"}),
    "h264, intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=24:min-keyint=24:scenecut=0:b-adapt=0:log-level=none"}),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg2": ("matroska", "mpeg2video", {"bf": "2", "g": "12"}),
}


def cut_start(video: bytes, find_first: Callable[[list[av.Packet]], int], kind: str = "matroska") -> bytes:
    """Remuxes the packets from `find_first(packets)` on, with the first frame at time 0."""
    out = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(out, "w", format=kind) as container:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets = packets[find_first(packets) :]
        stream = container.add_stream_from_template(source.streams.video[0])
        earliest = min(packet.pts for packet in packets)
        for packet in packets:
            packet.pts, packet.dts = packet.pts - earliest, packet.dts - earliest
            packet.stream = stream
            container.mux(packet)
    return out.getvalue()


def find_second_keyframe(packets: list[av.Packet]) -> int:
    return [number for number, packet in enumerate(packets) if packet.is_keyframe][1]


def match_source_frames(clip: np.ndarray) -> list[int]:
    """The index in `moving_frames` of each frame."""
    source_lines = moving_frames()[:, ::8].astype(int)
    return [int(np.abs(source_lines - frame[::8].astype(int)).mean(axis=(1, 2, 3)).argmin()) for frame in clip]


@pytest.mark.parametrize("order", LEADING)
def test_cut_video_starts_with_its_first_decodable_frame(order: str):
    kind, codec, options = LEADING[order]
    video = cut_start(encode(moving_frames(), 30, kind, codec, **options), find_second_keyframe)
    with av.open(io.BytesIO(video)) as container:
        listed = sum(bool(packet.size) for packet in container.demux(video=0))
    with av.open(io.BytesIO(video)) as container:
        first = next(container.decode(video=0)).time
    plain = decode_all_frames(video)
    assert 40 < len(plain) <= listed - 1
    assert first is not None and first > 0
    sampled, source = sample_clip(video, CLIP), sample_all_frames(video, CLIP)
    source_frame_count = (len(plain) + 2) // 3
    assert sampled.padding_frames == source.padding_frames == sum(3 * index >= len(plain) for index in range(30))
    assert np.array_equal(sampled.clip[:source_frame_count], plain[::3])
    assert np.array_equal(source.clip, plain)
    assert match_source_frames(source.clip) == list(range(90 - len(plain), 90))


@pytest.mark.parametrize("pause", [0, 20])
def test_cut_avi_starts_with_its_first_decodable_frame(pause: int):
    """avi has no timestamps to identify frames. With `pause`, the first frame is shown for longer."""
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(moving_frames(), 30, "mp4", "mpeg4", bf="2", g="12"))) as source,
        av.open(out, "w", format="avi") as container,
    ):
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets = packets[find_second_keyframe(packets) :]
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number + (pause if number else 0)
            packet.duration = 1
            packet.stream, packet.time_base = stream, Fraction(1, 30)
            container.mux(packet)
    video = out.getvalue()
    with av.open(io.BytesIO(video)) as container:
        decoded = sum(1 for _ in container.decode(video=0))
    assert decoded == len(packets) - 2
    sampled, source = sample_clip(video, CLIP), sample_all_frames(video, CLIP)
    assert match_source_frames(source.clip) == list(range(90 - decoded, 90))
    assert np.allclose(source.times_s, np.arange(decoded) / 30)
    assert match_source_frames(sampled.clip)[: decoded // 3] == list(range(90 - decoded, 90, 3))[: decoded // 3]
    assert sampled.padding_frames == sum(3 * index >= decoded for index in range(30))


def test_packets_without_a_time_are_decoded_as_references():
    """As after `ffmpeg -ss 0.7 -c copy -avoid_negative_ts disabled`: mkv cannot store the times before 0."""
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(moving_frames(), 30, "mp4", g="90"))) as source,
        av.open(out, "w", format="matroska", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                early = round(0.7 / packet.time_base)
                packet.stream, packet.pts, packet.dts = stream, packet.pts - early, packet.dts - early
                container.mux(packet)
    video = out.getvalue()
    with av.open(io.BytesIO(video)) as container:
        assert sum(bool(packet.size) and packet.pts is None for packet in container.demux(video=0)) > 10
    source = sample_all_frames(video, CLIP)
    assert match_source_frames(source.clip) == list(range(21, 90))


@pytest.mark.parametrize("order", ["h264, open groups", "hevc", "mpeg4", "vp9", "vp8"])
def test_frames_before_the_first_keyframe_are_dropped(order: str):
    """Some decoders return invalid frames for these packets without an error."""
    vpx = {"g": "24", "cpu-used": "8", "deadline": "realtime"}
    kind, codec, options = (LEADING | {"vp9": ("webm", "libvpx-vp9", vpx), "vp8": ("webm", "libvpx", vpx)})[order]
    complete = encode(moving_frames(), 30, kind, codec, **options)
    sampled = sample_clip(cut_start(complete, lambda packets: find_second_keyframe(packets) - 5), CLIP)
    expected = sample_clip(cut_start(complete, find_second_keyframe), CLIP)
    assert np.array_equal(sampled.clip, expected.clip)
    assert sampled.padding_frames == expected.padding_frames


def test_damaged_frames_are_not_treated_as_missing_references():
    video = encode(moving_frames(), 30, "matroska", **{"x264-params": "keyint=30:min-keyint=30:scenecut=0"})
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keyframes = [packet for packet in packets if packet.is_keyframe]
    assert len(keyframes) == 3
    for packet in (*keyframes, packets[1]):  # packets[1] is a P-frame that others reference
        offset = video.index(bytes(packet))
        for filler in (b"\xff", b"\0"):
            broken = video[: offset + 40] + filler * (packet.size - 40) + video[offset + packet.size :]
            with pytest.raises(RejectedVideo, match="damaged"):
                sample_clip(broken, CLIP)


def test_video_without_decodable_frames_is_damaged():
    video = encode(moving_frames(), 30, "mp4", "libx265", **{"x265-params": "keyint=90:log-level=none"})
    with pytest.raises(RejectedVideo, match="damaged"):
        sample_clip(cut_start(video, lambda packets: 5), CLIP)


def encode_av1(frames: np.ndarray) -> bytes:
    """Encodes with SVT-AV1, which gives this thread real-time priority if root runs it, and takes that back."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return encode(frames, 30, "mp4", "libsvtav1", preset="12", crf="20", g="30")
    finally:
        os.sched_setscheduler(0, policy, priority)


@pytest.mark.parametrize("first", [0, 15, 40])
def test_av1_trimmed_by_an_edit_list(first: int):
    """The AV1 decoder reads `skip_frame` only once, at the first packet."""
    video = encode_av1(moving_frames())
    start = struct.pack(">IiI", (90 - first) * 1000 // 30, first * 512, 1 << 16)
    trimmed = replace_box(video, "moov/trak/edts/elst", make_box("elst", struct.pack(">II", 0, 1), start))
    with av.open(io.BytesIO(trimmed)) as container:
        assert container.streams.video[0].codec_context.name == "libdav1d"
        assert any(packet.is_discard for packet in container.demux(video=0)) == bool(first)
    sampled, source = sample_clip(trimmed, CLIP), sample_all_frames(trimmed, CLIP)
    shown = list(range(first, 90))
    assert np.array_equal(source.clip, decode_all_frames(trimmed)[: len(source.clip)])
    assert match_source_frames(source.clip) == shown[: len(source.clip)]
    assert match_source_frames(sampled.clip) == [shown[min(3 * index, len(shown) - 1)] for index in range(30)]
    assert sampled.padding_frames == sum(3 * index >= len(shown) for index in range(30))


class Track(NamedTuple):
    """A video track of a uniform colour."""

    colour: tuple[int, int, int]
    frames: int
    fps: int
    size: int
    flags: Disposition = Disposition(0)


RED, GREEN = (200, 40, 40), (40, 160, 60)
FILM = Track(GREEN, 30, 10, 64, Disposition.default)


def encode_tracks(tracks: list[Track], kind: str) -> bytes:
    """Encodes one video stream per track."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        streams = []
        for track in tracks:
            stream = container.add_stream("libx264", rate=track.fps)
            stream.width, stream.height, stream.pix_fmt = track.size, track.size, "yuv420p"
            stream.disposition = track.flags
            streams.append(stream)
        packets = []
        for track, stream in zip(tracks, streams, strict=True):
            picture = np.broadcast_to(np.uint8(track.colour), (track.size, track.size, 3)).copy()
            frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for _ in range(track.frames)]
            packets += [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        container.mux(packets)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize(
    "secondary",
    [
        Track(RED, 1, 10, 128),  # a still image that is not marked as one
        Track(RED, 1, 10, 128, Disposition.default),
        Track(RED, 4, 1, 128),  # a thumbnail per second for the seek bar
        Track(RED, 4, 1, 128, Disposition.default),
        Track(RED, 30, 10, 128),  # as long as the film, but without the default flag
        Track(RED, 30, 10, 32, Disposition.default),  # smaller
    ],
)
def test_main_track_is_chosen_in_any_order(kind: str, secondary: Track):
    for tracks in ([secondary, FILM], [FILM, secondary]):
        video = encode_tracks(tracks, kind)
        assert np.abs(decode_clip(video, CLIP).astype(int) - GREEN).max() <= _TOLERANCE
        if secondary.frames > 4 and shutil.which("ffmpeg"):
            assert np.abs(decode_with_ffmpeg(video) - GREEN).max() <= _TOLERANCE


def decode_with_ffmpeg(video: bytes) -> np.ndarray:
    """int64 [3]: the colour of the track that the ffmpeg command selects."""
    with tempfile.NamedTemporaryFile(suffix=".mkv") as file:
        Path(file.name).write_bytes(video)
        command = ["ffmpeg", "-v", "error", "-i", file.name, "-frames:v", "1", "-s", "2x2", "-pix_fmt", "rgb24"]
        raw = subprocess.run([*command, "-f", "rawvideo", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(4, 3).mean(axis=0).astype(int)


def test_tracks_are_ranked_by_default_flag_and_size():
    for first, second, chosen in (
        (Track(RED, 30, 10, 64), Track(GREEN, 30, 10, 64), RED),  # equal: the first
        (Track(RED, 30, 10, 64), Track(GREEN, 30, 10, 96), GREEN),
        (Track(RED, 30, 10, 64, Disposition.default), Track(GREEN, 30, 10, 96), RED),
        (Track(RED, 30, 10, 64, Disposition.default), Track(GREEN, 30, 10, 96, Disposition.default), GREEN),
    ):
        video = encode_tracks([first, second], "matroska")
        assert np.abs(decode_clip(video, CLIP).astype(int) - chosen).max() <= _TOLERANCE
        if shutil.which("ffmpeg"):
            assert np.abs(decode_with_ffmpeg(video) - chosen).max() <= _TOLERANCE


def test_file_with_only_still_images_is_rejected_as_still():
    video = encode_tracks([Track(RED, 1, 10, 64), Track(GREEN, 1, 10, 96)], "matroska")
    with pytest.raises(RejectedVideo, match="still"):
        decode_clip(video, CLIP)


INDEX_PER_FRAGMENT = "frag_keyframe+dash"  # one index per fragment


def box_size(video: bytes, kind: str) -> int:
    """Size in bytes of the first top-level box of this kind."""
    return next(box.end - box.start for box in list_boxes(video) if box.kind == kind)


COMPLETE = {
    "live": encode_fragmented,
    "index per fragment": lambda: encode_fragmented(flags=INDEX_PER_FRAGMENT),
    "sidx": lambda: encode_fragmented(flags=INDEXED),
    "just long enough": lambda: encode_fragmented(30),
    "mehd": lambda: set_stated_duration(encode_fragmented(), 5, "mehd"),
    "mvhd": lambda: set_stated_duration(encode_fragmented(), 5, "mvhd"),
    "first fragment in moov": lambda: encode_fragmented(flags="frag_keyframe"),
}
SHORT = {
    "sidx": lambda: encode_fragmented(15, flags=INDEXED),
    "mehd": lambda: set_stated_duration(encode_fragmented(15), 1.5, "mehd"),
    "mvhd": lambda: set_stated_duration(encode_fragmented(15), 1.5, "mvhd"),
    "unknown length": lambda: set_stated_duration(encode_fragmented(15), (2**32 - 1) / 1000, "mvhd"),  # all ones
    "longer audio": lambda: set_stated_duration(encode_fragmented(15, sound_s=4), 4, "mehd"),
    "live, ended": lambda: keep_fragments(encode_fragmented(), 2),
}
TRUNCATED = {
    "sidx": lambda: keep_fragments(encode_fragmented(flags=INDEXED), 1),
    "sidx, 2 s": lambda: keep_fragments(encode_fragmented(flags=INDEXED), 2),
    "mehd": lambda: keep_fragments(set_stated_duration(encode_fragmented(), 5, "mehd"), 1),
    "mvhd": lambda: keep_fragments(set_stated_duration(encode_fragmented(), 5, "mvhd"), 1),
    "with audio": lambda: keep_fragments(set_stated_duration(encode_fragmented(sound_s=5), 5, "mehd"), 2),
    "within a header": lambda: keep_fragments(encode_fragmented(), 1, extra_bytes=60),
    "within frames": lambda: keep_fragments(encode_fragmented(), 1, extra_bytes=400),
    "before frames": lambda: keep_fragments(encode_fragmented(), 1, extra_bytes=box_size(encode_fragmented(), "moof")),
    "within a box header": lambda: keep_fragments(encode_fragmented(), 1, extra_bytes=5),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_fragmented_files_decode(name: str):
    sampled = sample_clip(COMPLETE[name](), CLIP)
    assert sampled.padding_frames == 0
    assert np.allclose(mean_levels(sampled.clip), grey_levels(50)[:30], atol=_TOLERANCE)


@pytest.mark.parametrize("name", SHORT)
def test_short_complete_fragmented_files_are_padded(name: str):
    sampled = sample_clip(SHORT[name](), CLIP)
    source_frame_count = 30 - sampled.padding_frames
    assert source_frame_count == (20 if "live" in name else 15)
    levels = mean_levels(sampled.clip)[:source_frame_count]
    assert np.allclose(levels, grey_levels(50)[:source_frame_count], atol=_TOLERANCE)


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_fragmented_file_is_rejected(name: str):
    with pytest.raises(RejectedVideo, match="truncated") as raised:
        sample_clip(TRUNCATED[name](), CLIP)
    assert raised.value.reason == "damaged"


def test_fragmented_file_truncated_after_the_clip_decodes():
    video = keep_fragments(encode_fragmented(flags=INDEXED), 4)
    assert np.allclose(mean_levels(decode_clip(video, CLIP)), grey_levels(50)[:30], atol=_TOLERANCE)


@pytest.mark.parametrize("tag", [b"DURATION", b"DIRECTOR"])
def test_mkv_truncated_with_its_audio_is_rejected(tag: bytes):
    """Without the DURATION tag only the total length is stated, which the audio does not reach either."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        video, sound = container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt, sound.layout = 64, 64, "yuv420p", "mono"
        video.options = {"tune": "zerolatency"}
        for level in grey_levels(40):
            picture = np.full((64, 64, 3), level, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            noise.sample_rate = 8000
            container.mux(sound.encode(noise))
        container.mux(video.encode())
    complete = out.getvalue().replace(b"DURATION", tag)
    assert sample_clip(complete, CLIP).padding_frames == 0
    with av.open(io.BytesIO(complete)) as container:
        cut = next(packet.pos for packet in container.demux(video=0) if packet.pts >= 2000)
    with pytest.raises(RejectedVideo, match="damaged"):
        sample_clip(complete[: cut - 10], CLIP)


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_avi_truncated_anywhere_is_rejected(codec: str):
    """FFmpeg treats the rest of some of them as a complete file."""
    video = encode(moving_frames(), 30, "avi", codec, strict="unofficial")
    complete = sample_clip(video, CLIP)
    first = video.index(b"00dc", video.index(b"movi")) + 4000
    for cut in np.linspace(first, 0.7 * len(video), 10).astype(int):
        with pytest.raises(RejectedVideo, match="damaged"):
            sample_clip(video[:cut], CLIP)
    for cut in (len(video) - 1, video.rindex(b"idx1")):
        assert np.array_equal(sample_clip(video[:cut], CLIP).clip, complete.clip)


def test_live_mkv_truncated_within_a_frame_is_rejected():
    """A live stream states neither length nor sizes, so a complete file may end after any frame."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska", options={"live": "1"}) as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for picture in [*moving_frames()[:20], None]:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24") if picture is not None else None
            container.mux(stream.encode(frame))
    video = out.getvalue()
    with av.open(io.BytesIO(video)) as container:
        assert container.duration is None
        begin, end = [packet.pos for packet in container.demux(video=0) if packet.size][10:12]
    assert sample_clip(video, CLIP).padding_frames == 10
    for cut in (begin + 1, begin + 40, end - 1):
        with pytest.raises(RejectedVideo, match="it is truncated: it ends within an element"):
            sample_clip(video[:cut], CLIP)
