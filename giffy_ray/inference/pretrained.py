"""Loads trained models by name, path or address, for inference. Imports neither Ray nor MLflow.

A model is a checkpoint (`training.checkpoint_format`), or a folder in the layout of Hugging Face:

    config.json          library_name, format_version, and the fields of the experiment that determine clips
    model.safetensors    weights of all networks; a tensor is called NETWORK.NAME
    README.md            the model card, which is not read

MLflow is imported only for an address in its registry, such as `models:/giffy_ray@champion`. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from giffy_ray.config import Experiment, override
from giffy_ray.core.errors import InputError
from giffy_ray.core.packaged import packaged_models, packaged_path
from giffy_ray.core.storage import download_file, is_file, join, local_path, open_stream, resolve_path
from giffy_ray.training import checkpoint_format, learners
from giffy_ray.training.learners import Learner

REGISTRY_SCHEME = "models:/"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LIBRARY_NAME, FORMAT_VERSION = "giffy_ray", 1
CONFIG_FIELDS = ("clip.", "model.", "train.seed")  # of the experiment, that a folder of Hugging Face's layout may set
_MAX_CONFIG_BYTES = 2**20


def load_pretrained(source: str, device: torch.device) -> tuple[Learner, Experiment]:
    """Loads a trained model.

    Args:
        source: Name of a model of the package; path or URI of a checkpoint or of a folder that `giffy export` wrote; or
            the address of a registered model, in the MLflow server of MLFLOW_TRACKING_URI.
        device: Where the networks compute.

    Raises:
        InputError: There is no such model, its files are damaged, or MLflow is not installed.
    """
    with open_pretrained(source) as location:
        if is_hugging_face_folder(location):
            return _load_hugging_face_folder(location, device)
        return checkpoint_format.load_learner(location, device)


@contextmanager
def open_pretrained(source: str) -> Iterator[str]:
    """Yields the path or URI of the folder of a trained model, and turns errors of reading it into InputError.

    Args:
        source: See `load_pretrained`. The files of a registered model are downloaded, and removed at the end.

    Raises:
        InputError: See `load_pretrained`.
    """
    try:
        if source in packaged_models():
            yield str(packaged_path("models", source))
        elif source.startswith(REGISTRY_SCHEME):
            with tempfile.TemporaryDirectory() as folder:
                yield _download_registered(source, Path(folder))
        else:
            yield resolve_path(source)
    except FileNotFoundError as error:
        names = ", ".join(packaged_models())
        raise InputError(
            f"model: there is none at {source!r}; give a checkpoint, a models:/ address, or one of {names}"
        ) from error
    except (checkpoint_format.CorruptCheckpoint, SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError) and str(error).startswith("model: "):
            raise
        raise InputError(f"model: {source!r} cannot be loaded: {error}") from error


def is_hugging_face_folder(location: str) -> bool:
    """Whether a folder has the layout of Hugging Face, rather than that of a checkpoint."""
    return is_file(join(location, CONFIG)) and not is_file(join(location, checkpoint_format.EXPERIMENT))


def _load_hugging_face_folder(location: str, device: torch.device) -> tuple[Learner, Experiment]:
    """Raises ValueError or SafetensorError if the files are damaged or do not belong together."""
    experiment = _read_config(join(location, CONFIG))
    with _open_locally(join(location, WEIGHTS)) as path:
        layouts = checkpoint_format.read_layouts(path)
        # Checked before memory is taken for the networks: their size is what a file claims that a stranger may have
        # written.
        with torch.device("meta"):
            expected = learners.build(experiment, torch.device("meta"))
        _match_networks(expected, layouts)
        learner = learners.build(experiment, device)
        for target in _match_networks(learner, layouts):
            checkpoint_format.copy_tensor(path, target)
            if target.tensor.is_floating_point() and not target.tensor.isfinite().all():
                raise ValueError(f"{WEIGHTS}: {target.key!r} holds numbers that are not finite")
    return learner, experiment


def _match_networks(learner: Learner, layouts: checkpoint_format.TensorLayouts) -> list[checkpoint_format.TensorTarget]:
    """Pairs all tensors of a learner with those of the file. Raises ValueError where they differ."""
    targets = []
    for name, network in learner.networks.items():
        prefix = f"{name}."
        own_layouts = {key: layout for key, layout in layouts.items() if key.startswith(prefix)}
        targets += checkpoint_format.match_tensors(WEIGHTS, own_layouts, network, prefix)
    unknown = sorted(layouts.keys() - {target.key for target in targets})
    if unknown:
        raise ValueError(
            f"{WEIGHTS}: holds {unknown[0]!r}, which this model does not have ({len(unknown)} such tensors)"
        )
    for target in targets:
        dtype = layouts[target.key][1]
        if dtype.is_floating_point != target.tensor.is_floating_point():
            raise ValueError(f"{WEIGHTS}: {target.key!r} has dtype {dtype}; expected {target.tensor.dtype}")
    return targets


def _read_config(location: str) -> Experiment:
    with open_stream(location) as stream:
        text = stream.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG}: is larger than {_MAX_CONFIG_BYTES // 2**20} MiB")
    try:
        config: Any = json.loads(text)
        library, version, fields = (config.get(key) for key in ("library_name", "format_version", "experiment"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{CONFIG}: is not a JSON object ({error})") from error
    if library != LIBRARY_NAME:
        raise ValueError(f"{CONFIG}: is not a model of {LIBRARY_NAME} (library_name {library!r})")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{CONFIG}: has format_version {version!r}, and this giffy_ray reads {FORMAT_VERSION}; update it"
        )
    if not isinstance(fields, dict):
        raise ValueError(f"{CONFIG}: has no experiment, a JSON object")
    for name in fields:
        if not name.startswith(CONFIG_FIELDS):
            raise ValueError(f"{CONFIG}: {name!r} does not determine clips; remove it")
    return override(Experiment(), fields)


@contextmanager
def _open_locally(location: str) -> Iterator[Path]:
    """Yields the path of a file, which is downloaded if it lies in a bucket. Raises ValueError if there is none."""
    if not is_file(location):
        raise ValueError(f"{location}: is missing")
    path = local_path(location)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, location.rpartition("/")[2])
        download_file(location, copy)
        yield copy


def _download_registered(address: str, folder: Path) -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(f"model: set MLFLOW_TRACKING_URI to the MLflow server of {address!r}")
    try:
        from giffy_ray.tracking.model_registry import download_checkpoint

        return download_checkpoint(uri, address, folder)
    except ImportError as error:  # the registry imports MLflow when it is used
        raise InputError(
            f"model: {address!r} is in MLflow's registry, and MLflow is not installed; pip install 'giffy_ray[train]'"
        ) from error
