import io

import av
import numpy as np
import pytest
from PIL import Image

from giffy_ray.core import media


def level_clips(levels: list[int], clips: int = 2) -> np.ndarray:
    frames = np.asarray(levels, np.uint8)[None, :, None, None, None]
    return np.broadcast_to(frames, (clips, len(levels), 16, 16, 3)).copy()


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_plays_every_frame_at_its_rate(kind):
    rows = {"real": level_clips([0, 60, 120, 180, 240]), "made": level_clips([240, 180, 120, 60, 0])}
    image = Image.open(io.BytesIO(media.animation(rows, fps=10, kind=kind)))
    assert image.n_frames == 5
    for frame in range(5):
        image.seek(frame)
        pixels = np.asarray(image.convert("RGB")).astype(int)
        height, width = pixels.shape[:2]
        # The last clip of each row, well inside it: the upper row counts up, the lower one down.
        upper, lower = pixels[14 + 64, width - 30].mean(), pixels[height - 30, width - 30].mean()
        assert (upper, lower) == pytest.approx((60 * frame, 240 - 60 * frame), abs=6)
        image.load()
        assert image.info["duration"] == (100 if frame < 4 else 800)
    assert image.info["loop"] == 0


@pytest.mark.parametrize("fps", [10, 7.5])
def test_an_mp4_plays_every_frame_at_its_rate_and_rests_on_the_last(fps: float):
    rows = {"real": level_clips([0, 60, 120, 180, 240], clips=1), "odd": level_clips([240, 180, 120, 60, 0], clips=1)}
    with av.open(io.BytesIO(media.animation(rows, fps, "mp4"))) as video:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
        assert float(video.streams.video[0].average_rate or 0) == pytest.approx(fps)
    still = Image.open(io.BytesIO(media.animation(rows, fps, "webp"))).size
    assert frames[0].shape[:2] == (still[1] + still[1] % 2, still[0] + still[0] % 2)
    assert still[0] % 2 or still[1] % 2  # H.264 wants even sizes, and this is none
    assert len(frames) == 5 + round(0.7 * fps)
    for number, frame in enumerate(frames):
        level = 60 * min(number, 4)
        seen = frame[14 + 64, -50].mean(), frame[14 + 131 + 64, -50].mean()
        assert seen == pytest.approx((level, 240 - level), abs=6)


def test_a_contact_sheet_shows_eight_moments_from_first_to_last():
    clip = level_clips(list(range(0, 240, 8)), clips=1)[0]  # 30 frames
    sheet = Image.open(io.BytesIO(media.contact_sheet([("one", {"real": clip, "made": 255 - clip})], fps=10)))
    pixels = np.asarray(sheet.convert("RGB")).astype(int)
    moments = np.linspace(0, 29, 8).round().astype(int)
    width = pixels.shape[1]
    row = pixels[28 + 28 + 64]  # through the middle of the upper row
    seen = [int(row[width - 14 - 64 - (7 - column) * 131].mean()) for column in range(8)]
    assert seen == (moments * 8).tolist()


def test_many_methods_are_shown_smaller_and_all_of_them():
    levels = [20 * row for row in range(12)]
    clips = {f"method {level}": level_clips([level] * 3, clips=1)[0] for level in levels}
    sheet = Image.open(io.BytesIO(media.contact_sheet([("one", clips)], fps=10)))
    pixels = np.asarray(sheet.convert("RGB")).astype(int)
    side, gap = 960 // 12, 3
    column = pixels[:, pixels.shape[1] - 14 - side // 2].mean(1)  # through the last column of pictures
    assert [round(column[28 + 28 + row * (side + gap) + side // 2]) for row in range(12)] == levels
    assert sheet.height == 28 + 28 + 12 * (side + gap) + 14
