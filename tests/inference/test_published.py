"""The checkpoints shipped with the project are valid, and more accurate than a cross-fade on held-out clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from giffy_ray.config import Experiment, SyntheticConfig, flatten, load
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.synthetic import dataset
from giffy_ray.evaluation.metrics import sharpness_ratio, skill, squared_error
from giffy_ray.models.baselines import linear
from giffy_ray.training import checkpoint_format, checkpoints, learners
from tests.conftest import ROOT

PUBLISHED = sorted((ROOT / "giffy_ray" / "pretrained").glob("*/"))
VIDEOS = 12


@pytest.fixture(scope="module")
def target() -> torch.Tensor:
    """uint8 [VIDEOS, 30, 64, 64, 3]: the test split of the built-in dataset, both categories."""
    planned = dataset.plan_videos(SyntheticConfig(training_clips=1, validation_clips=1, test_clips=VIDEOS // 2))
    videos = [dataset.render_video(video) for video in planned if video.split == "test"]
    _, experiment = checkpoint_format.load_learner(str(PUBLISHED[0]))
    return torch.from_numpy(np.stack([decode_clip(video, experiment.clip) for video in videos]))


def test_an_accurate_and_a_sharp_model_are_published():
    assert [folder.name for folder in PUBLISHED] == ["between", "between-sharp"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_model_is_valid_and_beats_interpolation(folder: Path, target: torch.Tensor):
    checkpoint_format.verify(str(folder))
    learner, experiment = checkpoint_format.load_learner(str(folder))
    assert not experiment.storage.startswith("/")
    assert experiment.data.root is None
    default = flatten(Experiment())
    for name, value in flatten(experiment).items():  # only the fields that determine clips
        assert name.startswith(("clip.", "model.")) or name == "train.seed" or value == default[name], name
    start, end = target[:, 0], target[:, -1]
    generated = learner.generate(start, end, torch.zeros(VIDEOS, learner.latent))
    interpolated = linear(start, end, 30)
    assert skill(squared_error(generated, target), squared_error(interpolated, target)) > 0.4
    assert sharpness_ratio(generated, target).mean() > sharpness_ratio(interpolated, target).mean()


def test_own_videos_experiment_starts_from_the_accurate_model():
    experiment = load(PUBLISHED[0].parent.parent / "experiments" / "own-videos.yaml")
    assert experiment.train.init_from == "between"
    learner = learners.build(experiment, torch.device("cpu"), steps=1)
    checkpoints.load_pretrained(str(PUBLISHED[0]), learner)
    published, _ = checkpoint_format.load_learner(str(PUBLISHED[0]))
    for name, weight in published.networks["between"].state_dict().items():
        assert torch.equal(learner.networks["between"].state_dict()[name], weight)
