import io
import warnings
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from giffy_ray.config import ClipConfig
from giffy_ray.core.media import PAPER
from giffy_ray.evaluation.dataset_report import histogram, measure, readable, sample, survey

FRAMES = 6


def brightening(by: int, height: int = 16, width: int = 16) -> np.ndarray:
    """uint8 [time, height, width, 3], every pixel `by` grey levels lighter in each frame."""
    levels = (10 + by * np.arange(FRAMES)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (FRAMES, height, width, 3)).copy()


class FakeStore:
    """What the survey asks of a Store; the clips are made when they are asked for."""

    def __init__(self, categories: list[str], clip_of: Callable[[int], np.ndarray], **changed: object):
        count = len(categories)
        self.name = str(changed.get("name", "filmed"))
        self.categories = categories
        self.ids = [f"{category}/{row:05d}.mp4" for row, category in enumerate(categories)]
        self.rejects = changed.get("rejects", [])
        self.clip_of = clip_of
        frames, height, width, _ = clip_of(0).shape
        self.clip = ClipConfig(frames=frames, fps=10.0, height=height, width=width)
        facts = {
            "codec": ["h264"] * count,
            "source_width": [320] * count,
            "source_height": [240] * count,
            "source_fps": [29.97] * count,
            "seconds": [4.5] * count,
            "padded": [0] * count,
        }
        self.facts = pa.table({name: changed.get(name, values) for name, values in facts.items()})

    def split_indices(self, split: str) -> np.ndarray:
        every = np.arange(len(self.ids))
        return {"training": every[every % 4 > 0], "validation": every[every % 4 == 0]}.get(split, every[:0])

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.clip_of(int(row)) for row in rows])


def opened(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for name, content in files.items()}


def test_motion_and_linear_error_have_their_closed_forms():
    def clip_of(row: int) -> np.ndarray:
        clip = brightening(5)
        clip[2] += 30 * row  # one frame leaps: two of five differences change, and l2 by the leap itself
        return clip

    found = measure(FakeStore(["a"] * 2, clip_of), np.asarray([0, 1]))
    assert found.motion == pytest.approx([5, (3 * 5 + 35 + 25) / 5])
    assert found.linear_l2 == pytest.approx([0, 30 * np.sqrt(16 * 16 * 3) / 100], abs=1e-9)


def test_a_sample_is_spread_over_the_rows_and_always_the_same():
    rows = np.arange(100, 1100)
    drawn = sample(rows, 40)
    assert len(drawn) == 40 and (np.arange(40) == (drawn - 100) // 25).all()
    assert (drawn == sample(rows, 40)).all() and (sample(rows[:40], 40) == rows[:40]).all()


def test_a_histogram_counts_every_value_in_its_group():
    rng = np.random.default_rng(1)
    values, groups = rng.gamma(2, 3, 500), rng.integers(0, 3, 500)
    made = histogram(values, groups, 4)
    assert made.counts.sum(1).tolist() == [*np.bincount(groups), 0] and made.beyond == 0
    assert made.counts.sum(0).tolist() == np.histogram(values, made.edges)[0].tolist()


@pytest.mark.parametrize("highest", [25.0, 30.0, 59.94, 60.0])
def test_frame_rates_of_television_and_film_fall_into_the_bins_of_their_whole_numbers(highest: float):
    values = np.asarray([rate for rate in (23.976, 24.0, 29.97, 30.0) if rate <= highest] + [highest])
    counts = histogram(values, np.zeros(len(values), int), 1).counts[0]
    assert sorted(counts[counts > 0]) == ([1, 2] if highest == 25 else [2, 3] if highest == 30 else [1, 2, 2])


def test_a_few_far_values_do_not_flatten_a_histogram():
    values = np.asarray([*np.linspace(1, 10, 300), 5000.0, 7000.0])
    made = histogram(values, np.zeros(302, int), 1)
    assert made.edges[-1] < 20 and made.beyond == 2 and made.counts.sum() == 302 and made.counts[0, -1] == 2


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_equal_values_are_one_bar(value: float):
    made = histogram(np.full(5, value), np.zeros(5, int), 1)
    assert made.counts.max() == 5 and made.edges[0] <= value <= made.edges[-1]


def test_names_become_readable_and_remain_different():
    assert readable("e\u0301te\u0301 à Łódź", 30) == "été à Łódź"
    assert readable("日本\n", 30) == "\\u65e5\\u672c\\n"
    assert readable("a" * 40 + "b" * 40, 9) == "aaaa…bbbb"


def test_clips_are_shown_from_easy_to_hard():
    def clip_of(row: int) -> np.ndarray:  # the higher the row, the harder; the first frame tells the row
        clip = np.full((FRAMES, 16, 16, 3), 40 + row, np.uint8)
        clip[2] += 5 * row
        return clip

    sheet = opened(survey(FakeStore(["a"] * 21, clip_of)))["dataset_clips.png"].astype(int)
    column = sheet[:, -14 - 7 * 131 - 64]  # through the first moment of every clip
    shown = [int(value) for value, run in runs(column[:, 0]) if run == 128]
    assert shown == [40 + 2, 40 + 8, 40 + 14, 40 + 19]


def runs(values: np.ndarray) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return [(int(values[s]), int(n)) for s, n in zip(starts, np.diff([*starts, len(values)]), strict=True)]


ODD = ["A name that was made of the title of a whole film, its year and its country", "été", "日本", "_a$b$^c", "x\n"]
REJECTS = [{"id": str(n), "category": "a", "reason": f"reason_{n % 11}", "detail": ""} for n in range(50)]


@pytest.mark.parametrize(
    ("store", "blocks"),
    [
        (lambda: FakeStore(["one"], lambda row: brightening(0), seconds=[0.0], source_fps=[0.0]), [1]),
        (lambda: FakeStore(ODD * 3, brightening, name="日本 $x$", rejects=REJECTS), [3] * 5),
        (lambda: FakeStore([f"c{row % 300}" for row in range(900)], lambda row: brightening(row % 7)), [3] * 8),
        (lambda: FakeStore(["wide"] * 5, lambda row: brightening(row, 128, 256), padded=[0, 0, 0, 3, 3]), [4]),
        (lambda: FakeStore(["tall"] * 2, lambda row: brightening(row, 256, 128)), [2]),
    ],
    ids=["one clip, nothing known", "odd names", "300 categories", "wide", "tall"],
)
def test_every_data_set_gives_two_sensible_pictures(store: Callable[[], FakeStore], blocks: list[int]):
    made = store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = opened(survey(made))
    assert list(pictures) == ["dataset_clips.png", "dataset_measures.png"]
    for picture in pictures.values():
        assert (picture[0, 0] == PAPER).all() and 300 < picture.shape[1] < 1600
    clip = made.clip
    shown_px = 128 * clip.height // max(clip.height, clip.width) + 3
    assert 0 < pictures["dataset_clips.png"].shape[0] - sum(blocks) * shown_px - len(blocks) * 42 < 160
    assert 500 < pictures["dataset_measures.png"].shape[0] < 900


def test_no_text_of_the_measures_overlaps_or_is_cut(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Text] = []
    boxes, figures = [], []

    def save(figure: Figure, *_: object, **__: object) -> None:
        figure.draw_without_rendering()  # lays it out
        with monkeypatch.context() as patched:
            patched.setattr(Text, "draw", lambda text, _: drawn.append(text))
            figure.draw_without_rendering()
        figures.append(figure)
        boxes.extend(text.get_window_extent() for text in drawn if text.get_text().strip() and text.get_visible())

    monkeypatch.setattr(Figure, "savefig", save)
    unknown = [0.0, 1.0] * 150
    categories = [f"{place % 12} {'long ' * 20}" for place in range(300)]
    survey(
        FakeStore(categories, lambda row: brightening(row % 9), seconds=unknown, source_fps=unknown, rejects=REJECTS)
    )
    assert len(boxes) > 60
    wide, high = figures[0].bbox.size
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= wide and box.y1 <= high for box in boxes)
    overlapping = [
        (one, other)
        for place, one in enumerate(boxes)
        for other in boxes[:place]
        if one.shrunk(0.98, 0.9).overlaps(other)
    ]
    assert not overlapping
