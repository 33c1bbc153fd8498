"""Base classes and field types of the sections of a run file."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FilePath = Annotated[Path, Field(strict=False)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]

LOWEST_TEMPERATURE = 0.01
"""vLLM replaces a lower temperature by this one (`_MAX_TEMP` of its sampling_params.py)."""

HIGHEST_TEMPERATURE = 100.0
"""Every token is then practically as likely as any other."""


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Service(Section):
    """Address on which a service listens."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """Port to listen on. 0 means any free port; only `palimpsest run` accepts 0."""
