"""A worker: it samples with verified versions only, stops with its run, and reports its status."""

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    CutRequested,
    RunFinished,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout import worker as the_worker
from palimpsest.services.rollout.worker import NO_PARTITION
from tests.records.builders import SAMPLING
from tests.unit.rollout.working import (
    LIMIT_S,
    MOST_SAMPLES,
    RUN,
    Place,
    announce,
    committed,
    finish,
    finished,
    ids,
    messages,
    offer,
    working,
)


class SlowDisk(SqliteBus):
    """A log whose writes of trajectories block until `goes_on` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.publishing, self.goes_on = threading.Event(), threading.Event()

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if topic == TRAJECTORIES:
            self.publishing.set()
            assert self.goes_on.wait(LIMIT_S)
        return super().publish(topic, records)


async def test_a_group_is_not_begun_before_its_version_is_verified(place: Place) -> None:
    offer(place.bus, 0, version=2)
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: Version(2) in running.weights.awaited)
        assert (running.weights.verified, running.engine.asked) == (0, [])
        running.engine.scoring.clear()
        announce(place.bus, 2)
        await running.until(lambda: running.engine.loaded == [0, 2])  # loaded, and its canary is not scored yet
        assert (running.weights.verified, running.engine.asked) == (0, [])
        running.engine.scoring.set()
        await running.until(lambda: finished(place.bus) == ids(0))
    assert {s.version for m in messages(place.bus, TRAJECTORIES) for s in m.segments} == {2}


async def test_an_offer_with_another_limit_than_the_workers_ends_it_with_both_numbers(place: Place) -> None:
    other = msgspec.structs.replace(SAMPLING, max_trajectory_tokens=SAMPLING.max_trajectory_tokens + 1)
    offer(place.bus, 0, sampling=other)
    announce(place.bus, 0)
    async with working(place) as running:
        with pytest.raises(UserError, match=r"is 64 on worker-0, from the test, but .* of up to 65 tokens") as error:
            await running.ends()
    assert error.value.code is ExitCode.CONFIGURATION
    assert (finished(place.bus), committed(place.bus)) == ([], 0), "another worker samples it"


async def test_an_offer_with_another_limit_after_one_with_the_workers_is_dead_lettered(place: Place) -> None:
    """The learner of a run offers one limit, so another program wrote it."""
    offer(place.bus, 0)
    (sound,) = messages(place.bus, TASKS)
    other = msgspec.structs.replace(SAMPLING, max_trajectory_tokens=SAMPLING.max_trajectory_tokens + 1)
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: finished(place.bus) == ids(0))
        forged = msgspec.structs.replace(sound, group="g000001", index=1, sampling=other)
        place.bus.publish(TASKS, [Outgoing("g", encode(forged))])
        offer(place.bus, 2)
        await running.until(lambda: finished(place.bus) == ids(0, 2))
    (letter,) = messages(place.bus, DEAD_LETTERS)
    assert (letter.cause, letter.reason) == (
        RejectCause.OUT_OF_RANGE,
        "group g000001: max_trajectory_tokens is 65; earlier offers have 64",
    )


async def test_nothing_is_sampled_before_the_first_version(place: Place) -> None:
    offer(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: Version(0) in running.weights.awaited)
        assert running.worker.waiting_for() == running.worker.not_ready() == "the first version"
        assert running.engine.asked == []
        announce(place.bus, 0)
        await running.until(lambda: finished(place.bus) == ids(0))
        await running.until(lambda: running.worker.waiting_for() == "tasks")
        assert running.worker.not_ready() is None


async def test_a_second_worker_of_a_single_task_partition_reports_that_it_has_none(place: Place) -> None:
    announce(place.bus, 0)
    async with working(place, name="worker-0") as first:
        await first.until(lambda: first.worker.waiting_for() == "tasks")
        async with working(place, name="worker-1") as second:
            await second.until(lambda: NO_PARTITION in {w.waiting_for() for w in (first.worker, second.worker)})


async def test_unreadable_records_are_dead_lettered_and_work_continues(place: Place) -> None:
    place.bus.publish(TASKS, [Outgoing("a key", b"\xff\x00")])
    place.bus.publish(CONTROL, [Outgoing("another", b"\xc1")])
    offer(place.bus, 1)
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: committed(place.bus) == 2)
        await running.until(lambda: len(messages(place.bus, DEAD_LETTERS)) == 2)
    letters = {letter.topic: letter for letter in messages(place.bus, DEAD_LETTERS)}
    assert {(d.run, d.topic, d.partition, d.offset, d.key, d.body) for d in letters.values()} == {
        ("test", TASKS, 0, 0, "a key", b"\xff\x00"),
        ("test", CONTROL, 0, 0, "another", b"\xc1"),
    }
    assert all(letter.reason for letter in letters.values())
    assert {letter.cause for letter in letters.values()} == {RejectCause.UNDECODABLE}
    assert finished(place.bus) == ids(1)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"samples": 0}, RejectCause.OUT_OF_RANGE),
        ({"version": -1}, RejectCause.NEGATIVE_VERSION),
        ({"time_limit_s": float("nan")}, RejectCause.NOT_FINITE),
        ({"sampling": msgspec.structs.replace(SAMPLING, max_turns=0)}, RejectCause.OUT_OF_RANGE),
        ({"sampling": msgspec.structs.replace(SAMPLING, temperature=float("inf"))}, RejectCause.NOT_FINITE),
    ],
)
async def test_an_invalid_offer_is_dead_lettered_and_work_continues(
    place: Place, changes: dict[str, Any], cause: RejectCause
) -> None:
    offer(place.bus, 0)
    (standing,) = messages(place.bus, TASKS)
    place.bus.publish(TASKS, [Outgoing("g", encode(msgspec.structs.replace(standing, **changes)))])
    place.bus.publish(CONTROL, [Outgoing("test", encode(VersionPublished("test", Version(-4), "", 0.0)))])
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: committed(place.bus) == 2)
        await running.until(lambda: len(messages(place.bus, DEAD_LETTERS)) == 2)
    causes = {letter.topic: letter.cause for letter in messages(place.bus, DEAD_LETTERS)}
    assert causes == {TASKS: cause, CONTROL: RejectCause.NEGATIVE_VERSION}
    assert finished(place.bus) == ids(0)


async def test_made_up_records_of_control_and_offers_change_nothing(place: Place) -> None:
    """Without the checks, the worker would wait for version 10^9, or stop, or pause, or sample for a stranger."""
    announce(place.bus, 0)
    offer(place.bus, 7, writer=0)  # by an earlier release: older than the worker
    async with working(place) as running:
        await running.until(lambda: running.weights.verified == 0)
        made_up = [
            VersionPublished(RUN, Version(10**9), "", 0.0, 1),
            VersionPublished(RUN, Version(3), "", 0.0),
            RunFinished(RUN, Version(0), 2),
            CutRequested(RUN, 7, Version(0), 5.0, 2),
        ]
        place.bus.publish(CONTROL, [Outgoing(RUN, encode(message)) for message in made_up])
        offer(place.bus, 0, version=10**9)
        offer(place.bus, 3, writer=0)
        offer(place.bus, 4, writer=2)
        offer(place.bus, 5, samples=MOST_SAMPLES + 1)
        offer(place.bus, 1)
        await running.until(lambda: finished(place.bus) == ids(1, 7))
        announce(place.bus, 2)
        await running.until(lambda: running.weights.verified == 2)
        assert running.engine.loaded == [0, 2]
        await running.until(lambda: len(messages(place.bus, DEAD_LETTERS)) == 8)
    causes = [(letter.topic, letter.cause) for letter in messages(place.bus, DEAD_LETTERS)]
    assert sorted(causes) == [
        *[(CONTROL, RejectCause.UNKNOWN_VERSION)],
        *[(CONTROL, RejectCause.UNKNOWN_WRITER)] * 3,
        *[(TASKS, RejectCause.OUT_OF_RANGE)],
        *[(TASKS, RejectCause.UNKNOWN_VERSION)],
        *[(TASKS, RejectCause.UNKNOWN_WRITER)] * 2,
    ]


async def test_records_of_another_run_are_dead_lettered_and_ignored(place: Place) -> None:
    offer(place.bus, 0, run="another")
    announce(place.bus, 3, run="another")
    announce(place.bus, 1)
    async with working(place) as running:
        finish(place.bus, run="another")
        offer(place.bus, 1)
        await running.until(lambda: committed(place.bus) == 2)
        announce(place.bus, 2)  # read after the other run's end
        await running.until(lambda: running.weights.verified == 2)
        assert running.engine.loaded == [1, 2]
        assert sorted(running.engine.asked) == ids(1)
        await running.until(lambda: len(messages(place.bus, DEAD_LETTERS)) == 3)
    letters = messages(place.bus, DEAD_LETTERS)
    assert sorted(letter.topic for letter in letters) == [CONTROL, CONTROL, TASKS]
    assert {(letter.run, letter.cause) for letter in letters} == {("test", RejectCause.WRONG_RUN)}


async def test_a_worker_stops_when_its_run_is_over(place: Place) -> None:
    finish(place.bus)  # from an earlier start of the run, so not its end
    announce(place.bus, 0)
    offer(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: sorted(running.engine.asked) == ids(0))
        finish(place.bus)
        await running.until(lambda: running.worker.waiting_for() == "trajectories in flight, before it stops")
        running.engine.open()
        await running.ends()
    assert finished(place.bus) == ids(0)
    assert committed(place.bus) == 1
    assert messages(place.bus, WORKERS)[-1].live == 2  # it publishes its stop when it begins to stop


async def test_a_stopping_worker_begins_no_task(place: Place) -> None:
    offer(place.bus, 0)
    announce(place.bus, 0)
    async with working(place, max_live=4) as running:
        running.engine.shut()
        await running.until(lambda: sorted(running.engine.asked) == ids(0))
        running.worker.stop()
        await running.until(lambda: running.worker.waiting_for() == "trajectories in flight, before it stops")
        assert running.worker.not_ready() == "trajectories in flight, before it stops"
        offer(place.bus, 1, 2)
        announce(place.bus, 1)
        await running.until(lambda: running.weights.verified == 1)  # it still reads versions and reads no tasks
        running.engine.open()
        await running.ends()
        assert sorted(running.engine.asked) == ids(0)
    assert finished(place.bus) == ids(0)
    assert committed(place.bus) == 1
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 3)
        assert sorted(again.engine.asked) == ids(1, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("max_live", [1, 3, 7])
async def test_there_are_never_more_live_trajectories_than_slots(place: Place, max_live: int) -> None:
    offer(place.bus, *range(6), samples=4)
    announce(place.bus, 0)
    async with working(place, max_live=max_live) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == max_live)
        announce(place.bus, 1)
        await running.until(lambda: running.weights.verified == 1)  # it has polled many times since
        assert running.worker.alive().live == running.engine.live == max_live
        running.engine.open()
        await running.until(lambda: committed(place.bus) == 6)
        assert running.engine.most == max_live
        assert running.worker.alive().live == 0
    assert finished(place.bus) == ids(*range(6), samples=range(4))


async def test_updates_and_status_are_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_worker, "ALIVE_S", 0.02)
    announce(place.bus, 0)
    offer(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == 2)
        assert running.worker.status()["engine"] == {"kind": "scripted"}
        announce(place.bus, 1)
        await running.until(lambda: running.weights.verified == 1)
        await running.until(
            lambda: any(isinstance(m, WorkerAlive) and m.version == 1 for m in messages(place.bus, WORKERS))
        )
    reports = messages(place.bus, WORKERS)
    applied = [m for m in reports if isinstance(m, VersionApplied)]
    assert [(m.run, m.worker, m.version, m.accepted, m.canary_error, m.live) for m in applied] == [
        ("test", "worker-0", 0, True, 0.0, 0),
        ("test", "worker-0", 1, True, 0.0, 2),
    ]
    assert [m.digest for m in applied] == [place.store.manifest(Version(v)).digest for v in (0, 1)]
    last = [m for m in reports if isinstance(m, WorkerAlive)][-1]
    assert (last.run, last.worker, last.version, last.live, last.sampled_tokens) == ("test", "worker-0", 1, 2, 0)
    assert last.seconds > last.idle_s >= 0


async def test_a_refused_version_ends_the_worker_and_is_published(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == 2)
        monkeypatch.setenv("PALIMPSEST_FAULT", "rollout.scripted_canary")
        announce(place.bus, 1)
        await running.until(lambda: running.engine.loaded == [0, 1])
        running.engine.open()  # version 1 samples from here on
        with pytest.raises(UserError, match="refused version 1") as error:
            await running.ends()
    assert error.value.code is ExitCode.CANARY
    applied = [m for m in messages(place.bus, WORKERS) if isinstance(m, VersionApplied)]
    assert [(m.version, m.accepted, m.canary_error) for m in applied] == [(0, True, 0.0), (1, False, 0.5)]
    assert (committed(place.bus), messages(place.bus, TRAJECTORIES)) == (0, [])


async def test_a_refusal_is_published_before_the_worker_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0)
    with closing(SlowDisk(place.bus.path)) as bus:
        async with working(place, bus=bus) as running:
            await running.until(bus.publishing.is_set)  # while trajectories are being written, later records wait
            monkeypatch.setenv("PALIMPSEST_FAULT", "rollout.scripted_canary")
            announce(place.bus, 1)
            await running.until(lambda: [report.accepted for report in running.reports] == [True, False])
            bus.goes_on.set()
            with pytest.raises(UserError, match="refused version 1"):
                await running.ends()
    assert [m.accepted for m in messages(place.bus, WORKERS) if isinstance(m, VersionApplied)] == [True, False]
