"""Searches for a better CVAE, then trains it: python jobs/tune_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

The space is the experiment's `search` section. A search that was cut goes on when it is started again (--resume auto;
never: a new one; must: or nothing). Its trials, and the training of the best, are shown under it in MLflow.
"""

from pathlib import Path

from giffy_ray import command
from giffy_ray.config import Experiment, differences
from giffy_ray.storage import join, write_text


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray import cluster, tune
    from giffy_ray.data.prepare import prepare
    from giffy_ray.results import check_evaluation, log_data_set, show_search, train_and_show
    from giffy_ray.tracking import check_tracking, open_run

    study = tune.named(experiment)
    check_tracking(study)
    share, share_of_trials = cluster.share_of(study), cluster.share_of_trials(study)
    points = tune.first_points(study)  # a mistake in the space is told before anything is rendered or decoded
    store = prepare(study)
    check_evaluation(experiment, store)

    with tune.claim(study, store) as lease, open_run(study) as parent:
        log_data_set(store, [parent])
        side_by_side = share_of_trials.trainings
        print(f"searching {study.name}: {tune.most_trials(study)} trials, {side_by_side} at a time", flush=True)
        found = tune.search_claimed(study, store, share_of_trials, parent.place, points, lease)
        parent.close_children()
        show_search(study, found, store, parent)

        best = tune.trained_out(experiment, study, found)
        where = join(study.storage, study.name, "best.yaml")
        write_text(where, differences(best))
        parent.log_text(differences(best), "best.yaml")
        print(f"the best trial is {found.best[0].name}: {where}")
        train_and_show(best, store, share, parent)


def check(experiment: Experiment) -> None:
    from giffy_ray import tune
    from giffy_ray.results import check_evaluation

    tune.check_search(experiment)
    tune.check_trainings(experiment)
    check_evaluation(experiment)


if __name__ == "__main__":
    command.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", check=check)
