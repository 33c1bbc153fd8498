"""A worker at a cut: it stands still, sends ahead what it sampled, says so, and waits for what the log says next."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus, SqliteConsumer
from palimpsest.common.config.schema import ScriptedEngineConfig
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutReleased,
    CutRequested,
    SegmentFlushed,
    TrajectoryFinished,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout import cut_responder, instruments
from tests.unit.rollout.working import (
    LIMIT_S,
    RUN,
    GatedEngine,
    Place,
    announce,
    finished,
    ids,
    messages,
    offer,
    turns,
    working,
)


class Gate(asyncio.Event):
    """Set when the engine runs and may still sample."""

    def __init__(self, engine: "Limited") -> None:
        super().__init__()
        self._engine, self.more = engine, asyncio.Event()

    def is_set(self) -> bool:
        return super().is_set() and len(self._engine.sampled) < self._engine.limit

    async def wait(self) -> Literal[True]:
        await super().wait()
        while len(self._engine.sampled) >= self._engine.limit:
            self.more.clear()
            await self.more.wait()
        return True


class Limited(GatedEngine):
    """Waits in the middle of a message when it has sampled so many tokens; says 8 at a time, its limit."""

    def __init__(self, place: Place, limit: int) -> None:
        super().__init__(place.dialogue)
        self._config = ScriptedEngineConfig(kind="scripted", texts=("abcdefghijklmnopq",), tokens_per_s=1e6)
        self.limit, self.sampled = limit, list[Version]()
        """Version of each token so far."""
        self._running = Gate(self)
        self._running.set()

    def _sample(self, request: str, message: Any) -> None:
        super()._sample(request, message)
        self.sampled.append(message.versions[-1])

    def allow(self, tokens: int) -> None:
        """So many in all."""
        self.limit = tokens
        self._running.more.set()  # type: ignore[attr-defined]


def ask(bus: SqliteBus, cut: int, version: int) -> None:
    bus.publish(CONTROL, [Outgoing(RUN, encode(CutRequested(RUN, cut, Version(version), 5.0)))])


def release(bus: SqliteBus, cut: int) -> None:
    bus.publish(CONTROL, [Outgoing(RUN, encode(CutReleased(RUN, cut)))])


def reached(bus: SqliteBus) -> list[CutReached]:
    return [message for message in messages(bus, WORKERS) if isinstance(message, CutReached)]


def flushes(bus: SqliteBus) -> list[SegmentFlushed]:
    return [message for message in messages(bus, TRAJECTORIES) if isinstance(message, SegmentFlushed)]


def ends(bus: SqliteBus) -> dict[int, int]:
    """Of the partitions in which anything stands."""
    with bus.consumer(TRAJECTORIES) as consumer:
        return {partition: end for partition, end in consumer.ends().items() if end}


async def stands_still(engine: Limited) -> None:
    """Though it may sample, it does not."""
    count = len(engine.sampled)
    engine.allow(1000)
    await turns()
    assert len(engine.sampled) == count


async def test_a_worker_stands_still_from_its_answer_until_a_newer_version(place: Place) -> None:
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 5)
        assert at_work.worker.status()["cut"] is None
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        assert at_work.worker.status()["cut"] == 1
        await stands_still(engine)
        (answer,), (sent,) = reached(place.bus), flushes(place.bus)
        assert (answer.run, answer.worker, answer.cut, answer.version, answer.flushed) == (RUN, "worker-0", 1, 0, 1)
        assert answer.positions == ends(place.bus)
        assert answer.pause_s >= 0
        assert (sent.trajectory, [(segment.version, len(segment)) for segment in sent.segments]) == (
            "g000000/0",
            [(0, 5)],
        )
        announce(place.bus, 1)
        await at_work.until(lambda: finished(place.bus) == ["g000000/0"])
    assert at_work.engine.loaded == [0, 1]
    assert engine.sampled == [0] * 5 + [1] * 3
    (whole,) = (m for m in messages(place.bus, TRAJECTORIES) if isinstance(m, TrajectoryFinished))
    assert whole.tokens.startswith(sent.tokens)
    assert whole.segments[:1] == sent.segments
    assert [(segment.version, len(segment)) for segment in whole.segments] == [(0, 5), (1, 3)]


@pytest.mark.parametrize("how", ["released", "the learner was started again"])
async def test_when_no_version_comes_of_a_cut_the_worker_goes_on_with_the_one_it_has(place: Place, how: str) -> None:
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 5)
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        announce(place.bus, 0)  # a copy of what stands before the request: it says nothing
        await stands_still(engine)
        assert len(reached(place.bus)) == 1
        if how == "released":
            release(place.bus, 1)
        else:
            published = VersionPublished(run=RUN, version=Version(0), digest="", published_at=1.0)
            place.bus.publish(CONTROL, [Outgoing(RUN, encode(published))])
        await at_work.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.loaded == [0]
    assert engine.sampled == [0] * 8


async def test_a_release_allows_for_no_version_that_was_succeeded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer version is announced, and not loaded yet, when its own cut comes and goes."""
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 5)
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        goes_on, fetch = asyncio.Event(), at_work.weights._fetch

        async def slow(version: Version) -> Any:
            await goes_on.wait()
            return await fetch(version)

        monkeypatch.setattr(at_work.weights, "_fetch", slow)
        announce(place.bus, 1)
        ask(place.bus, 2, 1)
        release(place.bus, 2)
        ask(place.bus, 3, 1)
        await at_work.until(lambda: reached(place.bus)[-1].cut == 3)
        release(place.bus, 3)
        await at_work.until(lambda: at_work.worker.status()["cut"] is None)
        await stands_still(engine)
        goes_on.set()
        await at_work.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.sampled == [0] * 5 + [1] * 3


async def test_what_waits_for_a_tool_is_sent_ahead_and_what_was_sent_is_not_sent_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asyncio.Event()
    offer(place.bus, 0, 1, samples=1)
    announce(place.bus, 0)
    async with working(place) as at_work:
        real = at_work.worker._sampler.sessions.finalize

        async def finalize(session_id: str) -> object:
            await answers.wait()
            return await real(session_id)

        async def step(session_id: str, number: int, text: str) -> object:
            return await finalize(session_id)

        monkeypatch.setattr(at_work.worker._sampler.sessions, "step", step)
        monkeypatch.setattr(at_work.worker._sampler.sessions, "finalize", finalize)
        await at_work.until(lambda: at_work.worker.alive().sampled_tokens == 4)  # both messages have ended
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        ask(place.bus, 2, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 2)
        assert [(answer.cut, answer.flushed) for answer in reached(place.bus)] == [(1, 2), (2, 0)]
        assert sorted(flush.trajectory for flush in flushes(place.bus)) == ids(0, 1, samples=[0])
        answers.set()
        await at_work.until(lambda: finished(place.bus) == ids(0, 1, samples=[0]))  # no token is needed for that
    whole = {m.trajectory: m for m in messages(place.bus, TRAJECTORIES) if isinstance(m, TrajectoryFinished)}
    assert all(whole[flush.trajectory].tokens == flush.tokens for flush in flushes(place.bus))


async def test_a_worker_that_starts_while_a_request_stands_answers_and_waits_with_the_others(place: Place) -> None:
    announce(place.bus, 0)
    ask(place.bus, 1, 0)
    announce(place.bus, 1)  # that was the end of cut 1
    ask(place.bus, 2, 1)
    offer(place.bus, 0)
    async with working(place) as at_work:
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        (answer,) = reached(place.bus)
        assert (answer.cut, answer.version, answer.positions, answer.flushed) == (2, -1, {}, 0)
        await at_work.looked()
        assert (at_work.engine.loaded, at_work.engine.asked) == ([], [])
        announce(place.bus, 2)
        await at_work.until(lambda: finished(place.bus) == ids(0))
        assert at_work.engine.loaded == [2]  # the version whose weights are about to go is not even loaded
        assert len(reached(place.bus)) == 1


async def test_a_worker_that_starts_while_a_request_stands_takes_its_version_when_it_is_released(place: Place) -> None:
    announce(place.bus, 1)
    ask(place.bus, 1, 1)
    offer(place.bus, 0)
    async with working(place) as at_work:
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        release(place.bus, 1)
        await at_work.until(lambda: finished(place.bus) == ids(0))
        assert at_work.engine.loaded == [1]


async def test_cuts_of_the_past_are_not_answered_however_many_there_were(place: Place) -> None:
    announce(place.bus, 0)
    for cut in range(200):  # more than are read at once: the 256th record is a request
        ask(place.bus, cut, 0)
        release(place.bus, cut)
    announce(place.bus, 1)
    offer(place.bus, 0)
    async with working(place) as at_work:
        await at_work.until(lambda: finished(place.bus) == ids(0))
        assert at_work.engine.loaded == [1]
        assert reached(place.bus) == []


async def test_when_nothing_is_heard_any_more_the_worker_goes_on_and_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_responder, "HOLD_LIMIT_S", 0.0)
    before = instruments.HOLDS_GIVEN_UP._value.get()
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 5)
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        engine.allow(1000)
        await at_work.until(lambda: finished(place.bus) == ["g000000/0"])
        assert instruments.HOLDS_GIVEN_UP._value.get() == before + 1
        assert at_work.worker.status()["cut"] is None
        announce(place.bus, 1)
        ask(place.bus, 2, 1)  # a learner that comes back is served as ever
        await at_work.until(lambda: [answer.cut for answer in reached(place.bus)] == [1, 2])


class Silent(SqliteBus):
    """A log that does not say where `control` ends until it is told to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> SqliteConsumer:
        consumer = super().consumer(topic, group=group, member=member)
        real = consumer.ends

        def ends() -> dict[int, int]:
            if topic == CONTROL:
                self.asked.set()
                assert self.goes_on.wait(LIMIT_S)
            return real()

        consumer.ends = ends  # type: ignore[method-assign]
        return consumer


async def test_a_log_that_does_not_answer_is_not_taken_for_a_learner_that_is_gone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sampled behind the learner's back can never be scored, and an outage is to cost time only."""
    monkeypatch.setattr(cut_responder, "HOLD_LIMIT_S", 0.0)
    before = instruments.HOLDS_GIVEN_UP._value.get()
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    with closing(Silent(place.bus.path)) as bus:
        async with working(place, engine=engine, bus=bus) as at_work:
            await at_work.until(lambda: len(engine.sampled) == 5)
            bus.goes_on.clear()
            bus.asked.clear()
            ask(place.bus, 1, 0)
            await at_work.until(lambda: bus.asked.is_set() and len(reached(place.bus)) == 1)
            await stands_still(engine)
            announce(place.bus, 1)  # the learner is back as soon as the log is
            bus.goes_on.set()
            await at_work.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.sampled == [0] * 5 + [1] * 3
    assert instruments.HOLDS_GIVEN_UP._value.get() == before


async def test_after_an_outage_the_learner_has_its_time_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_responder, "ANSWER_S", 0.0)  # every look counts as one that took too long
    monkeypatch.setattr(cut_responder, "HOLD_LIMIT_S", 0.001)
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 5)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 5)
        ask(place.bus, 1, 0)
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        await at_work.looked()
        await stands_still(engine)
        assert at_work.worker.status()["cut"] == 1


async def test_a_cut_waits_for_the_verdict_on_what_is_on_the_engine(place: Place) -> None:
    """What an unverified version said is not sent ahead either."""
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 2)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 2)
        engine.scoring.clear()
        announce(place.bus, 1)
        await at_work.until(lambda: engine.loaded == [0, 1])
        engine.allow(4)
        await at_work.until(lambda: engine.sampled == [0, 0, 1, 1])
        ask(place.bus, 1, 1)
        await at_work.until(lambda: at_work.worker.status()["cut"] == 1)
        await at_work.looked()
        assert (flushes(place.bus), reached(place.bus)) == ([], [])
        engine.scoring.set()
        await at_work.until(lambda: len(reached(place.bus)) == 1)
        assert reached(place.bus)[0].version == 1
        assert [segment.version for segment in flushes(place.bus)[0].segments] == [0, 1]


async def test_nothing_of_a_refused_version_is_sent_ahead(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, 2)
    async with working(place, engine=engine) as at_work:
        await at_work.until(lambda: len(engine.sampled) == 2)
        engine.scoring.clear()
        monkeypatch.setenv("PALIMPSEST_FAULT", "rollout.scripted_canary")
        announce(place.bus, 1)
        await at_work.until(lambda: engine.loaded == [0, 1])
        engine.allow(4)
        await at_work.until(lambda: engine.sampled == [0, 0, 1, 1])
        ask(place.bus, 1, 1)
        await at_work.until(lambda: at_work.worker.status()["cut"] == 1)
        engine.scoring.set()
        with pytest.raises(UserError, match="refused version 1"):
            await at_work.ends()
    assert messages(place.bus, TRAJECTORIES) == []
    assert reached(place.bus) == []


class SlowDisk(SqliteBus):
    """A log that takes trajectories only when it is told to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.publishing, self.goes_on = threading.Event(), threading.Event()

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if topic == TRAJECTORIES:
            self.publishing.set()
            assert self.goes_on.wait(LIMIT_S)
        return super().publish(topic, records)


async def test_a_worker_answers_when_all_that_it_sampled_is_durable(place: Place) -> None:
    """The trajectories that ended just before the cut, too."""
    offer(place.bus, 0)
    announce(place.bus, 0)
    with closing(SlowDisk(place.bus.path)) as bus:
        async with working(place, bus=bus) as at_work:
            await at_work.until(lambda: at_work.worker.status()["finished"] == 2)
            ask(place.bus, 1, 0)
            await at_work.until(lambda: at_work.worker.status()["cut"] == 1)
            await at_work.until(bus.publishing.is_set)
            await at_work.looked()
            assert reached(place.bus) == []
            bus.goes_on.set()
            await at_work.until(lambda: len(reached(place.bus)) == 1)
            assert finished(place.bus) == ids(0)
            assert reached(place.bus)[0].positions == ends(place.bus)


async def test_requests_of_another_run_or_without_sense_are_buried(place: Place) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0)
    for wrong in (CutRequested("another", 1, Version(0), 5.0), CutRequested(RUN, -1, Version(0), 5.0)):
        place.bus.publish(CONTROL, [Outgoing(RUN, encode(wrong))])
    async with working(place) as at_work:
        await at_work.until(lambda: finished(place.bus) == ids(0))
        assert at_work.worker.status()["cut"] is None
    assert reached(place.bus) == []
    assert {letter.cause for letter in messages(place.bus, DEAD_LETTERS)} == {
        RejectCause.WRONG_RUN,
        RejectCause.OUT_OF_RANGE,
    }
