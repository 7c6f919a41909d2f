"""The paper's conditional VAE (its Table 1), with configurable widths.

    start, end --ImageEncoder--> two image codes
    clip, codes --VideoEncoder--> mean, std of the latent        (training only)
    latent, codes --Generator--> generated clip

The defaults of `CVAEConfig` are Table 1 with the batch norm of the authors' code: 485,486,299 parameters at
30x64x64. Layers are convolution -> batch norm -> activation. The first convolution of an encoder and all output layers
have no batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import BaseCVAEConfig, CGANConfig, ClipConfig, CVAEConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise
from giffy_ray.models.layers import (
    BatchStatisticsNorm1d,
    BatchStatisticsNorm2d,
    SameConvTranspose3d,
    add_norm_activation,
    conv2d,
    conv3d,
    leaky_relu,
    linear,
    require_multiples,
)

_STD_FLOOR = 1e-6


class ImageEncoder(nn.Module):
    """Maps ImageFloats to codes, [batch, image_code].

    Args:
        model: Widths of the layers.
        clip: Size of the images.
        batch_statistics: Use batch statistics in eval mode, too, like the authors' code. A generated clip then depends
            on the other clips of its batch; a batch of one uses the running statistics.
        last_convolution: Include the fourth convolution.
    """

    def __init__(
        self,
        model: BaseCVAEConfig | CGANConfig,
        clip: ClipConfig,
        batch_statistics: bool = False,
        last_convolution: bool = True,
    ):
        super().__init__()
        first, second, third, fourth = model.image_widths
        norm_2d, norm_1d = None, None
        if model.batch_norm and batch_statistics:
            norm_2d, norm_1d = BatchStatisticsNorm2d, BatchStatisticsNorm1d
        elif model.batch_norm:
            norm_2d, norm_1d = nn.BatchNorm2d, nn.BatchNorm1d
        self.features = nn.Sequential(
            add_norm_activation(conv2d(3, first, 4, 2), None, first, leaky_relu()),
            add_norm_activation(conv2d(first, second, 3, 1), norm_2d, second, leaky_relu()),
            add_norm_activation(conv2d(second, third, 4, 2), norm_2d, third, leaky_relu()),
        )
        if last_convolution:
            self.features.append(add_norm_activation(conv2d(third, fourth, 3, 1), norm_2d, fourth, leaky_relu()))
        flat = (fourth if last_convolution else third) * (clip.height // 4) * (clip.width // 4)
        self.hidden = add_norm_activation(linear(flat, model.image_hidden), norm_1d, model.image_hidden, leaky_relu())
        self.code = linear(model.image_hidden, model.image_code)

    def forward(self, image: ImageFloats) -> Tensor:
        return self.code(self.hidden(self.features(image).flatten(1)))


def build_clip_features(widths: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """Builds convolutions from ClipFloats to `widths[-1]` channels; each layer halves height and width.

    The first layer has no batch norm.
    """
    layers, inputs = [], 3
    for width in widths:
        norm = nn.BatchNorm3d if batch_norm and layers else None
        layers.append(add_norm_activation(conv3d(inputs, width, (3, 4, 4), (1, 2, 2)), norm, width, leaky_relu()))
        inputs = width
    return nn.Sequential(*layers)


class VideoEncoder(nn.Module):
    """Maps ClipFloats and both image codes to mean and standard deviation of q(latent), [batch, latent] each."""

    def __init__(self, model: BaseCVAEConfig, clip: ClipConfig):
        super().__init__()
        norm_1d = nn.BatchNorm1d if model.batch_norm else None
        self.features = build_clip_features(model.video_widths, model.batch_norm)
        flat = model.video_widths[-1] * clip.frames * (clip.height // 16) * (clip.width // 16)
        self.hidden = add_norm_activation(
            linear(flat + 2 * model.image_code, model.video_hidden), norm_1d, model.video_hidden, leaky_relu()
        )
        self.distribution = linear(model.video_hidden, 2 * model.latent)

    def forward(self, clip: ClipFloats, start_code: Tensor, end_code: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(clip).flatten(1)
        hidden = self.hidden(torch.cat([features, start_code, end_code], dim=1))
        mean, raw_std = self.distribution(hidden).chunk(2, dim=1)
        return mean, functional.softplus(raw_std) + _STD_FLOOR


class Generator(nn.Module):
    """Maps the latent and both image codes to ClipFloats. `activation` follows each hidden deconvolution."""

    def __init__(self, model: CVAEConfig | CGANConfig, clip: ClipConfig, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        first, second, third, fourth, fifth = model.generator_widths
        norm_3d, norm_1d = (nn.BatchNorm3d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        self.seed_shape = (first, clip.frames // 6, clip.height // 8, clip.width // 8)
        flat = first * (clip.frames // 6) * (clip.height // 8) * (clip.width // 8)
        self.seed = add_norm_activation(linear(model.latent + 2 * model.image_code, flat), norm_1d, flat, nn.ReLU())

        def up(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
            layer = SameConvTranspose3d(inputs, outputs, kernel, stride)
            return add_norm_activation(layer, norm_3d, outputs, activation())

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
    """Base class of both CVAEs. Training encodes whole clips (`forward`); `generate` needs only the end images.

    A subclass sets `generator` and calls it in `_decode`.
    """

    generator: nn.Module

    def __init__(self, model: BaseCVAEConfig, clip: ClipConfig):
        super().__init__()
        self.image_encoder = ImageEncoder(model, clip, model.image_batch_statistics)
        self.video_encoder = VideoEncoder(model, clip)

    def forward(self, clip: ClipFloats, noise: Noise) -> tuple[ClipFloats, Tensor, Tensor]:
        """Reconstructs `clip` from a latent sampled with `noise`.

        Returns:
            The reconstruction, and mean and standard deviation of q(latent), [batch, latent] each.
        """
        start, end = clip[:, :, 0], clip[:, :, -1]
        start_code, end_code = self.image_encoder(start), self.image_encoder(end)
        mean, std = self.video_encoder(clip, start_code, end_code)
        return self._decode(mean + std * noise, start_code, end_code, start, end), mean, std

    def generate(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> ClipFloats:
        """Generates clips from their end images; `noise` is the latent, and noise 0 is the prior's mean."""
        return self._decode(noise, self.image_encoder(start), self.image_encoder(end), start, end)

    def _decode(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        raise NotImplementedError


class CVAE(Autoencoder):
    """The paper's CVAE."""

    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        # The generator upsamples time by 3 and 2; the video encoder halves height and width four times.
        require_multiples(clip, model.kind, frames=6, height=16, width=16)
        super().__init__(model, clip)
        self.generator = Generator(model, clip)

    def _decode(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        return self.generator(latent, start_code, end_code)
