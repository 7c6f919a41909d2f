"""The metrics that a search can optimise: their directions, and which of them a training reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from giffy_ray.config import (
    AdversarialConfig,
    BetweenConfig,
    ConfigError,
    Direct3DConfig,
    Experiment,
    SearchConfig,
    override,
)

# Metric -> direction. Discriminator logits have none: they should stay balanced.
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
_DISCRIMINATOR_METRICS = {"g_loss", "d_loss", "d_real", "d_made"}
# Loss -> the fields that change its scale. Trials that differ in one of them cannot be compared by this loss.
_SCALED_BY = {
    "train/loss": (
        "model.reconstruction_weight",
        "model.ends_weight",
        "model.kl_weight",
        "model.adversarial_weight",
        "model.kl_warmup_steps",
        "model.free_nats",
        "model.error_epsilon",
        "model.posterior_fraction",
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


def resolve_objectives(search: SearchConfig) -> dict[str, str]:
    """Maps each metric to optimise to "minimize" or "maximize".

    Raises:
        ConfigError: `search.metric` is unknown or has no direction.
    """
    if search.objectives:
        return dict(search.objectives)
    direction = _DIRECTIONS.get(search.metric)
    if direction is None:
        raise ConfigError(f"search.metric: no such metric (value {search.metric!r}){_suggest(search.metric)}")
    if not direction:
        raise ConfigError(
            f"search.metric: {search.metric} has no default direction; use "
            f"search.objectives={{{search.metric}: maximize}} or minimize (value {search.metric!r})"
        )
    return {search.metric: direction}


def check_metrics(experiment: Experiment) -> None:
    """Raises ConfigError if trials do not report an objective, or if a searched field changes its scale."""
    field = "search.objectives" if experiment.search.objectives else "search.metric"
    for metric in resolve_objectives(experiment.search):
        for description, variant in _list_variants(experiment):
            metrics = list_reported_metrics(variant)
            if metric not in metrics:
                raise ConfigError(
                    f"{field}: a training with {description} does not report it (value {metric!r})"
                    f"{_suggest(metric, metrics)}"
                )
        for name in experiment.search.space:
            if name in _SCALED_BY.get(metric, ()):
                raise ConfigError(
                    f"{field}: {metric} depends on {name}, which search.space varies, so trials cannot be compared by "
                    f"it; use a validation metric such as val/l2_paper (value {metric!r})"
                )


def list_reported_metrics(experiment: Experiment) -> set[str]:
    """Lists the metrics in every report of a training. The two GPU metrics are included, but need a GPU."""
    model = experiment.model
    if isinstance(model, BetweenConfig):
        losses = {"loss", "kl", "relative_error"}
        if 0 < model.posterior_fraction < 1:
            losses |= {"posterior_error", "prior_error"}
        if model.adversarial_weight and not model.adversarial_from_step:  # not reported before that step
            losses |= _DISCRIMINATOR_METRICS
    elif isinstance(model, AdversarialConfig):
        losses = {*_DISCRIMINATOR_METRICS, "frame_loss"}
        if isinstance(model, Direct3DConfig):
            losses.add("reconstruction")
    else:
        losses = {"loss", "kl", "reconstruction", "ends"}
    common = {name for name in _DIRECTIONS if not name.startswith("train/")}
    return common | {f"train/{name}" for name in (*losses, "skipped")}


def _list_variants(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    """Yields the experiment, and a variant for each bound and choice of a model field: they may report other losses."""
    yield f"model.kind={experiment.model.kind}", experiment
    for name, spec in experiment.search.space.items():
        if name.startswith("model."):
            for value in next(iter(spec.values())):
                yield f"{name}={value}", override(experiment, {name: value})


def _suggest(metric: str, known: set[str] | None = None) -> str:
    names = sorted(known or _DIRECTIONS)
    matches = difflib.get_close_matches(metric, names, n=1, cutoff=0.6)
    if not matches:
        matches = [name for name in names if name.rpartition("/")[2] == metric.rpartition("/")[2]]
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(names)}"
