"""The training sample stream as a pure function of the sample index. No Ray, no state.

Sample index p selects clip permutation(seed, epoch)[p mod N] of epoch p div N. Step s with global batch size G takes
the sample indices [s*G, (s+1)*G) for any world size; rank r of W takes the r-th of W nearly equal slices. Augmentation
is drawn from (seed, p). The stream therefore does not depend on batch size, world size or interruptions.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from giffy_ray.config import AugmentConfig, DataConfig
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.transforms import AugmentationDraws, augment_clip, choose_segment, normalize_times

# Second word of the Philox key. Shuffling uses the epoch there, so the streams never collide.
_AUGMENTATION_STREAM = 2**64 - 1


def shuffled_indices(sample_indices: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    """Maps sample indices to dataset indices. Each epoch visits every element of `indices` once, in a random order.

    Args:
        sample_indices: int64 [n].
        indices: int64, the dataset indices to shuffle.
        seed: Seed of the order.

    Returns:
        int64 [n]: dataset indices.
    """
    epochs, offsets = np.divmod(sample_indices, len(indices))
    shuffled = np.empty(len(sample_indices), dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        shuffled[in_epoch] = indices[_permutation(seed, int(epoch), len(indices))[offsets[in_epoch]]]
    return shuffled


@functools.lru_cache(maxsize=2)  # a batch may span two epochs; the permutation of a million clips takes 8 MB
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def subsample_split(dataset: ClipDataset, split: str, max_clips: int, seed: int = 0) -> np.ndarray:
    """Selects up to `max_clips` clips of a split: those whose IDs have the smallest hashes with the seed.

    The selection is stable: a clip added to the dataset replaces at most one of the selected clips.

    Returns:
        int64: dataset indices in ascending order.
    """
    indices = dataset.split_indices(split)
    if len(indices) <= max_clips:
        return indices
    ids, key = dataset.ids, seed.to_bytes(8, "little")
    hashes = [hashlib.blake2b(ids[index].encode(), key=key, digest_size=8).digest() for index in indices.tolist()]
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    return indices[np.sort(order[:max_clips])]


def rank_indices(step: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Returns the sample indices of one rank in one step, int64. The counts of the ranks differ by at most one."""
    first = rank * global_batch_size // world_size
    end = (rank + 1) * global_batch_size // world_size
    return step * global_batch_size + np.arange(first, end)


class TrainingSampler:
    """Loads and augments the samples of the training split.

    Args:
        dataset: Source of the clips.
        data: Segments and augmentation.
        seed: Seed of the order and of the augmentation.
    """

    def __init__(self, dataset: ClipDataset, data: DataConfig, seed: int):
        self.dataset, self.seed = dataset, seed
        self.indices = dataset.split_indices("training")
        self.segments, self.augment = data.segments, data.augment
        self.frames = data.segments.frames or dataset.clip.frames

    def __call__(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples with `sample_indices`, int64 [n].

        Returns:
            Clips, uint8 [n, frames, height, width, 3], and frame times, float32 [n, frames], from 0 at the start to 1
            at the end.
        """
        indices, clip = shuffled_indices(sample_indices, self.indices, self.seed), self.dataset.clip
        times = np.tile(np.linspace(0, 1, self.frames, dtype=np.float32), (len(indices), 1))
        if not self.segments.frames and self.augment == AugmentConfig():
            return self.dataset.get_clips(indices), times
        clips = np.empty((len(indices), self.frames, clip.height, clip.width, 3), np.uint8)
        for row, (index, sample_index) in enumerate(zip(indices, sample_indices, strict=True)):
            draws = self._draw(int(sample_index))
            if self.segments.frames:
                frames, times_s = self.dataset.get_frames(int(index))
                chosen = choose_segment(times_s, self.segments, draws.segment)
                frames, times[row] = frames[chosen], normalize_times(times_s[chosen])
            else:
                frames = self.dataset.get_clips(indices[row : row + 1])[0]
            clips[row] = augment_clip(frames, times[row], self.augment, draws)
            if self.augment.reverse and draws.reverse < 0.5:
                times[row] = 1 - times[row, ::-1]
        return clips, times

    def _draw(self, sample_index: int) -> AugmentationDraws:
        # Philox advances the first word of its counter with every draw, so the second word separates the samples.
        key = np.asarray([self.seed, _AUGMENTATION_STREAM], np.uint64)
        counter = np.asarray([0, sample_index, 0, 0], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return AugmentationDraws.from_uniform(generator.random(AugmentationDraws.count(self.frames)))
