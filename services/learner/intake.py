"""The learner's reading of the log: trajectories in, every one accounted for.

A record is checked before anything is made of it. One that cannot be used goes to `dead_letters` whole, with the
reason, and the run goes on. One that was seen before is passed over: delivery is at least once, the effect once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.arrays import unpack_int32
from common.bus.port import Bus, OffsetGone, Outgoing, Record
from common.frontier import Frontier
from common.logs import logger
from common.messages import (
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    GroupOffered,
    Sampling,
    TrajectoryDropped,
    TrajectoryFinished,
    Undecodable,
    dead_letter,
    decode,
    encode,
    group_id,
)
from common.refusal import ExitCode, Refusal
from common.trajectory import Malformed, check
from common.versions import Version
from services.learner import metrics
from services.learner.planner import Arrival, Planner
from services.learner.tasks import task

POLL_RECORDS = 512
MOST_TOKENS = 1 << 24
"""A trajectory longer than this is garbage."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A usable trajectory and where it stands on the log."""

    record: TrajectoryFinished
    partition: int
    offset: int

    @property
    def oldest(self) -> Version | None:
        """Lowest version among its tokens; None if nothing was sampled."""
        return min((segment.version for segment in self.record.segments), default=None)


class _Foreign(Malformed):
    """A sound record that has no place in this run."""


class Intake:
    """Feeds the planner from the log and offers what the planner admits."""

    def __init__(
        self,
        bus: Bus,
        planner: Planner[Arrived],
        *,
        run: str,
        seed: int,
        environments: Mapping[str, float],
        samples: int,
        sampling: Sampling,
        time_limit_s: float,
    ) -> None:
        self._bus, self._planner, self._run = bus, planner, run
        self._seed, self._environments, self._samples = seed, environments, samples
        self._sampling, self._time_limit_s = sampling, time_limit_s
        self._frontier = Frontier()
        self._reader = bus.consumer(TRAJECTORIES)
        self.arrived: dict[str, Arrived] = {}
        """Trajectories waiting to be trained on, by id."""
        self.task_ends: dict[int, int] = {}
        """Where the tasks of the groups known so far end on the log."""
        self.sampled_tokens = 0
        """Trainable tokens of everything that arrived."""

    def start(self, offsets: Mapping[int, int], task_offsets: Mapping[int, int], *, now: float) -> None:
        """Read on from a checkpoint's offsets ({}: from the beginning) and learn what was offered after it.

        Raises Refusal when the log no longer reaches back that far: skipping would lose trajectories silently.
        """
        try:
            self._reader.seek(offsets)
            for partition in self._reader.assignment():
                self._frontier.start(partition, offsets.get(partition, 0))
            self._adopt(task_offsets, now)
        except OffsetGone as gone:
            raise Refusal(
                f"the log no longer holds what the checkpoint needs: {gone}. Trajectories would be lost silently, so "
                f"the run stops here: restore the log, or start a new run from this one's newest snapshot",
                ExitCode.DAMAGED,
            ) from None

    def offer(self, newest: Version, *, now: float) -> int:
        """Offer as many groups as the planner admits, to be sampled by `newest` or later; how many."""
        offers = []
        for _ in range(self._planner.slots()):
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
        metrics.OFFERED.inc(self._samples * len(offers))
        return len(offers)

    def read_all(self, newest: Version, *, timeout_s: float) -> None:
        """Take in everything on the log, waiting at most so long for a first record.

        `newest`: no token can be of a later version.
        """
        while records := self._reader.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            for record in records:
                self._frontier.read(record.partition, record.offset)
                try:
                    self._take(record, newest)
                except (Undecodable, Malformed) as error:
                    self._bury(record, error)
            if len(records) < POLL_RECORDS:
                break
            timeout_s = 0.0

    def resolve(self, arrived: Arrived) -> None:
        """The trajectory's record needs no further attention."""
        self._frontier.resolve(arrived.partition, arrived.offset)
        del self.arrived[arrived.record.trajectory]

    def offsets(self) -> dict[int, int]:
        """Where reading must start again, for a checkpoint."""
        return self._frontier.offsets()

    def backlog(self) -> int:
        """Records on the log not read yet."""
        ends, read = self._reader.ends(), self._frontier.offsets()
        return sum(max(0, end - read.get(partition, 0)) for partition, end in ends.items())

    def close(self) -> None:
        """Stop reading."""
        self._reader.close()

    def _take(self, record: Record, newest: Version) -> None:
        message: TrajectoryFinished | TrajectoryDropped = decode(TRAJECTORIES, record.body)
        if message.run != self._run:
            raise _Foreign(f"it is of run {message.run}")
        if isinstance(message, TrajectoryDropped):
            known = self._planner.drop(message.group, message.trajectory, message.reason)
            if known is Arrival.NEW:
                metrics.DROPPED.labels(message.reason.value).inc()
        else:
            check_finished(message, newest)
            arrived = Arrived(message, record.partition, record.offset)
            known = self._planner.arrive(message.group, message.trajectory, arrived)
            if known is Arrival.NEW:
                self.arrived[message.trajectory] = arrived
                self.sampled_tokens += sum(map(len, message.segments))
                return
        if known is Arrival.UNKNOWN:
            raise _Foreign(f"trajectory {message.trajectory} was never offered in this run")
        if known is Arrival.DUPLICATE:
            metrics.DUPLICATES.inc()
        self._frontier.resolve(record.partition, record.offset)

    def _bury(self, record: Record, error: ValueError) -> None:
        logger().warning("dead letter", partition=record.partition, offset=record.offset, reason=str(error))
        self._bus.publish(DEAD_LETTERS, [Outgoing(record.key, encode(dead_letter(self._run, record, str(error))))])
        self._frontier.resolve(record.partition, record.offset)
        metrics.DEAD_LETTERED.inc()
        if not isinstance(error, _Foreign):
            # the worker names the trajectory in a header, so that the ledger knows which one is lost
            self._planner.dead_letter(record.key, record.headers.get("trajectory", ""))

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


def check_finished(message: TrajectoryFinished, newest: Version) -> None:
    """Raise Malformed unless everything that training relies on holds."""
    if len(message.tokens) % 4 or not 0 < len(message.tokens) <= 4 * MOST_TOKENS:
        raise Malformed(f"{len(message.tokens)} bytes are no array of 4-byte tokens")
    tokens = unpack_int32(message.tokens)
    if tokens.min() < 0:
        raise Malformed("a token is negative")
    check(message.segments, len(tokens))
    for segment in message.segments:
        if segment.version > newest:
            raise Malformed(f"a segment is of version {segment.version}, the newest published is {newest}")
        if segment.start == 0:
            raise Malformed("the first token is sampled: nothing predicts it")
    if not (math.isfinite(message.reward) and 0 <= message.reward <= 1):
        raise Malformed(f"reward {message.reward} is outside [0, 1]")
    if not (math.isfinite(message.temperature) and message.temperature > 0):
        raise Malformed(f"temperature {message.temperature} is not above 0")
