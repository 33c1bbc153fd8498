"""What the small built-in families share: one tool call a message counts, and six messages are the most."""

from palimpsest.services.env_gateway.environments.port import Malformed, Message, Reply, ToolCall, Turn

MAX_TURNS = 6
ONE_CALL = "one call per message"


class ToolFailed(Exception):
    """The call cannot be carried out; the text is what the model is told."""


def first_call(turn: Turn) -> ToolCall | None:
    """The attempt of this turn that counts, which is the first; None if that one is malformed."""
    first = turn.attempts[0]
    return None if isinstance(first, Malformed) else first


def reply_to_calls(turn: Turn, result: str | ToolFailed | None) -> Reply:
    """A tool message for each call: the result for the one that counted, a refusal for the others."""
    refused = len(turn.calls) - (result is not None)
    texts = ([str(result)] if result is not None else []) + [ONE_CALL] * refused
    return Reply(
        tuple(Message(role="tool", content=text) for text in texts),
        tool_errors=refused + isinstance(result, ToolFailed),
    )


def argument(call: ToolCall, *, tool: str, name: str) -> str:
    """The only argument of a call of this tool. Raises ToolFailed."""
    if call.name != tool:
        raise ToolFailed("unknown tool")
    value = call.arguments.get(name)
    if len(call.arguments) != 1 or not isinstance(value, str):
        raise ToolFailed("wrong arguments")
    return value
