"""A data set -> two pictures of what is in it, so that one sees what a model will be trained on.

`dataset_clips.png` shows a few clips of each category, `dataset_measures.png` how the clips are distributed: as files
(length, frame rate, picture size) and as they are trained on (motion, error of linear interpolation).
"""

from __future__ import annotations

import functools
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from giffy_ray.config import SPLITS
from giffy_ray.core.media import FAINT, INK, PAPER, contact_sheet
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.metrics import l2_paper
from giffy_ray.models.baselines import linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_MOST_CATEGORIES = 8
_MOST_MEASURED = 400  # clips in the histograms of what is slow to measure
_MOST_CANDIDATES = 50  # clips of a category, of which some are shown
_SHOWN_QUANTILES = (0.1, 0.4, 0.7, 0.95)  # of a category's order by linear interpolation's error: from easy to hard
_THUMBNAIL_PX = 128
_NAME_LETTERS, _ID_LETTERS, _TITLE_LETTERS = 32, 20, 70
# The "muted" palette of Paul Tol, made for all kinds of colour vision, without its pale sand; grey is for the others.
_COLOURS = ("#332288", "#cc6677", "#44aa99", "#882255", "#999933", "#88ccee", "#aa4499", "#117733")
_OTHERS_COLOUR = "#a6a9ae"
_PAPER, _INK, _FAINT = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (PAPER, INK, FAINT))
_BINS = 25  # so that halves and quarters of the largest value lie in the middle of a bin too
_DPI, _WIDE_IN, _PANELS_IN, _LINE_IN, _MARGIN_IN = 100, 11.2, 5.6, 0.2, 0.16
_TEXT_PT = 9
_LEGEND_COLUMNS = 3
_MOST_OVERLAID = 3  # more outlines than that cannot be told apart; they are stacked
_TICKS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Measures:
    """Of some clips as they are trained on, one value a clip."""

    rows: np.ndarray  # int64 [clips], of the store
    motion: np.ndarray  # float64 [clips], mean absolute difference of consecutive frames, in grey levels 0..255
    linear_l2: np.ndarray  # float64 [clips], error of linear interpolation between the ends, in `l2_paper`'s unit


@dataclass(frozen=True)
class Histogram:
    """Clips counted by group and bin. `beyond` of them lie above the last bin and are counted in it."""

    counts: np.ndarray  # int64 [groups, bins]
    edges: np.ndarray  # float64 [bins + 1]
    beyond: int


def survey(store: ClipDataset) -> dict[str, bytes]:
    """File name -> PNG, of a store with at least one clip.

    At most 8 categories are told apart, the largest; motion and error are measured on at most 400 clips for each of
    the two pictures, the same ones every time.
    """
    shown = _largest(store.categories)
    every = np.arange(len(store.ids))
    sampled = sample(every, _MOST_MEASURED)
    # A sample of everything may hold no clip of a category, so what is shown is chosen from samples of each.
    categories = np.asarray(store.categories)
    of_shown = {name: sample(every[categories == name], _MOST_CANDIDATES) for name in shown}
    measures = measure(store, np.unique(np.concatenate([sampled, *of_shown.values()])))
    return {
        "dataset_clips.png": _clips_picture(store, of_shown, measures),
        "dataset_measures.png": _measures_picture(store, shown, sampled, measures),
    }


def sample(rows: np.ndarray, most: int) -> np.ndarray:
    """`rows`, or where there are more than `most`, one out of each of `most` equal stretches; always the same ones."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng(0)
    return np.asarray([rng.choice(stretch) for stretch in np.array_split(rows, most)])


def measure(store: ClipDataset, rows: np.ndarray) -> Measures:
    """Motion and linear interpolation's error of the clips of `rows`, int64 [clips]."""
    motion, linear_l2 = np.empty(len(rows)), np.empty(len(rows))
    for place, row in enumerate(rows):  # one at a time: as float64, a large clip takes a few hundred megabytes
        clip = store.get_clips(np.asarray([row]))
        motion[place] = np.abs(np.diff(clip.astype(np.int16), axis=1)).mean()
        real = torch.from_numpy(clip)
        linear_l2[place] = l2_paper(linear(real[:, 0], real[:, -1], real.shape[1]), real).item()
    return Measures(rows, motion, linear_l2)


def histogram(values: np.ndarray, groups: np.ndarray, group_count: int) -> Histogram:
    """Counts `values` (at least 0) from zero up to their largest, by `groups` (int [values], 0 to group_count - 1).

    The largest value is the middle of the last bin, so that 23.976 and 24, or 29.97 and 30, are counted together. Where
    a few values are far above all others, the bins end before them.
    """
    high = float(values.max(initial=0))
    usual = float(np.quantile(values, 0.98)) if len(values) else 0.0
    if usual and high > 4 * usual:
        high = 1.5 * usual
    step = (high or 1.0) / (_BINS - 1)
    edges = (np.arange(_BINS + 1) - 0.5) * step
    inside = np.minimum(values, high)
    counts = np.stack([np.histogram(inside[groups == group], edges)[0] for group in range(group_count)])
    return Histogram(counts, edges, int((values > edges[-1]).sum()))


def _largest(categories: Sequence[str]) -> list[str]:
    counts = Counter(categories)
    return sorted(sorted(counts, key=lambda name: (-counts[name], name))[:_MOST_CATEGORIES])


def _header(store: ClipDataset) -> list[str]:
    """Name, clips, and what they came from: a line each."""
    clip, every = store.clip, np.arange(len(store.ids))
    codecs = Counter(store.facts["codec"].to_pylist()).most_common()
    named = ", ".join(f"{readable(codec or 'unknown', 16)} ({count:,})" for codec, count in codecs[:4])
    more = f" and {len(codecs) - 4} more" if len(codecs) > 4 else ""
    facts = (
        (
            _clips_of(store, every),
            _counted(len(set(store.categories)), "category"),
            f"{clip.frames} frames at {clip.fps:g} fps, {clip.width}×{clip.height}",
        ),
        (f"codecs: {named}{more}", _padded(store, every), _counted(len(store.rejects), "reject")),
    )
    return [readable(store.name, _TITLE_LETTERS), *("   ·   ".join(line) for line in facts)]


def _clips_of(store: ClipDataset, rows: np.ndarray) -> str:
    """'412 clips: 350 training, 62 validation'."""
    counts = {split: int(np.isin(store.split_indices(split), rows).sum()) for split in SPLITS}
    return f"{_counted(len(rows), 'clip')}: " + ", ".join(f"{n:,} {split}" for split, n in counts.items() if n)


def _padded(store: ClipDataset, rows: np.ndarray) -> str:
    """The share of clips whose videos were too short, so that their last frame was repeated."""
    padded = store.facts["padded"].to_numpy()[rows] > 0
    return f"{_percent(int(padded.sum()), len(rows))} padded at the end"


def _percent(part: int, whole: int) -> str:
    return "<1%" if 0 < part < whole / 100 else f"{part / whole:.0%}"


def _counted(count: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}" if count else f"no {plural}"


def _clips_picture(store: ClipDataset, of_shown: dict[str, np.ndarray], measures: Measures) -> bytes:
    l2_of = dict(zip(measures.rows.tolist(), measures.linear_l2.tolist(), strict=True))
    categories = np.asarray(store.categories)
    samples = []
    for category, candidates in of_shown.items():
        by_error = sorted(candidates.tolist(), key=lambda row: l2_of[row])
        quantile_of = {by_error[round(q * (len(by_error) - 1))]: q for q in reversed(_SHOWN_QUANTILES)}
        clips = {}
        for row, quantile in reversed(quantile_of.items()):
            name = readable(Path(store.ids[row]).stem, _ID_LETTERS)
            clips[f"{quantile:.0%}   l2 {l2_of[row]:.0f}\n{name}"] = _thumbnail(store.get_clips(np.asarray([row]))[0])
        of_category = np.flatnonzero(categories == category)
        title = readable(category, _TITLE_LETTERS)
        samples.append((f"{title}   {_clips_of(store, of_category)}   {_padded(store, of_category)}", clips))
    more = len(set(store.categories)) - len(samples)
    quantiles = ", ".join(f"{quantile:.0%}" for quantile in _SHOWN_QUANTILES)
    header = _header(store)
    note = f", of at most {_MOST_CANDIDATES} clips of each" if len(store.ids) > _MOST_CANDIDATES else ""
    header.append(
        f"Clips at {quantiles} of their category's order from easy to hard, by l2 of linear interpolation{note}."
    )
    if more:
        header.append(f"The {len(samples)} largest categories; {more:,} more are not shown.")
    return contact_sheet(samples, store.clip.fps, header)


def _thumbnail(clip: np.ndarray) -> np.ndarray:
    """uint8 [time, height, width, 3], its means over squares of pixels where it is twice too large, or more."""
    time, height, width, _ = clip.shape
    side = max(1, max(height, width) // _THUMBNAIL_PX)
    whole = clip[:, : height // side * side, : width // side * side]
    squares = whole.reshape(time, height // side, side, width // side, side, 3)
    return squares.mean((2, 4)).round().astype(np.uint8)


@functools.cache
def readable(text: str, letters: int) -> str:
    """`text` as the pictures' font can draw it, on one line, cut in the middle to at most `letters`.

    What the font lacks, such as 日, is written as \\u65e5, so that names remain different.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    text = unicodedata.normalize("NFC", text)
    text = "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= letters else f"{text[: letters // 2]}…{text[-((letters - 1) // 2) :]}"


def _measures_picture(store: ClipDataset, shown: list[str], sampled: np.ndarray, measures: Measures) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    number = {category: place for place, category in enumerate(shown)}
    groups = np.asarray([number.get(category, len(shown)) for category in store.categories])
    legend = [f"{readable(name, _NAME_LETTERS)} ({store.categories.count(name):,})" for name in shown]
    others = len(set(store.categories)) - len(shown)
    if others:
        legend.append(f"{others:,} others ({int((groups == len(shown)).sum()):,})")
    colours = [*_COLOURS[: len(shown)], *([_OTHERS_COLOUR] if others else [])]

    header = _header(store)
    head_in = 2 * _MARGIN_IN + (len(header) + 0.6 + -(-len(legend) // _LEGEND_COLUMNS)) * _LINE_IN
    pads = ConstrainedLayoutEngine(w_pad=_MARGIN_IN, h_pad=_MARGIN_IN / 2, hspace=0.03, wspace=0)
    figure = Figure((_WIDE_IN, head_in + _PANELS_IN), _DPI, facecolor=_PAPER, layout=pads)
    grid = figure.add_gridspec(2, 1, height_ratios=[head_in, _PANELS_IN])
    head, body = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _write_head(head, head_in, header, legend, colours)
    axes = body.subplots(2, 3).flat

    at = np.searchsorted(measures.rows, sampled)
    note = "" if len(sampled) == len(store.ids) else f"\na sample of {len(sampled)} of {len(store.ids):,} clips"
    facts = {name: store.facts[name].to_numpy() for name in ("seconds", "source_fps", "source_width", "source_height")}
    size = np.sqrt(facts["source_width"].astype(float) * facts["source_height"])
    _draw_known(next(axes), "length of the video", "seconds", facts["seconds"], groups, colours)
    _draw_known(next(axes), "frame rate of the video", "frames a second", facts["source_fps"], groups, colours)
    _draw_known(next(axes), "picture size of the video", "√(width × height) in pixels", size, groups, colours)
    _draw(next(axes), "motion", f"grey levels from frame to frame{note}", measures.motion[at], groups[sampled], colours)
    l2 = measures.linear_l2[at]
    _draw(next(axes), "error of linear interpolation", f"l2 of the clip{note}", l2, groups[sampled], colours)
    _draw_rejects(next(axes), Counter(reject["reason"] for reject in store.rejects))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def _write_head(
    head: FigureBase, head_in: float, header: Sequence[str], legend: Sequence[str], colours: Sequence[str]
) -> None:
    """The header's lines and under them the legend. By hand: matplotlib's own drops names that begin with `_`."""

    def write(across_in: float, line: float, text: str, colour: str) -> None:
        place = (across_in / _WIDE_IN, 1 - (_MARGIN_IN + (line + 0.5) * _LINE_IN) / head_in)
        head.text(*place, text, color=colour, fontsize=_TEXT_PT, va="center", parse_math=False)

    for line, text in enumerate(header):
        write(_MARGIN_IN, line, text, _FAINT if line else _INK)
    column_in = (_WIDE_IN - 2 * _MARGIN_IN) / _LEGEND_COLUMNS
    for place, (text, colour) in enumerate(zip(legend, colours, strict=True)):
        line, column = divmod(place, _LEGEND_COLUMNS)
        write(_MARGIN_IN + column * column_in, len(header) + 0.6 + line, "■", colour)
        write(_MARGIN_IN + column * column_in + 0.16, len(header) + 0.6 + line, text, _INK)


def _draw_known(
    axes: Axes, title: str, unit: str, values: np.ndarray, groups: np.ndarray, colours: Sequence[str]
) -> None:
    """As `_draw`, without the zeros, which stand for what the file does not say."""
    known = values > 0
    unknown = int((~known).sum())
    note = f"\n{unknown:,} unknown, left out" if unknown else ""
    _draw(axes, title, f"{unit}{note}", values[known], groups[known], colours)


def _draw(axes: Axes, title: str, unit: str, values: np.ndarray, groups: np.ndarray, colours: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    _style(axes, title)
    if not len(values):
        _say(axes, "unknown")
        axes.set_xlabel(unit, fontsize=_TEXT_PT, color=_INK)
        return
    made = histogram(values, groups, len(colours))
    stacked = len(colours) > _MOST_OVERLAID
    top = _stack(axes, made, colours) if stacked else _overlay(axes, made, colours)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICKS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS, integer=True, min_n_ticks=1))
    axes.set_xlim(2 * made.edges[0], made.edges[-1] - made.edges[0])
    axes.set_ylim(0, 1.08 * top)
    beyond = f"\n{made.beyond:,} higher, counted in the last bar" if made.beyond else ""
    axes.set_xlabel(f"{unit}{beyond}", fontsize=_TEXT_PT, color=_INK)
    axes.set_ylabel("clips, stacked" if stacked else "clips", fontsize=_TEXT_PT, color=_INK)


def _overlay(axes: Axes, made: Histogram, colours: Sequence[str]) -> int:
    """See-through areas with outlines; returns the height of the highest."""
    for group in np.argsort(-made.counts.max(1), kind="stable"):  # the highest first, so that it hides no other
        heights = np.where(made.counts[group], made.counts[group], np.nan)  # no line along the axis where none are
        axes.stairs(heights, made.edges, fill=True, color=colours[group], alpha=0.25)
        axes.stairs(heights, made.edges, color=colours[group], linewidth=1.4)
    return int(made.counts.max())


def _stack(axes: Axes, made: Histogram, colours: Sequence[str]) -> int:
    """Solid areas on top of each other, the first group's uppermost as in the legend; returns the total's height."""
    below = np.zeros(_BINS, int)
    for counts, colour in reversed(list(zip(made.counts, colours, strict=True))):
        top = below + counts
        axes.stairs(
            np.where(counts, top, np.nan), made.edges, baseline=below, fill=True, facecolor=colour, edgecolor=_PAPER
        )
        below = top
    return int(below.max())


def _draw_rejects(axes: Axes, reasons: Counter[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    _style(axes, "rejects, by reason")
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    if not reasons:
        _say(axes, "no rejects")
        return
    counts = reasons.most_common()
    if len(counts) > _MOST_CATEGORIES:
        rest = counts[_MOST_CATEGORIES - 1 :]
        counts = [*counts[: _MOST_CATEGORIES - 1], (f"{len(rest)} other reasons", sum(n for _, n in rest))]
    axes.barh(range(len(counts)), [n for _, n in counts], height=0.22, color=_OTHERS_COLOUR)
    for line, (reason, count) in enumerate(counts):
        text = f"{readable(reason, _NAME_LETTERS)}  {count:,}"
        axes.text(0, line - 0.15, text, fontsize=_TEXT_PT, color=_INK, va="bottom", parse_math=False)
    # Never fewer than four lines: a single bar would fill the panel.
    axes.set_ylim(max(len(counts), 4) - 0.5, -0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICKS, integer=True, min_n_ticks=1))
    axes.set_xlim(0, 1.08 * counts[0][1])
    axes.set_xlabel("videos", fontsize=_TEXT_PT, color=_INK)


def _style(axes: Axes, title: str) -> None:
    axes.set_facecolor(_PAPER)
    axes.set_title(title, loc="left", fontsize=_TEXT_PT + 1, color=_INK)
    axes.tick_params(labelsize=_TEXT_PT - 0.5, colors=_FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _say(axes: Axes, text: str) -> None:
    """Words in the place of a drawing."""
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    place = (0.5, 0.5)
    axes.text(*place, text, transform=axes.transAxes, ha="center", fontsize=_TEXT_PT + 1, color=_FAINT)
