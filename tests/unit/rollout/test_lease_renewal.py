"""The lease of a session while the model writes: renewals by a simulated clock, with a real gateway."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from palimpsest.common.environments import lookup
from palimpsest.common.messages import TrajectoryDropped, TrajectoryFinished
from palimpsest.common.service import Server
from palimpsest.common.sessions import registry
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.port import SessionFailed
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import Lease
from palimpsest.services.env_gateway.app import create_app
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import SampledTokens
from palimpsest.services.rollout.lease_renewal import with_renewals
from tests.processes.waiting import LIMIT_S
from tests.unit.env_gateway.fakes import ManualClock
from tests.unit.rollout.sampling import SAMPLING, MessageEngine, NextMessage, Setting

LEASE_S = 30.0
MESSAGE_LEASES = 4
"""Duration of each model message, in leases."""


class SlowEngine(MessageEngine):
    """Takes MESSAGE_LEASES leases for a message; the gateway's clock advances in steps of a third of a lease."""

    clock: ManualClock
    renews: bool
    woken: asyncio.Semaphore
    renewed: asyncio.Semaphore

    async def sleep(self, seconds: float) -> None:
        """The sampler's sleep: ends when the clock has advanced by the given time."""
        assert seconds == LEASE_S / 3
        await self.woken.acquire()

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        for _ in range(3 * MESSAGE_LEASES):
            self.clock.now += LEASE_S / 3
            if self.renews:
                self.woken.release()
                await self.renewed.acquire()
        return await super().generate(
            prompt, request=request, temperature=temperature, max_tokens=max_tokens, stop=stop
        )


@pytest.mark.parametrize("renews", [True, False])
async def test_a_message_longer_than_the_lease_keeps_its_session(
    dialogue: ChatRenderer, monkeypatch: pytest.MonkeyPatch, renews: bool
) -> None:
    """Without renewals each attempt loses its session, although the same messages sampled faster are valid."""
    engine = SlowEngine([NextMessage(dialogue.encode(text)) for text in (*lookup.solution(3), *lookup.solution(3)[:1])])
    engine.clock, engine.renews = ManualClock(), renews
    engine.woken, engine.renewed = asyncio.Semaphore(0), asyncio.Semaphore(0)
    renew = SessionClient.heartbeat

    async def observed(self: SessionClient, session_id: str) -> Lease:
        lease = await renew(self, session_id)
        engine.renewed.release()
        return lease

    monkeypatch.setattr(SessionClient, "heartbeat", observed)
    offered, limits = registry.built_in(), SessionLimits(9, LEASE_S, 10 * LEASE_S * MESSAGE_LEASES, 1000)
    app = create_app(Sessions(offered, limits, clock=engine.clock), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        setting = Setting(f"http://127.0.0.1:{server.port}", dialogue)
        sampler = replace(setting.sampler(engine), sleep=engine.sleep)
        async with asyncio.timeout(LIMIT_S), sampler.sessions:
            ended = await sampler.sample(setting.group("lookup", 3, SAMPLING), 2)
    if renews:
        assert isinstance(ended, TrajectoryFinished)
        assert (ended.attempt, ended.reward, ended.turns) == (0, 1.0, 2)
    else:
        assert isinstance(ended, TrajectoryDropped)
        assert ended.detail.endswith("the session is over: expired")


async def test_a_lost_lease_cancels_the_message() -> None:
    cancelled = asyncio.Event()

    async def write() -> str:
        try:
            return await asyncio.Future()
        finally:
            cancelled.set()

    async def renew() -> None:
        raise SessionFailed("gone", "the session is over: expired")

    with pytest.raises(SessionFailed, match="expired"):
        await with_renewals(write(), renew, lease_s=3.0, sleep=lambda _: asyncio.sleep(0))
    assert cancelled.is_set()


async def test_a_message_ends_its_renewals() -> None:
    ended = asyncio.Event()

    async def wait(_: float) -> None:
        try:
            await asyncio.Future()
        finally:
            ended.set()

    async def never() -> None:
        raise AssertionError("no renewal was due")

    assert await with_renewals(asyncio.sleep(0, "text"), never, lease_s=3.0, sleep=wait) == "text"
    assert ended.is_set()
