"""Conditional two-stream GAN: a moving foreground in front of a still background.

Vondrick, Pirsiavash, Torralba 2016 (arXiv 1609.02612).

    start, end (, noise) --image encoder--> code
    code --video stream--> foreground, mask;  code --static stream--> background
    generated = mask * foreground + (1 - mask) * background

Layers and initialisation follow the authors' conditional code, github.com/cvondrick/videogan. Differences:
    - The image encoder takes both end images as 6 channels; theirs takes the first frame only.
    - As in their code, the streams generate 16 frames per time step of the seed, which is 32 for 30 frames. The middle
      frames are kept.
    - Images and clips are in 0..1 at the interface and in -1..1 inside, as theirs; the output of tanh is rescaled.
    - The discriminator ends in one logit, the difference of their two class scores. For 30 frames, its last kernel
      spans one time step instead of two.
    - `latent` values of noise can join the code as constant planes. The default is none, as in their code.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from giffy_ray.config import ClipConfig, ConfigError, TwoStreamConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, PerClip
from giffy_ray.models.layers import add_norm_activation, leaky_relu, require_multiples

_HALVINGS = 4
_MIN_FRAMES = 2**_HALVINGS  # leaves one time step for the discriminator's last layer
_HALF = (4, 2, 1)  # kernel, stride, padding of every layer that halves or doubles the size


class TwoStreamGenerator(nn.Module):
    """Image encoder, video stream with mask, and static stream."""

    def __init__(self, model: TwoStreamConfig, clip: ClipConfig):
        super().__init__()
        _check_clip_size(clip, model.kind)
        self.frames = clip.frames
        self.mask_weight = model.mask_weight
        fine, *_, coarse = model.widths
        code_channels = coarse + model.latent
        down = [nn.Conv2d(6, fine, *_HALF), nn.ReLU()]
        for inputs, outputs in pairwise(model.widths):
            layer = nn.Conv2d(inputs, outputs, *_HALF)
            down.append(add_norm_activation(layer, nn.BatchNorm2d, outputs, nn.ReLU()))
        self.image_encoder = nn.Sequential(*down)

        seed_steps = -(-clip.frames // 2**_HALVINGS)
        seed = nn.ConvTranspose3d(code_channels, coarse, (seed_steps, 1, 1))
        video = [add_norm_activation(seed, nn.BatchNorm3d, coarse, nn.ReLU())]
        still = []
        inputs = coarse
        for outputs in reversed(model.widths[:-1]):
            video_layer = nn.ConvTranspose3d(inputs, outputs, *_HALF)
            video.append(add_norm_activation(video_layer, nn.BatchNorm3d, outputs, nn.ReLU()))
            still_layer = nn.ConvTranspose2d(inputs if still else code_channels, outputs, *_HALF)
            still.append(add_norm_activation(still_layer, nn.BatchNorm2d, outputs, nn.ReLU()))
            inputs = outputs
        self.video_stream = nn.Sequential(*video)
        self.foreground = nn.Sequential(nn.ConvTranspose3d(fine, 3, *_HALF), nn.Tanh())
        self.mask = nn.Sequential(nn.ConvTranspose3d(fine, 1, *_HALF), nn.Sigmoid())
        self.static_stream = nn.Sequential(*still, nn.ConvTranspose2d(fine, 3, *_HALF), nn.Tanh())
        self.apply(_initialise)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """Returns generated clips and their penalty: `mask_weight` times the mean of the clip's mask."""
        foreground, mask, background = self.streams(start, end, noise)
        generated = mask * foreground + (1 - mask) * background
        return generated, self.mask_weight * mask.flatten(1).mean(1)

    def streams(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, Tensor, Tensor]:
        """Computes the streams that `forward` blends, all in 0..1.

        Returns:
            Foreground, mask [batch, 1, time, height, width] and background [batch, 3, 1, height, width].
        """
        code = self.image_encoder(2 * torch.cat([start, end], dim=1) - 1)
        code = torch.cat([code, noise[:, :, None, None].expand(-1, -1, *code.shape[2:])], dim=1)
        features = self.video_stream(code[:, :, None])
        foreground = self._crop_time(self.foreground(features))
        mask = self._crop_time(self.mask(features))
        background = self.static_stream(code)[:, :, None]
        return (foreground + 1) / 2, mask, (background + 1) / 2

    def _crop_time(self, clip: Tensor) -> Tensor:
        """Keeps the middle `frames` of the generated time steps."""
        return clip.narrow(2, (clip.shape[2] - self.frames) // 2, self.frames)


class TwoStreamDiscriminator(nn.Module):
    """Sees only the clip. The widths are the generator's, twice those of the authors' unconditional discriminator."""

    def __init__(self, model: TwoStreamConfig, clip: ClipConfig):
        super().__init__()
        _check_clip_size(clip, model.kind)
        layers = [nn.Conv3d(3, model.widths[0], *_HALF), leaky_relu()]
        for inputs, outputs in pairwise(model.widths):
            norm = nn.BatchNorm3d(outputs, eps=1e-3)
            layers += [nn.Conv3d(inputs, outputs, *_HALF), norm, leaky_relu()]
        last_kernel = (clip.frames // 2**_HALVINGS, clip.height // 2**_HALVINGS, clip.width // 2**_HALVINGS)
        self.layers = nn.Sequential(*layers, nn.Conv3d(model.widths[-1], 1, last_kernel))
        self.apply(_initialise)

    def forward(self, target: ClipFloats, generated: ClipFloats) -> tuple[PerClip, PerClip]:
        """Returns the logits of both; batch norm treats them as separate batches."""
        return self.layers(2 * target - 1).flatten(), self.layers(2 * generated - 1).flatten()


def _check_clip_size(clip: ClipConfig, kind: str) -> None:
    require_multiples(clip, kind, height=2**_HALVINGS, width=2**_HALVINGS)
    if clip.frames < _MIN_FRAMES:
        raise ConfigError(f"clip.frames: {kind} needs at least {_MIN_FRAMES} frames (value {clip.frames})")


def _initialise(module: nn.Module) -> None:
    """The authors' initialisation: weights N(0, 0.01), those of batch norm N(1, 0.02), biases 0."""
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    assert module.bias is not None
    nn.init.zeros_(module.bias)
