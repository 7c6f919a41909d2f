"""Progress display: a bar on a terminal, periodic lines in a log."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 5.0


def progress_columns() -> tuple[ProgressColumn, ...]:
    """Returns the columns of every progress bar: title, bar, count and remaining time."""
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


class ProgressBar:
    """Counts up to `total`. Prints a line every few seconds if stdout is not a terminal.

    Args:
        title: Name of the work.
        total: Number of items.
        unit: Plural name of an item, shown in the lines.
    """

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self.completed = 0
        self._last_line_s = time.monotonic()
        self._progress = Progress(*progress_columns()) if sys.stdout.isatty() else None

    def __enter__(self) -> ProgressBar:
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total)
        return self

    def advance(self, count: int) -> None:
        self.completed += count
        if self._progress:
            self._progress.advance(self._task, count)
        elif self.completed == self.total or time.monotonic() - self._last_line_s > _LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            print(f"{self.title}: {self.completed}/{self.total} {self.unit}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
