"""The project as a whole: directions of imports, names, and paths in the documentation."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "giffy_ray"
# Packages from top to bottom. Each imports only from its own layer and those below.
LAYERS = [
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
ONLY_IMPORTERS = {
    "mlflow": ["tracking"],
    "ray.tune": ["tuning"],
    "ray.data": ["data"],
    "optuna": ["tuning"],
    "ray.serve": ["inference"],
    "fastapi": ["inference"],
}
# Former names; the glossary and the API reference have the current ones.
RETIRED_NAMES = """
    AS_ANY_PROCESS Adversary AnyOfEach Carrier Dealer Descent Fetched KEEP_MEMORY Lease LeaseLost Ledger Maker Meter
    PASSING Perceived Position Positions Recipe Reel Relay Share Store Tell ToRayTrain Trained Watch
    _Asks _Deal _HOPELESS _Judges _MAKE_DO_S _STARTS_SPOILED _Tells _YOUNG
    _bring _first_whole _near _refuse_scraps _speakable _stale
    ask_to_stop at_first_counting_flops augmented averaging caps claimed clip_norm crown deal_splits dealt descend
    error_floor first_points forget_stop from_first grace_epochs heard held interval_of keep_gb l2_report line_of
    most_skipped noise_at noise_for offer persuade refuse_missing relayed rows_at rows_of sampled_share settle
    share_buffers share_of share_of_trials shifted_clips slice_of start_from study_page take_over to_resume
    train_and_show trained_out verdict waited weight_of why_ended without_secrets
"""


def imports() -> list[tuple[str, str]]:
    """Returns pairs of a package and a module that it imports, also inside functions."""
    pairs = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                pairs += [(package, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                pairs += [(package, f"{node.module}.{alias.name}") for alias in node.names]
    return pairs


def identifiers(path: Path) -> set[str]:
    """Returns all names in a module: variables, attributes, functions, classes, arguments and keywords."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for attribute in ("id", "attr", "name", "arg", "asname"):
            name = getattr(node, attribute, None)
            if isinstance(name, str):
                names.add(name)
    return names


def test_imports_point_down():
    layer_of = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
    # A folder without modules is what an earlier version left of a package that has moved.
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert packages - {"__init__"} == set(layer_of)
    internal = [(package, name.split(".")[1]) for package, name in imports() if name.startswith("giffy_ray.")]
    assert not [(package, imported) for package, imported in internal if layer_of[imported] < layer_of[package]]


def test_retired_names_are_gone():
    retired = set(RETIRED_NAMES.split())
    for path in PACKAGE.rglob("*.py"):
        assert not identifiers(path) & retired, path


def test_nothing_is_unpickled():
    """Files from elsewhere are parsed as numbers and text. torch.load would execute code in them."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        assert not re.search(r"torch\.save\b|torch\.load\((?!.*weights_only=True)", path.read_text()), path


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_has_one_importer(library: str):
    importers = {package for package, name in imports() if name == library or name.startswith(f"{library}.")}
    assert sorted(importers) == ONLY_IMPORTERS[library]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("giffy_ray", "torch ray mlflow av"),
        ("giffy_ray.cli.main", "torch ray mlflow av numpy pydantic pyarrow rich PIL"),
        ("giffy_ray.cli.jobs", "torch ray mlflow av"),
        ("giffy_ray.workflows", "torch ray mlflow av"),
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
def test_a_module_does_not_import_heavy_libraries(module: str, forbidden: str):
    code = f"import sys, {module}; print(*(set(sys.modules) & set({forbidden.split()!r})))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert completed.stdout.strip() == ""


INFERENCE_CODE = """
import sys
for name in ("ray", "mlflow", "optuna", "matplotlib", "torchmetrics"):
    sys.modules[name] = None  # makes importing it fail
import torch
from giffy_ray.config import Experiment, override
from giffy_ray.inference.loading import load_trained_models
from giffy_ray.inference.pyfunc_model import InterpolationModel
clip = InterpolationModel("giffy_ray/pretrained/between").experiment.clip
start, end = torch.randint(0, 256, (2, 1, clip.height, clip.width, 3), dtype=torch.uint8)
(model,) = load_trained_models(override(Experiment(), {"evaluate.runs": ["giffy_ray/pretrained/between"]}), clip)
generated = model.learner.generate(start, end, torch.zeros(1, model.learner.latent))
predicted = InterpolationModel("giffy_ray/pretrained/between").predict({"start": start.numpy(), "end": end.numpy()})
print(tuple(generated.shape) == (1, clip.frames, clip.height, clip.width, 3), (generated.numpy() == predicted).all())
"""


def test_inference_needs_neither_ray_nor_mlflow():
    command = [sys.executable, "-c", INFERENCE_CODE]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "True True"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "cluster/README.md",
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
    ],
)
def test_every_path_in_the_docs_exists(page: str):
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"(?:giffy_ray|jobs|cluster|tests|docs|benchmarks)/[\w./-]*\w", text))
    paths |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    paths = {path for path in paths if not path.endswith(".bak")}  # the reader is told to delete these
    assert paths or page != "README.md"
    folders = (ROOT, (ROOT / page).parent)
    assert not [path for path in paths if not any((folder / path).exists() for folder in folders)]
