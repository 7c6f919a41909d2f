"""Direct 3D in-betweening GAN: Li, Roblek, Tagliasacchi 2019 (arXiv 1905.10240).

    start, end --ImageEncoder--> codes at an eighth of the size
    noise, codes --latent generator--> latent video of `frames` steps --video generator--> generated clip
    clip --VideoDiscriminator--> logit;  single frames of it --ImageDiscriminator--> logit

To our knowledge, these follow the publication: the three parts of the generator, codes and noise gated into every
residual block, a temporal length that doubles, batch norm in the generator, and spectral norm in both discriminators.
Widths and kernels of the encoder, the video generator and the discriminators follow an unofficial re-implementation.
The publication leaves open, and we chose:
    - Gates: a softmax over start, end and noise for each block, channel and time step, initially uniform.
    - Lengths: an eighth, a quarter, half and all of the frames, rounded up, reached by repeating steps. 16 frames give
      2, 4, 8, 16 as in the publication, and 30 give 4, 8, 15, 30. `latent_blocks` are spread evenly over the four.
    - Blocks: 8, each with two 3x3x3 convolutions after batch norm and ReLU. The publication has more.
    - Ends: all frames are generated, including both ends, which the frame loss ties to the given images.
    - Image discriminator: it sees 8 evenly spaced frames including the ends, so it involves no randomness.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from giffy_ray.config import ClipConfig, ConfigError, Direct3DConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, PerClip
from giffy_ray.models.layers import (
    SameConvTranspose3d,
    add_norm_activation,
    conv2d,
    conv3d,
    leaky_relu,
    linear,
    require_multiples,
)

_LENGTH_COUNT = 4  # temporal lengths of the latent video
_IMAGE_DISCRIMINATOR_FRAMES = 8
_CUBE = (3, 3, 3)  # kernel
_UNIT = (1, 1, 1)  # kernel or stride


class ImageEncoder(nn.Module):
    """Maps ImageFloats to codes, [batch, image_widths[-1], height / 8, width / 8]."""

    def __init__(self, model: Direct3DConfig):
        super().__init__()
        *widths, code = model.image_widths
        layers, inputs = [], 3
        for width in widths:
            layers.append(add_norm_activation(conv2d(inputs, width, 4, 2), nn.BatchNorm2d, width, nn.ReLU()))
            layers.append(add_norm_activation(conv2d(width, width, 3, 1), nn.BatchNorm2d, width, nn.ReLU()))
            inputs = width
        self.layers = nn.Sequential(*layers, conv2d(inputs, code, 3, 1))

    def forward(self, image: ImageFloats) -> Tensor:
        return self.layers(2 * image - 1)


class Gate(nn.Module):
    """alpha_s * start + alpha_e * end + (1 - alpha_s - alpha_e) * noise, over `length` time steps.

    Maps codes and noise, [batch, channels, height, width] each, to [batch, channels, length, height, width].
    """

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3, channels, length))

    def forward(self, start_code: Tensor, end_code: Tensor, noise_map: Tensor) -> Tensor:
        parts = torch.stack([start_code, end_code, noise_map])
        return torch.einsum("sct,sbchw->bcthw", self.logits.softmax(0), parts)


class LatentBlock(nn.Module):
    """Resizes the latent video to `length` steps, adds the gated codes and noise, and applies a residual block."""

    def __init__(self, code: int, width: int, length: int):
        super().__init__()
        self.length = length
        self.gate = Gate(code, length)
        self.injected = conv3d(code, width, _UNIT, _UNIT)
        self.residual = nn.Sequential(
            *(nn.BatchNorm3d(width), nn.ReLU(), conv3d(width, width, _CUBE, _UNIT)),
            *(nn.BatchNorm3d(width), nn.ReLU(), conv3d(width, width, _CUBE, _UNIT)),
        )

    def forward(self, latent: Tensor | None, start_code: Tensor, end_code: Tensor, noise_map: Tensor) -> Tensor:
        injected = self.injected(self.gate(start_code, end_code, noise_map))
        if latent is not None:
            injected = injected + functional.interpolate(latent, size=injected.shape[2:])
        return injected + self.residual(injected)


class Direct3DGenerator(nn.Module):
    """Image encoder, latent generator and video generator."""

    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        require_multiples(clip, model.kind, height=8, width=8)
        if model.latent_blocks % _LENGTH_COUNT:
            raise ConfigError(
                f"model.latent_blocks: {model.kind} needs a multiple of {_LENGTH_COUNT} (value {model.latent_blocks})"
            )
        code, width = model.image_widths[-1], model.latent_width
        self.image_encoder = ImageEncoder(model)
        self.map_shape = (code, clip.height // 8, clip.width // 8)
        self.noise_map = linear(model.latent, code * (clip.height // 8) * (clip.width // 8))
        blocks_per_length = model.latent_blocks // _LENGTH_COUNT
        self.latent_generator = nn.ModuleList(
            LatentBlock(code, width, length) for length in latent_lengths(clip.frames) for _ in range(blocks_per_length)
        )
        self.video_generator = _build_video_generator(width, model.generator_widths)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """Returns generated clips and their penalty, which is always 0."""
        start_code, end_code = self.image_encoder(start), self.image_encoder(end)
        noise_map = self.noise_map(noise).view(-1, *self.map_shape)
        latent = None
        for block in self.latent_generator:
            latent = block(latent, start_code, end_code, noise_map)
        generated = self.video_generator(latent)
        return generated, generated.new_zeros(len(generated))


class VideoDiscriminator(nn.Module):
    """Sees the whole clip but no end images: convolutions that halve height and width, and a linear layer."""

    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        halvings = _check_discriminator_size(model, clip)
        layers, inputs = [], 3
        for width in model.discriminator_widths:
            layers += [spectral_norm(nn.Conv3d(inputs, width, 4, (1, 2, 2), padding=1)), leaky_relu()]
            inputs = width
        # A kernel of 4 with padding 1 removes one time step per layer.
        flat = inputs * (clip.frames - halvings) * (clip.height // 2**halvings) * (clip.width // 2**halvings)
        self.layers = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(flat, 1)))

    def forward(self, target: ClipFloats, generated: ClipFloats) -> tuple[PerClip, PerClip]:
        """Returns the logits of both."""
        return self.layers(2 * target - 1).squeeze(1), self.layers(2 * generated - 1).squeeze(1)


class ImageBlock(nn.Module):
    """Residual block that halves height and width: two convolutions plus a 1x1 shortcut, both averaged over 2x2."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = nn.Sequential(
            *(spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), leaky_relu()),
            *(spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1)), nn.AvgPool2d(2)),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), spectral_norm(nn.Conv2d(inputs, outputs, 1)))

    def forward(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(self.residual(features) + self.shortcut(features), 0.2)


class ImageDiscriminator(nn.Module):
    """Classifies single frames; a clip's logit is the mean over its frames."""

    judged: Tensor

    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        _check_discriminator_size(model, clip)
        # A buffer, because a list of indices would be copied to the GPU, synchronously, in every step.
        self.register_buffer("judged", torch.tensor(scored_frame_indices(clip.frames)), persistent=False)
        widths = (3, *model.discriminator_widths)
        self.blocks = nn.Sequential(*(ImageBlock(*pair) for pair in pairwise(widths)))
        self.logit = spectral_norm(nn.Linear(widths[-1], 1))

    def forward(self, target: ClipFloats, generated: ClipFloats) -> tuple[PerClip, PerClip]:
        """Returns the logits of both."""
        return self._compute_logits(target), self._compute_logits(generated)

    def _compute_logits(self, clips: ClipFloats) -> Tensor:
        frames = 2 * clips.index_select(2, self.judged).transpose(1, 2) - 1
        features = self.blocks(frames.flatten(0, 1)).mean((2, 3))
        return self.logit(features).view(len(clips), -1).mean(1)


def latent_lengths(frames: int) -> list[int]:
    """Temporal lengths of the latent video up to `frames`; each is half of the next, rounded up."""
    return [-(-frames // 2**halvings) for halvings in reversed(range(_LENGTH_COUNT))]


def scored_frame_indices(frames: int) -> list[int]:
    """Frames that the image discriminator sees: 8 evenly spaced ones from first to last, or all of a shorter clip."""
    count = min(_IMAGE_DISCRIMINATOR_FRAMES, frames)
    return [round(step * (frames - 1) / (count - 1)) for step in range(count)]


def _build_video_generator(inputs: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """Builds layers from [batch, inputs, time, height / 8, width / 8] to ClipFloats; they keep the temporal length."""
    layers = []
    upsampling = ((3, 4, 4), (1, 2, 2))  # kernel, stride
    for width in widths:
        kernel, stride = upsampling if layers else (_CUBE, _UNIT)
        for layer in (
            SameConvTranspose3d(inputs, width, kernel, stride),
            SameConvTranspose3d(width, width, _CUBE, _UNIT),
        ):
            layers.append(add_norm_activation(layer, nn.BatchNorm3d, width, nn.ReLU()))
        inputs = width
    return nn.Sequential(*layers, SameConvTranspose3d(inputs, 3, *upsampling), nn.Sigmoid())


def _check_discriminator_size(model: Direct3DConfig, clip: ClipConfig) -> int:
    """Returns how often the discriminators halve height and width; raises ConfigError if the clip is too small."""
    halvings = len(model.discriminator_widths)
    require_multiples(clip, model.kind, height=2**halvings, width=2**halvings)
    if clip.frames <= halvings:
        raise ConfigError(f"clip.frames: {model.kind} needs at least {halvings + 1} frames (value {clip.frames})")
    return halvings
