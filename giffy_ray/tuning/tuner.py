"""Search: Optuna proposes values (`ledger`), Ray Tune runs each trial in an actor of its own (`trial`).

What is known of a search lies in Optuna's storage and the trials' folders, not in Ray Tune's: a search that was killed
goes on from there. The objective is a validation metric that does not contain what is searched.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.execution import class_cache  # no setting says what Tune passes on
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.cluster.shared_storage import leave_token, remove_token
from giffy_ray.config import ConfigError, Experiment, override, to_yaml
from giffy_ray.core.run_lock import RunLock
from giffy_ray.core.storage import join, read_text
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.tracking.tracker import params_of, tracking_uri
from giffy_ray.training import checkpoints
from giffy_ray.training.progress_callback import format_epoch
from giffy_ray.training.trainer import check, check_experiment, checkpoint_bytes, locked_run
from giffy_ray.tuning.objectives import check_metrics, objectives
from giffy_ray.tuning.optuna_storage import opened, refuse_database_of
from giffy_ray.tuning.optuna_study import ENDED, EPOCH, OptunaStudy
from giffy_ray.tuning.population import Population
from giffy_ray.tuning.population import check as check_population
from giffy_ray.tuning.search_space import Values, combinations, distributions, earlier_point, edges, reports_point
from giffy_ray.tuning.trial_runner import FAILED, experiment_of, name_of, trial

__all__ = [
    "Study",
    "Trial",
    "check_search",
    "check_trainings",
    "claim",
    "experiment_of",
    "initial_points",
    "most_trials",
    "objectives",
    "refit_experiment",
    "resolve_study",
    "search",
    "search_claimed",
]

# What may differ where a search goes on.
_MAY_CHANGE = (
    *("search.trials", "search.max_hours", "search.patience", "search.resume", "search.enqueue"),
    *("storage", "data.root", "data.node_cache_gb", "speed.", "cluster.", "tracking.", "evaluate."),
)


@dataclass(frozen=True)
class Trial:
    """One trial that is over: what it tried, and its value of each objective."""

    number: int
    values: Values
    epochs: int
    objectives: tuple[float, ...]
    cut: bool  # it was ended early, as others were better by then
    ended: str  # why it has no value to speak of; an empty string where it has
    reports: dict[int, float]  # epoch -> the objective, where there is a single one

    @property
    def name(self) -> str:
        return name_of(self.number)


@dataclass(frozen=True)
class Study:
    trials: tuple[Trial, ...]  # best first; those that failed last
    best: tuple[Trial, ...]  # of several objectives those that no other is better than in all of them
    stop_reason: str
    importances: dict[str, dict[str, float]]  # objective -> field -> its share; empty where there are too few trials


def search(
    experiment: Experiment, store: ClipDataset, share: WorkerResources, parent: str, points: Sequence[Values] = ()
) -> Study:
    """Runs trials of the experiment over `search.space` until there are `search.trials`, or its budget is spent.

    `points` are tried first. `share` is what a trial gets; `parent` is the place of the run that the trials are shown
    under. Raises ConfigError before anything starts, RuntimeError where every trial failed.
    """
    with claim(experiment, store) as lease:
        return search_claimed(experiment, store, share, parent, points, lease)


@contextmanager
def claim(experiment: Experiment, store: ClipDataset) -> Iterator[RunLock]:
    """Inside, the search of the experiment's name is ours: nobody else writes to its folder and its MLflow run.

    Raises ConfigError before anything starts.
    """
    check_search(experiment)
    values = {name: edges(distribution)[0] for name, distribution in distributions(experiment).items()}
    check(experiment_of(experiment, 0, values), store, values)
    with locked_run(experiment, store, _MAY_CHANGE) as lease:
        _warn_of_little_space(experiment)
        yield lease


def _warn_of_little_space(experiment: Experiment) -> None:
    """Each trial keeps its newest checkpoint; members of a population those of two epochs too."""
    trials, kept = most_trials(experiment), 3 if experiment.search.sampler == "pbt" else 1
    size, free = checkpoint_bytes(experiment_of(experiment, 0, {})), checkpoints.free_bytes(experiment)
    if trials * kept * size > free:
        print(
            f"warning: search.trials: the checkpoints of {trials} trials take up to {trials * kept * size / 1e9:.2g} "
            f"GB (value {experiment.search.trials}), and {free / 1e9:.2g} GB are free on the disk of "
            f"{experiment.storage}",
            file=sys.stderr,
            flush=True,
        )


def search_claimed(
    experiment: Experiment,
    store: ClipDataset,
    share: WorkerResources,
    parent: str,
    points: Sequence[Values],
    lease: RunLock,
) -> Study:
    """As `search`, within `claim`, whose lease is given."""
    ledger = (Population if experiment.search.sampler == "pbt" else OptunaStudy)(experiment, points)
    if ledger.unfinished() or not ledger.stop_reason():
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's banner; _Tells says what there is to say
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # and so it does of trials that fail
        withhold_credentials()
        if share.summary:
            print(share.summary, flush=True)
        _tuner(experiment, store, share, parent, ledger, lease).fit()
        remove_token(experiment, lease.holder)
        lease.check()
    return _study(ledger)


def withhold_credentials() -> None:
    """Keeps Ray Tune from giving trials the driver's AWS_* by a runtime environment, which Ray writes to its logs.

    They have them already: `cluster.connect` passes them on.
    """
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if "AWS_" in name}


def resolve_study(experiment: Experiment) -> Experiment:
    """The search of an experiment: one that is there to be gone on with, or a new one, as `search.resume` says.

    Raises ConfigError where one must be there and is not.
    """
    name = f"{experiment.name}-study"
    if experiment.search.resume == "never":
        name = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    override(experiment, {"name": _best_name(name)})  # one that is too long is refused now, not after the search
    study = override(experiment, {"name": name})
    if experiment.search.resume == "must" and read_text(join(study.storage, name, "experiment.yaml")) is None:
        raise ConfigError(f"search.resume: there is no search {name!r} in {study.storage} to go on with (value 'must')")
    return study


def check_search(experiment: Experiment) -> None:
    """What can be known to be wrong with the `search` section without a cluster or clips. Raises ConfigError."""
    distributions(experiment)
    check_metrics(experiment)
    if experiment.search.patience and len(experiment.search.objectives) > 1:
        raise ConfigError(
            f"search.patience: has no effect with several search.objectives, of which no trial is the best (value "
            f"{experiment.search.patience}); leave it out, or give one objective"
        )
    if experiment.search.sampler == "pbt":
        check_population(experiment)


def check_trainings(experiment: Experiment) -> None:
    """Raises ConfigError where a trial, or the training of the best one, would be refused with a value of the space.

    Each bound and choice is tried, with the first one of the other fields.
    """
    study, space = resolve_study(experiment), distributions(experiment)
    ends = {name: edges(distribution) for name, distribution in space.items()}
    first = {name: values[0] for name, values in ends.items()}
    for values in [first, *({**first, name: value} for name, others in ends.items() for value in others[1:])]:
        for what, training in (
            ("a trial", experiment_of(study, 0, values)),
            ("the training of the best trial", override(experiment, values)),
        ):
            try:
                check_experiment(training, space)
            except ConfigError as error:
                said = ", ".join(f"{name}={value}" for name, value in values.items())
                raise ConfigError(f"search.space: {what} with {said} cannot run: {error}") from error


def most_trials(experiment: Experiment) -> int:
    """How many trials a search has at most: `search.trials`, or fewer where `search.space` has fewer combinations."""
    points, trials = combinations(distributions(experiment)), experiment.search.trials
    return trials if points is None or experiment.search.sampler == "pbt" else min(trials, points)


def initial_points(experiment: Experiment) -> list[Values]:
    """What a new search tries first: the report's values, then those of `search.enqueue`.

    Raises ConfigError, also where `search.storage` cannot be opened.
    """
    check_search(experiment)
    uri = tracking_uri(experiment)
    if experiment.search.storage:
        refuse_database_of(uri, experiment)
        opened(experiment).remove_session()
    report = reports_point(experiment)
    earlier = [earlier_point(experiment, run, params_of(uri, run)) for run in experiment.search.enqueue]
    return [*([report] if report else []), *earlier]


def refit_experiment(experiment: Experiment, study: Experiment, found: Study) -> Experiment:
    """The training of the best trial's values. They were the last of several in a population: on from its weights."""
    best = found.best[0]
    changes = best.values | {"name": _best_name(study.name)}
    if study.search.sampler == "pbt":
        changes["train.init_from"] = checkpoints.latest_checkpoint(experiment_of(study, best.number, best.values))
    return override(experiment, changes)


def _best_name(study: str) -> str:
    return f"{study}-best"


def _tuner(
    experiment: Experiment, store: ClipDataset, share: WorkerResources, parent: str, ledger: OptunaStudy, lease: RunLock
) -> tune.Tuner:
    yaml = to_yaml(experiment)
    token = leave_token(experiment, lease.holder)
    run = functools.partial(trial, study=yaml, store=store.location, share=share, parent=parent, token=token)
    return tune.Tuner(
        tune.with_resources(run, _resources(experiment, share)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the ledger has no more
            max_concurrent_trials=share.trainings,
            search_alg=OptunaSearcher(ledger),
            scheduler=PruningScheduler(ledger),
            reuse_actors=True,  # one process start less for each trial that does not fail
            trial_name_creator=_known_as,
            trial_dirname_creator=_known_as,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=join(experiment.storage, experiment.name),
            failure_config=tune.FailureConfig(max_failures=experiment.cluster.max_failures),
            verbose=0,
            stop=_WhenLost(lease),
            callbacks=[TrialProgressCallback(experiment)],
        ),
    )


class _WhenLost(tune.Stopper):
    """Ends the trials of a search that another process goes on with."""

    def __init__(self, lease: RunLock):
        self.lease = lease

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.lease.lost)

    def __getstate__(self) -> dict[str, Any]:
        """Of a file that Ray Tune writes and we never read: a lease has a thread."""
        return {}


def _known_as(one: Any) -> str:
    """Of Ray Tune's trials, which are turns where ours train in turns."""
    name, until = name_of(one.config["number"]), one.config.get("until")
    return name if until is None else f"{name}-{until:04}"


def _resources(experiment: Experiment, share: WorkerResources) -> dict[str, float]:
    """Of a trial's actor. One that has workers only drives them, and stays on the head, which is no spot machine."""
    if experiment.search.workers > 1:
        return {"CPU": 0, "node:__internal_head__": 0.001}  # Tune refuses a trial that asks for nothing
    return {"CPU": share.cpus_per_worker, "GPU": share.gpus_per_worker}


class OptunaSearcher(Searcher):
    """Ray Tune's side of `OptunaStudy.ask`."""

    def __init__(self, ledger: OptunaStudy):
        super().__init__()
        self.ledger = ledger
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        asked = self.ledger.ask()
        if asked is None:
            return Searcher.FINISHED if self.ledger.stop_reason() else None  # None: not now
        self.numbers[trial_id], values = asked
        return {"number": asked[0], "values": values, **self.ledger.trial_directive(asked[0])}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.ledger.end(self.numbers[trial_id], "its process died" if error else "")

    def save(self, checkpoint_path: str) -> None:
        """The ledger keeps everything already."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


class PruningScheduler(FIFOScheduler):
    """Ray Tune's side of `OptunaStudy.report`."""

    def __init__(self, ledger: OptunaStudy):
        super().__init__()
        self.ledger = ledger

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if FAILED in result:
            self.ledger.end(number, result[FAILED])
            trial.max_failures = 0  # what failed is raised next, which ends the actor, and is not tried again
            return TrialScheduler.CONTINUE
        if "epoch" not in result:  # only a checkpoint
            return TrialScheduler.CONTINUE
        ended = self.ledger.report(number, result["epoch"], result)
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE


class TrialProgressCallback(tune.Callback):
    """A line when a trial starts, and one for each of its reports."""

    def __init__(self, experiment: Experiment):
        self.settings, self.trials = experiment.search, most_trials(experiment)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        values = "  ".join(f"{name} {_short(value)}" for name, value in trial.config["values"].items())
        take = trial.config.get("take")
        self._say(trial, f"{values}  on from trial {take[1] + 1}" if take else values)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if FAILED in result:
            self._say(trial, result[FAILED])
        elif "epoch" in result:
            self._say(trial, format_epoch(result, self.settings.epochs))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if FAILED not in trial.last_result:
            self._say(trial, "its process died")

    def _say(self, trial: Any, what: str) -> None:
        print(f"trial {trial.config['number'] + 1}/{self.trials}  {what}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _study(ledger: OptunaStudy) -> Study:
    trials = [_trial_of(frozen, ledger) for frozen in ledger.trials()]
    best = {frozen.number for frozen in ledger.best()}
    sign = 1 if next(iter(ledger.objectives.values())) == "minimize" else -1
    trials.sort(key=lambda one: (bool(one.ended), sign * one.objectives[0] if one.objectives else 0))
    if not best:
        reasons = "\n  ".join(f"{one.name}: {one.ended}" for one in trials)
        raise RuntimeError(f"none of {len(trials)} trials came to a value:\n  {reasons}")
    winners = tuple(one for one in trials if one.number in best)
    return Study(tuple(trials), winners, ledger.stop_reason(), ledger.importances())


def _trial_of(frozen: FrozenTrial, ledger: OptunaStudy) -> Trial:
    reports = dict(sorted(frozen.intermediate_values.items()))
    epochs = max(reports, default=frozen.user_attrs.get(EPOCH, 0))
    cut, ended = frozen.state == TrialState.PRUNED, frozen.user_attrs.get(ENDED, "")
    return Trial(frozen.number, ledger.params_of(frozen), epochs, tuple(ledger.values_of(frozen)), cut, ended, reports)
