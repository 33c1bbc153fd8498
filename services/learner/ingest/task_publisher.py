"""Publishes tasks: the groups that the ledger admits, to be sampled by the workers."""

from collections.abc import Callable, Mapping

from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    OLD_LOGPROBS,
    TASKS,
    GroupOffered,
    encode,
    group_id,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.offers import OfferSettings, check_own
from palimpsest.services.learner.ingest.read_offers import read_offers
from palimpsest.services.learner.ingest.resume import no_records_skipped
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.ingest.watermarks import ScoreWatermarks


class TaskPublisher:
    """Offers groups on topic `tasks`.

    `confirm` raises Fenced unless the run still belongs to this learner. A learner that was replaced would offer its
    successor's groups a second time. epoch: of this learner. control: checks the offers that are adopted.
    """

    def __init__(
        self,
        bus: Bus,
        ledger: TrajectoryLedger[ReceivedTrajectory],
        offers: OfferSettings,
        *,
        run: str,
        confirm: Callable[[], None],
        epoch: Callable[[], int],
        control: ControlCheck,
    ) -> None:
        self._bus, self._ledger, self._offers, self._run, self._confirm = bus, ledger, offers, run, confirm
        self._epoch, self._control = epoch, control
        self._scores, self._watermarks = bus.consumer(OLD_LOGPROBS), ScoreWatermarks()
        self._task_ends: dict[int, int] = {}

    def start(self, task_offsets: Mapping[int, int], score_offsets: Mapping[int, int], *, now: float) -> None:
        """Start from a checkpoint's offsets ({}: the start of the topic) and adopt the groups offered after it.

        Restore the ledger first. Raises UserError if the log starts after these offsets.
        """
        with no_records_skipped():
            self._adopt(task_offsets, now)
            self._scores.seek(score_offsets)
            self._watermarks.start(score_offsets)

    def offer(self, newest: Version, *, now: float, taken: int = 0) -> int:
        """Offer as many groups as the ledger admits, to be sampled by `newest` or later. Return the number of groups.

        taken: groups of a batch whose step has not changed the weights; they count as unresolved.
        """
        if slots := max(0, self._ledger.free_slots() - taken):
            self._confirm()
            self._watermarks.offer(self._ledger.next_index, self._scores.ends())
        offers = [self._next_offer(newest, now) for _ in range(slots)]
        for at in self._bus.publish(TASKS, [Outgoing(offer.group, encode(offer)) for offer in offers]):
            self._task_ends[at.partition] = max(self._task_ends.get(at.partition, 0), at.offset + 1)
        instruments.OFFERED.inc(self._offers.next.samples * len(offers))
        return len(offers)

    def offsets(self) -> dict[int, int]:
        """Topic `tasks`: partition -> offset after the last task of the groups in the ledger, for a checkpoint."""
        return dict(self._task_ends)

    def score_offsets(self) -> dict[int, int]:
        """Topic `old_logprobs`: records before these offsets belong to resolved trajectories. {}: any record may count.

        For a checkpoint.
        """
        oldest = self._ledger.oldest_open()
        return self._watermarks.offsets(self._ledger.next_index if oldest is None else int(oldest[1:]))

    def close(self) -> None:
        """Close the consumer."""
        self._scores.close()

    def _next_offer(self, newest: Version, now: float) -> GroupOffered:
        index, settings = self._ledger.next_index, self._offers.next
        environment, task_seed = settings.task(index)
        return GroupOffered(
            run=self._run,
            group=self._ledger.offer(now=now, time_limit_s=settings.time_limit_s),
            index=index,
            version=newest,
            environment=environment,
            task_seed=task_seed,
            samples=settings.samples,
            sampling=settings.sampling,
            time_limit_s=settings.time_limit_s,
            writer=self._epoch(),
        )

    def _adopt(self, task_offsets: Mapping[int, int], now: float) -> None:
        """Enter the groups that were offered after the checkpoint into the ledger, in their order."""
        offers, self._task_ends = read_offers(self._bus, self._run, task_offsets)
        offered = {offer.index for offer in offers if not offer.evaluation and self._is_ours(offer)}
        while self._ledger.next_index in offered:
            group = group_id(self._ledger.next_index)
            self._ledger.offer(now=now)
            logger().debug("adopted", group=group)

    def _is_ours(self, offer: GroupOffered) -> bool:
        """Whether a learner of this run made the offer. An offer without an epoch, as earlier releases wrote it, counts
        if it is exactly what this run offers."""
        try:
            self._control.check_offer(offer, history=True)
            check_own(offer, self._offers)
        except RejectedRecord as error:
            logger().warning("offer not adopted", group=offer.group[:32], reason=str(error))
            return False
        return True
