"""The tables that a job prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from giffy_ray.config import SPLITS
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prune import Removal
from giffy_ray.evaluation.evaluator import ALL, MEASURES, REPORT_NOTE, REPORT_TABLE_2, Summary

WIDTH = 110  # of the tables; a job's log has no terminal to ask
COLUMNS = 4  # categories of the table beside the one for all; the others are on the page and in the CSV
_SHOWN_CATEGORIES = 30
_METHOD_WIDTH = 34  # of the first column of the tables
_SKILL_PRECISION_FLOOR = -1  # a skill below this needs neither digits nor bounds
_BOUNDED = 3  # columns that have room for intervals


def data_table(store: ClipDataset) -> Table:
    """How many clips there are of each category in each split, and how many videos were rejected."""
    splits = [split for split in SPLITS if len(store.split_indices(split))]
    kept = f"{store.bytes / 1e9:.2f} GB" if store.recipe.cache else "decoded anew each time"
    table = Table(title=f"{store.name}: {len(store)} clips, {kept}", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in (*splits, "rejected"):
        table.add_column(heading, justify="right")
    clips = store.category_counts()
    rejects = Counter(reject["category"] for reject in store.rejects)
    names = sorted({category for category, _ in clips} | set(rejects))
    for name in names[:_SHOWN_CATEGORIES]:
        table.add_row(name, *(str(clips[name, split]) for split in splits), str(rejects[name]))
    if len(names) > _SHOWN_CATEGORIES:
        table.add_row(f"and {len(names) - _SHOWN_CATEGORIES} more")
    if len(names) > 1:
        table.add_section()
        table.add_row(ALL, *(str(len(store.split_indices(split))) for split in splits), str(len(store.rejects)))
    return table


def removals_table(removals: Sequence[Removal], storage: str, dry_run: bool) -> Table:
    """What `jobs/prepare.py --prune` removes, or would remove: files, bytes, and why nothing needs them."""
    if not removals:
        return Table(title=f"nothing to remove from {storage}", title_justify="left")
    title = f"would be removed from {storage}" if dry_run else f"removing from {storage}"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("files", justify="right")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("why")
    for one in removals:
        table.add_row(one.what, f"{one.files:,}", f"{one.bytes:,}", one.why)
    table.add_section()
    files, total_bytes = sum(one.files for one in removals), sum(one.bytes for one in removals)
    table.add_row("all", f"{files:,}", f"{total_bytes:,}")
    return table


def distance_table(summaries: Sequence[Summary], store: ClipDataset, split: str, there_are: int | None = None) -> Table:
    """As the report's Table 2, and beside its figures: methods down, categories across, l2 inside.

    `there_are`: clips of the split, where the evaluation is of some of them.
    """
    clips = count_of(summaries[-1].clips, there_are)
    table = Table(
        title=f"{store.name}: l2 of {clips} {split} clips, mean ± standard deviation; smaller is better\n"
        + _interval_of_means(summaries, "l2_paper"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown, left_out = _columns(table, summaries, store)
    of = {(summary.category, summary.method): summary.spreads["l2_paper"] for summary in summaries}
    for method in dict.fromkeys(summary.method for summary in summaries):
        table.add_row(method, *("{:.0f} ± {:.0f}".format(*of[category, method]) for category in shown))
    captions = []
    if left_out:
        captions.append(f"The largest categories; {left_out} more are in evaluation.html.")
    if any(category in printed for printed in REPORT_TABLE_2.values() for category in shown):
        table.add_section()
        for method, printed in REPORT_TABLE_2.items():
            cells = ("{} ± {}".format(*printed[name]) if name in printed else "" for name in shown)
            table.add_row(f"the report's {method}", *cells, style="dim")
        captions.append(REPORT_NOTE)
    table.caption = "\n".join(captions)
    return table


def count_of(clips: int, there_are: int | None) -> str:
    """'500 of 33,900', or '500' where these are all that there are."""
    return f"{clips:,}" if there_are in (None, clips) else f"{clips:,} of {there_are:,}"


def _interval_of_means(summaries: Sequence[Summary], metric: str) -> str:
    """How wide the widest interval of the methods' means over all clips is, as part of a title."""
    category = summaries[-1].category
    bounds = [summary.intervals[metric] for summary in summaries if summary.category == category]
    half = max(((high - low) / 2 for low, high in bounds if math.isfinite(high - low)), default=None)
    if half is None:
        return "95 % interval of the means: none, as all clips are of one source"
    digits = MEASURES[metric].digits + 1
    return f"95 % interval of the means over all, by source video: ±{half:.{digits}f} at most"


def skill_table(summaries: Sequence[Summary], store: ClipDataset) -> Table:
    """How much nearer than linear interpolation each method comes, in the columns of `distance_table`."""
    table = Table(
        title=f"skill and clips won against linear interpolation, of {summaries[-1].clips:,} clips",
        caption="skill: 1 - squared error over linear interpolation's, and its 95 % interval by source video.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown, _ = _columns(table, summaries, store)
    of = {(summary.category, summary.method): summary for summary in summaries if summary.skill}
    for method in dict.fromkeys(method for _, method in of):
        table.add_row(method, *(_skill_of(of[category, method], len(shown) <= _BOUNDED) for category in shown))
    return table


def measures_table(summaries: Sequence[Summary], there_are: int | None = None) -> Table:
    """The means of the other metrics, over all clips. `there_are`: as for `distance_table`."""
    every = [summary for summary in summaries if summary.category == summaries[-1].category]
    others = {name: shown for name, shown in MEASURES.items() if name != "l2_paper"}
    table = Table(
        title=f"{count_of(every[0].clips, there_are)} clips; means\nPSNR: {_interval_of_means(summaries, 'psnr')}",
        caption="Motion ratio, sharpness: best at 1. best of K: the nearest of K samples; diversity: between them.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", max_width=_METHOD_WIDTH, overflow="fold")
    for shown in others.values():
        table.add_column(shown.label.replace(" ", "\n"), justify="right", no_wrap=True)
    for summary in every:
        means = (f"{summary.spreads[n][0]:.{m.digits}f}" if n in summary.spreads else "" for n, m in others.items())
        table.add_row(summary.method, *means)
    return table


def perceptual_table(looks: Mapping[str, Mapping[str, float]], clips: int, there_are: int | None = None) -> Table:
    """Metrics through trained networks: methods down, metrics across."""
    table = Table(
        title=f"{count_of(clips, there_are)} clips, through trained networks; smaller is better",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method", min_width=_METHOD_WIDTH, max_width=_METHOD_WIDTH, overflow="fold")
    for metric in next(iter(looks.values())):
        table.add_column(metric.replace("kernel_distance_", "kernel distance\n"), justify="right")
    for method, values in looks.items():
        table.add_row(method, *(f"{value:z.4f}" for value in values.values()))
    return table


def _columns(table: Table, summaries: Sequence[Summary], store: ClipDataset) -> tuple[list[str], int]:
    """Adds a column for the methods, and one for each of the largest categories and for all.

    Returns those categories, and how many are left out.
    """
    clips = {summary.category: summary.clips for summary in summaries}
    by_size = sorted((name for name in clips if name != ALL), key=lambda name: -clips[name])
    shown = [*sorted(by_size[:COLUMNS]), *([ALL] if ALL in clips else [])]
    table.add_column("method", max_width=_METHOD_WIDTH, overflow="fold")
    for category in shown:
        heading = f"{category_name(store, category)}\n{clips[category]} {'clip' if clips[category] == 1 else 'clips'}"
        table.add_column(heading, justify="right", min_width=11, max_width=25, overflow="fold")
    return shown, len(by_size) - len(by_size[:COLUMNS])


def _skill_of(summary: Summary, bounded: bool) -> str:
    assert summary.skill
    skill, low, high = summary.skill
    if skill < _SKILL_PRECISION_FLOOR:
        return f"{skill:.1f} {summary.won:4.0%}"
    bounds = f" ({low:z.2f}, {high:z.2f})" if bounded and not math.isnan(low) else ""
    return f"{skill:z.2f}{bounds} {summary.won:4.0%}"


def category_name(store: ClipDataset, category: str) -> str:
    return category if category == ALL else f"{store.name}-{category}"
