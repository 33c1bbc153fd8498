"""The learner's reader of a replica's scores: waiting, requests, and restarts."""

import numpy as np
import pytest

from palimpsest.common.arrays import unpack_float32
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    OldLogprobsComputed,
    OldLogprobsRequested,
    VersionPublished,
    decode,
    encode,
)
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.replica.records import to_rows
from tests.learner_parts.models import canaries, perturb
from tests.records.builders import a_row, a_segment
from tests.servers.stores import eventually
from tests.unit.learner.replica.replicas import (
    MIXED,
    Clock,
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


def never() -> bool:
    return False


def test_a_batch_gets_its_scores_as_soon_as_they_are_published(setup: Setup) -> None:
    records = some_records()
    reader, scores = a_reader(setup)
    setup.trajectories(*records)
    with RunningReplica(setup):
        rows = reader.wait_for_scores(
            [to_row(record) for record in records], Version(3), heartbeat=lambda: None, stop=never
        )
    assert rows is not None
    assert [row.trajectory for row in rows] == [record.trajectory for record in records]
    for row in rows:
        assert row.old is not None
        assert np.array_equal(np.isnan(row.old), row.versions < 0)
    assert scores.digests == {v: setup.store.manifest(Version(v)).digest for v in range(3)}
    assert setup.requests() == []
    reader.close()


def test_tokens_of_the_current_version_are_not_waited_for(setup: Setup) -> None:
    reader, scores = a_reader(setup)
    row = to_row(finished(2, 0, (a_segment(4, 6, 2),), tokens=7))
    rows = reader.wait_for_scores([row], Version(2), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(4, 6, 2)]
    assert setup.requests() == []
    reader.close()


def test_the_reader_requests_scores_after_half_of_the_wait_and_returns_at_its_end(setup: Setup) -> None:
    clock = Clock()
    reader, scores = a_reader(setup, wait_s=8.0, clock=clock)
    record = finished(0, 0, MIXED)

    def heartbeat() -> None:
        clock.now += 1.0

    rows = reader.wait_for_scores([to_row(record)], Version(2), heartbeat=heartbeat, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(2, 5, 0), (5, 8, 1), (10, 14, 2)]
    assert clock.now == 8.0
    with setup.bus.consumer(OLD_LOGPROBS) as consumer:
        (request,) = [decode(OLD_LOGPROBS, r.body) for r in consumer.poll(limit=9, timeout_s=0.0)]
    assert isinstance(request, OldLogprobsRequested)
    assert (request.trajectory, request.tokens, request.temperature) == (record.trajectory, record.tokens, 0.7)
    assert [(s.start, s.stop, s.version) for s in request.segments] == [(2, 5, 0), (5, 8, 1)], "version 2 is resident"
    assert (to_rows(request, vocabulary=300)).keys() == {0, 1}
    reader.close()


def test_requested_scores_end_the_wait(setup: Setup) -> None:
    clock = Clock()
    reader, scores = a_reader(setup, wait_s=1000.0, clock=clock)

    def heartbeat() -> None:
        clock.now = 501.0

    with RunningReplica(setup):
        rows = reader.wait_for_scores([to_row(finished(0, 0, MIXED))], Version(2), heartbeat=heartbeat, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(10, 14, 2)]
    assert (len(setup.requests()), clock.now) == (1, 501.0)
    reader.close()


def test_replicas_get_a_longer_wait_until_their_first_score(setup: Setup) -> None:
    """Scores from before the reader started do not show that a replica is alive."""
    clock = Clock()
    early, late = finished(0, 0, MIXED), finished(1, 0, MIXED)
    setup.trajectories(early)
    with RunningReplica(setup):
        eventually(lambda: len(setup.scores()) == 3)
    reader, scores = a_reader(setup, wait_s=8.0, first_wait_s=50.0, clock=clock)

    def heartbeat() -> None:
        clock.now += 1.0
        if clock.now == 30.0:  # a replica starts and scores another trajectory
            (score,) = [score for score in setup.scores() if score.start == 2]
            setup.bus.publish(OLD_LOGPROBS, [Outgoing(score.trajectory, encode(score))])

    rows = reader.wait_for_scores([to_row(late)], Version(2), heartbeat=heartbeat, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(2, 5, 0), (5, 8, 1), (10, 14, 2)]
    assert clock.now == 38.0
    reader.wait_for_scores([to_row(late)], Version(2), heartbeat=heartbeat, stop=never)
    assert clock.now == 46.0
    reader.close()


def test_scores_that_arrive_before_their_versions_digest_are_kept(setup: Setup) -> None:
    """Topics are read independently; on Kafka, one may be slower than another."""
    record, clock = finished(0, 0, (a_segment(2, 5, 3),)), Clock()
    perturb(setup.newest, by=0.05, seed=3)
    weights = raw_tensors(named_weights(setup.newest))
    manifest = setup.store.put("test", Version(3), weights, canaries(setup.newest), writer=1)
    setup.trajectories(record)
    with RunningReplica(setup):
        eventually(lambda: len(setup.scores()) == 1)
    reader, scores = a_reader(setup, wait_s=8.0, clock=clock)

    def heartbeat() -> None:
        clock.now += 1.0
        if clock.now == 2.0:
            published = VersionPublished(
                run="test", version=Version(3), digest=manifest.digest, published_at=0.0, writer=1
            )
            setup.bus.publish(CONTROL, [Outgoing("test", encode(published))])

    rows = reader.wait_for_scores([to_row(record)], Version(4), heartbeat=heartbeat, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == []
    assert (clock.now, setup.requests()) == (2.0, [])
    reader.close()


def test_a_stop_ends_the_wait(setup: Setup) -> None:
    reader, _ = a_reader(setup)
    assert (
        reader.wait_for_scores([to_row(finished(0, 0, MIXED))], Version(2), heartbeat=lambda: None, stop=lambda: True)
        is None
    )
    reader.close()


def test_a_restart_reads_all_scores_but_those_of_resolved_trajectories(setup: Setup) -> None:
    records = some_records()
    setup.trajectories(*records)
    with RunningReplica(setup):
        eventually(lambda: keys(setup.scores()) == set().union(*map(spans_of, records)))
    resolved = frozenset({records[0].trajectory, records[3].trajectory})
    reader, scores = a_reader(setup, resolved=resolved)
    assert reader.read() == 3 + len(setup.scores()) - 6, "the versions, and scores"
    assert len(scores) == 3
    # a batch in training counts as resolved, and still needs its scores
    rows = reader.wait_for_scores([to_row(records[1])], Version(2), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == []
    reader.close()


def test_a_restart_reads_from_the_given_offsets(setup: Setup) -> None:
    early, late = some_records()[:2]
    setup.trajectories(early)
    with RunningReplica(setup):
        eventually(lambda: keys(setup.scores()) == spans_of(early))
        with setup.bus.consumer(OLD_LOGPROBS) as consumer:
            begin = consumer.ends()
        setup.trajectories(late)
        eventually(lambda: keys(setup.scores()) == spans_of(early) | spans_of(late))
    reader, scores = a_reader(setup)
    reader.start(begin)
    assert scores.missing(reader.attach([to_row(late)])[0]) == []
    assert len(scores.missing(reader.attach([to_row(early)])[0])) == 3
    reader.close()


def test_scores_of_a_batch_are_attached_after_its_groups_are_closed(setup: Setup) -> None:
    """The ledger closes a group when a batch takes its last trajectory."""
    record = finished(0, 0, MIXED)
    reader, scores = a_reader(setup, resolved=frozenset({record.trajectory}))
    setup.trajectories(record)
    with RunningReplica(setup):
        rows = reader.wait_for_scores([to_row(record)], Version(3), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == []
    reader.retain()
    assert len(scores) == 0
    reader.close()


def test_scores_of_other_weights_are_never_attached(setup: Setup) -> None:
    """The scores have the same version number and a digest that this run never published."""
    reader, scores = a_reader(setup)
    record = finished(0, 0, (a_segment(2, 5, 0),))
    setup.trajectories(record)
    with RunningReplica(setup):
        eventually(lambda: len(setup.scores()) == 1)
    (score,) = setup.scores()
    fields = {name: getattr(score, name) for name in score.__struct_fields__}
    assert len(unpack_float32(score.values)) == 3
    other = OldLogprobsComputed(**fields | {"digest": "another", "trajectory": "g000000/5"})
    setup.bus.publish(OLD_LOGPROBS, [Outgoing(other.trajectory, encode(other))])
    reader.read()
    row = to_row(record)
    stranger = a_row("g000000/5", row.tokens.tolist(), row.versions.tolist())
    assert scores.missing(reader.attach([row])[0]) == []
    assert scores.missing(reader.attach([stranger])[0]) == [(2, 5, 0)]
    reader.close()


def test_unusable_records_are_dead_lettered_once(setup: Setup) -> None:
    def letters() -> int:
        with setup.bus.consumer(DEAD_LETTERS) as consumer:
            return len(consumer.poll(limit=100, timeout_s=0.0))

    setup.bus.publish(OLD_LOGPROBS, [Outgoing(f"g000000/{i}", b"garbage") for i in range(3)])
    for _ in range(2):  # the second reader is that of a restart
        reader, scores = a_reader(setup)
        reader.read()
        assert len(scores) == 0
        assert letters() == 3
        reader.close()
