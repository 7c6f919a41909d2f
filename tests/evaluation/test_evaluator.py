import csv
import io
import itertools
import statistics

import numpy as np
import pytest
import torch

from giffy_ray.config import ClipConfig, ConfigError, from_yaml
from giffy_ray.evaluation.evaluator import (
    MEASURES,
    REAL,
    Evaluator,
    Score,
    baseline_methods,
    evaluate,
    summarise,
    to_csv,
)
from giffy_ray.models.sampling import generate_in_parts, learner_method, learner_methods, noise_from_clip_ids
from giffy_ray.training import learners

CLIP = ClipConfig(frames=4, height=16, width=16)
SOURCES = ["film 1", "film 2", "film 1"]


class Clips:
    """Stands for a store: clips that hold one value each, straight lines in time but for one."""

    def __init__(self):
        self.clip = CLIP
        self.ids, self.categories = ["a", "b", "c"], ["skiing", "erupting", "skiing"]
        self.levels = np.asarray([[0, 30, 60, 90], [0, 10, 20, 30], [0, 0, 0, 90]], np.uint8)

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        levels = self.levels[rows][:, :, None, None, None]
        return np.broadcast_to(levels, (len(rows), 4, 16, 16, 3)).copy()


class Guesser:
    """Stands for a learner: frames between of level 40 and ten times the first number of the noise."""

    def __init__(self, latent: int):
        self.latent = latent

    def generate(self, start, end, noise, frames=None):
        made = torch.stack([start, start, end, end], dim=1)
        level = 40 + 10 * noise[:, 0] if self.latent else torch.full((len(start),), 40.0)
        made[:, 1:3] = level.round().to(torch.uint8).view(-1, 1, 1, 1, 1)
        return made


def black(start, end, clip_ids):
    return torch.zeros(len(clip_ids), 4, 16, 16, 3, dtype=torch.uint8)


def test_every_method_and_clip_is_scored_by_id():
    methods = baseline_methods(["linear"], CLIP) | {"black": [black]}
    scores = evaluate(methods, Clips(), np.asarray([2, 0]), SOURCES)  # type: ignore[arg-type]
    assert [(s.method, s.category, s.clip_id, s.source) for s in scores] == [
        ("linear", "skiing", "c", "film 1"),
        ("linear", "skiing", "a", "film 1"),
        ("black", "skiing", "c", "film 1"),
        ("black", "skiing", "a", "film 1"),
    ]
    values = 16 * 16 * 3
    # Clip c is 0, 0, 0, 90 and its line 0, 30, 60, 90; clip a is its own line.
    assert scores[0].l2_paper == pytest.approx((values * (30**2 + 60**2)) ** 0.5 / 100)
    assert scores[0].squared_error == pytest.approx(values * (30**2 + 60**2))
    # It changes by 30, 30, 30 where the real clip does by 0, 0, 90.
    assert scores[0].motion_error == pytest.approx(((30**2 + 30**2 + 60**2) / 3) ** 0.5)
    assert scores[0].motion_ratio == pytest.approx(1)
    assert scores[1].l2_paper == 0
    assert scores[2].l2_paper == pytest.approx((values * 90**2) ** 0.5 / 100)
    assert scores[2].psnr == float("inf")  # between its ends, clip c is black
    assert scores[2].ends_error == pytest.approx((90**2 / 2) ** 0.5)
    assert {score.diversity for score in scores} == {None}


def test_linear_interpolation_is_always_among_the_baselines_and_first():
    assert list(baseline_methods(["hold"], CLIP)) == ["linear", "hold"]
    assert list(baseline_methods(["hold", "linear"], CLIP)) == ["linear", "hold"]
    assert list(baseline_methods([], CLIP)) == ["linear"]


def test_a_baseline_that_cannot_make_such_clips_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"minterpolate_mci: images of at least 16x16.*\(value 8x16\)"):
        baseline_methods(["hold", "minterpolate_mci"], ClipConfig(frames=4, height=8, width=16))


def test_a_learner_is_scored_by_its_mean_one_sample_and_the_best_of_several():
    learner, store, rows = Guesser(latent=2), Clips(), np.asarray([0, 1, 2])
    methods = learner_methods("mine", learner, seed=7, samples=3)  # type: ignore[arg-type]
    assert list(methods) == ["mine", "mine, sample", "mine, best of 3"]
    scores = {(s.method, s.clip_id): s for s in evaluate(methods, store, rows, SOURCES)}  # type: ignore[arg-type]
    levels = {"mine": np.full((3, 1), 40.0)}
    drawn = np.stack(
        [(40 + 10 * noise_from_clip_ids(7 + k, store.ids, 2)[:, 0]).round().numpy() for k in range(3)], axis=1
    )
    levels |= {"mine, sample": drawn[:, :1], "mine, best of 3": drawn}
    for name, of_clips in levels.items():
        for row, clip_id in enumerate(store.ids):
            real = store.levels[row, 1:3].astype(float)
            errors = [float(((level - real) ** 2).sum()) * 16 * 16 * 3 for level in of_clips[row]]
            assert scores[name, clip_id].squared_error == pytest.approx(min(errors))
    for row, clip_id in enumerate(store.ids):
        apart = [abs(one - other) for one, other in itertools.combinations(drawn[row], 2)]
        assert scores["mine, best of 3", clip_id].diversity == pytest.approx(statistics.fmean(apart))
        assert scores["mine, sample", clip_id].diversity is None


def test_a_learner_without_noise_has_no_samples():
    assert list(learner_methods("mine", Guesser(latent=0), seed=0, samples=8)) == ["mine"]  # type: ignore[arg-type]
    assert list(learner_methods("mine", Guesser(latent=1), seed=0, samples=1)) == ["mine", "mine, sample"]  # type: ignore[arg-type]


def test_a_clip_is_made_from_the_same_noise_whatever_is_made_beside_it():
    make, ends = learner_method(Guesser(latent=2), seed=3), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)  # type: ignore[arg-type]
    both = make(ends, ends, ["a", "b"])
    assert torch.equal(both[1:], make(ends[1:], ends[1:], ["b"]))
    assert not torch.equal(both[0], both[1])


def test_who_watches_sees_the_real_and_all_made_clips_once():
    store, seen = Clips(), {}

    def watch(name: str, rows: np.ndarray, clips: np.ndarray) -> None:
        for row, clip in zip(rows.tolist(), clips, strict=True):
            assert (name, row) not in seen
            seen[name, row] = clip[:, 0, 0, 0].tolist()

    methods = baseline_methods([], CLIP) | {"black": [black]}
    evaluate(methods, store, np.asarray([2, 0]), SOURCES, watch)  # type: ignore[arg-type]
    assert seen == {
        (REAL, 2): [0, 0, 0, 90],
        (REAL, 0): [0, 30, 60, 90],
        ("linear", 2): [0, 30, 60, 90],
        ("linear", 0): [0, 30, 60, 90],
        ("black", 2): [0, 0, 0, 0],
        ("black", 0): [0, 0, 0, 0],
    }


def scores() -> list[Score]:
    l2 = {"linear": (10, 20, 60), "cvae": (12, 14, 40)}
    return [
        Score(
            method,
            category,
            clip_id,
            l2_paper=value,
            psnr=20.0,
            ssim=0.5,
            ends_error=0.0,
            motion_error=value / 2,
            motion_ratio=1.5,
            sharpness_ratio=0.75,
            squared_error=value**2,
            diversity=value / 4 if method == "cvae" else None,
            source=source,
        )
        for method, values in l2.items()
        for value, clip_id, category, source in zip(
            values, "abc", ("skiing", "erupting", "skiing"), SOURCES, strict=True
        )
    ]


def test_the_table_has_means_deviations_and_shares_won():
    rows = {(row.category, row.method): row for row in summarise(scores())}
    assert list(rows) == [(c, m) for c in ("erupting", "skiing", "all") for m in ("linear", "cvae")]
    assert rows["skiing", "linear"].spreads["l2_paper"] == (35, 25)
    assert rows["all", "cvae"].spreads["l2_paper"] == (22, pytest.approx(statistics.pstdev([12, 14, 40])))
    assert rows["all", "cvae"].spreads["diversity"][0] == pytest.approx(22 / 4)
    assert rows["all", "cvae"].spreads.keys() == MEASURES.keys()
    assert rows["all", "linear"].spreads.keys() == MEASURES.keys() - {"diversity"}
    assert rows["all", "cvae"].won == pytest.approx(2 / 3)
    assert rows["skiing", "cvae"].won == 0.5
    assert rows["all", "linear"].won is None
    assert rows["all", "linear"].skill is None
    assert rows["all", "cvae"].clips == 3


def test_skill_is_against_linear_interpolation_with_an_interval_by_source():
    rows = {(row.category, row.method): row for row in summarise(scores())}
    skill, low, high = rows["all", "cvae"].skill
    assert skill == pytest.approx(1 - (12**2 + 14**2 + 40**2) / (10**2 + 20**2 + 60**2))
    # Two sources: a resample has the first twice, the second twice, or both.
    film_1, film_2 = 1 - (12**2 + 40**2) / (10**2 + 60**2), 1 - 14**2 / 20**2
    assert (low, high) == (pytest.approx(min(film_1, film_2)), pytest.approx(max(film_1, film_2)))
    # All clips of one source say nothing of others.
    assert rows["skiing", "cvae"].skill == pytest.approx((film_1, np.nan, np.nan), nan_ok=True)


def test_infinite_values_stay_visible_in_the_means():
    equal = [
        Score("linear", "x", str(i), 0, psnr, 1, 0, 0, 1, 1, 0, None, "s") for i, psnr in enumerate((20.0, np.inf))
    ]
    (row,) = summarise(equal)
    mean, deviation = row.spreads["psnr"]
    assert mean == np.inf
    assert np.isnan(deviation)


def test_ratios_to_what_stands_still_are_left_out_of_the_means():
    ratios = (0.5, np.inf, np.nan, 1.5)
    moving = [
        Score("linear", "x", str(i), 0, 20, 1, 0, 0, ratio, np.nan, 0, None, "s") for i, ratio in enumerate(ratios)
    ]
    (row,) = summarise(moving)
    assert row.spreads["motion_ratio"] == (1, 0.5)
    assert np.isnan(row.spreads["sharpness_ratio"]).all()


def test_many_categories_have_an_interval_only_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("giffy_ray.evaluation.evaluator._RESAMPLES", 20)
    many = [
        Score(method, f"c{clip}", f"{clip} {half}", 1, 20, 1, 0, 0, 1, 1, 2.0 + clip, None, str(half))
        for method in ("linear", "hold")
        for clip in range(9)
        for half in range(2)
    ]
    bounded = {row.category: not np.isnan(row.skill).any() for row in summarise(many) if row.skill}
    assert [category for category, has_bounds in bounded.items() if has_bounds] == ["all"]
    few = summarise([score for score in many if score.category < "c8"])
    assert all(not np.isnan(row.skill).any() for row in few if row.skill)


def test_the_csv_has_a_row_for_each_method_and_clip():
    rows = list(csv.DictReader(io.StringIO(to_csv(scores()))))
    assert list(rows[0])[:6] == ["method", "category", "clip_id", "l2_paper", "psnr", "ssim"]
    assert len(rows) == 6
    assert rows[3] == {
        "method": "cvae",
        "category": "skiing",
        "clip_id": "a",
        "l2_paper": "12",
        "psnr": "20.0",
        "ssim": "0.5",
        "ends_error": "0.0",
        "motion_error": "6.0",
        "motion_ratio": "1.5",
        "sharpness_ratio": "0.75",
        "squared_error": "144",
        "diversity": "3.0",
        "source": "film 1",
    }
    assert rows[0]["diversity"] == ""


class Jittery(Guesser):
    """A learner whose clips depend, as those of a network may, on how many it is asked for at once."""

    def __init__(self):
        super().__init__(latent=2)
        self.asked: list[int] = []

    def generate(self, start, end, noise, frames=None):
        self.asked.append(len(start))
        return super().generate(start, end, noise + 3 * len(start), frames)


def test_all_samples_are_made_in_parts_of_one_size_so_that_a_clip_does_not_depend_on_its_batch():
    learner, store = Jittery(), Clips()
    methods = learner_methods("mine", learner, seed=7, samples=3)  # type: ignore[arg-type]
    together = evaluate(methods, store, np.arange(3), SOURCES)  # type: ignore[arg-type]
    assert learner.asked == [8, 8]  # 3 clips of 4 noises each
    alone = [evaluate(methods, store, np.asarray([row]), SOURCES) for row in range(3)]  # type: ignore[arg-type]
    assert set(learner.asked) == {8}
    by_clip = sorted(together, key=lambda score: score.clip_id)
    assert to_csv(by_clip) == to_csv([score for scores in alone for score in scores])


@pytest.mark.parametrize("mirrors", [1, 4])
def test_a_network_makes_the_same_clip_whatever_is_made_beside_it(mirrors: int):
    text = f"{{model: {{kind: between, self_ensemble: {mirrors}, widths: [8, 8, 8]}}, clip: {{frames: 4}}}}"
    experiment = from_yaml(text, ["clip.height=16", "clip.width=16"])
    learner = learners.build(experiment, torch.device("cpu"))
    random = np.random.default_rng(0)
    start, end = (torch.from_numpy(random.integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)) for _ in "ab")
    noise = noise_from_clip_ids(0, [str(clip) for clip in range(11)], learner.latent)
    together = generate_in_parts(learner, start, end, noise)
    assert together.shape == (11, 4, 16, 16, 3)
    for clip in (0, 7, 8, 10):
        alone = generate_in_parts(learner, *(each[clip : clip + 1] for each in (start, end, noise)))
        assert torch.equal(alone[0], together[clip])


def test_an_evaluator_gives_the_scores_and_only_the_clips_that_are_watched_or_drawn():
    store = Clips()
    store.sources = SOURCES  # type: ignore[attr-defined]
    methods = baseline_methods([], CLIP) | {"black": [black]}
    rows = np.asarray([2, 0, 1])
    done = Evaluator(methods, store, watched={0}, drawn={1, 2})(rows)  # type: ignore[arg-type]
    assert to_csv(done.scores) == to_csv(evaluate(methods, store, rows, SOURCES))  # type: ignore[arg-type]
    assert [(name, seen.tolist(), clips[0, :, 0, 0, 0].tolist()) for name, seen, clips in done.clips] == [
        (REAL, [0], [0, 30, 60, 90]),
        ("linear", [0], [0, 30, 60, 90]),
        ("black", [0], [0, 0, 0, 0]),
    ]
    assert done.sprites.keys() == {(row, name) for row in (1, 2) for name in (REAL, "linear", "black")}


def test_the_means_over_all_clips_have_an_interval_by_source():
    rows = {(row.category, row.method): row for row in summarise(scores())}
    # Two sources: a resample has the first twice, the second twice, or both. Of linear's l2: 35, 20 or 30.
    assert rows["all", "linear"].intervals["l2_paper"] == (pytest.approx(20), pytest.approx(35))
    assert rows["all", "linear"].intervals["psnr"] == (20, 20)
    assert rows["skiing", "linear"].intervals == {}
