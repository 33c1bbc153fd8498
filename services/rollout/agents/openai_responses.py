"""The responses of OpenAI: requests, replies and streams. Source: OpenAI's API reference. Pure.

A program sends its whole conversation as `input`; `previous_response_id` is refused, because nothing is stored here
under the name of a response.
"""

from collections.abc import Iterator
from typing import Any

from palimpsest.services.rollout.agents.conversation import ChatMessage
from palimpsest.services.rollout.agents.openai_chat import MODEL, ROLES, Body
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

_TEXTS = ("input_text", "output_text", "text")


def parse(body: Any, *, temperature: float) -> ModelRequest:
    """Return what a request asks for. Raises Refused."""
    fields = Fields(body, temperature=temperature)
    given = fields.take("input", (str, list), [])
    instructions = fields.take("instructions", str, "")
    messages = [ChatMessage("system", instructions)] if instructions else []
    messages += [ChatMessage("user", given)] if isinstance(given, str) else _conversation(given)
    tools = tuple(_tool(one) for one in fields.take("tools", list, []))
    stream = bool(fields.take("stream", bool, False))
    limit = fields.limit("max_output_tokens")
    fields.sampling()
    fields.only("tool_choice", "auto", why="the model chooses; a forced choice would need restricted sampling")
    fields.only("parallel_tool_calls", True, why="the model may call several tools in one message")
    fields.only("text", {"format": {"type": "text"}}, {}, why="it would restrict which tokens can be sampled")
    fields.only("truncation", "disabled", why="the program decides what it sends")
    fields.only("include", [], why="it is not supported; leave it out")
    fields.only("background", False, why="it is not supported; leave it out")
    fields.accept("model", "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
    fields.finish()
    return ModelRequest(check_messages(messages), tools, limit, stream)


def reply(done: Completion, created: int) -> Body:
    """Return the reply without streaming."""
    return _response(done, created, status="completed" if done.stopped else "incomplete", output=_items(done))


def events(done: Completion, created: int) -> Iterator[tuple[str, Body | str]]:
    """Yield the events of a stream: name and data."""
    number = 0

    def event(kind: str, **more: Any) -> tuple[str, Body]:
        nonlocal number
        number += 1
        return kind, {"type": kind, "sequence_number": number - 1, **more}

    begun = _response(done, created, status="in_progress", output=[])
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(_items(done)):
        at = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part, text = item["content"][0], {**at, "content_index": 0}
            yield event("response.output_item.added", output_index=index, item={**item, "content": []})
            yield event("response.content_part.added", **text, part={**part, "text": ""})
            yield event("response.output_text.delta", **text, delta=part["text"], logprobs=[])
            yield event("response.output_text.done", **text, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **text, part=part)
        else:
            yield event("response.output_item.added", output_index=index, item={**item, "arguments": ""})
            yield event("response.function_call_arguments.delta", **at, delta=item["arguments"])
            yield event("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        yield event("response.output_item.done", output_index=index, item=item)
    kind = "response.completed" if done.stopped else "response.incomplete"
    yield event(kind, response=reply(done, created))


def _conversation(items: list[Any]) -> list[ChatMessage]:
    """Return the messages of `input`: calls that follow a message of the model belong to it."""
    conversation: list[ChatMessage] = []
    after_model = False
    for item in items:
        if not isinstance(item, dict):
            raise Refused("`input` must hold objects", param="input")
        kind = item.get("type") or "message"
        if kind == "message":
            if item.get("role") not in ROLES:
                raise Refused(f"the role of a message must be one of {', '.join(ROLES)}", param="input")
            conversation.append(ChatMessage(ROLES[item["role"]], text_of(item.get("content"), *_TEXTS)))
        elif kind == "function_call":
            called = call_of(item.get("name"), item.get("arguments"))
            last = conversation.pop() if after_model else ChatMessage("assistant", "")
            conversation.append(ChatMessage("assistant", last.content, (*last.calls, called)))
        elif kind == "function_call_output":
            conversation.append(ChatMessage("tool", text_of(item.get("output"), *_TEXTS)))
        else:
            raise Refused(f"an item of `input` is of type {kind!r}, which is not supported", param="input")
        after_model = conversation[-1].role == "assistant"
    return conversation


def _tool(tool: Any) -> Body:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise Refused("a tool must be of type `function`", param="tools")
    return tool_schema(tool.get("name"), tool.get("description"), tool.get("parameters"), tool.get("strict"))


def _items(done: Completion) -> list[Body]:
    items: list[Body] = []
    status = "completed" if done.stopped else "incomplete"
    if done.content or not done.calls:
        part = {"type": "output_text", "text": done.content, "annotations": [], "logprobs": []}
        items.append(
            {"type": "message", "id": f"msg_{done.id}", "status": status, "role": "assistant", "content": [part]}
        )
    items += [
        {
            "type": "function_call",
            "id": f"fc_{one.id}",
            "call_id": one.id,
            "name": one.call.name,
            "arguments": one.call.arguments,
            "status": "completed",
        }
        for one in done.calls
    ]
    return items


def _response(done: Completion, created: int, *, status: str, output: list[Body]) -> Body:
    ended = status != "in_progress"
    usage = {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
    return {
        "id": done.id,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "model": MODEL,
        "output": output,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage if ended else None,
    }
