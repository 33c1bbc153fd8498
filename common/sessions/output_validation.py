"""Validates the values that an environment returns. An invalid value fails the session and never becomes a reward.

Equivalent forms of a valid value are converted: NumPy's scalars and arrays without dimensions to Python's numbers,
lists to tuples, and a reward that misses its bound by rounding to the bound.
"""

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from palimpsest.common.environments.port import EnvironmentFailed, Message, Opening, Outcome, Reply, Score

ROLES = ("system", "user", "assistant", "tool")
ROUNDING = 1e-6
"""Distance from [0, 1] within which a reward is set to the bound: a sum of float32 parts misses it by about 1e-7."""
OPENING_BYTES = 2**20
"""Maximum size of the first messages and the tools of a session, as UTF-8. They are kept as long as the session."""


def check_opening(returned: Any) -> Opening:
    """Return the opening with plain values. Raises EnvironmentFailed."""
    if not isinstance(returned, Opening):
        raise _invalid(f"reset returned {_shown(returned)}, not an Opening")
    messages = _messages(returned.messages)
    if not messages:
        raise _invalid("reset returned no messages")
    if not isinstance(returned.tools, list | tuple):
        raise _invalid(f"tools are {_shown(returned.tools)}, not a tuple or list of schemas")
    opening = Opening(messages, tuple(_schema(schema) for schema in returned.tools))
    size = sum(len(message.content.encode()) for message in messages) + len(json.dumps(opening.tools))
    if size > OPENING_BYTES:
        raise _invalid(f"the first messages and the tools take {size} bytes; at most {OPENING_BYTES} are allowed")
    return opening


def check_outcome(returned: Any) -> Outcome:
    """Return the reply or score with plain values. Raises EnvironmentFailed."""
    if not isinstance(returned, Reply):
        return check_score(returned)
    errors = _plain(returned.tool_errors)
    if isinstance(errors, bool) or not isinstance(errors, Integral) or errors < 0:
        raise _invalid(f"tool_errors is {_shown(returned.tool_errors)}, not a count")
    return Reply(_messages(returned.messages), int(errors))


def check_score(returned: Any) -> Score:
    """Return the score with plain values and a reward in [0, 1]. Raises EnvironmentFailed."""
    if not isinstance(returned, Score):
        raise _invalid(f"{_shown(returned)} is neither a Reply nor a Score")
    reward = _number(returned.reward)
    if reward is None or not -ROUNDING <= reward <= 1 + ROUNDING:
        raise _invalid(f"reward is {_shown(returned.reward)}, not a number in [0, 1]")
    success = _plain(returned.success)
    if not isinstance(success, bool):
        raise _invalid(f"success is {_shown(returned.success)}, not true or false")
    return Score(min(max(reward, 0.0), 1.0), success, _parts(returned.parts))


def _parts(returned: Any) -> dict[str, float]:
    try:
        given = dict(returned)
    except (TypeError, ValueError):
        raise _invalid(f"parts is {_shown(returned)}, not a mapping") from None
    parts = {}
    for name, part in given.items():
        number = _number(part)
        if not isinstance(name, str) or number is None:
            raise _invalid(f"reward part {_shown(name)} is {_shown(part)}, not a number with a name")
        parts[str(name)] = number
    return parts


def _schema(returned: Any) -> dict[str, Any]:
    """Return a tool's schema as JSON has it."""
    if not isinstance(returned, Mapping):
        raise _invalid(f"a tool's schema is {_shown(returned)}, not a mapping")
    try:
        schema: dict[str, Any] = json.loads(json.dumps(dict(returned), allow_nan=False, default=_plain_item))
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"a tool's schema is not JSON: {error}") from None
    return schema


def _messages(returned: Any) -> tuple[Message, ...]:
    if not isinstance(returned, list | tuple):
        raise _invalid(f"messages are {_shown(returned)}, not a tuple or list of Messages")
    for message in returned:
        if not isinstance(message, Message) or not isinstance(message.content, str) or message.role not in ROLES:
            raise _invalid(f"{_shown(message)} is not a Message")
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise _invalid(f"a message's text cannot be encoded: {error}") from None
    return tuple(returned)


def _number(value: Any) -> float | None:
    """Return the value as a finite float; None if it is not one. True and False are not numbers."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        return None
    try:
        number = float(plain)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """Return the Python value of a scalar, or of an array or tensor without dimensions, of any library."""
    try:
        return value.item() if tuple(value.shape) == () else value
    except Exception:  # no array; or code of the value failed
        return value


def _plain_item(value: Any) -> Any:
    """Return a value inside a schema that JSON has no form for as plain lists and numbers. Raises TypeError."""
    plain = value.tolist() if hasattr(value, "tolist") else None
    if plain is None or type(plain) is type(value):
        raise TypeError(f"{_shown(value)} has no form in JSON")
    return plain


def _shown(value: Any) -> str:
    try:
        return repr(value)[:100]
    except Exception:  # repr runs code of the value
        return f"a {type(value).__name__}"


def _invalid(message: str) -> EnvironmentFailed:
    return EnvironmentFailed("environment_invalid", message)
