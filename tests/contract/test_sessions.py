"""Contract of the port to sessions: through a gateway, in the worker's process, and through the choice of both."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import httpx
import pytest

from palimpsest.common.environments import hop, lookup
from palimpsest.common.environments.port import EnvironmentFailed, Score
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.service import Server
from palimpsest.common.sessions import registry
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.hosts import EnvironmentHost
from palimpsest.common.sessions.in_process import InProcessSessions
from palimpsest.common.sessions.placed import PlacedSessions
from palimpsest.common.sessions.port import CAPACITY, EnvironmentSessions, SessionFailed
from palimpsest.common.sessions.registry import Entry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Status, Step
from palimpsest.services.env_gateway.app import create_app
from tests.processes.waiting import LIMIT_S
from tests.unit.env_gateway.fakes import ManualClock, ScriptedWorld, reply

PLACES = ("gateway", "in_process", "placed")
LEASE_S = 5.0


class Place:
    """Sessions in one place, with the built-in environments and `fake`, whose sessions use `worlds` in turn."""

    def __init__(self) -> None:
        self.clock, self.worlds = ManualClock(), list[EnvironmentHost]()
        self.calls: EnvironmentSessions

    def sessions(self, limit: int = 50) -> Sessions:
        async def opened() -> EnvironmentHost:
            return self.worlds.pop(0)

        offered = {**registry.built_in(), "fake": Entry("fake", "7", "", False, opened)}
        return Sessions(offered, SessionLimits(limit, LEASE_S, 600.0, 1000), clock=self.clock)


@contextmanager
def served(sessions: Sessions) -> Iterator[str]:
    """URL of a gateway with these sessions."""
    app = create_app(sessions, {})
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(params=PLACES)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """The port in one place. The gateway of `placed` knows no environment, so nothing can be asked of it by mistake."""
    place = Place()
    async with AsyncExitStack() as stack:
        local = InProcessSessions(place.sessions())
        if request.param == "in_process":
            place.calls = await stack.enter_async_context(local)
        else:
            behind = place.sessions() if request.param == "gateway" else Sessions({}, SessionLimits(9, 9.0, 9.0, 9))
            client = SessionClient(stack.enter_context(served(behind)), timeout_s=LIMIT_S, connections=9)
            both = PlacedSessions(local, client, in_process=frozenset({*registry.CLASSES, "fake"}))
            place.calls = await stack.enter_async_context(client if request.param == "gateway" else both)
        yield place


async def begin(place: Place, environment: str = "fake", seed: int = 3, key: str = "k") -> str:
    """Create a session; return its id."""
    wanted = CreateSession(environment=environment, seed=seed)
    return (await place.calls.create(wanted, idempotency_key=key)).session_id


async def play(place: Place, environment: str, seed: int, texts: list[str]) -> list[Step]:
    """All replies of a session with these model messages."""
    session = await begin(place, environment, seed, f"{environment}{seed}{texts}")
    return [await place.calls.step(session, number, text) for number, text in enumerate(texts)]


async def test_both_places_give_the_same_session_and_the_same_records(place: Place) -> None:
    opened = await place.calls.create(CreateSession(environment="lookup", seed=3), idempotency_key="k")
    assert (opened.next_step, opened.lease_expires_in_s, opened.environment_version) == (0, LEASE_S, "1")
    assert opened.messages[0].content == "What is the value of basil?"
    alone = lookup.Lookup()
    alone.reset(3)
    assert opened.initial_state_hash == alone.state_hash()
    steps = await play(place, "lookup", 3, lookup.solution(3))
    assert [(step.step, step.status) for step in steps] == [(0, Status.RUNNING), (1, Status.TERMINATED)]
    assert steps[0].messages[0].content == "5"
    assert (steps[1].reward, steps[1].success, steps[1].reward_parts) == (1.0, True, {"call": 0.3, "answer": 0.7})


async def test_a_repeated_call_has_no_further_effect(place: Place) -> None:
    world = ScriptedWorld(reply("4"), Score(0.5, False))
    place.worlds.append(world)
    session = await begin(place)
    assert await begin(place) == session
    first = await place.calls.step(session, 0, "a")
    assert await place.calls.step(session, 0, "a") == first
    last = await place.calls.step(session, 1, "b")
    assert await place.calls.step(session, 1, "b") == last == await place.calls.finalize(session)
    assert (len(world.turns), world.closed) == (2, 1)


@pytest.mark.parametrize(("number", "text", "code"), [(0, "other", "step_conflict"), (2, "a", "step_gap")])
async def test_a_step_out_of_order_is_refused(place: Place, number: int, text: str, code: str) -> None:
    place.worlds.append(ScriptedWorld(reply("4")))
    session = await begin(place)
    await place.calls.step(session, 0, "a")
    with pytest.raises(SessionFailed) as failed:
        await place.calls.step(session, number, text)
    assert failed.value.code == code


async def test_steps_of_the_same_moment_each_have_their_own_outcome(place: Place) -> None:
    """Twenty good steps, a failing environment, and a step of a session that is over."""
    place.worlds += [ScriptedWorld(EnvironmentFailed("environment_raised", "ValueError: no")), ScriptedWorld()]
    failing, over = await begin(place, key="failing"), await begin(place, key="over")
    await place.calls.close(over)
    good = [await begin(place, "hop", seed, f"hop{seed}") for seed in range(20)]
    calls = [place.calls.step(session, 0, hop.solution(seed)[0]) for seed, session in enumerate(good)]
    outcomes: list[Any] = await asyncio.gather(
        *calls, place.calls.step(failing, 0, "a"), place.calls.step(over, 0, "a"), return_exceptions=True
    )
    assert [(step.step, step.status) for step in outcomes[:20]] == [(0, Status.RUNNING)] * 20
    assert len({step.messages[0].content for step in outcomes[:20]}) > 1
    assert (outcomes[20].status, outcomes[20].reward) == (Status.ERROR, None)
    assert outcomes[20].error.code == "environment_raised"
    assert isinstance(outcomes[21], SessionFailed)
    assert outcomes[21].code == "gone"


async def test_a_slow_step_holds_no_other(place: Place) -> None:
    slow = ScriptedWorld(reply("late"))
    place.worlds.append(slow)
    session, quick = await begin(place), await begin(place, "lookup", 3, "quick")
    slow.hold()
    late = asyncio.create_task(place.calls.step(session, 0, "a"))
    async with asyncio.timeout(LIMIT_S):
        assert (await place.calls.step(quick, 0, lookup.solution(3)[0])).messages[0].content == "5"
    assert not late.done()
    slow.gate.set()
    assert (await late).messages[0].content == "late"


async def test_a_failed_environment_leaves_the_reward_unknown(place: Place) -> None:
    broken = EnvironmentFailed("environment_invalid", "reward is nan")
    place.worlds += [ScriptedWorld(broken), ScriptedWorld(final=broken)]
    step = await place.calls.step(await begin(place), 0, "a")
    scored = await place.calls.finalize(await begin(place, key="other"))
    for end in (step, scored):
        assert (end.status, end.reward, end.success) == (Status.ERROR, None, None)
        assert end.error is not None
        assert end.error.code == "environment_invalid"


async def test_a_truncated_session_is_scored(place: Place) -> None:
    session = await begin(place, "lookup", 3)
    await place.calls.step(session, 0, lookup.solution(3)[0])
    end = await place.calls.finalize(session)
    assert (end.status, end.reward, end.success) == (Status.TRUNCATED, 0.3, False)


async def test_a_lease_ends_a_session_unless_it_is_renewed(place: Place) -> None:
    place.worlds += [ScriptedWorld(reply("4")), ScriptedWorld(reply("4"))]
    renewed, lost = await begin(place), await begin(place, key="lost")
    place.clock.now += 0.6 * LEASE_S
    assert (await place.calls.heartbeat(renewed)).lease_expires_in_s == LEASE_S
    place.clock.now += 0.6 * LEASE_S
    assert (await place.calls.step(renewed, 0, "a")).status is Status.RUNNING
    for call in (place.calls.step(lost, 0, "a"), place.calls.heartbeat(lost)):
        with pytest.raises(SessionFailed, match="the session is over: expired"):
            await call


async def test_malformed_calls_and_long_results_are_answered_alike(place: Place) -> None:
    place.worlds.append(ScriptedWorld(reply("x" * 2000)))
    (step,) = await play(place, "lookup", 3, ["<tool_call>\n{\n</tool_call>"])
    assert step.messages[0].content.startswith("malformed tool call")
    long = await place.calls.step(await begin(place), 0, render("lookup", {"key": "basil"}))
    assert long.messages[0].content == "x" * 1000 + "\n[cut: 2000 bytes, 1000 are shown]"


async def test_an_unknown_environment_is_refused(place: Place) -> None:
    with pytest.raises(SessionFailed) as failed:
        await begin(place, "nothing")
    assert failed.value.code == "unknown_environment"


async def test_sessions_beyond_the_limit_wait_for_a_place() -> None:
    place, pauses = Place(), list[float]()
    sessions = place.sessions(limit=1)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        place.clock.now += seconds
        if sum(pauses) > 5.0:
            sessions.close(held)

    async with InProcessSessions(sessions, clock=place.clock, sleep=sleep) as calls:
        place.calls = calls
        held = await begin(place, "lookup", 1, "held")
        wanted = CreateSession(environment="lookup", seed=2)
        with pytest.raises(SessionFailed) as refused:
            await calls.create(wanted, idempotency_key="impatient", capacity_s=1.0)
        assert refused.value.code == CAPACITY
        assert await begin(place, "lookup", 2, "patient") != held
    assert sum(pauses) > 5.0


async def test_closing_the_sessions_of_a_process_ends_them_without_a_reward() -> None:
    world, place = ScriptedWorld(), Place()
    place.worlds.append(world)
    sessions = place.sessions()
    async with InProcessSessions(sessions) as place.calls:
        session = await begin(place)
    assert (sessions.state(session).status, sessions.state(session).reward, world.closed) == (Status.EXPIRED, None, 1)


async def test_a_mixture_has_some_environments_in_the_process_and_some_at_the_gateway() -> None:
    here, there = Place(), Place()
    near, far = here.sessions(), there.sessions()
    there.worlds.append(ScriptedWorld(Score(0.5, True)))
    with served(far) as url:
        client = SessionClient(url, timeout_s=LIMIT_S, connections=9)
        async with PlacedSessions(InProcessSessions(near), client, in_process=frozenset(["lookup"])) as here.calls:
            ends = await play(here, "lookup", 3, lookup.solution(3)) + await play(here, "fake", 3, ["a"])
    assert [end.reward for end in ends] == [None, 1.0, 0.5]
    assert (near.status()["environments"], far.status()["environments"]) == (
        {"lookup": {"terminated": 1}}, {"fake": {"terminated": 1}}
    )  # fmt: skip


class CountsRequests:
    """Counts the requests of a client, and loses the reply to a batch after its first line if `loses`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loses: bool) -> None:
        self.batches, self.alone = list[int](), 0
        send, alone = SessionClient._send_batch, SessionClient._step_alone

        async def noted_batch(client: SessionClient, steps: Any) -> AsyncIterator[Any]:
            self.batches.append(len(steps))
            async for outcome in send(client, steps):
                yield outcome
                if loses:
                    raise TimeoutError

        async def noted_alone(client: SessionClient, step: Any) -> Step:
            self.alone += 1
            return await alone(client, step)

        monkeypatch.setattr(SessionClient, "_send_batch", noted_batch)
        monkeypatch.setattr(SessionClient, "_step_alone", noted_alone)


@pytest.mark.parametrize("loses", [False, True])
async def test_steps_of_the_same_moment_share_a_request_and_are_applied_once(
    monkeypatch: pytest.MonkeyPatch, loses: bool
) -> None:
    place, counted = Place(), CountsRequests(monkeypatch, loses=loses)
    place.worlds += (worlds := [ScriptedWorld(Score(0.5, True)) for _ in range(70)])
    with served(place.sessions(limit=100)) as url:
        async with SessionClient(url, timeout_s=LIMIT_S, connections=9) as place.calls:
            ids = [await begin(place, key=f"{number}") for number in range(70)]
            ends = await asyncio.gather(*(place.calls.step(session, 0, "a") for session in ids))
    assert {(end.status, end.reward) for end in ends} == {(Status.TERMINATED, 0.5)}
    assert counted.batches == [64, 6]
    assert counted.alone == (70 - 2 if loses else 0)
    assert [len(world.turns) for world in worlds] == [1] * 70


def test_a_batch_has_a_largest_size() -> None:
    steps = [{"session_id": "x", "step": 0, "action": {"type": "text", "text": "a"}}] * 65
    with served(Place().sessions()) as url:
        answer = httpx.post(f"{url}/v1/steps", json={"steps": steps}, timeout=LIMIT_S)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_long_texts_are_split_over_requests_and_larger_ones_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place, counted = Place(), CountsRequests(monkeypatch, loses=False)
    place.worlds += [ScriptedWorld(Score(0.5, True)) for _ in range(5)]
    texts = ["a" * 100_000, "b" * 100_000, "c" * 100_000, "d" * 300_000, "e"]
    with served(place.sessions()) as url:
        async with SessionClient(url, timeout_s=LIMIT_S, connections=9) as place.calls:
            ids = [await begin(place, key=text[0]) for text in texts]
            await asyncio.gather(*(place.calls.step(s, 0, text) for s, text in zip(ids, texts, strict=True)))
    assert (counted.batches, counted.alone) == ([2], 3)
