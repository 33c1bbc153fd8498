"""Resolves trajectories: drops those that cannot be trained on, counts what was trained and lost, and ends a run in
which nothing else arrives."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from palimpsest.common.branches import trajectory_of
from palimpsest.common.bus.decoding import TRAJECTORY
from palimpsest.common.bus.port import Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import TRAJECTORIES, DropReason, encode
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.buffer.groups import ReadyGroup
from palimpsest.services.learner.buffer.hopeless import refuse_even, refuse_hopeless
from palimpsest.services.learner.buffer.token_fates import TokenFates
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory


class Drops:
    """The drops of one learner.

    budget: trajectories that may be unresolved at the same time; skip_even: drop groups whose rewards are all equal.
    """

    def __init__(self, ingest: Ingest, *, budget: int, skip_even: bool = False) -> None:
        self._ledger, self._reader, self._budget, self._skip_even = ingest.ledger, ingest.reader, budget, skip_even
        self._dead_letters, self._skipped = ingest.dead_letters, Counter[str]()
        self.fates = TokenFates()
        """Trained and lost tokens of the trajectories that were resolved."""
        self._untrained = Counter[str]()
        """Trajectory -> trainable tokens of its branches on which the training failed, until it is resolved."""

    def admit(self, budget: int) -> None:
        """Use another number of trajectories that may be unresolved at the same time."""
        self._budget = budget

    def drop_unusable(self, version: Version, *, now: float) -> None:
        """Drop trajectories that are too late, too stale, or in too small a group.

        version: the version to train at; now: seconds, of the clock of the offers.
        """
        for trajectory in self._ledger.expire(now=now):
            logger().warning("dropped", trajectory=trajectory, reason="deadline")
            self._reader.forget(trajectory)
            instruments.DROPPED.labels("deadline").inc()
        self.resolve(DropReason.OVER_STALENESS, self._ledger.drop_stale(version))
        self.resolve(DropReason.GROUP_TOO_SMALL, self._ledger.drop_small())
        for group in self._ledger.drop_even(lambda arrived: arrived.record.reward) if self._skip_even else ():
            self._skipped[group[0].record.environment] += 1
            self.resolve(DropReason.EVEN_GROUP, group)

    def resolve(self, reason: DropReason, dropped: Iterable[ReceivedTrajectory]) -> None:
        """Count trajectories that the ledger dropped, and mark their records as done."""
        for arrived in dropped:
            instruments.DROPPED.labels(reason.value).inc()
            instruments.TRAJECTORY_LENGTHS.labels(reason.value).observe(arrived.sampled_from(0))
            logger().info("dropped", trajectory=arrived.record.trajectory, reason=reason.value, newest=arrived.newest)
            self._reader.resolve(arrived)
            if reason is DropReason.OVER_STALENESS:
                self.fates.add(sampled=arrived.sampled_from(0), trained=0, seconds=arrived.seconds)

    def resolve_trained(self, trained: Iterable[ReceivedTrajectory], *, lowest: int) -> None:
        """Mark the records of trained trajectories as done. lowest: lowest version inside the staleness bound."""
        for arrived in trained:
            self._reader.resolve(arrived)
            instruments.TRAJECTORY_LENGTHS.labels("trained").observe(arrived.sampled_from(0))
            trained_tokens = arrived.sampled_from(lowest) - self._untrained.pop(arrived.record.trajectory, 0)
            self.fates.add(sampled=arrived.sampled_from(0), trained=trained_tokens, seconds=arrived.seconds)

    def bury_failed(
        self, batch: list[ReadyGroup[ReceivedTrajectory]], rows: list[list[Row]], failed: Mapping[str, str]
    ) -> tuple[list[ReadyGroup[ReceivedTrajectory]], list[list[Row]]]:
        """Take out the rows of a trained batch on which the training failed. Return the batch and rows without them.

        A trajectory is dead-lettered if none of its other rows has a trainable token; a session with another branch to
        train on stays trained. failed: row, by the name of its trajectory or branch -> error text. Raises Fenced, and
        UserError if no trajectory is left.
        """
        left = [[row for row in group if row.trajectory not in failed] for group in rows]
        usable = {trajectory_of(row.trajectory) for group in left for row in group if (row.versions >= 0).any()}
        trainable = {row.trajectory: int((row.versions >= 0).sum()) for group in rows for row in group}
        buried: dict[str, str] = {}
        for name, error in failed.items():
            if (trajectory := trajectory_of(name)) in usable:
                self._untrained[trajectory] += trainable[name]
                instruments.FAILED_BRANCHES.inc()
                logger().warning("branch not trained on", branch=name, reason=error)
            else:
                buried[trajectory] = error
        if buried and all(one.record.trajectory in buried for group in batch for one in group.items):
            raise UserError(
                f"a pass fails on every trajectory of the batch, so the cause is probably not in the records: "
                f"{next(iter(buried.values()))}. Check the model (model.path) and the device",
                ExitCode.CRASHED,
            )
        for arrived in (arrived for group in batch for arrived in group.items if arrived.record.trajectory in buried):
            record, name = arrived.record, arrived.record.trajectory
            self._dead_letters.write(
                Record(
                    TRAJECTORIES, arrived.partition, arrived.offset, record.group, encode(record), {TRAJECTORY: name}
                ),
                RejectedRecord(RejectCause.FORWARD_FAILED, buried[name]),
            )
            self._ledger.bury()
            self._reader.resolve(arrived)
        return (
            [
                replace(group, items=[one for one in group.items if one.record.trajectory not in buried])
                for group in batch
            ],
            [[row for row in group if trajectory_of(row.trajectory) not in buried] for group in left],
        )

    def counts(self) -> dict[str, int]:
        """Number of trajectories dropped in the run, by reason."""
        dropped = self._ledger.counts()["dropped"]
        assert isinstance(dropped, dict)
        return dropped

    def end_if_hopeless(self, before: Mapping[str, int]) -> None:
        """Raise UserError if no batch can be expected. before: `counts` when the wait for a batch began."""
        reasons = self.counts()
        new = {reason: number - before.get(reason, 0) for reason, number in reasons.items()}
        even = new.pop(DropReason.EVEN_GROUP.value, 0)
        refuse_hopeless(
            sum(new.values()),
            admitted=self._budget,
            waiting=self._ledger.waiting(),
            reasons=reasons,
            detail=self._reader.dropped_because,
        )
        refuse_even(even, admitted=self._budget)

    def take_skipped(self) -> dict[str, int]:
        """Return the groups skipped since the last call because their rewards are equal, by environment."""
        skipped, self._skipped = dict(self._skipped), Counter()
        return skipped
