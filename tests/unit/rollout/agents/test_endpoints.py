"""The endpoints over real HTTP with the official clients of OpenAI and Anthropic."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
import pytest_asyncio

from palimpsest.common.environments.tool_calls import render
from palimpsest.services.rollout.agents.endpoints import serving
from palimpsest.services.rollout.agents.open_sessions import OpenSession
from palimpsest.services.rollout.agents.runner import AgentRunner
from tests.unit.rollout.agents.test_continuation import TOOLS, Playing
from tests.unit.rollout.sampling import Setting

CALL = render("lookup", {"key": "red"})
HELLO = [{"role": "user", "content": "hello"}]
FLAT: list[Any] = [{"type": "function", **TOOLS[0]["function"]}]
ANTHROPIC: list[Any] = [{"name": "lookup", "description": "", "input_schema": {"type": "object"}}]


class Served:
    """A session behind the endpoints, whose model messages are given."""

    def __init__(self, setting: Setting) -> None:
        self.playing, self.texts = Playing(setting), list[str]()
        self.playing._rng.choice = lambda _: self.texts.pop(0)  # type: ignore[method-assign, assignment, misc]
        self.runner = AgentRunner({}, None)  # type: ignore[arg-type]
        self.key = self.runner.open.add(OpenSession(self.playing.session, None, None, 2))  # type: ignore[arg-type]

    @property
    def sequences(self) -> int:
        return len(self.playing.session.sequences)

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.runner.address}/v1", api_key=self.key, **options)

    def anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.runner.address, api_key=self.key)

    async def post(self, path: str, body: Any) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            headers = {"Authorization": f"Bearer {self.key}"}
            return await client.post(f"{self.runner.address}{path}", json=body, headers=headers)


@pytest_asyncio.fixture
async def served(setting: Setting) -> AsyncIterator[Served]:
    made = Served(setting)
    with serving(made.runner):
        yield made


async def test_chat_completions_with_tools(served: Served) -> None:
    served.texts = [f"I look. {CALL}", "3"]
    async with served.openai() as client:
        first = await client.chat.completions.create(model="any", messages=HELLO, tools=TOOLS)  # type: ignore[call-overload]
        message = first.choices[0].message
        assert (message.content, first.choices[0].finish_reason) == ("I look.", "tool_calls")
        assert (message.tool_calls[0].function.name, message.tool_calls[0].function.arguments) == (
            "lookup",
            '{"key": "red"}',
        )
        assert first.usage.completion_tokens == len(served.playing.answers[0].tokens)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
        messages = [*HELLO, message.model_dump(exclude_none=True), result]
        second = await client.chat.completions.create(model="any", messages=messages, tools=TOOLS)  # type: ignore[call-overload]
        assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("3", "stop")
    assert served.sequences == 1


async def test_a_chat_stream_adds_up_to_the_message(served: Served) -> None:
    served.texts = [f"I look. {CALL}"]
    async with (
        served.openai() as client,
        client.chat.completions.stream(model="any", messages=HELLO, tools=TOOLS) as stream,  # type: ignore[arg-type]
    ):
        done = await stream.get_final_completion()
    assert done.choices[0].message.content == "I look."
    assert done.choices[0].message.tool_calls[0].function.arguments == '{"key": "red"}'  # type: ignore[index]
    assert done.choices[0].finish_reason == "tool_calls"


async def test_responses_with_tools_and_a_stream(served: Served) -> None:
    served.texts = [f"I look. {CALL}", "3"]
    async with served.openai() as client:
        first = await client.responses.create(model="any", instructions="be short", input="hello", tools=FLAT)
        assert first.output_text == "I look."
        items = [{"role": "user", "content": "hello"}, *[item.model_dump(exclude_none=True) for item in first.output]]
        items.append({"type": "function_call_output", "call_id": first.output[1].call_id, "output": "5"})  # type: ignore[union-attr]
        async with client.responses.stream(model="any", instructions="be short", input=items, tools=FLAT) as stream:  # type: ignore[arg-type]
            kinds = [event.type async for event in stream]
            second = await stream.get_final_response()
    assert second.output_text == "3"
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert served.sequences == 1


async def test_anthropic_messages_with_tools_and_a_stream(served: Served) -> None:
    served.texts = [f"I look. {CALL}", "3"]
    common: dict[str, Any] = {"model": "any", "max_tokens": 64, "system": "be short", "tools": ANTHROPIC}
    async with served.anthropic() as client:
        first = await client.messages.create(messages=HELLO, **common)  # type: ignore[arg-type]
        assert (first.stop_reason, first.content[0].text, first.content[1].input) == (
            "tool_use",
            "I look.",
            {"key": "red"},
        )  # type: ignore[union-attr]
        result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "5"}  # type: ignore[union-attr]
        messages = [
            *HELLO,
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
            {"role": "user", "content": [result]},
        ]
        async with client.messages.stream(messages=messages, **common) as stream:  # type: ignore[arg-type]
            assert [text async for text in stream.text_stream] == ["3"]
            second = await stream.get_final_message()
    assert (second.stop_reason, second.usage.output_tokens) == ("end_turn", len(served.playing.answers[1].tokens))
    assert served.sequences == 1


async def test_the_endpoints_share_one_conversation(served: Served) -> None:
    served.texts = ["3", "red"]
    async with served.openai() as client, served.anthropic() as other:
        first = await client.chat.completions.create(model="any", messages=HELLO)  # type: ignore[arg-type]
        messages = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}, *HELLO]
        await other.messages.create(model="any", max_tokens=9, messages=messages)  # type: ignore[arg-type]
    assert served.sequences == 1


REFUSED = (
    ("/v1/chat/completions", {"temperature": 0.2}, "temperature"),
    ("/v1/chat/completions", {"top_p": 0.9}, "top_p"),
    ("/v1/chat/completions", {"n": 2}, "n"),
    ("/v1/chat/completions", {"stop": ["x"]}, "stop"),
    ("/v1/chat/completions", {"logit_bias": {"1": 5}}, "logit_bias"),
    ("/v1/chat/completions", {"presence_penalty": 0.5}, "presence_penalty"),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", {"seed": 1}, "seed"),
    ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "I"}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ("/v1/chat/completions", {"tools": [{**TOOLS[0], "function": {"name": "a", "strict": True}}]}, "tools"),
    ("/v1/responses", {"previous_response_id": "a"}, "previous_response_id"),
    ("/v1/responses", {"reasoning": {"effort": "low"}}, "reasoning"),
    ("/v1/messages", {"stop_sequences": ["x"]}, "stop_sequences"),
    ("/v1/messages", {"top_k": 5}, "top_k"),
    ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
)


@pytest.mark.parametrize(("path", "fields", "name"), REFUSED)
async def test_what_would_change_the_sampling_is_refused(
    served: Served, path: str, fields: dict[str, Any], name: str
) -> None:
    body = {"model": "any", **({"input": "hello"} if path == "/v1/responses" else {"messages": HELLO}), **fields}
    reply = await served.post(path, body)
    assert reply.status_code == 400
    assert name in reply.text or "message" in reply.text
    assert served.playing.prompts == []


async def test_what_changes_nothing_is_accepted(served: Served) -> None:
    served.texts = ["3"]
    fields = {
        "temperature": 0.7, "top_p": 1, "n": 1, "stop": None, "presence_penalty": 0, "tool_choice": "auto",
        "parallel_tool_calls": True, "user": "me", "metadata": {}, "store": False, "max_tokens": 7,
        "response_format": {"type": "text"}, "seed": None,
    }  # fmt: skip
    reply = await served.post("/v1/chat/completions", {"model": "any", "messages": HELLO, **fields})
    assert reply.status_code == 200, reply.text


async def test_a_repeated_request_with_its_key_gets_the_same_message(served: Served) -> None:
    served.texts = ["3"]
    async with served.openai() as client:
        headers = {"Idempotency-Key": "one"}
        made = [
            await client.chat.completions.create(model="any", messages=HELLO, extra_headers=headers)  # type: ignore[arg-type]
            for _ in range(3)
        ]
    assert len({one.id for one in made}) == 1
    assert len(served.playing.prompts) == 1


async def test_a_client_that_leaves_ends_nothing(served: Served) -> None:
    served.texts = ["3"]
    started, release = asyncio.Event(), asyncio.Event()
    sample = served.playing.session._sample

    async def slow(*arguments: Any) -> Any:
        started.set()
        await release.wait()
        return await sample(*arguments)

    served.playing.session._sample = slow
    async with served.openai(max_retries=0) as client:
        headers = {"Idempotency-Key": "one"}
        create = client.chat.completions.create(model="any", messages=HELLO, extra_headers=headers)  # type: ignore[arg-type]
        lost = asyncio.create_task(create)
        await started.wait()
        lost.cancel()
        release.set()
        again = await client.chat.completions.create(model="any", messages=HELLO, extra_headers=headers)  # type: ignore[arg-type]
    assert again.choices[0].message.content == "3"
    assert served.sequences == 1


async def test_an_unknown_key_is_refused(served: Served) -> None:
    served.key = "session-other"
    async with served.openai(max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not of an open session"):
            await client.chat.completions.create(model="any", messages=HELLO)  # type: ignore[arg-type]
    async with served.anthropic() as client_2:
        with pytest.raises(anthropic.AuthenticationError):
            await client_2.messages.create(model="any", max_tokens=9, messages=HELLO)  # type: ignore[arg-type]


BAD_REWARDS = (
    {},
    {"reward": 2},
    {"reward": True},
    {"reward": "1"},
    {"reward": 1, "else": 0},
    {"reward": 1, "success": 1},
    [],
)


async def test_a_reward_ends_the_session(served: Served) -> None:
    served.texts = ["3"]
    for bad in BAD_REWARDS:
        assert (await served.post("/v1/session/reward", bad)).status_code == 400
    assert (await served.post("/v1/session/step", {"text": "3"})).status_code == 404
    assert (await served.post("/v1/session/reward", {"reward": 0.5, "parts": {"a": 0.5}})).json() == {"ended": True}
    posted = served.playing.session.reward.result()
    assert (posted.reward, posted.success, posted.parts) == (0.5, False, {"a": 0.5})
    late = await served.post("/v1/chat/completions", {"messages": HELLO})
    assert (late.status_code, late.json()["error"]["code"]) == (409, "session_ended")
