"""The messages of Anthropic: requests, replies and streams. Source: Anthropic's API reference. Pure."""

import json
from collections.abc import Iterator
from typing import Any

from palimpsest.services.rollout.agents.conversation import ChatMessage
from palimpsest.services.rollout.agents.openai_chat import MODEL, Body
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


def parse(body: Any, *, temperature: float) -> ModelRequest:
    """Return what a request asks for. Raises Refused."""
    fields = Fields(body, temperature=temperature)
    system = text_of(fields.take("system", (str, list), ""), "text")
    messages = [ChatMessage("system", system)] if system else []
    messages += [part for one in fields.take("messages", list, []) for part in _chat_messages(one)]
    tools = tuple(_tool(one) for one in fields.take("tools", list, []))
    stream = bool(fields.take("stream", bool, False))
    limit = fields.limit("max_tokens")
    fields.sampling()
    why = "the model chooses, also several tools; a forced choice would need restricted sampling"
    fields.only("tool_choice", {"type": "auto"}, {"type": "auto", "disable_parallel_tool_use": False}, why=why)
    fields.only("stop_sequences", [], why="stop texts are not supported; leave it out")
    fields.only("thinking", {"type": "disabled"}, why="the model reasons as its chat template says; leave it out")
    fields.accept("model", "metadata", "service_tier", "cache_control")
    fields.finish()
    return ModelRequest(check_messages(messages), tools, limit, stream)


def reply(done: Completion, created: int) -> Body:  # noqa: ARG001 - the other endpoints tell the time
    """Return the reply without streaming."""
    return _message(done, _blocks(done), _reason(done), done.completion_tokens)


def events(done: Completion, created: int) -> Iterator[tuple[str, Body | str]]:  # noqa: ARG001
    """Yield the events of a stream: name and data."""

    def event(kind: str, **more: Any) -> tuple[str, Body]:
        return kind, {"type": kind, **more}

    yield event("message_start", message=_message(done, [], None, 0))
    for index, block in enumerate(_blocks(done)):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"], ensure_ascii=False)}
        yield event("content_block_start", index=index, content_block=empty)
        yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    usage = {"output_tokens": done.completion_tokens}
    yield event("message_delta", delta={"stop_reason": _reason(done), "stop_sequence": None}, usage=usage)
    yield event("message_stop")


def error_body(error: Refused) -> Body:
    """Return the body of an error reply."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
        error.status, "invalid_request_error" if error.status < 500 else "api_error"
    )
    return {"type": "error", "error": {"type": kind, "message": f"{error.code}: {error}"}}


def _chat_messages(message: Any) -> list[ChatMessage]:
    """Return the messages in one of Anthropic's: tool results in a user message are messages of the tools."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise Refused("the role of a message must be user or assistant", param="messages")
    content = message.get("content")
    if not isinstance(content, list):
        return [ChatMessage(message["role"], text_of(content))]
    calls = tuple(call_of(one.get("name"), one.get("input")) for one in content if _is(one, "tool_use"))
    results = [one for one in content if _is(one, "tool_result")]
    rest = [one for one in content if not (_is(one, "tool_use") or _is(one, "tool_result"))]
    text = text_of(rest, "text")
    if message["role"] == "assistant":
        if results:
            raise Refused("a message of the model holds a tool result", param="messages")
        return [ChatMessage("assistant", text, calls)]
    if calls:
        raise Refused("a message of the user holds a tool call", param="messages")
    answers = [ChatMessage("tool", text_of(one.get("content"), "text")) for one in results]
    return answers + ([ChatMessage("user", text)] if text or not answers else [])


def _is(block: Any, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind


def _tool(tool: Any) -> Body:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        raise Refused("a tool must have an `input_schema` and run in the program", param="tools")
    return tool_schema(tool.get("name"), tool.get("description"), tool.get("input_schema"), tool.get("strict"))


def _blocks(done: Completion) -> list[Body]:
    blocks: list[Body] = [{"type": "text", "text": done.content}] if done.content or not done.calls else []
    blocks += [
        {"type": "tool_use", "id": one.id, "name": one.call.name, "input": json.loads(one.call.arguments)}
        for one in done.calls
    ]
    return blocks


def _reason(done: Completion) -> str:
    return ("tool_use" if done.calls else "end_turn") if done.stopped else "max_tokens"


def _message(done: Completion, content: list[Body], reason: str | None, output_tokens: int) -> Body:
    return {
        "id": done.id,
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": done.prompt_tokens, "output_tokens": output_tokens},
    }
