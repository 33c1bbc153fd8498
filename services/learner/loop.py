"""The learner's loop: wait for a batch, train on it, checkpoint, publish; again.

The order at the end of a version makes crashes harmless. Checkpoint first: from then on this version's trajectories
count as trained. Then store and announce: after a crash in between, the restart announces what the checkpoint holds.

A learner that was paused, or cut off, may have been replaced meanwhile. The store refuses its versions and checkpoints;
for what the store does not see (history, records, the log) the loop asks the store first, and ends when it is fenced.
"""

import time
from collections.abc import Callable
from typing import Any

from palimpsest.common import failpoints
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.logs import logger
from palimpsest.common.service import Status, Stop
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.batch.collate import split_minibatches, to_rows
from palimpsest.services.learner.buffer.ledger import ReadyGroup, TrajectoryLedger
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints, NoCheckpoint
from palimpsest.services.learner.checkpointing.manifest import SCHEMA, Progress
from palimpsest.services.learner.distributed import NOTHING, ProcessGroup
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory, TrajectoryReader
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.history import History
from palimpsest.services.learner.observability.version_record import Batch, export_to_prometheus
from palimpsest.services.learner.old_logprobs.routes import Route
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training.follower import TrainOrder, broadcast_state
from palimpsest.services.learner.training.results import StepResult, merge
from palimpsest.services.learner.training.state import TrainingState, split_checkpoint
from palimpsest.services.learner.training.trainer import Trainer

POLL_S = 0.1
CONFIRM_S = 2.0
"""While it waits, the learner asks so often whether the run is still its own. A process that was stopped has not asked
for longer than that when it wakes, so it asks before it reads on."""
HOPELESS_BUDGETS = 2
"""So many times the admitted trajectories dropped, without one that arrived, end the run."""


class Loop:
    """Rank 0: the one coordinator."""

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        samples: int,
        config: LearnerConfig,
        step: Trainer,
        trainee: TrainablePolicy,
        companions: TrainingState,
        planner: TrajectoryLedger[ReceivedTrajectory],
        intake: TrajectoryReader,
        writer: Writer,
        publisher: Publisher,
        route: Route,
        checkpoints: Checkpoints,
        open_history: Callable[[int], History],
        recorder: BatchDump | None,
        teller: VersionReporter,
        ranks: ProcessGroup,
        stop: Stop,
    ) -> None:
        self._run, self._seed, self._samples, self._config = run, seed, samples, config
        self._step, self._trainee, self._companions = step, trainee, companions
        self._ranks, self._stop = ranks, stop
        self._planner, self._intake, self._writer, self._publisher = planner, intake, writer, publisher
        self._route, self._teller = route, teller
        self._checkpoints, self._open_history, self._recorder = checkpoints, open_history, recorder
        self._version, self._digest, self._trained_versions = Version(0), "", 0
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._confirmed = self._started
        self._phases = PhaseTimer()
        self._history: History  # opened by start
        self._last_line: dict[str, Any] = {}
        self._waiting_for: str | None = "the start"

    def start(self) -> None:
        """From the newest checkpoint, or from the beginning; ends with a version that workers can take on."""
        self._writer.begin()  # first: what is read below can no longer change under us
        try:
            progress, tensors = self._checkpoints.newest()
        except NoCheckpoint:
            self._intake.start({}, {}, now=time.monotonic())
            history_bytes = 0
        else:
            own, beside = split_checkpoint(tensors)
            self._trainee.restore(own, progress.optimizer_steps)
            self._companions.restore(beside)
            self._planner.restore(progress.ledger, now=time.monotonic())
            self._intake.start(progress.offsets, progress.task_offsets, progress.score_offsets, now=time.monotonic())
            history_bytes = progress.history_bytes
            self._version, self._trained_versions = progress.version, progress.trained_versions
            self._seconds_before = progress.seconds
            logger().info(
                "resumed", version=self._version, trained_versions=self._trained_versions, writer=self._writer.epoch
            )
        broadcast_state(self._trainee, self._companions, self._ranks)
        self._confirm()
        self._history = self._open_history(history_bytes)
        self._teller.start()
        manifest = self._publisher.republish(self._version, now=time.time())
        self._version, self._digest = manifest.version, manifest.digest
        self._route.start()
        instruments.VERSION.set(self._version)

    def run(self) -> bool:
        """Train until the run's versions are done or a stop is asked for; whether they are done. Raises Fenced."""
        try:
            done = self._train_on()
        except Fenced:
            self._ranks.broadcast_object(NOTHING)  # wherever this rank hears of it, the others wait for an order
            raise
        self._ranks.broadcast_object(NOTHING)
        return done

    def _train_on(self) -> bool:
        self._intake.offer(self._version, now=time.monotonic())
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

    def waiting_for(self) -> str | None:
        """What it waits for; None while it trains."""
        return self._waiting_for

    def status(self) -> Status:
        """For /v1/status."""
        return {
            "run": self._run,
            "writer": self._writer.epoch,
            "version": self._version,
            "trained_versions": self._trained_versions,
            "versions": self._config.versions,
            "trajectories": self._planner.counts(),
            "waiting_trajectories": self._planner.waiting(),
            "complete_groups": self._planner.complete(),
            "oldest_group": self._planner.oldest_open(),
            "last": self._last_line,
        }

    def _next_batch(self) -> tuple[list[ReadyGroup[ReceivedTrajectory]], list[list[Row]]] | None:
        """The next groups to train on, and their rows; None when a stop is asked for."""
        wanted = self._config.groups_per_batch
        with self._phases.of("wait"):
            timeout_s = 0.0
            dropped_before = self._dropped()
            while not self._stop.requested:
                self._confirm_now_and_then()
                failpoints.reach("learner.before_reading")
                # everything there is, before choosing: the oldest groups must not wait behind what was read first
                self._intake.read_all(self._version, timeout_s=timeout_s)
                self._drop_unusable()
                self._intake.offer(self._version, now=time.monotonic())
                if (ready := self._planner.peek_batch()) and (rows := self._known(ready)) is not None:
                    self._waiting_for = None
                    self._planner.take_batch()  # only now: a stop that came meanwhile leaves everything as it was
                    return ready, rows
                timeout_s = 0.0 if self._route.work(self._version, self._digest) else POLL_S
                self._give_up_on_nothing(self._dropped() - dropped_before)
                self._waiting_for = f"trajectories: {self._planner.complete()} of {wanted} groups are complete"
                instruments.PENDING.set(self._pending())
                instruments.WAITING.set(self._planner.waiting())
        return None

    def _give_up_on_nothing(self, dropped: int) -> None:
        """Stop when whole budgets of trajectories were dropped and not one arrived: no waiting will mend that."""
        budget = (self._config.max_staleness + 1) * self._config.groups_per_batch * self._samples
        if dropped >= HOPELESS_BUDGETS * budget and not self._planner.waiting():
            reasons = self._planner.counts()["dropped"]
            raise UserError(
                f"{dropped} trajectories in a row were dropped and none came back: {reasons}. The workers' logs tell "
                f"why each was (usually the environment or its gateway); mend that and go on with --resume",
                ExitCode.UNAVAILABLE,
            )

    def _drop_unusable(self) -> None:
        """What is too late, too stale, or in too small a group."""
        for trajectory in self._planner.expire(now=time.monotonic()):
            logger().warning("dropped", trajectory=trajectory, reason="deadline")
            self._intake.forget(trajectory)
            instruments.DROPPED.labels("deadline").inc()
        oldest = {
            name: self._version if arrived.oldest is None else arrived.oldest
            for name, arrived in self._intake.arrived.items()
        }
        for reason, dropped in (
            ("over_staleness", self._planner.drop_stale(self._version, oldest)),
            ("group_too_small", self._planner.drop_small()),
        ):
            for arrived in dropped:
                instruments.DROPPED.labels(reason).inc()
                logger().info("dropped", trajectory=arrived.record.trajectory, reason=reason, oldest=arrived.oldest)
                self._intake.resolve(arrived)

    def _known(self, batch: list[ReadyGroup[ReceivedTrajectory]]) -> list[list[Row]] | None:
        """The rows of each group with what is known of their old log-probs; None when a stop came first."""
        groups = [to_rows(group, self._config.advantages.kind) for group in batch]
        self._waiting_for = "old log-probs of the batch"
        known = self._route.attach_old_logprobs(
            [row for group in groups for row in group],
            self._version,
            heartbeat=self._confirm_now_and_then,
            stop=lambda: self._stop.requested,
        )
        if known is None:
            return None
        rows = iter(known)
        return [[next(rows) for _ in group] for group in groups]

    def _train(self, batch: list[ReadyGroup[ReceivedTrajectory]], rows: list[list[Row]]) -> None:
        """One version: train, account for it, make it durable, publish it."""
        now = self._version
        durable = self._config.checkpoint.every == 1  # else a crash brings these trajectories back, to be scored again
        training = frozenset(row.trajectory for group in rows for row in group if durable)
        order = TrainOrder(now, split_minibatches(rows, self._config.minibatches, seed=self._seed, version=now))
        with self._phases.of("train"):
            self._publisher.canaries.choose([row for group in rows for row in group])
            self._ranks.broadcast_object((order,))

            def cut() -> None:
                self._route.cut(now, self._digest, training=training)
                self._ranks.broadcast_object(NOTHING)  # the others have scored along, and wait to step

            trained = merge(
                self._ranks.all_gather_object(self._step.train(order.minibatches, now, before_first_step=cut))
            )
        failpoints.reach("learner.after_step")
        self._confirm()
        for group in batch:
            for arrived in group.items:
                self._intake.resolve(arrived)
        self._version, self._trained_versions = Version(now + 1), self._trained_versions + 1
        records = [arrived.record for group in batch for arrived in group.items]
        self._account(Batch(now, self._version, records, rows), trained)
        if self._trained_versions % self._config.checkpoint.every == 0:
            with self._phases.of("checkpoint"):
                self._checkpoint()
        with self._phases.of("publish"):
            self._publish()

    def _account(self, batch: Batch, trained: StepResult) -> None:
        if self._recorder is not None:
            self._recorder.record(batch, trained)
            self._confirm()  # writing it may have taken long
        self._last_line = self._teller.line(
            batch,
            trained,
            seconds=self._seconds(),
            phases=self._phases.take(),
            learning_rate=self._trainee.learning_rate,
            counts=self._planner.counts(),
            sampled_tokens=self._intake.sampled_tokens,
        )
        self._history.add(self._last_line)
        export_to_prometheus(self._last_line)

    def _publish(self) -> None:
        failpoints.reach("learner.before_publishing")
        self._digest = self._publisher.publish(self._version, now=time.time()).digest
        self._route.published(self._version, self._digest)
        failpoints.reach("learner.after_publishing")
        instruments.VERSION.set(self._version)
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
                optimizer_steps=self._trainee.steps,
                ledger=self._planner.state(),
                offsets=self._intake.offsets(),
                task_offsets=self._intake.task_ends,
                score_offsets=self._intake.score_offsets(),
                history_bytes=self._history.length,
                seconds=self._seconds(),
            ),
            self._trainee.state() | self._companions.state(),
        )

    def _confirm_now_and_then(self) -> None:
        if time.monotonic() - self._confirmed > CONFIRM_S:
            self._confirm()

    def _confirm(self) -> None:
        self._writer.confirm()
        self._confirmed = time.monotonic()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _dropped(self) -> int:
        dropped = self._planner.counts()["dropped"]
        assert isinstance(dropped, dict)
        return sum(dropped.values())

    def _pending(self) -> int:
        pending = self._planner.counts()["pending"]
        assert isinstance(pending, int)
        return pending
