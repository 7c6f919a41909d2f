"""The sample stream is a pure function of the sample index. tests/data/test_loader.py tests its use by Ray Data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giffy_ray.config import AugmentConfig, ClipConfig, DataConfig, SegmentsConfig
from giffy_ray.data.sampler import TrainingSampler, rank_indices, shuffled_indices, subsample_split
from giffy_ray.data.transforms import AugmentationDraws, augment_clip, choose_segment

INDICES = np.asarray([3, 5, 8, 9, 12, 40, 41])


def test_each_epoch_visits_every_index_once():
    shuffled = shuffled_indices(np.arange(5 * len(INDICES)), INDICES, seed=1).reshape(5, -1)
    assert all(sorted(epoch) == INDICES.tolist() for epoch in shuffled.tolist())
    assert len({tuple(epoch) for epoch in shuffled.tolist()}) > 1


def test_sample_index_selects_the_same_clip_in_any_batch():
    sample_indices = np.arange(50)
    together = shuffled_indices(sample_indices, INDICES, seed=1)
    alone = [int(shuffled_indices(np.asarray([index]), INDICES, seed=1)[0]) for index in sample_indices]
    assert alone == together.tolist()
    assert shuffled_indices(sample_indices, INDICES, seed=2).tolist() != together.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_split_a_step_without_gap_or_overlap(world_size: int):
    for step in (0, 7):
        slices = [rank_indices(step, 6, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(slices).tolist() == list(range(6 * step, 6 * step + 6))
        assert {len(rank_slice) for rank_slice in slices} == {6 // world_size}


class FakeDataset:
    """Clips whose channels encode the dataset index, the frame, and the line and column."""

    clip = ClipConfig(frames=6, fps=10, height=8, width=8)
    source_frames = 31

    def split_indices(self, split: str) -> np.ndarray:
        return INDICES

    def get_frames(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        frames = np.zeros((self.source_frames, 8, 8, 3), np.uint8)
        frames[..., 0] = index
        frames[..., 1] = np.arange(self.source_frames)[:, None, None]
        frames[..., 2] = 8 * np.arange(8)[:, None] + np.arange(8)
        return frames, np.arange(self.source_frames) / 10

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.get_frames(int(index))[0][:6] for index in indices])


def load_samples(sample_indices: np.ndarray, seed: int = 0, **fields) -> tuple[np.ndarray, np.ndarray]:
    return TrainingSampler(FakeDataset(), DataConfig(**fields), seed)(sample_indices)  # type: ignore[arg-type]


ALL_AUGMENTATION = {
    "augment": AugmentConfig(flip=True, reverse=True, crop=0.5, pan=0.5),
    "segments": SegmentsConfig(frames=5, shortest_s=0.4, frame_times="jittered"),
}


def test_sampler_returns_dataset_clips_without_augmentation():
    clips, times = load_samples(np.arange(7))
    assert clips[:, 0, 0, 0, 0].tolist() == shuffled_indices(np.arange(7), INDICES, 0).tolist()
    assert clips[:, :, 0, 0, 1].tolist() == [list(range(6))] * 7
    assert np.allclose(times, np.arange(6) / 5)
    assert times.dtype == np.float32


@settings(deadline=None)  # the first example imports torch
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(0, 2**31))
def test_sample_depends_on_seed_and_sample_index_alone(sample_indices: list[int], seed: int):
    clips, times = load_samples(np.asarray(sample_indices), seed, **ALL_AUGMENTATION)
    for row, sample_index in enumerate(sample_indices):
        clips_alone, times_alone = load_samples(np.asarray([sample_index]), seed, **ALL_AUGMENTATION)
        assert np.array_equal(clips[row], clips_alone[0])
        assert np.array_equal(times[row], times_alone[0])


def test_flip_and_reverse_each_apply_to_half_of_the_clips_independently():
    clips, times = load_samples(np.arange(4000), augment=AugmentConfig(flip=True, reverse=True))
    is_flipped = clips[:, 0, 0, 0, 2] == 7
    is_reversed = clips[:, 0, 0, 0, 1] == 5
    # 4,000 fair coin tosses: 2,000 +- 32, and both at once 1,000 +- 27.
    assert abs(is_flipped.sum() - 2000) < 4 * 32
    assert abs(is_reversed.sum() - 2000) < 4 * 32
    assert abs((is_flipped & is_reversed).sum() - 1000) < 4 * 27
    flipped, backwards = clips[is_flipped], clips[is_reversed]
    assert np.array_equal(flipped[:, :, 0, :, 2], np.broadcast_to(np.arange(7, -1, -1), (len(flipped), 6, 8)))
    assert np.array_equal(backwards[:, :, 0, 0, 1], np.broadcast_to(np.arange(5, -1, -1), (len(backwards), 6)))
    assert np.allclose(times, np.arange(6) / 5)  # reversing evenly spaced times does not change them
    other_seed, _ = load_samples(np.arange(4000), seed=1, augment=AugmentConfig(flip=True))
    assert ((other_seed[:, 0, 0, 0, 2] == 7) != is_flipped).any()


def gradient_frames() -> np.ndarray:
    """Three frames of 32x32: red rises by 4 per line, green by 4 per column."""
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[..., 0], frames[..., 1] = 4 * np.arange(32)[:, None], 4 * np.arange(32)
    return frames


TIMES = np.asarray([0, 0.25, 1])
ZERO_DRAWS = AugmentationDraws.from_uniform(np.zeros(13))


def test_draws_split_the_random_numbers_in_a_fixed_order():
    """The order defines the sample stream: changing it changes every training."""
    numbers = np.arange(AugmentationDraws.count(4))
    draws = AugmentationDraws.from_uniform(numbers)
    assert np.concatenate([np.atleast_1d(field) for field in draws]).tolist() == numbers.tolist()
    assert [np.size(field) for field in draws] == [1, 1, 3, 1, 1, 1, 3, 6]


def test_crop_is_the_same_window_in_all_frames():
    augment = AugmentConfig(crop=0.5)
    # A size draw of 1 crops to half. The centre may be from 8 to 24 of 32: a draw of 0.5 is 16, one of 0.25 is 12.
    draws = ZERO_DRAWS._replace(crop=np.asarray([1, 0.5, 0.25]))
    cropped = augment_clip(gradient_frames(), TIMES, augment, draws)
    assert cropped.shape == (3, 32, 32, 3)
    assert np.array_equal(cropped[0], cropped[2])
    # Line i of the result shows the middle of line 4 + (i + 0.5) / 2 - 0.5.
    lines, columns = (4 * (first + (np.arange(32) + 0.5) / 2 - 0.5) for first in (4, 8))
    assert np.abs(cropped[0, :, 5, 0] - lines).max() <= 0.5
    assert np.abs(cropped[0, 5, :, 1] - columns).max() <= 0.5
    uncropped = augment_clip(gradient_frames(), TIMES, augment, ZERO_DRAWS)  # a size draw of 0 crops nothing
    assert np.array_equal(uncropped, gradient_frames())


def test_pan_moves_the_window_evenly_in_time():
    draws = ZERO_DRAWS._replace(
        crop=np.asarray([1, 0, 0.5]),  # half the frame, at the left, at half the height
        pan=np.float64(1),
        pan_crop=np.asarray([1, 1, 0.5]),  # all the way to the right
    )
    for pan in (1.0, 0.5):
        panned = augment_clip(gradient_frames(), TIMES, AugmentConfig(crop=0.5, pan=pan), draws)
        lefts = [pan * 16 * time for time in TIMES]
        for frame, left in zip(panned, lefts, strict=True):
            columns = 4 * np.clip(left + (np.arange(32) + 0.5) / 2 - 0.5, 0, 31)
            assert np.abs(frame[5, :, 1] - columns).max() <= 0.5
            assert np.array_equal(frame[:, :, 0], panned[0][:, :, 0])  # no vertical motion
    without_distance = draws._replace(pan=np.float64(0))
    still = augment_clip(gradient_frames(), TIMES, AugmentConfig(crop=0.5, pan=1), without_distance)
    assert np.array_equal(still[0], still[2])


def test_brightness_scales_all_values_of_a_clip_by_one_factor():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    for draw in (0.0, 0.3, 0.9):
        draws = ZERO_DRAWS._replace(brightness=np.float64(draw))
        scaled = augment_clip(frames, TIMES, AugmentConfig(brightness=0.4), draws)
        factor = 0.6 + 0.8 * draw
        assert np.array_equal(scaled, np.minimum(np.round(frames * factor), 255))


def test_channel_permutation_reaches_all_six_orders():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    permuted = []
    for order in range(6):
        draws = ZERO_DRAWS._replace(channel_order=np.float64((order + 0.5) / 6))
        permuted.append(augment_clip(frames, TIMES, AugmentConfig(permute_channels=True), draws))
    assert len({clip.tobytes() for clip in permuted}) == 6
    for clip in permuted:
        assert np.array_equal(np.sort(clip, axis=-1), np.sort(frames, axis=-1))
    assert np.array_equal(permuted[-1], frames[..., ::-1])


def test_segments_have_every_length_and_start():
    clips, times = load_samples(np.arange(3000), segments=SegmentsConfig(frames=5, shortest_s=0.5))
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
    evenly_spaced = np.round(first[:, None] + np.linspace(0, 1, 5) * (last - first)[:, None])
    assert np.abs(frames - evenly_spaced).max() <= 1


def test_jittered_frame_times_are_ordered_and_cover_the_segment():
    segments = SegmentsConfig(frames=3, shortest_s=3, frame_times="jittered")
    clips, times = load_samples(np.arange(3000), segments=segments, augment=AugmentConfig(reverse=True))
    frames = clips[:, :, 0, 0, 1].astype(int)
    assert {tuple(start_and_end) for start_and_end in frames[:, [0, 2]].tolist()} == {(0, 30), (30, 0)}
    middle = np.bincount(np.minimum(frames[:, 1], 30), minlength=31)
    assert middle[1:30].min() > 50  # of 3,000; the mean is 100
    is_reversed = frames[:, 0] == 30
    assert np.allclose(times[~is_reversed, 1], frames[~is_reversed, 1] / 30)
    assert np.allclose(times[is_reversed, 1], 1 - frames[is_reversed, 1] / 30, atol=1e-6)


def test_video_shorter_than_the_shortest_segment_is_used_whole():
    times_s = np.asarray([0, 0.1, 0.3])
    for draws in (np.zeros(9), np.full(9, 0.99)):
        assert choose_segment(times_s, SegmentsConfig(frames=2), draws).tolist() == [0, 2]
        assert choose_segment(times_s, SegmentsConfig(frames=5), draws).tolist() == [0, 1, 1, 2, 2]


class FakeSplit:
    """A dataset whose validation clips have these IDs."""

    def __init__(self, ids: list[str]):
        self.ids = sorted(ids)

    def split_indices(self, split: str) -> np.ndarray:
        return np.arange(len(self.ids))

    def subsample(self, max_clips: int, seed: int = 0) -> list[str]:
        indices = subsample_split(self, "validation", max_clips, seed)  # type: ignore[arg-type]
        assert (np.diff(indices) > 0).all()
        return [self.ids[index] for index in indices]


def test_subsample_of_a_small_split_is_the_whole_split():
    split = FakeSplit([f"{clip}.mp4" for clip in range(20)])
    assert split.subsample(20) == split.subsample(21) == split.ids
    assert len(split.subsample(19)) == 19


def test_subsample_depends_on_seed_and_ids_and_is_stable_when_clips_are_added():
    ids = [f"skiing/{clip}.mp4" for clip in range(300)]
    before = FakeSplit(ids).subsample(100)
    assert before == FakeSplit(ids[::-1]).subsample(100)
    assert before != FakeSplit(ids).subsample(100, seed=1)
    assert set(FakeSplit(ids).subsample(50)) < set(before)
    after = FakeSplit([*ids, *(f"baking/{clip}.mp4" for clip in range(100))]).subsample(100)
    unchanged = set(before) & set(after)
    # 100 of 400 instead of 100 of 300: three quarters stay, and only added clips replace the others.
    assert 55 <= len(unchanged) <= 92
    assert all(clip.startswith("baking/") for clip in set(after) - unchanged)
