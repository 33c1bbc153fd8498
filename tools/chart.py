"""Generates the chart's values.schema.json and docs/chart-values.md from the comments of its values.yaml. Pure.

The comment lines above a key describe it. A line `# @schema {...}` adds to the JSON schema of the key; the type follows
from the default. Keys that values.yaml does not have are errors.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

COMMENT = re.compile(r"^\s*# ?(.*)$")
KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):(?: |$)")
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
Path = tuple[str, ...]


def schema(text: str) -> str:
    """Return the JSON schema of the values. Raises ValueError if a key has no comment."""
    root = _section(yaml.safe_load(text), comments(text), ())
    return json.dumps({"title": "Values of the chart palimpsest", **root}, indent=2) + "\n"


def table(text: str) -> str:
    """Return the page with a table of all values."""
    values, described = yaml.safe_load(text), comments(text)
    rows = ["| value | default | what it does |", "|---|---|---|"]
    for path, default in _leaves(values, described, ()):
        cell = described[path][0].replace("|", "\\|")
        rows.append(f"| `{'.'.join(path)}` | `{json.dumps(default)}` | {cell} |")
    intro = "Values of the [chart](kubernetes.md). `make docs` generates this page from its values.yaml."
    return "\n".join(["# Values of the chart", "", intro, "", *rows]) + "\n"


def comments(text: str) -> dict[Path, tuple[str, dict[str, Any]]]:
    """Return description and additional schema of every key that has a comment."""
    found: dict[Path, tuple[str, dict[str, Any]]] = {}
    path: list[str] = []
    pending: list[str] = []
    for line in text.splitlines():
        if comment := COMMENT.match(line):
            pending.append(comment[1])
        elif key := KEY.match(line):
            path = [*path[: len(key[1]) // 2], key[2]]
            extra: dict[str, Any] = {}
            for note in pending:
                if note.startswith("@schema "):
                    extra |= json.loads(note.removeprefix("@schema "))
            if pending:
                found[tuple(path)] = (" ".join(one for one in pending if not one.startswith("@schema ")), extra)
            pending = []
        else:
            pending = []
    return found


def _section(
    values: Mapping[str, Any], described: Mapping[Path, tuple[str, dict[str, Any]]], path: Path
) -> dict[str, Any]:
    properties = {}
    for name, default in values.items():
        at = (*path, name)
        if at not in described:
            raise ValueError(f"values.yaml: {'.'.join(at)} has no comment: describe it in the line above")
        description, extra = described[at]
        below = _section(default, described, at) if _is_section(default, extra) else {"type": TYPES[type(default)]}
        properties[name] = {"description": description, **below, **extra}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _leaves(
    values: Mapping[str, Any], described: Mapping[Path, tuple[str, Sequence[Any] | Mapping[str, Any]]], path: Path
) -> Iterator[tuple[Path, Any]]:
    for name, default in values.items():
        at = (*path, name)
        if _is_section(default, described[at][1]):
            yield from _leaves(default, described, at)
        else:
            yield at, default


def _is_section(default: Any, extra: Any) -> bool:
    """Whether the default is a section with keys of its own, and not a free table (`@schema` states its type)."""
    return isinstance(default, dict) and "type" not in extra
