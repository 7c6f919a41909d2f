"""MLflow's model registry: versions of a model, one of which has the alias `champion`.

A version is a folder with an `MLmodel` file and a checkpoint. MLflow's `python_function` flavour names the module that
loads it, so the folder holds no code and no pickle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from giffy_ray.config import ClipConfig, ConfigError
from giffy_ray.core.storage import redact_credentials
from giffy_ray.tracking.uploader import create_client

CHAMPION = "champion"  # alias
CHECKPOINT = "checkpoint"  # folder next to MLmodel
_DIGEST_TAG = "giffy_ray.sha256"  # of the checkpoint's manifest
_UPLOAD_TIMEOUT_S = 600  # for a server that passes uploads on to a bucket


@dataclass(frozen=True)
class Version:
    """A registered version of a model."""

    name: str
    number: int
    tags: Mapping[str, str]


def write_mlmodel(folder: Path, clip: ClipConfig, latent: int, loader_module: str) -> None:
    """Writes the MLmodel file, with the model's signature.

    Args:
        folder: The folder that holds the checkpoint.
        clip: Size and length of the clips.
        latent: Size of the latent; with one, the signature has the parameter `seed`.
        loader_module: Loads the model.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    frame_shape = (clip.height, clip.width, 3)
    dtype = np.dtype(np.uint8)
    inputs = Schema([TensorSpec(dtype, (-1, *frame_shape), name) for name in ("start", "end")])
    outputs = Schema([TensorSpec(dtype, (-1, clip.frames, *frame_shape), "clip")])
    params = {"params": ParamSchema([ParamSpec("seed", "long", None)])} if latent else {}
    model = Model(signature=ModelSignature(inputs, outputs, **params))
    pyfunc.add_to_model(model, loader_module=loader_module, data=CHECKPOINT)
    model.save(folder / "MLmodel")


def add_version(uri: str, name: str, run_id: str, folder: Path, digest: str, tags: Mapping[str, str]) -> Version:
    """Registers `folder`, or returns the version that this run registered with the same digest.

    Args:
        uri: The MLflow server or database.
        name: Name of the model.
        run_id: MLflow's id of the run, among whose artifacts the folder is stored.
        folder: The version's files.
        digest: Identifies the weights.
        tags: More tags of the version.
    """
    from mlflow.exceptions import MlflowException

    client = create_client(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as failure:
        if failure.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get(_DIGEST_TAG) == digest:
            return Version(name, int(version.version), version.tags)
    with _long_http_timeout():
        client.log_artifacts(run_id, str(folder), _artifact_path(digest))
    source = f"{client.get_run(run_id).info.artifact_uri}/{_artifact_path(digest)}"
    version_tags = {**tags, _DIGEST_TAG: digest}
    # Does not wait for the version: it is ready at once.
    version = client.create_model_version(name, source, run_id, tags=version_tags, await_creation_for=0)
    return Version(name, int(version.version), version.tags)


def get_champion(uri: str, name: str) -> Version | None:
    """Returns the version with the alias `champion`, or None."""
    from mlflow.exceptions import MlflowException

    try:
        version = create_client(uri).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as failure:
        if failure.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return Version(name, int(version.version), version.tags)


def set_champion(uri: str, version: Version) -> None:
    create_client(uri).set_registered_model_alias(version.name, CHAMPION, str(version.number))


def download_checkpoint(uri: str, model: str, folder: Path) -> str:
    """Downloads the checkpoint of `models:/NAME@champion` or `models:/NAME/3` into `folder`. Returns its path.

    Raises:
        ConfigError: There is no such model, or giffy_ray did not register it.
    """
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if not match:
        raise ConfigError("a registered model is models:/NAME@champion or models:/NAME/3")
    client = create_client(uri)
    name, alias, number = match.groups()
    try:
        by_alias = client.get_model_version_by_alias(name, alias) if alias else None
        version = by_alias or client.get_model_version(name, number)
        if _DIGEST_TAG not in version.tags:
            raise ConfigError(f"{name} {version.version} was not registered by giffy_ray")
        checkpoint = f"{_artifact_path(version.tags[_DIGEST_TAG])}/{CHECKPOINT}"
        return client.download_artifacts(version.run_id or "", checkpoint, str(folder))
    except MlflowException as error:
        raise ConfigError(redact_credentials(f"MLflow at {uri} reports: {error}")) from error


def _artifact_path(digest: str) -> str:
    """Returns the folder among the run's artifacts, which differs if a resumed run is registered again."""
    return f"model-{digest[:12]}"


@contextmanager
def _long_http_timeout() -> Iterator[None]:
    """Raises MLflow's HTTP timeout to the time that gigabytes of weights may take."""
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    previous = os.environ.get(variable)
    os.environ[variable] = str(_UPLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        if previous is None:
            del os.environ[variable]
        else:
            os.environ[variable] = previous
