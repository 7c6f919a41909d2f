"""Vondrick, Pirsiavash, Torralba 2016 (arXiv 1609.02612), conditional: a moving foreground before a still background.

    start, end (, noise) --image encoder--> code
    code --video stream--> foreground, mask;  code --static stream--> background
    made = mask * foreground + (1 - mask) * background

Layers and initial values are those of the authors' conditional code, github.com/cvondrick/videogan. What differs:
    - the image encoder takes both end images as 6 channels: theirs has the first frame alone to go on
    - as theirs, the streams make 16 frames for each time step of the seed, 32 for 30: the middle ones are kept
    - images and clips are in 0..1 outside; inside, -1..1 as theirs, and tanh's -1..1 is brought back to 0..1
    - the discriminator ends in one logit instead of two classes, whose difference it is; for 30 frames its last kernel
      has one time step to see rather than two
    - `latent` values of noise may join the code as constant planes; theirs, and the default, has none
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from giffy_ray.config import ClipConfig, ConfigError, TwoStreamConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, PerClip
from giffy_ray.models.layers import leaky_relu, normalised, require_multiples

_HALVINGS = 4
_LEAST_FRAMES = 2**_HALVINGS  # with fewer, nothing is left of time for the discriminator's last layer
_HALF = (4, 2, 1)  # kernel, stride, padding of every layer that halves or doubles


class TwoStreamGenerator(nn.Module):
    def __init__(self, model: TwoStreamConfig, clip: ClipConfig):
        super().__init__()
        _refuse_other_sizes(clip, model.kind)
        self.frames, self.mask_weight = clip.frames, model.mask_weight
        fine, *_, coarse = model.widths
        code = coarse + model.latent
        down = [nn.Conv2d(6, fine, *_HALF), nn.ReLU()]
        for inputs, outputs in pairwise(model.widths):
            down.append(normalised(nn.Conv2d(inputs, outputs, *_HALF), nn.BatchNorm2d, outputs, nn.ReLU()))
        self.image_encoder = nn.Sequential(*down)

        steps = -(-clip.frames // 2**_HALVINGS)  # time steps of the seed
        seed = nn.ConvTranspose3d(code, coarse, (steps, 1, 1))
        video, still, inputs = [normalised(seed, nn.BatchNorm3d, coarse, nn.ReLU())], [], coarse
        for outputs in reversed(model.widths[:-1]):
            video.append(normalised(nn.ConvTranspose3d(inputs, outputs, *_HALF), nn.BatchNorm3d, outputs, nn.ReLU()))
            wide = inputs if still else code
            still.append(normalised(nn.ConvTranspose2d(wide, outputs, *_HALF), nn.BatchNorm2d, outputs, nn.ReLU()))
            inputs = outputs
        self.video_stream = nn.Sequential(*video)
        self.foreground = nn.Sequential(nn.ConvTranspose3d(fine, 3, *_HALF), nn.Tanh())
        self.mask = nn.Sequential(nn.ConvTranspose3d(fine, 1, *_HALF), nn.Sigmoid())
        self.static_stream = nn.Sequential(*still, nn.ConvTranspose2d(fine, 3, *_HALF), nn.Tanh())
        self.apply(_initialise)

    def forward(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, PerClip]:
        """(made, `mask_weight` times the mean of each clip's mask over the frames that are kept)."""
        foreground, mask, background = self.streams(start, end, noise)
        made = mask * foreground + (1 - mask) * background
        return made, self.mask_weight * mask.flatten(1).mean(1)

    def streams(self, start: ImageFloats, end: ImageFloats, noise: Noise) -> tuple[ClipFloats, Tensor, Tensor]:
        """Foreground, mask [batch, 1, time, height, width] and background [batch, 3, 1, height, width], all 0..1."""
        code = self.image_encoder(2 * torch.cat([start, end], dim=1) - 1)
        code = torch.cat([code, noise[:, :, None, None].expand(-1, -1, *code.shape[2:])], dim=1)
        features = self.video_stream(code[:, :, None])
        foreground, mask = self._kept(self.foreground(features)), self._kept(self.mask(features))
        background = self.static_stream(code)[:, :, None]
        return (foreground + 1) / 2, mask, (background + 1) / 2

    def _kept(self, clip: Tensor) -> Tensor:
        return clip.narrow(2, (clip.shape[2] - self.frames) // 2, self.frames)


class TwoStreamDiscriminator(nn.Module):
    """Sees the clip alone. Its widths are the generator's, twice those of their unconditional discriminator."""

    def __init__(self, model: TwoStreamConfig, clip: ClipConfig):
        super().__init__()
        _refuse_other_sizes(clip, model.kind)
        layers = [nn.Conv3d(3, model.widths[0], *_HALF), leaky_relu()]
        for inputs, outputs in pairwise(model.widths):
            norm = nn.BatchNorm3d(outputs, eps=1e-3)
            layers += [nn.Conv3d(inputs, outputs, *_HALF), norm, leaky_relu()]
        left = (clip.frames // 2**_HALVINGS, clip.height // 2**_HALVINGS, clip.width // 2**_HALVINGS)
        self.layers = nn.Sequential(*layers, nn.Conv3d(model.widths[-1], 1, left))
        self.apply(_initialise)

    def forward(self, real: ClipFloats, made: ClipFloats) -> tuple[PerClip, PerClip]:
        """Logits of being real. Each of the two is a batch of its own to batch norm."""
        return self.layers(2 * real - 1).flatten(), self.layers(2 * made - 1).flatten()


def _refuse_other_sizes(clip: ClipConfig, kind: str) -> None:
    require_multiples(clip, kind, height=2**_HALVINGS, width=2**_HALVINGS)
    if clip.frames < _LEAST_FRAMES:
        raise ConfigError(f"clip.frames: {kind} needs at least {_LEAST_FRAMES} (value {clip.frames})")


def _initialise(module: nn.Module) -> None:
    """Theirs: weights N(0, 0.01), batch norm's N(1, 0.02), biases 0."""
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    assert module.bias is not None
    nn.init.zeros_(module.bias)
