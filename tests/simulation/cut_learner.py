"""The learner of simulated runs (cut_schedules.py): it requests cuts, scores and publishes, but trains nothing.

`schedule` holds the random numbers, the log and the checker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.messages import CONTROL, TASKS, Sampling, VersionPublished, encode
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.build import build_ingest
from palimpsest.services.learner.ingest.offers import TaskSettings
from palimpsest.services.learner.ingest.trajectory_reader import NoEvaluations, ReceivedTrajectory
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer, as_row
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from tests.records.any_learner import any_control
from tests.simulation.memory_bus import MemoryBus
from tests.simulation.score_checker import score_under
from tests.simulation.simulated_time import Actor

RUN = "test"
START = Version(0)
SAMPLES, GROUPS = 2, 2
SAMPLING = Sampling(temperature=1.0, max_turn_tokens=4, max_trajectory_tokens=60, max_turns=3)
DEADLINE_S = 5.0


@dataclass(frozen=True)
class LearnerCheckpoint:
    """A checkpoint."""

    version: Version = START
    ledger: Any = None
    offsets: dict[int, int] = field(default_factory=dict)
    task_offsets: dict[int, int] = field(default_factory=dict)
    score_offsets: dict[int, int] = field(default_factory=dict)


class LearnerFailed(Exception):
    """The learner must end."""


class Learner:
    """Learner without training; its ingest, ledger and cut coordinator are real."""

    def __init__(self, schedule: Any, checkpoint: LearnerCheckpoint, *, writer: int, versions: int) -> None:
        self._writer, self._cutting = writer, False
        self._schedule, self._random = schedule, schedule.random
        self._bus, self._now = LearnerBus(schedule, self._confirm), schedule.store.clock
        self._version = checkpoint.version
        """Version of the current weights."""
        ledger: TrajectoryLedger[ReceivedTrajectory] = TrajectoryLedger(
            samples=SAMPLES, groups_per_batch=GROUPS, max_staleness=2, time_limit_s=200.0
        )
        if checkpoint.ledger is not None:
            ledger.restore(checkpoint.ledger, now=self._now())
        self._scores = ScoreStore()
        self._ingest = build_ingest(
            self._bus, ledger, TaskSettings(0, {"any": 1.0}, SAMPLES, SAMPLING, 600.0), run=RUN, vocabulary=1 << 20,
            confirm=self._confirm, keep_flushed=True, epoch=lambda: self._writer, control=any_control(),
            evaluations=NoEvaluations(),
        )  # fmt: skip
        self._ledger, self._reader, self._tasks = ledger, self._ingest.reader, self._ingest.tasks
        scorer = EagerScorer(self._score, self._scores, run=RUN, micro_batch_tokens=150, durable=self._bus)
        self._interruption = CutCoordinator(
            self._bus, self._ingest, scorer, self._scores, run=RUN, deadline_s=DEADLINE_S, confirm=self._confirm,
            clock=self._now, epoch=lambda: self._writer, control=any_control(),
        )  # fmt: skip
        self._checkpoint, self._versions = checkpoint, versions

    def live(self) -> None:
        """Run until the last version, a failure or a replacement."""
        try:
            self._live()
        except (LearnerFailed, Fenced):
            self._interruption.release()

    def _live(self) -> None:
        self._ingest.start(
            self._checkpoint.offsets, self._checkpoint.task_offsets, self._checkpoint.score_offsets, now=self._now()
        )
        self._publish()
        self._interruption.start()
        while self._version < self._versions:
            self._train(self._batch())
        self._confirm()
        for arrived in self._reader.arrived.values():
            self._keep(arrived)

    def _batch(self) -> list[ReceivedTrajectory]:
        while True:
            self._confirm()
            self._reader.read_all(self._version, timeout_s=0.0)
            self._ledger.expire(now=self._now())
            for arrived in (*self._ledger.drop_stale(self._version), *self._ledger.drop_small()):
                self._reader.resolve(arrived)
            self._tasks.offer(self._version, now=self._now())
            if batch := self._ledger.take_batch(self._version):
                for arrived in [arrived for group in batch for arrived in group.stale]:
                    self._reader.resolve(arrived)
                return [arrived for group in batch for arrived in group.items]
            if not self._interruption.work(self._version, str(self._version)):
                self._reader.read_all(self._version, timeout_s=2.0)

    def _train(self, batch: list[ReceivedTrajectory]) -> None:
        names = {arrived.record.trajectory for arrived in batch}
        self._cutting = True
        report = self._interruption.cut(self._version, str(self._version), training=names)
        self._cutting = False
        heard_by = self._now()
        self._sleep(4.0)
        self._confirm()
        for arrived in batch:
            self._keep(arrived)
        for arrived in batch:
            self._reader.resolve(arrived)
            self._scores.forget(arrived.record.trajectory)
        self._schedule.checker.changed(self._version, report.cut, report.answered, heard_by=heard_by)
        self._version = Version(self._version + 1)
        self._schedule.checkpoints.append(
            LearnerCheckpoint(
                self._version, self._ledger.state(), self._reader.offsets(), self._tasks.offsets(),
                self._tasks.score_offsets(),
            )
        )  # fmt: skip
        self._sleep(2.0)
        if self._schedule.chance(0.05):
            raise LearnerFailed  # for example, the store is full
        self._publish()
        self._interruption.published(self._version, str(self._version))

    def _keep(self, arrived: ReceivedTrajectory) -> None:
        row = self._scores.attach(as_row(arrived.record))
        known = row.old if row.old is not None else np.full(len(row.tokens), np.nan)
        old = {int(token): float(value) for token, value in zip(row.tokens, known, strict=True) if not np.isnan(value)}
        self._schedule.checker.keeps(arrived.record, old, self._version)

    def _confirm(self) -> None:
        if self._writer != self._schedule.writer:
            raise Fenced("another learner took over this run")

    def _publish(self) -> None:
        self._confirm()
        published = VersionPublished(RUN, self._version, str(self._version), self._now(), self._writer)
        self._bus.publish(CONTROL, [Outgoing(RUN, encode(published))])

    def _score(self, batches: Sequence[PaddedBatch]) -> Any:
        self._sleep(0.3)
        if self._cutting and self._schedule.chance(0.02):
            raise LearnerFailed
        return [np.full(batch.tokens.shape, score_under(self._version), dtype=np.float32) for batch in batches]

    def _sleep(self, most_s: float) -> None:
        Actor.here.actor.sleep(self._schedule.delay_s(most_s))


class LearnerBus(MemoryBus):
    """Bus of a learner that may die before its records are on the log, or before publish returns.

    No pause may fall between the check that the learner has the run and its messages to workers, so `publish` calls
    `confirm` again.
    """

    def __init__(self, schedule: Any, confirm: Callable[[], None]) -> None:
        super().__init__(schedule.store)
        self._schedule, self._confirm = schedule, confirm

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        self._delay()
        self.store.on_access()
        if topic in (CONTROL, TASKS):
            self._confirm()
        positions = super().publish(topic, records)
        self._delay()
        return positions

    def _delay(self) -> None:
        if self._schedule.chance(0.5):
            Actor.here.actor.sleep(self._schedule.delay_s(1.0))
