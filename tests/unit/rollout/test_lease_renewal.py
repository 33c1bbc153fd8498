"""The lease of a session while the model writes: renewals by a simulated clock, with a real gateway."""

import asyncio
from collections.abc import Callable, Sequence
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
from palimpsest.services.rollout.lease_renewal import Timer, with_renewals
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
    due: Callable[[], None]
    renewed: asyncio.Semaphore

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """The sampler's timer: makes the call when the clock has advanced by the given time."""
        assert seconds == LEASE_S / 3
        self.due = call
        return ManualTimer()

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        for _ in range(3 * MESSAGE_LEASES):
            self.clock.now += LEASE_S / 3
            if self.renews:
                self.due()
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
    engine.renewed = asyncio.Semaphore(0)
    renew = SessionClient.heartbeat

    async def observed(self: SessionClient, session_id: str) -> Lease:
        lease = await renew(self, session_id)
        asyncio.get_running_loop().call_soon(engine.renewed.release)  # after the next timer is set
        return lease

    monkeypatch.setattr(SessionClient, "heartbeat", observed)
    offered, limits = registry.built_in(), SessionLimits(9, LEASE_S, 10 * LEASE_S * MESSAGE_LEASES, 1000)
    app = create_app(Sessions(offered, limits, clock=engine.clock), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        setting = Setting(f"http://127.0.0.1:{server.port}", dialogue)
        sampler = replace(setting.sampler(engine), later=engine.later)
        async with asyncio.timeout(LIMIT_S), sampler.sessions:
            ended = await sampler.sample(setting.group("lookup", 3, SAMPLING), 2)
    if renews:
        assert isinstance(ended, TrajectoryFinished)
        assert (ended.attempt, ended.reward, ended.turns) == (0, 1.0, 2)
    else:
        assert isinstance(ended, TrajectoryDropped)
        assert ended.detail.endswith("the session is over: expired")


class ManualTimer:
    """A timer whose call a test makes."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def at_once(_: float, call: Callable[[], None]) -> asyncio.Handle:
    """Make a call without the wait before it."""
    return asyncio.get_running_loop().call_soon(call)


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
        await with_renewals(write(), renew, lease_s=3.0, later=at_once)
    assert cancelled.is_set()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling(), "the next attempt of the trajectory must not be cancelled"


async def test_a_message_ends_its_renewals() -> None:
    timer = ManualTimer()

    async def never() -> None:
        raise AssertionError("no renewal was due")

    written = with_renewals(asyncio.sleep(0, "text"), never, lease_s=3.0, later=lambda _, __: timer)
    assert await written == "text"
    assert timer.cancelled


@pytest.mark.parametrize("fails", [True, False])
async def test_a_message_ends_a_renewal_in_progress(fails: bool) -> None:
    """Nothing of it is left when the next request on the session begins, and its outcome has no effect any more."""
    renewing, ended = asyncio.Event(), asyncio.Event()

    async def renew() -> None:
        renewing.set()
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            ended.set()
            if fails:
                raise SessionFailed("gone", "the session is over: expired") from None
            raise

    async def write() -> str:
        await renewing.wait()
        return "text"

    async with asyncio.timeout(LIMIT_S):
        assert await with_renewals(write(), renew, lease_s=3.0, later=at_once) == "text"
        assert ended.is_set()
        await asyncio.sleep(0)  # a cancellation that was requested would arrive here


async def test_a_cancelled_message_stays_cancelled_if_its_lease_is_lost() -> None:
    """Who cancels a trajectory waits for its end, not for its next attempt."""

    async def renew() -> None:
        written.cancel()
        raise SessionFailed("gone", "the session is over: expired")

    async def write() -> str:
        return await asyncio.Future()

    written = asyncio.create_task(with_renewals(write(), renew, lease_s=3.0, later=at_once))
    async with asyncio.timeout(LIMIT_S):
        await asyncio.wait({written})
    assert written.cancelled()
