"""A worker serves an evaluation with exactly the stated version, and keeps what later versions must sample."""

import msgspec
import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    DropReason,
    EvaluationEnded,
    EvaluationStarted,
    TrajectoryDropped,
    TrajectoryFinished,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.versions import Version
from palimpsest.services.rollout.evaluations import WorkerEvaluations
from tests.unit.rollout.working import RUN, Place, announce, finished, ids, messages, offer, turns, working

EVALUATED = ["e000000-000000/0", "e000000-000000/1"]


def start(place: Place, version: int = 0, *, writer: int = 1) -> None:
    started = EvaluationStarted(run=RUN, version=Version(version), writer=writer)
    place.bus.publish(CONTROL, [Outgoing(RUN, encode(started))])


def end(place: Place, version: int = 0) -> None:
    ended = EvaluationEnded(run=RUN, version=Version(version), writer=1)
    place.bus.publish(CONTROL, [Outgoing(RUN, encode(ended))])


async def test_an_evaluation_overtakes_groups_of_later_versions(place: Place) -> None:
    announce(place.bus, 0)
    start(place)
    announce(place.bus, 2)
    offer(place.bus, 0, version=2)  # before it on the same partition
    offer(place.bus, 0, version=0, evaluation=True)
    async with working(place) as running:
        await running.until(lambda: finished(place.bus) == EVALUATED)
        assert running.engine.loaded == [0]
        end(place)
        await running.until(lambda: finished(place.bus) == EVALUATED + ids(0))
    versions = {m.group: {s.version for s in m.segments} for m in messages(place.bus, TRAJECTORIES)}
    assert versions == {"e000000-000000": {0}, "g000000": {2}}


async def test_an_evaluation_keeps_its_version_while_its_trajectories_are_in_flight(place: Place) -> None:
    announce(place.bus, 0)
    start(place)
    offer(place.bus, 0, version=0, evaluation=True)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == 2)
        announce(place.bus, 2)
        await running.until(lambda: running.weights._newest == 2)
        await turns()
        running.engine.open()
        await running.until(lambda: finished(place.bus) == EVALUATED)
        assert running.engine.loaded == [0]


async def test_without_the_hold_the_trajectories_are_told_apart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def observe(*_: object) -> None: ...

    monkeypatch.setattr(WorkerEvaluations, "observe", observe)
    announce(place.bus, 0)
    start(place)
    offer(place.bus, 0, version=0, evaluation=True)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == 2)
        announce(place.bus, 2)
        await running.until(lambda: running.weights.verified == 2)
        running.engine.open()
        await running.until(lambda: len(messages(place.bus, TRAJECTORIES)) == 2)
    found = messages(place.bus, TRAJECTORIES)
    assert all(isinstance(m, TrajectoryDropped) and m.reason is DropReason.VERSION_PASSED for m in found)


async def test_a_later_learner_ends_the_evaluation_of_the_one_that_it_replaced(place: Place) -> None:
    held: list[Version | None] = []

    async def use(version: Version | None) -> None:
        held.append(version)

    follows = WorkerEvaluations(use, lambda _: None)
    await follows.observe(EvaluationStarted(run=RUN, version=Version(3), writer=1))
    await follows.observe(VersionPublished(run=RUN, version=Version(4), digest="", published_at=0.0, writer=1))
    await follows.observe(EvaluationEnded(run=RUN, version=Version(2), writer=1))
    await follows.observe(VersionPublished(run=RUN, version=Version(5), digest="", published_at=0.0, writer=2))
    assert held == [3, None]


@pytest.mark.parametrize(
    ("samples", "group", "reason"),
    [
        (3, "e000000-000000", "group e000000-000000: samples is 3; evaluation.samples is 2 on worker-0"),
        (2, "g000005", "group g000005: evaluation is True, but its id says otherwise"),
    ],
)
async def test_an_unlawful_offer_is_rejected(place: Place, samples: int, group: str, reason: str) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0, evaluation=True)
    (sound,) = messages(place.bus, TASKS)
    place.bus.publish(TASKS, [Outgoing("g", encode(msgspec.structs.replace(sound, samples=samples, group=group)))])
    async with working(place) as running:
        await running.until(lambda: len(messages(place.bus, DEAD_LETTERS)) == 1)
        await running.until(lambda: finished(place.bus) == EVALUATED)
    (letter,) = messages(place.bus, DEAD_LETTERS)
    assert (letter.cause in (RejectCause.OUT_OF_RANGE, RejectCause.CONTRADICTS_OFFER), letter.reason) == (True, reason)
    assert all(isinstance(m, TrajectoryFinished) for m in messages(place.bus, TRAJECTORIES))
