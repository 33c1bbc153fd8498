"""Creation of sessions, their leases, and how long ended sessions are kept."""

import asyncio

import pytest

from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments.port import EnvironmentFailed, Opening
from palimpsest.common.sessions.hosts import AtCapacity
from palimpsest.common.sessions.sessions import REMEMBERED_PER_SESSION
from palimpsest.common.sessions.wire import CreateSession, Status, Step
from tests.unit.env_gateway.fakes import (
    HALF,
    WANTED,
    ManualClock,
    ScriptedWorld,
    a_step,
    begun,
    reply,
    some_sessions,
    taken,
)


async def test_the_same_key_gives_the_same_session_and_no_key_a_new_one(clock: ManualClock) -> None:
    sessions = some_sessions(ScriptedWorld, clock)
    first = await sessions.create(WANTED, "k")
    assert await sessions.create(WANTED, "k") == first
    assert len({await begun(sessions), await begun(sessions), await begun(sessions, "other")}) == 3
    assert sessions.status()["live_sessions"] == 4


async def test_a_key_reused_for_another_session_is_a_conflict(clock: ManualClock) -> None:
    sessions = some_sessions(ScriptedWorld, clock)
    await begun(sessions, "k")
    with pytest.raises(HttpError) as error:
        await sessions.create(CreateSession(environment="fake", seed=4), "k")
    assert (error.value.status, error.value.body["code"]) == (409, "key_conflict")


async def test_concurrent_creations_with_one_key_begin_one_session(clock: ManualClock) -> None:
    spare = [ScriptedWorld() for _ in range(8)]
    held = spare[-1]
    held.hold()
    sessions = some_sessions(spare.pop, clock, max_sessions=8)
    asked = [asyncio.create_task(sessions.create(WANTED, "k")) for _ in range(8)]
    await held.entered.wait()
    held.gate.set()
    assert len(set(await asyncio.gather(*asked))) == 1
    assert len(spare) == 7


async def test_a_failed_creation_is_refused_and_frees_its_key(clock: ManualClock) -> None:
    class Unlucky(ScriptedWorld):
        async def reset(self, seed: int) -> tuple[Opening, str]:
            raise EnvironmentFailed("environment_raised", "ValueError: no such task")

    worlds: list[ScriptedWorld] = [Unlucky(), ScriptedWorld()]
    opened = list(worlds)
    sessions = some_sessions(lambda: worlds.pop(0), clock)
    with pytest.raises(HttpError) as error:
        await sessions.create(WANTED, "k")
    assert (error.value.status, error.value.body["code"]) == (502, "environment_raised")
    assert opened[0].closed == 1
    assert sessions.status()["live_sessions"] == 0
    await begun(sessions, "k")


async def test_a_session_without_requests_for_a_lease_expires_without_a_reward(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"))
    sessions = some_sessions(lambda: world, clock, lease_s=10.0)
    session = await begun(sessions)
    clock.now += 9.9
    sessions.sweep()
    await taken(sessions, session, 0)  # renews the lease
    clock.now += 9.9
    sessions.sweep()
    assert sessions.state(session).lease_expires_in_s == pytest.approx(0.1)
    clock.now += 0.2
    sessions.sweep()
    assert world.closed == 1
    state = sessions.state(session)
    assert (state.status, state.reward, state.next_step, state.lease_expires_in_s) == (Status.EXPIRED, None, 1, None)
    with pytest.raises(HttpError) as error:
        await taken(sessions, session, 1)
    assert error.value.status == 410
    ended = Step.model_validate_json(await sessions.finalize(session))
    assert (ended.status, ended.reward, world.finalized) == (Status.EXPIRED, None, 0)


async def test_a_late_step_does_not_revive_an_expired_session(clock: ManualClock) -> None:
    world = ScriptedWorld(reply("4"))
    sessions = some_sessions(lambda: world, clock, lease_s=10.0)
    session = await begun(sessions)
    clock.now += 10.0
    with pytest.raises(HttpError) as error:
        await taken(sessions, session, 0)
    assert (error.value.status, world.turns) == (410, [])


async def test_a_heartbeat_renews_the_lease(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(HALF), clock, lease_s=10.0)
    session = await begun(sessions)
    for _ in range(3):
        clock.now += 9.0
        assert sessions.heartbeat(session).lease_expires_in_s == 10.0
        sessions.sweep()
    assert (await taken(sessions, session, 0)).reward == 0.5
    with pytest.raises(HttpError) as error:
        sessions.heartbeat(session)
    assert error.value.status == 410


async def test_a_session_busy_with_a_step_does_not_expire(clock: ManualClock) -> None:
    world = ScriptedWorld(HALF)
    sessions = some_sessions(lambda: world, clock, lease_s=10.0)
    session = await begun(sessions)
    world.hold()
    step = asyncio.create_task(taken(sessions, session, 0))
    await world.entered.wait()
    clock.now += 100.0
    sessions.sweep()
    world.gate.set()
    assert (await step).reward == 0.5


async def test_an_ended_session_is_kept_for_a_limited_time(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(reply("4"), HALF), clock, remember_s=60.0)
    session = await begun(sessions, "k")
    await taken(sessions, session, 0)
    last = await sessions.step(session, a_step(1))
    clock.now += 59.9
    sessions.sweep()
    assert await sessions.step(session, a_step(1)) == last
    with pytest.raises(HttpError) as error:
        await sessions.create(WANTED, "k")
    assert error.value.status == 410
    clock.now += 0.1
    sessions.sweep()
    with pytest.raises(HttpError) as unknown:
        await sessions.step(session, a_step(1))
    assert (unknown.value.status, unknown.value.body["code"]) == (404, "unknown_session")
    assert await begun(sessions, "k") != session


async def test_the_number_of_kept_ended_sessions_is_bounded(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(HALF), clock, max_sessions=1)
    ids = []
    for number in range(REMEMBERED_PER_SESSION + 2):
        ids.append(await begun(sessions, f"k{number}"))
        await taken(sessions, ids[-1], 0)
    assert sessions.status()["remembered_sessions"] == REMEMBERED_PER_SESSION
    assert sessions.status()["sessions"] == {"terminated": REMEMBERED_PER_SESSION + 2}
    with pytest.raises(HttpError):
        sessions.state(ids[1])
    assert sessions.state(ids[2]).reward == 0.5


async def test_sessions_over_the_limit_are_refused_until_one_ends(clock: ManualClock) -> None:
    sessions = some_sessions(lambda: ScriptedWorld(HALF), clock, max_sessions=2)
    first, _ = await begun(sessions), await begun(sessions)
    with pytest.raises(HttpError) as error:
        await begun(sessions)
    assert (error.value.status, error.value.body["code"], error.value.body["retryable"]) == (
        429,
        "capacity",
        True,
    )
    assert error.value.headers == {"Retry-After": "1"}
    await taken(sessions, first, 0)
    await begun(sessions)


async def test_a_host_at_capacity_is_refused_like_a_full_gateway(clock: ManualClock) -> None:
    def full() -> ScriptedWorld:
        raise AtCapacity("64 sessions already have their own process")

    sessions = some_sessions(full, clock)
    with pytest.raises(HttpError) as error:
        await begun(sessions)
    assert (error.value.status, error.value.body["code"], error.value.body["retryable"]) == (
        429,
        "capacity",
        True,
    )
    assert sessions.status()["live_sessions"] == 0


async def test_an_unknown_environment_is_a_404(clock: ManualClock) -> None:
    with pytest.raises(HttpError) as error:
        await some_sessions(ScriptedWorld, clock).create(CreateSession(environment="nothing", seed=0), None)
    assert (error.value.status, error.value.body["code"]) == (404, "unknown_environment")


async def test_a_stopping_gateway_begins_no_session_and_finishes_steps(clock: ManualClock) -> None:
    spare = [ScriptedWorld(HALF) for _ in range(3)]
    sessions = some_sessions(spare.pop, clock)
    running, begun_with_key = await begun(sessions), await sessions.create(WANTED, "k")
    sessions.refuse_new()
    with pytest.raises(HttpError) as error:
        await begun(sessions)
    assert (error.value.status, error.value.body["code"], error.value.body["retryable"]) == (
        503,
        "draining",
        True,
    )
    assert len(spare) == 1
    assert await sessions.create(WANTED, "k") == begun_with_key
    assert (await taken(sessions, running, 0)).reward == 0.5


async def test_draining_expires_open_sessions_without_a_reward(clock: ManualClock) -> None:
    world = ScriptedWorld()
    sessions = some_sessions(lambda: world, clock)
    session = await begun(sessions)
    sessions.drain()
    assert (sessions.state(session).status, sessions.state(session).reward, world.closed) == (Status.EXPIRED, None, 1)
    assert sessions.status()["sessions"] == {"expired": 1}


async def test_a_creation_in_progress_when_the_gateway_drains_is_refused_and_closed(clock: ManualClock) -> None:
    world = ScriptedWorld()
    world.hold()
    sessions = some_sessions(lambda: world, clock)
    creation = asyncio.create_task(begun(sessions))
    await world.entered.wait()
    sessions.drain()
    with pytest.raises(HttpError) as error:
        await creation
    assert error.value.status == 503
    assert world.closed >= 1
    assert sessions.status()["live_sessions"] == 0
