"""Hyperparameter search: Optuna proposes values, Ray Tune runs each trial in an actor.

The state of a study is in Optuna's storage and in the trials' run folders, not in Ray Tune's files, so an interrupted
study resumes from there. The objective is a metric whose scale does not depend on the searched fields.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.execution import class_cache  # Ray has no public setting for the variables that Tune passes on
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.cluster.shared_storage import remove_token, write_token
from giffy_ray.config import ConfigError, Experiment, override, to_yaml
from giffy_ray.core.run_lock import RunLock
from giffy_ray.core.storage import join, read_text
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.tracking.search_progress import SearchProgress, TrialResult
from giffy_ray.tracking.tracker import Tracker, fetch_params, tracking_uri
from giffy_ray.training import checkpoint_selection
from giffy_ray.training.progress_callback import format_epoch
from giffy_ray.training.trainer import (
    ENVIRONMENT_FIELDS,
    check_experiment,
    check_run,
    estimate_checkpoint_bytes,
    locked_run,
)
from giffy_ray.tuning.independent_trials import EPOCH_ATTR, IndependentTrials
from giffy_ray.tuning.objectives import check_metrics, resolve_objectives
from giffy_ray.tuning.optuna_storage import open_storage, reject_shared_database
from giffy_ray.tuning.optuna_study import FAILURE_ATTR
from giffy_ray.tuning.population import Population, check_population
from giffy_ray.tuning.search_space import (
    Values,
    build_distributions,
    count_combinations,
    edge_values,
    format_value,
    paper_point,
    point_from_run,
)
from giffy_ray.tuning.trial_runner import FAILURE_KEY, run_trial, trial_experiment, trial_name
from giffy_ray.tuning.trial_source import TrialSource

__all__ = [
    "Study",
    "Trial",
    "check_search",
    "check_trainings",
    "initial_points",
    "lock_study",
    "max_trials",
    "refit_experiment",
    "resolve_objectives",
    "resolve_study",
    "run_trials",
    "search",
    "trial_experiment",
]

# Fields, and prefixes of fields, that may change when a study resumes.
_MUTABLE_FIELDS = (
    *ENVIRONMENT_FIELDS,
    "search.trials",
    "search.max_hours",
    "search.patience",
    "search.resume",
    "search.enqueue",
)
_PROCESS_DIED = "the trial's process died"


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Attributes:
        number: Optuna's number, from 0.
        values: The searched fields; in a population, the last values.
        epochs: The last epoch that was reported.
        objectives: Value of each objective, empty if the trial reported none.
        pruned: Whether ASHA stopped it.
        failure: Why it failed, or an empty string.
        reports: Epoch -> value of a single objective.
    """

    number: int
    values: Values
    epochs: int
    objectives: tuple[float, ...]
    pruned: bool
    failure: str
    reports: Mapping[int, float]

    @property
    def name(self) -> str:
        return trial_name(self.number)


@dataclass(frozen=True)
class Study:
    """The result of a search.

    Attributes:
        trials: Best first by the first objective, failed trials last.
        best: The best trial, or, with several objectives, the Pareto front.
        stop_reason: Why the study has ended.
        importances: Objective -> field -> share of the variance. Empty if there are too few trials.
    """

    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    stop_reason: str
    importances: Mapping[str, Mapping[str, float]]


def search(
    experiment: Experiment,
    dataset: ClipDataset,
    worker_resources: WorkerResources,
    parent: str,
    points: Sequence[Values] = (),
) -> Study:
    """Searches `search.space`, until `search.trials` or another limit is reached. Resumes a search of the same name.

    Args:
        experiment: The experiment of the study, from `resolve_study`.
        dataset: The clips of all trials.
        worker_resources: Of each worker of a trial.
        parent: Folder of the run that MLflow shows the trials under.
        points: Tried first in a new study.

    Raises:
        ConfigError: The study cannot run. Nothing has started.
        RuntimeError: No trial completed successfully.
    """
    with lock_study(experiment, dataset) as lock:
        return run_trials(experiment, dataset, worker_resources, parent, points, lock)


@contextmanager
def lock_study(experiment: Experiment, dataset: ClipDataset) -> Iterator[RunLock]:
    """Holds the run lock of the study, so that no other process writes to its folder and its MLflow run.

    Raises:
        ConfigError: The study cannot run, or another process holds the lock.
    """
    check_search(experiment)
    values = {name: edge_values(distribution)[0] for name, distribution in build_distributions(experiment).items()}
    check_run(trial_experiment(experiment, 0, values), dataset, values)
    with locked_run(experiment, dataset, _MUTABLE_FIELDS) as lock:
        _warn_of_low_disk_space(experiment)
        yield lock


def _warn_of_low_disk_space(experiment: Experiment) -> None:
    trials = max_trials(experiment)
    checkpoints_per_trial = (
        3 if experiment.search.sampler == "pbt" else 1
    )  # the latest; in a population, those of two epochs as well
    needed_bytes = trials * checkpoints_per_trial * estimate_checkpoint_bytes(trial_experiment(experiment, 0, {}))
    available_bytes = checkpoint_selection.available_bytes(experiment)
    if needed_bytes > available_bytes:
        print(
            f"warning: search.trials: the checkpoints of {trials} trials take up to {needed_bytes / 1e9:.2g} GB "
            f"(value {experiment.search.trials}), and {available_bytes / 1e9:.2g} GB are free on the disk of "
            f"{experiment.storage}",
            file=sys.stderr,
            flush=True,
        )


def run_trials(
    experiment: Experiment,
    dataset: ClipDataset,
    worker_resources: WorkerResources,
    parent: str,
    points: Sequence[Values],
    lock: RunLock,
    tracker: Tracker | None = None,
) -> Study:
    """Runs the trials of a study whose `lock` the caller holds. See `search` for the other arguments.

    Logs the best result so far to the parent run if its `tracker` is given.
    """
    source: TrialSource
    if experiment.search.sampler == "pbt":
        source = Population(experiment, points)
    else:
        source = IndependentTrials(experiment, points)
    if source.has_unfinished_trials() or not source.stop_reason():
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # no banner: TrialProgressCallback shows the progress
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # and the failures
        withhold_credentials()
        if worker_resources.summary:
            print(worker_resources.summary, flush=True)
        progress = SearchProgress(tracker, source.study.objectives) if tracker else None
        build_tuner(experiment, dataset, worker_resources, parent, source, lock, progress).fit()
        remove_token(experiment, lock.holder)
        lock.check()
    return collect_study(source)


def withhold_credentials() -> None:
    """Stops Ray Tune from passing AWS_* to trials in a runtime environment, which Ray writes to its logs.

    The trials have these variables anyway: `cluster.connect` passes them on.
    """
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if "AWS_" in name}


def resolve_study(experiment: Experiment) -> Experiment:
    """Returns the experiment of the study, whose name decides whether it resumes; see `search.resume`.

    Raises:
        ConfigError: `search.resume=must` and there is no such search, or the name is too long.
    """
    name = f"{experiment.name}-study"
    if experiment.search.resume == "never":
        name = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    override(experiment, {"name": _refit_name(name)})  # raises now, rather than after the study, if it is too long
    study_experiment = override(experiment, {"name": name})
    storage = study_experiment.storage
    if experiment.search.resume == "must" and read_text(join(storage, name, "experiment.yaml")) is None:
        raise ConfigError(
            f"search.resume: there is no study {name!r} in {storage} to resume; use --resume auto (value 'must')"
        )
    return study_experiment


def check_search(experiment: Experiment) -> None:
    """Checks the `search` section, without a cluster or clips. Raises ConfigError."""
    build_distributions(experiment)
    check_metrics(experiment)
    if experiment.search.patience and len(experiment.search.objectives) > 1:
        raise ConfigError(
            f"search.patience: has no effect with several search.objectives, of which no trial is the best (value "
            f"{experiment.search.patience}); remove it, or give one objective"
        )
    if experiment.search.sampler == "pbt":
        check_population(experiment)


def check_trainings(experiment: Experiment) -> None:
    """Checks that a trial, and the training of the best trial, can run with the values of the space.

    Tests each bound and choice of a field, together with the first one of every other field. Raises ConfigError.
    """
    study_experiment = resolve_study(experiment)
    space = build_distributions(experiment)
    edges = {name: edge_values(distribution) for name, distribution in space.items()}
    first_point = {name: values[0] for name, values in edges.items()}
    points = [first_point]
    for name, values in edges.items():
        points += [{**first_point, name: value} for value in values[1:]]
    for point in points:
        trainings = {
            "a trial": trial_experiment(study_experiment, 0, point),
            "the training of the best trial": override(experiment, point),
        }
        for description, training in trainings.items():
            try:
                check_experiment(training, space)
            except ConfigError as error:
                assignments = ", ".join(f"{name}={value}" for name, value in point.items())
                raise ConfigError(f"search.space: {description} with {assignments} cannot run: {error}") from error


def max_trials(experiment: Experiment) -> int:
    """Returns the most trials a search can have: `search.trials`, or the size of a smaller finite space."""
    combinations = count_combinations(build_distributions(experiment))
    trials = experiment.search.trials
    return trials if combinations is None or experiment.search.sampler == "pbt" else min(trials, combinations)


def initial_points(experiment: Experiment) -> list[Values]:
    """Returns the points that a new study tries first: the paper's values, then those of `search.enqueue`.

    Raises:
        ConfigError: The search is invalid, `search.storage` cannot be opened, or a run of `search.enqueue` is outside
            the space.
    """
    check_search(experiment)
    uri = tracking_uri(experiment)
    if experiment.search.storage:
        reject_shared_database(uri, experiment)
        open_storage(experiment).remove_session()
    points = [paper_point(experiment)]
    points += [point_from_run(experiment, run_id, fetch_params(uri, run_id)) for run_id in experiment.search.enqueue]
    return [point for point in points if point]


def refit_experiment(experiment: Experiment, study_experiment: Experiment, study: Study) -> Experiment:
    """Returns the experiment that trains the best trial's values to completion.

    The training starts from scratch, or from the weights of the best trial of a population, whose values are only the
    last of several.

    Args:
        experiment: The experiment that `resolve_study` was called with.
        study_experiment: What it returned.
        study: The result of the study.
    """
    best = study.best[0]
    changes = best.values | {"name": _refit_name(study_experiment.name)}
    if study_experiment.search.sampler == "pbt":
        best_experiment = trial_experiment(study_experiment, best.number, best.values)
        changes["train.init_from"] = checkpoint_selection.latest_checkpoint(best_experiment)
    return override(experiment, changes)


def _refit_name(study_name: str) -> str:
    return f"{study_name}-best"


def build_tuner(
    experiment: Experiment,
    dataset: ClipDataset,
    worker_resources: WorkerResources,
    parent: str,
    source: TrialSource,
    lock: RunLock,
    progress: SearchProgress | None = None,
) -> tune.Tuner:
    """Builds the Ray Tune job that runs the trials of `source`."""
    trainable = functools.partial(
        run_trial,
        experiment_yaml=to_yaml(experiment),
        dataset_path=dataset.location,
        worker_resources=worker_resources,
        parent=parent,
        token=write_token(experiment, lock.holder),
    )
    return tune.Tuner(
        tune.with_resources(trainable, _actor_resources(experiment, worker_resources)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # unlimited: OptunaSearcher ends the study
            max_concurrent_trials=worker_resources.max_concurrent,
            search_alg=OptunaSearcher(source, progress),
            scheduler=PruningScheduler(source),
            reuse_actors=True,  # saves a process start per trial
            trial_name_creator=_tune_trial_name,
            trial_dirname_creator=_tune_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=experiment.run_dir,
            failure_config=tune.FailureConfig(max_failures=experiment.cluster.max_failures),
            verbose=0,
            stop=LockLossStopper(lock),
            callbacks=[TrialProgressCallback(experiment)],
        ),
    )


class LockLossStopper(tune.Stopper):
    """Stops all trials if another process takes over the search."""

    def __init__(self, lock: RunLock):
        self.lock = lock

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.lock.lost_reason)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the lock, whose thread cannot be pickled. Ray Tune saves its stopper; we never restore it."""
        return {}


def _tune_trial_name(tune_trial: Any) -> str:
    """Names a trial of Ray Tune, which in a population is one generation of ours."""
    config = tune_trial.config
    name = trial_name(config["number"])
    return f"{name}-{config['stop_epoch']:04}" if "stop_epoch" in config else name


def _actor_resources(experiment: Experiment, worker_resources: WorkerResources) -> dict[str, float]:
    """Returns the resources of a trial's actor.

    A multi-worker trial only coordinates: it uses no CPU and is pinned to the head node, which is never a spot
    instance.
    """
    if experiment.search.workers > 1:
        return {"CPU": 0, "node:__internal_head__": 0.001}  # Ray Tune rejects a trial without resources
    return {"CPU": worker_resources.cpus_per_worker, "GPU": worker_resources.gpus_per_worker}


class OptunaSearcher(Searcher):
    """Passes the trials of a `TrialSource` to Ray Tune."""

    def __init__(self, source: TrialSource, progress: SearchProgress | None = None):
        super().__init__()
        self.source = source
        self.progress = progress
        self.numbers: dict[str, int] = {}  # Ray Tune's trial id -> trial number

    def suggest(self, trial_id: str) -> Any:
        proposal = self.source.ask()
        if proposal is None:
            return Searcher.FINISHED if self.source.stop_reason() else None  # None: try again later
        number, values = proposal
        self.numbers[trial_id] = number
        return {"number": number, "values": values, **self.source.trial_directive(number)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.source.end(self.numbers[trial_id], _PROCESS_DIED if error else "")
        if self.progress:
            self.progress.update(_collect_results(self.source))

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the state is in Optuna's storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, as `save`."""


class PruningScheduler(FIFOScheduler):
    """Passes reports to a `TrialSource`, which decides whether the trial stops."""

    def __init__(self, source: TrialSource):
        super().__init__()
        self.source = source

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if FAILURE_KEY in result:
            self.source.end(number, result[FAILURE_KEY])
            trial.max_failures = 0  # the trial raises next, which ends its actor; it must not be retried
            return TrialScheduler.CONTINUE
        if "epoch" not in result:  # a checkpoint without validation
            return TrialScheduler.CONTINUE
        must_stop = self.source.report(number, result["epoch"], result)
        return TrialScheduler.STOP if must_stop else TrialScheduler.CONTINUE


class TrialProgressCallback(tune.Callback):
    """Prints a line when a trial starts, and one for each of its reports."""

    def __init__(self, experiment: Experiment):
        self.epochs = experiment.search.epochs
        self.trials = max_trials(experiment)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        line = "  ".join(f"{name} {format_value(value)}" for name, value in trial.config["values"].items())
        exploit_from = trial.config.get("exploit_from")
        if exploit_from:
            _, source_number = exploit_from
            line += f"  from the weights of trial {source_number + 1}"
        self._print(trial, line)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if FAILURE_KEY in result:
            self._print(trial, result[FAILURE_KEY])
        elif "epoch" in result:
            self._print(trial, format_epoch(result, self.epochs))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if FAILURE_KEY not in trial.last_result:
            self._print(trial, _PROCESS_DIED)

    def _print(self, trial: Any, line: str) -> None:
        print(f"trial {trial.config['number'] + 1}/{self.trials}  {line}", flush=True)


def collect_study(source: TrialSource) -> Study:
    """Collects the result of a search. Raises RuntimeError if no trial completed successfully."""
    trials = [_collect_trial(frozen, source) for frozen in source.study.trials()]
    best = {frozen.number for frozen in source.study.best()}
    sign = source.study.sign(next(iter(source.study.objectives)))
    trials.sort(key=lambda trial: (bool(trial.failure), sign * trial.objectives[0] if trial.objectives else 0))
    if not best:
        reasons = "\n  ".join(f"{trial.name}: {trial.failure}" for trial in trials)
        raise RuntimeError(f"none of {len(trials)} trials completed successfully:\n  {reasons}")
    return Study(
        trials=tuple(trials),
        best=tuple(trial for trial in trials if trial.number in best),
        stop_reason=source.stop_reason(),
        importances=source.importances(),
    )


def _collect_results(source: TrialSource) -> dict[int, TrialResult]:
    """Returns the results of the trials that have ended, by number."""
    results = {}
    for trial in source.study.trials():
        if trial.state.is_finished():
            is_valid = trial.state == TrialState.COMPLETE and FAILURE_ATTR not in trial.user_attrs
            results[trial.number] = TrialResult(trial_name(trial.number), tuple(trial.values) if is_valid else ())
    return results


def _collect_trial(frozen: FrozenTrial, source: TrialSource) -> Trial:
    reports = dict(sorted(frozen.intermediate_values.items()))
    return Trial(
        number=frozen.number,
        values=source.final_values(frozen),
        epochs=max(reports, default=frozen.user_attrs.get(EPOCH_ATTR, 0)),
        objectives=tuple(source.objective_values(frozen)),
        pruned=frozen.state == TrialState.PRUNED,
        failure=frozen.user_attrs.get(FAILURE_ATTR, ""),
        reports=reports,
    )
