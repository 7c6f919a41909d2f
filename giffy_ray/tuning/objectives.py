"""The metrics that a search can optimise: which direction is better, and which ones a training reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from giffy_ray.config import Adversarial, BetweenConfig, ConfigError, Direct3DConfig, Experiment, SearchConfig, override

# Metric -> which is better; "" where neither is: logits of a discriminator are to balance, not to grow or shrink.
_DIRECTIONS = {
    "val/l2_paper": "minimize",
    "val/psnr": "maximize",
    "val/skill": "maximize",
    "val/blur": "minimize",
    "train/loss": "minimize",
    "train/kl": "minimize",
    "train/reconstruction": "minimize",
    "train/ends": "minimize",
    "train/frame_loss": "minimize",
    "train/relative_error": "minimize",
    "train/posterior_error": "minimize",
    "train/prior_error": "minimize",
    "train/g_loss": "minimize",
    "train/d_loss": "minimize",
    "train/d_real": "",
    "train/d_made": "",
    "train/skipped": "minimize",
    "speed/clips_per_s": "maximize",
    "speed/step_ms": "minimize",
    "speed/data_wait_fraction": "minimize",
    "speed/memory_gb": "minimize",
    "speed/tflops_per_worker": "maximize",
    "speed/gpu_memory_gb": "minimize",
    "speed/model_flop_utilisation": "maximize",
}
_JUDGED = ("g_loss", "d_loss", "d_real", "d_made")
# Loss -> the fields that it is computed from: trials with other values of these report it on another scale.
_COMPUTED_FROM = {
    "train/loss": (
        *("model.reconstruction_weight", "model.ends_weight", "model.kl_weight", "model.adversarial_weight"),
        *("model.kl_warmup_steps", "model.free_nats", "model.error_epsilon", "model.posterior_fraction"),
        "model.adversarial_from_step",
    ),
    "train/kl": ("model.free_nats",),
    "train/frame_loss": ("model.frame_loss",),
    "train/relative_error": ("model.error_epsilon",),
    "train/posterior_error": ("model.error_epsilon",),
    "train/prior_error": ("model.error_epsilon",),
    "train/g_loss": ("model.adversarial_loss",),
    "train/d_loss": ("model.adversarial_loss", "model.real_label"),
}


def objectives(settings: SearchConfig) -> dict[str, str]:
    """Metric -> which is better, smaller or larger. Raises ConfigError for a `search.metric` without a direction."""
    if settings.objectives:
        return dict(settings.objectives)
    better = _DIRECTIONS.get(settings.metric)
    if better is None:
        raise ConfigError(f"search.metric: no such metric (value {settings.metric!r}){_suggest(settings.metric)}")
    if not better:
        raise ConfigError(
            f"search.metric: {settings.metric} has no direction of its own; state it, as "
            f"search.objectives={{{settings.metric}: maximize}} or minimize"
        )
    return {settings.metric: better}


def check_metrics(experiment: Experiment) -> None:
    """Raises ConfigError for an objective that a trial does not report, or that is computed from what is searched."""
    field = "search.objectives" if experiment.search.objectives else "search.metric"
    for metric in objectives(experiment.search):
        for what, trained in _variants(experiment):
            known = reported_by(trained)
            if metric not in known:
                raise ConfigError(
                    f"{field}: a training with {what} does not report it (value {metric!r}){_suggest(metric, known)}"
                )
        for name in experiment.search.space:
            if name in _COMPUTED_FROM.get(metric, ()):
                raise ConfigError(
                    f"{field}: {metric} is computed from {name}, which search.space varies, so its values cannot be "
                    f"compared; use a metric of val/, such as val/l2_paper"
                )


def reported_by(experiment: Experiment) -> set[str]:
    """The metrics in every report of a training, but for those of a GPU, which cannot be known here."""
    model = experiment.model
    if isinstance(model, BetweenConfig):
        losses = {"loss", "kl", "relative_error"}
        if 0 < model.posterior_fraction < 1:
            losses |= {"posterior_error", "prior_error"}
        if model.adversarial_weight and not model.adversarial_from_step:  # before that step they are missing
            losses |= {*_JUDGED}
    elif isinstance(model, Adversarial):
        losses = {*_JUDGED, "frame_loss"} | ({"reconstruction"} if isinstance(model, Direct3DConfig) else set())
    else:
        losses = {"loss", "kl", "reconstruction", "ends"}
    others = {name for name in _DIRECTIONS if not name.startswith("train/")}
    return others | {f"train/{name}" for name in (*losses, "skipped")}


def _variants(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    """The experiment, and it with each bound and choice of a model's field: what is reported may depend on these."""
    yield f"model.kind={experiment.model.kind}", experiment
    for name, spec in experiment.search.space.items():
        if name.startswith("model."):
            for value in next(iter(spec.values())):
                yield f"{name}={value}", override(experiment, {name: value})


def _suggest(metric: str, known: set[str] | None = None) -> str:
    names = sorted(known or _DIRECTIONS)
    near = difflib.get_close_matches(metric, names, n=1, cutoff=0.6) or [
        name for name in names if name.rpartition("/")[2] == metric.rpartition("/")[2]
    ]
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
