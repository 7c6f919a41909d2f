"""Search: Ray Tune with Optuna proposes values, each trial is a training of its own; the only importer of ray.tune.

A trial's driver is a Tune trainable that takes no CPU and starts Ray Train's workers, whose reports ASHA sees. The
objective is a validation metric that does not contain what is searched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import ray.exceptions
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from giffy_ray.cluster import Share
from giffy_ray.config import ConfigError, Distribution, Experiment, SearchConfig, flatten, from_yaml, override, to_yaml
from giffy_ray.data.store import Store
from giffy_ray.reports import line_of
from giffy_ray.storage import join
from giffy_ray.tracking import tracking_uri
from giffy_ray.train import check, train

# Trial drivers stay on the head node, which is not a spot machine; Tune refuses a trial that asks for nothing.
_DRIVER = {"CPU": 0, "node:__internal_head__": 0.001}


@dataclass(frozen=True)
class Trial:
    """One finished trial: what it tried, and the best value of the metric that it reported."""

    name: str
    values: dict[str, Any]
    epochs: int
    best: float


@dataclass(frozen=True)
class Study:
    best: Trial
    trials: tuple[Trial, ...]  # best first
    failed: dict[str, str]  # name of a trial -> its error


def search(experiment: Experiment, store: Store, share: Share, parent: str) -> Study:
    """Runs `search.trials` trials of the experiment over `search.space`, the report's values first.

    `parent` is the place of the run that the trials are shown under. Raises ConfigError before anything starts.
    """
    settings = experiment.search
    check(experiment, store)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's banner; _Tell says what there is to say
    space = space_of(experiment)
    driver = functools.partial(_trial, experiment=to_yaml(experiment), store=store.location, share=share, parent=parent)
    tuner = tune.Tuner(
        tune.with_resources(driver, _DRIVER),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode="min",
            num_samples=settings.trials,
            max_concurrent_trials=share.trainings,
            search_alg=OptunaSearch(seed=settings.seed, points_to_evaluate=first_points(settings)),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                # One more than a trial ever reports: a trial that gets to its end is not to be killed there.
                max_t=settings.epochs + 1,
                grace_period=settings.grace_epochs,
                reduction_factor=2,
            ),
            reuse_actors=True,  # one process start less for each trial
            trial_name_creator=lambda trial: trial_name(trial.trial_id),
            trial_dirname_creator=lambda trial: trial_name(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=join(experiment.storage, experiment.name),
            verbose=0,
            callbacks=[_Tell(settings)],
        ),
    )
    return _study(tuner.fit(), experiment)


def space_of(experiment: Experiment) -> dict[str, Any]:
    """`search.space` as Ray Tune's distributions. Every bound is tried on the experiment first: ConfigError."""
    if not experiment.search.space:
        raise ConfigError("search.space: nothing to search; give it fields such as optim.lr: {log_uniform: [...]}")
    space = {}
    for name, spec in experiment.search.space.items():
        if len(spec) != 1:
            raise ConfigError(f"search.space.{name}: give one distribution, as {{uniform: [0, 1]}} (value {spec!r})")
        kind, values = next(iter(spec.items()))
        for value in values:
            override(experiment, {name: value})
        space[name] = _distribution(f"search.space.{name}", kind, values)
    return space


def _distribution(where: str, kind: Distribution, values: Sequence[Any]) -> Any:
    if kind == "choice":
        return tune.choice(list(values))
    if len(values) != 2 or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} needs [low, high] with low < high (value {list(values)!r})")
    if kind == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"{where}: log_uniform needs low > 0 (value {list(values)!r})")
    match kind:
        case "log_uniform":
            return tune.loguniform(*values)
        case "uniform":
            return tune.uniform(*values)
        case "int":
            return tune.randint(values[0], values[1] + 1)


def first_points(settings: SearchConfig) -> list[dict[str, Any]]:
    """The report's values of what is searched, where the space holds them: the trial that the others must beat."""
    report = {name: value for name, value in flatten(Experiment()).items() if name in settings.space}

    def holds(name: str) -> bool:
        kind, values = next(iter(settings.space[name].items()))
        return report[name] in values if kind == "choice" else values[0] <= report[name] <= values[1]

    return [report] if all(holds(name) for name in report) else []


def _trial(values: dict[str, Any], experiment: str, store: str, share: Share, parent: str) -> None:
    """One trial: a training of its own, in the study's folder, with the trial's values."""
    study = from_yaml(experiment)
    changes = {
        "name": trial_name(tune.get_context().get_trial_id() or ""),
        "storage": join(study.storage, study.name),
        "tracking.uri": tracking_uri(study),
        "train.epochs": study.search.epochs,
    }
    train(override(study, changes | values), Store(store), share, parent, [TuneReportCallback()])


def trial_name(trial_id: str) -> str:
    return f"trial-{trial_id}"


class _Tell(tune.Callback):
    """A line when a trial starts, and one for each of its reports."""

    def __init__(self, settings: SearchConfig):
        self.settings, self.numbers = settings, {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)
        values = "  ".join(f"{name} {value:.3g}" for name, value in trial.config.items())
        print(f"trial {number}/{self.settings.trials}  {values}", flush=True)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        number = self.numbers[trial.trial_id]
        print(f"trial {number}/{self.settings.trials}  {line_of(result, self.settings.epochs)}", flush=True)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        print(f"trial {self.numbers[trial.trial_id]}/{self.settings.trials}  failed", flush=True)


def _study(results: tune.ResultGrid, experiment: Experiment) -> Study:
    trials, failed = [], {}
    for result in results:
        name = (result.path or "").rpartition("/")[2]
        reports = result.metrics_dataframe
        if reports is None or reports.empty or experiment.search.metric not in reports:
            failed[name] = str(result.error or "it reported nothing")
            continue
        # Trials that ASHA ends raise ActorDiedError in their driver; they have reported, and that is what counts.
        if result.error and not isinstance(result.error, ray.exceptions.RayActorError):
            failed[name] = str(result.error)
        best = float(reports[experiment.search.metric].to_numpy().min())
        trials.append(Trial(name, dict(result.config or {}), int(reports["epoch"].to_numpy().max()), best))
    if not trials:
        raise RuntimeError(f"none of the {len(failed)} trials of {experiment.name} reported: {failed}")
    trials.sort(key=lambda trial: trial.best)
    return Study(trials[0], tuple(trials), failed)
