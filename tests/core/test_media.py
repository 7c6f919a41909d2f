"""Rendered media show the right frames, at the right time and in the right place."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from giffy_ray.core import media


def level_clips(levels: list[int], clips: int = 2) -> np.ndarray:
    """uint8 [clips, len(levels), 16, 16, 3]: frames of uniform grey levels."""
    frames = np.asarray(levels, np.uint8)[None, :, None, None, None]
    return np.broadcast_to(frames, (clips, len(levels), 16, 16, 3)).copy()


@pytest.mark.parametrize("file_format", ["gif", "webp"])
def test_animation_plays_every_frame_at_its_rate(file_format):
    rows = {"real": level_clips([0, 60, 120, 180, 240]), "generated": level_clips([240, 180, 120, 60, 0])}
    image = Image.open(io.BytesIO(media.render_animation(rows, fps=10, file_format=file_format)))
    assert image.n_frames == 5
    for frame in range(5):
        image.seek(frame)
        pixels = np.asarray(image.convert("RGB")).astype(int)
        height, width = pixels.shape[:2]
        # Inside the last clip of each row: the upper row counts up, the lower one down.
        upper, lower = pixels[14 + 64, width - 30].mean(), pixels[height - 30, width - 30].mean()
        assert (upper, lower) == pytest.approx((60 * frame, 240 - 60 * frame), abs=6)
        image.load()
        assert image.info["duration"] == (100 if frame < 4 else 800)
    assert image.info["loop"] == 0


@pytest.mark.parametrize("fps", [10, 7.5])
def test_mp4_plays_every_frame_at_its_rate_and_holds_the_last_one(fps: float):
    rows = {"real": level_clips([0, 60, 120, 180, 240], clips=1), "odd": level_clips([240, 180, 120, 60, 0], clips=1)}
    with av.open(io.BytesIO(media.render_animation(rows, fps, "mp4"))) as video:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
        assert float(video.streams.video[0].average_rate or 0) == pytest.approx(fps)
    webp_size = Image.open(io.BytesIO(media.render_animation(rows, fps, "webp"))).size
    assert frames[0].shape[:2] == (webp_size[1] + webp_size[1] % 2, webp_size[0] + webp_size[0] % 2)
    assert webp_size[0] % 2 or webp_size[1] % 2  # an odd size, which H.264 cannot encode
    assert len(frames) == 5 + round(0.7 * fps)
    for number, frame in enumerate(frames):
        level = 60 * min(number, 4)
        centre_levels = frame[14 + 64, -50].mean(), frame[14 + 131 + 64, -50].mean()
        assert centre_levels == pytest.approx((level, 240 - level), abs=6)


def test_contact_sheet_shows_eight_frames_from_first_to_last():
    clip = level_clips(list(range(0, 240, 8)), clips=1)[0]  # 30 frames
    sheet = Image.open(
        io.BytesIO(media.render_contact_sheet([("sample", {"real": clip, "generated": 255 - clip})], fps=10))
    )
    pixels = np.asarray(sheet.convert("RGB")).astype(int)
    frame_indices = np.linspace(0, 29, 8).round().astype(int)
    width = pixels.shape[1]
    row = pixels[28 + 28 + 64]  # through the middle of the upper row
    column_levels = [int(row[width - 14 - 64 - (7 - column) * 131].mean()) for column in range(8)]
    assert column_levels == (frame_indices * 8).tolist()


def test_contact_sheet_shrinks_frames_to_fit_many_methods():
    levels = [20 * row for row in range(12)]
    clips = {f"method {level}": level_clips([level] * 3, clips=1)[0] for level in levels}
    sheet = Image.open(io.BytesIO(media.render_contact_sheet([("sample", clips)], fps=10)))
    pixels = np.asarray(sheet.convert("RGB")).astype(int)
    side, gap = 960 // 12, 3
    column = pixels[:, pixels.shape[1] - 14 - side // 2].mean(1)  # through the last column of frames
    assert [round(column[28 + 28 + row * (side + gap) + side // 2]) for row in range(12)] == levels
    assert sheet.height == 28 + 28 + 12 * (side + gap) + 14
