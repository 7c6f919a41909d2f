"""Conditional discriminator of `between`: separates target from generated frames, given both end images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import spectral_norm

from giffy_ray.config import BetweenConfig, ClipConfig
from giffy_ray.core.tensor_types import ClipFloats, PerClip
from giffy_ray.models.layers import leaky_relu

AUGMENT_DRAWS = 7  # random numbers per clip
# Generated and target frames differ by a few grey levels. With spectral norm, the logits would differ as little.
_INPUT_GAIN = 30.0
_LOGIT_GAIN = 10.0
_MAX_SHIFT = 1 / 8  # largest translation, as a fraction of the size
_CUTOUT_SIDE = 1 / 2  # side of the cutout, as a fraction of the size


class PairDiscriminator(nn.Module):
    """Maps (target, generated) to the logits of both, [batch] each, averaged over the positions of a patch classifier.

    Both are whole clips with equal time steps and share their end frames. The input channels of each frame between are
    the frame, both end images (pix2pix, Isola et al. 2017, arXiv 1611.07004, extended in time) and its amplified
    difference from linear interpolation. The layers use spectral norm (Miyato et al. 2018, arXiv 1802.05957) and no
    batch norm, so a clip's logit does not depend on the other clips of the batch.
    """

    def __init__(self, model: BetweenConfig, clip: ClipConfig):
        super().__init__()
        layers, inputs = [], 12
        for width in model.discriminator_widths:
            convolution = nn.Conv3d(inputs, width, (3, 4, 4), (1, 2, 2), padding=1)
            layers += [spectral_norm(convolution), leaky_relu()]
            inputs = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv3d(inputs, 1, (1, 3, 3), padding=(0, 1, 1))))

    def forward(self, target: ClipFloats, generated: ClipFloats) -> tuple[PerClip, PerClip]:
        return self._compute_logits(target), self._compute_logits(generated)

    def _compute_logits(self, clip: ClipFloats) -> PerClip:
        between = clip[:, :, 1:-1]
        start = clip[:, :, 0].unsqueeze(2).expand_as(between)
        end = clip[:, :, -1].unsqueeze(2).expand_as(between)
        times = torch.linspace(0, 1, clip.shape[2], dtype=clip.dtype, device=clip.device)[1:-1].view(1, 1, -1, 1, 1)
        residual = _INPUT_GAIN * (between - torch.lerp(start, end, times))
        inputs = torch.cat([2 * torch.cat([between, start, end], dim=1) - 1, residual], dim=1)
        return _LOGIT_GAIN * self.layers(inputs).flatten(1).mean(1)


def diff_augment(clip: ClipFloats, draws: Tensor) -> ClipFloats:
    """Differentiable augmentation of a discriminator's input: DiffAugment (Zhao et al. 2020, arXiv 2006.10738).

    Applies colour, translation and cutout, equally to all frames of a clip.

    Args:
        clip: The clips to augment.
        draws: Uniform random numbers in [0, 1), [batch, AUGMENT_DRAWS].
    """
    brightness, saturation, contrast, down, right, y, x = (draws[:, i].view(-1, 1, 1, 1, 1) for i in range(7))
    clip = clip + brightness - 0.5
    grey = clip.mean(1, keepdim=True)
    clip = grey + (clip - grey) * 2 * saturation
    mean = clip.mean((1, 2, 3, 4), keepdim=True)
    clip = mean + (clip - mean) * (0.5 + contrast)
    return _cut_out(_shift(clip, down, right), y, x)


def _shift(clip: ClipFloats, down: Tensor, right: Tensor) -> ClipFloats:
    """Translates each clip by whole pixels, up to an eighth of its size, and fills with black."""
    batch, _, _, height, width = clip.shape
    max_y, max_x = round(height * _MAX_SHIFT), round(width * _MAX_SHIFT)
    padded = pad(clip, (max_x, max_x, max_y, max_y))
    rows = (down.view(-1) * (2 * max_y + 1)).long()[:, None] + torch.arange(height, device=clip.device)
    columns = (right.view(-1) * (2 * max_x + 1)).long()[:, None] + torch.arange(width, device=clip.device)
    clips = torch.arange(batch, device=clip.device)[:, None, None]
    # [batch, height, width, channel, time] while indexing
    return padded.permute(0, 3, 4, 1, 2)[clips, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)


def _cut_out(clip: ClipFloats, y: Tensor, x: Tensor) -> ClipFloats:
    """Blackens a square of half the size, centred at (y, x) in fractions of the height and width."""
    height, width = clip.shape[-2:]
    distance_y = (torch.arange(height, device=clip.device).view(-1, 1) + 0.5) / height - y
    distance_x = (torch.arange(width, device=clip.device) + 0.5) / width - x
    return clip * ((distance_y.abs() > _CUTOUT_SIDE / 2) | (distance_x.abs() > _CUTOUT_SIDE / 2))
