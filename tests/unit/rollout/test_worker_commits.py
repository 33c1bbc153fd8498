"""Commits of a worker: a task is committed only after all its trajectories are on the log."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES, WORKERS, DropReason, TrajectoryDropped
from palimpsest.common.versions import Version
from palimpsest.services.rollout import worker as the_worker
from tests.unit.rollout.working import (
    Place,
    announce,
    committed,
    finished,
    heard,
    ids,
    messages,
    offer,
    opened_bus,
    working,
)

pytestmark = pytest.mark.thorough

FULL = OSError(errno.ENOSPC, "No space left on device")


class FullDisk(SqliteBus):
    """A log that refuses records on these topics."""

    refuses: tuple[str, ...] = ()

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if topic in self.refuses:
            raise FULL
        return super().publish(topic, records)


@pytest.fixture
def full_disk(place: Place) -> Iterator[FullDisk]:
    with closing(FullDisk(place.bus.path)) as bus:
        yield bus


async def test_a_task_is_committed_when_all_its_trajectories_are_on_the_log(place: Place) -> None:
    offer(place.bus, 0, 1, 2)
    announce(place.bus, 0)
    async with working(place) as running:
        running.engine.shut(lambda trajectory: trajectory == "g000001/1")
        await running.until(lambda: len(finished(place.bus)) == 5)
        await running.until(lambda: committed(place.bus) == 1)
        offer(place.bus, 3)
        await running.until(lambda: set(ids(3)) <= set(finished(place.bus)))  # it polled and committed in the meantime
        assert committed(place.bus) == 1
        running.engine.open()
        await running.until(lambda: committed(place.bus) == 4)
        assert finished(place.bus) == ids(0, 1, 2, 3)


async def test_a_worker_killed_before_the_commit_samples_the_same_trajectories_again(place: Place) -> None:
    offer(place.bus, 0, 1, 2)
    announce(place.bus, 0)
    async with working(place) as killed:
        killed.engine.shut(lambda trajectory: trajectory == "g000001/1")
        await killed.until(lambda: len(finished(place.bus)) == 5 and committed(place.bus) == 1)
    assert finished(place.bus) == [*ids(0), "g000001/0", *ids(2)]
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 3)
        assert sorted(again.engine.asked) == ids(1, 2)
    assert finished(place.bus) == sorted([*ids(0, 1, 2), "g000001/0", *ids(2)])


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_trajectory_is_lost_at_any_end_of_a_worker(place: Place, data: st.DataObject) -> None:
    groups, samples = data.draw(st.integers(1, 4), "groups"), data.draw(st.integers(1, 3), "samples")
    everything = ids(*range(groups), samples=range(samples))
    held = data.draw(st.sets(st.sampled_from(everything)), "held")
    path = place.folder / f"{len(list(place.folder.iterdir()))}.sqlite"
    with closing(opened_bus(path)) as bus:
        offer(bus, *range(groups), samples=samples)
        announce(bus, 0)
        async with working(place, bus=bus, max_live=len(everything)) as first:
            first.engine.shut(held.__contains__)
            enough = data.draw(st.integers(0, len(everything) - len(held)), "finished when it ends")
            await first.until(lambda: len(finished(bus)) >= enough)
            if enough == len(everything) - len(held):
                whole = min((int(name[1:7]) for name in held), default=groups)
                await first.until(lambda: committed(bus) >= whole)
            if data.draw(st.booleans(), "asked to stop"):
                first.worker.stop()
                first.engine.open()
                await first.ends()
        standing = set(finished(bus))
        assert set(ids(*range(committed(bus)), samples=range(samples))) <= standing
        async with working(place, bus=bus) as second:
            await second.until(lambda: committed(bus) == groups)
            begun_again = set(second.engine.asked)
        assert set(finished(bus)) == set(everything)
        assert set(everything) - standing <= begun_again


async def test_a_dropped_trajectory_counts_as_done(place: Place) -> None:
    offer(place.bus, 0, environment="no_such_environment")
    offer(place.bus, 1)
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: committed(place.bus) == 2)
    dropped = [m for m in messages(place.bus, TRAJECTORIES) if isinstance(m, TrajectoryDropped)]
    assert sorted((d.trajectory, d.reason) for d in dropped) == [(i, DropReason.ENVIRONMENT_FAILED) for i in ids(0)]
    assert all("unknown_environment" in d.detail for d in dropped)
    assert finished(place.bus) == ids(1)


@pytest.mark.parametrize("topic", [TRAJECTORIES, WORKERS, DEAD_LETTERS])
async def test_a_failed_publish_ends_the_worker_and_commits_nothing(
    place: Place, full_disk: FullDisk, topic: str
) -> None:
    full_disk.refuses = (topic,)
    place.bus.publish(TASKS, [Outgoing("x", b"not a task")])
    offer(place.bus, 1)
    announce(place.bus, 0)
    async with working(place, bus=full_disk) as running:
        with pytest.raises(OSError, match="No space left"):
            await running.ends()
    assert committed(place.bus) <= len(messages(place.bus, DEAD_LETTERS))
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 2)
    assert len(messages(place.bus, DEAD_LETTERS)) >= 1
    assert set(finished(place.bus)) == set(ids(1))


async def test_a_task_that_does_not_finish_in_time_stays_uncommitted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(the_worker, "DRAIN_S", 0.2)
    offer(place.bus, 0, 1)
    announce(place.bus, 0)
    async with working(place) as running:
        running.engine.shut(lambda trajectory: trajectory == "g000001/0")
        await running.until(lambda: len(finished(place.bus)) == 3)
        running.worker.stop()
        await running.ends()
    assert committed(place.bus) == 1
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 2)
        assert sorted(again.engine.asked) == ids(1)


@pytest.mark.parametrize("waits_for", ["a slot", "a version"])
async def test_a_worker_that_cannot_take_a_task_stays_a_group_member(place: Place, waits_for: str) -> None:
    """Otherwise other workers would sample its tasks again."""
    with closing(opened_bus(place.folder / "short.sqlite", lease_s=0.3)) as bus:
        offer(bus, 0, 1, version=0 if waits_for == "a slot" else 1)
        announce(bus, 0)
        async with working(place, bus=bus, max_live=2) as running:
            running.engine.shut()
            if waits_for == "a slot":
                await running.until(lambda: running.engine.live == 2)
            else:
                await running.until(lambda: Version(1) in running.weights.awaited)
            for _ in range(3):
                last = heard(bus, "worker-0")
                await running.until(lambda last=last: heard(bus, "worker-0") > last)


async def test_done_tasks_are_committed_while_no_task_can_be_taken(place: Place) -> None:
    offer(place.bus, 0)
    offer(place.bus, 1, version=1)
    announce(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: Version(1) in running.weights.awaited)
        running.engine.open()
        await running.until(lambda: committed(place.bus) == 1)
    assert finished(place.bus) == ids(0)


async def test_workers_share_the_tasks(place: Place) -> None:
    with closing(opened_bus(place.folder / "wide.sqlite", partitions=4)) as bus:
        announce(bus, 0)
        async with working(place, bus=bus) as one, working(place, bus=bus, name="worker-1") as other:
            await one.until(lambda: heard(bus, "worker-0") > 0 and heard(bus, "worker-1") > 0)
            offer(bus, *range(12))
            await one.until(lambda: set(finished(bus)) == set(ids(*range(12))))
            assert one.engine.asked
            assert other.engine.asked
