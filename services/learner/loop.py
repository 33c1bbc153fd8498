"""The learner's loop: wait for a batch, train on it, checkpoint, publish; repeat.

The order at the end of a version makes crashes harmless. The checkpoint counts this version's trajectories as trained.
Then the loop stores and announces the version. After a crash in between, the restart announces it. While a thread does
both (publishing/publishing.py), nothing that others read may name the version.

A learner that was paused or lost the network may have been replaced. The store refuses its versions and checkpoints.
The store does not see writes to the history, the batch dumps and the log, so before them the loop confirms with the
store that the run still belongs to this learner. It ends if it is fenced.
"""

import time
from contextlib import suppress
from typing import Any

from palimpsest.common import failpoints, logs
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.logs import logger
from palimpsest.common.messages import DropReason
from palimpsest.common.service import Stop
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.user_error import ExitCode
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.batch.collate import regroup, split_minibatches, to_rows
from palimpsest.services.learner.buffer.admission import WAIT_SHARE
from palimpsest.services.learner.buffer.groups import ReadyGroup
from palimpsest.services.learner.checkpointing.checkpoints import NoCheckpoint
from palimpsest.services.learner.checkpointing.manifest import SCHEMA, Progress
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.control.state import ControlState
from palimpsest.services.learner.distributed import NOTHING
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.drops import Drops
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.loop_parts import Outputs, Records, Training, most_unresolved
from palimpsest.services.learner.loop_status import LoopStatus
from palimpsest.services.learner.observability.history import History
from palimpsest.services.learner.observability.prometheus_export import export_to_prometheus
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.version_record import Batch
from palimpsest.services.learner.old_logprobs.routes import Route
from palimpsest.services.learner.ownership import Ownership
from palimpsest.services.learner.publishing.publishing import Checkpoint, Publishing
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training.follower import TrainOrder, broadcast_state
from palimpsest.services.learner.training.results import StepResult, merge
from palimpsest.services.learner.training.state import split_checkpoint

POLL_S = 0.1


class Loop:
    """Rank 0: coordinates the other ranks and connects to the log and the store."""

    def __init__(
        self, config: RunConfig, training: Training, ingest: Ingest, route: Route, outputs: Outputs, records: Records,
        control: RunControl, stop: Stop,
    ) -> None:  # fmt: skip
        self._run, self._config, self._seed, self._control = config.run.id, config.learner, config.run.seed, control
        self._drops = Drops(ingest, budget=most_unresolved(config), skip_even=self._config.even_groups == "skip")
        self._trainer, self._policy = training.trainer, training.policy
        self._state, self._ranks = training.state, training.ranks
        self._ledger, self._reader, self._tasks, self._ingest = ingest.ledger, ingest.reader, ingest.tasks, ingest
        self._route, self._records, self._stop, self._evaluator = route, records, stop, outputs.evaluator
        self._writer, self._publisher, self._checkpoints = outputs.writer, outputs.publisher, outputs.checkpoints
        self.version, self.trained_versions, self._offers_wait = Version(0), 0, False
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._last_batch = self._started
        self._ownership = Ownership(outputs.writer, lambda: outputs.publisher.renew_lease())
        self._confirm = self._ownership.confirm
        self._phases = PhaseTimer(base="report")
        self._publishing = Publishing(
            self._publisher, self._checkpoints, self._phases, background=self._config.publishing == "background",
            announced=self._announced, needed=lambda restart: self._ledger.bound.lowest(restart),
            checkpoints_inline=training.shards is not None and training.shards.split_policy is not None,
        )  # fmt: skip
        self._history: History  # opened by start
        self._last_line: dict[str, Any] = {}
        self._log_level = config.logs.level
        self.status = LoopStatus()

    def start(self) -> None:
        """Load the newest checkpoint, if there is one, and publish the version that workers start with."""
        self._writer.begin()  # first, so that no other learner changes the state that is read below
        try:
            progress, tensors = self._checkpoints.newest()
        except NoCheckpoint:
            self._ingest.start({}, {}, {}, now=time.monotonic())
            history_bytes, control = 0, ControlState()
        else:
            policy, state = split_checkpoint(tensors)
            self._policy.restore(policy, progress.optimizer_steps)
            self._state.restore(state)
            self._ledger.restore(progress.ledger, now=time.monotonic())
            self._ingest.start(progress.offsets, progress.task_offsets, progress.score_offsets, now=time.monotonic())
            history_bytes, control = progress.history_bytes, progress.control
            self._evaluator.restore(progress.evaluation, progress.task_offsets)
            self.version, self.trained_versions = progress.version, progress.trained_versions
            self._seconds_before = progress.seconds
            logger().info(
                "resumed", version=self.version, trained_versions=self.trained_versions, writer=self._writer.epoch
            )
        broadcast_state(self._policy, self._state, self._ranks)
        self._confirm()
        self._control.restore(control, self)
        self._history = self._records.open_history(history_bytes)
        self._records.reporter.start()
        self.version = self._publishing.start(self.version, now=time.time())
        self._evaluator.start(self.version, self.trained_versions)
        self._route.start()
        self.status.published(self.version)
        self.update_status()
        self.status.ready = True

    def run(self) -> bool:
        """Train until all versions are done or a stop is requested. Return whether they are done. Raises Fenced."""
        self._phases.take()  # the start belongs to no version
        try:
            done = self._train_versions()
        except Fenced:
            self._ranks.broadcast_object(NOTHING)  # the other ranks wait for an order
            raise
        self._ranks.broadcast_object(NOTHING)
        return done

    def _train_versions(self) -> bool:
        while self.trained_versions < self._config.versions or self._evaluates_last():
            batch = self._next_batch() if self.trained_versions < self._config.versions else None
            if batch is not None:
                self._train(*batch)
            elif self._stop.requested:
                self._publishing.finish()
                self._checkpoint()
                self._route.release()
                return False
        self._checkpoint()
        self._publisher.finish(self.version, trained=self.trained_versions)
        return True

    def _evaluates_last(self) -> bool:
        """Evaluate the last version until what has arrived is read. Return whether its evaluation has not ended."""
        self._publishing.finish()
        self._evaluator.work(self.version, self.trained_versions, self._config.versions)
        if self._evaluator.in_progress:
            self._ownership.confirm_periodically()
            self._control.at_safe_point(self)
            self._reader.read_all(self.version, timeout_s=POLL_S)
            self.status.waiting_for = self._evaluator.status()
            self.update_status()
        return self._evaluator.in_progress

    def update_status(self) -> None:
        """Report the present state to the HTTP thread and to Prometheus."""
        self.status.update(
            self._ledger, now=time.monotonic(), run=self._run, writer=self._writer.epoch, version=self.version,
            trained_versions=self.trained_versions, versions=self._config.versions,
            settings=self._control.current.generation, paused=self._control.state().paused,
            evaluation=self._evaluator.status() or self._evaluator.result(), last=self._last_line,
        )  # fmt: skip

    def _next_batch(self) -> tuple[list[ReadyGroup[ReceivedTrajectory]], list[list[Row]]] | None:
        """Return the next groups to train on, and their rows; None if a stop is requested."""
        with self._phases.of("wait"):
            timeout_s = 0.0
            first_look: float | None = None
            dropped_before = self._drops.counts()
            while not self._stop.requested:
                self._ownership.confirm_periodically()
                if self._names_the_version():
                    self._publishing.finish()
                if self._publishing.permits("changes"):
                    self._control.at_safe_point(self)
                failpoints.reach("learner.before_reading")
                # read everything before choosing, so that the oldest groups are trained on first
                self._reader.read_all(self.version, timeout_s=timeout_s)
                self._drops.drop_unusable(self.version, now=time.monotonic())
                self._offers_wait = not self._publishing.permits("offers")
                if not self._offers_wait:
                    self._offer()
                self._evaluator.work(self.version, self.trained_versions, self._config.versions)
                evaluates = not self._evaluator.permits_training(self.trained_versions, self._config.versions)
                complete_at = time.monotonic()
                paused_by = self._control.paused_by("training")
                if (
                    not paused_by
                    and not evaluates
                    and self._ledger.peek_batch(self.version)
                    and self._route.take_turn(self.version, self._publishing.digest, stop=lambda: self._stop.requested)
                    and (ready := self._ledger.peek_batch(self.version))
                    and (rows := self._attach_old_logprobs(ready)) is not None
                ):
                    self.status.waiting_for = None
                    self._ledger.take_batch(self.version)  # after the wait, so that a stop during it changes nothing
                    self._adapt(waited_s=0.0 if first_look is None else complete_at - first_look, now=complete_at)
                    return ready, rows
                if first_look is None and not paused_by:
                    first_look = complete_at
                works = self._publishing.permits("scores") and self._route.work(self.version, self._publishing.digest)
                timeout_s = 0.0 if works else POLL_S
                if not self._control.is_paused:
                    self._drops.end_if_hopeless(dropped_before)
                self.update_status()
                self.status.wait_for_batch(
                    self._ledger.complete(), self._config.groups_per_batch, paused_by=paused_by,
                    evaluation=self._evaluator.status() if evaluates else "",
                )  # fmt: skip
        return None

    def _names_the_version(self) -> bool:
        """Whether a change or an evaluation must name the newest version before the next batch is taken."""
        return self._control.has_requests or self._evaluator.begins(self.trained_versions, self._config.versions)

    def _offer(self, taken: int = 0) -> None:
        """Offer the groups that are admitted. taken: groups in training."""
        if not self._control.paused_by("offers"):
            self._tasks.offer(self.version, now=time.monotonic(), taken=taken)

    def _adapt(self, *, waited_s: float, now: float) -> None:
        """Adapt the admission to whether the learner waited for the batch that it takes now."""
        if self._config.admission == "adaptive":
            self._ledger.adapt(waited=waited_s > WAIT_SHARE * (now - self._last_batch))
        self._last_batch = now
        instruments.ADMITTED_GROUPS.set(self._ledger.admitted_groups)

    def _attach_old_logprobs(self, batch: list[ReadyGroup[ReceivedTrajectory]]) -> list[list[Row]] | None:
        """Return the rows of each group with the available old log-probs; None if a stop or a change is requested."""
        low, kind, shape = self._ledger.bound.lowest(self.version), self._config.advantages.kind, self._reader.routes
        groups = [
            to_rows([o.record for o in g.items], kind, lowest=low, baseline=[o.record for o in g.stale], routes=shape)
            for g in batch
        ]
        self.status.waiting_for = "old log-probs of the batch"
        attached = self._route.attach_old_logprobs(
            [row for group in groups for row in group],
            self.version,
            heartbeat=self._ownership.confirm_periodically,
            stop=lambda: self._stop.requested or self._control.has_requests,
        )
        return None if attached is None else regroup(attached, groups)

    def _train(self, batch: list[ReadyGroup[ReceivedTrajectory]], rows: list[list[Row]]) -> None:
        """Train, report, checkpoint and publish one version."""
        now = self.version
        durable = self._config.checkpoint.every == 1  # otherwise a crash may repeat the step, which needs the scores
        training = frozenset(row.trajectory for group in rows for row in group if durable)
        minibatches = split_minibatches(rows, self._config.minibatches, seed=self._seed, version=now)
        order = TrainOrder(now, minibatches, self._config if self._control.current.generation else None)
        with self._phases.of("train"):
            self._publisher.canaries.choose([row for group in rows for row in group])
            self._ranks.broadcast_object((order,))

            def cut() -> None:
                if self._publishing.wait():  # else the error is raised after the step, which the other ranks take too
                    if self._offers_wait:
                        with suppress(Fenced):  # raised by the next `confirm`
                            self._offer(taken=len(batch))
                    self._route.cut(now, self._publishing.digest, training=training)
                self._ranks.broadcast_object(NOTHING)  # ends the scoring of the other ranks, which then step

            result = self._trainer.train(order.minibatches, now, before_first_step=cut)
            trained = merge(self._ranks.gather_shares(result))
        self._publishing.finish()
        failpoints.reach("learner.after_step")
        self._confirm()
        batch, rows = self._drops.bury_failed(batch, rows, trained.rejected)
        for group in batch:
            self._drops.resolve_trained(group.items, lowest=self._ledger.bound.lowest(now))
            self._drops.resolve(DropReason.OVER_STALENESS, group.stale)
        self.version, self.trained_versions = Version(now + 1), self.trained_versions + 1
        records = [arrived.record for group in batch for arrived in group.items]
        stale = [arrived.record for group in batch for arrived in group.stale]
        self._report(Batch(now, self.version, records, rows, stale, self._ledger.bound.lowest(now)), trained)
        state = self._state_now() if self.trained_versions % self._config.checkpoint.every == 0 else None
        self._publishing.publish(self.version, state, now=time.time(), durable=durable)

    def _report(self, batch: Batch, trained: StepResult) -> None:
        if self._config.record:
            self._records.dump.record(batch, trained)
            self._confirm()  # writing the dump may have taken long
        for phase, seconds in (phases := self._phases.take()).items():
            instruments.PHASE_SECONDS.labels(phase).observe(seconds)
        self._last_line = self._records.reporter.line(
            batch, trained, seconds=self._seconds(), phases=phases, learning_rate=self._policy.learning_rate,
            counts=self._ledger.counts(), sampled_tokens=self._reader.sampled_tokens,
            skipped_even=self._drops.take_skipped(), token_fates=self._drops.fates.take(),
            oldest_live_s=self._ledger.oldest_live_age(now=time.monotonic()), stored=self._publishing.stored.take(),
        )  # fmt: skip
        self._last_line["settings"] = self._control.current.generation
        self._history.add(self._last_line)
        export_to_prometheus(self._last_line)
        self.update_status()

    def use_settings(self, config: RunConfig) -> None:
        """Use these settings from now on; see RunControl."""
        self._config = config.learner
        self._ledger.use_bound(self._control.staleness_bound())
        self._drops.admit(most_unresolved(config))
        if config.logs.level != self._log_level:
            self._log_level = config.logs.level
            logs.set_level(self._log_level)
        self._trainer.configure(self._config)
        self._records.reporter.use(RunThresholds.of(self._config))
        self._publisher.canaries.use(self._config.canary_trajectories)
        self._checkpoints.keep(self._config.checkpoint.keep)
        self._ingest.offers.use(self._control.state().temperatures, time_limit_s=config.tasks.time_limit_s)

    @property
    def next_group(self) -> int:
        """Index of the next group to offer; see RunControl."""
        return self._ledger.next_index

    def save_checkpoint(self) -> dict[str, Any]:
        """Save a checkpoint of the newest version, unless there is one; see RunControl."""
        saved = self._checkpoint()
        return {"version": self.version, "digest": self._publishing.digest, "nothing_new": not saved}

    def cut_now(self) -> dict[str, Any]:
        """Cut all live generations and let the workers go on; see RunControl."""
        return self._route.cut_now(self.version, self._publishing.digest)

    def request_stop(self) -> None:
        """End the run after a checkpoint; see RunControl."""
        self._stop.request(ExitCode.STOPPED)

    def _announced(self, version: Version, digest: str) -> None:
        self._route.published(version, digest)
        failpoints.reach("learner.after_publishing")
        self.status.published(version)

    def close(self) -> None:
        """Wait a little for a version that is not announced: the learner ends."""
        self._publishing.close()

    def _state_now(self) -> Checkpoint:
        progress = Progress(
            schema=SCHEMA, run=self._run, writer=self._writer.epoch, version=self.version,
            digest=self._publishing.digest, trained_versions=self.trained_versions, optimizer_steps=self._policy.steps,
            ledger=self._ledger.state(), offsets=self._reader.offsets(), task_offsets=self._tasks.offsets(),
            score_offsets=self._tasks.score_offsets(), history_bytes=self._history.length, seconds=self._seconds(),
            control=self._control.state(), evaluation=self._evaluator.state(),
        )  # fmt: skip
        return Checkpoint(progress, self._policy.state() | self._state.state())

    def _checkpoint(self) -> bool:
        return self._publishing.save(self._state_now())

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
