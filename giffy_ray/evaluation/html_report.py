"""Renders an evaluation as one self-contained HTML file that plays all clips side by side, in sync.

The file holds clips and scores as JSON; the script of `html_report.html` draws them.
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
from giffy_ray.evaluation.evaluator import MEASURES, PAPER_NOTE, PAPER_TABLE_2, REAL, Score, Summary
from giffy_ray.evaluation.tables import format_count

_TEMPLATE = Path(__file__).with_suffix(".html")
_STYLE = Path(__file__).with_suffix(".css")
_MAX_PIXELS = 90_000_000  # over all frames of all clips; about 25 MB of HTML


def select_page_clips(dataset: ClipDataset, indices: np.ndarray, method_count: int) -> list[int]:
    """Selects as many of `indices` as fit on a page with this many methods, evenly over the categories."""
    clip = dataset.clip
    pixels = clip.frames * clip.height * clip.width * (method_count + 1)  # the target clip is shown, too
    category_counts: Counter[str] = Counter()
    ranked = []
    for index in indices.tolist():
        category = dataset.categories[index]
        ranked.append((category_counts[category], index))
        category_counts[category] += 1
    return sorted(index for _, index in sorted(ranked)[: max(1, _MAX_PIXELS // pixels)])


def render_comparison(
    dataset: ClipDataset,
    split: str,
    scores: Sequence[Score],
    summaries: Sequence[Summary],
    sprites: Mapping[int, Mapping[str, bytes]],
    split_size: int | None = None,
) -> bytes:
    """Renders the HTML page of an evaluation.

    Args:
        dataset: The target clips.
        split: Name of the evaluated split.
        scores: Scores of all evaluated clips.
        summaries: `summarise(scores)`.
        sprites: Dataset index -> method or REAL -> `media.encode_sprite` of the clip, for the clips to show.
        split_size: Clips of the split, if only some of them are evaluated.
    """
    scores_by_clip: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for score in scores:
        scores_by_clip[score.clip_id][score.method] = {metric: getattr(score, metric) for metric in MEASURES}
    clip_count, clip = len(scores_by_clip), dataset.clip
    selection = "" if len(sprites) == clip_count else "the first of each category, "
    data = {
        "name": dataset.name,
        "title": f"{dataset.name}: generated and target clips of the {split} split",
        "subtitle": f"{format_count(clip_count, split_size)} clips of {clip.frames} frames at {clip.fps:g} fps, "
        f"{clip.width}×{clip.height}, held out of training. All clips play in sync.",
        "gallery_note": f"{len(sprites)} of {clip_count} clips, {selection}compressed for this page; the scores are "
        "those of the uncompressed clips.",
        "size": [clip.height, clip.width],
        "frames": clip.frames,
        "fps": clip.fps,
        "sprite_columns": sprite_columns(clip.frames),
        "methods": list(dict.fromkeys(score.method for score in scores)),
        "target": REAL,
        "measures": [{"name": name, **measure._asdict()} for name, measure in MEASURES.items()],
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "paper": {"rows": PAPER_TABLE_2, "note": PAPER_NOTE},
        "clips": [
            {
                "id": dataset.ids[index],
                "category": dataset.categories[index],
                "scores": scores_by_clip[dataset.ids[index]],
                "sprites": {name: base64.b64encode(sprite).decode() for name, sprite in clip_sprites.items()},
            }
            for index, clip_sprites in sprites.items()
        ],
    }
    return render_template(_TEMPLATE, data)


def render_template(template: Path, data: Mapping[str, Any]) -> bytes:
    """Fills the placeholders {{style}}, with the common CSS, and {{data}}, with `data` as JSON."""
    # Inside a script element, only "</script" and "<!--" are special, and JSON has "<" only in strings.
    text = json.dumps(_to_json(data), allow_nan=False).replace("<", "\\u003c")
    return template.read_text().replace("{{style}}", _STYLE.read_text()).replace("{{data}}", text).encode()


def _to_json(value: Any) -> Any:
    """Replaces floats that JSON lacks: infinities by strings that JavaScript's Number() parses, NaN by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value
