"""The trajectory reader accounts for every record of the log."""

from dataclasses import replace
from typing import Any

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    TRAJECTORIES,
    DropReason,
    TrajectoryDropped,
)
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from tests.learner_parts.ingest import Ledger, an_ingest
from tests.learner_parts.interruption import a_flush
from tests.records.builders import a_finished
from tests.unit.learner.ingest.reading import NEWEST, letters, publish, started


def test_finished_and_dropped_trajectories_reach_the_ledger(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(
        bus,
        a_finished(0, 0),
        a_finished(0, 1),
        TrajectoryDropped("test", "g000001/0", "g000001", "worker-0", DropReason.ENVIRONMENT_FAILED, "?"),
    )
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.complete() == 1
    assert ledger.counts()["dropped"] == {"environment_failed": 1}
    assert sorted(reader.arrived) == ["g000000/0", "g000000/1"]
    assert reader.sampled_tokens == 8


def test_a_repeated_trajectory_counts_once(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75), a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.waiting() == 1
    assert reader.arrived["g000000/0"].record.reward == 0.25
    assert letters(bus) == []


def test_offsets_stop_at_the_first_untrained_trajectory(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    partition = reader.arrived["g000000/0"].partition
    assert reader.offsets()[partition] == 0
    reader.resolve(reader.arrived["g000000/1"])
    assert reader.offsets()[partition] == 0
    reader.resolve(reader.arrived["g000000/0"])
    assert reader.offsets()[partition] == 2


def test_a_restart_rereads_unresolved_trajectories_and_adopts_later_offers(bus: SqliteBus) -> None:
    before = an_ingest(bus)
    before.start({}, {}, {}, now=0.0)
    before.tasks.offer(Version(0), now=0.0)
    publish(bus, a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    before.reader.read_all(NEWEST, timeout_s=0)
    assert before.ledger.take_batch(Version(0)) is None
    state, offsets, task_offsets = before.ledger.state(), before.reader.offsets(), before.tasks.offsets()
    before.ledger.expire(now=1e9)  # the old process offers more before it exits
    assert before.tasks.offer(Version(1), now=0.0) > 0
    before.close()

    again = an_ingest(bus)
    again.ledger.restore(state, now=0.0)
    again.start(offsets, task_offsets, {}, now=0.0)
    again.reader.read_all(NEWEST, timeout_s=0)
    assert sorted(again.reader.arrived) == ["g000000/0", "g000000/1", "g000001/0"]
    assert again.ledger.counts()["offered"] == before.ledger.counts()["offered"]
    assert again.ledger.next_index == before.ledger.next_index


def test_a_restart_from_the_groups_committed_offsets_would_lose_trajectories(bus: SqliteBus) -> None:
    """Committed offsets of a consumer group say what was read; the checkpoint's offsets say what was trained."""
    before, ledger = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    before.read_all(NEWEST, timeout_s=0)
    read = {partition: end for partition, end in before._consumer.ends().items() if end}
    for offsets, found in ((before.offsets(), 2), (read, 0)):
        again = an_ingest(bus)
        again.ledger.restore(ledger.state(), now=0.0)
        again.start(offsets, {}, {}, now=0.0)
        again.reader.read_all(NEWEST, timeout_s=0)
        assert again.ledger.waiting() == found
        again.close()


class Forgetful(Ledger):
    """A ledger that never recognizes an id."""

    def _find(self, group: str, trajectory: str) -> Any:
        found = super()._find(group, trajectory)
        if found.status is not ArrivalStatus.DUPLICATE or group not in self._open:
            return found
        sample = int(trajectory.rpartition("/")[2])
        return replace(found, status=ArrivalStatus.NEW, group=self._open[group], sample=sample)


@pytest.mark.parametrize(("kind", "reward"), [(TrajectoryLedger, 0.25), (Forgetful, 0.75)])
def test_without_ids_a_repeated_record_would_replace_the_first(
    bus: SqliteBus, kind: type[Ledger], reward: float
) -> None:
    ingest = an_ingest(bus, ledger=kind)
    ingest.start({}, {}, {}, now=0.0)
    ingest.tasks.offer(Version(0), now=0.0)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    assert ingest.reader.arrived["g000000/0"].record.reward == reward


def test_a_truncated_log_stops_the_run(bus: SqliteBus) -> None:
    with pytest.raises(UserError, match="would lose trajectories silently"):
        an_ingest(bus).start({0: 17}, {}, {}, now=0.0)


def test_pending_counts_awaited_and_untrained_trajectories(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, a_finished(0, 0), TrajectoryDropped("test", "g000000/1", "g000000", "a", DropReason.DEADLINE, "?"))
    reader.read_all(NEWEST, timeout_s=0)
    pending = reader.is_pending
    assert pending("g000000/0")
    assert not pending("g000000/1")
    assert pending("g000001/0")
    assert not pending("g000077/0")
    assert not pending("g000001/2")
    assert not pending("g000001/00")
    assert not pending("nonsense")


def test_read_until_reads_every_record_up_to_the_positions(bus: SqliteBus) -> None:
    reader, _ = started(bus, keep_flushed=True)
    publish(bus, *(a_flush(group, sample) for group in range(4) for sample in range(2)))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    assert reader.read_until(ends, NEWEST, deadline_s=10)
    assert len(reader.flushed) == 8
    assert reader.read_until({}, NEWEST, deadline_s=0)
    assert reader.read_until(ends, NEWEST, deadline_s=0), "records read before need not be read again"
    assert reader.read_until({0: 10**9, 99: 1}, NEWEST, deadline_s=0), "positions beyond the end of the log are ignored"


def test_read_until_returns_false_for_positions_not_reached_in_time(
    bus: SqliteBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    monkeypatch.setattr(reader._consumer, "poll", lambda **_: [])  # an outage
    assert not reader.read_until(ends, NEWEST, deadline_s=0.01)
