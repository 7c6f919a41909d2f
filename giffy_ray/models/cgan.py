"""The report's CGAN: the CVAE's image encoder and generator, and a discriminator that sees the clip alone.

    start, end --ImageEncoder--> codes;  noise, codes --Generator, leaky ReLU--> made clip
    clip --CGANDiscriminator--> logit of its being real

The defaults of `CGANConfig` are the authors' code: 222,277,483 and 15,854,641 parameters at 30x64x64. Four widths
64, 128, 256, 512 and 1024 hidden values would be the video encoder of Table 1 that the report starts from.
"""

from __future__ import annotations

from torch import Tensor, nn

from giffy_ray.config import CGANConfig, ClipConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, PerClip
from giffy_ray.models.cvae import Generator, ImageEncoder, clip_features
from giffy_ray.models.layers import leaky_relu, linear, normalised, require_multiples


class CGANGenerator(nn.Module):
    def __init__(self, model: CGANConfig, clip: ClipConfig):
        super().__init__()
        require_multiples(clip, model.kind, frames=6, height=8, width=8)
        self.image_encoder = ImageEncoder(model, clip, last_convolution=model.image_last_convolution)
        self.generator = Generator(model, clip, activation=leaky_relu)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """(made, what the output costs by itself: nothing)."""
        made = self.generator(noise, self.image_encoder(start), self.image_encoder(end))
        return made, made.new_zeros(len(made))


class CGANDiscriminator(nn.Module):
    def __init__(self, model: CGANConfig, clip: ClipConfig):
        super().__init__()
        halvings = len(model.discriminator_widths)
        require_multiples(
            clip, f"{model.kind} with {halvings} model.discriminator_widths", height=2**halvings, width=2**halvings
        )
        norm_1d = nn.BatchNorm1d if model.batch_norm else None
        self.features = clip_features(model.discriminator_widths, model.batch_norm)
        channels = (3, *model.discriminator_widths)[-1]
        flat = channels * clip.frames * (clip.height // 2**halvings) * (clip.width // 2**halvings)
        hidden = model.discriminator_hidden
        self.hidden = normalised(linear(flat, hidden), norm_1d, hidden, leaky_relu())
        self.logit = linear(hidden, 1)

    def forward(self, real: ClipFloats, made: ClipFloats) -> tuple[PerClip, PerClip]:
        """Logits of being real. Each of the two is a batch of its own to batch norm."""
        return self._judged(real), self._judged(made)

    def _judged(self, clips: ClipFloats) -> Tensor:
        return self.logit(self.hidden(self.features(clips).flatten(1))).squeeze(1)
