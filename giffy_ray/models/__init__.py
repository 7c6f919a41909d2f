"""Networks. They know nothing of Ray, of optimisers or of uint8."""

from __future__ import annotations

from torch import nn

from giffy_ray.config import ClipConfig, ConfigError, Experiment, ModelConfig
from giffy_ray.models.advanced_cvae import AdvancedCVAE
from giffy_ray.models.between import Between
from giffy_ray.models.cgan import CGANDiscriminator, CGANGenerator
from giffy_ray.models.cvae import CVAE
from giffy_ray.models.direct_3d import Direct3DGenerator, ImageDiscriminator, VideoDiscriminator
from giffy_ray.models.pair_discriminator import PairDiscriminator
from giffy_ray.models.two_stream import TwoStreamDiscriminator, TwoStreamGenerator


def build(model: ModelConfig, clip: ClipConfig) -> nn.Module:
    """The network of `model.kind` that makes clips, with fresh weights (torch's global generator draws them).

    Of a GAN it is the generator: (start, end, noise) -> (made, what its output costs by itself, [batch]).
    Raises ConfigError for a size that its layers cannot make.
    """
    match model.kind:
        case "cvae":
            return CVAE(model, clip)
        case "advanced_cvae":
            return AdvancedCVAE(model, clip)
        case "cgan":
            return CGANGenerator(model, clip)
        case "two_stream":
            return TwoStreamGenerator(model, clip)
        case "direct_3d":
            return Direct3DGenerator(model, clip)
        case "between":
            return Between(model, clip)


def discriminators(model: ModelConfig, clip: ClipConfig) -> dict[str, nn.Module]:
    """Those of `model` by name, with fresh weights: (real, made) -> logits of both, [batch] each. A CVAE has none.

    Both batches pass in one call, so that DistributedDataParallel sees one forward for each backward.
    """
    match model.kind:
        case "cgan":
            return {"discriminator": CGANDiscriminator(model, clip)}
        case "two_stream":
            return {"discriminator": TwoStreamDiscriminator(model, clip)}
        case "direct_3d":
            return {
                "video_discriminator": VideoDiscriminator(model, clip),
                "image_discriminator": ImageDiscriminator(model, clip),
            }
        case "between" if model.adversarial_weight:
            return {"discriminator": PairDiscriminator(model, clip)}
    return {}


def refuse_other_lengths(experiment: Experiment, frames: int | None, field: str = "frames") -> None:
    """Raises ConfigError, which names `field`, where a network that makes clips of one length is asked for another."""
    if frames not in (None, experiment.clip.frames):
        raise ConfigError(
            f"{field}: {experiment.model.kind} makes clips of clip.frames={experiment.clip.frames} (value {frames})"
        )
