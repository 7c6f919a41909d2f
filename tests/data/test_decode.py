"""Frames are told apart by their grey level, so that each test knows which source frame came out."""

import functools
import io
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
from giffy_ray.data.decode import RejectedVideo, decode_clip, nearest_frames, sample_clip, sample_source
from giffy_ray.data.scaling import SCALING
from tests.conftest import encode, grey_levels, grey_video
from tests.data.boxes import box, boxes, replaced
from tests.data.corpus import INDEXED, first_fragments, fragmented, of_packets, states_length

CLIP = ClipConfig()
_NOTHING_NEW = b"\0\0\1\xb6\x50\0\0"  # a frame of MPEG-4 that is the one before
_TOLERANCE = 3  # grey levels that encoding may cost; neighbours differ by 37


def levels(clip: np.ndarray) -> np.ndarray:
    return clip.reshape(len(clip), -1).mean(axis=1)


def test_every_third_frame_of_the_first_ninety():
    clip = decode_clip(grey_video(90, 30), CLIP)
    assert clip.shape == (30, 64, 64, 3)
    assert clip.dtype == np.uint8
    assert np.allclose(levels(clip), grey_levels(90)[0:90:3], atol=_TOLERANCE)


def test_what_comes_after_three_seconds_is_left_out():
    assert np.allclose(levels(decode_clip(grey_video(200, 30), CLIP)), grey_levels(200)[0:90:3], atol=_TOLERANCE)


@pytest.mark.parametrize(("fps", "frames"), [(60, 180), (25, 75), (24, 72), (15, 45), (10, 30)])
def test_other_rates_are_sampled_by_time(fps: int, frames: int):
    nearest = [
        min(range(frames), key=lambda frame: (abs(Fraction(frame, fps) - Fraction(moment, 10)), frame))
        for moment in range(30)
    ]
    sampled = sample_clip(grey_video(frames, fps), CLIP)
    assert np.allclose(levels(sampled.clip), grey_levels(frames)[nearest], atol=_TOLERANCE)
    assert sampled.padded == 0


@pytest.mark.parametrize(("frames", "padded"), [(60, 10), (45, 15), (4, 28), (3, 29), (2, 29)])
def test_a_short_video_repeats_its_last_frame_and_says_so(frames: int, padded: int):
    sampled = sample_clip(grey_video(frames, 30), CLIP)
    assert sampled.padded == padded
    real = 30 - padded
    assert np.allclose(levels(sampled.clip)[:real], grey_levels(frames)[: 3 * real : 3], atol=_TOLERANCE)
    assert np.allclose(levels(sampled.clip)[real:], grey_levels(frames)[-1], atol=_TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")]
)
def test_containers(kind: str, codec: str):
    video = encode(np.full((90, 48, 80, 3), 130, np.uint8), 30, kind, codec)
    assert np.abs(decode_clip(video, CLIP).astype(int) - 130).max() <= _TOLERANCE


def test_channels_are_red_green_blue_and_rows_are_rows():
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
    boxes = picture.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    error = clip[0].astype(float) - boxes
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 42
    # A subsampling that aliases would show single pixels: a spread of 74 instead of 74 / 4.
    assert clip[0].std() == pytest.approx(boxes.std(), rel=0.05)


GOOD = grey_video(90, 30)
PLAYLIST = b"#EXTM3U\n#EXTINF:3,\nfile:///etc/hostname\n"
SCRIPT = b"ffconcat version 1.0\nfile '/etc/hostname'\n"


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (b"", "empty"),
        (b"not a video at all", "not_video"),
        (PLAYLIST, "not_video"),
        (SCRIPT, "not_video"),
        (GOOD[:64], "not_video"),
        (bytes(len(GOOD)), "not_video"),
    ],
)
def test_what_is_no_video_is_rejected_with_a_reason(video: bytes, reason: str):
    with pytest.raises(RejectedVideo) as raised:
        decode_clip(video, CLIP)
    assert raised.value.reason == reason
    assert raised.value.detail


@pytest.mark.parametrize(
    ("kind", "codec", "tag"),
    [("matroska", "libx264", b"DURATION"), ("matroska", "libx264", b"DIRECTOR"), ("avi", "mpeg4", b"DURATION")],
)
def test_a_video_that_lasts_less_long_than_its_sound_is_whole(kind: str, codec: str, tag: bytes):
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
    assert sampled.padded == 20
    assert np.allclose(levels(sampled.clip)[:10], grey_levels(10), atol=_TOLERANCE)


def test_an_avi_without_its_index_is_whole():
    video = grey_video(60, kind="avi")
    without, whole = sample_clip(video[: video.rindex(b"idx1")], CLIP), sample_clip(video, CLIP)
    assert np.array_equal(without.clip, whole.clip)
    assert without.padded == whole.padded == 10


def test_what_was_cut_off_after_the_clip_is_not_missed():
    video = grey_video(200, kind="matroska")
    with av.open(io.BytesIO(video)) as container:
        cut = next(packet.pos for packet in container.demux(video=0) if packet.pts >= 3300)
    assert np.array_equal(decode_clip(video[:cut], CLIP), decode_clip(video, CLIP))


def test_frames_that_the_decoder_keeps_back_are_missed():
    first = encode(np.zeros((1, 64, 64, 3), np.uint8), 10, "avi", "mpeg4")
    with av.open(io.BytesIO(first)) as container:
        packet = bytes(next(container.demux(video=0)))
    video = of_packets([packet, *[_NOTHING_NEW] * 29], "mp4", 64, 64, "mpeg4")
    with pytest.raises(RejectedVideo, match="of 30 frames did not decode"):
        decode_clip(video, CLIP)


def at_times(times: list[int], unit: Fraction, kind: str, codec: str = "libx264") -> bytes:
    """A grey video whose frame i is shown at `times[i]` units."""
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


def nearest_of(times: list[int], unit: Fraction) -> list[int]:
    """For each moment of a clip the frame nearest to it, the earlier of two that are equally near; in fractions."""
    since = [(time - times[0]) * unit for time in times]
    return [min(range(len(times)), key=lambda i: (abs(since[i] - Fraction(k, 10)), i)) for k in range(30)]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_frames_at_uneven_times(kind: str):
    times = np.random.default_rng(0).integers(5, 200, 60).cumsum().tolist()
    sampled, wanted = sample_clip(at_times(times, Fraction(1, 1000), kind), CLIP), nearest_of(times, Fraction(1, 1000))
    assert np.allclose(levels(sampled.clip), grey_levels(60)[wanted], atol=_TOLERANCE)
    assert np.allclose(sampled.times_s, [(times[i] - times[0]) / 1000 for i in wanted], atol=2e-3)


def test_an_avi_may_leave_frames_out():
    times = [0, 1, 2, 10, 11, 20, 21, 22, 23, 40, 41, 42, 43, 44, 60, 70, 80, 90]
    sampled = sample_clip(at_times(times, Fraction(1, 30), "avi", "mpeg4"), CLIP)
    wanted = nearest_of(times, Fraction(1, 30))
    assert np.allclose(levels(sampled.clip), grey_levels(len(times))[wanted], atol=_TOLERANCE)


@pytest.mark.parametrize(
    ("entries", "first", "last"),
    [
        ([(3000, 1024)], 0, 89),
        ([(2500, 1024 + 15 * 512)], 15, 89),  # the frames before are decoded and not shown: their times are negative
        ([(1000, 1024 + 30 * 512)], 30, 59),
        ([(400, -1), (3000, 1024)], 0, 89),  # nothing for 0.4 s
    ],
)
def test_edit_lists(entries: list[tuple[int, int]], first: int, last: int):
    packed = b"".join(struct.pack(">IiI", length, start, 1 << 16) for length, start in entries)
    video = replaced(GOOD, "moov/trak/edts/elst", box("elst", struct.pack(">II", 0, len(entries)), packed))
    sampled = sample_clip(video, CLIP)
    shown = [min(first + 3 * moment, last) for moment in range(30)]
    assert np.allclose(levels(sampled.clip), grey_levels(90)[shown], atol=_TOLERANCE)
    assert sampled.padded == sum(first + 3 * moment > last for moment in range(30))


X264 = "bframes=5:b-adapt=0:b-pyramid=normal:ref=6:open-gop=1:keyint=24"
ORDERS = {
    "h264": ("mp4", "libx264", {}),
    "h264 with pyramids and open groups": ("mp4", "libx264", {"x264-params": X264}),
    "h264 without": ("mp4", "libx264", {"x264-params": "bframes=0"}),
    "h264 in mkv": ("matroska", "libx264", {}),
    "h264 in avi": ("avi", "libx264", {}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none"}),
    "vp9": ("webm", "libvpx-vp9", {"lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "5", "deadline": "good"}),
    "mpeg4 in mp4": ("mp4", "mpeg4", {"bf": "2"}),
    "mpeg4 in avi": ("avi", "mpeg4", {}),
    "mpeg4 in avi, foretold": ("avi", "mpeg4", {"bf": "2"}),
}


@functools.cache
def moving_frames() -> np.ndarray:
    """uint8 [90, 64, 64, 3]: coloured blocks on their way to the right; no two frames alike."""
    blocks = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(blocks, shift, axis=1)[:, :64] for shift in range(90)])


def all_frames(video: bytes) -> np.ndarray:
    """Everything that the decoder gives, in its order, brought to size by the same scaler."""
    scaler, frames = VideoReformatter(), []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            small = scaler.reformat(frame, 64, 64, "rgb24", interpolation=SCALING, threads=1)
            frames.append(small.to_ndarray())
    return np.stack(frames)


@pytest.mark.parametrize("order", [*ORDERS, "mpeg4 in avi, packed"])
def test_leaving_out_frames_changes_no_other(order: str):
    video = (
        packed_avi()
        if "packed" in order
        else encode(moving_frames(), 30, ORDERS[order][0], ORDERS[order][1], **ORDERS[order][2])
    )
    plain = all_frames(video)
    # The plain decode is in the order in which the frames were encoded.
    thin, real = plain[:, ::8].astype(int), moving_frames()[:, ::8]
    assert [np.abs(real - frame).mean(axis=(1, 2, 3)).argmin() for frame in thin] == list(range(90))
    sampled, source = sample_clip(video, CLIP), sample_source(video, CLIP)
    assert np.array_equal(sampled.clip, plain[0:90:3])
    assert np.array_equal(source.clip, plain[:88])
    assert np.allclose(source.times_s, np.arange(88) / 30, atol=1e-3)
    assert np.array_equal(source.clip[nearest_frames(source.times_s, CLIP)], sampled.clip)
    assert sampled.padded == source.padded == 0


def packed_avi() -> bytes:
    """As DivX and Xvid wrote them: a frame and the one before it in one packet, then an empty one to make up for it."""
    plain = encode(moving_frames(), 30, "avi", "mpeg4", bf="1", b_strategy="0", sc_threshold="1000000000")
    name = b"\0\0\1\xb2"
    with av.open(io.BytesIO(plain)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    begin = packets[0].index(name)
    end = packets[0].index(b"\0\0\1", begin + 4)
    packed = [packets[0][:begin] + name + b"DivX503b1393p" + packets[0][end:]]
    for packet in packets[1:]:
        if packet[packet.index(b"\0\0\1\xb6") + 4] >> 6 == 2:  # shown before the one that came before it
            packed[-1:] = [packed[-1] + packet, _NOTHING_NEW]
        else:
            packed.append(packet)
    return of_packets(packed, "avi", 64, 64, "mpeg4", 30)


def test_the_source_of_a_short_video_is_all_of_it():
    source = sample_source(grey_video(20, 30), CLIP)
    assert np.allclose(levels(source.clip), grey_levels(20), atol=_TOLERANCE)
    assert source.padded == 23


# As in a film that was cut into pieces without decoding it.
LEADING = {
    "h264, open groups": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=24:min-keyint=24:scenecut=0:bframes=3"}),
    "h264, intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=24:min-keyint=24:scenecut=0:b-adapt=0:log-level=none"}),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg2": ("matroska", "mpeg2video", {"bf": "2", "g": "12"}),
}


def piece(video: bytes, begin: Callable[[list[av.Packet]], int], kind: str = "matroska") -> bytes:
    """The packets from one on, untouched, the first frame shown at 0."""
    out = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(out, "w", format=kind) as container:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets = packets[begin(packets) :]
        stream = container.add_stream_from_template(source.streams.video[0])
        earliest = min(packet.pts for packet in packets)
        for packet in packets:
            packet.pts, packet.dts = packet.pts - earliest, packet.dts - earliest
            packet.stream = stream
            container.mux(packet)
    return out.getvalue()


def second_keyframe(packets: list[av.Packet]) -> int:
    return [number for number, packet in enumerate(packets) if packet.is_keyframe][1]


def source_frames(clip: np.ndarray) -> list[int]:
    """Which of `moving_frames` each picture is."""
    real = moving_frames()[:, ::8].astype(int)
    return [int(np.abs(real - picture[::8].astype(int)).mean(axis=(1, 2, 3)).argmin()) for picture in clip]


@pytest.mark.parametrize("order", LEADING)
def test_a_piece_begins_with_the_first_frame_that_decodes(order: str):
    kind, codec, options = LEADING[order]
    video = piece(encode(moving_frames(), 30, kind, codec, **options), second_keyframe)
    with av.open(io.BytesIO(video)) as container:
        listed = sum(bool(packet.size) for packet in container.demux(video=0))
    with av.open(io.BytesIO(video)) as container:
        first = next(container.decode(video=0)).time
    plain = all_frames(video)
    assert 40 < len(plain) <= listed - 1
    assert first is not None and first > 0
    sampled, source = sample_clip(video, CLIP), sample_source(video, CLIP)
    real = (len(plain) + 2) // 3
    assert sampled.padded == source.padded == sum(3 * moment >= len(plain) for moment in range(30))
    assert np.array_equal(sampled.clip[:real], plain[::3])
    assert np.array_equal(source.clip, plain)
    assert source_frames(source.clip) == list(range(90 - len(plain), 90))


@pytest.mark.parametrize("pause", [0, 20])
def test_a_piece_of_an_avi_begins_with_the_first_frame_that_decodes(pause: int):
    """An avi gives no times to know the frames by. Its first one may stay for longer."""
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(moving_frames(), 30, "mp4", "mpeg4", bf="2", g="12"))) as source,
        av.open(out, "w", format="avi") as container,
    ):
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets = packets[second_keyframe(packets) :]
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
    sampled, source = sample_clip(video, CLIP), sample_source(video, CLIP)
    assert source_frames(source.clip) == list(range(90 - decoded, 90))
    assert np.allclose(source.times_s, np.arange(decoded) / 30)
    assert source_frames(sampled.clip)[: decoded // 3] == list(range(90 - decoded, 90, 3))[: decoded // 3]
    assert sampled.padded == sum(3 * moment >= decoded for moment in range(30))


def test_frames_without_a_time_are_decoded_for_those_that_have_one():
    """A trim by `ffmpeg -ss 0.7 -c copy -avoid_negative_ts disabled`: an mkv cannot hold the times before 0."""
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
    source = sample_source(video, CLIP)
    assert source_frames(source.clip) == list(range(21, 90))


@pytest.mark.parametrize("order", ["h264, open groups", "hevc", "mpeg4", "vp9", "vp8"])
def test_frames_before_the_first_keyframe_are_left_out(order: str):
    """Not all decoders say that what they make of these is no picture."""
    vpx = {"g": "24", "cpu-used": "8", "deadline": "realtime"}
    kind, codec, options = (LEADING | {"vp9": ("webm", "libvpx-vp9", vpx), "vp8": ("webm", "libvpx", vpx)})[order]
    whole = encode(moving_frames(), 30, kind, codec, **options)
    sampled = sample_clip(piece(whole, lambda packets: second_keyframe(packets) - 5), CLIP)
    expected = sample_clip(piece(whole, second_keyframe), CLIP)
    assert np.array_equal(sampled.clip, expected.clip)
    assert sampled.padded == expected.padded


def test_a_hole_is_no_leading_frame():
    """Frames missing at the start are one thing, frames that were there and are broken another."""
    video = encode(moving_frames(), 30, "matroska", **{"x264-params": "keyint=30:min-keyint=30:scenecut=0"})
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keyframes = [packet for packet in packets if packet.is_keyframe]
    assert len(keyframes) == 3
    for packet in (*keyframes, packets[1]):  # the second is a P frame, which others are predicted from
        place = video.index(bytes(packet))
        for filler in (b"\xff", b"\0"):
            broken = video[: place + 40] + filler * (packet.size - 40) + video[place + packet.size :]
            with pytest.raises(RejectedVideo, match="damaged"):
                sample_clip(broken, CLIP)


def test_what_never_decodes_is_damaged():
    video = encode(moving_frames(), 30, "mp4", "libx265", **{"x265-params": "keyint=90:log-level=none"})
    with pytest.raises(RejectedVideo, match="damaged"):
        sample_clip(piece(video, lambda packets: 5), CLIP)


@pytest.mark.parametrize("first", [0, 15, 40])
def test_av1_that_was_trimmed_without_decoding_it(first: int):
    """The decoder of AV1 decides once, at the first packet, what it will leave out."""
    video = encode(moving_frames(), 30, "mp4", "libsvtav1", preset="12", crf="20", g="30")
    start = struct.pack(">IiI", (90 - first) * 1000 // 30, first * 512, 1 << 16)
    trimmed = replaced(video, "moov/trak/edts/elst", box("elst", struct.pack(">II", 0, 1), start))
    with av.open(io.BytesIO(trimmed)) as container:
        assert container.streams.video[0].codec_context.name == "libdav1d"
        assert any(packet.is_discard for packet in container.demux(video=0)) == bool(first)
    sampled, source = sample_clip(trimmed, CLIP), sample_source(trimmed, CLIP)
    shown = list(range(first, 90))
    assert np.array_equal(source.clip, all_frames(trimmed)[: len(source.clip)])
    assert source_frames(source.clip) == shown[: len(source.clip)]
    assert source_frames(sampled.clip) == [shown[min(3 * moment, len(shown) - 1)] for moment in range(30)]
    assert sampled.padded == sum(3 * moment >= len(shown) for moment in range(30))


class Track(NamedTuple):
    """A video track of one colour."""

    colour: tuple[int, int, int]
    frames: int
    fps: int
    size: int
    flags: Disposition = Disposition(0)


RED, GREEN = (200, 40, 40), (40, 160, 60)
FILM = Track(GREEN, 30, 10, 64, Disposition.default)


def of_tracks(tracks: list[Track], kind: str) -> bytes:
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
    "other",
    [
        Track(RED, 1, 10, 128),  # a single picture, not marked as one
        Track(RED, 1, 10, 128, Disposition.default),
        Track(RED, 4, 1, 128),  # a picture a second, for the bar below the film
        Track(RED, 4, 1, 128, Disposition.default),
        Track(RED, 30, 10, 128),  # as long as the film, and not marked as default
        Track(RED, 30, 10, 32, Disposition.default),  # a smaller one
    ],
)
def test_the_film_is_chosen_wherever_it_stands(kind: str, other: Track):
    for tracks in ([other, FILM], [FILM, other]):
        video = of_tracks(tracks, kind)
        assert np.abs(decode_clip(video, CLIP).astype(int) - GREEN).max() <= _TOLERANCE
        if other.frames > 4 and shutil.which("ffmpeg"):
            assert np.abs(by_ffmpegs_choice(video) - GREEN).max() <= _TOLERANCE


def by_ffmpegs_choice(video: bytes) -> np.ndarray:
    """int64 [3]: the colour of the track that ffmpeg's command line takes."""
    with tempfile.NamedTemporaryFile(suffix=".mkv") as file:
        Path(file.name).write_bytes(video)
        command = ["ffmpeg", "-v", "error", "-i", file.name, "-frames:v", "1", "-s", "2x2", "-pix_fmt", "rgb24"]
        raw = subprocess.run([*command, "-f", "rawvideo", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(4, 3).mean(axis=0).astype(int)


def test_two_films_are_ranked_by_their_marks_and_size():
    for first, second, chosen in (
        (Track(RED, 30, 10, 64), Track(GREEN, 30, 10, 64), RED),  # alike: the first
        (Track(RED, 30, 10, 64), Track(GREEN, 30, 10, 96), GREEN),
        (Track(RED, 30, 10, 64, Disposition.default), Track(GREEN, 30, 10, 96), RED),
        (Track(RED, 30, 10, 64, Disposition.default), Track(GREEN, 30, 10, 96, Disposition.default), GREEN),
    ):
        video = of_tracks([first, second], "matroska")
        assert np.abs(decode_clip(video, CLIP).astype(int) - chosen).max() <= _TOLERANCE
        if shutil.which("ffmpeg"):
            assert np.abs(by_ffmpegs_choice(video) - chosen).max() <= _TOLERANCE


def test_a_file_of_nothing_but_single_pictures_is_a_still():
    video = of_tracks([Track(RED, 1, 10, 64), Track(GREEN, 1, 10, 96)], "matroska")
    with pytest.raises(RejectedVideo, match="still"):
        decode_clip(video, CLIP)


EACH_INDEXED = "frag_keyframe+dash"  # each fragment by itself


def length_of(video: bytes, kind: str) -> int:
    """Of the first box of this kind at the top of a file, in bytes."""
    return next(part.end - part.start for part in boxes(video) if part.kind == kind)


WHOLE = {
    "live": fragmented,
    "each indexed": lambda: fragmented(flags=EACH_INDEXED),
    "sidx": lambda: fragmented(flags=INDEXED),
    "just long enough": lambda: fragmented(30),
    "mehd": lambda: states_length(fragmented(), 5, "mehd"),
    "mvhd": lambda: states_length(fragmented(), 5, "mvhd"),
    "first fragment in moov": lambda: fragmented(flags="frag_keyframe"),
}
SHORT = {
    "sidx": lambda: fragmented(15, flags=INDEXED),
    "mehd": lambda: states_length(fragmented(15), 1.5, "mehd"),
    "mvhd": lambda: states_length(fragmented(15), 1.5, "mvhd"),
    "length not known": lambda: states_length(fragmented(15), (2**32 - 1) / 1000, "mvhd"),  # all ones
    "longer sound": lambda: states_length(fragmented(15, sound_s=4), 4, "mehd"),
    "live, ended": lambda: first_fragments(fragmented(), 2),
}
CUT_OFF = {
    "sidx": lambda: first_fragments(fragmented(flags=INDEXED), 1),
    "sidx, 2 s": lambda: first_fragments(fragmented(flags=INDEXED), 2),
    "mehd": lambda: first_fragments(states_length(fragmented(), 5, "mehd"), 1),
    "mvhd": lambda: first_fragments(states_length(fragmented(), 5, "mvhd"), 1),
    "with sound": lambda: first_fragments(states_length(fragmented(sound_s=5), 5, "mehd"), 2),
    "within a header": lambda: first_fragments(fragmented(), 1, partly=60),
    "within pictures": lambda: first_fragments(fragmented(), 1, partly=400),
    "before pictures": lambda: first_fragments(fragmented(), 1, partly=length_of(fragmented(), "moof")),
    "within the head of a box": lambda: first_fragments(fragmented(), 1, partly=5),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_fragmented_files(name: str):
    sampled = sample_clip(WHOLE[name](), CLIP)
    assert sampled.padded == 0
    assert np.allclose(levels(sampled.clip), grey_levels(50)[:30], atol=_TOLERANCE)


@pytest.mark.parametrize("name", SHORT)
def test_fragmented_files_that_are_short_and_whole(name: str):
    sampled = sample_clip(SHORT[name](), CLIP)
    real = 30 - sampled.padded
    assert real == (20 if "live" in name else 15)
    assert np.allclose(levels(sampled.clip)[:real], grey_levels(50)[:real], atol=_TOLERANCE)


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_fragmented_file_that_was_cut_off(name: str):
    with pytest.raises(RejectedVideo, match=r"cut off") as raised:
        sample_clip(CUT_OFF[name](), CLIP)
    assert raised.value.reason == "damaged"


def test_a_fragmented_file_that_was_cut_off_after_the_clip():
    video = first_fragments(fragmented(flags=INDEXED), 4)
    assert np.allclose(levels(decode_clip(video, CLIP)), grey_levels(50)[:30], atol=_TOLERANCE)


@pytest.mark.parametrize("tag", [b"DURATION", b"DIRECTOR"])
def test_an_mkv_whose_sound_was_cut_off_with_it(tag: bytes):
    """Without the tag only the length of the whole is stated, which the sound does not reach either."""
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
    whole = out.getvalue().replace(b"DURATION", tag)
    assert sample_clip(whole, CLIP).padded == 0
    with av.open(io.BytesIO(whole)) as container:
        cut = next(packet.pos for packet in container.demux(video=0) if packet.pts >= 2000)
    with pytest.raises(RejectedVideo, match="damaged"):
        sample_clip(whole[: cut - 10], CLIP)


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_an_avi_that_was_cut_off_anywhere(codec: str):
    """FFmpeg takes what is left of some for the whole."""
    video = encode(moving_frames(), 30, "avi", codec, strict="unofficial")
    whole = sample_clip(video, CLIP)
    first = video.index(b"00dc", video.index(b"movi")) + 4000
    for cut in np.linspace(first, 0.7 * len(video), 10).astype(int):
        with pytest.raises(RejectedVideo, match="damaged"):
            sample_clip(video[:cut], CLIP)
    for cut in (len(video) - 1, video.rindex(b"idx1")):
        assert np.array_equal(sample_clip(video[:cut], CLIP).clip, whole.clip)


def test_an_mkv_that_states_no_length_is_cut_off_within_a_frame():
    """As streamed: the sizes of the whole and of its parts are left open, so it may end after any frame."""
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
    assert sample_clip(video, CLIP).padded == 10
    for cut in (begin + 1, begin + 40, end - 1):
        with pytest.raises(RejectedVideo, match=r"it ends within an element, .*: it was cut off"):
            sample_clip(video[:cut], CLIP)
