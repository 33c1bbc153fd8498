"""Environments and clocks that a test controls."""

import asyncio
from collections.abc import Callable
from typing import Any

from palimpsest.common.environments.port import (
    EnvironmentFailed,
    Message,
    Opening,
    Outcome,
    Reply,
    Score,
    Turn,
)
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.sessions.hosts import EnvironmentHost
from palimpsest.common.sessions.registry import Entry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Session, Step, TakeStep, TextAction

WANTED = CreateSession(environment="fake", seed=3)
HALF = Score(0.5, False, {"half": 0.5})


class ManualClock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def reply(text: str) -> Reply:
    """A reply with one tool message."""
    return Reply((Message(role="tool", content=text),))


class ScriptedWorld:
    """A host that returns the given outcomes in turn and counts its calls; each call waits until `gate` is open."""

    def __init__(self, *outcomes: Outcome | EnvironmentFailed, final: Score | EnvironmentFailed = HALF) -> None:
        self.outcomes, self.final = list(outcomes), final
        self.turns: list[Turn] = []
        self.finalized = 0
        self.closed = 0
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    def hold(self) -> None:
        """Block the next call; `entered` is set when it arrives."""
        self.gate.clear()
        self.entered.clear()

    async def reset(self, seed: int) -> tuple[Opening, str]:
        await self._pass()
        return Opening((Message(role="user", content=f"task {seed}"),)), f"hash {seed}"

    async def step(self, turn: Turn) -> Outcome:
        self.turns.append(turn)
        await self._pass()
        return _given(self.outcomes.pop(0))

    async def finalize(self) -> Score:
        self.finalized += 1
        await self._pass()
        return _given(self.final)

    def close(self) -> None:
        self.closed += 1
        self.gate.set()

    async def _pass(self) -> None:
        self.entered.set()
        await self.gate.wait()


def _given(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def some_sessions(open_world: Callable[[], EnvironmentHost], clock: Callable[[], float], **limits: Any) -> Sessions:
    """Sessions of one environment named `fake`."""

    async def opened() -> EnvironmentHost:
        return open_world()

    numbers = {"max_sessions": 4, "lease_s": 600.0, "remember_s": 600.0, "result_bytes": 1000, **limits}
    return Sessions({"fake": Entry("fake", "7", "", False, opened)}, SessionLimits(**numbers), clock=clock)


async def begun(sessions: Sessions, key: str | None = None) -> str:
    """Create a session of the fake environment."""
    return Session.model_validate_json(await sessions.create(WANTED, key)).session_id


async def taken(sessions: Sessions, session_id: str, number: int, text: str = "hello") -> Step:
    """Take this step and return the reply."""
    return Step.model_validate_json(await sessions.step(session_id, a_step(number, text)))


def a_step(number: int, text: str = "hello") -> TakeStep:
    """A step with a text."""
    return TakeStep(step=number, action=TextAction(type="text", text=text))


def counter_value(name: str, **labels: str) -> float:
    """Return the metric's value."""
    return REGISTRY.get_sample_value(name, labels) or 0.0
