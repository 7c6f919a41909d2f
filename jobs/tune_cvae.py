"""Searches for a better CVAE, then trains it: python jobs/tune_cvae.py [EXPERIMENT.yaml] [section.field=value ...]

The space is the experiment's `search` section. A search that was cut goes on when it is started again (--resume auto;
never: a new one; must: or nothing). Its trials, and the training of the best, are shown under it in MLflow.
"""

from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import Experiment, differences
from giffy_ray.core.storage import join, write_text


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import check_evaluation, log_data_set
    from giffy_ray.tracking.tracker import check_tracking, open_run
    from giffy_ray.tuning import tuner
    from giffy_ray.tuning.report import show_search
    from giffy_ray.workflows import train_and_show

    study = tuner.resolve_study(experiment)
    check_tracking(study)
    share, share_of_trials = resources.resources_for(study), resources.trial_resources_for(study)
    points = tuner.initial_points(study)  # a mistake in the space is told before anything is rendered or decoded
    store = prepare(study)
    check_evaluation(experiment, store)

    with tuner.claim(study, store) as lease, open_run(study) as parent:
        log_data_set(store, [parent])
        side_by_side = share_of_trials.trainings
        print(f"searching {study.name}: {tuner.most_trials(study)} trials, {side_by_side} at a time", flush=True)
        found = tuner.search_claimed(study, store, share_of_trials, parent.place, points, lease)
        parent.close_children()
        show_search(study, found, store, parent)

        best = tuner.refit_experiment(experiment, study, found)
        where = join(study.storage, study.name, "best.yaml")
        write_text(where, differences(best))
        parent.log_text(differences(best), "best.yaml")
        print(f"the best trial is {found.best[0].name}: {where}")
        train_and_show(best, store, share, parent)


def check(experiment: Experiment) -> None:
    from giffy_ray.evaluation.report import check_evaluation
    from giffy_ray.tuning import tuner

    tuner.check_search(experiment)
    tuner.check_trainings(experiment)
    check_evaluation(experiment)


if __name__ == "__main__":
    cli.run(main, __doc__, Path(__file__).parent / "experiments" / "demo.yaml", check=check)
