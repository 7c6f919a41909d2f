"""Fixtures of the command line: a runner of `giffy` in this process, small pictures, and a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from giffy_ray.cli import main
from giffy_ray.config import Experiment, override
from giffy_ray.training import checkpoint_format, checkpoints, learners


class Result(NamedTuple):
    """What a run of `giffy` left."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_giffy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `giffy` with arguments in this process."""

    def run_giffy(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["giffy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main.main()
        output = capsys.readouterr()
        code = exit_info.value.code
        if isinstance(code, str):  # Python prints it
            return Result(1, output.out, f"{output.err}{code}\n")
        return Result(code or 0, output.out, output.err)

    return run_giffy


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with random weights, whose samples differ."""
    changes = {"clip.frames": 6, "clip.height": 32, "clip.width": 32, "model.kind": "between", "model.latent": 2}
    experiment = override(Experiment(), changes | {"model.widths": (4, 6, 8)})
    learner = learners.build(experiment, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in learner.networks.values():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("model")
    checkpoints.Snapshot(learner, experiment, checkpoint_format.TrainState(0)).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def fixed_size_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a CVAE that generates 6 frames of 16x16."""
    from tests.conftest import TINY

    experiment = override(Experiment(), TINY)
    learner = learners.build(experiment, torch.device("cpu"))
    folder = tmp_path_factory.mktemp("fixed-size-model")
    checkpoints.Snapshot(learner, experiment, checkpoint_format.TrainState(0)).save(folder)
    return str(folder)


def make_picture(seed: int, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: coarse random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, channels), np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of four PNG files of 32x24 in the current folder: 0.png to 3.png."""
    monkeypatch.chdir(tmp_path)
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        Image.fromarray(make_picture(number)).save(name)
    return names
