"""What the learner's loop reports to the HTTP thread."""

from palimpsest.common.instruments import HEARTBEAT, AgeGauge
from palimpsest.common.service import Status
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments


class LoopStatus:
    """Snapshots: the HTTP thread must not read collections that the loop changes."""

    def __init__(self) -> None:
        self.waiting_for: str | None = "the start"
        """What the loop waits for; None during training."""
        self.ready = False
        """Whether the loop could train now, also while it waits for trajectories."""
        self._fields: Status = {}
        self._heartbeat = AgeGauge(HEARTBEAT.labels("learner"))
        self._since_version = AgeGauge(instruments.LAST_VERSION)

    def update(self, fields: Status) -> None:
        """Replace the fields of /v1/status. The loop does not change them afterwards."""
        self._fields = fields
        self._heartbeat.restart()

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
