"""A resolved run as TOML: what `--check` prints and what a run's folder keeps."""

from pathlib import Path
from typing import Any

import tomli_w

from palimpsest.common.config.schema import RunConfig


def to_toml(config: RunConfig) -> str:
    """The whole run with every default filled in; reading it back gives the same run."""
    return tomli_w.dumps(_plain(config.model_dump()))


def _plain(value: Any) -> Any:
    """`value` in TOML's types. TOML has no null: a key without a value is left out."""
    match value:
        case dict():
            return {str(key): _plain(entry) for key, entry in value.items() if entry is not None}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case Path():
            return str(value)
    return value
