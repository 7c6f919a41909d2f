"""Frames are told apart by their grey level, so that each test knows which source frame came out."""

from fractions import Fraction

import numpy as np
import pytest

from giffy_ray.config import ClipConfig
from giffy_ray.data.decode import RejectedVideo, decode_clip, sample_clip
from tests.conftest import encode, grey_levels, grey_video

CLIP = ClipConfig()
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


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_truncated_video_is_rejected(share: float):
    faststart = encode(
        np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), dtype=np.uint8), 30, movflags="faststart"
    )
    for video in (GOOD, faststart):
        with pytest.raises(RejectedVideo):
            decode_clip(video[: int(len(video) * share)], CLIP)


def test_sound_alone_is_rejected():
    import io

    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(RejectedVideo, match="no_video"):
        decode_clip(out.getvalue(), CLIP)
