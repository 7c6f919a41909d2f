"""What the sections of an Experiment are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A field that does not exist or a value that it cannot take; the message names both."""


class Strict:
    """Makes pydantic refuse unknown fields in every section that inherits from it."""

    __pydantic_config__ = ConfigDict(extra="forbid")
