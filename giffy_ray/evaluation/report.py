"""Reports of datasets and of evaluations: printed tables, CSV, pictures, an HTML page, and the same in MLflow."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from giffy_ray.cluster import resources
from giffy_ray.cluster.resources import MALLOC_ENV
from giffy_ray.config import ClipConfig, ConfigError, Experiment
from giffy_ray.core import media
from giffy_ray.core.storage import join, read_bytes, write_bytes
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.loader import map_batches_with_models
from giffy_ray.data.sampler import subsample_split
from giffy_ray.evaluation import perceptual_metrics
from giffy_ray.evaluation.dataset_report import fit_label, measure_clips, render_dataset_pictures, subsample
from giffy_ray.evaluation.evaluator import (
    BASELINE,
    BATCH_SIZE,
    REAL,
    Evaluator,
    Score,
    Summary,
    build_baselines,
    summarise,
    to_csv,
)
from giffy_ray.evaluation.html_report import render_comparison, select_page_clips
from giffy_ray.evaluation.perceptual_evaluator import PerceptualEvaluator
from giffy_ray.evaluation.tables import (
    MAX_CATEGORY_COLUMNS,
    TABLE_WIDTH,
    category_name,
    dataset_table,
    distance_table,
    measures_table,
    perceptual_table,
    skill_table,
)
from giffy_ray.models.sampling import Method, TrainedModel, learner_methods
from giffy_ray.tracking.tracker import Tracker

# Clips of the contact sheet, as quantiles of linear interpolation's error: an objective choice, not a flattering one.
_TYPICAL_QUANTILES = (0.5, 0.85)
_MAX_PERCEPTUAL_CLIPS = 100  # a method takes about two minutes on two cores
_MAX_CANDIDATES = 100  # clips per category that the typical clips are selected from
_MAX_LABEL_LETTERS = 70


def report_dataset(dataset: ClipDataset) -> None:
    """Prints a table of the dataset and writes pictures of it into the dataset's folder."""
    Console(width=TABLE_WIDTH).print(dataset_table(dataset))
    for name, content in render_dataset_pictures(dataset).items():
        write_bytes(join(dataset.location, name), content)
        print(f"  {join(dataset.location, name)}")


def log_dataset_report(dataset: ClipDataset, trackers: Sequence[Tracker]) -> None:
    """Logs the pictures, the list of rejects and the counts of the dataset to MLflow."""
    rejects = read_bytes(join(dataset.location, "rejects.parquet"))
    log_files({**render_dataset_pictures(dataset), "rejects.parquet": rejects}, trackers, "data_set")
    counts = {"clips": len(dataset), "rejects": len(dataset.rejects), "stored_gb": dataset.size_bytes / 1e9}
    counts |= {f"rejects/{reason}": count for reason, count in dataset.count_rejects_by_reason().items()}
    for tracker in trackers:
        tracker.log_results({f"data/{name}": value for name, value in counts.items()})


def check_evaluation(experiment: Experiment, dataset: ClipDataset | None = None) -> None:
    """Checks the `evaluate` section before a long training, so that `report_evaluation` does not fail after it.

    Args:
        experiment: The experiment to check.
        dataset: The clips, if they are prepared; the split is checked only then.

    Raises:
        ConfigError: A baseline, a perceptual metric or the split is not available.
    """
    settings = experiment.evaluate
    build_baselines(settings.baselines, experiment.clip)
    for name, path in settings.weights.items():
        if name not in settings.perceptual:
            raise ConfigError(
                f"evaluate.weights.{name}: no metric uses this file; add {name} to evaluate.perceptual or remove the "
                f"file (value {path!r})"
            )
    perceptual_metrics.check_available(settings.perceptual, settings.weights)
    if dataset is not None and not len(dataset.split_indices(settings.split)):
        raise _empty_split_error(dataset, settings.split)


def _empty_split_error(dataset: ClipDataset, split: str) -> ConfigError:
    return ConfigError(
        f"evaluate.split: {dataset.location} has no clips of this split; choose another one (value {split!r})"
    )


@dataclass(frozen=True)
class EvaluatorFactory:
    """Builds the `Evaluator` of an actor; picklable, unlike the evaluator's methods."""

    experiment: Experiment
    runs: tuple[TrainedModel, ...]
    dataset: ClipDataset
    return_indices: frozenset[int]
    sprite_indices: frozenset[int]

    def __call__(self) -> Evaluator:
        methods = build_methods(self.experiment, self.runs, self.dataset.clip)
        return Evaluator(methods, self.dataset, self.return_indices, self.sprite_indices)


def build_methods(experiment: Experiment, runs: Sequence[TrainedModel], clip: ClipConfig) -> dict[str, list[Method]]:
    """Returns the baselines of `evaluate.baselines`, followed by the methods of each run's learner."""
    methods = build_baselines(experiment.evaluate.baselines, clip)
    for run in runs:
        methods |= learner_methods(run.name, run.learner, run.experiment.train.seed, experiment.evaluate.samples)
    return methods


def _count_weight_bytes(run: TrainedModel) -> int:
    return sum(value.nbytes for network in run.learner.networks.values() for value in network.state_dict().values())


def report_evaluation(
    experiment: Experiment, runs: Sequence[TrainedModel], dataset: ClipDataset, trackers: Sequence[Tracker]
) -> None:
    """Compares the runs with the baselines on `evaluate.split`.

    Prints tables, and writes evaluation.csv, evaluation.html, a contact sheet and an animation into the experiment's
    folder and to MLflow.

    Raises:
        ConfigError: The dataset has no clips of the split.
    """
    split, clip = experiment.evaluate.split, dataset.clip
    indices = subsample_split(dataset, split, experiment.evaluate.clips)
    split_size = len(dataset.split_indices(split))
    if not len(indices):
        raise _empty_split_error(dataset, split)
    names = list(build_methods(experiment, runs, clip))
    sheet_clips: dict[int, dict[str, np.ndarray]] = {index: {} for index in select_typical_clips(dataset, indices)}
    sprites: dict[int, dict[str, bytes]] = {index: {} for index in select_page_clips(dataset, indices, len(names))}
    perceptual_evaluator = PerceptualEvaluator(
        experiment.evaluate.perceptual, experiment.evaluate.weights, subsample(indices, _MAX_PERCEPTUAL_CLIPS)
    )
    return_indices = {*sheet_clips, *(perceptual_evaluator.indices.tolist() if experiment.evaluate.perceptual else [])}
    make_evaluator = EvaluatorFactory(experiment, tuple(runs), dataset, frozenset(return_indices), frozenset(sprites))
    batch_count = -(-len(indices) // BATCH_SIZE)
    pool = resources.model_pool(experiment, batch_count, sum(_count_weight_bytes(run) for run in runs))
    actor_resources = {**pool.resources, "runtime_env": {"env_vars": MALLOC_ENV}}
    scores: list[Score] = []
    for batch in map_batches_with_models(
        indices,
        make_evaluator,
        batch_size=BATCH_SIZE,
        actors=pool.actors,
        title="evaluating",
        resources=actor_resources,
    ):
        scores += batch.scores
        for name, clip_indices, clips in batch.clips:
            perceptual_evaluator.update(name, clip_indices, clips)
            for index, generated in zip(clip_indices.tolist(), clips, strict=True):
                if index in sheet_clips:
                    sheet_clips[index][name] = generated.copy()
        for (index, name), sprite in batch.sprites.items():
            sprites[index][name] = sprite
    summaries = summarise(scores)
    console = Console(width=TABLE_WIDTH)
    console.print(distance_table(summaries, dataset, split, split_size))
    console.print(skill_table(summaries, dataset))
    console.print(measures_table(summaries, split_size))
    perceptual_results = perceptual_evaluator.compute()
    if perceptual_results:
        console.print(perceptual_table(perceptual_results, len(perceptual_evaluator.indices), split_size))
    files = {
        "evaluation.csv": to_csv(scores).encode(),
        "evaluation.html": render_comparison(dataset, split, scores, summaries, sprites, split_size),
        **_render_pictures(sheet_clips, dataset, scores, [REAL, BASELINE, *(run.name for run in runs)]),
    }
    folder = experiment.run_dir
    for name, content in files.items():
        write_bytes(join(folder, name), content)
        print(f"  {join(folder, name)}")
    log_files(files, trackers)
    for tracker in trackers:
        tracker.log_results(_tracked_metrics(summaries[-len(names) :], split, perceptual_results))


def log_files(files: Mapping[str, bytes], trackers: Sequence[Tracker], folder: str | None = None) -> None:
    """Logs files, by name, as artifacts in `folder` of each tracker's run."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        for name, content in files.items():
            path = Path(temporary_folder, name)
            path.write_bytes(content)
            for tracker in trackers:
                tracker.log_file(path, folder)


def _tracked_metrics(
    summaries: Sequence[Summary], split: str, perceptual_results: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Means by metric name, such as 'validation/cvae best of 8/psnr'.

    Replaces characters of method names that MLflow does not allow.
    """
    tracked = {}
    for summary in summaries:
        method = re.sub(r"[^\w./ -]", "_", summary.method.replace(",", ""))
        values = {metric: mean for metric, (mean, _) in summary.spreads.items()}
        values |= perceptual_results.get(summary.method, {})
        if summary.win_rate is not None and summary.skill is not None:
            values |= {"win_rate": summary.win_rate, "skill": summary.skill[0]}
        tracked |= {f"{split}/{method}/{metric}": value for metric, value in values.items()}
    return tracked


def select_typical_clips(dataset: ClipDataset, indices: np.ndarray) -> list[int]:
    """Selects an average and a hard clip of each of the largest categories, by linear interpolation's error."""
    by_category: dict[str, list[int]] = {}
    for index in indices.tolist():
        by_category.setdefault(dataset.categories[index], []).append(index)
    largest = sorted(by_category, key=lambda name: -len(by_category[name]))[:MAX_CATEGORY_COLUMNS]
    selected = []
    for category in sorted(largest):
        measures = measure_clips(dataset, subsample(np.asarray(by_category[category]), _MAX_CANDIDATES))
        by_error = measures.indices[np.argsort(measures.linear_l2, kind="stable")]
        selected += [int(by_error[round(quantile * (len(by_error) - 1))]) for quantile in _TYPICAL_QUANTILES]
    return list(dict.fromkeys(selected))


def _render_pictures(
    clips: Mapping[int, Mapping[str, np.ndarray]],
    dataset: ClipDataset,
    scores: Sequence[Score],
    animated_methods: Sequence[str],
) -> dict[str, bytes]:
    """Renders the contact sheet of clips, by dataset index and method, and the animation of `animated_methods`."""
    l2_by_clip = {(score.method, score.clip_id): score.l2_paper for score in scores}
    samples = []
    for index, clip_by_method in clips.items():
        clip_id = dataset.ids[index]
        category = category_name(dataset, dataset.categories[index])
        title = f"{category}   {fit_label(Path(clip_id).stem, _MAX_LABEL_LETTERS)}"
        labels = {name: f"{name}\nl2 {l2_by_clip[name, clip_id]:.0f}" for name in clip_by_method if name != REAL}
        samples.append((title, {labels.get(name, name): clip for name, clip in clip_by_method.items()}))
    animated = {
        name: np.stack([clip_by_method[name] for clip_by_method in clips.values()]) for name in animated_methods
    }
    return {
        "contact_sheet.png": media.render_contact_sheet(samples, dataset.clip.fps),
        "clips.gif": media.render_animation(animated, dataset.clip.fps, "gif"),
    }
