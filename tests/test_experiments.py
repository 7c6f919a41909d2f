"""Every experiment of giffy_ray/experiments, with reduced widths and sizes, trains and reduces its own error."""

import json
import os
from pathlib import Path

import pytest
import torch

from giffy_ray.config import load, override
from giffy_ray.training import learners
from tests.conftest import ROOT, in_float64
from tests.models.test_models import ADVANCED, CGAN, DIRECT_3D, TWO_STREAM

FOLDER = ROOT / "giffy_ray" / "experiments"
EXPERIMENTS = sorted(FOLDER.rglob("*.yaml"))
# Reference values of every fourth step. GIFFY_RAY_GOLDEN=1 rewrites them.
GOLDEN = ROOT / "tests" / "golden_curves.json"
STEPS, BATCH = 20, 4
SMALL = {"clip.frames": 6, "clip.height": 16, "clip.width": 16}
CVAE = {name: value for name, value in ADVANCED.items() if name.startswith("model.") and name != "model.kind"}
TINY = {
    "cvae": CVAE | SMALL,
    "advanced_cvae": CVAE | {"clip.frames": 10, "clip.height": 32, "clip.width": 32},
    "cgan": CGAN,
    "two_stream": TWO_STREAM,
    "direct_3d": DIRECT_3D,
    "between": SMALL
    | {
        "model.widths": (4, 6, 8),
        "model.latent": 2,
        "model.discriminator_widths": (2, 2, 2),
        "model.adversarial_from_step": 0,
    },
}
# The logged error that each kind of model must reduce; `frame_loss` for all others.
ERROR_METRIC = {"cvae": "reconstruction", "advanced_cvae": "reconstruction", "between": "relative_error"}


def moving_squares(frames: int, height: int, width: int) -> torch.Tensor:
    """uint8 [BATCH, frames, height, width, 3]: a bright square that moves sideways over a background of one colour."""
    clips = torch.zeros(BATCH, frames, height, width, 3, dtype=torch.uint8)
    for index in range(BATCH):
        clips[index] = torch.tensor([20, 40, 30]) * (index + 1)
        for frame in range(frames):
            left = frame * (width // 2) // (frames - 1)
            clips[index, frame, height // 4 : height // 2, left : left + width // 4] = 230
    return clips


def assert_golden(name: str, curve: list[float]) -> None:
    """Compares a curve with its reference values, to detect unintended changes."""
    curves = json.loads(GOLDEN.read_text())
    if os.environ.get("GIFFY_RAY_GOLDEN"):
        GOLDEN.write_text(json.dumps(curves | {name: [float(f"{value:.6g}") for value in curve]}, indent=1) + "\n")
        return
    assert curve == pytest.approx(curves[name], rel=1e-3), f"{name}: if the change is intended, see GOLDEN"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
@in_float64()
def test_training_reduces_the_error(path: Path):
    kind = load(path).model.kind
    rates = {"optim.lr": 3e-3, "optim.discriminator_lr": 1e-4, "optim.warmup_steps": 0}
    changes = rates | {"train.global_batch_size": BATCH, "cluster.workers": 1}
    if path.stem == "between-sharp":
        # This experiment fine-tunes a trained generator. An untrained one fools so small a discriminator within ten
        # steps, and diverges from the clips at the full weight of the adversarial loss.
        changes |= {"model.adversarial_weight": 0.03}
    experiment = override(load(path), TINY[kind] | changes)
    learner = learners.build(experiment, torch.device("cpu"), STEPS)
    clip = experiment.clip
    clips = moving_squares(clip.frames, clip.height, clip.width)
    times = torch.linspace(0, 1, clip.frames).expand(BATCH, -1)
    # The sample indices, and with them the noise, are the same in each step.
    losses = [learner.update(clips, times, torch.arange(BATCH)) for _ in range(STEPS)]
    errors = [float(step_losses[ERROR_METRIC.get(kind, "frame_loss")]) for step_losses in losses]
    assert errors[-1] < 0.95 * errors[0]
    assert_golden(str(path.relative_to(FOLDER)), errors[::4])
    assert all(torch.isfinite(value) for step_losses in losses for value in step_losses.values())
    generated = learner.generate(clips[:, 0], clips[:, -1], torch.zeros(BATCH, learner.latent))
    assert generated.shape == clips.shape
