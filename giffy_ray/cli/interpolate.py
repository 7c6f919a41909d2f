"""`giffy interpolate`: its options, and which of them go with pictures, with a folder of pairs and with a video.

What can be wrong with the arguments is checked before torch is imported, and what can be wrong with the pictures before
the model is loaded.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from giffy_ray.cli.errors import FAILED, print_error
from giffy_ray.core.errors import InputError

if TYPE_CHECKING:
    from giffy_ray.cli.key_frames import KeyFrames
    from giffy_ray.inference.images import Fit
    from giffy_ray.inference.interpolator import Dtype, Ease, Interpolator

_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_MIN_MOTION_SIZE = 8
InputKind = Literal["pictures", "a folder", "a video"]
_CLIP_OPTIONS = ("frames", "duration", "fps", "samples", "seed", "loop", "ease", "fit", "resize")
# Options that have an effect on some kinds of input only. On another kind they are refused rather than ignored.
_KINDS_OF_OPTION: dict[str, tuple[InputKind, ...]] = {
    **dict.fromkeys(_CLIP_OPTIONS, ("pictures", "a folder")),
    "clip_format": ("a folder",),
    "times": ("a video",),
    "to_fps": ("a video",),
}
_EPILOG = """\b
Examples:
  giffy interpolate a.jpg b.jpg -o out.mp4
  giffy interpolate 1.png 2.png 3.png --loop --ease in-out -o loop.gif
  giffy interpolate a.jpg b.jpg --duration 2 --fps 30 --samples 4 -o out.webp
  giffy interpolate film.mp4 --times 2 -o smooth.mp4
  giffy interpolate pairs/ -o clips/
"""


class MotionSize(click.ParamType):
    """A size in pixels, or `auto`, which becomes None."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Parses the text of the option."""
        if value == "auto":
            return None
        if str(value).isdecimal() and int(value) >= _MIN_MOTION_SIZE:
            return int(value)
        self.fail(f"{value!r} is neither auto nor a number of pixels, at least {_MIN_MOTION_SIZE}", param, ctx)


class FiniteRange(click.FloatRange):
    """A range of numbers without infinity and NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parses the text of the option."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@dataclass(frozen=True)
class Request:
    """The parsed command line: a field for each option."""

    inputs: tuple[Path, ...]
    output: Path
    frames: int
    duration: float | None  # seconds
    fps: float
    samples: int
    seed: int
    loop: bool
    ease: Ease
    fit: Fit
    resize: bool
    clip_format: str
    times: float | None
    to_fps: float | None
    model: str
    device: str
    dtype: Dtype
    motion_size: int | None  # pixels
    quality: int
    overwrite: bool


@click.command(epilog=_EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option(
    "--frames",
    type=click.IntRange(2),
    default=30,
    show_default=True,
    help="Frames from one picture to the next, both counted.",
)
@click.option("--duration", type=FiniteRange(0, min_open=True), help="Seconds of the whole clip, instead of --frames.")
@click.option(
    "--fps",
    type=FiniteRange(0, 1000, min_open=True),
    default=10.0,
    show_default=True,
    help="Frames per second of a clip between pictures.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of clips, as out-1.mp4, out-2.mp4. The first is the most probable one.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Determines the other samples.")
@click.option("--loop", is_flag=True, help="Return to the first picture, so that the clip repeats seamlessly.")
@click.option(
    "--ease",
    type=click.Choice(["linear", "in", "out", "in-out"]),
    default="linear",
    show_default=True,
    help="Even motion between two pictures, or a slow start, end or both.",
)
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "stretch"]),
    default="crop",
    show_default=True,
    help="How to fit a picture whose shape differs from that of the first.",
)
@click.option("--resize", is_flag=True, help="Scale the pictures to the size of a model that has only one.")
@click.option(
    "--format",
    "clip_format",
    type=click.Choice(["mp4", "gif", "webp", "png"]),
    default="mp4",
    show_default=True,
    help="Format of the clips of a folder of pairs.",
)
@click.option("--times", type=FiniteRange(1, min_open=True), help="Multiply the frame rate of a video.")
@click.option("--to-fps", type=FiniteRange(0, 1000, min_open=True), help="Frame rate of the new video.")
@click.option(
    "--model",
    default="between",
    show_default=True,
    help="between, between-sharp, the folder of a checkpoint, or models:/NAME@ALIAS.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto for the fastest.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Precision of the network's arithmetic.",
)
@click.option(
    "--flow-size",
    "motion_size",
    type=MotionSize(),
    metavar="[auto|N]",
    default="auto",
    show_default=True,
    help="Longer side of the images on which motion is estimated: small for large motion, large for small motion.",
)
@click.option(
    "--quality", type=click.IntRange(0, 100), default=80, show_default=True, help="Of mp4 and WebP; 100 is the best."
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--quiet", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object that describes the result.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def interpolate(context: click.Context, quiet: bool, as_json: bool, **options: Any) -> None:
    """Generates the video between pictures.

    INPUT is two or more pictures, the key frames of one clip; or one video, whose frame rate is raised; or one folder
    of pairs: subfolders with two pictures each, or pictures named NAME_a and NAME_b.

    The suffix of the output selects the format: .mp4, .gif or .webp; .png or no suffix writes a PNG file per frame.
    """
    request = Request(**options)
    kind = classify(request.inputs)
    _refuse_other_options(context, kind)
    reporter = Reporter(quiet, as_json)
    if kind == "pictures":
        interpolate_pictures(request, reporter)
    elif kind == "a video":
        raise_frame_rate(request, reporter)
    elif not interpolate_folder(request, reporter):
        context.exit(FAILED)


class Reporter:
    """Prints progress and results: a bar on stderr if that is a terminal, and lines or one JSON object on stdout."""

    def __init__(self, quiet: bool, as_json: bool):
        self._quiet, self._as_json = quiet, as_json

    def print_line(self, text: str) -> None:
        """Prints a line, unless --quiet or --json was given."""
        if not self._quiet and not self._as_json:
            click.echo(text)

    def print_json(self, result: dict[str, Any]) -> None:
        """Prints the result of the command if --json was given."""
        if self._as_json:
            click.echo(json.dumps(result))

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function that takes the number of frames done so far, and of all frames."""
        from rich.console import Console
        from rich.progress import Progress

        from giffy_ray.core.progress import progress_columns

        is_hidden = self._quiet or not sys.stderr.isatty()
        with Progress(*progress_columns(), console=Console(stderr=True), disable=is_hidden, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda completed, total: bar.update(task, completed=completed, total=total)


def classify(inputs: Sequence[Path]) -> InputKind:
    """Returns what the inputs are.

    Raises:
        InputError: One does not exist, or they do not go together.
    """
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if len(inputs) == 1:
        (path,) = inputs
        if path.is_dir():
            return "a folder"
        from giffy_ray.inference.pairs import IMAGE_SUFFIXES

        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"{path}: is one picture; give two or more, a video, or a folder of pairs")
        return "a video"
    for path in inputs:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give it alone, or pictures only")
        if path.suffix.lower() in _VIDEO_SUFFIXES:
            raise InputError(f"{path}: is a video; give it alone, or pictures only")
    return "pictures"


def interpolate_pictures(request: Request, reporter: Reporter) -> None:
    """Writes the clips of two or more key frames."""
    from giffy_ray.cli.key_frames import KeyFrames

    _plan(len(request.inputs), request)
    _check_outputs(request.output, request)
    pictures = KeyFrames(request.inputs, request.fit, request.loop)
    interpolator = _load_interpolator(request)
    result = _write_clips(interpolator, pictures, request.output, request, reporter)
    reporter.print_json(result | _describe(interpolator, request))


def interpolate_folder(request: Request, reporter: Reporter) -> bool:
    """Writes a clip of each pair in a folder, and continues after a pair that fails. Returns whether none failed."""
    from giffy_ray.cli.key_frames import KeyFrames
    from giffy_ray.inference.pairs import find_pairs

    (folder,) = request.inputs
    if request.output.exists() and not request.output.is_dir():
        raise InputError(f"{request.output}: is a file; the clips of a folder are written to a folder")
    if request.output.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{request.output}: is in the folder of the pairs; choose another --output")
    _plan(2, request)
    try:
        found = find_pairs(str(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for file in found.skipped:
        print_error(f"giffy: skipped: {file.path}: {file.reason}")
    start_s = time.perf_counter()
    interpolator = _load_interpolator(request)
    clips, failures = [], []
    for pair in found.pairs:
        name = f"{pair.name}/frame_%04d.png" if request.clip_format == "png" else f"{pair.name}.{request.clip_format}"
        try:
            _check_outputs(request.output / name, request)
            pictures = KeyFrames((pair.start, pair.end), request.fit, request.loop)
            clips.append(_write_clips(interpolator, pictures, request.output / name, request, reporter))
        except InputError as error:
            print_error(f"giffy: failed: {pair.name}: {error}")
            failures.append({"pair": pair.name, "error": str(error)})
    elapsed_s = time.perf_counter() - start_s
    reporter.print_line(f"{request.output}: {len(clips)} of {len(found.pairs)} pairs in {elapsed_s:.1f} s")
    result = {
        "output": str(request.output),
        "clips": clips,
        "failed": failures,
        "skipped": [{"path": file.path, "reason": file.reason} for file in found.skipped],
        "seconds": round(elapsed_s, 3),
    }
    reporter.print_json(result | _describe(interpolator, request))
    return not failures


def raise_frame_rate(request: Request, reporter: Reporter) -> None:
    """Writes a video with a higher frame rate."""
    from giffy_ray.cli.key_frames import explain_write_errors

    (source,) = request.inputs
    if (request.times is None) == (request.to_fps is None):
        raise InputError(
            f"{source}: give one of --times and --to-fps for a video, such as --times 2; or give two or more pictures"
        )
    if request.output.exists() and not request.overwrite:
        raise InputError(f"{request.output}: exists already; choose another --output, or replace it with --overwrite")
    interpolator = _load_interpolator(request)
    from giffy_ray.inference.video import interpolate_video

    with reporter.progress(request.output.name) as show, explain_write_errors(request.output):
        report = interpolate_video(
            interpolator,
            source,
            request.output,
            times=request.times,
            fps=request.to_fps,
            quality=request.quality,
            motion_size=request.motion_size,
            on_progress=show,
        )
    width, height = _read_size(request.output)
    for stream in report.left_out:
        print_error(f"giffy: left out: {stream}")
    reporter.print_line(
        f"{request.output}: {report.frames_written} frames of {width}x{height} at {report.target_fps:g} fps, "
        f"{report.frames_made} of them generated; {report.cuts} cuts"
    )
    result = {
        "output": str(request.output),
        "files": [str(request.output)],
        "frames": report.frames_written,
        "fps": report.target_fps,
        "width": width,
        "height": height,
        "motion_sizes": request.motion_size and [request.motion_size],
        "seconds": round(report.elapsed_s, 3),
        "source_fps": report.source_fps,
        "generated_frames": report.frames_made,
        "duplicate_frames": report.duplicates,
        "cut_times_s": report.cut_times_s,
        "left_out": report.left_out,
    }
    reporter.print_json(result | _describe(interpolator, request))


def _read_size(video: Path) -> tuple[int, int]:
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


def _write_clips(
    interpolator: Interpolator, pictures: KeyFrames, output: Path, request: Request, reporter: Reporter
) -> dict[str, Any]:
    """Writes the samples of one list of key frames. Returns what --json prints about them."""
    from giffy_ray.cli.key_frames import ClipWriter, count_frames, explain_write_errors, sample_paths

    segments = _plan(len(pictures), request)
    frames = count_frames(segments, request.loop)
    paths = sample_paths(output, request.samples)
    writer = ClipWriter(
        interpolator,
        pictures,
        segments,
        loop=request.loop,
        ease=request.ease,
        seed=request.seed,
        resize=request.resize,
        motion_size=request.motion_size,
    )
    start_s = time.perf_counter()
    with reporter.progress(output.name) as show:
        done = itertools.count(1)
        for sample, path in enumerate(paths):
            with explain_write_errors(path):
                writer.write(path, sample, request.fps, request.quality, lambda: show(next(done), frames * len(paths)))
    seconds = time.perf_counter() - start_s
    for path in paths:
        size = f"{writer.width}x{writer.height}"
        reporter.print_line(f"{path}: {frames} frames of {size} at {request.fps:g} fps")
    return {
        "output": str(output),
        "files": [str(path) for path in paths],
        "frames": frames,
        "fps": request.fps,
        "width": writer.width,
        "height": writer.height,
        "motion_sizes": writer.motion_sizes,
        "seconds": round(seconds, 3),
    }


def _plan(pictures: int, request: Request) -> list[int]:
    from giffy_ray.cli.key_frames import plan_segments

    return plan_segments(pictures, request.frames, request.duration, request.fps, request.loop)


def _load_interpolator(request: Request) -> Interpolator:
    from giffy_ray.inference.interpolator import Interpolator

    interpolator = Interpolator.from_pretrained(request.model, request.device, request.dtype)
    if request.samples > 1 and interpolator.generator.latent == 0:
        raise InputError(f"--samples: the model {request.model} has only one clip per pair (value {request.samples})")
    return interpolator


def _describe(interpolator: Interpolator, request: Request) -> dict[str, str]:
    return {"model": request.model, "device": str(interpolator.device), "dtype": request.dtype}


def _check_outputs(output: Path, request: Request) -> None:
    """Raises InputError if the output has an unknown format, exists already, or is an input."""
    from giffy_ray.cli.key_frames import find_outputs, sample_paths

    inputs = {path.resolve() for path in request.inputs}
    for path in sample_paths(output, request.samples):
        existing = find_outputs(path)
        if inputs & {file.resolve() for file in existing}:
            raise InputError(f"{path}: is an input too; choose another --output")
        if existing and not request.overwrite:
            raise InputError(f"{existing[0]}: exists already; choose another --output, or replace it with --overwrite")


def _refuse_other_options(context: click.Context, kind: InputKind) -> None:
    """Raises UsageError if the user gave an option that has no effect on this kind of input."""
    given = {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
    }
    for name, option in given.items():
        kinds = _KINDS_OF_OPTION.get(name or "", (kind,))
        if kind not in kinds:
            raise click.UsageError(f"{option} is for {' or '.join(kinds)}, and the input is {kind}")
    if {"frames", "duration"} <= given.keys():
        raise click.UsageError("--frames and --duration exclude each other")
