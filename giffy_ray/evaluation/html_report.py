"""Scores and pictures of clips -> one HTML file that plays them side by side, in step, and needs nothing else.

The pictures and figures lie in it as JSON; `html_report.html` draws them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from giffy_ray.core.media import sprite_columns
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.evaluator import MEASURES, REAL, REPORT_NOTE, REPORT_TABLE_2, Score, Summary

_TEMPLATE, _STYLE = Path(__file__).with_suffix(".html"), Path(__file__).with_suffix(".css")
_MOST_PIXELS = 90_000_000  # of all frames of all clips: about 25 MB of file


def chosen_rows(store: ClipDataset, rows: np.ndarray, methods: int) -> list[int]:
    """Those of `rows` that a page with this many methods has room for: the first of every category, in order."""
    clip = store.clip
    pixels = clip.frames * clip.height * clip.width * (methods + 1)
    seen: Counter[str] = Counter()
    ranked = []
    for row in rows.tolist():
        ranked.append((seen[store.categories[row]], row))
        seen[store.categories[row]] += 1
    return sorted(row for _, row in sorted(ranked)[: max(1, _MOST_PIXELS // pixels)])


def render_comparison(
    store: ClipDataset,
    split: str,
    scores: Sequence[Score],
    summaries: Sequence[Summary],
    sprites: Mapping[int, Mapping[str, bytes]],
    there_are: int | None = None,
) -> bytes:
    """The HTML. `sprites`: row of the store -> {REAL and every method: `render.sprite` of its clip}.

    `there_are`: clips of the split, where `scores` are of some of them.
    """
    scores_of: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for score in scores:
        scores_of[score.clip_id][score.method] = {metric: getattr(score, metric) for metric in MEASURES}
    clips, clip = len(scores_of), store.clip
    taken = f"{clips}" if there_are in (None, clips) else f"{clips} of {there_are}"
    of_each = "" if len(sprites) == clips else "the first of each category, "
    study = {
        "name": store.name,
        "title": f"{store.name}: {split} clips, made and real",
        "about": f"{taken} clips of {clip.frames} frames at {clip.fps:g} a second, {clip.width}×{clip.height}, "
        "held out of training. All play in step.",
        "shown": f"{len(sprites)} of {clips} clips, {of_each}compressed for this page; scores are of the originals.",
        "size": [clip.height, clip.width],
        "frames": clip.frames,
        "fps": clip.fps,
        "across": sprite_columns(clip.frames),
        "methods": list(dict.fromkeys(score.method for score in scores)),
        "real": REAL,
        "measures": [{"name": name, **measure._asdict()} for name, measure in MEASURES.items()],
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "report": {"rows": REPORT_TABLE_2, "note": REPORT_NOTE},
        "clips": [
            {
                "id": store.ids[row],
                "category": store.categories[row],
                "scores": scores_of[store.ids[row]],
                "sprites": {name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
            }
            for row, pictures in sprites.items()
        ],
    }
    return render_template(_TEMPLATE, study)


def render_template(template: Path, study: Mapping[str, Any]) -> bytes:
    """The page of a template: with the look that all have, and `study` as the JSON that it draws."""
    # In a script element only "</script" and "<!--" matter, and JSON has "<" nowhere but in strings.
    text = json.dumps(_plain(study), allow_nan=False).replace("<", "\\u003c")
    return template.read_text().replace("{{style}}", _STYLE.read_text()).replace("{{study}}", text).encode()


def _plain(value: Any) -> Any:
    """With the numbers that JSON lacks as JavaScript's Number() reads them, and none for what is not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
