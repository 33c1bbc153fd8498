"""What a request for a model message asks for, and the refusal of what would make its log-probs meaningless. Pure.

A parameter that changes the distribution that tokens are sampled from (top_p, penalties, stop texts, a response format)
is refused with a sentence, never ignored: the learner computes old log-probs of the plain distribution at the run's
temperature. Parameters that only label a request are accepted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from palimpsest.services.rollout.agents.conversation import Call, ChatMessage, call


class Refused(Exception):
    """A request that is not served. `code` is for programs, the text for people."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request", param: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request for the next model message."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...]
    max_tokens: int | None
    stream: bool
    usage: bool = True
    """Whether a stream ends with the usage."""


@dataclass(frozen=True, slots=True)
class DeliveredCall:
    """A tool call as delivered."""

    id: str
    call: Call


@dataclass(frozen=True, slots=True)
class Completion:
    """A model message as delivered."""

    id: str
    content: str
    calls: tuple[DeliveredCall, ...]
    stopped: bool
    """Whether the model ended its message, rather than a limit."""
    prompt_tokens: int
    completion_tokens: int
    request: ModelRequest = field(repr=False)


class Fields:
    """The fields of a request body, each of which must be taken or refused."""

    def __init__(self, body: Any, *, temperature: float) -> None:
        if not isinstance(body, Mapping):
            raise Refused("the body must be a JSON object")
        self._left, self._temperature = dict(body), temperature

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field; `default` if it is absent or null. Raises Refused if it is of another type."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Refused(f"`{name}` has the wrong type ({type(value).__name__})", param=name)
        return value

    def accept(self, *names: str) -> None:
        """Take fields that change nothing about the tokens."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *permitted: Any, why: str) -> None:
        """Refuse a field unless it is absent, null or one of these values."""
        value = self._left.pop(name, None)
        if value is not None and not any(value == one and type(value) in (type(one), int) for one in permitted):
            raise Refused(f"`{name}` is {json.dumps(value)[:100]}: {why}", param=name)

    def sampling(self) -> None:
        """Take or refuse the usual parameters of sampling."""
        exact = "old log-probs are exact for the plain distribution only"
        wanted = self._temperature
        self.only("temperature", wanted, why=f"this run samples at temperature {wanted:g}; leave it out")
        self.only("top_p", 1.0, why=f"{exact}; leave it out")
        self.only("top_k", 0, -1, why=f"{exact}; leave it out")
        for name in ("frequency_penalty", "presence_penalty"):
            self.only(name, 0.0, why=f"{exact}; leave it out")

    def limit(self, *names: str) -> int | None:
        """Return the smallest of the length limits with these names; None without any."""
        found = [value for name in names if (value := self.take(name, int)) is not None]
        if any(value < 1 for value in found):
            raise Refused(f"`{names[0]}` must be at least 1", param=names[0])
        return min(found, default=None)

    def finish(self) -> None:
        """Refuse what is left."""
        for name, value in self._left.items():
            if value is not None:
                raise Refused(f"`{name}` is not supported: leave it out (docs/agents.md lists what is)", param=name)


def text_of(content: Any, *kinds: str) -> str:
    """Return the text of a message's content: a text, or parts of these kinds. Raises Refused."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise Refused("the content of a message must be a text or a list of text parts", param="messages")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Refused(f"a part of a message is of type {kind!r}; only text is supported", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def call_of(name: Any, arguments: Any) -> Call:
    """Return a tool call of an earlier message; its arguments are an object or its JSON. Raises Refused."""
    try:
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    if not isinstance(name, str) or not isinstance(parsed, dict):
        raise Refused("a tool call of an earlier message has no name, or arguments that are no JSON object")
    return call(name, parsed)


def tool_schema(name: Any, description: Any, parameters: Any, strict: Any = None) -> dict[str, Any]:
    """Return a tool in the form of chat templates. Raises Refused."""
    if not isinstance(name, str) or not name:
        raise Refused("a tool has no name", param="tools")
    if strict:
        raise Refused(
            f"tool {name}: `strict` would restrict which tokens can be sampled, so old log-probs would be wrong; set "
            f"it to false",
            param="tools",
        )
    function = {"name": name, "description": description or "", "parameters": parameters or {"type": "object"}}
    return {"type": "function", "function": function}


def check_messages(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages. Raises Refused if there are none or the last one is the model's."""
    if not messages:
        raise Refused("a request needs at least one message", param="messages")
    if messages[-1].role == "assistant":
        raise Refused("the last message must not be the model's: it cannot be continued inside", param="messages")
    return tuple(messages)
