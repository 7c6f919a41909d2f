import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from giffy_ray.config import ClipConfig
from giffy_ray.core import media
from giffy_ray.evaluation.evaluator import MEASURES, REAL, Score, summarise
from giffy_ray.evaluation.html_report import chosen_rows, render_comparison

WICKED = "erupting/</script><script>alert(1)</script><!-- é \u2028 日.mp4"
IDS = ["erupting/one.mp4", WICKED, "skiing/three.mp4"]


class FakeStore:
    def __init__(self, categories: list[str], frames: int = 6, side: int = 16):
        self.name, self.categories = "filmed", categories
        self.ids = [*IDS, *(f"{row}.mp4" for row in range(len(IDS), len(categories)))]
        self.clip = ClipConfig(frames=frames, fps=10, height=side, width=side)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of the scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def score(method: str, clip_id: str, value: float, psnr: float = 20.0) -> Score:
    diversity = value if "best" in method else None
    category = clip_id.partition("/")[0]
    return Score(method, category, clip_id, value, psnr, 0.5, 0, value, 1, 1, value, diversity, clip_id)


def written(shown: int = 3) -> tuple[str, dict]:
    """The page of three clips by linear and cvae, of which the first `shown` are in it, and its JSON."""
    store = FakeStore(["erupting", "erupting", "skiing"])
    scores = [score(method, clip_id, 2.0, np.inf) for method in ("linear", "cvae, best of 2") for clip_id in IDS]
    clip = np.zeros((6, 16, 16, 3), np.uint8)
    pictures = {name: media.sprite(clip) for name in (REAL, "linear", "cvae, best of 2")}
    html = render_comparison(store, "test", scores, summarise(scores), dict.fromkeys(range(shown), pictures))  # type: ignore[arg-type]
    text = html.decode()
    return text, json.loads(Reader(text).scripts[0])


def test_the_page_is_whole_html_that_holds_every_clip_and_runs_no_name():
    text, study = written()
    reader = Reader(text)
    assert not reader.open
    assert [clip["id"] for clip in study["clips"]] == IDS
    assert len(reader.scripts) == 2  # the JSON and the page's own; none out of a name
    assert "alert(1)" not in reader.scripts[1]
    assert "<!--" not in text
    assert "innerHTML" not in text
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\bat\("(\w+)"\)', text)) | set(re.findall(r'getElementById\("(\w+)"\)', text))
    assert used <= set(ids)


def test_the_page_needs_nothing_from_elsewhere():
    text, _ = written()
    assert not re.findall(r"https?:|//[a-z]", text.replace("// ", ""))
    assert not [tag for tag, attributes in Reader(text).elements if {"src", "href"} & attributes.keys()]
    assert "@import" not in text
    assert not re.findall(r"url\(", text)


def test_the_page_has_every_score_summary_and_picture():
    _, study = written()
    assert study["methods"] == ["linear", "cvae, best of 2"]
    assert [measure["name"] for measure in study["measures"]] == list(MEASURES)
    for clip in study["clips"]:
        assert clip["sprites"].keys() == {REAL, "linear", "cvae, best of 2"}
        assert clip["scores"]["linear"]["l2_paper"] == 2
        assert clip["scores"]["linear"]["psnr"] == "Infinity"  # which JSON has no number for
        assert clip["scores"]["linear"]["diversity"] is None
        assert clip["scores"]["cvae, best of 2"]["diversity"] == 2
    summaries = {(s["category"], s["method"]): s for s in study["summaries"]}
    assert summaries["all", "linear"]["spreads"]["l2_paper"] == [2, 0]
    assert summaries["all", "linear"]["spreads"]["psnr"] == ["Infinity", None]
    assert summaries["erupting", "cvae, best of 2"]["won"] == 0
    assert summaries["erupting", "cvae, best of 2"]["skill"] == [0, 0, 0]  # as wrong as linear in every resample
    assert summaries["skiing", "cvae, best of 2"]["skill"] == [0, None, None]  # one video alone has no interval
    assert study["report"]["rows"]["CVAE"] == {"erupting": [180, 110], "skiing": [197, 80]}
    assert "swapped" in study["report"]["note"]
    assert (study["size"], study["frames"], study["fps"], study["across"]) == ([16, 16], 6, 10, 3)


def test_the_page_says_how_many_clips_there_are():
    assert written(3)[1]["shown"].startswith("3 of 3 clips, compressed")
    assert written(2)[1]["shown"].startswith("2 of 3 clips, the first of each category, compressed")


@pytest.mark.parametrize(
    ("categories", "pixels", "expected"),
    [
        (["a"] * 5, 10, [0, 1, 2, 3, 4]),
        (["a"] * 5 + ["b"] * 3, 4, [0, 1, 5, 6]),
        (["a"] * 5 + ["b"] * 1, 4, [0, 1, 2, 5]),
        (["a", "b", "c", "d"], 2, [0, 1]),
        (["a", "b"], 0, [0]),  # a clip larger than the page may be: one is shown
    ],
)
def test_what_does_not_fit_is_cut_evenly(monkeypatch, categories: list[str], pixels: int, expected: list[int]):
    """`pixels`: how many clips of real and two methods there is room for."""
    monkeypatch.setattr("giffy_ray.evaluation.html_report._MOST_PIXELS", pixels * 3 * 6 * 16 * 16)
    store = FakeStore(categories)
    assert chosen_rows(store, np.arange(len(categories)), methods=2) == expected  # type: ignore[arg-type]


def test_a_hundred_clips_by_six_methods_stay_below_25_megabytes():
    store = FakeStore(["a"] * 1000, frames=30, side=64)
    shown = chosen_rows(store, np.arange(1000), methods=6)  # type: ignore[arg-type]
    assert len(shown) >= 100
    # A clip that compresses about as well as film: smooth shapes that move, and a little noise.
    random, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64]
    waves = [np.sin((x + 2 * t) / 9 + channel) * np.cos(y / 7 + t / 20) for t in range(30) for channel in range(3)]
    smooth = 128 + 100 * np.stack(waves).reshape(30, 3, 64, 64).transpose(0, 2, 3, 1)
    clip = (smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    assert len(media.sprite(clip)) * 4 / 3 * 7 * len(shown) < 25e6


def test_a_sprite_holds_all_frames_in_order():
    clip = np.broadcast_to((40 * np.arange(6)).astype(np.uint8)[:, None, None, None], (6, 16, 16, 3))
    picture = np.asarray(Image.open(io.BytesIO(media.sprite(clip))).convert("RGB")).astype(int)
    across = media.sprite_columns(6)
    assert picture.shape == (2 * 16, across * 16, 3)
    for frame in range(6):
        top, left = frame // across * 16, frame % across * 16
        assert picture[top + 4 : top + 12, left + 4 : left + 12].mean() == pytest.approx(40 * frame, abs=3)
