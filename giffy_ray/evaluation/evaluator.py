"""Made against real, on clips that were held out: every method, every clip, every metric, by clip id, in memory."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from giffy_ray.config import ClipConfig
from giffy_ray.core import media
from giffy_ray.core.tensor_types import Clips, PerClip
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation import metrics
from giffy_ray.models.baselines import BASELINES
from giffy_ray.models.sampling import FromNoise, Method, generate_in_parts

BASELINE = "linear"  # what the others are measured against
REAL = "real"
ALL = "all"  # the categories together
BATCH = 16  # clips: what an actor of an evaluation is given at a time
_RESAMPLES = 1000
_MOST_INTERVALS = 8  # categories: where there are more, only all together get one, as it takes a quarter of a second
_BOUNDED = ("l2_paper", "psnr")  # whose means over all clips get an interval
_MEASURED = 2  # clips at a time: the memory of larger float64 copies costs more than what is computed from them

# Sees clips go by: the method's name, or REAL; rows of the store; their clips, uint8 [rows, time, height, width, 3]
Watch = Callable[[str, np.ndarray, np.ndarray], None]


class Measure(NamedTuple):
    """How a metric of `giffy_ray.evaluation.metrics` is shown."""

    label: str
    better: Literal["minimize", "maximize", "one", "none"]  # one: nearer to 1
    digits: int
    meaning: str


MEASURES = {
    "l2_paper": Measure("l2", "minimize", 0, "distance to the real clip, in the report's unit"),
    "psnr": Measure("PSNR dB", "maximize", 1, "of the frames between"),
    "ssim": Measure("SSIM", "maximize", 3, "of the frames between"),
    "motion_error": Measure("motion error", "minimize", 1, "of the changes from frame to frame, in grey levels"),
    "motion_ratio": Measure("motion ratio", "one", 2, "how much it moves, over how much the real clip does"),
    "sharpness_ratio": Measure("sharpness", "one", 2, "how sharp its frames are, over how sharp the real ones are"),
    "ends_error": Measure("ends error", "minimize", 1, "of the first and the last frame, in grey levels"),
    "diversity": Measure("diversity", "none", 1, "how far a clip's samples are from each other, in grey levels"),
}
_METRICS = {
    "l2_paper": metrics.l2_paper,
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
    "ends_error": metrics.ends_error,
    "motion_error": metrics.motion_error,
    "motion_ratio": metrics.motion_ratio,
    "sharpness_ratio": metrics.sharpness_ratio,
    "squared_error": metrics.squared_error,
}

# Mean and standard deviation of l2, as printed.
REPORT_TABLE_2 = {
    "interpolation": {"erupting": (62, 58), "skiing": (153, 89)},
    "CVAE": {"erupting": (180, 110), "skiing": (197, 80)},
    "CGAN": {"erupting": (223, 96)},
}
REPORT_NOTE = (
    "The report's Table 2 is not comparable with ours: its clips are others. Its unit is 0..255 over 100, which is our "
    "l2's, not 0..1 as its caption says. By its authors' code, red and blue were swapped in the clips of its CVAE and "
    "CGAN rows. Its CVAE for skiing is the advanced one."
)


@dataclass(frozen=True)
class Score:
    """One row of evaluation.csv: how one method did on one clip. Units are those of `giffy_ray.evaluation.metrics`."""

    method: str
    category: str
    clip_id: str
    l2_paper: float
    psnr: float
    ssim: float
    ends_error: float
    motion_error: float
    motion_ratio: float
    sharpness_ratio: float
    squared_error: float
    diversity: float | None  # of the samples that this clip is the best of
    source: str  # the video that the clip was cut from


def baseline_methods(names: Iterable[str], clip: ClipConfig) -> dict[str, list[Method]]:
    """The baselines of these names, linear interpolation always and first.

    Each is tried here, so that one that cannot make such clips is a ConfigError before anything else is done.
    """

    def method(name: str) -> Method:
        return lambda start, end, clip_ids: BASELINES[name](start, end, clip.frames)

    methods = {name: [method(name)] for name in dict.fromkeys([BASELINE, *names])}
    black = torch.zeros(1, clip.height, clip.width, 3, dtype=torch.uint8)
    for (make,) in methods.values():
        make(black, black, [""])
    return methods


def evaluate(
    methods: Mapping[str, Sequence[Method]],
    store: ClipDataset,
    rows: np.ndarray,
    sources: Sequence[str],
    watch: Watch = lambda name, rows, clips: None,
) -> list[Score]:
    """Scores every method on the clips of `rows`, one Score for each method and clip.

    Of several that share a name, the clip nearest to the real one is scored. `sources`: of each row of the store.
    """
    scores = []
    for first in range(0, len(rows), BATCH):
        scores += _score(methods, store, rows[first : first + BATCH], sources, watch)
    return scores


class Evaluated(NamedTuple):
    """What an evaluation of a batch of rows gives."""

    scores: list[Score]
    clips: list[tuple[str, np.ndarray, np.ndarray]]  # what a Watch is called with, of the rows that are watched
    sprites: dict[tuple[int, str], bytes]  # row and method, or REAL -> `render.sprite` of the clip


class Evaluator:
    """Rows of a store -> Evaluated: what each actor of an evaluation does, with `map_rows`.

    `watched`: the rows whose clips are given back; `drawn`: those whose sprites are.
    """

    def __init__(
        self, methods: Mapping[str, Sequence[Method]], store: ClipDataset, watched: Iterable[int], drawn: Iterable[int]
    ):
        self.methods, self.store = methods, store
        self.watched, self.drawn = np.asarray(sorted(watched), dtype=np.int64), frozenset(drawn)

    def __call__(self, rows: np.ndarray) -> Evaluated:
        done = Evaluated([], [], {})

        def watch(name: str, rows: np.ndarray, clips: np.ndarray) -> None:
            chosen = np.isin(rows, self.watched)
            if chosen.any():
                done.clips.append((name, rows[chosen], clips[chosen]))
            for row, clip in zip(rows.tolist(), clips, strict=True):
                if row in self.drawn:
                    done.sprites[row, name] = media.sprite(clip)

        done.scores.extend(_score(self.methods, self.store, rows, self.store.sources, watch))
        return done


def _score(
    methods: Mapping[str, Sequence[Method]], store: ClipDataset, rows: np.ndarray, sources: Sequence[str], watch: Watch
) -> list[Score]:
    scores = []
    real = torch.from_numpy(store.get_clips(rows))
    watch(REAL, rows, real.numpy())
    made_by = _make(methods, real, [store.ids[row] for row in rows])
    for name, several in methods.items():
        made, diversity = _best([made_by[method] for method in several], real)
        watch(name, rows, made.numpy())
        values = {metric: _each(of, made, real).tolist() for metric, of in _METRICS.items()}
        scores += [
            Score(
                name,
                store.categories[row],
                store.ids[row],
                **{metric: each[i] for metric, each in values.items()},
                diversity=diversity[i] if diversity else None,
                source=sources[int(row)],
            )
            for i, row in enumerate(rows)
        ]
    return scores


def _make(methods: Mapping[str, Sequence[Method]], real: Clips, clip_ids: list[str]) -> dict[Method, Clips]:
    """The clips of each distinct method: a sample is also among those that the best is chosen from.

    All samples of a learner are made together.
    """
    start, end = real[:, 0], real[:, -1]
    distinct = dict.fromkeys(method for several in methods.values() for method in several)
    of_learner: dict[int, list[FromNoise]] = defaultdict(list)
    for method in distinct:
        if isinstance(method, FromNoise):
            of_learner[id(method.learner)].append(method)
    made = {method: method(start, end, clip_ids) for method in distinct if not isinstance(method, FromNoise)}
    for several in of_learner.values():
        noise = torch.cat([method.noise(clip_ids) for method in several])
        starts, ends = (image.repeat(len(several), 1, 1, 1) for image in (start, end))
        clips = generate_in_parts(several[0].learner, starts, ends, noise)
        made |= zip(several, clips.split(len(clip_ids)), strict=True)
    return made


def _best(samples: Sequence[Clips], real: Clips) -> tuple[Clips, list[float] | None]:
    """Of each clip the sample nearest to `real`, and where there are several how far they are from each other."""
    if len(samples) == 1:
        return samples[0], None
    errors = torch.stack([_each(metrics.squared_error, made, real) for made in samples])
    stacked = torch.stack(list(samples), dim=1)
    return stacked[torch.arange(len(real)), errors.argmin(0)], _each(metrics.diversity, stacked).tolist()


def _each(metric: Callable[..., PerClip], *clips: Tensor) -> PerClip:
    parts = zip(*(tensor.split(_MEASURED) for tensor in clips), strict=True)
    return torch.cat([metric(*part) for part in parts])


@dataclass(frozen=True)
class Summary:
    """One row of a table: a method on a category."""

    category: str
    method: str
    clips: int
    spreads: dict[str, tuple[float, float]]  # of each metric mean and population standard deviation over the clips
    won: float | None  # share of clips with a smaller l2_paper than linear interpolation; none for itself
    # Against linear interpolation, and the ends of its 95 % interval by source, NaN where there is none.
    skill: tuple[float, float, float] | None
    # Of the means of `_BOUNDED`, the ends of their 95 % intervals by source; NaN where there is none.
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """By category, in order of their names, and method, in the order scored; then all categories together.

    Ratios to a real clip that stands still, or is flat, are infinite or undefined, and are left out of means.
    """
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.category):
        groups[score.category, score.method].append(score)
    if len({score.category for score in scores}) > 1:
        for score in scores:
            groups[ALL, score.method].append(score)
    baseline = {score.clip_id: score for score in scores if score.method == BASELINE}
    categories, last = len({category for category, _ in groups}), list(groups)[-1][0]
    summaries = []
    for (category, method), group in groups.items():
        values = {metric: [getattr(score, metric) for score in group] for metric in MEASURES}
        spreads = {metric: _spread(metric, each) for metric, each in values.items() if None not in each}
        won = skill = None
        if method != BASELINE:
            beside = [baseline[score.clip_id] for score in group]
            won = float(np.mean([ours.l2_paper < linear.l2_paper for ours, linear in zip(group, beside, strict=True)]))
            skill = _skill(group, beside, category == ALL or categories <= _MOST_INTERVALS + 1)
        # Only over all clips, as it takes time.
        intervals = {metric: _interval_of_mean(group, values[metric]) for metric in _BOUNDED if category == last}
        summaries.append(Summary(category, method, len(group), spreads, won, skill, intervals))
    return summaries


def to_csv(scores: Sequence[Score]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score.__dataclass_fields__)
    writer.writerows([list(vars(score).values()) for score in scores])
    return text.getvalue()


def _spread(metric: str, values: Sequence[float]) -> tuple[float, float]:
    """An infinite PSNR has an infinite mean, and no standard deviation."""
    each = np.asarray(values, dtype=float)
    if MEASURES[metric].better == "one":
        each = each[np.isfinite(each)]
    if not len(each):
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):
        return float(each.mean()), float(each.std())


def _interval_of_mean(scores: Sequence[Score], values: Sequence[float]) -> tuple[float, float]:
    """Over the clips where the value is finite."""
    finite = [(score.source, value) for score, value in zip(scores, values, strict=True) if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    sources, kept = zip(*finite, strict=True)
    each = torch.tensor(kept, dtype=torch.float64)
    return metrics.interval(torch.mean, sources, each, resamples=_RESAMPLES)


def _skill(ours: Sequence[Score], linear: Sequence[Score], bounded: bool) -> tuple[float, float, float]:
    made_sse, linear_sse = (
        torch.tensor([one.squared_error for one in each], dtype=torch.float64) for each in (ours, linear)
    )
    low = high = math.nan
    if bounded:
        sources = [score.source for score in ours]
        low, high = metrics.interval(metrics.skill, sources, made_sse, linear_sse, resamples=_RESAMPLES)
    return float(metrics.skill(made_sse, linear_sse)), low, high
