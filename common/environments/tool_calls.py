"""Parses tool calls in the text of a model, in the format of Hermes and Qwen3.

    <tool_call>
    {"name": "lookup", "arguments": {"key": "amber"}}
    </tool_call>

A message may hold several calls. The JSON is strict: exactly these two fields, no NaN, no lone surrogates. A malformed
call becomes a remark for the model, so `read` never raises.
"""

import json
import re
from typing import Any

import msgspec

from palimpsest.common.environments.port import Malformed, Turn
from palimpsest.common.sessions.wire import Action, MessageAction, TextAction, ToolCall, ToolCallsAction

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, END_THINK = "<think>", "</think>"
_TAG = re.compile(f"{OPEN}|{THINK}")
MAX_CALLS = 8
"""Maximum number of calls per message; one remark answers the rest."""


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]


_call = msgspec.json.Decoder(_Call)
_json = json.JSONDecoder()


def turn(action: Action) -> Turn:
    """Convert an action to a turn."""
    match action:
        case TextAction():
            return read(action.text)
        case ToolCallsAction():
            return Turn("", action.calls)
        case MessageAction():
            return Turn(action.content.strip())


def read(text: str) -> Turn:
    """Parse the text and the calls of a model message. Its reasoning is left out, even if it has no end.

    >>> read('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    Turn(text='Wait.', attempts=(ToolCall(id='', name='add', arguments={'a': 1}),))
    """
    rest = text.partition(END_THINK)[2] if END_THINK in text else text
    texts: list[str] = []
    attempts: list[ToolCall | Malformed] = []
    while found := _TAG.search(rest):
        texts.append(rest[: found.start()])
        rest = rest[found.end() :]
        if found[0] == THINK:
            rest = rest.partition(END_THINK)[2]  # empty if the reasoning has no end
            continue
        if len(attempts) == MAX_CALLS:
            attempts.append(Malformed(f"more than {MAX_CALLS} calls in one message"))
            rest = ""
            break
        attempt, rest = _attempt(rest)
        attempts.append(attempt)
    texts.append(rest)
    return Turn("".join(texts).strip(), tuple(attempts))


def render(name: str, arguments: dict[str, Any]) -> str:
    """Return the call in the format that `read` parses."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, allow_nan=False)
    body = body.replace("</", "<\\/")  # equivalent JSON without a closing tag inside
    return f"{OPEN}\n{body}\n{CLOSE}"


def remark(malformed: Malformed) -> str:
    """Return the message for the model about a malformed call."""
    return f"malformed tool call: {malformed.problem}"


def _attempt(rest: str) -> tuple[ToolCall | Malformed, str]:
    """Parse one call from the text after its opening tag. Return it and the text after its end."""
    start = len(rest) - len(rest.lstrip())
    try:
        _, end = _json.raw_decode(rest, start)
    except (ValueError, RecursionError):
        end = -1
    if end >= 0 and rest[end:].lstrip().startswith(CLOSE):
        return _strict(rest[start:end]), rest[end:].lstrip().removeprefix(CLOSE)
    body, closed, after = rest.partition(CLOSE)
    if not closed:
        return Malformed(f"no {CLOSE}"), ""
    return _strict(body.strip()), after


def _strict(body: str) -> ToolCall | Malformed:
    try:
        call = _call.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        return Malformed(_brief(error))
    return ToolCall(name=call.name, arguments=call.arguments)


def _brief(error: Exception) -> str:
    """Return a short line about the error, with a bounded length."""
    if isinstance(error, msgspec.ValidationError):
        return str(error)[:200]
    return "not JSON" if isinstance(error, msgspec.DecodeError) else "not JSON that can be taken"
