"""The sample stream is a function of position; Ray Data's part in it is in tests/data/test_loader.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giffy_ray.config import AugmentConfig, ClipConfig, DataConfig, SegmentsConfig
from giffy_ray.data.sampler import TrainingSampler, rank_indices, sample_rows, shuffled_indices
from giffy_ray.data.transforms import augment_clip, choose_segment

ROWS = np.asarray([3, 5, 8, 9, 12, 40, 41])


def test_each_epoch_holds_every_row_once():
    dealt = shuffled_indices(np.arange(5 * len(ROWS)), ROWS, seed=1).reshape(5, -1)
    assert all(sorted(epoch) == ROWS.tolist() for epoch in dealt.tolist())
    assert len({tuple(epoch) for epoch in dealt.tolist()}) > 1


def test_a_position_is_the_same_clip_wherever_one_starts():
    positions = np.arange(50)
    whole = shuffled_indices(positions, ROWS, seed=1)
    assert [int(shuffled_indices(np.asarray([p]), ROWS, seed=1)[0]) for p in positions] == whole.tolist()
    assert shuffled_indices(positions, ROWS, seed=2).tolist() != whole.tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_workers_share_a_step_without_gap_or_overlap(workers: int):
    for step in (0, 7):
        shares = [rank_indices(step, 6, rank, workers) for rank in range(workers)]
        assert np.concatenate(shares).tolist() == list(range(6 * step, 6 * step + 6))
        assert {len(share) for share in shares} == {6 // workers}


class FakeStore:
    """Each clip names its row, frame, line and column in its channels."""

    clip = ClipConfig(frames=6, fps=10, height=8, width=8)
    source_frames = 31

    def split_indices(self, split: str) -> np.ndarray:
        return ROWS

    def frames_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        frames = np.zeros((self.source_frames, 8, 8, 3), np.uint8)
        frames[..., 0] = row
        frames[..., 1] = np.arange(self.source_frames)[:, None, None]
        frames[..., 2] = 8 * np.arange(8)[:, None] + np.arange(8)
        return frames, np.arange(self.source_frames) / 10

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.frames_of(int(row))[0][:6] for row in rows])


def dealt(positions: np.ndarray, seed: int = 0, **fields) -> tuple[np.ndarray, np.ndarray]:
    return TrainingSampler(FakeStore(), DataConfig(**fields), seed)(positions)  # type: ignore[arg-type]


EVERYTHING = {
    "augment": AugmentConfig(flip=True, reverse=True, crop=0.5, pan=0.5),
    "segments": SegmentsConfig(frames=5, shortest_s=0.4, frame_times="jittered"),
}


def test_without_augmentation_a_clip_is_what_the_store_holds():
    clips, times = dealt(np.arange(7))
    assert clips[:, 0, 0, 0, 0].tolist() == shuffled_indices(np.arange(7), ROWS, 0).tolist()
    assert clips[:, :, 0, 0, 1].tolist() == [list(range(6))] * 7
    assert np.allclose(times, np.arange(6) / 5)
    assert times.dtype == np.float32


@settings(deadline=None)  # the first of them imports torch
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(0, 2**31))
def test_what_is_done_to_a_clip_depends_on_seed_and_position_alone(positions: list[int], seed: int):
    together = dealt(np.asarray(positions), seed, **EVERYTHING)
    for place, position in enumerate(positions):
        alone = dealt(np.asarray([position]), seed, **EVERYTHING)
        assert np.array_equal(together[0][place], alone[0][0])
        assert np.array_equal(together[1][place], alone[1][0])


def test_half_of_the_clips_are_mirrored_and_half_are_reversed_independently():
    clips, times = dealt(np.arange(4000), augment=AugmentConfig(flip=True, reverse=True))
    mirrored = clips[:, 0, 0, 0, 2] == 7
    backwards = clips[:, 0, 0, 0, 1] == 5
    # A fair coin thrown 4,000 times: 2,000 +- 32, and both at once 1,000 +- 27.
    assert abs(mirrored.sum() - 2000) < 4 * 32
    assert abs(backwards.sum() - 2000) < 4 * 32
    assert abs((mirrored & backwards).sum() - 1000) < 4 * 27
    assert np.array_equal(clips[mirrored][:, :, 0, :, 2], np.broadcast_to(np.arange(7, -1, -1), (mirrored.sum(), 6, 8)))
    assert np.array_equal(clips[backwards][:, :, 0, 0, 1], np.broadcast_to(np.arange(5, -1, -1), (backwards.sum(), 6)))
    assert np.allclose(times, np.arange(6) / 5)  # evenly spaced times stay what they are
    other, _ = dealt(np.arange(4000), seed=1, augment=AugmentConfig(flip=True))
    assert ((other[:, 0, 0, 0, 2] == 7) != mirrored).any()


def ramps() -> np.ndarray:
    """Three frames of 32x32: red rises by 4 a line, green by 4 a column."""
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[..., 0], frames[..., 1] = 4 * np.arange(32)[:, None], 4 * np.arange(32)
    return frames


TIMES = np.asarray([0, 0.25, 1])


def test_a_crop_is_a_window_of_the_picture_alike_in_all_frames():
    augment = AugmentConfig(crop=0.5)
    # A size draw of 1 cuts half. Its middle may be from 8 to 24 of 32: a draw of 0.5 is 16, one of 0.25 is 12.
    draws = np.zeros(13)
    draws[2:5] = 1, 0.5, 0.25
    cropped = augment_clip(ramps(), TIMES, augment, draws)
    assert cropped.shape == (3, 32, 32, 3)
    assert np.array_equal(cropped[0], cropped[2])
    # Line i of the result shows the middle of line 4 + (i + 0.5) / 2 - 0.5.
    lines, columns = (4 * (first + (np.arange(32) + 0.5) / 2 - 0.5) for first in (4, 8))
    assert np.abs(cropped[0, :, 5, 0] - lines).max() <= 0.5
    assert np.abs(cropped[0, 5, :, 1] - columns).max() <= 0.5
    assert np.array_equal(augment_clip(ramps(), TIMES, augment, np.zeros(13)), ramps())  # a size draw of 0 cuts nothing


def test_a_pan_moves_the_window_evenly_in_time():
    draws = np.zeros(13)
    draws[2:5] = 1, 0, 0.5  # half the picture, at the left, in the middle of the height
    draws[7:11] = 1, 1, 1, 0.5  # all the way to the right
    for pan in (1.0, 0.5):
        panned = augment_clip(ramps(), TIMES, AugmentConfig(crop=0.5, pan=pan), draws)
        lefts = [pan * 16 * time for time in TIMES]
        for frame, left in zip(panned, lefts, strict=True):
            columns = 4 * np.clip(left + (np.arange(32) + 0.5) / 2 - 0.5, 0, 31)
            assert np.abs(frame[5, :, 1] - columns).max() <= 0.5
            assert np.array_equal(frame[:, :, 0], panned[0][:, :, 0])  # nothing moves up or down
    still = augment_clip(ramps(), TIMES, AugmentConfig(crop=0.5, pan=1), np.where(np.arange(13) == 7, 0, draws))
    assert np.array_equal(still[0], still[2])


def test_brightness_is_one_factor_for_all_values_of_a_clip():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    for draw in (0.0, 0.3, 0.9):
        lit = augment_clip(frames, TIMES, AugmentConfig(brightness=0.4), np.asarray([0, 0, 0, 0, 0, draw]))
        factor = 0.6 + 0.8 * draw
        assert np.array_equal(lit, np.minimum(np.round(frames * factor), 255))


def test_colours_change_places_in_every_way():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    seen = [
        augment_clip(frames, TIMES, AugmentConfig(permute_channels=True), np.asarray([0] * 6 + [(place + 0.5) / 6]))
        for place in range(6)
    ]
    assert len({one.tobytes() for one in seen}) == 6
    for one in seen:
        assert np.array_equal(np.sort(one, axis=-1), np.sort(frames, axis=-1))
    assert np.array_equal(seen[-1], frames[..., ::-1])


def test_intervals_are_anywhere_in_the_video_and_of_every_length():
    clips, times = dealt(np.arange(3000), segments=SegmentsConfig(frames=5, shortest_s=0.5))
    frames = clips[:, :, 0, 0, 1].astype(int)
    first, last = frames[:, 0], frames[:, -1]
    assert (np.diff(frames, axis=1) > 0).all()
    assert first.min() == 0
    assert last.max() == 30
    assert (last - first).min() == 5
    assert (last - first).max() == 30
    # Uniform between 0.5 and 3 s: mean 1.75, standard error 0.72 / sqrt(3000) = 0.013.
    assert np.mean(last - first) / 10 == pytest.approx(1.75, abs=4 * 0.013)
    assert np.allclose(times, (frames - first[:, None]) / (last - first)[:, None], atol=1e-6)
    even = np.round(first[:, None] + np.linspace(0, 1, 5) * (last - first)[:, None])
    assert np.abs(frames - even).max() <= 1


def test_random_moments_are_in_order_and_everywhere_between():
    intervals = SegmentsConfig(frames=3, shortest_s=3, frame_times="jittered")
    clips, times = dealt(np.arange(3000), segments=intervals, augment=AugmentConfig(reverse=True))
    frames = clips[:, :, 0, 0, 1].astype(int)
    assert {tuple(ends) for ends in frames[:, [0, 2]].tolist()} == {(0, 30), (30, 0)}
    middle = np.bincount(np.minimum(frames[:, 1], 30), minlength=31)
    assert middle[1:30].min() > 50  # 100 each of 3,000
    backwards = frames[:, 0] == 30
    assert np.allclose(times[~backwards, 1], frames[~backwards, 1] / 30)
    assert np.allclose(times[backwards, 1], 1 - frames[backwards, 1] / 30, atol=1e-6)


def test_a_video_shorter_than_the_shortest_interval_is_dealt_whole():
    times_s = np.asarray([0, 0.1, 0.3])
    for draws in (np.zeros(9), np.full(9, 0.99)):
        assert choose_segment(times_s, SegmentsConfig(frames=2), draws).tolist() == [0, 2]
        assert choose_segment(times_s, SegmentsConfig(frames=5), draws).tolist() == [0, 1, 1, 2, 2]


class Ids:
    """Stands for a store whose validation clips have these ids."""

    def __init__(self, ids: list[str]):
        self.ids = sorted(ids)

    def split_indices(self, split: str) -> np.ndarray:
        return np.arange(len(self.ids))

    def sampled(self, most: int, seed: int = 0) -> list[str]:
        rows = sample_rows(self, "validation", most, seed)  # type: ignore[arg-type]
        assert (np.diff(rows) > 0).all()
        return [self.ids[row] for row in rows]


def test_a_sample_of_a_split_is_all_of_it_where_it_has_no_more():
    clips = Ids([f"{clip}.mp4" for clip in range(20)])
    assert clips.sampled(20) == clips.sampled(21) == clips.ids
    assert len(clips.sampled(19)) == 19


def test_a_sample_follows_from_the_seed_and_the_ids_and_keeps_its_clips_when_others_are_added():
    ids = [f"skiing/{clip}.mp4" for clip in range(300)]
    before = Ids(ids).sampled(100)
    assert before == Ids(ids[::-1]).sampled(100)
    assert before != Ids(ids).sampled(100, seed=1)
    assert set(Ids(ids).sampled(50)) < set(before)
    after = Ids([*ids, *(f"baking/{clip}.mp4" for clip in range(100))]).sampled(100)
    kept = set(before) & set(after)
    # 100 of 400 instead of 100 of 300: three quarters stay, and only the new ones are new.
    assert 55 <= len(kept) <= 92
    assert all(clip.startswith("baking/") for clip in set(after) - kept)
