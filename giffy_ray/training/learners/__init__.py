"""Learners: the training step and the generation of clips for each kind of model.

The training loop knows a model only through its `Learner`. Nothing here imports Ray.
"""

from __future__ import annotations

import copyreg
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from giffy_ray.config import (
    AdversarialConfig,
    BaseCVAEConfig,
    BetweenConfig,
    CGANConfig,
    ConfigError,
    Experiment,
    field_dependencies,
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
    """The interface between the training loop and a model.

    Ray pickles a learner as its experiment and weights, without optimizer states.
    """

    networks: dict[str, nn.Module]  # by their name in checkpoints, never wrapped in DDP
    latent: int  # width of the noise that `generate` takes

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by their name in checkpoints, created when they are used."""
        ...

    def update(self, clips: Clips, times: Times, sample_indices: SampleIndices) -> dict[str, Tensor]:
        """Takes one optimizer step.

        Args:
            clips: This rank's part of the batch.
            times: Time of each frame, 0 at the start and 1 at the end.
            sample_indices: Positions of the clips in the sample stream, which determine noise and learning rate.

        Returns:
            Named losses, averaged over `clips`, and `skipped`: above 0 if a gradient was not finite and its step was
            skipped.
        """
        ...

    def generate(self, start: Images, end: Images, noise: Noise, frames: int | None = None) -> Clips:
        """Generates one clip for each pair of images; see `models.sampling.ClipGenerator`."""
        ...

    def reconstruct(self, clips: Clips) -> Clips | None:
        """Reconstructs clips from all their frames; None if no network of the learner sees them, as in a GAN."""
        ...


def build(experiment: Experiment, device: torch.device, steps: int = 1) -> Learner:
    """Builds the learner of `experiment.model.kind` with weights initialized from `experiment.train.seed`.

    Args:
        experiment: The experiment to train, or that was trained.
        device: Device of the networks; may be the meta device.
        steps: Number of steps of the whole training, for the learning-rate schedule.

    Raises:
        ConfigError: The model cannot be built or trained with these fields.
    """
    _check_batch_norm_batch(experiment)
    _check_micro_batches(experiment)
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


def _rebuild(experiment_yaml: str, weights: Mapping[str, Mapping[str, np.ndarray]]) -> Learner:
    """Rebuilds an unpickled learner, on the GPU if this process has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = build(from_yaml(experiment_yaml), device)
    for name, values in weights.items():
        learner.networks[name].load_state_dict({key: torch.tensor(value) for key, value in values.items()})
    return learner


for _learner_class in (BetweenLearner, CVAELearner, GANLearner):
    copyreg.pickle(_learner_class, _reduce)  # type: ignore[arg-type]


def check(experiment: Experiment, searched: Collection[str] = ()) -> None:
    """Checks that every field has its documented effect in a training of the experiment.

    Not part of `build`, which also loads checkpoints for inference.

    Args:
        experiment: The experiment to train.
        searched: Fields that a study varies. A field may lack an effect because of one of them: it has an effect in
            other trials.

    Raises:
        ConfigError: A field is ignored or would be applied incorrectly.
    """
    _check_batch_norm_batch(experiment)
    _check_micro_batches(experiment)
    _check_batch_norm_micro_batches(experiment)
    _check_frame_times(experiment)
    _check_discriminator_lr(experiment, searched)
    augment = experiment.data.augment
    if augment.pan and augment.crop == 1 and "data.augment.crop" not in searched:
        raise ConfigError(
            f"data.augment.pan: moves the crop window of data.augment.crop; set a crop below 1 (value {augment.pan})"
        )
    _check_inactive_fields(experiment, searched)
    _check_sync_batch_norm(experiment, searched)


def _check_batch_norm_batch(experiment: Experiment) -> None:
    """Batch norm cannot normalize a single clip, which torch would report only at the first step."""
    model = experiment.model
    batch_size = experiment.train.global_batch_size
    workers = experiment.cluster.max_workers
    if isinstance(model, BaseCVAEConfig | CGANConfig) and model.batch_norm and batch_size < 2 * workers:
        raise ConfigError(
            f"train.global_batch_size: model.batch_norm needs two clips on each of cluster.workers={workers} "
            f"(value {batch_size}); use at least {2 * workers}"
        )


def _check_micro_batches(experiment: Experiment) -> None:
    size = experiment.speed.micro_batch_size
    if size and _has_discriminator(experiment):
        raise ConfigError(
            f"speed.micro_batch_size: not supported with a discriminator, which trains on the same whole batch as the "
            f"generator (value {size}); use more workers or a smaller train.global_batch_size"
        )


def _has_discriminator(experiment: Experiment) -> bool:
    model = experiment.model
    if isinstance(model, BetweenConfig):
        return bool(model.adversarial_weight)
    return isinstance(model, AdversarialConfig)


def _check_batch_norm_micro_batches(experiment: Experiment) -> None:
    model = experiment.model
    size = experiment.speed.micro_batch_size
    if size and isinstance(model, BaseCVAEConfig) and model.batch_norm:
        raise ConfigError(
            f"speed.micro_batch_size: batch norm would compute its statistics over {size} clips instead of the "
            f"worker's whole batch (value {size}); use more workers or model.batch_norm=false"
        )


def _check_frame_times(experiment: Experiment) -> None:
    """Only `between` gets the times of the frames, and its discriminator does not."""
    model = experiment.model
    segments = experiment.data.segments
    if segments.frame_times == "uniform":
        return
    if not segments.frames:
        problem = "applies only to segments of videos, which data.segments.frames=0 turns off"
    elif not isinstance(model, BetweenConfig):
        problem = f"model.kind={model.kind} assumes evenly spaced frames"
    elif model.adversarial_weight:
        problem = "the discriminator of model.adversarial_weight assumes evenly spaced frames"
    else:
        return
    raise ConfigError(f"data.segments.frame_times: {problem} (value {segments.frame_times!r}); use 'uniform'")


def _check_discriminator_lr(experiment: Experiment, searched: Collection[str]) -> None:
    model = experiment.model
    lr = experiment.optim.discriminator_lr
    varies_discriminator = not {"model.kind", "model.adversarial_weight"}.isdisjoint(searched)
    if lr is not None and not _has_discriminator(experiment) and not varies_discriminator:
        hint = "set model.adversarial_weight or remove it" if isinstance(model, BetweenConfig) else "remove it"
        raise ConfigError(
            f"optim.discriminator_lr: model.kind={model.kind} trains no discriminator (value {lr}); {hint}"
        )


def _check_inactive_fields(experiment: Experiment, searched: Collection[str]) -> None:
    fields = flatten(experiment)
    defaults = flatten(override(Experiment(), {"model.kind": experiment.model.kind}))
    for name, required_field, accepted in field_dependencies.find_inactive_fields(fields, defaults):
        if required_field not in searched and "model.kind" not in searched:
            raise ConfigError(
                f"{name}: has no effect with {required_field}={fields[required_field]}, only with {accepted} "
                f"(value {fields[name]}); change one of them"
            )


def _check_sync_batch_norm(experiment: Experiment, searched: Collection[str]) -> None:
    is_between = isinstance(experiment.model, BetweenConfig)
    if experiment.speed.sync_batch_norm and is_between and "model.kind" not in searched:
        raise ConfigError("speed.sync_batch_norm: model.kind=between has no batch norm (value True); remove it")
