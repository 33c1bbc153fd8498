"""Load the configuration of a run from its TOML file, the environment and the flags, and validate it.

Precedence: defaults < TOML < environment (PALIMPSEST_LEARNER__VERSIONS) < flags (--learner.versions=3). The loader
records the origin of every value, so that an error names it. An error about an unknown key suggests the closest key.
"""

import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from palimpsest.common import run_folder
from palimpsest.common.config.environment import variables
from palimpsest.common.config.proximal import SnapshotProximal
from palimpsest.common.config.recipes import apply_recipe, unknown
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.schema_keys import (
    Key,
    bare_type,
    expected_type,
    fields_of,
    members_of,
    section_fields,
    unknown_key,
)
from palimpsest.common.user_error import UserError

RENAMED: dict[Key, Key] = {
    ("learner", "discrepancy", "weight_normalise"): ("learner", "discrepancy", "weight_normalize"),
}
"""Old key -> the key that replaced it. Run files of older releases may use the old key."""


@dataclass(frozen=True)
class Invocation:
    """The parsed command line of a program, with the validated configuration."""

    config: RunConfig
    source: Path
    check: bool = False
    """Print the resolved configuration and exit."""
    resume: Path | None = None
    """Folder of a run to resume."""
    overrides: tuple[str, ...] = field(default_factory=tuple)
    """The flags that set keys, in their original form, to pass to other processes."""


def load(arguments: Sequence[str], environment: Mapping[str, str], *, program: str) -> Invocation:
    """Load the run file that the arguments name. Raises UserError with all problems, or with the usage text."""
    path: Path | None = None
    check, resume = False, None
    overrides: list[tuple[Key, str, str]] = []
    flags: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--check":
            check = True
        elif argument in ("--help", "-h"):
            raise UserError(usage(program))
        elif argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                if not remaining and ("." in name or name == "resume"):
                    raise UserError(f"{argument} needs a value: {argument}=VALUE")
                value = remaining.pop(0) if remaining else ""  # a flag without a section is unknown, with any value
            if name == "resume":
                resume = Path(value)
            else:
                overrides.append((tuple(name.split(".")), value, f"--{name}"))
                flags.append(f"--{name}={value}")
        elif path is None:
            path = Path(argument)
        else:
            raise UserError(f"expected one run file, got {path} and {argument}")
    if path is None and resume is not None:
        path = resume / run_folder.RUN_FILE
        if not path.is_file():
            raise UserError(f"--resume {resume}: not the folder of a run (it has no {path.name})")
    if path is None:
        raise UserError(usage(program))
    values, origins = _toml(path)
    problems = [f"{path}: {problem}" for problem in _rename(values)]
    problems += [
        problem
        for key, value, origin in [*variables(environment), *overrides]
        if (problem := _set(values, origins, RENAMED.get(key, key), value, origin))
    ]
    problems += _follow_recipe(values, origins, path)
    config = _validate(values, origins, path, problems)
    return Invocation(config, path, check, resume, tuple(flags))


def usage(program: str) -> str:
    """Return the usage text of a program that reads a run file."""
    return (
        f"usage: {program} RUN.toml [--check] [--SECTION.KEY=VALUE ...]\n"
        f"  --check        print the resolved configuration and exit\n"
        f"  --learner.optimizer.lr=3e-6   any configuration key (docs/configuration.md lists them)"
    )


def _toml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Start from a copy of examples/embedded.toml") from None
    except IsADirectoryError:
        own = path / run_folder.RUN_FILE
        hint = f"the run file in it is {own}" if own.is_file() else "name a run file (RUN.toml)"
        raise UserError(f"{path} is a folder; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: invalid TOML: {error}") from None
    return values, {}


def _rename(values: dict[str, Any]) -> list[str]:
    """Move values from old keys to the keys that replaced them. Returns an error text for each value set twice."""
    problems = []
    for old, new in RENAMED.items():
        section: Any = values
        for part in old[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or old[-1] not in section:
            continue
        if new[-1] in section:
            problems.append(
                f"{'.'.join(old)} is the old name of {'.'.join(new)}, which is also set: remove the old one"
            )
        section.setdefault(new[-1], section.pop(old[-1]))
    return problems


def _set(values: dict[str, Any], origins: dict[Key, str], key: Key, text: str, origin: str) -> str | None:
    """Set the key to the text of a flag or a variable. Returns an error text if the schema has no such key."""
    expected = expected_type(key)
    if expected is None:
        return f"{origin}: {unknown_key(key)}"
    at = values
    for depth, part in enumerate(key[:-1], start=1):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            return f"{origin}: {'.'.join(key[:depth])} is already set to {at!r}, which has no keys"
    at[key[-1]] = text if _is_text(expected) else _literal(text)
    origins[key] = origin
    return None


def _follow_recipe(values: dict[str, Any], origins: dict[Key, str], path: Path) -> list[str]:
    """Apply the recipe below the keys that the run sets. Returns an error text if the recipe does not exist."""
    learner = values.get("learner")
    if not isinstance(learner, dict) or not isinstance(name := learner.get("recipe", ""), str):
        return []
    if not name:
        if isinstance(proximal := learner.get("proximal"), dict):
            proximal.setdefault("kind", SnapshotProximal().kind)
        return []
    if problem := unknown(name):
        return [f"{origins.get(('learner', 'recipe'), path)}: {problem}"]
    values["learner"] = apply_recipe(name, learner)
    return []


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _validate(values: dict[str, Any], origins: dict[Key, str], path: Path, problems: list[str]) -> RunConfig:
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, origins, str(path))
    if problems:
        raise UserError("\n".join(problems))
    return config


def problems_of(error: ValidationError, origins: Mapping[Key, str] | None = None, path: str = "") -> list[str]:
    """Return an error text for each problem. origins: key -> flag or variable that set it; path: of the other keys."""
    origins, problems = origins or {}, []
    for detail in error.errors():
        full = tuple(str(part) for part in detail["loc"])
        tags = [part for i, part in enumerate(full) if _is_tag(full, i)]
        key = tuple(part for i, part in enumerate(full) if not _is_tag(full, i))
        if _is_branch(key) and key[-1].startswith("literal["):
            continue  # the error of the other type of this key lists these words
        key = tuple(part for i, part in enumerate(key) if not _is_branch(key[: i + 1]))
        where = _origin(origins, key, detail) or path
        by = origins.get((*key[:-1], "kind"))
        problem = _problem(key, detail, tags[-1] if tags else None, f" by {by}" if by else "")
        problems.append(f"{where}: {problem}" if where else problem)
    return problems


def _problem(key: Key, detail: Any, tag: str | None, by: str) -> str:
    """Return the error text for the key.

    tag: the kind of the section that holds the key, if the section has kinds. by: the origin of that kind.
    """
    name, section, given = ".".join(key), fields_of(key), f"got {detail['input']!r}"
    if key[-1:] == ("[key]",):
        return f"{'.'.join(key[:-2])}: there is no {key[-2]!r}; it can be {detail['ctx']['expected']}"
    match detail["type"]:
        case "extra_forbidden":
            return unknown_key(key, tag, by)
        case "union_tag_invalid":
            kind, known = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            return f"{name}.kind: there is no {kind!r}; it can be {known}"
        case "union_tag_not_found":
            return f"{name}.kind is missing; it decides which other keys are valid"
        case "model_type" | "model_attributes_type" if section:
            hint = f"did you mean {name}.kind?" if "kind" in section else f"its keys are {', '.join(sorted(section))}"
            return f"{name} is a section, {given}; {hint}"
        case "missing" | "too_short" | "too_long" | "tuple_type" if pair := next(filter(_is_pair, (key, key[:-1])), ()):
            return f"{'.'.join(pair)}: input should be two numbers, [low, high]{_or_words(pair)}, {given}"
        case "missing":
            return f"{name} is missing"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{name + ': ' if key else ''}{message}{_or_words(key)}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{name}: {message}{_or_words(key)}, {given}"


def _origin(origins: Mapping[Key, str], key: Key, detail: Any) -> str | None:
    """Return the flag or variable that set the key or a section above it.

    If keys contradict each other, return the origins of the keys that the error text names.
    """
    if detail["type"] == "union_tag_invalid":
        key = (*key, "kind")
    if above := next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), None):
        return above
    below = {".".join(at[len(key) :]): origin for at, origin in origins.items() if at[: len(key)] == key}
    text = detail["msg"] if detail["type"] == "value_error" else ""
    return " and ".join(below[name] for name in below if re.search(rf"\b{re.escape(name)}(?![\w.]*\w)", text)) or None


def _is_tag(key: Key, i: int) -> bool:
    """Whether key[i] is the name of a union member that pydantic inserted into the path."""
    return i > 0 and fields_of(key[:i]) is not None and key[i] not in (fields_of(key[:i]) or {}) and i < len(key) - 1


def _is_branch(key: Key) -> bool:
    """Whether the last part of the key is a type name that pydantic inserted for a key with several types."""
    above = expected_type(key[:-1]) if len(key) > 1 else None
    return above is not None and len(members_of(above)) > 1 and section_fields(above) is None


def _or_words(key: Key) -> str:
    """Return the words that the key accepts instead of a number, as the end of an error text."""
    members = members_of(expected_type(key)) if key else []
    literals = [member for member in members if get_origin(member) is Literal]
    return "".join(f", or be {word!r}" for word in get_args(literals[0])) if literals and len(members) > 1 else ""


def _is_pair(key: Key) -> bool:
    """Whether the key takes a pair of numbers."""
    return bool(key) and any(get_args(bare_type(m)) == (float, float) for m in members_of(expected_type(key)))


def _is_text(annotation: Any) -> bool:
    """Whether the key takes the text of a flag unchanged instead of a TOML literal."""
    members = members_of(annotation)
    return all(m in (str, Path, types.NoneType) or get_origin(m) is Literal for m in members)
