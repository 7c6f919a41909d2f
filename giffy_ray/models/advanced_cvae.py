"""The paper's advanced CVAE: the CVAE's encoders, and a generator that sees the end images and the time.

    latent, codes --seed, deconvolutions--> features
    features, start, end, frame number --joined, deconvolutions--> generated clip

The defaults of `AdvancedCVAEConfig` follow the authors' code. At 30x64x64 the generator has 4,528,515 parameters, 1/47
of Table 1's generator. Its first deconvolution has kernel 3 and stride 5 in time, so two of every five time steps hold
only the bias. According to the paper, the images join "at an intermediate deconvolutional layer"; in the code, they
join after the last upsampling. `join_stage: half_size` implements the paper's text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import AdvancedCVAEConfig, ClipConfig
from giffy_ray.core.tensor_types import ClipFloats, ImageFloats, Noise
from giffy_ray.models.cvae import Autoencoder
from giffy_ray.models.layers import SameConvTranspose3d, Triple, add_norm_activation, linear, require_multiples

_KERNEL = (3, 4, 4)
_SAME = (1, 1, 1)  # strides
_DOUBLE = (1, 2, 2)


class AdvancedGenerator(nn.Module):
    """Maps the latent, both image codes and both end images to ClipFloats."""

    def __init__(self, model: AdvancedCVAEConfig, clip: ClipConfig):
        super().__init__()
        first, second, third, fourth, fifth = model.generator_widths
        norm_3d, norm_1d = (nn.BatchNorm3d, nn.BatchNorm1d) if model.batch_norm else (None, None)
        self.seed_shape = (first, clip.frames // 10, clip.height // 32, clip.width // 32)
        flat = first * (clip.frames // 10) * (clip.height // 32) * (clip.width // 32)
        self.seed = add_norm_activation(linear(model.latent + 2 * model.image_code, flat), norm_1d, flat, nn.ReLU())
        self.half_size = model.join_stage == "half_size"
        self.time_channels = model.time_channels

        def up(inputs: int, outputs: int, stride: Triple) -> nn.Module:
            return add_norm_activation(
                SameConvTranspose3d(inputs, outputs, _KERNEL, stride), norm_3d, outputs, nn.ReLU()
            )

        joined_channels = 2 * 3 + model.time_channels
        self.before = nn.Sequential(
            up(first, second, (5, 4, 4)), up(second, third, (2, 2, 2)), up(third, fourth, _DOUBLE)
        )
        if self.half_size:
            self.after = nn.Sequential(up(fourth + joined_channels, fifth, _DOUBLE), up(fifth, fifth, _SAME))
        else:
            self.before.append(up(fourth, fifth, _DOUBLE))
            self.after = nn.Sequential(up(fifth + joined_channels, fifth, _SAME))
        self.after.extend([SameConvTranspose3d(fifth, 3, _KERNEL, _SAME), nn.Sigmoid()])

    def forward(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        seed = self.seed(torch.cat([latent, start_code, end_code], dim=1))
        features = self.before(seed.view(-1, *self.seed_shape))
        return self.after(torch.cat([features, self._condition(start, end, features.shape[2])], dim=1))

    def _condition(self, start: ImageFloats, end: ImageFloats, frames: int) -> Tensor:
        """Input of every frame t: both end images, at half size if `half_size`, and planes of t / frames.

        Returns [batch, 6 + time_channels, frames, height, width].
        """
        both = torch.cat([start, end], dim=1)
        if self.half_size:
            both = functional.avg_pool2d(both, 2)
        images = both[:, :, None].expand(-1, -1, frames, -1, -1)
        time = torch.arange(frames, device=both.device, dtype=both.dtype) / frames
        planes = time.view(1, 1, -1, 1, 1).expand(len(both), self.time_channels, -1, *both.shape[2:])
        return torch.cat([images, planes], dim=1)


class AdvancedCVAE(Autoencoder):
    """The paper's advanced CVAE."""

    def __init__(self, model: AdvancedCVAEConfig, clip: ClipConfig):
        # The generator upsamples time by 5 and 2, height and width by 4 and three times by 2.
        require_multiples(clip, model.kind, frames=10, height=32, width=32)
        super().__init__(model, clip)
        self.generator = AdvancedGenerator(model, clip)

    def _decode(
        self, latent: Noise, start_code: Tensor, end_code: Tensor, start: ImageFloats, end: ImageFloats
    ) -> ClipFloats:
        return self.generator(latent, start_code, end_code, start, end)
