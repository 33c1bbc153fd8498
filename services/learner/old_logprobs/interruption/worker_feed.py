"""Reads topic `workers`: live workers, answers to cuts, and outages of the log."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.common.bus.port import Bus, Consumer, OffsetGone, Record
from palimpsest.common.messages import WORKERS, CutReached
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.ingest.trajectory_reader import POLL_RECORDS
from palimpsest.services.learner.old_logprobs.interruption.liveness import WorkerLiveness
from palimpsest.services.learner.old_logprobs.interruption.outage_clock import OutageClock

READ_S = 30.0
"""Limit of a read to the end, in seconds."""
RECENT = 256
"""Number of newest records in each partition that `start` reads to find the live workers."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Result of one read."""

    answers: list[CutReached]
    """Answers to cuts, in the order of reading."""
    extends_cut: bool = False
    """Whether an outage before this read restarts the deadline of the cut."""


class WorkerFeed:
    """Reads the workers' records from `start` to `close`."""

    def __init__(
        self,
        bus: Bus,
        dead_letters: DeadLetterWriter,
        *,
        run: str,
        clock: Callable[[], float] = time.monotonic,
        sleeping: bool = False,
    ) -> None:
        """sleeping: whether engines sleep at a cut."""
        self._bus, self._dead_letters, self._run, self._clock = bus, dead_letters, run, clock
        self._liveness, self._outages = WorkerLiveness(sleeping=sleeping), OutageClock()
        self._consumer: Consumer  # opened by start

    def start(self) -> Heard:
        """Open the consumer and read the newest records."""
        self._consumer = self._bus.consumer(WORKERS)
        for partition, end in self._consumer.ends().items():
            _seek_back(self._consumer, partition, end)
        return self.read_to_end()

    def poll(self) -> Heard:
        """Read the available records without waiting."""
        answers, count = self._poll(timeout_s=0.0)
        if count:  # an empty poll may be an outage
            self._note_read()
        return Heard(answers)

    def read_to_end(self, *, wait_s: float = 0.0) -> Heard:
        """Read everything on the topic, and wait at most `wait_s` seconds for more. Waits while the log does not
        answer.

        One poll may return only some of the records on the topic, so polls repeat until the end of each partition.
        """
        answers, _ = self._poll(timeout_s=wait_s)
        ends = self._consumer.ends()
        until = self._clock() + READ_S
        while any(self._consumer.positions().get(p, 0) < end for p, end in ends.items()) and self._clock() < until:
            answers += self._poll(timeout_s=1.0)[0]
        return Heard(answers, extends_cut=self._outages.extends_cut(self._note_read()))

    def begin_cut(self) -> None:
        """Start counting outages for a cut that was requested just now."""
        self._note_read()  # publishing the request may have taken long
        self._outages.begin_cut()

    def alive(self) -> frozenset[str]:
        """Names of the live workers."""
        return self._liveness.alive(now=self._clock())

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()

    def _note_read(self) -> float:
        now = self._clock()
        if lost_s := self._outages.read(now=now):
            self._liveness.discount_outage(lost_s, now=now)
        return lost_s

    def _poll(self, *, timeout_s: float) -> tuple[list[CutReached], int]:
        """Return the answers to cuts and the number of records. Waits at most `timeout_s` seconds for a first
        record."""
        answers: list[CutReached] = []
        count = 0
        while records := self._consumer.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            count += len(records)
            answers += [answer for record in records if (answer := self._take(record)) is not None]
            if len(records) < POLL_RECORDS:
                break
            timeout_s = 0.0
        return answers, count

    def _take(self, record: Record) -> CutReached | None:
        try:
            message = decode_for_run(record, self._run)
        except RejectedRecord as error:
            self._dead_letters.write(record, error)
            return None
        self._liveness.record_heartbeat(message, now=self._clock())
        return message if isinstance(message, CutReached) else None


def _seek_back(consumer: Consumer, partition: int, end: int) -> None:
    """Seek to the newest RECENT records of a partition."""
    start = max(0, end - RECENT)
    try:
        consumer.seek({partition: start})
    except OffsetGone:  # the log starts at a later offset, and live workers publish again soon
        consumer.seek({partition: end})
