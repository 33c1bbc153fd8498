"""A replica and the learner's reader of its scores, with a real log, a real store, and the tiny model."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.common.arrays import pack_int32, unpack_float32
from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load as load_config
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    OldLogprobsComputed,
    OldLogprobsRequested,
    RunFinished,
    SegmentFlushed,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
    group_id,
)
from palimpsest.common.service import Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.trajectory import MalformedTrajectory, Segment
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader, WaitLimits
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.old_logprobs.scoring import rows_by_version
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.replica.queue import ScoringQueue
from palimpsest.services.learner.replica.records import to_rows
from palimpsest.services.learner.replica.worker import ReplicaWorker
from palimpsest.services.local.supervisor import Supervisor, assign_ports
from tests.learner_parts.models import CPU, canaries, load, perturb
from tests.records.builders import a_finished, a_row, a_segment
from tests.servers.stores import eventually

pytestmark = pytest.mark.thorough

TOPICS = {TASKS: 1, TRAJECTORIES: 2, CONTROL: 1, WORKERS: 1, OLD_LOGPROBS: 2, DEAD_LETTERS: 1}
BATCH_TOKENS = 64
LAYOUT_NOISE = 2e-3
"""nats; the bf16 error of different padding or other rows in the forward pass."""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    opened = SqliteBus(tmp_path / "bus.sqlite")
    opened.create_topics(TOPICS)
    yield opened
    opened.close()


class Setup:
    """Three versions in the store and on the log, and a replica's model."""

    def __init__(self, folder: Path, store: SnapshotClient, bus: SqliteBus) -> None:
        self.folder, self.store, self.bus = folder, store, bus
        self.newest = load(folder)
        for version in range(3):
            perturb(self.newest, by=0.05, seed=version)
            manifest = store.put(
                "test", Version(version), raw_tensors(named_weights(self.newest)), canaries(self.newest), writer=1
            )
            published = VersionPublished(
                run="test", version=Version(version), digest=manifest.digest, published_at=0.0
            )  # fmt: skip
            bus.publish(CONTROL, [Outgoing("test", encode(published))])
        self.source = SnapshotSource(self.newest, store, CPU, loaded=lambda _: None)

    def replica(self, name: str, stop: Stop, bus: SqliteBus | None = None) -> ReplicaWorker:
        return ReplicaWorker(
            run="test", name=name, bus=bus or self.bus, device=CPU, batch_tokens=BATCH_TOKENS, stop=stop
        )  # fmt: skip

    def trajectories(self, *records: TrajectoryFinished | SegmentFlushed) -> None:
        self.bus.publish(TRAJECTORIES, [Outgoing(record.group, encode(record)) for record in records])

    def scores(self) -> list[OldLogprobsComputed]:
        return [message for message in self._messages() if isinstance(message, OldLogprobsComputed)]

    def requests(self) -> list[OldLogprobsRequested]:
        return [message for message in self._messages() if isinstance(message, OldLogprobsRequested)]

    def _messages(self) -> list[Any]:
        with self.bus.consumer(OLD_LOGPROBS) as consumer:
            records = consumer.poll(limit=10_000, timeout_s=0.0)
        return [decode(OLD_LOGPROBS, record.body) for record in records]


@pytest.fixture
def setup(starting_model: Path, store: SnapshotClient, bus: SqliteBus) -> Setup:
    return Setup(starting_model, store, bus)


class RunningReplica:
    """A replica that runs in a thread; leaving the context stops it and joins the thread."""

    def __init__(self, setup: Setup, name: str = "replica-0", bus: SqliteBus | None = None) -> None:
        self.stop = Stop()
        self.replica = setup.replica(name, self.stop, bus)
        self._resident = VersionedModel(load(setup.folder), setup.store)
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            self.replica.work(self._resident)
        except BaseException as error:  # join() raises it in the test's thread
            self._error = error

    def __enter__(self) -> "RunningReplica":
        self.thread.start()
        eventually(lambda: self.replica.waiting_for() is None)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.request()
        self.join()

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self._error is not None:
            raise self._error


def finished(index: int, sample: int, segments: tuple[Segment, ...], tokens: int = 14) -> TrajectoryFinished:
    """Return a finished trajectory with tokens that differ from those of other trajectories."""
    message = a_finished(index, sample, segments=segments, tokens=tokens)
    generator = torch.Generator().manual_seed(100 * index + sample)
    drawn = torch.randint(3, 250, (tokens,), generator=generator).tolist()
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return TrajectoryFinished(**fields | {"tokens": pack_int32(drawn), "temperature": 0.7})


MIXED = (a_segment(2, 5, 0), a_segment(5, 8, 1), a_segment(10, 14, 2))


def some_records() -> list[TrajectoryFinished]:
    return [
        finished(0, 0, MIXED),
        finished(0, 1, (a_segment(3, 9, 0),), tokens=12),
        finished(1, 0, (a_segment(1, 4, 1), a_segment(6, 11, 1)), tokens=11),
        finished(1, 1, MIXED),
        finished(2, 0, (a_segment(4, 6, 2),), tokens=7),
    ]


def spans_of(message: TrajectoryFinished) -> set[tuple[str, int, int, int]]:
    return {(message.trajectory, s.start, s.stop, int(s.version)) for s in message.segments}


def keys(scores: list[OldLogprobsComputed]) -> set[tuple[str, int, int, int]]:
    return {(c.trajectory, c.start, c.stop, int(c.version)) for c in scores}


def to_row(message: TrajectoryFinished) -> Row:
    tokens = np.frombuffer(message.tokens, dtype=np.int32)
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for segment in message.segments:
        versions[segment.start : segment.stop] = segment.version
    return a_row(message.trajectory, tokens.tolist(), versions.tolist(), temperature=message.temperature)


# The queue


def rows_of(*versions: int, trajectory: str = "g/0", tokens: int = 6) -> dict[Version, Row]:
    segments = [a_segment(i + 1, i + 2, v) for i, v in enumerate(versions)]
    return rows_by_version(trajectory, np.arange(tokens, dtype=np.int32), segments, 1.0)


def test_a_row_ends_with_its_versions_last_token() -> None:
    rows = rows_of(0, 1, 0, 2)
    assert {version: row.versions.tolist() for version, row in rows.items()} == {
        0: [-1, 0, -1, 0], 1: [-1, -1, 1], 2: [-1, -1, -1, -1, 2],
    }  # fmt: skip
    assert all(row.tokens.tolist() == list(range(len(row.tokens))) for row in rows.values())


def test_a_record_is_done_when_all_its_versions_are_scored() -> None:
    queue, at = ScoringQueue(), Position(0, 7)
    queue.add(rows_of(0, 1), at)
    (first,), (second,) = queue.take(Version(0)), queue.take(Version(1))
    assert len(queue) == 0
    assert queue.done(first) is None
    assert queue.done(second) == at


def test_requested_versions_come_first_then_the_loaded_one_then_ascending() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, 1), Position(0, 0))
    queue.add(rows_of(2, 3, trajectory="g/1"), Position(0, 1))
    assert queue.versions(None) == [0, 1, 2, 3]
    assert queue.versions(Version(2)) == [2, 0, 1, 3]
    queue.prioritize({Version(3): rows_of(2, 3, trajectory="g/1")[Version(3)]})
    assert queue.versions(Version(2)) == [3, 2, 0, 1]
    assert len(queue) == 4, "the row is queued already, so it is scored once"


def test_requested_rows_that_are_not_queued_are_scored_without_a_log_position() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0), Position(0, 0))
    queue.prioritize(rows_of(0, trajectory="g/9"))
    queue.prioritize(rows_of(0, 0))  # one token more than the queued row
    assert len(queue) == 3
    requested = queue.take(Version(0))
    assert [work.row.trajectory for work in requested] == ["g/9", "g/0"], "a batch waits for these, so they come first"
    (own,) = queue.take(Version(0))
    assert [queue.done(work) for work in (own, *requested)] == [Position(0, 0), None, None]


def test_unscored_jobs_return_to_the_queue_unless_their_partition_was_lost() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, trajectory="g/1"), Position(0, 0))
    queue.add(rows_of(0, trajectory="g/2"), Position(1, 0))
    queue.prioritize(rows_of(0, trajectory="g/3"))
    queue.prioritize(rows_of(0, trajectory="g/2"))
    urgent, rest = queue.take(Version(0)), queue.take(Version(0))
    assert [work.row.trajectory for work in (*urgent, *rest)] == ["g/2", "g/3", "g/1"]
    queue.forget(0)
    queue.put_back([*urgent, *rest])
    assert [work.row.trajectory for work in queue.take(Version(0))] == ["g/2", "g/3"]
    assert len(queue) == 0


def test_jobs_of_a_lost_partition_are_discarded() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, 1), Position(0, 0))
    queue.add(rows_of(0), Position(1, 0))
    (begun,) = [work for work in queue.take(Version(0)) if work.origin == Position(0, 0)]
    queue.forget(0)
    assert queue.versions(None) == []
    assert queue.done(begun) is None


BAD: dict[str, dict[str, object]] = {
    "no tokens": {"tokens": b""},
    "half a token": {"tokens": b"\0" * 30},
    "a negative token": {"tokens": pack_int32([1, -2, 3, 4, 5, 6, 7, 8])},
    "a token beyond the vocabulary": {"tokens": pack_int32([1, 2, 3, 4, 5, 6, 7, 300])},
    "a segment beyond the tokens": {"segments": (a_segment(6, 9, 0),)},
    "the first token sampled": {"segments": (a_segment(0, 2, 0),)},
    "a negative version": {"segments": (a_segment(1, 2, -3),)},
    "a version beyond int32": {"segments": (a_segment(1, 2, 1 << 31),)},
    "a temperature of 0": {"temperature": 0.0},
    "a temperature of nan": {"temperature": float("nan")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_record_that_no_model_can_score_is_refused(bad: dict[str, object]) -> None:
    good = a_finished(0, 0)
    assert list(to_rows(good, vocabulary=300)) == [0]
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    with pytest.raises(MalformedTrajectory):
        to_rows(TrajectoryFinished(**fields | bad), vocabulary=300)


# Values


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


# Scoring


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
    over = [Outgoing("test", encode(RunFinished(run="test", version=Version(2))))]
    setup.bus.publish(CONTROL, over)
    with RunningReplica(setup) as running:
        setup.trajectories(finished(0, 0, MIXED))
        eventually(lambda: len(setup.scores()) == 3)
        setup.bus.publish(CONTROL, over)
        running.join()
        assert not running.stop.requested


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


# The learner's reader


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_reader(
    setup: Setup,
    *,
    wait_s: float = 60.0,
    first_wait_s: float = 0.0,
    clock: Clock | None = None,
    resolved: frozenset[str] = frozenset(),
) -> tuple[ScoreReader, ScoreStore]:
    scores = ScoreStore()
    dead_letters = DeadLetterWriter(setup.bus, run="test", confirm=lambda: None)
    reader = ScoreReader(
        setup.bus, scores, dead_letters, WaitLimits(wait_s, first_wait_s), run="test",
        wanted=lambda name: name not in resolved, confirm=lambda: None, clock=clock or Clock(),
    )  # fmt: skip
    return reader, scores


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
            published = VersionPublished(run="test", version=Version(3), digest=manifest.digest, published_at=0.0)
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
