"""Totals are summed up from the layer table of the authors' code; what the streams blend to is written out."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from giffy_ray.config import ClipConfig, ConfigError, TwoStreamConfig
from giffy_ray.models.two_stream import TwoStreamDiscriminator, TwoStreamGenerator
from tests.models.test_direct_3d import total
from tests.models.test_models import parameters

SMALL = TwoStreamConfig(widths=(2, 3, 4, 5))
CLIP = ClipConfig(frames=18, height=32, width=32)  # 32 are made


def clips(batch: int = 3, seed: int = 0) -> Tensor:
    shape = (batch, 3, CLIP.frames, CLIP.height, CLIP.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def generator(model: TwoStreamConfig = SMALL) -> TwoStreamGenerator:
    torch.manual_seed(0)
    return TwoStreamGenerator(model, CLIP)


def test_totals_are_those_of_the_layer_table():
    with torch.device("meta"):
        network = TwoStreamGenerator(TwoStreamConfig(), ClipConfig())
        discriminator = TwoStreamDiscriminator(TwoStreamConfig(), ClipConfig(frames=32))
        at_30 = TwoStreamDiscriminator(TwoStreamConfig(), ClipConfig())
    flat, cube = 4**2, 4**3
    assert {name: parameters(child) for name, child in network.named_children()} == {
        "image_encoder": total(
            (flat, 6, 128, False), (flat, 128, 256, True), (flat, 256, 512, True), (flat, 512, 1024, True)
        ),
        "video_stream": total(
            (2, 1024, 1024, True), (cube, 1024, 512, True), (cube, 512, 256, True), (cube, 256, 128, True)
        ),
        "foreground": total((cube, 128, 3, False)),
        "mask": total((cube, 128, 1, False)),
        "static_stream": total(
            (flat, 1024, 512, True), (flat, 512, 256, True), (flat, 256, 128, True), (flat, 128, 3, False)
        ),
    }
    table = (cube, 3, 128, False), (cube, 128, 256, True), (cube, 256, 512, True), (cube, 512, 1024, True)
    assert parameters(discriminator) == total(*table, (2 * 4 * 4, 1024, 1, False))
    assert parameters(at_30) == total(*table, (1 * 4 * 4, 1024, 1, False))


def test_made_is_the_foreground_before_the_background():
    network, clip = generator(), clips()
    ends = clip[:, :, 0], clip[:, :, -1]
    with torch.no_grad():
        made, penalty = network(*ends, torch.zeros(3, 0))
        foreground, mask, background = network.streams(*ends, torch.zeros(3, 0))
    assert made.shape == foreground.shape == clip.shape
    assert mask.shape == (3, 1, *clip.shape[2:])
    assert background.shape == (3, 3, 1, *clip.shape[3:])
    for part in (made, foreground, mask, background):
        assert 0 <= part.min().item() <= part.max().item() <= 1
    for frame in range(CLIP.frames):
        shown = mask[:, :, frame]
        expected = shown * foreground[:, :, frame] + (1 - shown) * background[:, :, 0]
        torch.testing.assert_close(made[:, :, frame], expected)
    torch.testing.assert_close(penalty, 0.1 * mask.mean((1, 2, 3, 4)))


@pytest.mark.parametrize(("logit", "stream"), [(30.0, 0.75), (-30.0, 0.25)])
def test_a_mask_of_one_shows_the_foreground_and_of_none_the_background(logit: float, stream: float):
    network, clip = generator(), clips()
    # tanh(bias) = 0.5 is 0.75 in 0..1, and -0.5 is 0.25.
    for head, bias in ((network.foreground[0], 0.5), (network.static_stream[-2], -0.5), (network.mask[0], None)):
        assert isinstance(head, nn.ConvTranspose2d | nn.ConvTranspose3d)
        assert head.bias is not None
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, logit if bias is None else float(torch.atanh(torch.tensor(bias))))
    made, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.zeros(3, 0))
    torch.testing.assert_close(made, torch.full_like(made, stream))
    torch.testing.assert_close(penalty, torch.full_like(penalty, 0.1 if logit > 0 else 0.0))


def test_the_middle_of_what_is_made_is_kept():
    network = generator()
    numbered = torch.arange(32.0).view(1, 1, 32, 1, 1)
    assert network._kept(numbered).flatten().tolist() == list(range(7, 25))


def test_initial_weights():
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
def test_both_end_images_matter(changed: int):
    network, clip = generator(), clips()
    other = clip.clone()
    other[:, :, changed] = clips(seed=1)[:, :, changed]
    made, others = (network(c[:, :, 0], c[:, :, -1], torch.zeros(3, 0))[0] for c in (clip, other))
    assert (made - others).abs().max().item() > 1e-4


def test_noise_joins_where_it_is_asked_for():
    network, clip = generator(TwoStreamConfig(widths=(2, 3, 4, 5), latent=2)), clips()
    noises = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    made, others = (network(clip[:, :, 0], clip[:, :, -1], noise)[0] for noise in noises)
    assert (made - others).abs().max().item() > 1e-4


@pytest.mark.parametrize("latent", [0, 2])
def test_every_weight_is_trained(latent: int):
    """What DistributedDataParallel would wait for in vain."""
    network, clip = generator(TwoStreamConfig(widths=(2, 3, 4, 5), latent=latent)), clips()
    discriminator = TwoStreamDiscriminator(SMALL, CLIP)
    made, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.randn(3, latent))
    real_logits, made_logits = discriminator(clip, made)
    assert real_logits.shape == made_logits.shape == penalty.shape == (3,)
    (real_logits - made_logits + penalty).sum().backward()
    for trained in (network, discriminator):
        assert not [name for name, weight in trained.named_parameters() if weight.grad is None]
    # What a constant added before batch norm cannot change has no gradient: those biases alone may be still.
    still = [name for name, weight in network.named_parameters() if not weight.grad.any()]  # type: ignore[union-attr]
    assert all(name.endswith("bias") for name in still)


def test_real_and_made_are_batches_of_their_own():
    judge, clip = TwoStreamDiscriminator(SMALL, CLIP), clips()
    real_logits, made_logits = judge(clip, clip.flip(2))
    torch.testing.assert_close(judge(clip, 1 - clip)[0], real_logits)
    torch.testing.assert_close(judge(clip.flip(2), clip)[0], made_logits)


@pytest.mark.parametrize("network", [TwoStreamGenerator, TwoStreamDiscriminator])
@pytest.mark.parametrize(("field", "size"), [("frames", 15), ("height", 24), ("width", 40)])
def test_other_sizes_are_refused(network: type[nn.Module], field: str, size: int):
    with pytest.raises(ConfigError, match=rf"clip\.{field}: two_stream .*\(value {size}\)"):
        network(SMALL, dataclasses.replace(ClipConfig(), **{field: size}))
