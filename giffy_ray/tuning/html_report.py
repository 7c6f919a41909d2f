"""Renders a study as one self-contained HTML file: plots of all trials, and clips of the best ones.

The file holds trials and clips as JSON; the script of `html_report.html` draws them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giffy_ray.config import ClipConfig, Distribution, Experiment
from giffy_ray.core.media import sprite_columns
from giffy_ray.evaluation.html_report import render_template
from giffy_ray.tuning.objectives import resolve_objectives
from giffy_ray.tuning.tables import NO_PRUNING_NOTE
from giffy_ray.tuning.tuner import Study, Trial

_TEMPLATE = Path(__file__).with_suffix(".html")
_TOO_FEW_TRIALS_NOTE = "Too few trials to estimate importances."
_POPULATION_NOTE = "Importances are undefined: values changed while the trials trained."


@dataclass(frozen=True)
class ClipStrip:
    """The shown clips of one trial, or the target clips.

    Attributes:
        name: Name of the trial, or REAL.
        sprites: `media.encode_sprite` of each clip.
        missing_reason: Why there are no sprites, or an empty string.
    """

    name: str
    sprites: tuple[bytes, ...]
    missing_reason: str = ""


def render_study(
    experiment: Experiment, study: Study, clip: ClipConfig, clip_ids: Sequence[str], strips: Sequence[ClipStrip]
) -> bytes:
    """Renders the HTML page of a search.

    Args:
        experiment: The experiment of the study.
        study: The result of the study.
        clip: Size and frame rate of the clips.
        clip_ids: Of the clips in each strip.
        strips: Clips to play side by side.
    """
    best = {trial.number for trial in study.best}
    is_population = experiment.search.sampler == "pbt"
    data = {
        "name": experiment.name,
        "summary": _summarize(experiment, study),
        "method": _describe_method(experiment),
        "objectives": [
            {"name": name, "direction": direction} for name, direction in resolve_objectives(experiment.search).items()
        ],
        "fields": [_field_data(name, spec) for name, spec in experiment.search.space.items()],
        "trials": [_trial_data(trial, trial.number in best) for trial in study.trials],
        "importances": study.importances,
        "importances_note": _POPULATION_NOTE if is_population else _TOO_FEW_TRIALS_NOTE,
        "clips": {
            "ids": list(clip_ids),
            "size": [clip.height, clip.width],
            "frames": clip.frames,
            "fps": clip.fps,
            "sprite_columns": sprite_columns(clip.frames),
            "strips": [_strip_data(strip) for strip in strips],
        },
    }
    return render_template(_TEMPLATE, data)


def _field_data(name: str, spec: Mapping[Distribution, Sequence[Any]]) -> dict[str, Any]:
    ((kind, values),) = spec.items()
    if kind == "choice":
        return {"name": name, "kind": kind, "choices": list(values)}
    return {"name": name, "kind": kind, "low": values[0], "high": values[1]}


def _trial_data(trial: Trial, is_best: bool) -> dict[str, Any]:
    return {
        "number": trial.number,
        "name": trial.name,
        "values": trial.values,
        "epochs": trial.epochs,
        "results": [] if trial.failure else list(trial.objectives),
        "state": _state(trial),
        "failure": trial.failure,
        "best": is_best,
        "reports": [list(report) for report in trial.reports.items()],
    }


def _strip_data(strip: ClipStrip) -> dict[str, Any]:
    sprites = [base64.b64encode(sprite).decode() for sprite in strip.sprites]
    return {"name": strip.name, "missing_reason": strip.missing_reason, "sprites": sprites}


def _state(trial: Trial) -> str:
    if trial.failure:
        return "failed"
    return "pruned" if trial.pruned else "completed"


def _summarize(experiment: Experiment, study: Study) -> str:
    objectives = resolve_objectives(experiment.search)
    if len(objectives) > 1:
        outcome = f"Trials on the Pareto front: {len(study.best)}."
    else:
        best = study.best[0]
        ((name, value),) = zip(objectives, best.objectives, strict=True)
        outcome = f"The best is {best.name}: {name} {value:.4g}."
    return f"{_count_states(study.trials)}. {outcome} Stop reason: {study.stop_reason}."


def _count_states(trials: Sequence[Trial]) -> str:
    """Returns '12 trials: 5 completed, 6 pruned, 1 failed'."""
    states = [_state(trial) for trial in trials]
    counts = [(states.count(state), state) for state in ("completed", "pruned", "failed")]
    description = ", ".join(f"{count} {state}" for count, state in counts if count)
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {description}"


def _describe_method(experiment: Experiment) -> str:
    search = experiment.search
    if search.sampler == "pbt":
        return (
            f"Population-based training for {search.epochs} epochs: after each validation, the worst quarter copies "
            "weights and values of the best quarter, and perturbs the values. The page shows each trial's last values."
        )
    sampler = {"tpe": "Optuna's TPE sampler", "random": "random sampling"}[search.sampler]
    budget = f"Values from {sampler}, at most {search.epochs} epochs per trial."
    if len(search.objectives) > 1:
        return f"{budget} {NO_PRUNING_NOTE}"
    if not search.asha:
        return f"{budget} No trial is pruned (search.asha=false)."
    return f"{budget} Weak trials are pruned by asynchronous successive halving (ASHA)."
