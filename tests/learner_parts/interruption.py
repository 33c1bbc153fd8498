"""The learner's side of the interruption route on a real log, with fakes for the weights (`Table`), the clock
(`Ticking`) and the workers (functions that answer a cut as soon as it is on the log)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.common.arrays import Float32Array, pack_int32
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TOPICS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutRequested,
    OldLogprobsComputed,
    SegmentFlushed,
    TrajectoryFinished,
    VersionPublished,
    WorkerAlive,
    decode,
    encode,
    group_id,
    trajectory_id,
)
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer, Score
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from tests.learner_parts.ingest import an_ingest
from tests.records.any_learner import any_control
from tests.records.builders import a_segment

RUN = "test"
Answer = Callable[["Log", CutRequested], None]


def digest(version: int) -> str:
    """Fake digest of this version's weights."""
    return f"digest of {version}"


class Log(SqliteBus):
    """The log; it calls every function of `answers` with each published cut request."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "bus.sqlite")
        self.create_topics(dict.fromkeys(TOPICS, 2) | {CONTROL: 1})
        self.answers: list[Answer] = []
        self.order: list[str] = []
        """Topics of all publications, in order."""

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        """See Bus."""
        self.order += [topic] if records else []
        at = super().publish(topic, records)
        for record in records if topic == CONTROL else ():
            if isinstance(request := decode(CONTROL, record.body), CutRequested):
                for answer in self.answers:
                    answer(self, request)
        return at

    def messages(self, topic: str) -> list[Any]:
        """All messages of a topic."""
        return [decode(topic, record.body) for record in read_existing(self, topic)]

    def sampled(self, *records: TrajectoryFinished | SegmentFlushed) -> dict[int, int]:
        """Publish trajectories. Returns the positions that a worker would report."""
        placed = self.publish(
            TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records]
        )
        return {at.partition: at.offset + 1 for at in placed}

    def report(self, *messages: WorkerAlive | CutReached) -> None:
        """Publish messages of workers."""
        self.publish(WORKERS, [Outgoing(message.worker, encode(message)) for message in messages])

    def announced(self, version: int) -> None:
        """Announce a version."""
        message = VersionPublished(RUN, Version(version), digest(version), 0.0, 1)
        self.publish(CONTROL, [Outgoing(RUN, encode(message))])

    def scored(self) -> list[OldLogprobsComputed]:
        """All old log-probs on the log."""
        return [m for m in self.messages(OLD_LOGPROBS) if isinstance(m, OldLogprobsComputed)]


class Ticking:
    """A clock that advances by `tick` seconds at every reading."""

    def __init__(self, tick: float = 0.001) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Table:
    """Fake model: a token's log-prob is -(version + 1) - token / 1000, independent of its prefix."""

    def __init__(self, version: int = 0) -> None:
        self.version, self.rows = version, 0

    def __call__(self, batches: Sequence[PaddedBatch]) -> list[Float32Array]:
        self.rows += sum(len(batch.rows) for batch in batches)
        return [self.value(batch.tokens) for batch in batches]

    def value(self, tokens: Any) -> Float32Array:
        """Log-probs of these tokens."""
        values: Float32Array = (-(self.version + 1) - np.asarray(tokens) / 1000).astype(np.float32)
        return values


def alive(worker: str, version: int = 0) -> WorkerAlive:
    """A heartbeat of a worker."""
    return WorkerAlive(RUN, worker, version=version, live=1, sampled_tokens=0, seconds=1.0, idle_s=0.0)


def reached(worker: str, cut: int, positions: dict[int, int] | None = None, version: int = 0) -> CutReached:
    """A worker's answer to a cut."""
    return CutReached(RUN, worker, cut=cut, version=version, positions=positions or {}, flushed=0, pause_s=0.0)


def a_flush(
    index: int,
    sample: int,
    *,
    cut: int = 1,
    tokens: int | list[int] = 8,
    segments: tuple[Segment, ...] = (),
    worker: str = "a",
    run: str = RUN,
) -> SegmentFlushed:
    """An unfinished trajectory; without segments, tokens [2, 6) have version 0."""
    return SegmentFlushed(
        run=run,
        trajectory=trajectory_id(group_id(index), sample),
        group=group_id(index),
        attempt=0,
        worker=worker,
        cut=cut,
        tokens=pack_int32(list(range(1, tokens + 1)) if isinstance(tokens, int) else tokens),
        segments=segments or (a_segment(2, 6, 0),),
        temperature=1.0,
    )


def flushing(worker: str, *sampled: SegmentFlushed | TrajectoryFinished) -> Answer:
    """A worker that publishes these records and answers the cut."""

    def answer(log: Log, request: CutRequested) -> None:
        log.report(reached(worker, request.cut, log.sampled(*sampled), request.version))

    return answer


class Learner:
    """Rank 0 of a learner, reduced to what cuts need."""

    def __init__(
        self,
        log: Log,
        score: Score,
        *,
        before: "Learner | None" = None,
        clock: Callable[[], float] | None = None,
        confirm: Callable[[], None] = lambda: None,
        deadline_s: float = 5.0,
        samples: int = 2,
        groups: int = 4,
        micro_batch_tokens: int = 10_000,
    ) -> None:
        """`before`: the learner whose checkpoint this learner resumes from."""
        self.scores = ScoreStore()
        self.ingest = an_ingest(
            log, samples=samples, groups=groups, max_staleness=0, keep_flushed=True, confirm=confirm,
            on_resolved=self.scores.forget,
        )  # fmt: skip
        self.ledger, self.reader = self.ingest.ledger, self.ingest.reader
        self.scorer = EagerScorer(score, self.scores, run=RUN, micro_batch_tokens=micro_batch_tokens, durable=log)
        self.interruption = CutCoordinator(
            log, self.ingest, self.scorer, self.scores, run=RUN, deadline_s=deadline_s, confirm=confirm,
            clock=clock or Ticking(), epoch=lambda: 1, control=any_control(),
        )  # fmt: skip
        if before is None:
            self.ingest.start({}, {}, {}, now=0.0)
        else:
            self.ledger.restore(before.ledger.state(), now=0.0)
            tasks = before.ingest.tasks
            self.ingest.start(before.reader.offsets(), tasks.offsets(), tasks.score_offsets(), now=0.0)
        self.ingest.tasks.offer(Version(0), now=0.0)
        self.interruption.start()

    def read(self, newest: int = 0) -> None:
        """Read all records of the log."""
        self.reader.read_all(Version(newest), timeout_s=0)

    def close(self) -> None:
        """Close the consumers of the log."""
        self.interruption.close()
        self.ingest.close()
