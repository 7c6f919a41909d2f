"""Checks gates against their formula and spectral norm against a singular value decomposition."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from giffy_ray.config import ClipConfig, ConfigError, Direct3DConfig
from giffy_ray.models.direct_3d import (
    Direct3DGenerator,
    Gate,
    ImageDiscriminator,
    VideoDiscriminator,
    latent_lengths,
    scored_frame_indices,
)
from tests.models.test_models import count_parameters

SMALL = Direct3DConfig(
    latent=3,
    image_widths=(2, 3, 4, 2),
    latent_width=4,
    latent_blocks=4,
    generator_widths=(4, 3, 2),
    discriminator_widths=(2, 3, 4, 5),
)
CLIP = ClipConfig(frames=10, height=16, width=32)


def random_clips(batch: int = 3, seed: int = 0) -> Tensor:
    shape = (batch, 3, CLIP.frames, CLIP.height, CLIP.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def build_generator() -> Direct3DGenerator:
    torch.manual_seed(0)
    return Direct3DGenerator(SMALL, CLIP)


def count_layer_parameters(*layers: tuple[int, int, int, bool]) -> int:
    """Counts weights, biases and batch norm parameters of layers (kernel positions, inputs, outputs, batch norm)."""
    return sum(taps * inputs * outputs + outputs + 2 * outputs * norm for taps, inputs, outputs, norm in layers)


def test_parameter_counts_match_the_layer_table():
    with torch.device("meta"):
        network = Direct3DGenerator(Direct3DConfig(), ClipConfig())
        video = VideoDiscriminator(Direct3DConfig(), ClipConfig())
        image = ImageDiscriminator(Direct3DConfig(), ClipConfig())
    # Two blocks at each of 4, 8, 15 and 30 steps; batch norms precede the convolutions and are 256 wide.
    block = count_layer_parameters((1, 64, 256, False), (27, 256, 256, True), (27, 256, 256, True))
    assert {name: count_parameters(child) for name, child in network.named_children()} == {
        "image_encoder": count_layer_parameters(
            *((16, 3, 64, True), (9, 64, 64, True), (16, 64, 128, True), (9, 128, 128, True)),
            *((16, 128, 256, True), (9, 256, 256, True), (9, 256, 64, False)),
        ),
        "noise_map": count_layer_parameters((1, 128, 64 * 8 * 8, False)),
        "latent_generator": 8 * block + 2 * 3 * 64 * (4 + 8 + 15 + 30),
        "video_generator": count_layer_parameters(
            *((27, 256, 256, True), (27, 256, 256, True), (48, 256, 128, True), (27, 128, 128, True)),
            *((48, 128, 64, True), (27, 64, 64, True), (48, 64, 3, False)),
        ),
    }
    pairs = [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert count_parameters(video) == count_layer_parameters(
        *((64, *pair, False) for pair in pairs), (26 * 4 * 4, 512, 1, False)
    )
    blocks = [count_layer_parameters((9, i, o, False), (9, o, o, False), (1, i, o, False)) for i, o in pairs]
    assert count_parameters(image) == sum(blocks) + 512 + 1


def test_latent_lengths_double_up_to_the_clips():
    assert latent_lengths(16) == [2, 4, 8, 16]  # as in the publication
    assert latent_lengths(30) == [4, 8, 15, 30]


def test_scored_frames_are_evenly_spaced_and_include_both_ends():
    assert scored_frame_indices(15) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert scored_frame_indices(5) == [0, 1, 2, 3, 4]
    assert scored_frame_indices(30)[0] == 0
    assert scored_frame_indices(30)[-1] == 29


def test_gate_matches_its_formula():
    gate = Gate(channels=2, length=3).double()
    random = torch.Generator().manual_seed(0)
    start, end, noise = torch.randn(3, 4, 2, 5, 6, generator=random, dtype=torch.float64)
    shares = torch.rand(3, 2, 3, generator=random, dtype=torch.float64)
    with torch.no_grad():
        gate.logits.copy_(shares.log() + 7)  # softmax turns these into the shares over their sum
    generated = gate(start, end, noise)
    assert generated.shape == (4, 2, 3, 5, 6)
    for channel in range(2):
        for step in range(3):
            alpha_s, alpha_e, _ = (shares[:, channel, step] / shares[:, channel, step].sum()).tolist()
            expected = (
                alpha_s * start[:, channel] + alpha_e * end[:, channel] + (1 - alpha_s - alpha_e) * noise[:, channel]
            )
            torch.testing.assert_close(generated[:, channel, step], expected)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_gate_can_select_a_single_source(source: int):
    gate = Gate(channels=2, length=3)
    parts = torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            gate(*parts), parts.mean(0)[:, :, None].expand(-1, -1, 3, -1, -1)
        )  # initially uniform
        gate.logits[source] = 100
        torch.testing.assert_close(gate(*parts), parts[source][:, :, None].expand(-1, -1, 3, -1, -1))


def test_outputs_have_the_clips_shape_and_range():
    clip = random_clips()
    generated, penalty = build_generator()(clip[:, :, 0], clip[:, :, -1], torch.randn(3, 3))
    assert generated.shape == clip.shape
    assert 0 <= generated.min().item() <= generated.max().item() <= 1
    assert penalty.tolist() == [0] * 3
    for discriminator in (VideoDiscriminator(SMALL, CLIP), ImageDiscriminator(SMALL, CLIP)):
        target_logits, generated_logits = discriminator(clip, generated)
        assert target_logits.shape == generated_logits.shape == (3,)


@pytest.mark.parametrize("changed", [0, -1], ids=["start", "end"])
def test_output_depends_on_both_end_images(changed: int):
    network, clip, noise = build_generator(), random_clips(), torch.zeros(3, 3)
    changed_clip = clip.clone()
    changed_clip[:, :, changed] = random_clips(seed=1)[:, :, changed]
    first, second = (network(c[:, :, 0], c[:, :, -1], noise)[0] for c in (clip, changed_clip))
    assert (first - second).abs().max().item() > 1e-4


def test_output_depends_on_the_noise():
    network, clip = build_generator(), random_clips()
    noises = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    first, second = (network(clip[:, :, 0], clip[:, :, -1], noise)[0] for noise in noises)
    assert (first - second).abs().max().item() > 1e-4


def test_every_parameter_gets_a_gradient():
    """DistributedDataParallel would wait forever for a missing gradient."""
    network, clip = build_generator(), random_clips()
    discriminators = [VideoDiscriminator(SMALL, CLIP), ImageDiscriminator(SMALL, CLIP)]
    generated, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.randn(3, 3))
    loss = penalty.sum()
    for discriminator in discriminators:
        target_logits, generated_logits = discriminator(clip, generated)
        loss = loss + (target_logits - 2 * generated_logits).sum()
    loss.backward()
    for module in (network, *discriminators):
        assert not [name for name, weight in module.named_parameters() if weight.grad is None]
    zero_gradients = [name for name, weight in network.named_parameters() if not weight.grad.any()]  # type: ignore[union-attr]
    # Only biases before batch norm, which have no effect, may have a zero gradient.
    assert all(name.endswith("bias") for name in zero_gradients)


@pytest.mark.parametrize("network", [VideoDiscriminator, ImageDiscriminator])
def test_spectral_norm_of_every_weight_is_1(network: type[nn.Module]):
    torch.manual_seed(0)
    discriminator, clip = network(SMALL, CLIP), random_clips()
    with torch.no_grad():
        for _ in range(50):  # each call is one step of the power iteration
            discriminator(clip, clip)
    discriminator.eval()
    layers = [layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear)]
    assert len(layers) == (5 if network is VideoDiscriminator else 13)
    for layer in layers:
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=0.01)


def test_logit_of_a_clip_does_not_depend_on_its_batch():
    for discriminator in (VideoDiscriminator(SMALL, CLIP).eval(), ImageDiscriminator(SMALL, CLIP).eval()):
        clip = random_clips()
        target_logits, generated_logits = discriminator(clip, 1 - clip)
        target_logit, generated_logit = discriminator(clip[1:2], 1 - clip[1:2])
        torch.testing.assert_close(target_logits[1:2], target_logit)
        torch.testing.assert_close(generated_logits[1:2], generated_logit)


def test_image_discriminator_ignores_all_but_its_frames():
    discriminator, clip = ImageDiscriminator(SMALL, CLIP).eval(), random_clips()
    scored = scored_frame_indices(CLIP.frames)
    ignored = [frame for frame in range(CLIP.frames) if frame not in scored]
    assert len(ignored) == 2
    changed = clip.clone()
    changed[:, :, ignored] = 0
    torch.testing.assert_close(*discriminator(clip, changed))
    # The order of frames has no effect.
    changed[:, :, scored] = clip[:, :, scored[::-1]]
    torch.testing.assert_close(*discriminator(clip, changed))


@pytest.mark.parametrize(
    ("network", "field", "size"),
    [
        (Direct3DGenerator, "height", 20),
        (Direct3DGenerator, "width", 36),
        (VideoDiscriminator, "frames", 4),
        (VideoDiscriminator, "height", 24),
        (ImageDiscriminator, "width", 40),
    ],
)
def test_unsupported_sizes_are_rejected(network: type[nn.Module], field: str, size: int):
    with pytest.raises(ConfigError, match=rf"clip\.{field}: direct_3d .*\(value {size}\)"):
        network(SMALL, dataclasses.replace(ClipConfig(), **{field: size}))


def test_blocks_that_do_not_spread_evenly_are_rejected():
    with pytest.raises(ConfigError, match=r"model\.latent_blocks: .*multiple of 4 \(value 6\)"):
        Direct3DGenerator(Direct3DConfig(latent_blocks=6), CLIP)
