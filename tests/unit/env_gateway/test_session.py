"""The examples in docstrings, and the memory that an ended session keeps."""

import doctest

import pytest

from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments import calculator, tool_calls
from palimpsest.common.sessions import live_session as session_module
from palimpsest.common.sessions.live_session import LiveSession
from palimpsest.common.sessions.session_store import SessionStore
from palimpsest.common.sessions.wire import CreateSession, Message, Status, Step
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


async def test_the_replies_of_a_running_session_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "REPLY_BYTES", 1000)
    session = LiveSession(
        id="s", wanted=CreateSession(environment="fake", seed=0), key=None, lease_until=0.0, on_end=lambda _: None,
    )  # fmt: skip
    replies = [session.replied(b"a" * 300, Step(step=number, status=Status.RUNNING)) for number in range(9)]
    kept = 1000 // (300 + len(replies[0]))
    assert session.bytes == session_module.SESSION_BYTES + kept * (300 + len(replies[0]))
    assert session.stored(8, b"a" * 300) == replies[8]
    assert session.stored(9 - kept, b"a" * 300) == replies[9 - kept]
    with pytest.raises(HttpError, match=f"the reply to step {8 - kept} is not kept any more"):
        session.stored(8 - kept, b"a" * 300)
    long = session.replied(b"a" * 2000, Step(step=9, status=Status.RUNNING))
    assert session.stored(9, b"a" * 2000) == long, "the last reply is kept at any size"


async def test_remembered_sessions_are_bounded_in_bytes() -> None:
    store = SessionStore(remember=100, remember_s=60.0, remember_bytes=10_000)
    names = []
    for number in range(10):
        session = LiveSession(
            id=f"s{number}", wanted=CreateSession(environment="fake", seed=0), key=None, lease_until=0.0,
            on_end=lambda session: store.mark_ended(session, 0.0),
        )  # fmt: skip
        store.add(session)
        session.replied(b"a" * 1000, Step(step=0, status=Status.TERMINATED, reward=1.0, success=True))
        names.append(session.id)
    remembered = [name for name in names if store.find(name)]
    assert remembered == names[-3:], "each takes over 3,000 bytes"
    assert store.status()["remembered_bytes"] == sum(store.find(name).bytes for name in remembered)  # type: ignore[union-attr]
