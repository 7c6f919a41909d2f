"""What is shown at the end of a job: tables, CSV, pictures, a page; on the terminal, in the storage, in MLflow."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from giffy_ray import checkpoints, render
from giffy_ray.cluster import Share
from giffy_ray.config import SPLITS, ClipConfig, ConfigError, Experiment, override
from giffy_ray.data.store import Store
from giffy_ray.evaluate import (
    ALL,
    BASELINE,
    MEASURES,
    REAL,
    REPORT_NOTE,
    REPORT_TABLE_2,
    Score,
    Summary,
    baseline_methods,
    evaluate,
    learner_methods,
    summarise,
    to_csv,
)
from giffy_ray.learners import Learner
from giffy_ray.page import chosen_rows, page
from giffy_ray.reports import line_of, relayed
from giffy_ray.storage import join, read_bytes, settle, write_bytes
from giffy_ray.survey import measure, readable, sample, survey
from giffy_ray.tracking import Tracker, open_run
from giffy_ray.train import train
from giffy_ray.tune import Study

_SHOWN_CATEGORIES = 30
_WIDTH = 110  # of the tables; a job's log has no terminal to ask
_METHOD_WIDTH = 34  # of the first column of the tables
_HOPELESS = -10  # a skill below this needs no digits
_BOUNDED = 3  # columns that have room for intervals
_COLUMNS = 4  # categories of the table beside the one for all; the others are on the page and in the CSV
# Which held-out clips are shown: by their place in the order of linear interpolation's error, not by our taste.
_SHOWN_QUANTILES = (0.5, 0.85)
_MOST_CANDIDATES = 100  # clips of a category, of which those are chosen


class Trained(NamedTuple):
    """A learner that is shown, and what for."""

    name: str
    learner: Learner
    experiment: Experiment


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
    baseline_methods(experiment.evaluate.baselines, store.clip)  # what cannot be shown is told before the training
    clips, cluster = len(store.rows_of("training")), experiment.cluster
    workers = str(cluster.most) if cluster.fewest == cluster.most else f"{cluster.fewest} to {cluster.most}"
    print(f"training {experiment.name}: {clips} clips, {workers} workers", flush=True)

    def show(metrics: Mapping[str, Any]) -> None:
        if "epoch" in metrics:  # and not only a checkpoint
            print(line_of(metrics, experiment.train.epochs), flush=True)

    with relayed(show) as relay:
        checkpoint = train(experiment, store, share, parent.place if parent else None, [relay])
    trained = Trained(experiment.model.kind, *checkpoints.load(checkpoint))
    trackers = [open_run(experiment), *([parent] if parent else [])]
    if parent is None:
        log_data_set(store, trackers)
    show_results(experiment, [trained], store, trackers)
    for tracker in trackers:
        tracker.finish()
    print(f"  {checkpoint}")


def trained_runs(experiment: Experiment, clip: ClipConfig) -> list[Trained]:
    """The learners of `evaluate.runs`, or of the experiment's own run; of each run its newest checkpoint.

    Raises ConfigError where there is no such run, or where its clips are not of the size and length of `clip`.
    """
    if not experiment.evaluate.runs:
        learner, trained = checkpoints.load(checkpoints.newest(experiment))
        return [_fitting(Trained(trained.model.kind, learner, trained), "name", clip)]
    runs = [Trained(_short(run), *_loaded(experiment, run)) for run in experiment.evaluate.runs]
    names = Counter(run.name for run in runs)
    names.update([REAL, BASELINE, *experiment.evaluate.baselines])
    for run in runs:
        if names[run.name] > 1:
            raise ConfigError(f"evaluate.runs: another method or run is called that too (value {run.name!r})")
    return [_fitting(run, "evaluate.runs", clip) for run in runs]


def _loaded(experiment: Experiment, run: str) -> tuple[Learner, Experiment]:
    """`run`: a name, or, with a slash in it, where a checkpoint lies."""
    try:
        location = settle(run) if "/" in run else checkpoints.newest(override(experiment, {"name": run}))
        return checkpoints.load(location)
    except (ConfigError, FileNotFoundError, checkpoints.DamagedCheckpoint) as error:
        raise ConfigError(f"evaluate.runs: {error} (value {run!r})") from error


def _short(run: str) -> str:
    """What a run is called in the tables: of a checkpoint the folder that it lies in, unless it has a name itself."""
    *folders, last = run.rstrip("/").split("/")
    return folders[-1] if folders and last.startswith("checkpoint_") else last


def _fitting(run: Trained, field: str, clip: ClipConfig) -> Trained:
    ours = run.experiment.clip
    for name in ("frames", "height", "width"):
        if getattr(ours, name) != getattr(clip, name):
            raise ConfigError(
                f"{field}: {run.name} was trained with clip.{name}={getattr(ours, name)} and cannot make clips of "
                f"clip.{name}={getattr(clip, name)}; evaluate it with an experiment that has its `clip` section"
            )
    return run


def show_results(experiment: Experiment, runs: Sequence[Trained], store: Store, trackers: Sequence[Tracker]) -> None:
    """Sets the runs and the baselines side by side on `evaluate.split`, as the `evaluate` section says.

    Prints tables, and leaves CSV, pictures and a page in the experiment's folder and in MLflow. Raises ConfigError
    where the data set has no such split.
    """
    split, clip = experiment.evaluate.split, store.clip
    rows = store.rows_of(split)
    if not len(rows):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {split!r})")
    methods = baseline_methods(experiment.evaluate.baselines, clip)
    for run in runs:
        methods |= learner_methods(run.name, run.learner, run.experiment.train.seed, experiment.evaluate.samples)
    clips: dict[int, dict[str, np.ndarray]] = {row: {} for row in _typical(store, rows)}
    sprites: dict[int, dict[str, bytes]] = {row: {} for row in chosen_rows(store, rows, len(methods))}

    def watch(name: str, watched: np.ndarray, made: np.ndarray) -> None:
        for row, one in zip(watched.tolist(), made, strict=True):
            if row in clips:
                clips[row][name] = one.copy()
            if row in sprites:
                sprites[row][name] = render.sprite(one)

    scores = evaluate(methods, store, rows, store.sources, watch)
    summaries = summarise(scores)
    console = Console(width=_WIDTH)
    console.print(distance_table(summaries, store, split))
    console.print(skill_table(summaries, store))
    console.print(measures_table(summaries))
    files = {
        "evaluation.csv": to_csv(scores).encode(),
        "evaluation.html": page(store, split, scores, summaries, sprites),
        **_pictures(clips, store, scores, [REAL, BASELINE, *(run.name for run in runs)]),
    }
    folder = join(experiment.storage, experiment.name)
    for name, content in files.items():
        write_bytes(join(folder, name), content)
        print(f"  {join(folder, name)}")
    _log_files(files, trackers)
    for tracker in trackers:
        tracker.log_results(_logged(summaries[-len(methods) :], split))


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


def distance_table(summaries: Sequence[Summary], store: Store, split: str) -> Table:
    """As the report's Table 2, and beside its figures: methods down, categories across, l2 inside."""
    table = Table(
        title=f"{store.name}: l2 of {split} clips, mean ± standard deviation; smaller is better",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown, left_out = _columns(table, summaries, store)
    of = {(summary.category, summary.method): summary.spreads["l2_report"] for summary in summaries}
    for method in dict.fromkeys(summary.method for summary in summaries):
        table.add_row(method, *("{:.0f} ± {:.0f}".format(*of[category, method]) for category in shown))
    captions = []
    if left_out:
        captions.append(f"The largest categories; {left_out} more are in evaluation.html.")
    if any(category in printed for printed in REPORT_TABLE_2.values() for category in shown):
        table.add_section()
        for method, printed in REPORT_TABLE_2.items():
            cells = ("{} ± {}".format(*printed[name]) if name in printed else "" for name in shown)
            table.add_row(f"the report's {method}", *cells, style="dim")
        captions.append(REPORT_NOTE)
    table.caption = "\n".join(captions)
    return table


def skill_table(summaries: Sequence[Summary], store: Store) -> Table:
    """How much nearer than linear interpolation each method comes, in the columns of `distance_table`."""
    table = Table(
        title="skill and clips won against linear interpolation",
        caption="skill: 1 - squared error over linear interpolation's, and its 95 % interval by source video.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown, _ = _columns(table, summaries, store)
    of = {(summary.category, summary.method): summary for summary in summaries if summary.skill}
    for method in dict.fromkeys(method for _, method in of):
        table.add_row(method, *(_skill_of(of[category, method], len(shown) <= _BOUNDED) for category in shown))
    return table


def measures_table(summaries: Sequence[Summary]) -> Table:
    """The means of the other metrics, over all clips."""
    every = [summary for summary in summaries if summary.category == summaries[-1].category]
    others = {name: shown for name, shown in MEASURES.items() if name != "l2_report"}
    table = Table(
        title=f"{every[0].clips} clips; means",
        caption="Motion ratio, sharpness: best at 1. best of K: the nearest of K samples; diversity: between them.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", max_width=_METHOD_WIDTH, overflow="fold")
    for shown in others.values():
        table.add_column(shown.label.replace(" ", "\n"), justify="right", no_wrap=True)
    for summary in every:
        means = (f"{summary.spreads[n][0]:.{m.digits}f}" if n in summary.spreads else "" for n, m in others.items())
        table.add_row(summary.method, *means)
    return table


def _columns(table: Table, summaries: Sequence[Summary], store: Store) -> tuple[list[str], int]:
    """Adds a column for the methods, and one for each of the largest categories and for all.

    Returns those categories, and how many are left out.
    """
    clips = {summary.category: summary.clips for summary in summaries}
    by_size = sorted((name for name in clips if name != ALL), key=lambda name: -clips[name])
    shown = [*sorted(by_size[:_COLUMNS]), *([ALL] if ALL in clips else [])]
    table.add_column("method", max_width=_METHOD_WIDTH, overflow="fold")
    for category in shown:
        heading = f"{_category(store, category)}\n{clips[category]} {'clip' if clips[category] == 1 else 'clips'}"
        table.add_column(heading, justify="right", min_width=11, max_width=25, overflow="fold")
    return shown, len(by_size) - len(by_size[:_COLUMNS])


def _skill_of(summary: Summary, bounded: bool) -> str:
    assert summary.skill
    skill, low, high = summary.skill
    if skill < _HOPELESS:
        return f"{skill:.0f} {summary.won:4.0%}"
    bounds = f" ({low:z.2f}, {high:z.2f})" if bounded and not math.isnan(low) else ""
    return f"{skill:z.2f}{bounds} {summary.won:4.0%}"


def _log_files(files: Mapping[str, bytes], trackers: Sequence[Tracker], folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as local:
        for name, content in files.items():
            Path(local, name).write_bytes(content)
            for tracker in trackers:
                tracker.log_file(Path(local, name), folder)


def _category(store: Store, category: str) -> str:
    return category if category == ALL else f"{store.name}-{category}"


def _logged(summaries: Sequence[Summary], split: str) -> dict[str, float]:
    """'validation/cvae best of 8/psnr' and so on: the means, under names that MLflow takes."""
    logged = {}
    for summary in summaries:
        method = re.sub(r"[^\w./ -]", "_", summary.method.replace(",", ""))
        values = {metric: mean for metric, (mean, _) in summary.spreads.items()}
        if summary.won is not None and summary.skill is not None:
            values |= {"won": summary.won, "skill": summary.skill[0]}
        logged |= {f"{split}/{method}/{metric}": value for metric, value in values.items()}
    return logged


def _typical(store: Store, rows: np.ndarray) -> list[int]:
    """A few clips of the largest categories, easy and hard, told by linear interpolation alone."""
    of_category: dict[str, list[int]] = {}
    for row in rows.tolist():
        of_category.setdefault(store.categories[row], []).append(row)
    shown = []
    for category in sorted(sorted(of_category, key=lambda name: -len(of_category[name]))[:_COLUMNS]):
        measured = measure(store, sample(np.asarray(of_category[category]), _MOST_CANDIDATES))
        by_error = measured.rows[np.argsort(measured.linear_l2, kind="stable")]
        shown += [int(by_error[round(quantile * (len(by_error) - 1))]) for quantile in _SHOWN_QUANTILES]
    return list(dict.fromkeys(shown))


def _pictures(
    clips: Mapping[int, Mapping[str, np.ndarray]], store: Store, scores: Sequence[Score], moving: Sequence[str]
) -> dict[str, bytes]:
    """The contact sheet of a few rows' clips by method, and the animation of the methods of `moving`."""
    l2_of = {(score.method, score.clip_id): score.l2_report for score in scores}
    samples = []
    for row, made in clips.items():
        clip_id = store.ids[row]
        title = f"{_category(store, store.categories[row])}   {readable(Path(clip_id).stem, 70)}"
        labels = {name: f"{name}\nl2 {l2_of[name, clip_id]:.0f}" for name in made if name != REAL}
        samples.append((title, {labels.get(name, name): one for name, one in made.items()}))
    rows = {name: np.stack([made[name] for made in clips.values()]) for name in moving}
    return {
        "contact_sheet.png": render.contact_sheet(samples, store.clip.fps),
        "clips.gif": render.animation(rows, store.clip.fps, "gif"),
    }
