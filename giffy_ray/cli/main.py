"""The console script `giffy`. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from giffy_ray.cli.doctor import doctor
from giffy_ray.cli.errors import report_errors, require_extra
from giffy_ray.cli.interpolate import interpolate
from giffy_ray.core.errors import InputError

if TYPE_CHECKING:
    from giffy_ray.inference.service_guard import ServiceLimits

_EPILOG = "Exit codes: 0 success, 1 failure, 2 wrong usage or input, 130 interrupted."
_MODEL_OPTION = click.option(
    "--model",
    default="between",
    show_default=True,
    help="between, between-sharp, the folder of a checkpoint, or models:/NAME@ALIAS.",
)
_DEBUG_OPTION = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
_JOBS = {
    "train": "Trains a model.",
    "tune": "Searches hyperparameters, and trains the best model.",
    "evaluate": "Compares trained models with each other and with baselines.",
    "prepare": "Decodes a dataset, and shows what it contains.",
}


class _OrderedGroup(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_OrderedGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="giffy_ray", prog_name="giffy")
def giffy() -> None:
    """Generates the video between two pictures, and trains the models that do so."""


giffy.add_command(interpolate)


@giffy.command()
@_MODEL_OPTION
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 2**16 - 1), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--token",
    envvar="GIFFY_RAY_TOKEN",
    show_envvar=True,
    help="Secret that clients must send. Other users of the machine can see options, but not the variable.",
)
@click.option("--device", default="auto", show_default=True, help="Of the workers: cpu, cuda, mps, or auto.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that compute.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a limit, such as image_megapixels=50; may be repeated.",
)
@click.option(
    "--reload-interval", type=float, default=30.0, show_default=True, help="Seconds between looks at an alias."
)
@_DEBUG_OPTION
def serve(limits: tuple[str, ...], reload_interval: float, **options: Any) -> None:
    """Serves a model over HTTP, with a page for browsers."""
    require_extra("serve")
    from giffy_ray.inference.service import run_service

    run_service(limits=_parse_limits(limits), reload_interval_s=reload_interval, **options)


def _parse_limits(assignments: tuple[str, ...]) -> ServiceLimits:
    from giffy_ray.inference.service_guard import ServiceLimits

    types = {field.name: {"int": int, "float": float}[str(field.type)] for field in dataclasses.fields(ServiceLimits)}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in types:
            closest = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {closest[0]!r}?" if closest else f"expected one of {', '.join(types)}"
            raise InputError(f"--limit: there is no {name!r}; {hint}")
        try:
            changes[name] = types[name](text)
        except ValueError:
            raise InputError(
                f"--limit: {name} must be a number of type {types[name].__name__} (value {text!r})"
            ) from None
    return ServiceLimits(**changes)


@giffy.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option(
    "--format",
    "file_format",
    required=True,
    type=click.Choice(["torch-export", "onnx", "huggingface"]),
    help="A .pt2 file, a .onnx file, or a folder as on the Hugging Face Hub.",
)
@_MODEL_OPTION
@_DEBUG_OPTION
def export(output: Path, file_format: Any, model: str) -> None:
    """Writes a model for other tools."""
    from giffy_ray.inference.export import export_model

    click.echo(export_model(model, output, file_format))


def _add_job(name: str, summary: str) -> None:
    """Adds a command that passes its arguments, --help included, to the runner of jobs."""

    @giffy.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        from giffy_ray.cli import jobs

        jobs.run_job(getattr(jobs, name.upper()), program=f"giffy {name}", argv=arguments)


for _name, _summary in _JOBS.items():
    _add_job(_name, _summary)


@giffy.command()
@click.argument("storage", default="runs", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(1, 2**16 - 1), default=5000, show_default=True, help="On this machine only."
)
def ui(storage: Path, port: int) -> None:
    """Shows the runs in a local STORAGE in a browser.

    STORAGE is runs/ by default.
    """
    require_extra("train")
    from giffy_ray.tracking.server import serve_ui

    serve_ui(storage, port)


giffy.add_command(doctor)


def main() -> None:
    """Runs `giffy`; see `cli.errors` for the exit codes."""
    with report_errors("giffy", debug="--debug" in sys.argv):
        try:
            sys.exit(giffy.main(prog_name="giffy", standalone_mode=False))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            raise KeyboardInterrupt from None
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "giffy"
            raise InputError(f"{error.format_message()} See '{command} --help'.") from None


if __name__ == "__main__":
    main()
