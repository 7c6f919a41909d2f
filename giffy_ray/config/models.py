"""The `model` section: one class for each kind of model, its defaults those of who described it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from giffy_ray.config.values import Count, Positive, Share, Strict, Weight


@dataclass(frozen=True)
class Encoders(Strict):
    """What both of the report's CVAEs have in common: how they see, and what they are trained on."""

    image_widths: tuple[Positive, Positive, Positive, Positive] = (16, 32, 64, 128)
    image_hidden: Positive = 256
    image_code: Positive = 1000
    video_widths: tuple[Positive, Positive, Positive, Positive] = (64, 128, 256, 512)
    video_hidden: Positive = 1024
    latent: Positive = 600
    batch_norm: bool = True
    # The authors' image encoder always normalises by the batch it is given, when clips are made too.
    image_batch_statistics: bool = False
    reconstruction_weight: Weight = 2.0  # lambda1 of equation 1
    ends_weight: Weight = 2.0  # lambda2 of equation 1
    kl_warmup_steps: Count = 0  # over which the divergence from the prior comes in


@dataclass(frozen=True)
class CVAEConfig(Encoders):
    """The report's CVAE. The defaults are its Table 1: 485,486,299 parameters at 30x64x64."""

    kind: Literal["cvae"] = "cvae"
    generator_widths: tuple[Positive, Positive, Positive, Positive, Positive] = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class AdvancedCVAEConfig(Encoders):
    """The report's advanced CVAE: its decoder sees the end images and the time. 276,496,267 parameters as coded."""

    kind: Literal["advanced_cvae"] = "advanced_cvae"
    generator_widths: tuple[Positive, Positive, Positive, Positive, Positive] = (128, 64, 32, 16, 8)
    # Before the last doubling of height and width, or after it, as coded.
    join_stage: Literal["half_size", "full_size"] = "full_size"
    time_channels: Literal[1, 3] = 3  # the frame number, so many times


@dataclass(frozen=True)
class Adversarial(Strict):
    """What the GANs have in common: equation 2 of the report."""

    adversarial_loss: Literal["logistic", "hinge"] = "logistic"
    real_label: Share = 0.9  # one-sided label smoothing, for the logistic loss; 1: none
    discriminator_updates: Positive = 4  # for each update of the generator
    frame_loss: Literal["squared", "absolute"] = "squared"  # of both end frames, summed over their values
    frame_weight: Weight = 0.02  # lambda of equation 2


@dataclass(frozen=True)
class CGANConfig(Adversarial):
    """The report's CGAN. The defaults are its layers as coded: 222,277,483 and 15,854,641 parameters at 30x64x64."""

    kind: Literal["cgan"] = "cgan"
    image_widths: tuple[Positive, Positive, Positive, Positive] = (16, 32, 64, 128)
    image_last_convolution: bool = True  # the report says that it was removed
    image_hidden: Positive = 256
    image_code: Positive = 1000
    latent: Positive = 600
    generator_widths: tuple[Positive, Positive, Positive, Positive, Positive] = (256, 128, 64, 32, 16)
    discriminator_widths: tuple[Positive, ...] = (16, 32, 64)
    discriminator_hidden: Positive = 128
    batch_norm: bool = True


@dataclass(frozen=True)
class TwoStreamConfig(Adversarial):
    """Vondrick et al. 2016 [2], conditional on both end images: a moving foreground before a still background."""

    kind: Literal["two_stream"] = "two_stream"
    latent: Count = 0  # they give their conditional generator no noise
    widths: tuple[Positive, Positive, Positive, Positive] = (128, 256, 512, 1024)  # of all its streams, fine to coarse
    mask_weight: Weight = 0.1  # of the mask's mean, so that the foreground stays small
    real_label: Share = 1.0
    discriminator_updates: Positive = 1
    frame_loss: Literal["squared", "absolute"] = "absolute"
    # None: theirs, which weighs the mean over the values of a frame with 10, in -1..1, where differences are twice as
    # large: 20 / (3 * clip.height * clip.width).
    frame_weight: Weight | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Direct3DConfig(Adversarial):
    """Li, Roblek, Tagliasacchi 2019 [4]: in-betweening with direct 3D convolutions."""

    kind: Literal["direct_3d"] = "direct_3d"
    latent: Positive = 128
    image_widths: tuple[Positive, Positive, Positive, Positive] = (64, 128, 256, 64)
    latent_width: Positive = 256  # of the 3D latent generator
    latent_blocks: Positive = 8  # a multiple of 4, the number of temporal lengths
    generator_widths: tuple[Positive, Positive, Positive] = (256, 128, 64)
    discriminator_widths: tuple[Positive, Positive, Positive, Positive] = (64, 128, 256, 512)
    reconstruction_weight: Weight = 0.0  # of the mean absolute difference of all frames
    real_label: Share = 1.0
    discriminator_updates: Positive = 1
    frame_loss: Literal["squared", "absolute"] = "absolute"


@dataclass(frozen=True)
class BetweenConfig(Strict):
    """Our own: flows from both ends, a visibility mask and a residual on top of linear interpolation."""

    kind: Literal["between"] = "between"
    widths: tuple[Positive, Positive, Positive] = (32, 48, 64)  # at 1/2, 1/4 and 1/8 of the size
    latent: Positive = 8
    posterior_fraction: Share = (
        0.5  # of the clips are made from q(latent | clip) in training, the others from the prior
    )
    kl_weight: Weight = 1e-4  # relative to a squared error as large as linear interpolation's
    kl_warmup_steps: Count = 500
    free_nats: Weight = 0.05  # of each value of the latent, that cost nothing
    # Mean squared errors below this count as one of its size: what is nearly still is not worth a large weight.
    error_epsilon: Annotated[float, Field(gt=0)] = 0.002
    # What is made is the mean over this many mirror images of the ends: as it is, left to right, upside down, both.
    self_ensemble: Literal[1, 2, 4] = 1
    # Above 0, a discriminator that sees the end images judges the made frames.
    adversarial_weight: Weight = 0.0
    adversarial_from_step: Count = 0  # until then the generator learns by itself
    discriminator_widths: tuple[Positive, Positive, Positive] = (32, 64, 128)


ModelConfig = Annotated[
    CVAEConfig | AdvancedCVAEConfig | CGANConfig | TwoStreamConfig | Direct3DConfig | BetweenConfig,
    Field(discriminator="kind"),
]
