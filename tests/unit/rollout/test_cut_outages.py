"""A worker at a cut that does not end in time, and during an outage of the log."""

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus, SqliteConsumer
from palimpsest.common.messages import (
    CONTROL,
    TRAJECTORIES,
)
from palimpsest.services.rollout import cut_responder, instruments
from tests.unit.rollout.cutting import assert_paused, ends, reached, request, worker_mid_message
from tests.unit.rollout.working import (
    LIMIT_S,
    Place,
    announce,
    finished,
    ids,
    offer,
    working,
)


async def test_a_worker_resumes_and_reports_it_when_the_cut_does_not_end_in_time(place: Place) -> None:
    before = instruments.HOLDS_GIVEN_UP._value.get()
    async with worker_mid_message(place, hold_s=0.0) as (running, engine):
        request(place.bus, 1, 0)
        await running.until(lambda: len(reached(place.bus)) == 1)
        engine.allow(1000)
        await running.until(lambda: finished(place.bus) == ["g000000/0"])
        assert instruments.HOLDS_GIVEN_UP._value.get() == before + 1
        assert running.worker.status()["cut"] is None
        announce(place.bus, 1)
        request(place.bus, 2, 1)  # a learner that returns gets an answer
        await running.until(lambda: [answer.cut for answer in reached(place.bus)] == [1, 2])


class UnresponsiveBus(SqliteBus):
    """A log whose `ends` of the control topic blocks while `resume` is clear."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked, self.resume = threading.Event(), threading.Event()
        self.resume.set()

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> SqliteConsumer:
        consumer = super().consumer(topic, group=group, member=member)
        real = consumer.ends

        def ends() -> dict[int, int]:
            if topic == CONTROL:
                self.asked.set()
                assert self.resume.wait(LIMIT_S)
            return real()

        consumer.ends = ends  # type: ignore[method-assign]
        return consumer


async def test_an_outage_of_the_log_does_not_end_a_cut(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens sampled outside the cut could never be scored, and an outage must cost only time."""
    monkeypatch.setattr(cut_responder, "HOLD_LIMIT_S", 0.0)
    before = instruments.HOLDS_GIVEN_UP._value.get()
    with closing(UnresponsiveBus(place.bus.path)) as bus:
        async with worker_mid_message(place, bus=bus) as (running, engine):
            bus.resume.clear()
            bus.asked.clear()
            request(place.bus, 1, 0)
            await running.until(lambda: bus.asked.is_set() and len(reached(place.bus)) == 1)
            await assert_paused(engine)
            announce(place.bus, 1)  # the learner publishes once the log answers
            bus.resume.set()
            await running.until(lambda: finished(place.bus) == ["g000000/0"])
    assert engine.sampled == [0] * 5 + [1] * 3
    assert instruments.HOLDS_GIVEN_UP._value.get() == before


async def test_after_an_outage_the_time_limit_of_the_cut_starts_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_responder, "ANSWER_S", 0.0)  # every read of the log counts as too slow
    monkeypatch.setattr(cut_responder, "HOLD_LIMIT_S", 0.001)
    async with worker_mid_message(place) as (running, engine):
        request(place.bus, 1, 0)
        await running.until(lambda: len(reached(place.bus)) == 1)
        await running.looked()
        await assert_paused(engine)
        assert running.worker.status()["cut"] == 1


class SlowDisk(SqliteBus):
    """A log whose writes of trajectories block until `resume` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.publishing, self.resume = threading.Event(), threading.Event()

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if topic == TRAJECTORIES:
            self.publishing.set()
            assert self.resume.wait(LIMIT_S)
        return super().publish(topic, records)


async def test_a_worker_answers_after_all_its_trajectories_are_durable(place: Place) -> None:
    """This includes trajectories that finished just before the cut."""
    offer(place.bus, 0)
    announce(place.bus, 0)
    with closing(SlowDisk(place.bus.path)) as bus:
        async with working(place, bus=bus) as running:
            await running.until(lambda: running.worker.status()["finished"] == 2)
            request(place.bus, 1, 0)
            await running.until(lambda: running.worker.status()["cut"] == 1)
            await running.until(bus.publishing.is_set)
            await running.looked()
            assert reached(place.bus) == []
            bus.resume.set()
            await running.until(lambda: len(reached(place.bus)) == 1)
            assert finished(place.bus) == ids(0)
            assert reached(place.bus)[0].positions == ends(place.bus)
