"""MLflow's model registry: versions of a name, and the alias of one of them.

A version is a folder of an `MLmodel` file and a checkpoint. MLflow's flavour `python_function` names the module that
loads it, so there is no code in the folder, and no pickle.
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
from giffy_ray.tracking.uploader import client_of

CHAMPION = "champion"
CHECKPOINT = "checkpoint"  # the folder beside MLmodel
_DIGEST = "giffy_ray.sha256"  # tag: of what a version makes clips with
_STORE_S = 600  # for a server that takes an upload through itself to a bucket


@dataclass(frozen=True)
class Version:
    name: str
    number: int
    tags: Mapping[str, str]


def write_mlmodel(folder: Path, clip: ClipConfig, latent: int, loader: str) -> None:
    """Writes the MLmodel file of the checkpoint below `folder`, with the signature of what `loader` loads."""
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    picture, byte = (clip.height, clip.width, 3), np.dtype(np.uint8)
    ends = Schema([TensorSpec(byte, (-1, *picture), name) for name in ("start", "end")])
    clips = Schema([TensorSpec(byte, (-1, clip.frames, *picture), "clip")])
    seed = {"params": ParamSchema([ParamSpec("seed", "long", None)])} if latent else {}
    model = Model(signature=ModelSignature(ends, clips, **seed))
    pyfunc.add_to_model(model, loader_module=loader, data=CHECKPOINT)
    model.save(folder / "MLmodel")


def add(uri: str, name: str, run_id: str, folder: Path, digest: str, tags: Mapping[str, str]) -> Version:
    """A version of `folder`, kept among the run's files; one of this run and digest that is there is returned."""
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as known:
        if known.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get(_DIGEST) == digest:
            return Version(name, int(version.version), version.tags)
    with _time_to_store():
        client.log_artifacts(run_id, str(folder), _place(digest))
    source = f"{client.get_run(run_id).info.artifact_uri}/{_place(digest)}"
    known = {**tags, _DIGEST: digest}
    added = client.create_model_version(name, source, run_id, tags=known, await_creation_for=0)  # it is there at once
    return Version(name, int(added.version), added.tags)


def champion(uri: str, name: str) -> Version | None:
    from mlflow.exceptions import MlflowException

    try:
        found = client_of(uri).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as unknown:
        if unknown.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return Version(name, int(found.version), found.tags)


def set_champion(uri: str, version: Version) -> None:
    client_of(uri).set_registered_model_alias(version.name, CHAMPION, str(version.number))


def fetch(uri: str, model: str, folder: Path) -> str:
    """Brings `models:/NAME@champion` or `models:/NAME/3` into `folder`. Returns where its checkpoint lies.

    Raises ConfigError where there is no such model, or it is not one of ours.
    """
    from mlflow.exceptions import MlflowException

    asked = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if not asked:
        raise ConfigError("a registered model is models:/NAME@champion or models:/NAME/3")
    client, (name, alias, number) = client_of(uri), asked.groups()
    try:
        by_alias = client.get_model_version_by_alias(name, alias) if alias else None
        version = by_alias or client.get_model_version(name, number)
        if _DIGEST not in version.tags:
            raise ConfigError(f"{name} {version.version} was not registered by giffy_ray")
        checkpoint = f"{_place(version.tags[_DIGEST])}/{CHECKPOINT}"
        return client.download_artifacts(version.run_id or "", checkpoint, str(folder))
    except MlflowException as error:
        raise ConfigError(redact_credentials(f"MLflow at {uri} says: {error}")) from error


def _place(digest: str) -> str:
    """Among the run's files. A run that goes on may be registered again, and takes nothing from earlier versions."""
    return f"model-{digest[:12]}"


@contextmanager
def _time_to_store() -> Iterator[None]:
    """Inside, MLflow waits for answers for as long as it takes to store weights of gigabytes."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before, os.environ[name] = os.environ.get(name), str(_STORE_S)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
