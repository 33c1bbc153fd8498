"""The keys of the schema and their types, and what to say about a key that it does not have."""

import difflib
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from palimpsest.common.config.schema import RunConfig

Key = tuple[str, ...]
MOST_SUGGESTED = 3
"""Keys of other sections that the error about an unknown key names, at most."""


def unknown_key(key: Key, tag: str | None = None, by: str = "") -> str:
    """Return the error text for a key that the schema does not have. tag, by: see `_problem`."""
    for depth in range(len(key)):
        fields = fields_of(key[:depth])
        if fields is None or key[depth] in fields:
            continue
        section = ".".join(key[:depth])
        near = difflib.get_close_matches(key[depth], fields, n=1, cutoff=0.5)
        elsewhere = _keys_ending(key[depth:], key[:depth])
        if not near and not elsewhere and not _is_entry(key[:depth]):
            elsewhere = _keys_ending(key[depth:], ())
        name = ".".join(key[: depth + 1])
        kinds = len(members_of(expected_type(key[:depth]))) > 1
        where = f"any kind of {section}" if kinds else f"[{section}]" if section else "a run"
        if elsewhere:
            return f"{name} is not a key of {where}; did you mean {_or(elsewhere)}?"
        if near:
            return f"{name} is not a key of {where}; did you mean {'.'.join((*key[:depth], near[0]))}?"
        return f"{name} is not a key of {where}; {'they have' if kinds else 'it has'} {', '.join(sorted(fields))}"
    above = ".".join(key[:-1])
    if fields_of(key[:-1]) is None:
        return f"{'.'.join(key)} is not a key: {above} has none"
    own = next(
        m.model_fields
        for m in members_of(expected_type(key[:-1]))
        if tag in get_args(m.model_fields["kind"].annotation)
    )
    return f'{".".join(key)} is not a key of {above} with kind = "{tag}"{by}; that has {", ".join(sorted(own))}'


def _is_entry(section: Key) -> bool:
    """Whether the section is one of those that a run names itself, as env_gateway.adapters.NAME."""
    above = expected_type(section[:-1]) if section else None
    return above is not None and get_origin(bare_type(above)) is dict


def _keys_ending(tail: Key, section: Key) -> list[str]:
    """Return the keys and sections below a section that end so, those of outer sections first; [] if more than three
    do."""
    found, sections = list[str](), [section]
    for above in sections:  # grows while it is read
        fields = fields_of(above) or {}
        if tail[0] in fields and expected_type((*above, *tail)) is not None:
            found.append(".".join((*above, *tail)))
        sections += [(*above, own) for own in fields if fields_of((*above, own)) is not None]
    return found if len(found) <= MOST_SUGGESTED else []


def _or(words: list[str]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def fields_of(key: Key) -> dict[str, Any] | None:
    """Return names and types of the keys in a section, or None if the key is not a section."""
    expected: Any = RunConfig
    for part in key:
        if get_origin(bare_type(expected)) is dict:
            expected = get_args(bare_type(expected))[1]
            continue
        fields = section_fields(expected)
        if fields is None or part not in fields:
            return None
        expected = fields[part]
    return section_fields(expected)


def expected_type(key: Key) -> Any:
    """Return the type of this key in the schema, or None if the schema has no such key."""
    expected: Any = RunConfig
    for part in key:
        fields = section_fields(expected)
        if fields is None:
            origin = get_origin(bare_type(expected))
            if origin is dict:
                expected = get_args(bare_type(expected))[1]
                continue
            return None
        if part not in fields:
            return None
        expected = fields[part]
    return expected


def section_fields(annotation: Any) -> dict[str, Any] | None:
    """Return names and types of the keys of a type, or None if it is not a section."""
    members = members_of(annotation)
    sections = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    if not sections:
        return None
    return {name: info.annotation for section in sections for name, info in section.model_fields.items()}


def members_of(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type alone."""
    annotation = bare_type(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for arg in get_args(annotation) for member in members_of(arg)]
    return [annotation]


def bare_type(annotation: Any) -> Any:
    """Return a type without its annotations."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
