"""The report's conditional VAE (its Table 1), every width configurable.

    start, end --ImageEncoder--> two image codes
    clip, codes --VideoEncoder--> mean, std of the latent        (training only)
    latent, codes --Generator--> made clip

The defaults of `CVAEConfig` are Table 1 with the batch norm of the authors' code: 485,486,299 parameters at
30x64x64. Layers are convolution -> batch norm -> activation; the first convolution of an encoder and every output
layer have no batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import CGANConfig, ClipConfig, CVAEConfig, Encoders
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise
from giffy_ray.models.layers import (
    ByBatchNorm1d,
    ByBatchNorm2d,
    SameConvTranspose3d,
    conv2d,
    conv3d,
    leaky_relu,
    linear,
    normalised,
    require_multiples,
)

_STD_FLOOR = 1e-6


class ImageEncoder(nn.Module):
    """ImageFloats -> [batch, image_code].

    `by_batch`: normalised by the batch at hand when clips are made too, as the authors' always is. What is made of a
    pair then depends on the pairs beside it; a single pair is normalised by the running statistics.
    """

    def __init__(
        self, model: Encoders | CGANConfig, clip: ClipConfig, by_batch: bool = False, last_convolution: bool = True
    ):
        super().__init__()
        first, second, third, fourth = model.image_widths
        norm_2d, norm_1d = (ByBatchNorm2d, ByBatchNorm1d) if by_batch else (nn.BatchNorm2d, nn.BatchNorm1d)
        if not model.batch_norm:
            norm_2d, norm_1d = None, None
        self.features = nn.Sequential(
            normalised(conv2d(3, first, 4, 2), None, first, leaky_relu()),
            normalised(conv2d(first, second, 3, 1), norm_2d, second, leaky_relu()),
            normalised(conv2d(second, third, 4, 2), norm_2d, third, leaky_relu()),
        )
        if last_convolution:
            self.features.append(normalised(conv2d(third, fourth, 3, 1), norm_2d, fourth, leaky_relu()))
        flat = (fourth if last_convolution else third) * (clip.height // 4) * (clip.width // 4)
        self.hidden = normalised(linear(flat, model.image_hidden), norm_1d, model.image_hidden, leaky_relu())
        self.code = linear(model.image_hidden, model.image_code)

    def forward(self, image: ImageFloats) -> Tensor:
        return self.code(self.hidden(self.features(image).flatten(1)))


def clip_features(widths: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """ClipFloats -> features as wide as the last of `widths`; each layer halves height and width, the first is bare."""
    layers, inputs = [], 3
    for width in widths:
        norm = nn.BatchNorm3d if batch_norm and layers else None
        layers.append(normalised(conv3d(inputs, width, (3, 4, 4), (1, 2, 2)), norm, width, leaky_relu()))
        inputs = width
    return nn.Sequential(*layers)


class VideoEncoder(nn.Module):
    """ClipFloats and both image codes -> mean and standard deviation of q(latent), each [batch, latent]."""

    def __init__(self, model: Encoders, clip: ClipConfig):
        super().__init__()
        norm_1d = nn.BatchNorm1d if model.batch_norm else None
        self.features = clip_features(model.video_widths, model.batch_norm)
        flat = model.video_widths[-1] * clip.frames * (clip.height // 16) * (clip.width // 16)
        self.hidden = normalised(
            linear(flat + 2 * model.image_code, model.video_hidden), norm_1d, model.video_hidden, leaky_relu()
        )
        self.distribution = linear(model.video_hidden, 2 * model.latent)

    def forward(self, clip: ClipFloats, start_code: Tensor, end_code: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(clip).flatten(1)
        hidden = self.hidden(torch.cat([features, start_code, end_code], dim=1))
        mean, raw_std = self.distribution(hidden).chunk(2, dim=1)
        return mean, functional.softplus(raw_std) + _STD_FLOOR


class Generator(nn.Module):
    """Latent and both image codes -> ClipFloats. `activation` is that of the deconvolutions."""

    def __init__(self, model: CVAEConfig | CGANConfig, clip: ClipConfig, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        first, second, third, fourth, fifth = model.generator_widths
        norm_3d, norm_1d = (nn.BatchNorm3d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        self.seed_shape = (first, clip.frames // 6, clip.height // 8, clip.width // 8)
        flat = first * (clip.frames // 6) * (clip.height // 8) * (clip.width // 8)
        self.seed = normalised(linear(model.latent + 2 * model.image_code, flat), norm_1d, flat, nn.ReLU())

        def up(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
            layer = SameConvTranspose3d(inputs, outputs, kernel, stride)
            return normalised(layer, norm_3d, outputs, activation())

        self.layers = nn.Sequential(
            up(first, second, (1, 2, 2), (1, 1, 1)),
            up(second, third, (3, 2, 2), (3, 2, 2)),
            up(third, fourth, (3, 2, 2), (1, 2, 2)),
            up(fourth, fifth, (3, 4, 4), (1, 2, 2)),
            SameConvTranspose3d(fifth, 3, (2, 4, 4), (2, 1, 1)),
            nn.Sigmoid(),
        )

    def forward(self, latent: Noise, start_code: Tensor, end_code: Tensor) -> ClipFloats:
        seed = self.seed(torch.cat([latent, start_code, end_code], dim=1))
        return self.layers(seed.view(-1, *self.seed_shape))


class Autoencoder(nn.Module):
    """What both CVAEs have in common. Training sees the clip (`forward`); making one needs only its ends (`generate`).

    A subclass has a `generator`, and says in `_made` what it is given.
    """

    generator: nn.Module

    def __init__(self, model: Encoders, clip: ClipConfig):
        super().__init__()
        self.image_encoder = ImageEncoder(model, clip, model.image_batch_statistics)
        self.video_encoder = VideoEncoder(model, clip)

    def forward(self, clip: ClipFloats, noise: Noise) -> tuple[ClipFloats, Tensor, Tensor]:
        """Encodes `clip`, samples its latent with `noise` and makes it again.

        Returns (made, mean, std): ClipFloats and the parameters of q(latent), [batch, latent] each.
        """
        start, end = clip[:, :, 0], clip[:, :, -1]
        start_code, end_code = self.image_encoder(start), self.image_encoder(end)
        mean, std = self.video_encoder(clip, start_code, end_code)
        return self._made(mean + std * noise, start_code, end_code, start, end), mean, std

    def generate(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> ClipFloats:
        return self._made(noise, self.image_encoder(start), self.image_encoder(end), start, end)

    def _made(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        raise NotImplementedError


class CVAE(Autoencoder):
    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        # Time grows by 3 and 2 in the generator; height and width are halved four times in the video encoder.
        require_multiples(clip, model.kind, frames=6, height=16, width=16)
        super().__init__(model, clip)
        self.generator = Generator(model, clip)

    def _made(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        return self.generator(latent, start_code, end_code)
