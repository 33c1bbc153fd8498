"""Rank 0's reading of `old_logprobs`: what replicas scored, or the learner itself before a restart, by trajectory.

A restart reads again from where values of unresolved trajectories may stand (intake.py); those of others are passed
over. A value counts for a token only if it is of the weights that were published under the
version's number: their digests stand on `control`.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    DeadLetter,
    OldLogprobsComputed,
    OldLogprobsRequested,
    VersionPublished,
    dead_letter,
    encode,
    message_in,
)
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.old_logprobs.score_store import Missing, ScoreStore

POLL_RECORDS = 512
POLL_S = 0.1
FIRST_WAIT_S = 600.0
"""Until the first score comes a batch waits for so long: replicas that start with the run have a model to load."""
ASK_AFTER = 0.5
"""Share of the wait after which scores are asked for."""


class ScoreReader:
    """Fills Scores from the log."""

    def __init__(
        self,
        bus: Bus,
        scores: ScoreStore,
        *,
        run: str,
        wait_s: float,
        wanted: Callable[[str], bool],
        confirm: Callable[[], None],
        first_wait_s: float = FIRST_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """wanted: whether the trajectory is not resolved yet; confirm: raises unless the run is still the learner's."""
        self._bus, self._scores, self._run, self._wait_s = bus, scores, run, wait_s
        self._wanted, self._confirm, self._clock = wanted, confirm, clock
        self._control, self._reader = bus.consumer(CONTROL), bus.consumer(OLD_LOGPROBS)
        self._first_wait_s = first_wait_s
        self._standing, self._heard = self._reader.ends(), False
        self._awaited: frozenset[str] = frozenset()
        self._buried = _buried(bus)
        self.digests: dict[Version, str] = {}
        """Of the weights of each version that was announced."""
        self.waited_s = 0.0
        """Seconds that batches have waited for scores, since the process began."""
        self.requested = 0
        """Trajectories whose scores were asked for because they did not come."""

    def start(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets of `old_logprobs` ({}: from the beginning). Raises OffsetGone."""
        self._reader.seek(offsets)
        self.read()

    def read(self, *, timeout_s: float = 0.0) -> int:
        """Take in everything that stands there, waiting at most so long for a first value; how many records told of
        values or of versions."""
        taken = 0
        while announced := self._control.poll(limit=POLL_RECORDS, timeout_s=0.0):
            taken += sum(map(self._announce, announced))
        while records := self._reader.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                try:
                    taken += self._take(record)
                except RejectedRecord as error:
                    self._bury(record, error)
            timeout_s = 0.0
        return taken

    def attach(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with every old log-prob that is known by now."""
        return [self._scores.attach(row, self.digests) for row in rows]

    def wait_for_scores(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """The rows with their old log-probs, as soon as all are there or the time is over; None when a stop came first.

        Tokens of `now` need none: the learner holds those weights. After half of the time what is missing is asked for
        once more. The time begins when a replica is first heard of. `look` is called now and then meanwhile.
        """
        began = self._clock()
        self._awaited = frozenset(row.trajectory for row in rows)
        try:
            return self._wait(list(rows), now, began, heartbeat, stop)
        finally:
            self._awaited = frozenset()
            self.waited_s += self._clock() - began

    def retain(self) -> None:
        """Forget what belongs to resolved trajectories."""
        self._scores.retain(self._wanted)

    def close(self) -> None:
        """Stop reading."""
        self._reader.close()
        self._control.close()

    def _wait(
        self, rows: list[Row], now: Version, began: float, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        asked, first, heard = False, True, self._heard
        while True:
            if self.read(timeout_s=0.0 if first else POLL_S) or first:
                rows, first = self.attach(rows), False
            lacking = [(row, spans) for row in rows if (spans := self._lacking(row, now))]
            if not lacking:
                return rows
            if self._heard and not heard:
                heard, began = True, self._clock()
            waited, limit_s = self._clock() - began, self._wait_s
            if not heard:
                limit_s = max(limit_s, self._first_wait_s)
            if waited >= limit_s:
                tokens = sum(stop - start for _, spans in lacking for start, stop, _ in spans)
                logger().warning(
                    "scores did not come", trajectories=len(lacking), tokens=tokens, waited_s=round(waited, 1)
                )
                return rows
            if stop():
                return None
            if not asked and waited >= ASK_AFTER * limit_s:
                asked = True
                self._request_scores(lacking)
            heartbeat()

    def _lacking(self, row: Row, now: Version) -> list[Missing]:
        return [span for span in self._scores.missing(row) if span[2] != now]

    def _request_scores(self, lacking: Sequence[tuple[Row, list[Missing]]]) -> None:
        self._confirm()
        logger().warning("scores asked for", trajectories=len(lacking))
        self.requested += len(lacking)
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
        message: OldLogprobsComputed | OldLogprobsRequested = message_in(record)
        if message.run != self._run:
            raise RejectedRecord(RejectCause.WRONG_RUN, f"it is of run {message.run}")
        if isinstance(message, OldLogprobsRequested):
            return 0
        self._heard = self._heard or record.offset >= self._standing.get(record.partition, 0)
        if not (message.trajectory in self._awaited or self._wanted(message.trajectory)):
            return 0
        self._scores.put(message)
        return 1

    def _announce(self, record: Record) -> bool:
        """Whether it was a version of this run."""
        try:
            message = message_in(record)
        except RejectedRecord:
            return False  # the worker that meets it buries it
        if not isinstance(message, VersionPublished) or message.run != self._run:
            return False
        self.digests[message.version] = message.digest
        return True

    def _bury(self, record: Record, error: RejectedRecord) -> None:
        """Keep a record that cannot be used, whole, once: after a restart it is met again."""
        at = (record.partition, record.offset)
        if at in self._buried:
            return
        self._confirm()
        self._buried.add(at)
        logger().warning(
            "dead letter", topic=record.topic, partition=record.partition, offset=record.offset,
            cause=error.cause.value, reason=str(error),
        )  # fmt: skip
        letter = dead_letter(self._run, record, error, now=time.time())
        self._bus.publish(DEAD_LETTERS, [Outgoing(record.key, encode(letter))])
        instruments.DEAD_LETTERS.labels(error.cause.value, record.topic).inc()


def _buried(bus: Bus) -> set[tuple[int, int]]:
    """Partition and offset of the records of `old_logprobs` that are dead letters already."""
    places = set()
    for record in read_existing(bus, DEAD_LETTERS):
        try:
            letter: DeadLetter = message_in(record)
        except RejectedRecord:
            continue
        if letter.topic == OLD_LOGPROBS:
            places.add((letter.partition, letter.offset))
    return places
