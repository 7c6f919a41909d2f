"""Every call of `giffy` in the documentation is valid, and docs/reference/cli.md has all commands and options."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from giffy_ray.cli import jobs
from giffy_ray.cli.main import giffy
from giffy_ray.core.packaged import packaged_experiments
from tests.cli.conftest import Result
from tests.conftest import ROOT, moving_video

PAGE = ROOT / "docs" / "reference" / "cli.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
JOBS = {name: getattr(jobs, name.upper()) for name in ("train", "tune", "evaluate", "prepare")}


def documented_commands(page: Path) -> list[str]:
    """Returns the calls of `giffy` in the shell blocks of a page."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*([A-Z_]+=\S+ )*(\S*bin/)?giffy ", line)]


def split(command: str) -> tuple[str, list[str]]:
    """Returns the name of a command and its arguments, without environment variables before it."""
    words = shlex.split(command, comments=True)
    while not words[0].endswith("giffy"):
        words.pop(0)
    return words[1], words[2:]


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in documented_commands(page)}))
def test_a_documented_command_is_valid(command: str):
    name, arguments = split(command)
    giffy.commands[name].make_context(name, list(arguments))  # parses and converts, and runs nothing
    if name in JOBS:
        parsed = jobs.parse("", arguments, JOBS[name].flags)
        assert parsed.experiment is None or parsed.experiment in packaged_experiments()


def test_every_command_has_an_example():
    assert {split(command)[0] for command in documented_commands(PAGE)} == set(giffy.commands)


@pytest.mark.parametrize("name", giffy.commands)
def test_every_option_is_documented(name: str):
    heading = "Jobs" if name in JOBS else f"giffy {name}"
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert section
    options = {
        option: parameter
        for parameter in giffy.commands[name].params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    documented = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section[1]))
    undocumented = options.keys() - documented
    assert undocumented <= ({"--debug"} if name in ("ui", "doctor") else set())
    if name not in JOBS:
        assert documented - {"--help"} <= options.keys() | {"--format"}


@pytest.mark.parametrize(
    "command", [command for command in documented_commands(PAGE) if command.startswith("giffy interp")]
)
def test_a_documented_interpolation_runs(
    run_giffy: Callable[..., Result], model: str, pictures: list[str], command: str
):
    """With the model of the tests, on small files of the documented names."""
    _, arguments = split(command)
    Path("pairs/shop").mkdir(parents=True)
    for source, copy in (
        ("0.png", "a.jpg"),
        ("1.png", "b.jpg"),
        ("0.png", "pairs/shop/1.png"),
        ("1.png", "pairs/shop/2.png"),
    ):
        Path(copy).write_bytes(Path(source).read_bytes())
    Path("film.mp4").write_bytes(moving_video(0, 4, 10))
    Path("film.mkv").write_bytes(moving_video(0, 4, 10, kind="matroska"))
    if "--device" in arguments:
        position = arguments.index("--device") + 1
        arguments[position] = "cpu"
    if "--model" in arguments:
        arguments[arguments.index("--model") + 1] = model
    else:
        arguments += ["--model", model]
    result = run_giffy("interpolate", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    output = Path(arguments[arguments.index("-o") + 1])
    samples = sorted(Path().glob(f"{output.stem}-?{output.suffix}"))
    assert (output.exists(), len(samples)) in ((True, 0), (False, 4))
