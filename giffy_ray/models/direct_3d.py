"""Li, Roblek, Tagliasacchi 2019 (arXiv 1905.10240): in-betweening with direct 3D convolutions.

    start, end --ImageEncoder--> codes at an eighth of the size
    noise, codes --LatentGenerator--> latent video of `frames` steps --video generator--> made clip
    clip --VideoDiscriminator--> logit;  single frames of it --ImageDiscriminator--> logit

As the paper has it, to our knowledge: the three parts of the generator, codes and noise gated into every residual
block, a temporal length that doubles, batch norm in the generator and spectral norm in both discriminators. The widths
and kernels of the encoder, the video generator and the discriminators are those of an unofficial re-implementation.
Not known, and chosen:
    - gates: a softmax over start, end and noise for each block, channel and time step, even at first
    - lengths: an eighth, a quarter, half and all of the frames, rounded up (16: 2, 4, 8, 16 as in the paper; 30: 4, 8,
      15, 30), reached by repeating steps; `latent_blocks` are spread evenly over the four
    - 8 blocks of two 3x3x3 convolutions, batch norm and ReLU before each (the paper's are more)
    - all frames are made, the two ends too, which the frame loss holds to what was given
    - the image discriminator sees 8 evenly spaced frames, the ends among them, so that nothing in it is random
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
    conv2d,
    conv3d,
    leaky_relu,
    linear,
    normalised,
    require_multiples,
)

_LENGTHS = 4
_JUDGED_FRAMES = 8
_CUBE, _EACH = (3, 3, 3), (1, 1, 1)


class ImageEncoder(nn.Module):
    """ImageFloats -> [batch, the last of `image_widths`, height / 8, width / 8]."""

    def __init__(self, model: Direct3DConfig):
        super().__init__()
        *widths, code = model.image_widths
        layers, inputs = [], 3
        for width in widths:
            layers.append(normalised(conv2d(inputs, width, 4, 2), nn.BatchNorm2d, width, nn.ReLU()))
            layers.append(normalised(conv2d(width, width, 3, 1), nn.BatchNorm2d, width, nn.ReLU()))
            inputs = width
        self.layers = nn.Sequential(*layers, conv2d(inputs, code, 3, 1))

    def forward(self, image: ImageFloats) -> Tensor:
        return self.layers(2 * image - 1)


class Gate(nn.Module):
    """alpha_s * start + alpha_e * end + (1 - alpha_s - alpha_e) * noise, over `length` time steps.

    Codes and noise are [batch, channels, height, width]; out comes [batch, channels, length, height, width].
    """

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3, channels, length))

    def forward(self, start_code: Tensor, end_code: Tensor, noise_map: Tensor) -> Tensor:
        parts = torch.stack([start_code, end_code, noise_map])
        return torch.einsum("sct,sbchw->bcthw", self.logits.softmax(0), parts)


class LatentBlock(nn.Module):
    """Brings the latent video to `length` steps, adds what its gate lets in, then two convolutions with a skip."""

    def __init__(self, code: int, width: int, length: int):
        super().__init__()
        self.length = length
        self.gate = Gate(code, length)
        self.injected = conv3d(code, width, _EACH, _EACH)
        self.residual = nn.Sequential(
            *(nn.BatchNorm3d(width), nn.ReLU(), conv3d(width, width, _CUBE, _EACH)),
            *(nn.BatchNorm3d(width), nn.ReLU(), conv3d(width, width, _CUBE, _EACH)),
        )

    def forward(self, latent: Tensor | None, start_code: Tensor, end_code: Tensor, noise_map: Tensor) -> Tensor:
        injected = self.injected(self.gate(start_code, end_code, noise_map))
        if latent is not None:
            injected = injected + functional.interpolate(latent, size=injected.shape[2:])
        return injected + self.residual(injected)


class Direct3DGenerator(nn.Module):
    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        require_multiples(clip, model.kind, height=8, width=8)
        if model.latent_blocks % _LENGTHS:
            raise ConfigError(
                f"model.latent_blocks: {model.kind} needs a multiple of {_LENGTHS} (value {model.latent_blocks})"
            )
        code, width = model.image_widths[-1], model.latent_width
        self.image_encoder = ImageEncoder(model)
        self.map_shape = (code, clip.height // 8, clip.width // 8)
        self.noise_map = linear(model.latent, code * (clip.height // 8) * (clip.width // 8))
        each = model.latent_blocks // _LENGTHS
        self.latent_generator = nn.ModuleList(
            LatentBlock(code, width, length) for length in lengths(clip.frames) for _ in range(each)
        )
        self.video_generator = _video_generator(width, model.generator_widths)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """(made, what the output costs by itself: nothing)."""
        start_code, end_code = self.image_encoder(start), self.image_encoder(end)
        noise_map = self.noise_map(noise).view(-1, *self.map_shape)
        latent = None
        for block in self.latent_generator:
            latent = block(latent, start_code, end_code, noise_map)
        made = self.video_generator(latent)
        return made, made.new_zeros(len(made))


class VideoDiscriminator(nn.Module):
    """Sees the whole clip, and no image besides: four convolutions that halve height and width, and a linear layer."""

    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        halvings = _refuse_sizes_of_discriminators(model, clip)
        layers, inputs = [], 3
        for width in model.discriminator_widths:
            layers += [spectral_norm(nn.Conv3d(inputs, width, 4, (1, 2, 2), padding=1)), leaky_relu()]
            inputs = width
        # A kernel of 4 with padding 1 takes a time step off at each layer.
        flat = inputs * (clip.frames - halvings) * (clip.height // 2**halvings) * (clip.width // 2**halvings)
        self.layers = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(flat, 1)))

    def forward(self, real: ClipFloats, made: ClipFloats) -> tuple[PerClip, PerClip]:
        """Logits of being real."""
        return self.layers(2 * real - 1).squeeze(1), self.layers(2 * made - 1).squeeze(1)


class ImageBlock(nn.Module):
    """Halves height and width: two convolutions, beside them a shortcut of 1x1; both averaged over 2x2."""

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
    """Judges single frames; a clip's logit is the mean of theirs."""

    judged: Tensor

    def __init__(self, model: Direct3DConfig, clip: ClipConfig):
        super().__init__()
        _refuse_sizes_of_discriminators(model, clip)
        # A buffer, for a list of indices would be copied to the GPU at each step, which waits for it.
        self.register_buffer("judged", torch.tensor(judged_frames(clip.frames)), persistent=False)
        widths = (3, *model.discriminator_widths)
        self.blocks = nn.Sequential(*(ImageBlock(*pair) for pair in pairwise(widths)))
        self.logit = spectral_norm(nn.Linear(widths[-1], 1))

    def forward(self, real: ClipFloats, made: ClipFloats) -> tuple[PerClip, PerClip]:
        """Logits of being real."""
        return self._judged(real), self._judged(made)

    def _judged(self, clips: ClipFloats) -> Tensor:
        frames = 2 * clips.index_select(2, self.judged).transpose(1, 2) - 1
        features = self.blocks(frames.flatten(0, 1)).mean((2, 3))
        return self.logit(features).view(len(clips), -1).mean(1)


def lengths(frames: int) -> list[int]:
    """Of the latent video on its way to `frames`: each is half of the next, rounded up."""
    return [-(-frames // 2**halvings) for halvings in reversed(range(_LENGTHS))]


def judged_frames(frames: int) -> list[int]:
    """Evenly spaced from the first to the last; all of a clip that has no more than there are to be judged."""
    count = min(_JUDGED_FRAMES, frames)
    return [round(place * (frames - 1) / (count - 1)) for place in range(count)]


def _video_generator(inputs: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """[batch, inputs, time, height / 8, width / 8] -> ClipFloats. Time stays as long as it is."""
    layers, double = [], ((3, 4, 4), (1, 2, 2))
    for width in widths:
        kernel, stride = double if layers else (_CUBE, _EACH)
        for layer in (
            SameConvTranspose3d(inputs, width, kernel, stride),
            SameConvTranspose3d(width, width, _CUBE, _EACH),
        ):
            layers.append(normalised(layer, nn.BatchNorm3d, width, nn.ReLU()))
        inputs = width
    return nn.Sequential(*layers, SameConvTranspose3d(inputs, 3, *double), nn.Sigmoid())


def _refuse_sizes_of_discriminators(model: Direct3DConfig, clip: ClipConfig) -> int:
    """How often they halve height and width; raises ConfigError for a clip with which they cannot."""
    halvings = len(model.discriminator_widths)
    require_multiples(clip, model.kind, height=2**halvings, width=2**halvings)
    if clip.frames <= halvings:
        raise ConfigError(f"clip.frames: {model.kind} needs at least {halvings + 1} (value {clip.frames})")
    return halvings
