"""A Learner is the only thing that the training loop knows of a model: how to take one step, and how to make clips."""

from __future__ import annotations

import copyreg
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from giffy_ray.config import (
    Adversarial,
    BetweenConfig,
    CGANConfig,
    ConfigError,
    Encoders,
    Experiment,
    effects,
    flatten,
    from_yaml,
    override,
    to_yaml,
)
from giffy_ray.core.tensor_types import Clips, Images, Noise, SampleIndices, Times
from giffy_ray.training.learners.between import BetweenLearner
from giffy_ray.training.learners.cvae import CVAELearner
from giffy_ray.training.learners.gan import GANLearner


class Learner(Protocol):
    """A learner is pickled as its experiment and weights, without optimisers: so Ray sends it to actors."""

    networks: dict[str, nn.Module]  # bare, never wrapped: what a checkpoint holds
    optimizers: dict[str, torch.optim.Optimizer]
    latent: int  # width of the noise that `generate` takes

    def update(self, clips: Clips, times: Times, positions: SampleIndices) -> dict[str, Tensor]:
        """One step on clips whose frames are shown at `times`. Returns named losses, averaged over these clips.

        With them `skipped`, above 0 where a gradient was not finite and was left out. `positions` are the clips'
        places in the sample stream: noise and learning rate follow from them.
        """
        ...

    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Makes clips from their two ends. `frames` other than the experiment's: ConfigError where it cannot."""
        ...

    def reconstruct(self, clips: Clips) -> Clips | None:
        """Makes clips again from all their frames; None where no part of the learner sees them, as in a GAN."""
        ...


def build(experiment: Experiment, device: torch.device, steps: int = 1) -> Learner:
    """The learner of `experiment.model.kind`, with weights drawn from `experiment.train.seed`.

    `steps` is how many the whole training has, which the learning rate may depend on. Raises ConfigError.
    """
    _refuse_single_clips(experiment)
    _refuse_micro_batches(experiment)
    match experiment.model.kind:
        case "cvae" | "advanced_cvae":
            return CVAELearner(experiment, device, steps)
        case "cgan" | "two_stream" | "direct_3d":
            return GANLearner(experiment, device, steps)
        case "between":
            return BetweenLearner(experiment, device, steps)


def _reduce(learner: Any) -> tuple:
    weights = {
        name: {key: value.cpu().numpy() for key, value in network.state_dict().items()}
        for name, network in learner.networks.items()
    }
    return _rebuild, (to_yaml(learner.experiment), weights)


def _rebuild(experiment: str, weights: Mapping[str, Mapping[str, np.ndarray]]) -> Learner:
    """On the GPU, where this process has one."""
    learner = build(from_yaml(experiment), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for network, values in weights.items():
        learner.networks[network].load_state_dict({key: torch.tensor(value) for key, value in values.items()})
    return learner


for _learner in (BetweenLearner, CVAELearner, GANLearner):
    copyreg.pickle(_learner, _reduce)  # type: ignore[arg-type]


def _refuse_single_clips(experiment: Experiment) -> None:
    """Batch norm cannot normalise one clip by itself, which torch would only say at the first step."""
    model, batch, workers = experiment.model, experiment.train.global_batch_size, experiment.cluster.max_workers
    if isinstance(model, Encoders | CGANConfig) and model.batch_norm and batch < 2 * workers:
        raise ConfigError(
            f"train.global_batch_size: model.batch_norm needs two clips on each of cluster.workers={workers} "
            f"(value {batch})"
        )


def _refuse_micro_batches(experiment: Experiment) -> None:
    model, size = experiment.model, experiment.speed.micro_batch_size
    if size and (isinstance(model, Adversarial) or (isinstance(model, BetweenConfig) and model.adversarial_weight)):
        raise ConfigError(
            f"speed.micro_batch_size: generator and discriminators take turns on the same clips, which must then be "
            f"all of "
            f"a worker's (value {size}); use more workers, or a smaller train.global_batch_size"
        )


def check(experiment: Experiment, searched: Collection[str] = ()) -> None:
    """Raises ConfigError where a training would compute something else than its fields say, or ignore one.

    `searched`: fields that a search varies. What has no effect because of one of them has one in other trials. Not part
    of `build`, which also loads checkpoints to make clips.
    """
    _refuse_single_clips(experiment)
    _refuse_micro_batches(experiment)
    _refuse_batch_norm_of_parts(experiment)
    _refuse_frame_times(experiment)
    _refuse_discriminator_rate(experiment, searched)
    augment = experiment.data.augment
    if augment.pan and augment.crop == 1 and "data.augment.crop" not in searched:
        raise ConfigError(
            f"data.augment.pan: moves what data.augment.crop cuts out; give a crop below 1 (value {augment.pan})"
        )
    _refuse_without_effect(experiment, searched)
    _refuse_sync_without_batch_norm(experiment, searched)


def _refuse_without_effect(experiment: Experiment, searched: Collection[str]) -> None:
    fields = flatten(experiment)
    defaults = flatten(override(Experiment(), {"model.kind": experiment.model.kind}))
    for name, needed, words in effects.without_effect(fields, defaults):
        if needed not in searched and "model.kind" not in searched:
            raise ConfigError(
                f"{name}: has no effect with {needed}={fields[needed]}, only with {words} (value {fields[name]}); "
                "change one of them"
            )


def _refuse_sync_without_batch_norm(experiment: Experiment, searched: Collection[str]) -> None:
    synced, model = experiment.speed.sync_batch_norm, experiment.model
    if synced and isinstance(model, BetweenConfig) and "model.kind" not in searched:
        raise ConfigError("speed.sync_batch_norm: model.kind=between has no batch norm (value True); leave it out")


def _refuse_batch_norm_of_parts(experiment: Experiment) -> None:
    model, size = experiment.model, experiment.speed.micro_batch_size
    if size and isinstance(model, Encoders) and model.batch_norm:
        raise ConfigError(
            f"speed.micro_batch_size: batch norm would take its statistics over {size} clips, not over a worker's "
            f"share of "
            f"train.global_batch_size (value {size}); use more workers, or model.batch_norm=false"
        )


def _refuse_frame_times(experiment: Experiment) -> None:
    """`between` alone is told when frames are shown, and its discriminator is not."""
    model, segments = experiment.model, experiment.data.segments
    if segments.frame_times == "uniform":
        return
    if not segments.frames:
        why = "is of parts of the videos, which data.segments.frames=0 turns off"
    elif not isinstance(model, BetweenConfig):
        why = f"model.kind={model.kind} takes frames to be evenly spaced"
    elif model.adversarial_weight:
        why = "the discriminator of model.adversarial_weight takes frames to be evenly spaced"
    else:
        return
    raise ConfigError(f"data.segments.frame_times: {why} (value {segments.frame_times!r}); use 'uniform'")


def _refuse_discriminator_rate(experiment: Experiment, searched: Collection[str]) -> None:
    model, rate = experiment.model, experiment.optim.discriminator_lr
    adversarial = isinstance(model, Adversarial) or (isinstance(model, BetweenConfig) and model.adversarial_weight)
    if rate is not None and not adversarial and not {"model.kind", "model.adversarial_weight"} & {*searched}:
        hint = "; set model.adversarial_weight, or leave it out" if isinstance(model, BetweenConfig) else ""
        raise ConfigError(
            f"optim.discriminator_lr: model.kind={model.kind} trains no discriminator (value {rate}){hint}"
        )
