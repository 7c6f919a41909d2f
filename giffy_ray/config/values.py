"""What the sections of an Experiment are made of."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from giffy_ray.core.storage import SecretInAddress, checked_location, expand_home

# Counts fit into the 32-bit integers of Ray and the 64-bit products of torch's sizes.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # what numpy, torch and Optuna all take
Share = Annotated[float, Field(ge=0, le=1)]
_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")


def _checked_run(run: str) -> str:
    """The name of a run, models:/... or a location."""
    return run if run.startswith("models:/") else checked_location(run)


def _checked_tracking_uri(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    error_type = SecretInAddress if "@" in uri else ValueError
    if uri == "databricks":
        return uri
    if not separator:
        server = re.fullmatch(r"[\w.-]+:\d+(/.*)?|\[[0-9a-fA-F:]+\]:\d+", uri)
        wanted = f"http://{uri}" if server else "http://HOST:PORT or sqlite:////FOLDER/mlflow.db"
        raise error_type(f"an address begins with its scheme; give {wanted}")
    if scheme.partition("+")[0] not in _TRACKING_SCHEMES:
        raise error_type(f"{scheme}:// is not an address of MLflow; expected {', '.join(_TRACKING_SCHEMES)}")
    try:
        complete = scheme.startswith(("sqlite", "databricks")) or bool(urlsplit(f"{scheme}://{rest}").hostname)
        _ = urlsplit(f"{scheme}://{rest}").port
    except ValueError as error:
        raise error_type("is not an address: its port is no number") from error
    if not complete or not rest:
        raise error_type(f"names no server; expected {scheme}://HOST:PORT")
    return f"{scheme}://{rest}"


Location = Annotated[str, AfterValidator(checked_location)]  # of a folder or file: a path, s3://... or gs://...
LocalPath = Annotated[str, AfterValidator(expand_home)]
Run = Annotated[str, AfterValidator(_checked_run)]
TrackingUri = Annotated[str, AfterValidator(_checked_tracking_uri)]


class Strict:
    """Makes pydantic refuse unknown fields in every section that inherits from it."""

    __pydantic_config__ = ConfigDict(extra="forbid")
