"""Confirms with the store that the run still belongs to this learner."""

import time
from collections.abc import Callable

from palimpsest.common.snapshots.writer import Writer

CONFIRM_S = 2.0
"""Seconds between checks that the run still belongs to this learner, while it waits. After a suspension the last check
is older than this, so the learner checks before it reads again."""


class Ownership:
    """The checks of one learner. renew: called with each periodic check, to take the lease again."""

    def __init__(self, writer: Writer, renew: Callable[[], None]) -> None:
        self._writer, self._renew = writer, renew
        self._confirmed = time.monotonic()

    def confirm(self) -> None:
        """Raise Fenced if another learner took over the run."""
        self._writer.confirm()
        self._confirmed = time.monotonic()

    def confirm_periodically(self) -> None:
        """Confirm, if the last check is older than CONFIRM_S."""
        if time.monotonic() - self._confirmed > CONFIRM_S:
            self.confirm()
            self._renew()
