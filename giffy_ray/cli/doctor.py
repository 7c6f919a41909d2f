"""`giffy doctor`: what this machine offers, and what will be slow or fail on it and why.

machine, libraries, services --collect_facts--> Facts --diagnose--> findings --> table or JSON
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from giffy_ray.cli.errors import FAILED

if TYPE_CHECKING:
    from rich.table import Table

    from giffy_ray.cli.facts import Facts

_TRAINING_LIBRARIES = ("ray", "mlflow", "optuna")
_FILTER_USES = {
    "minterpolate": "the baselines minterpolate_mci and minterpolate_blend",
    "zscale": "comparisons of HDR colours",
    "tonemap": "comparisons of HDR colours",
}
_SUFFIXES = {"libx264": ".mp4", "libwebp": ".webp"}
_TABLE_WIDTH = 80
_GB = 1e9
_MIN_DISK_BYTES = 1e9
_MIN_MEMORY_BYTES = 4e9  # enough for pictures of 3840x2160
_MIN_SHARED_MEMORY_BYTES = 1e9

Severity = Literal["broken", "fails", "slow"]


@dataclass(frozen=True)
class Finding:
    """Something that does not work, or not as fast as it could.

    Attributes:
        severity: `broken`: interpolation does not work. `fails`: something else does not. `slow`: it works slowly.
        problem: What, and why.
        remedy: What to do about it.
    """

    severity: Severity
    problem: str
    remedy: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Reports what works here, and what will be slow or fail.

    Tries an interpolation of two small images. Looks whether Ray and MLflow answer where RAY_ADDRESS and
    MLFLOW_TRACKING_URI are set, and starts neither. Exits with 1 if interpolation does not work.
    """
    from giffy_ray.cli.facts import collect_facts

    facts = collect_facts(os.environ)
    findings = diagnose(facts)
    is_ok = not any(finding.severity == "broken" for finding in findings)
    if as_json:
        report = {"ok": is_ok, **dataclasses.asdict(facts), "findings": [vars(finding) for finding in findings]}
        click.echo(json.dumps(report))
    else:
        _print_report(facts, findings)
    if not is_ok:
        context.exit(FAILED)


def diagnose(facts: Facts) -> list[Finding]:
    """Returns what will be slow or fail, the most severe first."""
    findings = [*_diagnose_interpolation(facts), *_diagnose_training(facts), *_diagnose_speed(facts)]
    order = ("broken", "fails", "slow")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _diagnose_interpolation(facts: Facts) -> Iterator[Finding]:
    reinstall = "reinstall giffy_ray in a new environment: pip install giffy_ray"
    for name, problem in facts.import_errors.items():
        yield Finding("broken", f"{name} cannot be imported: {problem}", reinstall)
    if not facts.models:
        yield Finding("broken", "The package holds no pretrained model.", reinstall)
    if facts.self_test_error:
        yield Finding("broken", f"An interpolation of two small images failed: {facts.self_test_error}", reinstall)
    for encoder, suffix in _SUFFIXES.items():
        if not facts.encoders.get(encoder, True):
            severity: Severity = "broken" if suffix == ".mp4" else "fails"
            yield Finding(
                severity,
                f"PyAV's FFmpeg has no {encoder}, so it writes no {suffix}.",
                "pip install --force-reinstall --only-binary av av",
            )
    for folder in facts.folders:
        if folder.problem:
            severity = "broken" if folder.purpose == "temporary" else "fails"
            yield Finding(
                severity,
                f"The {folder.purpose} folder {folder.path} cannot be written: {folder.problem}",
                "set TMPDIR to another folder" if folder.purpose == "temporary" else "work in another folder",
            )
        elif folder.free_bytes is not None and folder.free_bytes < _MIN_DISK_BYTES:
            yield Finding(
                "fails",
                f"The {folder.purpose} folder {folder.path} has only {_format_gb(folder.free_bytes)} free.",
                "free some space",
            )
    if facts.free_memory_bytes is not None and facts.free_memory_bytes < _MIN_MEMORY_BYTES:
        yield Finding(
            "fails",
            f"{_format_gb(facts.free_memory_bytes)} of memory are free; pictures of 3840x2160 need up to 4 GB.",
            "close other programs, raise the container's limit, or use smaller pictures",
        )


def _diagnose_training(facts: Facts) -> Iterator[Finding]:
    missing = [name for name in _TRAINING_LIBRARIES if facts.versions.get(name) is None]
    if missing:
        yield Finding(
            "fails",
            f"{', '.join(missing)} not installed: train, tune, evaluate, prepare and ui do not run.",
            "pip install 'giffy_ray[train]'",
        )
    if facts.ray.problem:
        yield Finding(
            "fails",
            f"No Ray answers at {facts.ray.address}: {facts.ray.problem}",
            "set RAY_ADDRESS to a running cluster, or RAY_ADDRESS=local to start Ray here",
        )
    if facts.mlflow.problem:
        yield Finding(
            "fails",
            f"MLflow does not answer at {facts.mlflow.address}: {facts.mlflow.problem}",
            "start the server or correct MLFLOW_TRACKING_URI; runs keep their events until it answers",
        )
    if not facts.filters.get("minterpolate", True):
        yield Finding(
            "fails",
            "PyAV's FFmpeg has no minterpolate, which two baselines of evaluations are.",
            "pip install --force-reinstall --only-binary av av, or evaluate.baselines=[linear, hold]",
        )
    if facts.missing_modules:
        yield Finding(
            "fails",
            f"This system has no {', '.join(facts.missing_modules)}: videos are decoded without a sandbox.",
            "prepare videos from strangers on Linux",
        )


def _diagnose_speed(facts: Facts) -> Iterator[Finding]:
    if facts.has_nvidia_driver and not facts.gpus and not facts.import_errors:
        yield Finding(
            "slow",
            f"There is an NVIDIA GPU, but torch {facts.versions.get('torch')} cannot use it.",
            "install torch for your CUDA version, from https://download.pytorch.org/whl/",
        )
    elif not facts.gpus and not facts.has_mps:
        yield Finding(
            "slow",
            f"There is no GPU: the networks run on {facts.cores:g} CPU cores.",
            "this is enough for pictures; use a machine with a GPU for long videos and trainings",
        )
    if facts.cores < 2:
        yield Finding(
            "slow",
            f"This process may use {facts.cores:g} CPU cores; decoding and training share them.",
            "allow two cores or more",
        )
    if facts.torch_threads is not None and facts.torch_threads > max(1, facts.cores):
        threads = max(1, int(facts.cores))
        yield Finding(
            "slow",
            f"torch starts {facts.torch_threads} threads, and this process may use {facts.cores:g} cores.",
            f"export OMP_NUM_THREADS={threads}",
        )
    if (
        facts.versions.get("ray")
        and facts.shared_memory_bytes is not None
        and facts.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES
    ):
        yield Finding(
            "slow",
            f"/dev/shm has {_format_gb(facts.shared_memory_bytes)} free; Ray then keeps its objects on the disk.",
            "docker run --shm-size=2g",
        )


def _print_report(facts: Facts, findings: list[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_facts_table(facts))
    console.print(_findings_table(findings))


def _facts_table(facts: Facts) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False, width=_TABLE_WIDTH, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in _rows(facts):
        if name is None:
            table.add_section()
        else:
            table.add_row(name, Text(value))
    return table


def _rows(facts: Facts) -> Iterator[tuple[str | None, str]]:
    """Yields names and values of the table. A name of None begins a section."""
    yield "system", facts.platform
    for name, version in facts.versions.items():
        yield name, version or "not installed"
    yield "FFmpeg", f"{facts.ffmpeg or 'unknown'}, in PyAV"
    yield None, ""
    yield "CPU cores", f"{facts.cores:g} usable of {facts.machine_cores}"
    yield "memory", "unknown" if facts.free_memory_bytes is None else f"{_format_gb(facts.free_memory_bytes)} free"
    for gpu in facts.gpus:
        yield "GPU", f"{gpu.name}, {_format_gb(gpu.free_bytes)} free of {_format_gb(gpu.total_bytes)}"
    if not facts.gpus:
        yield "GPU", "Apple's, through MPS" if facts.has_mps else "none"
    for folder in facts.folders:
        free = "" if folder.free_bytes is None else f", {_format_gb(folder.free_bytes)} free"
        yield f"{folder.purpose} folder", f"{folder.path}{free}, {folder.problem or 'writable'}"
    yield None, ""
    for name, is_available in facts.filters.items():
        yield f"filter {name}", "yes" if is_available else f"no; only for {_FILTER_USES[name]}"
    for name, is_available in facts.encoders.items():
        yield f"encoder {name}", "yes" if is_available else "no"
    yield "models", ", ".join(facts.models) or "none"
    self_test = f"{facts.self_test_s} s, with loading the model" if facts.self_test_s is not None else "not passed"
    yield "self-test", f"3 frames of 64x64: {self_test}"
    yield None, ""
    for name, service in (("Ray", facts.ray), ("MLflow", facts.mlflow)):
        address = f"{service.address}, " if service.address else ""
        state = f", {'does not answer' if service.problem else 'answers'}" if service.address else ""
        yield name, f"{address}{service.description}{state}"


def _findings_table(findings: list[Finding]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colours = {"broken": "bold red", "fails": "red", "slow": "yellow"}
    title = "What is slow or fails here" if findings else "Nothing is slow or fails here"
    table = Table(box=box.SIMPLE, show_header=False, width=_TABLE_WIDTH, title=title, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for finding in findings:
        severity = Text(finding.severity, style=colours[finding.severity])
        table.add_row(severity, Text(f"{finding.problem}\nRemedy: {finding.remedy}"))
    return table


def _format_gb(size_bytes: float) -> str:
    return f"{size_bytes / _GB:.1f} GB"
