"""Interpolates many pairs of images, in this process or in Ray actors that hold the model, and lists the results.

    folder or table --find_pairs--> pairs --ClipMaker, in each actor--> clips and records --> manifest

A record, `.records/NAME.json` in the output folder, describes a complete clip: what it was made of, and its size. When
the job is started again, a pair with a valid record is not made again. Files appear only when they are complete.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from giffy_ray.config import flatten, override
from giffy_ray.core.errors import InputError
from giffy_ray.core.storage import (
    check_writable,
    filesystem_of,
    join,
    local_path,
    read_bytes,
    read_text,
    redact_credentials,
    write_bytes,
    write_text,
)
from giffy_ray.inference.clip import DEFAULT_QUALITY, save_frames
from giffy_ray.inference.images import Fit, match_sizes, read_image
from giffy_ray.inference.interpolator import DEFAULT_FPS, DEFAULT_MODEL, Interpolator, frame_times
from giffy_ray.inference.pairs import Pair, PairList, find_pairs, is_table

if TYPE_CHECKING:
    from giffy_ray.cluster.resources import Pool

ClipFormat = Literal["mp4", "gif", "webp"]
ManifestFormat = Literal["csv", "parquet"]
Status = Literal["ok", "failed", "skipped"]

_RECORDS = ".records"  # folder in the output; names of pairs never begin with a dot
_RECORD_VERSION = 1  # of what a record means; records of another version are not used
_MAX_IMAGE_BYTES = 2**30
_MAX_ATTEMPTS = 2  # Ray restarts a worker that dies, for ever
_MAX_ERROR_CHARS = 500
_EPSILON = 1e-9  # so that 3 GPUs are 30 tenths of a GPU
_TEST_SIZE = 16, 16  # height and width of the clip that tests the options


@dataclass(frozen=True)
class ClipOptions:
    """Options that all clips of a job share.

    Attributes:
        frames: Length of a clip, both images included.
        fps: Frames per second.
        file_format: Format of the clips.
        quality: 0 to 100, for mp4 and WebP.
        samples: Number of clips per pair. The first is the most probable one.
        seed: Determines the others.
        motion_size: See `Interpolator`.
        fit: See `Interpolator`.
        resize: See `Interpolator`.

    Raises:
        InputError: A value is out of its range.
    """

    frames: int = 30
    fps: float = DEFAULT_FPS
    file_format: ClipFormat = "mp4"
    quality: int = DEFAULT_QUALITY
    samples: int = 1
    seed: int = 0
    motion_size: int | None = None
    fit: Fit = "crop"
    resize: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("file_format", get_args(ClipFormat)), ("fit", get_args(Fit))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: must be one of {', '.join(choices)} (value {getattr(self, name)!r})")
        for name, minimum in (("frames", 2), ("samples", 1), ("seed", 0), ("motion_size", 8)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{name}: must be at least {minimum} (value {value})")


@dataclass(frozen=True)
class ManifestRow:
    """One clip, one pair that failed, or one file that belongs to no pair.

    Attributes:
        name: Name of the pair.
        start: Path or address of the first image; of a skipped file, its own.
        end: Path or address of the last image.
        output: The clip, relative to the output folder.
        status: `ok`, also if an earlier start of the job made the clip; `failed`; or `skipped` for a file that belongs
            to no pair.
        error: Why it failed or was skipped.
        seconds: What making the clip took; for the first one of a pair, with reading the images.
        width: Of the clip, in pixels.
        height: Of the clip, in pixels.
        frames: Of the clip.
    """

    name: str
    start: str
    end: str
    output: str = ""
    status: Status = "ok"
    error: str = ""
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    frames: int = 0


@dataclass(frozen=True)
class BulkResult:
    """Result of a job.

    Attributes:
        rows: The rows of the manifest.
        manifest: Path or address of the manifest.
        made: Number of pairs whose clips were made.
        kept: Number of pairs whose clips were complete already.
    """

    rows: tuple[ManifestRow, ...]
    manifest: str
    made: int
    kept: int

    def count(self, status: Status) -> int:
        """Returns the number of rows with this status."""
        return sum(row.status == status for row in self.rows)


def interpolate_pairs(
    location: str,
    output: str,
    model: str = DEFAULT_MODEL,
    options: ClipOptions | None = None,
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    shared_storage: bool = False,
    manifest_format: ManifestFormat = "csv",
) -> BulkResult:
    """Makes the clips of all pairs in a folder or table, and a manifest. A pair that fails does not end the job.

    Args:
        location: Folder or table of pairs, local or in a bucket; see `find_pairs`.
        output: Folder of the clips, local or in a bucket.
        model: See `Interpolator.from_pretrained`.
        options: What all clips have in common.
        workers: Number of actors that hold the model. 0 works in this process, without Ray. None takes one per GPU of
            the cluster, or per CPU if no GPU is free.
        gpus_per_worker: GPUs of each actor, such as 0.5; None uses one if there is one.
        shared_storage: Nodes that join the cluster later see the local folders too.
        manifest_format: Format of the manifest.

    Raises:
        InputError: The pairs, the model, the options, the output or the cluster cannot be used.
    """
    options = options or ClipOptions()
    _check_output(location, output)
    found = find_pairs(location)
    interpolator = Interpolator.from_pretrained(model, "cpu")
    _make_test_clip(interpolator, options)
    pool = _plan_pool(interpolator, len(found.pairs), workers, gpus_per_worker)
    if pool.actors:
        _check_shared_folders(location, output, shared_storage)
    device = "auto" if not pool.actors else "cuda" if pool.resources.get("num_gpus") else "cpu"
    job = _Job(found.pairs, output, model, _digest_model(interpolator), device, options, uuid.uuid4().hex)
    manifest = join(output, f"manifest.{manifest_format}")
    outcomes: list[_Outcome] = []
    try:
        for outcome in _run(job, pool):
            outcomes.append(outcome)
    finally:
        rows = [row for outcome in outcomes for row in outcome.rows] + _list_unpaired(location, found)
        write_bytes(manifest, _encode_manifest(rows, manifest_format))
    made, kept = (sum(outcome.kind == kind for outcome in outcomes) for kind in ("made", "kept"))
    return BulkResult(tuple(rows), manifest, made, kept)


@dataclass(frozen=True)
class _Job:
    """Everything that an actor needs."""

    pairs: tuple[Pair, ...]
    output: str
    model: str
    model_digest: str
    device: str
    options: ClipOptions
    id: str  # of this start of the job


@dataclass(frozen=True)
class _Outcome:
    rows: tuple[ManifestRow, ...]
    kind: Literal["made", "kept", "failed"]


def _run(job: _Job, pool: Pool) -> Iterator[_Outcome]:
    from giffy_ray.cluster.resources import MALLOC_ENV
    from giffy_ray.data.loader import map_batches_with_models

    results = map_batches_with_models(
        np.arange(len(job.pairs)),
        _MakerFactory(job),
        batch_size=1,
        actors=pool.actors,
        title="interpolating",
        resources={**pool.resources, "runtime_env": {"env_vars": MALLOC_ENV}},
    )
    for outcomes in results:
        yield from outcomes


@dataclass(frozen=True)
class _MakerFactory:
    """Makes a `ClipMaker` in each actor."""

    job: _Job

    def __call__(self) -> ClipMaker:
        interpolator = Interpolator.from_pretrained(self.job.model, self.job.device)
        if _digest_model(interpolator) != self.job.model_digest:
            raise InputError(f"model: {self.job.model!r} was replaced while the job started; start it again")
        return ClipMaker(interpolator, self.job)


class ClipMaker:
    """Makes the clips of one pair after another, and records them.

    Args:
        interpolator: The model.
        job: What to make.
    """

    def __init__(self, interpolator: Interpolator, job: _Job):
        self.interpolator, self.job = interpolator, job

    def __call__(self, indices: np.ndarray) -> list[_Outcome]:
        """Returns what became of the pairs with these indices, int64 [n]."""
        return [self._process(self.job.pairs[index]) for index in indices.tolist()]

    def _process(self, pair: Pair) -> _Outcome:
        record_file = join(self.job.output, _RECORDS, f"{pair.name}.json")
        try:
            key = self._identify(pair)
            record = _read_record(record_file)
            if record.get("key") == key and _are_complete(self.job.output, record["clips"]):
                return _to_outcome(pair, record["clips"], "kept")
            self._count_attempt(record_file, record)
            clips = self._make_clips(pair)
            write_text(record_file, json.dumps({"version": _RECORD_VERSION, "key": key, "clips": clips}))
            return _to_outcome(pair, clips, "made")
        except Exception as error:  # whatever is wrong with a pair, the others are made
            row = ManifestRow(pair.name, pair.start, pair.end, status="failed", error=_describe_error(error))
            return _Outcome((_redact(row),), "failed")

    def _identify(self, pair: Pair) -> str:
        """Returns a digest of all that determines the clips of a pair."""
        parts = {
            "images": [[path, *_stat_image(path, side)] for side, path in (("start", pair.start), ("end", pair.end))],
            "model": self.job.model_digest,
            "options": dataclasses.asdict(self.job.options),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _count_attempt(self, record_file: str, record: dict[str, Any]) -> None:
        """Records that making a pair begins. Raises InputError if workers died of it before."""
        attempts = record.get("attempts", 0) if record.get("job") == self.job.id else 0
        if attempts >= _MAX_ATTEMPTS:
            raise InputError(f"{attempts} workers died while they made this clip; see Ray's logs")
        state = {"version": _RECORD_VERSION, "job": self.job.id, "attempts": attempts + 1}
        write_text(record_file, json.dumps(state))

    def _make_clips(self, pair: Pair) -> list[dict[str, Any]]:
        """Writes the clips of a pair. Returns for each the fields of its row, and its size in bytes."""
        options = self.job.options
        begin_s = time.perf_counter()
        start, end = match_sizes(_read_image(pair.start), _read_image(pair.end), options.fit)
        size = options.motion_size or self.interpolator.choose_motion_size(start, end)
        clips = []
        for sample in range(options.samples):
            frames = self.interpolator.iter_frames(
                start,
                end,
                frame_times(options.frames),
                sample=sample,
                seed=options.seed,
                motion_size=size,
                resize=options.resize,
            )
            first = next(frames)
            height, width = first.shape[:2]
            name = _output_name(pair, options, sample)
            count, size_bytes = _save(itertools.chain([first], frames), join(self.job.output, name), options)
            shape = {"width": width, "height": height, "frames": count}
            end_s = time.perf_counter()
            clips.append({"output": name, "bytes": size_bytes, "seconds": round(end_s - begin_s, 3), **shape})
            begin_s = end_s
        return clips


def _to_outcome(pair: Pair, clips: Iterable[dict[str, Any]], kind: Literal["made", "kept"]) -> _Outcome:
    fields = [{name: value for name, value in clip.items() if name != "bytes"} for clip in clips]
    rows = (_redact(ManifestRow(pair.name, pair.start, pair.end, **values)) for values in fields)
    return _Outcome(tuple(rows), kind)


def _output_name(pair: Pair, options: ClipOptions, sample: int) -> str:
    suffix = f"-{sample + 1}" if options.samples > 1 else ""
    return f"{pair.name}{suffix}.{options.file_format}"


def _save(frames: Iterable[np.ndarray], location: str, options: ClipOptions) -> tuple[int, int]:
    """Writes a clip to a folder or bucket. Returns the numbers of its frames and bytes."""
    path = local_path(location)
    if path is not None:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # of a worker that was killed
            leftover.unlink(missing_ok=True)
        count = save_frames(frames, path, options.fps, options.quality)
        return count, path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        temporary = Path(folder, f"clip.{options.file_format}")
        count = save_frames(frames, temporary, options.fps, options.quality)
        filesystem, key = filesystem_of(location)
        fs.copy_files(str(temporary), key, fs.LocalFileSystem(), filesystem)
        return count, temporary.stat().st_size


def _stat_image(location: str, side: str) -> tuple[int, int]:
    """Returns size in bytes and modification time in ns. Raises InputError for what is no regular file."""
    filesystem, path = filesystem_of(location)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"{side}: there is no file {location}")
    if not info.is_file:
        raise InputError(f"{side}: {location} is not a regular file")
    if info.size > _MAX_IMAGE_BYTES:
        raise InputError(f"{side}: {location} has {info.size / 2**30:.1f} GiB; the limit is 1 GiB, scale it down")
    return info.size, info.mtime_ns or 0


def _read_image(location: str) -> np.ndarray:
    path = local_path(location)
    return read_image(read_bytes(location), location) if path is None else read_image(path)


def _read_record(location: str) -> dict[str, Any]:
    """Returns a record, or an empty one if there is none that can be used."""
    try:
        record = json.loads(read_text(location) or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) and record.get("version") == _RECORD_VERSION else {}


def _are_complete(output: str, clips: Iterable[dict[str, Any]]) -> bool:
    for clip in clips:
        filesystem, path = filesystem_of(join(output, clip["output"]))
        if filesystem.get_file_info(path).size != clip["bytes"]:
            return False
    return True


def _describe_error(error: Exception) -> str:
    if isinstance(error, InputError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:_MAX_ERROR_CHARS]


def _redact(row: ManifestRow) -> ManifestRow:
    texts = {name: redact_credentials(getattr(row, name)) for name in ("start", "end", "error")}
    return dataclasses.replace(row, **texts)


def _list_unpaired(location: str, found: PairList) -> list[ManifestRow]:
    """A row of a table asks for a clip, so it has failed; a file of a folder may be there for another reason."""
    status: Status = "failed" if is_table(location) else "skipped"
    return [
        _redact(ManifestRow("", file.path, "", status=status, error=f"{file.path} {file.reason}"))
        for file in found.skipped
    ]


def _encode_manifest(rows: Sequence[ManifestRow], manifest_format: ManifestFormat) -> bytes:
    records = [dataclasses.asdict(row) for row in rows]
    if manifest_format == "parquet":
        types = {"str": pa.string(), "Status": pa.string(), "float": pa.float64(), "int": pa.int64()}
        schema = pa.schema([(field.name, types[str(field.type)]) for field in dataclasses.fields(ManifestRow)])
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records, schema), buffer)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(ManifestRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def _check_output(location: str, output: str) -> None:
    try:
        source, target = (str(local_path(path) or path).rstrip("/") for path in (location, output))
        check_writable(output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"output: cannot be written: {reason} (value {redact_credentials(output)!r})") from error
    if f"{target}/".startswith(f"{source}/"):
        raise InputError(
            f"output: {output} lies in the folder of the pairs, where another start would take its clips for images; "
            "choose another folder"
        )


def _make_test_clip(interpolator: Interpolator, options: ClipOptions) -> None:
    """Makes two frames, so that options that can never work fail once and at once, rather than for each pair."""
    height, width = interpolator.fixed_size or _TEST_SIZE
    image = np.zeros((height, width, 3), np.uint8)
    frames = interpolator.iter_frames(image, image, frame_times(options.frames), motion_size=max(height, width))
    with tempfile.TemporaryDirectory(prefix="giffy_ray-") as folder:
        path = Path(folder, f"clip.{options.file_format}")
        save_frames(itertools.islice(frames, 2), path, options.fps, options.quality)


def _digest_model(interpolator: Interpolator) -> str:
    """Returns a digest of the weights, and of the fields of the experiment that determine clips."""
    fields = flatten(interpolator.experiment)
    shown = {name: value for name, value in fields.items() if name.startswith(("clip.", "model."))}
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True, default=str).encode())
    for network_name, network in sorted(interpolator.generator.networks.items()):
        for name, tensor in network.state_dict().items():
            digest.update(f"{network_name}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plan_pool(interpolator: Interpolator, pairs: int, workers: int | None, gpus_per_worker: float | None) -> Pool:
    """Connects to Ray and plans the actors.

    Raises:
        InputError: The cluster cannot hold them.
    """
    from giffy_ray.cluster import resources

    if workers is not None and workers < 0:
        raise InputError(f"workers: must be at least 0 (value {workers})")
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise InputError(f"gpus_per_worker: must be at least 0 (value {gpus_per_worker:g})")
    if workers == 0:
        if gpus_per_worker is not None:
            raise InputError("gpus_per_worker: has no effect without workers; remove it, or set workers")
        return resources.Pool(0, {})
    resources.connect()
    networks = interpolator.generator.networks.values()
    weight_bytes = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    if workers is None and gpus_per_worker is None:
        return resources.model_pool(interpolator.experiment, pairs, weight_bytes)
    nodes = resources.list_nodes()
    gpus = float(any(node.gpus for node in nodes)) if gpus_per_worker is None else gpus_per_worker
    fitting = (min(node.cpus, node.gpus / gpus + _EPSILON if gpus else node.cpus) for node in nodes)
    capacity = sum(node.count * int(count) for node, count in zip(nodes, fitting, strict=True))
    if capacity < (workers or 1):
        wanted = f"{workers or 1} workers with 1 CPU and {gpus:g} GPUs each"
        raise InputError(f"workers: the cluster has room for {capacity} of {wanted}; ask for fewer workers or GPUs")
    return resources.Pool(min(workers or capacity, pairs), {"num_cpus": 1, "num_gpus": gpus})


def _check_shared_folders(location: str, output: str, shared_storage: bool) -> None:
    """Raises InputError if a node of the cluster does not see a local folder."""
    from giffy_ray.cluster import resources
    from giffy_ray.config import ConfigError, Experiment

    folders = {"storage": output, "data.root": location, "cluster.shared_storage": shared_storage}
    try:
        resources.check_folders(override(Experiment(), folders))
    except ConfigError as error:
        text = str(error).replace("storage: ", "output: ", 1).replace("data.root: ", "pairs: ", 1)
        raise InputError(text.replace("cluster.shared_storage=true", "shared_storage")) from error
