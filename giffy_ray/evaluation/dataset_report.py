"""Two pictures of a dataset, to inspect training data before training on it.

`dataset_clips.png` shows a few clips of each category. `dataset_measures.png` shows histograms: of the source videos
(duration, frame rate, picture size) and of the clips (motion, error of linear interpolation).
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
from giffy_ray.core.media import BACKGROUND_RGB, MUTED_RGB, TEXT_RGB, render_contact_sheet
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.evaluation.metrics import l2_paper
from giffy_ray.models.baselines import linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_MAX_CATEGORIES = 8
_MAX_MEASURED_CLIPS = 400  # in the histograms of measures that are slow to compute
_MAX_CANDIDATES = 50  # clips per category that the shown clips are selected from
_SHOWN_QUANTILES = (0.1, 0.4, 0.7, 0.95)  # of linear interpolation's error within a category: from easy to hard
_THUMBNAIL_PX = 128
_MAX_NAME_LETTERS = 32
_MAX_ID_LETTERS = 20
_MAX_TITLE_LETTERS = 70
_MAX_CODEC_LETTERS = 16
_MAX_CODECS = 4  # listed by name in the header
# Paul Tol's "muted" palette, which is safe for colour blindness, without its pale sand; grey is for other categories.
_COLOURS = ("#332288", "#cc6677", "#44aa99", "#882255", "#999933", "#88ccee", "#aa4499", "#117733")
_OTHERS_COLOUR = "#a6a9ae"
_BACKGROUND_HEX, _TEXT_HEX, _MUTED_HEX = (
    "#{:02x}{:02x}{:02x}".format(*rgb) for rgb in (BACKGROUND_RGB, TEXT_RGB, MUTED_RGB)
)
_BINS = 25  # halves and quarters of the largest value are bin centres, too
_DPI = 100
_WIDTH_IN = 11.2
_PANELS_HEIGHT_IN = 5.6
_LINE_HEIGHT_IN = 0.2
_MARGIN_IN = 0.16
_FONT_SIZE_PT = 9
_LEGEND_COLUMNS = 3
_MAX_OVERLAID_GROUPS = 3  # more outlines are indistinguishable, so more groups are stacked
_TICK_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class ClipMeasures:
    """Measures of clips in the form that models are trained on, one value per clip."""

    indices: np.ndarray  # int64 [clips], into the dataset
    motion: np.ndarray  # float64 [clips], mean absolute difference of consecutive frames, grey levels 0..255
    linear_l2: np.ndarray  # float64 [clips], `l2_paper` of linear interpolation between the ends


@dataclass(frozen=True)
class Histogram:
    """Counts of clips by group and bin. The last bin includes `overflow` clips beyond the last edge."""

    counts: np.ndarray  # int64 [groups, bins]
    edges: np.ndarray  # float64 [bins + 1]
    overflow: int


def render_dataset_pictures(dataset: ClipDataset) -> dict[str, bytes]:
    """Renders `dataset_clips.png` and `dataset_measures.png` of a dataset with at least one clip.

    Shows the 8 largest categories and merges all others. Motion and error are measured on a fixed subsample of at most
    400 clips per picture.

    Returns:
        PNG files by name.
    """
    shown_categories = _largest_categories(dataset.categories)
    all_indices = np.arange(len(dataset.ids))
    histogram_indices = subsample(all_indices, _MAX_MEASURED_CLIPS)
    # A subsample of the dataset may miss a category, so the shown clips come from subsamples of each category.
    categories = np.asarray(dataset.categories)
    candidates = {name: subsample(all_indices[categories == name], _MAX_CANDIDATES) for name in shown_categories}
    measures = measure_clips(dataset, np.unique(np.concatenate([histogram_indices, *candidates.values()])))
    return {
        "dataset_clips.png": _render_clips(dataset, candidates, measures),
        "dataset_measures.png": _render_histograms(dataset, shown_categories, histogram_indices, measures),
    }


def subsample(indices: np.ndarray, max_count: int) -> np.ndarray:
    """Returns at most `max_count` of `indices`, evenly spread and deterministic: one from each of equal stretches."""
    if len(indices) <= max_count:
        return indices
    rng = np.random.default_rng(0)
    return np.asarray([rng.choice(stretch) for stretch in np.array_split(indices, max_count)])


def measure_clips(dataset: ClipDataset, indices: np.ndarray) -> ClipMeasures:
    """Computes motion and linear interpolation's error of the clips at `indices`, int64 [clips]."""
    motion = np.empty(len(indices))
    linear_l2 = np.empty(len(indices))
    for row, index in enumerate(indices):  # one at a time: a large clip takes hundreds of megabytes as float64
        clip = dataset.get_clips(np.asarray([index]))
        motion[row] = np.abs(np.diff(clip.astype(np.int16), axis=1)).mean()
        target = torch.from_numpy(clip)
        linear_l2[row] = l2_paper(linear(target[:, 0], target[:, -1], target.shape[1]), target).item()
    return ClipMeasures(indices, motion, linear_l2)


def compute_histogram(values: np.ndarray, groups: np.ndarray, group_count: int) -> Histogram:
    """Counts values per group in 25 bins from zero to the largest value.

    The largest value is the centre of the last bin, so that 23.976 and 24, or 29.97 and 30, share a bin. If a few
    values far exceed the rest, the bins end before them and the last bin includes them.

    Args:
        values: Values >= 0, [values].
        groups: Group of each value, int [values] in 0..group_count - 1.
        group_count: Number of groups.
    """
    high = float(values.max(initial=0))
    typical_high = float(np.quantile(values, 0.98)) if len(values) else 0.0
    if typical_high and high > 4 * typical_high:
        high = 1.5 * typical_high
    step = (high or 1.0) / (_BINS - 1)
    edges = (np.arange(_BINS + 1) - 0.5) * step
    clipped = np.minimum(values, high)
    counts = np.stack([np.histogram(clipped[groups == group], edges)[0] for group in range(group_count)])
    return Histogram(counts, edges, int((values > edges[-1]).sum()))


def _largest_categories(categories: Sequence[str]) -> list[str]:
    counts = Counter(categories)
    return sorted(sorted(counts, key=lambda name: (-counts[name], name))[:_MAX_CATEGORIES])


def _header_lines(dataset: ClipDataset) -> list[str]:
    """Name of the dataset, its clips, and the videos that they were cut from."""
    clip, all_indices = dataset.clip, np.arange(len(dataset.ids))
    codecs = Counter(dataset.metadata["codec"].to_pylist()).most_common()
    codec_list = ", ".join(
        f"{fit_label(codec or 'unknown', _MAX_CODEC_LETTERS)} ({count:,})" for codec, count in codecs[:_MAX_CODECS]
    )
    if len(codecs) > _MAX_CODECS:
        codec_list += f" and {len(codecs) - _MAX_CODECS} more"
    clip_facts = (
        _describe_splits(dataset, all_indices),
        _format_plural(len(set(dataset.categories)), "category"),
        f"{clip.frames} frames at {clip.fps:g} fps, {clip.width}×{clip.height}",
    )
    video_facts = (
        f"codecs: {codec_list}",
        _describe_padding(dataset, all_indices),
        _format_plural(len(dataset.rejects), "reject"),
    )
    separator = "   ·   "
    return [fit_label(dataset.name, _MAX_TITLE_LETTERS), separator.join(clip_facts), separator.join(video_facts)]


def _describe_splits(dataset: ClipDataset, indices: np.ndarray) -> str:
    """Formats as '412 clips: 350 training, 62 validation'."""
    counts = {split: int(np.isin(dataset.split_indices(split), indices).sum()) for split in SPLITS}
    by_split = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
    return f"{_format_plural(len(indices), 'clip')}: {by_split}"


def _describe_padding(dataset: ClipDataset, indices: np.ndarray) -> str:
    """Share of clips that repeat their last frame because the video was too short."""
    padded = dataset.metadata["padded"].to_numpy()[indices] > 0
    return f"{_format_percent(int(padded.sum()), len(indices))} padded at the end"


def _format_percent(part: int, whole: int) -> str:
    return "<1%" if 0 < part < whole / 100 else f"{part / whole:.0%}"


def _format_plural(count: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}" if count else f"no {plural}"


def _render_clips(dataset: ClipDataset, candidates: dict[str, np.ndarray], measures: ClipMeasures) -> bytes:
    l2_by_index = dict(zip(measures.indices.tolist(), measures.linear_l2.tolist(), strict=True))
    categories = np.asarray(dataset.categories)
    samples = []
    for category, category_candidates in candidates.items():
        by_error = sorted(category_candidates.tolist(), key=lambda index: l2_by_index[index])
        # In a small category, quantiles share a clip, which is shown once with the lowest of them.
        quantile_by_index = {by_error[round(q * (len(by_error) - 1))]: q for q in reversed(_SHOWN_QUANTILES)}
        clips = {}
        for index, quantile in reversed(quantile_by_index.items()):
            name = fit_label(Path(dataset.ids[index]).stem, _MAX_ID_LETTERS)
            label = f"{quantile:.0%}   l2 {l2_by_index[index]:.0f}\n{name}"
            clips[label] = _shrink(dataset.get_clips(np.asarray([index]))[0])
        category_indices = np.flatnonzero(categories == category)
        title = (
            f"{fit_label(category, _MAX_TITLE_LETTERS)}   {_describe_splits(dataset, category_indices)}"
            f"   {_describe_padding(dataset, category_indices)}"
        )
        samples.append((title, clips))
    omitted_count = len(set(dataset.categories)) - len(samples)
    quantiles = ", ".join(f"{quantile:.0%}" for quantile in _SHOWN_QUANTILES)
    header = _header_lines(dataset)
    note = f", among at most {_MAX_CANDIDATES} clips per category" if len(dataset.ids) > _MAX_CANDIDATES else ""
    header.append(f"Clips at the {quantiles} quantiles of linear interpolation's l2 in their category{note}.")
    if omitted_count:
        header.append(f"The {len(samples)} largest categories; {omitted_count:,} more are not shown.")
    return render_contact_sheet(samples, dataset.clip.fps, header)


def _shrink(clip: np.ndarray) -> np.ndarray:
    """Averages over squares of pixels if the clip is at least twice the thumbnail's size.

    Maps uint8 [time, height, width, 3] to the same axes.
    """
    time, height, width, _ = clip.shape
    side = max(1, max(height, width) // _THUMBNAIL_PX)
    cropped = clip[:, : height // side * side, : width // side * side]
    squares = cropped.reshape(time, height // side, side, width // side, side, 3)
    return squares.mean((2, 4)).round().astype(np.uint8)


@functools.cache
def fit_label(text: str, max_letters: int) -> str:
    """Converts `text` to one line that the pictures' font can draw, and shortens it in the middle to `max_letters`.

    Characters that the font lacks, such as 日, become escapes, such as \\u65e5, so that different names stay different.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    text = unicodedata.normalize("NFC", text)
    text = "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= max_letters:
        return text
    return f"{text[: max_letters // 2]}…{text[-((max_letters - 1) // 2) :]}"


def _render_histograms(
    dataset: ClipDataset, shown_categories: list[str], histogram_indices: np.ndarray, measures: ClipMeasures
) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    group_by_category = {category: group for group, category in enumerate(shown_categories)}
    others_group = len(shown_categories)
    groups = np.asarray([group_by_category.get(category, others_group) for category in dataset.categories])
    legend = [f"{fit_label(name, _MAX_NAME_LETTERS)} ({dataset.categories.count(name):,})" for name in shown_categories]
    colours: list[str] = list(_COLOURS[: len(shown_categories)])
    other_categories = len(set(dataset.categories)) - len(shown_categories)
    if other_categories:
        legend.append(f"{other_categories:,} others ({int((groups == others_group).sum()):,})")
        colours.append(_OTHERS_COLOUR)

    header = _header_lines(dataset)
    legend_lines = -(-len(legend) // _LEGEND_COLUMNS)
    header_height_in = 2 * _MARGIN_IN + (len(header) + 0.6 + legend_lines) * _LINE_HEIGHT_IN
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN_IN, h_pad=_MARGIN_IN / 2, hspace=0.03, wspace=0)
    size_in = (_WIDTH_IN, header_height_in + _PANELS_HEIGHT_IN)
    figure = Figure(size_in, _DPI, facecolor=_BACKGROUND_HEX, layout=layout)
    grid = figure.add_gridspec(2, 1, height_ratios=[header_height_in, _PANELS_HEIGHT_IN])
    header_figure, panels_figure = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _draw_header(header_figure, header_height_in, header, legend, colours)
    axes = panels_figure.subplots(2, 3).flat

    metadata = {
        name: dataset.metadata[name].to_numpy() for name in ("seconds", "source_fps", "source_width", "source_height")
    }
    picture_size = np.sqrt(metadata["source_width"].astype(float) * metadata["source_height"])
    _draw_known_values(next(axes), "video duration", "seconds", metadata["seconds"], groups, colours)
    _draw_known_values(next(axes), "video frame rate", "frames per second", metadata["source_fps"], groups, colours)
    _draw_known_values(next(axes), "video picture size", "√(width × height) in pixels", picture_size, groups, colours)
    rows = np.searchsorted(measures.indices, histogram_indices)
    is_complete = len(histogram_indices) == len(dataset.ids)
    note = "" if is_complete else f"\na sample of {len(histogram_indices)} of {len(dataset.ids):,} clips"
    motion, linear_l2 = measures.motion[rows], measures.linear_l2[rows]
    measured_groups = groups[histogram_indices]
    _draw_histogram(next(axes), "motion", f"grey levels from frame to frame{note}", motion, measured_groups, colours)
    _draw_histogram(
        next(axes), "error of linear interpolation", f"l2 of the clip{note}", linear_l2, measured_groups, colours
    )
    _draw_rejects(next(axes), Counter(reject["reason"] for reject in dataset.rejects))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def _draw_header(
    figure: FigureBase, height_in: float, header: Sequence[str], legend: Sequence[str], colours: Sequence[str]
) -> None:
    """Draws the header lines and the legend. Matplotlib's own legend drops names that begin with `_`."""

    def write(left_in: float, line: float, text: str, colour: str) -> None:
        x = left_in / _WIDTH_IN
        y = 1 - (_MARGIN_IN + (line + 0.5) * _LINE_HEIGHT_IN) / height_in
        figure.text(x, y, text, color=colour, fontsize=_FONT_SIZE_PT, va="center", parse_math=False)

    for line, text in enumerate(header):
        write(_MARGIN_IN, line, text, _MUTED_HEX if line else _TEXT_HEX)
    column_in = (_WIDTH_IN - 2 * _MARGIN_IN) / _LEGEND_COLUMNS
    for entry, (text, colour) in enumerate(zip(legend, colours, strict=True)):
        line, column = divmod(entry, _LEGEND_COLUMNS)
        write(_MARGIN_IN + column * column_in, len(header) + 0.6 + line, "■", colour)
        write(_MARGIN_IN + column * column_in + 0.16, len(header) + 0.6 + line, text, _TEXT_HEX)


def _draw_known_values(
    axes: Axes, title: str, unit: str, values: np.ndarray, groups: np.ndarray, colours: Sequence[str]
) -> None:
    """Draws a histogram without zeros, which mark values missing from the video file."""
    known = values > 0
    unknown_count = int((~known).sum())
    note = f"\n{unknown_count:,} unknown, left out" if unknown_count else ""
    _draw_histogram(axes, title, f"{unit}{note}", values[known], groups[known], colours)


def _draw_histogram(
    axes: Axes, title: str, unit: str, values: np.ndarray, groups: np.ndarray, colours: Sequence[str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    _style_axes(axes, title)
    if not len(values):
        _draw_placeholder(axes, "unknown")
        axes.set_xlabel(unit, fontsize=_FONT_SIZE_PT, color=_TEXT_HEX)
        return
    histogram = compute_histogram(values, groups, len(colours))
    stacked = len(colours) > _MAX_OVERLAID_GROUPS
    top = _draw_stacked(axes, histogram, colours) if stacked else _draw_overlaid(axes, histogram, colours)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS, integer=True, min_n_ticks=1))
    axes.set_xlim(2 * histogram.edges[0], histogram.edges[-1] - histogram.edges[0])
    axes.set_ylim(0, 1.08 * top)
    note = f"\n{histogram.overflow:,} higher, counted in the last bar" if histogram.overflow else ""
    axes.set_xlabel(f"{unit}{note}", fontsize=_FONT_SIZE_PT, color=_TEXT_HEX)
    axes.set_ylabel("clips, stacked" if stacked else "clips", fontsize=_FONT_SIZE_PT, color=_TEXT_HEX)


def _draw_overlaid(axes: Axes, histogram: Histogram, colours: Sequence[str]) -> int:
    """Draws translucent areas with outlines; returns the largest count."""
    for group in np.argsort(-histogram.counts.max(1), kind="stable"):  # the tallest first, so that it hides no other
        # NaN instead of 0 draws no line along the axis.
        heights = np.where(histogram.counts[group], histogram.counts[group], np.nan)
        axes.stairs(heights, histogram.edges, fill=True, color=colours[group], alpha=0.25)
        axes.stairs(heights, histogram.edges, color=colours[group], linewidth=1.4)
    return int(histogram.counts.max())


def _draw_stacked(axes: Axes, histogram: Histogram, colours: Sequence[str]) -> int:
    """Draws solid areas on top of each other, the first group uppermost as in the legend; returns the largest total."""
    below = np.zeros(_BINS, int)
    for counts, colour in reversed(list(zip(histogram.counts, colours, strict=True))):
        top = below + counts
        axes.stairs(
            np.where(counts, top, np.nan),
            histogram.edges,
            baseline=below,
            fill=True,
            facecolor=colour,
            edgecolor=_BACKGROUND_HEX,
        )
        below = top
    return int(below.max())


def _draw_rejects(axes: Axes, reasons: Counter[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    _style_axes(axes, "rejects by reason")
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    if not reasons:
        _draw_placeholder(axes, "no rejects")
        return
    counts = reasons.most_common()
    if len(counts) > _MAX_CATEGORIES:
        rest = counts[_MAX_CATEGORIES - 1 :]
        counts = [*counts[: _MAX_CATEGORIES - 1], (f"{len(rest)} other reasons", sum(count for _, count in rest))]
    axes.barh(range(len(counts)), [count for _, count in counts], height=0.22, color=_OTHERS_COLOUR)
    for line, (reason, count) in enumerate(counts):
        text = f"{fit_label(reason, _MAX_NAME_LETTERS)}  {count:,}"
        axes.text(0, line - 0.15, text, fontsize=_FONT_SIZE_PT, color=_TEXT_HEX, va="bottom", parse_math=False)
    # Room for at least four bars, because a single one would fill the panel.
    axes.set_ylim(max(len(counts), 4) - 0.5, -0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS, integer=True, min_n_ticks=1))
    axes.set_xlim(0, 1.08 * counts[0][1])
    axes.set_xlabel("videos", fontsize=_FONT_SIZE_PT, color=_TEXT_HEX)


def _style_axes(axes: Axes, title: str) -> None:
    axes.set_facecolor(_BACKGROUND_HEX)
    axes.set_title(title, loc="left", fontsize=_FONT_SIZE_PT + 1, color=_TEXT_HEX)
    axes.tick_params(labelsize=_FONT_SIZE_PT - 0.5, colors=_MUTED_HEX)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED_HEX)


def _draw_placeholder(axes: Axes, text: str) -> None:
    """Draws text instead of a histogram."""
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize=_FONT_SIZE_PT + 1, color=_MUTED_HEX)
