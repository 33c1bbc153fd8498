"""A worker that starts after the end of its run ends too, unless the run is continued."""

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import CONTROL, ControlChanged, RunFinished, VersionPublished, encode
from palimpsest.common.run_end import RunEnd
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.versions import Version
from tests.unit.rollout.working import RUN, VERSIONS, Place, announce, finish, finished, ids, offer, working


class TwoLearners:
    """A store in which learner 2 has begun. It has written nothing to the log yet."""

    def newest_writer(self) -> int:
        return 2

    def newest_version(self) -> Version:
        return Version(3)


def change(number: int, versions: object, *, writer: int = 1) -> ControlChanged:
    return ControlChanged(
        RUN, writer, number, f"c{number}", "ann", "tune", "", "settings", {}, {"learner.versions": versions}, number,
        Version(0), 0, 0.0, "",
    )  # fmt: skip


def put(bus: SqliteBus, change: ControlChanged) -> None:
    bus.publish(CONTROL, [Outgoing("c", encode(change))])


async def test_a_worker_that_starts_after_the_end_of_the_run_ends(place: Place) -> None:
    announce(place.bus, 0)
    offer(place.bus, 0)  # no learner would read its trajectories
    finish(place.bus, versions=VERSIONS)
    async with working(place) as running:
        await running.ends()
    assert (running.engine.asked, finished(place.bus)) == ([], [])


async def test_a_worker_that_starts_after_the_end_waits_for_the_learner_that_has_begun(place: Place) -> None:
    announce(place.bus, 0)
    finish(place.bus, versions=VERSIONS)
    offer(place.bus, 0)
    async with working(place, control=ControlCheck(TwoLearners())) as running:
        await running.until(lambda: finished(place.bus) == ids(0))


async def test_a_worker_that_starts_after_the_end_waits_where_its_run_file_has_more_versions(place: Place) -> None:
    announce(place.bus, 0)
    finish(place.bus, versions=VERSIONS - 1)
    offer(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: finished(place.bus) == ids(0))


async def test_a_worker_knows_the_number_of_versions_that_was_changed_before_the_end(place: Place) -> None:
    announce(place.bus, 0)
    put(place.bus, change(1, VERSIONS - 10))
    finish(place.bus, versions=VERSIONS - 10)
    async with working(place) as running:
        await running.ends()


def test_the_end_of_a_run_holds_until_a_newer_learner_writes() -> None:
    end = RunEnd(VERSIONS)
    end.observe(RunFinished(RUN, Version(30), 1))  # an earlier release named no number
    assert end.announced is None
    over = RunFinished(RUN, Version(31), 1, VERSIONS)
    end.observe(over)
    assert end.announced == over
    end.observe(VersionPublished(RUN, Version(31), "", 0.0, 2))
    assert end.announced is None


def test_a_changed_number_of_versions_counts_once_and_only_as_a_number() -> None:
    end = RunEnd(VERSIONS)
    for record in (change(2, 60), change(1, 20), change(2, 10), change(3, "many")):
        end.observe(record)
    end.observe(RunFinished(RUN, Version(59), 1, 59))
    assert end.announced is None
    end.observe(RunFinished(RUN, Version(60), 1, 60))
    assert end.announced is not None
