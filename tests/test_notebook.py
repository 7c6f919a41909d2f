"""The notebook of examples/ runs top to bottom, with a training of seconds instead of minutes."""

import base64
import csv
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from giffy_ray.core.packaged import packaged_models
from tests.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
TRAIN_S = 20
MAX_STORED_BYTES = 150_000
# tqdm and Ray ask for ipywidgets, which Jupyter has and this test does without; the tests give Ray a token.
EXPECTED_STDERR = "IProgress not found|import tqdm|Missing packages: \\['ipywidgets'\\]|Token authentication is enabled"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook with its outputs, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIFFY_RAY_QUICKSTART_S", str(TRAIN_S))
        patch.setenv("RAY_ADDRESS", "local")  # another test's cluster may run on this machine
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}})
        client.execute()
    return notebook, folder


def outputs_of(notebook: Any, source: str) -> list[Any]:
    """Returns the outputs of the cell that contains `source`."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    return cell.outputs


def shown_frames(outputs: list[Any]) -> tuple[int, tuple[int, int]]:
    """Returns the number of frames and the size of the animation that a cell shows."""
    (html,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    encoded = re.search(r"data:image/webp;base64,([\w+/=]+)", html)
    assert encoded
    animation = Image.open(io.BytesIO(base64.b64decode(encoded[1])))
    return animation.n_frames, animation.size  # type: ignore[attr-defined]


def test_clips_are_shown_and_saved(executed: tuple[Any, Path]):
    notebook, folder = executed
    assert shown_frames(outputs_of(notebook, "clip = interpolator(")) == (26, (256, 256))
    assert shown_frames(outputs_of(notebook, "fade =")) == (26, (512, 256))
    assert shown_frames(outputs_of(notebook, "select_checkpoint(")) == (26, (256, 256))
    assert (folder / "quickstart" / "clip.mp4").stat().st_size > 1000


def test_a_model_is_trained_and_compared(executed: tuple[Any, Path]):
    notebook, folder = executed
    runs = folder / "quickstart" / "runs"
    assert list((runs / "my-model").glob("checkpoint_*/manifest.json"))
    with (runs / "compared" / "evaluation.csv").open() as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert {"linear", "between", "my-model"} <= methods
    (table,) = [output.data["text/plain"] for output in outputs_of(notebook, "search_runs")]
    assert re.search(rf"my-model +{2 * TRAIN_S} ", table)
    (sheet,) = [output.data["image/png"] for output in outputs_of(notebook, "contact_sheet.png")]
    assert Image.open(io.BytesIO(base64.b64decode(sheet))).width > 500


def test_nothing_warns_but_the_libraries(executed: tuple[Any, Path]):
    notebook, _ = executed
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    lines = [line for output in outputs if output.get("name") == "stderr" for line in output.text.splitlines()]
    assert not [line for line in lines if line.strip() and not re.search(EXPECTED_STDERR, line)]


def test_the_notebook_is_stored_without_results():
    """They would change with every model, and hide what a change of the notebook is."""
    assert NOTEBOOK.stat().st_size < MAX_STORED_BYTES
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in cells if cell.execution_count is not None]
    assert sum(len(cell.outputs) for cell in cells) <= 1
    assert notebook.metadata.kernelspec.name == "python3"
    assert [name for cell in cells for name in re.findall(r'from_pretrained\("([\w-]+)"', cell.source)] == ["between"]
    assert "between" in packaged_models()
