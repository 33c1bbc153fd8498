"""Exact old log-probs without any copy of the model: workers stop before the weights change.

Before the first optimizer step of a version's training the learner asks for a cut: every worker stands still and
flushes what it sampled. All of that is scored by the weights that are still resident, and the scores are durable before
the weights change. Workers go on when they hear of the next version (docs/algorithms/interruption.md).
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from palimpsest.common import failpoints
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Consumer, OffsetGone, Outgoing, Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    WORKERS,
    CutReached,
    CutReleased,
    CutRequested,
    OldLogprobsComputed,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.flushes import Flushed
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.ingest.trajectory_reader import POLL_RECORDS
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer, Sampled, as_row
from palimpsest.services.learner.old_logprobs.interruption.cut import Cut, CutReport, next_number
from palimpsest.services.learner.old_logprobs.interruption.liveness import WorkerLiveness
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore, check_computed

POLL_S = 0.05
"""Pause while workers are waited for and nothing is there to be scored."""
SLICE_S = 0.2
"""While a batch is waited for, no micro-batch is begun after so long: what arrives is to be read meanwhile."""
READ_S = 30.0
"""What workers flushed stands on the log when they say so. Only an outage of the log can hold it back for so long."""
ANSWER_S = 5.0
"""Between two looks at what workers say. When it took longer, the log did not answer or the learner was busy: nobody
could be heard, and the workers have their time anew."""
RECENT = 256
"""So many of the newest records in each partition of `workers` are read at the start, to know who is there."""


class CutCoordinator:
    """The learner's side of a cut (rank 0). `confirm`: raises Fenced unless the run is still this learner's."""

    def __init__(
        self,
        bus: Bus,
        ingest: Ingest,
        scorer: EagerScorer,
        scores: ScoreStore,
        *,
        run: str,
        deadline_s: float,
        confirm: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus, self._ingest, self._reader, self._scorer, self._scores = bus, ingest, ingest.reader, scorer, scores
        self._run, self._deadline_s, self._confirm, self._clock = run, deadline_s, confirm, clock
        self._roster = WorkerLiveness()
        self._workers: Consumer  # opened by start
        self._heard_to: dict[int, int] = {}
        """Topic `workers`: partition -> offset after the last record that was read."""
        self._listened_at = 0.0
        self._first = self._next = 1
        self._open: int | None = None
        self._digests: dict[Version, str] = {}

    @property
    def digests(self) -> Mapping[Version, str]:
        """Of the weights of every version published in this run."""
        return self._digests

    def start(self) -> None:
        """Learn from the log: the last cut, the versions' digests, scores of what is not resolved, who is there.

        Comes after TrajectoryReader.start, and after the version to begin with was published.
        """
        control = list(self._existing_messages(CONTROL))
        self._first = self._next = next_number(control)
        self._digests = {m.version: m.digest for m in control if isinstance(m, VersionPublished)}
        found = 0
        for message in self._existing_messages(OLD_LOGPROBS, self._ingest.tasks.score_offsets()):
            if isinstance(message, OldLogprobsComputed) and self._reader.is_pending(message.trajectory):
                self._scores.put(message)
                found += message.stop - message.start
        instruments.OLD_FOUND.inc(found)
        self._workers = self._bus.consumer(WORKERS)
        self._heard_to = {p: _seek_back(self._workers, p, end) for p, end in self._workers.ends().items()}
        self._poll_workers_to_end()
        logger().debug("interruption", next_cut=self._next, found=found, workers=sorted(self._alive()))

    def work(self, now: Version, digest: str) -> int:
        """While a batch is waited for: score some of what has arrived; how many tokens. 0: nothing is left to do.

        now, digest: the version that is resident.
        """
        self._digests[now] = digest
        self._poll_workers(timeout_s=0.0)
        until = self._clock() + SLICE_S
        tokens = self._scorer.work(self._sampled(), now, digest, should_stop=lambda: self._clock() >= until)
        self._settle(now)
        instruments.OLD_SCORED.labels("early").inc(tokens)
        return tokens

    def cut(self, now: Version, digest: str, *, training: Collection[str] = ()) -> CutReport:
        """Before the first optimizer step: stop the workers, and score every token of `now` that lacks an old log-prob.

        When this returns the scores are durable and the weights may change. A worker that has not answered by the
        deadline is left out. `training`: trajectories whose scores nobody needs after this step.

        Never raises Fenced: other ranks wait in a collective meanwhile. The report says so, and whoever asks next is
        told again.
        """
        self._digests[now] = digest
        try:
            report = self._cut(now, digest, training)
        except Fenced:
            return CutReport(cut=0, version=now, fenced=True)
        self._open = None
        instruments.CUTS.inc()
        instruments.LATE_WORKERS.inc(len(report.late))
        instruments.OLD_SCORED.labels("cut").inc(report.tokens_scored)
        for phase, seconds in (*report.seconds.items(), ("stall", report.stall_s)):
            instruments.CUT_SECONDS.labels(phase).observe(seconds)
        logger().info(
            "cut", cut=report.cut, version=now, workers=len(report.workers), late=report.late, flushed=report.flushed,
            tokens=report.tokens_scored, stall_s=round(report.stall_s, 3),
        )  # fmt: skip
        return report

    def published(self, version: Version, digest: str) -> None:
        """A version was announced: that ended the hold."""
        self._digests[version] = digest

    def release(self) -> None:
        """Nothing comes of the cut under way: let the workers sample on. Does nothing when none is.

        Once a cut has returned, it is too late for that: its version's weights change, and if the learner goes on from
        later ones, nobody can score what is sampled with it now. The next version ends the hold, or the learner's
        restart.
        """
        if self._open is None:
            return
        cut, self._open = self._open, None
        try:
            self._confirm()
        except Fenced:
            return  # whoever has the run speaks to the workers
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(CutReleased(run=self._run, cut=cut)))])
        logger().info("cut released", cut=cut)

    def close(self) -> None:
        """Stop reading."""
        self._workers.close()

    def _cut(self, now: Version, digest: str, training: Collection[str]) -> CutReport:
        seconds: dict[str, float] = {}
        with self._timed(seconds, "before"):
            # what is here already need not be scored while workers stand still
            self._reader.read_all(now, timeout_s=0.0)
            before = self._scorer.work(self._sampled(training), now, digest)
            settled = self._settle(now)
        self._poll_workers_to_end()
        cut = self._request(now)
        asked_at = self._listened_at = self._clock()
        self._roster.discount_silence(now=asked_at)  # to ask may have taken long
        tokens, flushed = before, settled

        def score(enough: bool) -> int:
            nonlocal tokens, flushed
            with self._timed(seconds, "score"):
                scored = self._scorer.work(self._sampled(training), now, digest, should_stop=lambda: enough)
            tokens, flushed = tokens + scored, flushed + self._settle(now)
            return scored

        failpoints.reach("learner.at_cut")
        with self._timed(seconds, "wait"):
            timeout_s = 0.0
            while True:
                self._poll_workers(timeout_s=timeout_s, cut=cut)
                self._poll_workers_to_end(cut)
                if not cut.is_waiting(self._alive(), now=self._clock()):
                    break
                self._reader.read_all(now, timeout_s=0.0)
                timeout_s = 0.0 if score(enough=True) else POLL_S  # what is here already need not wait for the others
        seconds["wait"] -= seconds.get("score", 0.0)
        with self._timed(seconds, "read"):
            caught_up = self._read(cut.positions, now)
            # who was left out may have flushed all the same, and who died had finished something
            self._read(dict.fromkeys(self._reader.offsets(), sys.maxsize), now)
        score(enough=False)
        failpoints.reach("learner.after_cut")
        if not caught_up:
            logger().warning("cut: the log did not give what workers flushed", cut=cut.number, positions=cut.positions)
        return CutReport(
            cut=cut.number,
            version=now,
            workers=cut.workers,
            answered=cut.answered,
            late=cut.late,
            caught_up=caught_up,
            stall_s=self._clock() - asked_at,
            tokens_scored=tokens,
            flushed=flushed,
            seconds=seconds,
        )

    def _read(self, positions: Mapping[int, int], now: Version) -> bool:
        """Take in what stands on `trajectories` below these offsets; whether all of it came. An outage may come in
        between once: the second look waits until the log answers."""
        return any(self._reader.read_until(positions, now, deadline_s=READ_S) for _ in range(2))

    def _request(self, now: Version) -> Cut:
        self._confirm()  # the successor's workers are not to be stopped
        number, self._next = self._next, self._next + 1
        request = CutRequested(run=self._run, cut=number, version=now, deadline_s=self._deadline_s)
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(request))])
        self._open = number
        return Cut(number, now, requested_at=self._clock(), deadline_s=self._deadline_s)

    def _sampled(self, training: Collection[str] = ()) -> list[Sampled]:
        """What may lack scores: trajectories that wait to be trained on, and flushes of live ones."""
        arrived = (one for trajectory, one in self._reader.arrived.items() if trajectory not in training)
        return [*arrived, *self._reader.flushed]

    def _settle(self, now: Version) -> int:
        """Be done with flushes in which nothing is left to be scored; how many."""
        done = [flushed for flushed in self._reader.flushed if self._scorer.is_done(flushed)]
        for flushed in done:
            late = self._late(flushed, now)
            instruments.FLUSHES.labels("late" if late else "scored").inc()
            instruments.LATE_TOKENS.inc(late)
            self._reader.resolve_flushed(flushed)
        return len(done)

    def _late(self, flushed: Flushed, now: Version) -> int:
        """Tokens that came too late: of a flush for a version that is gone, those that nobody scored in time."""
        record = flushed.record
        if any(segment.version == now for segment in record.segments):
            return 0  # what it lacks of older versions was counted when it should have been flushed
        lacking = self._scores.missing(self._scores.attach(as_row(record), self._digests))
        late = sum(stop - start for start, stop, _ in lacking)
        if late:
            logger().info("late flush", trajectory=record.trajectory, cut=record.cut, worker=record.worker, tokens=late)
        return late

    def _alive(self) -> frozenset[str]:
        return self._roster.alive(now=self._clock())

    def _poll_workers_to_end(self, cut: Cut | None = None) -> None:
        """Take in everything that stands on `workers`; while the log does not answer, wait. A poll alone may bring less
        than there is."""
        ends = self._workers.ends()
        until = self._clock() + READ_S
        while any(self._heard_to.get(p, 0) < end for p, end in ends.items()) and self._clock() < until:
            self._poll_workers(timeout_s=1.0, cut=cut)
        lost_s, self._listened_at = (now := self._clock()) - self._listened_at, now
        if lost_s <= ANSWER_S:
            self._roster.listened(now=now)
        else:
            self._roster.discount_silence(now=now)
            if cut is not None:
                cut.restart_deadline(now=now, lost_s=lost_s)

    def _poll_workers(self, *, timeout_s: float, cut: Cut | None = None) -> None:
        """Take in what workers said, waiting at most so long for a first record."""
        while records := self._workers.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                self._heard_to[record.partition] = record.offset + 1
                if (message := self._message(record)) is None:
                    continue
                self._roster.record_heartbeat(message, now=self._clock())
                if not isinstance(message, CutReached) or (cut is not None and cut.take(message)):
                    continue
                if message.cut >= self._next:  # asked for by a learner that was replaced: the number is taken
                    self._next = message.cut + 1
                if message.cut >= self._first:
                    instruments.LATE_ANSWERS.inc()
                    logger().info("late answer", worker=message.worker, cut=message.cut)
            if len(records) < POLL_RECORDS:
                break
            timeout_s = 0.0

    def _existing_messages(self, topic: str, start: Mapping[int, int] | None = None) -> Iterator[Any]:
        """Messages of this run that stand on the topic now, from these offsets on."""
        for record in read_existing(self._bus, topic, start):
            if (message := self._message(record)) is not None:
                yield message

    def _message(self, record: Record) -> Any:
        """The record's message; None if it cannot be used. Then it is dead-lettered."""
        try:
            message = decode_for_run(record, self._run)
            if isinstance(message, OldLogprobsComputed):
                check_computed(message)
        except RejectedRecord as error:
            self._ingest.dead_letters.write(record, error)
            return None
        return message

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + self._clock() - started


def _seek_back(workers: Consumer, partition: int, end: int) -> int:
    """Begin with the newest records of a partition; where that is."""
    start = max(0, end - RECENT)
    try:
        workers.seek({partition: start})
    except OffsetGone:  # the log begins later: whoever is there will be heard of soon
        workers.seek({partition: end})
        return end
    return start
