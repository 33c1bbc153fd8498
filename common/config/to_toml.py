"""A resolved run as TOML: what `--check` prints and what a run's folder keeps."""

import json
import re
from pathlib import Path
from typing import Any

from palimpsest.common.config.schema import RunConfig


def to_toml(config: RunConfig) -> str:
    """The whole run with every default filled in; reading it back gives the same run."""
    lines: list[str] = []
    _table(config.model_dump(), (), lines)
    return "\n".join(lines).strip() + "\n"


def _table(values: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in values.items() if v is not None and not (isinstance(v, dict) and _is_section(path, k))}
    if path and (plain or not values):
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{key} = {_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, dict) and key not in plain:
            _table(value, (*path, key), lines)


def _is_section(path: tuple[str, ...], key: str) -> bool:
    return (*path, key) not in {
        ("tasks", "environments"),
        ("model", "chat_template_options"),
        ("env_gateway", "plugins"),
    }


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Path():
            return _text(str(value))
        case str():
            return _text(value)
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(map(_value, value)) + "]"
        case dict():
            return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    raise TypeError(f"{type(value).__name__} has no TOML form here")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML wants this one escaped too
