"""Made against real, on clips that were held out: every method, every clip, every metric, by clip id, in memory."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from giffy_ray.data.store import Store
from giffy_ray.learners import Learner
from giffy_ray.learners.noise import noise_for
from giffy_ray.metrics import METRICS
from giffy_ray.models import baselines
from giffy_ray.shapes import Clips, Images

BASELINE = "linear"
ALL = "all"  # the categories together
_BATCH = 16

# start, end, ids of the clips -> made clips
Method = Callable[[Images, Images, list[str]], Clips]


@dataclass(frozen=True)
class Score:
    """One row of evaluation.csv: how one method did on one clip."""

    method: str
    category: str
    clip_id: str
    l2_report: float
    psnr: float
    ssim: float


def linear_method(frames: int) -> Method:
    return lambda start, end, clip_ids: baselines.linear(start, end, frames)


def learner_method(learner: Learner, seed: int) -> Method:
    """One sample for each clip, from noise that depends on the seed and the clip's id only."""
    return lambda start, end, clip_ids: learner.generate(start, end, noise_for(seed, clip_ids, learner.latent))


def evaluate(methods: Mapping[str, Method], store: Store, rows: np.ndarray) -> list[Score]:
    """Scores every method on the clips of `rows`, one Score for each method and clip."""
    scores = []
    for first in range(0, len(rows), _BATCH):
        chosen = rows[first : first + _BATCH]
        real = torch.from_numpy(store.gather(chosen))
        clip_ids = [store.ids[row] for row in chosen]
        for name, method in methods.items():
            made = method(real[:, 0], real[:, -1], clip_ids)
            values = {metric: of(made, real).tolist() for metric, of in METRICS.items()}
            scores += [
                Score(name, store.categories[row], store.ids[row], **{m: values[m][i] for m in METRICS})
                for i, row in enumerate(chosen)
            ]
    return scores


@dataclass(frozen=True)
class Summary:
    """One row of the table: a method on a category. Means and population standard deviations over the clips."""

    category: str
    method: str
    clips: int
    l2_report: tuple[float, float]
    psnr: tuple[float, float]
    ssim: tuple[float, float]
    won: float | None  # share of clips with a smaller l2_report than interpolation; none for itself


def summarise(scores: list[Score]) -> list[Summary]:
    """By category, in order of their names, and method, in the order scored; then all categories together."""
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.category):
        groups[score.category, score.method].append(score)
    if len({score.category for score in scores}) > 1:
        for score in scores:
            groups[ALL, score.method].append(score)
    baseline = {score.clip_id: score.l2_report for score in scores if score.method == BASELINE}

    def spread(group: list[Score], metric: str) -> tuple[float, float]:
        values = [getattr(score, metric) for score in group]
        return statistics.fmean(values), statistics.pstdev(values)

    def won(method: str, group: list[Score]) -> float | None:
        if method == BASELINE or not baseline:
            return None
        return statistics.fmean(score.l2_report < baseline[score.clip_id] for score in group)

    return [
        Summary(
            category,
            method,
            len(group),
            spread(group, "l2_report"),
            spread(group, "psnr"),
            spread(group, "ssim"),
            won(method, group),
        )
        for (category, method), group in groups.items()
    ]


def to_csv(scores: list[Score]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score.__dataclass_fields__)
    writer.writerows([list(vars(score).values()) for score in scores])
    return text.getvalue()
