"""The report's conditional VAE (its Table 1), every width configurable.

    start, end --ImageEncoder--> two image codes
    clip, codes --VideoEncoder--> mean, std of the latent        (training only)
    latent, codes --Generator--> made clip

The defaults of `CVAEConfig` are Table 1 with the batch norm of the authors' code: 485,486,299 parameters at
30x64x64. Layers are convolution -> batch norm -> activation; the first convolution of an encoder and every output
layer have no batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import ClipConfig, ConfigError, CVAEConfig
from giffy_ray.models.blocks import SameConvTranspose3d, conv2d, conv3d, leaky_relu, linear, normalised
from giffy_ray.shapes import ClipFloats, ImageFloats, Noise

# Halvings of height and width in the video encoder; doublings of time in the generator are 3 and 2.
_SPATIAL_MULTIPLE, _TIME_MULTIPLE = 16, 6
_STD_FLOOR = 1e-6


class ImageEncoder(nn.Module):
    """ImageFloats -> [batch, image_code]."""

    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        super().__init__()
        first, second, third, fourth = model.image_widths
        norm_2d, norm_1d = (nn.BatchNorm2d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        self.features = nn.Sequential(
            normalised(conv2d(3, first, 4, 2), None, first, leaky_relu()),
            normalised(conv2d(first, second, 3, 1), norm_2d, second, leaky_relu()),
            normalised(conv2d(second, third, 4, 2), norm_2d, third, leaky_relu()),
            normalised(conv2d(third, fourth, 3, 1), norm_2d, fourth, leaky_relu()),
        )
        flat = fourth * (clip.height // 4) * (clip.width // 4)
        self.hidden = normalised(linear(flat, model.image_hidden), norm_1d, model.image_hidden, leaky_relu())
        self.code = linear(model.image_hidden, model.image_code)

    def forward(self, image: ImageFloats) -> Tensor:
        return self.code(self.hidden(self.features(image).flatten(1)))


class VideoEncoder(nn.Module):
    """ClipFloats and both image codes -> mean and standard deviation of q(latent), each [batch, latent]."""

    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        super().__init__()
        norm_3d, norm_1d = (nn.BatchNorm3d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        layers, inputs = [], 3
        for width in model.video_widths:
            norm = norm_3d if layers else None
            layers.append(normalised(conv3d(inputs, width, (3, 4, 4), (1, 2, 2)), norm, width, leaky_relu()))
            inputs = width
        self.features = nn.Sequential(*layers)
        flat = inputs * clip.frames * (clip.height // 16) * (clip.width // 16)
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
    """Latent and both image codes -> ClipFloats."""

    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        super().__init__()
        first, second, third, fourth, fifth = model.generator_widths
        norm_3d, norm_1d = (nn.BatchNorm3d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        self.seed_shape = (first, clip.frames // 6, clip.height // 8, clip.width // 8)
        flat = first * (clip.frames // 6) * (clip.height // 8) * (clip.width // 8)
        self.seed = normalised(linear(model.latent + 2 * model.image_code, flat), norm_1d, flat, nn.ReLU())

        def up(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
            layer = SameConvTranspose3d(inputs, outputs, kernel, stride)
            return normalised(layer, norm_3d, outputs, nn.ReLU())

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


class CVAE(nn.Module):
    """Training sees the clip (`forward`); making one needs only its two ends (`generate`)."""

    def __init__(self, model: CVAEConfig, clip: ClipConfig):
        super().__init__()
        for name, size, multiple in (
            ("frames", clip.frames, _TIME_MULTIPLE),
            ("height", clip.height, _SPATIAL_MULTIPLE),
            ("width", clip.width, _SPATIAL_MULTIPLE),
        ):
            if size % multiple:
                raise ConfigError(f"clip.{name}: the cvae needs a multiple of {multiple} (value {size})")
        self.image_encoder = ImageEncoder(model, clip)
        self.video_encoder = VideoEncoder(model, clip)
        self.generator = Generator(model, clip)

    def forward(self, clip: ClipFloats, noise: Noise) -> tuple[ClipFloats, Tensor, Tensor]:
        """Encodes `clip`, samples its latent with `noise` and makes it again.

        Returns (made, mean, std): ClipFloats and the parameters of q(latent), [batch, latent] each.
        """
        start_code, end_code = self.image_encoder(clip[:, :, 0]), self.image_encoder(clip[:, :, -1])
        mean, std = self.video_encoder(clip, start_code, end_code)
        return self.generator(mean + std * noise, start_code, end_code), mean, std

    def generate(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> ClipFloats:
        return self.generator(noise, self.image_encoder(start), self.image_encoder(end))
