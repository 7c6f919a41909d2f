import csv
import io
import statistics

import numpy as np
import pytest
import torch

from giffy_ray.config import ClipConfig
from giffy_ray.evaluate import Score, evaluate, linear_method, summarise, to_csv


class Clips:
    """Stands for a store: clips that hold one value each, straight lines in time but for one."""

    def __init__(self):
        self.clip = ClipConfig(frames=4, height=16, width=16)
        self.ids, self.categories = ["a", "b", "c"], ["skiing", "erupting", "skiing"]
        self.levels = np.asarray([[0, 30, 60, 90], [0, 10, 20, 30], [0, 0, 0, 90]], np.uint8)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        levels = self.levels[rows][:, :, None, None, None]
        return np.broadcast_to(levels, (len(rows), 4, 16, 16, 3)).copy()


def black(start, end, clip_ids):
    return torch.zeros(len(clip_ids), 4, 16, 16, 3, dtype=torch.uint8)


def test_every_method_and_clip_is_scored_by_id():
    scores = evaluate({"linear": linear_method(4), "black": black}, Clips(), np.asarray([2, 0]))  # type: ignore[arg-type]
    assert [(s.method, s.category, s.clip_id) for s in scores] == [
        ("linear", "skiing", "c"),
        ("linear", "skiing", "a"),
        ("black", "skiing", "c"),
        ("black", "skiing", "a"),
    ]
    values = 16 * 16 * 3
    # Clip c is 0, 0, 0, 90 and its line 0, 30, 60, 90; clip a is its own line.
    assert scores[0].l2_report == pytest.approx((values * (30**2 + 60**2)) ** 0.5 / 100)
    assert scores[1].l2_report == 0
    assert scores[2].l2_report == pytest.approx((values * 90**2) ** 0.5 / 100)
    assert scores[2].psnr == float("inf")  # between its ends, clip c is black


def scores() -> list[Score]:
    l2 = {"linear": (10, 20, 60), "cvae": (12, 14, 40)}
    return [
        Score(method, category, clip_id, value, 20.0, 0.5)
        for method, values in l2.items()
        for value, clip_id, category in zip(values, "abc", ("skiing", "erupting", "skiing"), strict=True)
    ]


def test_the_table_has_means_deviations_and_shares_won():
    rows = {(row.category, row.method): row for row in summarise(scores())}
    assert list(rows) == [(c, m) for c in ("erupting", "skiing", "all") for m in ("linear", "cvae")]
    assert rows["skiing", "linear"].l2_report == (35, 25)
    assert rows["all", "cvae"].l2_report == (22, pytest.approx(statistics.pstdev([12, 14, 40])))
    assert rows["all", "cvae"].won == pytest.approx(2 / 3)
    assert rows["skiing", "cvae"].won == 0.5
    assert rows["all", "linear"].won is None
    assert rows["all", "cvae"].clips == 3


def test_the_csv_has_a_row_for_each_method_and_clip():
    rows = list(csv.DictReader(io.StringIO(to_csv(scores()))))
    assert list(rows[0]) == ["method", "category", "clip_id", "l2_report", "psnr", "ssim"]
    assert len(rows) == 6
    assert rows[3] == {
        "method": "cvae",
        "category": "skiing",
        "clip_id": "a",
        "l2_report": "12",
        "psnr": "20.0",
        "ssim": "0.5",
    }
