"""`between`: motion on top of linear interpolation, for any number of frames.

    start, end --Pyramid--> features of both, at 1/2, 1/4 and 1/8 of the size
    both, and how well each place of one matches those near it in the other --> context
    context --> p(latent | start, end)
    context, real frames --> q(latent)                                          (training only)
    time, latent, context, features --Synthesis, coarse to fine--> two flows, visibility, residual --> frame

A frame at time t, from 0 at the start to 1 at the end, is

    (1 - a) warp(start, t flow_start) + a warp(end, (1 - t) flow_end) + 4 t (1 - t) residual,
    a = sigmoid(logit(t) + visibility):

the blend of Super SloMo (Jiang et al. 2018, arXiv 1712.00080), with the two features of the end images warped at every
scale as in IFRNet (Kong et al. 2022, arXiv 2205.14620). All heads start from zero, so an untrained network *is* linear
interpolation, and both end frames are exact whatever the weights. The prior is learned (SVG-LP, Denton & Fergus 2018,
arXiv 1802.07687). The latent has few values: of many independent ones, hardly any sample is right in most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, Times

_COARSEST = 8  # pixels of the image to one of the coarsest features
_REACH = 4  # how far matches are looked for, in pixels of the coarsest features
_FLOWS, _BLEND = 4, 4  # channels: two flows of (x, y); visibility and a residual of three colours
_SLOPE = 0.2
_MOST_FAVOUR = 8.0  # of visibility
_LOG_STD = -6.0, 3.0
_FIRST_LOG_STD = -2.0  # where training starts: what the first samples say is not drowned in noise
_POOLED = 4  # places along height and along width that the latent is drawn from
_MIRRORS = ((), (-1,), (-2,), (-2, -1))  # axes that are turned round: left to right, upside down, both


class Between(nn.Module):
    """Training sees the frames (`forward`); making them needs only the two ends (`generate`)."""

    def __init__(self, model: BetweenConfig, clip: ClipConfig):
        super().__init__()
        for name, size in (("height", clip.height), ("width", clip.width)):
            if size % _COARSEST:
                raise ConfigError(f"clip.{name}: between needs a multiple of {_COARSEST} (value {size})")
        self.pyramid = Pyramid(model.widths)
        self.context = Context(model)
        self.prior = Gaussian(model.widths[-1], model)
        self.posterior = Posterior(model)
        self.synthesis = Synthesis(model)
        self.mirrors = _MIRRORS[: model.self_ensemble]

    def forward(self, clip: ClipFloats, times: Times, noise: Noise, sampled: Tensor):
        """Makes the frames between of `clip` again: `sampled`, bool [batch], says from q's sample or the prior's mean.

        Returns (made [batch, 3, time - 2, height, width], mean and std of q, mean and std of the prior), the latter
        four [batch, latent].
        """
        start, end = clip[:, :, 0], clip[:, :, -1]
        features, context = self._seen(start, end)
        mean, std, prior_mean, prior_std = self._distributions(clip, times, context)
        latent = torch.where(sampled[:, None], mean + std * noise, prior_mean)
        made = self._frames(start, end, features, context, latent, times[:, 1:-1])
        return made, mean, std, prior_mean, prior_std

    def distributions(self, clip: ClipFloats, times: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and std of q, mean and std of the prior, as `forward` returns them, and no frames."""
        _, context = self._seen(clip[:, :, 0], clip[:, :, -1])
        return self._distributions(clip, times, context)

    def _distributions(self, clip: ClipFloats, times: Times, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.posterior(clip, times, context), *self.prior(context)

    def generate(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Times) -> ClipFloats:
        """Frames at `times`; noise 0 is the prior's mean.

        The mean of what is made of the ends and of mirror images of them (Lim et al. 2017, EDSR, arXiv 1707.02921,
        section 3.4), as many as `self_ensemble`: what is a guess that goes either way cancels out.
        """
        starts, ends = (torch.cat([image.flip(axes) for axes in self.mirrors]) for image in (start, end))
        count = len(self.mirrors)
        made = self._generated(starts, ends, noise.repeat(count, 1), times.repeat(count, 1)).chunk(count)
        return torch.stack([clip.flip(axes) for clip, axes in zip(made, self.mirrors, strict=True)]).mean(0)

    def _generated(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Times) -> ClipFloats:
        features, context = self._seen(start, end)
        mean, std = self.prior(context)
        return self._frames(start, end, features, context, mean + std * noise, times)

    def _seen(self, start: ImageFloats, end: ImageFloats) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        both = self.pyramid(torch.cat([start, end]))
        features = [tuple(level.chunk(2)) for level in both]
        return features, self.context(*features[-1])  # type: ignore[arg-type, return-value]

    def _frames(self, start, end, features, context: Tensor, latent: Tensor, times: Times) -> ClipFloats:
        """Each pair is seen once, and made at each of its times: the batch of the synthesis is pairs x times."""
        pairs, count = times.shape
        again = torch.arange(pairs, device=times.device).repeat_interleave(count)
        time = times.reshape(-1, 1, 1, 1)
        everywhere = latent[:, :, None, None].expand(-1, -1, *context.shape[2:])
        coarse = torch.cat([context, everywhere], dim=1)[again]
        finer = [(of_start[again], of_end[again]) for of_start, of_end in reversed(features[:-1])]
        frames = blend(start[again], end[again], time, *self.synthesis(coarse, finer, time))
        return frames.view(pairs, count, *frames.shape[1:]).transpose(1, 2)


class Pyramid(nn.Module):
    """ImageFloats -> features at 1/2, 1/4 and 1/8 of its size, as many as there are widths."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        inputs = (3, *widths[:-1])
        self.levels = nn.ModuleList(
            nn.Sequential(_conv(fewer, more, stride=2), _conv(more, more))
            for fewer, more in zip(inputs, widths, strict=True)
        )

    def forward(self, image: ImageFloats) -> list[Tensor]:
        features, levels = image, []
        for level in self.levels:
            features = level(features)
            levels.append(features)
        return levels


class Context(nn.Module):
    """The coarsest features of both images -> what is known of the pair, [batch, width, height/8, width/8]."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        width = model.widths[-1]
        matched = 2 * (2 * _REACH + 1) ** 2
        self.layers = nn.Sequential(_conv(2 * width + matched, width), Residual(width), Residual(width))

    def forward(self, start: Tensor, end: Tensor) -> Tensor:
        return self.layers(torch.cat([start, end, matches(start, end), matches(end, start)], dim=1))


class Gaussian(nn.Module):
    """Features [batch, width, h, w] -> mean and standard deviation of the latent, [batch, latent] each."""

    def __init__(self, width: int, model: BetweenConfig):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(_POOLED), nn.Flatten(), nn.Linear(width * _POOLED**2, width), nn.LeakyReLU(_SLOPE)
        )
        self.mean, self.log_std = nn.Linear(width, model.latent), nn.Linear(width, model.latent)
        nn.init.constant_(self.log_std.bias, _FIRST_LOG_STD)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features)
        return self.mean(hidden), self.log_std(hidden).clamp(*_LOG_STD).exp()


class Posterior(nn.Module):
    """q: all frames' differences from linear interpolation, seen through the context."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        width = model.widths[-1]
        self.frames = Pyramid(model.widths)
        self.timed = _conv(width + 1, width)
        self.gaussian = Gaussian(2 * width, model)

    def forward(self, clip: ClipFloats, times: Times, context: Tensor) -> tuple[Tensor, Tensor]:
        time = times[:, None, 1:-1, None, None]
        between = clip[:, :, 1:-1] - clip[:, :, :1] * (1 - time) - clip[:, :, -1:] * time
        count = between.shape[2]
        features = self.frames(between.transpose(1, 2).flatten(0, 1))[-1]
        planes = times[:, 1:-1].reshape(-1, 1, 1, 1).expand(-1, 1, *features.shape[2:])
        features = self.timed(torch.cat([features, planes], dim=1))
        mean = features.view(-1, count, *features.shape[1:]).mean(1)
        return self.gaussian(torch.cat([mean, context], dim=1))


class Synthesis(nn.Module):
    """From coarse to fine, three times: correct the flows, then warp the features of the next finer scale by them."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        fine, middle, coarse = model.widths
        self.levels = nn.ModuleList(
            [
                Refine(coarse + model.latent + 1, coarse, middle, _FLOWS),
                Refine(3 * middle + _FLOWS + 1, middle, fine, _FLOWS),
                Refine(3 * fine + _FLOWS + 1, fine, 0, _FLOWS + _BLEND),
            ]
        )

    def forward(self, coarse: Tensor, finer: list[tuple[Tensor, Tensor]], time: Tensor) -> tuple[Tensor, Tensor]:
        """`finer`: features of start and end at 1/4 and 1/2; time [n, 1, 1, 1].

        Returns flows of start and end, [n, 4, height, width] in pixels, and visibility and residual, [n, 4, ...].
        """
        seen, flows = coarse, coarse.new_zeros(len(coarse), _FLOWS, *coarse.shape[2:])
        for refine, features, pixels in zip(self.levels, (*finer, None), (4, 2, 1), strict=True):
            planes = time.expand(-1, 1, *seen.shape[2:])
            state, change = refine(torch.cat([seen, planes], dim=1))
            flows = functional.interpolate(flows, scale_factor=2, mode="bilinear") + change[:, :_FLOWS]
            if features is None:
                return flows, change[:, _FLOWS:]
            start, end = features
            near = warp(start, time * flows[:, :2] / pixels), warp(end, (1 - time) * flows[:, 2:] / pixels)
            seen = torch.cat([state, *near, flows / pixels], dim=1)
        raise AssertionError("the last level returns")


class Refine(nn.Module):
    """[n, inputs, h, w] -> a state and changes of what is made, both of twice the height and width."""

    def __init__(self, inputs: int, width: int, states: int, changes: int):
        super().__init__()
        self.layers = nn.Sequential(_conv(inputs, width), Residual(width))
        self.state = nn.Sequential(nn.Conv2d(width, 4 * states, 3, padding=1), nn.PixelShuffle(2)) if states else None
        self.change = nn.Sequential(_zero(nn.Conv2d(width, 4 * changes, 3, padding=1)), nn.PixelShuffle(2))

    def forward(self, seen: Tensor) -> tuple[Tensor | None, Tensor]:
        features = self.layers(seen)
        return self.state(features) if self.state else None, self.change(features)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(_conv(width, width), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(features + self.layers(features), _SLOPE)


def blend(start: ImageFloats, end: ImageFloats, time: Tensor, flows: Tensor, visible: Tensor) -> ImageFloats:
    """The frame at `time`, [n, 1, 1, 1]; `visible` is visibility and residual, [n, 4, height, width].

    The weight of the end, sigmoid(logit(t) + v), is written so that it is exactly 0 and 1 at the ends.
    """
    favour = time * visible[:, :1].clamp(-_MOST_FAVOUR, _MOST_FAVOUR).exp()
    weight = favour / (1 - time + favour)
    # Bicubic: bilinear blurs what lies between pixels, and so made frames 7 % less sharp than real ones.
    near = warp(start, time * flows[:, :2], "bicubic"), warp(end, (1 - time) * flows[:, 2:], "bicubic")
    return (1 - weight) * near[0] + weight * near[1] + 4 * time * (1 - time) * visible[:, 1:]


def warp(picture: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Backward warping: each pixel is fetched from where its flow, [n, 2, h, w] in pixels as (x, y), points to.

    `mode` is grid_sample's: bilinear or bicubic. Beyond the edge lies the edge. A flow that is not finite gives NaN.
    """
    height, width = flow.shape[2:]
    finite = flow.isfinite().all(1, keepdim=True)
    flow = torch.where(finite, flow, 0.0)  # on a CPU, the gradient of grid_sample at NaN is a segmentation fault
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).view(-1, 1) + flow[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    warped = functional.grid_sample(picture, grid, mode, padding_mode="border", align_corners=True)
    return torch.where(finite, warped, math.nan)


def matches(picture: Tensor, other: Tensor) -> Tensor:
    """Cosine of the features of each place with those of `other` up to `_REACH` away: [n, (2 * _REACH + 1)^2, h, w].

    The cost volume of PWC-Net (Sun et al. 2018, arXiv 1709.02371). Beyond the edge the cosine is 0.
    """
    pairs, channels, height, width = picture.shape
    around = functional.unfold(functional.normalize(other, dim=1), 2 * _REACH + 1, padding=_REACH)
    around = around.view(pairs, channels, -1, height, width)
    return (around * functional.normalize(picture, dim=1)[:, :, None]).sum(1)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(_SLOPE))


def _zero(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
