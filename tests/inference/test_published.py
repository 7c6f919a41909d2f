"""The checkpoints that come with the project: whole, and nearer to clips that they never saw than a cross-fade is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from giffy_ray.config import Experiment, SyntheticConfig, flatten, load
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.synthetic import dataset
from giffy_ray.evaluation.metrics import sharpness_ratio, skill, squared_error
from giffy_ray.models.baselines import linear
from giffy_ray.training import checkpoints, learners
from tests.conftest import ROOT

PUBLISHED = sorted((ROOT / "published").glob("*/"))
VIDEOS = 12


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """uint8 [VIDEOS, 30, 64, 64, 3]: of the test split of the built-in data, both categories."""
    planned = dataset.plan(SyntheticConfig(training_clips=1, validation_clips=1, test_clips=VIDEOS // 2))
    videos = [dataset.video(one) for one in planned if one.split == "test"]
    _, experiment = checkpoints.load(str(PUBLISHED[0]))
    return torch.from_numpy(np.stack([decode_clip(video, experiment.clip) for video in videos]))


def test_there_are_an_accurate_and_a_sharp_one():
    assert [folder.name for folder in PUBLISHED] == ["between", "between-sharp"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_it_is_whole_and_beats_interpolation(folder: Path, real: torch.Tensor):
    checkpoints.verify(str(folder))
    learner, experiment = checkpoints.load(str(folder))
    assert not experiment.storage.startswith("/")
    assert experiment.data.root is None
    default = flatten(Experiment())
    for name, value in flatten(experiment).items():  # what makes clips, and no more
        assert name.startswith(("clip.", "model.")) or name == "train.seed" or value == default[name], name
    start, end = real[:, 0], real[:, -1]
    made, faded = learner.generate(start, end, torch.zeros(VIDEOS, learner.latent)), linear(start, end, 30)
    gained = skill(squared_error(made, real), squared_error(faded, real))
    assert gained > 0.4
    sharper = sharpness_ratio(made, real).mean() - sharpness_ratio(faded, real).mean()
    assert sharper > 0


def test_own_videos_are_trained_on_from_the_accurate_one():
    experiment = load(PUBLISHED[0].parent.parent / "jobs" / "experiments" / "own-videos.yaml")
    assert experiment.train.init_from == "published/between"
    learner = learners.build(experiment, torch.device("cpu"), steps=1)
    checkpoints.load_pretrained(str(PUBLISHED[0]), learner)
    published, _ = checkpoints.load(str(PUBLISHED[0]))
    for name, weight in published.networks["between"].state_dict().items():
        assert torch.equal(learner.networks["between"].state_dict()[name], weight)
