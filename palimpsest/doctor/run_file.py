"""Reads the folder and the fixed ports from the configuration of a run. The run itself validates the keys."""

from __future__ import annotations

import importlib
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.common import run_folder

PREFIX = "PALIMPSEST_"
SWITCHES = ("--check", "--help", "-h")


def named(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return values by dotted key. Flags override the environment, which overrides the file, as in common/config."""
    path, flags = _words(words)
    values: dict[str, Any] = {}
    if path is None and "resume" in flags:
        path = Path(flags["resume"]) / run_folder.RUN_FILE
    if path is not None:
        values.update(_flat("", _read(path)))
    for name, value in environment.items():
        if name.startswith(PREFIX):
            values[name[len(PREFIX) :].lower().replace("__", ".")] = value
    return {**values, **flags}


def unknown(words: Sequence[str]) -> str:
    """Return the first flag that is not a configuration key (a key has a dot), or an empty string.

    >>> unknown(["my.toml", "--run.id=a", "--resume=runs/a", "--color-scheme"])
    '--color-scheme'
    """
    _, flags = _words(words)
    return next((f"--{name}" for name in flags if "." not in name and name != "resume"), "")


def names_a_run(words: Sequence[str]) -> bool:
    """Return whether the words name a run file or the folder of a run.

    >>> names_a_run(["my.toml"]), names_a_run(["--resume=runs/a"]), names_a_run(["--run.id=a"])
    (True, True, False)
    """
    path, flags = _words(words)
    return path is not None or "resume" in flags


def folder(values: Mapping[str, Any]) -> Path:
    """Return the folder of the run, or its parent if the run has no id yet."""
    if "resume" in values:
        return Path(str(values["resume"]))
    return Path(str(values.get("run.folder", "runs"))) / str(values.get("run.id", ""))


def ports(values: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return key, host and number of each fixed port. Ignores hosts that are names, not IP addresses."""
    fixed = []
    for key, value in sorted(values.items()):
        section, _, name = key.rpartition(".")
        host = str(values.get(f"{section}.host", "127.0.0.1"))
        host = "127.0.0.1" if host == "localhost" else host
        if name == "port" and str(value).isdecimal() and 0 < int(value) < 65536 and _is_address(host):
            fixed.append((key, host, int(value)))
    return fixed


def _words(words: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    path, flags = None, {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word in SWITCHES:
            continue
        if not word.startswith("--"):
            path = Path(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and waiting:
            value = waiting.pop(0)
        flags[name] = value
    return path, flags


def _read(path: Path) -> dict[str, Any]:
    """Return the tables of the file. Empty if it is missing or invalid, which the run itself reports."""
    try:
        toml = importlib.import_module("tomllib")  # Python 3.11 and later
        return dict(toml.loads(path.read_text()))
    except (ImportError, OSError, ValueError):
        return {}


def _flat(prefix: str, table: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(f"{prefix}{name}.", value))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
