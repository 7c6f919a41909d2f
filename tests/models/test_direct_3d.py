"""Gates are checked against their formula, spectral norm against a singular value decomposition."""

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
    judged_frames,
    lengths,
)
from tests.models.test_models import parameters

SMALL = Direct3DConfig(
    latent=3,
    image_widths=(2, 3, 4, 2),
    latent_width=4,
    latent_blocks=4,
    generator_widths=(4, 3, 2),
    discriminator_widths=(2, 3, 4, 5),
)
CLIP = ClipConfig(frames=10, height=16, width=32)


def clips(batch: int = 3, seed: int = 0) -> Tensor:
    shape = (batch, 3, CLIP.frames, CLIP.height, CLIP.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def generator() -> Direct3DGenerator:
    torch.manual_seed(0)
    return Direct3DGenerator(SMALL, CLIP)


def total(*layers: tuple[int, int, int, bool]) -> int:
    """Of layers (values of the kernel, inputs, outputs, batch norm): weights, biases, and 2 for each normalised."""
    return sum(taps * inputs * outputs + outputs + 2 * outputs * norm for taps, inputs, outputs, norm in layers)


def test_totals_are_those_of_the_layer_table():
    with torch.device("meta"):
        network = Direct3DGenerator(Direct3DConfig(), ClipConfig())
        video = VideoDiscriminator(Direct3DConfig(), ClipConfig())
        image = ImageDiscriminator(Direct3DConfig(), ClipConfig())
    # Two blocks at each of 4, 8, 15 and 30 steps; batch norm stands before the convolutions, both 256 wide.
    block = total((1, 64, 256, False), (27, 256, 256, True), (27, 256, 256, True))
    assert {name: parameters(child) for name, child in network.named_children()} == {
        "image_encoder": total(
            *((16, 3, 64, True), (9, 64, 64, True), (16, 64, 128, True), (9, 128, 128, True)),
            *((16, 128, 256, True), (9, 256, 256, True), (9, 256, 64, False)),
        ),
        "noise_map": total((1, 128, 64 * 8 * 8, False)),
        "latent_generator": 8 * block + 2 * 3 * 64 * (4 + 8 + 15 + 30),
        "video_generator": total(
            *((27, 256, 256, True), (27, 256, 256, True), (48, 256, 128, True), (27, 128, 128, True)),
            *((48, 128, 64, True), (27, 64, 64, True), (48, 64, 3, False)),
        ),
    }
    pairs = [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert parameters(video) == total(*((64, *pair, False) for pair in pairs), (26 * 4 * 4, 512, 1, False))
    blocks = [total((9, i, o, False), (9, o, o, False), (1, i, o, False)) for i, o in pairs]
    assert parameters(image) == sum(blocks) + 512 + 1


def test_temporal_lengths():
    assert lengths(16) == [2, 4, 8, 16]  # the paper's
    assert lengths(30) == [4, 8, 15, 30]


def test_judged_frames_are_evenly_spaced_and_include_both_ends():
    assert judged_frames(15) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert judged_frames(5) == [0, 1, 2, 3, 4]
    assert judged_frames(30)[0] == 0
    assert judged_frames(30)[-1] == 29


def test_the_gate_is_its_formula():
    gate = Gate(channels=2, length=3).double()
    random = torch.Generator().manual_seed(0)
    start, end, noise = torch.randn(3, 4, 2, 5, 6, generator=random, dtype=torch.float64)
    shares = torch.rand(3, 2, 3, generator=random, dtype=torch.float64)
    with torch.no_grad():
        gate.logits.copy_(shares.log() + 7)  # the softmax of logarithms is the shares over their sum
    made = gate(start, end, noise)
    assert made.shape == (4, 2, 3, 5, 6)
    for channel in range(2):
        for step in range(3):
            alpha_s, alpha_e, _ = (shares[:, channel, step] / shares[:, channel, step].sum()).tolist()
            expected = (
                alpha_s * start[:, channel] + alpha_e * end[:, channel] + (1 - alpha_s - alpha_e) * noise[:, channel]
            )
            torch.testing.assert_close(made[:, channel, step], expected)


@pytest.mark.parametrize("open_to", [0, 1, 2])
def test_a_gate_open_to_one_lets_that_one_through(open_to: int):
    gate = Gate(channels=2, length=3)
    parts = torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(gate(*parts), parts.mean(0)[:, :, None].expand(-1, -1, 3, -1, -1))  # as it begins
        gate.logits[open_to] = 100
        torch.testing.assert_close(gate(*parts), parts[open_to][:, :, None].expand(-1, -1, 3, -1, -1))


def test_shapes_and_ranges():
    clip = clips()
    made, penalty = generator()(clip[:, :, 0], clip[:, :, -1], torch.randn(3, 3))
    assert made.shape == clip.shape
    assert 0 <= made.min().item() <= made.max().item() <= 1
    assert penalty.tolist() == [0] * 3
    for judge in (VideoDiscriminator(SMALL, CLIP), ImageDiscriminator(SMALL, CLIP)):
        real_logits, made_logits = judge(clip, made)
        assert real_logits.shape == made_logits.shape == (3,)


@pytest.mark.parametrize("changed", [0, -1], ids=["start", "end"])
def test_both_end_images_matter(changed: int):
    network, clip, noise = generator(), clips(), torch.zeros(3, 3)
    other = clip.clone()
    other[:, :, changed] = clips(seed=1)[:, :, changed]
    made, others = (network(c[:, :, 0], c[:, :, -1], noise)[0] for c in (clip, other))
    assert (made - others).abs().max().item() > 1e-4


def test_other_noise_makes_other_clips():
    network, clip = generator(), clips()
    noises = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    made, others = (network(clip[:, :, 0], clip[:, :, -1], noise)[0] for noise in noises)
    assert (made - others).abs().max().item() > 1e-4


def test_every_weight_is_trained():
    """What DistributedDataParallel would wait for in vain."""
    network, clip = generator(), clips()
    judges = [VideoDiscriminator(SMALL, CLIP), ImageDiscriminator(SMALL, CLIP)]
    made, penalty = network(clip[:, :, 0], clip[:, :, -1], torch.randn(3, 3))
    loss = penalty.sum()
    for judge in judges:
        real_logits, made_logits = judge(clip, made)
        loss = loss + (real_logits - 2 * made_logits).sum()
    loss.backward()
    for trained in (network, *judges):
        assert not [name for name, weight in trained.named_parameters() if weight.grad is None]
    still = [name for name, weight in network.named_parameters() if not weight.grad.any()]  # type: ignore[union-attr]
    # What a constant added before batch norm cannot change has no gradient: those biases alone may be still.
    assert all(name.endswith("bias") for name in still)


@pytest.mark.parametrize("network", [VideoDiscriminator, ImageDiscriminator])
def test_the_largest_singular_value_of_every_weight_is_1(network: type[nn.Module]):
    torch.manual_seed(0)
    judge, clip = network(SMALL, CLIP), clips()
    with torch.no_grad():
        for _ in range(50):  # each is a step of the power iteration
            judge(clip, clip)
    judge.eval()
    layers = [layer for layer in judge.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear)]
    assert len(layers) == (5 if network is VideoDiscriminator else 13)
    for layer in layers:
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=0.01)


def test_a_clips_logit_depends_on_that_clip_alone():
    for judge in (VideoDiscriminator(SMALL, CLIP).eval(), ImageDiscriminator(SMALL, CLIP).eval()):
        clip = clips()
        together, others = judge(clip, 1 - clip)
        alone, other = judge(clip[1:2], 1 - clip[1:2])
        torch.testing.assert_close(together[1:2], alone)
        torch.testing.assert_close(others[1:2], other)


def test_the_image_discriminator_does_not_see_the_frames_it_does_not_judge():
    judge, clip = ImageDiscriminator(SMALL, CLIP).eval(), clips()
    judged = judged_frames(CLIP.frames)
    unseen = [frame for frame in range(CLIP.frames) if frame not in judged]
    assert len(unseen) == 2
    changed = clip.clone()
    changed[:, :, unseen] = 0
    torch.testing.assert_close(*judge(clip, changed))
    # The order of frames is nothing to it.
    changed[:, :, judged] = clip[:, :, judged[::-1]]
    torch.testing.assert_close(*judge(clip, changed))


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
def test_other_sizes_are_refused(network: type[nn.Module], field: str, size: int):
    with pytest.raises(ConfigError, match=rf"clip\.{field}: direct_3d .*\(value {size}\)"):
        network(SMALL, dataclasses.replace(ClipConfig(), **{field: size}))


def test_blocks_that_do_not_spread_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"model\.latent_blocks: .*multiple of 4 \(value 6\)"):
        Direct3DGenerator(Direct3DConfig(latent_blocks=6), CLIP)
