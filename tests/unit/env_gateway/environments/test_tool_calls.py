"""Parsing tool calls in a model's message."""

import math
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from palimpsest.common.environments.port import Malformed, Turn
from palimpsest.common.environments.tool_calls import MAX_CALLS, read, render, turn
from palimpsest.common.sessions.wire import MessageAction, TextAction, ToolCall, ToolCallsAction

PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"', '{"name": "f", "arguments": {}}', "\n", "\\"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CALLS = st.tuples(st.text(), st.dictionaries(st.text(), JSON, max_size=4))


@settings(deadline=None)
@given(st.text() | st.lists(PIECES | st.text(max_size=5)).map("".join))
@example("<tool_call>" + '{"a":' * 100_000)
@example("<tool_call>" + "[" * 100_000 + "</tool_call>")
@example("<tool_call>" + "9" * 10_000 + "</tool_call>")
@example("<tool_call>" * 1000)
@example("<tool_call>\ud800</tool_call>")
def test_parsing_never_fails(text: str) -> None:
    found = read(text)
    assert len(found.attempts) <= MAX_CALLS + 1
    assert found.text == found.text.strip()


@settings(deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=MAX_CALLS), st.text(alphabet="ab <>/{\n"))
@example([("f", {"x": "</tool_call><tool_call></think><think>"})], "")
def test_well_formed_calls_are_parsed_unchanged(calls: list[tuple[str, dict[str, Any]]], between: str) -> None:
    found = read(between.join(["", *(render(name, arguments) for name, arguments in calls), ""]))
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.attempts == found.calls


def test_the_form_is_that_of_qwen3() -> None:
    text = '<tool_call>\n{"name": "lookup", "arguments": {"key": "amber"}}\n</tool_call>'
    assert render("lookup", {"key": "amber"}) == text
    assert read(text) == Turn("", (ToolCall(name="lookup", arguments={"key": "amber"}),))


def test_a_closing_tag_inside_a_string_does_not_end_the_call() -> None:
    found = read('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call> then')
    assert found == Turn("then", (ToolCall(name="f", arguments={"x": "</tool_call>"}),))


def test_text_around_calls_is_kept_and_calls_stay_in_order() -> None:
    one, two = render("one", {}), render("two", {"x": 2})
    found = read(f" first {one} middle {two} last ")
    assert found.text == "first  middle  last"
    assert [call.name for call in found.calls] == ["one", "two"]
    assert found.answer is None


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "not JSON"),
        ("lookup(amber)", "not JSON"),
        ('{"name": "f", "arguments": {}', "not JSON"),
        ('{"name": "f", "arguments": {}} and more', "not JSON"),
        ('{"name": "f", "arguments": {"x": NaN}}', "not JSON"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "not JSON"),
        ("{'name': 'f', 'arguments': {}}", "not JSON"),
        ("[]", "Expected `object`, got `array`"),
        ('{"name": "f"}', "Object missing required field `arguments`"),
        ('{"arguments": {}}', "Object missing required field `name`"),
        ('{"name": 1, "arguments": {}}', "Expected `str`, got `int` - at `$.name`"),
        ('{"name": "f", "arguments": "{}"}', "Expected `object`, got `str` - at `$.arguments`"),
        ('{"name": "f", "arguments": {}, "id": 3}', "Object contains unknown field `id`"),
    ],
)
def test_the_problem_of_a_malformed_call_is_reported(body: str, problem: str) -> None:
    found = read(f"<tool_call>\n{body}\n</tool_call>")
    assert found.attempts == (Malformed(problem),)
    assert found.calls == ()
    assert found.answer is None


def test_an_unterminated_call_is_malformed() -> None:
    assert read('so <tool_call>\n{"name": "f", "arguments": {}}') == Turn("so", (Malformed("no </tool_call>"),))


def test_a_malformed_call_does_not_hide_the_next_one() -> None:
    found = read("<tool_call>{</tool_call>" + render("f", {}))
    assert found.attempts == (Malformed("not JSON"), ToolCall(name="f", arguments={}))


def test_calls_over_the_limit_are_reported_once() -> None:
    found = read(render("f", {}) * (MAX_CALLS + 3))
    assert len(found.calls) == MAX_CALLS
    assert found.attempts[-1] == Malformed("more than 8 calls in one message")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nIs it 3? <tool_call>\n</think>\n\n4", "4"),
        ("it was opened in the prompt</think>4", "4"),
        ("<think>it never ends, so there is no message", ""),
        ("4 <think>", "4"),
        ("4 <think>or is it 5", "4"),
        ("<think>a</think>4<think>b</think>2<think>c", "42"),
    ],
)
def test_reasoning_is_not_part_of_the_answer(text: str, answer: str) -> None:
    assert read(text).answer == answer


CALL = render("f", {"x": "<think>"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<think>I could write {CALL}", 0),
        (f"Well. <think>I could write {CALL}", 0),
        (f"<think>no</think>Well. <think>I could write {CALL}", 0),
        (f"{CALL}<think>and again {CALL}", 1),
        (f"{CALL}{CALL}", 2),
        (f"<think>{CALL}</think>{CALL}", 1),
    ],
)
def test_a_call_inside_reasoning_is_not_executed(text: str, calls: int) -> None:
    found = read(text)
    assert found.attempts == (ToolCall(name="f", arguments={"x": "<think>"}),) * calls


def test_actions_of_every_type_become_turns() -> None:
    call = ToolCall(id="c1", name="f", arguments={"x": math.pi})
    assert turn(TextAction(type="text", text=" 4 ")) == Turn("4")
    assert turn(MessageAction(type="message", content=" <tool_call> ")) == Turn("<tool_call>")
    assert turn(ToolCallsAction(type="tool_calls", calls=(call,))) == Turn("", (call,))
