"""Limits of turns, calls and texts of a session. Each is also switched off, and then the session continues."""

from typing import Any

import pytest

from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments.port import EnvironmentFailed
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.wire import Message, Status, Step
from tests.unit.env_gateway.fakes import ManualClock, ScriptedWorld, begun, counter_value, reply, some_sessions, taken

OFF = 10**9
CALLS = render("add", {}) * 2
LONG = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 30
CASES = (
    ("turns", {"turns": 3}, "hello", "4", "env_gateway.session_turns permits 3 messages"),
    ("calls", {"calls": 5}, CALLS, "4", "env_gateway.session_calls permits 5 calls"),
    (
        "output_bytes",
        {"output_bytes": 170, "result_bytes": 40},
        "hello",
        LONG,
        "session_output_bytes permits 170 bytes",
    ),
)
"""Limit, its value, the model's message, the environment's. Each ends the session at the third message."""
cases = pytest.mark.parametrize(("limit", "limits", "text", "answer", "sentence"), CASES, ids=[one[0] for one in CASES])


async def three_steps(world: ScriptedWorld, clock: ManualClock, text: str, limits: dict[str, Any]) -> list[Step]:
    """Take three steps; the third is repeated, and a fourth is refused if the session is over."""
    sessions = some_sessions(lambda: world, clock, **limits)
    session = await begun(sessions)
    steps = [await taken(sessions, session, number, text) for number in range(3)]
    assert await taken(sessions, session, 2, text) == steps[-1]
    if steps[-1].status.is_terminal:
        with pytest.raises(HttpError, match="the session is over: truncated"):
            await taken(sessions, session, 3, text)
    return steps


@cases
async def test_a_session_at_a_limit_is_truncated_with_its_score_and_a_sentence(
    clock: ManualClock, limit: str, limits: dict[str, Any], text: str, answer: str, sentence: str
) -> None:
    world = ScriptedWorld(*[reply(answer)] * 3)
    before = counter_value("palimpsest_gateway_sessions_limited_total", environment="fake", limit=limit)
    failures = {"environment": "fake", "code": f"limit_{limit}"}
    steps = await three_steps(world, clock, text, limits)
    assert [step.status for step in steps] == [Status.RUNNING, Status.RUNNING, Status.TRUNCATED]
    assert (steps[-1].reward, steps[-1].success, steps[-1].messages) == (0.5, False, ())
    assert steps[-1].error is not None
    assert steps[-1].error.code == f"limit_{limit}"
    assert sentence in steps[-1].error.message
    assert world.finalized == world.closed == 1
    assert counter_value("palimpsest_gateway_sessions_limited_total", environment="fake", limit=limit) == before + 1
    assert counter_value("palimpsest_gateway_environment_failures_total", **failures) == 0


@cases
async def test_without_the_limit_the_session_continues(
    clock: ManualClock, limit: str, limits: dict[str, Any], text: str, answer: str, sentence: str
) -> None:
    world = ScriptedWorld(*[reply(answer)] * 3)
    steps = await three_steps(world, clock, text, {**limits, limit: OFF})
    assert [step.status for step in steps] == [Status.RUNNING] * 3
    assert all(step.error is None for step in steps)
    assert world.finalized == 0


async def test_calls_beyond_the_limit_do_not_reach_the_environment(clock: ManualClock) -> None:
    world = ScriptedWorld(*[reply("4")] * 3)
    await three_steps(world, clock, CALLS, {"calls": 5})
    assert [len(turn.calls) for turn in world.turns] == [2, 2]


async def test_an_environment_that_cannot_score_at_the_limit_gives_no_reward(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"), final=EnvironmentFailed("environment_raised", "broken"))
    sessions = some_sessions(lambda: world, clock, turns=1)
    step = await taken(sessions, await begun(sessions), 0)
    assert (step.status, step.reward) == (Status.ERROR, None)
    assert step.error is not None
    assert step.error.code == "environment_raised"


async def test_messages_of_a_truncated_result_keep_their_note(clock: ManualClock) -> None:
    world = ScriptedWorld(reply(LONG))
    sessions = some_sessions(lambda: world, clock, result_bytes=40, output_bytes=60)
    step = await taken(sessions, await begun(sessions), 0)
    assert step.messages == (Message(role="tool", content=LONG[:20] + "\n[cut: 60 bytes, 40 are shown]"),)
