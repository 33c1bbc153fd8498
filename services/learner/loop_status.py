"""What the learner's loop reports to the HTTP thread and to Prometheus."""

import math
import time
from typing import Any

from palimpsest.common.instruments import HEARTBEAT, AgeGauge
from palimpsest.common.service import Status
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger


class LoopStatus:
    """Snapshots: the HTTP thread must not read collections that the loop changes."""

    def __init__(self) -> None:
        self._waiting: tuple[str | None, float] = ("the start", time.monotonic())
        self.ready = False
        """Whether the loop could train now, also while it waits for trajectories."""
        self._fields: Status = {}
        self._heartbeat = AgeGauge(HEARTBEAT.labels("learner"))
        self._since_version = AgeGauge(instruments.LAST_VERSION)

    @property
    def waiting_for(self) -> str | None:
        """What the loop waits for; None during training."""
        return self._waiting[0]

    @waiting_for.setter
    def waiting_for(self, what: str | None) -> None:
        """Set what the loop waits for."""
        before, since = self._waiting
        self._waiting = (what, since if _kind(what) == _kind(before) else time.monotonic())

    def wait_for_batch(self, complete: int, needed: int, *, paused_by: str | None, evaluation: str) -> None:
        """Set what the loop waits for before it takes a batch. evaluation: the one that must end first, or empty."""
        trajectories = f"trajectories: {complete} of {needed} groups are complete"
        self.waiting_for = f"resume: {paused_by} paused the training" if paused_by else evaluation or trajectories

    def waited_s(self) -> float | None:
        """Return how long the loop has waited for what it waits for; None during training."""
        what, since = self._waiting
        return None if what is None else time.monotonic() - since

    def update(self, ledger: TrajectoryLedger[Any], *, now: float, **fields: Any) -> None:
        """Replace the fields of /v1/status and the series of the ledger. The loop does not change `fields` afterwards.

        now: seconds, of the clock of the offers.
        """
        age = ledger.oldest_live_age(now=now)
        instruments.OLDEST_LIVE.set(math.nan if age is None else age)
        instruments.PENDING.set(ledger.pending())
        instruments.WAITING.set(ledger.waiting())
        oldest = ledger.oldest_open()
        instruments.OLDEST_GROUP.set(ledger.age(oldest, now=now) if oldest else math.nan)
        self._heartbeat.restart()
        self._fields = {
            **fields,
            "trajectories": ledger.counts(),
            "waiting_trajectories": ledger.waiting(),
            "complete_groups": ledger.complete(),
            "oldest_group": oldest,
            "oldest_group_s": round(ledger.age(oldest, now=now), 1) if oldest else None,
        }

    def published(self, version: Version) -> None:
        """Report a version that was published."""
        instruments.VERSION.set(version)
        self._since_version.restart()

    def fields(self) -> Status:
        """Return the fields of /v1/status, as of the last turn of the loop."""
        return self._fields

    def not_ready(self) -> str | None:
        """Return why the loop could not train now; None if it could."""
        return None if self.ready else self.waiting_for


def _kind(what: str | None) -> str | None:
    """Return the part of a text that stays the same during one wait: what is before the counts."""
    return None if what is None else what.partition(":")[0]
