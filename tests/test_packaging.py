"""The wheel contains what its users need, and its core requirements are enough to generate clips."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import av
import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from giffy_ray.data.synthetic.scenes import draw_clip
from giffy_ray.inference.interpolator import Interpolator
from tests.conftest import ROOT

PACKAGE = ROOT / "giffy_ray"
CORE = {"av", "click", "jaxtyping", "numpy", "pillow", "pydantic", "pyyaml", "rich", "safetensors", "torch"}
EXTRAS = {"train", "serve", "export", "perceptual", "postgres", "dev"}
POSIX_MODULES = {"resource", "fcntl", "pwd"}  # that Windows lacks
MAX_IMPORT_S = 0.05


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def run_in_empty_folder(unpacked: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs Python with the wheel's package before the checkout's, in a folder without files."""
    empty = folder / "empty"
    empty.mkdir()
    environment = {"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_contains_every_file_of_the_package(wheel: zipfile.ZipFile):
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    for pattern in (
        r"giffy_ray/pretrained/between/between\.safetensors",
        r"giffy_ray/pretrained/between-sharp/manifest\.json",
        r"giffy_ray/experiments/small/cgan\.yaml",
        r"giffy_ray/evaluation/html_report\.html",
        r"giffy_ray/py\.typed",
    ):
        assert [name for name in expected if re.fullmatch(pattern, name)], pattern


def test_the_core_requires_only_what_generates_clips(requirements: list[Requirement]):
    core = {canonical(requirement.name) for requirement in requirements if requirement.marker is None}
    assert core == CORE
    markers = " ".join(str(requirement.marker) for requirement in requirements)
    extras = set(re.findall(r'extra == "(\w+)"', markers))
    assert extras == EXTRAS


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(names: set[str]) -> set[str]:
    """Returns the distributions that installing `names` installs."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {canonical(requirement.name)} - found
    return found


def modules_beyond(names: set[str]) -> set[str]:
    """Returns the top-level modules of this environment that installing `names` would not install."""
    installed = required_by(names)
    return {
        module
        for module, distributions in packages_distributions().items()
        if not {canonical(name) for name in distributions} & {*installed, "giffy-ray"}
    }


NAMES_CODE = """
import sys
from giffy_ray.config import load
from giffy_ray.core.packaged import packaged_experiments, packaged_models, packaged_path
from giffy_ray.training.checkpoint_format import verify
from giffy_ray.training.checkpoint_selection import resolve_init_from

for name in packaged_experiments():
    load(packaged_path("experiments", name), ["data.root=videos"])
experiment = load(packaged_path("experiments", "own-videos"), ["data.root=videos"])
checkpoint = resolve_init_from(experiment)
verify(checkpoint)
print(len(packaged_experiments()), *packaged_models(), experiment.train.init_from, checkpoint)
"""


def test_names_of_experiments_and_models_resolve_without_a_checkout(unpacked: Path, tmp_path: Path):
    process = run_in_empty_folder(unpacked, tmp_path, "-c", NAMES_CODE)
    assert process.returncode == 0, process.stderr
    count, *models, init_from, checkpoint = process.stdout.split()
    assert int(count) == len(list(PACKAGE.glob("experiments/**/*.yaml"))) > 10
    assert models == ["between", "between-sharp"]
    assert init_from == "between"
    assert checkpoint == str(unpacked / "giffy_ray" / "pretrained" / "between")


BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # makes importing it fail, as if it were not installed
"""
INTERPOLATION_CODE = """
from giffy_ray.inference.interpolator import Interpolator
Interpolator.from_pretrained("between", device="cpu")("../a.png", "../b.png", frames=5).save("clip.mp4")
import giffy_ray
print(giffy_ray.__file__)
"""


def test_core_requirements_are_enough_to_interpolate(unpacked: Path, tmp_path: Path):
    blocked = modules_beyond(CORE) | POSIX_MODULES
    assert {"ray", "mlflow", "optuna", "matplotlib", "torchmetrics", "pyarrow", "fastapi", "pandas"} <= blocked
    assert not {"torch", "av", "PIL", "yaml", "giffy_ray"} & blocked
    film = draw_clip("skiing", 5)
    for name, frame in {"a": film[0], "b": film[20]}.items():
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    code = BLOCK.format(blocked=sorted(blocked)) + INTERPOLATION_CODE
    process = run_in_empty_folder(unpacked, tmp_path, "-c", code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(unpacked / "giffy_ray" / "__init__.py")
    with av.open(str(tmp_path / "empty" / "clip.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    expected = Interpolator.from_pretrained("between", device="cpu")(film[0], film[20], frames=5)
    assert frames.shape == expected.frames.shape
    difference = np.abs(frames.astype(float) - expected.frames).mean(axis=(1, 2, 3))
    assert difference.max() < 4  # what H.264 loses
    between_frames = np.abs(np.diff(expected.frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert between_frames.min() > difference.max()  # so frames in another order would be noticed


IMPORT_CODE = """
import sys, time
start_s = time.process_time()
import giffy_ray
print(time.process_time() - start_s, *{"torch", "numpy", "ray", "pydantic"} & set(sys.modules))
"""


def test_importing_the_package_takes_no_time(unpacked: Path, tmp_path: Path):
    process = run_in_empty_folder(unpacked, tmp_path, "-c", IMPORT_CODE)
    elapsed_s, *imported = process.stdout.split()
    assert float(elapsed_s) < MAX_IMPORT_S
    assert not imported


def test_a_bucket_without_pyarrow_is_refused_in_one_line(unpacked: Path, tmp_path: Path):
    code = BLOCK.format(blocked=["pyarrow"]) + (
        "from giffy_ray.inference.pretrained import load_pretrained\n"
        "import torch\n"
        "try:\n"
        "    load_pretrained('s3://bucket/model', torch.device('cpu'))\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    process = run_in_empty_folder(unpacked, tmp_path, "-c", code)
    assert process.returncode == 0, process.stderr
    assert process.stdout == (
        "InputError model: 's3://bucket/model' cannot be loaded: s3://bucket: buckets need pyarrow; pip install "
        "'giffy_ray[train]'\n"
    )
