"""The table of a search's trials."""

from __future__ import annotations

from rich import box
from rich.table import Table

from giffy_ray.config import SearchConfig
from giffy_ray.tuning.tuner import Study

WHY_NONE_IS_CUT = (
    "Of several objectives none is ended early: successive halving (search.asha) needs one number to compare."
)


def trials_table(study: Study, search: SearchConfig) -> Table:
    """The trials of a search, best first; of several objectives the Pareto front is marked: none beats these in all."""
    names = [*search.space]
    measured = [*search.objectives] or [search.metric]
    best, mark, title = {trial.number for trial in study.best}, "best", "trials, best first"
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    if len(measured) > 1:
        mark, title = "front", f"trials, by {measured[0]}; {len(best)} on the Pareto front"
        table.caption = f"front: no trial beats these in all objectives. {WHY_NONE_IS_CUT}"
    table.title = title
    table.add_column("", no_wrap=True)
    table.add_column("trial", no_wrap=True)
    for heading in (*(name.rpartition(".")[2].replace("_", "\n") for name in names), "epochs", *measured):
        table.add_column(heading, justify="right")
    for trial in study.trials:
        tried = [trial.values[name] for name in names]
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in tried]
        reached = ["failed"] if trial.ended else [f"{value:.4g}" for value in trial.objectives]
        table.add_row(mark if trial.number in best else "", trial.name, *values, str(trial.epochs), *reached)
    failures = [f"{trial.name}: {trial.ended}" for trial in study.trials if trial.ended]
    table.caption = "\n".join([*([str(table.caption)] if table.caption else []), *failures]) or None
    return table
