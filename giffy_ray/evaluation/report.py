"""Evaluation of trained models beside the baselines: tables, CSV, pictures, an HTML report."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from giffy_ray.cluster import resources
from giffy_ray.cluster.resources import MALLOC_ENV
from giffy_ray.config import ClipConfig, ConfigError, Experiment
from giffy_ray.core import media
from giffy_ray.core.storage import join, read_bytes, write_bytes
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.loader import map_rows
from giffy_ray.data.sampler import sample_rows
from giffy_ray.evaluation import perceptual_metrics
from giffy_ray.evaluation.dataset_report import measure, readable, sample, survey
from giffy_ray.evaluation.evaluator import (
    BASELINE,
    BATCH,
    REAL,
    Evaluator,
    Score,
    Summary,
    baseline_methods,
    summarise,
    to_csv,
)
from giffy_ray.evaluation.html_report import chosen_rows, render_comparison
from giffy_ray.evaluation.perceptual_evaluator import PerceptualEvaluator
from giffy_ray.evaluation.tables import (
    COLUMNS,
    WIDTH,
    category_name,
    data_table,
    distance_table,
    measures_table,
    perceptual_table,
    skill_table,
)
from giffy_ray.models.sampling import ClipGenerator, Method, learner_methods
from giffy_ray.tracking.tracker import Tracker

# Which held-out clips are shown: by their place in the order of linear interpolation's error, not by our taste.
_SHOWN_QUANTILES = (0.5, 0.85)
_MOST_PERCEIVED = 100  # clips: a method takes about two minutes of two cores
_MOST_CANDIDATES = 100  # clips of a category, of which those are chosen


class TrainedModel(NamedTuple):
    """A generator that is evaluated, and the experiment that it was trained with."""

    name: str
    learner: ClipGenerator
    experiment: Experiment


def show_data_set(store: ClipDataset) -> None:
    """What a data set holds: a printed table, and pictures in its folder."""
    Console(width=WIDTH).print(data_table(store))
    for name, content in survey(store).items():
        write_bytes(join(store.location, name), content)
        print(f"  {join(store.location, name)}")


def log_data_set(store: ClipDataset, trackers: Sequence[Tracker]) -> None:
    """The same to MLflow: pictures, the list of rejects, and counts."""
    rejects = read_bytes(join(store.location, "rejects.parquet"))
    _log_files({**survey(store), "rejects.parquet": rejects}, trackers, "data_set")
    counts = {"clips": len(store), "rejects": len(store.rejects), "stored_gb": store.bytes / 1e9}
    counts |= {f"rejects/{reason}": count for reason, count in store.reject_counts().items()}
    for tracker in trackers:
        tracker.log_results({f"data/{name}": value for name, value in counts.items()})


def check_evaluation(experiment: Experiment, store: ClipDataset | None = None) -> None:
    """Raises ConfigError for what `show_results` could not show, before the training that it comes after.

    `store`: of the clips, where they are known.
    """
    settings = experiment.evaluate
    baseline_methods(settings.baselines, experiment.clip)
    for name, path in settings.weights.items():
        if name not in settings.perceptual:
            raise ConfigError(f"evaluate.weights.{name}: evaluate.perceptual does not name {name} (value {path!r})")
    perceptual_metrics.require(settings.perceptual, settings.weights)
    if store is not None and not len(store.split_indices(settings.split)):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {settings.split!r})")


@dataclass(frozen=True)
class MakeEvaluator:
    """What an actor of an evaluation is made from."""

    experiment: Experiment
    runs: tuple[TrainedModel, ...]
    store: ClipDataset
    watched: frozenset[int]
    drawn: frozenset[int]

    def __call__(self) -> Evaluator:
        methods = methods_of(self.experiment, self.runs, self.store.clip)
        return Evaluator(methods, self.store, self.watched, self.drawn)


def methods_of(experiment: Experiment, runs: Sequence[TrainedModel], clip: ClipConfig) -> dict[str, list[Method]]:
    """The baselines of `evaluate.baselines`, then what the learners of `runs` make."""
    methods = baseline_methods(experiment.evaluate.baselines, clip)
    for run in runs:
        methods |= learner_methods(run.name, run.learner, run.experiment.train.seed, experiment.evaluate.samples)
    return methods


def _bytes_of(run: TrainedModel) -> int:
    return sum(value.nbytes for network in run.learner.networks.values() for value in network.state_dict().values())


def show_results(
    experiment: Experiment, runs: Sequence[TrainedModel], store: ClipDataset, trackers: Sequence[Tracker]
) -> None:
    """Sets the runs and the baselines side by side on `evaluate.split`, as the `evaluate` section says.

    Prints tables, and leaves CSV, pictures and a page in the experiment's folder and in MLflow. Raises ConfigError
    where the data set has no such split.
    """
    split, clip = experiment.evaluate.split, store.clip
    rows, there_are = sample_rows(store, split, experiment.evaluate.clips), len(store.split_indices(split))
    if not len(rows):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {split!r})")
    names = list(methods_of(experiment, runs, clip))
    clips: dict[int, dict[str, np.ndarray]] = {row: {} for row in _typical(store, rows)}
    sprites: dict[int, dict[str, bytes]] = {row: {} for row in chosen_rows(store, rows, len(names))}
    perceived = PerceptualEvaluator(
        experiment.evaluate.perceptual, experiment.evaluate.weights, sample(rows, _MOST_PERCEIVED)
    )
    watched = {*clips, *(perceived.rows.tolist() if experiment.evaluate.perceptual else [])}
    make_evaluator = MakeEvaluator(experiment, tuple(runs), store, frozenset(watched), frozenset(sprites))
    pool = resources.model_pool(experiment, -(-len(rows) // BATCH), sum(_bytes_of(run) for run in runs))
    asked = {**pool.resources, "runtime_env": {"env_vars": MALLOC_ENV}}
    scores: list[Score] = []
    for done in map_rows(rows, make_evaluator, batch=BATCH, actors=pool.actors, title="evaluating", resources=asked):
        scores += done.scores
        for name, seen, made in done.clips:
            perceived.update(name, seen, made)
            for row, one in zip(seen.tolist(), made, strict=True):
                if row in clips:
                    clips[row][name] = one.copy()
        for (row, name), picture in done.sprites.items():
            sprites[row][name] = picture
    summaries = summarise(scores)
    console = Console(width=WIDTH)
    console.print(distance_table(summaries, store, split, there_are))
    console.print(skill_table(summaries, store))
    console.print(measures_table(summaries, there_are))
    looks = perceived.compute()
    if looks:
        console.print(perceptual_table(looks, len(perceived.rows), there_are))
    files = {
        "evaluation.csv": to_csv(scores).encode(),
        "evaluation.html": render_comparison(store, split, scores, summaries, sprites, there_are),
        **_pictures(clips, store, scores, [REAL, BASELINE, *(run.name for run in runs)]),
    }
    folder = join(experiment.storage, experiment.name)
    for name, content in files.items():
        write_bytes(join(folder, name), content)
        print(f"  {join(folder, name)}")
    _log_files(files, trackers)
    for tracker in trackers:
        tracker.log_results(_logged(summaries[-len(names) :], split, looks))


def _log_files(files: Mapping[str, bytes], trackers: Sequence[Tracker], folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as local:
        for name, content in files.items():
            Path(local, name).write_bytes(content)
            for tracker in trackers:
                tracker.log_file(Path(local, name), folder)


def _logged(summaries: Sequence[Summary], split: str, looks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """'validation/cvae best of 8/psnr' and so on: the means, under names that MLflow takes."""
    logged = {}
    for summary in summaries:
        method = re.sub(r"[^\w./ -]", "_", summary.method.replace(",", ""))
        values = {metric: mean for metric, (mean, _) in summary.spreads.items()} | {**looks.get(summary.method, {})}
        if summary.won is not None and summary.skill is not None:
            values |= {"won": summary.won, "skill": summary.skill[0]}
        logged |= {f"{split}/{method}/{metric}": value for metric, value in values.items()}
    return logged


def _typical(store: ClipDataset, rows: np.ndarray) -> list[int]:
    """A few clips of the largest categories, easy and hard, told by linear interpolation alone."""
    of_category: dict[str, list[int]] = {}
    for row in rows.tolist():
        of_category.setdefault(store.categories[row], []).append(row)
    shown = []
    for category in sorted(sorted(of_category, key=lambda name: -len(of_category[name]))[:COLUMNS]):
        measured = measure(store, sample(np.asarray(of_category[category]), _MOST_CANDIDATES))
        by_error = measured.rows[np.argsort(measured.linear_l2, kind="stable")]
        shown += [int(by_error[round(quantile * (len(by_error) - 1))]) for quantile in _SHOWN_QUANTILES]
    return list(dict.fromkeys(shown))


def _pictures(
    clips: Mapping[int, Mapping[str, np.ndarray]], store: ClipDataset, scores: Sequence[Score], moving: Sequence[str]
) -> dict[str, bytes]:
    """The contact sheet of a few rows' clips by method, and the animation of the methods of `moving`."""
    l2_of = {(score.method, score.clip_id): score.l2_paper for score in scores}
    samples = []
    for row, made in clips.items():
        clip_id = store.ids[row]
        title = f"{category_name(store, store.categories[row])}   {readable(Path(clip_id).stem, 70)}"
        labels = {name: f"{name}\nl2 {l2_of[name, clip_id]:.0f}" for name in made if name != REAL}
        samples.append((title, {labels.get(name, name): one for name, one in made.items()}))
    rows = {name: np.stack([made[name] for made in clips.values()]) for name in moving}
    return {
        "contact_sheet.png": media.contact_sheet(samples, store.clip.fps),
        "clips.gif": media.animation(rows, store.clip.fps, "gif"),
    }
