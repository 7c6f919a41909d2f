"""`between`: learned motion on top of linear interpolation, for any number of frames.

    start, end --Pyramid--> features of both, at 1/2, 1/4 and 1/8 of the size
    coarsest features and their cost volumes --Context--> context
    context --> p(latent | start, end)
    context, target frames --> q(latent)                                        (training only)
    time, latent, context, features --Synthesis, coarse to fine--> two flows, visibility, residual --> frame

`models.motion` defines the blend. The features of both end images are warped at every scale, as in IFRNet (Kong et al.
2022, arXiv 2205.14620). All heads start from zero, so an untrained network *is* linear interpolation; both end frames
are exact for any weights. The prior is learned (SVG-LP, Denton & Fergus 2018, arXiv 1802.07687). The latent has few
dimensions: with many independent ones, hardly any sample is right in most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import BetweenConfig, ClipConfig, ConfigError
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise, Times
from giffy_ray.models.motion import Motion, blend, warp

_COARSEST_STRIDE = 8  # image pixels per position of the coarsest features
_SEARCH_RADIUS = 4  # of the cost volume, in positions of the coarsest features
_FLOW_CHANNELS = 4  # two flows of (x, y)
_BLEND_CHANNELS = 4  # visibility, and a residual of three colours
_LEAKY_SLOPE = 0.2
_LOG_STD_RANGE = -6.0, 3.0
_INITIAL_LOG_STD = -2.0  # keeps the first samples of the latent informative
_POOLED_SIZE = 4  # positions along height and width that the latent's distribution depends on
_MAX_BATCH_PIXELS = 2**18  # image pixels x frames per call of the synthesis; bounds its memory to some 500 MB
_MIRRORS = ((), (-1,), (-2,), (-2, -1))  # flipped axes: none, horizontal, vertical, both


class Between(nn.Module):
    """Training encodes whole clips (`forward`); `generate` needs only the end images."""

    def __init__(self, model: BetweenConfig, clip: ClipConfig):
        super().__init__()
        for name, size in (("height", clip.height), ("width", clip.width)):
            if size % _COARSEST_STRIDE:
                raise ConfigError(f"clip.{name}: between needs a multiple of {_COARSEST_STRIDE} (value {size})")
        self.pyramid = Pyramid(model.widths)
        self.context = Context(model)
        self.prior = Gaussian(model.widths[-1], model)
        self.posterior = Posterior(model)
        self.synthesis = Synthesis(model)
        self.mirrors = _MIRRORS[: model.self_ensemble]

    def forward(self, clip: ClipFloats, times: Times, noise: Noise, sampled: Tensor):
        """Reconstructs the frames between of `clip`.

        Args:
            clip: Whole clips.
            times: Time of each frame, 0 at the start and 1 at the end.
            noise: Noise for samples of q.
            sampled: bool [batch]; True uses a sample of q as the latent, False the prior's mean.

        Returns:
            Generated frames [batch, 3, time - 2, height, width], then mean and standard deviation of q, and mean and
            standard deviation of the prior, [batch, latent] each.
        """
        start, end = clip[:, :, 0], clip[:, :, -1]
        features, context = self._encode(start, end)
        mean, std, prior_mean, prior_std = self._compute_distributions(clip, times, context)
        latent = torch.where(sampled[:, None], mean + std * noise, prior_mean)
        generated = self._synthesise(start, end, features, context, latent, times[:, 1:-1])
        return generated, mean, std, prior_mean, prior_std

    def distributions(self, clip: ClipFloats, times: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and standard deviation of q and of the prior, as from `forward`, without generating frames."""
        _, context = self._encode(clip[:, :, 0], clip[:, :, -1])
        return self._compute_distributions(clip, times, context)

    def _compute_distributions(
        self, clip: ClipFloats, times: Times, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std = self.posterior(clip, times, context)
        prior_mean, prior_std = self.prior(context)
        return mean, std, prior_mean, prior_std

    def generate(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Times) -> ClipFloats:
        """Generates the frames at `times`; noise 0 uses the prior's mean as the latent.

        Averages over mirrored versions of the end images, `self_ensemble` in number (Lim et al. 2017, EDSR, arXiv
        1707.02921, section 3.4), which cancels out errors of random direction.
        """
        starts = torch.cat([start.flip(axes) for axes in self.mirrors])
        ends = torch.cat([end.flip(axes) for axes in self.mirrors])
        count = len(self.mirrors)
        mirrored = self._generate_once(starts, ends, noise.repeat(count, 1), times.repeat(count, 1))
        # unflatten and slices rather than chunk: torch.export could not keep the batch dynamic.
        by_mirror = mirrored.unflatten(0, (count, -1))
        clips = [by_mirror[index].flip(axes) for index, axes in enumerate(self.mirrors)]
        return torch.stack(clips).mean(0)

    def _generate_once(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Times) -> ClipFloats:
        features, context = self._encode(start, end)
        mean, std = self.prior(context)
        return self._synthesise(start, end, features, context, mean + std * noise, times)

    @torch.no_grad()
    def iter_motion(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Tensor) -> Iterator[Motion]:
        """Estimates the motion between two images; see `models.motion.MotionEstimator`.

        Height and width must be multiples of 8. `self_ensemble` has no effect.
        """
        features, context = self._encode(start, end)
        mean, std = self.prior(context)
        latent = mean + std * noise
        batch_frames = max(1, _MAX_BATCH_PIXELS // (start.shape[2] * start.shape[3]))
        for batch in times.split(batch_frames):
            yield self._estimate(features, context, latent, batch[None])

    def _encode(self, start: ImageFloats, end: ImageFloats) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Returns the features of (start, end) at each scale, from fine to coarse, and the context."""
        levels = self.pyramid(torch.cat([start, end]))
        pairs = start.shape[0]  # len() would be a constant in torch.export
        features = [(level[:pairs], level[pairs:]) for level in levels]
        return features, self.context(*features[-1])

    def _synthesise(self, start, end, features, context: Tensor, latent: Tensor, times: Times) -> ClipFloats:
        motion = self._estimate(features, context, latent, times)
        repeated = _repeat_pairs(times)
        frames = blend(start[repeated], end[repeated], times.reshape(-1, 1, 1, 1), motion)
        return frames.view(*times.shape, *frames.shape[1:]).transpose(1, 2)

    def _estimate(self, features, context: Tensor, latent: Tensor, times: Times) -> Motion:
        """Encoded pairs are repeated for each of their times, so the batch of the synthesis is pairs x times."""
        repeated = _repeat_pairs(times)
        time = times.reshape(-1, 1, 1, 1)
        latent_planes = latent[:, :, None, None].expand(-1, -1, *context.shape[2:])
        coarse = torch.cat([context, latent_planes], dim=1)[repeated]
        finer = [
            (start_features[repeated], end_features[repeated])
            for start_features, end_features in reversed(features[:-1])
        ]
        return self.synthesis(coarse, finer, time)


class Pyramid(nn.Module):
    """Maps ImageFloats to features at 1/2, 1/4, 1/8... of its size, one level per width."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        inputs = (3, *widths[:-1])
        self.levels = nn.ModuleList(
            nn.Sequential(_conv_activation(width_in, width_out, stride=2), _conv_activation(width_out, width_out))
            for width_in, width_out in zip(inputs, widths, strict=True)
        )

    def forward(self, image: ImageFloats) -> list[Tensor]:
        features, levels = image, []
        for level in self.levels:
            features = level(features)
            levels.append(features)
        return levels


class Context(nn.Module):
    """Maps the coarsest features of both images to joint features, [batch, channels, height / 8, width / 8]."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        width = model.widths[-1]
        volume_channels = 2 * (2 * _SEARCH_RADIUS + 1) ** 2
        self.layers = nn.Sequential(
            _conv_activation(2 * width + volume_channels, width), Residual(width), Residual(width)
        )

    def forward(self, start: Tensor, end: Tensor) -> Tensor:
        return self.layers(torch.cat([start, end, cost_volume(start, end), cost_volume(end, start)], dim=1))


class Gaussian(nn.Module):
    """Maps features [batch, width, h, w] to mean and standard deviation of the latent, [batch, latent] each."""

    def __init__(self, width: int, model: BetweenConfig):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(_POOLED_SIZE),
            nn.Flatten(),
            nn.Linear(width * _POOLED_SIZE**2, width),
            nn.LeakyReLU(_LEAKY_SLOPE),
        )
        self.mean = nn.Linear(width, model.latent)
        self.log_std = nn.Linear(width, model.latent)
        nn.init.constant_(self.log_std.bias, _INITIAL_LOG_STD)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features)
        return self.mean(hidden), self.log_std(hidden).clamp(*_LOG_STD_RANGE).exp()


class Posterior(nn.Module):
    """q(latent): encodes the differences of all frames from linear interpolation, together with the context."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        width = model.widths[-1]
        self.frames = Pyramid(model.widths)
        self.timed = _conv_activation(width + 1, width)
        self.gaussian = Gaussian(2 * width, model)

    def forward(self, clip: ClipFloats, times: Times, context: Tensor) -> tuple[Tensor, Tensor]:
        time = times[:, None, 1:-1, None, None]
        differences = clip[:, :, 1:-1] - clip[:, :, :1] * (1 - time) - clip[:, :, -1:] * time
        count = differences.shape[2]
        features = self.frames(differences.transpose(1, 2).flatten(0, 1))[-1]
        planes = times[:, 1:-1].reshape(-1, 1, 1, 1).expand(-1, 1, *features.shape[2:])
        features = self.timed(torch.cat([features, planes], dim=1))
        mean = features.view(-1, count, *features.shape[1:]).mean(1)
        return self.gaussian(torch.cat([mean, context], dim=1))


class Synthesis(nn.Module):
    """Refines the flows in three steps, from coarse to fine, and warps the features of each next scale by them."""

    def __init__(self, model: BetweenConfig):
        super().__init__()
        fine, middle, coarse = model.widths
        self.levels = nn.ModuleList(
            [
                Refine(coarse + model.latent + 1, coarse, middle, _FLOW_CHANNELS),
                Refine(3 * middle + _FLOW_CHANNELS + 1, middle, fine, _FLOW_CHANNELS),
                Refine(3 * fine + _FLOW_CHANNELS + 1, fine, 0, _FLOW_CHANNELS + _BLEND_CHANNELS),
            ]
        )

    def forward(self, coarse: Tensor, finer: list[tuple[Tensor, Tensor]], time: Tensor) -> Motion:
        """Estimates the motion of each frame.

        Args:
            coarse: Context and latent at 1/8 of the size.
            finer: Features of start and end at 1/4 and 1/2 of the size.
            time: Time of each frame, [n, 1, 1, 1].
        """
        inputs = coarse
        flows = coarse.new_zeros(coarse.shape[0], _FLOW_CHANNELS, *coarse.shape[2:])
        for refine, features, pixels in zip(self.levels, (*finer, None), (4, 2, 1), strict=True):
            planes = time.expand(-1, 1, *inputs.shape[2:])
            state, change = refine(torch.cat([inputs, planes], dim=1))
            flows = functional.interpolate(flows, scale_factor=2, mode="bilinear") + change[:, :_FLOW_CHANNELS]
            if features is None:
                visibility_residual = change[:, _FLOW_CHANNELS:]
                return Motion(flows, visibility_residual[:, :1], visibility_residual[:, 1:])
            start, end = features
            warped_start = warp(start, time * flows[:, :2] / pixels)
            warped_end = warp(end, (1 - time) * flows[:, 2:] / pixels)
            inputs = torch.cat([state, warped_start, warped_end, flows / pixels], dim=1)
        raise AssertionError("the last level returns")


class Refine(nn.Module):
    """Maps [n, inputs, h, w] to a state (None if `states` is 0) and output changes, both at twice the size."""

    def __init__(self, inputs: int, width: int, states: int, changes: int):
        super().__init__()
        self.layers = nn.Sequential(_conv_activation(inputs, width), Residual(width))
        self.state = nn.Sequential(nn.Conv2d(width, 4 * states, 3, padding=1), nn.PixelShuffle(2)) if states else None
        self.change = nn.Sequential(_zero_initialise(nn.Conv2d(width, 4 * changes, 3, padding=1)), nn.PixelShuffle(2))

    def forward(self, inputs: Tensor) -> tuple[Tensor | None, Tensor]:
        features = self.layers(inputs)
        return self.state(features) if self.state else None, self.change(features)


class Residual(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(_conv_activation(width, width), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(features + self.layers(features), _LEAKY_SLOPE)


def cost_volume(features: Tensor, other_features: Tensor) -> Tensor:
    """Cosine similarity of each position with the other image's positions within `_SEARCH_RADIUS`.

    The cost volume of PWC-Net (Sun et al. 2018, arXiv 1709.02371). It is 0 beyond the edge.

    Returns:
        [n, (2 * _SEARCH_RADIUS + 1)^2, height, width].
    """
    pairs, channels, height, width = features.shape
    normalized = functional.normalize(other_features, dim=1)
    neighbours = functional.unfold(normalized, 2 * _SEARCH_RADIUS + 1, padding=_SEARCH_RADIUS)
    neighbours = neighbours.view(pairs, channels, -1, height, width)
    return (neighbours * functional.normalize(features, dim=1)[:, :, None]).sum(1)


def _repeat_pairs(times: Times) -> Tensor:
    """Returns the index of the pair of each frame, int64 [pairs x times]."""
    pairs, count = times.shape
    return torch.arange(pairs, device=times.device).repeat_interleave(count)


def _conv_activation(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(_LEAKY_SLOPE))


def _zero_initialise(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
