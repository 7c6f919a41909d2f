"""Population-based training, on objectives that are known in closed form."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.core import run_lock
from giffy_ray.training import checkpoint_selection, checkpoints, trainer
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.learners import Learner
from giffy_ray.tuning import tuner
from giffy_ray.tuning.optuna_study import FAILURE_ATTR, WORST
from giffy_ray.tuning.population import Population, check_population, exploit_and_explore
from giffy_ray.tuning.trial_runner import _train_generation, _train_in_process
from tests.training.test_checkpoints import BATCH, build_learner, step

EPOCHS = 6
SPACE = "{optim.lr: {log_uniform: [1e-3, 0.5]}, model.ends_weight: {choice: [1, 2, 4]}}"


def load_experiment(folder: Path, *overrides: str) -> Experiment:
    common = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.trials=8", f"search.epochs={EPOCHS}"]
    # A journal file, because SQLite waits for the disk after each of the thousands of reports.
    return load(None, [*common, "search.sampler=pbt", f"search.storage={folder}.log", *overrides])


class SimulatedTrainings:
    """Trainings of the loss w^2 / 2 from w = 1 by gradient descent: an epoch multiplies w by 1 - optim.lr.

    Like checkpoints, the weights outlive the process of the study.
    """

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], float] = {}  # (trial, epoch) -> w
        self.trained_epochs: list[tuple[int, int]] = []

    def train(self, number: int, values: dict, stop_epoch: int, exploit_from: list[int] | None) -> float:
        """Trains one generation. Returns the loss."""
        last_epoch = max((epoch for trial, epoch in self.weights if trial == number), default=0)
        if exploit_from:
            source_epoch, source_number = exploit_from
            if last_epoch <= source_epoch:
                self.weights[number, source_epoch] = self.weights[source_number, source_epoch]
        if last_epoch < stop_epoch:
            weight = self.weights.get((number, stop_epoch - 1), 1.0)
            self.weights[number, stop_epoch] = weight * (1 - values["optim.lr"])
            self.trained_epochs.append((number, stop_epoch))
        return self.weights[number, stop_epoch] ** 2 / 2

    def run(
        self, experiment: Experiment, concurrency: int = 1, seed: int = 0, kill_after: int | None = None
    ) -> Population:
        """Runs a population, whose concurrent trainings end in random order.

        `kill_after`: the number of trainings before the process is killed; the last one does not report.
        """
        population = Population(experiment)
        generator = random.Random(seed)
        running: list[tuple[int, dict, dict[str, Any]]] = []
        trainings = 0
        while True:
            while len(running) < concurrency and (proposal := population.ask()):
                number, values = proposal
                running.append((number, values, population.trial_directive(number)))
            if not running:
                assert population.stop_reason()
                return population
            number, values, directive = running.pop(generator.randrange(len(running)))
            loss = self.train(number, values, **directive)
            trainings += 1
            if trainings == kill_after:
                return population
            assert not population.report(number, directive["stop_epoch"], {"val/l2_paper": loss})
            population.end(number)


def history(population: Population) -> list[tuple]:
    return [
        (trial.number, trial.params, trial.intermediate_values, trial.user_attrs) for trial in population.study.trials()
    ]


def exploits_of(trial: FrozenTrial) -> list[list[Any]]:
    """Returns [epoch, source trial, new values] of each exploit."""
    return trial.user_attrs.get("taken", [])


def test_worst_quarter_copies_the_best_and_perturbs_its_values():
    space = {"lr": FloatDistribution(0.1, 1.1), "kind": CategoricalDistribution(("a", "b", "c"))}
    values = {number: {"lr": number / 8 + 0.1, "kind": "a"} for number in range(8)}
    costs = {0: 8.0, 1: 1.0, 2: 5.0, 3: 3.0, 4: 7.0, 5: 4.0, 6: 6.0, 7: 2.0}
    outcomes = set()
    for seed in range(50):
        exploits = exploit_and_explore(costs, values, space, str(seed))
        assert exploits.keys() == {0, 4}
        for source, new_values in exploits.values():
            assert source in (1, 7)
            expected = [min(max(factor * values[source]["lr"], 0.1), 1.1) for factor in (0.8, 1.2)]
            assert new_values["lr"] in expected
            assert new_values["kind"] in "ab"
            outcomes.add((source, expected.index(new_values["lr"]), new_values["kind"]))
        assert exploits == exploit_and_explore(costs, values, space, str(seed))
    assert len(outcomes) == 8
    assert exploit_and_explore({3: 1.0}, values, space, "") == {}


def test_reports_follow_from_the_values_and_the_population_improves(tmp_path: Path):
    population = SimulatedTrainings().run(load_experiment(tmp_path))
    trials = {trial.number: trial for trial in population.study.trials()}
    weights = {(number, 0): 1.0 for number in range(8)}
    values = {number: trial.params for number, trial in trials.items()}
    for epoch in range(1, EPOCHS + 1):
        for number, trial in trials.items():
            weights[number, epoch] = weights[number, epoch - 1] * (1 - values[number]["optim.lr"])
            expected = weights[number, epoch] ** 2 / 2
            assert trial.intermediate_values[epoch] == pytest.approx(expected, rel=1e-9)
        ranking = sorted(values, key=lambda number: trials[number].intermediate_values[epoch])
        exploits = {
            number: exploit for number, trial in trials.items() for exploit in exploits_of(trial) if exploit[0] == epoch
        }
        assert exploits.keys() == (set(ranking[-2:]) if epoch < EPOCHS else set())
        for number, (_, source, new_values) in exploits.items():
            assert source in ranking[:2]
            weights[number, epoch] = weights[source, epoch]
            values = {**values, number: new_values}
    # The larger the learning rate, the better.
    first_rates = [trial.params["optim.lr"] for trial in trials.values()]
    last_rates = [trial_values["optim.lr"] for trial_values in values.values()]
    assert max(last_rates) > max(first_rates)
    assert sum(map(math.log, last_rates)) > sum(map(math.log, first_rates)) + 1
    best_without_exploits = min(math.prod([1 - rate] * EPOCHS) ** 2 / 2 for rate in first_rates)
    best = population.study.best()[0]
    assert (best.value or 1) < best_without_exploits
    study = tuner.collect_study(population)
    assert study.best[0].values["optim.lr"] == values[best.number]["optim.lr"]
    assert study.trials[0].objectives == (best.value,)
    assert study.importances == {}


def test_history_depends_neither_on_the_order_of_reports_nor_on_concurrency(tmp_path: Path):
    histories = [
        history(SimulatedTrainings().run(load_experiment(tmp_path / str(seed)), concurrency, seed))
        for concurrency, seed in ((1, 0), (3, 1), (8, 2), (20, 3))
    ]
    # The seed of the study determines the values, which are drawn in order.
    assert all(later == histories[0] for later in histories[1:])


def test_repeatedly_killed_study_has_the_history_of_an_undisturbed_one(tmp_path: Path):
    undisturbed_trainings = SimulatedTrainings()
    killed_trainings = SimulatedTrainings()
    undisturbed = history(undisturbed_trainings.run(load_experiment(tmp_path / "whole"), 3))
    generator = random.Random(0)
    kills = 0
    while True:
        seed, kill_after = generator.randrange(99), generator.randrange(1, 9)
        population = killed_trainings.run(load_experiment(tmp_path / "killed"), 3, seed, kill_after)
        kills += 1
        if population.stop_reason():
            break
    assert kills > 5
    # Values that are drawn after a kill use another seed, so that a resumed study does not draw the same ones again.
    assert len(history(population)) == len(undisturbed) == 8
    assert all(list(reports) == list(range(1, EPOCHS + 1)) for _, _, reports, _ in history(population))
    assert sorted(killed_trainings.trained_epochs) == sorted(undisturbed_trainings.trained_epochs)  # none twice
    all_drawn = load_experiment(tmp_path / "begun")
    SimulatedTrainings().run(all_drawn, 8, kill_after=1)  # after all eight trials have drawn their values
    trainings = SimulatedTrainings()
    trainings.run(all_drawn, 8, 5, kill_after=20)
    trainings.run(all_drawn, 2, 6, kill_after=7)
    assert history(trainings.run(all_drawn, 5, 7)) == undisturbed


def test_diverged_trial_copies_another_and_failed_trial_leaves(tmp_path: Path):
    population, trainings = Population(load_experiment(tmp_path)), SimulatedTrainings()
    while proposal := population.ask():
        number, values = proposal
        directive = population.trial_directive(number)
        stop_epoch = directive["stop_epoch"]
        loss = trainings.train(number, values, **directive)
        if (number, stop_epoch) == (5, 2):
            loss = math.nan
        if (number, stop_epoch) == (3, 2):
            population.end(number, "the trial's process died")
            continue
        population.report(number, stop_epoch, {"val/l2_paper": loss})
        population.end(number)
    trials = population.study.trials()
    assert trials[5].intermediate_values[2] == WORST
    assert 2 in [epoch for epoch, _, _ in exploits_of(trials[5])]
    assert trials[5].intermediate_values[EPOCHS] < 0.5
    assert trials[3].user_attrs[FAILURE_ATTR] == "the trial's process died"
    assert max(trials[3].intermediate_values) == 1
    sources = {source for trial in trials for epoch, source, _ in exploits_of(trial) if epoch >= 2}
    assert 3 not in sources
    assert all(max(trial.intermediate_values) == EPOCHS for trial in trials if trial.number != 3)


def test_maximized_metric_has_the_history_of_its_minimized_negative(tmp_path: Path):
    minimized_trainings = SimulatedTrainings()
    minimized = history(minimized_trainings.run(load_experiment(tmp_path / "small")))
    maximized_trainings = SimulatedTrainings()
    population = Population(load_experiment(tmp_path / "large", "search.metric=val/skill"))
    while proposal := population.ask():
        number, values = proposal
        directive = population.trial_directive(number)
        loss = maximized_trainings.train(number, values, **directive)
        population.report(number, directive["stop_epoch"], {"val/skill": -loss})
        population.end(number)
    maximized = history(population)
    assert maximized_trainings.weights == minimized_trainings.weights
    assert [(number, params, attributes) for number, params, _, attributes in maximized] == [
        (number, params, attributes) for number, params, _, attributes in minimized
    ]
    results = {trial.number: (trial.value or 0) for trial in population.study.trials()}
    assert population.study.best()[0].number == max(results, key=lambda number: results[number])


def test_diverged_trial_ranks_last_by_a_maximized_metric(tmp_path: Path):
    population = Population(load_experiment(tmp_path, "search.metric=val/skill"))
    while proposal := population.ask():
        number, _ = proposal
        stop_epoch = population.trial_directive(number)["stop_epoch"]
        diverges = (number, stop_epoch) == (5, 2)
        population.report(number, stop_epoch, {"val/skill": math.nan if diverges else -3e6 + number})
        population.end(number)
    trials = population.study.trials()
    assert trials[5].intermediate_values[2] == -WORST
    sources = {epoch: source for epoch, source, _ in exploits_of(trials[5])}
    assert sources[2] in (6, 7)  # although every other result is below -WORST
    assert all(FAILURE_ATTR not in trial.user_attrs for trial in trials)


def test_population_ends_after_its_hours_and_drops_stopped_trials(tmp_path: Path):
    late = Population(load_experiment(tmp_path / "late", "search.max_hours=1e-9"))
    assert late.ask() is None
    assert "search.max_hours" in late.stop_reason()
    overrides = ["search.trials=2", "train.validate_every=4"]
    population = Population(load_experiment(tmp_path / "stopped", *overrides))
    number, _ = population.ask() or (-1, {})
    assert population.trial_directive(number) == {"stop_epoch": 4, "exploit_from": None}
    population.end(number)  # without its report
    assert population.study.trials()[0].user_attrs[FAILURE_ATTR] == "stopped after epoch 0"
    other_number, _ = population.ask() or (-1, {})
    assert other_number == 1
    assert population.ask() is None  # nothing to do while the other trial trains
    assert population.stop_reason() == ""
    population.report(other_number, 4, {"val/l2_paper": 1.0})
    population.end(other_number)
    assert (population.ask() or (-1,))[0] == other_number  # the last trial has none to copy from
    assert population.trial_directive(other_number) == {"stop_epoch": EPOCHS, "exploit_from": None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.space={model.latent: {int: [8, 16]}}"], r"search\.space\.model\.latent: cannot change.*optim\.lr, "),
        (["search.space={optim.beta1: {uniform: [0.5, 0.9]}}"], r"search\.space\.optim\.beta1: cannot change"),
        (
            ["search.space={train.global_batch_size: {int: [8, 16]}}"],
            r"search\.space\.train\.global_batch_size: cannot.*model\.ends_weight",
        ),
        (
            ["search.objectives={val/skill: maximize, val/blur: minimize}"],
            r"search\.objectives: .*search\.metric alone",
        ),
        (["search.workers=2"], r"search\.workers: .*one worker per trial \(value 2\)"),
        (["search.patience=3"], r"search\.patience: .*remove it \(value 3\)"),
        (["search.trials=1"], r"search\.trials: .*at least two trials \(value 1\)"),
        (
            ["model.kind=between", "search.space={model.adversarial_weight: {uniform: [0, 1]}}"],
            r"search\.space\.model\.adversarial_weight: at 0 there is no discriminator",
        ),
    ],
)
def test_unsupported_search_is_rejected_before_anything_starts(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        tuner.initial_points(load_experiment(tmp_path, *overrides))


def test_learning_rates_and_label_smoothing_are_searchable(tmp_path: Path):
    space = "{optim.discriminator_lr: {log_uniform: [1e-5, 1e-2]}, model.real_label: {uniform: [0.7, 1]}}"
    check_population(load_experiment(tmp_path, "model.kind=cgan", f"search.space={space}"))


def save_checkpoint(run: Experiment, name: str, learner: Learner, steps: int, epoch: int | None) -> None:
    path = Path(run.storage, run.name, name)
    path.mkdir(parents=True)
    checkpoints.Snapshot(learner, run, TrainState(steps, {"val/l2_paper": float(steps)}, epoch=epoch)).save(path)


def test_trial_resumes_from_anothers_weights_with_its_own_learning_rate(tiny: Experiment, tmp_path: Path):
    source = override(
        tiny, {"storage": str(tmp_path), "name": "trial-0001", "train.global_batch_size": BATCH, "optim.lr": 1e-3}
    )
    copier = override(source, {"name": "trial-0002", "optim.lr": 3e-3})
    source_learner = build_learner(source)
    copier_learner = build_learner(override(copier, {"train.seed": 5}))
    for number in range(2):
        step(source_learner, source, number)
    save_checkpoint(source, "checkpoint_1", source_learner, 2, 1)
    before = {key: value.clone() for key, value in source_learner.networks["cvae"].state_dict().items()}
    step(source_learner, source, 2)
    save_checkpoint(source, "checkpoint_2", source_learner, 3, 2)  # the source trains on meanwhile
    save_checkpoint(copier, "checkpoint_1", copier_learner, 2, 1)

    for _ in range(2):  # as after an interruption
        checkpoints.copy_checkpoint_from(copier, source, 1)
        resumed = build_learner(copier)
        assert checkpoints.restore(checkpoint_selection.latest_checkpoint(copier), resumed).epoch == 1
        assert all(torch.equal(value, before[key]) for key, value in resumed.networks["cvae"].state_dict().items())
    # A step of Adam is the learning rate times a function of state and gradient, which are the same for both.
    step(resumed, copier, 2)
    after = resumed.networks["cvae"].state_dict()
    source_after = source_learner.networks["cvae"].state_dict()
    for key, _ in resumed.networks["cvae"].named_parameters():
        expected = 3 * (source_after[key] - before[key])
        assert torch.allclose(after[key] - before[key], expected, rtol=1e-3, atol=1e-6), key

    save_checkpoint(copier, "checkpoint_9", resumed, 3, None)
    checkpoints.copy_checkpoint_from(copier, source, 1)  # does nothing: the copier has passed that epoch
    assert checkpoint_selection.latest_checkpoint(copier).endswith("checkpoint_9")
    with pytest.raises(ConfigError, match=r"no valid checkpoint in .*trial-0001"):
        checkpoints.copy_checkpoint_from(copier, source, 5)


def test_checkpoints_that_others_may_copy_are_kept(tiny: Experiment, tmp_path: Path):
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    for number, epoch in enumerate([1, 2, None, 3, None, None]):
        save_checkpoint(run, f"checkpoint_{number}", build_learner(run), number, epoch)
    checkpoint_selection.remove_older(run, epochs=2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint_1",
        "checkpoint_3",
        "checkpoint_5",
    ]
    checkpoint_selection.remove_older(run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint_5"]


class FakeDataset:
    fingerprint, location = "f", "here"

    def split_indices(self, split: str) -> list[int]:
        return [0]


def test_generation_may_change_searched_fields_only(tiny: Experiment, tmp_path: Path):
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    mutable_fields = (*trainer.MUTABLE_FIELDS, "optim.lr")
    dataset: Any = FakeDataset()
    with trainer.locked_run(run, dataset, mutable_fields):
        pass
    new_rate = override(run, {"optim.lr": 0.5})
    with trainer.locked_run(new_rate, dataset, mutable_fields):
        pass
    with (
        pytest.raises(ConfigError, match=r"optim\.lr: the run 'run' was started with"),
        trainer.locked_run(new_rate, dataset),
    ):
        pass
    new_beta = override(new_rate, {"optim.beta1": 0.5})
    with (
        pytest.raises(ConfigError, match=r"optim\.beta1: the run 'run'"),
        trainer.locked_run(new_beta, dataset, mutable_fields),
    ):
        pass


def test_trial_leaves_checkpoints_of_a_run_that_another_process_trains(tiny: Experiment, tmp_path: Path):
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    dataset: Any = FakeDataset()
    save_checkpoint(run, "checkpoint_1", build_learner(run), 1, 1)
    save_checkpoint(run, "checkpoint_2", build_learner(run), 2, 2)
    incomplete = tmp_path / "run" / "checkpoint_2"
    (incomplete / "manifest.json").unlink()
    with run_lock.run_lock(run.run_dir):
        for start in (
            lambda: _train_in_process(run, dataset, ""),
            lambda: _train_generation(run, run, dataset, "", 2, None),
            lambda: trainer.train(run, dataset, WorkerResources(1, 0, 1)),
        ):
            with pytest.raises(ConfigError, match="'run' is being trained by process"):
                start()
    assert incomplete.exists()


def test_waiting_population_does_not_query_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray Tune asks for the next trial continually while others train."""
    population = Population(load_experiment(tmp_path))
    numbers = []
    while proposal := population.ask():
        numbers.append(proposal[0])
    assert len(numbers) == 8
    for number in numbers[:-1]:
        population.report(number, 1, {"val/l2_paper": float(number)})
        population.end(number)
    last = numbers[-1]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the storage is queried")

    with monkeypatch.context() as patch:
        for name in ("get_trial", "get_all_trials", "get_study_user_attrs", "get_best_trial"):
            patch.setattr(type(population.study._study._storage), name, fail)
        for _ in range(100):
            assert population.ask() is None
            assert population.stop_reason() == ""
            assert population.trial_directive(last) == {"stop_epoch": 1, "exploit_from": None}
    population.report(last, 1, {"val/l2_paper": 100.0})
    population.end(last)
    resumed = Population(load_experiment(tmp_path))
    while proposal := population.ask():
        number, _ = proposal
        assert resumed.ask() == proposal  # the state in memory equals the stored one
        assert resumed.trial_directive(number) == population.trial_directive(number)
