"""A worker at a cut: it pauses, flushes sampled tokens, answers, and waits for the end of the cut on the log."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TRAJECTORIES,
    CutRequested,
    TrajectoryFinished,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from tests.unit.rollout.cutting import assert_paused, ends, flushes, reached, release, request, worker_mid_message
from tests.unit.rollout.working import (
    RUN,
    Place,
    announce,
    finished,
    ids,
    messages,
    offer,
    working,
)


def republish(bus: SqliteBus) -> None:
    """Announce version 0 as a restarted learner does."""
    published = VersionPublished(run=RUN, version=Version(0), digest="", published_at=1.0, writer=1)
    bus.publish(CONTROL, [Outgoing(RUN, encode(published))])


END_OF_CUT: dict[str, tuple[Callable[[SqliteBus], None], list[int], list[tuple[int, int]]]] = {
    "a newer version": (lambda bus: announce(bus, 1), [0, 1], [(0, 5), (1, 3)]),
    "a release": (lambda bus: release(bus, 1), [0], [(0, 8)]),
    "a restart of the learner": (republish, [0], [(0, 8)]),
}
"""Record that ends a cut -> how to publish it, versions that the engine loads, and segments of the trajectory."""


@pytest.mark.parametrize(("end", "loaded", "segments"), END_OF_CUT.values(), ids=END_OF_CUT)
async def test_a_worker_pauses_from_its_answer_until_the_end_of_the_cut(
    place: Place, end: Callable[[SqliteBus], None], loaded: list[int], segments: list[tuple[int, int]]
) -> None:
    async with worker_mid_message(place) as (running, engine):
        assert running.worker.status()["cut"] is None
        request(place.bus, 1, 0)
        await running.until(lambda: len(reached(place.bus)) == 1)
        assert running.worker.status()["cut"] == 1
        announce(place.bus, 0)  # a copy of an earlier record does not end the cut
        await assert_paused(engine)
        (answer,), (flush,) = reached(place.bus), flushes(place.bus)
        assert (answer.run, answer.worker, answer.cut, answer.version, answer.flushed) == (RUN, "worker-0", 1, 0, 1)
        assert answer.positions == ends(place.bus)
        assert answer.pause_s >= 0
        assert flush.trajectory == "g000000/0"
        assert [(segment.version, len(segment)) for segment in flush.segments] == [(0, 5)]
        end(place.bus)
        await running.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.loaded == loaded
    assert engine.sampled == [version for version, count in segments for _ in range(count)]
    (whole,) = (m for m in messages(place.bus, TRAJECTORIES) if isinstance(m, TrajectoryFinished))
    assert whole.tokens.startswith(flush.tokens)
    assert whole.segments[0].start == flush.segments[0].start
    assert whole.segments[0].behavior_logprobs.startswith(flush.segments[0].behavior_logprobs)
    assert [(segment.version, len(segment)) for segment in whole.segments] == segments


async def test_a_release_does_not_resume_a_replaced_version(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer version is announced and not yet loaded when its own cut is requested and released."""
    async with worker_mid_message(place) as (running, engine):
        request(place.bus, 1, 0)
        await running.until(lambda: len(reached(place.bus)) == 1)
        resume, fetch = asyncio.Event(), running.weights._fetch

        async def slow(version: Version) -> Any:
            await resume.wait()
            return await fetch(version)

        monkeypatch.setattr(running.weights, "_fetch", slow)
        announce(place.bus, 1)
        request(place.bus, 2, 1)
        release(place.bus, 2)
        request(place.bus, 3, 1)
        await running.until(lambda: reached(place.bus)[-1].cut == 3)
        release(place.bus, 3)
        await running.until(lambda: running.worker.status()["cut"] is None)
        await assert_paused(engine)
        resume.set()
        await running.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.sampled == [0] * 5 + [1] * 3


async def test_trajectories_that_wait_for_a_tool_are_flushed_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asyncio.Event()
    offer(place.bus, 0, 1, samples=1)
    announce(place.bus, 0)
    async with working(place) as running:
        real = running.worker._sampler.sessions.finalize

        async def finalize(session_id: str) -> object:
            await answers.wait()
            return await real(session_id)

        async def step(session_id: str, number: int, text: str) -> object:
            return await finalize(session_id)

        monkeypatch.setattr(running.worker._sampler.sessions, "step", step)
        monkeypatch.setattr(running.worker._sampler.sessions, "finalize", finalize)
        await running.until(lambda: running.worker.alive().sampled_tokens == 4)  # both messages are complete
        request(place.bus, 1, 0)
        await running.until(lambda: len(reached(place.bus)) == 1)
        request(place.bus, 2, 0)
        await running.until(lambda: len(reached(place.bus)) == 2)
        assert [(answer.cut, answer.flushed) for answer in reached(place.bus)] == [(1, 2), (2, 0)]
        assert sorted(flush.trajectory for flush in flushes(place.bus)) == ids(0, 1, samples=[0])
        answers.set()
        await running.until(lambda: finished(place.bus) == ids(0, 1, samples=[0]))  # no further token is sampled
    whole = {m.trajectory: m for m in messages(place.bus, TRAJECTORIES) if isinstance(m, TrajectoryFinished)}
    assert all(whole[flush.trajectory].tokens == flush.tokens for flush in flushes(place.bus))


@dataclass(frozen=True)
class OpenCut:
    """A control topic with an open cut."""

    records: list[Callable[[SqliteBus], None]]
    cut: int
    end: Callable[[SqliteBus], None]
    loaded: list[int]


STARTS = {
    "then a newer version": OpenCut(
        [
            lambda bus: announce(bus, 0),
            lambda bus: request(bus, 1, 0),
            lambda bus: announce(bus, 1),  # ends cut 1
            lambda bus: request(bus, 2, 1),
        ],
        cut=2,
        end=lambda bus: announce(bus, 2),
        loaded=[2],  # version 1, which the learner is about to replace, is not loaded
    ),
    "then a release": OpenCut(
        [lambda bus: announce(bus, 1), lambda bus: request(bus, 1, 1)],
        cut=1,
        end=lambda bus: release(bus, 1),
        loaded=[1],
    ),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
async def test_a_worker_that_starts_during_a_cut_answers_and_waits_for_its_end(place: Place, start: OpenCut) -> None:
    for publish in start.records:
        publish(place.bus)
    offer(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: len(reached(place.bus)) == 1)
        (answer,) = reached(place.bus)
        assert (answer.cut, answer.version, answer.positions, answer.flushed) == (start.cut, -1, {}, 0)
        await running.looked()
        assert (running.engine.loaded, running.engine.asked) == ([], [])
        start.end(place.bus)
        await running.until(lambda: finished(place.bus) == ids(0))
        assert running.engine.loaded == start.loaded
        assert len(reached(place.bus)) == 1


async def test_ended_cuts_are_not_answered(place: Place) -> None:
    announce(place.bus, 0)
    for cut in range(200):  # more than one poll returns: the 256th record is a request
        request(place.bus, cut, 0)
        release(place.bus, cut)
    announce(place.bus, 1)
    offer(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: finished(place.bus) == ids(0))
        assert running.engine.loaded == [1]
        assert reached(place.bus) == []


async def test_a_cut_waits_for_the_canary_of_the_loaded_version(place: Place) -> None:
    """Tokens of an unverified version are not flushed."""
    async with worker_mid_message(place, 2) as (running, engine):
        engine.scoring.clear()
        announce(place.bus, 1)
        await running.until(lambda: engine.loaded == [0, 1])
        engine.allow(4)
        await running.until(lambda: engine.sampled == [0, 0, 1, 1])
        request(place.bus, 1, 1)
        await running.until(lambda: running.worker.status()["cut"] == 1)
        await running.looked()
        assert (flushes(place.bus), reached(place.bus)) == ([], [])
        engine.scoring.set()
        await running.until(lambda: len(reached(place.bus)) == 1)
        assert reached(place.bus)[0].version == 1
        assert [segment.version for segment in flushes(place.bus)[0].segments] == [0, 1]


async def test_no_token_of_a_refused_version_is_flushed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker_mid_message(place, 2) as (running, engine):
        engine.scoring.clear()
        monkeypatch.setenv("PALIMPSEST_FAULT", "rollout.scripted_canary")
        announce(place.bus, 1)
        await running.until(lambda: engine.loaded == [0, 1])
        engine.allow(4)
        await running.until(lambda: engine.sampled == [0, 0, 1, 1])
        request(place.bus, 1, 1)
        await running.until(lambda: running.worker.status()["cut"] == 1)
        engine.scoring.set()
        with pytest.raises(UserError, match="refused version 1"):
            await running.ends()
    assert messages(place.bus, TRAJECTORIES) == []
    assert reached(place.bus) == []


async def test_requests_of_another_run_and_invalid_requests_are_dead_lettered(place: Place) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0)
    for invalid in (CutRequested("another", 1, Version(0), 5.0), CutRequested(RUN, -1, Version(0), 5.0)):
        place.bus.publish(CONTROL, [Outgoing(RUN, encode(invalid))])
    async with working(place) as running:
        await running.until(lambda: finished(place.bus) == ids(0))
        assert running.worker.status()["cut"] is None
    assert reached(place.bus) == []
    assert {letter.cause for letter in messages(place.bus, DEAD_LETTERS)} == {
        RejectCause.WRONG_RUN,
        RejectCause.OUT_OF_RANGE,
    }
