"""The number of concurrent trajectories of a worker changes while it runs."""

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config.settings import MAX_LIVE
from palimpsest.common.messages import CONTROL, ControlChanged, encode
from palimpsest.common.versions import Version
from tests.unit.rollout.working import RUN, Place, announce, committed, finished, ids, offer, working


def change(bus: SqliteBus, number: int, max_live: int, *, writer: int = 1) -> None:
    """Put a changed rollout.max_live on the log."""
    record = ControlChanged(
        RUN, writer, number, f"c{number}", "ann", "tune", "", "settings", {MAX_LIVE: 4}, {MAX_LIVE: max_live}, number,
        Version(0), 0, 0.0, "",
    )  # fmt: skip
    bus.publish(CONTROL, [Outgoing("c", encode(record))])


async def test_the_number_of_slots_changes_while_the_worker_runs(place: Place) -> None:
    offer(place.bus, *range(3), samples=4)
    announce(place.bus, 0)
    change(place.bus, 1, 2)  # of before the worker's start
    async with working(place, max_live=4) as running:
        running.engine.shut()
        await running.until(lambda: running.engine.live == 2)
        change(place.bus, 2, 9)  # more than the engine was started for
        change(place.bus, 1, 1)  # repeated after an outage
        await running.until(lambda: running.engine.live == 4)
        announce(place.bus, 1)
        await running.until(lambda: running.weights.verified == 1)  # it has read all changes
        assert running.engine.live == running.engine.most == 4
        running.engine.open()
        await running.until(lambda: committed(place.bus) == 3)
    assert finished(place.bus) == ids(*range(3), samples=range(4))
