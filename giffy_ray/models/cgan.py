"""The paper's CGAN: the CVAE's image encoder and generator, and a discriminator that sees only the clip.

    start, end --ImageEncoder--> codes;  noise, codes --Generator, leaky ReLU--> generated clip
    clip --CGANDiscriminator--> logit that the clip is real

The defaults of `CGANConfig` follow the authors' code: 222,277,483 and 15,854,641 parameters at 30x64x64. The
discriminator starts from the video encoder of Table 1, which would be the widths 64, 128, 256, 512 and 1024 hidden
units.
"""

from __future__ import annotations

from torch import Tensor, nn

from giffy_ray.config import CGANConfig, ClipConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, PerClip
from giffy_ray.models.cvae import Generator, ImageEncoder, build_clip_features
from giffy_ray.models.layers import add_norm_activation, leaky_relu, linear, require_multiples


class CGANGenerator(nn.Module):
    """The paper's CGAN generator."""

    def __init__(self, model: CGANConfig, clip: ClipConfig):
        super().__init__()
        require_multiples(clip, model.kind, frames=6, height=8, width=8)
        self.image_encoder = ImageEncoder(model, clip, last_convolution=model.image_last_convolution)
        self.generator = Generator(model, clip, activation=leaky_relu)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """Returns generated clips and their penalty, which is always 0."""
        generated = self.generator(noise, self.image_encoder(start), self.image_encoder(end))
        return generated, generated.new_zeros(len(generated))


class CGANDiscriminator(nn.Module):
    """The paper's CGAN discriminator: strided 3D convolutions, a hidden layer and one logit."""

    def __init__(self, model: CGANConfig, clip: ClipConfig):
        super().__init__()
        halvings = len(model.discriminator_widths)
        require_multiples(
            clip, f"{model.kind} with {halvings} model.discriminator_widths", height=2**halvings, width=2**halvings
        )
        norm_1d = nn.BatchNorm1d if model.batch_norm else None
        self.features = build_clip_features(model.discriminator_widths, model.batch_norm)
        channels = (3, *model.discriminator_widths)[-1]
        flat = channels * clip.frames * (clip.height // 2**halvings) * (clip.width // 2**halvings)
        hidden = model.discriminator_hidden
        self.hidden = add_norm_activation(linear(flat, hidden), norm_1d, hidden, leaky_relu())
        self.logit = linear(hidden, 1)

    def forward(self, target: ClipFloats, generated: ClipFloats) -> tuple[PerClip, PerClip]:
        """Returns the logits of both; batch norm treats them as separate batches."""
        return self._compute_logits(target), self._compute_logits(generated)

    def _compute_logits(self, clips: ClipFloats) -> Tensor:
        return self.logit(self.hidden(self.features(clips).flatten(1))).squeeze(1)
