"""Layers of the paper's networks: PyTorch layers with TensorFlow's SAME padding and the authors' initialisation.

Features are floats with channels first. Weights are drawn from a normal distribution with standard deviation 0.02,
which convolutions truncate at two standard deviations; biases start at 0. Both follow the code that the paper builds
on.
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
    """Convolution with SAME padding, for inputs whose height and width are multiples of `stride`.

    [batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]
    """
    return _initialise(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2))


def conv3d(inputs: int, outputs: int, kernel: Triple, stride: Triple) -> nn.Conv3d:
    """Convolution with SAME padding, for inputs whose time, height and width are multiples of `stride`.

    [batch, inputs, time, height, width] -> [batch, outputs, time / stride, height / stride, width / stride]
    """
    time, height, width = ((k - s + 1) // 2 for k, s in zip(kernel, stride, strict=True))
    return _initialise(nn.Conv3d(inputs, outputs, kernel, stride, padding=(time, height, width)))


class SameConvTranspose3d(nn.ConvTranspose3d):
    """Transposed convolution with TensorFlow's SAME padding: every axis grows exactly by the factor `stride`.

    TensorFlow crops `kernel - stride` from the full output, the smaller half at the front. PyTorch's `padding` crops
    both sides equally, so `forward` crops an odd remainder. If the stride exceeds the kernel, the positions behind each
    kernel hold only the bias.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple):
        time, height, width = (max(k - s, 0) // 2 for k, s in zip(kernel, stride, strict=True))
        padding = (time, height, width)
        time, height, width = (max(s - k, 0) for k, s in zip(kernel, stride, strict=True))
        output_padding = (time, height, width)
        super().__init__(inputs, outputs, kernel, stride, padding, output_padding)
        nn.init.normal_(self.weight, std=_INIT_STD)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        time, height, width = (size * stride for size, stride in zip(features.shape[2:], self.stride, strict=True))
        return super().forward(features)[:, :, :time, :height, :width]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer with the authors' initialisation."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=_INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer


def add_norm_activation(
    layer: nn.Module, norm: Callable[[int], nn.Module] | None, width: int, activation: nn.Module
) -> nn.Sequential:
    """Returns layer -> norm -> activation; no norm if `norm` is None. `width`: channels of the layer's output."""
    return nn.Sequential(layer, *([norm(width)] if norm else []), activation)


class _BatchStatisticsNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm that uses the statistics of the current batch in eval mode, too.

    A batch of one uses the running statistics: its own would turn it into zeros, as they do in TensorFlow.
    """

    def forward(self, features: Tensor) -> Tensor:
        if self.training or len(features) == 1:
            return super().forward(features)
        return functional.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=self.eps)


class BatchStatisticsNorm1d(_BatchStatisticsNorm, nn.BatchNorm1d):
    """`_BatchStatisticsNorm` of [batch, channels]."""


class BatchStatisticsNorm2d(_BatchStatisticsNorm, nn.BatchNorm2d):
    """`_BatchStatisticsNorm` of [batch, channels, height, width]."""


class SyncBatchStatisticsNorm(_BatchStatisticsNorm, nn.SyncBatchNorm):
    """Uses the statistics of all ranks' batches in training, and of the current batch in eval mode."""


def convert_sync_batch_norm(network: nn.Module) -> nn.Module:
    """Converts batch norms to synchronised ones and keeps parameters, buffers and their names.

    Unlike `nn.SyncBatchNorm.convert_sync_batchnorm`, it keeps eval-mode batch statistics of layers that use them.
    """
    if isinstance(network, _BatchStatisticsNorm):
        synced = SyncBatchStatisticsNorm(network.num_features, network.eps, network.momentum)
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
    """Raises ConfigError unless the named dimensions of `clip` are multiples of the given values.

    `kind` names the model in the message.
    """
    for name, multiple in multiples.items():
        size = getattr(clip, name)
        if size % multiple:
            raise ConfigError(f"clip.{name}: {kind} needs a multiple of {multiple} (value {size})")


def leaky_relu() -> nn.LeakyReLU:
    """Leaky ReLU with the authors' slope."""
    return nn.LeakyReLU(_LEAKY_SLOPE)


def _initialise(convolution: Convolution) -> Convolution:
    nn.init.trunc_normal_(convolution.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
