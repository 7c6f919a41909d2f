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
from giffy_ray.evaluation.html_report import render_comparison, select_page_clips

HOSTILE_ID = "erupting/</script><script>alert(1)</script><!-- é \u2028 日.mp4"
IDS = ["erupting/one.mp4", HOSTILE_ID, "skiing/three.mp4"]


class FakeDataset:
    def __init__(self, categories: list[str], frames: int = 6, side: int = 16):
        self.name, self.categories = "filmed", categories
        self.ids = [*IDS, *(f"{index}.mp4" for index in range(len(IDS), len(categories)))]
        self.clip = ClipConfig(frames=frames, fps=10, height=side, width=side)


class PageParser(HTMLParser):
    """Collects elements with their attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements = []
        self.scripts = []
        self.open_tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open_tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] == "script":
            self.scripts[-1] += data


def make_score(method: str, clip_id: str, value: float, psnr: float = 20.0) -> Score:
    diversity = value if "best" in method else None
    category = clip_id.partition("/")[0]
    return Score(method, category, clip_id, value, psnr, 0.5, 0, value, 1, 1, value, diversity, clip_id)


def render_page(clip_count: int = 3) -> tuple[str, dict]:
    """Renders the page of three scored clips, which shows the first `clip_count`; returns the HTML and its JSON."""
    dataset = FakeDataset(["erupting", "erupting", "skiing"])
    scores = [make_score(method, clip_id, 2.0, np.inf) for method in ("linear", "cvae, best of 2") for clip_id in IDS]
    clip = np.zeros((6, 16, 16, 3), np.uint8)
    sprites = {name: media.encode_sprite(clip) for name in (REAL, "linear", "cvae, best of 2")}
    html = render_comparison(dataset, "test", scores, summarise(scores), dict.fromkeys(range(clip_count), sprites))  # type: ignore[arg-type]
    text = html.decode()
    return text, json.loads(PageParser(text).scripts[0])


def test_page_is_complete_html_and_executes_no_clip_id():
    text, data = render_page()
    parser = PageParser(text)
    assert not parser.open_tags
    assert [clip["id"] for clip in data["clips"]] == IDS
    assert len(parser.scripts) == 2  # the JSON and the page's script; none from a clip id
    assert "alert(1)" not in parser.scripts[1]
    assert "<!--" not in text
    assert "innerHTML" not in text
    ids = [attributes["id"] for _, attributes in parser.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used_ids = set(re.findall(r'\bbyId\("(\w+)"\)', text)) | set(re.findall(r'getElementById\("(\w+)"\)', text))
    assert "clips" in used_ids and used_ids <= set(ids)


def test_page_loads_no_external_resources():
    text, _ = render_page()
    assert not re.findall(r"https?:|//[a-z]", text.replace("// ", ""))
    assert not [tag for tag, attributes in PageParser(text).elements if {"src", "href"} & attributes.keys()]
    assert "@import" not in text
    assert not re.findall(r"url\(", text)


def test_page_data_holds_all_scores_summaries_and_sprites():
    _, data = render_page()
    assert data["methods"] == ["linear", "cvae, best of 2"]
    assert [measure["name"] for measure in data["measures"]] == list(MEASURES)
    for clip in data["clips"]:
        assert clip["sprites"].keys() == {REAL, "linear", "cvae, best of 2"}
        assert clip["scores"]["linear"]["l2_paper"] == 2
        assert clip["scores"]["linear"]["psnr"] == "Infinity"  # JSON has no infinity
        assert clip["scores"]["linear"]["diversity"] is None
        assert clip["scores"]["cvae, best of 2"]["diversity"] == 2
    summaries = {(s["category"], s["method"]): s for s in data["summaries"]}
    assert summaries["all", "linear"]["spreads"]["l2_paper"] == [2, 0]
    assert summaries["all", "linear"]["spreads"]["psnr"] == ["Infinity", None]
    assert summaries["erupting", "cvae, best of 2"]["win_rate"] == 0
    assert summaries["erupting", "cvae, best of 2"]["skill"] == [0, 0, 0]  # the same errors as linear in every resample
    assert summaries["skiing", "cvae, best of 2"]["skill"] == [0, None, None]  # no interval for a single video
    assert data["paper"]["rows"]["CVAE"] == {"erupting": [180, 110], "skiing": [197, 80]}
    assert "swapped" in data["paper"]["note"]
    assert (data["size"], data["frames"], data["fps"], data["sprite_columns"]) == ([16, 16], 6, 10, 3)


def test_page_states_how_many_clips_it_shows():
    assert render_page(3)[1]["gallery_note"].startswith("3 of 3 clips, compressed")
    assert render_page(2)[1]["gallery_note"].startswith("2 of 3 clips, the first of each category, compressed")


@pytest.mark.parametrize(
    ("categories", "capacity", "expected"),
    [
        (["a"] * 5, 10, [0, 1, 2, 3, 4]),
        (["a"] * 5 + ["b"] * 3, 4, [0, 1, 5, 6]),
        (["a"] * 5 + ["b"] * 1, 4, [0, 1, 2, 5]),
        (["a", "b", "c", "d"], 2, [0, 1]),
        (["a", "b"], 0, [0]),  # a single clip is shown even if it exceeds the limit
    ],
)
def test_page_clips_are_selected_evenly_over_categories(
    monkeypatch, categories: list[str], capacity: int, expected: list[int]
):
    """`capacity`: how many clips, each with its target and two methods, fit on the page."""
    monkeypatch.setattr("giffy_ray.evaluation.html_report._MAX_PIXELS", capacity * 3 * 6 * 16 * 16)
    dataset = FakeDataset(categories)
    assert select_page_clips(dataset, np.arange(len(categories)), method_count=2) == expected  # type: ignore[arg-type]


def test_page_of_100_clips_and_6_methods_stays_below_25_mb():
    dataset = FakeDataset(["a"] * 1000, frames=30, side=64)
    selected = select_page_clips(dataset, np.arange(1000), method_count=6)  # type: ignore[arg-type]
    assert len(selected) >= 100
    # Compresses about as well as film: smooth moving shapes with a little noise.
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    waves = [np.sin((x + 2 * t) / 9 + channel) * np.cos(y / 7 + t / 20) for t in range(30) for channel in range(3)]
    smooth = 128 + 100 * np.stack(waves).reshape(30, 3, 64, 64).transpose(0, 2, 3, 1)
    clip = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    assert len(media.encode_sprite(clip)) * 4 / 3 * 7 * len(selected) < 25e6


def test_sprite_holds_all_frames_in_order():
    clip = np.broadcast_to((40 * np.arange(6)).astype(np.uint8)[:, None, None, None], (6, 16, 16, 3))
    picture = np.asarray(Image.open(io.BytesIO(media.encode_sprite(clip))).convert("RGB")).astype(int)
    columns = media.sprite_columns(6)
    assert picture.shape == (2 * 16, columns * 16, 3)
    for frame in range(6):
        top, left = frame // columns * 16, frame % columns * 16
        assert picture[top + 4 : top + 12, left + 4 : left + 12].mean() == pytest.approx(40 * frame, abs=3)
