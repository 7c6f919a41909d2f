"""The table of a study's trials."""

from __future__ import annotations

from rich import box
from rich.table import Table

from giffy_ray.config import SearchConfig
from giffy_ray.tuning.search_space import format_value
from giffy_ray.tuning.tuner import Study

NO_PRUNING_NOTE = (
    "No trial is pruned: ASHA (search.asha) compares trials by one number, and there are several objectives."
)


def trials_table(study: Study, search: SearchConfig) -> Table:
    """Builds a table of all trials, best first. With several objectives, it marks the Pareto front."""
    fields = list(search.space)
    metrics = list(search.objectives) or [search.metric]
    best = {trial.number for trial in study.best}
    if len(metrics) > 1:
        mark = "front"
        title = f"trials, by {metrics[0]}; {len(best)} on the Pareto front"
        notes = [f"front: not dominated by any other trial. {NO_PRUNING_NOTE}"]
    else:
        mark = "best"
        title = "trials, best first"
        notes = []
    notes += [f"{trial.name}: {trial.failure}" for trial in study.trials if trial.failure]
    table = Table(
        title=title,
        caption="\n".join(notes) or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("trial", no_wrap=True)
    headings = [name.rpartition(".")[2].replace("_", "\n") for name in fields]
    for heading in (*headings, "epochs", *metrics):
        table.add_column(heading, justify="right")
    for trial in study.trials:
        values = [format_value(trial.values[name]) for name in fields]
        results = ["failed"] if trial.failure else [f"{value:.4g}" for value in trial.objectives]
        table.add_row(mark if trial.number in best else "", trial.name, *values, str(trial.epochs), *results)
    return table
