"""Searches for a better CVAE, then trains it: python jobs/tune_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

The space is the experiment's `search` section. Every search is a new one, named after the experiment and the time;
its trials, and the training of the best, are shown under it in MLflow.
"""

from datetime import datetime
from pathlib import Path

from rich.console import Console

from giffy_ray import cluster, command, tune
from giffy_ray.config import Experiment, differences, override
from giffy_ray.data.prepare import prepare
from giffy_ray.results import log_data_set, train_and_show
from giffy_ray.storage import join, write_text
from giffy_ray.tables import trials_table
from giffy_ray.tracking import open_run


def main(experiment: Experiment) -> None:
    study_name = f"{experiment.name}-{datetime.now():%Y%m%d-%H%M%S}"
    searched = override(experiment, {"name": study_name})
    share = cluster.share_of(searched)
    tune.space_of(searched)  # a mistake in the space is told before anything is rendered or decoded
    store = prepare(searched)

    parent = open_run(searched)
    log_data_set(store, [parent])
    print(f"searching {study_name}: {searched.search.trials} trials, {share.trainings} at a time", flush=True)
    study = tune.search(searched, store, share, parent.place)
    parent.close_children()
    Console(width=100).print(trials_table(study, searched.search.metric))

    best = override(experiment, study.best.values | {"name": f"{study_name}-best"})
    where = join(searched.storage, study_name, "best.yaml")
    write_text(where, differences(best))
    parent.log_text(differences(best), "best.yaml")
    print(f"the best trial is {study.best.name}: {where}")
    train_and_show(best, store, share, parent)


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml")
