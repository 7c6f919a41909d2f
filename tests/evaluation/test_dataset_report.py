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
from giffy_ray.core.media import BACKGROUND_RGB
from giffy_ray.evaluation.dataset_report import (
    compute_histogram,
    fit_label,
    measure_clips,
    render_dataset_pictures,
    subsample,
)

FRAMES = 6


def brightening_clip(step: int, height: int = 16, width: int = 16) -> np.ndarray:
    """uint8 [time, height, width, 3]; each frame is `step` grey levels brighter than the previous one."""
    levels = (10 + step * np.arange(FRAMES)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (FRAMES, height, width, 3)).copy()


class FakeDataset:
    """The parts of a ClipDataset that its report uses; clips are generated on access."""

    def __init__(self, categories: list[str], clip_of: Callable[[int], np.ndarray], **overrides: object):
        count = len(categories)
        self.name = str(overrides.get("name", "filmed"))
        self.categories = categories
        self.ids = [f"{category}/{index:05d}.mp4" for index, category in enumerate(categories)]
        self.rejects = overrides.get("rejects", [])
        self.clip_of = clip_of
        frames, height, width, _ = clip_of(0).shape
        self.clip = ClipConfig(frames=frames, fps=10.0, height=height, width=width)
        metadata = {
            "codec": ["h264"] * count,
            "source_width": [320] * count,
            "source_height": [240] * count,
            "source_fps": [29.97] * count,
            "seconds": [4.5] * count,
            "padded": [0] * count,
        }
        self.metadata = pa.table({name: overrides.get(name, values) for name, values in metadata.items()})

    def split_indices(self, split: str) -> np.ndarray:
        indices = np.arange(len(self.ids))
        by_split = {"training": indices[indices % 4 > 0], "validation": indices[indices % 4 == 0]}
        return by_split.get(split, indices[:0])

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.clip_of(int(index)) for index in indices])


def decode_pictures(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for name, content in files.items()}


def test_motion_and_linear_error_match_closed_forms():
    def clip_of(index: int) -> np.ndarray:
        clip = brightening_clip(5)
        clip[2] += 30 * index  # one frame jumps: it changes two of five differences, and l2 by the jump itself
        return clip

    measures = measure_clips(FakeDataset(["a"] * 2, clip_of), np.asarray([0, 1]))
    assert measures.motion == pytest.approx([5, (3 * 5 + 35 + 25) / 5])
    assert measures.linear_l2 == pytest.approx([0, 30 * np.sqrt(16 * 16 * 3) / 100], abs=1e-9)


def test_subsample_is_evenly_spread_and_deterministic():
    indices = np.arange(100, 1100)
    selected = subsample(indices, 40)
    assert len(selected) == 40 and (np.arange(40) == (selected - 100) // 25).all()
    assert (selected == subsample(indices, 40)).all() and (subsample(indices[:40], 40) == indices[:40]).all()


def test_histogram_counts_every_value_in_its_group():
    rng = np.random.default_rng(1)
    values, groups = rng.gamma(2, 3, 500), rng.integers(0, 3, 500)
    histogram = compute_histogram(values, groups, 4)
    assert histogram.counts.sum(1).tolist() == [*np.bincount(groups), 0] and histogram.overflow == 0
    assert histogram.counts.sum(0).tolist() == np.histogram(values, histogram.edges)[0].tolist()


@pytest.mark.parametrize("highest", [25.0, 30.0, 59.94, 60.0])
def test_ntsc_frame_rates_share_the_bins_of_their_nearest_integers(highest: float):
    values = np.asarray([rate for rate in (23.976, 24.0, 29.97, 30.0) if rate <= highest] + [highest])
    counts = compute_histogram(values, np.zeros(len(values), int), 1).counts[0]
    assert sorted(counts[counts > 0]) == ([1, 2] if highest == 25 else [2, 3] if highest == 30 else [1, 2, 2])


def test_outliers_do_not_flatten_the_histogram():
    values = np.asarray([*np.linspace(1, 10, 300), 5000.0, 7000.0])
    histogram = compute_histogram(values, np.zeros(302, int), 1)
    assert (
        histogram.edges[-1] < 20
        and histogram.overflow == 2
        and histogram.counts.sum() == 302
        and histogram.counts[0, -1] == 2
    )


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_equal_values_share_one_bin(value: float):
    histogram = compute_histogram(np.full(5, value), np.zeros(5, int), 1)
    assert histogram.counts.max() == 5 and histogram.edges[0] <= value <= histogram.edges[-1]


def test_labels_are_drawable_and_stay_distinct():
    assert fit_label("e\u0301te\u0301 à Łódź", 30) == "été à Łódź"
    assert fit_label("日本\n", 30) == "\\u65e5\\u672c\\n"
    assert fit_label("a" * 40 + "b" * 40, 9) == "aaaa…bbbb"


def test_clips_are_sorted_from_easy_to_hard():
    def clip_of(index: int) -> np.ndarray:  # error grows with the index, which the first frame encodes
        clip = np.full((FRAMES, 16, 16, 3), 40 + index, np.uint8)
        clip[2] += 5 * index
        return clip

    sheet = decode_pictures(render_dataset_pictures(FakeDataset(["a"] * 21, clip_of)))["dataset_clips.png"].astype(int)
    column = sheet[:, -14 - 7 * 131 - 64]  # through the first frame of every clip
    levels = [int(value) for value, length in run_lengths(column[:, 0]) if length == 128]
    assert levels == [40 + 2, 40 + 8, 40 + 14, 40 + 19]


def run_lengths(values: np.ndarray) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff([*starts, len(values)])
    return [(int(values[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


ODD_NAMES = [
    "A name that consists of the title of a whole film, its year and its country",
    "été",
    "日本",
    "_a$b$^c",
    "x\n",
]
REJECTS = [{"id": str(n), "category": "a", "reason": f"reason_{n % 11}", "detail": ""} for n in range(50)]


@pytest.mark.parametrize(
    ("make_dataset", "block_rows"),
    [
        (lambda: FakeDataset(["one"], lambda index: brightening_clip(0), seconds=[0.0], source_fps=[0.0]), [1]),
        (lambda: FakeDataset(ODD_NAMES * 3, brightening_clip, name="日本 $x$", rejects=REJECTS), [3] * 5),
        (
            lambda: FakeDataset(
                [f"c{number % 300}" for number in range(900)], lambda index: brightening_clip(index % 7)
            ),
            [3] * 8,
        ),
        (
            lambda: FakeDataset(["wide"] * 5, lambda index: brightening_clip(index, 128, 256), padded=[0, 0, 0, 3, 3]),
            [4],
        ),
        (lambda: FakeDataset(["tall"] * 2, lambda index: brightening_clip(index, 256, 128)), [2]),
    ],
    ids=["one clip, nothing known", "odd names", "300 categories", "wide", "tall"],
)
def test_unusual_datasets_give_two_plausible_pictures(make_dataset: Callable[[], FakeDataset], block_rows: list[int]):
    dataset = make_dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = decode_pictures(render_dataset_pictures(dataset))
    assert list(pictures) == ["dataset_clips.png", "dataset_measures.png"]
    for picture in pictures.values():
        assert (picture[0, 0] == BACKGROUND_RGB).all() and 300 < picture.shape[1] < 1600
    clip = dataset.clip
    row_px = 128 * clip.height // max(clip.height, clip.width) + 3
    assert 0 < pictures["dataset_clips.png"].shape[0] - sum(block_rows) * row_px - len(block_rows) * 42 < 160
    assert 500 < pictures["dataset_measures.png"].shape[0] < 900


def test_texts_of_the_histograms_neither_overlap_nor_leave_the_picture(monkeypatch: pytest.MonkeyPatch):
    texts: list[Text] = []
    boxes = []
    figures = []

    def save(figure: Figure, *_: object, **__: object) -> None:
        figure.draw_without_rendering()  # computes the layout
        with monkeypatch.context() as patched:
            patched.setattr(Text, "draw", lambda text, _: texts.append(text))
            figure.draw_without_rendering()
        figures.append(figure)
        boxes.extend(text.get_window_extent() for text in texts if text.get_text().strip() and text.get_visible())

    monkeypatch.setattr(Figure, "savefig", save)
    unknown = [0.0, 1.0] * 150
    categories = [f"{number % 12} {'long ' * 20}" for number in range(300)]
    render_dataset_pictures(
        FakeDataset(
            categories, lambda index: brightening_clip(index % 9), seconds=unknown, source_fps=unknown, rejects=REJECTS
        )
    )
    assert len(boxes) > 60
    width, height = figures[0].bbox.size
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    overlapping = [
        (box, other)
        for number, box in enumerate(boxes)
        for other in boxes[:number]
        if box.shrunk(0.98, 0.9).overlaps(other)
    ]
    assert not overlapping
