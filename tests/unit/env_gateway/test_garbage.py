"""Invalid results and errors of an environment never become a reward."""

import math
from typing import Any

import pytest

from palimpsest.common.environments.port import Opening, Reply, Score, Turn
from palimpsest.common.sessions.hosts import InProcess
from palimpsest.common.sessions.wire import Message, Status, Step
from tests.unit.env_gateway.fakes import ManualClock, begun, counter_value, reply, some_sessions, taken


class Environment:
    """An environment that returns or raises the given outcome."""

    version = "1"

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def reset(self, seed: int) -> Opening:
        return Opening((Message(role="user", content=str(seed)),))

    def step(self, turn: Turn) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def finalize(self) -> Any:
        return self.step(Turn(""))

    def state_hash(self) -> str:
        return ""


GARBAGE = [
    Score(math.nan, True),
    Score(math.inf, True),
    Score(-math.inf, True),
    Score(1.00001, True),
    Score(-0.00001, True),
    Score(10**400, True),
    Score("1.0", True),  # type: ignore[arg-type]
    Score(True, True),
    Score(None, True),  # type: ignore[arg-type]
    Score(1.0, 1),  # type: ignore[arg-type]
    Score(1.0, True, {"part": math.nan}),
    Score(1.0, True, {1: 1.0}),  # type: ignore[dict-item]
    Score(1.0, True, 5),  # type: ignore[arg-type]
    1.0,
    None,
    {"reward": 1.0},
    Reply(()),
    Reply(("text",)),  # type: ignore[arg-type]
    Reply((Message(role="tool", content="\ud800"),)),
    Reply((Message.model_construct(role="root", content="x"),)),
    Reply((Message.model_construct(role="tool", content=5),)),
    Reply((Message(role="tool", content="x"),), tool_errors=-1),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=[str(number) for number in range(len(GARBAGE))])
async def test_garbage_from_an_environment_never_becomes_a_reward(clock: ManualClock, garbage: Any) -> None:
    sessions = some_sessions(lambda: InProcess(Environment(garbage)), clock)
    ended = await taken(sessions, await begun(sessions), 0)
    assert (ended.status, ended.reward, ended.success, ended.messages) == (Status.ERROR, None, None, ())
    assert ended.error is not None
    assert ended.error.code == "environment_invalid"


@pytest.mark.parametrize("garbage", [*GARBAGE[:16], reply("a reply")], ids=[str(number) for number in range(17)])
async def test_garbage_from_finalize_never_becomes_a_reward(clock: ManualClock, garbage: Any) -> None:
    sessions = some_sessions(lambda: InProcess(Environment(garbage)), clock)
    ended = Step.model_validate_json(await sessions.finalize(await begun(sessions)))
    assert (ended.status, ended.reward) == (Status.ERROR, None)


async def test_an_environment_that_raises_ends_its_session_with_its_message(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: InProcess(Environment(ZeroDivisionError("by zero"))), clock)
    session = await begun(sessions)
    before = counter_value(
        "palimpsest_gateway_environment_failures_total", environment="fake", code="environment_raised"
    )
    ended = await taken(sessions, session, 0)
    assert (ended.status, ended.reward) == (Status.ERROR, None)
    assert ended.error is not None
    assert (ended.error.code, ended.error.message) == ("environment_raised", "ZeroDivisionError: by zero")
    assert await taken(sessions, session, 0) == ended
    after = counter_value(
        "palimpsest_gateway_environment_failures_total", environment="fake", code="environment_raised"
    )
    assert after - before == 1
