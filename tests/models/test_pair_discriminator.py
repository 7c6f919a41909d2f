"""The judge of `between`, and what it is shown in place of clips."""

import pytest
import torch
from torch import nn

from giffy_ray.config import BetweenConfig, ClipConfig, Experiment, override
from giffy_ray.models.pair_discriminator import AUGMENT_DRAWS, PairDiscriminator, augmented
from giffy_ray.training import learners
from tests.models.test_between import SMALL

CLIP = ClipConfig(frames=6, height=16, width=24)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def discriminator() -> PairDiscriminator:
    torch.manual_seed(0)
    return PairDiscriminator(BetweenConfig(discriminator_widths=(4, 6, 8)), CLIP)


def neutral(**changed: float) -> torch.Tensor:
    """Draws that change nothing but what is named; the hole lies beyond the corner."""
    names = ("brightness", "saturation", "contrast", "down", "right", "y", "x")
    values = {"brightness": 0.5, "saturation": 0.5, "contrast": 0.5, "down": 0.5, "right": 0.5, "y": 5, "x": 5}
    return torch.tensor([[(values | changed)[name] for name in names]] * 2)


def test_every_change_is_what_it_is_called(clip: torch.Tensor):
    assert len(neutral()[0]) == AUGMENT_DRAWS
    torch.testing.assert_close(augmented(clip, neutral()), clip)
    torch.testing.assert_close(augmented(clip, neutral(brightness=0.75)), clip + 0.25)
    grey = clip.mean(1, keepdim=True).expand_as(clip)
    torch.testing.assert_close(augmented(clip, neutral(saturation=0)), grey)
    middle = clip.mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(augmented(clip, neutral(contrast=0)), (clip + middle) / 2)


def test_shifts_and_holes_are_the_same_in_all_frames(clip: torch.Tensor):
    shifted = augmented(clip, neutral(down=0.999, right=0))  # two lines up, three columns to the right
    torch.testing.assert_close(shifted[..., :-2, 3:], clip[..., 2:, :-3])
    assert not shifted[..., -2:, :].any()
    assert not shifted[..., :3].any()
    holed = augmented(clip, neutral(y=0.5, x=0.25))  # lines 4 to 11, columns 0 to 11
    assert not holed[..., 4:12, :12].any()
    kept = torch.ones(16, 24, dtype=torch.bool)
    kept[4:12, :12] = False
    torch.testing.assert_close(holed[..., kept], clip[..., kept])


def test_the_gradient_passes_through_the_changes(clip: torch.Tensor):
    clip.requires_grad_()
    augmented(clip, neutral(saturation=0.7, down=0.9, y=0.5, x=0.5)).sum().backward()
    assert clip.grad is not None and clip.grad.any()


def test_it_sees_the_frames_between_and_both_ends(discriminator: PairDiscriminator, clip: torch.Tensor):
    discriminator.eval()  # no power iteration between one call and the next
    logits, _ = discriminator(clip, clip)
    assert logits.shape == (2,)
    for frame in range(5):
        other = clip.clone()
        other[0, :, frame] = 1 - other[0, :, frame]
        changed, _ = discriminator(other, clip)
        assert changed[0] != logits[0]
        torch.testing.assert_close(changed[1], logits[1])  # what is said of a clip does not depend on the others


def test_no_layer_stretches_anything(discriminator: PairDiscriminator, clip: torch.Tensor):
    for _ in range(60):
        discriminator(clip, clip)  # each call takes the power iteration one step on
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv3d):
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
            assert float(largest.detach()) == pytest.approx(1, abs=0.05)


def test_between_is_trained_against_it():
    experiment = override(Experiment(), SMALL | {"model.adversarial_weight": 0.1, "model.adversarial_from_step": 1})
    learner = learners.build(experiment, torch.device("cpu"), steps=3)
    random = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (4, 6, 16, 24, 3), generator=random).to(torch.uint8)
    times = torch.linspace(0, 1, 6).expand(4, -1)
    before = {name: weight.clone() for name, weight in learner.networks["discriminator"].named_parameters()}
    assert "d_loss" not in learner.update(clips, times, torch.arange(4))
    losses = learner.update(clips, times, torch.arange(4, 8))
    assert {"d_loss", "d_real", "d_made", "g_loss"} <= losses.keys()
    assert all(value.isfinite() for value in losses.values())
    for name, weight in learner.networks["discriminator"].named_parameters():
        # Hinge loss moves the last bias up by the real clips and down by the made ones.
        assert torch.equal(before[name], weight) == (name == "layers.6.bias"), name
