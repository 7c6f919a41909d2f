"""Networks. They know nothing of Ray, of optimisers or of uint8."""

from __future__ import annotations

from torch import nn

from giffy_ray.config import ClipConfig, CVAEConfig
from giffy_ray.models.cvae import CVAE


def build(model: CVAEConfig, clip: ClipConfig) -> nn.Module:
    """The network of `model.kind` with fresh weights (torch's global generator draws them)."""
    match model.kind:
        case "cvae":
            return CVAE(model, clip)
