"""Files that come with the package: pretrained models and experiments, referred to by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_ROOT = Path(__file__).parent.parent
_FOLDERS = {"models": _ROOT / "pretrained", "experiments": _ROOT / "experiments"}


def packaged_models() -> list[str]:
    """Returns the names of the pretrained models."""
    return sorted(path.parent.name for path in _FOLDERS["models"].glob("*/manifest.json"))


def packaged_experiments() -> list[str]:
    """Returns the names of the experiments, such as `demo` and `small/cgan`."""
    folder = _FOLDERS["experiments"]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def packaged_path(kind: Literal["models", "experiments"], name: str) -> Path:
    """Returns the folder of a pretrained model, or the file of an experiment. The name must be a listed one."""
    return _FOLDERS[kind] / (name if kind == "models" else f"{name}.yaml")
