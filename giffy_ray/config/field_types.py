"""Validated types for configuration fields."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from giffy_ray.core.storage import SecretInAddress, expand_home, normalize_location

_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")


def _validate_run(run: str) -> str:
    """Accepts a run name, a location or models:/NAME@ALIAS."""
    return run if run.startswith("models:/") else normalize_location(run)


def _validate_tracking_uri(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    error_type = SecretInAddress if "@" in uri else ValueError
    if uri == "databricks":
        return uri
    if not separator:
        server = re.fullmatch(r"[\w.-]+:\d+(/.*)?|\[[0-9a-fA-F:]+\]:\d+", uri)
        suggestion = f"http://{uri}" if server else "http://HOST:PORT or sqlite:////FOLDER/mlflow.db"
        raise error_type(f"has no URI scheme; use {suggestion}")
    if scheme.partition("+")[0] not in _TRACKING_SCHEMES:
        raise error_type(f"MLflow does not support {scheme}://; expected {', '.join(_TRACKING_SCHEMES)}")
    try:
        complete = scheme.startswith(("sqlite", "databricks")) or bool(urlsplit(f"{scheme}://{rest}").hostname)
        _ = urlsplit(f"{scheme}://{rest}").port
    except ValueError as error:
        raise error_type("the port is not a number") from error
    if not complete or not rest:
        raise error_type(f"has no server; expected {scheme}://HOST:PORT")
    return f"{scheme}://{rest}"


# Counts fit the 32-bit integers of Ray, and their products the 64-bit sizes of torch.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # the range that NumPy, torch and Optuna all accept
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[str, AfterValidator(normalize_location)]  # a local path, s3://... or gs://...
LocalPath = Annotated[str, AfterValidator(expand_home)]
Run = Annotated[str, AfterValidator(_validate_run)]
TrackingUri = Annotated[str, AfterValidator(_validate_tracking_uri)]


class StrictSection:
    """Base class of all sections: pydantic rejects unknown fields."""

    __pydantic_config__ = ConfigDict(extra="forbid")
