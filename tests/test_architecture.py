"""The house as a whole: imports point one way, and the README speaks of files that exist."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "giffy_ray"
# Each floor imports from itself and from those below it.
FLOORS = [
    {"cli", "workflows"},
    {"tuning"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"data"},
    {"models"},
    {"tracking"},
    {"cluster"},
    {"config"},
    {"core"},
]
ONLY_IMPORTERS = {"mlflow": ["tracking"], "ray.tune": ["tuning"], "ray.data": ["data"], "optuna": ["tuning"]}


def imports() -> list[tuple[str, str]]:
    """(part of the package, module that it imports), inside functions too."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(part, name.name) for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(part, f"{node.module}.{name.name}") for name in node.names]
    return found


def test_imports_point_one_way():
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    parts = {path.stem for path in PACKAGE.iterdir() if path.stem != "__init__" and path.suffix in ("", ".py")}
    assert parts - {"__pycache__"} == set(floor)
    ours = [(part, name.split(".")[1]) for part, name in imports() if name.startswith("giffy_ray.")]
    assert not [(part, other) for part, other in ours if floor[other] < floor[part]]


def test_nothing_is_unpickled():
    """What others give us is read as numbers and text; torch.load would run what is in a file."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        assert not re.search(r"torch\.save\b|torch\.load\((?!.*weights_only=True)", path.read_text()), path


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_has_one_importer(library: str):
    importers = {part for part, name in imports() if name == library or name.startswith(f"{library}.")}
    assert sorted(importers) == ONLY_IMPORTERS[library]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("giffy_ray", "torch ray mlflow av"),
        ("giffy_ray.config", "torch ray mlflow"),
        ("giffy_ray.data.decode", "torch ray mlflow"),
        ("giffy_ray.data.clip_dataset", "torch ray mlflow"),
        ("giffy_ray.data.synthetic", "torch ray mlflow"),
        ("giffy_ray.models", "ray mlflow av"),
        ("giffy_ray.training.learners", "ray mlflow av"),
        ("giffy_ray.evaluation.metrics", "ray mlflow torchmetrics"),
        ("giffy_ray.evaluation.dataset_report", "ray mlflow matplotlib"),
    ],
)
def test_what_a_task_imports_is_light(module: str, forbidden: str):
    code = f"import sys, {module}; print(*(set(sys.modules) & set({forbidden.split()!r})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == ""


@pytest.mark.parametrize(
    "page", ["README.md", "cluster/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_path_in_the_docs_exists(page: str):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?:giffy_ray|jobs|cluster|tests|docs|benchmarks)/[\w./-]*\w", text))
    named |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    named = {name for name in named if not name.endswith(".bak")}  # what the reader is told to throw away
    assert named or page != "README.md"
    near = (ROOT, (ROOT / page).parent)
    assert not [name for name in named if not any((folder / name).exists() for folder in near)]
