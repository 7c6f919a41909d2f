"""Parameter totals are those of the report's code; padding is checked against a plain loop."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from giffy_ray import models
from giffy_ray.config import (
    AdvancedCVAEConfig,
    BetweenConfig,
    CGANConfig,
    ClipConfig,
    ConfigError,
    CVAEConfig,
    Experiment,
    override,
)
from giffy_ray.models.advanced_cvae import AdvancedGenerator
from giffy_ray.models.baselines import linear
from giffy_ray.models.cvae import ImageEncoder
from giffy_ray.models.layers import SameConvTranspose3d, conv2d, conv3d

ADVANCED = {
    "model.kind": "advanced_cvae",
    "model.image_widths": (2, 2, 2, 2),
    "model.image_hidden": 4,
    "model.image_code": 4,
    "model.video_widths": (2, 2, 2, 2),
    "model.video_hidden": 4,
    "model.latent": 3,
    "model.generator_widths": (2, 2, 2, 2, 2),
    "clip.frames": 10,
    "clip.height": 32,
    "clip.width": 64,
}

CGAN = {
    "model.kind": "cgan",
    "model.image_widths": (2, 2, 2, 2),
    "model.image_hidden": 4,
    "model.image_code": 4,
    "model.latent": 3,
    "model.generator_widths": (2, 2, 2, 2, 2),
    "model.discriminator_widths": (2, 2, 2),
    "model.discriminator_hidden": 4,
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 16,
}
TWO_STREAM = {
    "model.kind": "two_stream",
    "model.widths": (2, 2, 2, 2),
    "clip.frames": 18,
    "clip.height": 16,
    "clip.width": 16,
}
DIRECT_3D = {
    "model.kind": "direct_3d",
    "model.latent": 3,
    "model.image_widths": (2, 2, 2, 2),
    "model.latent_width": 4,
    "model.latent_blocks": 4,
    "model.generator_widths": (2, 2, 2),
    "model.discriminator_widths": (2, 2, 2, 2),
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 16,
}


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


def test_advanced_totals():
    with torch.device("meta"):
        network = models.build(AdvancedCVAEConfig(), ClipConfig())
        one_channel = AdvancedGenerator(AdvancedCVAEConfig(time_channels=1), ClipConfig())
        half_size = AdvancedGenerator(AdvancedCVAEConfig(time_channels=1, joined="half_size"), ClipConfig())
    totals = {name: parameters(child) for name, child in network.named_children()}
    assert totals == {"image_encoder": 8_758_936, "video_encoder": 263_208_816, "generator": 4_528_515}
    assert parameters(network) == 276_496_267
    assert parameters(one_channel) == 4_527_747
    # Joined a layer earlier, 7 more channels go into a kernel of 3x4x4 for 8, and none into the next one.
    assert parameters(half_size) == 4_527_747 + 7 * 48 * 8 - 7 * 48 * 8


def test_cgan_totals():
    with torch.device("meta"):
        generator = models.build(CGANConfig(), ClipConfig())
        discriminator = models.discriminators(CGANConfig(), ClipConfig())["discriminator"]
        shorter = models.build(CGANConfig(image_last_convolution=False), ClipConfig())
        as_table_1 = CGANConfig(discriminator_widths=(64, 128, 256, 512), discriminator_hidden=1024)
        large = models.discriminators(as_table_1, ClipConfig())["discriminator"]
    assert parameters(generator) == 222_277_483
    assert parameters(discriminator) == 15_854_641
    assert parameters(shorter.get_submodule("image_encoder")) == 4_490_520
    assert parameters(large) == 259_931_841


def test_who_judges_which_model():
    with torch.device("meta"):
        judges = {
            kind: set(models.discriminators(override(Experiment(), {"model.kind": kind}).model, ClipConfig()))
            for kind in ("cvae", "advanced_cvae", "cgan", "two_stream", "direct_3d", "between")
        }
        judges["sharp"] = set(models.discriminators(BetweenConfig(adversarial_weight=0.1), ClipConfig()))
    one, both, nobody = {"discriminator"}, {"video_discriminator", "image_discriminator"}, set()
    assert judges == {
        "cvae": nobody,
        "advanced_cvae": nobody,
        "cgan": one,
        "two_stream": one,
        "direct_3d": both,
        "between": nobody,
        "sharp": one,
    }


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


@pytest.mark.parametrize(("field", "size"), [("clip.frames", 6), ("clip.height", 48), ("clip.width", 16)])
def test_the_advanced_layers_make_multiples_of_10_and_32(field: str, size: int):
    wrong = override(Experiment(), {**ADVANCED, field: size})
    with pytest.raises(ConfigError, match=f"{field}: advanced_cvae .*{size}"):
        models.build(wrong.model, wrong.clip)


def test_a_discriminator_that_halves_too_often_is_refused():
    model, clip = CGANConfig(discriminator_widths=(2, 2, 2, 2)), ClipConfig(frames=6, height=16, width=24)
    with pytest.raises(ConfigError, match=r"clip\.width: .*4 model\.discriminator_widths.*16 \(value 24\)"):
        models.discriminators(model, clip)


@pytest.mark.parametrize("joined", ["half_size", "full_size"])
@pytest.mark.parametrize("time_channels", [1, 3])
def test_every_frame_of_the_advanced_generator_sees_the_ends_and_its_number(joined: str, time_channels: int):
    small = override(Experiment(), {**ADVANCED, "model.join_stage": joined, "model.time_channels": time_channels})
    network = models.build(small.model, small.clip)
    generator = network.get_submodule("generator")
    inputs = []
    generator.get_submodule("after").register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    start, end = torch.rand(2, 2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert network.generate(start, end, torch.zeros(2, 3)).shape == (2, 3, 10, 32, 64)  # type: ignore[operator]

    (joint,) = inputs
    if joined == "half_size":  # the mean of each 2x2
        start, end = ((i[..., ::2, :] + i[..., 1::2, :]) / 2 for i in (start, end))
        start, end = ((i[..., ::2] + i[..., 1::2]) / 2 for i in (start, end))
    assert joint.shape[1:] == (2 + 6 + time_channels, 10, *start.shape[2:])
    for frame in range(10):
        torch.testing.assert_close(joint[:, 2:5, frame], start)
        torch.testing.assert_close(joint[:, 5:8, frame], end)
        torch.testing.assert_close(joint[:, 8:, frame], torch.full_like(joint[:, 8:, frame], frame / 10))


@pytest.mark.parametrize("kind", ["advanced_cvae", "cgan"])
def test_every_weight_is_trained(kind: str):
    """What DistributedDataParallel would wait for in vain."""
    small = override(Experiment(), ADVANCED if kind == "advanced_cvae" else CGAN)
    shape = (3, 3, small.clip.frames, small.clip.height, small.clip.width)
    clip = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    network = models.build(small.model, small.clip)
    given = (clip,) if kind == "advanced_cvae" else (clip[:, :, 0], clip[:, :, -1])
    outputs = network(*given, torch.ones(3, 3))
    judges = models.discriminators(small.model, small.clip).values()
    for judge in judges:
        outputs += judge(clip, outputs[0].detach())
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for trained in (network, *judges):
        assert not [name for name, weight in trained.named_parameters() if weight.grad is None]


def test_the_cgan_makes_clips_and_judges_each_by_itself():
    small = override(Experiment(), CGAN)
    generator = models.build(small.model, small.clip)
    clip = torch.rand(4, 3, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    made, penalty = generator(clip[:, :, 0], clip[:, :, -1], torch.ones(4, 3))
    assert made.shape == clip.shape
    assert 0 <= made.min().item() <= made.max().item() <= 1
    assert penalty.tolist() == [0] * 4
    judge = models.discriminators(small.model, small.clip)["discriminator"]
    real_logits, made_logits = judge(clip, made)
    assert real_logits.shape == made_logits.shape == (4,)
    # To batch norm the two are batches of their own: one does not depend on what the other holds.
    torch.testing.assert_close(judge(clip, 1 - made)[0], real_logits)


def test_the_authors_image_encoder_normalises_by_its_batch_when_making_too():
    model = CVAEConfig(image_widths=(2, 2, 2, 2), image_hidden=4, image_code=5, image_batch_statistics=True)
    encoder = ImageEncoder(model, ClipConfig(height=16, width=16), model.image_batch_statistics)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trained = encoder.train()(images)
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    made = encoder.eval()(images)
    torch.testing.assert_close(made, trained)
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.named_buffers())
    # One image has no statistics of its own; torch's batch norm in eval mode is the reference.
    plain = ImageEncoder(model, ClipConfig(height=16, width=16))
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(images[:1]), plain.eval()(images[:1]))
    assert not torch.allclose(plain(images), made, atol=1e-3)


DECONVOLUTIONS = [
    ((1, 2, 2), (1, 1, 1)),
    ((3, 2, 2), (3, 2, 2)),
    ((3, 2, 2), (1, 2, 2)),
    ((3, 4, 4), (1, 2, 2)),
    ((2, 4, 4), (2, 1, 1)),
    # of the advanced CVAE
    ((3, 4, 4), (5, 4, 4)),
    ((3, 4, 4), (2, 2, 2)),
    ((3, 4, 4), (1, 1, 1)),
]


@pytest.mark.parametrize(("kernel", "stride"), DECONVOLUTIONS)
def test_transposed_same_padding_is_tensorflows(kernel: tuple, stride: tuple):
    layer = SameConvTranspose3d(2, 3, kernel, stride).double()
    features = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = _plain_transposed(features[0].numpy(), layer.weight.detach().numpy(), stride)
    assert np.allclose(layer(features)[0].detach().numpy(), expected)


def _plain_transposed(features: np.ndarray, weight: np.ndarray, stride: tuple) -> np.ndarray:
    """The gradient of a SAME convolution, written out: TensorFlow pads max(k-s, 0)//2 in front, the rest behind."""
    sizes, kernel = features.shape[1:], weight.shape[2:]
    out = np.zeros((weight.shape[1], *(n * s for n, s in zip(sizes, stride, strict=True))))
    for place in itertools.product(*(range(n) for n in sizes)):
        for tap in itertools.product(*(range(k) for k in kernel)):
            at = [p * s + t - max(k - s, 0) // 2 for p, s, t, k in zip(place, stride, tap, kernel, strict=True)]
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


def test_same_padding_of_clips():
    """TensorFlow pads max(k-s, 0) in all, the smaller half in front."""
    kernel, stride, sizes = (3, 4, 4), (1, 2, 2), (3, 6, 4)
    layer = conv3d(2, 3, kernel, stride).double()
    clip = torch.randn(1, 2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((3, 3, 3, 2))
    for place in itertools.product(*(range(n) for n in expected.shape[1:])):
        for tap in itertools.product(*(range(k) for k in kernel)):
            at = [p * s + t - (k - s) // 2 for p, s, t, k in zip(place, stride, tap, kernel, strict=True)]
            if all(0 <= a < n for a, n in zip(at, sizes, strict=True)):
                expected[:, *place] += layer.weight[:, :, *tap].detach().numpy() @ clip[0, :, *at].numpy()
    assert np.allclose(layer(clip)[0].detach().numpy(), expected)


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
