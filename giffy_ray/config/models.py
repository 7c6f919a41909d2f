"""The `model` section: one class per kind of model. The defaults are those of the publication that describes it.

Equation and table numbers without a citation refer to the paper (`docs/paper.md`). Widths are numbers of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from giffy_ray.config.field_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, StrictSection


@dataclass(frozen=True)
class BaseCVAEConfig(StrictSection):
    """Encoders and losses that both CVAEs of the paper share."""

    image_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64, 128)
    """Channels of the image encoder's four convolutions."""
    image_hidden: PositiveInt = 256
    """Units of the image encoder's hidden layer."""
    image_code: PositiveInt = 1000
    """Length of the code of each end image."""
    video_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 512)
    """Channels of the video encoder's four convolutions."""
    video_hidden: PositiveInt = 1024
    """Units of the video encoder's hidden layer."""
    latent: PositiveInt = 600
    """Dimensions of the latent."""
    batch_norm: bool = True
    """Use batch normalization in all networks."""
    image_batch_statistics: bool = False
    """Let the image encoder normalize by the statistics of the current batch at inference too, as the authors' code
    does. Requires `batch_norm`."""
    reconstruction_weight: NonNegativeFloat = 2.0
    """Weight of the reconstruction error, lambda1 of equation 1."""
    ends_weight: NonNegativeFloat = 2.0
    """Weight of the error of the first and last frame, lambda2 of equation 1."""
    kl_warmup_steps: NonNegativeInt = 0
    """Number of steps over which the weight of the KL divergence rises linearly to its value."""


@dataclass(frozen=True)
class CVAEConfig(BaseCVAEConfig):
    """The paper's CVAE. The defaults are its Table 1: 485,486,299 parameters at 30x64x64."""

    kind: Literal["cvae"] = "cvae"
    """Selects this model."""
    generator_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (256, 128, 64, 32, 16)
    """Channels of the generator's five layers before the output layer."""


@dataclass(frozen=True)
class AdvancedCVAEConfig(BaseCVAEConfig):
    """The paper's advanced CVAE: its decoder sees the end images and the time. 276,496,267 parameters as coded."""

    kind: Literal["advanced_cvae"] = "advanced_cvae"
    """Selects this model."""
    generator_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (128, 64, 32, 16, 8)
    """Channels of the generator's five layers before the output layer."""
    join_stage: Literal["half_size", "full_size"] = "full_size"
    """Where the end images join the generator: before its last upsampling, or after it, as coded."""
    time_channels: Literal[1, 3] = 3
    """Number of channels that hold the frame number."""


@dataclass(frozen=True)
class AdversarialConfig(StrictSection):
    """Losses that all GANs share: equation 2."""

    adversarial_loss: Literal["logistic", "hinge"] = "logistic"
    """Adversarial loss."""
    real_label: Fraction = 0.9
    """Target of the discriminator for real clips under the logistic loss, 0 to 1. Below 1: one-sided label
    smoothing."""
    discriminator_updates: PositiveInt = 4
    """Discriminator updates per generator update."""
    frame_loss: Literal["squared", "absolute"] = "squared"
    """Error of the first and last frame, summed over their values."""
    frame_weight: NonNegativeFloat = 0.02
    """Weight of `frame_loss`, lambda of equation 2."""


@dataclass(frozen=True)
class CGANConfig(AdversarialConfig):
    """The paper's CGAN. The defaults are its layers as coded: 222,277,483 and 15,854,641 parameters at 30x64x64."""

    kind: Literal["cgan"] = "cgan"
    """Selects this model."""
    image_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64, 128)
    """Channels of the image encoder's four convolutions."""
    image_last_convolution: bool = True
    """Include the image encoder's last convolution, which the paper says was removed."""
    image_hidden: PositiveInt = 256
    """Units of the image encoder's hidden layer."""
    image_code: PositiveInt = 1000
    """Length of the code of each end image."""
    latent: PositiveInt = 600
    """Dimensions of the noise."""
    generator_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (256, 128, 64, 32, 16)
    """Channels of the generator's five layers before the output layer."""
    discriminator_widths: tuple[PositiveInt, ...] = (16, 32, 64)
    """Channels of the discriminator's convolutions."""
    discriminator_hidden: PositiveInt = 128
    """Units of the discriminator's hidden layer."""
    batch_norm: bool = True
    """Use batch normalization in all networks."""


@dataclass(frozen=True)
class TwoStreamConfig(AdversarialConfig):
    """Vondrick et al. 2016, conditional on both end images: a moving foreground over a still background."""

    kind: Literal["two_stream"] = "two_stream"
    """Selects this model."""
    latent: NonNegativeInt = 0
    """Dimensions of the noise. 0 uses none, as the authors' conditional generator."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (128, 256, 512, 1024)
    """Channels of all streams, from fine to coarse."""
    mask_weight: NonNegativeFloat = 0.1
    """Weight of the mean of the mask, which keeps the foreground small."""
    real_label: Fraction = 1.0
    discriminator_updates: PositiveInt = 1
    frame_loss: Literal["squared", "absolute"] = "absolute"
    # The authors weigh the mean over a frame in -1..1, where differences are twice as large, with 10.
    frame_weight: NonNegativeFloat | None = None  # type: ignore[assignment]
    """Weight of `frame_loss`. Null uses the authors' weight, 20 / (3 * clip.height * clip.width)."""


@dataclass(frozen=True)
class Direct3DConfig(AdversarialConfig):
    """Li, Roblek, Tagliasacchi 2019: in-betweening with direct 3D convolutions."""

    kind: Literal["direct_3d"] = "direct_3d"
    """Selects this model."""
    latent: PositiveInt = 128
    """Dimensions of the noise."""
    image_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 64)
    """Channels of the image encoder; the last value is the size of the code."""
    latent_width: PositiveInt = 256
    """Channels of the 3D latent generator."""
    latent_blocks: PositiveInt = 8
    """Residual blocks of the latent generator: a multiple of 4, the number of temporal resolutions."""
    generator_widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (256, 128, 64)
    """Channels of the video generator."""
    discriminator_widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 512)
    """Channels of both discriminators."""
    reconstruction_weight: NonNegativeFloat = 0.0
    """Weight of the mean absolute error of all frames."""
    real_label: Fraction = 1.0
    discriminator_updates: PositiveInt = 1
    frame_loss: Literal["squared", "absolute"] = "absolute"


@dataclass(frozen=True)
class BetweenConfig(StrictSection):
    """The project's own model: bidirectional flow, a visibility mask and a residual on top of linear interpolation."""

    kind: Literal["between"] = "between"
    """Selects this model."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 48, 64)
    """Channels at 1/2, 1/4 and 1/8 of the frame size."""
    latent: PositiveInt = 8
    """Dimensions of the latent."""
    posterior_fraction: Fraction = 0.5
    """Fraction of the training clips generated from the posterior q(latent | clip), 0 to 1. The others use the prior
    mean."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the KL divergence, in nats, relative to the error that `error_epsilon` normalizes."""
    kl_warmup_steps: NonNegativeInt = 500
    """Number of steps over which `kl_weight` rises linearly to its value."""
    free_nats: NonNegativeFloat = 0.05
    """KL divergence per latent dimension that costs nothing, in nats."""
    error_epsilon: Annotated[float, Field(gt=0)] = 0.002
    """Added to the mean squared error of linear interpolation (values 0..1), by which the error of a clip is divided.
    It bounds the weight of clips that hardly move."""
    self_ensemble: Literal[1, 2, 4] = 1
    """Number of mirror images of the end images whose outputs are averaged. 1 uses the original only, 2 adds the one
    flipped left to right, 4 adds those flipped upside down and both ways."""
    adversarial_weight: NonNegativeFloat = 0.0
    """Weight of the adversarial loss. Above 0, a discriminator that sees the end images is trained too."""
    adversarial_from_step: NonNegativeInt = 0
    """First step with the adversarial loss."""
    discriminator_widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 64, 128)
    """Channels of the discriminator."""


ModelConfig = Annotated[
    CVAEConfig | AdvancedCVAEConfig | CGANConfig | TwoStreamConfig | Direct3DConfig | BetweenConfig,
    Field(discriminator="kind"),
]
