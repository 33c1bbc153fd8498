"""Tool calls in the text of a model, in the form of Hermes and Qwen3.

    <tool_call>
    {"name": "lookup", "arguments": {"key": "amber"}}
    </tool_call>

A message may hold several. The JSON is strict: exactly these two fields, no NaN, no lone surrogates. What cannot be
read is no failure but something to tell the model, so `read` never raises.
"""

import json
from typing import Any

import msgspec

from palimpsest.common.sessions.wire import Action, MessageAction, TextAction, ToolCall, ToolCallsAction
from palimpsest.services.env_gateway.environments.port import Malformed, Turn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, END_THINK = "<think>", "</think>"
MAX_CALLS = 8
"""Calls read from one message; the rest is answered with one remark."""


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]


_call = msgspec.json.Decoder(_Call)
_json = json.JSONDecoder()


def turn(action: Action) -> Turn:
    """An action as an environment takes it."""
    match action:
        case TextAction():
            return read(action.text)
        case ToolCallsAction():
            return Turn("", action.calls)
        case MessageAction():
            return Turn(action.content.strip())


def read(text: str) -> Turn:
    """What a model message says and which calls it makes.

    >>> read('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    Turn(text='Wait.', attempts=(ToolCall(id='', name='add', arguments={'a': 1}),))
    """
    rest = _after_reasoning(text)
    said: list[str] = []
    attempts: list[ToolCall | Malformed] = []
    while OPEN in rest:
        before, _, rest = rest.partition(OPEN)
        said.append(before)
        if len(attempts) == MAX_CALLS:
            attempts.append(Malformed(f"more than {MAX_CALLS} calls in one message"))
            rest = ""
            break
        attempt, rest = _attempt(rest)
        attempts.append(attempt)
    said.append(rest)
    return Turn("".join(said).strip(), tuple(attempts))


def render(name: str, arguments: dict[str, Any]) -> str:
    """The call as a model should write it; `read` gives it back."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, allow_nan=False)
    body = body.replace("</", "<\\/")  # the same JSON, and no closing tag inside it
    return f"{OPEN}\n{body}\n{CLOSE}"


def remark(malformed: Malformed) -> str:
    """What the model is told about an attempt that could not be read."""
    return f"malformed tool call: {malformed.problem}"


def _after_reasoning(text: str) -> str:
    """The message without its reasoning; empty if the reasoning never ends."""
    head, ended, tail = text.partition(END_THINK)
    if ended:
        return tail
    return "" if head.lstrip().startswith(THINK) else head


def _attempt(rest: str) -> tuple[ToolCall | Malformed, str]:
    """Read one call from the text after its opening tag; also gives the text after its end."""
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
    """One line of fixed wording and bounded length."""
    if isinstance(error, msgspec.ValidationError):
        return str(error)[:200]
    return "not JSON" if isinstance(error, msgspec.DecodeError) else "not JSON that can be taken"
