"""The learner's side of a cut: exact old log-probs without a copy of the model.

Before the first optimizer step of a version the learner requests a cut: every worker pauses and flushes the tokens that
it has sampled. The learner scores these tokens with the resident weights. The scores are durable before the weights
change. Workers resume when they read the announcement of the next version (docs/algorithms/interruption.md).
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from palimpsest.common import failpoints
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    CutReached,
    CutReleased,
    CutRequested,
    OldLogprobsComputed,
    VersionPublished,
    encode,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.flushes import Flushed
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer, Sampled, as_row
from palimpsest.services.learner.old_logprobs.interruption.cut import Cut, CutReport, next_number
from palimpsest.services.learner.old_logprobs.interruption.worker_feed import WorkerFeed
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore, check_computed
from palimpsest.services.learner.timing import PhaseTimer

POLL_S = 0.05
"""Seconds between reads while the cut waits for workers and no token is left to score."""
SLICE_S = 0.2
"""Limit of one call of `work`, in seconds. No micro-batch starts later, so that the loop reads new records."""
READ_S = 30.0
"""Limit for reading the workers' flushes, in seconds. Flushes are on the log when a worker answers, so only an outage
can delay reading for this long."""


class CutStopped(Exception):
    """A stop was requested while a cut waited for workers."""


class CutCoordinator:
    """Requests cuts and scores what workers flush (rank 0).

    confirm: raises Fenced unless the run still belongs to this learner. epoch: returns the epoch of this learner.
    control: checks the records of earlier learners. left_out: returns groups that `work` does not score.
    before_waking: engines share the learner's GPUs and sleep at a cut: a cut waits for every live worker, and only then
    scores. Called before a release, upon which they take back their memory; None: engines do not sleep.
    """

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
        epoch: Callable[[], int],
        control: ControlCheck,
        left_out: Callable[[], Collection[str]] = frozenset,
        clock: Callable[[], float] = time.monotonic,
        before_waking: Callable[[], None] | None = None,
    ) -> None:
        self._bus, self._ingest, self._reader, self._scorer, self._scores = bus, ingest, ingest.reader, scorer, scores
        self._run, self._deadline_s, self._confirm, self._clock = run, deadline_s, confirm, clock
        self._epoch, self._control, self._left_out = epoch, control, left_out
        self._sleeping, self._before_waking = before_waking is not None, before_waking
        self._workers = WorkerFeed(bus, ingest.dead_letters, run=run, clock=clock, sleeping=self._sleeping)
        self._first = self._next = 1
        self._open: int | None = None

    def start(self) -> None:
        """Read from the log: the last cut, the versions' digests, scores of unresolved trajectories, live workers.

        Call it after Ingest.start and after the first version was published.
        """
        control = list(self._read_existing_messages(CONTROL))
        self._first = self._next = next_number(control)
        self._scores.digests = {m.version: m.digest for m in control if isinstance(m, VersionPublished)}
        found = 0
        for message in self._read_existing_messages(OLD_LOGPROBS, self._ingest.tasks.score_offsets()):
            if isinstance(message, OldLogprobsComputed) and self._reader.is_pending(message.trajectory):
                self._scores.put(message)
                found += message.stop - message.start
        instruments.OLD_FOUND.inc(found)
        self._note_other_cuts(self._workers.start().answers)
        logger().debug("interruption", next_cut=self._next, found=found, workers=sorted(self._workers.alive()))

    def work(self, now: Version, digest: str) -> int:
        """Score some arrived tokens while the loop waits for a batch. Return the number of tokens; 0 if none is left.

        now, digest: the resident version.
        """
        self._scores.digests[now] = digest
        self._note_other_cuts(self._workers.poll().answers)
        if self._sleeping:
            return 0
        until, left_out = self._clock() + SLICE_S, self._left_out()
        early = [one for one in self._sampled() if isinstance(one, Flushed) or one.record.group not in left_out]
        tokens = self._scorer.work(early, now, digest, should_stop=lambda: self._clock() >= until)
        self._resolve_scored_flushes(now)
        instruments.OLD_SCORED.labels("early").inc(tokens)
        return tokens

    def cut(
        self,
        now: Version,
        digest: str,
        *,
        training: Collection[str] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> CutReport:
        """Pause the workers and score every token of `now` that lacks an old log-prob.

        Call it before the first optimizer step. When it returns, the scores are durable and the weights may change. A
        worker that has not answered by the deadline is left out. training: trajectories whose scores are not needed
        after this step. Raises CutStopped, with the cut open, if `stop` returns True while it waits for workers.

        Never raises Fenced, because other ranks wait in a collective operation. The report has the field `fenced`, and
        the next `confirm` raises again.
        """
        self._scores.digests[now] = digest
        try:
            report = self._cut(now, digest, training, stop)
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

    def cut_and_release(self, now: Version, digest: str) -> CutReport:
        """Cut while the weights stay, and resume the workers. Raises Fenced.

        Later tokens of `now` are scored before the next step, as if there had been no cut.
        """
        report = self.cut(now, digest)
        self._confirm()
        self._release(report.cut)
        return report

    def take_turn(self, now: Version, digest: str, *, stop: Callable[[], bool]) -> bool:
        """Cut before the learner computes anything with `now`: then all engines sleep. Raises Fenced.

        Return False if a stop was requested during the wait for the workers; they sample again.
        """
        try:
            self.cut(now, digest, stop=stop)
        except CutStopped:
            assert self._open is not None
            self._release(self._open)
            return False
        self._confirm()
        return True

    def published(self, version: Version, digest: str) -> None:
        """Record an announced version. The announcement resumes the workers."""
        self._scores.digests[version] = digest

    def release(self) -> None:
        """Resume the workers if a cut has failed. Does nothing if no cut is open, and if engines sleep.

        After a cut has returned, the weights of its version change, and tokens sampled with that version could not be
        scored. Then only the next version, or a restart of the learner, resumes the workers. Engines sleep until then
        also after a failed cut: the ranks of a learner that fails are not in step, so they cannot return their memory
        before they end.
        """
        if self._open is not None and not self._sleeping:
            self._release(self._open)

    def _release(self, cut: int) -> None:
        self._open = None
        if self._before_waking is not None:
            self._before_waking()
        try:
            self._confirm()
        except Fenced:
            return  # the learner that has the run resumes the workers
        release = CutReleased(run=self._run, cut=cut, writer=self._epoch())
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(release))])
        logger().info("cut released", cut=cut)

    def close(self) -> None:
        """Close the consumer."""
        self._workers.close()

    def _cut(self, now: Version, digest: str, training: Collection[str], stop: Callable[[], bool]) -> CutReport:
        timer = PhaseTimer(self._clock, base="request")
        with timer.of("before"):
            # score arrived tokens before the workers pause
            self._reader.read_all(now, timeout_s=0.0)
            before = 0 if self._sleeping else self._scorer.work(self._sampled(training), now, digest)
            settled = self._resolve_scored_flushes(now)
        self._note_other_cuts(self._workers.read_to_end().answers)
        cut = self._request_cut(now)
        requested_at = self._clock()
        self._workers.begin_cut()
        tokens, flushed = before, settled

        def score(enough: bool) -> int:
            nonlocal tokens, flushed
            with timer.of("score"):
                scored = self._scorer.work(self._sampled(training), now, digest, should_stop=lambda: enough)
            tokens, flushed = tokens + scored, flushed + self._resolve_scored_flushes(now)
            return scored

        failpoints.reach("learner.at_cut")
        with timer.of("wait"):
            wait_s = 0.0
            while True:
                read = self._workers.read_to_end(wait_s=wait_s)
                if read.extends_cut:
                    cut.restart_deadline(now=self._clock())
                self._note_other_cuts(answer for answer in read.answers if not cut.take(answer))
                if not cut.is_waiting(self._workers.alive(), now=self._clock()):
                    break
                if stop():
                    raise CutStopped
                self._reader.read_all(now, timeout_s=0.0)
                # score while the cut waits for the other workers, unless they still have the memory
                wait_s = 0.0 if not self._sleeping and score(enough=True) else POLL_S
        with timer.of("read"):
            caught_up = self._read_trajectories(cut.positions, now)
            # a late worker may have flushed, and a dead one may have finished trajectories
            self._read_trajectories(dict.fromkeys(self._reader.offsets(), sys.maxsize), now)
        score(enough=False)
        failpoints.reach("learner.after_cut")
        if not caught_up:
            logger().warning("cut timed out before all flushes were read", cut=cut.number, positions=cut.positions)
        return CutReport(
            cut=cut.number,
            version=now,
            workers=cut.workers,
            answered=cut.answered,
            late=cut.late,
            caught_up=caught_up,
            stall_s=self._clock() - requested_at,
            tokens_scored=tokens,
            flushed=flushed,
            seconds=timer.take(),
        )

    def _read_trajectories(self, positions: Mapping[int, int], now: Version) -> bool:
        """Read topic `trajectories` up to these offsets. Return whether that succeeded.

        The second attempt covers an outage of the log during the first: it waits until the log answers.
        """
        return any(self._reader.read_until(positions, now, deadline_s=READ_S) for _ in range(2))

    def _request_cut(self, now: Version) -> Cut:
        self._confirm()  # a learner that was replaced must not pause its successor's workers
        number, self._next = self._next, self._next + 1
        request = CutRequested(
            run=self._run, cut=number, version=now, deadline_s=self._deadline_s, writer=self._epoch()
        )
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(request))])
        self._open = number
        deadline_s = math.inf if self._sleeping else self._deadline_s
        return Cut(number, now, requested_at=self._clock(), deadline_s=deadline_s)

    def _sampled(self, training: Collection[str] = ()) -> list[Sampled]:
        """Records that may have unscored tokens: trajectories that wait to be trained on, and flushes of live ones."""
        arrived = (received for name, received in self._reader.arrived.items() if name not in training)
        return [*arrived, *self._reader.flushed]

    def _resolve_scored_flushes(self, now: Version) -> int:
        """Resolve the flushes without unscored tokens. Return their number."""
        done = [flushed for flushed in self._reader.flushed if self._scorer.is_done(flushed)]
        for flushed in done:
            late = self._count_late_tokens(flushed, now)
            instruments.FLUSHES.labels("late" if late else "scored").inc()
            instruments.LATE_TOKENS.inc(late)
            self._reader.resolve_flushed(flushed)
        return len(done)

    def _count_late_tokens(self, flushed: Flushed, now: Version) -> int:
        """Number of tokens in a flush that were not scored before the weights of their version changed."""
        record = flushed.record
        if any(segment.version == now for segment in record.segments):
            return 0  # tokens of older versions were counted with the cut that missed them
        lacking = self._scores.missing(self._scores.attach(as_row(record)))
        late = sum(stop - start for start, stop, _ in lacking)
        if late:
            logger().info("late flush", trajectory=record.trajectory, cut=record.cut, worker=record.worker, tokens=late)
        return late

    def _note_other_cuts(self, answers: Iterable[CutReached]) -> None:
        """Count answers to cuts other than the open one."""
        for answer in answers:
            # a learner that was replaced may have requested a cut with that number, so the number is taken
            self._next = max(self._next, answer.cut + 1)
            if answer.cut >= self._first:
                instruments.LATE_ANSWERS.inc()
                logger().info("late answer", worker=answer.worker, cut=answer.cut)

    def _read_existing_messages(self, topic: str, start: Mapping[int, int] | None = None) -> Iterator[Any]:
        """Yield the messages of this run that are on the topic now, from these offsets on."""
        for record in read_existing(self._bus, topic, start):
            if (message := self._decode_or_dead_letter(record)) is not None:
                yield message

    def _decode_or_dead_letter(self, record: Record) -> Any:
        """Return the record's message. None if it is of a replaced learner, or cannot be used and was dead-lettered."""
        try:
            message = decode_for_run(record, self._run)
            if isinstance(message, OldLogprobsComputed):
                check_computed(message)
            if record.topic == CONTROL and not self._control.check(message, history=True):
                return None
        except RejectedRecord as error:
            self._ingest.dead_letters.write(record, error)
            return None
        return message
