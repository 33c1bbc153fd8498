"""Validates the values that an environment returns. An invalid value fails the session and never becomes a reward."""

import json
import math
from typing import Any

from palimpsest.services.env_gateway.environments.port import EnvironmentFailed, Message, Opening, Outcome, Reply, Score

ROLES = ("system", "user", "assistant", "tool")


def check_opening(returned: Any) -> Opening:
    """Return a valid opening. Raises EnvironmentFailed."""
    if not isinstance(returned, Opening):
        raise _invalid(f"reset returned {_shown(returned)}, not an Opening")
    _check_messages(returned.messages)
    if not returned.messages:
        raise _invalid("reset returned no messages")
    if not isinstance(returned.tools, tuple) or not all(isinstance(schema, dict) for schema in returned.tools):
        raise _invalid("tools are not a tuple of schemas")
    try:
        json.dumps(returned.tools, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _invalid(f"a tool's schema is not JSON: {error}") from None
    return returned


def check_outcome(returned: Any) -> Outcome:
    """Return a valid reply or score. Raises EnvironmentFailed."""
    if isinstance(returned, Reply):
        _check_messages(returned.messages)
        if type(returned.tool_errors) is not int or returned.tool_errors < 0:
            raise _invalid(f"tool_errors is {_shown(returned.tool_errors)}, not a count")
        return returned
    return check_score(returned)


def check_score(returned: Any) -> Score:
    """Return a valid score, with a reward in [0, 1]. Raises EnvironmentFailed."""
    if not isinstance(returned, Score):
        raise _invalid(f"{_shown(returned)} is neither a Reply nor a Score")
    if not _is_number(returned.reward) or not 0 <= returned.reward <= 1:
        raise _invalid(f"reward is {_shown(returned.reward)}, not a number in [0, 1]")
    if type(returned.success) is not bool:
        raise _invalid(f"success is {_shown(returned.success)}, not true or false")
    try:
        parts = dict(returned.parts)
    except (TypeError, ValueError):
        raise _invalid(f"parts is {_shown(returned.parts)}, not a mapping") from None
    for name, part in parts.items():
        if not isinstance(name, str) or not _is_number(part):
            raise _invalid(f"reward part {_shown(name)} is {_shown(part)}, not a number")
    return returned


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, tuple):
        raise _invalid(f"messages are {_shown(messages)}, not a tuple")
    for message in messages:
        if not isinstance(message, Message) or not isinstance(message.content, str) or message.role not in ROLES:
            raise _invalid(f"{_shown(message)} is not a Message")
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise _invalid(f"a message's text cannot be encoded: {error}") from None


def _is_number(value: Any) -> bool:
    """Whether the value is a finite number; True and False are not."""
    return type(value) in (int, float) and math.isfinite(value)


def _shown(value: Any) -> str:
    try:
        return repr(value)[:100]
    except Exception:  # repr runs code of the value
        return f"a {type(value).__name__}"


def _invalid(message: str) -> EnvironmentFailed:
    return EnvironmentFailed("environment_invalid", message)
