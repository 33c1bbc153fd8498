"""The learner's reading of the log: trajectories in, every one accounted for.

A record is checked before anything is made of it. One that cannot be used goes to `dead_letters` whole, with the
cause, and the run goes on. One that was seen before is passed over: delivery is at least once, the effect once. Only
what ended as a dead letter is taken up again when a sound record of it comes in time.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from palimpsest.common.bus.port import Bus, OffsetGone, Outgoing, Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    DEAD_LETTERS,
    OLD_LOGPROBS,
    REPLAYED,
    TASKS,
    TRAJECTORIES,
    GroupOffered,
    Sampling,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    Undecodable,
    dead_letter,
    decode,
    encode,
    group_id,
    message_in,
    trajectory_id,
)
from palimpsest.common.offset_tracker import OffsetTracker
from palimpsest.common.rejected_record import FOREIGN, RejectCause, RejectedRecord
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.flushes import FlushBuffer, Flushed
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from palimpsest.services.learner.buffer.task_sampler import task
from palimpsest.services.learner.ingest.validation import check_finished, check_sampled
from palimpsest.services.learner.ingest.watermarks import ScoreWatermarks

POLL_RECORDS = 512
TAKEN = (ArrivalStatus.NEW, ArrivalStatus.REVIVED)
BEGINNING: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReceivedTrajectory:
    """A usable trajectory and where it stands on the log."""

    record: TrajectoryFinished
    partition: int
    offset: int

    @property
    def oldest(self) -> Version | None:
        """Lowest version among its tokens; None if nothing was sampled."""
        return min((segment.version for segment in self.record.segments), default=None)


class TrajectoryReader:
    """Feeds the planner from the log and offers what the planner admits."""

    def __init__(
        self,
        bus: Bus,
        planner: TrajectoryLedger[ReceivedTrajectory],
        *,
        run: str,
        seed: int,
        environments: Mapping[str, float],
        samples: int,
        sampling: Sampling,
        time_limit_s: float,
        confirm: Callable[[], None],
        keep_flushed: bool = False,
        on_resolved: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._confirm = confirm
        """Raises unless the run is still this learner's; comes before everything that is published here."""
        self._keeps_flushed = keep_flushed
        """Whether somebody scores flushes and calls `resolve_flushed`; else they are passed over."""
        self._ended = on_resolved
        """Is told of each trajectory whose fate is settled: nobody asks for its scores any more."""
        self._bus, self._planner, self._run = bus, planner, run
        self._seed, self._environments, self._samples = seed, environments, samples
        self._sampling, self._time_limit_s = sampling, time_limit_s
        self._frontier = OffsetTracker()
        self._reader = bus.consumer(TRAJECTORIES)
        self._beginnings, self._scores = ScoreWatermarks(), bus.consumer(OLD_LOGPROBS)
        self.arrived: dict[str, ReceivedTrajectory] = {}
        """Trajectories waiting to be trained on, by id."""
        self.flushed = FlushBuffer()
        """Flushes of live trajectories, until they are scored or their trajectory ends."""
        self._read_to: dict[int, int] = {}
        self.task_ends: dict[int, int] = {}
        """Where the tasks of the groups known so far end on the log."""
        self.sampled_tokens = 0
        """Trainable tokens of everything that arrived."""

    def start(
        self,
        offsets: Mapping[int, int],
        task_offsets: Mapping[int, int],
        score_offsets: Mapping[int, int] = BEGINNING,
        *,
        now: float,
    ) -> None:
        """Read on from a checkpoint's offsets ({}: from the beginning) and learn what was offered after it.

        Raises UserError when the log no longer reaches back that far: skipping would lose trajectories silently.
        """
        try:
            self._reader.seek(offsets)
            for partition in self._reader.assignment():
                self._frontier.start(partition, offsets.get(partition, 0))
                self._read_to[partition] = offsets.get(partition, 0)
            self._adopt(task_offsets, now)
            self._scores.seek(score_offsets)
            self._beginnings.start(score_offsets)
        except OffsetGone as gone:
            raise UserError(
                f"the log no longer holds what the checkpoint needs: {gone}. Trajectories would be lost silently, so "
                f"the run stops here: restore the log, or start a new run from this one's newest snapshot",
                ExitCode.DAMAGED,
            ) from None

    def offer(self, newest: Version, *, now: float) -> int:
        """Offer as many groups as the planner admits, to be sampled by `newest` or later; how many."""
        if slots := self._planner.free_slots():
            self._confirm()  # a learner that was replaced would offer its successor's groups a second time
            self._beginnings.offer(self._planner.next_index, self._scores.ends())
        offers = []
        for _ in range(slots):
            index = self._planner.next_index
            environment, task_seed = task(self._seed, index, self._environments)
            group = self._planner.offer(now=now)
            offers.append(
                GroupOffered(
                    run=self._run,
                    group=group,
                    index=index,
                    version=newest,
                    environment=environment,
                    task_seed=task_seed,
                    samples=self._samples,
                    sampling=self._sampling,
                    time_limit_s=self._time_limit_s,
                )
            )
        for at in self._bus.publish(TASKS, [Outgoing(offer.group, encode(offer)) for offer in offers]):
            self.task_ends[at.partition] = max(self.task_ends.get(at.partition, 0), at.offset + 1)
        instruments.OFFERED.inc(self._samples * len(offers))
        return len(offers)

    def read_all(self, newest: Version, *, timeout_s: float) -> None:
        """Take in everything on the log, waiting at most so long for a first record.

        `newest`: no token can be of a later version.
        """
        while records := self._reader.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                self._frontier.read(record.partition, record.offset)
                self._read_to[record.partition] = record.offset + 1
                try:
                    self._take(record, newest)
                except RejectedRecord as error:
                    self.dead_letter(record, error)
            if len(records) < POLL_RECORDS:
                break
            timeout_s = 0.0

    def read_until(self, positions: Mapping[int, int], newest: Version, *, deadline_s: float) -> bool:
        """Take in everything below these offsets of `trajectories`; False if it did not come within so many seconds."""
        ends = self._reader.ends()  # nobody can have published more than stands there
        wanted = {p: min(offset, ends[p]) for p, offset in positions.items() if p in ends}
        until = time.monotonic() + deadline_s
        while any(self._read_to.get(partition, 0) < offset for partition, offset in wanted.items()):
            if (left := until - time.monotonic()) <= 0:
                return False
            self.read_all(newest, timeout_s=min(left, 1.0))
        return True

    def dead_letter(self, record: Record, error: RejectedRecord, *, ends: bool = True) -> None:
        """Keep a record that cannot be used, whole, with its cause; the run goes on without it.

        `ends`: it may have been a trajectory's end, so that the ledger counts the trajectory as lost.
        """
        self._confirm()  # to a learner that was replaced, whatever its successor offered looks like this
        logger().warning(
            "dead letter", topic=record.topic, partition=record.partition, offset=record.offset,
            cause=error.cause.value, reason=str(error),
        )  # fmt: skip
        letter = dead_letter(self._run, record, error, now=time.time())
        self._bus.publish(DEAD_LETTERS, [Outgoing(record.key, encode(letter))])
        self._frontier.resolve(record.partition, record.offset)
        instruments.DEAD_LETTERS.labels(error.cause.value, record.topic).inc()
        if ends and error.cause not in FOREIGN:
            # the worker names the trajectory in a header, so that the ledger knows which one is lost
            self._planner.dead_letter(record.key, record.headers.get("trajectory", ""))

    def resolve(self, arrived: ReceivedTrajectory) -> None:
        """The trajectory's record needs no further attention."""
        self._frontier.resolve(arrived.partition, arrived.offset)
        del self.arrived[arrived.record.trajectory]
        self.forget(arrived.record.trajectory)

    def forget(self, trajectory: str) -> None:
        """The trajectory's fate is settled: neither its flushes nor its scores are needed any more."""
        self._pass_over(self.flushed.forget(trajectory))
        self._ended(trajectory)

    def resolve_flushed(self, flushed: Flushed) -> None:
        """The flush was scored, durably, or there is nothing to score in it."""
        self.flushed.remove(flushed)
        self._frontier.resolve(flushed.partition, flushed.offset)

    def pending(self) -> Callable[[str], bool]:
        """Whether a trajectory's fate is open: it is awaited, or it waits to be trained on."""
        return self._planner.is_pending

    def offsets(self) -> dict[int, int]:
        """Where reading must start again, for a checkpoint."""
        return self._frontier.offsets()

    def score_offsets(self) -> dict[int, int]:
        """Topic `old_logprobs`: what stands before is of trajectories whose fate is settled. {}: it may be anyone's."""
        oldest = self._planner.oldest_open()
        return self._beginnings.offsets(self._planner.next_index if oldest is None else int(oldest[1:]))

    def close(self) -> None:
        """Stop reading."""
        self._scores.close()
        self._reader.close()

    def _take(self, record: Record, newest: Version) -> None:
        message: TrajectoryFinished | TrajectoryDropped | SegmentFlushed = message_in(record)
        if message.run != self._run:
            raise RejectedRecord(RejectCause.WRONG_RUN, f"it is of run {message.run}")
        if isinstance(message, SegmentFlushed):
            self._take_flushed(message, record, newest)
            return
        if isinstance(message, TrajectoryDropped):
            known = self._planner.drop(message.group, message.trajectory, message.reason)
            if known in TAKEN:
                instruments.DROPPED.labels(message.reason.value).inc()
                self.forget(message.trajectory)
        else:
            check_finished(message, newest)
            arrived = ReceivedTrajectory(message, record.partition, record.offset)
            known = self._planner.arrive(message.group, message.trajectory, arrived)
            if known in TAKEN:
                self.arrived[message.trajectory] = arrived
                self._pass_over(self.flushed.forget(message.trajectory))  # the whole holds every part
                self.sampled_tokens += sum(map(len, message.segments))
        if known is ArrivalStatus.UNKNOWN:
            raise RejectedRecord(
                RejectCause.NEVER_OFFERED, f"trajectory {message.trajectory} was never offered in this run"
            )
        self._say(known, message, record)
        if known is ArrivalStatus.DUPLICATE or isinstance(message, TrajectoryDropped):
            self._frontier.resolve(record.partition, record.offset)

    def _take_flushed(self, message: SegmentFlushed, record: Record, newest: Version) -> None:
        """Keep it to be scored. Whatever is wrong with it, the ledger does not change: the end is still to come."""
        flushed = Flushed(message, record.partition, record.offset)
        try:
            check_sampled(message, newest)
            if not self._was_offered(message):
                raise RejectedRecord(
                    RejectCause.NEVER_OFFERED, f"trajectory {message.trajectory} was never offered in this run"
                )
        except RejectedRecord as error:
            self.dead_letter(record, error, ends=False)
            return
        ended = message.trajectory in self.arrived or not self.pending()(message.trajectory)
        self._pass_over([flushed] if ended or not self._keeps_flushed else self.flushed.add(flushed))

    def _pass_over(self, needless: Iterable[Flushed]) -> None:
        for flushed in needless:
            self._frontier.resolve(flushed.partition, flushed.offset)
            instruments.FLUSHES.labels("needless").inc()

    def _was_offered(self, message: SegmentFlushed) -> bool:
        group, _, sample = message.trajectory.rpartition("/")
        index = int(group[1:]) if group[1:].isdecimal() else -1
        return (
            group == message.group == group_id(index)
            and 0 <= index < self._planner.next_index
            and sample.isdecimal()
            and message.trajectory == trajectory_id(group, int(sample))
        )

    def _say(self, known: ArrivalStatus, message: TrajectoryFinished | TrajectoryDropped, record: Record) -> None:
        replayed = {REPLAYED: record.headers[REPLAYED]} if REPLAYED in record.headers else {}
        if known is ArrivalStatus.REVIVED:
            logger().info("dead letter made good", trajectory=message.trajectory, offset=record.offset, **replayed)
        elif known is ArrivalStatus.DUPLICATE:
            instruments.DUPLICATES.inc()
            group = "open" if self._planner.is_open(message.group) else "closed"
            logger().info("duplicate", trajectory=message.trajectory, offset=record.offset, group=group, **replayed)

    def _adopt(self, task_offsets: Mapping[int, int], now: float) -> None:
        """Groups offered after the checkpoint are on the log of tasks: take them over in their order."""
        offers: dict[int, int] = {}
        with self._bus.consumer(TASKS) as consumer:
            consumer.seek(task_offsets)
            ends = consumer.ends()
            missing = sum(end - task_offsets.get(partition, 0) for partition, end in ends.items())
            while missing > 0:
                for record in consumer.poll(limit=POLL_RECORDS, timeout_s=1.0):
                    missing -= 1
                    try:
                        offer: GroupOffered = decode(TASKS, record.body)
                    except Undecodable:
                        continue  # the worker that meets it buries it
                    if offer.run == self._run:
                        offers[offer.index] = offer.samples
        self.task_ends = dict(ends)
        while self._planner.next_index in offers:
            group = group_id(self._planner.next_index)
            self._planner.offer(now=now, samples=offers[self._planner.next_index])
            logger().debug("adopted", group=group)
