"""Guarantees to a client while a session runs and when it ends."""

import asyncio

import pytest

from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments.port import Reply, Score
from palimpsest.common.sessions.wire import Message, Session, Status, Step
from tests.unit.env_gateway.fakes import (
    HALF,
    WANTED,
    ManualClock,
    ScriptedWorld,
    a_step,
    begun,
    counter_value,
    reply,
    some_sessions,
    taken,
)


async def test_a_session_opens_with_the_task_and_ends_with_the_reward(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"), Score(0.75, True, {"call": 0.25, "answer": 0.5}))
    sessions = some_sessions(lambda: world, clock)
    opened = Session.model_validate_json(await sessions.create(WANTED, None))
    assert (opened.messages[0].content, opened.initial_state_hash) == ("task 3", "hash 3")
    assert (opened.next_step, opened.lease_expires_in_s, opened.environment_version) == (0, 600.0, "7")
    assert len(opened.session_id) == 32
    first = await taken(sessions, opened.session_id, 0)
    assert (first.step, first.status, first.reward) == (0, Status.RUNNING, None)
    assert first.messages == (Message(role="tool", content="4"),)
    last = await taken(sessions, opened.session_id, 1)
    assert (last.step, last.status, last.reward, last.success) == (1, Status.TERMINATED, 0.75, True)
    assert last.reward_parts == {"call": 0.25, "answer": 0.5}
    assert world.closed == 1


async def test_a_repeated_step_is_applied_once_and_gets_the_same_answer(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"), HALF)
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    first = await sessions.step(session, a_step(0))
    assert await sessions.step(session, a_step(0)) == first
    last = await sessions.step(session, a_step(1))
    assert await sessions.step(session, a_step(1)) == last
    assert len(world.turns) == 2


async def test_retries_during_a_step_wait_for_its_answer_and_are_not_applied(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"), reply("5"))
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    world.hold()
    asked = [asyncio.create_task(sessions.step(session, a_step(0))) for _ in range(8)]
    await world.entered.wait()
    world.gate.set()
    assert len(set(await asyncio.gather(*asked))) == 1
    assert len(world.turns) == 1


@pytest.mark.parametrize(("number", "text", "code"), [(0, "something else", "step_conflict"), (2, "hello", "step_gap")])
async def test_a_step_out_of_order_is_refused_with_the_next_number(
    clock: ManualClock, number: int, text: str, code: str
) -> None:
    world = ScriptedWorld(reply("4"))
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    await taken(sessions, session, 0)
    with pytest.raises(HttpError) as error:
        await sessions.step(session, a_step(number, text))
    assert (error.value.status, error.value.body["code"], error.value.body["next_step"]) == (409, code, 1)
    assert len(world.turns) == 1


async def test_a_step_after_the_end_is_refused(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(HALF), clock)
    session = await begun(sessions)
    await taken(sessions, session, 0)
    with pytest.raises(HttpError) as error:
        await taken(sessions, session, 1)
    assert (error.value.status, error.value.body["code"]) == (410, "gone")


async def test_finalize_scores_the_session_once(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"))
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    await taken(sessions, session, 0)
    first = await sessions.finalize(session)
    assert await sessions.finalize(session) == first
    ended = Step.model_validate_json(first)
    assert (ended.status, ended.reward, ended.reward_parts, ended.step) == (Status.TRUNCATED, 0.5, {"half": 0.5}, 1)
    assert (world.finalized, world.closed) == (1, 1)


async def test_finalize_of_an_ended_session_returns_its_last_reply(clock: ManualClock) -> None:
    world = ScriptedWorld(Score(1.0, True))
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    last = await sessions.step(session, a_step(0))
    assert await sessions.finalize(session) == last
    assert world.finalized == 0


async def test_closing_during_a_step_ends_the_session_at_once(clock: ManualClock) -> None:
    world = ScriptedWorld(HALF)
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    world.hold()
    step = asyncio.create_task(taken(sessions, session, 0))
    await world.entered.wait()
    sessions.close(session)
    sessions.close(session)
    assert world.closed == 1
    with pytest.raises(HttpError) as error:
        await step
    assert error.value.status == 410
    assert (sessions.state(session).status, sessions.state(session).reward) == (Status.CANCELLED, None)


async def test_closing_an_ended_or_unknown_session_changes_nothing(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(HALF), clock)
    session = await begun(sessions)
    await taken(sessions, session, 0)
    sessions.close(session)
    sessions.close("unknown")
    assert sessions.state(session).status is Status.TERMINATED


async def test_a_malformed_call_is_an_observation(clock: ManualClock) -> None:
    world = ScriptedWorld(Reply(()), reply("4"))
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    bad = "<tool_call>\n{broken\n</tool_call>"
    before = counter_value("palimpsest_gateway_tool_errors_total", environment="fake", cause="malformed")
    alone = await taken(sessions, session, 0, bad)
    assert (alone.status, [m.content for m in alone.messages]) == (Status.RUNNING, ["malformed tool call: not JSON"])
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    both = await taken(sessions, session, 1, good + bad)
    assert [m.content for m in both.messages] == ["malformed tool call: not JSON", "4"]
    assert [m.role for m in both.messages] == ["tool", "tool"]
    assert counter_value("palimpsest_gateway_tool_errors_total", environment="fake", cause="malformed") - before == 2


async def test_a_long_tool_result_is_truncated_with_a_note(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(reply("é" * 600), reply("é" * 500)), clock, result_bytes=1001)
    session = await begun(sessions)
    cut = await taken(sessions, session, 0)
    assert cut.messages[0].content == "é" * 500 + "\n[cut: 1200 bytes, 1001 are shown]"
    assert (await taken(sessions, session, 1)).messages[0].content == "é" * 500


async def test_steps_replays_and_rewards_are_counted(clock: ManualClock) -> None:
    names = {
        "palimpsest_gateway_steps_total": {"environment": "fake"},
        "palimpsest_gateway_replays_total": {"request": "step"},
        "palimpsest_gateway_sessions_created_total": {"environment": "fake"},
        "palimpsest_gateway_sessions_ended_total": {"environment": "fake", "status": "terminated"},
        "palimpsest_gateway_reward_sum": {"environment": "fake"},
        "palimpsest_gateway_live_sessions": {"environment": "fake"},
        "palimpsest_gateway_step_seconds_count": {"environment": "fake"},
    }
    before = [counter_value(name, **labels) for name, labels in names.items()]
    sessions = some_sessions(lambda: ScriptedWorld(reply("4"), HALF), clock)
    done, _ = await begun(sessions), await begun(sessions)
    for number in (0, 0, 0, 1, 1):
        await taken(sessions, done, number)
    after = [counter_value(name, **labels) for name, labels in names.items()]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 3, 2, 1, 0.5, 1, 2]
