"""The settings of a worker that people change while its run is running."""

from palimpsest.common import logs
from palimpsest.common.config.settings import LOG_LEVEL, MAX_LIVE
from palimpsest.common.logs import logger
from palimpsest.common.messages import ControlChanged
from palimpsest.services.rollout.slots import Slots


class LiveSettings:
    """Applies changes of settings. A worker that starts reads all changes of the run."""

    def __init__(self, slots: Slots, *, max_live: int) -> None:
        """max_live: trajectories for which the engine was started; a change cannot raise it."""
        self._slots, self._max_live = slots, max_live
        self._newest = (0, 0)
        """Number and writer of the newest change that was applied."""

    def use(self, change: ControlChanged) -> None:
        """Use those settings of a change that concern a worker."""
        if not change.follows(*self._newest):
            return
        self._newest = (change.number, change.writer)
        if (size := change.after.get(MAX_LIVE)) is not None:
            self._slots.resize(min(int(size), self._max_live))
            logger().info("setting", key=MAX_LIVE, value=size, by=change.who)
        if (level := change.after.get(LOG_LEVEL)) is not None:
            logs.set_level(str(level))
