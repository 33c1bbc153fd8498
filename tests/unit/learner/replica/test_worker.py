"""A replica with a real log, a real store, and the tiny model: its scores and their order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load as load_config
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    ControlChanged,
    OldLogprobsRequested,
    RunFinished,
    SegmentFlushed,
    TrajectoryFinished,
    decode,
    encode,
    group_id,
)
from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.old_logprobs.scoring import rows_by_version
from palimpsest.services.local.supervisor import Supervisor, assign_ports
from tests.records.builders import a_finished, a_segment
from tests.servers.stores import eventually
from tests.unit.learner.replica.replicas import (
    BATCH_TOKENS,
    MIXED,
    VERSIONS,
    RunningReplica,
    Setup,
    a_reader,
    finished,
    keys,
    some_records,
    spans_of,
    to_row,
)

pytestmark = pytest.mark.thorough

LAYOUT_NOISE = 2e-3
"""nats; the bf16 error of different padding or other rows in the forward pass."""


def test_18_5_values_equal_those_of_the_snapshot_source_bit_for_bit(setup: Setup) -> None:
    """Both use the same layout: equal rows, truncated alike, in one forward pass."""
    records = some_records()
    setup.trajectories(*records)
    with RunningReplica(setup):
        eventually(lambda: keys(setup.scores()) == set().union(*map(spans_of, records)))
    by_version = [rows_by_version(m.trajectory, to_row(m).tokens, m.segments, m.temperature) for m in records]
    for version in map(Version, range(3)):
        own = [rows[version] for rows in by_version if version in rows]
        together = sorted(own, key=lambda row: (len(row.tokens), row.trajectory))
        assert len(together) * len(together[-1].tokens) <= BATCH_TOKENS
        batch = pad(together)
        (exact,) = setup.source.proximal([batch], Version(2)).logprobs
        for i, row in enumerate(together):
            for score in setup.scores():
                if (score.trajectory, score.version) == (row.trajectory, version):
                    assert score.values == exact[i, score.start : score.stop].numpy().tobytes()
                    assert score.digest == setup.store.manifest(version).digest


def test_a_row_scored_alone_differs_from_the_learners_batch_by_layout_noise_only(setup: Setup) -> None:
    records = some_records()
    with RunningReplica(setup):
        for record in records:  # each in its own forward pass
            setup.trajectories(record)
            eventually(lambda record=record: keys(setup.scores()) >= spans_of(record))
    reader, scores = a_reader(setup)
    reader.read()
    rows = reader.attach([to_row(record) for record in records])
    (exact,) = setup.source.proximal([pad([to_row(record) for record in records])], Version(2)).logprobs
    for i, row in enumerate(rows):
        assert row.old is not None
        assert scores.missing(row) == []
        own = row.versions >= 0
        assert np.abs(row.old[own] - exact[i, : len(own)].numpy()[own]).max() <= LAYOUT_NOISE
    reader.close()


def test_flushed_and_finished_segments_are_scored_and_unusable_records_are_skipped(setup: Setup) -> None:
    whole = finished(0, 0, MIXED)
    flushed = SegmentFlushed(
        run="test", trajectory=whole.trajectory, group=whole.group, attempt=0, worker="worker-0", cut=1,
        tokens=whole.tokens[: 4 * 7], segments=(MIXED[0], a_segment(5, 7, 1)), temperature=whole.temperature,
    )  # fmt: skip
    nothing = finished(3, 0, ())
    nothing = TrajectoryFinished(**{n: getattr(nothing, n) for n in nothing.__struct_fields__} | {"segments": ()})
    setup.trajectories(flushed, nothing, a_finished(3, 1, run="another"))
    setup.bus.publish(TRAJECTORIES, [Outgoing(group_id(i), b"garbage") for i in range(4)])
    with RunningReplica(setup) as running:
        eventually(lambda: len(setup.scores()) == 2)
        setup.trajectories(whole)
        eventually(lambda: len(setup.scores()) == 5)
        eventually(lambda: committed(setup) == ends(setup))
        status = running.replica.status()
    assert keys(setup.scores()) == {
        (whole.trajectory, *span) for span in [(2, 5, 0), (5, 7, 1), (5, 8, 1), (10, 14, 2)]
    }
    assert status["skipped"] == {"unusable": 5}
    assert (status["waiting"], status["scored_tokens"], status["partitions"]) == (0, 5 + 10, [0, 1])


def test_18_15_a_deleted_version_is_counted_and_skipped(setup: Setup) -> None:
    gone = finished(0, 0, (a_segment(2, 5, 0), a_segment(5, 8, 6)))
    setup.trajectories(gone)
    with RunningReplica(setup) as running:
        eventually(lambda: committed(setup) == ends(setup))
        assert running.replica.status()["skipped"] == {"version_missing": 1}
    assert keys(setup.scores()) == {(gone.trajectory, 2, 5, 0)}


def test_a_damaged_version_ends_the_replica(setup: Setup, tmp_path: Path) -> None:
    held = tmp_path / "store" / "objects" / setup.store.manifest(Version(1)).object
    body = bytearray(held.read_bytes())
    body[len(body) // 2] ^= 1
    held.write_bytes(body)
    setup.trajectories(finished(0, 0, (a_segment(2, 5, 1),)))
    running = RunningReplica(setup)
    running.thread.start()
    with pytest.raises(UserError, match="snapshot 1 is damaged") as error:
        running.join()
    assert error.value.code is ExitCode.DAMAGED
    assert committed(setup) == {}


def test_each_version_is_loaded_once_for_all_queued_rows(setup: Setup) -> None:
    setup.trajectories(*(finished(i, 0, MIXED) for i in range(12)))
    with RunningReplica(setup) as running:
        eventually(lambda: len(setup.scores()) == 36)
        assert running.replica.status()["loads"] == 3


def test_an_announced_version_is_fetched_ahead(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(FetchAhead, "begin", lambda self, held, target: begun.append((held, target)))
    setup.trajectories(finished(0, 0, MIXED))
    with RunningReplica(setup):
        eventually(lambda: len(setup.scores()) == 3)
        assert begun == [], "the versions on the log were announced before the replica started"
        setup.bus.publish(CONTROL, [Outgoing("test", encode(setup.announcement))])
        eventually(lambda: begun == [(2, 2)])


def test_requested_scores_are_computed_again(setup: Setup) -> None:
    record = finished(0, 0, MIXED)
    with RunningReplica(setup):
        request = OldLogprobsRequested(
            run="test", trajectory=record.trajectory, tokens=record.tokens, segments=MIXED[:2], temperature=0.7
        )  # fmt: skip
        setup.bus.publish(OLD_LOGPROBS, [Outgoing(record.trajectory, encode(request))])
        eventually(lambda: keys(setup.scores()) == {(record.trajectory, 2, 5, 0), (record.trajectory, 5, 8, 1)})


class RequestingBus(SqliteBus):
    """A bus that publishes a request right after the first scores."""

    def __init__(self, path: Path, request: OldLogprobsRequested) -> None:
        super().__init__(path)
        self._request: OldLogprobsRequested | None = request

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        at = super().publish(topic, records)
        if topic == OLD_LOGPROBS and (request := self._request):
            self._request = None
            self.publish(OLD_LOGPROBS, [Outgoing(request.trajectory, encode(request))])
        return at


def test_requested_scores_come_before_the_rest_of_the_queue(setup: Setup) -> None:
    """A batch waits for a limited time, and the queue holds work for much longer."""
    records = [finished(i, 0, (a_segment(2, 14, version),)) for i, version in enumerate((0,) * 12 + (1,) * 12)]
    requested = finished(99, 0, (a_segment(2, 14, 2),))  # belongs to another replica, which hangs
    setup.trajectories(*records)
    request = OldLogprobsRequested(
        run="test",
        trajectory=requested.trajectory,
        tokens=requested.tokens,
        segments=requested.segments,
        temperature=0.7,
    )
    bus = RequestingBus(setup.bus.path, request)
    with RunningReplica(setup, bus=bus):
        eventually(lambda: len(setup.scores()) == 25)
    bus.close()
    with setup.bus.consumer(OLD_LOGPROBS) as consumer:
        order = [(r.partition, decode(OLD_LOGPROBS, r.body)) for r in consumer.poll(limit=99, timeout_s=0)]
    (partition_of_request,) = {partition for partition, message in order if message.trajectory == requested.trajectory}
    own = [message for partition, message in order if partition == partition_of_request]
    at = next(i for i, message in enumerate(own) if isinstance(message, OldLogprobsRequested))
    assert own[at + 1].trajectory == requested.trajectory
    assert len(own) > at + 2, "the other rows come afterward"
    assert committed(setup) == ends(setup)


def test_a_replica_stops_at_the_end_of_its_run_and_not_of_an_earlier_run(setup: Setup) -> None:
    over = [Outgoing("test", encode(RunFinished(run="test", version=Version(2), writer=1)))]
    setup.bus.publish(CONTROL, over)
    with RunningReplica(setup) as running:
        setup.trajectories(finished(0, 0, MIXED))
        eventually(lambda: len(setup.scores()) == 3)
        setup.bus.publish(CONTROL, over)
        running.join()
        assert not running.stop.requested


@pytest.mark.parametrize("newer", [False, True], ids=["over", "continued"])
def test_a_replica_that_starts_after_the_end_of_its_run_ends_unless_a_learner_has_begun(
    setup: Setup, newer: bool
) -> None:
    end = RunFinished(run="test", version=Version(2), writer=1, versions=VERSIONS)
    setup.bus.publish(CONTROL, [Outgoing("test", encode(end))])
    if newer:
        Writer(setup.store).begin()
    with RunningReplica(setup) as running:
        if newer:
            setup.trajectories(finished(0, 0, MIXED))
            eventually(lambda: len(setup.scores()) == 3)
        else:
            running.join()
            assert not running.stop.requested


def test_a_replica_uses_the_changed_staleness_bound(setup: Setup) -> None:
    """Its run file has 0, so it would score only the tokens of version 2."""
    setup.max_staleness = 0
    change = ControlChanged(
        "test", 1, 1, "c1", "ann", "tune", "", "settings", {}, {"learner.max_staleness": 5}, 1, Version(0), 0, 0.0, ""
    )
    setup.bus.publish(CONTROL, [Outgoing("test", encode(change))])
    setup.trajectories(finished(0, 0, MIXED))
    with RunningReplica(setup):
        eventually(lambda: keys(setup.scores()) == spans_of(finished(0, 0, MIXED)))


def test_two_replicas_share_the_work_and_every_segment_is_scored(setup: Setup) -> None:
    with RunningReplica(setup, "replica-0") as one, RunningReplica(setup, "replica-1") as other:
        eventually(lambda: len(one.replica.status()["partitions"]) == len(other.replica.status()["partitions"]) == 1)
        records = [finished(i, 0, MIXED) for i in range(12)]
        setup.trajectories(*records)
        expected = set().union(*map(spans_of, records))
        eventually(lambda: keys(setup.scores()) == expected)
    authors = [score.by for score in setup.scores()]
    assert set(authors) == {"replica-0", "replica-1"}
    assert len(authors) == len(expected), "each segment is scored by one replica"


def test_repeated_scores_of_another_replica_change_nothing(setup: Setup) -> None:
    """A replica that exits between publishing and committing leaves its records to another replica."""
    record = finished(0, 0, MIXED)
    setup.trajectories(record)
    with RunningReplica(setup, "replica-0"):
        eventually(lambda: len(setup.scores()) == 3)
    rewind(setup)
    with RunningReplica(setup, "replica-1"):
        eventually(lambda: len(setup.scores()) == 6)
    reader, scores = a_reader(setup)
    reader.read()
    assert (scores.repeats, scores.conflicts) == (3, 0)
    reader.close()


def committed(setup: Setup) -> dict[int, int]:
    """Committed offsets of partitions that were read: the start of a new member of the group."""
    rows = setup.bus._db.execute("SELECT partition, offset FROM commits WHERE grp = 'replica'").fetchall()
    return {partition: offset for partition, offset in rows if offset}


def ends(setup: Setup) -> dict[int, int]:
    with setup.bus.consumer(TRAJECTORIES) as consumer:
        return {partition: end for partition, end in consumer.ends().items() if end}


def rewind(setup: Setup) -> None:
    """Reset the committed offsets to 0."""
    with setup.bus.consumer(TRAJECTORIES, group="replica", member="rewind") as consumer:
        consumer.poll(limit=0, timeout_s=0.0)
        consumer.commit(dict.fromkeys(consumer.assignment(), 0))
    assert committed(setup) == {}


LOCAL = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.mark.parametrize(
    ("kind", "asked", "started"), [("replica", 0, 1), ("replica", 3, 3), ("snapshot", 3, 0), ("bypass", 0, 0)]
)
def test_a_local_run_starts_replicas_when_it_needs_them(tmp_path: Path, kind: str, asked: int, started: int) -> None:
    own = f'run.folder = "{tmp_path}"\nlocal.replicas = {asked}\nlearner.proximal.kind = "{kind}"\n'
    (tmp_path / "run.toml").write_text(LOCAL + own)
    config, flags = assign_ports(load_config([str(tmp_path / "run.toml")], {}, program="").config)
    local = Supervisor(config, tmp_path / "run.toml", flags)
    assert [child.name for child in local.replicas] == [f"replica-{i}" for i in range(started)]
    assert all("palimpsest.services.learner.replica" in child.command for child in local.replicas)
    assert len(local.replica_urls) == len(set(local.replica_urls.values())) == started
    assert [child for child in local.children if child in local.replicas] == local.replicas


def test_tokens_that_the_learner_will_mask_are_not_scored_unless_a_batch_requests_them(setup: Setup) -> None:
    setup.max_staleness = 1
    records = [finished(0, 0, MIXED), finished(0, 1, (a_segment(3, 9, 0),), tokens=12)]
    with RunningReplica(setup) as running:
        setup.bus.publish(CONTROL, [Outgoing("test", encode(setup.announcement))])  # version 2: 1 is the oldest
        eventually(lambda: running.replica.newest == 2)
        setup.trajectories(*records)
        eventually(lambda: running.replica.status()["skipped"] == {"too_old": 2})
        eventually(lambda: {score.version for score in setup.scores()} == {1, 2})
        request = OldLogprobsRequested(
            run="test", trajectory=records[1].trajectory, tokens=records[1].tokens, segments=records[1].segments,
            temperature=0.7,
        )  # fmt: skip
        setup.bus.publish(OLD_LOGPROBS, [Outgoing(records[1].trajectory, encode(request))])
        eventually(lambda: {score.version for score in setup.scores()} == {0, 1, 2})
