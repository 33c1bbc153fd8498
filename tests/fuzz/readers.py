"""The readers of every topic around one log, and what became of each record that they read."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.port import Bus, Consumer, Record
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    CutReleased,
    CutRequested,
    OldLogprobsRequested,
    VersionPublished,
    decode,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.trajectory_limit import TrajectoryLimit
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.batch.collate import to_rows
from palimpsest.services.learner.dead_letters import replay
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.old_logprobs.interruption.worker_feed import WorkerFeed
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader, WaitLimits
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.replica.records import to_rows as rows_to_score
from palimpsest.services.rollout.cut_state import CutState
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.record_reader import RecordReader
from tests.fuzz.corpus import HIGHEST, RUN, WRITER
from tests.learner_parts.ingest import VOCABULARY, an_ingest
from tests.processes.waiting import LIMIT_S
from tests.records.builders import SAMPLING

NOW = Version(HIGHEST)
PARTITIONS, END = 2, 2**62
"""Partitions of each topic, and an offset that no topic reaches."""
ACCEPTED, PASSED_OVER, REJECTED = "accepted", "passed over", "dead letter"
Place = tuple[str, int, int]
"""Topic, partition, offset."""


class Store:
    """What the store of the run knows; see Authority in common/snapshots/control_check.py."""

    def newest_writer(self) -> int:
        return WRITER

    def newest_version(self) -> Version:
        return NOW


class Outcomes:
    """What became of each record, and the most processor time that one took."""

    def __init__(self) -> None:
        self.of: dict[Place, str] = {}
        self.slowest_s = 0.0

    def note(self, record: Record, outcome: str, began: float) -> None:
        """Note the outcome. Raises AssertionError if the record has one already."""
        place = (record.topic, record.partition, record.offset)
        assert place not in self.of, f"{place} was read twice: {self.of[place]}, {outcome}"
        self.of[place] = outcome
        self.slowest_s = max(self.slowest_s, time.process_time() - began)

    def wrap(self, reader: Any, method: str, outcome: Callable[[Record, Any], str]) -> None:
        """Note the outcome of every record that this method of the reader handles."""
        inner = getattr(reader, method)

        def handled(record: Record, *arguments: Any) -> Any:
            began = time.process_time()
            try:
                result = inner(record, *arguments)
            except RejectedRecord:
                self.note(record, REJECTED, began)
                raise
            self.note(record, outcome(record, result), began)
            return result

        setattr(reader, method, handled)


class Readers:
    """The learner's readers of a run whose newest version is HIGHEST, and the checks of a worker and of a replica."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self.outcomes = bus, Outcomes()
        self.ingest: Ingest = an_ingest(bus, samples=2, groups=2, max_staleness=HIGHEST)
        self.ingest.start({}, {}, {}, now=0.0)
        self._rejected: set[Place] = set()
        writer: Any = self.ingest.dead_letters
        writer.write = self._note_letter(writer.write)
        reader: TrajectoryReader = self.ingest.reader
        self.outcomes.wrap(reader, "_receive", lambda record, _: self._trajectory_outcome(record))
        self._feed = WorkerFeed(bus, self.ingest.dead_letters, run=RUN)
        self._feed.start()
        self.outcomes.wrap(self._feed, "_take", lambda record, _: self._outcome(record))
        self._scores = ScoreReader(
            bus, ScoreStore(), self.ingest.dead_letters, WaitLimits(1.0), run=RUN, wanted=reader.is_pending,
            confirm=lambda: None, control=ControlCheck(Store()),
        )  # fmt: skip
        self.outcomes.wrap(self._scores, "_take", lambda _, taken: ACCEPTED if taken else PASSED_OVER)
        self._cuts, self._loop, self._outbox = CutState(), asyncio.Runner(), Outbox(bus)
        limit = TrajectoryLimit(SAMPLING.max_trajectory_tokens, "the fuzzer")
        self._worker = RecordReader(RUN, self._outbox, ControlCheck(Store()), limit, samples=(2, 2), worker="worker-0")
        self._worker._limit_agreed = True  # as after the learner's first offer
        self._consumers = {topic: bus.consumer(topic) for topic in (TASKS, CONTROL, OLD_LOGPROBS, DEAD_LETTERS)}
        self.offer()

    def offer(self) -> None:
        """Offer groups as the learner does, and skip the offers: the worker's checks get mutated ones."""
        self.ingest.tasks.offer(NOW, now=time.monotonic())
        self._consumers[TASKS].seek(self._consumers[TASKS].ends())

    def open_groups(self) -> list[int]:
        """Indexes of the groups with awaited trajectories."""
        return [int(name[1:]) for name in self.ingest.ledger.state().open_groups]

    def read(self) -> None:
        """Read everything on the log with every reader."""
        assert self.ingest.reader.read_until(dict.fromkeys(range(PARTITIONS), END), NOW, deadline_s=LIMIT_S)
        self._feed.read_to_end()
        while _behind(self._scores._consumer):
            self._scores.read(timeout_s=1.0)
        for record in _rest(self._consumers[OLD_LOGPROBS]):
            _rows_of_a_replica(record)
        self._loop.run(self._read_as_worker())
        for record in _rest(self._consumers[DEAD_LETTERS]):
            self._read_letter(record)

    def train(self) -> int:
        """Build the arrays of every complete batch, and count its trajectories as trained. Return their number."""
        trained = 0
        while True:
            for arrived in self.ingest.ledger.drop_small():
                self.ingest.reader.resolve(arrived)
            if (batch := self.ingest.ledger.take_batch(NOW)) is None:
                break
            for group in batch:
                records = [arrived.record for arrived in group.items]
                pad(to_rows(records, "grpo", lowest=0, baseline=[arrived.record for arrived in group.stale]))
                for arrived in (*group.items, *group.stale):
                    self.ingest.reader.resolve(arrived)
                trained += len(records)
        self.offer()
        return trained

    def letters(self) -> set[Place]:
        """Places of the records that have a dead letter, by the listing of `palimpsest dead-letters`."""
        buried, unreadable = replay.read(self._bus, RUN)
        assert all(one.reason for one in unreadable)
        return {(one.letter.topic, one.letter.partition, one.letter.offset) for one in buried}

    def close(self) -> None:
        """Close the consumers."""
        for consumer in (self._feed, self._scores, self.ingest, *self._consumers.values()):
            consumer.close()
        self._loop.close()

    def _trajectory_outcome(self, record: Record) -> str:
        place = (record.partition, record.offset)
        arrived = any((one.partition, one.offset) == place for one in self.ingest.reader.arrived.values())
        return ACCEPTED if arrived else self._outcome(record, otherwise=PASSED_OVER)

    def _outcome(self, record: Record, otherwise: str = ACCEPTED) -> str:
        """The outcome of a record whose rejection the reader handles itself."""
        return REJECTED if _place(record) in self._rejected else otherwise

    def _note_letter(self, write: Callable[[Record, RejectedRecord], None]) -> Callable[..., None]:
        def noted(record: Record, error: RejectedRecord) -> None:
            write(record, error)
            self._rejected.add(_place(record))

        return noted

    async def _read_as_worker(self) -> None:
        """Read the tasks and the records of `control` as a worker does, and publish its dead letters."""
        for topic in (TASKS, CONTROL):
            for record in _rest(self._consumers[topic]):
                began, letters = time.process_time(), self._outbox._put_so_far
                if topic == TASKS:
                    message: object = await self._worker.read_offer(record, lambda: None)
                else:
                    message = await self._worker.read_control(record, history=False)
                    if isinstance(message, VersionPublished | CutRequested | CutReleased):
                        self._cuts.observe(message)
                unused = PASSED_OVER if self._outbox._put_so_far == letters else REJECTED
                self.outcomes.note(record, unused if message is None else ACCEPTED, began)
        publishing = asyncio.create_task(self._outbox.run())
        await self._outbox.flush()
        publishing.cancel()

    def _read_letter(self, record: Record) -> None:
        """A reader of dead letters lists the ones that it cannot decode; the others are letters or forged letters."""
        began = time.process_time()
        try:
            decode(DEAD_LETTERS, record.body)
        except RejectedRecord:
            self.outcomes.note(record, PASSED_OVER, began)
        else:
            self.outcomes.note(record, ACCEPTED, began)


def _rows_of_a_replica(record: Record) -> None:
    """Read a record of `old_logprobs` as a replica does. The learner reads it too and dead-letters it."""
    with suppress(RejectedRecord):
        message = message_in(record)
        if isinstance(message, OldLogprobsRequested):
            rows_to_score(message, vocabulary=VOCABULARY)


def _behind(consumer: Consumer) -> bool:
    """Whether the topic holds records that the consumer has not returned."""
    read = consumer.positions()
    return any(read[partition] < end for partition, end in consumer.ends().items())


def _rest(consumer: Consumer) -> Iterator[Record]:
    """The records up to the end of the topic. A poll of Kafka may return before its fetch is answered."""
    while _behind(consumer):
        yield from consumer.poll(limit=1000, timeout_s=1.0)


def _place(record: Record) -> Place:
    return (record.topic, record.partition, record.offset)
