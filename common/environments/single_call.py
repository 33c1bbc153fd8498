"""Shared rules of the small built-in families: one tool call per message counts, and a session has six messages."""

from palimpsest.common.environments.port import Malformed, Message, Reply, ToolCall, Turn

MAX_TURNS = 6
ONE_CALL = "one call per message"


class ToolFailed(Exception):
    """The call failed; the text is the result for the model."""


def first_call(turn: Turn) -> ToolCall | None:
    """Return the first call of this turn, which is the one that counts; None if it is malformed."""
    first = turn.attempts[0]
    return None if isinstance(first, Malformed) else first


def reply_to_calls(turn: Turn, result: str | ToolFailed | None) -> Reply:
    """Return a tool message for each call: the result of the first one, a refusal for the others."""
    refused = len(turn.calls) - (result is not None)
    texts = ([str(result)] if result is not None else []) + [ONE_CALL] * refused
    return Reply(
        tuple(Message(role="tool", content=text) for text in texts),
        tool_errors=refused + isinstance(result, ToolFailed),
    )


def argument(call: ToolCall, *, tool: str, name: str) -> str:
    """Return the only argument of a call of this tool. Raises ToolFailed."""
    if call.name != tool:
        raise ToolFailed("unknown tool")
    value = call.arguments.get(name)
    if len(call.arguments) != 1 or not isinstance(value, str):
        raise ToolFailed("wrong arguments")
    return value
