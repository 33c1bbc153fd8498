"""Reads topic `trajectories` into the ledger. Every record is accounted for.

Each record is decoded, validated and entered into the ledger, then accepted or rejected. A rejected record goes to
`dead_letters` unchanged, with its cause, and the run continues. A record that was read before has no effect: delivery
is at least once. If a trajectory ended as a dead letter, a usable record of it is accepted while its group is open.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from palimpsest.common.branches import sequences
from palimpsest.common.bus.port import Bus, Record
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.instruments import report_lag
from palimpsest.common.logs import logger
from palimpsest.common.messages import REPLAYED, TRAJECTORIES, SegmentFlushed, TrajectoryDropped, TrajectoryFinished
from palimpsest.common.offset_tracker import OffsetTracker
from palimpsest.common.rejected_record import FOREIGN, RejectCause, RejectedRecord
from palimpsest.common.routes import RouteShape
from palimpsest.common.trajectory import trainable
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.flushes import FlushBuffer, Flushed
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.ingest.offers import OfferSettings, check_offer
from palimpsest.services.learner.ingest.resume import no_records_skipped
from palimpsest.services.learner.ingest.validation import validate

POLL_RECORDS = 512
ACCEPTED = (ArrivalStatus.NEW, ArrivalStatus.RECOVERED)
Message = TrajectoryFinished | TrajectoryDropped | SegmentFlushed


@dataclass(frozen=True, slots=True)
class ReceivedTrajectory:
    """A usable trajectory and its position on the log."""

    record: TrajectoryFinished
    partition: int
    offset: int
    seconds: float = 0.0
    """From the offer of its group, or from a restart after it, until the record was read."""

    @property
    def newest(self) -> Version | None:
        """Highest version among its tokens; None if no token was sampled."""
        return max((one.version for part in sequences(self.record) for one in part.segments), default=None)

    def sampled_from(self, lowest: int) -> int:
        """Number of tokens of version `lowest` or later."""
        return sum(len(one) for part in sequences(self.record) for one in part.segments if one.version >= lowest)


class EvaluationRecords(Protocol):
    """Gets the records of evaluations: an Evaluator."""

    def enter(self, message: Message) -> None:
        """Enter a message. Raises RejectedRecord if it was never offered."""

    def dead_letter(self, trajectory: str) -> None:
        """Enter a trajectory whose record cannot be used."""


class NoEvaluations:
    """Of a run without evaluations: none was offered."""

    def enter(self, _message: Message) -> None:
        """See EvaluationRecords."""
        raise RejectedRecord(RejectCause.NEVER_OFFERED, "the run offers no evaluation")

    def dead_letter(self, _trajectory: str) -> None:
        """See EvaluationRecords."""


class TrajectoryReader:
    """Enters what workers publish into the ledger.

    offered: what the groups of the run are offered as. A trajectory that contradicts it is rejected.
    vocabulary: number of token ids of the model. A record with another id is rejected.
    keep_flushed: keep flushes of live trajectories until `resolve_flushed` is called. Otherwise they are skipped.
    on_resolved: called with the id of each trajectory that needs no more scores.
    evaluations: gets the records of evaluations, which never reach the ledger of the training.
    """

    def __init__(
        self,
        bus: Bus,
        ledger: TrajectoryLedger[ReceivedTrajectory],
        dead_letters: DeadLetterWriter,
        *,
        run: str,
        offered: OfferSettings,
        vocabulary: int,
        evaluations: EvaluationRecords,
        keep_flushed: bool = False,
        on_resolved: Callable[[str], None] = lambda _: None,
        routes: RouteShape | None = None,
    ) -> None:
        self._ledger, self._dead_letters, self._run = ledger, dead_letters, run
        self._offered, self._vocabulary = offered, vocabulary
        self.routes = routes
        """Of the experts that each trajectory carries; None: it carries none."""
        self._keeps_flushed, self._on_resolved, self._evaluations = keep_flushed, on_resolved, evaluations
        self._consumer = bus.consumer(TRAJECTORIES)
        self._tracker = OffsetTracker()
        self.arrived: dict[str, ReceivedTrajectory] = {}
        """Trajectories waiting to be trained on, by id."""
        self.flushed = FlushBuffer()
        """Flushes of live trajectories, until they are scored or their trajectory ends."""
        self.dropped_because = ""
        """Why a worker dropped the last trajectory that it dropped."""
        self.sampled_tokens = 0
        """Trainable tokens of all trajectories that arrived."""

    def start(self, offsets: Mapping[int, int]) -> None:
        """Start reading at a checkpoint's offsets ({}: the start of the topic).

        Raises UserError if the log starts after these offsets.
        """
        with no_records_skipped():
            self._consumer.seek(offsets)
            for partition in self._consumer.assignment():
                self._tracker.start(partition, offsets.get(partition, 0))

    def read_all(self, newest: Version, *, timeout_s: float) -> None:
        """Read everything on the log, waiting at most `timeout_s` for a first record.

        newest: no token can be of a later version.
        """
        while records := self._consumer.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                self._tracker.read(record.partition, record.offset)
                self._receive(record, newest)
            if len(records) < POLL_RECORDS:
                break
            timeout_s = 0.0
        report_lag(TRAJECTORIES, self._consumer)

    def read_until(self, positions: Mapping[int, int], newest: Version, *, deadline_s: float) -> bool:
        """Read everything below these offsets of `trajectories`. Return False if `deadline_s` seconds pass first."""
        ends = self._consumer.ends()  # no record is at or after these offsets
        targets = {p: min(offset, ends[p]) for p, offset in positions.items() if p in ends}
        until = time.monotonic() + deadline_s
        while any(self._consumer.positions().get(partition, 0) < offset for partition, offset in targets.items()):
            if (left := until - time.monotonic()) <= 0:
                return False
            self.read_all(newest, timeout_s=min(left, 1.0))
        return True

    def is_pending(self, trajectory: str) -> bool:
        """Whether the trajectory is awaited or waits to be trained on."""
        return self._ledger.is_pending(trajectory)

    def resolve(self, arrived: ReceivedTrajectory) -> None:
        """Mark the trajectory as done: its record need not be read again."""
        self._tracker.resolve(arrived.partition, arrived.offset)
        del self.arrived[arrived.record.trajectory]
        self.forget(arrived.record.trajectory)

    def forget(self, trajectory: str) -> None:
        """Discard the flushes and scores of a trajectory that has ended."""
        self._skip(self.flushed.forget(trajectory))
        self._on_resolved(trajectory)

    def resolve_flushed(self, flushed: Flushed) -> None:
        """Mark the flush as done: its scores are durable, or it has nothing to score."""
        self.flushed.remove(flushed)
        self._tracker.resolve(flushed.partition, flushed.offset)

    def offsets(self) -> dict[int, int]:
        """Partition -> offset at which a restart must read, for a checkpoint."""
        return self._tracker.offsets()

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()

    def _receive(self, record: Record, newest: Version) -> None:
        """Decode the record, validate it, enter it into the ledger; then accept or reject it."""
        ends_trajectory = True
        try:
            message: Message = decode_for_run(record, self._run)
            ends_trajectory = not isinstance(message, SegmentFlushed)
            validate(message, newest, vocabulary=self._vocabulary, routes=self.routes)
            if is_evaluation(message.group):
                self._evaluations.enter(message)
                self._tracker.resolve(record.partition, record.offset)  # a checkpoint holds what it entered
                return
            self._check_offer(message)
            status = self._enter(message, record)
        except RejectedRecord as error:
            self._reject(record, error, ends_trajectory=ends_trajectory)
            return
        match message:
            case SegmentFlushed():
                self._accept_flush(message, record, status)
            case TrajectoryDropped():
                self._accept_drop(message, record, status)
            case TrajectoryFinished():
                self._accept_finished(message, record, status)

    def _check_offer(self, message: Message) -> None:
        """Raise RejectedRecord if a trajectory that was offered was sampled otherwise."""
        if isinstance(message, TrajectoryDropped):
            return
        if self._ledger.status_of(message.group, message.trajectory) is not ArrivalStatus.UNKNOWN:
            check_offer(message, self._offered)

    def _enter(self, message: Message, record: Record) -> ArrivalStatus:
        """Enter the message into the ledger. Raises RejectedRecord if the trajectory was never offered.

        A flush changes nothing in the ledger, because the trajectory has not ended.
        """
        match message:
            case SegmentFlushed():
                status = self._ledger.status_of(message.group, message.trajectory)
            case TrajectoryDropped():
                status = self._ledger.drop(message.group, message.trajectory, message.reason)
            case TrajectoryFinished():
                seconds = self._ledger.age(message.group, now=time.monotonic())
                arrived = ReceivedTrajectory(message, record.partition, record.offset, seconds)
                status = self._ledger.arrive(message.group, message.trajectory, arrived, newest=arrived.newest)
                if status in ACCEPTED:
                    self.arrived[message.trajectory] = arrived
        if status is ArrivalStatus.UNKNOWN:
            raise RejectedRecord(
                RejectCause.NEVER_OFFERED, f"trajectory {message.trajectory} was never offered in this run"
            )
        return status

    def _accept_finished(self, message: TrajectoryFinished, record: Record, status: ArrivalStatus) -> None:
        if status in ACCEPTED:
            self._skip(self.flushed.forget(message.trajectory))  # the finished trajectory contains them
            self.sampled_tokens += sum(trainable(part.segments) for part in sequences(message))
        else:
            self._tracker.resolve(record.partition, record.offset)
        self._log(status, message, record)

    def _accept_drop(self, message: TrajectoryDropped, record: Record, status: ArrivalStatus) -> None:
        if status in ACCEPTED:
            instruments.DROPPED.labels(message.reason.value).inc()
            self.dropped_because = message.detail
            self.forget(message.trajectory)
        self._tracker.resolve(record.partition, record.offset)
        self._log(status, message, record)

    def _accept_flush(self, message: SegmentFlushed, record: Record, status: ArrivalStatus) -> None:
        flushed = Flushed(message, record.partition, record.offset)
        live = status is ArrivalStatus.NEW
        self._skip(self.flushed.add(flushed) if live and self._keeps_flushed else [flushed])

    def _reject(self, record: Record, error: RejectedRecord, *, ends_trajectory: bool) -> None:
        """Dead-letter the record. If it may have been a trajectory's end, the ledger counts the trajectory as lost."""
        self._dead_letters.write(record, error)
        self._tracker.resolve(record.partition, record.offset)
        if ends_trajectory and error.cause not in FOREIGN:
            # the body may be undecodable, so the worker names the trajectory in a header too
            name = record.headers.get("trajectory", "")
            if is_evaluation(record.key):
                self._evaluations.dead_letter(name)
            else:
                self._ledger.dead_letter(record.key, name)

    def _skip(self, needless: Iterable[Flushed]) -> None:
        for flushed in needless:
            self._tracker.resolve(flushed.partition, flushed.offset)
            instruments.FLUSHES.labels("needless").inc()

    def _log(self, status: ArrivalStatus, message: TrajectoryFinished | TrajectoryDropped, record: Record) -> None:
        replayed = {REPLAYED: record.headers[REPLAYED]} if REPLAYED in record.headers else {}
        if status is ArrivalStatus.RECOVERED:
            logger().info("dead letter recovered", trajectory=message.trajectory, offset=record.offset, **replayed)
        elif status is ArrivalStatus.DUPLICATE:
            instruments.DUPLICATES.inc()
            group = "open" if self._ledger.is_open(message.group) else "closed"
            logger().info("duplicate", trajectory=message.trajectory, offset=record.offset, group=group, **replayed)
