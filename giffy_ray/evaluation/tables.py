"""Tables of datasets, evaluations and storage cleanups, printed by the jobs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from giffy_ray.config import SPLITS
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prune import Removal
from giffy_ray.evaluation.evaluator import ALL, MEASURES, PAPER_NOTE, PAPER_TABLE_2, Summary

TABLE_WIDTH = 110  # characters; a job's log has no terminal width to query
MAX_CATEGORY_COLUMNS = 4  # besides the total; the HTML page and the CSV hold all categories
_MAX_CATEGORY_ROWS = 30
_METHOD_COLUMN_WIDTH = 34
_SKILL_PRECISION_FLOOR = -1  # below this skill, neither digits nor bounds are informative
_MAX_COLUMNS_WITH_BOUNDS = 3  # more columns leave no room for the bounds of intervals


def dataset_table(dataset: ClipDataset) -> Table:
    """Clips per category and split, and rejected videos per category."""
    splits = [split for split in SPLITS if len(dataset.split_indices(split))]
    size = f"{dataset.size_bytes / 1e9:.2f} GB" if dataset.decode_config.cache else "decoded on every access"
    table = Table(title=f"{dataset.name}: {len(dataset)} clips, {size}", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in (*splits, "rejected"):
        table.add_column(heading, justify="right")
    clips = dataset.count_by_category()
    rejects = Counter(reject["category"] for reject in dataset.rejects)
    names = sorted({category for category, _ in clips} | set(rejects))
    for name in names[:_MAX_CATEGORY_ROWS]:
        table.add_row(name, *(str(clips[name, split]) for split in splits), str(rejects[name]))
    if len(names) > _MAX_CATEGORY_ROWS:
        table.add_row(f"and {len(names) - _MAX_CATEGORY_ROWS} more")
    if len(names) > 1:
        table.add_section()
        totals = (str(len(dataset.split_indices(split))) for split in splits)
        table.add_row(ALL, *totals, str(len(dataset.rejects)))
    return table


def removals_table(removals: Sequence[Removal], storage: str, dry_run: bool) -> Table:
    """Files that `jobs/prepare.py --prune` removes, or would remove in a dry run, with sizes and reasons."""
    if not removals:
        return Table(title=f"nothing to remove from {storage}", title_justify="left")
    title = f"would be removed from {storage}" if dry_run else f"removing from {storage}"
    table = Table(title=title, title_justify="left")
    table.add_column("item")
    table.add_column("files", justify="right")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("reason")
    for removal in removals:
        table.add_row(removal.description, f"{removal.files:,}", f"{removal.bytes:,}", removal.reason)
    table.add_section()
    total_files = sum(removal.files for removal in removals)
    total_bytes = sum(removal.bytes for removal in removals)
    table.add_row("all", f"{total_files:,}", f"{total_bytes:,}")
    return table


def distance_table(
    summaries: Sequence[Summary], dataset: ClipDataset, split: str, split_size: int | None = None
) -> Table:
    """l2 by method (rows) and category (columns), in the layout of the paper's Table 2 and next to its figures.

    Args:
        summaries: Results of `summarise`.
        dataset: The target clips.
        split: Name of the evaluated split.
        split_size: Clips of the split, if only some of them are evaluated.
    """
    clips = format_count(summaries[-1].clips, split_size)
    table = Table(
        title=f"{dataset.name}: l2 of {clips} {split} clips, mean ± standard deviation; smaller is better\n"
        + _describe_widest_interval(summaries, "l2_paper"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    categories, omitted_count = _add_category_columns(table, summaries, dataset)
    spreads = {(summary.category, summary.method): summary.spreads["l2_paper"] for summary in summaries}
    for method in dict.fromkeys(summary.method for summary in summaries):
        table.add_row(method, *("{:.0f} ± {:.0f}".format(*spreads[category, method]) for category in categories))
    captions = []
    if omitted_count:
        captions.append(f"The largest categories; evaluation.html shows {omitted_count} more.")
    if any(category in figures for figures in PAPER_TABLE_2.values() for category in categories):
        table.add_section()
        for method, figures in PAPER_TABLE_2.items():
            cells = ("{} ± {}".format(*figures[name]) if name in figures else "" for name in categories)
            table.add_row(f"the paper's {method}", *cells, style="dim")
        captions.append(PAPER_NOTE)
    table.caption = "\n".join(captions)
    return table


def format_count(clips: int, total: int | None) -> str:
    """Formats as '500 of 33,900', or '500' if `total` is unknown or the same."""
    return f"{clips:,}" if total in (None, clips) else f"{clips:,} of {total:,}"


def _describe_widest_interval(summaries: Sequence[Summary], metric: str) -> str:
    """Half-width of the widest interval of the methods' means over all clips, as part of a title."""
    category = summaries[-1].category
    bounds = [summary.intervals[metric] for summary in summaries if summary.category == category]
    half_width = max(((high - low) / 2 for low, high in bounds if math.isfinite(high - low)), default=None)
    if half_width is None:
        return "95 % interval of the means: none, because all clips have the same source"
    digits = MEASURES[metric].digits + 1
    return f"95 % interval of the means over all, by source video: ±{half_width:.{digits}f} at most"


def skill_table(summaries: Sequence[Summary], dataset: ClipDataset) -> Table:
    """Skill and win rate against linear interpolation, in the columns of `distance_table`."""
    table = Table(
        title=f"skill and win rate against linear interpolation, {summaries[-1].clips:,} clips",
        caption="skill: 1 - squared error over linear interpolation's, and its 95 % interval by source video.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    categories, _ = _add_category_columns(table, summaries, dataset)
    with_bounds = len(categories) <= _MAX_COLUMNS_WITH_BOUNDS
    by_cell = {(summary.category, summary.method): summary for summary in summaries if summary.skill}
    for method in dict.fromkeys(method for _, method in by_cell):
        table.add_row(method, *(_format_skill(by_cell[category, method], with_bounds) for category in categories))
    return table


def measures_table(summaries: Sequence[Summary], split_size: int | None = None) -> Table:
    """Means over all clips of the metrics other than l2. For `split_size` see `distance_table`."""
    totals = [summary for summary in summaries if summary.category == summaries[-1].category]
    measures = {metric: measure for metric, measure in MEASURES.items() if metric != "l2_paper"}
    clips = format_count(totals[0].clips, split_size)
    table = Table(
        title=f"{clips} clips; means\nPSNR: {_describe_widest_interval(summaries, 'psnr')}",
        caption="Motion ratio, sharpness: best at 1. best of K: closest of K samples; diversity: between samples.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", max_width=_METHOD_COLUMN_WIDTH, overflow="fold")
    for measure in measures.values():
        table.add_column(measure.label.replace(" ", "\n"), justify="right", no_wrap=True)
    for summary in totals:
        means = [
            f"{summary.spreads[metric][0]:.{measure.digits}f}" if metric in summary.spreads else ""
            for metric, measure in measures.items()
        ]
        table.add_row(summary.method, *means)
    return table


def perceptual_table(results: Mapping[str, Mapping[str, float]], clips: int, split_size: int | None = None) -> Table:
    """Perceptual metrics: methods as rows, metrics as columns. For `split_size` see `distance_table`."""
    table = Table(
        title=f"{format_count(clips, split_size)} clips, metrics of pretrained networks; smaller is better",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method", min_width=_METHOD_COLUMN_WIDTH, max_width=_METHOD_COLUMN_WIDTH, overflow="fold")
    for metric in next(iter(results.values())):
        table.add_column(metric.replace("kernel_distance_", "kernel distance\n"), justify="right")
    for method, values in results.items():
        table.add_row(method, *(f"{value:z.4f}" for value in values.values()))
    return table


def _add_category_columns(table: Table, summaries: Sequence[Summary], dataset: ClipDataset) -> tuple[list[str], int]:
    """Adds a column for the methods, one for each of the largest categories, and one for the total.

    Returns:
        The categories of the columns, and the number of omitted categories.
    """
    clips = {summary.category: summary.clips for summary in summaries}
    by_size = sorted((name for name in clips if name != ALL), key=lambda name: -clips[name])
    largest = by_size[:MAX_CATEGORY_COLUMNS]
    categories = [*sorted(largest), *([ALL] if ALL in clips else [])]
    table.add_column("method", max_width=_METHOD_COLUMN_WIDTH, overflow="fold")
    for category in categories:
        noun = "clip" if clips[category] == 1 else "clips"
        heading = f"{category_name(dataset, category)}\n{clips[category]} {noun}"
        table.add_column(heading, justify="right", min_width=11, max_width=25, overflow="fold")
    return categories, len(by_size) - len(largest)


def _format_skill(summary: Summary, with_bounds: bool) -> str:
    assert summary.skill
    skill, low, high = summary.skill
    if skill < _SKILL_PRECISION_FLOOR:
        return f"{skill:.1f} {summary.win_rate:4.0%}"
    bounds = f" ({low:z.2f}, {high:z.2f})" if with_bounds and not math.isnan(low) else ""
    return f"{skill:z.2f}{bounds} {summary.win_rate:4.0%}"


def category_name(dataset: ClipDataset, category: str) -> str:
    """Returns 'dataset-category', or 'all' for the total."""
    return category if category == ALL else f"{dataset.name}-{category}"
