"""The metrics that a search can optimise."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from giffy_ray.config import ConfigError, Experiment, load, override
from giffy_ray.training import learners, train_loop
from giffy_ray.training.throughput import ThroughputMonitor
from giffy_ray.tuning import tuner
from giffy_ray.tuning.objectives import list_reported_metrics, resolve_objectives
from tests.conftest import TINY

GPU_METRICS = {"speed/gpu_memory_gb", "speed/model_flop_utilisation"}


def load_experiment(*overrides: str) -> Experiment:
    return load(None, ["search.space={optim.lr: {uniform: [0.1, 1]}}", *overrides])


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("val/l2_paper", "minimize"),
        ("val/psnr", "maximize"),
        ("val/skill", "maximize"),
        ("val/blur", "minimize"),
        ("train/kl", "minimize"),
        ("speed/step_ms", "minimize"),
        ("speed/clips_per_s", "maximize"),
    ],
)
def test_metric_has_its_own_direction(metric: str, direction: str):
    experiment = load_experiment(f"search.metric={metric}")
    tuner.check_search(experiment)
    assert resolve_objectives(experiment.search) == {metric: direction}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.metric=val/pnsr"], r"search\.metric: no such metric.*did you mean 'val/psnr'"),
        (["search.metric=psnr"], r"did you mean 'val/psnr'"),
        (["search.metric=time_total_s"], r"no such metric.*known: "),
        (["search.metric=val/ssim"], r"no such metric"),
        (["search.metric=train/d_real", "model.kind=cgan"], r"search\.objectives=\{train/d_real: maximize\}"),
        (["search.metric=train/g_loss"], r"search\.metric: a training with model\.kind=cvae does not report it"),
        (["search.objectives={val/sharp: maximize, val/psnr: maximize}"], r"search\.objectives: .*does not report it"),
        (
            ["search.metric=train/loss", "search.space={model.ends_weight: {uniform: [0, 1]}}"],
            r"train/loss depends on model\.ends_weight",
        ),
        (
            [
                "search.metric=train/d_loss",
                "model.kind=between",
                "model.adversarial_weight=1",
                "search.space={model.adversarial_weight: {choice: [0, 1]}}",
            ],
            r"a training with model\.adversarial_weight=0 does not report it",
        ),
    ],
)
def test_metric_that_cannot_compare_trials_is_rejected(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        tuner.initial_points(load_experiment(*overrides))


def test_objectives_state_the_direction_of_a_metric_without_one():
    experiment = load_experiment("search.objectives={train/d_real: maximize}", "model.kind=cgan")
    tuner.check_search(experiment)
    assert resolve_objectives(experiment.search) == {"train/d_real": "maximize"}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("cvae", []),
        ("between", []),
        ("between", ["model.posterior_fraction=0"]),
        ("between", ["model.adversarial_weight=1", "model.discriminator_widths=[2, 2, 2]"]),
        ("between", ["model.adversarial_weight=1", "model.adversarial_from_step=1"]),
        ("cgan", []),
        ("two_stream", ["model.widths=[2, 2, 2, 2]"]),
        ("direct_3d", ["model.generator_widths=[2, 2, 2]", "model.discriminator_widths=[2, 2, 2, 2]"]),
    ],
)
def test_listed_metrics_are_those_that_a_training_reports(kind: str, overrides: list[str]):
    """Compares with a step of each learner, as the throughput monitor names its losses, and with the validation."""
    clip = ["clip.frames=6", "clip.height=32", "clip.width=32"] if kind in ("cvae", "between", "cgan") else []
    small_models: dict[str, dict[str, Any]] = {
        "cvae": TINY,
        "between": {"model.widths": (4, 6, 8), "model.latent": 2},
        "cgan": {"model.image_widths": (2, 2, 2, 2), "model.generator_widths": (2, 2, 2, 2, 2)},
        "direct_3d": {"model.image_widths": (2, 2, 2, 2), "model.latent_width": 2},
    }
    experiment = load(None, [f"model.kind={kind}", "train.global_batch_size=2", *clip, *overrides])
    experiment = override(experiment, small_models.get(kind, {}))
    device = torch.device("cpu")
    learner = learners.build(experiment, device)
    size = (experiment.clip.frames, experiment.clip.height, experiment.clip.width)
    clips = torch.randint(0, 255, (2, *size, 3), dtype=torch.uint8)
    times = torch.linspace(0, 1, size[0]).expand(2, -1)
    monitor = ThroughputMonitor({}, 2, device)
    monitor.add_step(0, learner.update(clips, times, torch.arange(2)), 2)

    class FakeDataset:
        ids: ClassVar = ["a", "b"]

        def split_indices(self, split: str) -> np.ndarray:
            return np.arange(2)

        def get_clips(self, indices: np.ndarray) -> np.ndarray:
            return clips.numpy()[indices]

    dataset: Any = FakeDataset()
    validation = train_loop.validate(lambda start, end, ids: clips, dataset, 2, device)
    assert {**monitor.compute(), **validation}.keys() == list_reported_metrics(experiment) - GPU_METRICS


def test_patience_with_several_objectives_is_rejected():
    overrides = ["search.objectives={val/skill: maximize, val/blur: minimize}", "search.patience=3"]
    with pytest.raises(ConfigError, match=r"search\.patience: has no effect with several"):
        tuner.check_search(load_experiment(*overrides))
