"""The command line of all jobs: NAME [EXPERIMENT] [section.field=value ...] [options].

`giffy train` and jobs/train.py run the same `Job`. Validation comes before heavy imports, so that a mistake in the
experiment is reported within a second, without Ray.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from giffy_ray import workflows
from giffy_ray.cli.errors import report_errors, require_extra
from giffy_ray.config import ConfigError, Experiment, check_required_fields, load, override
from giffy_ray.core.messages import redact_output
from giffy_ray.core.packaged import packaged_experiments, packaged_path
from giffy_ray.core.storage import check_readable, check_writable, resolve_path

_OVERRIDE = re.compile(r"[\w.-]*=")
_DEMO, _BETWEEN = (packaged_path("experiments", name) for name in ("demo", "between"))


@dataclass(frozen=True)
class Job:
    """A job, and the command line that it accepts.

    Attributes:
        function: Called with the experiment, and with a keyword argument for each flag.
        usage: The text of --help. COMMAND stands for what the user types.
        experiment: The experiment file if the command line gives none.
        flags: Options of this job and their help texts, by name.
        needs_data: Whether the job reads videos or clips, so that `data.root` must be readable.
        check: Validates the experiment before Ray starts. Raises ConfigError.
        without_file: Called if the command line names no experiment, with the default one and the overrides. Returns
            the experiment to use.
    """

    function: Callable[..., None]
    usage: str
    experiment: Path = _DEMO
    flags: Mapping[str, str] = field(default_factory=dict)
    needs_data: bool = True
    check: Callable[[Experiment], object] = lambda experiment: None
    without_file: Callable[[Experiment, Sequence[str]], Experiment] | None = None


TRAIN = Job(
    workflows.train_and_evaluate,
    """Trains a model: COMMAND [EXPERIMENT] [section.field=value ...]

Evaluates the checkpoint with the best validation score against the baselines, and registers it in MLflow. Started again
with the same name=..., an interrupted run resumes from its last checkpoint.""",
    check=workflows.check_training,
)
TUNE = Job(
    workflows.tune,
    """Tunes hyperparameters: COMMAND [EXPERIMENT] [section.field=value ...]

Searches the `search` section's space, trains the best configuration to completion and evaluates it. MLflow shows the
trials and the final training below the search. Started again, an interrupted search resumes; --resume=never starts a
new search, and --resume=must fails if there is none to resume.""",
    flags=workflows.TUNE_FLAGS,
    check=workflows.check_tuning,
)
EVALUATE = Job(
    workflows.evaluate,
    """Compares trained runs with the baselines: COMMAND EXPERIMENT | name=RUN [evaluate.runs=[a, b]]

By default, evaluates the run that `storage` and `name` of the experiment identify. evaluate.runs lists other runs, or
pretrained models such as between. An entry with a slash is the location of a checkpoint, such as s3://bucket/checkpoint,
or a registered model, such as models:/giffy_ray@champion. Each run is represented by its checkpoint with the best
validation, or by its latest if none was validated.

Without an experiment, name=RUN evaluates that run with its own experiment. If there is no such run, the job evaluates
evaluate.runs on the demo's clips and `name` is the folder of the results.

`between` generates clips of the experiment's size and length; all other models need those that they were trained with.

Writes evaluation.csv (one row per method and clip), evaluation.html (all clips side by side), a contact sheet and an
animation to the experiment's folder. The MLflow run NAME-evaluation, a child of the evaluated run, holds them too.""",
    check=workflows.check_evaluation,
    without_file=workflows.experiment_of_run,
)
PREPARE = Job(
    workflows.prepare_dataset,
    """Prepares a dataset: COMMAND [EXPERIMENT] [data.root=... ...] [--prune [--dry-run]]

Decodes the videos, and prints and draws what the dataset contains. Every job decodes a dataset on first use; run this
one before you pay for GPUs. It also verifies the checksums of cached clips, and retries videos that were rejected for a
possibly transient reason.

With --prune it decodes nothing, and removes from `storage` what this experiment's videos do not need: clips of other
decode settings, datasets and shards of other videos, built-in videos of other settings, and leftovers of killed jobs.
It keeps everything that a running training uses. --prune --dry-run only lists what would be removed.""",
    flags=workflows.PREPARE_FLAGS,
)
MAKE_DATASET = Job(
    workflows.render_dataset,
    """Renders the built-in dataset: COMMAND [EXPERIMENT] [data.synthetic.training_clips=400 ...]

Writes H.264 videos in the layout of Moments in Time below the experiment's storage. Every job does so on first use; run
this one to look at the videos or to use them elsewhere.""",
)
PUBLISH = Job(
    workflows.publish,
    """Exports a run's trained model: COMMAND [EXPERIMENT] [name=... storage=...]

Exports the checkpoint with the best validation, or the newest if none was validated. The export holds the weights and
the config fields that determine the generated clips (clip, model, train.seed). It is written to published/NAME in a
local `storage`. evaluate.runs, train.init_from and `giffy interpolate --model` accept this folder.""",
    experiment=_BETWEEN,
    needs_data=False,
)
REGISTER = Job(
    workflows.register,
    """Registers a run's best model in MLflow: COMMAND [EXPERIMENT] [name=... storage=...]

Every training registers its model when it ends. Run this job if the registry was unavailable then, or to register the
model under another name (tracking.model=...). It registers the checkpoint with the best validation, which becomes
models:/giffy_ray@champion if it scores better than the current champion on the same clips.""",
    experiment=_BETWEEN,
    needs_data=False,
)
REPLAY_TRACKING = Job(
    workflows.replay_tracking,
    """Sends undelivered events to MLflow: COMMAND [EXPERIMENT] [name=RUN]

Sends the events of a run, and of the trials below it, that MLflow has not received or has refused; fix the cause of
refusals first. Exits with 1 if MLflow still does not have all of them. Fails while a job writes to the run.""",
    needs_data=False,
)


class Arguments(NamedTuple):
    """The parsed command line of a job."""

    experiment: str | None  # its name, or the path of its file
    overrides: list[str]  # section.field=value
    debug: bool
    flags: dict[str, bool]  # the job's own options


def run_job(
    job: Job, *, experiment: Path | None = None, program: str | None = None, argv: Sequence[str] | None = None
) -> None:
    """Runs a job from the command line: loads the experiment, validates it, connects to Ray and calls the job.

    The exit code is 0 if the job returns, 2 for a mistake in the experiment and 1 for any other error. An error prints
    one message; --debug adds the traceback.

    Args:
        job: The job.
        experiment: Replaces the job's default experiment.
        program: What the user types, such as `giffy train`. None is the script that runs.
        argv: The arguments. None is those of the script.
    """
    redact_output()
    default = experiment or job.experiment
    usage = job.usage.replace("COMMAND", program or f"python {sys.argv[0]}")
    usage = f"{usage}\n\nThe default of EXPERIMENT is {default.stem}."
    arguments = parse(usage, sys.argv[1:] if argv is None else argv, job.flags, program)
    program = program or Path(sys.argv[0]).name
    with report_errors(program, arguments.debug):
        require_extra("train")
        path = default if arguments.experiment is None else find_experiment(arguments.experiment)
        loaded = load(path, arguments.overrides)
        loaded = override(loaded, {"storage": resolve_path(loaded.storage)})
        _check_storage(loaded)
        if job.without_file and arguments.experiment is None:
            loaded = job.without_file(loaded, arguments.overrides)
        if job.needs_data:
            _check_data(loaded)
        job.check(loaded)
        from giffy_ray.cluster import resources

        resources.connect()
        job.function(loaded, **arguments.flags)


def find_experiment(name: str) -> Path:
    """Returns the file of an experiment, given its path or the name of one that comes with the package.

    Raises:
        ConfigError: There is neither; the message suggests the closest name.
    """
    path = Path(name)
    names = packaged_experiments()
    if path.is_file():
        return path
    if name in names:
        return packaged_path("experiments", name)
    if path.exists():
        return path  # a folder or a device: `load` reports what is wrong with it
    closest = difflib.get_close_matches(path.stem if path.suffix else name, names, n=1)
    hint = f"did you mean {closest[0]!r}?" if closest else f"giffy_ray comes with {', '.join(names)}"
    raise ConfigError(f"{name}: no such experiment file; {hint}")


def parse(
    usage: str | None, argv: Sequence[str], flags: Mapping[str, str] | None = None, program: str | None = None
) -> Arguments:
    """Parses a command line. Exits with code 0 after --help, and with code 2 for an invalid option."""
    parser = argparse.ArgumentParser(
        program, description=usage, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="EXPERIMENT or section.field=value",
        help=f"a YAML file, or one of: {', '.join(packaged_experiments())}; and overrides of its fields",
    )
    parser.add_argument("--profile", action="store_true", help="record a torch.profiler trace (speed.profile=true)")
    parser.add_argument("--resume", choices=("auto", "never", "must"), help="an interrupted search (search.resume)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    options = parser.parse_intermixed_args(argv)
    if "" in options.arguments:  # "$EXPERIMENT" with an unset variable
        parser.error("unexpected '': expected an experiment or section.field=value")
    experiments = [argument for argument in options.arguments if _is_experiment(argument)]
    if len(experiments) > 1:
        parser.error(
            f"unexpected {experiments[1]!r}: the experiment is {experiments[0]!r}; expected section.field=value"
        )
    overrides = [argument for argument in options.arguments if not _is_experiment(argument)]
    if options.profile:
        overrides.append("speed.profile=true")
    if options.resume:
        overrides.append(f"search.resume={options.resume}")
    flag_values = {name: getattr(options, name) for name in flags or ()}
    return Arguments(experiments[0] if experiments else None, overrides, options.debug, flag_values)


def _is_experiment(argument: str) -> bool:
    return not _OVERRIDE.match(argument) or (argument.endswith((".yaml", ".yml")) and Path(argument).is_file())


def _check_storage(experiment: Experiment) -> None:
    try:
        check_writable(experiment.storage)
    except (OSError, ValueError) as error:
        raise ConfigError(f"storage: cannot be written: {_reason(error)} (value {experiment.storage!r})") from error


def _check_data(experiment: Experiment) -> None:
    check_required_fields(experiment)
    root = experiment.data.root
    if root is None:
        return
    try:
        check_readable(root)
    except FileNotFoundError as error:
        message = f"data.root: no such folder or list (.csv, .parquet) of videos (value {root!r})"
        raise ConfigError(message) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.root: cannot be read: {_reason(error)} (value {root!r})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
