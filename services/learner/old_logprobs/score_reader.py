"""Rank 0 reads topic `old_logprobs`: scores of replicas, or scores of the learner before a restart.

A restart reads again from the first record that can belong to an unresolved trajectory (ingest/watermarks.py) and
skips values of resolved trajectories. A value applies to a token only if it was computed with the weights that were
published under the version's number. Topic `control` holds the digests of these weights.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Record
from palimpsest.common.instruments import report_lag
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    DeadLetter,
    OldLogprobsComputed,
    OldLogprobsRequested,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.old_logprobs.score_store import Missing, ScoreStore

POLL_RECORDS = 512
POLL_S = 0.1
FIRST_WAIT_S = 600.0
"""A batch waits this long for the first score of the run: replicas that start with the run load a model first."""
REQUEST_AFTER = 0.5
"""Share of the wait after which missing scores are requested again."""


@dataclass(frozen=True, slots=True)
class WaitLimits:
    """How long a batch waits for its scores, in seconds."""

    wait_s: float
    first_wait_s: float = FIRST_WAIT_S
    """Limit until the first score of the run is read. The longer of this and `wait_s` applies."""


class ScoreReader:
    """Fills the score store from the log.

    wanted: returns whether a trajectory is unresolved. confirm: raises Fenced unless the run still belongs to this
    learner. control: checks the announcements of versions.
    """

    def __init__(
        self,
        bus: Bus,
        scores: ScoreStore,
        dead_letters: DeadLetterWriter,
        limits: WaitLimits,
        *,
        run: str,
        wanted: Callable[[str], bool],
        confirm: Callable[[], None],
        control: ControlCheck,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus, self._scores, self._dead_letters, self._limits = bus, scores, dead_letters, limits
        self._run, self._wanted, self._confirm, self._clock = run, wanted, confirm, clock
        self._check = control
        self._control, self._consumer = bus.consumer(CONTROL), bus.consumer(OLD_LOGPROBS)
        self._ends_at_start, self._scores_began = self._consumer.ends(), False
        self._awaited: frozenset[str] = frozenset()
        self._dead_lettered = _dead_lettered(bus)

    def start(self, offsets: Mapping[int, int]) -> None:
        """Read from these offsets of `old_logprobs` ({}: from the beginning). Raises OffsetGone."""
        self._consumer.seek(offsets)
        self.read()

    def read(self, *, timeout_s: float = 0.0) -> int:
        """Read everything on the log, waiting at most `timeout_s` seconds for a first record of `old_logprobs`.

        Return the number of records with values or versions.
        """
        taken = 0
        while announced := self._control.poll(limit=POLL_RECORDS, timeout_s=0.0):
            taken += sum(map(self._store_digest, announced))
        while records := self._consumer.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                try:
                    taken += self._take(record)
                except RejectedRecord as error:
                    self._reject(record, error)
            timeout_s = 0.0
        report_lag(OLD_LOGPROBS, self._consumer)
        return taken

    def attach(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with every old log-prob received so far."""
        return [self._scores.attach(row) for row in rows]

    def wait_for_scores(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """Return the rows once all their old log-probs have arrived or the time limit has passed.

        None if a stop is requested first. Tokens of version `now` need no value: the learner holds those weights. After
        half of the limit, missing scores are requested again. The limit starts when the first score of the run is read.
        `heartbeat` is called during the wait.
        """
        self._awaited = frozenset(row.trajectory for row in rows)
        try:
            return self._wait(list(rows), now, heartbeat, stop)
        finally:
            self._awaited = frozenset()

    def retain(self) -> None:
        """Discard the scores of resolved trajectories."""
        self._scores.retain(self._wanted)

    def close(self) -> None:
        """Close the consumers."""
        self._consumer.close()
        self._control.close()

    def _wait(
        self, rows: list[Row], now: Version, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        requested, first_read, timed, began = False, True, self._scores_began, self._clock()
        while True:
            if self.read(timeout_s=0.0 if first_read else POLL_S) or first_read:
                rows, first_read = self.attach(rows), False
            lacking = [(row, spans) for row in rows if (spans := self._missing_spans(row, now))]
            if not lacking:
                return rows
            if self._scores_began and not timed:
                timed, began = True, self._clock()
            waited, limit_s = self._clock() - began, self._limits.wait_s
            if not timed:
                limit_s = max(limit_s, self._limits.first_wait_s)
            if waited >= limit_s:
                tokens = sum(stop - start for _, spans in lacking for start, stop, _ in spans)
                logger().warning(
                    "old log-probs timed out", trajectories=len(lacking), tokens=tokens, waited_s=round(waited, 1)
                )
                return rows
            if stop():
                return None
            if not requested and waited >= REQUEST_AFTER * limit_s:
                requested = True
                self._request_scores(lacking)
            heartbeat()

    def _missing_spans(self, row: Row, now: Version) -> list[Missing]:
        return [span for span in self._scores.missing(row) if span[2] != now]

    def _request_scores(self, lacking: Sequence[tuple[Row, list[Missing]]]) -> None:
        self._confirm()
        logger().warning("re-requested old log-probs", trajectories=len(lacking))
        self._bus.publish(
            OLD_LOGPROBS, [Outgoing(row.trajectory, encode(self._request(row, spans))) for row, spans in lacking]
        )

    def _request(self, row: Row, spans: Sequence[Missing]) -> OldLogprobsRequested:
        return OldLogprobsRequested(
            run=self._run,
            trajectory=row.trajectory,
            tokens=pack_int32(row.tokens),
            segments=tuple(
                Segment(start, stop, version, pack_float32(row.behavior[start:stop])) for start, stop, version in spans
            ),
            temperature=row.temperature,
        )

    def _take(self, record: Record) -> int:
        message: OldLogprobsComputed | OldLogprobsRequested = decode_for_run(record, self._run)
        if isinstance(message, OldLogprobsRequested):
            return 0
        self._scores_began = self._scores_began or record.offset >= self._ends_at_start.get(record.partition, 0)
        if not (message.trajectory in self._awaited or self._wanted(message.trajectory)):
            return 0
        self._scores.put(message)
        return 1

    def _store_digest(self, record: Record) -> bool:
        """Store the digest of a version. Return whether the record announced a version of this run."""
        try:
            message = decode_for_run(record, self._run)
            current = self._check.check(message, history=True)  # the announcements of this learner name it
        except RejectedRecord:
            return False  # the worker that reads it dead-letters it
        if not current or not isinstance(message, VersionPublished):
            return False
        self._scores.digests[message.version] = message.digest
        return True

    def _reject(self, record: Record, error: RejectedRecord) -> None:
        """Dead-letter a record, unless this or an earlier process has done so: a restart reads it again."""
        at = (record.partition, record.offset)
        if at not in self._dead_lettered:
            self._dead_letters.write(record, error)
            self._dead_lettered.add(at)


def _dead_lettered(bus: Bus) -> set[tuple[int, int]]:
    """Partition and offset of each record of `old_logprobs` that has a dead letter."""
    places = set()
    for record in read_existing(bus, DEAD_LETTERS):
        try:
            letter: DeadLetter = message_in(record)
        except RejectedRecord:
            continue
        if letter.topic == OLD_LOGPROBS:
            places.add((letter.partition, letter.offset))
    return places
