"""The sections of an Experiment, with their defaults. Those of the models are in `models`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PlainValidator

from giffy_ray.config.models import CVAEConfig, ModelConfig
from giffy_ray.config.values import Count, LocalPath, Location, Positive, Run, Seed, Share, Strict, TrackingUri, Weight
from giffy_ray.core.storage import join

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Split = Literal["training", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = get_args(Split)
VIDEO_LIST_SUFFIXES = (".csv", ".parquet")  # of a `data.root` that is a list of videos
Baseline = Literal["linear", "linear_as_coded", "hold", "minterpolate_mci", "minterpolate_blend"]
PerceptualMetric = Literal["st_lpips", "kernel_distance_frames", "kernel_distance_motion", "lpips", "fid", "fvd"]
Supplied = Literal["lpips", "fid", "fvd"]  # the metrics whose networks the user brings
Distribution = Literal["log_uniform", "uniform", "int", "choice"]


def _search_value(value: Any) -> bool | int | float | str | None:
    """A bound or choice of `search.space`. Words that read as numbers are numbers: YAML reads 1e-4 as a word."""
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("a search draws numbers, words, true, false or null")
    return value


SearchValue = Annotated[bool | int | float | str | None, PlainValidator(_search_value)]


@dataclass(frozen=True)
class SyntheticConfig(Strict):
    """The built-in data set, rendered when `data.root` is not given. Counts are clips per category."""

    training_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 400
    validation_clips: Annotated[int, Field(gt=0, le=1_000_000)] = 50
    test_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # seen by neither training nor tuning
    ood_clips: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # a test outside the range of the others
    seed: Seed = 0


@dataclass(frozen=True)
class LimitsConfig(Strict):
    """What a video file may cost. One that asks for more is rejected by name, before it is decoded where possible."""

    file_mb: Positive = 256
    pixels: Positive = 4096 * 4096  # of one frame
    frames: Positive = 1_000_000
    seconds: Positive = 24 * 3600
    decode_s: Positive = 60  # of wall time, for one file
    memory_mb: Positive = 2048  # of the process that decodes


@dataclass(frozen=True)
class SegmentsConfig(Strict):
    """Training on parts of the videos: the store keeps all their frames, and random intervals of them are dealt."""

    frames: Literal[0] | Annotated[int, Field(ge=2, lt=2**31)] = 0  # dealt of each interval; 0: whole clips are dealt
    shortest_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    frame_times: Literal["uniform", "jittered"] = "uniform"  # of the frames between start and end


@dataclass(frozen=True)
class AugmentConfig(Strict):
    """What may happen to a clip on its way to training, the same to all its frames but for `pan`."""

    flip: bool = False  # every other clip, left to right
    reverse: bool = False  # every other clip, in time
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # the smallest share of height and width that is cut out
    pan: Share = 0.0  # how far the part that is cut out may move on its way from the first frame to the last
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the largest share by which all values grow or shrink
    permute_channels: bool = False  # red, green and blue change places


@dataclass(frozen=True)
class DataConfig(Strict):
    # A folder of videos, or a list of them (.csv, .parquet); none: the built-in data set; ???: the user must say.
    root: Location | None = None
    categories: tuple[str, ...] = ()  # empty: all that there are
    # The most videos of a category ('*': of each other one) in a split: {skiing: {training: 1800, validation: 81}}.
    max_videos: dict[str, dict[Split, Positive]] = field(default_factory=dict)
    # Share of the videos held out of training, by what they were cut from; the data set's own validation split then
    # becomes `test`. None: its own split, or a tenth where it has none.
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    ucf101_list: Literal[1, 2, 3] = 1  # which of its three split lists
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # nothing is trained on what is left over beyond
    cache_decoded: bool = (
        True  # decoded clips are kept on disk; false: videos are decoded again whenever they are dealt
    )
    cache_max_gb: Annotated[float, Field(gt=0)] | None = None  # the most that decoded clips may take; none: the disk
    # The most that copies of clips on s3:// or gs:// may take on a node; none: what is free, less a tenth of the disk.
    node_cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class ClipConfig(Strict):
    """What is kept of a video: `frames` frames at `fps`, from its beginning (30 at 10 fps: the first 3 s)."""

    frames: Annotated[int, Field(ge=3, lt=2**31)] = 30
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    height: Positive = 64
    width: Positive = 64
    # How a picture of another shape is brought to this one: whole but out of shape, cut at the sides, or with margins.
    fit: Literal["stretch", "crop", "pad"] = "stretch"


@dataclass(frozen=True)
class OptimConfig(Strict):
    """Adam, as the report used it; the rest is for who asks for it."""

    lr: Rate = 1e-4
    discriminator_lr: Rate | None = None  # none: that of the generator
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.8
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: Weight = 0.0  # decoupled from the gradient (AdamW)
    warmup_steps: Count = 0  # over which the learning rate rises to its value
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to nothing at the last step
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None  # of the gradient of a network
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # decay of an average of the weights, which then makes the clips
    )


@dataclass(frozen=True)
class TrainConfig(Strict):
    epochs: Positive = 100
    global_batch_size: Positive = 20  # clips per optimiser step, over all workers together
    validate_every: Positive = 1  # epochs from one validation, with samples and a checkpoint, to the next
    validate_clips: Positive = 500  # at most, of the validation split; the same ones in every run of a data set
    checkpoint_every: Count = 0  # steps between further checkpoints; 0: none
    keep_checkpoints: Positive = 1  # checkpoints of the best validations that are kept, beside the newest
    init_from: Location | None = None  # a run, or where a checkpoint lies, whose networks the first step starts from
    max_skipped_steps: Count = 10  # steps without a finite gradient before a run is stopped
    seed: Seed = 0


@dataclass(frozen=True)
class SpeedConfig(Strict):
    """How a step is computed; what it computes stays the same but for rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto: bfloat16 on a GPU
    compile: bool = False  # by torch.compile: a minute at the start, for faster steps
    channels_last: bool = False  # how clips and weights lie in memory; some GPUs convolve faster so
    micro_batch_size: Count = 0  # most clips that a worker takes at once; 0: its whole share
    compress_gradients: bool = False  # workers send each other bfloat16
    sync_batch_norm: bool = False  # statistics of the clips of all workers, on GPUs
    profile: bool = False  # a torch.profiler trace of a few steps, among the run's files in MLflow; or say --profile


@dataclass(frozen=True)
class ClusterConfig(Strict):
    # DDP workers; [min, max]: as many as there is room for, more and fewer while the training runs.
    workers: Positive | tuple[Positive, Positive] = 1
    max_failures: Count = 3  # restarts from the last checkpoint before a run is given up
    max_preemptions: Count = 100  # restarts for machines that were taken away, counted apart
    gpu: bool | None = None  # a GPU for each worker; none: where the cluster has GPUs, or may add them
    shared_storage: bool = False  # nodes that an autoscaler adds mount the local `storage` and `data.root`, too

    def __post_init__(self) -> None:
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers must be [min, max], the smaller first: not {list(self.workers)}")  # type: ignore[arg-type]

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class TrackingConfig(Strict):
    uri: TrackingUri | None = None  # none: an SQLite file in `storage`
    experiment: str = "giffy_ray"
    samples: bool = True  # log an animation of a few clips at each validation; false: only those at the end
    # In MLflow's registry, of the best model of each training that ends; none: it is not registered.
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = "giffy_ray"


@dataclass(frozen=True)
class EvaluateConfig(Strict):
    split: Literal["validation", "test", "ood"] = "validation"
    clips: Positive = 1000  # at most, of the split; the same ones in every evaluation of a data set
    # Names of runs in `storage`, locations of checkpoints, models:/NAME@champion; empty: the run `name`.
    runs: tuple[Run, ...] = ()
    baselines: tuple[Baseline, ...] = get_args(Baseline)  # linear is always there: the others are measured against it
    perceptual: tuple[PerceptualMetric, ...] = ()  # docs/metrics.md; the first three need the extra `perceptual`
    weights: dict[Supplied, LocalPath] = field(default_factory=dict)  # TorchScript files of these
    samples: Positive = 8  # of a model that makes several clips of the same ends, the best of which is shown too


@dataclass(frozen=True)
class SearchConfig(Strict):
    """What `jobs/tune_*.py` tries. `space` maps a field of the experiment to {distribution: [low, high]}."""

    trials: Positive = 12
    max_hours: Annotated[float, Field(gt=0)] | None = None  # no trial is begun later; what was interrupted counts on
    patience: Positive | None = None  # trials without a better one, after which none is begun
    epochs: Positive = 20  # of the longest trial; ASHA ends poor ones sooner
    metric: str = "val/l2_paper"  # optimised in its own direction; must not be computed from the searched fields
    # Replaces `metric`: {val/skill: maximize, val/blur: minimize}. With two or more, ASHA is off. A single one states the
    # direction of a metric that has none of its own, such as train/d_real.
    objectives: dict[str, Literal["minimize", "maximize"]] = field(default_factory=dict)
    # pbt: `trials` train side by side, and after each validation the worst take over weights and values of the best.
    sampler: Literal["tpe", "random", "pbt"] = "tpe"
    asha: bool = True  # of one metric, and not of pbt
    grace_period: Positive = 2  # no trial is ended before
    reduction_factor: Annotated[int, Field(ge=2, lt=2**31)] = 2  # of so many trials at a rung, one goes on
    seed: Seed = 0
    workers: Positive = 1  # of a trial; one trains in the trial's own process
    # Below 1, trials share a GPU; that takes trials of one worker.
    gpus_per_worker: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    resume: Literal["auto", "never", "must"] = "auto"  # a search of this name that is there
    # Of Optuna: postgresql://USER@HOST/DATABASE, or a journal file /path/NAME.log. None: SQLite in the search's folder.
    storage: LocalPath | None = None
    enqueue: tuple[str, ...] = ()  # MLflow's ids of runs whose values are tried after the report's
    space: dict[str, dict[Distribution, tuple[SearchValue, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError(
                f"search.gpus_per_worker={self.gpus_per_worker:g} needs search.workers=1, not {self.workers}: "
                "NCCL cannot run two workers of one training on one GPU"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"search.gpus_per_worker must be whole above 1, for Ray: not {self.gpus_per_worker:g}")


@dataclass(frozen=True)
class Experiment(Strict):
    # Most file systems take 255 characters in the name of a folder, and MLflow 250 in that of a run.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = "default"
    storage: Location = "runs/"  # where runs, stores and results are written: a folder, s3://... or gs://...
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    model: ModelConfig = field(default_factory=CVAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    @property
    def run_dir(self) -> str:
        """The folder of the run: checkpoints, metrics and results."""
        return join(self.storage, self.name)
