"""The learner's loop: wait for a batch, train on it, checkpoint, publish; repeat.

The order at the end of a version makes crashes harmless. The checkpoint counts this version's trajectories as trained.
Then the loop stores and announces the version. After a crash in between, the restart announces it.

A learner that was paused or lost the network may have been replaced. The store refuses its versions and checkpoints.
The store does not see writes to the history, the batch dumps and the log, so before them the loop confirms with the
store that the run still belongs to this learner. It ends if it is fenced.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from palimpsest.common import failpoints
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.logs import logger
from palimpsest.common.messages import DropReason
from palimpsest.common.service import Stop
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.batch.collate import split_minibatches, to_rows
from palimpsest.services.learner.buffer.admission import WAIT_SHARE
from palimpsest.services.learner.buffer.groups import ReadyGroup
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints, NoCheckpoint
from palimpsest.services.learner.checkpointing.manifest import SCHEMA, Progress
from palimpsest.services.learner.distributed import NOTHING, ProcessGroup
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.drops import Drops
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.loop_status import LoopStatus
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.history import History
from palimpsest.services.learner.observability.prometheus_export import export_to_prometheus
from palimpsest.services.learner.observability.version_record import Batch
from palimpsest.services.learner.old_logprobs.routes import Route
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training.follower import TrainOrder, broadcast_state
from palimpsest.services.learner.training.results import StepResult, merge
from palimpsest.services.learner.training.state import TrainingState, split_checkpoint
from palimpsest.services.learner.training.trainer import Trainer

POLL_S = 0.1
CONFIRM_S = 2.0
"""Seconds between checks that the run still belongs to this learner, while it waits. After a suspension the last check
is older than this, so the learner checks before it reads again."""


@dataclass(frozen=True, slots=True)
class Training:
    """The objects that train the policy, on every rank."""

    trainer: Trainer
    policy: TrainablePolicy
    state: TrainingState
    """The state beside the policy; a checkpoint holds both."""
    ranks: ProcessGroup


@dataclass(frozen=True, slots=True)
class Outputs:
    """Writers of versions and checkpoints. The store refuses their writes after another learner took the run."""

    writer: Writer
    publisher: Publisher
    checkpoints: Checkpoints


@dataclass(frozen=True, slots=True)
class Records:
    """Writers of the records about each version."""

    open_history: Callable[[int], History]
    """Opens the history, truncated to a number of bytes."""
    dump: BatchDump | None
    reporter: VersionReporter


class Loop:
    """Rank 0: coordinates the other ranks and connects to the log and the store."""

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        ingest: Ingest,
        route: Route,
        outputs: Outputs,
        records: Records,
        stop: Stop,
    ) -> None:
        self._run, self._config, self._seed = config.run.id, config.learner, config.run.seed
        budget = (self._config.max_staleness + 1) * self._config.groups_per_batch * config.tasks.samples_per_group
        self._drops = Drops(ingest, budget=budget, skip_even=self._config.even_groups == "skip")
        self._trainer, self._policy = training.trainer, training.policy
        self._state, self._ranks = training.state, training.ranks
        self._ledger, self._reader, self._tasks, self._ingest = ingest.ledger, ingest.reader, ingest.tasks, ingest
        self._route, self._records, self._stop = route, records, stop
        self._writer, self._publisher, self._checkpoints = outputs.writer, outputs.publisher, outputs.checkpoints
        self._version, self._digest, self._trained_versions = Version(0), "", 0
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._confirmed = self._last_batch = self._started
        self._phases = PhaseTimer()
        self._history: History  # opened by start
        self._last_line: dict[str, Any] = {}
        self.status = LoopStatus()

    def start(self) -> None:
        """Load the newest checkpoint, if there is one, and publish the version that workers start with."""
        self._writer.begin()  # first, so that no other learner changes the state that is read below
        try:
            progress, tensors = self._checkpoints.newest()
        except NoCheckpoint:
            self._ingest.start({}, {}, {}, now=time.monotonic())
            history_bytes = 0
        else:
            policy, state = split_checkpoint(tensors)
            self._policy.restore(policy, progress.optimizer_steps)
            self._state.restore(state)
            self._ledger.restore(progress.ledger, now=time.monotonic())
            self._ingest.start(progress.offsets, progress.task_offsets, progress.score_offsets, now=time.monotonic())
            history_bytes = progress.history_bytes
            self._version, self._trained_versions = progress.version, progress.trained_versions
            self._seconds_before = progress.seconds
            logger().info(
                "resumed", version=self._version, trained_versions=self._trained_versions, writer=self._writer.epoch
            )
        broadcast_state(self._policy, self._state, self._ranks)
        self._confirm()
        self._history = self._records.open_history(history_bytes)
        self._records.reporter.start()
        manifest = self._publisher.republish(self._version, now=time.time())
        self._version, self._digest = manifest.version, manifest.digest
        self._route.start()
        self.status.published(self._version)
        self.update_status()
        self.status.ready = True

    def run(self) -> bool:
        """Train until all versions are done or a stop is requested. Return whether they are done. Raises Fenced."""
        try:
            done = self._train_versions()
        except Fenced:
            self._ranks.broadcast_object(NOTHING)  # the other ranks wait for an order
            raise
        self._ranks.broadcast_object(NOTHING)
        return done

    def _train_versions(self) -> bool:
        self._tasks.offer(self._version, now=time.monotonic())
        while self._trained_versions < self._config.versions:
            batch = self._next_batch()
            if batch is None:
                self._checkpoint()
                self._route.release()
                return False
            self._train(*batch)
        self._checkpoint()
        self._publisher.finish(self._version)
        return True

    def update_status(self) -> None:
        """Report the present state to the HTTP thread and to Prometheus."""
        age = self._ledger.oldest_live_age(now=time.monotonic())
        instruments.OLDEST_LIVE.set(math.nan if age is None else age)
        oldest = self._ledger.oldest_open()
        instruments.OLDEST_GROUP.set(self._ledger.age(oldest, now=time.monotonic()) if oldest else math.nan)
        instruments.PENDING.set(self._ledger.pending())
        instruments.WAITING.set(self._ledger.waiting())
        self.status.update(
            {
                "run": self._run,
                "writer": self._writer.epoch,
                "version": self._version,
                "trained_versions": self._trained_versions,
                "versions": self._config.versions,
                "trajectories": self._ledger.counts(),
                "waiting_trajectories": self._ledger.waiting(),
                "complete_groups": self._ledger.complete(),
                "oldest_group": self._ledger.oldest_open(),
                "last": self._last_line,
            }
        )

    def _next_batch(self) -> tuple[list[ReadyGroup[ReceivedTrajectory]], list[list[Row]]] | None:
        """Return the next groups to train on, and their rows; None if a stop is requested."""
        needed = self._config.groups_per_batch
        with self._phases.of("wait"):
            timeout_s = 0.0
            first_look: float | None = None
            dropped_before = self._drops.counts()
            while not self._stop.requested:
                self._confirm_periodically()
                failpoints.reach("learner.before_reading")
                # read everything before choosing, so that the oldest groups are trained on first
                self._reader.read_all(self._version, timeout_s=timeout_s)
                self._drops.drop_unusable(self._version, now=time.monotonic())
                self._tasks.offer(self._version, now=time.monotonic())
                complete_at = time.monotonic()
                if (ready := self._ledger.peek_batch(self._version)) and (
                    rows := self._attach_old_logprobs(ready)
                ) is not None:
                    self.status.waiting_for = None
                    self._ledger.take_batch(self._version)  # after the wait, so that a stop during it changes nothing
                    self._adapt(waited_s=0.0 if first_look is None else complete_at - first_look, now=complete_at)
                    return ready, rows
                first_look = complete_at if first_look is None else first_look
                timeout_s = 0.0 if self._route.work(self._version, self._digest) else POLL_S
                self._drops.end_if_hopeless(dropped_before)
                self.update_status()
                self.status.waiting_for = f"trajectories: {self._ledger.complete()} of {needed} groups are complete"
        return None

    def _adapt(self, *, waited_s: float, now: float) -> None:
        """Adapt the admission to whether the learner waited for the batch that it takes now."""
        if self._config.admission == "adaptive":
            self._ledger.adapt(waited=waited_s > WAIT_SHARE * (now - self._last_batch))
        self._last_batch = now
        instruments.ADMITTED_GROUPS.set(self._ledger.admitted_groups)

    def _attach_old_logprobs(self, batch: list[ReadyGroup[ReceivedTrajectory]]) -> list[list[Row]] | None:
        """Return the rows of each group with the available old log-probs; None if a stop is requested first."""
        lowest = self._version - self._config.max_staleness
        groups = [
            to_rows(
                [arrived.record for arrived in group.items],
                self._config.advantages.kind,
                lowest=lowest,
                baseline=[arrived.record for arrived in group.stale],
            )
            for group in batch
        ]
        self.status.waiting_for = "old log-probs of the batch"
        attached = self._route.attach_old_logprobs(
            [row for group in groups for row in group],
            self._version,
            heartbeat=self._confirm_periodically,
            stop=lambda: self._stop.requested,
        )
        if attached is None:
            return None
        rows = iter(attached)
        return [[next(rows) for _ in group] for group in groups]

    def _train(self, batch: list[ReadyGroup[ReceivedTrajectory]], rows: list[list[Row]]) -> None:
        """Train, report, checkpoint and publish one version."""
        now = self._version
        durable = self._config.checkpoint.every == 1  # otherwise a crash may repeat the step, which needs the scores
        training = frozenset(row.trajectory for group in rows for row in group if durable)
        order = TrainOrder(now, split_minibatches(rows, self._config.minibatches, seed=self._seed, version=now))
        with self._phases.of("train"):
            self._publisher.canaries.choose([row for group in rows for row in group])
            self._ranks.broadcast_object((order,))

            def cut() -> None:
                self._route.cut(now, self._digest, training=training)
                self._ranks.broadcast_object(NOTHING)  # ends the scoring of the other ranks, which then step

            result = self._trainer.train(order.minibatches, now, before_first_step=cut)
            trained = merge(self._ranks.all_gather_object(result))
        failpoints.reach("learner.after_step")
        self._confirm()
        for group in batch:
            self._drops.resolve_trained(group.items, lowest=now - self._config.max_staleness)
            self._drops.resolve(DropReason.OVER_STALENESS, group.stale)
        self._version, self._trained_versions = Version(now + 1), self._trained_versions + 1
        records = [arrived.record for group in batch for arrived in group.items]
        stale = [arrived.record for group in batch for arrived in group.stale]
        self._report(Batch(now, self._version, records, rows, stale, now - self._config.max_staleness), trained)
        if self._trained_versions % self._config.checkpoint.every == 0:
            with self._phases.of("checkpoint"):
                self._checkpoint()
        with self._phases.of("publish"):
            self._publish()

    def _report(self, batch: Batch, trained: StepResult) -> None:
        if self._records.dump is not None:
            self._records.dump.record(batch, trained)
            self._confirm()  # writing the dump may have taken long
        for phase, seconds in (phases := self._phases.take()).items():
            instruments.PHASE_SECONDS.labels(phase).observe(seconds)
        self._last_line = self._records.reporter.line(
            batch,
            trained,
            seconds=self._seconds(),
            phases=phases,
            learning_rate=self._policy.learning_rate,
            counts=self._ledger.counts(),
            sampled_tokens=self._reader.sampled_tokens,
            skipped_even=self._drops.take_skipped(),
            token_fates=self._drops.fates.take(),
            oldest_live_s=self._ledger.oldest_live_age(now=time.monotonic()),
        )
        self._history.add(self._last_line)
        export_to_prometheus(self._last_line)
        self.update_status()

    def _publish(self) -> None:
        failpoints.reach("learner.before_publishing")
        self._digest = self._publisher.publish(self._version, now=time.time()).digest
        self._route.published(self._version, self._digest)
        failpoints.reach("learner.after_publishing")
        self.status.published(self._version)
        kept = self._checkpoints.oldest_version()
        needed = min(self._version, kept if kept is not None else Version(0))
        self._publisher.keep_from(Version(needed - self._config.max_staleness))

    def _checkpoint(self) -> None:
        self._checkpoints.save(
            Progress(
                schema=SCHEMA,
                run=self._run,
                writer=self._writer.epoch,
                version=self._version,
                digest=self._digest,
                trained_versions=self._trained_versions,
                optimizer_steps=self._policy.steps,
                ledger=self._ledger.state(),
                offsets=self._reader.offsets(),
                task_offsets=self._tasks.offsets(),
                score_offsets=self._tasks.score_offsets(),
                history_bytes=self._history.length,
                seconds=self._seconds(),
            ),
            self._policy.state() | self._state.state(),
        )

    def _confirm_periodically(self) -> None:
        if time.monotonic() - self._confirmed > CONFIRM_S:
            self._confirm()

    def _confirm(self) -> None:
        self._writer.confirm()
        self._confirmed = time.monotonic()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
