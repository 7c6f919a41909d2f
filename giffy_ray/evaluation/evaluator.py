"""Scores generated clips against held-out targets: every method, clip and metric, in memory.

`Evaluator` turns dataset indices into `Score`s and runs as a Ray actor; `summarise` aggregates scores into tables.
"""

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
from giffy_ray.models.sampling import LearnerMethod, Method, generate_in_batches

BASELINE = "linear"  # reference method of the skill and the win rate
REAL = "real"  # label of the target clips
ALL = "all"  # label of the summary over all categories
BATCH_SIZE = 16  # clips that an evaluation actor processes per call
_RESAMPLES = 1000
_MAX_CATEGORIES_WITH_INTERVALS = 8  # an interval takes 0.25 s; with more categories only the total gets one
_METRICS_WITH_INTERVAL = ("l2_paper", "psnr")
_METRIC_CHUNK_SIZE = 2  # clips; allocating larger float64 copies takes longer than the arithmetic on them

# Receives the method's name or REAL, dataset indices [clips], and uint8 [clips, time, height, width, 3].
ClipCallback = Callable[[str, np.ndarray, np.ndarray], None]


class Measure(NamedTuple):
    """Display settings of a metric of `giffy_ray.evaluation.metrics`."""

    label: str
    better: Literal["minimize", "maximize", "one", "none"]  # one: closer to 1 is better
    digits: int
    meaning: str


MEASURES = {
    "l2_paper": Measure("l2", "minimize", 0, "distance to the target clip, in the paper's unit"),
    "psnr": Measure("PSNR dB", "maximize", 1, "peak signal-to-noise ratio of the frames between"),
    "ssim": Measure("SSIM", "maximize", 3, "structural similarity of the frames between"),
    "motion_error": Measure("motion error", "minimize", 1, "error of frame-to-frame changes, in grey levels"),
    "motion_ratio": Measure("motion ratio", "one", 2, "amount of motion relative to the target"),
    "sharpness_ratio": Measure("sharpness", "one", 2, "sharpness of the frames relative to the target"),
    "ends_error": Measure("ends error", "minimize", 1, "error of the first and last frame, in grey levels"),
    "diversity": Measure("diversity", "none", 1, "distance between samples of the same clip, in grey levels"),
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

# Mean and standard deviation of l2, as printed in the paper.
PAPER_TABLE_2 = {
    "interpolation": {"erupting": (62, 58), "skiing": (153, 89)},
    "CVAE": {"erupting": (180, 110), "skiing": (197, 80)},
    "CGAN": {"erupting": (223, 96)},
}
PAPER_NOTE = (
    "The paper's Table 2 is not comparable with these results, because it uses different clips. Its unit is pixels in "
    "0..255 divided by 100, like our l2, not 0..1 as its caption says. According to the authors' code, red and blue "
    "were swapped in the clips of the CVAE and CGAN rows. The CVAE for skiing is the advanced one."
)


@dataclass(frozen=True)
class Score:
    """One row of evaluation.csv: one method on one clip. `giffy_ray.evaluation.metrics` defines the units."""

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
    diversity: float | None  # of the samples that the best one was selected from
    source: str  # source video of the clip


def build_baselines(names: Iterable[str], clip: ClipConfig) -> dict[str, list[Method]]:
    """Returns the named baselines as methods; linear interpolation is always included and comes first.

    Runs each baseline once on black images, so that an unsupported clip size fails early.

    Raises:
        ConfigError: A baseline does not support the frames, height or width of `clip`.
    """

    def build_method(name: str) -> Method:
        return lambda start, end, clip_ids: BASELINES[name](start, end, clip.frames)

    methods = {name: [build_method(name)] for name in dict.fromkeys([BASELINE, *names])}
    black = torch.zeros(1, clip.height, clip.width, 3, dtype=torch.uint8)
    for (method,) in methods.values():
        method(black, black, [""])
    return methods


def evaluate(
    methods: Mapping[str, Sequence[Method]],
    dataset: ClipDataset,
    indices: np.ndarray,
    sources: Sequence[str],
    on_clips: ClipCallback = lambda name, indices, clips: None,
) -> list[Score]:
    """Scores every method on every clip of `indices`.

    Args:
        methods: Methods by name. Of several methods under one name, the clip closest to the target is scored.
        dataset: The target clips.
        indices: Dataset indices, int64 [clips].
        sources: Source video of every clip of the dataset.
        on_clips: Called with each batch of target clips, then with each method's clips.

    Returns:
        One score per method and clip.
    """
    scores = []
    for first in range(0, len(indices), BATCH_SIZE):
        scores += _score_batch(methods, dataset, indices[first : first + BATCH_SIZE], sources, on_clips)
    return scores


class EvaluatedBatch(NamedTuple):
    """Result of evaluating one batch of dataset indices."""

    scores: list[Score]
    clips: list[tuple[str, np.ndarray, np.ndarray]]  # arguments of a ClipCallback, for the clips to return
    sprites: dict[tuple[int, str], bytes]  # (dataset index, method or REAL) -> `media.encode_sprite` of the clip


class Evaluator:
    """Maps dataset indices to an `EvaluatedBatch`; the actor class of `map_batches_with_models`.

    Args:
        methods: Methods by name, see `evaluate`.
        dataset: The target clips.
        return_indices: Dataset indices whose clips are returned.
        sprite_indices: Dataset indices whose sprites are returned.
    """

    def __init__(
        self,
        methods: Mapping[str, Sequence[Method]],
        dataset: ClipDataset,
        return_indices: Iterable[int],
        sprite_indices: Iterable[int],
    ):
        self.methods = methods
        self.dataset = dataset
        self.return_indices = np.asarray(sorted(return_indices), dtype=np.int64)
        self.sprite_indices = frozenset(sprite_indices)

    def __call__(self, indices: np.ndarray) -> EvaluatedBatch:
        batch = EvaluatedBatch([], [], {})

        def collect(name: str, indices: np.ndarray, clips: np.ndarray) -> None:
            selected = np.isin(indices, self.return_indices)
            if selected.any():
                batch.clips.append((name, indices[selected], clips[selected]))
            for index, clip in zip(indices.tolist(), clips, strict=True):
                if index in self.sprite_indices:
                    batch.sprites[index, name] = media.encode_sprite(clip)

        batch.scores.extend(_score_batch(self.methods, self.dataset, indices, self.dataset.sources, collect))
        return batch


def _score_batch(
    methods: Mapping[str, Sequence[Method]],
    dataset: ClipDataset,
    indices: np.ndarray,
    sources: Sequence[str],
    on_clips: ClipCallback,
) -> list[Score]:
    scores = []
    target = torch.from_numpy(dataset.get_clips(indices))
    on_clips(REAL, indices, target.numpy())
    clips_by_method = _generate_clips(methods, target, [dataset.ids[index] for index in indices])
    for name, variants in methods.items():
        generated, diversity = _select_best([clips_by_method[method] for method in variants], target)
        on_clips(name, indices, generated.numpy())
        values = {
            metric_name: _compute_in_chunks(metric, generated, target).tolist()
            for metric_name, metric in _METRICS.items()
        }
        for row, index in enumerate(indices):
            score = Score(
                name,
                dataset.categories[index],
                dataset.ids[index],
                **{metric_name: per_clip[row] for metric_name, per_clip in values.items()},
                diversity=diversity[row] if diversity else None,
                source=sources[int(index)],
            )
            scores.append(score)
    return scores


def _generate_clips(methods: Mapping[str, Sequence[Method]], target: Clips, clip_ids: list[str]) -> dict[Method, Clips]:
    """Runs each distinct method once, although a sample is also a candidate of "best of K".

    All samples of one learner are generated together.
    """
    start, end = target[:, 0], target[:, -1]
    distinct = dict.fromkeys(method for variants in methods.values() for method in variants)
    methods_by_learner: dict[int, list[LearnerMethod]] = defaultdict(list)
    for method in distinct:
        if isinstance(method, LearnerMethod):
            methods_by_learner[id(method.learner)].append(method)
    generated = {method: method(start, end, clip_ids) for method in distinct if not isinstance(method, LearnerMethod)}
    for variants in methods_by_learner.values():
        noise = torch.cat([method.noise(clip_ids) for method in variants])
        starts = start.repeat(len(variants), 1, 1, 1)
        ends = end.repeat(len(variants), 1, 1, 1)
        clips = generate_in_batches(variants[0].learner, starts, ends, noise)
        generated |= zip(variants, clips.split(len(clip_ids)), strict=True)
    return generated


def _select_best(samples: Sequence[Clips], target: Clips) -> tuple[Clips, list[float] | None]:
    """Returns the sample closest to `target` for each clip, and the diversity if there are several samples."""
    if len(samples) == 1:
        return samples[0], None
    errors = torch.stack([_compute_in_chunks(metrics.squared_error, generated, target) for generated in samples])
    stacked = torch.stack(list(samples), dim=1)  # [batch, sample, time, height, width, 3]
    best = stacked[torch.arange(len(target)), errors.argmin(0)]
    return best, _compute_in_chunks(metrics.diversity, stacked).tolist()


def _compute_in_chunks(metric: Callable[..., PerClip], *clips: Tensor) -> PerClip:
    chunks = zip(*(tensor.split(_METRIC_CHUNK_SIZE) for tensor in clips), strict=True)
    return torch.cat([metric(*chunk) for chunk in chunks])


@dataclass(frozen=True)
class Summary:
    """One row of a table: a method on a category."""

    category: str
    method: str
    clips: int
    spreads: dict[str, tuple[float, float]]  # metric -> mean and population standard deviation over the clips
    win_rate: float | None  # share of clips with a smaller l2_paper than the baseline; None for the baseline
    # Skill over the baseline and the bounds of its 95 % interval by source video; NaN bounds: no interval.
    skill: tuple[float, float, float] | None
    # Metric -> bounds of the 95 % interval of the mean, by source video; NaN: no interval.
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """Aggregates scores by category and method.

    Means exclude infinite and undefined ratios, which a still or flat target clip causes.

    Returns:
        Summaries by category name and, within a category, in the order of scoring. Several categories are followed by
        the summaries over all of them.
    """
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.category):
        groups[score.category, score.method].append(score)
    if len({score.category for score in scores}) > 1:
        for score in scores:
            groups[ALL, score.method].append(score)
    baseline_scores = {score.clip_id: score for score in scores if score.method == BASELINE}
    category_count = len({category for category, _ in groups})
    last_category = list(groups)[-1][0]
    summaries = []
    for (category, method), group in groups.items():
        values = {metric: [getattr(score, metric) for score in group] for metric in MEASURES}
        spreads = {
            metric: _mean_and_std(metric, per_clip) for metric, per_clip in values.items() if None not in per_clip
        }
        win_rate = skill = None
        if method != BASELINE:
            references = [baseline_scores[score.clip_id] for score in group]
            wins = [score.l2_paper < reference.l2_paper for score, reference in zip(group, references, strict=True)]
            win_rate = float(np.mean(wins))
            with_interval = category == ALL or category_count <= _MAX_CATEGORIES_WITH_INTERVALS + 1
            skill = _skill_with_interval(group, references, with_interval)
        intervals = {}
        if category == last_category:  # bootstrapping is slow, so only the summary over all clips gets intervals
            intervals = {metric: _mean_interval(group, values[metric]) for metric in _METRICS_WITH_INTERVAL}
        summaries.append(Summary(category, method, len(group), spreads, win_rate, skill, intervals))
    return summaries


def to_csv(scores: Sequence[Score]) -> str:
    """Formats scores as CSV with a header row; missing values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score.__dataclass_fields__)
    writer.writerows([list(vars(score).values()) for score in scores])
    return text.getvalue()


def _mean_and_std(metric: str, values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation. An infinite PSNR makes the mean infinite and the deviation NaN."""
    per_clip = np.asarray(values, dtype=float)
    if MEASURES[metric].better == "one":
        per_clip = per_clip[np.isfinite(per_clip)]
    if not len(per_clip):
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):
        return float(per_clip.mean()), float(per_clip.std())


def _mean_interval(scores: Sequence[Score], values: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean over the clips with a finite value."""
    finite = [(score.source, value) for score, value in zip(scores, values, strict=True) if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    sources, finite_values = zip(*finite, strict=True)
    per_clip = torch.tensor(finite_values, dtype=torch.float64)
    return metrics.bootstrap_interval(torch.mean, sources, per_clip, resamples=_RESAMPLES)


def _skill_with_interval(
    scores: Sequence[Score], references: Sequence[Score], with_interval: bool
) -> tuple[float, float, float]:
    generated_sse = torch.tensor([score.squared_error for score in scores], dtype=torch.float64)
    linear_sse = torch.tensor([score.squared_error for score in references], dtype=torch.float64)
    low = high = math.nan
    if with_interval:
        sources = [score.source for score in scores]
        low, high = metrics.bootstrap_interval(metrics.skill, sources, generated_sse, linear_sse, resamples=_RESAMPLES)
    return float(metrics.skill(generated_sse, linear_sse)), low, high
