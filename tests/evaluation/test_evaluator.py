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
    build_baselines,
    evaluate,
    summarise,
    to_csv,
)
from giffy_ray.models.sampling import LearnerMethod, generate_in_batches, learner_methods, noise_from_clip_ids
from giffy_ray.training import learners

CLIP = ClipConfig(frames=4, height=16, width=16)
SOURCES = ["film 1", "film 2", "film 1"]


class FakeDataset:
    """Clips whose frames are of one grey level each. The levels of "a" and "b" are linear in time."""

    def __init__(self):
        self.clip = CLIP
        self.ids = ["a", "b", "c"]
        self.categories = ["skiing", "erupting", "skiing"]
        self.sources = SOURCES
        self.levels = np.asarray([[0, 30, 60, 90], [0, 10, 20, 30], [0, 0, 0, 90]], np.uint8)

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        levels = self.levels[indices][:, :, None, None, None]
        return np.broadcast_to(levels, (len(indices), 4, 16, 16, 3)).copy()


class FakeLearner:
    """Generates frames between of grey level 40 plus ten times the first value of the noise."""

    def __init__(self, latent: int):
        self.networks: dict[str, torch.nn.Module] = {}
        self.latent = latent

    def generate(self, start, end, noise, frames=None):
        generated = torch.stack([start, start, end, end], dim=1)
        level = 40 + 10 * noise[:, 0] if self.latent else torch.full((len(start),), 40.0)
        generated[:, 1:3] = level.round().to(torch.uint8).view(-1, 1, 1, 1, 1)
        return generated


def generate_black(start, end, clip_ids):
    return torch.zeros(len(clip_ids), 4, 16, 16, 3, dtype=torch.uint8)


def test_evaluate_scores_every_method_and_clip():
    methods = build_baselines(["linear"], CLIP) | {"black": [generate_black]}
    scores = evaluate(methods, FakeDataset(), np.asarray([2, 0]), SOURCES)  # type: ignore[arg-type]
    assert [(s.method, s.category, s.clip_id, s.source) for s in scores] == [
        ("linear", "skiing", "c", "film 1"),
        ("linear", "skiing", "a", "film 1"),
        ("black", "skiing", "c", "film 1"),
        ("black", "skiing", "a", "film 1"),
    ]
    values = 16 * 16 * 3
    # Clip c is 0, 0, 0, 90 and its interpolation 0, 30, 60, 90; clip a equals its interpolation.
    assert scores[0].l2_paper == pytest.approx((values * (30**2 + 60**2)) ** 0.5 / 100)
    assert scores[0].squared_error == pytest.approx(values * (30**2 + 60**2))
    # The interpolation changes by 30, 30, 30, the target by 0, 0, 90.
    assert scores[0].motion_error == pytest.approx(((30**2 + 30**2 + 60**2) / 3) ** 0.5)
    assert scores[0].motion_ratio == pytest.approx(1)
    assert scores[1].l2_paper == 0
    assert scores[2].l2_paper == pytest.approx((values * 90**2) ** 0.5 / 100)
    assert scores[2].psnr == float("inf")  # the frames between of clip c are black
    assert scores[2].ends_error == pytest.approx((90**2 / 2) ** 0.5)
    assert {score.diversity for score in scores} == {None}


def test_linear_interpolation_is_always_the_first_baseline():
    assert list(build_baselines(["hold"], CLIP)) == ["linear", "hold"]
    assert list(build_baselines(["hold", "linear"], CLIP)) == ["linear", "hold"]
    assert list(build_baselines([], CLIP)) == ["linear"]


def test_build_baselines_rejects_unsupported_clip_sizes():
    with pytest.raises(ConfigError, match=r"minterpolate_mci: needs images of at least 16x16.*\(value 8x16\)"):
        build_baselines(["hold", "minterpolate_mci"], ClipConfig(frames=4, height=8, width=16))


def test_learner_is_scored_by_its_mean_a_sample_and_the_best_of_several_samples():
    learner = FakeLearner(latent=2)
    dataset = FakeDataset()
    indices = np.asarray([0, 1, 2])
    methods = learner_methods("mine", learner, seed=7, samples=3)  # type: ignore[arg-type]
    assert list(methods) == ["mine", "mine, sample", "mine, best of 3"]
    scores = {(s.method, s.clip_id): s for s in evaluate(methods, dataset, indices, SOURCES)}  # type: ignore[arg-type]
    noises = [noise_from_clip_ids(7 + sample, dataset.ids, 2) for sample in range(3)]
    sample_levels = np.stack([(40 + 10 * noise[:, 0]).round().numpy() for noise in noises], axis=1)  # [clip, sample]
    levels_by_method = {
        "mine": np.full((3, 1), 40.0),
        "mine, sample": sample_levels[:, :1],
        "mine, best of 3": sample_levels,
    }
    for name, levels in levels_by_method.items():
        for index, clip_id in enumerate(dataset.ids):
            target = dataset.levels[index, 1:3].astype(float)
            errors = [float(((level - target) ** 2).sum()) * 16 * 16 * 3 for level in levels[index]]
            assert scores[name, clip_id].squared_error == pytest.approx(min(errors))
    for index, clip_id in enumerate(dataset.ids):
        distances = [abs(first - second) for first, second in itertools.combinations(sample_levels[index], 2)]
        assert scores["mine, best of 3", clip_id].diversity == pytest.approx(statistics.fmean(distances))
        assert scores["mine, sample", clip_id].diversity is None


def test_learner_without_noise_has_no_samples():
    assert list(learner_methods("mine", FakeLearner(latent=0), seed=0, samples=8)) == ["mine"]  # type: ignore[arg-type]
    assert list(learner_methods("mine", FakeLearner(latent=1), seed=0, samples=1)) == ["mine", "mine, sample"]  # type: ignore[arg-type]


def test_noise_of_a_clip_does_not_depend_on_its_batch():
    method = LearnerMethod(FakeLearner(latent=2), seed=3)  # type: ignore[arg-type]
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    both = method(images, images, ["a", "b"])
    assert torch.equal(both[1:], method(images[1:], images[1:], ["b"]))
    assert not torch.equal(both[0], both[1])


def test_callback_receives_every_target_and_generated_clip_once():
    dataset = FakeDataset()
    received = {}

    def on_clips(name: str, indices: np.ndarray, clips: np.ndarray) -> None:
        for index, clip in zip(indices.tolist(), clips, strict=True):
            assert (name, index) not in received
            received[name, index] = clip[:, 0, 0, 0].tolist()

    methods = build_baselines([], CLIP) | {"black": [generate_black]}
    evaluate(methods, dataset, np.asarray([2, 0]), SOURCES, on_clips)  # type: ignore[arg-type]
    assert received == {
        (REAL, 2): [0, 0, 0, 90],
        (REAL, 0): [0, 30, 60, 90],
        ("linear", 2): [0, 30, 60, 90],
        ("linear", 0): [0, 30, 60, 90],
        ("black", 2): [0, 0, 0, 0],
        ("black", 0): [0, 0, 0, 0],
    }


def make_scores() -> list[Score]:
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


def test_summaries_hold_means_deviations_and_win_rates():
    rows = {(row.category, row.method): row for row in summarise(make_scores())}
    assert list(rows) == [(c, m) for c in ("erupting", "skiing", "all") for m in ("linear", "cvae")]
    assert rows["skiing", "linear"].spreads["l2_paper"] == (35, 25)
    assert rows["all", "cvae"].spreads["l2_paper"] == (22, pytest.approx(statistics.pstdev([12, 14, 40])))
    assert rows["all", "cvae"].spreads["diversity"][0] == pytest.approx(22 / 4)
    assert rows["all", "cvae"].spreads.keys() == MEASURES.keys()
    assert rows["all", "linear"].spreads.keys() == MEASURES.keys() - {"diversity"}
    assert rows["all", "cvae"].win_rate == pytest.approx(2 / 3)
    assert rows["skiing", "cvae"].win_rate == 0.5
    assert rows["all", "linear"].win_rate is None
    assert rows["all", "linear"].skill is None
    assert rows["all", "cvae"].clips == 3


def test_skill_against_linear_interpolation_has_an_interval_by_source():
    rows = {(row.category, row.method): row for row in summarise(make_scores())}
    skill, low, high = rows["all", "cvae"].skill
    assert skill == pytest.approx(1 - (12**2 + 14**2 + 40**2) / (10**2 + 20**2 + 60**2))
    # With two sources, a resample holds the first twice, the second twice, or both.
    film_1, film_2 = 1 - (12**2 + 40**2) / (10**2 + 60**2), 1 - 14**2 / 20**2
    assert (low, high) == (pytest.approx(min(film_1, film_2)), pytest.approx(max(film_1, film_2)))
    # Clips of a single source give no interval.
    assert rows["skiing", "cvae"].skill == pytest.approx((film_1, np.nan, np.nan), nan_ok=True)


def test_infinite_psnr_gives_an_infinite_mean():
    scores = [
        Score("linear", "x", str(i), 0, psnr, 1, 0, 0, 1, 1, 0, None, "s") for i, psnr in enumerate((20.0, np.inf))
    ]
    (row,) = summarise(scores)
    mean, deviation = row.spreads["psnr"]
    assert mean == np.inf
    assert np.isnan(deviation)


def test_means_exclude_infinite_and_undefined_ratios():
    ratios = (0.5, np.inf, np.nan, 1.5)
    scores = [
        Score("linear", "x", str(i), 0, 20, 1, 0, 0, ratio, np.nan, 0, None, "s") for i, ratio in enumerate(ratios)
    ]
    (row,) = summarise(scores)
    assert row.spreads["motion_ratio"] == (1, 0.5)
    assert np.isnan(row.spreads["sharpness_ratio"]).all()


def test_only_the_total_of_many_categories_has_an_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("giffy_ray.evaluation.evaluator._RESAMPLES", 20)
    scores = [
        Score(method, f"c{clip}", f"{clip} {half}", 1, 20, 1, 0, 0, 1, 1, 2.0 + clip, None, str(half))
        for method in ("linear", "hold")
        for clip in range(9)
        for half in range(2)
    ]
    has_bounds = {row.category: not np.isnan(row.skill).any() for row in summarise(scores) if row.skill}
    assert [category for category, bounds in has_bounds.items() if bounds] == ["all"]
    fewer_categories = summarise([score for score in scores if score.category < "c8"])
    assert all(not np.isnan(row.skill).any() for row in fewer_categories if row.skill)


def test_csv_has_one_row_per_method_and_clip():
    rows = list(csv.DictReader(io.StringIO(to_csv(make_scores()))))
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


class BatchSensitiveLearner(FakeLearner):
    """Its clips depend on the batch size, as those of a network do because of rounding."""

    def __init__(self):
        super().__init__(latent=2)
        self.batch_sizes: list[int] = []

    def generate(self, start, end, noise, frames=None):
        self.batch_sizes.append(len(start))
        return super().generate(start, end, noise + 3 * len(start), frames)


def test_samples_are_generated_in_batches_of_a_fixed_size():
    learner = BatchSensitiveLearner()
    dataset = FakeDataset()
    methods = learner_methods("mine", learner, seed=7, samples=3)  # type: ignore[arg-type]
    together = evaluate(methods, dataset, np.arange(3), SOURCES)  # type: ignore[arg-type]
    assert learner.batch_sizes == [8, 8]  # 3 clips with 4 noises each
    separate = [evaluate(methods, dataset, np.asarray([index]), SOURCES) for index in range(3)]  # type: ignore[arg-type]
    assert set(learner.batch_sizes) == {8}
    by_clip = sorted(together, key=lambda score: score.clip_id)
    assert to_csv(by_clip) == to_csv([score for scores in separate for score in scores])


@pytest.mark.parametrize("mirrors", [1, 4])
def test_clip_of_a_network_does_not_depend_on_its_batch(mirrors: int):
    text = f"{{model: {{kind: between, self_ensemble: {mirrors}, widths: [8, 8, 8]}}, clip: {{frames: 4}}}}"
    experiment = from_yaml(text, ["clip.height=16", "clip.width=16"])
    learner = learners.build(experiment, torch.device("cpu"))
    rng = np.random.default_rng(0)
    start, end = (torch.from_numpy(rng.integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)) for _ in range(2))
    noise = noise_from_clip_ids(0, [str(clip) for clip in range(11)], learner.latent)
    together = generate_in_batches(learner, start, end, noise)
    assert together.shape == (11, 4, 16, 16, 3)
    for clip in (0, 7, 8, 10):
        part = slice(clip, clip + 1)
        separate = generate_in_batches(learner, start[part], end[part], noise[part])
        assert torch.equal(separate[0], together[clip])


def test_evaluator_returns_scores_and_only_the_requested_clips_and_sprites():
    dataset = FakeDataset()
    methods = build_baselines([], CLIP) | {"black": [generate_black]}
    indices = np.asarray([2, 0, 1])
    evaluator = Evaluator(methods, dataset, return_indices={0}, sprite_indices={1, 2})  # type: ignore[arg-type]
    batch = evaluator(indices)
    assert to_csv(batch.scores) == to_csv(evaluate(methods, dataset, indices, SOURCES))  # type: ignore[arg-type]
    returned = [
        (name, clip_indices.tolist(), clips[0, :, 0, 0, 0].tolist()) for name, clip_indices, clips in batch.clips
    ]
    assert returned == [
        (REAL, [0], [0, 30, 60, 90]),
        ("linear", [0], [0, 30, 60, 90]),
        ("black", [0], [0, 0, 0, 0]),
    ]
    assert batch.sprites.keys() == {(index, name) for index in (1, 2) for name in (REAL, "linear", "black")}


def test_means_over_all_clips_have_an_interval_by_source():
    rows = {(row.category, row.method): row for row in summarise(make_scores())}
    # With two sources, a resample holds the first twice, the second twice, or both: means of linear's l2 of 35, 20, 30.
    assert rows["all", "linear"].intervals["l2_paper"] == (pytest.approx(20), pytest.approx(35))
    assert rows["all", "linear"].intervals["psnr"] == (20, 20)
    assert rows["skiing", "linear"].intervals == {}
