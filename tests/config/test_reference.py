"""docs/reference/configuration.md is generated, and documents every field."""

import pytest

from giffy_ray.config import BetweenConfig, Experiment, flatten, load, reference
from tests.conftest import ROOT

SECTIONS = list(reference.find_sections())


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.fields_reference(), (
        "run python -m giffy_ray.config.reference > docs/reference/configuration.md"
    )


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.name or 'root'}-{section.config.__name__}")
def test_every_field_has_a_docstring(section: reference.Section):
    docstrings = reference.read_docstrings(section.config)
    assert docstrings.keys() == section.config.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    for name, docstring in docstrings.items():
        assert docstring.endswith("."), name
    assert section.config.__doc__


def test_the_reference_has_a_row_for_every_field():
    documented = reference.fields_reference()
    kinds = [section.config.kind for section in SECTIONS if section.name == "model"]  # type: ignore[attr-defined]
    assert len(kinds) == 6
    for kind in kinds:
        for name in flatten(load(None, [f"model.kind={kind}"])):
            assert f"| `{name}` | " in documented


def test_a_row_shows_type_default_and_docstring():
    rows = {line.split("`")[1]: line for line in reference.fields_reference().splitlines() if line.startswith("| `")}
    docstring = "Number of frames, including the start and end images. At least 3."
    assert rows["clip.frames"] == f"| `clip.frames` | integer ≥ 3 | `30` | {docstring} |"
    assert rows["data.validation_fraction"].startswith(
        "| `data.validation_fraction` | number > 0 and < 1 or null | `null` | Fraction of the videos"
    )
    assert "| integer > 0 or list of 2 (integer > 0) | `1` |" in rows["cluster.workers"]


def test_a_subclass_inherits_the_docstring_of_a_field():
    docstrings = {section.config.__name__: reference.read_docstrings(section.config) for section in SECTIONS}
    assert docstrings["Direct3DConfig"]["real_label"] == docstrings["CGANConfig"]["real_label"]
    assert docstrings["TwoStreamConfig"]["frame_weight"] != docstrings["CGANConfig"]["frame_weight"]
    assert docstrings["BetweenConfig"].keys() == BetweenConfig.__dataclass_fields__.keys()
    assert docstrings[Experiment.__name__]["name"].startswith("Name of the run")
