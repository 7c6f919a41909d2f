"""The judge of `between`: tells real frames from made ones, knowing the two images that they lie between."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import spectral_norm

from giffy_ray.config import BetweenConfig, ClipConfig
from giffy_ray.core.tensor_types import ClipFloats, PerClip
from giffy_ray.models.layers import leaky_relu

AUGMENT_DRAWS = 7
# What is made differs from what is real by a few grey levels, which spectral norm would keep as small in the logits.
_AMPLIFIED, _LOGIT = 30.0, 10.0
_SHIFT, _HOLE = 1 / 8, 1 / 2  # of the size: the largest translation, and the side of what is cut out


class PairDiscriminator(nn.Module):
    """(real, made) -> logits of both, [batch] each: the mean over places of what each place says.

    Both are whole clips in even steps, with their end frames, which are the same in both. Each frame between is seen
    with both end images joined as channels (pix2pix, Isola et al. 2017, arXiv 1611.07004, in time as well), and with
    what it adds to linear interpolation between them, amplified. Spectral norm (Miyato et al. 2018, arXiv 1802.05957)
    and no batch norm, so that a clip's logit does not depend on the others.
    """

    def __init__(self, model: BetweenConfig, clip: ClipConfig):
        super().__init__()
        layers, inputs = [], 12
        for width in model.discriminator_widths:
            convolution = nn.Conv3d(inputs, width, (3, 4, 4), (1, 2, 2), padding=1)
            layers += [spectral_norm(convolution), leaky_relu()]
            inputs = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv3d(inputs, 1, (1, 3, 3), padding=(0, 1, 1))))

    def forward(self, real: ClipFloats, made: ClipFloats) -> tuple[PerClip, PerClip]:
        return self._logits(real), self._logits(made)

    def _logits(self, clip: ClipFloats) -> PerClip:
        between = clip[:, :, 1:-1]
        start, end = (clip[:, :, place].unsqueeze(2).expand_as(between) for place in (0, -1))
        times = torch.linspace(0, 1, clip.shape[2], dtype=clip.dtype, device=clip.device)[1:-1].view(1, 1, -1, 1, 1)
        added = _AMPLIFIED * (between - torch.lerp(start, end, times))
        seen = torch.cat([2 * torch.cat([between, start, end], dim=1) - 1, added], dim=1)
        return _LOGIT * self.layers(seen).flatten(1).mean(1)


def augmented(clip: ClipFloats, draws: Tensor) -> ClipFloats:
    """What a discriminator is shown in place of `clip`, differentiable: DiffAugment (Zhao et al. 2020, arXiv
    2006.10738) with colour, translation and cutout, the same for all frames of a clip.

    draws: [batch, AUGMENT_DRAWS], uniform in [0, 1).
    """
    brightness, saturation, contrast, down, right, y, x = (draws[:, i].view(-1, 1, 1, 1, 1) for i in range(7))
    clip = clip + brightness - 0.5
    grey = clip.mean(1, keepdim=True)
    clip = grey + (clip - grey) * 2 * saturation
    middle = clip.mean((1, 2, 3, 4), keepdim=True)
    clip = middle + (clip - middle) * (0.5 + contrast)
    return _with_hole(_shifted(clip, down, right), y, x)


def _shifted(clip: ClipFloats, down: Tensor, right: Tensor) -> ClipFloats:
    """Each clip moved by up to an eighth of its size, to whole pixels; what comes in is black."""
    batch, _, _, height, width = clip.shape
    tall, wide = round(height * _SHIFT), round(width * _SHIFT)
    around = pad(clip, (wide, wide, tall, tall))
    rows = (down.view(-1) * (2 * tall + 1)).long()[:, None] + torch.arange(height, device=clip.device)
    columns = (right.view(-1) * (2 * wide + 1)).long()[:, None] + torch.arange(width, device=clip.device)
    which = torch.arange(batch, device=clip.device)[:, None, None]
    return around.permute(0, 3, 4, 1, 2)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)


def _with_hole(clip: ClipFloats, y: Tensor, x: Tensor) -> ClipFloats:
    """Black in a square of half the size around (y, x), shares of the height and width."""
    height, width = clip.shape[-2:]
    far_y = (torch.arange(height, device=clip.device).view(-1, 1) + 0.5) / height - y
    far_x = (torch.arange(width, device=clip.device) + 0.5) / width - x
    return clip * ((far_y.abs() > _HOLE / 2) | (far_x.abs() > _HOLE / 2))
