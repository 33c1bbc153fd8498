"""Translates the settings of pip to uv, so that uv uses the same package indexes."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def client_settings(pip: Path) -> dict[str, str]:
    """Return the environment for uv: this environment and the configuration of this pip."""
    listed = subprocess.run([str(pip), "config", "list"], capture_output=True, text=True, check=False).stdout
    return translated(listed, dict(os.environ))


def translated(listed: str, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with the lines of `pip config list` added. Existing uv variables take precedence.

    >>> translated("global.no-index='true'\\nglobal.find-links='/wheels'\\n", {})["UV_FIND_LINKS"]
    '/wheels'
    """
    settings = dict(environment)
    for line in listed.splitlines():
        name, _, quoted = line.partition("=")
        value, key = _unquoted(quoted), name.split(".")[-1]
        if key == "index-url":
            settings.setdefault("UV_DEFAULT_INDEX", value)
        elif key == "extra-index-url":
            settings.setdefault("UV_INDEX", " ".join(value.split()))
        elif key == "find-links":
            settings.setdefault("UV_FIND_LINKS", ",".join(value.split()))
        elif key == "no-index" and value.lower() in ("1", "true", "yes", "on"):
            settings.setdefault("UV_NO_INDEX", "1")
        elif key == "cert" and Path(value).is_file():
            settings.setdefault("SSL_CERT_FILE", value)
    settings.setdefault("UV_HTTP_TIMEOUT", "180")
    settings.setdefault("UV_LINK_MODE", "hardlink")
    settings.setdefault("UV_NO_PROGRESS", "1")
    # Many containers set PYTHONDONTWRITEBYTECODE; each process would then compile torch again, which takes two to eight
    # seconds.
    settings.setdefault("UV_COMPILE_BYTECODE", "1")
    settings.pop("VIRTUAL_ENV", None)
    return settings


def _unquoted(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text
