"""How far things are, told to whoever waits: a bar on a terminal, lines in a job's log."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0


class Bar:
    """Counts `total` things up. Where the output is no terminal, a line now and then stands for the bar."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._told_s = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns) if sys.stdout.isatty() else None

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total)
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self._progress:
            self._progress.advance(self._task, count)
        elif self.done == self.total or time.monotonic() - self._told_s > _LINE_EVERY_S:
            self._told_s = time.monotonic()
            print(f"{self.title}: {self.done}/{self.total} {self.unit}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
