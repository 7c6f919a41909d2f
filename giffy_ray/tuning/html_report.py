"""A search's trials -> one HTML file that shows what was tried, what came of it, and the clips that the best make.

The trials and their clips lie in it as JSON; `html_report.html` draws them, each trial in all of its plots.
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
from giffy_ray.tuning.tables import WHY_NONE_IS_CUT
from giffy_ray.tuning.tuner import Study, Trial, objectives

_TEMPLATE = Path(__file__).with_suffix(".html")
NO_IMPORTANCES = "Too few trials to tell what mattered."
CHANGING = "Values changed while the trials trained: what one reached is not due to those that it has last."


@dataclass(frozen=True)
class ClipStrip:
    """The same clips by one maker: a trial, or the real ones."""

    name: str
    sprites: tuple[bytes, ...]  # `render.sprite` of each clip
    missing: str = ""  # why there are none


def render_study(
    study: Experiment, found: Study, clip: ClipConfig, clips: Sequence[str], reels: Sequence[ClipStrip]
) -> bytes:
    """The HTML. `clips`: ids of those that each reel holds."""
    measured, best = objectives(study.search), {trial.number for trial in found.best}
    data = {
        "name": study.name,
        "about": _about(study, found),
        "search": _how(study),
        "objectives": [{"name": name, "better": better} for name, better in measured.items()],
        "fields": [_field(name, spec) for name, spec in study.search.space.items()],
        "trials": [_plain(trial, trial.number in best) for trial in found.trials],
        "importances": found.importances,
        "unimportant": CHANGING if study.search.sampler == "pbt" else NO_IMPORTANCES,
        "clips": {
            "ids": list(clips),
            "size": [clip.height, clip.width],
            "frames": clip.frames,
            "fps": clip.fps,
            "across": sprite_columns(clip.frames),
            "reels": [
                {"name": reel.name, "missing": reel.missing, "sprites": [_text(sprite) for sprite in reel.sprites]}
                for reel in reels
            ],
        },
    }
    return render_template(_TEMPLATE, data)


def _field(name: str, spec: Mapping[Distribution, Sequence[Any]]) -> dict[str, Any]:
    kind, values = next(iter(spec.items()))
    if kind == "choice":
        return {"name": name, "kind": kind, "choices": list(values)}
    return {"name": name, "kind": kind, "low": values[0], "high": values[1]}


def _plain(trial: Trial, best: bool) -> dict[str, Any]:
    return {
        "number": trial.number,
        "name": trial.name,
        "values": trial.values,
        "epochs": trial.epochs,
        "reached": [] if trial.ended else list(trial.objectives),
        "state": "failed" if trial.ended else "cut" if trial.cut else "whole",
        "ended": trial.ended,
        "best": best,
        "reports": [list(report) for report in trial.reports.items()],
    }


def _about(study: Experiment, found: Study) -> str:
    best = [
        f"{name} {value:.4g}" for name, value in zip(objectives(study.search), found.best[0].objectives, strict=True)
    ]
    which = f"The best is {found.best[0].name}: {', '.join(best)}."
    if len(best) > 1:
        which = f"{len(found.best)} are on the Pareto front, which no other beats in all objectives."
    return f"{_counted(found.trials)}. {which} It ended as {found.stop_reason}."


def _counted(trials: Sequence[Trial]) -> str:
    """'12 trials: 5 to their end, 6 ended early, 1 failed'."""
    failed, cut = sum(bool(trial.ended) for trial in trials), sum(trial.cut for trial in trials)
    counts = {"to their end": len(trials) - failed - cut, "ended early": cut, "failed": failed}
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {named}"


def _how(study: Experiment) -> str:
    search = study.search
    if search.sampler == "pbt":
        return (
            f"A population that trains for {search.epochs} epochs. After each validation the worst quarter takes over "
            "weights and values of the best, and changes the values a little. Values shown are the last."
        )
    drawn = {"tpe": "by Optuna's TPE", "random": "by chance"}[search.sampler]
    longest = f"Values are drawn {drawn}, a trial has {search.epochs} epochs at most."
    if len(search.objectives) > 1:
        return f"{longest} {WHY_NONE_IS_CUT}"
    if not search.asha:
        return f"{longest} None is ended early (search.asha=false)."
    return f"{longest} Poor trials are ended early, by asynchronous successive halving."


def _text(sprite: bytes) -> str:
    return base64.b64encode(sprite).decode()
