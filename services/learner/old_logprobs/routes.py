"""The work of rank 0 for exact old log-probs, besides training: one route for each kind of proximal.

snapshot      no work, or (prefetch) scores arrived tokens while their version is resident
replica       reads the scores of the replicas, and waits for the scores of a batch
interruption  scores early, and pauses the workers before the weights change; engines that sleep: before it computes
surrogates    no work
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from palimpsest.common.bus.port import Bus
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS, InterruptionProximal, ReplicaProximal, SnapshotProximal
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.task_publisher import TaskPublisher
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader, WaitLimits
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore


class Route(Protocol):
    """The loop calls these methods, in this order for each version."""

    def start(self) -> None:
        """Read the state of earlier processes from the log. Call it after Ingest.start and after the first version was
        published."""

    def work(self, now: Version, digest: str) -> int:
        """Score some tokens early, while the loop waits for a batch. Return the number of tokens; 0 if none is left.

        now, digest: the version whose weights are resident.
        """

    def take_turn(self, now: Version, digest: str, *, stop: Callable[[], bool]) -> bool:
        """Called when a batch is complete, before the learner computes with it: wait until engines that share its GPU
        sleep. It may read further trajectories. Return False if a stop was requested during the wait; then they are
        awake. Raises Fenced."""

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """Return the rows of a batch with the available old log-probs; None if a stop was requested during the wait."""

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        """Called before the first optimizer step, which changes the weights of `now`. training: ids of the batch."""

    def cut_now(self, now: Version, digest: str) -> dict[str, Any]:
        """Pause the workers, score all their tokens and let them go on. Return the counts; {} without cuts."""

    def published(self, version: Version, digest: str) -> None:
        """Called after a version was announced."""

    def release(self) -> None:
        """Called when the run stops: releases workers that wait for a version."""

    def close(self) -> None:
        """Close the consumers."""


class NoRoute:
    """See Route. For a surrogate, or for snapshots that are loaded on demand."""

    def start(self) -> None: ...
    def work(self, now: Version, digest: str) -> int:
        return 0

    def take_turn(self, now: Version, digest: str, *, stop: Callable[[], bool]) -> bool:
        return True

    def attach_old_logprobs(
        self,
        rows: Sequence[Row],
        now: Version,
        *,
        heartbeat: Callable[[], None],
        stop: Callable[[], bool],
    ) -> list[Row] | None:
        return list(rows)

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None: ...
    def cut_now(self, now: Version, digest: str) -> dict[str, Any]:
        return {}

    def published(self, version: Version, digest: str) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


class PrefetchRoute(NoRoute):
    """See Route. For snapshots: scores arrived tokens while their version is resident, which saves a load later.

    Tokens of the version that is resident during training are scored by SnapshotSource, which needs no load for them. A
    crash loses the prefetched values; the store still holds the versions.
    """

    def __init__(
        self, reader: TrajectoryReader, scorer: EagerScorer, scores: ScoreStore, left_out: Callable[[], Collection[str]]
    ) -> None:
        """left_out: returns groups whose tokens the training passes will score."""
        self._reader, self._scorer, self._scores, self._left_out = reader, scorer, scores, left_out

    def work(self, now: Version, digest: str) -> int:
        self._scores.digests[now] = digest
        left_out = self._left_out()
        arrived = [received for received in self._reader.arrived.values() if received.record.group not in left_out]
        return self._scorer.work(arrived, now, digest, should_stop=lambda: True)

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        older = {version: digest for version, digest in self._scores.digests.items() if version != now}
        return [self._scores.attach(row, older) for row in rows]

    def published(self, version: Version, digest: str) -> None:
        self._scores.digests[version] = digest
        self._scores.retain(self._reader.is_pending)


class ReplicaRoute(NoRoute):
    """See Route. Reads scores from the log; a batch waits for its scores."""

    def __init__(self, tasks: TaskPublisher, reader: ScoreReader) -> None:
        self._tasks, self._reader = tasks, reader

    def start(self) -> None:
        self._reader.start(self._tasks.score_offsets())

    def work(self, now: Version, digest: str) -> int:
        self._reader.read()
        return 0

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        return self._reader.wait_for_scores(rows, now, heartbeat=heartbeat, stop=stop)

    def published(self, version: Version, digest: str) -> None:
        self._reader.retain()

    def close(self) -> None:
        self._reader.close()


class InterruptionRoute:
    """See Route. Workers pause before the weights change; `sleeping`: before the learner computes with a batch."""

    def __init__(
        self, reader: TrajectoryReader, coordinator: CutCoordinator, scores: ScoreStore, *, sleeping: bool = False
    ) -> None:
        self._reader, self._coordinator, self._scores = reader, coordinator, scores
        self._sleeping = sleeping

    def start(self) -> None:
        self._coordinator.start()

    def work(self, now: Version, digest: str) -> int:
        return self._coordinator.work(now, digest)

    def take_turn(self, now: Version, digest: str, *, stop: Callable[[], bool]) -> bool:
        return not self._sleeping or self._coordinator.take_turn(now, digest, stop=stop)

    def attach_old_logprobs(
        self,
        rows: Sequence[Row],
        now: Version,
        *,
        heartbeat: Callable[[], None],
        stop: Callable[[], bool],
    ) -> list[Row] | None:
        return [self._scores.attach(row) for row in rows]

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        if not self._sleeping:
            self._coordinator.cut(now, digest, training=training)

    def cut_now(self, now: Version, digest: str) -> dict[str, Any]:
        report = self._coordinator.cut_and_release(now, digest)
        return {
            "cut": report.cut,
            "workers": list(report.workers),
            "late": list(report.late),
            "tokens_scored": report.tokens_scored,
            "flushed": report.flushed,
        }

    def published(self, version: Version, digest: str) -> None:
        self._coordinator.published(version, digest)
        self._scores.retain(self._reader.is_pending)

    def release(self) -> None:
        self._coordinator.release()

    def close(self) -> None:
        self._coordinator.close()


def route(
    config: LearnerConfig,
    *,
    run: str,
    bus: Bus,
    ingest: Ingest,
    score: DistributedScorer,
    scores: ScoreStore,
    confirm: Callable[[], None],
    epoch: Callable[[], int],
    control: ControlCheck,
    before_waking: Callable[[], None] | None = None,
) -> Route:
    """Return the route of the configured kind. before_waking: see CutCoordinator.

    score: scores with the resident weights. scores: the store that `ingest` removes resolved trajectories from.
    epoch: returns the epoch of this learner. control: checks the records of earlier learners.
    """

    def eager_scorer(durable: Bus | None) -> EagerScorer:
        return EagerScorer(
            score,
            scores,
            run=run,
            micro_batch_tokens=config.micro_batch_tokens,
            packed=config.layout == "packed",
            at_once=score.width,
            durable=durable,
            routes=ingest.reader.routes,
        )

    def left_out() -> Collection[str]:
        """Groups not to score early: the next batch probably takes them, and its training passes score their tokens of
        the resident version. Later minibatches need other passes; so does a step that a crash may repeat."""
        durable = config.checkpoint.every == 1 or not PROXIMAL_KINDS[config.proximal.kind].cuts_workers
        return ingest.ledger.next_groups() if config.minibatches == 1 and durable else ()

    match PROXIMAL_KINDS[config.proximal.kind].route:
        case "none":
            return NoRoute()
        case "snapshot":
            assert isinstance(config.proximal, SnapshotProximal)
            if not config.proximal.prefetch:
                return NoRoute()
            return PrefetchRoute(ingest.reader, eager_scorer(None), scores, left_out)
        case "replica":
            assert isinstance(config.proximal, ReplicaProximal)
            reader = ScoreReader(
                bus,
                scores,
                ingest.dead_letters,
                WaitLimits(config.proximal.wait_s),
                run=run,
                wanted=ingest.reader.is_pending,
                confirm=confirm,
                control=control,
            )
            return ReplicaRoute(ingest.tasks, reader)
        case "interruption":
            assert isinstance(config.proximal, InterruptionProximal)
            coordinator = CutCoordinator(
                bus,
                ingest,
                eager_scorer(bus),
                scores,
                run=run,
                deadline_s=config.proximal.deadline_s,
                confirm=confirm,
                epoch=epoch,
                control=control,
                left_out=left_out,
                before_waking=before_waking,
            )
            return InterruptionRoute(ingest.reader, coordinator, scores, sleeping=before_waking is not None)
