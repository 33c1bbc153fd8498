"""A simulated run on the real ledger and offset tracker, with every harmless event, and its evidence."""

import random
from collections import Counter
from dataclasses import dataclass, field

from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES, DropReason, group_id, trajectory_id
from palimpsest.common.offset_tracker import OffsetTracker
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import (
    FINISHED,
    Announced,
    AuditedCheckpoint,
    Bounds,
    Evidence,
    Letter,
    Line,
    LogContents,
    LoggedRecord,
    Offer,
    Stored,
)
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger

SAMPLES, BOUND, PARTITIONS = 3, 1, 2
Place = tuple[int, int]


@dataclass
class Simulated:
    """A run of one process without crashes."""

    rng: random.Random
    entries: TrajectoryLedger[str] = field(
        default_factory=lambda: TrajectoryLedger(
            samples=SAMPLES, groups_per_batch=2, max_staleness=BOUND, time_limit_s=60
        )
    )
    frontier: OffsetTracker = field(default_factory=OffsetTracker)
    version: int = 0
    clock: float = 0.0
    offers: list[Offer] = field(default_factory=list)
    offered_at: list[int] = field(default_factory=list)
    arrivals: list[LoggedRecord] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    waiting: dict[str, LoggedRecord] = field(default_factory=dict)
    ends: list[int] = field(default_factory=lambda: [0] * PARTITIONS)
    checkpoints: list[AuditedCheckpoint] = field(default_factory=list)

    def step(self) -> None:
        """Simulate one event and the learner's reaction."""
        self.clock += 1.0
        while self.entries.free_slots():
            index = self.entries.next_index
            self.offers.append(Offer(self.entries.offer(now=self.clock), index, SAMPLES, ("lookup", 7 * index)))
            self.offered_at.append(self.version)
        index = self.rng.randrange(max(0, len(self.offers) - 6), len(self.offers))
        name = trajectory_id(group_id(index), self.rng.randrange(SAMPLES))
        match self.rng.choice(["finish"] * 7 + ["drop", "garbage", "nameless", "unsound", "stranger"]):
            case "finish":
                low = self.rng.randint(self.offered_at[index], self.version)
                self._arrive(name, low, self.rng.randint(low, self.version))
            case "drop":
                record = self._publish(name, DropReason.ENVIRONMENT_FAILED.value)
                self.entries.drop(group_id(index), name, DropReason.ENVIRONMENT_FAILED)
                self.frontier.resolve(record.partition, record.offset)
            case "garbage":
                self._bury(self._publish("", "", sound=False, index=index), group_id(index), name)
            case "nameless":
                self._bury(self._publish("", "", sound=False, index=index), "", "")
            case "unsound":
                self._bury(self._publish(name, FINISHED, sound=False), group_id(index), name)
            case "stranger":
                record = self._publish(trajectory_id(group_id(10_000 + index), 0), FINISHED, index=index)
                self._bury(record, "", "")  # never offered, so no trajectory of the run is lost
        self._learn()

    def evidence(self) -> Evidence:
        """Return the evidence that an audit reads, from the newest checkpoint on."""
        checkpoint = self.checkpoints[-1] if self.checkpoints else None
        lowest = max(0, self.version - BOUND)
        return Evidence(
            run="simulated",
            samples=SAMPLES,
            max_staleness=BOUND,
            every=1,
            log=LogContents(
                offers=tuple(self.offers),
                arrivals=tuple(self.arrivals),
                letters=tuple(self.letters),
                announced=tuple(Announced(Version(v), _digest(v)) for v in range(self.version + 1)),
                bounds={
                    TASKS: {0: Bounds(0, len(self.offers))},
                    TRAJECTORIES: {p: Bounds(0, end) for p, end in enumerate(self.ends)},
                    DEAD_LETTERS: {0: Bounds(0, len(self.letters))},
                },
            ),
            checkpoint=checkpoint,
            lines=tuple(self.lines),
            stored=tuple(Stored(Version(v), _digest(v), 1, 10) for v in range(lowest, self.version + 1)),
            leases={"learner": lowest},
            epoch=1,
            commits=tuple((int(one.version), one.writer) for one in self.checkpoints[-2:]),
        )

    def _arrive(self, name: str, oldest: int, newest: int) -> None:
        record = self._publish(name, FINISHED, oldest=oldest, newest=newest)
        known = self.entries.arrive(name.rpartition("/")[0], name, name, newest=Version(newest))
        if known in (ArrivalStatus.NEW, ArrivalStatus.RECOVERED):
            self.waiting[name] = record
        else:
            self.frontier.resolve(record.partition, record.offset)

    def _publish(
        self,
        name: str,
        how: str,
        *,
        sound: bool = True,
        oldest: int | None = None,
        newest: int | None = None,
        index: int | None = None,
    ) -> LoggedRecord:
        partition = (int(name[1:7]) if index is None else index) % PARTITIONS
        tokens = {} if oldest is None or newest is None else {oldest: 5, newest: 3}
        record = LoggedRecord(partition, self.ends[partition], name, how, oldest, newest, sound, tokens)
        self.ends[partition] += 1
        self.arrivals.append(record)
        self.frontier.read(record.partition, record.offset)
        return record

    def _bury(self, record: LoggedRecord, group: str, name: str) -> None:
        self.letters.append(Letter(record.partition, record.offset, name))
        self.frontier.resolve(record.partition, record.offset)
        self.entries.dead_letter(group, name)

    def _learn(self) -> None:
        self.entries.expire(now=self.clock)
        now = Version(self.version)
        for name in (*self.entries.drop_stale(now), *self.entries.drop_small()):
            self._resolve(name)
        if not (batch := self.entries.take_batch(now)):
            return
        trained = tuple(name for group in batch for name in group.items)
        tokens = Counter[int]()
        for name in trained:
            tokens.update({self.version - version: n for version, n in self.waiting[name].tokens.items()})
        ages = [age for age in tokens if age <= BOUND]
        for name in (*trained, *(name for group in batch for name in group.stale)):
            self._resolve(name)
        counts = self.entries.counts()
        dropped = counts["dropped"]
        assert isinstance(dropped, dict)
        self.version += 1
        self.lines.append(
            Line(
                self.version - 1,
                self.version,
                trained,
                len(trained),
                (min(ages), max(ages)),
                {name: n for name, n in counts.items() if isinstance(n, int)} | {"dropped": sum(dropped.values())},
                too_old=sum(n for age, n in tokens.items() if age > BOUND),
            )
        )
        self.checkpoints.append(
            AuditedCheckpoint(
                name=f"{self.version:08d}-00000001",
                version=Version(self.version),
                writer=1,
                digest=_digest(self.version - 1),
                trained_versions=len(self.lines),
                ledger=self.entries.state(),
                offsets=self.frontier.offsets(),
                task_offsets={0: len(self.offers)},
            )
        )

    def _resolve(self, name: str) -> None:
        record = self.waiting.pop(name)
        self.frontier.resolve(record.partition, record.offset)


def _digest(version: int) -> str:
    return f"{version:064x}"
