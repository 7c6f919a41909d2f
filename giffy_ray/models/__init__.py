"""Networks. They know nothing of Ray, of optimisers or of uint8."""

from __future__ import annotations

from torch import nn

from giffy_ray.config import ClipConfig, ConfigError, Experiment, ModelConfig
from giffy_ray.models.between import Between
from giffy_ray.models.cvae import CVAE


def build(model: ModelConfig, clip: ClipConfig) -> nn.Module:
    """The network of `model.kind` that makes clips, with fresh weights (torch's global generator draws them)."""
    match model.kind:
        case "cvae":
            return CVAE(model, clip)
        case "between":
            return Between(model, clip)
    raise ConfigError(f"model.kind: not built yet (value {model.kind!r})")


def refuse_other_lengths(experiment: Experiment, frames: int | None) -> None:
    """Raises ConfigError where a network that makes clips of one length is asked for another."""
    if frames not in (None, experiment.clip.frames):
        raise ConfigError(
            f"frames: {experiment.model.kind} makes clips of clip.frames={experiment.clip.frames} (value {frames})"
        )
