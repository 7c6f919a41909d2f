"""The discriminator of `between` and its augmentation."""

import pytest
import torch
from torch import nn

from giffy_ray.config import BetweenConfig, ClipConfig, Experiment, override
from giffy_ray.models.pair_discriminator import AUGMENT_DRAWS, PairDiscriminator, diff_augment
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


def neutral_draws(**overrides: float) -> torch.Tensor:
    """Draws without effect, except for the overrides. The cutout lies outside the image."""
    names = ("brightness", "saturation", "contrast", "down", "right", "y", "x")
    values = {"brightness": 0.5, "saturation": 0.5, "contrast": 0.5, "down": 0.5, "right": 0.5, "y": 5, "x": 5}
    return torch.tensor([[(values | overrides)[name] for name in names]] * 2)


def test_colour_augmentations_match_their_formulas(clip: torch.Tensor):
    assert len(neutral_draws()[0]) == AUGMENT_DRAWS
    torch.testing.assert_close(diff_augment(clip, neutral_draws()), clip)
    torch.testing.assert_close(diff_augment(clip, neutral_draws(brightness=0.75)), clip + 0.25)
    grey = clip.mean(1, keepdim=True).expand_as(clip)
    torch.testing.assert_close(diff_augment(clip, neutral_draws(saturation=0)), grey)
    mean = clip.mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(diff_augment(clip, neutral_draws(contrast=0)), (clip + mean) / 2)


def test_translation_and_cutout_are_equal_in_all_frames(clip: torch.Tensor):
    shifted = diff_augment(clip, neutral_draws(down=0.999, right=0))  # two rows up, three columns to the right
    torch.testing.assert_close(shifted[..., :-2, 3:], clip[..., 2:, :-3])
    assert not shifted[..., -2:, :].any()
    assert not shifted[..., :3].any()
    cut_out = diff_augment(clip, neutral_draws(y=0.5, x=0.25))  # rows 4 to 11, columns 0 to 11
    assert not cut_out[..., 4:12, :12].any()
    unchanged = torch.ones(16, 24, dtype=torch.bool)
    unchanged[4:12, :12] = False
    torch.testing.assert_close(cut_out[..., unchanged], clip[..., unchanged])


def test_augmentation_is_differentiable(clip: torch.Tensor):
    clip.requires_grad_()
    diff_augment(clip, neutral_draws(saturation=0.7, down=0.9, y=0.5, x=0.5)).sum().backward()
    assert clip.grad is not None and clip.grad.any()


def test_logit_depends_on_all_frames_of_its_clip_only(discriminator: PairDiscriminator, clip: torch.Tensor):
    discriminator.eval()  # freezes the power iteration of spectral norm
    logits, _ = discriminator(clip, clip)
    assert logits.shape == (2,)
    for frame in range(5):
        changed_clip = clip.clone()
        changed_clip[0, :, frame] = 1 - changed_clip[0, :, frame]
        changed_logits, _ = discriminator(changed_clip, clip)
        assert changed_logits[0] != logits[0]
        torch.testing.assert_close(changed_logits[1], logits[1])


def test_spectral_norm_of_every_layer_is_1(discriminator: PairDiscriminator, clip: torch.Tensor):
    for _ in range(60):
        discriminator(clip, clip)  # each call is one step of the power iteration
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv3d):
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
            assert float(largest.detach()) == pytest.approx(1, abs=0.05)


def test_between_trains_against_its_discriminator():
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
        # The hinge loss moves the last bias up for target clips and down by as much for generated ones.
        assert torch.equal(before[name], weight) == (name == "layers.6.bias"), name
