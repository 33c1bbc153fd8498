"""The hash of a session's state: equal for equal states, in every process. Pure."""

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel

from palimpsest.common.environments.port import digest

MAX_DEPTH = 64


def hash_of(*parts: Any) -> str:
    """Return the hash of the parts. Raises TypeError, which names a value without a plain form."""
    return digest(*(plain(part) for part in parts))


def plain(value: Any, depth: int = 0) -> Any:
    """Return the value as JSON has it: objects as their fields, sets in the order of their items.

    Raises TypeError.

    >>> plain({"seen": {"b", "a"}, 3: (1, None)})
    {'seen': ['a', 'b'], '3': [1, None]}
    """
    if depth > MAX_DEPTH:
        raise TypeError("the state is nested too deeply, or contains itself; pass state_hash=function")
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return plain(value.value, depth + 1)
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name), depth + 1) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(one, depth + 1) for one in value), key=lambda one: json.dumps(one, sort_keys=True))
    if isinstance(value, list | tuple):
        return [plain(one, depth + 1) for one in value]
    if type(value).__module__ == "builtins" or not hasattr(value, "__dict__"):
        raise TypeError(f"a {type(value).__name__} in the state has no plain form; pass state_hash=function")
    return plain(vars(value), depth + 1)
