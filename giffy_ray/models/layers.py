"""Layers that the report's networks are made of: TensorFlow's SAME padding and initial values, in PyTorch.

Floats, channels first. Weights start from a normal of standard deviation 0.02 (convolutions: cut at two of them),
biases from 0, as in the code that the report builds on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import ClipConfig, ConfigError

Triple = tuple[int, int, int]  # time, height, width
Convolution = TypeVar("Convolution", nn.Conv2d, nn.Conv3d)

_INIT_STD = 0.02
_LEAKY_SLOPE = 0.2


def conv2d(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """SAME for an input that `stride` divides: [batch, inputs, h, w] -> [batch, outputs, h/stride, w/stride]."""
    return _initialised(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2))


def conv3d(inputs: int, outputs: int, kernel: Triple, stride: Triple) -> nn.Conv3d:
    """SAME for an input that `stride` divides: [batch, inputs, t, h, w] -> the same over `stride`."""
    time, height, width = ((k - s + 1) // 2 for k, s in zip(kernel, stride, strict=True))
    return _initialised(nn.Conv3d(inputs, outputs, kernel, stride, padding=(time, height, width)))


class SameConvTranspose3d(nn.ConvTranspose3d):
    """TensorFlow's SAME transposed convolution: every axis comes out exactly `stride` times as long.

    TensorFlow cuts `kernel - stride` off the full result, the smaller half in front; PyTorch's `padding` cuts the
    same from both sides, so the odd one is cut here. Where the stride is the longer, nothing but the bias reaches the
    places behind each kernel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple):
        cut = [max(k - s, 0) // 2 for k, s in zip(kernel, stride, strict=True)]
        behind = [max(s - k, 0) for k, s in zip(kernel, stride, strict=True)]
        super().__init__(inputs, outputs, kernel, stride, (cut[0], cut[1], cut[2]), (behind[0], behind[1], behind[2]))
        nn.init.normal_(self.weight, std=_INIT_STD)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        time, height, width = (size * stride for size, stride in zip(features.shape[2:], self.stride, strict=True))
        return super().forward(features)[:, :, :time, :height, :width]


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=_INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer


def normalised(
    layer: nn.Module, norm: Callable[[int], nn.Module] | None, width: int, activation: nn.Module
) -> nn.Sequential:
    """layer -> batch norm (where there is one) -> activation."""
    return nn.Sequential(layer, *([norm(width)] if norm else []), activation)


class _ByBatch(nn.modules.batchnorm._BatchNorm):
    """Batch norm by the statistics of the batch at hand, when clips are made too.

    One item has no statistics to speak of (TensorFlow would turn it into zeros): it takes the running ones.
    """

    def forward(self, features: Tensor) -> Tensor:
        if self.training or len(features) == 1:
            return super().forward(features)
        return functional.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=self.eps)


class ByBatchNorm1d(_ByBatch, nn.BatchNorm1d):
    pass


class ByBatchNorm2d(_ByBatch, nn.BatchNorm2d):
    pass


class SyncByBatchNorm(_ByBatch, nn.SyncBatchNorm):
    """In training by the statistics of all workers' clips; when clips are made, by those of the batch at hand."""


def convert_sync_batch_norm(network: nn.Module) -> nn.Module:
    """`nn.SyncBatchNorm.convert_sync_batchnorm`, which would turn layers that use batch statistics into plain ones.

    Parameters, buffers and their names stay the same.
    """
    if isinstance(network, _ByBatch):
        synced = SyncByBatchNorm(network.num_features, network.eps, network.momentum)
        synced.weight, synced.bias = network.weight, network.bias
        for name, buffer in network.named_buffers(recurse=False):
            setattr(synced, name, buffer)
        return synced.train(network.training)
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children():
        setattr(network, name, convert_sync_batch_norm(child))
    return network


def require_multiples(clip: ClipConfig, kind: str, **multiples: int) -> None:
    """Raises ConfigError for a `clip` whose frames, height or width is not the multiple that its layers can make."""
    for name, multiple in multiples.items():
        if getattr(clip, name) % multiple:
            raise ConfigError(f"clip.{name}: {kind} needs a multiple of {multiple} (value {getattr(clip, name)})")


def leaky_relu() -> nn.LeakyReLU:
    return nn.LeakyReLU(_LEAKY_SLOPE)


def _initialised(convolution: Convolution) -> Convolution:
    nn.init.trunc_normal_(convolution.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
