"""Compares trained runs with the baselines: python jobs/evaluate.py EXPERIMENT.yaml | name=RUN [evaluate.runs=[a, b]]

By default, evaluates the run that `storage` and `name` of the experiment identify. evaluate.runs lists other runs. An
entry with a slash is the location of a checkpoint, such as published/between or s3://bucket/checkpoint, or a registered
model, such as models:/giffy_ray@champion. Each run is represented by its checkpoint with the best validation, or by its
latest if none was validated.

Without an experiment file, name=RUN evaluates that run with its own experiment. If there is no such run, the job
evaluates evaluate.runs on the demo's clips and `name` is the folder of the results.

`between` generates clips of the experiment's size and length; all other models need those that they were trained with.

Writes evaluation.csv (one row per method and clip), evaluation.html (all clips side by side), a contact sheet and an
animation to the experiment's folder. The MLflow run NAME-evaluation, a child of the evaluated run, holds them too.
"""

from collections.abc import Sequence
from pathlib import Path

from giffy_ray import cli
from giffy_ray.config import ConfigError, Experiment, from_yaml, override
from giffy_ray.core.storage import join, read_text


def main(experiment: Experiment) -> None:
    # Deferred imports: torch and Ray load only after the experiment is validated.
    from giffy_ray.cluster import resources
    from giffy_ray.data.prepare import prepare
    from giffy_ray.evaluation.report import report_evaluation
    from giffy_ray.inference.loading import load_trained_models
    from giffy_ray.tracking.tracker import check_tracking, open_evaluation

    resources.resources_for(experiment)
    check_tracking(experiment)
    runs = load_trained_models(experiment, experiment.clip)
    dataset = prepare(experiment)
    with open_evaluation(experiment) as tracker:
        report_evaluation(experiment, runs, dataset, [tracker])


def check(experiment: Experiment) -> None:
    from giffy_ray.evaluation.report import check_evaluation

    check_evaluation(experiment)


def without_file(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Returns the experiment of the run `name` with the overrides applied, or `experiment` if there is no such run.

    Raises:
        ConfigError: The overrides set no name, so the results would replace those of the default run.
    """
    if not any(assignment.startswith("name=") for assignment in overrides):
        raise ConfigError(
            "nothing to evaluate: give an experiment file, name=RUN to evaluate a run with its own experiment, or "
            "evaluate.runs=[a, b] with name=NAME for the results; see --help"
        )
    text = read_text(join(experiment.run_dir, "experiment.yaml"))
    if text is None:
        return experiment
    return override(from_yaml(text, overrides), {"storage": experiment.storage})


if __name__ == "__main__":
    demo = Path(__file__).parent / "experiments" / "demo.yaml"
    cli.run(main, __doc__, demo, check=check, without_file=without_file)
