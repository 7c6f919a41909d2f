"""Parameter counts match the authors' code; padding is checked against plain loops."""

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


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_cvae_has_table_1s_parameter_counts():
    with torch.device("meta"):
        network = models.build(CVAEConfig(), ClipConfig())
    totals = {name: count_parameters(child) for name, child in network.named_children()}
    assert totals == {"image_encoder": 8_758_936, "video_encoder": 263_208_816, "generator": 213_518_547}
    assert count_parameters(network) == 485_486_299


def test_cvae_without_batch_norm_has_table_1s_parameter_count():
    with torch.device("meta"):
        network = models.build(CVAEConfig(batch_norm=False), ClipConfig())
    assert count_parameters(network) == 485_317_179


def test_advanced_cvae_has_the_authors_parameter_counts():
    with torch.device("meta"):
        network = models.build(AdvancedCVAEConfig(), ClipConfig())
        one_channel = AdvancedGenerator(AdvancedCVAEConfig(time_channels=1), ClipConfig())
        half_size = AdvancedGenerator(AdvancedCVAEConfig(time_channels=1, join_stage="half_size"), ClipConfig())
    totals = {name: count_parameters(child) for name, child in network.named_children()}
    assert totals == {"image_encoder": 8_758_936, "video_encoder": 263_208_816, "generator": 4_528_515}
    assert count_parameters(network) == 276_496_267
    assert count_parameters(one_channel) == 4_527_747
    # Joining one layer earlier moves 7 input channels from one 3x4x4 kernel with 8 outputs to another.
    assert count_parameters(half_size) == 4_527_747 + 7 * 48 * 8 - 7 * 48 * 8


def test_cgan_has_the_authors_parameter_counts():
    with torch.device("meta"):
        generator = models.build(CGANConfig(), ClipConfig())
        discriminator = models.build_discriminators(CGANConfig(), ClipConfig())["discriminator"]
        shorter = models.build(CGANConfig(image_last_convolution=False), ClipConfig())
        as_table_1 = CGANConfig(discriminator_widths=(64, 128, 256, 512), discriminator_hidden=1024)
        large = models.build_discriminators(as_table_1, ClipConfig())["discriminator"]
    assert count_parameters(generator) == 222_277_483
    assert count_parameters(discriminator) == 15_854_641
    assert count_parameters(shorter.get_submodule("image_encoder")) == 4_490_520
    assert count_parameters(large) == 259_931_841


def test_each_kind_has_its_discriminators():
    kinds = ("cvae", "advanced_cvae", "cgan", "two_stream", "direct_3d", "between")
    with torch.device("meta"):
        names = {
            kind: set(models.build_discriminators(override(Experiment(), {"model.kind": kind}).model, ClipConfig()))
            for kind in kinds
        }
        names["sharp"] = set(models.build_discriminators(BetweenConfig(adversarial_weight=0.1), ClipConfig()))
    assert names == {
        "cvae": set(),
        "advanced_cvae": set(),
        "cgan": {"discriminator"},
        "two_stream": {"discriminator"},
        "direct_3d": {"video_discriminator", "image_discriminator"},
        "between": set(),
        "sharp": {"discriminator"},
    }


def test_cvae_output_has_the_clips_shape_and_range(tiny: Experiment):
    network = models.build(tiny.model, tiny.clip)
    clip = torch.rand(2, 3, 6, 16, 16)
    with torch.no_grad():
        generated, mean, std = network(clip, torch.zeros(2, 3))
    assert generated.shape == clip.shape
    assert mean.shape == std.shape == (2, 3)
    assert float(std.min()) > 0
    assert 0 <= float(generated.min()) <= float(generated.max()) <= 1
    assert network.generate(clip[:, :, 0], clip[:, :, -1], torch.zeros(2, 3)).shape == clip.shape


@pytest.mark.parametrize(("field", "size"), [("clip.frames", 32), ("clip.height", 24), ("clip.width", 40)])
def test_cvae_rejects_unsupported_sizes(tiny: Experiment, field: str, size: int):
    unsupported = override(tiny, {field: size})
    with pytest.raises(ConfigError, match=f"{field}.*{size}"):
        models.build(unsupported.model, unsupported.clip)


@pytest.mark.parametrize(("field", "size"), [("clip.frames", 6), ("clip.height", 48), ("clip.width", 16)])
def test_advanced_cvae_rejects_unsupported_sizes(field: str, size: int):
    unsupported = override(Experiment(), {**ADVANCED, field: size})
    with pytest.raises(ConfigError, match=f"{field}: advanced_cvae .*{size}"):
        models.build(unsupported.model, unsupported.clip)


def test_cgan_discriminator_rejects_too_many_layers_for_the_size():
    model, clip = CGANConfig(discriminator_widths=(2, 2, 2, 2)), ClipConfig(frames=6, height=16, width=24)
    with pytest.raises(ConfigError, match=r"clip\.width: .*4 model\.discriminator_widths.*16 \(value 24\)"):
        models.build_discriminators(model, clip)


@pytest.mark.parametrize("join_stage", ["half_size", "full_size"])
@pytest.mark.parametrize("time_channels", [1, 3])
def test_advanced_generator_joins_end_images_and_time_to_every_frame(join_stage: str, time_channels: int):
    small = override(Experiment(), {**ADVANCED, "model.join_stage": join_stage, "model.time_channels": time_channels})
    network = models.build(small.model, small.clip)
    generator = network.get_submodule("generator")
    joined_inputs = []
    generator.get_submodule("after").register_forward_pre_hook(lambda _, arguments: joined_inputs.append(arguments[0]))
    start, end = torch.rand(2, 2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert network.generate(start, end, torch.zeros(2, 3)).shape == (2, 3, 10, 32, 64)  # type: ignore[operator]

    (joined,) = joined_inputs
    if join_stage == "half_size":
        start, end = _halve(start), _halve(end)
    assert joined.shape[1:] == (2 + 6 + time_channels, 10, *start.shape[2:])
    for frame in range(10):
        torch.testing.assert_close(joined[:, 2:5, frame], start)
        torch.testing.assert_close(joined[:, 5:8, frame], end)
        torch.testing.assert_close(joined[:, 8:, frame], torch.full_like(joined[:, 8:, frame], frame / 10))


def _halve(images: torch.Tensor) -> torch.Tensor:
    """Returns the means of squares of 2x2 pixels."""
    images = (images[..., ::2, :] + images[..., 1::2, :]) / 2
    return (images[..., ::2] + images[..., 1::2]) / 2


@pytest.mark.parametrize("kind", ["advanced_cvae", "cgan"])
def test_every_parameter_gets_a_gradient(kind: str):
    """DistributedDataParallel would wait forever for a missing gradient."""
    small = override(Experiment(), ADVANCED if kind == "advanced_cvae" else CGAN)
    shape = (3, 3, small.clip.frames, small.clip.height, small.clip.width)
    clip = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    network = models.build(small.model, small.clip)
    inputs = (clip,) if kind == "advanced_cvae" else (clip[:, :, 0], clip[:, :, -1])
    outputs = network(*inputs, torch.ones(3, 3))
    discriminators = models.build_discriminators(small.model, small.clip).values()
    for discriminator in discriminators:
        outputs += discriminator(clip, outputs[0].detach())
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for module in (network, *discriminators):
        assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]


def test_cgan_generates_clips_and_scores_both_batches_separately():
    small = override(Experiment(), CGAN)
    generator = models.build(small.model, small.clip)
    clip = torch.rand(4, 3, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    generated, penalty = generator(clip[:, :, 0], clip[:, :, -1], torch.ones(4, 3))
    assert generated.shape == clip.shape
    assert 0 <= generated.min().item() <= generated.max().item() <= 1
    assert penalty.tolist() == [0] * 4
    discriminator = models.build_discriminators(small.model, small.clip)["discriminator"]
    target_logits, generated_logits = discriminator(clip, generated)
    assert target_logits.shape == generated_logits.shape == (4,)
    # Batch norm treats them as separate batches, so the logits of one do not depend on the other.
    torch.testing.assert_close(discriminator(clip, 1 - generated)[0], target_logits)


def test_image_encoder_can_use_batch_statistics_in_eval_mode():
    model = CVAEConfig(image_widths=(2, 2, 2, 2), image_hidden=4, image_code=5, image_batch_statistics=True)
    encoder = ImageEncoder(model, ClipConfig(height=16, width=16), model.image_batch_statistics)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    train_codes = encoder.train()(images)
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    eval_codes = encoder.eval()(images)
    torch.testing.assert_close(eval_codes, train_codes)
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.named_buffers())
    # A single image uses the running statistics, as torch's batch norm does in eval mode.
    plain = ImageEncoder(model, ClipConfig(height=16, width=16))
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(images[:1]), plain.eval()(images[:1]))
    assert not torch.allclose(plain(images), eval_codes, atol=1e-3)


DECONVOLUTIONS = [
    ((1, 2, 2), (1, 1, 1)),
    ((3, 2, 2), (3, 2, 2)),
    ((3, 2, 2), (1, 2, 2)),
    ((3, 4, 4), (1, 2, 2)),
    ((2, 4, 4), (2, 1, 1)),
    # advanced CVAE
    ((3, 4, 4), (5, 4, 4)),
    ((3, 4, 4), (2, 2, 2)),
    ((3, 4, 4), (1, 1, 1)),
]


@pytest.mark.parametrize(("kernel", "stride"), DECONVOLUTIONS)
def test_transposed_same_padding_matches_tensorflow(kernel: tuple, stride: tuple):
    layer = SameConvTranspose3d(2, 3, kernel, stride).double()
    features = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = _plain_transposed(features[0].numpy(), layer.weight.detach().numpy(), stride)
    assert np.allclose(layer(features)[0].detach().numpy(), expected)


def _plain_transposed(features: np.ndarray, weight: np.ndarray, stride: tuple) -> np.ndarray:
    """Gradient of a SAME convolution as a plain loop: TensorFlow pads max(k-s, 0)//2 at the front, the rest behind."""
    sizes, kernel = features.shape[1:], weight.shape[2:]
    out = np.zeros((weight.shape[1], *(n * s for n, s in zip(sizes, stride, strict=True))))
    for position in itertools.product(*(range(n) for n in sizes)):
        for tap in itertools.product(*(range(k) for k in kernel)):
            target = [p * s + t - max(k - s, 0) // 2 for p, s, t, k in zip(position, stride, tap, kernel, strict=True)]
            if all(0 <= a < n for a, n in zip(target, out.shape[1:], strict=True)):
                out[:, *target] += features[:, *position] @ weight[:, :, *tap]
    return out


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 1)])
def test_conv2d_pads_like_tensorflow(kernel: int, stride: int):
    layer = conv2d(2, 3, kernel, stride).double()
    image = torch.randn(1, 2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = layer(image)[0].detach().numpy()
    expected = np.zeros((3, 8 // stride, 6 // stride))
    front = (kernel - stride) // 2 if stride > 1 else kernel // 2
    for out_y, out_x in itertools.product(range(expected.shape[1]), range(expected.shape[2])):
        for tap_y, tap_x in itertools.product(range(kernel), repeat=2):
            y, x = out_y * stride + tap_y - front, out_x * stride + tap_x - front
            if 0 <= y < 8 and 0 <= x < 6:
                expected[:, out_y, out_x] += (
                    layer.weight[:, :, tap_y, tap_x].detach().numpy() @ image[0, :, y, x].numpy()
                )
    assert np.allclose(output, expected)


def test_conv3d_pads_like_tensorflow():
    """TensorFlow pads max(k-s, 0) in total, the smaller half at the front."""
    kernel, stride, sizes = (3, 4, 4), (1, 2, 2), (3, 6, 4)
    layer = conv3d(2, 3, kernel, stride).double()
    clip = torch.randn(1, 2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((3, 3, 3, 2))
    for position in itertools.product(*(range(n) for n in expected.shape[1:])):
        for tap in itertools.product(*(range(k) for k in kernel)):
            source = [p * s + t - (k - s) // 2 for p, s, t, k in zip(position, stride, tap, kernel, strict=True)]
            if all(0 <= a < n for a, n in zip(source, sizes, strict=True)):
                expected[:, *position] += layer.weight[:, :, *tap].detach().numpy() @ clip[0, :, *source].numpy()
    assert np.allclose(layer(clip)[0].detach().numpy(), expected)


def test_initial_weights_are_truncated_normal():
    weight = conv3d(64, 64, (3, 4, 4), (1, 2, 2)).weight
    # A normal with std 0.02, truncated at two standard deviations, has std 0.02 * 0.8796.
    assert float(weight.detach().std()) == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert float(weight.detach().abs().max()) <= 0.04


def test_linear_interpolation_reaches_both_ends_in_equal_steps():
    start, end = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.full((1, 2, 2, 3), 58, dtype=torch.uint8)
    clip = linear(start, end, 30)
    assert clip[0, :, 0, 0, 0].tolist() == [2 * frame for frame in range(30)]
    assert torch.equal(linear(end, start, 30), clip.flip(1))
