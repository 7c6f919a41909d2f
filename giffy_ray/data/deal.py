"""The sample stream as a function of position: which clip, and what is done to it. No Ray, no state.

Position p is clip permutation(seed, epoch)[p mod N] of epoch p div N. Step s of a run with global batch G is positions
[s*G, (s+1)*G), whatever the number of workers; rank r of W takes the r-th of W equal slices. Flips, crops and
intervals are drawn from (seed, position), so batches, workers and interruptions change nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

import numpy as np

from giffy_ray.config import AugmentConfig, DataConfig, IntervalsConfig
from giffy_ray.data.store import Store

_AUGMENT = 2**64 - 1  # where an epoch's number stands in the keys of permutations
# Flip, reverse, crop: size and place, brightness, colours; pan: how far, size and place; interval: length and start.
_DRAWS, _PAN, _INTERVAL = 13, 7, 11
_COLOURS = list(itertools.permutations(range(3)))


def rows_at(positions: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
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


def sample_rows(store: Store, split: str, most: int, seed: int = 0) -> np.ndarray:
    """int64: the rows of a split, in order, or of `most` of them: those whose ids have the smallest hash with the seed.

    So each clip that is added takes the place of at most one other.
    """
    rows = store.rows_of(split)
    if len(rows) <= most:
        return rows
    ids, key = store.ids, seed.to_bytes(8, "little")
    hashes = [hashlib.blake2b(ids[row].encode(), key=key, digest_size=8).digest() for row in rows.tolist()]
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    return rows[np.sort(order[:most])]


def slice_of(step: int, batch: int, rank: int, workers: int) -> np.ndarray:
    """int64: the positions that rank `rank` of `workers` takes in a step of `batch` clips over all workers.

    As even as can be: shares differ by one clip at most.
    """
    return step * batch + np.arange(rank * batch // workers, (rank + 1) * batch // workers)


class Dealer:
    """Positions of the training split -> clips, uint8 [n, frames, height, width, 3], and times, float32 [n, frames]:
    when each frame is shown, from 0 at the start to 1 at the end.
    """

    def __init__(self, store: Store, data: DataConfig, seed: int):
        self.store, self.rows, self.seed = store, store.rows_of("training"), seed
        self.intervals, self.augment = data.intervals, data.augment
        self.frames = data.intervals.frames or store.clip.frames

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, clip = rows_at(positions, self.rows, self.seed), self.store.clip
        times = np.tile(np.linspace(0, 1, self.frames, dtype=np.float32), (len(rows), 1))
        if not self.intervals.frames and self.augment == AugmentConfig():
            return self.store.gather(rows), times
        clips = np.empty((len(rows), self.frames, clip.height, clip.width, 3), np.uint8)
        for place, (row, position) in enumerate(zip(rows, positions, strict=True)):
            draws = self._draws(int(position))
            if self.intervals.frames:
                frames, times_s = self.store.frames_of(int(row))
                chosen = interval_of(times_s, self.intervals, draws[_INTERVAL:])
                frames, times[place] = frames[chosen], _shares(times_s[chosen])
            else:
                frames = self.store.gather(rows[place : place + 1])[0]
            clips[place] = augmented(frames, times[place], self.augment, draws)
            if self.augment.reverse and draws[1] < 0.5:
                times[place] = 1 - times[place, ::-1]
        return clips, times

    def _draws(self, position: int) -> np.ndarray:
        # The first word of the counter counts draws.
        key, counter = np.asarray([self.seed, _AUGMENT], np.uint64), np.asarray([0, position, 0, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter)
        return np.random.Generator(bits).random(_DRAWS + self.frames)


def interval_of(times_s: np.ndarray, intervals: IntervalsConfig, draws: np.ndarray) -> np.ndarray:
    """int64 [intervals.frames]: the frames dealt of an interval of a video whose frames are shown at `times_s`.

    Its length is uniform between `shortest_s` and the whole video, then its start is uniform. Draws in [0, 1):
    length, start, and one for each frame, which `moments: random` takes.
    """
    span_s = times_s[-1]
    shortest_s = min(intervals.shortest_s, span_s)
    length_s = shortest_s + draws[0] * (span_s - shortest_s)
    start_s = draws[1] * (span_s - length_s)
    if intervals.moments == "even":
        shares = np.linspace(0, 1, intervals.frames)
    else:
        # Each frame between has a part of the interval to itself: in order, spread out, and anywhere in it.
        inner = intervals.frames - 2
        shares = np.concatenate([[0], (np.arange(inner) + draws[2 : 2 + inner]) / max(inner, 1), [1]])
    return np.abs(times_s[None, :] - (start_s + shares * length_s)[:, None]).argmin(axis=1)


def augmented(frames: np.ndarray, times: np.ndarray, augment: AugmentConfig, draws: np.ndarray) -> np.ndarray:
    """uint8 [time, height, width, 3], a view where it can be: all frames changed alike, as `augment` says.

    But for `pan`, which moves what is cut out evenly over `times`, float [time] from 0 to 1.
    """
    if augment.crop < 1:
        first = _window(augment.crop, draws[2:5])
        # Squared, so that most windows move little: most cameras do.
        pan = augment.pan * draws[_PAN] ** 2
        last = first + pan * (_window(augment.crop, draws[_PAN + 1 : _PAN + 4]) - first)
        frames = _cut_out(frames, first + times[:, None] * (last - first))
    if augment.flip and draws[0] < 0.5:
        frames = frames[:, :, ::-1]
    if augment.reverse and draws[1] < 0.5:
        frames = frames[::-1]
    if augment.brightness:
        gain = 1 + (2 * draws[5] - 1) * augment.brightness
        frames = np.minimum(np.round(np.arange(256) * gain), 255).astype(np.uint8)[frames]
    if augment.colours:
        frames = frames[..., _COLOURS[int(draws[6] * len(_COLOURS))]]
    return frames


def _window(smallest: float, draws: np.ndarray) -> np.ndarray:
    """A part of the picture: its share of height and width, and its middle as (x, y), where edges are at -1 and 1."""
    share = 1 - draws[0] * (1 - smallest)
    return np.asarray([share, *((2 * draws[1:3] - 1) * (1 - share))])


def _cut_out(frames: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Of each frame its window, [time, 3], as large as the whole frame; bilinear."""
    import torch  # the tasks that only decode do without it
    from torch.nn.functional import affine_grid, grid_sample

    share, x, y = torch.from_numpy(windows.astype(np.float32)).unbind(1)
    none = torch.zeros_like(share)
    affine = torch.stack([torch.stack([share, none, x], 1), torch.stack([none, share, y], 1)], 1)
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    grid = affine_grid(affine, list(planes.shape), align_corners=False)
    cut = grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return cut.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _shares(times_s: np.ndarray) -> np.ndarray:
    """Times of an interval from 0 at its first frame to 1 at its last."""
    span_s = times_s[-1] - times_s[0]
    return (times_s - times_s[0]) / span_s if span_s else np.linspace(0, 1, len(times_s))
