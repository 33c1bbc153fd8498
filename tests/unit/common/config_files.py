"""A run file, its configuration, and its error message."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from palimpsest.common.config import RunConfig, load
from palimpsest.common.user_error import ExitCode, UserError

RUN = """
[run]
id = "first"
[model]
path = "models/starting"
[tasks]
environments = { lookup = 1.0 }
[learner]
versions = 3
"""
NOTHING: Mapping[str, str] = {}


def loaded(path: Path, *flags: str, **variables: str) -> RunConfig:
    return load([str(path), *flags], variables, program="prog").config


def refused(path: Path, *flags: str, more: str = "", **variables: str) -> str:
    """Return the error message of a run file with these additional lines, flags, and variables."""
    path.write_text(path.read_text() + more)
    with pytest.raises(UserError) as error:
        load([str(path), *flags], variables, program="prog")
    assert error.value.code is ExitCode.CONFIGURATION
    return str(error.value)
