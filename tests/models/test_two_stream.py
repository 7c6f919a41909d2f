"""Parameter counts follow the layer table of the authors' code; blending is checked against its formula."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from giffy_ray.config import ClipConfig, ConfigError, TwoStreamConfig
from giffy_ray.models.two_stream import TwoStreamDiscriminator, TwoStreamGenerator
from tests.models.test_direct_3d import count_layer_parameters
from tests.models.test_models import count_parameters

SMALL = TwoStreamConfig(widths=(2, 3, 4, 5))
CLIP = ClipConfig(frames=18, height=32, width=32)  # 32 frames are generated


def random_clips(batch: int = 3, seed: int = 0) -> Tensor:
    shape = (batch, 3, CLIP.frames, CLIP.height, CLIP.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def build_generator(model: TwoStreamConfig = SMALL) -> TwoStreamGenerator:
    torch.manual_seed(0)
    return TwoStreamGenerator(model, CLIP)


def test_parameter_counts_match_the_layer_table():
    with torch.device("meta"):
        network = TwoStreamGenerator(TwoStreamConfig(), ClipConfig())
        discriminator = TwoStreamDiscriminator(TwoStreamConfig(), ClipConfig(frames=32))
        at_30 = TwoStreamDiscriminator(TwoStreamConfig(), ClipConfig())
    square, cube = 4**2, 4**3  # kernels
    assert {name: count_parameters(child) for name, child in network.named_children()} == {
        "image_encoder": count_layer_parameters(
            (square, 6, 128, False), (square, 128, 256, True), (square, 256, 512, True), (square, 512, 1024, True)
        ),
        "video_stream": count_layer_parameters(
            (2, 1024, 1024, True), (cube, 1024, 512, True), (cube, 512, 256, True), (cube, 256, 128, True)
        ),
        "foreground": count_layer_parameters((cube, 128, 3, False)),
        "mask": count_layer_parameters((cube, 128, 1, False)),
        "static_stream": count_layer_parameters(
            (square, 1024, 512, True), (square, 512, 256, True), (square, 256, 128, True), (square, 128, 3, False)
        ),
    }
    table = (cube, 3, 128, False), (cube, 128, 256, True), (cube, 256, 512, True), (cube, 512, 1024, True)
    assert count_parameters(discriminator) == count_layer_parameters(*table, (2 * 4 * 4, 1024, 1, False))
    assert count_parameters(at_30) == count_layer_parameters(*table, (1 * 4 * 4, 1024, 1, False))


def test_generated_clip_blends_foreground_and_background():
    network, clip = build_generator(), random_clips()
    ends = clip[:, :, 0], clip[:, :, -1]
    with torch.no_grad():
        generated, penalty = network(*ends, torch.zeros(3, 0))
        foreground, mask, background = network.streams(*ends, torch.zeros(3, 0))
    assert generated.shape == foreground.shape == clip.shape
    assert mask.shape == (3, 1, *clip.shape[2:])
    assert background.shape == (3, 3, 1, *clip.shape[3:])
    for part in (generated, foreground, mask, background):
        assert 0 <= part.min().item() <= part.max().item() <= 1
    for frame in range(CLIP.frames):
        frame_mask = mask[:, :, frame]
        expected = frame_mask * foreground[:, :, frame] + (1 - frame_mask) * background[:, :, 0]
        torch.testing.assert_close(generated[:, :, frame], expected)
    torch.testing.assert_close(penalty, 0.1 * mask.mean((1, 2, 3, 4)))


@pytest.mark.parametrize(("logit", "stream"), [(30.0, 0.75), (-30.0, 0.25)])
def test_mask_selects_foreground_or_background(logit: float, stream: float):
    network, clip = build_generator(), random_clips()
    # tanh(bias) = 0.5 is 0.75 in 0..1, and -0.5 is 0.25.
    for head, bias in ((network.foreground[0], 0.5), (network.static_stream[-2], -0.5), (network.mask[0], None)):
        assert isinstance(head, nn.ConvTranspose2d | nn.ConvTranspose3d)
        assert head.bias is not None
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, logit if bias is None else float(torch.atanh(torch.tensor(bias))))
    generated, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.zeros(3, 0))
    torch.testing.assert_close(generated, torch.full_like(generated, stream))
    torch.testing.assert_close(penalty, torch.full_like(penalty, 0.1 if logit > 0 else 0.0))


def test_the_middle_of_the_generated_frames_is_kept():
    network = build_generator()
    numbered = torch.arange(32.0).view(1, 1, 32, 1, 1)
    assert network._crop_time(numbered).flatten().tolist() == list(range(7, 25))


def test_initial_weights_match_the_authors():
    network = TwoStreamGenerator(TwoStreamConfig(widths=(32, 32, 64, 64)), CLIP)
    convolution, norm = network.video_stream[1]._modules["0"], network.video_stream[1]._modules["1"]
    assert isinstance(convolution, nn.ConvTranspose3d)
    assert isinstance(norm, nn.BatchNorm3d)
    assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.02)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert convolution.bias is not None
    assert not convolution.bias.any()


@pytest.mark.parametrize("changed", [0, -1], ids=["start", "end"])
def test_output_depends_on_both_end_images(changed: int):
    network, clip = build_generator(), random_clips()
    changed_clip = clip.clone()
    changed_clip[:, :, changed] = random_clips(seed=1)[:, :, changed]
    first, second = (network(c[:, :, 0], c[:, :, -1], torch.zeros(3, 0))[0] for c in (clip, changed_clip))
    assert (first - second).abs().max().item() > 1e-4


def test_output_depends_on_the_noise_if_there_is_a_latent():
    network, clip = build_generator(TwoStreamConfig(widths=(2, 3, 4, 5), latent=2)), random_clips()
    noises = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    first, second = (network(clip[:, :, 0], clip[:, :, -1], noise)[0] for noise in noises)
    assert (first - second).abs().max().item() > 1e-4


@pytest.mark.parametrize("latent", [0, 2])
def test_every_parameter_gets_a_gradient(latent: int):
    """DistributedDataParallel would wait forever for a missing gradient."""
    network, clip = build_generator(TwoStreamConfig(widths=(2, 3, 4, 5), latent=latent)), random_clips()
    discriminator = TwoStreamDiscriminator(SMALL, CLIP)
    generated, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.randn(3, latent))
    target_logits, generated_logits = discriminator(clip, generated)
    assert target_logits.shape == generated_logits.shape == penalty.shape == (3,)
    (target_logits - generated_logits + penalty).sum().backward()
    for module in (network, discriminator):
        assert not [name for name, weight in module.named_parameters() if weight.grad is None]
    # Only biases before batch norm, which have no effect, may have a zero gradient.
    zero_gradients = [name for name, weight in network.named_parameters() if not weight.grad.any()]  # type: ignore[union-attr]
    assert all(name.endswith("bias") for name in zero_gradients)


def test_batch_norm_treats_target_and_generated_clips_separately():
    discriminator, clip = TwoStreamDiscriminator(SMALL, CLIP), random_clips()
    target_logits, generated_logits = discriminator(clip, clip.flip(2))
    torch.testing.assert_close(discriminator(clip, 1 - clip)[0], target_logits)
    torch.testing.assert_close(discriminator(clip.flip(2), clip)[0], generated_logits)


@pytest.mark.parametrize("network", [TwoStreamGenerator, TwoStreamDiscriminator])
@pytest.mark.parametrize(("field", "size"), [("frames", 15), ("height", 24), ("width", 40)])
def test_unsupported_sizes_are_rejected(network: type[nn.Module], field: str, size: int):
    with pytest.raises(ConfigError, match=rf"clip\.{field}: two_stream .*\(value {size}\)"):
        network(SMALL, dataclasses.replace(ClipConfig(), **{field: size}))
