"""From files, environment and flags to one checked configuration.

Defaults < TOML < environment (PALIMPSEST_LEARNER__VERSIONS) < flags (--learner.versions=3). Every value remembers the
layer it came from, so that an error names it. A misspelt key names its nearest neighbor.
"""

import difflib
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from palimpsest.common import run_folder
from palimpsest.common.config.proximal import SnapshotProximal
from palimpsest.common.config.recipes import apply_recipe, unknown
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError

ENV_PREFIX = "PALIMPSEST_"
NOT_KEYS = (
    "PALIMPSEST_CACHE",
    "PALIMPSEST_ENGINE_",
    "PALIMPSEST_FAULT",
    "PALIMPSEST_GATEWAY_TOKEN",
    "PALIMPSEST_KAFKA_",
)
"""Beginnings of environment variables that are no keys: tools/backends, what a worker tells its engine's processes,
common/failpoints.py, common/sessions/token.py, common/bus/kafka."""

Key = tuple[str, ...]
RENAMED: dict[Key, Key] = {
    ("learner", "discrepancy", "weight_normalise"): ("learner", "discrepancy", "weight_normalize"),
}
"""Old key -> the key that replaced it. Run files of older releases have the old one, and go on with it."""


@dataclass(frozen=True)
class Invocation:
    """What a program was asked to do."""

    config: RunConfig
    source: Path
    check: bool = False
    """Print the resolved run and stop."""
    resume: Path | None = None
    """Folder of a run to go on with."""
    overrides: tuple[str, ...] = field(default_factory=tuple)
    """The flags that set keys, as given: to pass on to other processes."""


def load(arguments: Sequence[str], environment: Mapping[str, str], *, program: str) -> Invocation:
    """Read the run that the arguments name. Raises UserError with every problem found, or with the usage."""
    path: Path | None = None
    check, resume = False, None
    overrides: list[tuple[Key, str, str]] = []
    passed_on: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--check":
            check = True
        elif argument in ("--help", "-h"):
            raise UserError(usage(program))
        elif argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                if not waiting:
                    raise UserError(f"{argument} needs a value: {argument}=VALUE")
                value = waiting.pop(0)
            if name == "resume":
                resume = Path(value)
            else:
                overrides.append((tuple(name.split(".")), value, f"--{name}"))
                passed_on.append(f"--{name}={value}")
        elif path is None:
            path = Path(argument)
        else:
            raise UserError(f"one run file is wanted, but {path} and {argument} were given")
    if path is None and resume is not None:
        path = resume / run_folder.RUN_FILE
        if not path.is_file():
            raise UserError(f"--resume {resume}: that is no run's folder (it has no {path.name})")
    if path is None:
        raise UserError(usage(program))
    values, origins = _toml(path)
    problems = [f"{path}: {problem}" for problem in _rename(values)]
    problems += [
        problem
        for key, value, origin in [*_variables(environment), *overrides]
        if (problem := _set(values, origins, RENAMED.get(key, key), value, origin))
    ]
    problems += _follow_recipe(values, origins, path)
    config = _validate(values, origins, path, problems)
    return Invocation(config, path, check, resume, tuple(passed_on))


def usage(program: str) -> str:
    """How to call a program that reads a run."""
    return (
        f"usage: {program} RUN.toml [--check] [--SECTION.KEY=VALUE ...]\n"
        f"  --check        print the resolved run and stop\n"
        f"  --learner.optimizer.lr=3e-6   any key of the run (docs/configuration.md lists them)"
    )


def _variables(environment: Mapping[str, str]) -> list[tuple[Key, str, str]]:
    """Keys that the environment sets, a section before the keys in it."""
    return [
        (tuple(part.lower() for part in name.removeprefix(ENV_PREFIX).split("__")), environment[name], name)
        for name in sorted(environment)
        if name.startswith(ENV_PREFIX) and not name.startswith(NOT_KEYS)
    ]


def _toml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. examples/embedded.toml is one to start from") from None
    except IsADirectoryError:
        own = path / run_folder.RUN_FILE
        kept = f"the run in it is described by {own}" if own.is_file() else "a file that describes a run is wanted"
        raise UserError(f"{path}: that is a folder; {kept}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    return values, {}


def _rename(values: dict[str, Any]) -> list[str]:
    """Move what old keys hold to the keys that replaced them; a sentence for each that is set under both."""
    problems = []
    for old, new in RENAMED.items():
        section: Any = values
        for part in old[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or old[-1] not in section:
            continue
        if new[-1] in section:
            problems.append(f"{'.'.join(old)} is the old name of {'.'.join(new)}, which is set, too: remove it")
        section.setdefault(new[-1], section.pop(old[-1]))
    return problems


def _set(values: dict[str, Any], origins: dict[Key, str], key: Key, text: str, origin: str) -> str | None:
    """Put a flag's or variable's text where the schema has its key; a sentence if it has none."""
    expected = _expected_type(key)
    if expected is None:
        return f"{origin}: {_unknown(key)}"
    at = values
    for depth, part in enumerate(key[:-1], start=1):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            return f"{origin}: {'.'.join(key[:depth])} is set to {at!r} already, which has no keys"
    at[key[-1]] = text if _is_text(expected) else _literal(text)
    origins[key] = origin
    return None


def _follow_recipe(values: dict[str, Any], origins: dict[Key, str], path: Path) -> list[str]:
    """Put what the recipe says under what is set; a sentence if there is no such recipe."""
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
        for detail in error.errors():
            full = tuple(str(part) for part in detail["loc"])
            tags = [part for i, part in enumerate(full) if _is_tag(full, i)]
            key = tuple(part for i, part in enumerate(full) if not _is_tag(full, i))
            if _is_branch(key) and key[-1].startswith("literal["):
                continue  # told with what else the key can be
            key = tuple(part for i, part in enumerate(key) if not _is_branch(key[: i + 1]))
            where = _origin(origins, key, detail) or str(path)
            by = origins.get((*key[:-1], "kind"))
            problems.append(f"{where}: {_problem(key, detail, tags[-1] if tags else None, f' by {by}' if by else '')}")
    if problems:
        raise UserError("\n".join(problems))
    return config


def _problem(key: Key, detail: Any, tag: str | None, by: str) -> str:
    """What is wrong at the key. tag: the kind of the section that the key is in, where it has kinds; by: who set it."""
    name, section, given = ".".join(key), _fields(key), f"got {detail['input']!r}"
    if key[-1:] == ("[key]",):
        return f"{'.'.join(key[:-2])}: there is no {key[-2]!r}; it can be {detail['ctx']['expected']}"
    match detail["type"]:
        case "extra_forbidden":
            return _unknown(key, tag, by)
        case "union_tag_invalid":
            kind, known = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            return f"{name}.kind: there is no {kind!r}; it can be {known}"
        case "union_tag_not_found":
            return f"{name}.kind is missing: the other keys depend on it"
        case "model_type" | "model_attributes_type" if section:
            hint = f"did you mean {name}.kind?" if "kind" in section else f"its keys are {', '.join(sorted(section))}"
            return f"{name} is a section, {given}; {hint}"
        case "missing" | "too_short" | "too_long" | "tuple_type" if pair := next(filter(_is_pair, (key, key[:-1])), ()):
            return f"{'.'.join(pair)}: input should be two numbers, [low, high]{_or_words(pair)}, {given}"
        case "missing":
            return f"{name} is missing"
        case "value_error":
            said = detail["msg"].removeprefix("Value error, ")
            return f"{name + ': ' if key else ''}{said}{_or_words(key)}"
    said = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{name}: {said}{_or_words(key)}, {given}"


def _origin(origins: dict[Key, str], key: Key, detail: Any) -> str | None:
    """The flag or variable that set the key, or a section it is in; of keys that contradict each other, those named."""
    if detail["type"] == "union_tag_invalid":
        key = (*key, "kind")
    if above := next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), None):
        return above
    below = {".".join(at[len(key) :]): origin for at, origin in origins.items() if at[: len(key)] == key}
    said = detail["msg"] if detail["type"] == "value_error" else ""
    return " and ".join(below[name] for name in below if re.search(rf"\b{re.escape(name)}(?![\w.]*\w)", said)) or None


def _is_tag(key: Key, i: int) -> bool:
    """Whether key[i] is the name of a union's member that pydantic put into the path."""
    return i > 0 and _fields(key[:i]) is not None and key[i] not in (_fields(key[:i]) or {}) and i < len(key) - 1


def _is_branch(key: Key) -> bool:
    """Whether key's last part names one of the types that a key may have, put there by pydantic."""
    above = _expected_type(key[:-1]) if len(key) > 1 else None
    return above is not None and len(_members(above)) > 1 and _section_fields(above) is None


def _or_words(key: Key) -> str:
    """The words that may stand at a key instead of a number."""
    members = _members(_expected_type(key)) if key else []
    literals = [member for member in members if get_origin(member) is Literal]
    return "".join(f", or be {word!r}" for word in get_args(literals[0])) if literals and len(members) > 1 else ""


def _is_pair(key: Key) -> bool:
    """Whether two numbers stand at the key."""
    return bool(key) and any(get_args(_bare(m)) == (float, float) for m in _members(_expected_type(key)))


def _unknown(key: Key, tag: str | None = None, by: str = "") -> str:
    for depth in range(len(key)):
        fields = _fields(key[:depth])
        if fields is None or key[depth] in fields:
            continue
        section = ".".join(key[:depth])
        near = difflib.get_close_matches(key[depth], fields, n=1, cutoff=0.5)
        name = ".".join(key[: depth + 1])
        kinds = len(_members(_expected_type(key[:depth]))) > 1
        where = f"any kind of {section}" if kinds else f"[{section}]" if section else "a run"
        if near:
            return f"{name} is not a key of {where}; did you mean {'.'.join((*key[:depth], near[0]))}?"
        return f"{name} is not a key of {where}; {'they have' if kinds else 'it has'} {', '.join(sorted(fields))}"
    above = ".".join(key[:-1])
    if _fields(key[:-1]) is None:
        return f"{'.'.join(key)} is not a key: {above} has none"
    own = next(
        m.model_fields for m in _members(_expected_type(key[:-1])) if tag in get_args(m.model_fields["kind"].annotation)
    )
    return f'{".".join(key)} is not a key of {above} with kind = "{tag}"{by}; that has {", ".join(sorted(own))}'


def _fields(key: Key) -> dict[str, Any] | None:
    """Names and types below a key that is a section, else None."""
    expected: Any = RunConfig
    for part in key:
        fields = _section_fields(expected)
        if fields is None or part not in fields:
            return None
        expected = fields[part]
    return _section_fields(expected)


def _expected_type(key: Key) -> Any:
    """Type the schema wants at this key; None if it has no such key."""
    expected: Any = RunConfig
    for part in key:
        fields = _section_fields(expected)
        if fields is None:
            origin = get_origin(_bare(expected))
            if origin is dict:
                expected = get_args(_bare(expected))[1]
                continue
            return None
        if part not in fields:
            return None
        expected = fields[part]
    return expected


def _section_fields(annotation: Any) -> dict[str, Any] | None:
    members = _members(annotation)
    sections = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    if not sections:
        return None
    return {name: info.annotation for section in sections for name, info in section.model_fields.items()}


def _members(annotation: Any) -> list[Any]:
    annotation = _bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_text(annotation: Any) -> bool:
    """Whether a flag's text stands as it is, not as a TOML literal."""
    members = _members(annotation)
    return all(m in (str, Path, types.NoneType) or get_origin(m) is Literal for m in members)
