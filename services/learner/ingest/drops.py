"""Drops the trajectories that cannot be trained on, and ends a run in which nothing else arrives."""

from collections.abc import Iterable

from palimpsest.common.logs import logger
from palimpsest.common.messages import DropReason
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.hopeless import refuse_hopeless
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory


class Drops:
    """The drops of one learner. budget: trajectories that may be unresolved at the same time."""

    def __init__(self, ingest: Ingest, *, budget: int) -> None:
        self._ledger, self._reader, self._budget = ingest.ledger, ingest.reader, budget

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

    def resolve(self, reason: DropReason, dropped: Iterable[ReceivedTrajectory]) -> None:
        """Count trajectories that the ledger dropped, and mark their records as done."""
        for arrived in dropped:
            instruments.DROPPED.labels(reason.value).inc()
            logger().info("dropped", trajectory=arrived.record.trajectory, reason=reason.value, newest=arrived.newest)
            self._reader.resolve(arrived)

    def count(self) -> int:
        """Number of trajectories dropped in the run."""
        return sum(self._dropped().values())

    def end_if_hopeless(self, before: int) -> None:
        """Raise UserError if all trajectories are dropped. before: `count` when the wait for a batch began."""
        refuse_hopeless(
            self.count() - before, admitted=self._budget, waiting=self._ledger.waiting(), reasons=self._dropped()
        )

    def _dropped(self) -> dict[str, int]:
        dropped = self._ledger.counts()["dropped"]
        assert isinstance(dropped, dict)
        return dropped
