"""The sample stream as a function of position: which clip, and what is done to it. No Ray, no state.

Position p is clip permutation(seed, epoch)[p mod N] of epoch p div N. Step s of a run with global batch G is positions
[s*G, (s+1)*G), whatever the number of workers; rank r of W takes the r-th of W equal slices. Flips, crops and
intervals are drawn from (seed, position), so batches, workers and interruptions change nothing.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from giffy_ray.config import AugmentConfig, DataConfig
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.transforms import _DRAWS, _INTERVAL, _shares, augment_clip, choose_segment

_AUGMENT = 2**64 - 1  # where an epoch's number stands in the keys of permutations


def shuffled_indices(positions: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """The store rows at positions of the sample stream over `rows`: each row once an epoch, in seeded order."""
    epochs, places = np.divmod(positions, len(rows))
    chosen = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = rows[_permutation(seed, int(epoch), len(rows))[places[here]]]
    return chosen


@functools.lru_cache(maxsize=2)  # a batch may take clips of two epochs, and a million clips take 8 MB
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def sample_rows(store: ClipDataset, split: str, most: int, seed: int = 0) -> np.ndarray:
    """int64: the rows of a split, in order, or of `most` of them: those whose ids have the smallest hash with the seed.

    So each clip that is added takes the place of at most one other.
    """
    rows = store.split_indices(split)
    if len(rows) <= most:
        return rows
    ids, key = store.ids, seed.to_bytes(8, "little")
    hashes = [hashlib.blake2b(ids[row].encode(), key=key, digest_size=8).digest() for row in rows.tolist()]
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    return rows[np.sort(order[:most])]


def rank_indices(step: int, batch: int, rank: int, workers: int) -> np.ndarray:
    """int64: the positions that rank `rank` of `workers` takes in a step of `batch` clips over all workers.

    As even as can be: shares differ by one clip at most.
    """
    return step * batch + np.arange(rank * batch // workers, (rank + 1) * batch // workers)


class TrainingSampler:
    """Positions of the training split -> clips, uint8 [n, frames, height, width, 3], and times, float32 [n, frames]:
    when each frame is shown, from 0 at the start to 1 at the end.
    """

    def __init__(self, store: ClipDataset, data: DataConfig, seed: int):
        self.store, self.rows, self.seed = store, store.split_indices("training"), seed
        self.segments, self.augment = data.segments, data.augment
        self.frames = data.segments.frames or store.clip.frames

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, clip = shuffled_indices(positions, self.rows, self.seed), self.store.clip
        times = np.tile(np.linspace(0, 1, self.frames, dtype=np.float32), (len(rows), 1))
        if not self.segments.frames and self.augment == AugmentConfig():
            return self.store.get_clips(rows), times
        clips = np.empty((len(rows), self.frames, clip.height, clip.width, 3), np.uint8)
        for place, (row, position) in enumerate(zip(rows, positions, strict=True)):
            draws = self._draws(int(position))
            if self.segments.frames:
                frames, times_s = self.store.frames_of(int(row))
                chosen = choose_segment(times_s, self.segments, draws[_INTERVAL:])
                frames, times[place] = frames[chosen], _shares(times_s[chosen])
            else:
                frames = self.store.get_clips(rows[place : place + 1])[0]
            clips[place] = augment_clip(frames, times[place], self.augment, draws)
            if self.augment.reverse and draws[1] < 0.5:
                times[place] = 1 - times[place, ::-1]
        return clips, times

    def _draws(self, position: int) -> np.ndarray:
        # The first word of the counter counts draws.
        key, counter = np.asarray([self.seed, _AUGMENT], np.uint64), np.asarray([0, position, 0, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter)
        return np.random.Generator(bits).random(_DRAWS + self.frames)
