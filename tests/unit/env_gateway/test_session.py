"""The examples in docstrings, and the memory that an ended session keeps."""

import doctest

import pytest

from palimpsest.common.sessions.wire import CreateSession, Message, Status, Step
from palimpsest.services.env_gateway.environments import calculator, tool_calls
from palimpsest.services.env_gateway.session import LiveSession
from tests.unit.env_gateway.fakes import ScriptedWorld


@pytest.mark.parametrize("module", [tool_calls, calculator])
def test_docstring_examples_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


async def test_an_ended_session_keeps_its_last_reply_only() -> None:
    ended: list[LiveSession] = []
    session = LiveSession(
        id="s", wanted=CreateSession(environment="fake", seed=0), key=None, lease_until=0.0, on_end=ended.append,
        world=ScriptedWorld(), opened=b"{}",
    )  # fmt: skip
    for number in range(3):
        message = Message(role="tool", content=str(number))
        session.replied(b"action", Step(step=number, status=Status.RUNNING, messages=(message,)))
    assert [session.stored(number, b"action") is None for number in range(4)] == [False, False, False, True]
    last = session.replied(b"action", Step(step=3, status=Status.TERMINATED, reward=1.0))
    assert ended == [session]
    assert (session.world, session.opened) == (None, None)
    assert session.stored(3, b"action") == last
    for number in (0, 1, 2, 4):
        with pytest.raises(Exception, match="over: terminated"):
            session.stored(number, b"action")


async def test_a_session_ends_once() -> None:
    session = LiveSession(
        id="s", wanted=CreateSession(environment="fake", seed=0), key=None, lease_until=0.0, on_end=lambda _: None
    )
    session.end_without_reward(Status.EXPIRED)
    with pytest.raises(AssertionError, match="ends once"):
        session.end_without_reward(Status.CANCELLED)
