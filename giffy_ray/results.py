"""What is shown at the end of a job: tables, CSV, pictures, a page; on the terminal, in the storage, in MLflow."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import torch
from rich.console import Console

from giffy_ray import checkpoints, cluster, learners, lease, perceptual, registry, render
from giffy_ray.cluster import Share
from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError, Experiment, from_yaml, override, to_yaml
from giffy_ray.data import prune
from giffy_ray.data.deal import sample_rows
from giffy_ray.data.store import Store
from giffy_ray.data.stream import map_rows
from giffy_ray.evaluate import (
    BASELINE,
    BATCH,
    REAL,
    Evaluator,
    Method,
    Score,
    Summary,
    baseline_methods,
    learner_method,
    learner_methods,
    summarise,
    to_csv,
)
from giffy_ray.learners import Learner
from giffy_ray.page import chosen_rows, page
from giffy_ray.perceived import Perceived
from giffy_ray.reports import line_of, relayed
from giffy_ray.storage import join, read_bytes, settle, without_secrets, write_bytes
from giffy_ray.study import Reel, study_page
from giffy_ray.survey import measure, readable, sample, survey
from giffy_ray.tables import (
    COLUMNS,
    WIDTH,
    category_name,
    count_of,
    data_table,
    distance_table,
    measures_table,
    perceptual_table,
    removals_table,
    skill_table,
    trials_table,
)
from giffy_ray.tracking import Tracker, open_run, tracking_uri
from giffy_ray.tracking.registry import fetch
from giffy_ray.train import KEEP_MEMORY, train
from giffy_ray.tune import Study, experiment_of

# Which held-out clips are shown: by their place in the order of linear interpolation's error, not by our taste.
_SHOWN_QUANTILES = (0.5, 0.85)
_MOST_PERCEIVED = 100  # clips: a method takes about two minutes of two cores
_REGISTERED = "models:/"  # in MLflow's registry
_MOST_CANDIDATES = 100  # clips of a category, of which those are chosen
_MOST_TRIALS, _MOST_CLIPS = 5, 6  # of a search, and of each of these, that its page shows
_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A learner that is shown, and what for."""

    name: str
    learner: Learner
    experiment: Experiment

    def __reduce__(self):
        weights = {
            name: {key: value.cpu().numpy() for key, value in network.state_dict().items()}
            for name, network in self.learner.networks.items()
        }
        return _rebuilt, (self.name, to_yaml(self.experiment), weights)


def _rebuilt(name: str, experiment: str, weights: Mapping[str, Mapping[str, np.ndarray]]) -> Trained:
    """On this actor's GPU, if it has one."""
    with_gpu = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    own = from_yaml(experiment)
    learner = learners.build(own, torch.device("cuda" if with_gpu else "cpu"))
    for network, values in weights.items():
        learner.networks[network].load_state_dict({key: torch.tensor(value) for key, value in values.items()})
    return Trained(name, learner, own)


def show_data_set(store: Store) -> None:
    """What a data set holds: a printed table, and pictures in its folder."""
    Console(width=WIDTH).print(data_table(store))
    for name, content in survey(store).items():
        write_bytes(join(store.location, name), content)
        print(f"  {join(store.location, name)}")


def prune_storage(experiment: Experiment, dry_run: bool) -> None:
    """Removes from the storage what the experiment's videos do not need, and prints what; `dry_run`: only prints it."""
    found = prune.plan(experiment)
    Console(width=WIDTH).print(removals_table(found.removals, experiment.storage, dry_run))
    for reason in found.kept:
        print(f"kept: {reason}")
    if not dry_run:
        for removal in found.removals:
            removal.remove()


def log_data_set(store: Store, trackers: Sequence[Tracker]) -> None:
    """The same to MLflow: pictures, the list of rejects, and counts."""
    rejects = read_bytes(join(store.location, "rejects.parquet"))
    _log_files({**survey(store), "rejects.parquet": rejects}, trackers, "data_set")
    counts = {"clips": len(store), "rejects": len(store.rejects), "stored_gb": store.bytes / 1e9}
    counts |= {f"rejects/{reason}": count for reason, count in store.reject_counts().items()}
    for tracker in trackers:
        tracker.log_results({f"data/{name}": value for name, value in counts.items()})


def show_search(study: Experiment, found: Study, store: Store, tracker: Tracker) -> None:
    """A search's trials as a table, and as `study.html` in its folder and in MLflow: plots, and clips of the best."""
    print(found.why_ended)
    Console(width=WIDTH).print(trials_table(found, study.search))
    rows = np.asarray(_typical(store, store.rows_of("validation"))[:_MOST_CLIPS])
    ids = [store.ids[row] for row in rows]
    real = torch.from_numpy(store.gather(rows))
    reels = [Reel(REAL, tuple(render.sprite(clip) for clip in real.numpy()))]
    best = {trial.number for trial in found.best}
    others = [trial for trial in found.trials if trial.number not in best and not trial.ended]
    for trial in [*found.best, *others][:_MOST_TRIALS]:
        try:
            location = checkpoints.select(experiment_of(study, trial.number, trial.values))
            learner, trained = checkpoints.load(location)
        except ConfigError as error:  # it was removed since; the others are shown
            reels.append(Reel(trial.name, (), without_secrets(str(error))))
            continue
        made = learner_method(learner, trained.train.seed)(real[:, 0], real[:, -1], ids)
        reels.append(Reel(trial.name, tuple(render.sprite(clip) for clip in made.numpy())))
    files = {"study.html": study_page(study, found, store.clip, ids, reels)}
    write_bytes(join(study.storage, study.name, "study.html"), files["study.html"])
    print(f"  {join(study.storage, study.name, 'study.html')}")
    _log_files(files, [tracker])


def check_evaluation(experiment: Experiment, store: Store | None = None) -> None:
    """Raises ConfigError for what `show_results` could not show, before the training that it comes after.

    `store`: of the clips, where they are known.
    """
    settings = experiment.evaluate
    baseline_methods(settings.baselines, experiment.clip)
    for name, path in settings.weights.items():
        if name not in settings.perceptual:
            raise ConfigError(f"evaluate.weights.{name}: evaluate.perceptual does not name {name} (value {path!r})")
    perceptual.require(settings.perceptual, settings.weights)
    if store is not None and not len(store.rows_of(settings.split)):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {settings.split!r})")


def train_and_show(experiment: Experiment, store: Store, share: Share, parent: Tracker | None = None) -> None:
    """Trains, then shows the trained model beside linear interpolation on the validation clips, and registers it.

    It is the checkpoint with the best validation in both cases. Everything goes to the training's own MLflow run, and
    to `parent`, the search that it belongs to, which goes on.
    """
    check_evaluation(experiment, store)
    clips, asked = len(store.rows_of("training")), experiment.cluster
    workers = str(asked.most) if asked.fewest == asked.most else f"{asked.fewest} to {asked.most}"
    held_out = len(store.rows_of("validation"))
    validated = count_of(min(held_out, experiment.train.validate_clips), held_out)
    print(f"training {experiment.name}: {clips} clips, {workers} workers; validation: {validated} clips", flush=True)

    def show(metrics: Mapping[str, Any]) -> None:
        if "epoch" in metrics:  # and not only a checkpoint
            print(line_of(metrics, experiment.train.epochs), flush=True)

    try:
        with relayed(show) as relay:
            train(experiment, store, share, parent.place if parent else None, [relay])
    except ray.train.TrainingFailedError:
        try:
            with lease.held(experiment), open_run(experiment) as tracker:  # workers that were killed have not said so
                tracker.finish("FAILED")
        except Exception as failure:  # must not hide why the training failed
            _log.warning("MLflow was not told that %r has failed (%r)", experiment.name, failure)
        raise
    with lease.held(experiment):  # the training's is over, and another one would write to the same run
        checkpoint = checkpoints.select(experiment)
        print(f"evaluating {checkpoints.describe(checkpoint)}", flush=True)
        trained = Trained(experiment.model.kind, *checkpoints.load(checkpoint))
        with open_run(experiment) as tracker:
            if parent is None:
                log_data_set(store, [tracker])
            show_results(experiment, [trained], store, [tracker, *([parent] if parent else [])])
        registry.offer(experiment)


def trained_runs(experiment: Experiment, clip: ClipConfig) -> list[Trained]:
    """The learners of `evaluate.runs`, or of the experiment's own run; of each run the checkpoint that
    `checkpoints.select` chooses, which is printed.

    Raises ConfigError where there is no such run, or where it cannot make clips of the size and length of `clip`.
    """
    if not experiment.evaluate.runs:
        learner, trained = _selected(experiment)
        return [_fitting(Trained(trained.model.kind, learner, trained), "name", clip)]
    runs = [Trained(_short(run), *_loaded(experiment, run)) for run in experiment.evaluate.runs]
    names = Counter(run.name for run in runs)
    names.update([REAL, BASELINE, *experiment.evaluate.baselines])
    for run in runs:
        if names[run.name] > 1:
            raise ConfigError(f"evaluate.runs: another method or run is called that too (value {run.name!r})")
    return [_fitting(run, "evaluate.runs", clip) for run in runs]


def _loaded(experiment: Experiment, run: str) -> tuple[Learner, Experiment]:
    """`run`: a name, or, with a slash in it, where a checkpoint lies, or models:/NAME@champion, models:/NAME/3."""
    try:
        if run.startswith(_REGISTERED):
            with tempfile.TemporaryDirectory() as folder:
                return checkpoints.load(fetch(tracking_uri(experiment), run, Path(folder)))
        return checkpoints.load(settle(run)) if "/" in run else _selected(override(experiment, {"name": run}))
    except (ConfigError, FileNotFoundError, checkpoints.DamagedCheckpoint) as error:
        raise ConfigError(f"evaluate.runs: {error} (value {run!r})") from error


def _selected(experiment: Experiment) -> tuple[Learner, Experiment]:
    choose = functools.partial(checkpoints.select, experiment)  # a training may be running
    location, loaded = checkpoints.read_chosen(choose, checkpoints.load)
    print(f"evaluating {checkpoints.describe(location)}", flush=True)
    return loaded


def _short(run: str) -> str:
    """What a run is called in the tables: of a checkpoint the folder that it lies in, unless it has a name itself."""
    if run.startswith(_REGISTERED):
        return run.removeprefix(_REGISTERED)
    *folders, last = run.rstrip("/").split("/")
    return folders[-1] if folders and last.startswith("checkpoint_") else last


def _fitting(run: Trained, field: str, clip: ClipConfig) -> Trained:
    """The run as it makes clips of the size and length of `clip`. Only `between` can make others than it learned."""
    ours = run.experiment.clip
    others = [name for name in ("frames", "height", "width") if getattr(ours, name) != getattr(clip, name)]
    if others and isinstance(run.experiment.model, BetweenConfig):
        return _resized(run, field, clip)
    for name in others:
        raise ConfigError(
            f"{field}: {run.name} was trained with clip.{name}={getattr(ours, name)} and cannot make clips of "
            f"clip.{name}={getattr(clip, name)}; evaluate it with an experiment that has its `clip` section"
        )
    return run


def _resized(run: Trained, field: str, clip: ClipConfig) -> Trained:
    """The same networks as the learner of an experiment with another clip; its discriminators stay behind."""
    changes = {f"clip.{name}": getattr(clip, name) for name in ("frames", "height", "width")}
    experiment = override(run.experiment, changes | {"model.adversarial_weight": 0.0})
    try:
        learner = learners.build(experiment, torch.device("cpu"))
    except ConfigError as error:
        raise ConfigError(f"{field}: {run.name} cannot make these clips: {error}") from error
    for name, network in learner.networks.items():
        network.load_state_dict(run.learner.networks[name].state_dict())
    return Trained(run.name, learner, experiment)


@dataclass(frozen=True)
class MakeEvaluator:
    """What an actor of an evaluation is made from; a learner travels as its experiment and its weights."""

    experiment: Experiment
    runs: tuple[Trained, ...]
    store: Store
    watched: frozenset[int]
    drawn: frozenset[int]

    def __call__(self) -> Evaluator:
        methods = methods_of(self.experiment, self.runs, self.store.clip)
        return Evaluator(methods, self.store, self.watched, self.drawn)


def methods_of(experiment: Experiment, runs: Sequence[Trained], clip: ClipConfig) -> dict[str, list[Method]]:
    """The baselines of `evaluate.baselines`, then what the learners of `runs` make."""
    methods = baseline_methods(experiment.evaluate.baselines, clip)
    for run in runs:
        methods |= learner_methods(run.name, run.learner, run.experiment.train.seed, experiment.evaluate.samples)
    return methods


def _bytes_of(run: Trained) -> int:
    return sum(value.nbytes for network in run.learner.networks.values() for value in network.state_dict().values())


def show_results(experiment: Experiment, runs: Sequence[Trained], store: Store, trackers: Sequence[Tracker]) -> None:
    """Sets the runs and the baselines side by side on `evaluate.split`, as the `evaluate` section says.

    Prints tables, and leaves CSV, pictures and a page in the experiment's folder and in MLflow. Raises ConfigError
    where the data set has no such split.
    """
    split, clip = experiment.evaluate.split, store.clip
    rows, there_are = sample_rows(store, split, experiment.evaluate.clips), len(store.rows_of(split))
    if not len(rows):
        raise ConfigError(f"evaluate.split: there are no such clips in {store.location} (value {split!r})")
    names = list(methods_of(experiment, runs, clip))
    clips: dict[int, dict[str, np.ndarray]] = {row: {} for row in _typical(store, rows)}
    sprites: dict[int, dict[str, bytes]] = {row: {} for row in chosen_rows(store, rows, len(names))}
    perceived = Perceived(experiment.evaluate.perceptual, experiment.evaluate.weights, sample(rows, _MOST_PERCEIVED))
    watched = {*clips, *(perceived.rows.tolist() if experiment.evaluate.perceptual else [])}
    make_evaluator = MakeEvaluator(experiment, tuple(runs), store, frozenset(watched), frozenset(sprites))
    pool = cluster.model_pool(experiment, -(-len(rows) // BATCH), sum(_bytes_of(run) for run in runs))
    resources = {**pool.resources, "runtime_env": {"env_vars": KEEP_MEMORY}}
    scores: list[Score] = []
    for done in map_rows(
        rows, make_evaluator, batch=BATCH, actors=pool.actors, title="evaluating", resources=resources
    ):
        scores += done.scores
        for name, seen, made in done.clips:
            perceived.watch(name, seen, made)
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
    looks = perceived.results()
    if looks:
        console.print(perceptual_table(looks, len(perceived.rows), there_are))
    files = {
        "evaluation.csv": to_csv(scores).encode(),
        "evaluation.html": page(store, split, scores, summaries, sprites, there_are),
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


def _typical(store: Store, rows: np.ndarray) -> list[int]:
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
    clips: Mapping[int, Mapping[str, np.ndarray]], store: Store, scores: Sequence[Score], moving: Sequence[str]
) -> dict[str, bytes]:
    """The contact sheet of a few rows' clips by method, and the animation of the methods of `moving`."""
    l2_of = {(score.method, score.clip_id): score.l2_report for score in scores}
    samples = []
    for row, made in clips.items():
        clip_id = store.ids[row]
        title = f"{category_name(store, store.categories[row])}   {readable(Path(clip_id).stem, 70)}"
        labels = {name: f"{name}\nl2 {l2_of[name, clip_id]:.0f}" for name in made if name != REAL}
        samples.append((title, {labels.get(name, name): one for name, one in made.items()}))
    rows = {name: np.stack([made[name] for made in clips.values()]) for name in moving}
    return {
        "contact_sheet.png": render.contact_sheet(samples, store.clip.fps),
        "clips.gif": render.animation(rows, store.clip.fps, "gif"),
    }
