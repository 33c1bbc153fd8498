"""The chat completions of OpenAI: requests, replies and streams. Source: OpenAI's API reference. Pure."""

from collections.abc import Iterator
from typing import Any

from palimpsest.services.rollout.agents.conversation import ChatMessage
from palimpsest.services.rollout.agents.requests import (
    Completion,
    Fields,
    ModelRequest,
    Refused,
    call_of,
    check_messages,
    text_of,
    tool_schema,
)

ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool", "assistant": "assistant"}
MODEL = "policy"
"""Name of the model in replies; a request may name any."""
Body = dict[str, Any]


def parse(body: Any, *, temperature: float) -> ModelRequest:
    """Return what a request asks for. Raises Refused."""
    fields = Fields(body, temperature=temperature)
    messages = [_chat_message(one) for one in fields.take("messages", list, [])]
    tools = tuple(_tool(one) for one in fields.take("tools", list, []))
    stream = bool(fields.take("stream", bool, False))
    options = fields.take("stream_options", dict, {})
    limit = fields.limit("max_tokens", "max_completion_tokens")
    fields.sampling()
    fields.only("n", 1, why="a request gets one message; send it again for another, which begins a branch")
    fields.only("tool_choice", "auto", why="the model chooses; a forced choice would need restricted sampling")
    fields.only("parallel_tool_calls", True, why="the model may call several tools in one message")
    fields.only("response_format", {"type": "text"}, why="it would restrict which tokens can be sampled")
    fields.only("logprobs", False, why="log-probs go to the learner, not to the program")
    for name in ("stop", "logit_bias", "functions", "modalities"):
        fields.only(name, [], {}, ["text"], why="it is not supported; leave it out")
    fields.accept("model", "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
    fields.finish()
    return ModelRequest(check_messages(messages), tools, limit, stream, bool(options.get("include_usage")))


def reply(done: Completion, created: int) -> Body:
    """Return the reply without streaming."""
    return {
        "id": done.id,
        "object": "chat.completion",
        "created": created,
        "model": MODEL,
        "choices": [{"index": 0, "message": _message(done), "finish_reason": _reason(done), "logprobs": None}],
        "usage": _usage(done),
    }


def events(done: Completion, created: int) -> Iterator[tuple[str, Body | str]]:
    """Yield the events of a stream: name (empty here) and data."""

    def chunk(choices: list[Body], **more: Any) -> Body:
        head = {"id": done.id, "object": "chat.completion.chunk", "created": created, "model": MODEL}
        return {**head, "choices": choices, **more}

    def delta(changed: Body, reason: str | None = None) -> Body:
        return chunk([{"index": 0, "delta": changed, "finish_reason": reason}])

    message = _message(done)
    yield "", delta({"role": "assistant", "content": message["content"] or ""})
    for index, one in enumerate(message.get("tool_calls", ())):
        yield "", delta({"tool_calls": [{"index": index, **one}]})
    yield "", delta({}, _reason(done))
    if done.request.usage:
        yield "", chunk([], usage=_usage(done))
    yield "", "[DONE]"


def error_body(error: Refused) -> Body:
    """Return the body of an error reply."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param or None, "code": error.code}}


def _chat_message(message: Any) -> ChatMessage:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(f"the role of a message must be one of {', '.join(ROLES)}", param="messages")
    calls = tuple(
        call_of((one.get("function") or {}).get("name"), (one.get("function") or {}).get("arguments"))
        for one in message.get("tool_calls") or ()
        if isinstance(one, dict)
    )
    return ChatMessage(ROLES[message["role"]], text_of(message.get("content"), "text"), calls)


def _tool(tool: Any) -> Body:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise Refused("a tool must be of type `function`", param="tools")
    return tool_schema(
        function.get("name"), function.get("description"), function.get("parameters"), function.get("strict")
    )


def _message(done: Completion) -> Body:
    message: Body = {"role": "assistant", "content": done.content or (None if done.calls else "")}
    if done.calls:
        message["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.call.name, "arguments": one.call.arguments}}
            for one in done.calls
        ]
    return message


def _reason(done: Completion) -> str:
    return ("tool_calls" if done.calls else "stop") if done.stopped else "length"


def _usage(done: Completion) -> Body:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
