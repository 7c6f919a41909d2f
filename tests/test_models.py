"""Parameter totals are those of the report's code; padding is checked against a plain loop."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from giffy_ray import models
from giffy_ray.config import ClipConfig, ConfigError, CVAEConfig, Experiment, override
from giffy_ray.models.baselines import linear
from giffy_ray.models.blocks import SameConvTranspose3d, conv2d, conv3d


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_table_1_totals():
    with torch.device("meta"):
        network = models.build(CVAEConfig(), ClipConfig())
    totals = {name: parameters(child) for name, child in network.named_children()}
    assert totals == {"image_encoder": 8_758_936, "video_encoder": 263_208_816, "generator": 213_518_547}
    assert parameters(network) == 485_486_299


def test_table_1_totals_without_batch_norm():
    with torch.device("meta"):
        network = models.build(CVAEConfig(batch_norm=False), ClipConfig())
    assert parameters(network) == 485_317_179


def test_shapes_and_ranges(tiny: Experiment):
    network = models.build(tiny.model, tiny.clip)
    clip = torch.rand(2, 3, 6, 16, 16)
    with torch.no_grad():
        made, mean, std = network(clip, torch.zeros(2, 3))
    assert made.shape == clip.shape
    assert mean.shape == std.shape == (2, 3)
    assert float(std.min()) > 0
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert network.generate(clip[:, :, 0], clip[:, :, -1], torch.zeros(2, 3)).shape == clip.shape


@pytest.mark.parametrize(("field", "size"), [("clip.frames", 32), ("clip.height", 24), ("clip.width", 40)])
def test_a_size_that_the_layers_cannot_make_is_refused(tiny: Experiment, field: str, size: int):
    wrong = override(tiny, {field: size})
    with pytest.raises(ConfigError, match=f"{field}.*{size}"):
        models.build(wrong.model, wrong.clip)


TABLE_1_DECONVOLUTIONS = [
    ((1, 2, 2), (1, 1, 1)),
    ((3, 2, 2), (3, 2, 2)),
    ((3, 2, 2), (1, 2, 2)),
    ((3, 4, 4), (1, 2, 2)),
    ((2, 4, 4), (2, 1, 1)),
]


@pytest.mark.parametrize(("kernel", "stride"), TABLE_1_DECONVOLUTIONS)
def test_transposed_same_padding_is_tensorflows(kernel: tuple, stride: tuple):
    layer = SameConvTranspose3d(2, 3, kernel, stride).double()
    features = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = _plain_transposed(features[0].numpy(), layer.weight.detach().numpy(), stride)
    assert np.allclose(layer(features)[0].detach().numpy(), expected)


def _plain_transposed(features: np.ndarray, weight: np.ndarray, stride: tuple) -> np.ndarray:
    """The gradient of a SAME convolution, written out: TensorFlow pads (k-s)//2 in front and the rest behind."""
    sizes, kernel = features.shape[1:], weight.shape[2:]
    out = np.zeros((weight.shape[1], *(n * s for n, s in zip(sizes, stride, strict=True))))
    for place in itertools.product(*(range(n) for n in sizes)):
        for tap in itertools.product(*(range(k) for k in kernel)):
            at = [p * s + t - (k - s) // 2 for p, s, t, k in zip(place, stride, tap, kernel, strict=True)]
            if all(0 <= a < n for a, n in zip(at, out.shape[1:], strict=True)):
                out[:, *at] += features[:, *place] @ weight[:, :, *tap]
    return out


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 1)])
def test_same_padding_of_images(kernel: int, stride: int):
    layer = conv2d(2, 3, kernel, stride).double()
    image = torch.randn(1, 2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = layer(image)[0].detach().numpy()
    expected = np.zeros((3, 8 // stride, 6 // stride))
    front = (kernel - stride) // 2 if stride > 1 else kernel // 2
    for out_y, out_x in itertools.product(range(expected.shape[1]), range(expected.shape[2])):
        for tap_y, tap_x in itertools.product(range(kernel), repeat=2):
            y, x = out_y * stride + tap_y - front, out_x * stride + tap_x - front
            if 0 <= y < 8 and 0 <= x < 6:
                expected[:, out_y, out_x] += (
                    layer.weight[:, :, tap_y, tap_x].detach().numpy() @ image[0, :, y, x].numpy()
                )
    assert np.allclose(made, expected)


def test_video_convolution_halves_space_and_keeps_time():
    assert conv3d(3, 5, (3, 4, 4), (1, 2, 2))(torch.zeros(1, 3, 30, 64, 32)).shape == (1, 5, 30, 32, 16)


def test_initial_weights():
    weight = conv3d(64, 64, (3, 4, 4), (1, 2, 2)).weight
    # A normal of std 0.02 cut at two deviations has std 0.02 * 0.8796.
    assert float(weight.detach().std()) == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert float(weight.detach().abs().max()) <= 0.04


def test_linear_interpolation_reaches_both_ends_and_goes_straight():
    start, end = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.full((1, 2, 2, 3), 58, dtype=torch.uint8)
    clip = linear(start, end, 30)
    assert clip[0, :, 0, 0, 0].tolist() == [2 * frame for frame in range(30)]
    assert torch.equal(linear(end, start, 30), clip.flip(1))
