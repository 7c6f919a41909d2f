"""Compares trained runs with baselines: python jobs/evaluate.py EXPERIMENT.yaml | name=RUN [evaluate.runs=[a, b]]

Without evaluate.runs it is the run of the experiment's `storage` and `name`; of each run the checkpoint with the
best validation is used, or the newest where none was validated.
Without an experiment file, the run `name` is evaluated as it was trained; where there is no such run, evaluate.runs are
evaluated as the demo is, and the results go to the folder `name`.
Models make clips of the size and length that they were trained on; `between` makes those of the experiment.
What is given with a slash, such as published/between or s3://bucket/checkpoint, is where a checkpoint lies. Writes
evaluation.csv, one row per method and clip, evaluation.html, in which all clips play side by side, a contact sheet and
an animation into the experiment's folder and into an MLflow run of its own, NAME-evaluation, under that of the run.
"""

from collections.abc import Sequence
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment, from_yaml, override
from giffy_ray.core.storage import join, read_text


def main(experiment: Experiment) -> None:
    # Imported here, with torch and Ray: a mistake in the experiment is told before that.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import show_results
    from giffy_ray.inference.loading import trained_runs
    from giffy_ray.tracking.tracker import check_tracking, open_evaluation

    resources.resources_for(experiment)
    check_tracking(experiment)
    runs = trained_runs(experiment, experiment.clip)
    store = prepare(experiment)
    with open_evaluation(experiment) as tracker:
        show_results(experiment, runs, store, [tracker])


def check(experiment: Experiment) -> None:
    from giffy_ray.evaluation.report import check_evaluation

    check_evaluation(experiment)


def without_file(experiment: Experiment, words: Sequence[str]) -> Experiment:
    """The experiment of the run `name`, with the overrides, or `experiment` where there is no such run.

    Raises ConfigError where nothing says what to evaluate: results would replace those of a run that nobody named.
    """
    if not any(word.startswith("name=") for word in words):
        raise ConfigError(
            "say what to evaluate: an experiment file, name=RUN for a run as it was trained, or evaluate.runs=[a, b] "
            "with name=NAME for the results; see --help"
        )
    text = read_text(join(experiment.storage, experiment.name, "experiment.yaml"))
    if text is None:
        return experiment
    return override(from_yaml(text, words), {"storage": experiment.storage})


if __name__ == "__main__":
    demo = Path(__file__).parent / "experiments" / "demo.yaml"
    cli.run(main, __doc__, demo, check=check, without_file=without_file)
