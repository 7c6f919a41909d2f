"""Networks. They depend on neither Ray nor optimizers, and see floats only, never uint8 pixels."""

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
    """Builds the network of `model.kind` that generates clips, with weights drawn from torch's global generator.

    A GAN's network is its generator: (start, end, noise) -> (generated, penalty [batch]). The penalty is a loss of the
    output alone, such as a regulariser.

    Raises:
        ConfigError: The layers do not support the size of `clip`.
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


def build_discriminators(model: ModelConfig, clip: ClipConfig) -> dict[str, nn.Module]:
    """Builds the discriminators of `model` by name, with new weights; none for a model without adversarial loss.

    A discriminator maps (target, generated) to the logits of both, [batch] each. It takes both batches in one call, so
    that DistributedDataParallel sees one forward per backward.
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


def require_trained_length(experiment: Experiment, frames: int | None, field: str = "frames") -> None:
    """Raises ConfigError, naming `field`, if `frames` differs from the only length that the model generates."""
    if frames not in (None, experiment.clip.frames):
        raise ConfigError(
            f"{field}: {experiment.model.kind} generates only clips of clip.frames={experiment.clip.frames} "
            f"(value {frames})"
        )
