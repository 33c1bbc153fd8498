"""Fixed policies that `palimpsest env check` plays, made from the tools of an opening. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.common.environments.port import Opening
from palimpsest.common.environments.tool_calls import CLOSE, OPEN, render

Policies = Mapping[str, Sequence[str]]
DEPTH = 8


def policies(opening: Opening) -> Policies:
    """Return the messages of each policy. Each starts a session and may end it early."""
    calls = [render(name, sample(parameters)) for name, parameters in tools(opening)]
    wrong = [render(name, {"no such argument": 1}) for name, _ in tools(opening)]
    return {
        "says nothing": [""],
        "answers at once": ["1"],
        "repeats the prompt": [opening.messages[-1].content],
        "calls every tool": [*calls, "done"],
        "calls with wrong arguments": [*wrong, "done"],
        "calls badly": [f"{OPEN}\n{{\n{CLOSE}", render("no_such_tool", {}), OPEN, "done"],
        "calls several at once": ["\n".join(calls[:4]) or "done", "done"],
    }


def tools(opening: Opening) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and parameters of each tool whose schema has them."""
    found = []
    for schema in opening.tools:
        function = schema.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found.append((function["name"], function.get("parameters") or {}))
    return found


def sample(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """Return a value of this JSON schema; an object has its required fields.

    >>> sample({"type": "object", "properties": {"n": {"type": "integer"}, "x": {}}, "required": ["n"]})
    {'n': 1}
    """
    root = schema if root is None else root
    if depth > DEPTH:
        return None
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return sample(root.get("$defs", {}).get(name, {}), root, depth + 1)
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema or "default" in schema:
        return schema.get("const", schema.get("default"))
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return sample(options[0], root, depth + 1)
    match schema.get("type", "object" if "properties" in schema else "string"):
        case "object":
            known = schema.get("properties", {})
            return {name: sample(known.get(name, {}), root, depth + 1) for name in schema.get("required", ())}
        case "array":
            return [sample(schema.get("items") or {}, root, depth + 1)] * int(schema.get("minItems", 0))
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
    return "a" * int(schema.get("minLength", 1))


def schema_problems(opening: Opening) -> list[str]:
    """Return what is wrong with the schemas of the tools."""
    found, names = [], list[str]()
    for number, schema in enumerate(opening.tools):
        function = schema.get("function")
        if schema.get("type") != "function" or not isinstance(function, Mapping):
            found.append(f'tool {number}: the schema must have "type": "function" and "function": {{...}}')
            continue
        name, parameters = function.get("name"), function.get("parameters")
        names.append(str(name))
        if not isinstance(name, str) or not name:
            found.append(f"tool {number}: it has no name")
        if not function.get("description"):
            found.append(f"tool {name}: it has no description")
        if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
            found.append(f'tool {name}: `parameters` must be a schema of "type": "object"')
        elif missing := set(parameters.get("required", ())) - set(parameters.get("properties", {})):
            found.append(f"tool {name}: required but not in `properties`: {', '.join(sorted(missing))}")
    return found + [f"tool {name}: two tools have this name" for name in sorted(set(names)) if names.count(name) > 1]
