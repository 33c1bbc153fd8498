"""What rank 0 does for exact old log-probs besides training: one route a kind of proximal.

snapshot      nothing, or (prefetch) scoring what has arrived while its version is resident
replica       reading what the replicas computed, and waiting for a batch's
interruption  scoring early, and a cut before the weights change
surrogates    nothing
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from palimpsest.common.bus.port import Bus
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import InterruptionProximal, ReplicaProximal, SnapshotProximal
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore


class Route(Protocol):
    """Called by the loop, in this order for each version."""

    def start(self) -> None:
        """Learn from the log what a former process knew. Comes after TrajectoryReader.start and the first version."""

    def work(self, now: Version, digest: str) -> int:
        """While a batch is waited for: a little of what can be done early; how many tokens. 0: nothing is left.

        now, digest: the version whose weights are resident.
        """

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """The rows of a batch with the old log-probs that are known; None when a stop came while they were awaited."""

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        """Before the first optimizer step: from here on the weights of `now` are gone. training: the batch's ids."""

    def published(self, version: Version, digest: str) -> None:
        """A version was announced."""

    def release(self) -> None:
        """The run stops here: nobody is to go on waiting for a version."""

    def close(self) -> None:
        """Stop reading."""


class NoRoute:
    """See Route. Of a surrogate, or of snapshots that are loaded when they are needed."""

    def start(self) -> None: ...
    def work(self, now: Version, digest: str) -> int:
        return 0

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
    def published(self, version: Version, digest: str) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


class PrefetchRoute(NoRoute):
    """See Route. Of snapshots: what has arrived is scored while its version is resident, so that it need not be loaded.

    Tokens of the version that is still resident are left to the batch's own pass, which costs no load either. A crash
    loses these values, and the store still has the versions.
    """

    def __init__(self, intake: TrajectoryReader, early: EagerScorer, scores: ScoreStore) -> None:
        self._intake, self._early, self._scores = intake, early, scores
        self._digests: dict[Version, str] = {}

    def work(self, now: Version, digest: str) -> int:
        self._digests[now] = digest
        return self._early.work(self._intake.arrived.values(), now, digest, should_stop=lambda: True)

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        older = {version: digest for version, digest in self._digests.items() if version != now}
        return [self._scores.attach(row, older) for row in rows]

    def published(self, version: Version, digest: str) -> None:
        self._digests[version] = digest
        self._scores.retain(self._intake.pending())


class ReplicaRoute(NoRoute):
    """See Route. Values come over the log; a batch waits for its own."""

    def __init__(self, intake: TrajectoryReader, reader: ScoreReader) -> None:
        self._intake, self._reader = intake, reader

    def start(self) -> None:
        self._reader.start(self._intake.score_offsets())

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
    """See Route. Workers stop before the weights change."""

    def __init__(self, intake: TrajectoryReader, interruption: CutCoordinator, scores: ScoreStore) -> None:
        self._intake, self._interruption, self._scores = intake, interruption, scores

    def start(self) -> None:
        self._interruption.start()

    def work(self, now: Version, digest: str) -> int:
        return self._interruption.work(now, digest)

    def attach_old_logprobs(
        self,
        rows: Sequence[Row],
        now: Version,
        *,
        heartbeat: Callable[[], None],
        stop: Callable[[], bool],
    ) -> list[Row] | None:
        return [self._scores.attach(row, self._interruption.digests) for row in rows]

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        self._interruption.cut(now, digest, training=training)

    def published(self, version: Version, digest: str) -> None:
        self._interruption.published(version, digest)
        self._scores.retain(self._intake.pending())

    def release(self) -> None:
        self._interruption.release()

    def close(self) -> None:
        self._interruption.close()


def route(
    config: LearnerConfig,
    *,
    run: str,
    bus: Bus,
    intake: TrajectoryReader,
    score: DistributedScorer,
    scores: ScoreStore,
    confirm: Callable[[], None],
) -> Route:
    """Of the configured kind. score: by the resident weights; scores: the same that `intake` forgets from."""

    def early(durable: Bus | None) -> EagerScorer:
        return EagerScorer(
            score,
            scores,
            run=run,
            micro_batch_tokens=config.micro_batch_tokens,
            at_once=score.width,
            durable=durable,
        )

    match config.proximal:
        case SnapshotProximal(prefetch=True):
            return PrefetchRoute(intake, early(None), scores)
        case ReplicaProximal():
            reader = ScoreReader(
                bus,
                scores,
                run=run,
                wait_s=config.proximal.wait_s,
                wanted=lambda trajectory: intake.pending()(trajectory),
                confirm=confirm,
            )
            return ReplicaRoute(intake, reader)
        case InterruptionProximal():
            cutting = CutCoordinator(
                bus, intake, early(bus), scores, run=run, deadline_s=config.proximal.deadline_s, confirm=confirm
            )
            return InterruptionRoute(intake, cutting, scores)
    return NoRoute()
