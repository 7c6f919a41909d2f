"""What is shown at the end of a job: the table, the CSV, the pictures; on the terminal, in the storage, in MLflow."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from giffy_ray import checkpoints, render
from giffy_ray.cluster import Share
from giffy_ray.config import SPLITS, ConfigError, Experiment
from giffy_ray.data.store import Store
from giffy_ray.evaluate import (
    ALL,
    BASELINE,
    Method,
    Score,
    Summary,
    evaluate,
    learner_method,
    linear_method,
    summarise,
    to_csv,
)
from giffy_ray.learners import Learner
from giffy_ray.metrics import METRICS
from giffy_ray.reports import line_of, relayed
from giffy_ray.storage import join, read_bytes, write_bytes
from giffy_ray.survey import survey
from giffy_ray.tracking import Tracker, open_run
from giffy_ray.train import train
from giffy_ray.tune import Study

_SHOWN_CATEGORIES = 30
_WIDTH = 100  # of the table; a job's log has no terminal to ask
# Which held-out clips are shown: by their place in the order of linear interpolation's error, not by our taste.
_SHOWN_QUANTILES = (0.5, 0.85)


def show_data_set(store: Store) -> None:
    """What a data set holds: a printed table, and pictures in its folder."""
    Console(width=_WIDTH).print(data_table(store))
    for name, content in survey(store).items():
        write_bytes(join(store.location, name), content)
        print(f"  {join(store.location, name)}")


def log_data_set(store: Store, trackers: Sequence[Tracker]) -> None:
    """The same to MLflow: pictures, the list of rejects, and counts."""
    rejects = read_bytes(join(store.location, "rejects.parquet"))
    _log_files({**survey(store), "rejects.parquet": rejects}, trackers, "data_set")
    counts = {"clips": len(store), "rejects": len(store.rejects), "stored_gb": store.bytes / 1e9}
    counts |= {f"rejects/{reason}": count for reason, count in store.reject_counts().items()}
    for tracker in trackers:
        tracker.log_results({f"data/{name}": value for name, value in counts.items()})


def train_and_show(experiment: Experiment, store: Store, share: Share, parent: Tracker | None = None) -> None:
    """Trains, then shows the trained model beside linear interpolation on the validation clips.

    Everything goes to the training's own MLflow run, and to `parent`, the search that it belongs to.
    """
    clips = len(store.rows_of("training"))
    print(f"training {experiment.name}: {clips} clips, {experiment.cluster.workers} workers", flush=True)
    with relayed(lambda metrics: print(line_of(metrics, experiment.train.epochs), flush=True)) as relay:
        checkpoint = train(experiment, store, share, parent.run_id if parent else None, [relay])
    learner, _ = checkpoints.load(checkpoint)
    trackers = [open_run(experiment), *([parent] if parent else [])]
    if parent is None:
        log_data_set(store, trackers)
    show_results(experiment, learner, store, experiment.evaluate.split, trackers)
    for tracker in trackers:
        tracker.finish()
    print(f"  {checkpoint}")


def show_results(
    experiment: Experiment,
    learner: Learner,
    store: Store,
    split: str,
    trackers: Sequence[Tracker],
) -> None:
    """Sets the learner beside interpolation on a split: a printed table, and CSV and pictures in the run's folder.

    Raises ConfigError where the data set has no such split.
    """
    rows = store.rows_of(split)
    if not len(rows):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {split!r})")
    methods = {
        BASELINE: linear_method(experiment.clip.frames),
        experiment.model.kind: learner_method(learner, experiment.train.seed),
    }
    scores = evaluate(methods, store, rows)
    summaries = summarise(scores)
    samples = _samples(methods, store, rows, scores)
    fps = experiment.clip.fps
    strip = {name: np.stack([clips[name] for _, clips in samples]) for name in samples[0][1]}
    files = {
        "evaluation.csv": to_csv(scores).encode(),
        "contact_sheet.png": render.contact_sheet(samples, fps),
        "clips.gif": render.animation(strip, fps, "gif"),
    }
    console = Console(width=_WIDTH)
    console.print(table_of(summaries, store, split))
    folder = join(experiment.storage, experiment.name)
    for name, content in files.items():
        write_bytes(join(folder, name), content)
        print(f"  {join(folder, name)}")
    _log_files(files, trackers)
    metrics = {
        f"{split}/{summary.method}/{metric}": getattr(summary, metric)[0]
        for summary in summaries[-len(methods) :]
        for metric in METRICS
    }
    for tracker in trackers:
        tracker.log_results(metrics)


def data_table(store: Store) -> Table:
    """How many clips there are of each category in each split, and how many videos were rejected."""
    splits = [split for split in SPLITS if len(store.rows_of(split))]
    kept = f"{store.bytes / 1e9:.2f} GB" if store.recipe.keep else "decoded anew each time"
    table = Table(title=f"{store.name}: {len(store)} clips, {kept}", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in (*splits, "rejected"):
        table.add_column(heading, justify="right")
    clips = Counter((store.categories[row], split) for split in splits for row in store.rows_of(split))
    rejects = Counter(reject["category"] for reject in store.rejects)
    names = sorted({category for category, _ in clips} | set(rejects))
    for name in names[:_SHOWN_CATEGORIES]:
        table.add_row(name, *(str(clips[name, split]) for split in splits), str(rejects[name]))
    if len(names) > _SHOWN_CATEGORIES:
        table.add_row(f"and {len(names) - _SHOWN_CATEGORIES} more")
    if len(names) > 1:
        table.add_section()
        table.add_row(ALL, *(str(len(store.rows_of(split))) for split in splits), str(len(store.rejects)))
    return table


def trials_table(study: Study, metric: str) -> Table:
    """The trials of a search, best first."""
    names = list(study.best.values)
    table = Table(title="trials, best first", title_justify="left")
    table.add_column("trial", no_wrap=True)
    for heading in (*(name.rpartition(".")[2] for name in names), "epochs", metric):
        table.add_column(heading, justify="right")
    for trial in study.trials:
        values = [f"{trial.values[name]:.3g}" for name in names]
        table.add_row(trial.name, *values, str(trial.epochs), f"{trial.best:.1f}")
    return table


def table_of(summaries: Sequence[Summary], store: Store, split: str) -> Table:
    table = Table(
        title=f"{store.name}: {split} clips, held out of training; mean ± standard deviation",
        caption="l2: the report's unit, smaller is better.  PSNR and SSIM: the frames between, larger is better.\n"
        "won: share of clips on which the method's l2 is smaller than linear interpolation's.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("videos", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("clips", "l2", "PSNR dB", "SSIM", "won"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, summary in enumerate(summaries):
        first = place == 0 or summaries[place - 1].category != summary.category
        if first and place:
            table.add_section()
        table.add_row(
            _category(store, summary.category) if first else "",
            summary.method,
            str(summary.clips) if first else "",
            "{:.0f} ± {:.0f}".format(*summary.l2_report),
            "{:.1f} ± {:.1f}".format(*summary.psnr),
            "{:.3f} ± {:.3f}".format(*summary.ssim),
            "" if summary.won is None else f"{summary.won:.0%}",
        )
    return table


def _log_files(files: Mapping[str, bytes], trackers: Sequence[Tracker], folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as local:
        for name, content in files.items():
            Path(local, name).write_bytes(content)
            for tracker in trackers:
                tracker.log_file(Path(local, name), folder)


def _category(store: Store, category: str) -> str:
    return category if category == ALL else f"{store.name}-{category}"


def _samples(
    methods: Mapping[str, Method], store: Store, rows: np.ndarray, scores: Sequence[Score]
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """(title, {real and each method: clip}) of a few clips of every category."""
    l2_of = {(score.method, score.clip_id): score.l2_report for score in scores}
    samples = []
    for category in sorted({store.categories[row] for row in rows}):
        of_category = sorted(
            (row for row in rows if store.categories[row] == category), key=lambda row: l2_of[BASELINE, store.ids[row]]
        )
        for quantile in _SHOWN_QUANTILES:
            row = of_category[round(quantile * (len(of_category) - 1))]
            clip_id = store.ids[row]
            real = torch.from_numpy(store.gather(np.asarray([row])))
            clips = {"real": real[0].numpy()}
            clips |= {name: method(real[:, 0], real[:, -1], [clip_id])[0].numpy() for name, method in methods.items()}
            l2 = ", ".join(f"{name} {l2_of[name, clip_id]:.0f}" for name in methods)
            samples.append((f"{_category(store, category)}   {Path(clip_id).stem}   l2: {l2}", clips))
    return samples
