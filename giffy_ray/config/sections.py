"""The sections of an Experiment and their defaults. `models` holds the `model` section.

The string literal below a field documents it; `reference` renders these docstrings as the configuration reference.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PlainValidator

from giffy_ray.config.field_types import (
    Fraction,
    LocalPath,
    Location,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Run,
    Seed,
    StrictSection,
    TrackingUri,
)
from giffy_ray.config.models import CVAEConfig, ModelConfig
from giffy_ray.core.storage import join

Split = Literal["training", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = get_args(Split)
VIDEO_LIST_SUFFIXES = (".csv", ".parquet")  # of a `data.root` that is a list of videos
Baseline = Literal["linear", "linear_as_coded", "hold", "minterpolate_mci", "minterpolate_blend"]
PerceptualMetric = Literal["st_lpips", "kernel_distance_frames", "kernel_distance_motion", "lpips", "fid", "fvd"]
UserSuppliedMetric = Literal["lpips", "fid", "fvd"]  # their networks come from `evaluate.weights`
Distribution = Literal["log_uniform", "uniform", "int", "choice"]


def _parse_search_value(value: Any) -> bool | int | float | str | None:
    """Validates a bound or choice of `search.space`. Converts numeric text: YAML 1.1 reads 1e-4 as a string."""
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be a number, text, true, false or null")
    return value


SearchValue = Annotated[bool | int | float | str | None, PlainValidator(_parse_search_value)]


@dataclass(frozen=True)
class SyntheticConfig(StrictSection):
    """The built-in dataset, which is rendered where `data.root` is null."""

    training_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 400
    """Training clips per category, 1 to 1,000,000."""
    validation_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 50
    """Validation clips per category, 1 to 1,000,000."""
    test_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Test clips per category, 0 to 1,000,000. Neither training nor tuning uses them."""
    ood_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Out-of-distribution test clips per category, 0 to 1,000,000. Their scene parameters lie outside the range of the
    other splits."""
    seed: Seed = 0
    """Random seed of the scenes."""


@dataclass(frozen=True)
class LimitsConfig(StrictSection):
    """Resource limits per video file. A video that exceeds one is rejected, where possible before it is decoded."""

    file_mb: PositiveInt = 256
    """Maximum file size in MiB."""
    pixels: PositiveInt = 4096 * 4096
    """Maximum number of pixels per frame."""
    frames: PositiveInt = 1_000_000
    """Maximum number of frames."""
    seconds: PositiveInt = 24 * 3600
    """Maximum duration in seconds."""
    decode_s: PositiveInt = 60
    """Maximum wall time to decode one file, in seconds."""
    memory_mb: PositiveInt = 2048
    """Maximum memory of the decoding process, in MiB."""


@dataclass(frozen=True)
class SegmentsConfig(StrictSection):
    """Training on random segments of the videos instead of whole clips. All source frames are then cached."""

    frames: Literal[0] | Annotated[int, Field(ge=2, lt=2**31)] = 0
    """Frames sampled from each segment, including its start and end. At least 2; 0 trains on whole clips."""
    shortest_s: PositiveFloat = 0.5
    """Minimum duration of a segment, in seconds. A shorter video is used whole."""
    frame_times: Literal["uniform", "jittered"] = "uniform"
    """How the frames between start and end are spaced in time: evenly, or at a random time within equal intervals."""


@dataclass(frozen=True)
class AugmentConfig(StrictSection):
    """Random augmentation of training clips. All frames of a clip change alike, except under `pan`."""

    flip: bool = False
    """Flip clips horizontally with probability 0.5."""
    reverse: bool = False
    """Reverse the frame order with probability 0.5."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest crop, as a fraction of height and width in (0, 1]. Crops are resized to the full frame; 1 turns
    cropping off."""
    pan: Fraction = 0.0
    """Maximum movement of the crop from the first to the last frame, as a fraction of the possible movement, 0 to 1.
    Requires `crop` below 1."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum relative change of all pixel values, in [0, 1)."""
    permute_channels: bool = False
    """Apply a random permutation to the colour channels."""


@dataclass(frozen=True)
class DataConfig(StrictSection):
    """The videos, how they are split, and how decoded clips are cached."""

    root: Location | None = None
    """Folder of videos, or list of videos (`.csv`, `.parquet`): a path, `s3://...` or `gs://...`. Null uses the
    built-in dataset. `???` in an experiment file requires the user to set the field."""
    categories: tuple[str, ...] = ()
    """Categories to use. Empty uses all."""
    max_videos: dict[str, dict[Split, PositiveInt]] = field(default_factory=dict)
    """Maximum number of videos per category and split, as in `{skiing: {training: 1800, validation: 81}}`. The
    category `"*"` applies to all categories that are not listed."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the videos held out for validation, in (0, 1), grouped by source. The dataset's own validation split
    becomes the `test` split. Null uses the dataset's own split, or 0.1 if it has none."""
    ucf101_list: Literal[1, 2, 3] = 1
    """Which of the three official UCF101 split lists to use."""
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Fail if more than this fraction of the videos is rejected, 0 to 1."""
    cache_decoded: bool = True
    """Cache decoded clips below `storage`. False decodes a video each time a clip is needed."""
    cache_max_gb: Annotated[float, Field(gt=0)] | None = None
    """Maximum size of all cached clips, in GB. Null limits it only by the free disk space."""
    node_cache_gb: PositiveFloat | None = None
    """Maximum size of the local copies on each node of clips cached on `s3://` or `gs://`, in GB. Null uses the free
    disk space minus a tenth of the disk."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Resource limits per video file."""
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)
    """Training on random segments of the videos."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random augmentation of training clips."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The built-in dataset."""


@dataclass(frozen=True)
class ClipConfig(StrictSection):
    """The clip taken from the beginning of each video. The defaults take 30 frames from the first 3 s."""

    frames: Annotated[int, Field(ge=3, lt=2**31)] = 30
    """Number of frames, including the start and end images. At least 3."""
    fps: PositiveFloat = 10.0
    """Frame rate in frames per second."""
    height: PositiveInt = 64
    """Frame height in pixels."""
    width: PositiveInt = 64
    """Frame width in pixels."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """How to fit videos of another aspect ratio: stretch them, crop the longer side, or pad with borders."""


@dataclass(frozen=True)
class OptimConfig(StrictSection):
    """Adam with the paper's settings. All other options are off by default."""

    lr: PositiveFloat = 1e-4
    """Learning rate."""
    discriminator_lr: PositiveFloat | None = None
    """Learning rate of the discriminators. Null uses `lr`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Adam's decay rate of the first moment, in [0, 1)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay rate of the second moment, in [0, 1)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW)."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps over which the learning rate rises linearly to its value."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule after the warmup. `cosine` decays to 0 at the last step."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of the gradient of each network. Larger gradients are scaled down; null turns clipping off."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, in [0, 1). Above 0, the averaged network generates the
    clips."""


@dataclass(frozen=True)
class TrainConfig(StrictSection):
    """Length of the training, validation and checkpoints."""

    epochs: PositiveInt = 100
    """Number of epochs."""
    global_batch_size: PositiveInt = 20
    """Clips per optimizer step, summed over all workers."""
    validate_every: PositiveInt = 1
    """Epochs between validations. Each validation logs samples and saves a checkpoint."""
    validate_clips: PositiveInt = 500
    """Maximum number of validation clips. All runs on a dataset use the same ones."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between additional checkpoints. 0 saves none."""
    keep_checkpoints: PositiveInt = 1
    """Number of checkpoints with the best validation score to keep, in addition to the newest two."""
    init_from: Location | None = None
    """Source of the initial weights of a new run: a run in `storage`, or else a pretrained model of that name, such as
    `between`; or the location of a checkpoint (with a `/`)."""
    max_skipped_steps: NonNegativeInt = 10
    """Fail after more than this many steps with a non-finite gradient."""
    seed: Seed = 0
    """Random seed of the initial weights, the sample order and the noise."""


@dataclass(frozen=True)
class SpeedConfig(StrictSection):
    """How a step is computed. These options change the result only by rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the networks. `auto` is bfloat16 autocast on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the networks with torch.compile. Adds about a minute at the start."""
    channels_last: bool = False
    """Use the channels-last memory format, which speeds up convolutions on some GPUs."""
    micro_batch_size: NonNegativeInt = 0
    """Maximum number of clips per forward pass of a worker; gradients accumulate over the parts of a batch. 0
    processes a worker's whole batch at once."""
    compress_gradients: bool = False
    """Exchange gradients between workers as bfloat16. GPUs only."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the clips of all workers. GPUs only."""
    profile: bool = False
    """Record a torch.profiler trace of a few steps, logged as an MLflow artifact. `--profile` sets it too."""


@dataclass(frozen=True)
class ClusterConfig(StrictSection):
    """Workers of a training and their restarts."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of DDP workers, or `[min, max]` for elastic training, which adds and removes workers with the free
    capacity."""
    max_failures: NonNegativeInt = 3
    """Number of restarts from the last checkpoint before the run fails."""
    max_preemptions: NonNegativeInt = 100
    """Number of restarts after node preemptions, which do not count as `max_failures`."""
    gpu: bool | None = None
    """Give each worker a GPU. Null uses GPUs if the cluster has them or its autoscaler can add them."""
    shared_storage: bool = False
    """State that the nodes that an autoscaler adds mount a local `storage` and `data.root`."""

    def __post_init__(self) -> None:
        """Rejects a range whose minimum exceeds its maximum."""
        if self.min_workers > self.max_workers:
            raise ValueError(f"cluster.workers: expected [min, max] with min <= max (value {list(self.workers)})")  # type: ignore[arg-type]

    @property
    def min_workers(self) -> int:
        """Number of workers below which an elastic training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Number of workers with which an elastic training runs if there is capacity."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class TrackingConfig(StrictSection):
    """MLflow tracking and model registry."""

    uri: TrackingUri | None = None
    """MLflow tracking URI. Null uses the SQLite file `mlflow.db` in `storage`."""
    experiment: str = "giffy_ray"
    """Name of the MLflow experiment."""
    samples: bool = True
    """Log an animation of a few generated clips at each validation. False logs only the last ones."""
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = "giffy_ray"
    """Name under which a completed training registers its best model. Null does not register it."""


@dataclass(frozen=True)
class EvaluateConfig(StrictSection):
    """Evaluation of trained models against baselines."""

    split: Literal["validation", "test", "ood"] = "validation"
    """Split to evaluate on."""
    clips: PositiveInt = 1000
    """Maximum number of clips. All evaluations on a dataset use the same ones."""
    runs: tuple[Run, ...] = ()
    """Models that `jobs/evaluate.py` compares: names of runs in `storage` or of pretrained models, locations of
    checkpoints (with a `/`), or `models:/NAME@champion`. Empty evaluates the run `name`."""
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    """Baselines to compare with. `linear` is always included, as the reference for the skill."""
    perceptual: tuple[PerceptualMetric, ...] = ()
    """Perceptual metrics to compute (`docs/metrics.md`). The first three need the extra `perceptual`."""
    weights: dict[UserSuppliedMetric, LocalPath] = field(default_factory=dict)
    """TorchScript file with the network of each of `lpips`, `fid` and `fvd` in `perceptual`."""
    samples: PositiveInt = 8
    """Samples per clip from a model with noise. The best one is reported too."""


@dataclass(frozen=True)
class SearchConfig(StrictSection):
    """The hyperparameter search of `jobs/tune.py`."""

    trials: PositiveInt = 12
    """Maximum number of trials."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Time budget in hours. No trial starts after it; time before an interruption counts. Null sets no limit."""
    patience: PositiveInt | None = None
    """Stop after this many trials without improvement. Null turns early stopping of the search off."""
    epochs: PositiveInt = 20
    """Epochs of a trial that runs to completion."""
    metric: str = "val/l2_paper"
    """Metric to optimize, in its own direction. It must not depend on the searched fields."""
    objectives: dict[str, Literal["minimize", "maximize"]] = field(default_factory=dict)
    """Metrics to optimize and their directions, instead of `metric`, as in `{val/skill: maximize, val/blur:
    minimize}`. Two or more turn ASHA off. A single one sets the direction of a metric that has none, such as
    `train/d_real`."""
    sampler: Literal["tpe", "random", "pbt"] = "tpe"
    """Tree-structured Parzen estimator, random search, or population-based training. `pbt` trains all trials side by
    side; after each validation the worst trials copy the weights of the best and perturb their values."""
    asha: bool = True
    """Stop weak trials early (asynchronous successive halving). Has no effect on `pbt` or on several objectives."""
    grace_period: PositiveInt = 2
    """Epochs before which ASHA stops no trial."""
    reduction_factor: Annotated[int, Field(ge=2, lt=2**31)] = 2
    """At each rung of ASHA, one of this many trials continues. At least 2."""
    seed: Seed = 0
    """Random seed of the sampler."""
    workers: PositiveInt = 1
    """DDP workers per trial. A single worker trains in the trial's own process."""
    gpus_per_worker: PositiveFloat = 1.0
    """GPUs per worker of a trial. Below 1, single-worker trials share a GPU; above 1, a whole number."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Resume an interrupted search of the same name: if there is one, never, or fail without one. `--resume` sets it
    too."""
    storage: LocalPath | None = None
    """Optuna storage: `postgresql://USER@HOST/DATABASE`, or a journal file `/path/NAME.log`. Null uses an SQLite file
    in the search's folder."""
    enqueue: tuple[str, ...] = ()
    """MLflow run ids whose values are tried first, after the paper's."""
    space: dict[str, dict[Distribution, tuple[SearchValue, ...]]] = field(default_factory=dict)
    """Search space: a distribution for each dotted field, as in `{optim.lr: {log_uniform: [1e-5, 1e-2]}}`.
    `log_uniform`, `uniform` and `int` take `[low, high]`, `choice` takes a list of values."""

    def __post_init__(self) -> None:
        """Rejects GPU shares that NCCL or Ray cannot provide."""
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError(
                f"search.gpus_per_worker: below 1 requires search.workers=1, not {self.workers}, because NCCL cannot "
                f"run two workers of one training on one GPU (value {self.gpus_per_worker:g})"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"search.gpus_per_worker: must be a whole number above 1, because Ray assigns whole GPUs (value "
                f"{self.gpus_per_worker:g})"
            )


@dataclass(frozen=True)
class Experiment(StrictSection):
    """Everything that defines one training."""

    # Most file systems limit a folder name to 255 characters, and MLflow a run name to 250.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = "default"
    """Name of the run and of its folder in `storage`: letters, digits, `.`, `_` and `-`, at most 200 characters."""
    storage: Location = "runs/"
    """Folder for runs, cached clips and results: a path, `s3://...` or `gs://...`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The videos, how they are split, and how decoded clips are cached."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """The clip taken from each video."""
    model: ModelConfig = field(default_factory=CVAEConfig)
    """The model to train."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the training, validation and checkpoints."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How a step is computed."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Workers of a training and their restarts."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow tracking and model registry."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation against baselines."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """The hyperparameter search."""

    @property
    def run_dir(self) -> str:
        """Folder of the run: checkpoints, metrics and results."""
        return join(self.storage, self.name)
