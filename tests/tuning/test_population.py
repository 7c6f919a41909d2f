"""Population-based training, on objectives whose course is known in closed form."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution

from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.core import run_lock
from giffy_ray.training import checkpoints, trainer
from giffy_ray.training.checkpoints import TrainState
from giffy_ray.training.learners import Learner
from giffy_ray.tuning import tuner
from giffy_ray.tuning.optuna_study import ENDED, WORST
from giffy_ray.tuning.population import Population, check, exploit_and_explore
from giffy_ray.tuning.trial_runner import _alone, _turn
from tests.training.test_checkpoints import BATCH, built, step

EPOCHS = 6
SPACE = "{optim.lr: {log_uniform: [1e-3, 0.5]}, model.ends_weight: {choice: [1, 2, 4]}}"


def experiment(folder: Path, *words: str) -> Experiment:
    given = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.trials=8", f"search.epochs={EPOCHS}"]
    # A journal file: there are thousands of reports here, for each of which SQLite waits for the disk.
    return load(None, [*given, "search.sampler=pbt", f"search.storage={folder}.log", *words])


class World:
    """Trainings of the loss w^2 / 2 from w = 1 by gradient descent: an epoch multiplies w by 1 - optim.lr.

    What is here outlives whoever searches, as checkpoints do.
    """

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], float] = {}  # (trial, epoch) -> w
        self.turns: list[tuple[int, int]] = []

    def take_turn(self, number: int, values: dict, until: int, take: tuple[int, int] | None) -> float:
        done = max((epoch for trial, epoch in self.weights if trial == number), default=0)
        if take and done <= take[0]:
            self.weights[number, take[0]] = self.weights[take[1], take[0]]
        if done < until:
            before = self.weights.get((number, until - 1), 1.0)
            self.weights[number, until] = before * (1 - values["optim.lr"])
            self.turns.append((number, until))
        return self.weights[number, until] ** 2 / 2

    def search(self, asked: Experiment, beside: int = 1, seed: int = 0, kill_after: int | None = None) -> Population:
        """`beside` turns at a time, which end in random order. `kill_after`: so many, the last without a report."""
        ledger, drawn, running, ended = Population(asked), random.Random(seed), [], 0
        while True:
            while len(running) < beside and (given := ledger.ask()):
                running.append((given[0], given[1], ledger.turn(given[0])))
            if not running:
                assert ledger.stop_reason()
                return ledger
            number, values, turn = running.pop(drawn.randrange(len(running)))
            value = self.take_turn(number, values, **turn)
            ended += 1
            if ended == kill_after:
                return ledger
            assert not ledger.report(number, turn["until"], {"val/l2_paper": value})
            ledger.end(number)


def course(ledger: Population) -> list[tuple]:
    return [(one.number, one.params, one.intermediate_values, one.user_attrs) for one in ledger.trials()]


def test_the_worst_quarter_takes_over_the_best_and_moves_its_values_a_little():
    space = {"lr": FloatDistribution(0.1, 1.1), "kind": CategoricalDistribution(("a", "b", "c"))}
    values = {number: {"lr": number / 8 + 0.1, "kind": "a"} for number in range(8)}
    reached = {0: 8.0, 1: 1.0, 2: 5.0, 3: 3.0, 4: 7.0, 5: 4.0, 6: 6.0, 7: 2.0}
    seen = set()
    for seed in range(50):
        taken = exploit_and_explore(reached, values, space, str(seed))
        assert taken.keys() == {0, 4}
        for source, new in taken.values():
            assert source in (1, 7)
            wanted = [min(max(factor * values[source]["lr"], 0.1), 1.1) for factor in (0.8, 1.2)]
            assert new["lr"] in wanted
            assert new["kind"] in "ab"
            seen.add((source, wanted.index(new["lr"]), new["kind"]))
        assert taken == exploit_and_explore(reached, values, space, str(seed))
    assert len(seen) == 8
    assert exploit_and_explore({3: 1.0}, values, space, "") == {}


def test_every_course_is_that_of_its_values_and_the_population_goes_the_right_way(tmp_path: Path):
    ledger = World().search(experiment(tmp_path))
    trials = ledger.trials()
    w = {(number, 0): 1.0 for number in range(8)}
    values = {one.number: one.params for one in trials}
    for epoch in range(1, EPOCHS + 1):
        for one in trials:
            w[one.number, epoch] = w[one.number, epoch - 1] * (1 - values[one.number]["optim.lr"])
            assert one.intermediate_values[epoch] == pytest.approx(w[one.number, epoch] ** 2 / 2, rel=1e-9)
        ranked = sorted(values, key=lambda number: one_of(trials, number).intermediate_values[epoch])
        takers = {one.number: took for one in trials for took in one.user_attrs.get("taken", []) if took[0] == epoch}
        assert takers.keys() == (set(ranked[-2:]) if epoch < EPOCHS else set())
        for number, (_, source, new) in takers.items():
            assert source in ranked[:2]
            w[number, epoch], values = w[source, epoch], {**values, number: new}
    # The larger the rate the better, here.
    first, last = [one.params["optim.lr"] for one in trials], [one["optim.lr"] for one in values.values()]
    assert max(last) > max(first)
    assert sum(map(math.log, last)) > sum(map(math.log, first)) + 1
    unaided = min(math.prod([1 - rate] * EPOCHS) ** 2 / 2 for rate in first)
    best = ledger.best()[0]
    assert (best.value or 1) < unaided
    found = tuner._study(ledger)
    assert found.best[0].values["optim.lr"] == values[best.number]["optim.lr"]
    assert found.trials[0].objectives == (best.value,)
    assert found.importances == {}


def one_of(trials: list, number: int):
    return next(one for one in trials if one.number == number)


def test_the_course_does_not_depend_on_who_is_first_nor_on_how_many_train_at_once(tmp_path: Path):
    courses = [
        course(World().search(experiment(tmp_path / str(seed)), beside, seed))
        for beside, seed in ((1, 0), (3, 1), (8, 2), (20, 3))
    ]
    # Values are drawn in order, by the seed of the search.
    assert all(one == courses[0] for one in courses)


def test_a_search_that_is_killed_again_and_again_has_the_course_of_one_that_is_not(tmp_path: Path):
    whole, killed = World(), World()
    undisturbed = course(whole.search(experiment(tmp_path / "whole"), 3))
    drawn = random.Random(0)
    kills = 0
    while True:
        ledger = killed.search(experiment(tmp_path / "killed"), 3, drawn.randrange(99), drawn.randrange(1, 9))
        kills += 1
        if ledger.stop_reason():
            break
    assert kills > 5
    # Those that are drawn after a kill are of another seed: a search that goes on does not draw the same again.
    assert len(course(ledger)) == len(undisturbed) == 8
    assert all(list(reports) == list(range(1, EPOCHS + 1)) for _, _, reports, _ in course(ledger))
    assert sorted(killed.turns) == sorted(whole.turns)  # none twice
    begun = experiment(tmp_path / "begun")
    World().search(begun, 8, kill_after=1)  # all eight are drawn
    again = World()
    again.search(begun, 8, 5, kill_after=20)
    again.search(begun, 2, 6, kill_after=7)
    assert course(again.search(begun, 5, 7)) == undisturbed


def test_what_diverges_takes_over_another_and_what_fails_is_out(tmp_path: Path):
    ledger, world = Population(experiment(tmp_path)), World()
    while asked := ledger.ask():
        number, turn = asked[0], ledger.turn(asked[0])
        value = world.take_turn(number, asked[1], **turn)
        if (number, turn["until"]) == (5, 2):
            value = math.nan
        if number == 3 and turn["until"] == 2:
            ledger.end(number, "its process died")
            continue
        ledger.report(number, turn["until"], {"val/l2_paper": value})
        ledger.end(number)
    trials = ledger.trials()
    assert trials[5].intermediate_values[2] == WORST
    assert 2 in [took[0] for took in trials[5].user_attrs["taken"]]
    assert trials[5].intermediate_values[EPOCHS] < 0.5
    assert trials[3].user_attrs[ENDED] == "its process died"
    assert max(trials[3].intermediate_values) == 1
    assert not [took for one in trials for took in one.user_attrs.get("taken", []) if took[0] >= 2 and took[1] == 3]
    assert all(max(one.intermediate_values) == EPOCHS for one in trials if one.number != 3)


def test_the_largest_are_taken_over_where_larger_is_better(tmp_path: Path):
    """The course of a metric that is to be large is that of its negative, which is to be small."""
    small = World()
    falling = course(small.search(experiment(tmp_path / "small")))

    class Rising(World):
        def take_turn(self, number: int, values: dict, until: int, take: tuple[int, int] | None) -> float:
            return -super().take_turn(number, values, until, take)

    large = Rising()
    asked = experiment(tmp_path / "large", "search.metric=val/skill")
    ledger = Population(asked)
    while given := ledger.ask():
        number, turn = given[0], ledger.turn(given[0])
        value = large.take_turn(number, given[1], **turn)
        ledger.report(number, turn["until"], {"val/skill": value})
        ledger.end(number)
    rising = course(ledger)
    assert large.weights == small.weights
    assert [(number, params, attributes) for number, params, _, attributes in rising] == [
        (number, params, attributes) for number, params, _, attributes in falling
    ]
    values = {trial.number: (trial.value or 0) for trial in ledger.trials()}
    assert ledger.best()[0].number == max(values, key=lambda number: values[number])


def test_what_diverges_is_the_worst_where_larger_is_better(tmp_path: Path):
    ledger = Population(experiment(tmp_path, "search.metric=val/skill"))
    while given := ledger.ask():
        number, turn = given[0], ledger.turn(given[0])
        diverged = number == 5 and turn["until"] == 2
        ledger.report(number, turn["until"], {"val/skill": math.nan if diverged else -3e6 + number})
        ledger.end(number)
    trials = ledger.trials()
    assert trials[5].intermediate_values[2] == -WORST
    taken = {took[0]: took[1] for took in trials[5].user_attrs["taken"]}
    assert taken[2] in (6, 7)  # although what the others reached is below -WORST
    assert all(ENDED not in trial.user_attrs for trial in trials)


def test_a_population_ends_with_its_hours_and_one_that_is_stopped_is_over(tmp_path: Path):
    late = Population(experiment(tmp_path / "late", "search.max_hours=1e-9"))
    assert late.ask() is None
    assert "search.max_hours" in late.stop_reason()
    ledger = Population(experiment(tmp_path / "stopped", "search.trials=2", "train.validate_every=4"))
    number, _ = ledger.ask() or (-1, {})
    assert ledger.turn(number) == {"until": 4, "take": None}
    ledger.end(number)  # without its report
    assert ledger.trials()[0].user_attrs[ENDED] == "it was stopped after epoch 0"
    other, _ = ledger.ask() or (-1, {})
    assert other == 1
    assert ledger.ask() is None  # not now: it is still at it
    assert ledger.stop_reason() == ""
    ledger.report(other, 4, {"val/l2_paper": 1.0})
    ledger.end(other)
    assert (ledger.ask() or (-1,))[0] == other  # alone it takes over nobody
    assert ledger.turn(other) == {"until": EPOCHS, "take": None}


@pytest.mark.parametrize(
    ("words", "message"),
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
        (["search.workers=2"], r"search\.workers: .*one worker a trial \(value 2\)"),
        (["search.patience=3"], r"search\.patience: .*none \(value 3\)"),
        (["search.trials=1"], r"search\.trials: .*two at least \(value 1\)"),
        (
            ["model.kind=between", "search.space={model.adversarial_weight: {uniform: [0, 1]}}"],
            r"search\.space\.model\.adversarial_weight: with 0 there is no discriminator",
        ),
    ],
)
def test_what_a_population_cannot_do_is_told_before_anything_starts(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        tuner.initial_points(experiment(tmp_path, *words))


def test_rates_weights_and_smoothing_may_be_searched(tmp_path: Path):
    space = "{optim.discriminator_lr: {log_uniform: [1e-5, 1e-2]}, model.real_label: {uniform: [0.7, 1]}}"
    check(experiment(tmp_path, "model.kind=cgan", f"search.space={space}"))


def saved(run: Experiment, name: str, learner: Learner, steps: int, epoch: int | None) -> None:
    place = Path(run.storage, run.name, name)
    place.mkdir(parents=True)
    checkpoints.Snapshot(learner, run, TrainState(steps, {"val/l2_paper": float(steps)}, epoch=epoch)).save(place)


def test_a_trial_goes_on_from_anothers_weights_with_a_rate_of_its_own(tiny: Experiment, tmp_path: Path):
    source = override(
        tiny, {"storage": str(tmp_path), "name": "trial-0001", "train.global_batch_size": BATCH, "optim.lr": 1e-3}
    )
    taker = override(source, {"name": "trial-0002", "optim.lr": 3e-3})
    theirs, ours = built(source), built(override(taker, {"train.seed": 5}))
    for number in range(2):
        step(theirs, source, number)
    saved(source, "checkpoint_1", theirs, 2, 1)
    before = {key: value.clone() for key, value in theirs.networks["cvae"].state_dict().items()}
    step(theirs, source, 2)
    saved(source, "checkpoint_2", theirs, 3, 2)  # the other has gone on meanwhile
    saved(taker, "checkpoint_1", ours, 2, 1)

    for _ in range(2):  # as when it was killed in between
        checkpoints.copy_checkpoint_from(taker, source, 1)
        resumed = built(taker)
        assert checkpoints.restore(checkpoints.latest_checkpoint(taker), resumed).epoch == 1
        assert all(torch.equal(value, before[key]) for key, value in resumed.networks["cvae"].state_dict().items())
    # A step of Adam is the rate times what the state and the gradient say, which are the same for both.
    step(resumed, taker, 2)
    after, other = resumed.networks["cvae"].state_dict(), theirs.networks["cvae"].state_dict()
    for key, _ in resumed.networks["cvae"].named_parameters():
        assert torch.allclose(after[key] - before[key], 3 * (other[key] - before[key]), rtol=1e-3, atol=1e-6), key

    saved(taker, "checkpoint_9", resumed, 3, None)
    checkpoints.copy_checkpoint_from(taker, source, 1)  # it is past it
    assert checkpoints.latest_checkpoint(taker).endswith("checkpoint_9")
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*trial-0001"):
        checkpoints.copy_checkpoint_from(taker, source, 5)


def test_what_others_may_still_take_over_is_kept(tiny: Experiment, tmp_path: Path):
    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    for number, epoch in enumerate([1, 2, None, 3, None, None]):
        saved(run, f"checkpoint_{number}", built(run), number, epoch)
    checkpoints.remove_older(run, epochs=2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint_1",
        "checkpoint_3",
        "checkpoint_5",
    ]
    checkpoints.remove_older(run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint_5"]


def test_a_turn_may_change_what_is_searched_and_nothing_else(tiny: Experiment, tmp_path: Path):
    class Clips:
        fingerprint, location = "f", "here"

        def split_indices(self, split: str) -> list[int]:
            return [0]

    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    may = (*trainer.MAY_CHANGE, "optim.lr")
    store: Any = Clips()
    with trainer.locked_run(run, store, may):
        pass
    changed = override(run, {"optim.lr": 0.5})
    with trainer.locked_run(changed, store, may):
        pass
    with (
        pytest.raises(ConfigError, match=r"optim\.lr: the run 'run' was started with"),
        trainer.locked_run(changed, store),
    ):
        pass
    other = override(changed, {"optim.beta1": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.beta1: the run 'run'"), trainer.locked_run(other, store, may):
        pass


def test_a_trial_touches_no_checkpoint_of_a_run_that_another_process_trains(tiny: Experiment, tmp_path: Path):
    class Clips:
        fingerprint, location = "f", "here"

        def split_indices(self, split: str) -> list[int]:
            return [0]

    run = override(tiny, {"storage": str(tmp_path), "name": "run"})
    store: Any = Clips()
    saved(run, "checkpoint_1", built(run), 1, 1)
    saved(run, "checkpoint_2", built(run), 2, 2)
    being_written = tmp_path / "run" / "checkpoint_2"
    (being_written / "manifest.json").unlink()
    with run_lock.run_lock(run.run_dir):
        for start in (
            lambda: _alone(run, store, ""),
            lambda: _turn(run, run, store, "", 2, None),
            lambda: trainer.train(run, store, WorkerResources(1, 0, 1)),
        ):
            with pytest.raises(ConfigError, match="'run' is being trained by process"):
                start()
    assert being_written.exists()


def test_a_waiting_population_asks_its_database_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray Tune asks for the next turn again and again while others train."""
    ledger = Population(experiment(tmp_path))
    given = []
    while turn := ledger.ask():
        given.append(turn)
    assert len(given) == 8
    for number, _ in given[:-1]:
        ledger.report(number, 1, {"val/l2_paper": float(number)})
        ledger.end(number)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the storage is asked")

    with monkeypatch.context() as patch:
        for name in ("get_trial", "get_all_trials", "get_study_user_attrs", "get_best_trial"):
            patch.setattr(type(ledger._study._storage), name, fail)
        for _ in range(100):
            assert ledger.ask() is None
            assert ledger.stop_reason() == ""
            assert ledger.turn(given[-1][0]) == {"until": 1, "take": None}
    ledger.report(given[-1][0], 1, {"val/l2_paper": 100.0})
    ledger.end(given[-1][0])
    resumed = Population(experiment(tmp_path))
    while turn := ledger.ask():
        assert resumed.ask() == turn  # what is in memory is what was stored
        assert resumed.turn(turn[0]) == ledger.turn(turn[0])
