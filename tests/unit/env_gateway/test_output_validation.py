"""Forms of a valid value that an author may return, and what the error names otherwise."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from palimpsest.common.environments.port import EnvironmentFailed, Opening, Reply, Score, tool
from palimpsest.common.sessions.output_validation import (
    OPENING_BYTES,
    check_opening,
    check_outcome,
    check_score,
)
from palimpsest.common.sessions.wire import Message
from palimpsest.services.env_gateway.processes.protocol import ChildResponse

TOOL_MESSAGE = Message(role="tool", content="5")


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (1, 1.0),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.float16(0.125), 0.125),
        (np.int64(1), 1.0),
        (np.array(0.75), 0.75),
        (np.array(1), 1.0),
        (Fraction(1, 4), 0.25),
        (sum([np.float32(0.1)] * 10, start=np.float32(0)), 1.0),  # 1.0000001 in float32
        (1 + 9e-7, 1.0),
        (-9e-7, 0.0),
        (-0.0, 0.0),
    ],
)
def test_equivalent_rewards_are_plain_floats_within_their_bounds(reward: Any, expected: float) -> None:
    checked = check_score(Score(reward, np.bool_(True), {"part": reward}))
    assert (checked.reward, type(checked.reward), checked.success) == (expected, float, True)
    assert type(checked.success) is bool
    assert type(checked.parts["part"]) is float
    assert (
        ChildResponse.model_validate_json(ChildResponse(score=checked).model_dump_json(), strict=True).score == checked
    )


def test_lists_are_tuples_and_numpy_values_in_a_schema_are_plain() -> None:
    schema = tool("pick", "Pick.", n="Which")
    given = {**schema, "limits": {"most": np.int64(3), "allowed": np.array([1, 2])}, "names": ("a",)}
    opening = check_opening(Opening([TOOL_MESSAGE], [given]))  # type: ignore[arg-type]
    assert opening == Opening((TOOL_MESSAGE,), ({**schema, "limits": {"most": 3, "allowed": [1, 2]}, "names": ["a"]},))
    assert check_outcome(Reply([TOOL_MESSAGE], np.int32(2))) == Reply((TOOL_MESSAGE,), 2)  # type: ignore[arg-type]
    assert check_outcome(Score(1, True, [("part", 1)])) == Score(1.0, True, {"part": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Score(np.array([0.5]), True), "reward is array([0.5]), not a number in [0, 1]"),  # type: ignore[arg-type]
        (Score(np.float32("nan"), True), "reward is "),  # type: ignore[arg-type]
        (Score(np.bool_(True), True), "reward is "),  # type: ignore[arg-type]
        (Score(1 + 2e-6, True), "reward is 1.000002, not a number in [0, 1]"),
        (Score(1.0, np.int64(1)), "success is "),  # type: ignore[arg-type]
        (Score(1.0, True, {"a": "x"}), "reward part 'a' is 'x', not a number with a name"),  # type: ignore[dict-item]
        (Reply((TOOL_MESSAGE,), 0.5), "tool_errors is 0.5, not a count"),  # type: ignore[arg-type]
        (Reply("text"), "messages are 'text', not a tuple or list of Messages"),  # type: ignore[arg-type]
        (Reply(["text"]), "'text' is not a Message"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_value_is_named(returned: Any, message: str) -> None:
    with pytest.raises(EnvironmentFailed) as failed:
        check_outcome(returned)
    assert failed.value.code == "environment_invalid"
    assert str(failed.value).startswith(message)


def test_an_opening_beyond_the_limit_is_refused_with_its_size() -> None:
    tools = (tool("pick", "Pick."),)
    room = OPENING_BYTES - len(json.dumps(tools))
    assert check_opening(Opening((Message(role="user", content="a" * room),), tools)).tools == tools
    with pytest.raises(EnvironmentFailed, match=f"take {OPENING_BYTES + 1} bytes; at most {OPENING_BYTES} are allowed"):
        check_opening(Opening((Message(role="user", content="a" * (room - 1) + "é"),), tools))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("lookup", "tools are 'lookup', not a tuple or list of schemas"),
        (["lookup"], "a tool's schema is 'lookup', not a mapping"),
        ([{"most": float("nan")}], "a tool's schema is not JSON: "),
        ([{"most": {1, 2}}], "a tool's schema is not JSON: {1, 2} has no form in JSON"),
    ],
)
def test_an_invalid_schema_is_named(tools: Any, message: str) -> None:
    with pytest.raises(EnvironmentFailed) as failed:
        check_opening(Opening((TOOL_MESSAGE,), tools))
    assert str(failed.value).startswith(message)
