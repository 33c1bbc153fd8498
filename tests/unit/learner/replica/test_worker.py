"""A replica, and the learner's reading of what it says: a real log, a real store, the tiny model."""

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
"""nats; what another padding or other rows in the pass do to bf16."""


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

    def said(self) -> list[OldLogprobsComputed]:
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


class Working:
    """A replica at work in a thread; leaving asks it to stop and waits for it."""

    def __init__(self, setup: Setup, name: str = "replica-0", bus: SqliteBus | None = None) -> None:
        self.stop = Stop()
        self.replica = setup.replica(name, self.stop, bus)
        self._resident = VersionedModel(load(setup.folder), setup.store)
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            self.replica.work(self._resident)
        except BaseException as error:  # told in the test's own thread
            self._error = error

    def __enter__(self) -> "Working":
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
    """With tokens of its own."""
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


def keys(said: list[OldLogprobsComputed]) -> set[tuple[str, int, int, int]]:
    return {(c.trajectory, c.start, c.stop, int(c.version)) for c in said}


def to_row(message: TrajectoryFinished) -> Row:
    tokens = np.frombuffer(message.tokens, dtype=np.int32)
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for segment in message.segments:
        versions[segment.start : segment.stop] = segment.version
    return a_row(message.trajectory, tokens.tolist(), versions.tolist(), temperature=message.temperature)


# What waits


def of(*versions: int, trajectory: str = "g/0", tokens: int = 6) -> dict[Version, Row]:
    segments = [a_segment(i + 1, i + 2, v) for i, v in enumerate(versions)]
    return rows_by_version(trajectory, np.arange(tokens, dtype=np.int32), segments, 1.0)


def test_a_row_ends_with_its_versions_last_token() -> None:
    rows = of(0, 1, 0, 2)
    assert {version: row.versions.tolist() for version, row in rows.items()} == {
        0: [-1, 0, -1, 0], 1: [-1, -1, 1], 2: [-1, -1, -1, -1, 2],
    }  # fmt: skip
    assert all(row.tokens.tolist() == list(range(len(row.tokens))) for row in rows.values())


def test_a_record_is_done_when_all_its_versions_are() -> None:
    backlog, at = ScoringQueue(), Position(0, 7)
    backlog.add(of(0, 1), at)
    (first,), (second,) = backlog.take(Version(0)), backlog.take(Version(1))
    assert len(backlog) == 0
    assert backlog.done(first) is None
    assert backlog.done(second) == at


def test_versions_come_as_held_then_ascending_and_what_a_batch_waits_for_first() -> None:
    backlog = ScoringQueue()
    backlog.add(of(0, 1), Position(0, 0))
    backlog.add(of(2, 3, trajectory="g/1"), Position(0, 1))
    assert backlog.versions(None) == [0, 1, 2, 3]
    assert backlog.versions(Version(2)) == [2, 0, 1, 3]
    backlog.prioritize({Version(3): of(2, 3, trajectory="g/1")[Version(3)]})
    assert backlog.versions(Version(2)) == [3, 2, 0, 1]
    assert len(backlog) == 4, "it waits already, so it is not scored twice"


def test_what_is_asked_for_and_does_not_wait_is_scored_without_a_place_on_the_log() -> None:
    backlog = ScoringQueue()
    backlog.add(of(0), Position(0, 0))
    backlog.prioritize(of(0, trajectory="g/9"))
    backlog.prioritize(of(0, 0))  # one token more than what waits
    assert len(backlog) == 3
    asked = backlog.take(Version(0))
    assert [work.row.trajectory for work in asked] == ["g/9", "g/0"], "a batch waits for these: they come first"
    (own,) = backlog.take(Version(0))
    assert [backlog.done(work) for work in (own, *asked)] == [Position(0, 0), None, None]


def test_what_was_taken_and_not_scored_waits_again_unless_its_partition_was_lost() -> None:
    backlog = ScoringQueue()
    backlog.add(of(0, trajectory="g/1"), Position(0, 0))
    backlog.add(of(0, trajectory="g/2"), Position(1, 0))
    backlog.prioritize(of(0, trajectory="g/3"))
    backlog.prioritize(of(0, trajectory="g/2"))
    urgent, rest = backlog.take(Version(0)), backlog.take(Version(0))
    assert [work.row.trajectory for work in (*urgent, *rest)] == ["g/2", "g/3", "g/1"]
    backlog.forget(0)
    backlog.put_back([*urgent, *rest])
    assert [work.row.trajectory for work in backlog.take(Version(0))] == ["g/2", "g/3"]
    assert len(backlog) == 0


def test_a_lost_partition_is_forgotten() -> None:
    backlog = ScoringQueue()
    backlog.add(of(0, 1), Position(0, 0))
    backlog.add(of(0), Position(1, 0))
    (begun,) = [work for work in backlog.take(Version(0)) if work.origin == Position(0, 0)]
    backlog.forget(0)
    assert backlog.versions(None) == []
    assert backlog.done(begun) is None


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
    "no temperature": {"temperature": float("nan")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_no_model_can_score_is_refused(bad: dict[str, object]) -> None:
    good = a_finished(0, 0)
    assert list(to_rows(good, vocabulary=300)) == [0]
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    with pytest.raises(MalformedTrajectory):
        to_rows(TrajectoryFinished(**fields | bad), vocabulary=300)


# Values


def test_18_5_the_values_are_those_of_the_snapshot_source_bit_for_bit(setup: Setup) -> None:
    """In the same layout: the same rows, cut alike, in one pass."""
    records = some_records()
    setup.trajectories(*records)
    with Working(setup):
        eventually(lambda: keys(setup.said()) == set().union(*map(spans_of, records)))
    by_version = [rows_by_version(m.trajectory, to_row(m).tokens, m.segments, m.temperature) for m in records]
    for version in map(Version, range(3)):
        own = [rows[version] for rows in by_version if version in rows]
        together = sorted(own, key=lambda row: (len(row.tokens), row.trajectory))
        assert len(together) * len(together[-1].tokens) <= BATCH_TOKENS
        batch = pad(together)
        (exact,) = setup.source.proximal([batch], Version(2)).logprobs
        for i, row in enumerate(together):
            for said in setup.said():
                if (said.trajectory, said.version) == (row.trajectory, version):
                    assert said.values == exact[i, said.start : said.stop].numpy().tobytes()
                    assert said.digest == setup.store.manifest(version).digest


def test_a_row_scored_alone_differs_from_the_learners_batch_by_layout_noise_only(setup: Setup) -> None:
    records = some_records()
    with Working(setup):
        for record in records:  # one at a time
            setup.trajectories(record)
            eventually(lambda record=record: keys(setup.said()) >= spans_of(record))
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


# Work


def test_flushed_and_finished_segments_are_scored_and_dropped_or_bad_records_passed_over(setup: Setup) -> None:
    whole = finished(0, 0, MIXED)
    flushed = SegmentFlushed(
        run="test", trajectory=whole.trajectory, group=whole.group, attempt=0, worker="worker-0", cut=1,
        tokens=whole.tokens[: 4 * 7], segments=(MIXED[0], a_segment(5, 7, 1)), temperature=whole.temperature,
    )  # fmt: skip
    nothing = finished(3, 0, ())
    nothing = TrajectoryFinished(**{n: getattr(nothing, n) for n in nothing.__struct_fields__} | {"segments": ()})
    setup.trajectories(flushed, nothing, a_finished(3, 1, run="another"))
    setup.bus.publish(TRAJECTORIES, [Outgoing(group_id(i), b"garbage") for i in range(4)])
    with Working(setup) as working:
        eventually(lambda: len(setup.said()) == 2)
        setup.trajectories(whole)
        eventually(lambda: len(setup.said()) == 5)
        eventually(lambda: committed(setup) == ends(setup))
        status = working.replica.status()
    assert keys(setup.said()) == {(whole.trajectory, *span) for span in [(2, 5, 0), (5, 7, 1), (5, 8, 1), (10, 14, 2)]}
    assert status["skipped"] == {"unusable": 5}
    assert (status["waiting"], status["scored_tokens"], status["partitions"]) == (0, 5 + 10, [0, 1])


def test_18_15_a_version_that_is_gone_is_counted_and_passed_over(setup: Setup) -> None:
    gone = finished(0, 0, (a_segment(2, 5, 0), a_segment(5, 8, 6)))
    setup.trajectories(gone)
    with Working(setup) as working:
        eventually(lambda: committed(setup) == ends(setup))
        assert working.replica.status()["skipped"] == {"version_missing": 1}
    assert keys(setup.said()) == {(gone.trajectory, 2, 5, 0)}


def test_a_damaged_version_ends_the_replica(setup: Setup, tmp_path: Path) -> None:
    held = tmp_path / "store" / "objects" / setup.store.manifest(Version(1)).object
    body = bytearray(held.read_bytes())
    body[len(body) // 2] ^= 1
    held.write_bytes(body)
    setup.trajectories(finished(0, 0, (a_segment(2, 5, 1),)))
    working = Working(setup)
    working.thread.start()
    with pytest.raises(UserError, match="snapshot 1 is damaged") as refusal:
        working.join()
    assert refusal.value.code is ExitCode.DAMAGED
    assert committed(setup) == {}


def test_each_version_is_loaded_once_for_all_that_waits(setup: Setup) -> None:
    setup.trajectories(*(finished(i, 0, MIXED) for i in range(12)))
    with Working(setup) as working:
        eventually(lambda: len(setup.said()) == 36)
        assert working.replica.status()["loads"] == 3


def test_what_is_asked_for_is_scored_again(setup: Setup) -> None:
    record = finished(0, 0, MIXED)
    with Working(setup):
        request = OldLogprobsRequested(
            run="test", trajectory=record.trajectory, tokens=record.tokens, segments=MIXED[:2], temperature=0.7
        )  # fmt: skip
        setup.bus.publish(OLD_LOGPROBS, [Outgoing(record.trajectory, encode(request))])
        eventually(lambda: keys(setup.said()) == {(record.trajectory, 2, 5, 0), (record.trajectory, 5, 8, 1)})


class Asking(SqliteBus):
    """With the first scores that somebody publishes here, a batch asks for these."""

    def __init__(self, path: Path, request: OldLogprobsRequested) -> None:
        super().__init__(path)
        self._request: OldLogprobsRequested | None = request

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        at = super().publish(topic, records)
        if topic == OLD_LOGPROBS and (request := self._request):
            self._request = None
            self.publish(OLD_LOGPROBS, [Outgoing(request.trajectory, encode(request))])
        return at


def test_what_is_asked_for_comes_before_the_rest_of_what_was_read(setup: Setup) -> None:
    """The batch waits for so long only, and reading has brought in work for far longer."""
    records = [finished(i, 0, (a_segment(2, 14, version),)) for i, version in enumerate((0,) * 12 + (1,) * 12)]
    strange = finished(99, 0, (a_segment(2, 14, 2),))  # another replica's, which hangs
    setup.trajectories(*records)
    request = OldLogprobsRequested(
        run="test", trajectory=strange.trajectory, tokens=strange.tokens, segments=strange.segments, temperature=0.7
    )
    asking = Asking(setup.bus.path, request)
    with Working(setup, bus=asking):
        eventually(lambda: len(setup.said()) == 25)
    asking.close()
    with setup.bus.consumer(OLD_LOGPROBS) as consumer:
        order = [(r.partition, decode(OLD_LOGPROBS, r.body)) for r in consumer.poll(limit=99, timeout_s=0)]
    (there,) = {partition for partition, message in order if message.trajectory == strange.trajectory}
    own = [message for partition, message in order if partition == there]
    asked = next(i for i, message in enumerate(own) if isinstance(message, OldLogprobsRequested))
    assert own[asked + 1].trajectory == strange.trajectory
    assert len(own) > asked + 2, "the others come afterwards"
    assert committed(setup) == ends(setup)


def test_it_ends_with_the_run_and_not_with_an_earlier_one(setup: Setup) -> None:
    over = [Outgoing("test", encode(RunFinished(run="test", version=Version(2))))]
    setup.bus.publish(CONTROL, over)
    with Working(setup) as working:
        setup.trajectories(finished(0, 0, MIXED))
        eventually(lambda: len(setup.said()) == 3)
        setup.bus.publish(CONTROL, over)
        working.join()
        assert not working.stop.requested


def test_two_replicas_share_the_work_and_every_segment_is_scored(setup: Setup) -> None:
    with Working(setup, "replica-0") as one, Working(setup, "replica-1") as other:
        eventually(lambda: len(one.replica.status()["partitions"]) == len(other.replica.status()["partitions"]) == 1)
        records = [finished(i, 0, MIXED) for i in range(12)]
        setup.trajectories(*records)
        wanted = set().union(*map(spans_of, records))
        eventually(lambda: keys(setup.said()) == wanted)
    by = [said.by for said in setup.said()]
    assert set(by) == {"replica-0", "replica-1"}
    assert len(by) == len(wanted), "nobody scored what was the other's"


def test_said_again_by_another_replica_it_means_the_same(setup: Setup) -> None:
    """One that died after publishing and before committing leaves its records to the next."""
    record = finished(0, 0, MIXED)
    setup.trajectories(record)
    with Working(setup, "replica-0"):
        eventually(lambda: len(setup.said()) == 3)
    rewind(setup)
    with Working(setup, "replica-1"):
        eventually(lambda: len(setup.said()) == 6)
    reader, scores = a_reader(setup)
    reader.read()
    assert (scores.repeats, scores.conflicts) == (3, 0)
    reader.close()


def committed(setup: Setup) -> dict[int, int]:
    """What a new member of the group would begin with, where anything was read."""
    rows = setup.bus._db.execute("SELECT partition, offset FROM commits WHERE grp = 'replica'").fetchall()
    return {partition: offset for partition, offset in rows if offset}


def ends(setup: Setup) -> dict[int, int]:
    with setup.bus.consumer(TRAJECTORIES) as consumer:
        return {partition: end for partition, end in consumer.ends().items() if end}


def rewind(setup: Setup) -> None:
    """As if nothing had been committed."""
    with setup.bus.consumer(TRAJECTORIES, group="replica", member="nobody") as consumer:
        consumer.poll(limit=0, timeout_s=0.0)
        consumer.commit(dict.fromkeys(consumer.assignment(), 0))
    assert committed(setup) == {}


LOCAL = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.mark.parametrize(
    ("kind", "asked", "started"), [("replica", 0, 1), ("replica", 3, 3), ("snapshot", 3, 0), ("bypass", 0, 0)]
)
def test_a_run_on_one_machine_starts_replicas_when_it_needs_them(
    tmp_path: Path, kind: str, asked: int, started: int
) -> None:
    own = f'run.folder = "{tmp_path}"\nlocal.replicas = {asked}\nlearner.proximal.kind = "{kind}"\n'
    (tmp_path / "run.toml").write_text(LOCAL + own)
    config, flags = assign_ports(load_config([str(tmp_path / "run.toml")], {}, program="").config)
    local = Supervisor(config, tmp_path / "run.toml", flags)
    assert [child.name for child in local.replicas] == [f"replica-{i}" for i in range(started)]
    assert all("palimpsest.services.learner.replica" in child.command for child in local.replicas)
    assert len(local.replica_urls) == len(set(local.replica_urls.values())) == started
    assert [child for child in local.children if child in local.replicas] == local.replicas


# The learner's side


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


def test_a_batch_gets_its_scores_as_soon_as_they_are_there(setup: Setup) -> None:
    records = some_records()
    reader, scores = a_reader(setup)
    setup.trajectories(*records)
    with Working(setup):
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


def test_tokens_of_the_present_version_are_not_waited_for(setup: Setup) -> None:
    reader, scores = a_reader(setup)
    row = to_row(finished(2, 0, (a_segment(4, 6, 2),), tokens=7))
    rows = reader.wait_for_scores([row], Version(2), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(4, 6, 2)]
    assert setup.requests() == []
    reader.close()


def test_after_half_of_the_time_it_asks_and_at_the_end_it_goes_on(setup: Setup) -> None:
    clock = Clock()
    reader, scores = a_reader(setup, wait_s=8.0, clock=clock)
    record = finished(0, 0, MIXED)

    def look() -> None:
        clock.now += 1.0

    rows = reader.wait_for_scores([to_row(record)], Version(2), heartbeat=look, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(2, 5, 0), (5, 8, 1), (10, 14, 2)]
    assert clock.now == 8.0
    with setup.bus.consumer(OLD_LOGPROBS) as consumer:
        (asked,) = [decode(OLD_LOGPROBS, r.body) for r in consumer.poll(limit=9, timeout_s=0.0)]
    assert isinstance(asked, OldLogprobsRequested)
    assert (asked.trajectory, asked.tokens, asked.temperature) == (record.trajectory, record.tokens, 0.7)
    assert [(s.start, s.stop, s.version) for s in asked.segments] == [(2, 5, 0), (5, 8, 1)], "version 2 is resident"
    assert (to_rows(asked, vocabulary=300)).keys() == {0, 1}
    reader.close()


def test_what_is_asked_for_comes_and_the_wait_is_over(setup: Setup) -> None:
    clock = Clock()
    reader, scores = a_reader(setup, wait_s=1000.0, clock=clock)

    def look() -> None:
        clock.now = 501.0

    with Working(setup):
        rows = reader.wait_for_scores([to_row(finished(0, 0, MIXED))], Version(2), heartbeat=look, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(10, 14, 2)]
    assert (len(setup.requests()), clock.now) == (1, 501.0)
    reader.close()


def test_replicas_get_longer_to_start_with_than_to_answer(setup: Setup) -> None:
    """What stands on the log says nothing of whether a replica lives now."""
    clock = Clock()
    early, late = finished(0, 0, MIXED), finished(1, 0, MIXED)
    setup.trajectories(early)
    with Working(setup):
        eventually(lambda: len(setup.said()) == 3)
    reader, scores = a_reader(setup, wait_s=8.0, first_wait_s=50.0, clock=clock)

    def look() -> None:
        clock.now += 1.0
        if clock.now == 30.0:  # a replica begins, with other work
            (told,) = [said for said in setup.said() if said.start == 2]
            setup.bus.publish(OLD_LOGPROBS, [Outgoing(told.trajectory, encode(told))])

    rows = reader.wait_for_scores([to_row(late)], Version(2), heartbeat=look, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == [(2, 5, 0), (5, 8, 1), (10, 14, 2)]
    assert clock.now == 38.0
    reader.wait_for_scores([to_row(late)], Version(2), heartbeat=look, stop=never)
    assert clock.now == 46.0
    reader.close()


def test_scores_that_come_before_their_versions_digest_are_not_waited_for_again(setup: Setup) -> None:
    """Each topic is read by itself: on a Kafka the one may be slower than the other."""
    record, clock = finished(0, 0, (a_segment(2, 5, 3),)), Clock()
    perturb(setup.newest, by=0.05, seed=3)
    weights = raw_tensors(named_weights(setup.newest))
    manifest = setup.store.put("test", Version(3), weights, canaries(setup.newest), writer=1)
    setup.trajectories(record)
    with Working(setup):
        eventually(lambda: len(setup.said()) == 1)
    reader, scores = a_reader(setup, wait_s=8.0, clock=clock)

    def look() -> None:
        clock.now += 1.0
        if clock.now == 2.0:
            published = VersionPublished(run="test", version=Version(3), digest=manifest.digest, published_at=0.0)
            setup.bus.publish(CONTROL, [Outgoing("test", encode(published))])

    rows = reader.wait_for_scores([to_row(record)], Version(4), heartbeat=look, stop=never)
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


def test_a_restart_reads_everything_from_the_beginning_but_what_is_resolved(setup: Setup) -> None:
    records = some_records()
    setup.trajectories(*records)
    with Working(setup):
        eventually(lambda: keys(setup.said()) == set().union(*map(spans_of, records)))
    resolved = frozenset({records[0].trajectory, records[3].trajectory})
    reader, scores = a_reader(setup, resolved=resolved)
    assert reader.read() == 3 + len(setup.said()) - 6, "the versions, and scores"
    assert len(scores) == 3
    # a batch that is being trained on counts as resolved already; its scores are still wanted
    rows = reader.wait_for_scores([to_row(records[1])], Version(2), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == []
    reader.close()


def test_a_restart_reads_from_where_it_is_told(setup: Setup) -> None:
    early, late = some_records()[:2]
    setup.trajectories(early)
    with Working(setup):
        eventually(lambda: keys(setup.said()) == spans_of(early))
        with setup.bus.consumer(OLD_LOGPROBS) as consumer:
            begin = consumer.ends()
        setup.trajectories(late)
        eventually(lambda: keys(setup.said()) == spans_of(early) | spans_of(late))
    reader, scores = a_reader(setup)
    reader.start(begin)
    assert scores.missing(reader.attach([to_row(late)])[0]) == []
    assert len(scores.missing(reader.attach([to_row(early)])[0])) == 3
    reader.close()


def test_scores_of_a_batch_come_though_its_groups_are_closed(setup: Setup) -> None:
    """The ledger closes a group when its last trajectory goes into a batch."""
    record = finished(0, 0, MIXED)
    reader, scores = a_reader(setup, resolved=frozenset({record.trajectory}))
    setup.trajectories(record)
    with Working(setup):
        rows = reader.wait_for_scores([to_row(record)], Version(3), heartbeat=lambda: None, stop=never)
    assert rows is not None
    assert scores.missing(rows[0]) == []
    reader.retain()
    assert len(scores) == 0
    reader.close()


def test_scores_by_other_weights_are_never_attached(setup: Setup) -> None:
    """A version of the same number that this run never announced."""
    reader, scores = a_reader(setup)
    record = finished(0, 0, (a_segment(2, 5, 0),))
    setup.trajectories(record)
    with Working(setup):
        eventually(lambda: len(setup.said()) == 1)
    (told,) = setup.said()
    fields = {name: getattr(told, name) for name in told.__struct_fields__}
    assert len(unpack_float32(told.values)) == 3
    other = OldLogprobsComputed(**fields | {"digest": "another", "trajectory": "g000000/5"})
    setup.bus.publish(OLD_LOGPROBS, [Outgoing(other.trajectory, encode(other))])
    reader.read()
    row = to_row(record)
    stranger = a_row("g000000/5", row.tokens.tolist(), row.versions.tolist())
    assert scores.missing(reader.attach([row])[0]) == []
    assert scores.missing(reader.attach([stranger])[0]) == [(2, 5, 0)]
    reader.close()


def test_records_that_cannot_be_used_are_buried_once(setup: Setup) -> None:
    def letters() -> int:
        with setup.bus.consumer(DEAD_LETTERS) as consumer:
            return len(consumer.poll(limit=100, timeout_s=0.0))

    setup.bus.publish(OLD_LOGPROBS, [Outgoing(f"g000000/{i}", b"garbage") for i in range(3)])
    for _ in range(2):  # the second time as after a restart
        reader, scores = a_reader(setup)
        reader.read()
        assert len(scores) == 0
        assert letters() == 3
        reader.close()
