"""Makes the clips between many pairs of images: python jobs/interpolate.py PAIRS --output FOLDER [options]

PAIRS is a folder with a subfolder of images per pair, or with images called NAME_a and NAME_b, NAME_1 and NAME_2, or
NAME_start and NAME_end; or a table (.csv, .parquet) with columns start, end and, if you like, name. PAIRS and FOLDER
may lie in a bucket, as in s3://BUCKET/FOLDER.

Ray runs the job on all GPUs of the cluster, or on all CPUs. Each clip is written as soon as it is made. The file
manifest.csv in FOLDER lists the clips, and the pairs that failed with the reason. Started again with the same
arguments, the job makes only the clips that are missing, or whose images, model or options have changed.

The exit code is 0 if there is a clip of every pair, 1 if a pair failed, and 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from giffy_ray.cli.errors import FAILED, report_errors
from giffy_ray.core.messages import redact_output
from giffy_ray.core.storage import resolve_path

if TYPE_CHECKING:
    from giffy_ray.inference.bulk import BulkResult

_MAX_SHOWN_FAILURES = 20


def main() -> None:
    redact_output()
    parser = make_parser()
    arguments = parser.parse_args()
    with report_errors(parser.prog, arguments.debug):
        # Deferred: --help needs neither torch nor Ray.
        from giffy_ray.inference import bulk

        options = bulk.ClipOptions(
            frames=arguments.frames,
            fps=arguments.fps,
            file_format=arguments.format,
            quality=arguments.quality,
            samples=arguments.samples,
            seed=arguments.seed,
            motion_size=arguments.flow_size,
            fit=arguments.fit,
            resize=arguments.resize,
        )
        result = bulk.interpolate_pairs(
            resolve_path(arguments.pairs),
            resolve_path(arguments.output),
            arguments.model,
            options,
            workers=arguments.workers,
            gpus_per_worker=arguments.gpus_per_worker,
            shared_storage=arguments.shared_storage,
            manifest_format=arguments.manifest,
        )
    show(result)
    if result.count("failed"):
        sys.exit(FAILED)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", metavar="PAIRS", help="folder or table of pairs of images")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the clips go")
    parser.add_argument("--model", default="between", help="name, path or address of a model (between)")
    parser.add_argument("--frames", type=int, default=30, help="length of a clip, both images included (30)")
    parser.add_argument("--fps", type=float, default=10.0, help="frames per second (10)")
    parser.add_argument("--format", choices=("mp4", "gif", "webp"), default="mp4", help="format of the clips (mp4)")
    parser.add_argument("--quality", type=int, default=80, help="0 to 100, for mp4 and webp (80)")
    parser.add_argument("--samples", type=int, default=1, help="clips per pair; the first is the most probable one (1)")
    parser.add_argument("--seed", type=int, default=0, help="determines the other samples (0)")
    parser.add_argument(
        "--flow-size", type=parse_flow_size, metavar="auto|N", help="longer side at which motion is estimated (auto)"
    )
    parser.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop", help="for an end of another shape")
    parser.add_argument("--resize", action="store_true", help="scale images to the size of a model of fixed size")
    parser.add_argument("--workers", type=int, help="processes that hold the model; 0 works without them")
    parser.add_argument("--gpus-per-worker", type=float, metavar="X", help="GPUs of each, such as 0.5")
    parser.add_argument("--shared-storage", action="store_true", help="all future nodes mount the local folders")
    parser.add_argument("--manifest", choices=("csv", "parquet"), default="csv", help="format of the manifest (csv)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_flow_size(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of pixels")
    return None if text == "auto" else int(text)


def show(result: BulkResult) -> None:
    failures = [row for row in result.rows if row.status == "failed"]
    for row in failures[:_MAX_SHOWN_FAILURES]:
        print(f"failed: {f'{row.name}: ' if row.name else ''}{row.error}", file=sys.stderr)
    if len(failures) > _MAX_SHOWN_FAILURES:
        print(f"failed: {len(failures) - _MAX_SHOWN_FAILURES} more, see the manifest", file=sys.stderr)
    print(
        f"pairs: {result.made} made, {result.kept} complete before, {len(failures)} failed; "
        f"{result.count('skipped')} files in no pair; listed in {result.manifest}"
    )


if __name__ == "__main__":
    main()
